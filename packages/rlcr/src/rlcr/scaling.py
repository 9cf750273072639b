"""Test-time scaling: votes over samples, resampled analyses, and consistency of what they say.

Samples of one prompt are pairs of an answer y_i and a confidence q_i. Answers of one class, equal
in the verifier's normal form, vote together. An answer of None (the completion had none) does not
vote. A confidence of None or NaN (the completion stated none) counts as zero in sums and below
every number in comparisons, and is left out of means.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlcr.metrics import pass_at_k
from rlcr.prompts import begun
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from tenfold_common.lm import Prompt, TextModel

METHODS = ("majority", "max", "weighted")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NormalForm = Callable[[str], Hashable]
# Sums of confidences are compared after rounding: 0.1 + 0.2 and 0.3 are a tie.
_DECIMALS = 9
# Data are often drawn with the same small seeds; a number beside the seed gives another stream.
_STREAM = 2507_16806


class AnalysisWarning(UserWarning):
    """Resampled analyses state no confidence that can be read."""


@dataclass(frozen=True, slots=True)
class Vote:
    """The answer that won.

    Attributes:
        answer: As the most confident sample of the winning class wrote it; None if none voted.
        confidence: Sum of q of the winning class over the sum of all, the winner's share of the
            confidence; the share of votes where all q are zero; NaN if none voted.
        mean_confidence: Mean q of the winning class, the number that calibrated models make the
            probability of being right; NaN if none of its samples stated a confidence.
        index: Place of that most confident sample, the first of equals; -1 if none voted.
        votes: Number of samples of the winning class.
    """

    answer: str | None
    confidence: float
    mean_confidence: float
    index: int
    votes: int


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """`Vote` of many prompts, each array `[P]`; the fields are those of `Vote`.

    Attributes:
        winner: Class id of the winner, int64; -1 if none voted.
        confidence: float64.
        mean_confidence: float64.
        index: int64.
        votes: int64.
    """

    winner: Ints
    confidence: Floats
    mean_confidence: Floats
    index: Ints
    votes: Ints


def aggregate(
    answers: Sequence[str | None],
    confidences: Sequence[float | None] | Floats,
    method: str = "majority",
    normal_form: NormalForm | None = None,
) -> Vote:
    """Choose one answer among the samples of a prompt.

    Args:
        answers: `[N]`; None where a completion has no answer.
        confidences: `[N]`, in [0, 1]; None or NaN where a completion states none.
        method: `"majority"`: the class with most samples. `"max"`: the class of the most confident
            sample. `"weighted"`: the class with the largest sum of q. Ties go to the class with
            the largest single q, then to the one that occurs first. With q all zero or absent,
            `"max"` and `"weighted"` are the majority.
        normal_form: Maps an answer to what equal answers share, such as a verifier's
            `normal_form`. Defaults to the string without white space around it.

    Raises:
        UserError: different lengths, no samples, an answer that is not text, q that is not a
            number in [0, 1], or an unknown method.

    Example:
        >>> aggregate(["4", "5", " 4"], [0.3, 0.9, 0.3], "weighted").answer
        '5'
    """
    ids = np.array(class_ids(answers, normal_form), dtype=np.int64)
    q = _numbers(confidences)
    if q.shape != ids.shape:
        raise UserError(f"there are {len(ids)} answers but {q.size} confidences")
    vote = aggregate_many(ids[None], q[None], method)
    index = int(vote.index[0])
    return Vote(
        answer=answers[index] if index >= 0 else None,
        confidence=float(vote.confidence[0]),
        mean_confidence=float(vote.mean_confidence[0]),
        index=index,
        votes=int(vote.votes[0]),
    )


def class_ids(answers: Sequence[str | None], normal_form: NormalForm | None = None) -> list[int]:
    """Number the classes of the answers 0, 1, ... in order of occurrence; None becomes -1.

    Raises:
        UserError: the answers are no list, or one of them is neither text nor None.
    """
    if isinstance(answers, str) or not isinstance(answers, (Sequence, np.ndarray)):
        raise UserError(
            f"answers must be a list of texts, one for each sample, not {answers!r:.80}"
        )
    for i, answer in enumerate(answers):
        if not (answer is None or isinstance(answer, str)):
            raise UserError(
                f"answer {i} must be a str, or None where there is none, not {answer!r:.80}"
            )
    form = normal_form or str.strip
    seen: dict[Hashable, int] = {}
    return [-1 if a is None else seen.setdefault(form(a), len(seen)) for a in answers]


def aggregate_many(classes: ArrayLike, confidences: ArrayLike, method: str = "majority") -> Votes:
    """Vote on many prompts at once; every row gives what `aggregate` gives.

    Args:
        classes: `[P, N]` integers: equal within a row where answers are equal, -1 for no answer.
            Rows are independent of each other.
        confidences: `[P, N]`, in [0, 1], NaN where none is stated.
        method: See `aggregate`.

    Raises:
        UserError: see `aggregate`; ids that are not integers, or shapes that differ.
    """
    if method not in METHODS:
        raise UserError(
            f"method must be one of {', '.join(METHODS)}, not {method!r}.{suggest(method, METHODS)}"
        )
    given, q = _samples(classes, confidences)
    voting = given >= 0
    stated = voting & ~np.isnan(q)
    weight = np.where(stated, q, 0.0)
    shape, columns = given.shape, np.broadcast_to(np.arange(given.shape[1]), given.shape)
    ids = _dense(given)
    cell = (ids + shape[1] * np.arange(shape[0])[:, None]).ravel()  # prompt and class in one number

    def per_class(weights: NDArray) -> Floats:
        sums = np.bincount(cell, weights.ravel(), len(cell))
        return np.asarray(sums, dtype=np.float64).reshape(shape)

    count, total, n_stated = per_class(voting), per_class(weight), per_class(stated)
    peak = np.full(len(cell), -1.0)  # no stated confidence is below every stated one
    np.maximum.at(peak, cell, np.where(stated, q, -1.0).ravel())
    peak = peak.reshape(shape)
    first = np.full(len(cell), shape[1])
    np.minimum.at(first, cell, columns.ravel())
    first = first.reshape(shape)

    score = {"majority": count, "max": peak, "weighted": total.round(_DECIMALS)}[method]
    row_total = total.sum(1)
    score = np.where(row_total[:, None] > 0, score, count)
    best = count > 0
    for key in (score, peak):
        best &= key == np.where(best, key, -np.inf).max(1, keepdims=True)
    choice = np.where(best, first, shape[1]).argmin(1)  # dense id of the winner

    def of_winner(values: NDArray) -> NDArray:
        return np.take_along_axis(values, choice[:, None], 1)[:, 0]

    votes = of_winner(count).astype(np.int64)
    anyone = votes > 0
    strongest = voting & (ids == choice[:, None])
    strongest &= np.where(stated, q, -1.0) == of_winner(peak)[:, None]
    index = np.where(anyone, strongest.argmax(1), -1)
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN: nobody voted or stated a confidence
        share = np.where(row_total > 0, of_winner(total), votes) / np.where(
            row_total > 0, row_total, voting.sum(1)
        )
        mean = of_winner(total) / of_winner(n_stated)
    winner = np.where(anyone, np.take_along_axis(given, index[:, None], 1)[:, 0], -1)
    return Votes(winner=winner, confidence=share, mean_confidence=mean, index=index, votes=votes)


def _samples(classes: ArrayLike, confidences: ArrayLike) -> tuple[Ints, Floats]:
    """Check and convert class ids and confidences, both `[P, N]`."""
    ids = np.asarray(classes)
    if ids.dtype.kind not in "iu":
        raise UserError(f"classes must be integer ids, not {ids.dtype}; see rlcr.scaling.class_ids")
    q = _numbers(confidences)
    if ids.ndim != 2 or ids.shape != q.shape:
        raise UserError(
            f"classes {ids.shape} and confidences {q.shape} must have one shape [P, N]: "
            "P prompts, N samples each"
        )
    if not ids.shape[1]:
        raise UserError("there are no samples; give at least one per prompt")
    if ((q < 0) | (q > 1)).any():
        low, high = np.nanmin(q), np.nanmax(q)
        raise UserError(
            f"confidences must lie in [0, 1], but reach from {low:g} to {high:g}. "
            "Divide percentages by 100."
        )
    return ids.astype(np.int64, copy=False), q


def _numbers(confidences: ArrayLike | Sequence[float | None]) -> Floats:
    """Convert confidences, None to NaN; numpy alone would read the texts of numbers as well."""
    if isinstance(confidences, np.ndarray) and confidences.dtype.kind in "iuf":
        return confidences.astype(np.float64, copy=False)
    given = np.asarray(confidences, dtype=object)
    for x in given.flat:
        if not (x is None or isinstance(x, Real)):
            raise UserError(
                f"confidences must be numbers in [0, 1], or None where there is none, not {x!r:.80}"
            )
    return given.astype(np.float64)


def _dense(ids: Ints) -> Ints:
    """Renumber each row's ids 0, 1, ... below N in rising order."""
    if (ids >= 0).all() and (ids < ids.shape[1]).all():
        return ids
    order = np.argsort(ids, axis=1)
    ordered = np.take_along_axis(ids, order, 1)
    rank = np.zeros_like(ids)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=rank[:, 1:])
    dense = np.empty_like(ids)
    np.put_along_axis(dense, order, rank, 1)
    return dense


