"""What `path_attention` asks of its inputs.

Every refusal names the tensor, what was seen and what is accepted.
"""

import os
import warnings
from itertools import pairwise

import torch
from torch import Tensor

from path_attn.cache import PaTHKVCache
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import is_available, require

BACKENDS = ("auto", "reference", "torch", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_MAX_HEAD_DIM = 256
UNIT_NORM_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}


class PaTHWarning(UserWarning):
    """Something about the inputs that is legal and probably not meant."""


def choose_backend(backend: str, q: Tensor, v: Tensor) -> str:
    """Name the back-end that runs: "reference", "torch" or "triton"."""
    obstacle = None
    if q.device.type != "cuda":
        obstacle = f"it needs CUDA tensors and q is on {q.device}"
    elif q.dtype == torch.float64:
        obstacle = "it has no float64"
    elif max(q.shape[-1], v.shape[-1]) > TRITON_MAX_HEAD_DIM:
        obstacle = (
            f"head dimensions {q.shape[-1]} and {v.shape[-1]} exceed its {TRITON_MAX_HEAD_DIM}"
        )
    if backend == "triton":
        if obstacle is not None and not _interpreting():
            raise UserError(
                f"backend 'triton' does not fit: {obstacle}. Use backend='torch' or 'auto'"
            )
        require("triton", extra="triton", package="path-attn")
        return backend
    if backend != "auto":
        return backend
    if q.device.type != "cuda":
        return "torch"
    if obstacle is None and not is_available("triton"):
        obstacle = "triton is not installed; pip install 'path-attn[triton]'"
    if obstacle is not None:
        warnings.warn(f"the triton back-end is not used: {obstacle}", PaTHWarning, stacklevel=3)
        return "torch"
    return "triton"


def _interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, beta: Tensor | None, g: Tensor | None
) -> None:
    """Check dimensions, dtypes and devices; w and beta with their reflection axis."""
    for name, x in (("q", q), ("k", k), ("v", v), ("w", w), ("beta", beta), ("g", g)):
        if not isinstance(x, Tensor) and (x is not None or name in "qkv"):
            raise UserError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UserError(
                f"{name} must have 4 dimensions, [B, T, heads, dim], got shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise UserError(
                f"{name} has dtype {x.dtype}; accepted are float32, float64, bfloat16 and float16"
            )
        if x.dtype != q.dtype:
            raise UserError(
                f"{name} has dtype {x.dtype} but q has {q.dtype}; q, k and v must agree"
            )
    batch, length, q_heads, dim = q.shape
    heads = k.shape[2]
    if length == 0 or batch == 0:
        raise UserError(
            f"q is empty (shape {tuple(q.shape)}): at least one token and one row are needed"
        )
    if 0 in (q_heads, heads, dim, v.shape[3]):
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: heads and dims must be "
            f"at least 1"
        )
    if q_heads % heads:
        raise UserError(
            f"q has {q_heads} heads but k has {heads}; q heads must be a multiple of k heads"
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], str]] = {
        "k": (k, (batch, length, heads, dim), "[B, T, H, K]"),
        "v": (v, (batch, length, heads, v.shape[3]), "[B, T, H, V]"),
        "g": (g, (batch, length, q_heads), "[B, T, HQ], one gate per query head"),
    }
    if (w is None) != (beta is None):
        raise UserError("w and beta belong together: give both, or neither for plain attention")
    if w is not None:
        many = w.shape[3:4] if w.dim() == 5 else ()
        if 0 in many:
            raise UserError(f"w has shape {tuple(w.shape)}: at least one reflection is needed")
        form = "[B, T, H, K] or [B, T, H, R, K]"
        expected["w"] = (w, (batch, length, heads, *many, dim), form)
        form = "[B, T, H] or [B, T, H, R], like w"
        expected["beta"] = (beta, (batch, length, heads, *many), form)
    for name, (x, shape, form) in expected.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            swapped = x.dim() >= 3 and x.shape[1] != length and x.shape[2] == q_heads
            hint = ". Did you pass [B, H, T, K]? This library uses [B, T, H, K]" if swapped else ""
            raise UserError(
                f"{name} has shape {tuple(x.shape)} but {shape} is needed: {form}{hint}"
            )
        if x.device != q.device:
            raise UserError(f"{name} is on {x.device} but q is on {q.device}")
        if x.dtype not in DTYPES:
            raise UserError(
                f"{name} has dtype {x.dtype}; accepted are float32, float64, bfloat16 and float16"
            )


