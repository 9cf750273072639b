"""The line from 0 to 100 between two opposite concepts, and distributions over its positions."""

import operator
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError
from wavelength_rsa import metrics

Floats = NDArray[np.float64]

LOW, HIGH = 0, 100
STEPS = (1, 2, 4, 5, 10, 20, 25, 50)


@dataclass(frozen=True)
class Scale:
    """Two opposite concepts, the ends of a line: `left` at 0 and `right` at 100.

    Raises:
        UserError: an end is no text or blank, or both are the same (case and blanks aside).

    Example:
        >>> str(Scale("Slow", "Fast"))
        'Slow .. Fast'
    """

    left: str
    right: str

    def __post_init__(self) -> None:
        """Check the ends."""
        for name, end in (("left", self.left), ("right", self.right)):
            if not isinstance(end, str) or not end.strip():
                raise UserError(
                    f"the {name} end of a scale is {end!r}; it must be a word or a phrase"
                )
        if fold(self.left) == fold(self.right):
            raise UserError(
                f"the ends of a scale are {self.left!r} and {self.right!r}; they must differ "
                "(upper case and blanks do not count)"
            )

    def __str__(self) -> str:
        return f"{self.left} .. {self.right}"


def tidy(text: str) -> str:
    """Return a text in Unicode NFC, each run of white space a single blank, none around it.

    Case stays. Two clues that agree in this form are one and the same to every listener.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def fold(text: str) -> str:
    """Return what all spellings of a text share: `tidy` without case.

    Example:
        >>> fold("  Café ") == fold("CAFE\u0301")
        True
    """
    # Folding can undo the composed form, so that form comes before and after.
    return tidy(tidy(text).casefold())


def grid(step: SupportsIndex = 5) -> Floats:
    """Return the positions 0, step, ..., 100, `[100 / step + 1]`, float64.

    Args:
        step: One of `STEPS`, the divisors of 100 that leave a position between the ends.

    Raises:
        UserError: step is another number.

    Example:
        >>> grid(25)
        array([  0.,  25.,  50.,  75., 100.])
    """
    return np.arange(LOW, HIGH + 1, _check_step(step), dtype=np.float64)


def grid_index(
    target: float, step: SupportsIndex = 5, *, snap: Literal["nearest"] | None = None
) -> int:
    """Return the place of a target on the grid, from 0 to 100 / step.

    Args:
        target: A position from 0 to 100.
        step: Distance of neighbouring positions, one of `STEPS`.
        snap: "nearest" moves a target to its nearest position, upwards from the middle between two;
            None takes multiples of the step only.

    Raises:
        UserError: the target is NaN, out of range or off the grid, or the step does not fit.

    Example:
        >>> grid_index(45), grid_index(47, snap="nearest"), grid_index(47, step=1)
        (9, 9, 47)
    """
    if snap not in (None, "nearest"):
        raise UserError(f"snap must be 'nearest' or None, not {snap!r}")
    step, target = _check_step(step), check_position(target)
    if snap is None and target % step:
        raise UserError(
            f"target {target:g} is not a multiple of step {step}; use step 1 (--step 1), or in "
            "Python snap='nearest'"
        )
    return int(target / step + 0.5)


def check_position(value: object, name: str = "target") -> float:
    """Return a position as a float.

    Raises:
        UserError: it is no number, NaN, or not from 0 to 100.
    """
    number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not number or not LOW <= value <= HIGH:  # false for NaN
        raise UserError(f"{name} must be a number from {LOW} to {HIGH}, not {value!r}")
    return float(value)


def project(values: ArrayLike, step: SupportsIndex = 5) -> Floats:
    """Count samples on the grid, splitting each between its two neighbours.

    A sample at a fraction f of the way from one position to the next counts 1 - f on the first and
    f on the second, so that both the number of samples and their mean are kept.

    Args:
        values: Samples, `[N]`, from 0 to 100.
        step: Distance of neighbouring positions, one of `STEPS`.

    Returns:
        The counts, `[100 / step + 1]`, float64, of sum N.

    Raises:
        UserError: a value is no number, NaN or out of range, or the step does not fit.

    Example:
        >>> project([0, 40, 50], step=25)
        array([1. , 0.4, 1.6, 0. , 0. ])
    """
    step = _check_step(step)
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"samples must be numbers, not {values!r:.80}") from error
    if x.ndim != 1:
        raise UserError(f"samples must be a list of numbers, [N], not of shape {list(x.shape)}")
    inside = (x >= LOW) & (x <= HIGH)  # False for NaN
    if not inside.all():
        at = int(np.argmin(inside))
        raise UserError(
            f"sample {at} is {x[at]:g}; samples must lie from {LOW} to {HIGH}: drop the others"
        )
    last = HIGH // step
    left = np.minimum(np.floor(x / step), last - 1).astype(np.int64)
    share = x / step - left
    counts = np.zeros(last + 1)
    np.add.at(counts, left, 1 - share)
    np.add.at(counts, left + 1, share)
    return counts


@dataclass(frozen=True, eq=False)
class Distribution:
    """Probabilities of the positions of a scale.

    Args:
        grid: Positions, `[n]`, rising.
        probs: `[n]`, finite, >= 0, of sum 1 within 1e-6; they are divided by their sum.

    Both are kept as float64 copies that cannot be written to.

    Raises:
        UserError: one of these does not hold.

    Example:
        >>> d = Distribution.from_samples([40, 50, 50, 60])
        >>> d.mean, d.argmax, d.crps(50)
        (50.0, 50.0, 1.25)
    """

    grid: Floats
    probs: Floats

    def __post_init__(self) -> None:
        """Check and freeze both arrays."""
        probs, positions = metrics.check_probs(self.probs, self.grid)
        if probs.ndim != 1:
            raise UserError(f"probs has the shape {list(probs.shape)}; one distribution is [n]")
        for name, array in (("grid", positions), ("probs", probs)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def from_samples(
        cls, values: ArrayLike, step: SupportsIndex = 5, smoothing: float = 0.0
    ) -> Self:
        """Return the histogram of samples `[N]`, see `project`.

        Args:
            values: Samples, `[N]`, from 0 to 100.
            step: Distance of neighbouring positions, one of `STEPS`.
            smoothing: Added to the count of every position, >= 0.

        Raises:
            UserError: see `project`; smoothing is negative; there are neither samples nor
                smoothing.
        """
        if not 0 <= smoothing < np.inf:
            raise UserError(f"smoothing must be a finite number >= 0, not {smoothing!r}")
        counts = project(values, step) + smoothing
        if not counts.any():
            raise UserError("there are no samples: give at least one, or smoothing > 0")
        return cls(grid(step), counts / counts.sum())

    @classmethod
    def uniform(cls, step: SupportsIndex = 5) -> Self:
        """Return the distribution that gives every position the same probability."""
        positions = grid(step)
        return cls(positions, np.full(len(positions), 1 / len(positions)))

    @classmethod
    def point(cls, target: float, step: SupportsIndex = 5) -> Self:
        """Return the distribution that is certain of one position of the grid."""
        positions = grid(step)
        return cls(positions, np.eye(len(positions))[grid_index(target, step)])

    @property
    def mean(self) -> float:
        """The expected position."""
        return float(metrics.mean(self.probs, self.grid))

    @property
    def sd(self) -> float:
        """The standard deviation, in points."""
        return float(metrics.sd(self.probs, self.grid))

    @property
    def entropy(self) -> float:
        """The entropy, in nats."""
        return float(metrics.entropy(self.probs))

    @property
    def argmax(self) -> float:
        """The most probable position; the mean of them if several tie."""
        return float(metrics.mode(self.probs, self.grid)[0])

    @property
    def tied(self) -> bool:
        """Whether several positions are the most probable (equal within a factor of 1 - 1e-9)."""
        return bool(metrics.mode(self.probs, self.grid)[1])

    def crps(self, target: float) -> float:
        """Return the continuous ranked probability score, see `metrics.crps`."""
        return float(metrics.crps(self.probs, self.grid, check_position(target)))

    def expected_distance(self, target: float) -> float:
        """Return the expected distance from a target, E|t' - t|."""
        return float(metrics.expected_distance(self.probs, self.grid, check_position(target)))

    def neg_log_prob(self, target: float) -> float:
        """Return -ln p(target), infinite where p is 0.

        Raises:
            UserError: the target is not a position of the grid.
        """
        at = np.flatnonzero(self.grid == check_position(target))
        if not len(at):
            raise UserError(
                f"target {target:g} is not a position of the grid {self.grid[0]:g}, "
                f"{self.grid[1]:g}, ..., {self.grid[-1]:g}; use a finer step, or its nearest "
                "position"
            )
        with np.errstate(divide="ignore"):
            return float(-np.log(self.probs[at[0]]) + 0.0)

    def w1(self, other: "Distribution") -> float:
        """Return the Wasserstein-1 distance in points from a distribution on the same grid."""
        return float(metrics.w1(self.probs, self._same_grid(other), self.grid))

    def js(self, other: "Distribution") -> float:
        """Return the Jensen-Shannon divergence in nats, from 0 to ln 2."""
        return float(metrics.js(self.probs, self._same_grid(other)))

    def tv(self, other: "Distribution") -> float:
        """Return the total variation distance, from 0 to 1."""
        return float(metrics.tv(self.probs, self._same_grid(other)))

    def quantile(self, p: float) -> float:
        """Return the least position t with P(t' <= t) >= p > 0; for p = 0 the least possible one.

        Raises:
            UserError: p is not in [0, 1].
        """
        if not 0 <= p <= 1:
            raise UserError(f"a quantile's p must be in [0, 1], not {p!r}")
        reached = np.cumsum(self.probs) >= max(p * (1 - 1e-12), 1e-300)
        return float(self.grid[np.argmax(reached)])

    def to_dict(self) -> dict[str, list[float]]:
        """Return `{"grid": [...], "probs": [...]}`, which is JSON."""
        return {"grid": self.grid.tolist(), "probs": self.probs.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, ArrayLike]) -> Self:
        """Return the distribution that `to_dict` wrote.

        Raises:
            UserError: a key is missing, or the values are no distribution.
        """
        for key in ("grid", "probs"):
            if key not in data:
                raise UserError(
                    f"a distribution needs {key!r}, but there is {', '.join(data) or 'nothing'}"
                )
        return cls(np.asarray(data["grid"]), np.asarray(data["probs"]))

    def _same_grid(self, other: "Distribution") -> Floats:
        if not np.array_equal(self.grid, other.grid):
            raise UserError(
                f"the distributions have {len(self.grid)} and {len(other.grid)} positions from "
                "different grids; make both with the same step"
            )
        return other.probs


def _check_step(step: SupportsIndex) -> int:
    try:
        value = operator.index(step)
    except TypeError:
        value = None
    if value not in STEPS or isinstance(step, bool):
        raise UserError(f"step must be one of {', '.join(map(str, STEPS))}, not {step!r}")
    return value
