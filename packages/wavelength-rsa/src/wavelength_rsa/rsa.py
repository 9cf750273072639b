"""Rational Speech Acts: speakers and listeners that reason about each other.

A literal listener L0(t|u) says what each utterance u means as a distribution over states t. With a
utility U(u, t), log L0(t|u) unless said otherwise, the pragmatic speaker and listener are

    S1(u|t) = exp(alpha U(u, t)) P(u)^lam exp(-cost(u)) / sum over utterances of the same
    L1(t|u) = S1(u|t) P(t)                              / sum over states of the same

and S2, L2, ... follow by putting L1 in the place of L0 (Frank and Goodman 2012; Goodman and Frank
2016). alpha = lam = 1 without cost is the speaker, and the same with equal priors and a null
utterance the listener, of arXiv 2509.06952. Matrices are `[..., m, n]`: utterances, then states.

All is computed with logarithms in float64. Probabilities of 0 (logarithms of -inf) are welcome, and
so are alpha = 0, where impossible utterances too are as likely as their prior, and alpha = inf, the
limit: the best utterance, ties (to 1e-12) shared as the prior shares them.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from torch import Size, Tensor
    from torch import device as Device

Array = NDArray[np.float64]
Either = TypeVar("Either", Array, "Tensor")  # numpy in, numpy out; torch in, torch out
Utility = Literal["log_prob", "neg_expected_distance", "neg_w1"]

SUM_TOLERANCE = 1e-6
TIE_TOLERANCE = 1e-12
BLOCK = 2**18  # probabilities: 2 MB
ORDINARY = 230.0  # exp(+-230) = 1e+-100; what 1e100 times an exponential below 1e-308 adds is lost


@dataclass(frozen=True, eq=False)
class Level(Generic[Either]):
    """One level of reasoning.

    Attributes:
        name: "L0", "S1", "L1", "S2", ...
        log_probs: `[..., m, n]` float64, with the null utterance last if there is one. A speaker's
            columns and a listener's rows sum to 1; rows of padded utterances are 0 (-inf).
    """

    name: str
    log_probs: Either


@dataclass(frozen=True, eq=False)
class RSA:
    """Speakers and listeners of any depth on top of a literal listener.

    Args:
        alpha: How much the speaker cares to be understood, >= 0, inf included; a number or a 0-dim
            tensor, through which gradients flow if `log_l0` is a tensor as well.
        depth: How often speaker and listener reason about each other; 0 is the literal listener.
        cost: `[m]`, or `[..., m]` for a batch, finite: what saying each utterance costs, in nats
            and outside of alpha. Defaults to 0; the null utterance costs 0.
        state_prior: `[n]` or `[..., n]`, weights >= 0. Defaults to equal ones.
        utterance_prior: `[m]` or `[..., m]`, weights >= 0. Defaults to equal ones; the null
            utterance has the mean weight of the others.
        prior_weight: lam, >= 0: the exponent of the utterance prior.
        null: "uniform" adds an utterance that says nothing (every state equally likely) as the last
            row, None does not.
        utility: "log_prob" or "neg_expected_distance", -E|t' - t| / tau over the states t' heard:
            near misses are nearly right. "neg_w1" is another name of the latter, as the expected
            distance is the Wasserstein-1 distance to the state meant.
        positions: `[n]`, where the states lie; needed by the utilities that measure distances.
        tau: The distance that costs one nat at alpha = 1, > 0, in the unit of `positions`.

    Raises:
        UserError: a value is out of range; the message names it.

    Example:
        A blue square, a blue circle and a green square (Frank and Goodman 2012). Who says "blue"
        likely means the square, since the circle could have been called "circle".

        >>> words = np.array(
        ...     [[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]]
        ... )  # blue square circle green
        >>> with np.errstate(divide="ignore"):
        ...     literal = np.log(words / words.sum(1, keepdims=True))
        >>> RSA(null=None).listener(literal)[0].round(3).tolist()
        [0.6, 0.4, 0.0]
    """

    alpha: "float | Tensor" = 1.0
    depth: int = 1
    cost: ArrayLike | None = None
    state_prior: ArrayLike | None = None
    utterance_prior: ArrayLike | None = None
    prior_weight: float = 1.0
    null: Literal["uniform"] | None = "uniform"
    utility: Utility = "log_prob"
    positions: ArrayLike | None = None
    tau: float = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without a matrix."""
        _check_alpha(self.alpha)
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise UserError(f"depth must be a whole number of at least 0, not {self.depth!r}")
        _check_prior_weight(self.prior_weight)
        if self.null not in (None, "uniform"):
            raise UserError(f'null must be "uniform" or None, not {self.null!r}')
        if self.utility not in get_args(Utility):
            raise UserError(
                f"utility must be one of {', '.join(get_args(Utility))}, not {self.utility!r}."
                + suggest(str(self.utility), get_args(Utility))
            )
        if self.utility != "log_prob" and self.positions is None:
            raise UserError(f"utility {self.utility!r} needs positions, such as grid(5)")
        if not _is_number(self.tau) or not 0.0 < self.tau < math.inf:
            raise UserError(f"tau must be a finite number above 0, not {self.tau!r}")

    def log_speaker(
        self, log_l0: Either, *, mask: "ArrayLike | Tensor | None" = None, keep_null: bool = True
    ) -> Either:
        """Return the log-probabilities of what the pragmatic speaker of this depth says.

        Args:
            log_l0: `[..., m, n]`, log L0(t|u): every row is a distribution over the states. numpy,
                or torch in float32 or float64, as half precision does not sum to 1; gradients flow
                to it.
            mask: `[..., m]` bool, False for padding; padded rows may hold anything and get
                probability 0. Defaults to all True.
            keep_null: Whether the result has the null utterance, if there is one, as its last row.

        Returns:
            `[..., m (+ 1 with the null utterance), n]` float64, of the kind of `log_l0`. Columns
            sum to 1, the null utterance included.

        Raises:
            UserError: `log_l0` is no matrix of log-probabilities or looks transposed, a length does
                not fit, depth is 0, or no utterance can mean one of the states.
        """
        if self.depth == 0:
            raise UserError("there is no speaker at depth 0, the literal listener; use depth=1")
        return self._level(2 * self.depth - 1, log_l0, mask, keep_null)

    def speaker(
        self, log_l0: Either, *, mask: "ArrayLike | Tensor | None" = None, keep_null: bool = True
    ) -> Either:
        """Return the probabilities of `log_speaker`."""
        return _exp(self.log_speaker(log_l0, mask=mask, keep_null=keep_null))

    def log_listener(
        self, log_l0: Either, *, mask: "ArrayLike | Tensor | None" = None, keep_null: bool = True
    ) -> Either:
        """Return the log-probabilities of what the pragmatic listener of this depth understands.

        The rows are alternatives: the utterance heard must be one of them, once.

        Args:
            log_l0: As in `log_speaker`.
            mask: As in `log_speaker`.
            keep_null: As in `log_speaker`.

        Returns:
            `[..., m (+ 1 with the null utterance), n]` float64, of the kind of `log_l0`. Rows sum
            to 1, those of padded utterances to 0. An utterance of prior 0 is understood as one of
            a very small prior would be.

        Raises:
            UserError: as in `log_speaker`, or an utterance fits only states of prior 0.
        """
        return self._level(2 * self.depth, log_l0, mask, keep_null)

    def listener(
        self, log_l0: Either, *, mask: "ArrayLike | Tensor | None" = None, keep_null: bool = True
    ) -> Either:
        """Return the probabilities of `log_listener`."""
        return _exp(self.log_listener(log_l0, mask=mask, keep_null=keep_null))

    def trace(
        self,
        log_l0: Either,
        *,
        mask: "ArrayLike | Tensor | None" = None,
        levels: Collection[str] | None = None,
    ) -> list[Level[Either]]:
        """Return levels of reasoning, computed once for all of them.

        Args:
            log_l0: As in `log_speaker`.
            mask: As in `log_speaker`.
            levels: Names of those to return. Defaults to all, L0, S1, L1, ... to L_depth.

        Returns:
            The levels, the literal listener first.

        Raises:
            UserError: as in `log_listener`, or a level has another name.
        """
        names = ["L0", *(f"{who}{d}" for d in range(1, self.depth + 1) for who in "SL")]
        for name in names if levels is None else levels:
            if name not in names:
                raise UserError(
                    f"levels at depth {self.depth} are {', '.join(names)}, not {name!r}"
                )
        wanted = [i for i, name in enumerate(names) if levels is None or name in levels]
        found = _compute(_game(self, log_l0, mask), self.alpha, wanted)
        return [
            Level(names[i], _like(log_l0, level)) for i, level in zip(wanted, found, strict=True)
        ]

    def _level(
        self, index: int, log_l0: Either, mask: "ArrayLike | Tensor | None", keep_null: bool
    ) -> Either:
        (level,) = _compute(_game(self, log_l0, mask), self.alpha, [index])
        return _like(log_l0, level if keep_null or self.null is None else level[..., :-1, :])


