"""New tokens after a cache: one, a few, or many."""

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn import blockwise
from path_attn.cache import PaTHKVCache
from path_attn.sequence import Run, Tokens, blocks, dense, masked, take

PAST_QUERIES = 512  # new tokens that meet a filled cache at once
WIDENED_KEYS = 1024  # half-precision keys widened at once: they stay in the processor's cache
STEP_TOKENS = 8  # up to so many new tokens walk one by one instead of folding the whole cache


def cached(
    run: Run, x: Tokens, mask: Tensor | None, cache: PaTHKVCache, dtype: torch.dtype
) -> Tensor:
    """Append to the cache and attend; gradients flow among the new tokens only."""
    if mask is not None:
        x = x.zeroed(mask)
    if cache.length and x.q.shape[1] <= STEP_TOKENS:
        return _step(run, x, mask, cache, dtype)
    if cache.length:
        out = _continue(run, x, mask, cache)
    else:
        out = dense(run, x) if mask is None else masked(run, x, mask)
    with torch.no_grad():
        cache.extend(x.k.to(dtype), x.v.to(dtype), x.w, x.beta, x.g, mask)
    return out


def _step(
    run: Run, x: Tokens, mask: Tensor | None, cache: PaTHKVCache, dtype: torch.dtype
) -> Tensor:
    """A few tokens after a filled cache, which is read once and not written."""
    count = x.q.shape[1]
    q, recent = _walk(x, mask, cache, dtype)
    visible = _visible(run, cache, count)
    if run.backend == "triton" and count == 1:
        out = _flash_step(run, q, recent, visible, cache)
    else:
        keys, values = cache.folded_keys, cache.values
        logits = torch.cat([_scores(q, keys), recent], -1)
        logits = _biased(run, logits, cache.bias)
        if visible is not None:
            logits = logits.unflatten(2, (count, -1))  # [B, H, count, G, length]
            # A masked query may see nothing; its row is zeroed at the end.
            hidden = ~visible[:, None, :, None]
            logits = logits.masked_fill(hidden, torch.finfo(q.dtype).min).flatten(2, 3)
        out = (logits.softmax(-1).to(values.dtype) @ values).to(q.dtype)
    out = out.unflatten(2, (count, -1)).transpose(1, 2).flatten(2, 3)  # [B, count, HQ, V]
    return out if mask is None else out.masked_fill(~mask[..., None, None], 0)


def _biased(run: Run, logits: Tensor, bias: Tensor | None) -> Tensor:
    """Cap logits `[B, H, count G, n]` and add the gates `[B, HQ, n]`."""
    if run.softcap:
        logits = run.softcap * torch.tanh(logits / run.softcap)
    if bias is None:
        return logits
    bias = bias.unflatten(1, (logits.shape[1], -1))  # [B, H, G, n]
    return (logits.unflatten(2, (-1, bias.shape[2])) + bias.unsqueeze(2)).flatten(2, 3)


def _flash_step(
    run: Run, q: Tensor, recent: Tensor, visible: Tensor | None, cache: PaTHKVCache
) -> Tensor:
    """One token on the Triton kernel: the folded keys there, the few open ones here."""
    from path_attn.kernels.decode import decode_triton

    keys, values, bias = cache.folded_keys, cache.values, cache.bias
    old = keys.shape[2]
    valid = None if visible is None else visible[:, 0].expand(q.shape[0], -1)
    parts = []
    if old:
        parts.append(
            decode_triton(
                q,
                keys,
                values[:, :, :old],
                bias=None if bias is None else bias[..., :old],
                valid=None if valid is None else valid[:, :old],
                softcap=run.softcap,
            )
        )
    if recent.shape[-1]:
        logits = _biased(run, recent, None if bias is None else bias[..., old:])
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None, old:], torch.finfo(q.dtype).min)
        weights = logits.softmax(-1)
        parts.append((weights @ values[:, :, old:].to(q.dtype), logits.logsumexp(-1)))
    outs, lses = zip(*parts, strict=True)
    return blockwise.merge_parts(list(outs), list(lses))[0]


def _visible(run: Run, cache: PaTHKVCache, count: int) -> Tensor | None:
    """Columns that the last `count` tokens may see, `[B or 1, count, length]`.

    None if all see all.
    """
    if count == 1 and cache.valid is None and not 0 < run.window < cache.length:
        return None
    column = torch.arange(cache.length, device=cache.values.device)
    visible = (column <= column[-count:, None])[None]
    rank = column[None] if cache.valid is None else cache.valid.cumsum(1)
    if run.window:
        visible = visible & (rank[:, -count:, None] - rank[:, None, :] < run.window)
    return visible if cache.valid is None else visible & cache.valid[:, None, :]


