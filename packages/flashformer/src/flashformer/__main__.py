"""`python -m flashformer`: the same as the command `flashformer`."""

import sys

from flashformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
