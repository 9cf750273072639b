"""Scoring rules for a stated confidence, and the margin that keeps the most likely answer best.

With the reward R = alpha c + lambda S(q, c) and a proper rule S, stating q = p is best for an
answer that is right with probability p, and the reward expected then has the slope
alpha + lambda (S(p, 1) - S(p, 0)) in p. Where this slope is negative a less likely answer pays more
than a likelier one. Its minimum is the margin; arXiv 2507.16806 shows that it is 0 for the Brier
score with equal weights. Boundedness of S alone does not make it non-negative.

Every rule here is shifted so that its least score is 0, the score of a malformed completion.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError, suggest

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScoringRule:
    """Base of the rules: a subclass gives `name` and `_scores`.

    A rule S(q, c) is proper when p S(q, 1) + (1 - p) S(q, 0) is largest at q = p. Then S(q, 1) does
    not fall and S(q, 0) does not rise with q, so extremes lie at q = 0 and q = 1.
    """

    name: ClassVar[str] = ""

    def score(self, confidence: ArrayLike, correct: ArrayLike) -> NDArray[np.float32]:
        """Score confidences, higher is better.

        Args:
            confidence: q in [0, 1], any shape; computed in float64.
            correct: c, 0 or 1 or a degree of correctness between, of a shape that broadcasts with
                `confidence`. Between 0 and 1 the score is c S(q, 1) + (1 - c) S(q, 0).

        Returns:
            The scores, float32, in `bounds()`.

        Raises:
            UserError: a value is not in [0, 1].
        """
        q, c = _unit_interval("confidence", confidence), _unit_interval("correct", correct)
        right, wrong = self._scores(q)
        return np.asarray(c * right + (1.0 - c) * wrong, dtype=np.float32)

    def margin(self, weight: float = 1.0, correctness_weight: float = 1.0) -> float:
        """Return min over q of correctness_weight + weight * (S(q, 1) - S(q, 0)).

        Negative: a wrong answer with a low confidence can pay more than a likelier answer with an
        honest one. S(q, 1) - S(q, 0) does not fall with q for a proper rule, so the minimum is at
        q = 0, or at q = 1 for a negative weight.
        """
        right, wrong = self._scores(np.array([0.0, 1.0]))
        return float(np.min(correctness_weight + weight * (right - wrong)))

    def bounds(self) -> tuple[float, float]:
        """Return the least and the greatest score."""
        scores = np.concatenate(self._scores(np.array([0.0, 1.0])))
        return float(scores.min()), float(scores.max())

    def max_weight(self, correctness_weight: float = 1.0) -> float:
        """Return the largest weight whose margin is not negative."""
        loss = -self.margin(1.0, 0.0)
        return correctness_weight / loss if loss > 0 else math.inf

    def _scores(self, q: Array) -> tuple[Array, Array]:
        """Return S(q, 1) and S(q, 0) for q in [0, 1], float64, of the shape of q."""
        raise NotImplementedError


@dataclass(frozen=True)
class Brier(ScoringRule):
    """S = 1 - (q - c)^2, in [0, 1]: the rule of arXiv 2507.16806. Largest weight 1."""

    name: ClassVar[str] = "brier"

    def _scores(self, q: Array) -> tuple[Array, Array]:
        return 1.0 - (1.0 - q) ** 2, 1.0 - q**2


@dataclass(frozen=True)
class Spherical(ScoringRule):
    """S(q, 1) = q / sqrt(q^2 + (1 - q)^2), S(q, 0) the same with 1 - q. Largest weight 1."""

    name: ClassVar[str] = "spherical"

    def _scores(self, q: Array) -> tuple[Array, Array]:
        length = np.hypot(q, 1.0 - q)
        return q / length, (1.0 - q) / length


@dataclass(frozen=True)
class ClippedLog(ScoringRule):
    """The logarithmic rule with q clipped to [eps, 1 - eps], shifted to start at 0.

    Proper; strictly so within the clip. Unscaled, S(q, 1) = ln(q) - ln(eps) reaches
    ln((1 - eps) / eps) nats and the weight may be at most 1 / ln((1 - eps) / eps): with eps = 0.05
    and weight 1 the margin is -1.94. Scaled, it is divided by that and lies in [0, 1].

    Args:
        eps: The clip, in (0, 0.5). Defaults to 0.05.
        scaled: Whether to divide by ln((1 - eps) / eps). Defaults to True.

    Raises:
        UserError: eps is out of range.
    """

    eps: float = 0.05
    scaled: bool = True
    name: ClassVar[str] = "log"

    def __post_init__(self) -> None:
        """Check eps."""
        if not 0.0 < self.eps < 0.5:
            raise UserError(f"eps must be between 0 and 0.5, both excluded, not {self.eps!r}")

    def _scores(self, q: Array) -> tuple[Array, Array]:
        unit = math.log((1.0 - self.eps) / self.eps) if self.scaled else 1.0
        q = np.clip(q, self.eps, 1.0 - self.eps)
        return np.log(q / self.eps) / unit, np.log((1.0 - q) / self.eps) / unit


@dataclass(frozen=True)
class BetaFamily(ScoringRule):
    """The rules whose thresholds t carry the weight t^(a-1) (1-t)^(b-1) (Buja et al. 2005).

    S(q, 1) = 1 - (1/M) int_q^1 t^(a-1) (1-t)^b dt and S(q, 0) = 1 - (1/M) int_0^q t^a (1-t)^(b-1)
    dt, with M the larger of the two full integrals, so that scores lie in [0, 1]. a = b = 1 is the
    Brier score. Large a stresses high confidences (over-confidence costs more), large b low ones.

    Args:
        a, b: Shape, each in [0.01, 100]. Default to 1.

    Raises:
        UserError: a or b is out of range.
    """

    a: float = 1.0
    b: float = 1.0
    name: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        """Check a and b."""
        for name in ("a", "b"):
            value = getattr(self, name)
            if not 0.01 <= value <= 100.0:
                raise UserError(f"{name} must be between 0.01 and 100, not {value!r}")

    def _scores(self, q: Array) -> tuple[Array, Array]:
        # B(a, b+1) : B(a+1, b) = b : a, so the larger of the two full integrals divides out.
        largest = max(self.a, self.b)
        miss = (self.b / largest) * _incomplete_beta(self.b + 1.0, self.a, 1.0 - q)
        false_alarm = (self.a / largest) * _incomplete_beta(self.a + 1.0, self.b, q)
        return 1.0 - miss, 1.0 - false_alarm


@dataclass(frozen=True)
class RankedBins(ScoringRule):
    """The ranked rule over levels 0, 1/(n-1), ..., 1, for confidences given in steps.

    q counts as its nearest level v. Each threshold t midway between neighbouring levels asks "is p
    above t?"; a wrong no costs 1 - t and a wrong yes t. One minus twice the mean cost is, since the
    midpoint rule is exact for linear functions, S = 1 - (v - c)^2. Among the levels the one
    nearest to p is best, and no other (strictly proper on the grid); steps finer than the grid earn
    nothing.

    Args:
        bins: Number of levels, at least 2. Defaults to 11: 0, 0.1, ..., 1.

    Raises:
        UserError: bins is not a whole number >= 2.
    """

    bins: int = 11
    name: ClassVar[str] = "bins"

    def __post_init__(self) -> None:
        """Check bins."""
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 2:
            raise UserError(f"bins must be a whole number of at least 2, not {self.bins!r}")

    def _scores(self, q: Array) -> tuple[Array, Array]:
        steps = self.bins - 1
        return Brier()._scores(np.floor(q * steps + 0.5) / steps)


_RULES: dict[str, Callable[..., ScoringRule]] = {
    rule.name: rule for rule in (Brier, Spherical, ClippedLog, BetaFamily, RankedBins)
}


def scoring_rule(spec: str | ScoringRule, **parameters: float) -> ScoringRule:
    """Make a rule from its name, or hand a rule through.

    Args:
        spec: `"brier"`, `"spherical"`, `"log"`, `"beta"`, `"bins"`, or a rule.
        **parameters: Of the named rule: `eps` and `scaled`, `a` and `b`, or `bins`.

    Returns:
        The rule.

    Raises:
        UserError: the name or a parameter is unknown, or parameters come with a ready rule.

    Example:
        >>> scoring_rule("log", eps=0.01)
        ClippedLog(eps=0.01, scaled=True)
    """
    if isinstance(spec, ScoringRule):
        if parameters:
            raise UserError(f"{spec!r} is made already; it takes no {', '.join(parameters)}")
        return spec
    if spec not in _RULES:
        near = suggest(str(spec), _RULES)
        raise UserError(f"rule must be one of {', '.join(_RULES)}, not {spec!r}.{near}")
    kind = _RULES[spec]
    known = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in parameters:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            raise UserError(f"rule {spec!r} {takes}, not {name!r}.{suggest(name, known)}")
    return kind(**parameters)


def _unit_interval(name: str, values: ArrayLike) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be numbers, not {values!r:.80}") from error
    inside = (array >= 0.0) & (array <= 1.0)  # False for NaN
    if not inside.all():
        raise UserError(f"{name} must be between 0 and 1, not {array[~inside].flat[0]}")
    return array


def _incomplete_beta(a: float, b: float, x: Array) -> Array:
    """Regularised incomplete beta function I_x(a, b), to about 1e-13.

    By its continued fraction (DLMF 8.17.22), evaluated by the modified Lentz method, on the side of
    the mean where it converges fast: in some ten terms plus the square root of a + b.
    """
    flip = x > (a + 1.0) / (a + b + 2.0)
    first, second = np.where(flip, b, a), np.where(flip, a, b)
    z = np.where(flip, 1.0 - x, x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    with np.errstate(divide="ignore"):  # ln 0 = -inf, whose exponential is the 0 wanted
        front = np.exp(first * np.log(z) + second * np.log1p(-z) - log_beta) / first
    tiny = 1e-300
    c = np.ones_like(z)
    d = 1.0 - (first + second) * z / (first + 1.0)
    d = 1.0 / np.where(np.abs(d) < tiny, tiny, d)
    fraction = d.copy()
    for m in range(1, 500):
        even = m * (second - m) * z / ((first + 2 * m - 1) * (first + 2 * m))
        odd = -(first + m) * (first + second + m) * z / ((first + 2 * m) * (first + 2 * m + 1))
        change = np.ones_like(z)
        for numerator in (even, odd):
            d = 1.0 + numerator * d
            c = 1.0 + numerator / c
            d = 1.0 / np.where(np.abs(d) < tiny, tiny, d)
            c = np.where(np.abs(c) < tiny, tiny, c)
            change = c * d
            fraction = fraction * change
        if np.all(np.abs(change - 1.0) < 1e-15):
            break
    value = front * fraction
    return np.where(flip, 1.0 - value, value)
