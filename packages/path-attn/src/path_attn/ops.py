"""The public operation.

It checks its inputs, chooses a back-end, handles padding, packing and the cache.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

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
from path_attn.decoding import cached
from path_attn.sequence import Run, Tokens, dense, masked, packed
from tenfold_common.errors import UserError

Backend = Literal["auto", "reference", "torch", "triton"]
GateScale = Literal["paper", "fla"]


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
        tokens = Tokens(
            q.to(dtype) * factor,
            k.to(dtype),
            v.to(dtype),
            None if w is None else w.to(dtype),
            None if beta is None else _clip(beta.to(dtype), max_beta),
            None if g is None else g.to(dtype) * (factor if gate_scale == "fla" else 1.0),
        )
        run = Run(chosen, block_size, window or 0, softcap or 0.0, q.dtype)
        if cache is not None:
            check_cache(cache, q, k, v, w, beta, g, chosen, gate_scale, scale)
            out = cached(run, tokens, attention_mask, cache, k.dtype)
        elif cu_seqlens is not None:
            out = packed(run, tokens, cu_seqlens.tolist())
        elif attention_mask is not None:
            out = masked(run, tokens, attention_mask)
        else:
            out = dense(run, tokens)
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


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else nullcontext()
    )


def _clip(beta: Tensor, max_beta: float | None) -> Tensor:
    return beta if max_beta is None else beta.clamp(max=max_beta)
