"""Games at random, and the plain equations' tables of them."""

from typing import Literal

import numpy as np

from wavelength_rsa.rsa import RSA

BARE = RSA(null=None)
Null = Literal["uniform"] | None


def logs(probs: object) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, dtype=np.float64))


def game(seed: int, m: int, n: int, zeros: float = 0.0) -> np.ndarray:
    """Probabilities [m, n]; a share of exact zeros, but no empty row or column."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(n, 0.7), size=m)
    gaps = rng.random((m, n)) < zeros
    gaps[np.arange(m), np.arange(m) % n] = False
    gaps[np.arange(n) % m, np.arange(n)] = False
    probs = np.where(gaps, 0.0, probs + 1e-9)
    return probs / probs.sum(1, keepdims=True)


def table(matrix: np.ndarray) -> dict[int, dict[int, float]]:
    return {i: dict(enumerate(row)) for i, row in enumerate(matrix.tolist())}


def keyed(values: np.ndarray | None) -> dict[int, float] | None:
    return None if values is None else dict(enumerate(values.tolist()))


def matrix(levels: dict[int, dict[int, float]], speaker: bool) -> np.ndarray:
    rows = np.array([[row[key] for key in sorted(row)] for _, row in sorted(levels.items())])
    return rows.T if speaker else rows


def with_null(probs: np.ndarray) -> np.ndarray:
    return np.vstack([probs, np.full(probs.shape[1], 1 / probs.shape[1])])


SHAPES = logs([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
