"""Watching a calibration run: what can go wrong while the Brier score looks better every step.

Two ways to be perfectly calibrated and useless: state the average accuracy for everything
(confidence collapse), or give up on the answer and state a confidence near zero (hedging collapse;
for a fixed q the reward's slope in the chance to be right is 2q, so near q = 0 nothing pulls the
answer up). Both look excellent by ECE and Brier alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rlcr.metrics import auroc, brier_score, ece


class CalibrationWarning(UserWarning):
    """A training run shows a known failure; the message says which and what helps."""


@dataclass(frozen=True)
class Alarm:
    """One warning of a run.

    Attributes:
        kind: `confidence_collapse`, `hedging_collapse`, `no_variance` or `truncated`.
        step: Optimiser step at which it was raised.
        message: What was seen and what helps.
    """

    kind: str
    step: int
    message: str


def window_metrics(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Return the live metrics of one logging window.

    Args:
        confidence: Stated confidences, float `[N]`; NaN where there is none.
        correct: 1 or 0, float `[N]`; NaN where the row could not be judged.

    Returns:
        `accuracy` over the judged rows; over the judged rows with a confidence `brier`, `ece` (ten
        bins, left-closed), `auroc` (NaN with one class), `confidence`, `confidence_std`,
        `distinct_confidences` and `stated`, their share. NaN where there is nothing to average.
    """
    judged = ~np.isnan(correct)
    both = judged & ~np.isnan(confidence)
    q, c = confidence[both], correct[both]
    result = {
        "accuracy": float(correct[judged].mean()) if judged.any() else math.nan,
        "stated": float(both.sum() / judged.sum()) if judged.any() else math.nan,
    }
    names = ["brier", "ece", "auroc", "confidence", "confidence_std", "distinct_confidences"]
    if not len(q):
        return {**result, **dict.fromkeys(names, math.nan)}
    two_classes = bool((c == 0).any() and (c == 1).any() and np.isin(c, (0, 1)).all())
    values = (
        brier_score(q, c),
        ece(q, c),
        auroc(q, c) if two_classes else math.nan,
        float(q.mean()),
        float(q.std()),
        float(len(np.unique(q))),
    )
    return {**result, **dict(zip(names, values, strict=True))}


@dataclass
class Monitor:
    """Raises each alarm once.

    Args:
        collapse_std: Confidence collapse: the standard deviation of q stays below this.
        collapse_logs: For so many logs in a row.
        accuracy_share: Hedging collapse: accuracy stays below this share of its start while the
            Brier score is no worse than at the start.
        hedging_logs: For so many logs in a row; one log alone may be chance.
        doubt: Hedging collapse as well: the mean of q stays below this for as many logs,
        doubt_auroc: the AUROC below this, and the Brier score no worse than at the start.
        start_logs: How many logs make up the start.
        truncated_share: More completions than this cut off at the length limit.
    """

    collapse_std: float = 0.01
    collapse_logs: int = 20
    accuracy_share: float = 0.8
    hedging_logs: int = 3
    doubt: float = 0.25
    doubt_auroc: float = 0.6
    start_logs: int = 3
    truncated_share: float = 0.5
    alarms: list[Alarm] = field(default_factory=list)
    _narrow: int = 0
    _doubting: int = 0
    _hedged: int = 0
    _start: list[tuple[float, float]] = field(default_factory=list)

    def update(self, step: int, logs: Mapping[str, float]) -> list[Alarm]:
        """Look at one log of the trainer (`rlcr/...` and TRL's own keys); return new alarms."""
        raised: list[Alarm] = []
        std = _number(logs, "rlcr/confidence_std")
        accuracy, brier = _number(logs, "rlcr/accuracy"), _number(logs, "rlcr/brier")
        self._narrow = self._narrow + 1 if std < self.collapse_std else 0
        if self._narrow >= self.collapse_logs:
            self._raise(
                raised,
                "confidence_collapse",
                step,
                f"confidence collapse: the standard deviation of q was below "
                f"{self.collapse_std} for {self._narrow} logs (now {std:.3g}). The ECE says "
                "nothing any more; look at AUROC. Give q some signal with an SFT warm-up, raise "
                "temperature, num_generations or entropy_coef, or lower the learning rate.",
            )
        hedging = self._hedging(accuracy, brier, logs)
        if hedging:
            self._raise(
                raised,
                "hedging_collapse",
                step,
                f"hedging collapse: {hedging}. The model earns by doubting its answers in place of "
                "giving right ones. Warm up longer, ramp calibration up (calibration_ramp_steps), "
                "raise correctness_weight, or lower the learning rate.",
            )
        if _number(logs, "frac_reward_zero_std") == 1.0:
            self._raise(
                raised,
                "no_variance",
                step,
                "no prompt has completions of different reward, so there is nothing to learn from. "
                "Raise temperature or num_generations, or choose prompts the model sometimes "
                "solves.",
            )
        cut = _number(logs, "completions/clipped_ratio")
        if cut > self.truncated_share:
            self._raise(
                raised,
                "truncated",
                step,
                f"{cut:.0%} of the completions reached max_completion_length without an end token; "
                "one that is cut off before its last tag earns nothing. Raise "
                "max_completion_length or shorten the reasoning asked for.",
            )
        return raised

    def _hedging(self, accuracy: float, brier: float, logs: Mapping[str, float]) -> str:
        """Return what shows that the model hedges, or ""."""
        q, area = _number(logs, "rlcr/confidence"), _number(logs, "rlcr/auroc")
        self._doubting = self._doubting + 1 if q < self.doubt and area < self.doubt_auroc else 0
        if math.isnan(accuracy) or math.isnan(brier):
            return ""
        if len(self._start) < self.start_logs:
            self._start.append((accuracy, brier))
            return ""
        first, first_brier = np.mean(self._start, axis=0)
        fallen = accuracy < self.accuracy_share * first and brier <= first_brier
        self._hedged = self._hedged + 1 if fallen else 0
        if brier > first_brier:
            return ""
        scores = f"the Brier score went from {first_brier:.3f} to {brier:.3f}"
        if self._hedged >= self.hedging_logs:
            return f"accuracy fell from {first:.3f} to {accuracy:.3f} while {scores}"
        if self._doubting >= self.hedging_logs:
            return (
                f"q is {q:.2f} in the mean for right and wrong answers alike (AUROC {area:.2f}), "
                f"and {scores} at accuracy {accuracy:.3f}"
            )
        return ""

    def _raise(self, raised: list[Alarm], kind: str, step: int, message: str) -> None:
        if all(alarm.kind != kind for alarm in self.alarms):
            alarm = Alarm(kind, step, message)
            self.alarms.append(alarm)
            raised.append(alarm)


def _number(logs: Mapping[str, float], name: str) -> float:
    value = logs.get(name)
    return math.nan if value is None else float(value)
