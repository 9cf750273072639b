"""PaTH attention in blocks, in plain torch on any device: differentiable, no T x T matrix.

`prepare` absorbs the reflections inside blocks of `block` tokens by one triangular solve each: it
moves every query to the start and every key to the end of its block (arXiv 2505.16381, section
3.3). `path_attn.tree` then moves them up a binary tree over the blocks, to the boundary where a
query and a key meet, so that a logit between two blocks is a plain dot product. What is left is
ordinary softmax attention, level after level, for which torch has a fast kernel on the CPU.

A forget gate climbs the same tree and becomes two extra dimensions of queries and keys, whose
product is the sum of the log gates between them; it is summed within runs of blocks only, never
over the whole sequence.

Per head, for n = T / b blocks: memory for T b logits and log2(n) / 2 copies of q and of k.

Letters: N rows (batch x key heads), G query heads per key head, n blocks, b block size, K key
dimension, D the same with the gate dimensions, V value dimension.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn.tree import Pairs, pairs_of, slots, tree_forward, tree_gates

GATE_DIMS = 2
WRITTEN_LOGITS = (
    2**22
)  # logits per row of N written out at once, where torch's kernel cannot be used


class Level(NamedTuple):
    """The sequence as n blocks of b tokens, ready for attention between blocks.

    Attributes:
        q: Queries at the start of their block, times the softmax scale, `[N, G, n, b, K]`.
        k: Keys at the end of their block, `[N, n, b, K]`.
        p: Products over the blocks, for row vectors: `q @ p` crosses a block leftwards, `[N, n, K,
            K]`.
    """

    q: Tensor
    k: Tensor
    p: Tensor


class Absorbed(NamedTuple):
    """The reflections of each block in UT form, U = T W and Y = T stril(W K^T), and their effect.

    Attributes:
        w: Directions of the block's steps, `[N, n, b R, K]`.
        u: `[N, n, b R, K]`.
        y: `[N, n, b R, b]`.
        k: Keys moved to the end of their block, `[N, n, b, K]`.
        p: Products of whole blocks, for row vectors, `[N, n, K, K]`.
    """

    w: Tensor
    u: Tensor
    y: Tensor
    k: Tensor
    p: Tensor


def absorb(k: Tensor, w: Tensor, beta: Tensor) -> Absorbed:
    """Solve one unit-triangular system per block.

    T = (I + stril(D W W^T))^{-1} D is applied to W and to stril(W K^T), which gives U and Y. Then
    k' = k - Y^T W and P = I - W^T U.

    Args:
        k: Keys, `[N, n, b, K]`.
        w: Directions, `[N, n, b, R, K]`, with R reflections a token.
        beta: Strengths, `[N, n, b, R]`.
    """
    step = torch.arange(w.shape[2], device=w.device).repeat_interleave(w.shape[3])
    token = torch.arange(w.shape[2], device=w.device)
    w, beta = w.flatten(2, 3), beta.flatten(2, 3)[..., None]
    w_beta = beta * w
    after_key = (w_beta @ k.mT) * (step[:, None] > token)  # D stril(W K^T)
    # The solve reads the strict lower triangle only, so the system needs neither mask nor identity.
    solved = torch.linalg.solve_triangular(
        w_beta @ w.mT, torch.cat([w_beta, after_key], -1), upper=False, unitriangular=True
    )
    u, y = solved.split([w.shape[-1], k.shape[2]], -1)
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    return Absorbed(w, u, y, k - y.mT @ w, eye - w.mT @ u)


def prepare(q: Tensor, k: Tensor, w: Tensor, beta: Tensor, block: int) -> tuple[Tensor, Level]:
    """Absorb all reflections inside each block.

    logits = Q K^T - tril(Q W^T) Y and q' = q - tril(Q W^T) U.

    Args:
        q: Scaled queries, `[N, G, T, K]`, T a multiple of `block`.
        k: Keys, `[N, T, K]`.
        w: Directions, `[N, T, R, K]`, with R reflections a token.
        beta: Strengths, `[N, T, R]`.
        block: Tokens per block.

    Returns:
        logits: Inside the blocks, `[N, G, n, b, b]`; entries above the diagonal have no meaning.
        level: The blocks.
    """
    q, k = q.unflatten(2, (-1, block)), k.unflatten(1, (-1, block))
    done = absorb(k, w.unflatten(1, (-1, block)), beta.unflatten(1, (-1, block)))
    token = torch.arange(block, device=q.device)
    step = token.repeat_interleave(w.shape[2])
    before_query = (q @ done.w.mT.unsqueeze(1)) * (
        token[:, None] >= step
    )  # tril(Q W^T), [N, G, n, b, b R]
    logits = q @ k.mT.unsqueeze(1) - before_query @ done.y.unsqueeze(1)
    return logits, Level(q - before_query @ done.u.unsqueeze(1), done.k, done.p)


def prepare_without_reflections(q: Tensor, k: Tensor, block: int) -> tuple[Tensor, Level]:
    """`prepare` for plain attention (H = I): the blocks are only cut."""
    q, k = q.unflatten(2, (-1, block)), k.unflatten(1, (-1, block))
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return q @ k.mT.unsqueeze(1), Level(q, k, eye.expand(*k.shape[:2], -1, -1))


def move_to_end(k: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Move the keys of consecutive blocks from the end of their block to the end of the last one.

    Args:
        k: `[..., m, b, D]`.
        p: `[..., m, D, D]`.

    Returns:
        k: `[..., m b, D]`. p: the product over all blocks, `[..., D, D]`.
    """
    keys, suffix = [k[..., -1, :, :]], p[..., -1, :, :]  # suffix = P_{m-1} ... P_{r+1}
    for r in range(p.shape[-3] - 2, -1, -1):
        keys.append(k[..., r, :, :] @ suffix.mT)
        suffix = suffix @ p[..., r, :, :]
    return torch.cat(keys[::-1], -2), suffix