def production(
    log_l0_at_target: ArrayLike,
    prior: ArrayLike | None = None,
    alpha: float = 1.0,
    lam: float = 1.0,
    cost: ArrayLike | None = None,
) -> Array:
    """Return log S1(u|t*) of candidates proposed for one target t*.

    log S1(u|t*) = alpha log L0(t*|u) + lam log P(u) - cost(u) - log of the sum over candidates
    (arXiv 2509.06952, its production experiment, with alpha = lam = 1 and no cost).

    Args:
        log_l0_at_target: `[k]`, log L0(t*|u), or another utility of at most 0 such as minus the
            expected distance; -inf where the listener would never choose the target.
        prior: `[k]`, weights >= 0 of the proposals, such as their counts. Defaults to equal ones.
        alpha: >= 0, inf for the best candidate.
        lam: Exponent of the prior, >= 0; 0 makes candidates alike however often proposed.
        cost: `[k]`, finite, in nats. Defaults to 0.

    Returns:
        `[k]` float64, log-probabilities.

    Raises:
        UserError: lengths differ, a value is out of range, or every candidate has probability 0.

    Example:
        >>> np.exp(production(np.log([0.1, 0.3]), prior=[3, 1])).round(3).tolist()
        [0.5, 0.5]
    """
    utility = _tensor(log_l0_at_target)
    if utility.ndim != 1 or not len(utility):
        raise UserError(
            "log_l0_at_target must be one number per candidate, [k] with k >= 1, "
            f"not of shape {list(utility.shape)}"
        )
    wrong = utility[~(utility <= SUM_TOLERANCE)]  # NaN included
    if len(wrong):
        raise UserError(
            f"log_l0_at_target has the value {float(wrong[0])}, but a logarithm of a probability "
            "is at most 0; pass np.log of probabilities"
        )
    _check_alpha(alpha)
    _check_prior_weight(lam)
    weight = _weight(prior, lam, cost, real=utility == utility, null=False, name="prior")
    pull = _pull(utility[:, None], weight, alpha)
    speaker, total = _speak(pull, pull.exp(), weight)
    if total.isneginf().any():
        raise UserError(
            "the listener gives every candidate's target probability 0; smooth its distributions "
            "(smoothing=...) or propose other candidates"
        )
    return speaker[:, 0].numpy()


