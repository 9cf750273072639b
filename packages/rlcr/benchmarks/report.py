"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import sys
from pathlib import Path

from tenfold_common.cli import run
from tenfold_common.errors import UserError
from tenfold_common.results import Result, load_bench, update_between_markers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
KINDS = ("demo", "rewards", "metrics", "step")
READMES = {  # the file, the way from it to benchmarks/, and the tables in it
    HERE.parent / "README.md": ("benchmarks/", KINDS[:1]),
    HERE / "README.md": ("", KINDS),
}


def newest(kind: str) -> Path | None:
    """The newest result of a kind; file names end in the date."""
    found = sorted(RESULTS.glob(f"{kind}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1])
    return found[-1] if found else None


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    columns = [column.replace("|", "\\|") for column in columns]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def bench_table(path: Path) -> str:
    """Every row: what, by whom, milliseconds, and the peer's time over ours."""
    bench = load_bench(path)
    ours = {
        (row["name"], row["shape"]): row["median_ms"]
        for row in bench["rows"]
        if row["impl"].startswith("rlcr")
    }
    rows = []
    for row in bench["rows"]:
        own = ours.get((row["name"], row["shape"]))
        mine = row["impl"].startswith("rlcr")
        ratio = "" if own is None or mine else f"{row['median_ms'] / own:.2f}"
        rows.append([row["name"], row["shape"], row["impl"], _ms(row["median_ms"]), ratio])
    env = bench["environment"]
    threads = f"{env['threads']} threads, " if env["threads"] else ""
    line = f"{env['cpu']}, {threads}torch {env['torch']}; `{bench['command']}`."
    body = table(["what", "size", "by", "ms", "time over ours"], rows)
    return "\n\n".join([body, "\n".join(f"- {note}" for note in bench["notes"]), line])


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def demo_table(path: Path) -> str:
    """The demo's table and claims."""
    result = Result.load(path)
    rows = [
        [c.name, c.claimed, f"{c.measured:.4g}", c.expected, "PASS" if c.passed else "FAIL"]
        for c in result.claims
    ]
    first, votes = result.tables[0], result.tables[2]
    return "\n\n".join(
        [
            table(first.columns, [[_cell(x) for x in row] for row in first.rows]),
            table(["claim", "claimed", "measured", "expected", "result"], rows),
            f"{votes.title}: " + ", ".join(f"{row[0]} {row[1]}" for row in votes.rows) + ".",
        ]
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


TABLES = {
    "demo": demo_table,
    "rewards": bench_table,
    "metrics": bench_table,
    "step": bench_table,
}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    path = newest(kind)
    if path is None:
        raise UserError(f"results/ has no {kind}_<hardware>_<yyyymmdd>.json")
    return f"{TABLES[kind](path)}\n\n[{path.name}]({folder}results/{path.name})"


def main(argv: list[str]) -> int:
    """Rewrite both files."""
    if argv:
        raise UserError(f"report.py takes no arguments, got {' '.join(argv)}")
    for readme, (folder, kinds) in READMES.items():
        for kind in kinds:
            changed = update_between_markers(readme, kind, text_of(kind, folder))
            print(
                f"{readme.relative_to(HERE.parent)}: {kind} {'updated' if changed else 'as it was'}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
