"""What importing each module costs over bare Python, each measured in fresh processes.

Run: python benchmarks/bench_import.py --json benchmarks/results/import_<hw>_<yyyymmdd>.json
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from tenfold_common import __version__, update_between_markers, write_bench

MODULES = [
    *("atomic", "cli", "device", "errors", "optional", "report"),
    *("results", "seed", "testing", "tiny", "lm"),
]
LIMIT_MS = 50.0
FOREIGN = "print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"


def seconds(code: str) -> float:
    """Run a program in a fresh interpreter and return its processor time, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print one line for each module and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--readme", type=Path, help="write the table between its import markers")
    args = parser.parse_args()
    names = ["tenfold_common", *(f"tenfold_common.{module}" for module in MODULES)]
    heavy = subprocess.run(
        [sys.executable, "-c", f"import sys, {', '.join(names)}; {FOREIGN}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    if heavy != "[]":
        sys.exit(f"an import pulls in {heavy}; no numbers")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats):  # bare Python beside every module, in the same round
        for name in names:
            bare = seconds("pass")
            times[name].append(1e3 * (seconds(f"import {name}") - bare))
    rows = []
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        median = max(0.0, statistics.median(values))
        row = {"name": name, "impl": "tenfold-common", "shape": "-", "dtype": "-", "n": len(values)}
        row |= {"median_ms": median, "p20_ms": max(0.0, low), "p80_ms": max(0.0, high)}
        rows.append({**row, "limit": LIMIT_MS, "fraction_of_limit": median / LIMIT_MS})
        print(f"{name:26} {median:6.1f} ms")
    write_bench(
        args.json,
        package="tenfold-common",
        version=__version__,
        command="python benchmarks/bench_import.py --json FILE --readme README.md",
        correctness={"gate": "no import of torch, transformers, numpy or rich", "max_err": None},
        rows=rows,
        notes=["processor time (user and system) over that of bare Python; the limit is in ms"],
    )
    if args.readme:
        lines = [f"| `{row['name']}` | {row['median_ms']:.1f} |" for row in rows]
        table = "\n".join(["| import | ms |", "|---|---|", *lines])
        update_between_markers(args.readme, "import", table)


if __name__ == "__main__":
    main()
