"""How far guesses lie from targets and from people's guesses, with intervals by concept pair.

The first functions work on the last axis of arrays of any shape; every sum is float64. Positions
and distances are in points of the scale 0 to 100, entropies and divergences in nats.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError

Floats = NDArray[np.float64]
_TIE = 1e-9  # relative: sums of the same counts in another order differ by less
# Data are often drawn with the same small seeds; a number beside the seed gives another stream.
_STREAM = 2509_06952
_DRAWS = 1 << 21  # bootstrap counts held at a time


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


# --------------------------------------------------------------------------------------------------
# One value per item


def listener_metrics(
    probs: ArrayLike, grid: ArrayLike, targets: ArrayLike
) -> dict[str, NDArray[np.float64]]:
    """Score a listener's distributions against the targets.

    Args:
        probs: The listener's answers, `[N, n]`, rows of sum 1.
        grid: Positions, `[n]`.
        targets: `[N]`, each a position of the grid.

    Returns:
        Arrays `[N]`, float64: `mean_error` |E t' - t| (the headline of arXiv 2509.06952),
        `map_error` |argmax - t| (the mean of tied positions), `expected_distance` E|t' - t|,
        `crps`, `nll` -ln p(t) in nats, `squared_error` (E t' - t)^2, `entropy` in nats, `sd` and
        `tied` (1 where several positions are the most probable).

    Raises:
        UserError: the shapes differ, a row is no distribution or a target is off the grid.
    """
    p, g = _rows(probs, grid, "probs")
    t = _column(targets, "targets", len(p))
    at = np.clip(np.searchsorted(g, t), 0, len(g) - 1)
    off = np.flatnonzero(g[at] != t)
    if len(off):
        raise UserError(
            f"targets[{off[0]}] is {t[off[0]]:g}, not a position of the grid {g[0]:g}, {g[1]:g}, "
            f"..., {g[-1]:g}; use a step that divides every target"
        )
    centre, (best, tied) = mean(p, g), mode(p, g)
    with np.errstate(divide="ignore"):  # -ln 0 is infinite, as it should be
        nll = -np.log(p[np.arange(len(p)), at]) + 0.0
    return {
        "mean_error": np.abs(centre - t),
        "map_error": np.abs(best - t),
        "expected_distance": expected_distance(p, g, t),
        "crps": crps(p, g, t),
        "nll": nll,
        "squared_error": (centre - t) ** 2,
        "entropy": entropy(p),
        "sd": sd(p, g),
        "tied": tied.astype(np.float64),
    }


def human_metrics(
    probs: ArrayLike, grid: ArrayLike, human: ArrayLike
) -> dict[str, NDArray[np.float64]]:
    """Compare a listener's distributions with those of people's answers.

    Args:
        probs: The listener's answers, `[N, n]`, rows of sum 1.
        grid: Positions, `[n]`.
        human: Histograms of people's answers, `[N, n]`, rows of sum 1.

    Returns:
        Arrays `[N]`, float64: the distances `w1` (points), `js` (nats) and `tv`, and listener minus
        people of the mean, the entropy and the standard deviation: `mean_difference`,
        `entropy_difference` and `sd_difference`, negative where the listener is too sure.

    Raises:
        UserError: the shapes differ, or a row is no distribution.
    """
    (p, g), (q, _) = _rows(probs, grid, "probs"), _rows(human, grid, "human")
    if len(p) != len(q):
        raise UserError(f"probs has {len(p)} rows but human has {len(q)}; they must pair")
    return {
        "w1": w1(p, q, g),
        "js": js(p, q),
        "tv": tv(p, q),
        "mean_difference": mean(p, g) - mean(q, g),
        "entropy_difference": entropy(p) - entropy(q),
        "sd_difference": sd(p, g) - sd(q, g),
    }


# --------------------------------------------------------------------------------------------------
# Agreement in order


class Correlations(TypedDict):
    """Correlation coefficients; NaN with the `reason` where they are undefined."""

    pearson: float
    spearman: float
    reason: str | None


def correlations(x: ArrayLike, y: ArrayLike) -> Correlations:
    """Return Pearson's and Spearman's correlation of `[N]` with `[N]`.

    Values within a relative 1e-9 of one another count as constant: the means of a listener that
    always answers the same differ by rounding alone.

    Raises:
        UserError: the lengths differ, or a value is not finite.
    """
    a = _column(x, "x")
    b = _column(y, "y", len(a))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("x and y must be finite to be correlated; leave out NaN and infinite ones")
    reason = None
    if len(a) < 2:
        reason = f"a correlation needs two or more items, not {len(a)}"
    for name, values in (("x", a), ("y", b)):
        if reason is None and np.ptp(values) <= _TIE * max(1.0, np.abs(values).max()):
            reason = f"{name} is constant ({values[0]:g})"
    if reason is not None:
        return {"pearson": np.nan, "spearman": np.nan, "reason": reason}
    return {
        "pearson": float(pearson_of(moments(a, b).mean(0))),
        "spearman": float(pearson_of(moments(_ranks(a), _ranks(b)).mean(0))),
        "reason": None,
    }


def moments(x: Floats, y: Floats) -> Floats:
    """Return x, y, x^2, y^2 and x y, `[..., 5]`: a correlation follows from their means."""
    x, y = np.broadcast_arrays(x - x.mean(), y - y.mean())  # centred: no cancellation of squares
    return np.stack([x, y, x * x, y * y, x * y], -1)


def pearson_of(means: Floats) -> Floats:
    """Return Pearson's correlation, `[...]`, from means of `moments`, `[..., 5]`."""
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may be constant
        return np.clip((xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y)), -1, 1)


