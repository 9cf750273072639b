"""`python -m path_attn`: the same as the command `path-attn`."""

import sys

from path_attn.cli import main

if __name__ == "__main__":
    sys.exit(main())
