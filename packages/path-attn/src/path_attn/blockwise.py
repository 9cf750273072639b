"""PaTH attention in blocks: `O(T (B + K))` memory, differentiable, on any device in plain torch.

The sequence is cut into blocks of `block` tokens, and these into super-blocks of `FAN_OUT` blocks.
`prepare` moves every query to the start and every key to the end of its block (arXiv 2505.16381,
section 3.3) by one triangular solve per block, `compose` does the same for super-blocks. With the d
x d product P of a whole block, a logit between two blocks is then `q_i P_{i-1} ... P_{j+1} k_j^T`,
and attention over all earlier blocks is ordinary softmax attention once their keys have been moved
up to the query's block ("folded"), one d x d product a block.

A forget gate is one more factor of the path: two extra dimensions, in which the product is a shear,
add the log gates between key and query to the logit. Gates are thus summed within blocks only,
never over the whole sequence.

Letters: N rows (batch x key heads), G query heads per key head, n blocks, b block size, D head
dimension (plus the two gate dimensions), V value dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FAN_OUT = 8  # blocks in a super-block: 8 x 64 tokens keep both the inner loop and the folds cheap
GATE_DIMS = 2


class Level(NamedTuple):
    """The sequence as n blocks of b tokens, ready for attention between blocks.

    Attributes:
        q: Queries at the start of their block, times the softmax scale, `[N, G, n, b, D]`.
        k: Keys at the end of their block, `[N, n, b, D]`.
        p: Products over the blocks, for row vectors: `q @ p` crosses a block leftwards, `[N, n, D,
            D]`.
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


def add_gates(level: Level, gates: Tensor) -> Level:
    """Append the gate dimensions to a level whose G is 1.

    A query carries (sum of gates from its block's start, 1), a key (1, sum of gates to its block's
    end), and crossing a block adds the block's sum.

    Args:
        level: Blocks without gates.
        gates: Running sum of the log gates inside each block, `[N, n, b]`.
    """
    one = torch.ones_like(gates)
    total = gates[..., -1:]
    q = torch.cat([level.q, torch.stack([gates, one], -1).unsqueeze(1)], -1)
    k = torch.cat([level.k, torch.stack([one, total - gates], -1)], -1)
    p = F.pad(level.p, (0, GATE_DIMS, 0, GATE_DIMS))
    shear = torch.zeros_like(p)
    shear[..., -1, -2] = total.squeeze(-1)
    shear = shear + torch.diag_embed(p.new_tensor([0.0] * level.p.shape[-1] + [1.0, 1.0]))
    return Level(q, k, p + shear)


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


def compose(level: Level, size: int) -> Level:
    """Join every `size` neighbouring blocks into one; n must be a multiple of `size`."""
    q, p = level.q.unflatten(2, (-1, size)), level.p.unflatten(1, (-1, size))
    queries, prefix = [q[:, :, :, 0]], p[:, :, 0]  # prefix = P_{r-1} ... P_0
    for r in range(1, size):
        queries.append(q[:, :, :, r] @ prefix.unsqueeze(1))
        prefix = p[:, :, r] @ prefix
    k, product = move_to_end(level.k.unflatten(1, (-1, size)), p)
    return Level(torch.cat(queries, 3), k, product)


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
    """Attention of `q [N, q, D]` to `k [N, k, D]`, `v [N, k, V]`.

    Output `[N, q, V]` and log-sum-exp `[N, q]`.
    """
    if not k.shape[1]:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -torch.inf)
    if _uses_flash(q, rules, mask):
        width = max(q.shape[-1], v.shape[-1])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_widen(x, width).unsqueeze(1) for x in (q, k, v)), scale=1.0
        )
        return out[:, 0, :, : v.shape[-1]], lse.reshape(q.shape[:2])
    logits, _ = _logits(q, k, rules, mask)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.clamp_min(torch.finfo(q.dtype).min).unsqueeze(-1))
    return weights @ v, lse


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
    """Gradients of one part given the output and log-sum-exp of the *whole* softmax.

    All `[N, parts, tokens, dim]`.
    """
    if _uses_flash(q, rules, mask):
        width = max(q.shape[-1], v.shape[-1])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_widen(x, width) for x in (grad, q, k, v, out)), lse, 0.0, False, scale=1.0
        )
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]
    logits, slope = _logits(q, k, rules, mask)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    d_logits = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    d_capped = d_logits if slope is None else d_logits * slope
    dq, dk = d_capped @ k, d_capped.mT @ q
    if slope is not None and rules.gate_dims:
        split = q.shape[-1] - rules.gate_dims
        dq[..., split:] = d_logits @ k[..., split:]
        dk[..., split:] = d_logits.mT @ q[..., split:]
    return dq, dk, weights.mT @ grad


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
# Attention over levels, as one operator that torch.compile takes whole


