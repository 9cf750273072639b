"""How rational are human listeners? The RSA listener fitted to what people answered."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError
from wavelength_rsa.data import Item, clusters, random_halves
from wavelength_rsa.human import alternatives
from wavelength_rsa.rsa import RSA, Array
from wavelength_rsa.scales import project

if TYPE_CHECKING:
    from torch import Tensor

    from wavelength_rsa.listeners import Listener


@dataclass(frozen=True)
class Fold:
    """What one fold of the cross-validation held out.

    Attributes:
        alpha: Fitted to the other folds.
        groups: Number of groups held out.
        log_likelihood: Of the held-out responses, in nats.
        baseline_log_likelihood: The same under the literal listener.
    """

    alpha: float
    groups: int
    log_likelihood: float
    baseline_log_likelihood: float


@dataclass(frozen=True)
class FitResult:
    """The alpha that fits human listeners best; log-likelihoods are sums over responses, in nats.

    Attributes:
        alpha: The maximum-likelihood estimate.
        low: Lower end of its 95% interval, by a bootstrap over groups. NaN with one group only.
        high: Upper end.
        log_likelihood: Of all responses at `alpha`.
        baseline_log_likelihood: Of all responses under the literal listener L0, nothing fitted.
        cv_log_likelihood: Of responses held out, sum over folds. NaN with one group only.
        cv_baseline: The literal listener on the same responses.
        folds: The folds.
        curve: Pairs (alpha, log-likelihood) of the grid.
        at_bound: Whether the best alpha is an end of the grid, so that it may lie beyond.
    """

    alpha: float
    low: float
    high: float
    log_likelihood: float
    baseline_log_likelihood: float
    cv_log_likelihood: float
    cv_baseline: float
    folds: tuple[Fold, ...]
    curve: tuple[tuple[float, float], ...]
    at_bound: bool


def fit_rsa(
    log_l0s: Sequence[Array],
    heard: Sequence[int],
    human: Sequence[ArrayLike],
    groups: Sequence[Hashable],
    *,
    rsa: RSA | None = None,
    alphas: ArrayLike | None = None,
    folds: int = 10,
    resamples: int = 10_000,
    seed: int = 0,
) -> FitResult:
    """Fit alpha of a pragmatic listener to human responses by maximum likelihood.

    The sum over games of human(t) log L(t|heard) is maximised on a grid of alphas, then between the
    neighbours of the best one by L-BFGS-B on log alpha. The bootstrap refits every resample of
    groups by a parabola through its best three grid points, times what the parabola of all data
    is off by.

    Args:
        log_l0s: N matrices `[m_i, n]`, the literal listener of each game, the utterance heard among
            the alternatives once.
        heard: `[N]`, the row of the utterance heard.
        human: N arrays `[n]`, how many people chose each state; counts, may be fractional.
        groups: `[N]`, keys: games of one group are resampled and held out together, such as those
            of one concept pair.
        rsa: All other settings; its alpha is not used. Defaults to `RSA()`. A cost or a prior of
            utterances for games of different m is `[N, m]`, padded with any valid number.
        alphas: The grid, ascending and > 0. Defaults to 37 steps from 1/64 to 64.
        folds: Number of folds, >= 2; at most the number of groups is used.
        resamples: Number of bootstrap resamples.
        seed: Draws folds and resamples.

    Returns:
        See `FitResult`.

    Raises:
        UserError: lengths differ, a value is out of range, or people chose a state that the
            listener gives probability 0.
    """
    import torch

    rsa = RSA() if rsa is None else rsa
    grid = np.geomspace(1 / 64, 64, 37) if alphas is None else np.asarray(alphas, dtype=np.float64)
    _check_fit(rsa, grid, folds, resamples)
    log_l0, mask, counts = _padded_games(rsa, log_l0s, heard, human, groups)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    codes = np.array([numbers[group] for group in groups])

    def likelihoods(listener: "Tensor") -> "Tensor":
        logs = listener[torch.arange(len(counts)), torch.as_tensor(np.array(heard))]
        return (counts * torch.where(counts > 0, logs, 0.0)).sum(-1)  # [N]; 0 log 0 = 0

    def at(alpha: "float | Tensor") -> "Tensor":
        return likelihoods(replace(rsa, alpha=alpha).log_listener(log_l0, mask=mask))

    literal = likelihoods(log_l0).numpy()
    curve = np.stack([at(float(alpha)).numpy() for alpha in grid])  # [A, N]
    if not np.isfinite(curve).all():
        i = int(np.argwhere(~np.isfinite(curve))[0, 1])
        raise UserError(
            f"people chose a state in game {i} that the listener gives probability 0, so no alpha "
            f"explains it; smooth log_l0s[{i}] or give every state some state_prior"
        )

    def fit(chosen: NDArray[np.bool_]) -> float:
        weights = torch.from_numpy(chosen.astype(np.float64))
        best = int((curve @ chosen).argmax())
        ends = np.log(grid[[max(best - 1, 0), min(best + 1, len(grid) - 1)]])
        return _climb(at, weights, float(np.log(grid[best])), tuple(ends))

    alpha = fit(np.ones(len(counts), dtype=bool))
    rng = np.random.default_rng(seed)
    by_group = curve @ np.eye(len(numbers))[codes]  # [A, G]
    low, high = _bootstrap(by_group, np.log(grid), math.log(alpha), resamples, rng)
    parts = _folds(at, fit, literal, codes, folds, rng)
    return FitResult(
        alpha=alpha,
        low=low,
        high=high,
        log_likelihood=float(at(alpha).sum()),
        baseline_log_likelihood=float(literal.sum()),
        cv_log_likelihood=sum(f.log_likelihood for f in parts) if parts else math.nan,
        cv_baseline=sum(f.baseline_log_likelihood for f in parts) if parts else math.nan,
        folds=parts,
        curve=tuple(zip(grid.tolist(), curve.sum(1).tolist(), strict=True)),
        at_bound=any(math.isclose(alpha, end, rel_tol=1e-6) for end in (grid[0], grid[-1])),
    )


def fit_games(
    items: Sequence[Item],
    *,
    listener: "Listener | None" = None,
    step: int = 5,
    folds: int = 10,
    seed: int = 0,
) -> FitResult:
    """Fit alpha of the pragmatic listener to human responses, cross-validated by concept pair.

    The utterances of a game are the clues that the data have for its scale, and the null utterance.

    Args:
        items: Items with human responses.
        listener: The literal listener. Defaults to people: a random half of the responses to each
            clue, with half a response spread over the grid; alpha is then fitted to the other half.
        step: Of the grid; that of the listener where one is given.
        folds: Of the cross-validation; at most one per concept pair.
        seed: Fixes the halves, the folds and the bootstrap.

    Returns:
        The fit, see `wavelength_rsa.fit_rsa`.

    Raises:
        UserError: an item has no responses, or there are fewer than two concept pairs.
    """
    missing = [item.id for item in items if not item.responses or len(item.responses) < 2]
    if missing or not items:
        raise UserError(
            "alpha is fitted to human responses, at least two for each item; "
            + (f"{len(missing)} items have fewer, first {missing[0]!r}" if items else "no items")
        )
    groups = clusters(items)
    if not groups.any():
        raise UserError(
            f"alpha is cross-validated by concept pair, but all items are on "
            f"{items[0].scale}; give items of at least two scales"
        )
    if listener is None:
        halves, others = random_halves(items, 1, seed, step)
        literal, counts = halves[0] + 0.5 / halves.shape[-1], others[0]
        literal /= literal.sum(-1, keepdims=True)
    else:
        counts = np.stack([project(item.responses or (), listener.step) for item in items])
        literal = listener.listen([(item.scale, item.clue) for item in items], seed=seed)
    with np.errstate(divide="ignore"):  # an impossible position is -inf
        logs = np.log(literal)
    games = [
        logs[members[considered]]
        for members, considered in zip(*alternatives(items, groups), strict=True)
    ]
    heard = [0] * len(items)  # the item itself comes first
    return fit_rsa(games, heard, list(counts), groups.tolist(), folds=folds, seed=seed)


def _climb(
    at: "Callable[[float | Tensor], Tensor]",
    weights: "Tensor",
    start: float,
    ends: tuple[float, float],
) -> float:
    """Return the alpha with the largest sum of weights * at(alpha), log alpha between the ends."""
    import torch
    from scipy.optimize import minimize

    scale = 1.0 / max(1.0, float(-(at(math.exp(start)) @ weights)))

    def loss(log_alpha: Array) -> tuple[float, Array]:
        x = torch.tensor(log_alpha[0], dtype=torch.float64, requires_grad=True)
        value = -(at(x.exp()) @ weights) * scale
        (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), np.array([float(slope)])

    found = minimize(
        loss,
        [start],
        jac=True,
        method="L-BFGS-B",
        bounds=[ends],
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    return math.exp(found.x[0])


def _bootstrap(
    curve: Array, log_alphas: Array, estimate: float, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the 95% interval of alpha from log-likelihoods `[A, G]` of G resampled groups.

    `estimate` is the log alpha of all of them.
    """
    size = curve.shape[1]
    if size < 2:
        return math.nan, math.nan
    totals = rng.multinomial(size, np.full(size, 1.0 / size), size=resamples) @ curve.T  # [R, A]
    bias = estimate - float(_vertices(curve.sum(1)[None], log_alphas)[0])
    low, high = np.exp(np.quantile(_vertices(totals, log_alphas), [0.025, 0.975]) + bias)
    return float(low), float(high)


