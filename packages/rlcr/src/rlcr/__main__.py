"""`python -m rlcr`: the same as the command `rlcr`."""

import sys

from rlcr.cli import main

if __name__ == "__main__":
    sys.exit(main())