def move_to_start(q: Tensor, p: Tensor) -> Tensor:
    """Move the queries of consecutive blocks from the start of their block to that of the first.

    Args:
        q: `[N, G, n, b, K]`.
        p: `[N, n, K, K]`.

    Returns:
        `[N, G, n b, K]`.
    """
    crossed = [torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).expand_as(p[:, 0])]
    for r in range(p.shape[1] - 1):
        crossed.append(p[:, r] @ crossed[-1])  # P_r ... P_0
    return (q @ torch.stack(crossed, 1).unsqueeze(1)).flatten(2, 3)


# --------------------------------------------------------------------------------------------------
# Softmax attention of queries to one set of keys, as a part of a larger softmax


class Rules(NamedTuple):
    """How logits become weights.

    Soft cap (0 = none), window (0 = none), trailing gate dimensions.
    """

    softcap: float
    window: int
    gate_dims: int


def _uses_flash(q: Tensor, rules: Rules, mask: Tensor | None) -> bool:
    return q.device.type == "cpu" and mask is None and not rules.softcap


def _logits(
    q: Tensor, k: Tensor, rules: Rules, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits with cap, gates and mask, and the derivative of the cap, both `[..., q, k]`."""
    if not rules.softcap:
        logits, slope = q @ k.mT, None
    else:
        split = q.shape[-1] - rules.gate_dims
        capped = torch.tanh(q[..., :split] @ k[..., :split].mT / rules.softcap)
        logits, slope = rules.softcap * capped, 1 - capped.square()
        if rules.gate_dims:
            logits = logits + q[..., split:] @ k[..., split:].mT
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)), slope


def _widen(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def part_forward(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries `[N, q, D]` to keys `[N, k, D]` and values `[N, k, V]`.

    Args:
        q: Queries, scaled.
        k: Keys.
        v: Values.
        rules: How logits become weights.
        mask: What each query sees, `[q, k]` or `[N, q, k]` bool, or None for all.

    Returns:
        out: `[N, q, V]`, 0 for a query that sees nothing. lse: log-sum-exp, `[N, q]`, there -inf.
    """
    if not k.shape[1]:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -torch.inf)
    if _uses_flash(q, rules, mask):
        width = max(q.shape[-1], v.shape[-1])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_widen(x, width).unsqueeze(1) for x in (q, k, v)), scale=1.0
        )
        return out[:, 0, :, : v.shape[-1]], lse.reshape(q.shape[:2])
    outs, lses = [], []
    for rows in _runs(q.shape[1], k.shape[1]):
        logits, _ = _logits(q[:, rows], k, rules, None if mask is None else mask[..., rows, :])
        lse = logits.logsumexp(-1)
        floor = torch.finfo(q.dtype).min
        outs.append(torch.exp(logits - lse.clamp_min(floor).unsqueeze(-1)) @ v)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def part_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part for q, k and v, shaped as for `part_forward`.

    `grad`, `out` `[N, q, V]` and `lse` `[N, q]` are those of the *whole* softmax.
    """
    if _uses_flash(q, rules, mask):
        width = max(q.shape[-1], v.shape[-1])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_widen(x, width).unsqueeze(1) for x in (grad, q, k, v, out)),
            lse.unsqueeze(1),
            0.0,
            False,
            scale=1.0,
        )
        return dq[:, 0, :, : q.shape[-1]], dk[:, 0, :, : k.shape[-1]], dv[:, 0, :, : v.shape[-1]]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    split = q.shape[-1] - rules.gate_dims
    for rows in _runs(q.shape[1], k.shape[1]):
        q_, grad_ = q[:, rows], grad[:, rows]
        logits, slope = _logits(q_, k, rules, None if mask is None else mask[..., rows, :])
        weights = torch.exp(logits - lse[:, rows, None])
        delta = (grad_ * out[:, rows]).sum(-1, keepdim=True)
        d_logits = weights * (grad_ @ v.mT - delta)
        d_capped = d_logits if slope is None else d_logits * slope
        dq[:, rows], dk_ = d_capped @ k, d_capped.mT @ q_
        if slope is not None and rules.gate_dims:  # the cap leaves the gates alone
            dq[:, rows, split:] = d_logits @ k[..., split:]
            dk_[..., split:] = d_logits.mT @ q_[..., split:]
        dk += dk_
        dv += weights.mT @ grad_
    return dq, dk, dv


def _runs(queries: int, keys: int) -> list[slice]:
    """Runs of queries whose logits are few enough to be written out together."""
    size = max(1, WRITTEN_LOGITS // keys)
    return [slice(first, min(first + size, queries)) for first in range(0, queries, size)]


def merge_parts(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join the parts of one softmax: outputs `[..., V]` with log-sum-exps `[...]`.

    A part may be empty (-inf).
    """
    total = lses[0]
    for lse in lses[1:]:
        total = torch.logaddexp(total, lse)
    out = torch.zeros_like(outs[0])
    for part, lse in zip(outs, lses, strict=True):
        out.addcmul_(part, torch.exp(lse - total).unsqueeze(-1))
    return out, total


