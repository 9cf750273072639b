"""Whole sequences: equal lengths, padding and packing, brought to rows for the back-ends."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from path_attn import blockwise
from path_attn.reference import global_path_attention


class Tokens(NamedTuple):
    """Inputs in compute dtype, shaped as the user gave them but with their reflection axis.

    q is scaled, g is as it enters the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    beta: Tensor | None
    g: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """Change every tensor that is there."""

        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        q, k, v, w, beta, g = self
        return Tokens(change(q), change(k), change(v), maybe(w), maybe(beta), maybe(g))

    def zeroed(self, mask: Tensor) -> "Tokens":
        """Zero masked tokens: H = I, gate 1, and no NaN to pass through a product with 0."""
        return self.each(lambda x: x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0))


class Run(NamedTuple):
    """How to attend: the options of `path_attention` that are left once inputs are checked."""

    backend: str
    block: int
    window: int  # 0: none
    softcap: float  # 0: none
    dtype: torch.dtype  # of the operands of matrix products on Triton


def dense(run: Run, x: Tokens) -> Tensor:
    """Equal-length sequences, every token real: `[B, T, HQ, V]`."""
    if run.backend == "reference":
        w, beta = x.w, x.beta
        if w is None or beta is None:
            w, beta = torch.zeros_like(x.k), torch.zeros_like(x.k[..., 0])
        return global_path_attention(
            x.q,
            x.k,
            x.v,
            w,
            beta,
            x.g,
            scale=1.0,
            window=run.window or None,
            softcap=run.softcap or None,
        )
    out, _, _ = blocks(run, x)
    return _from_rows(out, x.q)


def blocks(run: Run, x: Tokens) -> tuple[Tensor, Tensor, blockwise.Level]:
    """Output and log-sum-exp as `[N, G, T, ...]` rows, and the blocks."""
    length = x.q.shape[1]
    q, k, v, w, beta, g = _to_rows(x, share_heads=x.g is None or run.backend == "triton")
    prepared = blockwise.cut(q, k, v, w, beta, softcap=run.softcap, block=run.block)
    rules = {"softcap": run.softcap, "window": run.window}
    if run.backend == "triton":
        from path_attn.kernels.attention import attend_triton

        out, lse = attend_triton(prepared, g, compute_dtype=run.dtype, **rules)
    else:
        out, lse = blockwise.attend(prepared, g, **rules)
    return out[:, :, :length], lse[:, :, :length], prepared.level


def masked(run: Run, x: Tokens, mask: Tensor) -> Tensor:
    """Leaving out a masked token changes nothing for the others.

    Move the real ones to the front, run, put back.
    """
    order = torch.argsort(~mask, dim=1, stable=True)
    back = torch.argsort(order, dim=1)
    moved = x.zeroed(mask).each(lambda t: take(t, order))
    return take(dense(run, moved), back).masked_fill(~mask[..., None, None], 0)


def packed(run: Run, x: Tokens, bounds: list[int]) -> Tensor:
    """Sequences packed along T: those of similar length run as one right-padded batch."""
    buckets: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(bounds):
        buckets.setdefault((end - start).bit_length(), []).append((start, end - start))
    device = x.q.device
    outs, places = [], []
    for spans in buckets.values():
        starts, lengths = (
            torch.tensor(column, device=device) for column in zip(*spans, strict=True)
        )
        offset = torch.arange(int(lengths.max()), device=device)
        mask = offset < lengths[:, None]
        place = (starts[:, None] + offset).where(mask, 0)
        batch = x.each(lambda t, place=place: t[0, place]).zeroed(mask)
        outs.append(dense(run, batch)[mask])
        places.append(place[mask])
    return torch.cat(outs)[torch.argsort(torch.cat(places))].unsqueeze(0)


def _to_rows(x: Tokens, *, share_heads: bool) -> Tokens:
    """Rows of `blockwise.cut`: one per key head, or per query head where the gates differ.

    Returns:
        q `[N, G, T, K]`; k, v, w, beta `[N, T, ...]`; g `[N, G, T]`. Without sharing G is 1.
    """
    group = x.q.shape[2] // x.k.shape[2]
    shared = group if share_heads else 1

    def of_key(t: Tensor) -> Tensor:
        repeated = t if group == shared else t.repeat_interleave(group, 2)
        return repeated.transpose(1, 2).flatten(0, 1)

    def of_query(t: Tensor) -> Tensor:
        return t.transpose(1, 2).unflatten(1, (-1, shared)).flatten(0, 1)

    w, beta = (None if t is None else of_key(t) for t in (x.w, x.beta))
    g = None if x.g is None else of_query(x.g)
    return Tokens(of_query(x.q), of_key(x.k), of_key(x.v), w, beta, g)


def _from_rows(out: Tensor, q: Tensor) -> Tensor:
    """`[N, G, T, V]` rows back to `[B, T, HQ, V]`."""
    return out.unflatten(0, (q.shape[0], -1)).flatten(1, 2).transpose(1, 2)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Permute the tokens of each row: `x [B, T, ...]`, `index [B, T]`."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand_as(x))
