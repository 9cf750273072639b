"""Choose among candidates the one a listener would understand best; candidates can be anything.

Captions for one of several images, comments for one of several functions, clues for one of several
words: given how well each candidate fits each state, the candidates for one target state are ranked
by what a pragmatic speaker would say (see `wavelength_rsa.rsa`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError
from wavelength_rsa.rsa import RSA

Candidate = TypeVar("Candidate")
State = TypeVar("State")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranked(Generic[Candidate]):
    """A candidate with its probabilities.

    Attributes:
        candidate: As given.
        prob: That the pragmatic speaker says it of the target.
        listener_prob: That the listener this speaker has in mind (L0 at depth 1, L1 at depth 2)
            takes it for the target.
        prior: Its weight among the proposals; the weights sum to 1.
    """

    candidate: Candidate
    prob: float
    listener_prob: float
    prior: float


def pragmatic_rerank(
    candidates: Sequence[Candidate],
    states: Sequence[State],
    target: State,
    log_l0: ArrayLike | Callable[[Candidate, State], float],
    prior: ArrayLike | None = None,
    *,
    alpha: float = 1.0,
    prior_weight: float = 1.0,
    cost: ArrayLike | Callable[[Candidate], float] | None = None,
    depth: int = 1,
    null: Literal["uniform"] | None = None,
) -> list[Ranked[Candidate]]:
    """Rank candidates for one target among several states.

    Equal candidates are one (the first) with the sum of their priors: proposals sampled from a
    language model weigh as often as they were drawn.

    Args:
        candidates: `[k]` of any type.
        states: `[n]` of any type, all different, the target among them.
        target: One of the states.
        log_l0: `[k, n]`, log L0(state|candidate) with rows that are distributions over the states;
            or a function of a candidate and a state whose values are normalised over the states
            here, such as log p(candidate|state) or a similarity; -inf for "does not fit".
        prior: `[k]`, weights >= 0 of the proposals, such as their counts or model probabilities.
            Defaults to equal ones.
        alpha: How much it counts to be understood: 0 gives the prior, inf the best candidate.
        prior_weight: How much the prior counts.
        cost: `[k]` or a function of a candidate, in nats, such as 0.1 per word.
        depth: How often speaker and listener reason about each other, >= 1.
        null: "uniform" lets the speaker say nothing as well; what the probabilities lack to 1 is
            the probability of that.

    Returns:
        The different candidates, likeliest first; ties in the order given.

    Raises:
        UserError: the target is no state, a length does not fit, a value is out of range, or no
            candidate fits the target.

    Example:
        Two pictures. "dog" is true of both, so the careful speaker is specific.

        >>> pictures = {"left": "a dog on a beach", "right": "a dog on a sofa"}
        >>> def fit(caption, picture):
        ...     return float(sum(word in pictures[picture] for word in caption.split()))
        >>> for r in pragmatic_rerank(["dog", "dog beach"], list(pictures), "left", fit):
        ...     print(r.candidate, round(r.prob, 2))
        dog beach 0.59
        dog 0.41
    """
    if depth == 0:
        raise UserError("depth must be at least 1: at depth 0 nobody chooses among candidates")
    size, column = len(candidates), _find(target, states)
    if not size:
        raise UserError("there are no candidates to rank")
    if callable(log_l0):
        logs = _normalised([[log_l0(c, s) for s in states] for c in candidates])
    else:
        logs = np.asarray(log_l0, dtype=np.float64)
    if logs.shape != (size, len(states)):
        raise UserError(
            f"log_l0 must be [candidates, states] = {[size, len(states)]}, not of shape "
            f"{list(logs.shape)}"
        )
    costs = None
    if cost is not None:
        costs = _column("cost", [cost(c) for c in candidates] if callable(cost) else cost, size)
    weights = np.ones(size) if prior is None else _column("prior", prior, size)
    groups = _equal(candidates)
    first = [group[0] for group in groups]
    weights = np.array([weights[group].sum() for group in groups])
    possible = np.array((logs[first] != -np.inf).any(axis=0))
    if null is None and not possible[column]:
        raise UserError(
            f"no candidate fits the target {target!r}: log_l0 is -inf for all; smooth it, propose "
            'other candidates or use null="uniform"'
        )
    # Without a null utterance a state that fits no candidate has no speaker; rows do not need it.
    possible |= null is not None
    rsa = RSA(
        alpha=alpha,
        depth=depth,
        cost=None if costs is None else costs[first],
        utterance_prior=weights,
        prior_weight=prior_weight,
        null=null,
    )
    levels = rsa.trace(logs[first][:, possible])
    at = int(possible[:column].sum())
    speaker, listener = (np.exp(levels[i].log_probs[: len(first), at]) for i in (-2, -3))
    ranked = [
        Ranked(candidates[i], float(s), float(l), float(w))
        for i, s, l, w in zip(first, speaker, listener, weights / weights.sum(), strict=True)
    ]
    return sorted(ranked, key=lambda r: -r.prob)


@dataclass(frozen=True)
class PragmaticReranker(Generic[Candidate, State]):
    """`pragmatic_rerank` with a score function and settings kept for many targets.

    Args:
        score: A function of a candidate and a state, see `log_l0` of `pragmatic_rerank`.
        alpha: See `pragmatic_rerank`, as for all that follow.
        prior_weight: The weight of the prior.
        cost: A function of a candidate.
        depth: Depth of reasoning.
        null: Whether the speaker may say nothing.

    Example:
        >>> near = PragmaticReranker(lambda number, place: -abs(number - place), alpha=2.0)
        >>> near([10, 12, 17], states=[9, 20], target=20)[0].candidate
        17
    """

    score: Callable[[Candidate, State], float]
    alpha: float = 1.0
    prior_weight: float = 1.0
    cost: Callable[[Candidate], float] | None = None
    depth: int = 1
    null: Literal["uniform"] | None = None

    def __post_init__(self) -> None:
        """Check the settings before the first call."""
        RSA(alpha=self.alpha, prior_weight=self.prior_weight, depth=self.depth, null=self.null)

    def __call__(
        self,
        candidates: Sequence[Candidate],
        states: Sequence[State],
        target: State,
        prior: ArrayLike | None = None,
    ) -> list[Ranked[Candidate]]:
        """Rank candidates for a target; see `pragmatic_rerank`."""
        return pragmatic_rerank(
            candidates,
            states,
            target,
            self.score,
            prior,
            alpha=self.alpha,
            prior_weight=self.prior_weight,
            cost=self.cost,
            depth=self.depth,
            null=self.null,
        )


def _find(target: State, states: Sequence[State]) -> int:
    """Return the place of the target: the same object, or else an equal one."""
    same = [i for i, state in enumerate(states) if state is target]
    # Arrays and tensors have no single truth value, so they are found as objects only.
    equal = same or [i for i, state in enumerate(states) if (state == target) is True]
    if len(equal) != 1:
        raise UserError(
            f"the target {target!r} must occur once among the {len(states)} states, not "
            f"{len(equal)} times"
        )
    return equal[0]


def _equal(candidates: Sequence[object]) -> list[list[int]]:
    """Group the places of equal candidates; those without a hash are all different."""
    groups: dict[object, list[int]] = {}
    for i, candidate in enumerate(candidates):
        try:
            groups.setdefault(candidate, []).append(i)
        except TypeError:
            groups[object()] = [i]
    return list(groups.values())


def _normalised(scores: list[list[float]]) -> Array:
    """Return scores minus their logsumexp over states."""
    values = np.array(scores, dtype=np.float64)
    bad = ~(values < np.inf)  # NaN or inf
    if bad.any():
        raise UserError(f"the score function gave {values[bad][0]}; it must give numbers or -inf")
    best = values.max(1, keepdims=True)
    if np.isneginf(best).any():
        row = int(np.isneginf(best)[:, 0].argmax())
        raise UserError(f"candidate {row} fits no state: all its scores are -inf; leave it out")
    values = values - best
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def _column(name: str, values: ArrayLike, size: int) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (size,):
        raise UserError(f"{name} must be {size} numbers, one per candidate, not {values!r}")
    return column