# --------------------------------------------------------------------------------------------------
# Accuracy against the number of samples


@dataclass(frozen=True, slots=True)
class VoteCurve:
    """What voting gains with the number of samples N.

    Attributes:
        samples: The numbers N.
        accuracy: For each method the share of prompts whose vote is right, one float per N.
        pass_at_n: Chance that any of N samples is right: no vote can do better.
    """

    samples: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]
    pass_at_n: tuple[float, ...]


def vote_curve(
    classes: ArrayLike,
    confidences: ArrayLike,
    correct: ArrayLike,
    samples: Sequence[int],
    *,
    methods: Sequence[str] = METHODS,
    repeats: int = 8,
    seed: int = 0,
) -> VoteCurve:
    """Measure accuracy against the number of samples, over random subsets of the samples.

    Args:
        classes: `[P, N]` ids, see `aggregate_many`.
        confidences: `[P, N]`.
        correct: `[P, N]`, 1 where the sample is right, else 0.
        samples: Numbers from 1 to N.
        methods: See `aggregate`.
        repeats: Random subsets per number; one suffices, and is used, for all N samples.
        seed: Fixes the subsets, which are the same for all methods.

    Raises:
        UserError: see `aggregate_many`; a number of samples that is not there.
    """
    ids, q = _samples(classes, confidences)
    right = np.asarray(correct, dtype=np.float64)
    if right.shape != ids.shape or not ((right == 0) | (right == 1)).all():
        raise UserError(f"correct must hold 0 or 1 in the shape {ids.shape} of classes")
    total = ids.shape[1]
    if not samples or min(samples) < 1 or max(samples) > total:
        raise UserError(f"samples must be numbers from 1 to {total}, not {list(samples)}")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, not {repeats}")
    rng = np.random.default_rng([seed, _STREAM])
    orders = [rng.random(ids.shape).argsort(1) for _ in range(repeats)]
    found: dict[str, list[float]] = {method: [] for method in methods}
    for n in samples:
        if n == total:
            subsets = [np.broadcast_to(np.arange(total), ids.shape)]
        else:
            subsets = [np.sort(order[:, :n], 1) for order in orders]
        for method in methods:
            hits = [_hits(ids, q, right, subset, method) for subset in subsets]
            found[method].append(float(np.mean(hits)))
    good = right.sum(1).astype(np.int64)
    return VoteCurve(
        samples=tuple(samples),
        accuracy={method: tuple(values) for method, values in found.items()},
        pass_at_n=tuple(float(pass_at_k(total, good, n).mean()) for n in samples),
    )


