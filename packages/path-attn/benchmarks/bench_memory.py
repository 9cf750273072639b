"""Peak memory of one forward, and of one forward with backward."""

import sys

from path_attn.bench import main
from tenfold_common.cli import run

if __name__ == "__main__":
    sys.exit(run(main, ["memory", *sys.argv[1:]]))
