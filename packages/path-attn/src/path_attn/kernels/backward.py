"""Backward kernels: one walks over keys for each query tile, one over queries for each key tile.

Every gradient is written exactly once, by one program, in a fixed order: no atomics, bit-equal from
run to run. The weights are recomputed from the log-sum-exp of the forward pass. Not yet measured on
a GPU.
"""

# The kernels are Triton's language, in which names defined under a compile-time condition exist
# exactly where they are used; a checker of Python cannot know that.
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from path_attn.kernels.tiles import BACKWARD, LOG2E, cap, rows_at, tuned


@triton.jit
def _own_queries(
    q_ptr, k_ptr, v_ptr, logits_ptr, gate_q_ptr, gate_k_ptr, dq_ptr, d_logits_ptr, d_gate_q_ptr,
    d_out, lse, delta, head, tile, blocks, softcap, window,
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
    """Write what queries get from their tile's own blocks: d_logits and, of two, dq at level 0."""
    r = tl.arange(0, BLOCK_PAD * MERGE)
    c = tl.arange(0, BLOCK_PAD)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    for part in tl.static_range(MERGE):
        inside = r - part * BLOCK
        own = (inside >= 0)[:, None] & (inside < BLOCK)[:, None] & (c < BLOCK)[None, :]
        seen = own & (c[None, :] <= inside[:, None])
        if WINDOWED:
            seen &= inside[:, None] - c[None, :] < window
        block = (head * blocks + tile * MERGE + part) * (BLOCK * BLOCK)
        at = inside[:, None] * BLOCK + c[None, :]
        s = tl.load(logits_ptr + block + at, mask=seen, other=float("-inf"))
        v_at = rows_at(v_ptr, (tile * MERGE + part) * BLOCK, c, V_DIM, e)
        v = tl.load(v_at, mask=(c < BLOCK)[:, None] & (e < V_DIM)[None, :], other=0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2((s - lse[:, None]) * LOG2E) * (d_weights - delta[:, None])
        tl.store(d_logits_ptr + block + at, ds, mask=own)
        if part + 1 < MERGE:
            second = r >= BLOCK
            q_at = rows_at(q_ptr, tile * BLOCK, r - BLOCK, K_DIM, d)
            q = tl.load(q_at, mask=second[:, None] & (d < K_DIM)[None, :], other=0.0)
            k_at = rows_at(k_ptr, tile * BLOCK, c, K_DIM, d)
            k = tl.load(k_at, mask=(d < K_DIM)[None, :], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if CAPPED:
                x = cap(x, softcap)
                slope = 1.0 - (x / softcap) * (x / softcap)
            if GATED:
                x += tl.load(gate_q_ptr + tile * BLOCK + r - BLOCK, mask=second, other=0.0)[:, None]
                x += tl.load(gate_k_ptr + tile * BLOCK + c)[None, :]
            if WINDOWED:
                x = tl.where(r[:, None] - c[None, :] < window, x, float("-inf"))
            x = tl.where(second[:, None], x, float("-inf"))
            ds = tl.exp2((x - lse[:, None]) * LOG2E) * (d_weights - delta[:, None])
            if GATED:
                tl.store(d_gate_q_ptr + tile * BLOCK + r - BLOCK, tl.sum(ds, 1), mask=second)
            if CAPPED:
                ds *= slope
            dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
            dq_at = rows_at(dq_ptr, tile * BLOCK, r - BLOCK, K_DIM, d)
            tl.store(
                dq_at, dq.to(dq_ptr.dtype.element_ty), mask=second[:, None] & (d < K_DIM)[None, :]
            )


@tuned(BACKWARD)
@triton.jit
def tree_attention_bwd_kernel_dq(
    q_ptr,  # [N, G, rows, K]
    k_ptr,  # [N, rows, K]
    v_ptr,  # [N, T, V]
    logits_ptr,  # [N, G, n, b, b]
    gate_q_ptr,  # [N, G, rows]
    gate_k_ptr,  # [N, G, rows]
    d_out_ptr,  # [N, G, T, V]
    lse_ptr,  # [N, G, T]
    delta_ptr,  # [N, G, T], rowsum(d_out * out)
    dq_ptr,  # [N, G, rows, K]
    d_logits_ptr,  # [N, G, n, b, b]
    d_gate_q_ptr,  # [N, G, rows]
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
    """One program: MERGE query blocks of one head, their gradients at every level and d_logits."""
    TILE: tl.constexpr = BLOCK * MERGE
    ALIGNED: tl.constexpr = TILE % BLOCK_N == 0
    length = blocks * BLOCK
    tiles = blocks // MERGE
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    head = (pid // tiles).to(tl.int64)
    start = tile * TILE
    q_ptr += head * rows * K_DIM
    dq_ptr += head * rows * K_DIM
    k_ptr += (head // groups) * rows * K_DIM
    v_ptr += (head // groups) * length * V_DIM
    gate_q_ptr += head * rows
    d_gate_q_ptr += head * rows
    gate_k_ptr += head * rows

    r = tl.arange(0, BLOCK_PAD * MERGE)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    d_out_at = rows_at(d_out_ptr + head * length * V_DIM, start, r, V_DIM, e)
    d_out = tl.load(d_out_at, mask=(r < TILE)[:, None] & (e < V_DIM)[None, :], other=0.0)
    lse = tl.load(lse_ptr + head * length + start + r, mask=r < TILE, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: all its logits are -inf
    delta = tl.load(delta_ptr + head * length + start + r, mask=r < TILE, other=0.0)

    _own_queries(
        q_ptr, k_ptr, v_ptr, logits_ptr, gate_q_ptr, gate_k_ptr, dq_ptr, d_logits_ptr, d_gate_q_ptr,
        d_out, lse, delta, head, tile, blocks, softcap, window,
        BLOCK, BLOCK_PAD, K_DIM, V_DIM, K_PAD, V_PAD, GATED, CAPPED, WINDOWED, PRECISION, MERGE,
    )  # fmt: skip

    j = tl.arange(0, BLOCK_N)
    slot = blocks // 2 * BLOCK * (MERGE - 1)
    for level in range(MERGE - 1, levels):
        size = BLOCK << level
        pair = (tile * MERGE) >> (level + 1)
        if ((tile * MERGE) >> level) & 1:
            at = slot + pair * size
            past = start - (2 * pair + 1) * size
            q_ok = (r < TILE)[:, None] & (d < K_DIM)[None, :]
            q = tl.load(rows_at(q_ptr, at + past, r, K_DIM, d), mask=q_ok, other=0.0)
            dq = tl.zeros([BLOCK_PAD * MERGE, K_PAD], tl.float32)
            if GATED:
                gate_q = tl.load(gate_q_ptr + at + past + r, mask=r < TILE, other=0.0)
                d_gate_q = tl.zeros([BLOCK_PAD * MERGE], tl.float32)
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
                    slope = 1.0 - (s / softcap) * (s / softcap)
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
                d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
                ds = tl.exp2((s - lse[:, None]) * LOG2E) * (d_weights - delta[:, None])
                if GATED:
                    d_gate_q += tl.sum(ds, 1)
                if CAPPED:
                    ds *= slope
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            tl.store(
                rows_at(dq_ptr, at + past, r, K_DIM, d), dq.to(dq_ptr.dtype.element_ty), mask=q_ok
            )
            if GATED:
                tl.store(d_gate_q_ptr + at + past + r, d_gate_q, mask=r < TILE)
        slot += ((blocks + (1 << level) - 1) >> (level + 1)) * size


@triton.jit
def _own_keys(
    q_ptr, k_ptr, logits_ptr, gate_q_ptr, gate_k_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr,
    d_gate_k_ptr, v, row, tile, rows, blocks, groups, softcap, window,
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
    """Return dv of keys from their tile's own blocks and, of two, write dk at level 0."""
    start = tile * BLOCK * MERGE
    length = blocks * BLOCK
    r = tl.arange(0, BLOCK_PAD * MERGE)  # keys of the tile
    c = tl.arange(0, BLOCK_PAD)  # queries of one block
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    dv = tl.zeros([BLOCK_PAD * MERGE, V_PAD], tl.float32)

    if MERGE == 2:  # level 0: the tile's first block is seen by its second
        first_half = r < BLOCK
        k_ok = first_half[:, None] & (d < K_DIM)[None, :]
        k = tl.load(rows_at(k_ptr, tile * BLOCK, r, K_DIM, d), mask=k_ok, other=0.0)
        dk = tl.zeros([BLOCK_PAD * MERGE, K_PAD], tl.float32)
    for group in tl.range(
        0, groups, num_stages=1
    ):  # rarely more than a few: not worth shared memory
        head = row * groups + group
        for part in tl.static_range(MERGE):
            inside = r - part * BLOCK
            token = start + part * BLOCK + c
            d_out_at = rows_at(d_out_ptr + head * length * V_DIM, start + part * BLOCK, c, V_DIM, e)
            d_out = tl.load(d_out_at, mask=(c < BLOCK)[:, None] & (e < V_DIM)[None, :], other=0.0)
            lse = tl.load(lse_ptr + head * length + token, mask=c < BLOCK, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            seen = (inside >= 0)[:, None] & (inside[:, None] <= c[None, :]) & (c < BLOCK)[None, :]
            if WINDOWED:
                seen &= c[None, :] - inside[:, None] < window
            block = logits_ptr + (head * blocks + tile * MERGE + part) * (BLOCK * BLOCK)
            s = tl.load(
                block + c[None, :] * BLOCK + inside[:, None], mask=seen, other=float("-inf")
            )
            weights = tl.exp2((s - lse[None, :]) * LOG2E)
            if part == 1:
                q_at = rows_at(q_ptr + head * rows * K_DIM, tile * BLOCK, c, K_DIM, d)
                q = tl.load(q_at, mask=(d < K_DIM)[None, :], other=0.0)
                x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                if CAPPED:
                    x = cap(x, softcap)
                    slope = 1.0 - (x / softcap) * (x / softcap)
                if GATED:
                    slots = head * rows + tile * BLOCK
                    x += tl.load(gate_q_ptr + slots + c)[None, :]
                    x += tl.load(gate_k_ptr + slots + r, mask=first_half, other=0.0)[:, None]
                if WINDOWED:
                    x = tl.where(BLOCK + c[None, :] - r[:, None] < window, x, float("-inf"))
                x = tl.where(first_half[:, None], x, float("-inf"))
                delta = tl.load(delta_ptr + head * length + token)
                across = tl.exp2((x - lse[None, :]) * LOG2E)
                ds = across * (
                    tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :]
                )
                if GATED:
                    tl.store(d_gate_k_ptr + slots + r, tl.sum(ds, 1), mask=first_half)
                if CAPPED:
                    ds *= slope
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                weights += across
            dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    if MERGE == 2:
        tl.store(
            rows_at(dk_ptr, tile * BLOCK, r, K_DIM, d), dk.to(dk_ptr.dtype.element_ty), mask=k_ok
        )
    return dv


@tuned(BACKWARD)
@triton.jit
def tree_attention_bwd_kernel_dkv(
    q_ptr,  # [N, G, rows, K]
    k_ptr,  # [N, rows, K]
    v_ptr,  # [N, T, V]
    logits_ptr,  # [N, G, n, b, b]
    gate_q_ptr,  # [N, G, rows]
    gate_k_ptr,  # [N, G, rows]
    d_out_ptr,  # [N, G, T, V]
    lse_ptr,  # [N, G, T]
    delta_ptr,  # [N, G, T]
    dk_ptr,  # [N, rows, K]
    dv_ptr,  # [N, T, V]
    d_gate_k_ptr,  # [N, G, rows]
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
    """One program: MERGE blocks of keys and values of one key head; tiles are [keys, queries]."""
    TILE: tl.constexpr = BLOCK * MERGE
    ALIGNED: tl.constexpr = TILE % BLOCK_N == 0
    length = blocks * BLOCK
    tiles = blocks // MERGE
    pid = tl.program_id(0)
    tile = pid % tiles  # the first keys have the most queries
    row = (pid // tiles).to(tl.int64)
    start = tile * TILE
    k_ptr += row * rows * K_DIM
    dk_ptr += row * rows * K_DIM
    v_ptr += row * length * V_DIM
    dv_ptr += row * length * V_DIM

    r = tl.arange(0, BLOCK_PAD * MERGE)
    d = tl.arange(0, K_PAD)
    e = tl.arange(0, V_PAD)
    v_ok = (r < TILE)[:, None] & (e < V_DIM)[None, :]
    v = tl.load(rows_at(v_ptr, start, r, V_DIM, e), mask=v_ok, other=0.0)
    dv = _own_keys(
        q_ptr, k_ptr, logits_ptr, gate_q_ptr, gate_k_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr,
        d_gate_k_ptr, v, row, tile, rows, blocks, groups, softcap, window,
        BLOCK, BLOCK_PAD, K_DIM, V_DIM, K_PAD, V_PAD, GATED, CAPPED, WINDOWED, PRECISION, MERGE,
    )  # fmt: skip

    i = tl.arange(0, BLOCK_N)
    slot = blocks // 2 * BLOCK * (MERGE - 1)
    for level in range(MERGE - 1, levels):
        size = BLOCK << level
        pair = (tile * MERGE) >> (level + 1)
        begin = (2 * pair + 1) * size  # the right run's first token
        if (((tile * MERGE) >> level) & 1) == 0 and begin < length:
            at = slot + pair * size
            past = start - 2 * pair * size  # tokens of the left run before this tile
            k_ok = (r < TILE)[:, None] & (d < K_DIM)[None, :]
            k = tl.load(rows_at(k_ptr, at + past, r, K_DIM, d), mask=k_ok, other=0.0)
            dk = tl.zeros([BLOCK_PAD * MERGE, K_PAD], tl.float32)
            end = tl.minimum(size, length - begin)
            if WINDOWED:
                end = tl.maximum(0, tl.minimum(end, past + TILE - 1 + window - size))
            for group in range(groups):
                head = row * groups + group
                if GATED:
                    gate_k = tl.load(
                        gate_k_ptr + head * rows + at + past + r, mask=r < TILE, other=0.0
                    )
                    d_gate_k = tl.zeros([BLOCK_PAD * MERGE], tl.float32)
                for n in range(0, end, BLOCK_N):
                    query_ok = n + i < tl.minimum(size, length - begin)
                    q_at = rows_at(q_ptr + head * rows * K_DIM, at + n, i, K_DIM, d)
                    d_out_at = rows_at(d_out_ptr + head * length * V_DIM, begin + n, i, V_DIM, e)
                    if ALIGNED:
                        q = tl.load(q_at, mask=(d < K_DIM)[None, :], other=0.0)
                        d_out = tl.load(d_out_at, mask=(e < V_DIM)[None, :], other=0.0)
                    else:
                        q = tl.load(q_at, mask=query_ok[:, None] & (d < K_DIM)[None, :], other=0.0)
                        d_out = tl.load(
                            d_out_at, mask=query_ok[:, None] & (e < V_DIM)[None, :], other=0.0
                        )
                    token = head * length + begin + n + i
                    lse = tl.load(lse_ptr + token, mask=query_ok, other=0.0)
                    lse = tl.where(lse == float("-inf"), 0.0, lse)
                    delta = tl.load(delta_ptr + token, mask=query_ok, other=0.0)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                    if CAPPED:
                        s = cap(s, softcap)
                        slope = 1.0 - (s / softcap) * (s / softcap)
                    if GATED:
                        gate_q = tl.load(
                            gate_q_ptr + head * rows + at + n + i, mask=query_ok, other=0.0
                        )
                        s += gate_q[None, :] + gate_k[:, None]
                    if WINDOWED:
                        s = tl.where(
                            size + (n + i)[None, :] - past - r[:, None] < window, s, float("-inf")
                        )
                    if not ALIGNED:
                        s = tl.where(query_ok[None, :], s, float("-inf"))
                    weights = tl.exp2((s - lse[None, :]) * LOG2E)
                    dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
                    d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                    ds = weights * (d_weights - delta[None, :])
                    if GATED:
                        d_gate_k += tl.sum(ds, 1)
                    if CAPPED:
                        ds *= slope
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                if GATED:
                    tl.store(d_gate_k_ptr + head * rows + at + past + r, d_gate_k, mask=r < TILE)
            tl.store(
                rows_at(dk_ptr, at + past, r, K_DIM, d), dk.to(dk_ptr.dtype.element_ty), mask=k_ok
            )
        slot += ((blocks + (1 << level) - 1) >> (level + 1)) * size
    tl.store(rows_at(dv_ptr, start, r, V_DIM, e), dv.to(dv_ptr.dtype.element_ty), mask=v_ok)
