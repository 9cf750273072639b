"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from flashformer.peers import EAGER, LLAMA, OURS, STATIC
from tenfold_common.cli import run
from tenfold_common.readme import link, machine, newest, update_readmes
from tenfold_common.results import Result, claims_table, load_bench, markdown_table, show_cell

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
VLLM = "vLLM"
PEERS = (EAGER, STATIC, LLAMA, VLLM)
SHORT = "context 64"
ONE, TWO = f"{OURS}, 1 thread", f"{OURS}, 2 threads"

Times = dict[tuple[str, str, str, str], dict[str, Any]]  # size, context, implementation, format


class Aim(NamedTuple):
    """How many times as fast as a peer ours wants to be.

    Attributes:
        size: Of the model.
        format: Of ours.
        peer: Its name.
        theirs: Its format.
        times: At least so many.
    """

    size: str
    format: str
    peer: str
    theirs: str
    times: float


AIMS = (
    Aim("5M", "bf16", EAGER, "bf16", 15),
    Aim("100M", "bf16", EAGER, "bf16", 2),
    Aim("100M", "int8", EAGER, "bf16", 4),
    *(Aim(size, "bf16", STATIC, "bf16", 1.5) for size in ("5M", "30M", "100M")),
    *(Aim("5M", format, LLAMA, format, 2) for format in ("bf16", "int8", "int4")),
    *(Aim("30M", format, LLAMA, format, 1.2) for format in ("bf16", "int8", "int4")),
    Aim("100M", "bf16", LLAMA, "bf16", 1),
    *(Aim("100M", format, LLAMA, format, 1.25) for format in ("int8", "int4")),
)
SHARES = {"bf16": 0.85, "int8": 0.85, "int4": 0.7}  # of the streaming bandwidth, 100M and above
AIMED = ("context 64", "context 512")
TOLERANCE = 1.05  # two threads against one: what is within it is the same


def speed_table(path: Path) -> str:
    """Ours and the peers at the shortest context."""
    return _speed(load_bench(path), {SHORT})


def decode_table(path: Path) -> str:
    """Ours and the peers at all contexts, and what there is to know about it."""
    bench = load_bench(path)
    notes = "\n".join(f"- {note}" for note in bench["notes"])
    return f"{_speed(bench, None)}\n\n{notes}"


def _speed(bench: dict[str, Any], contexts: set[str] | None) -> str:
    times = by_place(bench["rows"])
    peers = [p for p in PEERS if any(impl == p for _, _, impl, _ in times)]
    lines = []
    for (size, context, impl, format), row in times.items():
        if impl != OURS or (contexts and context not in contexts):
            continue
        cells = []
        for peer in peers:
            theirs = times.get((size, context, peer, format))
            if theirs is None and peer != LLAMA:  # nothing below 16 bits there
                theirs = times.get((size, context, peer, "bf16"))
            cells.append("-" if theirs is None else _beside(theirs["median_ms"], row["median_ms"]))
        lines.append(
            [
                *(size, context.removeprefix("context "), format, f"{row['median_ms']:.3f}"),
                f"{row['extra']['tokens_per_second']:,.0f}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['fraction_of_limit']:.0%}",
                *cells,
            ]
        )
    heads = ["model", "context", "weights", "ours, ms", "tokens/s", "MB a token", "of bandwidth"]
    return markdown_table([*heads, *(f"{peer}, ms" for peer in peers)], lines)


def _beside(theirs: float, ours: float) -> str:
    return f"{theirs:.{2 if theirs < 10 else 1}f} ({theirs / ours:.3g}x)"


def by_place(rows: list[dict[str, Any]]) -> Times:
    """The rows of decoding by size, context, implementation and format."""
    found = {}
    for row in rows:
        if row["name"] == "decode":
            size, context = row["shape"].split(", ")
            found[size, context, row["impl"], row["dtype"]] = row
    return found


