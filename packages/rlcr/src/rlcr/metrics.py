"""How good confidences are: calibration, discrimination and selective prediction, with intervals.

Everywhere `confidence` is q in [0, 1], the stated probability that an answer is right, and
`correct` is c: 1 for right, 0 for wrong. Brier score, log loss, calibration errors and risk curves
also take soft labels in [0, 1]; AUROC and the report need 0 or 1. All sums are float64.

Calibration alone says little: a model that always states its accuracy has a calibration error of
zero and knows nothing. Read ECE beside accuracy, AUROC and the spread of q, as the report shows it.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError, suggest

Floats = NDArray[np.float64]
BINNINGS = ("left", "right", "reference")
UNINFORMATIVE_STD = 0.02  # below this spread of q, ECE says nothing about telling right from wrong
_CHUNK = 1 << 15  # rows binned at a time: their temporaries stay in the processor's cache
# Data are often drawn with the same small seeds; a number beside the seed gives another stream.
_STREAM = 2507_16806
_DRAWS = 1 << 21  # bootstrap counts held at a time


class MetricsWarning(UserWarning):
    """A metric is undefined or says nothing for these data."""


# --------------------------------------------------------------------------------------------------
# Inputs


def check_inputs(
    confidence: ArrayLike, correct: ArrayLike, *, soft: bool = True, scale: float = 1.0
) -> tuple[Floats, Floats]:
    """Return q and c as float64 arrays `[n]`, or say what is wrong with them.

    Args:
        confidence: `[n]`, numbers from 0 to `scale`.
        correct: `[n]`, 0 or 1 (or bool); with `soft` anything from 0 to 1.
        soft: Whether soft labels fit.
        scale: What certainty is called: 1, or 100 for percentages.

    Raises:
        UserError: empty, of different lengths, not numbers, NaN, out of range, or not 0 or 1.
    """
    q, c = _checked(confidence, correct, soft=soft, scale=scale)
    return q, c.astype(np.float64, copy=False)


def _checked(
    confidence: ArrayLike, correct: ArrayLike, *, soft: bool = True, scale: float = 1.0
) -> tuple[Floats, NDArray]:
    """Do `check_inputs`, but leave c in its own type: a copy of it costs as much as the checks."""
    if not (scale > 0 and math.isfinite(scale)):
        raise UserError(f"scale must be a finite number > 0, not {scale}")
    q = _numbers(confidence, "confidence").astype(np.float64, copy=False)
    c = _numbers(correct, "correct")
    if len(q) != len(c):
        raise UserError(f"confidence has {len(q)} values but correct has {len(c)}; they must pair")
    if not len(q):
        raise UserError("confidence and correct are empty; give at least one example")
    if scale != 1.0:
        q = q / scale
    low, high = _range(q, "confidence")
    if low < 0 or high > 1:
        seen = high if high > 1 else low
        hint = " Percentages? Pass scale=100." if scale == 1 and low >= 0 and high <= 100 else ""
        which = "maximum" if high > 1 else "minimum"
        raise UserError(
            f"confidence must lie in [0, {scale:g}], but its {which} is {seen * scale:g}.{hint}"
        )
    low, high = _range(c, "correct")
    if low < 0 or high > 1:
        raise UserError(f"correct must lie in [0, 1], but it reaches from {low:g} to {high:g}")
    if not soft and c.dtype.kind == "f":
        strange = (c != 0) & (c != 1)
        if strange.any():
            raise UserError(
                f"correct must be 0 or 1 here, but holds {c[strange][0]:g}. Soft labels fit "
                "brier_score, log_loss, ece and risk_coverage only; threshold them for the others."
            )
    return q, c


def _numbers(values: ArrayLike, name: str) -> NDArray:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiubO":
            raise UserError(f"{name} must be numbers, not values of type {array.dtype}")
        if array.dtype.kind == "O":  # None becomes NaN
            array = array.astype(np.float64)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be a list of numbers: {error}") from error
    if array.ndim != 1:
        raise UserError(f"{name} must have one dimension, not the shape {array.shape}")
    return array


def _range(values: NDArray, name: str) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if math.isnan(low):
        missing = int(np.isnan(values).sum())
        raise UserError(
            f"{name} holds {missing} NaN or None of {len(values)}. Leave these examples out and "
            "report how many, or decide on a value for them."
        )
    return low, high


_MOST_BINS = 100_000


def _check_bins(n_bins: int, binning: str) -> None:
    if not isinstance(n_bins, int) or not 1 <= n_bins <= _MOST_BINS:
        raise UserError(f"n_bins must be a whole number from 1 to {_MOST_BINS}, not {n_bins}")
    if binning not in BINNINGS:
        raise UserError(
            f"binning must be one of {', '.join(BINNINGS)}, not {binning!r}."
            f"{suggest(str(binning), BINNINGS)}"
        )


# --------------------------------------------------------------------------------------------------
# Scores


def brier_score(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean of (q - c)^2: 0 is best, 0.25 is what q = 0.5 always gets."""
    q, c = check_inputs(confidence, correct)
    gap = q - c
    return float(gap @ gap / len(gap))