def check_options(
    q: Tensor,
    scale: float | None,
    gate_scale: str,
    window: int | None,
    softcap: float | None,
    backend: str,
    block_size: int,
    max_beta: float | None,
) -> None:
    """Check everything that is not a tensor."""
    if gate_scale not in ("paper", "fla"):
        raise UserError(
            f"gate_scale is {gate_scale!r}; accepted are 'paper' and 'fla'."
            f"{suggest(gate_scale, ['paper', 'fla'])}"
        )
    if backend not in BACKENDS:
        raise UserError(
            f"backend is {backend!r}; accepted are {', '.join(BACKENDS)}."
            f"{suggest(backend, BACKENDS)}"
        )
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
        raise UserError(f"scale must be a positive number, got {scale}")
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(
            f"window must be a whole number of tokens, at least 1 (the token itself), got {window}"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise UserError(f"softcap must be a positive number, got {softcap}; use None for no cap")
    if type(block_size) is not int or not 1 <= block_size <= 256:
        raise UserError(f"block_size must be a whole number between 1 and 256, got {block_size}")
    if max_beta is not None and not 0 <= max_beta <= 2:
        raise UserError(f"max_beta must lie in [0, 2], got {max_beta}")


def check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    strict: bool,
    max_beta: float | None,
) -> None:
    """Check ranges of beta and g; with `strict` also NaN and the norm of w.

    Masked tokens may hold anything.
    """
    if mask is not None:

        def real(x: Tensor) -> Tensor:
            return x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0)

        q, k, v = real(q), real(k), real(v)
        w, beta, g = (None if x is None else real(x) for x in (w, beta, g))
    named = (("q", q), ("k", k), ("v", v), ("w", w), ("beta", beta), ("g", g))
    for name, x in named if strict else ():
        if x is not None and bool(x.isnan().any()):
            raise UserError(
                f"{name} contains NaN, first at index {tuple(x.isnan().nonzero()[0].tolist())}"
            )
    if beta is not None:
        low, high = (float(x) for x in torch.aminmax(beta.detach()))
        if not (low >= 0 and high <= 2):
            raise UserError(
                f"beta must lie in [0, 2], got values from {low:.6g} to {high:.6g}; "
                f"use 2 * sigmoid(...)"
            )
        reaches_two = high == 2 and (max_beta is None or max_beta == 2)
        if reaches_two and beta.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"beta reaches 2 in {beta.dtype}: rounding can make the path expand. Keep beta in "
                f"float32 or set max_beta=2 - 2**-7",
                PaTHWarning,
                stacklevel=3,
            )
    if g is not None:
        low, high = (float(x) for x in torch.aminmax(g.detach()))
        if not (low > -torch.inf and high <= 0):
            raise UserError(
                f"g must be finite log gates <= 0, got values from {low:.6g} to {high:.6g}; "
                f"use logsigmoid(...)"
            )
    if strict and w is not None:
        norm = w.detach().double().norm(dim=-1)
        tolerance = UNIT_NORM_TOLERANCE[w.dtype]
        wrong = ((norm - 1).abs() > tolerance) & (norm > tolerance)
        if bool(wrong.any()):
            seen = float(norm[wrong][0])
            raise UserError(
                f"w must have norm 1 (or 0) along its last axis, got {seen:.6g}; L2-normalise it"
            )


def check_cu_seqlens(
    cu_seqlens: Tensor,
    q: Tensor,
    mask: Tensor | None,
    cache: PaTHKVCache | None,
    return_cache: bool,
) -> None:
    """Check packed boundaries."""
    if not isinstance(cu_seqlens, Tensor):
        raise UserError(f"cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if mask is not None or cache is not None or return_cache:
        raise UserError(
            "cu_seqlens cannot be combined with attention_mask or a cache; pad the batch instead"
        )
    if q.shape[0] != 1:
        raise UserError(
            f"cu_seqlens needs all sequences packed in one row (B = 1), got B = {q.shape[0]}"
        )
    if (
        cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
        or len(cu_seqlens) < 2
    ):
        raise UserError(
            f"cu_seqlens must be [N + 1] of int32 or int64, got {tuple(cu_seqlens.shape)} of "
            f"{cu_seqlens.dtype}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1]:
        raise UserError(
            f"cu_seqlens must run from 0 to T = {q.shape[1]}, got {bounds[0]} to {bounds[-1]}"
        )
    if any(b <= a for a, b in pairwise(bounds)):
        raise UserError(f"cu_seqlens must rise strictly (no empty sequences), got {bounds[:8]}...")


def check_mask(mask: Tensor, q: Tensor) -> Tensor:
    """Check a padding mask and return it as bool."""
    if not isinstance(mask, Tensor):
        raise UserError(f"attention_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape != q.shape[:2]:
        raise UserError(
            f"attention_mask must be [B, T] = {tuple(q.shape[:2])} with 1 for real tokens, got "
            f"{tuple(mask.shape)}; causality is built in, 3-D and 4-D masks are not accepted"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise UserError(f"attention_mask must be bool or integer (1 = real), got {mask.dtype}")
    if mask.device != q.device:
        raise UserError(f"attention_mask is on {mask.device} but q is on {q.device}")
    if (
        mask.dtype != torch.bool
        and not torch.compiler.is_compiling()
        and bool(((mask != 0) & (mask != 1)).any())
    ):
        raise UserError("attention_mask must hold 0 and 1 only")
    return mask.bool()


def check_cache(
    cache: PaTHKVCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    backend: str,
    gate_scale: str,
    scale: float | None,
) -> None:
    """Check that inputs continue what the cache holds; an empty cache takes their form."""
    if not isinstance(cache, PaTHKVCache):
        raise UserError(f"cache must be a PaTHKVCache, got {type(cache).__name__}")
    if backend == "reference":
        raise UserError("backend 'reference' has no cache; use 'torch'")
    form = {
        "rows": q.shape[0],
        "key heads": k.shape[2],
        "query heads": q.shape[2],
        "key dimension": k.shape[3],
        "value dimension": v.shape[3],
        "dtype": v.dtype,
        "device": v.device,
        "reflections": 0 if w is None else w.shape[3],
        "gates": g is not None,
        "gate_scale": gate_scale if g is not None else None,
        "scale": scale,
    }
    if cache.length == 0:
        cache.form = form
        return
    if cache.values.is_inference() and not torch.is_inference_mode_enabled():
        raise UserError(
            "the cache was filled under torch.inference_mode(); go on under it, or fill it under "
            "torch.no_grad()"
        )
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, w, beta, g)
    ):
        raise UserError("no gradient flows through a filled cache; decode under torch.no_grad()")
    cache.form["rows"] = cache.batch  # rows come and go with reorder and repeat
    if form != cache.form:
        name = next(name for name in form if form[name] != cache.form[name])
        raise UserError(
            f"the cache does not fit: its {name} is {cache.form[name]}, these inputs have "
            f"{form[name]}"
        )
