"""Time of the metrics and votes against scikit-learn, netcal and torchmetrics, on one CPU thread.

Every group runs in one process, in turns, after a check that the results agree. The limit beside
each number is one numpy sort of the same million confidences, measured in the same run; ECE needs
no sort and may be faster.
"""

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rlcr import metrics, scaling
from rlcr._version import __version__
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.results import write_bench

DESCRIPTION = "Time of metrics and votes against scikit-learn, netcal and torchmetrics."
POINTS, BINS = 10**6, 10
BOOT_POINTS, RESAMPLES = 5000, 1000
PROMPTS, SAMPLES = 10**5, 16
TOLERANCE = 1e-6  # torchmetrics adds up in float32

Calls = dict[str, Callable[[], object]]


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_metrics.py", DESCRIPTION, __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default: 9)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers' imports
        groups, worst = prepare()
    limit = median(in_turns({"sort": groups["sort"][1]["numpy.sort"]}, args.repeats)["sort"])
    rows = []
    for name, (shape, calls) in groups.items():
        for impl, seconds in in_turns(calls, args.repeats).items():
            row = {"name": name, "impl": impl, "shape": shape, "dtype": "float64"}
            row |= quantiles(seconds)
            if shape.startswith(f"n{POINTS}"):
                row |= {
                    "achieved": median(seconds) * 1e3,
                    "limit": limit * 1e3,
                    "fraction_of_limit": limit / median(seconds),
                }
            rows.append(row)
            print(f"{name:<12} {shape:<24} {impl:<28} {row['median_ms']:10.2f} ms")
    if args.json:
        write_bench(
            args.json,
            package="rlcr",
            version=__version__,
            command=f"bench_metrics.py --repeats {args.repeats}",
            correctness={
                "gate": f"ECE and AUROC equal the peers' to {TOLERANCE}, votes a loop over prompts",
                "max_err": worst,
            },
            rows=rows,
            notes=[
                "achieved: median in ms; limit: one numpy.sort of the same points, in ms.",
                "Input checks are part of every time; torchmetrics is shown with and without its.",
                f"bootstrap: intervals of accuracy, Brier, ECE and AUROC at once, {RESAMPLES} "
                "resamples.",
            ],
        )
    return 0


def prepare() -> tuple[dict[str, tuple[str, Calls]], float]:
    """Make inputs and calls, and the largest difference between results that must agree."""
    from netcal.metrics import ECE
    from sklearn.metrics import roc_auc_score
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    q = rng.random(POINTS)
    c = (rng.random(POINTS) < q**1.5).astype(np.int64)
    verbal = q.round(1)
    tq, tc = torch.tensor(q), torch.tensor(c)
    peer = ECE(BINS)

    def torchmetrics(checks: bool) -> Callable[[], object]:
        return lambda: binary_calibration_error(tq, tc, n_bins=BINS, validate_args=checks)

    errors: Calls = {
        "rlcr": lambda: metrics.ece(q, c, BINS),
        "netcal": lambda: peer.measure(q, c),
        "torchmetrics": torchmetrics(True),
        "torchmetrics (no checks)": torchmetrics(False),
    }
    areas: Calls = {
        "rlcr": lambda: metrics.auroc(q, c),
        "scikit-learn": lambda: roc_auc_score(c, q),
    }
    verbal_areas: Calls = {
        "rlcr": lambda: metrics.auroc(verbal, c),
        "scikit-learn": lambda: roc_auc_score(c, verbal),
    }
    worst = max(disagreement(errors), disagreement(areas), disagreement(verbal_areas))
    some, right = q[:BOOT_POINTS], c[:BOOT_POINTS]
    ids = rng.integers(0, 8, (PROMPTS, SAMPLES))
    weights = rng.random((PROMPTS, SAMPLES))
    check_votes(ids[:200], weights[:200])

    def boot(confidence: np.ndarray) -> Callable[[], object]:
        return lambda: metrics.bootstrap_intervals(confidence, right, n_boot=RESAMPLES)

    def vote(method: str) -> Callable[[], object]:
        return lambda: scaling.aggregate_many(ids, weights, method)

    points, boots = f"n{POINTS}", f"n{BOOT_POINTS} B{RESAMPLES}"
    spread_ids = ids * 1000
    return {
        "sort": (
            points,
            {"numpy.sort": lambda: np.sort(q), "numpy.argsort": lambda: np.argsort(q)},
        ),
        "ece": (f"{points} bins{BINS}", errors),
        "auroc": (points, areas),
        "auroc verbal": (f"{points} distinct11", verbal_areas),
        "brier": (points, {"rlcr": lambda: metrics.brier_score(q, c)}),
        "smooth ece": (points, {"rlcr": lambda: metrics.smooth_ece(q, c)}),
        "bootstrap": (
            boots,
            {"rlcr": boot(some), "rlcr (11 distinct q)": boot(verbal[:BOOT_POINTS])},
        ),
        "vote": (
            f"P{PROMPTS} N{SAMPLES}",
            {f"rlcr ({m})": vote(m) for m in scaling.METHODS}
            | {
                "rlcr (weighted, any ids)": lambda: scaling.aggregate_many(
                    spread_ids, weights, "weighted"
                )
            },
        ),
    }, worst


def disagreement(calls: Calls) -> float:
    """Return the largest difference between results; stop if it is too large."""
    found = {name: float(call()) for name, call in calls.items()}  # pyright: ignore[reportArgumentType]
    worst = max(found.values()) - min(found.values())
    if not worst <= TOLERANCE:
        raise UserError(f"results disagree, no time is shown: {found}")
    return worst


def check_votes(ids: np.ndarray, weights: np.ndarray) -> None:
    """Compare weighted votes with a loop; stop if they differ."""
    won = scaling.aggregate_many(ids, weights, "weighted").winner
    expected = [np.bincount(row, w).argmax() for row, w in zip(ids, weights, strict=True)]
    if not np.array_equal(won, expected):
        raise UserError("votes differ from a loop over prompts; no time is shown")


def in_turns(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call: one warm-up each, then `repeats` rounds in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, repeats):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """Middle of the sorted times."""
    return sorted(seconds)[len(seconds) // 2]


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 20/80 percentiles in ms, and their number."""
    low, high = np.quantile(seconds, [0.2, 0.8]) * 1e3
    return {
        "median_ms": median(seconds) * 1e3,
        "p20_ms": float(low),
        "p80_ms": float(high),
        "n": len(seconds),
    }


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