def log_loss(confidence: ArrayLike, correct: ArrayLike, *, eps: float = 1e-6) -> float:
    """Return the mean of -(c ln q + (1 - c) ln(1 - q)) in nats, q clipped to [eps, 1 - eps]."""
    if not 0 < eps < 0.5:
        raise UserError(f"eps must lie between 0 and 0.5, not {eps}")
    q, c = check_inputs(confidence, correct)
    q = q.clip(eps, 1 - eps)
    return float(-(c * np.log(q) + (1 - c) * np.log1p(-q)).mean())


@dataclass(frozen=True, slots=True)
class Murphy:
    """The parts of a Brier score: brier = reliability - resolution + uncertainty.

    Attributes:
        reliability: How far q is from the success rate where q is stated; 0 is best.
        resolution: How far these rates are from the overall rate; large is good.
        uncertainty: Variance of the outcomes, the same for every model on the same answers.
    """

    reliability: float
    resolution: float
    uncertainty: float


def murphy_decomposition(confidence: ArrayLike, correct: ArrayLike) -> Murphy:
    """Split the Brier score over the distinct confidences (Murphy 1973); the sum is exact.

    Args:
        confidence: q, `[n]`. With as many distinct values as examples every rate is 0 or 1 and
            resolution says nothing; round q first.
        correct: c, `[n]`, 0 or 1.

    Raises:
        UserError: see `check_inputs`.
    """
    q, c = check_inputs(confidence, correct, soft=False)
    values, count, right = _groups(q, c)
    share, rate, base = count / len(q), right / count, c.mean()
    return Murphy(
        reliability=float(share @ (values - rate) ** 2),
        resolution=float(share @ (rate - base) ** 2),
        uncertainty=float(base * (1 - base)),
    )


