"""One query per head against a long read-only cache: flash decoding, split over the keys.

Every program reads one chunk of keys and values once, for all the query heads that share them; a
second kernel joins the chunks. The cost is the memory traffic of the cache, as for plain softmax
attention. Not yet measured on a GPU.
"""

# The kernels are Triton's language, in which names defined under a compile-time condition exist
# exactly where they are used; a checker of Python cannot know that.
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from path_attn.kernels.attention import DTYPES, MAX_HEAD_DIM
from path_attn.kernels.tiles import LOG2E, absorb, cap

BLOCK_G = 16  # the least a tensor-core product takes; query heads of one key head are padded to it
BLOCK_N = 64
PROGRAMS = 512  # enough to fill the largest GPUs about four times


def decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    softcap: float = 0.0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Attention of single tokens to folded keys, as a part of a larger softmax.

    `blockwise.merge_parts` joins such parts. Without gradient. Keys and values may be views of
    larger buffers; their last dimension must be dense.

    Args:
        q: Queries at the point the keys are folded to, times the softmax scale, `[B, H, G, K]`;
            cast to the dtype of k.
        k: Keys, `[B, H, L, K]`, float32, bfloat16 or float16.
        v: Values, `[B, H, L, V]`, dtype of k.
        bias: Added to the logits after the cap (log gates), `[B, H * G, L]` or `[B, H, G, L]`, or
            None.
        valid: Which keys exist, bool `[B, L]`, or None for all.
        softcap: Cap of the logits, bias excluded; 0 for none.
        precision: How float32 operands are multiplied: "ieee", "tf32x3" or "tf32".

    Returns:
        out: `[B, H, G, V]`, float32, 0 where a query sees no key. lse: `[B, H, G]`, float32, there
            -inf.
    """
    if k.dtype not in DTYPES or v.dtype != k.dtype:
        raise ValueError(
            f"keys are {k.dtype} and values {v.dtype}; "
            f"both must be one of {', '.join(map(str, DTYPES))}"
        )
    if max(k.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(
            f"head dimensions are {k.shape[-1]} and {v.shape[-1]}; "
            f"the Triton kernels take at most {MAX_HEAD_DIM}"
        )
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    if bias is not None:
        bias = bias.reshape(*q.shape[:3], k.shape[2]).float()
    return decode_forward(q.to(k.dtype).contiguous(), k, v, bias, valid, softcap, precision)


@torch.library.custom_op("path_attn::decode_forward", mutates_args=())
def decode_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    softcap: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """`decode_triton` for operands it has brought into form."""
    batch, heads, group, k_dim = q.shape
    length, v_dim = v.shape[2:]
    out = torch.empty(batch, heads, group, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, group, dtype=torch.float32, device=q.device)
    if not length:
        return out.zero_(), lse.fill_(-torch.inf)
    groups = triton.cdiv(group, BLOCK_G)
    wanted = min(triton.cdiv(PROGRAMS, batch * heads * groups), triton.cdiv(length, BLOCK_N))
    chunk = triton.cdiv(triton.cdiv(length, wanted), BLOCK_N) * BLOCK_N
    splits = triton.cdiv(length, chunk)
    parts = torch.empty(batch * heads * group, splits, v_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch * heads * group, splits, dtype=torch.float32, device=q.device)
    bias_, valid_ = (q if bias is None else bias), (q if valid is None else valid.to(torch.int8))
    constants = {
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_PAD": max(16, triton.next_power_of_2(k_dim)),
        "V_PAD": max(16, triton.next_power_of_2(v_dim)),
        "BIASED": bias is not None,
        "MASKED": valid is not None,
        "CAPPED": softcap > 0,
        "PRECISION": precision,
        "BLOCK_G": BLOCK_G,
        "BLOCK_N": BLOCK_N if max(k_dim, v_dim) <= 128 else BLOCK_N // 2,
        "num_warps": 4,
        "num_stages": 3 if k.element_size() == 2 else 1,
    }
    path_decode_fwd_kernel[(splits, heads * groups, batch)](
        *(q, k, v, bias_, valid_, parts, part_lse),
        *k.stride()[:3],
        *v.stride()[:3],
        *(bias_.stride() if bias is not None else (0, 0, 0, 0)),
        *(valid_.stride() if valid is not None else (0, 0)),
        *(length, heads, group, chunk, splits, float(softcap)),
        **constants,
    )
    path_decode_join_kernel[(batch * heads * group,)](
        *(parts, part_lse, out, lse, splits),
        V_DIM=v_dim,
        V_PAD=constants["V_PAD"],
        BLOCK_S=16,
        num_warps=4,
    )
    return out, lse


@decode_forward.register_fake
def _(q, k, v, bias, valid, softcap, precision):
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float32)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@triton.jit
def path_decode_fwd_kernel(
    q_ptr,  # [B, H, G, K], dense
    k_ptr,  # [B, H, L, K], any strides but the last
    v_ptr,  # [B, H, L, V], any strides but the last
    bias_ptr,  # [B, H, G, L], any strides
    valid_ptr,  # [B, L], int8
    parts_ptr,  # [B H G, splits, V]
    part_lse_ptr,  # [B H G, splits]
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    bias_stride_b,
    bias_stride_h,
    bias_stride_g,
    bias_stride_l,
    valid_stride_b,
    valid_stride_l,
    length,
    heads,
    group,
    chunk,
    splits,
    softcap,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one chunk of the keys of one key head for up to BLOCK_G query heads."""
    split = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first_g = tl.program_id(1) // heads * BLOCK_G
    b = tl.program_id(2).to(tl.int64)
    k_ptr += b * k_stride_b + head * k_stride_h
    v_ptr += b * v_stride_b + head * v_stride_h
    bias_ptr += b * bias_stride_b + head * bias_stride_h
    valid_ptr += b * valid_stride_b

    g = first_g + tl.arange(0, BLOCK_G)
    j = tl.arange(0, BLOCK_N)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    rows = (b * heads + head) * group + g
    q_ok = (g < group)[:, None] & (d < K_DIM)[None, :]
    q = tl.load(q_ptr + rows[:, None] * K_DIM + d[None, :], mask=q_ok, other=0.0)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, V_PAD], tl.float32)
    for n in range(split * chunk, tl.minimum((split + 1) * chunk, length), BLOCK_N):
        key = (n + j).to(tl.int64)
        ok = key < length
        if MASKED:  # what an unused place holds may be anything, NaN included
            ok = ok & (tl.load(valid_ptr + key * valid_stride_l, mask=ok, other=0) != 0)
        k_ok = ok[:, None] & (d < K_DIM)[None, :]
        v_ok = ok[:, None] & (e < V_DIM)[None, :]
        k = tl.load(k_ptr + key[:, None] * k_stride_l + d[None, :], mask=k_ok, other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_stride_l + e[None, :], mask=v_ok, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAPPED:
            s = cap(s, softcap)
        if BIASED:
            bias_at = bias_ptr + g[:, None] * bias_stride_g + key[None, :] * bias_stride_l
            s += tl.load(bias_at, mask=(g < group)[:, None] & ok[None, :], other=0.0)
        s = tl.where(ok[None, :], s, float("-inf"))
        m, l, acc = absorb(s, v, m, l, acc, PRECISION)

    nothing = l == 0.0
    out = acc / tl.where(nothing, 1.0, l)[:, None]
    lse = tl.where(nothing, float("-inf"), m + tl.log(tl.where(nothing, 1.0, l)))
    at = rows * splits + split
    tl.store(
        parts_ptr + at[:, None] * V_DIM + e[None, :],
        out,
        mask=(g < group)[:, None] & (e < V_DIM)[None, :],
    )
    tl.store(part_lse_ptr + at, lse, mask=g < group)


@triton.jit
def path_decode_join_kernel(
    parts_ptr,  # [B H G, splits, V]
    part_lse_ptr,  # [B H G, splits]
    out_ptr,  # [B H G, V]
    lse_ptr,  # [B H G]
    splits,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: the softmax-weighted mean of one query's chunks."""
    row = tl.program_id(0).to(tl.int64)
    parts_ptr += row * splits * V_DIM
    part_lse_ptr += row * splits
    i = tl.arange(0, BLOCK_S)
    e = tl.arange(0, V_PAD)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([V_PAD], tl.float32)
    for n in range(0, splits, BLOCK_S):
        ok = n + i < splits
        lse = tl.load(part_lse_ptr + n + i, mask=ok, other=float("-inf"))
        part_ok = ok[:, None] & (e < V_DIM)[None, :]
        part = tl.load(parts_ptr + (n + i)[:, None] * V_DIM + e[None, :], mask=part_ok, other=0.0)
        new_m = tl.maximum(m, tl.max(lse, 0))
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = tl.exp2((m - safe) * LOG2E)
        weights = tl.exp2((lse - safe) * LOG2E)
        acc = acc * decay + tl.sum(part * weights[:, None], 0)
        l = l * decay + tl.sum(weights, 0)
        m = new_m
    nothing = l == 0.0
    out = acc / tl.where(nothing, 1.0, l)
    lse = tl.where(nothing, float("-inf"), m + tl.log(tl.where(nothing, 1.0, l)))
    tl.store(out_ptr + row * V_DIM + e, out, mask=e < V_DIM)
    tl.store(lse_ptr + row + tl.arange(0, 1), lse)