# --------------------------------------------------------------------------------------------------
# Attention over the tree, as one operator that torch.compile takes whole


class _Reach(NamedTuple):
    """What of a pair of neighbouring runs sees each other, and through which mask."""

    queries: int  # the first so many of the right run
    first: int  # keys of the left run from here on
    mask: Tensor | None  # `[G queries, keys]`


def _reach(pairs: Pairs, block: int, heads: int, window: int, device: torch.device) -> _Reach:
    left, right = pairs.left * block, pairs.right * block
    if not window:
        return _Reach(right, 0, None)
    queries, first = min(right, window - 1), max(0, left - window + 1)
    if left - first + queries - 1 < window:
        return _Reach(queries, first, None)
    row = torch.arange(left, left + queries, device=device).repeat(heads)
    column = torch.arange(first, left, device=device)
    return _Reach(queries, first, row[:, None] - column < window)


def _right(x: Tensor, pairs: Pairs, block: int, queries: int) -> Tensor:
    """The first queries of every right run: `[N, G, T, ...]` to a view `[N, G, count, q, ...]`."""
    span, start = (pairs.left + pairs.right) * block, pairs.left * block
    run = x.narrow(2, pairs.first * block, pairs.number * span).unflatten(2, (pairs.number, span))
    return run[:, :, :, start : start + queries]


def _left(x: Tensor, pairs: Pairs, block: int, first: int) -> Tensor:
    """The last keys of every left run: `[N, T, V]` to a view `[N, count, k, V]`."""
    span = (pairs.left + pairs.right) * block
    run = x.narrow(1, pairs.first * block, pairs.number * span).unflatten(1, (pairs.number, span))
    return run[:, :, first : pairs.left * block]


