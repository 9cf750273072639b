"""Recalibration after training: monotone maps from stated confidences to better ones.

Fit on held-out answers, never on those the result is reported on. The maps keep the order of the
confidences (isotonic regression may merge some), so they mend calibration and not AUROC.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlcr.metrics import check_inputs
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError
from tenfold_common.optional import require

Floats = NDArray[np.float64]
# Stated confidences are round numbers, and 1.0 does not mean certainty: without a floor its
# infinite logit would rule the fit.
_EPS = 1e-3


class _Recalibrator:
    """Saving, loading and checks shared by the maps below."""

    kind: ClassVar[str]

    def fit(self, confidence: ArrayLike, correct: ArrayLike) -> Self:
        """Fit to held-out answers and return self.

        Args:
            confidence: q, `[n]`, in [0, 1].
            correct: c, `[n]`, 0 or 1, both occurring.

        Raises:
            UserError: see `rlcr.metrics.check_inputs`; or only one class occurs.
        """
        q, c = check_inputs(confidence, correct, soft=False)
        if c.min() == c.max():
            raise UserError(
                f"all {len(c)} answers are {'right' if c[0] else 'wrong'}; "
                "a recalibration needs some of both"
            )
        self._fit(q, c)
        return self

    def predict(self, confidence: ArrayLike) -> Floats:
        """Return the recalibrated confidences, `[n]` float64 in [0, 1].

        Raises:
            UserError: `fit` was not called, or confidences do not fit.
        """
        if not self._fitted():
            raise UserError(f"this {type(self).__name__} is not fitted; call fit or load first")
        values = np.asarray(confidence)
        q, _ = check_inputs(values, np.zeros(values.shape))
        return self._map(q)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters as JSON, atomically; raises UserError when not fitted."""
        if not self._fitted():
            raise UserError(f"this {type(self).__name__} is not fitted; there is nothing to save")
        with atomic_write(path, "w") as stream:
            json.dump({"kind": self.kind, **self._parameters()}, stream, allow_nan=False)
            stream.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; raises UserError when the file is of another kind or broken."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            kind = stored.pop("kind")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{str(path)!r} is not a saved recalibration: {error}") from error
        if kind != cls.kind:
            raise UserError(f"{str(path)!r} holds a {kind!r} recalibration, not a {cls.kind!r} one")
        try:
            made = cls(**stored)
            made._check()
        except (TypeError, UserError) as error:
            raise UserError(f"{str(path)!r} is broken: {error}") from error
        return made

    def _parameters(self) -> dict:
        raise NotImplementedError

    def _fitted(self) -> bool:
        raise NotImplementedError

    def _check(self) -> None:
        """Raise UserError or TypeError unless the parameters are finite numbers in order."""
        raise NotImplementedError

    def _fit(self, q: Floats, c: Floats) -> None:
        raise NotImplementedError

    def _map(self, q: Floats) -> Floats:
        raise NotImplementedError


@dataclass
class Platt(_Recalibrator):
    """p = sigmoid(slope * logit(q) + intercept), fitted by maximum likelihood (Platt 1999).

    The targets are Platt's, (right + 1) / (right + 2) and 1 / (wrong + 2), so that separable data
    give finite parameters. A negative slope is refused in favour of 0: a map must not turn the
    order of the confidences round. q is clipped to [0.001, 0.999] first.

    Attributes:
        slope: >= 0; None before `fit`.
        intercept: None before `fit`.
    """

    kind: ClassVar[str] = "platt"
    slope: float | None = None
    intercept: float | None = None

    def _parameters(self) -> dict:
        return asdict(self)

    def _fitted(self) -> bool:
        return self.slope is not None and self.intercept is not None

    def _check(self) -> None:
        slope = _finite(self.slope, "slope")
        _finite(self.intercept, "intercept")
        if slope < 0:
            raise UserError(f"slope must be >= 0, not {slope}")

    def _fit(self, q: Floats, c: Floats) -> None:
        right = c.sum()
        target = np.where(c == 1, (right + 1) / (right + 2), 1 / (len(c) - right + 2))
        x = _logit(q)
        self.slope, self.intercept = _logistic(x, target)
        if self.slope < 0:
            self.slope, self.intercept = 0.0, float(_logit(target.mean()))

    def _map(self, q: Floats) -> Floats:
        assert self.slope is not None
        assert self.intercept is not None
        return _sigmoid(self.slope * _logit(q) + self.intercept)


