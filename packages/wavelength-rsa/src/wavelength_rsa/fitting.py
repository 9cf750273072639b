"""How rational are human listeners? The RSA listener fitted to what people answered."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tenfold_common.errors import UserError
from wavelength_rsa.data import Item, clusters, random_halves
from wavelength_rsa.human import alternatives
from wavelength_rsa.rsa import FitResult, fit_rsa
from wavelength_rsa.scales import project

if TYPE_CHECKING:
    from wavelength_rsa.listeners import Listener


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
