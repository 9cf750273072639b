"""The equations of Rational Speech Acts, one plain function each: the oracle of the tests.

Sources: arXiv 2509.06952 for production and comprehension in the game Wavelength; Frank and Goodman
(2012) and Goodman and Frank (2016) for the recursion. Dicts, loops and Python floats only; slow on
purpose. A table is `table[given][what]`: `l0[utterance][state]` for listeners and
`s1[state][utterance]` for speakers, so that every inner dict sums to 1.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

U = TypeVar("U", bound=Hashable)  # utterances
T = TypeVar("T", bound=Hashable)  # states
NULL = "<null>"


def naive_production(
    at_target: Mapping[U, float],
    prior: Mapping[U, float] | None = None,
    alpha: float = 1.0,
    lam: float = 1.0,
    cost: Mapping[U, float] | None = None,
) -> dict[U, float]:
    """Return S1(u|t*) of the candidates u for one target, from L0(t*|u).

    S1(u|t*) = L0(t*|u)^alpha P(u)^lam exp(-cost(u)) / sum over candidates of the same; the paper's
    production with alpha = lam = 1 and no cost.
    """
    weights = {
        u: p**alpha * (prior[u] if prior else 1.0) ** lam * math.exp(-(cost[u] if cost else 0.0))
        for u, p in at_target.items()
    }
    total = sum(weights.values())
    return {u: weight / total for u, weight in weights.items()}


def naive_speaker(
    listener: Mapping[U, Mapping[T, float]],
    prior: Mapping[U, float] | None = None,
    alpha: float = 1.0,
    lam: float = 1.0,
    cost: Mapping[U, float] | None = None,
) -> dict[T, dict[U, float]]:
    """Return S(u|t) = L(t|u)^alpha P(u)^lam exp(-cost(u)), normalised over utterances.

    With alpha = 1, equal priors and no cost, the speaker inside the paper's pragmatic listener.
    """
    states = next(iter(listener.values()))
    return {
        t: naive_production({u: row[t] for u, row in listener.items()}, prior, alpha, lam, cost)
        for t in states
    }


def naive_listener(
    speaker: Mapping[T, Mapping[U, float]], state_prior: Mapping[T, float] | None = None
) -> dict[U, dict[T, float]]:
    """Return L(t|u) = S(u|t) P(t), normalised over states; P(t) is uniform by default."""
    table: dict[U, dict[T, float]] = {}
    for u in next(iter(speaker.values())):
        joint = {t: row[u] * (state_prior[t] if state_prior else 1.0) for t, row in speaker.items()}
        total = sum(joint.values())
        table[u] = {t: p / total for t, p in joint.items()}
    return table


def naive_trace(
    l0: Mapping[U, Mapping[T, float]],
    depth: int,
    *,
    prior: Mapping[U, float] | None = None,
    state_prior: Mapping[T, float] | None = None,
    alpha: float = 1.0,
    lam: float = 1.0,
    cost: Mapping[U, float] | None = None,
) -> list[tuple[str, dict]]:
    """Return L0, S1, L1, S2, ..., S_depth, L_depth with their names."""
    listener: Mapping[U, Mapping[T, float]] = l0
    levels: list[tuple[str, dict]] = [("L0", {u: dict(row) for u, row in l0.items()})]
    for d in range(1, depth + 1):
        speaker = naive_speaker(listener, prior, alpha, lam, cost)
        listener = naive_listener(speaker, state_prior)
        levels += [(f"S{d}", speaker), (f"L{d}", listener)]
    return levels


def naive_with_null(l0: Mapping[U, Mapping[T, float]]) -> dict[U | str, dict[T, float]]:
    """Add the null utterance, which says nothing: every state is equally likely under it."""
    states = next(iter(l0.values()))
    table: dict[U | str, dict[T, float]] = {u: dict(row) for u, row in l0.items()}
    table[NULL] = {t: 1.0 / len(states) for t in states}
    return table


def naive_metric_speaker(
    listener: Mapping[U, Mapping[T, float]],
    distance: Callable[[T, T], float],
    *,
    prior: Mapping[U, float] | None = None,
    alpha: float = 1.0,
    lam: float = 1.0,
    cost: Mapping[U, float] | None = None,
) -> dict[T, dict[U, float]]:
    """Return S(u|t) with the utility -E distance(t', t) over t' ~ L(.|u), in place of log L(t|u).

    exp(utility) stands where `naive_speaker` has L(t|u).
    """
    states = next(iter(listener.values()))
    closeness = {
        u: {t: math.exp(-sum(p * distance(s, t) for s, p in row.items())) for t in states}
        for u, row in listener.items()
    }
    return naive_speaker(closeness, prior, alpha, lam, cost)