def _grouped(x: Tensor, groups: int, tokens: int) -> Tensor:
    """`[N, G, T, ...]` to `[N groups, m, G tokens, ...]`.

    The blocks of each group, query heads side by side.
    """
    x = x.unflatten(2, (groups, -1, tokens))
    x = x.movedim(1, 3)  # [N, groups, m, G, tokens, ...]
    return x.flatten(3, 4).flatten(0, 1)


def _ungrouped(x: Tensor, groups: int, heads: int) -> Tensor:
    """Inverse of `_grouped`."""
    x = x.unflatten(0, (-1, groups)).unflatten(3, (heads, -1))  # [N, groups, m, G, tokens, ...]
    return x.movedim(3, 1).flatten(2, 4)


def _window_mask(
    rules: Rules, r: int, tokens: int, heads: int, device: torch.device
) -> tuple[int, Tensor | None]:
    """First key, of those in the r earlier blocks, that block r can see.

    With it a mask `[G tokens, keys]`, or None where every query sees all keys from there on.
    """
    if not rules.window:
        return 0, None
    first = max(0, r * tokens - rules.window + 1)
    if (r + 1) * tokens - 1 < rules.window:
        return first, None
    row = torch.arange(r * tokens, (r + 1) * tokens, device=device).repeat(heads)
    column = torch.arange(first, r * tokens, device=device)
    return first, row[:, None] - column < rules.window


def _diagonal_mask(tokens: int, rules: Rules, device: torch.device) -> Tensor:
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return mask.triu(1 - rules.window) if rules.window else mask


