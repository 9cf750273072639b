"""Keys and values of rows of tokens that are run once and read by many rows after them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from tenfold_common.lm.tokens import common_length

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache


class Prefixes:
    """Rows of tokens, each run once; what all of them begin with is run once for all.

    A past is the cache of one row, or None for a row without tokens. It is read by many and never
    changed.

    Args:
        forward: Runs rows of new tokens, each after its past, and returns the model's output with
            the cache of both.
        rows: All rows that will be asked for.
        batch_size: The most rows run together.

    Attributes:
        kind: `"padded"` if pasts of different lengths can stand in one batch; `"alone"` if a past
            can only be repeated, since a sliding window has dropped what would align it; `"none"`
            if the model gives no cache that other rows could read.
        together: How many rows may share a batch.
    """

    def __init__(
        self,
        forward: Callable[[list[list[int]], Sequence[DynamicCache | None]], Any],
        rows: Sequence[list[int]],
        batch_size: int,
    ) -> None:
        self._forward = forward
        self._start = shared_start(rows)
        first = self._start or max(rows, key=len)[:1]  # without a start, only the kind is of use
        cache = _cache(forward([first], [None])) if first else None
        self.kind = _kind(cache, len(first))
        self.together = 1 if self.kind == "alone" else batch_size
        self._base = cache if self._start and self.kind != "none" else None
        self._held: dict[tuple[int, ...], DynamicCache | None] = {}

    def pasts(self, rows: Sequence[list[int]]) -> list[DynamicCache | None]:
        """One past per row, the same for equal rows; None for all if `kind` is `"none"`.

        Those that the call before gave are still at hand, all others are dropped.
        """
        if self.kind == "none":
            return [None] * len(rows)
        keys = [tuple(row) for row in rows]
        held = {key: self._held[key] for key in keys if key in self._held}
        start = len(self._start)
        held |= {key: self._base for key in keys if len(key) == start}
        self._held = held
        new = sorted(set(keys).difference(held), key=lambda key: (-len(key), key))
        for k in range(0, len(new), self.together):
            batch = new[k : k + self.together]
            rests = [list(key[start:]) for key in batch]
            cache = _cache(self._forward(rests, [self._base] * len(batch)))
            held |= zip(batch, _split(cache, [len(key) for key in batch]), strict=True)
        return [held[key] for key in keys]


def shared_start(rows: Sequence[list[int]]) -> list[int]:
    """What all rows begin with."""
    return rows[0][: min(common_length(rows[0], row) for row in rows)]


def past_length(past: DynamicCache | None) -> int:
    """How many tokens a past holds."""
    return 0 if past is None else past.get_seq_length()


def join(pasts: Sequence[DynamicCache | None]) -> DynamicCache | None:
    """One cache of all rows for a run that may change it; shorter rows are padded on the left.

    Pasts that are not one and the same must be of the kind `"padded"`, see `Prefixes`.
    """
    import torch
    from torch.nn.functional import pad

    some = next((past for past in pasts if past is not None), None)
    if some is None:
        return None
    if _kind(some, past_length(some)) == "alone":
        cache = copy.deepcopy(some)
        cache.batch_repeat_interleave(len(pasts))
        return cache
    width = max(map(past_length, pasts))
    runs = [list(run) for _, run in groupby(pasts, key=id)]  # neighbours are copied only once

    def joined(layer: int, name: str) -> torch.Tensor:
        like = getattr(some.layers[layer], name)
        parts = []
        for run in runs:
            past = run[0]
            found = like[..., :0, :] if past is None else getattr(past.layers[layer], name)
            found = pad(found, (0, 0, width - found.shape[-2], 0))
            parts.append(found.expand(len(run), *found.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return _like(some, joined)


def _split(cache: Any, lengths: list[int]) -> list[DynamicCache]:
    """The rows of a cache without the padding on their right."""
    if len(lengths) == 1:
        return [cache]

    def cut(row: int, size: int) -> Callable[[int, str], torch.Tensor]:
        return lambda layer, name: getattr(cache.layers[layer], name)[row : row + 1, ..., :size, :]

    return [_like(cache, cut(row, size)) for row, size in enumerate(lengths)]


def _like(cache: DynamicCache, tensor: Callable[[int, str], torch.Tensor]) -> DynamicCache:
    """A cache of the same make with other keys and values."""
    made = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(layers):
        layer.keys, layer.values = tensor(number, "keys"), tensor(number, "values")
    made.layers = layers
    return made


def _cache(output: Any) -> Any:
    return getattr(output, "past_key_values", None)


def _kind(cache: Any, tokens: int) -> Literal["padded", "alone", "none"]:
    """What can be done with the cache of a run of so many tokens; see `Prefixes`."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if not isinstance(cache, DynamicCache) or not cache.layers:
        return "none"
    kinds = {type(layer) for layer in cache.layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "none"
    if cache.get_seq_length() != tokens:
        return "none"  # it holds more, such as the tokens of prompt tuning
    layers: list[Any] = cache.layers
    filled = all(layer.is_initialized for layer in layers)
    return "padded" if kinds == {DynamicLayer} and filled else "alone"
