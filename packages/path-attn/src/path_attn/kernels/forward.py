"""Forward kernel: softmax attention over the tree of `path_attn.tree`.

Not yet measured on a GPU.
"""

# The kernels are Triton's language, in which names defined under a compile-time condition exist
# exactly where they are used; a checker of Python cannot know that.
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from path_attn.kernels.tiles import FORWARD, absorb, cap, rows_at, tuned


@triton.jit
def _own_blocks(
    q_ptr, k_ptr, v_ptr, logits_ptr, gate_q_ptr, gate_k_ptr, head, tile, blocks, softcap, window,
    BLOCK: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    GATED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """The tile's own blocks: diagonals and, of two, the second one's view of the first."""
    r = tl.arange(0, BLOCK_PAD * MERGE)
    c = tl.arange(0, BLOCK_PAD)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    m = tl.full([BLOCK_PAD * MERGE], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_PAD * MERGE], tl.float32)
    acc = tl.zeros([BLOCK_PAD * MERGE, V_PAD], tl.float32)

    for part in tl.static_range(MERGE):  # the tile's own blocks
        inside = r - part * BLOCK
        seen = (inside >= 0)[:, None] & (inside < BLOCK)[:, None] & (c[None, :] <= inside[:, None])
        if WINDOWED:
            seen &= inside[:, None] - c[None, :] < window
        block = logits_ptr + (head * blocks + tile * MERGE + part) * (BLOCK * BLOCK)
        s = tl.load(block + inside[:, None] * BLOCK + c[None, :], mask=seen, other=float("-inf"))
        if part + 1 < MERGE:  # level 0: the tile's second block sees its first
            second = r >= BLOCK
            q_at = rows_at(q_ptr, tile * BLOCK, r - BLOCK, K_DIM, d)
            q = tl.load(q_at, mask=second[:, None] & (d < K_DIM)[None, :], other=0.0)
            k_at = rows_at(k_ptr, tile * BLOCK, c, K_DIM, d)
            k = tl.load(k_at, mask=(d < K_DIM)[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if CAPPED:
                x = cap(x, softcap)
            if GATED:
                x += tl.load(gate_q_ptr + tile * BLOCK + r - BLOCK, mask=second, other=0.0)[:, None]
                x += tl.load(gate_k_ptr + tile * BLOCK + c)[None, :]
            if WINDOWED:
                x = tl.where(r[:, None] - c[None, :] < window, x, float("-inf"))
            s = tl.where(second[:, None], x, s)
        v_at = rows_at(v_ptr, (tile * MERGE + part) * BLOCK, c, V_DIM, e)
        v = tl.load(v_at, mask=(c < BLOCK)[:, None] & (e < V_DIM)[None, :], other=0.0)
        m, l, acc = absorb(s, v, m, l, acc, PRECISION)
    return m, l, acc


@tuned(FORWARD)
@triton.jit
def tree_attention_fwd_kernel(
    q_ptr,  # [N, G, rows, K]
    k_ptr,  # [N, rows, K]
    v_ptr,  # [N, T, V]
    logits_ptr,  # [N, G, n, b, b]
    gate_q_ptr,  # [N, G, rows]
    gate_k_ptr,  # [N, G, rows]
    out_ptr,  # [N, G, T, V]
    lse_ptr,  # [N, G, T]
    rows,
    blocks,
    levels,
    groups,
    softcap,
    window,
    BLOCK: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    GATED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: MERGE query blocks of one head against every key before them."""
    TILE: tl.constexpr = BLOCK * MERGE
    ALIGNED: tl.constexpr = TILE % BLOCK_N == 0
    length = blocks * BLOCK
    tiles = blocks // MERGE
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest rows first
    head = (pid // tiles).to(tl.int64)
    start = tile * TILE
    q_ptr += head * rows * K_DIM
    k_ptr += (head // groups) * rows * K_DIM
    v_ptr += (head // groups) * length * V_DIM
    gate_q_ptr += head * rows
    gate_k_ptr += head * rows

    r = tl.arange(0, BLOCK_PAD * MERGE)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    m, l, acc = _own_blocks(
        q_ptr, k_ptr, v_ptr, logits_ptr, gate_q_ptr, gate_k_ptr, head, tile, blocks, softcap,
        window, BLOCK, BLOCK_PAD, K_DIM, V_DIM, K_PAD, V_PAD, GATED, CAPPED, WINDOWED, PRECISION,
        MERGE,
    )  # fmt: skip

    j = tl.arange(0, BLOCK_N)
    slot = blocks // 2 * BLOCK * (MERGE - 1)  # level 0 has been done if MERGE is 2
    for level in range(MERGE - 1, levels):
        size = BLOCK << level
        pair = (tile * MERGE) >> (level + 1)
        if ((tile * MERGE) >> level) & 1:
            at = slot + pair * size  # its left run starts at token 2 pair size
            past = start - (2 * pair + 1) * size  # tokens of the right run before this tile
            q_at = rows_at(q_ptr, at + past, r, K_DIM, d)
            q = tl.load(q_at, mask=(r < TILE)[:, None] & (d < K_DIM)[None, :], other=0.0)
            if GATED:
                gate_q = tl.load(gate_q_ptr + at + past + r, mask=r < TILE, other=0.0)
            first = 0
            if WINDOWED:
                first = tl.maximum(0, past + size - window + 1) // BLOCK_N * BLOCK_N
            for n in range(first, size, BLOCK_N):
                key_ok = n + j < size
                k_at = rows_at(k_ptr, at + n, j, K_DIM, d)
                v_at = rows_at(v_ptr, 2 * pair * size + n, j, V_DIM, e)
                if ALIGNED:
                    k = tl.load(k_at, mask=(d < K_DIM)[None, :], other=0.0)
                    v = tl.load(v_at, mask=(e < V_DIM)[None, :], other=0.0)
                else:
                    k = tl.load(k_at, mask=key_ok[:, None] & (d < K_DIM)[None, :], other=0.0)
                    v = tl.load(v_at, mask=key_ok[:, None] & (e < V_DIM)[None, :], other=0.0)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if CAPPED:
                    s = cap(s, softcap)
                if GATED:
                    s += (
                        gate_q[:, None]
                        + tl.load(gate_k_ptr + at + n + j, mask=key_ok, other=0.0)[None, :]
                    )
                if WINDOWED:
                    s = tl.where(
                        past + size + r[:, None] - (n + j)[None, :] < window, s, float("-inf")
                    )
                if not ALIGNED:
                    s = tl.where(key_ok[None, :], s, float("-inf"))
                m, l, acc = absorb(s, v, m, l, acc, PRECISION)
        slot += ((blocks + (1 << level) - 1) >> (level + 1)) * size

    nothing = l == 0.0
    out = acc / tl.where(nothing, 1.0, l)[:, None]
    lse = tl.where(nothing, float("-inf"), m + tl.log(tl.where(nothing, 1.0, l)))
    out_at = rows_at(out_ptr + head * length * V_DIM, start, r, V_DIM, e)
    tl.store(
        out_at, out.to(out_ptr.dtype.element_ty), mask=(r < TILE)[:, None] & (e < V_DIM)[None, :]
    )
    tl.store(lse_ptr + head * length + start + r, lse, mask=r < TILE)
