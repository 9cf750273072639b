"""Time of a decode step: lazily folded, rewritten each token, plain softmax."""

import sys

from path_attn.bench import main
from tenfold_common.cli import run

if __name__ == "__main__":
    sys.exit(run(main, ["decode", *sys.argv[1:]]))
