"""The rewards of RLCR as reward functions for TRL's GRPOTrainer.

R = w_f f + w_c f c + w_s f S(q, c): f says whether the completion is well formed, c whether its
answer is right, q is the confidence it states and S a proper scoring rule. With the Brier score and
equal weights this is, for well-formed completions, the reward c - (q - c)^2 of arXiv 2507.16806 up
to a constant; the constant keeps every well-formed completion at or above a malformed one, which
gets 0.
"""

import logging
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlcr.parsing import ERROR_CODES, FORMATS, ParsedCompletion, parse_completion
from rlcr.scoring import ScoringRule, scoring_rule
from rlcr.verify import Grader, VerifierSpec
from tenfold_common.errors import UserError, suggest

_LOG = logging.getLogger(__name__)

METHODS = ("rlcr", "rlvr")
_TOLERANCE = 1e-9  # of the margin: weights such as 0.1 + 0.2 are not exact
_KEPT_BATCHES = 4
# What GRPOTrainer passes beside the dataset's columns.
_NOT_COLUMNS = ("trainer_state", "log_extra", "log_metric", "environments")

RewardFunction = Callable[..., list[float | None]]


class RewardWarning(UserWarning):
    """Something about the data weakens the reward; training goes on."""


@dataclass(frozen=True)
class Scores:
    """What a batch of N completions earned.

    Attributes:
        format: `[N]`, float32: 1 where well formed, else 0; NaN where not scorable.
        correct: `[N]`, float32: 1 right, 0 wrong or malformed; NaN where not scorable.
        confidence: `[N]`, float64: the stated confidence; NaN where absent or malformed.
        calibration: `[N]`, float32: S(q, c), 0 where malformed or without confidence; NaN where not
            scorable.
        reward: `[N]`, float32: the weighted total; NaN where not scorable.
        parsed: The N parsed completions.
        verifier_failures: Number of completions whose verification raised; they count as wrong.
    """

    format: NDArray[np.float32]
    correct: NDArray[np.float32]
    confidence: NDArray[np.float64]
    calibration: NDArray[np.float32]
    reward: NDArray[np.float32]
    parsed: list[ParsedCompletion]
    verifier_failures: int


