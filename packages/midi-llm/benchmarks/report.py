"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import sys
from pathlib import Path
from typing import Any

from tenfold_common.cli import run
from tenfold_common.readme import link, machine, newest, update_readmes
from tenfold_common.results import Result, claims_table, load_bench, markdown_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
READMES = {  # the file, the way from it to benchmarks/, and the tables in it
    HERE.parent / "README.md": ("benchmarks/", ("demo",)),
    HERE / "README.md": ("", ("music", "engines")),
}


def demo_table(path: Path) -> str:
    """What the demo found."""
    result = Result.load(path)
    parts = [f"{result.summary} Seeds {', '.join(map(str, result.seeds))}."]
    for one in result.tables:
        parts += [f"{one.title}:", markdown_table(one.columns, one.rows)]
    return "\n\n".join([*parts, claims_table(result.claims)])


def music_table(path: Path) -> str:
    """Every row, with its rate or ratio, and the notes."""
    bench = load_bench(path)
    rows = [
        [row["name"], row["shape"], row["impl"], f"{row['median_ms']:,.2f}", _facts(row["extra"])]
        for row in bench["rows"]
    ]
    table = markdown_table(["what", "size", "by", "ms", ""], rows)
    notes = "\n".join(f"- {note}" for note in bench["notes"])
    return f"{table}\n\n{notes}\n\n{machine(bench)}; `{bench['command']}`."


def engines_table(path: Path) -> str:
    """Every row: model and number of prompts, engine, rates."""
    bench = load_bench(path)
    columns = ["model", "engine", "ms", "notes/s", "over the peer", "seconds of music a second"]
    rows = [
        [
            row["shape"], row["impl"],
            f"{row['median_ms']:,.0f} ({row['p20_ms']:,.0f} to {row['p80_ms']:,.0f})",
            f"{row['extra']['notes_a_second']:,.0f}", f"{row['extra']['over_the_peer']:.2f}x",
            f"{row['extra']['seconds_of_music']:,.1f}",
        ]
        for row in bench["rows"]
    ]  # fmt: skip
    notes = "\n".join(f"- {note}" for note in bench["notes"])
    table = markdown_table(columns, rows)
    return f"{table}\n\n{notes}\n\n{machine(bench)}; `{bench['command']}`."


def _facts(extra: dict[str, Any]) -> str:
    texts = {
        "notes_a_second": "{:,.0f} notes/s",
        "over_the_peer": "{:.1f}x the peer",
        "ours_over_it": "ours is {:.1f}x as fast",
        "times_as_fast": "{:.1f}x as fast as the whole head",
        "over_without": "{:.3f} of the time without",
    }
    return ", ".join(texts[name].format(value) for name, value in extra.items())


TABLES = {"demo": demo_table, "music": music_table, "engines": engines_table}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    path = newest(RESULTS, kind)
    return f"{TABLES[kind](path)}\n\n{link(path, folder)}"


if __name__ == "__main__":
    sys.exit(run(lambda argv: update_readmes(argv, READMES, text_of, HERE.parent)))