def _join(x: Tensor) -> Tensor:
    """`[N, G, count, q, ...]` to `[N count, G q, ...]`: heads that share keys, side by side."""
    return x.movedim(1, 2).flatten(2, 3).flatten(0, 1)


def _part(x: Tensor, rows: int, heads: int) -> Tensor:
    """Inverse of `_join`."""
    return x.unflatten(0, (rows, -1)).unflatten(2, (heads, -1)).movedim(2, 1)


def _diagonal_mask(block: int, rules: Rules, device: torch.device) -> Tensor:
    mask = torch.ones(block, block, dtype=torch.bool, device=device).tril()
    return mask.triu(1 - rules.window) if rules.window else mask


@torch.library.custom_op("path_attn::levels_forward", mutates_args=())
def levels_forward(
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    v: Tensor,
    softcap: float,
    window: int,
    gate_dims: int,
) -> tuple[Tensor, Tensor]:
    """Softmax attention inside the blocks and over all levels of the tree.

    Args:
        logits: Final logits inside the blocks, `[N, G, n, b, b]`.
        queries: Slots of the tree, `[N, G, rows, D]`; see `path_attn.tree`.
        keys: Slots of the tree, `[N, rows, D]`.
        v: Values, `[N, T, V]`.
        softcap: Cap of the logits, gates excluded; 0 for none.
        window: Visible keys per query; 0 for all.
        gate_dims: How many trailing dimensions of D hold gates (0 or 2).

    Returns:
        out: `[N, G, T, V]`. lse: log-sum-exp of the logits, `[N, G, T]`.
    """
    rules = Rules(softcap, window, gate_dims)
    rows, heads, blocks, block = logits.shape[:4]
    logits = logits.masked_fill(~_diagonal_mask(block, rules, v.device), -torch.inf)
    lse = logits.logsumexp(-1)
    out = torch.exp(logits - lse.unsqueeze(-1)) @ v.unflatten(1, (-1, block)).unsqueeze(1)
    out, lse = out.flatten(2, 3), lse.flatten(2, 3)
    for pairs in chain(*pairs_of(blocks)):
        reach = _reach(pairs, block, heads, window, v.device)
        if not reach.queries:
            continue
        part_out, part_lse = part_forward(
            _join(slots(queries, pairs, block, pairs.right)[..., : reach.queries, :]),
            slots(keys, pairs, block, pairs.left)[..., reach.first :, :].flatten(0, 1),
            _left(v, pairs, block, reach.first).flatten(0, 1),
            rules,
            reach.mask,
        )
        part_out, part_lse = _part(part_out, rows, heads), _part(part_lse, rows, heads)
        so_far, sum_so_far = (_right(x, pairs, block, reach.queries) for x in (out, lse))
        total = torch.logaddexp(sum_so_far, part_lse)
        so_far.mul_(torch.exp(sum_so_far - total).unsqueeze(-1))
        so_far.addcmul_(part_out, torch.exp(part_lse - total).unsqueeze(-1))
        sum_so_far.copy_(total)
    return out, lse


@levels_forward.register_fake
def _(logits, queries, keys, v, softcap, window, gate_dims):
    rows, heads = logits.shape[:2]
    return v.new_empty(rows, heads, v.shape[1], v.shape[2]), v.new_empty(rows, heads, v.shape[1])