def pair_order_accuracy(means: ArrayLike, targets: ArrayLike, clusters: ArrayLike) -> float:
    """Return how often the clue with the target further right is also understood further right.

    Args:
        means: The listener's expected positions, `[N]`.
        targets: `[N]`.
        clusters: Number of the concept pair, `[N]`; only items of one pair are compared.

    Returns:
        The share of right orders among all pairs of items with the same cluster and different
        targets, equal means counting one half; NaN without such pairs.

    Raises:
        UserError: the lengths differ.
    """
    m = _column(means, "means")
    t, c = _column(targets, "targets", len(m)), _column(clusters, "clusters", len(m))
    order = np.argsort(c, kind="stable")
    total = pairs = 0.0
    for rows in np.split(order, np.flatnonzero(np.diff(c[order])) + 1):
        first, second = (rows[i] for i in np.triu_indices(len(rows), 1))
        gap = m[second] - m[first]
        gap[np.abs(gap) <= 100 * _TIE] = 0.0
        asked = np.sign(t[second] - t[first])
        total += ((1 + np.sign(gap) * asked) / 2)[asked != 0].sum()
        pairs += np.count_nonzero(asked)
    return float(total / pairs) if pairs else float("nan")


# --------------------------------------------------------------------------------------------------
# Intervals