def _vertices(totals: Array, log_alphas: Array) -> Array:
    """Return where the parabola through the best three points is highest, `[R]` of `[R, A]`."""
    best = totals.argmax(1)
    middle = best.clip(1, len(log_alphas) - 2)
    x0, x1, x2 = (log_alphas[middle + i] for i in (-1, 0, 1))
    y0, y1, y2 = (totals[np.arange(len(totals)), middle + i] for i in (-1, 0, 1))
    left, right = (x1 - x0) * (y1 - y2), (x2 - x1) * (y1 - y0)
    bend = left + right  # > 0 unless the three are level
    shift = (right * (x2 - x1) - left * (x1 - x0)) / np.where(bend > 0, 2.0 * bend, math.inf)
    return np.where(best == middle, x1 + shift, log_alphas[best])


def _folds(
    at: "Callable[[float], Tensor]",
    fit: Callable[[NDArray[np.bool_]], float],
    literal: Array,
    codes: NDArray[np.int64],
    folds: int,
    rng: np.random.Generator,
) -> tuple[Fold, ...]:
    size = int(codes.max()) + 1
    if size < 2:
        return ()
    parts = []
    for part in np.array_split(rng.permutation(size), min(folds, size)):
        held = np.isin(codes, part)
        alpha = fit(~held)
        score = float(at(alpha).numpy()[held].sum())
        parts.append(Fold(alpha, len(part), score, float(literal[held].sum())))
    return tuple(parts)