def _groups(q: Floats, c: Floats) -> tuple[Floats, NDArray[np.intp], Floats]:
    """Return the distinct q in rising order, how often each occurs, and the sum of its c."""
    order = np.argsort(q)
    ordered = q[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    count = np.diff(np.append(first, len(q)))
    return ordered[first], count, np.add.reduceat(c[order], first)


# --------------------------------------------------------------------------------------------------
# Calibration error over bins


def _bin_index(q: Floats, n_bins: int, binning: str) -> NDArray[np.intp]:
    """Return the bin of each q; edges as in `ece`.

    The nearest edge is found by rounding q * n_bins, as the float64 nearest to i / n_bins; then the
    sign of q - edge, which is exact, decides the side, so that no rounding error can.
    """
    bins = q * n_bins
    np.rint(bins, out=bins)
    side = bins * (1 / n_bins) if binning == "reference" else bins / n_bins
    np.subtract(q, side, out=side)  # below 1 / n_bins, so it rounds to -1, 0 or 1
    if binning == "right":
        np.ceil(side, out=side)
        side -= 1
    else:
        np.floor(side, out=side)
    bins += side
    return bins.clip(0, n_bins - 1, out=bins).astype(np.intp)


def _bin_gaps(q: Floats, c: NDArray, n_bins: int, binning: str) -> Floats:
    """Return the sum of q - c in each bin."""
    gaps = np.zeros(n_bins)
    for start in range(0, len(q), _CHUNK):
        some = q[start : start + _CHUNK]
        index = _bin_index(some, n_bins, binning)
        gaps += np.bincount(index, some - c[start : start + _CHUNK], n_bins)
    return gaps


def ece(
    confidence: ArrayLike, correct: ArrayLike, n_bins: int = 10, binning: str = "left"
) -> float:
    """Return the expected calibration error: sum over bins of n_b / n * |mean q - mean c|.

    Args:
        confidence: q, `[n]`.
        correct: c, `[n]`, soft labels fit.
        n_bins: Number of bins of equal width. Papers use 10, torchmetrics defaults to 15.
        binning: `"left"`: [a, b), the last bin closed on both sides. `"right"`: (a, b], the first
            closed on both sides. Both with edges at the float64 nearest to i / n_bins, so 0.3 lies
            on an edge of ten bins. `"reference"`: left-closed at `numpy.linspace`'s edges, as in
            the authors' code: of ten bins, 0.3, 0.6 and 0.7 fall below their edges.

    Raises:
        UserError: see `check_inputs`; a binning is unknown.
    """
    _check_bins(n_bins, binning)
    q, c = _checked(confidence, correct)
    return float(np.abs(_bin_gaps(q, c, n_bins, binning)).sum() / len(q))


@dataclass(frozen=True, slots=True, eq=False)
class ReliabilityBins:
    """What a reliability diagram draws; every array is `[n_bins]`, float64, NaN in empty bins.

    Attributes:
        lower: Lower edges.
        upper: Upper edges.
        count: Number of examples, int64.
        confidence: Mean q.
        accuracy: Mean c.
    """

    lower: Floats
    upper: Floats
    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def reliability_bins(
    confidence: ArrayLike, correct: ArrayLike, n_bins: int = 10, binning: str = "left"
) -> ReliabilityBins:
    """Return count, mean q and mean c of bins of equal width; arguments and errors as in `ece`."""
    _check_bins(n_bins, binning)
    q, c = check_inputs(confidence, correct)
    index = _bin_index(q, n_bins, binning)
    count = np.bincount(index, minlength=n_bins).astype(np.int64)
    filled = np.where(count > 0, count, np.nan)
    edges = np.arange(n_bins + 1) / n_bins
    return ReliabilityBins(
        lower=edges[:-1],
        upper=edges[1:],
        count=count,
        confidence=np.bincount(index, q, n_bins) / filled,
        accuracy=np.bincount(index, c, n_bins) / filled,
    )


def max_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, n_bins: int = 10, binning: str = "left"
) -> float:
    """Return the largest |mean q - mean c| of a bin that is not empty; arguments as in `ece`."""
    bins = reliability_bins(confidence, correct, n_bins, binning)
    return float(np.nanmax(np.abs(bins.confidence - bins.accuracy)))


def equal_mass_ece(confidence: ArrayLike, correct: ArrayLike, n_bins: int = 10) -> float:
    """Return ECE over bins that hold about n / n_bins examples each (Nguyen and O'Connor 2015).

    Equal confidences stay in one bin, the one where the middle of their run falls, so the result
    does not depend on the order of the examples; verbal confidences may leave bins empty.

    Raises:
        UserError: see `check_inputs`.
    """
    _check_bins(n_bins, "left")
    q, c = check_inputs(confidence, correct)
    values, count, right = _groups(q, c)
    middle = 2 * np.cumsum(count) - count  # twice the rank of the middle of each run
    index = middle * n_bins // (2 * len(q))
    gaps = np.bincount(index, count * values - right, n_bins)
    return float(np.abs(gaps).sum() / len(q))