@dataclass
class Temperature(_Recalibrator):
    """p = sigmoid(logit(q) / temperature), fitted by maximum likelihood (Guo et al. 2017).

    Above 1 it takes confidences towards 0.5, below 1 away from it; 0.5 stays. q is clipped to
    [0.001, 0.999] first. The fitted temperature lies in [0.01, 100].

    Attributes:
        temperature: > 0; None before `fit`.
    """

    kind: ClassVar[str] = "temperature"
    temperature: float | None = None

    def _parameters(self) -> dict:
        return asdict(self)

    def _fitted(self) -> bool:
        return self.temperature is not None

    def _check(self) -> None:
        if _finite(self.temperature, "temperature") <= 0:
            raise UserError(f"temperature must be > 0, not {self.temperature}")

    def _fit(self, q: Floats, c: Floats) -> None:
        x = _logit(q)
        low, high = 0.01, 100.0  # of 1 / temperature, in which the loss is convex
        for _ in range(60):
            middle = math.sqrt(low * high)
            slope = float((_sigmoid(middle * x) - c) @ x)
            low, high = (low, middle) if slope > 0 else (middle, high)
        self.temperature = 1 / math.sqrt(low * high)

    def _map(self, q: Floats) -> Floats:
        assert self.temperature is not None
        return _sigmoid(_logit(q) / self.temperature)


@dataclass
class Isotonic(_Recalibrator):
    """The best rising step function, linear between its points (Zadrozny and Elkan 2002).

    Fitted by scikit-learn's pool-adjacent-violators; it needs more data than the other two.

    Attributes:
        points: Confidences in rising order.
        values: What they map to, not falling.
    """

    kind: ClassVar[str] = "isotonic"
    points: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def _parameters(self) -> dict:
        return asdict(self)

    def _fitted(self) -> bool:
        return bool(self.points)

    def _check(self) -> None:
        x = np.array([_finite(v, "points") for v in self.points])
        y = np.array([_finite(v, "values") for v in self.values])
        if not len(x) or x.shape != y.shape or (np.diff(x) <= 0).any() or (np.diff(y) < 0).any():
            raise UserError("points and values must be as many, at least one, and rise")
        if not ((y >= 0) & (y <= 1) & (x >= 0) & (x <= 1)).all():
            raise UserError("points and values must lie in [0, 1]")

    def _fit(self, q: Floats, c: Floats) -> None:
        isotonic = require(
            "sklearn.isotonic", extra="baselines", package="rlcr", purpose="isotonic regression"
        )
        fitted = isotonic.IsotonicRegression(y_min=0.0, y_max=1.0).fit(q, c)
        self.points = fitted.X_thresholds_.tolist()
        self.values = fitted.y_thresholds_.tolist()

    def _map(self, q: Floats) -> Floats:
        return np.interp(q, self.points, self.values)


def _finite(value: float | None, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def _logit(q: Floats | np.float64) -> Floats:
    q = np.clip(q, _EPS, 1 - _EPS)
    return np.log(q) - np.log1p(-q)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _logistic(x: Floats, target: Floats) -> tuple[float, float]:
    """Return slope and intercept of the logistic regression of soft targets, by Newton's method."""
    design = np.stack([x, np.ones_like(x)], 1)
    beta = np.zeros(2)

    def loss(beta: Floats) -> float:
        z = design @ beta
        return float((np.logaddexp(0.0, z) - target * z).sum())

    for _ in range(100):
        p = _sigmoid(design @ beta)
        gradient = design.T @ (p - target)
        # The tiny ridge keeps the step defined when q is constant.
        curvature = (design.T * (p * (1 - p))) @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-8 and loss(beta - size * step) > loss(beta):
            size /= 2
        beta = beta - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return float(beta[0]), float(beta[1])