@torch.library.custom_op("path_attn::levels_forward", mutates_args=())
def levels_forward(
    logits: Tensor,
    v: Tensor,
    qs: list[Tensor],
    ks: list[Tensor],
    ps: list[Tensor],
    softcap: float,
    window: int,
    gate_dims: int,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of every level.

    Args:
        logits: Final logits inside the finest blocks, `[N, G, n, b, b]`.
        v: Values, `[N, T, V]`.
        qs: Per level, finest first, `[N, G, n_l, b_l, D]`; level l + 1 joins equal runs of level
            l's blocks.
        ks: Per level, `[N, n_l, b_l, D]`.
        ps: Per level, `[N, n_l, D, D]`.
        softcap: Cap of the logits, gates excluded; 0 for none.
        window: Visible keys per query; 0 for all.
        gate_dims: How many trailing dimensions of D hold gates (0 or 2).

    Returns:
        out: `[N, G, T, V]`. lse: log-sum-exp of the logits, `[N, G, T]`.
    """
    rules = Rules(softcap, window, gate_dims)
    heads, block = logits.shape[1], logits.shape[-1]
    logits = logits.masked_fill(~_diagonal_mask(block, rules, logits.device), -torch.inf)
    lse = logits.logsumexp(-1)
    out = torch.exp(logits - lse.unsqueeze(-1)) @ v.unflatten(1, (-1, block)).unsqueeze(1)
    outs, lses = [out.flatten(2, 3)], [lse.flatten(2, 3)]
    for q, k, p, groups in zip(qs, ks, ps, _groups(ps), strict=True):
        tokens = q.shape[3]
        q = _grouped(q.flatten(2, 3), groups, tokens)  # [N groups, m, G tokens, D]
        k, p, values = (
            x.reshape(q.shape[0], -1, *x.shape[-2:]) for x in (k, p, v.unflatten(1, (-1, tokens)))
        )
        out = v.new_zeros(*q.shape[:3], v.shape[-1])
        lse = v.new_full(q.shape[:3], -torch.inf)
        folded, start = (
            k[:, 0],
            0,
        )  # the keys of blocks < r at the end of block r - 1, from token `start` on
        for r in range(1, q.shape[1]):
            first, mask = _window_mask(rules, r, tokens, heads, q.device)
            folded, start = folded[:, first - start :], first
            visible = values.flatten(1, 2)[:, first : r * tokens]
            out[:, r], lse[:, r] = part_forward(q[:, r], folded, visible, rules, mask)
            if r + 1 < q.shape[1]:
                folded = torch.cat([folded @ p[:, r].mT, k[:, r]], 1)
        outs.append(_ungrouped(out, groups, heads))
        lses.append(_ungrouped(lse.unsqueeze(-1), groups, heads).squeeze(-1))
    return merge_parts(outs, lses)


@levels_forward.register_fake
def _(logits, v, qs, ks, ps, softcap, window, gate_dims):
    rows, heads = logits.shape[:2]
    return v.new_empty(rows, heads, v.shape[1], v.shape[2]), v.new_empty(rows, heads, v.shape[1])


@torch.library.custom_op("path_attn::levels_backward", mutates_args=())
def levels_backward(
    grad: Tensor,
    logits: Tensor,
    v: Tensor,
    qs: list[Tensor],
    ks: list[Tensor],
    ps: list[Tensor],
    out: Tensor,
    lse: Tensor,
    softcap: float,
    window: int,
    gate_dims: int,
) -> list[Tensor]:
    """Gradients of `levels_forward` for `[logits, v, *qs, *ks, *ps]`.

    The state of a query block at every earlier block is walked again right to left, so nothing of
    size T x T is kept; the gradient then walks left to right. P is never inverted: it is singular
    where beta = 1.
    """
    rules = Rules(softcap, window, gate_dims)
    heads, block = logits.shape[1], logits.shape[-1]
    v_blocks, grad_blocks = v.unflatten(1, (-1, block)).unsqueeze(1), grad.unflatten(2, (-1, block))
    delta = (grad * out).sum(-1).unflatten(2, (-1, block))
    mask = _diagonal_mask(block, rules, logits.device)
    weights = torch.exp(
        logits.masked_fill(~mask, -torch.inf) - lse.unflatten(2, (-1, block)).unsqueeze(-1)
    )
    d_logits = weights * (grad_blocks @ v_blocks.mT - delta.unsqueeze(-1))
    dv = (weights.mT @ grad_blocks).sum(1).flatten(1, 2)
    d_qs, d_ks, d_ps = [], [], []
    for q, k, p, groups in zip(qs, ks, ps, _groups(ps), strict=True):
        tokens, shapes = q.shape[3], (k.shape, p.shape)
        q, grad_, out_ = (_grouped(x, groups, tokens) for x in (q.flatten(2, 3), grad, out))
        lse_ = _grouped(lse.unsqueeze(-1), groups, tokens).squeeze(-1)
        k, p, values = (
            x.reshape(q.shape[0], -1, *x.shape[-2:]) for x in (k, p, v.unflatten(1, (-1, tokens)))
        )
        dq, dk, dp, d_values = (torch.zeros_like(x) for x in (q, k, p, values))
        for r in range(1, q.shape[1]):
            first, mask = _window_mask(rules, r, tokens, heads, q.device)
            if first == r * tokens:
                continue
            oldest = first // tokens
            states = [q[:, r]]  # the query block at the end of block r - 1, r - 2, ..., oldest
            for j in range(r - 1, oldest, -1):
                states.append(states[-1] @ p[:, j])
            states = torch.stack(states[::-1], 1)  # [N groups, r - oldest, G tokens, D]
            if mask is not None:  # one mask a part, `[parts, G tokens, tokens]`
                mask = (
                    F.pad(mask, (first - oldest * tokens, 0))
                    .unflatten(1, (-1, tokens))
                    .transpose(0, 1)
                )
            seen = slice(oldest, r)
            whole = [
                x[:, r, None].expand(-1, r - oldest, *x.shape[2:]) for x in (grad_, out_, lse_)
            ]
            d_states, dk_r, dv_r = part_backward(
                whole[0], states, k[:, seen], values[:, seen], whole[1], whole[2], rules, mask
            )
            dk[:, seen] += dk_r
            d_values[:, seen] += dv_r
            arriving = d_states[:, 0]
            for j in range(oldest + 1, r):  # crossing block j: states[j - 1] = states[j] @ p[j]
                crossed = states[:, j - oldest]
                dp[:, j].baddbmm_(crossed.mT, arriving)
                arriving = torch.baddbmm(d_states[:, j - oldest], arriving, p[:, j].mT)
            dq[:, r] = arriving
        dv += d_values.reshape(dv.shape)
        d_qs.append(_ungrouped(dq, groups, heads).unflatten(2, (-1, tokens)))
        d_ks.append(dk.reshape(shapes[0]))
        d_ps.append(dp.reshape(shapes[1]))
    return [d_logits, dv, *d_qs, *d_ks, *d_ps]


@levels_backward.register_fake
def _(grad, logits, v, qs, ks, ps, out, lse, softcap, window, gate_dims):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (logits, v, *qs, *ks, *ps)
    ]


def _groups(ps: list[Tensor]) -> list[int]:
    """How many groups of blocks each level has.

    The number of blocks of the level above, 1 at the top.
    """
    return [*(p.shape[1] for p in ps[1:]), 1]


def _save(ctx, inputs, output):
    logits, v, qs, ks, ps, *ctx.rules = inputs
    ctx.levels = len(qs)
    ctx.save_for_backward(logits, v, *qs, *ks, *ps, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    n = ctx.levels
    if grad is None:
        return None, None, [None] * n, [None] * n, [None] * n, None, None, None
    logits, v, *levels, out, lse = ctx.saved_tensors
    qs, ks, ps = levels[:n], levels[n : 2 * n], levels[2 * n :]
    with torch.autocast(grad.device.type, enabled=False):
        grads = levels_backward(grad.contiguous(), logits, v, qs, ks, ps, out, lse, *ctx.rules)
    return (
        grads[0],
        grads[1],
        grads[2 : 2 + n],
        grads[2 + n : 2 + 2 * n],
        grads[2 + 2 * n :],
        None,
        None,
        None,
    )


levels_forward.register_autograd(_backward, setup_context=_save)


# --------------------------------------------------------------------------------------------------
# The whole operation


class Prepared(NamedTuple):
    """A sequence cut into levels, with what a caller needs to go on from its end.

    Attributes:
        logits: Final logits inside the finest blocks, `[N, G, n, b, b]`.
        v: Values padded to whole blocks, `[N, T', V]`.
        levels: Finest first.
    """

    logits: Tensor
    v: Tensor
    levels: list[Level]


def cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    *,
    softcap: float = 0.0,
    block: int = 64,
    super_blocks: bool = True,
) -> Prepared:
    """Pad to whole blocks and prepare every level.

    Args:
        q: Scaled queries, `[N, G, T, K]`; G must be 1 with gates.
        k: Keys, `[N, T, K]`.
        v: Values, `[N, T, V]`.
        w: Directions, `[N, T, R, K]`, or None for plain attention.
        beta: Strengths, `[N, T, R]`, or None with `w`.
        g: Log gates, `[N, T]`, or None.
        softcap: Cap of the logits inside blocks; 0 for none.
        block: Tokens per block.
        super_blocks: Whether to join blocks to a second level where there are many.
    """
    length = q.shape[2]
    block = min(block, length)
    super_blocks = super_blocks and length > block * FAN_OUT
    whole = block * FAN_OUT if super_blocks else block
    extra = -length % whole
    if extra:
        q, k, v = (F.pad(x, (0, 0, 0, extra)) for x in (q, k, v))
        w = None if w is None else F.pad(w, (0, 0, 0, 0, 0, extra))
        beta = None if beta is None else F.pad(beta, (0, 0, 0, extra))
        g = None if g is None else F.pad(g, (0, extra))
    if w is None or beta is None:
        logits, level = prepare_without_reflections(q, k, block)
    else:
        logits, level = prepare(q, k, w, beta, block)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if g is not None:
        gates = g.unflatten(1, (-1, block)).cumsum(-1)
        logits = logits + (gates[..., :, None] - gates[..., None, :]).unsqueeze(1)
        level = add_gates(level, gates)
    levels = [level]
    if super_blocks:
        levels.append(compose(level, FAN_OUT))
    return Prepared(logits, v, levels)


def attend(
    prepared: Prepared, *, softcap: float = 0.0, window: int = 0, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over a prepared sequence.

    Out `[N, G, T', V]` and log-sum-exp `[N, G, T']`, T' padded.
    """
    levels = prepared.levels
    return levels_forward(
        prepared.logits,
        prepared.v,
        [level.q for level in levels],
        [level.k for level in levels],
        [level.p for level in levels],
        softcap,
        window,
        GATE_DIMS if gated else 0,
    )