def _hits(ids: Ints, q: Floats, right: Floats, subset: NDArray, method: str) -> float:
    """Return the share of prompts whose vote among a subset of columns is right."""
    chosen, weights, hits = (np.take_along_axis(x, subset, 1) for x in (ids, q, right))
    index = aggregate_many(chosen, weights, method).index
    won = np.take_along_axis(hits, index[:, None], 1)[:, 0]
    return float(np.where(index >= 0, won, 0.0).mean())


# --------------------------------------------------------------------------------------------------
# Resampled analyses


@dataclass(frozen=True, slots=True, eq=False)
class AnalysisEnsemble:
    """Confidences of several analyses of one solution.

    Attributes:
        confidences: `[k]` float64, NaN where a continuation stated none.
        mean: Their mean, the confidence of the ensemble; NaN if all are missing.
        std: Their standard deviation: how much one solution's confidence wavers.
        missing: How many continuations stated none.
    """

    confidences: Floats
    mean: float
    std: float
    missing: int


def ensemble_analyses(
    model: "TextModel",
    prompt: "Prompt",
    completion: str,
    k: int,
    *,
    temperature: float = 0.7,
    max_tokens: int = 512,
    seed: int = 0,
    format: str = "tabc",
) -> AnalysisEnsemble:
    """Keep the reasoning and the answer of a completion and sample what follows it anew, k times.

    Completion and continuations are read leniently, see `rlcr.parsing.parse_completion`. Only what
    a continuation says before any `<answer>` counts: after it the talk is of another answer.
    Continuations that state no readable confidence are counted in an `AnalysisWarning`.

    Args:
        model: Continues the text.
        prompt: Text, or messages; the kept part is continued, as the assistant's turn.
        completion: What the model said before; it must have an answer.
        k: Number of analyses.
        temperature: Of the samples.
        max_tokens: Of each analysis with its confidence.
        seed: Fixes the samples.
        format: `"tabc"` or `"tac"`: formats in which the confidence follows the answer directly or
            after an analysis.

    Raises:
        UserError: k < 1, another format, or a completion without an answer.
    """
    from rlcr.parsing import parse_completion

    if k < 1:
        raise UserError(f"k must be at least 1, not {k}")
    if format not in ("tabc", "tac"):
        raise UserError(
            f"analyses can be resampled in the formats 'tabc' and 'tac', not {format!r}, in which "
            "nothing but the answer follows the reasoning, or the analysis precedes the answer"
        )
    parsed = parse_completion(completion, format, mode="lenient")
    if "answer" not in parsed.spans:
        raise UserError(f"the completion has no answer to keep: {parsed.detail or parsed.error}")
    close = "</answer>"
    kept = completion[: completion.index(close, parsed.spans["answer"][1]) + len(close)]
    (sampled,) = model.sample(
        [begun(prompt, kept)], n=k, temperature=temperature, max_tokens=max_tokens, seed=seed
    )
    # Without the kept part, whose reasoning may hold a confidence block of its own.
    said = [one.text.partition("<answer>")[0] for one in sampled]
    q = _numbers([parse_completion(text, format, mode="lenient").confidence for text in said])
    known = q[~np.isnan(q)]
    if len(known) < k:
        first = sampled[int(np.isnan(q).argmax())]
        warnings.warn(
            f"{k - len(known)} of {k} continuations state no confidence that can be read and are "
            f"left out ({sum(one.finish_reason == 'length' for one in sampled)} of all were cut "
            f"off at max_tokens={max_tokens}). The first of them: {first.text!r:.120}",
            AnalysisWarning,
            stacklevel=2,
        )
    return AnalysisEnsemble(
        confidences=q,
        mean=float(known.mean()) if len(known) else math.nan,
        std=float(known.std()) if len(known) else math.nan,
        missing=len(q) - len(known),
    )


