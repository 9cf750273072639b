"""Time of pragmatic speakers and listeners of many games: one padded batch against loops of dicts.

The loops are `wavelength_rsa.reference`, in the manner of evaluation scripts that keep a dict of
dicts per item. Both give S1 and L1 of the same games, ours as logarithms, which must agree to 1e-12
before any time is shown. One process, one CPU thread, in turns, processor time, so that other work
does not count.
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
from wavelength_rsa.reference import naive_listener, naive_speaker, naive_with_null
from wavelength_rsa.rsa import RSA

DESCRIPTION = "Time of RSA on batches of games against loops of dicts."
GAMES, STATES, MOST = 100, 21, 700
TOLERANCE = 1e-12
AIM = 50.0
LEVELS = ("S1", "L1")
BATCH, LOOPS = "wavelength_rsa, one batch", "loops of dicts"

Calls = dict[str, Callable[[], object]]
Table = dict  # of dicts of probabilities: table[given][what]


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
    tables = [as_dicts(probs) for probs in games]
    worst = max(largest_difference(alpha, tables, padded, mask) for alpha in (1.0, 2.0))
    tensor = torch.from_numpy(padded)
    rsa, sharp = RSA(), RSA(alpha=2.0)
    # With how many exponentials of every probability: to check L0, and unless alpha is 1 of alpha
    # U as well.
    groups: dict[str, tuple[int, Calls]] = {
        "S1 and L1": (
            1,
            {
                BATCH: lambda: rsa.trace(padded, mask=mask, levels=LEVELS),
                "one batch, then exponentials": lambda: probabilities(rsa, padded, mask),
                "game by game": lambda: [rsa.trace(np.log(g), levels=LEVELS) for g in games],
                LOOPS: lambda: [loops(table) for table in tables],
            },
        ),
        "S1 and L1, alpha 2": (
            2,
            {
                BATCH: lambda: sharp.trace(padded, mask=mask, levels=LEVELS),
                "one batch, then exponentials": lambda: probabilities(sharp, padded, mask),
                LOOPS: lambda: [loops(table, 2.0) for table in tables],
            },
        ),
        "L1 and gradient of alpha": (2, {BATCH: lambda: gradient(tensor, mask)}),
    }
    out = torch.empty_like(tensor)
    once = median(in_turns({"exp": lambda: torch.exp(tensor, out=out)}, args.repeats)["exp"])
    cells = sum(g.size for g in games)
    shape = f"{GAMES} games, {min(map(len, games))} to {MOST} utterances, {STATES} states"
    rows = []
    for name, (exponentials, calls) in groups.items():
        seconds, limit = in_turns(calls, args.repeats), exponentials * once
        ours = median(seconds[BATCH])
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
    verdicts = [
        f"{row['name']}: {factor:.1f} times as fast as the loops, the aim of {AIM:.0f} is "
        + ("reached" if factor >= AIM else "missed")
        for row in rows
        if row["impl"] == LOOPS and (factor := row["extra"]["time_over_one_batch"])
    ]
    print("\n".join(verdicts))
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
                "Ours returns logarithms, the loops return probabilities; then exponentials: "
                "torch.exp of both levels in place, for who needs probabilities.",
                "achieved: median in ms; limit: torch.exp of the padded batch "
                f"({once * 1e3:.1f} ms) once to check L0 and, unless alpha is 1, once more for "
                "alpha times the utility, in ms.",
                *verdicts,
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


def as_dicts(probs: np.ndarray) -> Table:
    """Return a game with its null utterance as a dict of dicts."""
    rows = {f"clue {u}": dict(enumerate(row)) for u, row in enumerate(probs.tolist())}
    return naive_with_null(rows)


def gradient(log_l0: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """Return the slope in alpha of the log-probability of the middle state under all utterances."""
    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    heard = RSA(alpha).log_listener(log_l0, mask=mask, keep_null=False)
    chosen = heard[..., STATES // 2][torch.from_numpy(mask)].sum()
    return torch.autograd.grad(chosen, alpha)[0]


def loops(table: Table, alpha: float = 1.0) -> tuple[Table, Table]:
    """Return S1 and L1 of one game."""
    speaker = naive_speaker(table, alpha=alpha)
    return speaker, naive_listener(speaker)


def probabilities(rsa: RSA, padded: np.ndarray, mask: np.ndarray) -> list[torch.Tensor]:
    """Return S1 and L1 of the batch, no logarithms."""
    levels = rsa.trace(padded, mask=mask, levels=LEVELS)
    return [torch.from_numpy(level.log_probs).exp_() for level in levels]


def largest_difference(
    alpha: float, tables: list[Table], padded: np.ndarray, mask: np.ndarray
) -> float:
    """Compare S1 and L1 of all games with the loops; stop if they differ."""
    worst = 0.0
    speaker, listener = (p.numpy() for p in probabilities(RSA(alpha), padded, mask))
    for i, table in enumerate(tables):
        s1, l1 = loops(table, alpha)
        rows = [*range(len(table) - 1), -1]  # the null utterance is last in both
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
