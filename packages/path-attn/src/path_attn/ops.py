"""The public operation.

It checks its inputs, chooses a back-end, handles padding, packing and the cache.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn import blockwise
from path_attn.cache import PaTHKVCache
from path_attn.checks import (
    check_cache,
    check_cu_seqlens,
    check_mask,
    check_options,
    check_shapes,
    check_values,
    choose_backend,
)
from path_attn.reference import global_path_attention
from tenfold_common.errors import UserError

Backend = Literal["auto", "reference", "torch", "triton"]
GateScale = Literal["paper", "fla"]
PAST_QUERIES = 512  # new tokens that meet a filled cache at once
WIDENED_KEYS = 1024  # half-precision keys widened at once: they stay in the processor's cache
STEP_TOKENS = 8  # up to so many new tokens walk one by one instead of folding the whole cache


def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    gate_scale: GateScale = "paper",
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cache: PaTHKVCache | None = None,
    return_cache: bool = False,
    backend: Backend = "auto",
    block_size: int = 64,
    max_beta: float | None = None,
    strict: bool = False,
) -> tuple[Tensor, PaTHKVCache | None]:
    r"""Causal softmax attention whose logits are `k_j^T H_{j+1} ... H_i q_i`.

    This is PaTH, arXiv 2505.16381, section 3.1:
    H_t = I - beta_t w_t w_t^T. With gates (PaTH-FoX) the sum of log gates from j + 1 to i is added.

    Args:
        q: Queries, `[B, T, HQ, K]`, float32, float64, bfloat16 or float16. The arithmetic is
            float32 (float64 for float64) on the torch back-end.
        k: Keys, `[B, T, H, K]`, dtype of q; HQ is a multiple of H.
        v: Values, `[B, T, H, V]`, dtype of q.
        w: Unit directions (or zero, which makes H = I), `[B, T, H, K]`, any of the dtypes; `[B, T,
            H, R, K]` for R reflections a token, the last of which meets the query first. None
                together with beta: H = I.
        beta: Strengths in [0, 2], `[B, T, H]` (`[B, T, H, R]`). Keep float32: near 2 a bfloat16
            rounds to 2.
        g: Log forget gates <= 0, one per query head, `[B, T, HQ]`. Keep float32.
        scale: Multiplies the logits. Defaults to `K ** -0.5`.
        gate_scale: "paper" adds the gates to the scaled logits; "fla" scales them as well, as
            flash-linear-attention does. A model must be run with the convention it was trained
            with.
        cu_seqlens: Boundaries of sequences packed along T, `[N + 1]` int32/int64, 0 first and T
            last; needs B = 1. Read on the host, so `torch.compile` breaks its graph here.
        attention_mask: 1 for real tokens, `[B, T]` bool or integer, any pattern. A masked token is
            neither a key nor a step of the path, and its output is 0.
        window: Key j is visible to query i iff `0 <= i - j < window`, counted in real tokens.
        softcap: Replaces `x = scale * A` by `softcap * tanh(x / softcap)`, before the gates.
        cache: What came before; the tokens given are appended to it in place. No gradient flows
            into it.
        return_cache: Start a cache where none is given.
        backend: "reference" (global UT form, O(T^2) memory), "torch" (blockwise, O(T block_size)
            memory), "triton" (CUDA), or "auto": triton for CUDA tensors where it applies, otherwise
            torch.
        block_size: Tokens per block, 1 to 256. It changes speed and memory, not the result.
        max_beta: Clips beta from above; None leaves it. Rounding can push an eigenvalue below -1
            near beta = 2.
        strict: Also check values everywhere: NaN, range of beta and g, norm of w. On the CPU the
            ranges of beta and g are always checked (not under `torch.compile`).

    Returns:
        o: `[B, T, HQ, V]`, dtype of q. cache: `cache`, a new one with `return_cache`, else None.

    Raises:
        UserError: a shape, dtype, device, value or option does not fit; the message says which.

    Example:
        >>> import torch
        >>> from path_attn import path_attention
        >>> q, k, v, w = (torch.randn(1, 5, 2, 4) for _ in range(4))
        >>> w = torch.nn.functional.normalize(w, dim=-1)
        >>> o, _ = path_attention(q, k, v, w, beta=torch.ones(1, 5, 2))
        >>> o.shape
        torch.Size([1, 5, 2, 4])
    """
    check_shapes(q, k, v, w, beta, g)
    check_options(q, scale, gate_scale, window, softcap, backend, block_size, max_beta)
    if attention_mask is not None:
        attention_mask = check_mask(attention_mask, q)
    if not torch.compiler.is_compiling() and (strict or q.device.type == "cpu"):
        check_values(q, k, v, w, beta, g, attention_mask, strict, max_beta)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q, attention_mask, cache, return_cache)
    if w is not None and beta is not None and w.dim() == 4:
        w, beta = w.unsqueeze(3), beta.unsqueeze(3)  # one reflection a token
    if cache is None and return_cache:
        cache = PaTHKVCache()
    chosen = choose_backend(backend, q, v)

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with _without_autocast(q.device.type):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        tokens = _Tokens(
            q.to(dtype) * factor,
            k.to(dtype),
            v.to(dtype),
            None if w is None else w.to(dtype),
            None if beta is None else _clip(beta.to(dtype), max_beta),
            None if g is None else g.to(dtype) * (factor if gate_scale == "fla" else 1.0),
        )
        run = _Runner(chosen, block_size, window or 0, softcap or 0.0, q.dtype)
        if cache is not None:
            check_cache(cache, q, k, v, w, beta, g, chosen, gate_scale, scale)
            out = run.cached(tokens, attention_mask, cache, k.dtype)
        elif cu_seqlens is not None:
            out = run.packed(tokens, cu_seqlens.tolist())
        elif attention_mask is not None:
            out = run.masked(tokens, attention_mask)
        else:
            out = run.dense(tokens)
        return out.to(q.dtype), cache


def path_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    cache: PaTHKVCache,
    scale: float | None = None,
    gate_scale: GateScale = "paper",
    attention_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
    max_beta: float | None = None,
) -> Tensor:
    """Append the next tokens to a filled cache and attend to all of it; see `path_attention`.

    Returns:
        o: `[B, T, HQ, V]` for the T new tokens, usually one.

    Raises:
        UserError: the cache is empty, or an input does not fit.
    """
    if cache.length == 0:
        raise UserError(
            "the cache is empty: prefill it first with path_attention(..., cache=cache)"
        )
    out, _ = path_attention(
        q,
        k,
        v,
        w,
        beta,
        g,
        cache=cache,
        scale=scale,
        gate_scale=gate_scale,
        attention_mask=attention_mask,
        window=window,
        softcap=softcap,
        backend=backend,
        max_beta=max_beta,
    )
    return out


def parallel_path_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    use_cache: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`path_attention` with the signature and gate convention of fla's function of this name.

    Args:
        q: `[B, T, HQ, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        w: `[B, T, H, K]`.
        beta: `[B, T, H]`.
        g: `[B, T, HQ]` or None; scaled together with the logits ("fla").
        scale: Defaults to `K ** -0.5`.
        cu_seqlens: `[N + 1]`, needs B = 1.
        use_cache: Also return the keys moved to the end of the sequence.

    Returns:
        o: `[B, T, HQ, V]`. k_cache: `[B, T, H, K]`, dtype of k, or None.
    """
    out, cache = path_attention(
        q,
        k,
        v,
        w,
        beta,
        g,
        scale=scale,
        gate_scale="fla",
        cu_seqlens=cu_seqlens,
        return_cache=use_cache,
    )
    if cache is None:
        return out, None
    cache.flush()
    return out, cache.folded_keys.transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Running it


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else nullcontext()
    )