def debiased_ece(
    confidence: ArrayLike, correct: ArrayLike, n_bins: int = 10, binning: str = "left"
) -> float:
    """Return the root of the debiased squared calibration error over bins (an L2 error).

    The plain estimate adds to each bin's squared gap the variance of its mean, so it is above zero
    for perfect confidences. Kumar, Liang and Ma (2019, arXiv 1909.10155; also Bröcker 2012)
    subtract that variance: sum over bins of n_b / n * ((mean q - mean c)^2 - var(q - c) / n_b),
    with var over n_b - 1. Where q is constant within a bin var(q - c) is their mean c (1 - mean c)
    n_b / (n_b - 1). The square is unbiased given the counts; its root is not, and is 0 where the
    estimate is below 0. Bins with one example have no variance and are left out.

    Returns:
        A float >= 0; NaN when every bin has one example or none.

    Raises:
        UserError: see `ece`.
    """
    _check_bins(n_bins, binning)
    q, c = check_inputs(confidence, correct)
    index, gap = _bin_index(q, n_bins, binning), q - c
    count = np.bincount(index, minlength=n_bins)
    used = count > 1
    if not used.any():
        return math.nan
    mean = np.bincount(index, gap, n_bins) / np.maximum(count, 1)
    spread = np.bincount(index, (gap - mean[index]) ** 2, n_bins)
    count, mean, spread = count[used], mean[used], spread[used]
    square = count @ (mean**2 - spread / (count - 1) / count) / count.sum()
    return math.sqrt(max(0.0, float(square)))


def smooth_ece(confidence: ArrayLike, correct: ArrayLike, *, grid: int = 2048) -> float:
    """Return the smooth calibration error (Błasiok and Nakkiran 2023, arXiv 2309.12236).

    q - c is smoothed over [0, 1] by a Gaussian kernel of width s that is reflected at both ends,
    and smECE(s) is the integral of its size. The result is the s with smECE(s) = s; no bins are
    chosen. Residuals are first split between the two nearest of `grid` cells, and the kernel acts
    on their cosine series, so the cost is O(n + grid log grid).

    Args:
        confidence: q, `[n]`.
        correct: c, `[n]`, soft labels fit.
        grid: Number of cells; widths below 1 / grid are not resolved.

    Raises:
        UserError: see `check_inputs`.
    """
    if grid < 2:
        raise UserError(f"grid must be at least 2, not {grid}")
    q, c = check_inputs(confidence, correct)
    place = (q * grid - 0.5).clip(0, grid - 1)
    cell = place.astype(np.intp).clip(max=grid - 2)
    part = place - cell
    gap = (q - c) / len(q)
    mass = np.bincount(cell, gap * (1 - part), grid) + np.bincount(cell + 1, gap * part, grid)
    # An even periodic extension makes a circular convolution the reflected one.
    series = np.fft.rfft(np.concatenate([mass, mass[::-1]]))
    rate = -0.5 * (math.pi * np.arange(grid + 1)) ** 2

    def smoothed(width: float) -> float:
        return float(np.abs(np.fft.irfft(series * np.exp(rate * width**2), 2 * grid)).sum() / 2)

    low, high = 0.0, 1.0  # smoothed(s) falls in s, so smoothed(s) - s has one zero
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if smoothed(middle) > middle else (low, middle)
    return (low + high) / 2