def _continue(run: Run, x: Tokens, mask: Tensor | None, cache: PaTHKVCache) -> Tensor:
    """Many tokens after a filled cache, which is one more part of their softmax."""
    order = None
    if mask is not None:
        order = torch.argsort(~mask, dim=1, stable=True)
        x = x.each(lambda t: take(t, order))
    out, lse, level = blocks(run, x)
    start = blockwise.move_to_start(level.q, level.p)[:, :, : out.shape[2]]
    heads = (x.q.shape[0], -1)
    start, new_out = (y.unflatten(0, heads).flatten(1, 2) for y in (start, out))
    new_lse = lse.unflatten(0, heads).flatten(1, 2)  # [B, HQ, T]
    past_out, past_lse = _attend_past(run, start, x.g, cache)
    out, _ = blockwise.merge_parts([new_out, past_out], [new_lse, past_lse])
    out = out.transpose(1, 2)
    if mask is None or order is None:
        return out
    return take(out, torch.argsort(order, dim=1)).masked_fill(~mask[..., None, None], 0)


def _attend_past(
    run: Run, q: Tensor, g: Tensor | None, cache: PaTHKVCache
) -> tuple[Tensor, Tensor]:
    """Attention to what the cache held before the new tokens, as a part of their softmax.

    Args:
        run: How to attend.
        q: New queries moved to the end of the cache, `[B, HQ, T, K]`.
        g: Their log gates, `[B, T, HQ]`, or None.
        cache: Not yet extended.

    Returns:
        out: `[B, HQ, T, V]`. lse: `[B, HQ, T]`.
    """
    first = 0
    if run.window and cache.valid is None:
        first = max(0, cache.length - run.window + 1)
    keys, bias = cache.present()
    k, v = (y[:, :, first:].to(q.dtype) for y in (keys, cache.values))
    if g is not None and bias is not None:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        gates, bias = g.transpose(1, 2).cumsum(-1), bias[:, :, first:]
        q = torch.cat([q, torch.stack([gates, torch.ones_like(gates)], -1)], -1)
        k = torch.cat([k, torch.stack([torch.ones_like(bias), bias], -1)], -1)
    rules = blockwise.Rules(run.softcap, 0, 0 if g is None else blockwise.GATE_DIMS)
    batch, heads = k.shape[:2]
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    parts = []
    for piece in q.split(PAST_QUERIES, 2):  # bounds the logits, where they are written out
        count, start = piece.shape[2], PAST_QUERIES * len(parts)
        visible = _sees_past(run, cache, first, start, count)
        if visible is not None:
            visible = visible.expand(batch, -1, -1).repeat(1, q.shape[1] // heads, 1)
            visible = visible.repeat_interleave(heads, 0)
        rows = piece.unflatten(1, (heads, -1)).flatten(2, 3).flatten(0, 1)  # [N, G count, D]
        out, lse = blockwise.part_forward(rows, k, v, rules, visible)
        shape = (*q.shape[:2], count)
        parts.append((out.reshape(*shape, -1), lse.reshape(shape)))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _sees_past(run: Run, cache: PaTHKVCache, first: int, start: int, count: int) -> Tensor | None:
    """Which columns from `first` on the new tokens `start` to `start + count` see.

    `[B or 1, count, columns]`, or None if all see all.
    """
    valid = cache.valid
    if valid is None and not run.window:
        return None
    device = cache.values.device
    new = torch.arange(start, start + count, device=device)
    rank = torch.arange(first, cache.length, device=device)[None]
    after = (cache.length + new)[None]
    if valid is not None:
        rank = valid.cumsum(1) - 1
        after = cache.lengths[:, None] + new
    visible = torch.ones(rank.shape[0], count, rank.shape[1], dtype=torch.bool, device=device)
    if run.window:
        visible = after[:, :, None] - rank[:, None, :] < run.window
    return visible if valid is None else visible & valid[:, None, :]


def _walk(
    x: Tokens, mask: Tensor | None, cache: PaTHKVCache, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Append a few tokens to the cache, moving each query on its way.

    Returns:
        q: Queries at the fold point, `[B, H, count G, K]`, tokens outermost. logits: Those of the
            columns that are open after the last token, `[B, H, count G, open]`; 0 for later ones.
    """
    count, groups = x.q.shape[1], (x.k.shape[2], -1)
    cache.reserve(count)
    moved, recent = [], []
    for t in range(count):
        token = x if count == 1 else x.each(lambda y, t=t: y[:, t : t + 1])
        valid = None if mask is None else mask[:, t : t + 1]
        cache.advance(token.k.to(dtype), token.v.to(dtype), token.w, token.beta, token.g, valid)
        q = token.q[:, 0].unflatten(1, groups)  # [B, H, G, K]
        logits = q[..., :0]
        if cache.walk is not None:
            seen = q @ cache.walk.mT
            q, logits = seen[..., : q.shape[-1]], seen[..., q.shape[-1] :]
        moved.append(q)
        recent.append(logits)
    if count == 1:
        return moved[0], recent[0]
    width = recent[-1].shape[-1]
    padded = [F.pad(logits, (0, width - logits.shape[-1])) for logits in recent]
    return torch.cat(moved, 2), torch.cat(padded, 2)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """`q keys^T` in the dtype of q, `[B, H, n, L]`: half-precision keys are widened run by run."""
    if keys.dtype == q.dtype:
        return q @ keys.mT
    runs = keys.split(WIDENED_KEYS, 2) if keys.shape[2] else [keys]
    return torch.cat([q @ run.to(q.dtype).mT for run in runs], -1)
