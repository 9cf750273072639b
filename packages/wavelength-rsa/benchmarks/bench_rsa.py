"""Time of pragmatic speakers and listeners of many games: one padded batch against loops of dicts.

The loops are `wavelength_rsa.reference`, in the manner of evaluation scripts that keep a dict of
dicts per item. Both give S1 and L1 of the same games, which must agree to 1e-12 before any time is
shown. One process, one CPU thread, in turns, processor time, so that other work does not count.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.results import write_bench
from wavelength_rsa._version import __version__
from wavelength_rsa.reference import naive_trace, naive_with_null
from wavelength_rsa.rsa import RSA

DESCRIPTION = "Time of RSA on batches of games against loops of dicts."
GAMES, STATES, MOST = 100, 21, 700
TOLERANCE = 1e-12
AIM = 50.0
EXPONENTIALS = 3  # of every probability: the check of L0, then one normalisation for S1 and L1 each

Calls = dict[str, Callable[[], object]]


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_rsa.py", DESCRIPTION, __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: 7)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    torch.set_num_threads(1)
    games = make_games()
    padded, mask = pad(games)
    worst = largest_difference(games, padded, mask)
    tables = [as_dicts(probs) for probs in games]
    tensor = torch.from_numpy(padded)
    rsa, bare = RSA(), RSA(alpha=2.0)
    groups: dict[str, Calls] = {
        "S1 and L1": {
            "wavelength-rsa, one batch": lambda: rsa.trace(padded, mask=mask),
            "wavelength-rsa, game by game": lambda: [rsa.trace(np.log(g)) for g in games],
            "loops of dicts": lambda: [naive_trace(table, 1) for table in tables],
        },
        "S1 and L1, alpha 2": {
            "wavelength-rsa, one batch": lambda: bare.trace(padded, mask=mask),
            "loops of dicts": lambda: [naive_trace(table, 1, alpha=2.0) for table in tables],
        },
        "L1 and gradient of alpha": {
            "wavelength-rsa, one batch": lambda: gradient(tensor, mask),
        },
    }
    limit = median(in_turns({"exp": lambda: tensor.exp()}, args.repeats)["exp"]) * EXPONENTIALS
    cells = sum(g.size for g in games)
    shape = f"{GAMES} games, {min(map(len, games))} to {MOST} utterances, {STATES} states"
    rows = []
    for name, calls in groups.items():
        seconds = in_turns(calls, args.repeats)
        ours = median(seconds["wavelength-rsa, one batch"])
        for impl, times in seconds.items():
            ratio = median(times) / ours
            low, high = np.quantile(times, [0.2, 0.8]) * 1e3
            rows.append(
                {
                    "name": name,
                    "impl": impl,
                    "shape": shape,
                    "dtype": "float64",
                    "median_ms": median(times) * 1e3,
                    "p20_ms": float(low),
                    "p80_ms": float(high),
                    "n": len(times),
                    "achieved": median(times) * 1e3,
                    "limit": limit * 1e3,
                    "fraction_of_limit": limit / median(times),
                    "extra": {
                        "time_over_one_batch": ratio,
                        "ns_per_probability": median(times) / cells * 1e9,
                    },
                }
            )
            print(f"{name:<26} {impl:<30} {median(times) * 1e3:10.2f} ms {ratio:9.1f} x")
    slowest = min(
        row["extra"]["time_over_one_batch"] for row in rows if row["impl"] == "loops of dicts"
    )
    verdict = "reached" if slowest >= AIM else "missed"
    print(f"one batch is at least {slowest:.1f} times as fast; the aim of {AIM:.0f} is {verdict}")
    if args.json:
        write_bench(
            args.json,
            package="wavelength-rsa",
            version=__version__,
            command=f"bench_rsa.py --repeats {args.repeats}",
            correctness={
                "gate": f"S1 and L1 of every game equal those of the loops to {TOLERANCE}",
                "max_err": worst,
            },
            rows=rows,
            notes=[
                "Times are processor time of one thread; making the dicts is not timed, checking "
                "and padding with the null utterance is.",
                f"achieved: median in ms; limit: {EXPONENTIALS} times torch.exp of the padded "
                "batch, the exponentials that logarithms cannot do without, in ms.",
                f"The aim of {AIM:.0f} times the loops is {verdict}: the least factor is "
                f"{slowest:.1f}.",
            ],
        )
    return 0


def make_games(seed: int = 0) -> list[np.ndarray]:
    """Return probabilities `[m_i, STATES]`, m_i from MOST / 2 to MOST as few samples agree."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(MOST // 2, MOST + 1, size=GAMES)
    sizes[0] = MOST
    games = [rng.dirichlet(np.full(STATES, 0.3), size=m) + 1e-9 for m in sizes]
    return [g / g.sum(1, keepdims=True) for g in games]


def pad(games: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities `[GAMES, MOST, STATES]` and the mask of real utterances."""
    padded = np.zeros((len(games), MOST, STATES))
    for probs, place in zip(games, padded, strict=True):
        place[: len(probs)] = np.log(probs)
    return padded, np.arange(MOST) < np.array([len(g) for g in games])[:, None]


def as_dicts(probs: np.ndarray) -> dict[str, dict[int, float]]:
    """Return a game with its null utterance as a dict of dicts."""
    rows = {f"clue {u}": dict(enumerate(row)) for u, row in enumerate(probs.tolist())}
    return naive_with_null(rows)


def gradient(log_l0: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """Return the slope in alpha of the log-probability of the middle state under all utterances."""
    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    heard = RSA(alpha).log_listener(log_l0, mask=mask, keep_null=False)
    chosen = heard[..., STATES // 2][torch.from_numpy(mask)].sum()
    return torch.autograd.grad(chosen, alpha)[0]


def largest_difference(games: list[np.ndarray], padded: np.ndarray, mask: np.ndarray) -> float:
    """Compare S1 and L1 of all games with the loops; stop if they differ."""
    worst = 0.0
    _, speaker, listener = (np.exp(level.log_probs) for level in RSA().trace(padded, mask=mask))
    for i, probs in enumerate(games):
        _, (_, s1), (_, l1) = naive_trace(as_dicts(probs), 1)
        rows = [*range(len(probs)), -1]  # the null utterance is last in both
        ours = speaker[i, rows], listener[i, rows]
        theirs = (
            np.array([list(column.values()) for column in s1.values()]).T,
            np.array([list(row.values()) for row in l1.values()]),
        )
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)))
    if not worst <= TOLERANCE:
        raise UserError(f"results differ by {worst}, no time is shown")
    return worst


def in_turns(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call: one warm-up each, then `repeats` rounds in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, repeats):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            calls[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """Middle of the sorted times."""
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