# --------------------------------------------------------------------------------------------------
# The recursion


@dataclass(frozen=True, eq=False)
class _Game:
    """Inputs in float64 for m utterances, the null one included, and n states."""

    given: "Tensor"  # [..., m, n] without the null utterance, log L0(t|u), not yet checked
    weight: "Tensor"  # [..., m, 1], lam log P(u) - cost(u); -inf: never said
    log_prior: "Tensor"  # [..., 1, n], log P(t)
    real: "Tensor"  # [..., m, 1], False for padding
    distance: "Tensor | None"  # [n, n], |t' - t| / tau

    def blocks(self, size: int) -> "Iterator[_Game]":
        """Yield the games of a batch, `size` at a time, `[size, m, n]`."""
        parts = (
            x.flatten(0, -3).split(size)
            for x in (self.given, self.weight, self.log_prior, self.real)
        )
        for given, weight, log_prior, real in zip(*parts, strict=True):
            yield _Game(given, weight, log_prior, real, self.distance)


def _compute(game: _Game, alpha: "float | Tensor", wanted: Sequence[int]) -> "list[Tensor]":
    """Return the wanted ones of `_levels`.

    Where no gradient needs all of it in memory a batch is computed in blocks that fit the cache,
    each into its part of the results: fresh memory costs more than the arithmetic.
    """
    import torch

    def compute(game: _Game, out: "Mapping[int, Tensor]") -> "list[Tensor]":
        levels = dict(enumerate(islice(_levels(game, alpha, out), wanted[-1] + 1)))
        if 0 in wanted:
            levels[0] = _fill(levels[0], game.real, -math.inf, out.get(0))
        return [levels[i] for i in wanted]

    *batch, m, _ = game.weight.shape
    n = game.log_prior.shape[-1]
    size = max(1, BLOCK // (m * n))
    games = math.prod(batch)
    inputs = (game.given, game.weight, game.log_prior, alpha)
    gradient = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
    if games <= size or gradient or game.given.device.type != "cpu":
        return compute(game, {})
    # numpy asks for huge pages, torch does not
    results = torch.from_numpy(np.empty((len(wanted), games, m, n)))
    with suppress(UserError):
        for block, *parts in zip(game.blocks(size), *(r.split(size) for r in results), strict=True):
            compute(block, dict(zip(wanted, parts, strict=True)))
        return [result.view(*batch, m, n) for result in results]
    return compute(game, {})  # fails as well, and knows where in the batch


def _levels(
    game: _Game, alpha: "float | Tensor", out: "Mapping[int, Tensor]"
) -> "Iterator[Tensor]":
    """Yield log L0, S1, L1, S2, ... without end, each `[..., m, n]`; padded rows are -inf.

    In L0 alone padded rows are uniform: exp(-inf) is slow. Level i is written to out[i] if there is
    one. Exponentials take most of the time, so those of the check of L0 serve the speaker as well,
    and those of a speaker its listener.
    """
    listener, probs = _literal(game)
    for depth in count(1):
        yield listener
        if depth > 1:
            probs = listener.exp()
        utility = listener if game.distance is None else -(probs @ game.distance)
        pull = _pull(utility, game.weight, alpha)
        strength = probs if pull is listener else pull.exp()
        speaker, total = _speak(pull, strength, game.weight, out.get(2 * depth - 1))
        _check_reachable(total, depth)
        yield speaker
        if _number(alpha) == math.inf:
            pull = _pull_of_the_nearest(utility, game)
            strength = pull.exp()
        evidence = game.log_prior - total
        listener = _listen(pull, strength, evidence, game.real, out.get(2 * depth))


def _literal(game: _Game) -> "tuple[Tensor, Tensor]":
    """Return log L0 with the null utterance, checked, and L0."""
    import torch

    logs = game.given
    *batch, m, n = logs.shape
    if not game.real.all():
        logs = _fill(logs, game.real[..., :m, :], -math.log(n))
    if m < game.real.shape[-2]:
        null = logs.new_full((*batch, 1, n), -math.log(n))
        logs = torch.cat([logs, null], dim=-2)
    probs = logs.exp()
    _check_rows(logs[..., :m, :], probs[..., :m, :])
    return logs, probs


def _pull(utility: "Tensor", weight: "Tensor", alpha: "float | Tensor") -> "Tensor":
    """Return alpha U(u, t); for alpha = inf 0 for the best utterances that can be said, else -inf.

    In the limit it decides before all weights do.
    """
    if _number(alpha) < math.inf:
        return _times(alpha, utility)
    return _largest(_fill(utility, ~weight.isneginf(), -math.inf), -2)


def _pull_of_the_nearest(utility: "Tensor", game: _Game) -> "Tensor":
    """Return what alpha = inf tells a listener: 0 where u is least behind the best, else -inf."""
    best = _fill(utility, ~game.weight.isneginf(), -math.inf).amax(-2, keepdim=True)
    behind = utility - _fill(best, ~best.isneginf(), 0.0)
    return _largest(_fill(behind, ~game.log_prior.isneginf(), -math.inf), -1)


def _largest(values: "Tensor", dim: int) -> "Tensor":
    """Return 0 at the largest values along `dim`, -inf elsewhere."""
    largest = (values >= values.amax(dim, keepdim=True) - TIE_TOLERANCE) & ~values.isneginf()
    return _fill(values.new_zeros(()), largest, -math.inf)


def _speak(
    pull: "Tensor", strength: "Tensor", weight: "Tensor", out: "Tensor | None" = None
) -> "tuple[Tensor, Tensor]":
    """Return log S(u|t) and its normaliser `[..., 1, n]`, where strength = exp(pull)."""
    import torch

    total = (weight.exp().mT @ strength).log()
    if not _exact(total, weight):
        total = (pull + weight).logsumexp(-2, keepdim=True)
    return torch.sub(pull, total, out=out).add_(weight), total


def _listen(
    pull: "Tensor", strength: "Tensor", evidence: "Tensor", real: "Tensor", out: "Tensor | None"
) -> "Tensor":
    """Return log L(t|u) = log of S(u|t) P(t), normalised over states.

    The weight of u is the same for all states and cancels, so it is left out: an utterance that is
    never said can be understood all the same. The evidence `[..., 1, n]` is P(t) over the
    normaliser of the speaker.
    """
    import torch

    total = _fill(strength @ evidence.exp().mT, real, 1.0).log()
    if not _exact(total, evidence):
        total = _fill(pull + evidence, real, 0.0).logsumexp(-1, keepdim=True)
    _check_understood(total)
    return torch.add(pull, evidence, out=out).sub_(_fill(total, real, math.inf))


def _exact(total: "Tensor", weight: "Tensor") -> bool:
    """Whether a sum of weighted exponentials needed no shift by the maximum."""
    return bool((total.detach().abs() < ORDINARY).all() and (weight.detach() < ORDINARY).all())


def _times(factor: "float | Tensor", logs: "Tensor") -> "Tensor":
    """Return factor * logs with 0 * -inf = 0, and without NaN in the gradient of the factor."""
    import torch

    if isinstance(factor, torch.Tensor) or factor == 0:
        impossible = logs.isneginf()
        product = factor * torch.where(impossible, 0.0, logs)
        return product if _number(factor) == 0 else torch.where(impossible, -math.inf, product)
    return logs if factor == 1 else factor * logs


# --------------------------------------------------------------------------------------------------
# Checks


def _game(rsa: RSA, log_l0: "Array | Tensor", mask: "ArrayLike | Tensor | None") -> _Game:
    """Check a literal listener against the settings, and add the null utterance."""
    import torch

    logs = _tensor(log_l0)
    if logs.ndim < 2 or 0 in logs.shape[-2:]:
        raise UserError(
            "log_l0 must have the axes [..., utterances, states], none of them empty, "
            f"not the shape {list(logs.shape)}"
        )
    *batch, m, n = logs.shape
    real = _mask(mask, torch.Size([*batch, m]), logs.device)
    null = rsa.null is not None
    weight = _weight(rsa.utterance_prior, rsa.prior_weight, rsa.cost, real, null, "utterance_prior")
    if null:
        real = torch.cat([real, real.new_ones(*batch, 1)], dim=-1)
    if weight.isneginf().all(-2).any():
        raise UserError(
            "a game has no utterance that can be said: its mask is all False or its "
            "utterance_prior all 0"
        )
    states = torch.Size([*batch, n])
    prior = _weights("state_prior", rsa.state_prior, states, logs.device)
    return _Game(
        given=logs,
        weight=weight,
        log_prior=(prior / prior.sum(-1, keepdim=True)).log()[..., None, :],
        real=real[..., None],
        distance=_distance(rsa, logs),
    )


def _tensor(values: "ArrayLike | Tensor") -> "Tensor":
    import torch

    if isinstance(values, torch.Tensor):
        return values.double()
    try:
        numbers = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"expected numbers in a regular array, not {values!r}: {error}") from error
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())