class _Tokens(NamedTuple):
    """Inputs in compute dtype, shaped as the user gave them but with their reflection axis.

    q is scaled, g is as it enters the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    beta: Tensor | None
    g: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "_Tokens":
        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        q, k, v, w, beta, g = self
        return _Tokens(change(q), change(k), change(v), maybe(w), maybe(beta), maybe(g))

    def zeroed(self, mask: Tensor) -> "_Tokens":
        """Zero masked tokens: H = I, gate 1, and no NaN to pass through a product with 0."""
        return self.each(lambda x: x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0))


class _Runner(NamedTuple):
    backend: str
    block: int
    window: int  # 0: none
    softcap: float  # 0: none
    dtype: torch.dtype  # of the operands of matrix products on Triton

    def dense(self, x: _Tokens) -> Tensor:
        """Equal-length sequences, every token real: `[B, T, HQ, V]`."""
        if self.backend == "reference":
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
                window=self.window or None,
                softcap=self.softcap or None,
            )
        out, _, _ = self._blocks(x)
        return _from_rows(out, x.q)

    def _blocks(self, x: _Tokens) -> tuple[Tensor, Tensor, blockwise.Level]:
        """Output and log-sum-exp as `[N, G, T, ...]` rows, and the blocks."""
        length = x.q.shape[1]
        q, k, v, w, beta, g = _to_rows(x, share_heads=x.g is None or self.backend == "triton")
        prepared = blockwise.cut(q, k, v, w, beta, softcap=self.softcap, block=self.block)
        rules = {"softcap": self.softcap, "window": self.window}
        if self.backend == "triton":
            from path_attn.kernels.attention import attend_triton

            out, lse = attend_triton(prepared, g, compute_dtype=self.dtype, **rules)
        else:
            out, lse = blockwise.attend(prepared, g, **rules)
        return out[:, :, :length], lse[:, :, :length], prepared.level

    def masked(self, x: _Tokens, mask: Tensor) -> Tensor:
        """Leaving out a masked token changes nothing for the others.

        Move the real ones to the front, run, put back.
        """
        order = torch.argsort(~mask, dim=1, stable=True)
        back = torch.argsort(order, dim=1)
        moved = x.zeroed(mask).each(lambda t: _take(t, order))
        return _take(self.dense(moved), back).masked_fill(~mask[..., None, None], 0)

    def packed(self, x: _Tokens, bounds: list[int]) -> Tensor:
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
            outs.append(self.dense(batch)[mask])
            places.append(place[mask])
        return torch.cat(outs)[torch.argsort(torch.cat(places))].unsqueeze(0)

    def cached(
        self, x: _Tokens, mask: Tensor | None, cache: PaTHKVCache, dtype: torch.dtype
    ) -> Tensor:
        """Append to the cache and attend; gradients flow among the new tokens only."""
        if mask is not None:
            x = x.zeroed(mask)
        if cache.length and x.q.shape[1] <= STEP_TOKENS:
            return self._step(x, mask, cache, dtype)
        if cache.length:
            out = self._continue(x, mask, cache)
        else:
            out = self.dense(x) if mask is None else self.masked(x, mask)
        with torch.no_grad():
            cache.extend(x.k.to(dtype), x.v.to(dtype), x.w, x.beta, x.g, mask)
        return out

    def _step(
        self, x: _Tokens, mask: Tensor | None, cache: PaTHKVCache, dtype: torch.dtype
    ) -> Tensor:
        """A few tokens after a filled cache, which is read once and not written."""
        count = x.q.shape[1]
        q, recent = _walk(x, mask, cache, dtype)
        visible = self._visible(cache, count)
        if self.backend == "triton" and count == 1:
            out = self._flash_step(q, recent, visible, cache)
        else:
            keys, values = cache.folded_keys, cache.values
            logits = torch.cat([_scores(q, keys), recent], -1)
            logits = self._biased(logits, cache.bias)
            if visible is not None:
                logits = logits.unflatten(2, (count, -1))  # [B, H, count, G, length]
                # A masked query may see nothing; its row is zeroed at the end.
                hidden = ~visible[:, None, :, None]
                logits = logits.masked_fill(hidden, torch.finfo(q.dtype).min).flatten(2, 3)
            out = (logits.softmax(-1).to(values.dtype) @ values).to(q.dtype)
        out = out.unflatten(2, (count, -1)).transpose(1, 2).flatten(2, 3)  # [B, count, HQ, V]
        return out if mask is None else out.masked_fill(~mask[..., None, None], 0)

    def _biased(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Cap logits `[B, H, count G, n]` and add the gates `[B, HQ, n]`."""
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if bias is None:
            return logits
        bias = bias.unflatten(1, (logits.shape[1], -1))  # [B, H, G, n]
        return (logits.unflatten(2, (-1, bias.shape[2])) + bias.unsqueeze(2)).flatten(2, 3)

    def _flash_step(
        self, q: Tensor, recent: Tensor, visible: Tensor | None, cache: PaTHKVCache
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
                    softcap=self.softcap,
                )
            )
        if recent.shape[-1]:
            logits = self._biased(recent, None if bias is None else bias[..., old:])
            if valid is not None:
                logits = logits.masked_fill(~valid[:, None, None, old:], torch.finfo(q.dtype).min)
            weights = logits.softmax(-1)
            parts.append((weights @ values[:, :, old:].to(q.dtype), logits.logsumexp(-1)))
        outs, lses = zip(*parts, strict=True)
        return blockwise.merge_parts(list(outs), list(lses))[0]

    def _visible(self, cache: PaTHKVCache, count: int) -> Tensor | None:
        """Columns that the last `count` tokens may see, `[B or 1, count, length]`.

        None if all see all.
        """
        if count == 1 and cache.valid is None and not 0 < self.window < cache.length:
            return None
        column = torch.arange(cache.length, device=cache.values.device)
        visible = (column <= column[-count:, None])[None]
        rank = column[None] if cache.valid is None else cache.valid.cumsum(1)
        if self.window:
            visible = visible & (rank[:, -count:, None] - rank[:, None, :] < self.window)
        return visible if cache.valid is None else visible & cache.valid[:, None, :]

    def _continue(self, x: _Tokens, mask: Tensor | None, cache: PaTHKVCache) -> Tensor:
        """Many tokens after a filled cache, which is one more part of their softmax."""
        order = None
        if mask is not None:
            order = torch.argsort(~mask, dim=1, stable=True)
            x = x.each(lambda t: _take(t, order))
        out, lse, level = self._blocks(x)
        start = blockwise.move_to_start(level.q, level.p)[:, :, : out.shape[2]]
        heads = (x.q.shape[0], -1)
        start, new_out = (y.unflatten(0, heads).flatten(1, 2) for y in (start, out))
        new_lse = lse.unflatten(0, heads).flatten(1, 2)  # [B, HQ, T]
        past_out, past_lse = self._past(start, x.g, cache)
        out, _ = blockwise.merge_parts([new_out, past_out], [new_lse, past_lse])
        out = out.transpose(1, 2)
        if mask is None or order is None:
            return out
        return _take(out, torch.argsort(order, dim=1)).masked_fill(~mask[..., None, None], 0)

    def _past(self, q: Tensor, g: Tensor | None, cache: PaTHKVCache) -> tuple[Tensor, Tensor]:
        """Attention to what the cache held before the new tokens, as a part of their softmax.

        Args:
            q: New queries moved to the end of the cache, `[B, HQ, T, K]`.
            g: Their log gates, `[B, T, HQ]`, or None.
            cache: Not yet extended.

        Returns:
            out: `[B, HQ, T, V]`. lse: `[B, HQ, T]`.
        """
        first = 0
        if self.window and cache.valid is None:
            first = max(0, cache.length - self.window + 1)
        keys, bias = cache.present()
        k, v = (y[:, :, first:].to(q.dtype) for y in (keys, cache.values))
        if g is not None and bias is not None:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            gates, bias = g.transpose(1, 2).cumsum(-1), bias[:, :, first:]
            q = torch.cat([q, torch.stack([gates, torch.ones_like(gates)], -1)], -1)
            k = torch.cat([k, torch.stack([torch.ones_like(bias), bias], -1)], -1)
        rules = blockwise.Rules(self.softcap, 0, 0 if g is None else blockwise.GATE_DIMS)
        batch, heads = k.shape[:2]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        parts = []
        for piece in q.split(PAST_QUERIES, 2):  # bounds the logits, where they are written out
            count, start = piece.shape[2], PAST_QUERIES * len(parts)
            visible = self._sees_past(cache, first, start, count)
            if visible is not None:
                visible = visible.expand(batch, -1, -1).repeat(1, q.shape[1] // heads, 1)
                visible = visible.repeat_interleave(heads, 0)
            rows = piece.unflatten(1, (heads, -1)).flatten(2, 3).flatten(0, 1)  # [N, G count, D]
            out, lse = blockwise.part_forward(rows, k, v, rules, visible)
            shape = (*q.shape[:2], count)
            parts.append((out.reshape(*shape, -1), lse.reshape(shape)))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _sees_past(self, cache: PaTHKVCache, first: int, start: int, count: int) -> Tensor | None:
        """Which columns from `first` on the new tokens `start` to `start + count` see.

        `[B or 1, count, columns]`, or None if all see all.
        """
        valid = cache.valid
        if valid is None and not self.window:
            return None
        device = cache.values.device
        new = torch.arange(start, start + count, device=device)
        rank = torch.arange(first, cache.length, device=device)[None]
        after = (cache.length + new)[None]
        if valid is not None:
            rank = valid.cumsum(1) - 1
            after = cache.lengths[:, None] + new
        visible = torch.ones(rank.shape[0], count, rank.shape[1], dtype=torch.bool, device=device)
        if self.window:
            visible = after[:, :, None] - rank[:, None, :] < self.window
        return visible if valid is None else visible & valid[:, None, :]


def _walk(
    x: _Tokens, mask: Tensor | None, cache: PaTHKVCache, dtype: torch.dtype
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


def _to_rows(x: _Tokens, *, share_heads: bool) -> _Tokens:
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
    return _Tokens(of_query(x.q), of_key(x.k), of_key(x.v), w, beta, g)


def _from_rows(out: Tensor, q: Tensor) -> Tensor:
    """`[N, G, T, V]` rows back to `[B, T, HQ, V]`."""
    return out.unflatten(0, (q.shape[0], -1)).flatten(1, 2).transpose(1, 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Permute the tokens of each row: `x [B, T, ...]`, `index [B, T]`."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand_as(x))


def _clip(beta: Tensor, max_beta: float | None) -> Tensor:
    return beta if max_beta is None else beta.clamp(max=max_beta)
