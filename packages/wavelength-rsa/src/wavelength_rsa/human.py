"""Do people listen pragmatically? RSA on top of people's own answers, without any model."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tenfold_common.errors import UserError
from wavelength_rsa import metrics
from wavelength_rsa.data import Item, clusters, random_halves
from wavelength_rsa.rsa import RSA
from wavelength_rsa.scales import grid, tidy

Floats = NDArray[np.float64]

METRICS = ("mean_error", "expected_distance", "crps", "log_likelihood", "w1", "entropy")


def human_rsa(
    items: Sequence[Item],
    *,
    alphas: Sequence[float] = (0.5, 1, 2, 4, 8),
    splits: int = 20,
    seed: int = 0,
    step: int = 5,
    smoothing: float | None = None,
    resamples: int = 10_000,
) -> dict[str, object]:
    """Compare the pragmatic listener L1 with the literal listener L0, both made from people.

    L0 of a clue is the histogram of a random half of the responses to it. L1 is `RSA(alpha)` with
    the clues of the scale and the null utterance as alternatives and equal priors (arXiv 2509.06952
    has model-made clues in their place). Both are scored against the target and against the other
    half of the responses, averaged over random splits.

    Two things to know before reading a difference. People answered knowing that a helpful player
    chose the clue: their histogram is no literal meaning, and L1 reasons a second time. And alpha
    alone flattens (small) or sharpens (large) a distribution, which moves every score whatever the
    other clue says: read it beside `entropy`, and beside `contrast`, which holds alpha fixed.

    Args:
        items: Items with human responses and with targets on the grid.
        alphas: Of the pragmatic listeners, >= 0.
        splits: Random halves to average over, at least 1.
        seed: Fixes the halves and the resamples.
        step: Distance of neighbouring positions.
        smoothing: Added to L0's count of every position. Defaults to 0.5 / n, half a response in
            all. `log_likelihood` leans on it, and with 0 it may be infinite.
        resamples: For the intervals, see `metrics.cluster_bootstrap`; clusters are concept pairs.

    Returns:
        `items`, `clusters`, `splits`, `seed`, `step`, `smoothing`, `resamples`, `literal` and
        `pragmatic`. `literal` holds L0's `mean_error`, `expected_distance` and `crps` from the
        target (points), its `log_likelihood` of the other half (nats a response, higher is better),
        its `w1` from the other half (points) and its `entropy` (nats), each a dictionary
        `{"value", "se", "low", "high"}`. `pragmatic` is a list, one entry per alpha, of `alpha`,
        the same six, `difference` with the six of L1 - L0, and `contrast` with those of L1 - the L1
        that considers the null utterance alone, all paired by item. All of it is JSON.

    Raises:
        UserError: there are no items, an item has no responses, a target is off the grid, or an
            argument is out of range.
    """
    if not items:
        raise UserError("there are no items; give at least one")
    positions = grid(step)
    smoothing = 0.5 / len(positions) if smoothing is None else smoothing
    if not 0 <= smoothing < np.inf:
        raise UserError(f"smoothing must be a finite number >= 0, not {smoothing!r}")
    targets, groups = np.array([item.target for item in items]), clusters(items)
    first, other = random_halves(items, splits, seed, step)  # [splits, N, n] counts
    literal = first + smoothing
    literal /= literal.sum(-1, keepdims=True)
    considered, mask = alternatives(items, groups)  # [N, m]
    with np.errstate(divide="ignore"):  # a position nobody chose is impossible without smoothing
        games = np.log(literal)[:, considered]  # [splits, N, m, n]
    mask = np.broadcast_to(mask, games.shape[:-1])
    alone = np.broadcast_to(np.arange(mask.shape[-1]) == 0, mask.shape)

    def interval(values: Floats) -> dict[str, float | None]:
        return metrics.cluster_bootstrap(values, groups, resamples=resamples, seed=seed).to_dict()

    base = _scores(literal, other, positions, targets)
    pragmatic = []
    for alpha in alphas:
        heard, without = (RSA(alpha).listener(games, mask=m)[:, :, 0] for m in (mask, alone))
        scores, control = (_scores(p, other, positions, targets) for p in (heard, without))
        entry = {"alpha": alpha, **{name: interval(scores[name]) for name in METRICS}}
        with np.errstate(invalid="ignore"):  # two infinite log-likelihoods have no difference
            for key, less in (("difference", base), ("contrast", control)):
                entry[key] = {name: interval(scores[name] - less[name]) for name in METRICS}
        pragmatic.append(entry)
    return {
        "items": len(items),
        "clusters": int(groups.max()) + 1,
        "splits": splits,
        "seed": seed,
        "step": step,
        "smoothing": smoothing,
        "resamples": resamples,
        "literal": {name: interval(base[name]) for name in METRICS},
        "pragmatic": pragmatic,
    }


def alternatives(
    items: Sequence[Item], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return for each item the items whose clues its listener considers, and which are no padding.

    Both are `[N, m]`. The item itself comes first; a clue is considered once, however often given.
    """
    games = []
    for number, item in enumerate(items):
        considered = {tidy(item.clue): number}
        for member in np.flatnonzero(groups == groups[number]).tolist():
            considered.setdefault(tidy(items[member].clue), member)
        games.append(list(considered.values()))
    width = max(map(len, games))
    padded = np.array([game + game[:1] * (width - len(game)) for game in games])
    return padded, np.arange(width) < np.array([[len(game)] for game in games])


def _scores(
    probs: Floats, other: Floats, positions: Floats, targets: Floats
) -> Mapping[str, Floats]:
    """Return `METRICS` of each item, `[N]`, averaged over splits; probs and other `[s, N, n]`."""
    people = other / other.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        logs = np.log(np.where(people > 0, probs, 1.0))
    each = [metrics.listener_metrics(p, positions, targets) for p in probs]
    against = {name: np.mean([m[name] for m in each], 0) for name in each[0]}
    return {
        **{name: against[name] for name in ("mean_error", "expected_distance", "crps", "entropy")},
        "log_likelihood": (people * logs).sum(-1).mean(0),
        "w1": metrics.w1(probs, people, positions).mean(0),
    }