def _like(like: Either, result: "Tensor") -> Either:
    import torch

    if isinstance(like, torch.Tensor):
        return cast(Either, result)
    return cast(Either, result.detach().numpy())


def _exp(logs: Either) -> Either:
    return cast(Either, np.exp(logs) if isinstance(logs, np.ndarray) else logs.exp())


def _fill(logs: "Tensor", real: "Tensor", padding: float, out: "Tensor | None" = None) -> "Tensor":
    """Put `padding` into the rows that are not real; the result is a new tensor, or `out`."""
    import torch

    return torch.where(real, logs, logs.new_tensor(padding), out=out)


def _number(alpha: "float | Tensor") -> float:
    return float(alpha if isinstance(alpha, int | float | np.number) else alpha.detach())


def _check_alpha(alpha: "float | Tensor") -> None:
    one = _is_number(alpha) or getattr(alpha, "shape", None) == ()
    if not one or not _number(alpha) >= 0:
        raise UserError(f"alpha must be one number of at least 0, inf included, not {alpha!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_prior_weight(lam: float) -> None:
    if not _is_number(lam) or not 0 <= lam < math.inf:
        raise UserError(f"prior_weight (lam) must be a finite number of at least 0, not {lam!r}")


def _check_rows(logs: "Tensor", probs: "Tensor") -> None:
    """Refuse what is not a matrix of log-probabilities with rows that sum to 1."""
    sums = probs.detach().sum(-1)
    good = _is_one(sums)
    if good.all():
        return
    row = tuple((~good).nonzero()[0].tolist())
    where = f"log_l0 has the axes [..., utterances, states] = {list(logs.shape)}; its row {row}"
    if logs.isnan().any():
        raise UserError(f"{where} has NaN")
    if _is_one(logs.sum(-1)).all() and (logs >= 0).all():
        raise UserError(f"{where} holds probabilities; pass their logarithms, np.log(l0)")
    if _is_one(logs.exp().sum(-2)).all():
        raise UserError(
            f"{where} sums to {float(sums[row]):.6g}, yet its columns sum to 1: the matrix looks "
            "transposed. Pass log_l0.swapaxes(-1, -2)"
        )
    raise UserError(
        f"{where} has probabilities that sum to {float(sums[row]):.6g}, not 1 (to "
        f"{SUM_TOLERANCE}): every row is one distribution over the states. Subtract its logsumexp "
        "in float64, or mask padded utterances"
    )


def _is_one(sums: "Tensor") -> "Tensor":
    return (sums - 1.0).abs() <= SUM_TOLERANCE


def _check_reachable(total: "Tensor", depth: int) -> None:
    if not total.isneginf().any():
        return
    *batch, _, state = total.isneginf().nonzero()[0].tolist()
    where = f"state {state}" + (f" of game {tuple(batch)}" if batch else "")
    if depth > 1:
        raise UserError(
            f"the speaker S{depth} cannot speak of {where}: its state_prior is 0, so no listener "
            "believes in it. Leave out states of prior 0, or use depth=1"
        )
    raise UserError(
        f'no utterance can mean {where}: L0 is 0 in its whole column. Use null="uniform", which '
        "adds an utterance that fits every state, or smooth L0"
    )


def _check_understood(total: "Tensor") -> None:
    never = total[..., 0].isneginf()
    if never.any():
        *batch, row = never.nonzero()[0].tolist()
        where = f"utterance {row}" + (f" of game {tuple(batch)}" if batch else "")
        raise UserError(
            f"{where} fits only states whose state_prior is 0, so a listener cannot make sense of "
            "it; leave it out (mask) or give those states some prior"
        )


def _mask(mask: "ArrayLike | Tensor | None", shape: "Size", device: "Device") -> "Tensor":
    """Return which utterances are real, `[..., m]` bool."""
    import torch

    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    real = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))
    if real.dtype != torch.bool:
        raise UserError(f"mask must be bool, True for real utterances, not {real.dtype}")
    return _spread("mask", real.to(device), shape)