class RLCRReward:
    """The reward of RLCR, or of its RLVR baseline.

    Give `functions()` to `GRPOTrainer(reward_funcs=...)` and `weights` to
    `GRPOConfig(reward_weights=...)`; the three share one parse and one verification of each batch.
    The object itself is one reward function that returns the weighted total.

    A row without a gold answer gets None from every function, which TRL leaves out. A malformed
    completion gets 0 from every function. NaN is never returned.

    Logged where TRL offers it, per batch: the share of completions with each parse error as
    `rlcr/parse/<code>` and of well-formed ones as `rlcr/parse/ok`; `rlcr/accuracy`,
    `rlcr/confidence`, `rlcr/confidence_std`, `rlcr/distinct_confidences`, `rlcr/brier`,
    `rlcr/calibration`, `rlcr/unscorable`, `rlcr/verifier_failures`.

    Args:
        verifier: How answers are graded, see `rlcr.verify.get_verifier`. Defaults to "auto".
        rule: The scoring rule S, a name or a `ScoringRule`. Defaults to "brier".
        correctness_weight: w_c. Defaults to 1.
        calibration_weight: w_s. Defaults to 1.
        format_weight: w_f. Defaults to 1. The paper's code has 0.5 for all three: the same up to
            scale.
        format: The output format, one of `rlcr.parsing.FORMATS`. Defaults to "tabc".
        gold_column: Dataset column with the gold answers. Defaults to "answer".
        verifier_column: Dataset column that names each row's verifier; None in it means `verifier`.
            Defaults to no such column.
        method: "rlcr", or "rlvr": the calibration weight is exactly 0 and the calibration is only
            logged. Defaults to "rlcr".
        allow_incorrect_incentive: Accept weights under which a less likely answer can pay more
            than a likelier one. Defaults to False.

    Raises:
        UserError: an argument is unknown, a weight is negative, or the weights and the rule break
            the incentive to be right; the message gives the margin.

    Example:
        >>> reward = RLCRReward(verifier="exact_match", format="tac")
        >>> text = "</think><answer>Paris</answer><confidence>0.8</confidence>"
        >>> total = reward(completions=[text], answer=["paris"])[0]
        >>> round(total, 4)  # 1 + 1 + (1 - 0.2 ** 2)
        2.96
    """

    def __init__(
        self,
        verifier: VerifierSpec = "auto",
        rule: str | ScoringRule = "brier",
        correctness_weight: float = 1.0,
        calibration_weight: float = 1.0,
        format_weight: float = 1.0,
        format: str = "tabc",
        gold_column: str = "answer",
        verifier_column: str | None = None,
        method: str = "rlcr",
        allow_incorrect_incentive: bool = False,
    ) -> None:
        if format not in FORMATS:
            near = suggest(str(format), FORMATS)
            raise UserError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.{near}")
        if method not in METHODS:
            near = suggest(str(method), METHODS)
            raise UserError(f"method must be one of {', '.join(METHODS)}, not {method!r}.{near}")
        if method == "rlcr" and format == "ta":
            raise UserError(
                "format 'ta' has no confidence to reward; use 'tabc', 'tbac' or 'tac', or "
                "method='rlvr'"
            )
        self.__name__ = "rlcr_reward"  # TRL logs rewards/<name>/mean
        self.rule = scoring_rule(rule)
        self._grader = Grader(verifier, keep_going=True)  # training must not end
        self.verifier = self._grader.common
        self.format, self.method = format, method
        self.gold_column, self.verifier_column = gold_column, verifier_column
        self.format_weight = float(format_weight)
        self.correctness_weight = float(correctness_weight)
        self.calibration_weight = 0.0 if method == "rlvr" else float(calibration_weight)
        _check_weights(
            self.rule,
            {
                "format_weight": self.format_weight,
                "correctness_weight": self.correctness_weight,
                "calibration_weight": float(calibration_weight),
            },
            self.calibration_weight,
            allow_incorrect_incentive,
        )
        self._warned_gold = False
        self._batches: OrderedDict[object, Scores] = OrderedDict()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        del state["_lock"]  # cannot be copied to another process
        state["_batches"] = OrderedDict()
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @property
    def weights(self) -> list[float]:
        """The weights of `functions()`, for `GRPOConfig(reward_weights=...)`."""
        return [self.format_weight, self.correctness_weight, self.calibration_weight]

    def functions(self) -> list[RewardFunction]:
        """Return the format, accuracy and calibration rewards, unweighted, for GRPOTrainer."""
        return [self.format_reward, self.accuracy_reward, self.calibration_reward]

    def format_margin(self) -> float:
        """Return the least reward of a well-formed completion; a malformed one gets 0.

        Never negative: it is the format weight plus 0 for a wrong answer at its worst score.
        """
        least, _ = self.rule.bounds()
        return self.format_weight + self.calibration_weight * least

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that a dataset has the columns wanted, before anything is generated.

        Raises:
            UserError: a column is missing.
        """
        available = sorted(set(columns))
        wanted = [("gold_column", self.gold_column)]
        if self.verifier_column is not None:
            wanted.append(("verifier_column", self.verifier_column))
        for argument, name in wanted:
            if name not in available:
                raise UserError(
                    f"the dataset has no column {name!r} for {argument}; it has "
                    f"{', '.join(map(repr, available)) or 'none'}.{suggest(name, available)}"
                )

    def score(
        self,
        texts: Sequence[str],
        golds: Sequence[object],
        *,
        verifiers: Sequence[VerifierSpec | None] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Scores:
        """Parse, verify and score N completions.

        Args:
            texts: The completions.
            golds: Their gold answers, see `rlcr.verify.Verifier.grade`.
            verifiers: For each row its verifier, or None for the common one. Defaults to the
                common one for all.
            prompts: The questions, for verifiers that ask a model. Defaults to none.

        Returns:
            The scores. A verifier that raises makes its row wrong; it is counted, and logged once.

        Raises:
            UserError: the lengths differ, or a verifier's name is unknown.
            MissingDependencyError: a verifier's package is not installed.
        """
        for name, rows in (("golds", golds), ("verifiers", verifiers), ("prompts", prompts)):
            if rows is not None and len(rows) != len(texts):
                raise UserError(f"{len(rows)} {name} do not fit {len(texts)} completions")
        known = {text: parse_completion(text, self.format) for text in dict.fromkeys(texts)}
        parsed = [known[text] for text in texts]
        grades, failed = self._grader.grade([p.answer for p in parsed], golds, prompts, verifiers)
        correct = np.array([np.nan if g is None else g for g in grades], dtype=np.float32)
        correct[failed] = 0.0
        self._warn_unscorable(correct, golds)
        scorable = ~np.isnan(correct)
        well_formed = np.array([p.ok for p in parsed], dtype=bool)
        correct[scorable & ~well_formed] = 0.0  # whatever a verifier of one's own says of None
        confidence = np.array(
            [np.nan if p.confidence is None else p.confidence for p in parsed], dtype=np.float64
        )
        calibration = np.where(scorable, np.float32(0.0), np.float32(np.nan))
        scored = scorable & ~np.isnan(confidence)
        calibration[scored] = self.rule.score(confidence[scored], correct[scored])
        form = np.where(scorable, well_formed, np.nan).astype(np.float32)
        terms = np.stack([form, correct, calibration])
        reward = (np.asarray(self.weights, dtype=np.float32)[:, None] * terms).sum(axis=0)
        return Scores(form, correct, confidence, calibration, reward, parsed, len(failed))

    def format_reward(
        self,
        completions: Sequence[object],
        prompts: Sequence[object] | None = None,
        completion_ids: Sequence[object] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return 1 for well-formed completions and 0 for others; this one logs the metrics."""
        scores = self._scores(completions, prompts, columns)
        self._log(scores, columns)
        return _optional(scores.format)

    def accuracy_reward(
        self,
        completions: Sequence[object],
        prompts: Sequence[object] | None = None,
        completion_ids: Sequence[object] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return 1 for right answers in well-formed completions and 0 for others."""
        return _optional(self._scores(completions, prompts, columns).correct)

    def calibration_reward(
        self,
        completions: Sequence[object],
        prompts: Sequence[object] | None = None,
        completion_ids: Sequence[object] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return S(q, c) for well-formed completions and 0 for others."""
        return _optional(self._scores(completions, prompts, columns).calibration)

    def __call__(
        self,
        completions: Sequence[object],
        prompts: Sequence[object] | None = None,
        completion_ids: Sequence[object] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return the weighted total: one reward function in place of the three.

        Args:
            completions: N texts, or N lists of messages, the last assistant message of which
                counts.
            prompts: N texts or lists of messages. Defaults to none.
            completion_ids: Not used.
            **columns: The dataset's columns, N values each, and what else GRPOTrainer passes.

        Returns:
            N rewards; None where there is no gold answer.

        Raises:
            UserError: a column is missing or of another length, or a completion is of another
                kind; the message names its index.
        """
        scores = self._scores(completions, prompts, columns)
        self._log(scores, columns)
        return _optional(scores.reward)

    def _scores(
        self,
        completions: Sequence[object],
        prompts: Sequence[object] | None,
        columns: dict[str, object],
    ) -> Scores:
        """Score a batch once for all functions that are asked about it, from any thread."""
        texts = [completion_text(item, i) for i, item in enumerate(completions)]
        self.check_columns(name for name in columns if name not in _NOT_COLUMNS)
        golds = self._column(self.gold_column, columns, len(texts))
        verifiers = None
        if self.verifier_column is not None:
            verifiers = self._column(self.verifier_column, columns, len(texts))
        questions = None
        if prompts is not None and self._grader.uses_prompts(verifiers):
            questions = [prompt_text(prompt) for prompt in prompts]
        key = (tuple(texts), repr(golds), repr(verifiers), tuple(questions or ()))
        with self._lock:
            scores = self._batches.get(key)
            if scores is None:
                scores = self.score(texts, golds, verifiers=verifiers, prompts=questions)
                self._batches[key] = scores
                if len(self._batches) > _KEPT_BATCHES:
                    self._batches.popitem(last=False)
        return scores

    def _column(self, name: str, columns: dict[str, object], length: int) -> list:
        values = columns[name]
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != length:
            raise UserError(
                f"column {name!r} must be a list with one value for each of the {length} "
                f"completions, not {values!r:.80}"
            )
        return list(values)

    def _warn_unscorable(self, correct: NDArray[np.float32], golds: Sequence[object]) -> None:
        unscorable = np.flatnonzero(np.isnan(correct))
        if self._warned_gold or not len(unscorable):
            return
        self._warned_gold = True
        row = int(unscorable[0])
        warnings.warn(
            f"row {row} and {len(unscorable) - 1} others of a batch of {len(golds)} cannot be "
            f"scored (gold answer {golds[row]!r:.80}); such rows are left out. Said once.",
            RewardWarning,
            stacklevel=4,
        )

    def _log(self, scores: Scores, columns: dict[str, object]) -> None:
        log_metric, log_extra = columns.get("log_metric"), columns.get("log_extra")
        if callable(log_metric):
            for name, value in batch_metrics(scores).items():
                log_metric(name, value)
        if callable(log_extra):
            log_extra("rlcr_answer", [p.answer for p in scores.parsed])
            log_extra("rlcr_confidence", [p.confidence for p in scores.parsed])
            log_extra("rlcr_correct", _optional(scores.correct))
            log_extra("rlcr_parse", [p.error or "ok" for p in scores.parsed])


def batch_metrics(scores: Scores) -> dict[str, float]:
    """Summarise a batch by finite numbers; what has no value in this batch is left out.

    Returns:
        Shares of the batch for `rlcr/parse/...`, `rlcr/unscorable` and `rlcr/verifier_failures`;
        means over scorable rows for `rlcr/accuracy` and `rlcr/calibration`; over well-formed rows
        with a confidence for the rest.
    """
    count = max(1, len(scores.parsed))
    errors = Counter(parsed.error or "ok" for parsed in scores.parsed)
    metrics = {f"rlcr/parse/{code}": errors[code] / count for code in ("ok", *ERROR_CODES)}
    scorable = ~np.isnan(scores.correct)
    metrics["rlcr/unscorable"] = float((~scorable).sum()) / count
    metrics["rlcr/verifier_failures"] = scores.verifier_failures / count
    if scorable.any():
        metrics["rlcr/accuracy"] = float(scores.correct[scorable].mean())
        metrics["rlcr/calibration"] = float(scores.calibration[scorable].mean())
    stated = ~np.isnan(scores.confidence)
    q = scores.confidence[stated]
    if q.size:
        metrics["rlcr/confidence"] = float(q.mean())
        metrics["rlcr/confidence_std"] = float(q.std())
        metrics["rlcr/distinct_confidences"] = float(np.unique(q).size)
    both = stated & scorable
    if both.any():
        gap = scores.confidence[both] - scores.correct[both]
        metrics["rlcr/brier"] = float((gap**2).mean())
    return metrics


def completion_text(completion: object, index: int = 0) -> str:
    """Return the text of a completion as TRL gives it.

    Args:
        completion: A text, or a list of messages: the last assistant message counts, its content a
            text or a list of blocks of type "text", which are joined. A message of tool calls
            only is the empty text.
        index: Its place in the batch, for the error.

    Raises:
        UserError: it is of another kind.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence):
        for message in reversed(completion):
            if isinstance(message, dict) and message.get("role") == "assistant":
                content = message.get("content")
                if content is None and message.get("tool_calls"):
                    return ""
                text = _content_text(content)
                if text is not None:
                    return text
                raise UserError(
                    f"completion {index}: the content of the last assistant message must be text "
                    f"or a list of text blocks, not {content!r:.80}"
                )
        raise UserError(f"completion {index} has no assistant message: {completion!r:.80}")
    raise UserError(
        f"completion {index} must be a text or a list of messages, not {completion!r:.80}"
    )


def prompt_text(prompt: object) -> str:
    """Return the question in a prompt: the text, or the last user message's."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        for message in reversed(prompt):
            if isinstance(message, dict) and message.get("role") == "user":
                return _content_text(message.get("content")) or ""
    raise UserError(f"a prompt must be a text or messages with a user's, not {prompt!r:.80}")


def _content_text(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [
        block["text"]
        for block in content
        if isinstance(block, dict)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
    ]
    return "".join(texts) if len(texts) == len(content) else None


def _check_weights(
    rule: ScoringRule, weights: dict[str, float], calibration: float, allowed: bool
) -> None:
    for name, weight in weights.items():
        if not (np.isfinite(weight) and weight >= 0.0):
            raise UserError(f"{name} must be a finite number >= 0, not {weight}")
    correctness = weights["correctness_weight"]
    margin = rule.margin(calibration, correctness)
    if allowed or (margin >= -_TOLERANCE and calibration <= correctness + _TOLERANCE):
        return
    most = min(rule.max_weight(correctness), correctness)
    reason = (
        f"min over q of correctness_weight + calibration_weight (S(q,1) - S(q,0)) is {margin:.4g}: "
        "a less likely answer can pay more than a likelier one"
        if margin < -_TOLERANCE
        else f"calibration then outweighs correctness (margin {margin:.4g})"
    )
    raise UserError(
        f"calibration_weight {calibration:g} with rule {rule} and correctness_weight "
        f"{correctness:g} is refused; {reason}. Use a calibration_weight of at most {most:.4g}, "
        "or pass allow_incorrect_incentive=True."
    )


def _optional(values: NDArray[np.float32]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
