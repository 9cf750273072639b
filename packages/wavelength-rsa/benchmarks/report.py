"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tenfold_common.cli import run
from tenfold_common.readme import bench_table, link, newest, update_readmes
from tenfold_common.results import Result, claims_table, markdown_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
READMES = {  # the file, the way from it to benchmarks/, and the tables in it
    HERE.parent / "README.md": ("benchmarks/", ("demo", "human")),
    HERE / "README.md": ("", ("scoring", "rsa")),
}
# Of tenfold_common.lm, what listeners and speakers call.
SHARING = ("score", "score_many", "sample")
PEOPLE = {
    "humans": "mean of 40 people",
    "half": "mean of 20 people",
    "single_human": "one person",
    "always_50": "always 50",
    "random_guess": "a random guess",
}


def demo_table(path: Path) -> str:
    """The demo's speakers, the error by number of clues, and the claims."""
    result = Result.load(path)
    parts = [f"{result.summary} Seeds {', '.join(map(str, result.seeds))}."]
    for one in result.tables[1:3]:
        parts += [f"{one.title}:", markdown_table(one.columns, one.rows)]
    return "\n\n".join([*parts, claims_table(result.claims)])


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
    return "\n\n".join([markdown_table(head, rows), markdown_table(reason, [literal, *changes])])


def _interval(value: dict[str, Any] | None, *, signed: bool = False) -> str:
    if value is None or value["value"] is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{value['value']:{sign}.2f}"
    if value["low"] is None:
        return text
    return f"{text} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"


def _is_ours(row: dict[str, Any]) -> bool:
    return row["impl"].startswith("wavelength_rsa") or row["impl"] in SHARING


SPEED = partial(bench_table, ours=_is_ours, ratio=".1f", whole=",.0f")
TABLES = {"demo": demo_table, "human": human_table, "scoring": SPEED, "rsa": SPEED}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    path = newest(RESULTS, kind)
    return f"{TABLES[kind](path)}\n\n{link(path, folder)}"


if __name__ == "__main__":
    sys.exit(run(lambda argv: update_readmes(argv, READMES, text_of, HERE.parent)))