def _weights(name: str, values: ArrayLike | None, shape: "Size", device: "Device") -> "Tensor":
    """Return weights >= 0 that broadcast to `shape`; ones by default."""
    import torch

    if values is None:
        return torch.ones(shape, dtype=torch.float64, device=device)
    weights = _spread(name, _tensor(values).to(device), shape)
    if not ((weights >= 0) & weights.isfinite()).all():
        raise UserError(f"{name} must be finite and at least 0, not {values!r}")
    if (weights.sum(-1) == 0).any():
        raise UserError(f"{name} must not be 0 throughout")
    return weights


def _spread(name: str, tensor: "Tensor", shape: "Size") -> "Tensor":
    """Broadcast over the batch; the last axis must fit exactly."""
    fits = tensor.ndim and tensor.shape[-1] == shape[-1] and tensor.ndim <= len(shape)
    if not fits or any(
        a not in (1, b) for a, b in zip(tensor.shape[-2::-1], shape[-2::-1], strict=False)
    ):
        raise UserError(
            f"{name} has the shape {list(tensor.shape)}, but log_l0 asks for {list(shape[-1:])} "
            f"or {list(shape)} (the null utterance, if there is one, is not counted)"
        )
    return tensor.expand(shape)


def _weight(
    prior: ArrayLike | None,
    lam: float,
    cost: ArrayLike | None,
    real: "Tensor",
    null: bool,
    name: str,
) -> "Tensor":
    """Return lam log P(u) - cost(u), `[..., m (+ 1), 1]`: -inf for padding, the null one last."""
    import torch

    weight = torch.zeros(real.shape, dtype=torch.float64, device=real.device)
    silence = weight.new_zeros(*real.shape[:-1], 1)
    if prior is not None:
        weights = _weights(name, prior, real.shape, real.device)
        weight = _times(lam, weights.log())
        mean = (weights * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        silence = _times(lam, _fill(mean, real.any(-1, keepdim=True), 1.0).log())
    if cost is not None:
        costs = _spread("cost", _tensor(cost).to(real.device), real.shape)
        if not costs.isfinite().all():
            raise UserError(f"cost must be finite, not {cost!r}; leave utterances out by mask")
        weight = weight - costs
    weight = _fill(weight, real, -math.inf)
    return (torch.cat([weight, silence], dim=-1) if null else weight)[..., None]


def _distance(rsa: RSA, logs: "Tensor") -> "Tensor | None":
    if rsa.utility == "log_prob":
        return None
    assert rsa.positions is not None
    positions = _tensor(rsa.positions).to(logs.device)
    if positions.shape != logs.shape[-1:] or not positions.isfinite().all():
        raise UserError(
            f"positions must be {logs.shape[-1]} finite numbers, one per state of log_l0, not "
            f"{rsa.positions!r}"
        )
    return (positions[:, None] - positions[None, :]).abs() / rsa.tau