# --------------------------------------------------------------------------------------------------
# Telling right from wrong


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return P(q of a right answer > q of a wrong one) + P(equal) / 2.

    Returns:
        0.5 for constant q; NaN, with a `MetricsWarning`, when all answers are right or all wrong.

    Raises:
        UserError: see `check_inputs`; soft labels do not fit.
    """
    q, c = check_inputs(confidence, correct, soft=False)
    value = _auroc(*_groups(q, c)[1:])
    if math.isnan(value):
        warnings.warn(
            f"AUROC is undefined: all {len(c)} answers are {'right' if c[0] else 'wrong'}",
            MetricsWarning,
            stacklevel=2,
        )
    return value


def _auroc(count: NDArray[np.intp], right: Floats) -> float:
    wrong = count - right
    pairs = right.sum() * wrong.sum()
    return float(right @ (np.cumsum(wrong) - wrong / 2) / pairs) if pairs else math.nan


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Return the error rate among the k most confident answers, for every k.

    Equal confidences count as if shuffled: a prefix that cuts a run of ties takes the run's mean
    error for its members (Geifman and El-Yaniv 2017).

    Returns:
        coverage: k / n for k = 1..n, `[n]`.
        risk: Mean of 1 - c among the k most confident, `[n]`.

    Raises:
        UserError: see `check_inputs`.
    """
    q, c = check_inputs(confidence, correct)
    _, count, right = _groups(q, c)
    errors = np.repeat(1 - right[::-1] / count[::-1], count[::-1])
    k = np.arange(1, len(q) + 1)
    return k / len(q), np.cumsum(errors) / k


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean of `risk_coverage` over the coverages: 0 is best, 1 - accuracy is chance."""
    return float(risk_coverage(confidence, correct)[1].mean())


def pass_at_k(n: ArrayLike, right: ArrayLike, k: int) -> Floats:
    """Return 1 - C(n - right, k) / C(n, k), the unbiased chance that one of k samples is right.

    Args:
        n: Number of samples of each problem, integers; any shape that broadcasts with `right`.
        right: Number of right samples, 0 <= right <= n.
        k: 1 <= k <= n.

    Returns:
        float64 in [0, 1], of the broadcast shape; sums of logarithms, so large n do not overflow.

    Raises:
        UserError: a number is not whole or out of range.
    """
    total, good = np.broadcast_arrays(np.asarray(n), np.asarray(right))
    if total.dtype.kind not in "iu" or good.dtype.kind not in "iub":
        raise UserError(f"n and right must be whole numbers, not {total.dtype} and {good.dtype}")
    good = good.astype(np.int64)
    if total.size and ((good < 0) | (good > total)).any():
        raise UserError("right must lie between 0 and n for every problem")
    if k < 1 or (total.size and k > total.min()):
        raise UserError(f"k must lie between 1 and the smallest n, {total.min()}, not {k}")
    log_none = np.zeros(total.shape)
    with np.errstate(divide="ignore"):  # log 0 = -inf: fewer wrong samples than k
        for i in range(k):
            log_none += np.log1p(-np.minimum(good / (total - i), 1.0))
    return -np.expm1(log_none)


# --------------------------------------------------------------------------------------------------
# Intervals


def bootstrap_intervals(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    n_bins: int = 10,
    binning: str = "left",
    ci: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of accuracy, Brier score, ECE and AUROC.

    A resample is a multinomial count of the distinct pairs (q, c), from which all four follow by
    sums over pairs sorted by q; no rows are copied or sorted again. ECE cannot be negative, so
    resampling shifts it upwards: for well calibrated answers its interval may lie above the value.

    Args:
        confidence: q, `[n]`.
        correct: c, `[n]`, 0 or 1.
        n_bins: For ECE.
        binning: For ECE.
        ci: Coverage, between 0 and 1.
        n_boot: Number of resamples.
        seed: Fixes the resamples.

    Returns:
        (low, high) for "accuracy", "brier", "ece", "auroc"; resamples with one class are left out
        of AUROC's, which is (NaN, NaN) if there are no others.

    Raises:
        UserError: see `check_inputs` and `ece`; `ci` or `n_boot` is out of range.
    """
    _check_bins(n_bins, binning)
    q, c = check_inputs(confidence, correct, soft=False)
    if not 0 < ci < 1:
        raise UserError(f"ci must lie between 0 and 1, such as 0.95, not {ci}")
    if n_boot < 2:
        raise UserError(f"n_boot must be at least 2, not {n_boot}")
    n = len(q)
    values, count, right = _groups(q, c)
    cells = np.stack([count - right, right], 1).astype(np.int64).ravel()  # wrong, right of each q
    gap = (values[:, None] - [0.0, 1.0]).ravel()
    starts = 2 * np.flatnonzero(np.diff(_bin_index(values, n_bins, binning), prepend=-1))
    drawn = []
    for counts in _resamples(cells, n_boot, np.random.default_rng([seed, _STREAM])):
        wrong, good = counts[:, 0::2], counts[:, 1::2]
        n_good = good.sum(1)
        won = np.einsum("bm,bm->b", good, np.cumsum(wrong, 1) - wrong / 2)
        with np.errstate(invalid="ignore"):  # 0 / 0 = NaN: one class only
            area = won / (n_good * (n - n_good))
        gaps = np.add.reduceat(counts * gap, starts, axis=1)
        drawn.append([n_good / n, counts @ gap**2 / n, np.abs(gaps).sum(1) / n, area])
    found = np.concatenate([np.stack(block) for block in drawn], 1)
    tails = [(1 - ci) / 2, (1 + ci) / 2]
    intervals = {}
    for name, row in zip(("accuracy", "brier", "ece", "auroc"), found, strict=True):
        row = row[~np.isnan(row)]
        low, high = np.quantile(row, tails) if len(row) else (math.nan, math.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def _resamples(cells: NDArray[np.int64], n_boot: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield blocks `[b, cells]` of multinomial counts, n_boot rows in all."""
    n, m = int(cells.sum()), len(cells)
    owner = np.repeat(np.arange(m), cells)
    block = max(1, _DRAWS // max(n, m))
    for start in range(0, n_boot, block):
        rows = min(block, n_boot - start)
        if 10 * m < n:  # a binomial draw per cell costs about ten draws of a row
            yield rng.multinomial(n, cells / n, size=rows).astype(np.float64)
        else:
            drawn = owner[rng.integers(0, n, (rows, n))] + m * np.arange(rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=rows * m)
            yield counts.reshape(rows, m).astype(np.float64)


# --------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """Everything about one set of confidences; `str()` gives a table, `to_dict()` JSON values.

    Attributes:
        n: Number of examples.
        accuracy: Mean c.
        mean_confidence: Mean q.
        overconfidence: Mean q minus accuracy.
        confidence_std: Standard deviation of q.
        distinct_confidences: Number of different q.
        auroc: NaN when undefined.
        brier: Mean of (q - c)^2.
        reliability: Part of the Brier score, see `Murphy`.
        resolution: Part of the Brier score.
        uncertainty: Part of the Brier score.
        log_loss: In nats, q clipped to [1e-6, 1 - 1e-6].
        ece: Over `n_bins` bins of equal width.
        equal_mass_ece: Over `n_bins` bins of equal mass.
        debiased_ece: Debiased L2 calibration error.
        smooth_ece: Needs no bins.
        max_calibration_error: Of the worst bin.
        aurc: Area under the risk-coverage curve.
        ece_informative: False when q hardly varies (`confidence_std` below 0.02): then a small ECE
            only says that the one number stated is near the accuracy.
        n_bins: As given.
        binning: As given.
        ci: As given.
        n_boot: As given.
        seed: As given.
        intervals: (low, high) of accuracy, brier, ece and auroc; empty without `ci`.
    """

    n: int
    accuracy: float
    mean_confidence: float
    overconfidence: float
    confidence_std: float
    distinct_confidences: int
    auroc: float
    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    log_loss: float
    ece: float
    equal_mass_ece: float
    debiased_ece: float
    smooth_ece: float
    max_calibration_error: float
    aurc: float
    ece_informative: bool
    n_bins: int
    binning: str
    ci: float | None
    n_boot: int
    seed: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON: NaN becomes None, intervals become lists."""

        def plain(value: object) -> object:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {key: plain(value) for key, value in asdict(self).items()}

    def __str__(self) -> str:
        """Return the table: what to read together stands together."""
        label = f"ECE, {self.n_bins} bins ({self.binning})"
        verdict = "" if self.ece_informative else "  uninformative: q hardly varies, see AUROC"
        lines = [
            ("examples", f"{self.n}", ""),
            ("accuracy", _show(self.accuracy), self._interval("accuracy")),
            ("AUROC", _show(self.auroc), self._interval("auroc")),
            ("std of q", _show(self.confidence_std), ""),
            ("distinct q", f"{self.distinct_confidences}", ""),
            (label, _show(self.ece), self._interval("ece") + verdict),
            ("Brier score", _show(self.brier), self._interval("brier")),
            ("  reliability", _show(self.reliability), ""),
            ("  resolution", _show(self.resolution), ""),
            ("  uncertainty", _show(self.uncertainty), ""),
            ("log loss (nats)", _show(self.log_loss), ""),
            ("mean q", _show(self.mean_confidence), f"accuracy {self.overconfidence:+.4f}"),
            ("ECE, equal mass", _show(self.equal_mass_ece), ""),
            ("L2 error, debiased", _show(self.debiased_ece), ""),
            ("smooth ECE", _show(self.smooth_ece), ""),
            ("worst bin", _show(self.max_calibration_error), ""),
            ("AURC", _show(self.aurc), ""),
        ]
        return "\n".join(f"{name:<26}{value:>9}  {note}".rstrip() for name, value, note in lines)

    def _interval(self, name: str) -> str:
        if name not in self.intervals or self.ci is None:
            return ""
        low, high = self.intervals[name]
        return f"[{_show(low)}, {_show(high)}] {100 * self.ci:g}%"


def _show(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def calibration_report(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    n_bins: int = 10,
    binning: str = "left",
    ci: float | None = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    scale: float = 1.0,
) -> CalibrationReport:
    """Measure accuracy, discrimination and calibration of one set of confidences.

    Args:
        confidence: q, `[n]`, numbers from 0 to `scale`.
        correct: c, `[n]`, 0 or 1.
        n_bins: Bins of the calibration errors.
        binning: `"left"`, `"right"` or `"reference"`, see `ece`.
        ci: Coverage of the bootstrap intervals; None for no intervals.
        n_boot: Number of resamples.
        seed: Fixes the resamples.
        scale: 100 if confidences are percentages.

    Raises:
        UserError: see `check_inputs`, `ece` and `bootstrap_intervals`.

    Example:
        >>> calibration_report([0.9, 0.9, 0.1, 0.1], [1, 1, 0, 1], ci=None).brier
        0.21
    """
    _check_bins(n_bins, binning)
    q, c = check_inputs(confidence, correct, soft=False, scale=scale)
    values, count, right = _groups(q, c)
    area = _auroc(count, right)
    if math.isnan(area):
        warnings.warn(
            f"AUROC is undefined: all {len(c)} answers are {'right' if c[0] else 'wrong'}",
            MetricsWarning,
            stacklevel=2,
        )
    parts = murphy_decomposition(q, c)
    spread = float(q.std())
    return CalibrationReport(
        n=len(q),
        accuracy=float(c.mean()),
        mean_confidence=float(q.mean()),
        overconfidence=float(q.mean() - c.mean()),
        confidence_std=spread,
        distinct_confidences=len(values),
        auroc=area,
        brier=brier_score(q, c),
        reliability=parts.reliability,
        resolution=parts.resolution,
        uncertainty=parts.uncertainty,
        log_loss=log_loss(q, c),
        ece=ece(q, c, n_bins, binning),
        equal_mass_ece=equal_mass_ece(q, c, n_bins),
        debiased_ece=debiased_ece(q, c, n_bins, binning),
        smooth_ece=smooth_ece(q, c),
        max_calibration_error=max_calibration_error(q, c, n_bins, binning),
        aurc=aurc(q, c),
        ece_informative=spread >= UNINFORMATIVE_STD,
        n_bins=n_bins,
        binning=binning,
        ci=ci,
        n_boot=n_boot,
        seed=seed,
        intervals={}
        if ci is None
        else bootstrap_intervals(
            q, c, n_bins=n_bins, binning=binning, ci=ci, n_boot=n_boot, seed=seed
        ),
    )