@torch.library.custom_op("path_attn::levels_backward", mutates_args=())
def levels_backward(
    grad: Tensor,
    logits: Tensor,
    queries: Tensor,
    keys: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softcap: float,
    window: int,
    gate_dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `levels_forward` for logits, queries, keys and v; the softmax is recomputed."""
    rules = Rules(softcap, window, gate_dims)
    rows, heads, blocks, block = logits.shape[:4]
    v_blocks, grad_blocks = v.unflatten(1, (-1, block)).unsqueeze(1), grad.unflatten(2, (-1, block))
    delta = (grad * out).sum(-1).unflatten(2, (-1, block))
    hidden = ~_diagonal_mask(block, rules, v.device)
    lse_blocks = lse.unflatten(2, (-1, block)).unsqueeze(-1)
    weights = torch.exp(logits.masked_fill(hidden, -torch.inf) - lse_blocks)
    d_logits = weights * (grad_blocks @ v_blocks.mT - delta.unsqueeze(-1))
    dv = (weights.mT @ grad_blocks).sum(1).flatten(1, 2)
    d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    for pairs in chain(*pairs_of(blocks)):
        reach = _reach(pairs, block, heads, window, v.device)
        if not reach.queries:
            continue
        dq, dk, dv_ = part_backward(
            _join(_right(grad, pairs, block, reach.queries)),
            _join(slots(queries, pairs, block, pairs.right)[..., : reach.queries, :]),
            slots(keys, pairs, block, pairs.left)[..., reach.first :, :].flatten(0, 1),
            _left(v, pairs, block, reach.first).flatten(0, 1),
            _join(_right(out, pairs, block, reach.queries)),
            _join(_right(lse, pairs, block, reach.queries)),
            rules,
            reach.mask,
        )
        slots(d_queries, pairs, block, pairs.right)[..., : reach.queries, :] = _part(
            dq, rows, heads
        )
        slots(d_keys, pairs, block, pairs.left)[..., reach.first :, :] = dk.unflatten(0, (rows, -1))
        _left(dv, pairs, block, reach.first).add_(dv_.unflatten(0, (rows, -1)))
    return d_logits, d_queries, d_keys, dv


@levels_backward.register_fake
def _(grad, logits, queries, keys, v, out, lse, softcap, window, gate_dims):
    def like(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(logits), like(queries), like(keys), like(v)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.rules = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    with torch.autocast(grad.device.type, enabled=False):
        grads = levels_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rules)
    return *grads, None, None, None


levels_forward.register_autograd(_backward, setup_context=_save)


# --------------------------------------------------------------------------------------------------
# The whole operation


class Prepared(NamedTuple):
    """A sequence cut into blocks.

    Attributes:
        logits: Inside the blocks, soft cap applied, gates not added, `[N, G, n, b, b]`; entries
            above the diagonal have no meaning.
        v: Values padded to whole blocks, `[N, T', V]`.
        level: The blocks.
    """

    logits: Tensor
    v: Tensor
    level: Level


def cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    beta: Tensor | None,
    *,
    softcap: float = 0.0,
    block: int = 64,
) -> Prepared:
    """Pad to whole blocks and absorb the reflections inside them.

    Args:
        q: Scaled queries, `[N, G, T, K]`.
        k: Keys, `[N, T, K]`.
        v: Values, `[N, T, V]`.
        w: Directions, `[N, T, R, K]`, or None for plain attention.
        beta: Strengths, `[N, T, R]`, or None with `w`.
        softcap: Cap of the logits inside blocks; 0 for none.
        block: Tokens per block.
    """
    block = min(block, q.shape[2])
    extra = -q.shape[2] % block
    if extra:
        q, k, v = (F.pad(x, (0, 0, 0, extra)) for x in (q, k, v))
        w = None if w is None else F.pad(w, (0, 0, 0, 0, 0, extra))
        beta = None if beta is None else F.pad(beta, (0, 0, 0, extra))
    if w is None or beta is None:
        logits, level = prepare_without_reflections(q, k, block)
    else:
        logits, level = prepare(q, k, w, beta, block)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return Prepared(logits, v, level)


def attend(
    prepared: Prepared, gates: Tensor | None = None, *, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention over a prepared sequence.

    Args:
        prepared: G must be 1 with gates.
        gates: Log gates, `[N, 1, T]`, or None.
        softcap: As given to `cut`.
        window: Visible keys per query; 0 for all.

    Returns:
        out: `[N, G, T', V]`. lse: log-sum-exp of the logits, `[N, G, T']`, without gradient.
    """
    logits, level = prepared.logits, prepared.level
    queries, keys = tree_forward(level.q, level.k, level.p, level.q.dtype)
    if gates is not None:
        block = level.k.shape[2]
        gates = F.pad(gates, (0, prepared.v.shape[1] - gates.shape[-1]))
        before, after, inside = tree_gates(gates, block)
        logits = logits + (inside[..., :, None] - inside[..., None, :])
        one = torch.ones_like(before)
        queries = torch.cat([queries, torch.stack([before, one], -1)], -1)
        keys = torch.cat([keys, torch.stack([one, after], -1)[:, 0]], -1)
    gate_dims = 0 if gates is None else GATE_DIMS
    return levels_forward(logits, queries, keys, prepared.v, softcap, window, gate_dims)
