"""Forward and backward time against SDPA with RoPE, the global form and fla's reference."""

import sys

from path_attn.bench import main
from tenfold_common.cli import run

if __name__ == "__main__":
    sys.exit(run(main, ["attention", *sys.argv[1:]]))