def aims_table(path: Path) -> str:
    """What was aimed at and what was reached; the least of the contexts 64 and 512."""
    bench = load_bench(path)
    times = by_place(bench["rows"])
    lines = [line for aim in AIMS if (line := _compared(times, aim))]
    for format, share in SHARES.items():
        for size in ("100M", "360M"):
            found = [
                row["fraction_of_limit"]
                for (s, context, impl, f), row in times.items()
                if (s, impl, f) == (size, OURS, format) and context in AIMED
            ]
            if found:
                what = f"{size} {format}: of the streaming bandwidth"
                lines.append(_line(what, f"{share:.0%}", f"{min(found):.0%}", min(found) >= share))
    slower = [
        row["median_ms"] / times[size, context, ONE, format]["median_ms"]
        for (size, context, impl, format), row in times.items()
        if impl == OURS and (size, context, ONE, format) in times
    ]
    if slower:
        worst = max(slower)
        lines.append(
            _line(
                "two threads to choose from: time over that of one thread, the worst",
                f"at most {TOLERANCE}", f"{worst:.2f}", worst <= TOLERANCE,
            )
        )  # fmt: skip
    for row in bench["rows"]:
        over = row.get("extra", {}).get("over_fair")
        if over is not None:
            size = row["shape"].split(", ")[0]
            what = f"{size} {row['dtype']} {row['impl']}: time over that of the fair share"
            lines.append(_line(what, "at most 3", f"{over:.2f}", over <= 3))
    return markdown_table(["aim", "wanted", "measured", "reached"], lines)


def _compared(times: Times, aim: Aim) -> list[str] | None:
    found = []
    for context in AIMED:
        ours = times.get((aim.size, context, OURS, aim.format))
        theirs = times.get((aim.size, context, aim.peer, aim.theirs))
        if ours and theirs:
            found.append(theirs["median_ms"] / ours["median_ms"])
    if not found:
        return None
    theirs = "" if aim.theirs == aim.format else f" {aim.theirs}"
    what = f"{aim.size} {aim.format}: times as fast as {aim.peer}{theirs}"
    return _line(what, f"{aim.times:g}", f"{min(found):.3g}", min(found) >= aim.times)


def _line(what: str, wanted: str, measured: str, reached: bool) -> list[str]:
    return [what, wanted, measured, show_cell(reached)]


def calls_table(path: Path) -> str:
    """What calls cost."""
    bench = load_bench(path)
    rows = [row for row in bench["rows"] if row["name"] == "calls"]
    best = {}
    for row in rows:
        best[row["shape"]] = min(row["median_ms"], best.get(row["shape"], row["median_ms"]))
    lines = []
    for row in rows:
        ms, over = row["median_ms"], row["median_ms"] / best[row["shape"]]
        lines.append([row["shape"], row["impl"], f"{ms:.3f}", f"{over:.2f}"])
    return markdown_table(["model", "calls", "ms a token", "over the fastest"], lines)


def demo_table(path: Path) -> str:
    """The demo's tables and claims."""
    result = Result.load(path)
    parts = [result.summary]
    for one in result.tables:
        parts += [f"{one.title}:", markdown_table(one.columns, one.rows)]
    return "\n\n".join([*parts, claims_table(result.claims)])


TABLES = {  # the table, and the kind of file it is made from
    "demo": (demo_table, "demo"),
    "speed": (speed_table, "decode"),
    "decode": (decode_table, "decode"),
    "aims": (aims_table, "decode"),
    "calls": (calls_table, "decode"),
}
READMES = {  # the file, the way from it to benchmarks/, and the tables in it
    HERE.parent / "README.md": ("benchmarks/", ("demo", "speed")),
    HERE / "README.md": ("", ("decode", "aims", "calls")),
}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    make, files = TABLES[kind]
    path = newest(RESULTS, files)
    line = link(path, folder)
    if files == "decode":
        bench = load_bench(path)
        line += f": {machine(bench)}; made by `{bench['command']}`."
    return f"{make(path)}\n\n{line}"


if __name__ == "__main__":
    sys.exit(run(lambda argv: update_readmes(argv, READMES, text_of, HERE.parent)))