def _check_fit(rsa: RSA, grid: Array, folds: int, resamples: int) -> None:
    if rsa.depth == 0:
        raise UserError("depth 0 is the literal listener, which has no alpha; use depth=1")
    ascending = grid.ndim == 1 and len(grid) > 2 and bool((np.diff(grid) > 0).all())
    if not ascending or not 0 < grid[0] <= grid[-1] < math.inf:
        raise UserError(
            f"alphas must be at least 3 finite numbers above 0 in ascending order, not {grid}"
        )
    for name, value, least in (("folds", folds, 2), ("resamples", resamples, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _padded_games(
    rsa: RSA,
    log_l0s: Sequence[Array],
    heard: Sequence[int],
    human: Sequence[ArrayLike],
    groups: Sequence[Hashable],
) -> "tuple[Tensor, NDArray[np.bool_], Tensor]":
    """Put all games into one batch: log L0 `[N, m, n]`, its mask `[N, m]` and counts `[N, n]`."""
    import torch

    size = len(log_l0s)
    lengths = {"heard": len(heard), "human": len(human), "groups": len(groups)}
    for name, length in lengths.items():
        if length != size or not size:
            raise UserError(
                f"{name} has {length} entries for {size} games (log_l0s); give one each"
            )
    games = [np.asarray(logs, dtype=np.float64) for logs in log_l0s]
    for i, logs in enumerate(games):
        if logs.ndim != 2 or logs.shape[1] != games[0].shape[-1]:
            raise UserError(
                f"log_l0s[{i}] must be [utterances, states] with the states of log_l0s[0], not of "
                f"shape {list(logs.shape)}"
            )
        if not 0 <= heard[i] < len(logs):
            raise UserError(f"heard[{i}] is {heard[i]}, but game {i} has {len(logs)} utterances")
        chosen = np.asarray(human[i], dtype=np.float64)
        if chosen.shape != logs.shape[1:] or not (np.isfinite(chosen) & (chosen >= 0)).all():
            raise UserError(
                f"human[{i}] must be {logs.shape[1]} counts of at least 0, one per state, not "
                f"{human[i]!r}"
            )
    sizes = np.array([len(logs) for logs in games])
    for name in ("cost", "utterance_prior"):
        if np.ndim(getattr(rsa, name)) == 1 and len(set(sizes.tolist())) > 1:
            raise UserError(
                f"{name} is one list, but the games have {sizes.min()} to {sizes.max()} "
                "utterances; give [N, m] padded to the largest m"
            )
    padded = np.zeros((size, sizes.max(), games[0].shape[1]))
    for logs, place in zip(games, padded, strict=True):
        place[: len(logs)] = logs
    mask = np.arange(sizes.max()) < sizes[:, None]
    counts = np.array([np.asarray(chosen, dtype=np.float64) for chosen in human])
    return torch.from_numpy(padded), mask, torch.from_numpy(counts)
