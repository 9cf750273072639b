"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import sys
from functools import partial
from pathlib import Path

from tenfold_common.cli import run
from tenfold_common.readme import bench_table, link, newest, update_readmes
from tenfold_common.results import Result, claims_table, markdown_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
KINDS = ("demo", "rewards", "metrics", "step")
READMES = {  # the file, the way from it to benchmarks/, and the tables in it
    HERE.parent / "README.md": ("benchmarks/", KINDS[:1]),
    HERE / "README.md": ("", KINDS),
}


def demo_table(path: Path) -> str:
    """The demo's table and claims."""
    result = Result.load(path)
    first, votes = result.tables[0], result.tables[2]
    return "\n\n".join(
        [
            markdown_table(first.columns, first.rows),
            claims_table(result.claims),
            f"{votes.title}: " + ", ".join(f"{row[0]} {row[1]}" for row in votes.rows) + ".",
        ]
    )


SPEED = partial(bench_table, ours=lambda row: row["impl"].startswith("rlcr"))
TABLES = {"demo": demo_table, "rewards": SPEED, "metrics": SPEED, "step": SPEED}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    path = newest(RESULTS, kind)
    return f"{TABLES[kind](path)}\n\n{link(path, folder)}"


if __name__ == "__main__":
    sys.exit(run(lambda argv: update_readmes(argv, READMES, text_of, HERE.parent)))