@dataclass(frozen=True)
class Interval:
    """An estimate, its standard error and its confidence interval, in the unit of the values."""

    value: float
    se: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the four as JSON; what is NaN or infinite becomes None."""
        return {k: v if np.isfinite(v) else None for k, v in asdict(self).items()}


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the mean of values with a bootstrap interval over clusters.

    Items of one concept pair share their scale, so they are no independent evidence: a resample
    draws as many clusters as there are, with replacement, and takes the mean of all their items
    (the percentile bootstrap; Davison and Hinkley 1997, section 3.8). The same seed and clusters
    give the same resamples whatever the values.

    Args:
        values: `[N]`.
        clusters: Number of the cluster of each value, `[N]`.
        resamples: How many, at least 2.
        seed: Fixes them.
        level: Coverage, between 0 and 1.

    Returns:
        `value` the mean, `se` the standard deviation over the resamples, `low` and `high` their
        percentiles. With one cluster, or where a value is infinite or NaN, these three are NaN.

    Raises:
        UserError: empty, of different lengths, or an argument is out of range.

    Example:
        >>> cluster_bootstrap([1.0, 3.0], [0, 1]).value
        2.0
    """
    column = _column(values, "values")[:, None]
    return bootstrap_of_means(
        column, clusters, lambda m: m[..., 0], resamples=resamples, seed=seed, level=level
    )


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the mean of a - b, `[N]` each, item by item, as `cluster_bootstrap` does.

    Raises:
        UserError: see `cluster_bootstrap`.
    """
    first = _column(a, "a")
    second = _column(b, "b", len(first))
    with np.errstate(invalid="ignore"):  # inf - inf is NaN
        difference = first - second
    return cluster_bootstrap(difference, clusters, resamples=resamples, seed=seed, level=level)


def bootstrap_of_means(
    columns: ArrayLike,
    clusters: ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a statistic of the means of columns with a bootstrap interval over clusters.

    Args:
        columns: `[N, k]`, one row per item.
        clusters: `[N]`.
        statistic: From means `[..., k]` to values `[...]`, such as `pearson_of` for the columns of
            `moments`, or a square root for a root mean square.
        resamples: How many, at least 2; those in which the statistic is NaN are left out.
        seed: Fixes them.
        level: Coverage, between 0 and 1.

    Returns:
        See `cluster_bootstrap`.

    Raises:
        UserError: see `cluster_bootstrap`.
    """
    x = np.asarray(columns, dtype=np.float64)
    c = _column(clusters, "clusters", len(x))
    if not len(x):
        raise UserError("there are no values to resample; give at least one")
    if resamples < 2:
        raise UserError(f"resamples must be at least 2, not {resamples!r}")
    if not 0 < level < 1:
        raise UserError(f"level must be between 0 and 1, such as 0.95, not {level!r}")
    value = float(statistic(x.mean(0)))
    _, members = np.unique(c, return_inverse=True)
    sizes = np.bincount(members).astype(np.float64)
    n = len(sizes)
    if n == 1 or not np.isfinite(x).all():
        return Interval(value, np.nan, np.nan, np.nan)
    sums = np.zeros((n, x.shape[1]))
    np.add.at(sums, members, x)
    rng = np.random.default_rng([seed, _STREAM])
    drawn = []
    for start in range(0, resamples, block := max(1, _DRAWS // n)):
        drawn_clusters = rng.integers(n, size=(min(block, resamples - start), n))
        count = _count_rows(drawn_clusters)  # [R, n]
        drawn.append(statistic((count @ sums) / (count @ sizes)[:, None]))
    found = np.concatenate(drawn)
    found = found[np.isfinite(found)]
    if len(found) < 2:
        return Interval(value, np.nan, np.nan, np.nan)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(found.std(ddof=1)), float(low), float(high))


# --------------------------------------------------------------------------------------------------
# Inputs


def _rows(probs: ArrayLike, grid: ArrayLike, name: str) -> tuple[Floats, Floats]:
    p, g = check_probs(probs, grid, name)
    if p.ndim != 2:
        raise UserError(f"{name} has the shape {list(p.shape)}; it must be [items, positions]")
    return p, g


def _column(values: ArrayLike, name: str, length: int | None = None) -> Floats:
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be numbers, not {values!r:.80}") from error
    if x.ndim != 1:
        raise UserError(f"{name} has the shape {list(x.shape)}; it must be a list, [N]")
    if length is not None and len(x) != length:
        raise UserError(f"{name} has {len(x)} values for {length} items; they must pair")
    return x


def _count_rows(drawn: NDArray[np.int64]) -> Floats:
    """Return how often each of the n numbers is in each row of `[R, n]`."""
    rows, n = drawn.shape
    places = (drawn + n * np.arange(rows)[:, None]).ravel()
    return np.bincount(places, minlength=rows * n).reshape(rows, n).astype(np.float64)


def _ranks(x: Floats) -> Floats:
    """Return ranks from 1, the mean rank for equal values."""
    _, at, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[at]
