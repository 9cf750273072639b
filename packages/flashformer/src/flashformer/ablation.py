"""What one call for the whole token is worth: the same stages, the same threads, in more calls."""

import time
from statistics import median
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from flashformer.cache import KVCache
    from flashformer.model import FlashModel

WAYS = ("many tokens", "token", "layer", "stage")


def decode_by_parts(
    model: "FlashModel", cache: "KVCache", token: int, way: str, steps: int, *, threads: int
) -> list[int]:
    """Choose tokens greedily with one native call per part; the tokens do not depend on it.

    Args:
        model: A model on the CPU back-end.
        cache: Grows by `steps`.
        token: The last token, not yet in the cache.
        way: One of `WAYS`: a call for all tokens, for each token, each layer or each stage.
        steps: How many to choose.
        threads: In every call.

    Raises:
        UserError: an unknown way, or another back-end.
    """
    import torch

    from flashformer.backends.cpu import CPUBackend

    backend = model.backend
    if not isinstance(backend, CPUBackend):
        raise UserError(
            f"parts of a token can be called on the CPU back-end, not on {backend.name}"
        )
    if way not in WAYS:
        raise UserError(f"way must be one of {', '.join(WAYS)}, not {way!r}")
    cache.check_room(steps)
    size = len(backend.plan.stages)
    width = {"token": size, "layer": 5, "stage": 1}.get(way)
    logits = torch.empty(model.spec.vocab)
    chosen: list[int] = []

    def call(given: int, new: int, stages: tuple[int, int] | None) -> list[int]:
        return backend.decode(
            cache.keys, cache.values, torch.tensor([given]), position=cache.length, new=new,
            logits=logits, threads=threads, stages=stages,
        ).tolist()  # fmt: skip

    if width is None:
        chosen = call(token, steps, None)
        cache.length += steps
        return chosen
    for _ in range(steps):
        found: list[int] = []
        for first in range(0, size, width):
            found = call(token, 1, (first, min(first + width, size)))
        token = found[0]
        chosen.append(token)
        cache.length += 1
    return chosen


def ablation(
    model: "FlashModel", *, context: int = 16, steps: int = 32, rounds: int = 7, threads: int = 1
) -> dict[str, float]:
    """Return the seconds of a token for each of `WAYS`, the median of rounds in turn.

    Raises:
        UserError: the context and the steps do not fit into the model's length.
    """
    cache = model.new_cache()
    cache.check_room(context + steps)
    model.feed([1] * context, cache)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, seconds in found.items():
            cache.crop(context)
            start = time.perf_counter()
            decode_by_parts(model, cache, 1, way, steps, threads=threads)
            seconds.append((time.perf_counter() - start) / steps)
    return {way: median(seconds) for way, seconds in found.items()}
