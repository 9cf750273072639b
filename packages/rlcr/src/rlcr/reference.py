"""The equations of RLCR, one plain function each: what everything fast is tested against.

Sources: "Beyond Binary Rewards: Training LMs to Reason About Their Uncertainty" (arXiv 2507.16806)
for the reward; the definitions of the metrics are those of Murphy (1973), Naeini et al. (2015) and
Geifman and El-Yaniv (2017). Python floats and loops only; slow on purpose.
"""

import math
from collections.abc import Callable, Sequence


def naive_rlcr_reward(correct: int, confidence: float) -> float:
    """Return R = c - (q - c)^2 for a well-formed answer (arXiv 2507.16806, the RLCR reward)."""
    return correct - (confidence - correct) ** 2


def naive_expected_reward(
    p: float, confidence: float, score: Callable[[float, int], float], weight: float = 1.0
) -> float:
    """Return E[c + weight * S(q, c)] for an answer that is right with probability p."""
    right = 1.0 + weight * score(confidence, 1)
    wrong = 0.0 + weight * score(confidence, 0)
    return p * right + (1.0 - p) * wrong


def naive_margin(score: Callable[[float, int], float], weight: float, points: int = 10001) -> float:
    """Return min over q of 1 + weight * (S(q, 1) - S(q, 0)), on a grid of q in [0, 1].

    By the envelope theorem this is the least slope of the best expected reward in p: where it is
    negative, a less likely answer can pay more than a likelier one.
    """
    grid = [i / (points - 1) for i in range(points)]
    return min(1.0 + weight * (score(q, 1) - score(q, 0)) for q in grid)


def naive_brier(confidence: Sequence[float], correct: Sequence[float]) -> float:
    """Return the mean of (q - c)^2."""
    return sum((q - c) ** 2 for q, c in zip(confidence, correct, strict=True)) / len(correct)


def naive_log_loss(
    confidence: Sequence[float], correct: Sequence[float], eps: float = 1e-6
) -> float:
    """Return the mean of -(c ln q + (1 - c) ln(1 - q)), q clipped to [eps, 1 - eps], in nats."""
    total = 0.0
    for q, c in zip(confidence, correct, strict=True):
        q = min(max(q, eps), 1.0 - eps)
        total -= c * math.log(q) + (1.0 - c) * math.log(1.0 - q)
    return total / len(correct)


def naive_bins(confidence: Sequence[float], n_bins: int = 10, binning: str = "left") -> list[int]:
    """Return the bin of each confidence among n_bins of equal width.

    `"left"`: [a, b), the last closed on both sides. `"right"`: (a, b], the first closed on both
    sides. Edges are the decimal numbers i / n_bins, so 0.3 lies on an edge of ten bins.
    `"reference"`: left-closed at the floating-point edges i * (1 / n_bins), as numpy.linspace
    gives them; 0.3, 0.6 and 0.7 then fall below their edges.
    """
    bins = []
    for q in confidence:
        index = 0
        for i in range(1, n_bins):
            edge = i * (1 / n_bins) if binning == "reference" else i / n_bins
            above = q > edge if binning == "right" else q >= edge
            index += above
        bins.append(index)
    return bins


def naive_ece(
    confidence: Sequence[float],
    correct: Sequence[float],
    n_bins: int = 10,
    binning: str = "left",
) -> float:
    """Return sum over bins of n_b / n * |mean q - mean c|."""
    bins = naive_bins(confidence, n_bins, binning)
    total = 0.0
    for b in set(bins):
        inside = [i for i, other in enumerate(bins) if other == b]
        gap = sum(confidence[i] - correct[i] for i in inside)
        total += abs(gap) / len(correct)
    return total


def naive_murphy(confidence: Sequence[float], correct: Sequence[float]) -> dict[str, float]:
    """Split the Brier score over the distinct confidences (Murphy 1973).

    Brier = reliability - resolution + uncertainty, exactly.
    """
    n, base = len(correct), sum(correct) / len(correct)
    reliability = resolution = 0.0
    for value in set(confidence):
        inside = [c for q, c in zip(confidence, correct, strict=True) if q == value]
        rate = sum(inside) / len(inside)
        reliability += len(inside) / n * (value - rate) ** 2
        resolution += len(inside) / n * (rate - base) ** 2
    return {
        "reliability": reliability,
        "resolution": resolution,
        "uncertainty": base * (1.0 - base),
    }


def naive_auroc(confidence: Sequence[float], correct: Sequence[int]) -> float:
    """Return P(q of a right answer > q of a wrong one) + P(equal) / 2; NaN with one class only."""
    right = [q for q, c in zip(confidence, correct, strict=True) if c == 1]
    wrong = [q for q, c in zip(confidence, correct, strict=True) if c == 0]
    if not right or not wrong:
        return math.nan
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    return wins / (len(right) * len(wrong))


def naive_aurc(confidence: Sequence[float], correct: Sequence[float]) -> float:
    """Return the mean over coverages k/n of the error rate among the k most confident.

    Answers of equal confidence count as if shuffled: a prefix that cuts a group of ties takes the
    group's mean error for its members.
    """
    order = sorted(range(len(correct)), key=lambda i: -confidence[i])
    errors: list[float] = []
    for i in order:
        tied = [1.0 - correct[j] for j in order if confidence[j] == confidence[i]]
        errors.append(sum(tied) / len(tied))
    return sum(sum(errors[:k]) / k for k in range(1, len(errors) + 1)) / len(errors)


def naive_pass_at_k(n: int, right: int, k: int) -> float:
    """Return 1 - C(n - right, k) / C(n, k): the chance that one of k of n samples is right."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