def intra_solution_std(confidences: ArrayLike) -> float:
    """Return the mean over solutions of the standard deviation of q over analyses of each.

    Args:
        confidences: `[S, K]`, K analyses of each of S solutions; NaN where none was stated.
            Solutions with fewer than two stated confidences are left out.

    Returns:
        A float, small when a model says the same of the same solution; NaN if all are left out.

    Raises:
        UserError: the array has not two dimensions.
    """
    q = np.asarray(confidences, dtype=np.float64)
    if q.ndim != 2:
        raise UserError(f"confidences must have the shape [S, K], not {q.shape}")
    q = q[(~np.isnan(q)).sum(1) >= 2]
    return float(np.nanstd(q, axis=1).mean()) if len(q) else math.nan


# --------------------------------------------------------------------------------------------------
# Consistency between answers


@dataclass(frozen=True, slots=True, eq=False)
class Consistency:
    """Whether the confidences of answers that exclude each other fit together.

    Attributes:
        sums: `[P]` float64, for each prompt the sum of q over its distinct answers; NaN where no
            answer states a confidence.
        mean: Mean of `sums`; at most 1 for a coherent model.
        share_above_one: Share of prompts whose sum exceeds 1.
    """

    sums: Floats
    mean: float
    share_above_one: float


def consistency(
    answers: Sequence[Sequence[str | None]],
    confidences: Sequence[Sequence[float | None] | Floats],
    normal_form: NormalForm | None = None,
) -> Consistency:
    """Sum the confidences of the distinct answers to each prompt.

    At most one of several different answers is right, so their probabilities add to at most 1. An
    answer given several times counts once, with its mean q.

    Args:
        answers: For each of P prompts the answers sampled; None is left out.
        confidences: For each answer its q; None or NaN is left out.
        normal_form: See `aggregate`.

    Raises:
        UserError: no prompts, different lengths, an answer that is not text, or q that is not a
            number in [0, 1].
    """
    if len(answers) != len(confidences) or not answers:
        raise UserError(
            f"answers of {len(answers)} prompts and confidences of {len(confidences)}; "
            "give both for the same prompts, at least one"
        )
    sums = np.full(len(answers), math.nan)
    for p, (texts, stated) in enumerate(zip(answers, confidences, strict=True)):
        ids = np.array(class_ids(texts, normal_form), dtype=np.int64)
        q = _numbers(stated)
        if q.shape != ids.shape:
            raise UserError(f"prompt {p} has {len(ids)} answers but {q.size} confidences")
        if ((q < 0) | (q > 1)).any():
            raise UserError(f"confidences of prompt {p} must lie in [0, 1], not {list(stated)}")
        used = (ids >= 0) & ~np.isnan(q)
        if used.any():
            count = np.bincount(ids[used])
            total = np.bincount(ids[used], q[used])
            sums[p] = (total[count > 0] / count[count > 0]).sum()
    known = sums[~np.isnan(sums)]
    return Consistency(
        sums=sums,
        mean=float(known.mean()) if len(known) else math.nan,
        share_above_one=float((known > 1 + 1e-9).mean()) if len(known) else math.nan,
    )
