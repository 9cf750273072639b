"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import json
import sys
from pathlib import Path
from typing import Any

from tenfold_common.cli import run
from tenfold_common.errors import UserError
from tenfold_common.results import Result, load_bench, update_between_markers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
READMES = {  # the file, the way from it to benchmarks/, and the tables in it
    HERE.parent / "README.md": ("benchmarks/", ("demo", "human")),
    HERE / "README.md": ("", ("scoring", "rsa")),
}
SHARING = (
    "score",
    "score_many",
    "sample",
)  # of tenfold_common.lm, what listeners and speakers call
PEOPLE = {
    "humans": "mean of 40 people",
    "half": "mean of 20 people",
    "single_human": "one person",
    "always_50": "always 50",
    "random_guess": "a random guess",
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
    ours = {(row["name"], row["shape"]): row["median_ms"] for row in bench["rows"] if _is_ours(row)}
    rows = []
    for row in bench["rows"]:
        own = ours.get((row["name"], row["shape"]))
        mine = _is_ours(row)
        ratio = "" if own is None or mine else f"{row['median_ms'] / own:.1f}"
        rows.append([row["name"], row["shape"], row["impl"], _ms(row["median_ms"]), ratio])
    env = bench["environment"]
    threads = f"{env['threads']} threads, " if env["threads"] else ""
    line = f"{env['cpu']}, {threads}torch {env['torch']}; `{bench['command']}`."
    body = table(["what", "size", "by", "ms", "time over ours"], rows)
    return "\n\n".join([body, "\n".join(f"- {note}" for note in bench["notes"]), line])


def _is_ours(row: dict[str, Any]) -> bool:
    return row["impl"].startswith("wavelength_rsa") or row["impl"] in SHARING


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def demo_table(path: Path) -> str:
    """The demo's speakers, the error by number of clues, and the claims."""
    result = Result.load(path)
    claims = [
        [c.name, c.claimed, f"{c.measured:.4g}", c.expected, "PASS" if c.passed else "FAIL"]
        for c in result.claims
    ]
    parts = [f"{result.summary} Seeds {', '.join(map(str, result.seeds))}."]
    for one in result.tables[1:3]:
        cells = [[_cell(x) for x in row] for row in one.rows]
        parts += [f"{one.title}:", table(one.columns, cells)]
    return "\n\n".join(
        [*parts, table(["claim", "claimed", "measured", "expected", "result"], claims)]
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def human_table(path: Path) -> str:
    """What people reach, and what RSA on top of their answers changes."""
    found = json.loads(path.read_text(encoding="utf-8"))
    people, pragmatic = found["baseline"]["rows"], found["rsa"]
    columns = ["mean_error", "rmse", "crps", "pearson"]
    rows = [
        [name, *(_interval(people[key].get(column)) for column in columns)]
        for key, name in PEOPLE.items()
    ]
    names = ["mean_error", "expected_distance", "log_likelihood", "w1"]
    literal = ["L0"] + [_interval(pragmatic["literal"][name], signed=False) for name in names]
    changes = [
        [f"L1 - L0, alpha {row['alpha']:g}"]
        + [_interval(row["difference"][name], signed=True) for name in names]
        for row in pragmatic["pragmatic"]
    ]
    head = ["points, 95 % interval", *(c.replace("_", " ") for c in columns)]
    reason = [
        "RSA on half of the answers, scored on the target and on the other half",
        *(n.replace("_", " ") for n in names),
    ]
    return "\n\n".join([table(head, rows), table(reason, [literal, *changes])])


def _interval(value: dict[str, Any] | None, *, signed: bool = False) -> str:
    if value is None or value["value"] is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{value['value']:{sign}.2f}"
    if value["low"] is None:
        return text
    return f"{text} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"


TABLES = {"demo": demo_table, "human": human_table, "scoring": bench_table, "rsa": bench_table}


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
