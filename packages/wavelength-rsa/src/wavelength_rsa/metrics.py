"""How far guesses lie from targets and from people's guesses, with intervals by concept pair.

The first functions work on the last axis of arrays of any shape; every sum is float64. Positions
and distances are in points of the scale 0 to 100, entropies and divergences in nats.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError

Floats = NDArray[np.float64]
_TIE = 1e-9  # relative: sums of the same counts in another order differ by less


# --------------------------------------------------------------------------------------------------
# Distributions over positions


def check_probs(probs: ArrayLike, grid: ArrayLike, name: str = "probs") -> tuple[Floats, Floats]:
    """Return distributions and their grid as float64, each row divided by its sum.

    Args:
        probs: `[..., n]`, each row finite, >= 0, of sum 1 within 1e-6.
        grid: Positions, `[n]`, finite and rising.
        name: What messages call `probs`.

    Raises:
        UserError: one of these does not hold; the message names the row.
    """
    try:
        p, g = np.array(probs, dtype=np.float64), np.array(grid, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} and the grid must be arrays of numbers: {error}") from error
    if g.ndim != 1 or len(g) < 2 or not np.isfinite(g).all() or (np.diff(g) <= 0).any():
        raise UserError(
            f"the grid must hold two or more finite, rising positions, not {np.array2string(g)}; "
            "make one with wavelength_rsa.grid(step)"
        )
    if p.ndim == 0 or p.shape[-1] != len(g):
        raise UserError(
            f"{name} has the shape {list(p.shape)} but the grid has {len(g)} positions; the last "
            f"axis of {name} must be the positions, [..., {len(g)}]"
        )
    sums = p.sum(-1)
    for bad, what in (
        (~np.isfinite(p).all(-1), "holds NaN or infinite values"),
        ((p < 0).any(-1), "holds negative values"),
        (~(np.abs(sums - 1) <= 1e-6), "does not sum to 1"),
    ):
        if bad.any():
            row = tuple(np.argwhere(bad)[0].tolist())
            where = f"{name}[{', '.join(map(str, row))}]" if row else name
            raise UserError(
                f"{where} {what} (its sum is {sums[row]:.6g}); a distribution is finite, >= 0 and "
                "sums to 1: divide counts by their sum, and logarithms need exp first"
            )
    return p / sums[..., None], g


def mean(probs: Floats, grid: Floats) -> Floats:
    """Return E[t], `[...]`, of distributions `[..., n]`."""
    return probs @ grid


def sd(probs: Floats, grid: Floats) -> Floats:
    """Return the standard deviations, `[...]`, of distributions `[..., n]`."""
    gap = grid - mean(probs, grid)[..., None]  # [..., n]
    return np.sqrt((probs * gap**2).sum(-1))


def entropy(probs: Floats) -> Floats:
    """Return the entropies in nats, `[...]`, of distributions `[..., n]`."""
    return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1) + 0.0


def mode(probs: Floats, grid: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the most probable position, the mean of tied ones, and whether there was a tie."""
    best = probs >= probs.max(-1, keepdims=True) * (1 - _TIE)  # [..., n]
    count = best.sum(-1)
    return (best @ grid) / count, count > 1


def expected_distance(probs: Floats, grid: Floats, target: ArrayLike) -> Floats:
    """Return E|t' - t|, `[...]`: also W1 to the point mass at the target `[...]`."""
    return (probs * np.abs(grid - np.asarray(target, dtype=np.float64)[..., None])).sum(-1)


def crps(probs: Floats, grid: Floats, target: ArrayLike) -> Floats:
    """Return the continuous ranked probability score, `[...]`, lower is better.

    It is the integral of (F(x) - [x >= t])^2 = E|X - t| - E|X - X'| / 2, exact for the jumps of F
    at the positions (Gneiting and Raftery 2007, eq. 20 and 21), and a proper score: the expected
    distance alone is least for a point mass at the median.
    """
    below = np.cumsum(probs, -1)[..., :-1]  # F between neighbouring positions
    spread = (below * (1 - below)) @ np.diff(grid)  # E|X - X'| / 2
    return expected_distance(probs, grid, target) - spread


def w1(p: Floats, q: Floats, grid: Floats) -> Floats:
    """Return the Wasserstein-1 distances, `[...]`: the area between the cumulative functions."""
    return np.abs(np.cumsum(p - q, -1)[..., :-1]) @ np.diff(grid)


def js(p: Floats, q: Floats) -> Floats:
    """Return the Jensen-Shannon divergences in nats, `[...]`, from 0 to ln 2 (no square root)."""
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def tv(p: Floats, q: Floats) -> Floats:
    """Return the total variation distances, `[...]`, from 0 to 1."""
    return np.abs(p - q).sum(-1) / 2
