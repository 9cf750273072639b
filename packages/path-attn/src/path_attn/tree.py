"""Queries and keys moved to the boundary they meet at: the path as a binary tree over blocks.

Let query block i and key block j < i be leaves of a binary tree over the blocks, and l the highest
bit in which i and j differ. Their ancestors at level l, runs of 2^l blocks, are neighbours: i's is
the right one of a pair, j's the left one. So with q moved back to the start of its run and k moved
forward to the end of its run,

    A_ij = q_i^{(l)} . k_j^{(l)}

and no product of Householder matrices is left between them. A query is needed at level l only where
bit l of i is 1, a key only where bit l of j is 0 and a right neighbour exists: half of each, per
level. The next level moves just these halves by one d x d product; P is never inverted (it is
singular where beta = 1).

Storage is one row per needed token, level after level, pair after pair ("slots"): `slot_rows` in
all. A forget gate climbs the same tree: the log gates between j and i are (from the run's start to
i) + (from after j to its run's end), both sums of terms of one sign over one run, so nothing large
is ever subtracted.

Cost per head, L = ceil(log2(n)) levels over n blocks: 2 T d^2 (L - 1) FLOPs to move queries and
keys, 2 T d^3 / b to multiply products, and L / 2 copies of q and of k in the compute dtype.
Rounding happens once a level, thus log2 n times on the longest path.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Pairs(NamedTuple):
    """Neighbouring runs at one level that are laid out alike.

    Attributes:
        first: First block of the first pair.
        number: How many pairs follow each other.
        left: Blocks in a left run, `2 ** level`.
        right: Blocks in a right run: `left`, or fewer in the last pair of a ragged end.
        slot: First slot row, in blocks.
    """

    first: int
    number: int
    left: int
    right: int
    slot: int


def levels_of(blocks: int) -> int:
    """Levels of the tree over `blocks` leaves: `ceil(log2(blocks))`."""
    return (blocks - 1).bit_length()


def slot_blocks(blocks: int) -> int:
    """Blocks of rows that all levels together need."""
    return sum(
        ((blocks + (1 << level) - 1) >> (level + 1)) << level for level in range(levels_of(blocks))
    )


def pairs_of(blocks: int) -> list[list[Pairs]]:
    """The pairs of every level: the complete ones, then perhaps one with a shorter right run."""
    levels, slot = [], 0
    for level in range(levels_of(blocks)):
        size = 1 << level
        full, rest = divmod(blocks, 2 * size)
        pairs = [Pairs(0, full, size, size, slot)] if full else []
        slot += full * size
        if rest > size:
            pairs.append(Pairs(full * 2 * size, 1, size, rest - size, slot))
            slot += size
        levels.append(pairs)
    return levels


def _members(x: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Left and right runs of `x [..., blocks, b, K]` as views `[..., count, tokens, K]`."""
    span = pairs.left + pairs.right
    runs = x.narrow(-3, pairs.first, pairs.number * span).unflatten(-3, (pairs.number, span))
    return runs[..., : pairs.left, :, :].flatten(-3, -2), runs[..., pairs.left :, :, :].flatten(
        -3, -2
    )


def slots(x: Tensor, pairs: Pairs, block: int, used: int) -> Tensor:
    """First `used` blocks of every slot: `x [..., rows, K]` to a view `[..., count, tokens, K]`."""
    rows = x.narrow(-2, pairs.slot * block, pairs.number * pairs.left * block)
    return rows.unflatten(-2, (pairs.number, pairs.left * block))[..., : used * block, :]


def _products(p: Tensor) -> list[Tensor]:
    """Products of the complete runs of every level that is still crossed, level 0 first."""
    products = [p]
    for _ in range(levels_of(p.shape[1]) - 2):
        low = products[-1]
        whole = low.shape[1] // 2 * 2
        products.append(low[:, 1:whole:2] @ low[:, 0:whole:2])
    return products


def _across(
    products: list[Tensor], level: int, pairs: Pairs, right: bool, dtype: torch.dtype
) -> Tensor:
    """Products of the left or right runs of these pairs, `[N, count, K, K]`, in `dtype`."""
    first = pairs.first // pairs.left + right
    return products[level][:, first : first + 2 * pairs.number : 2].to(dtype)


@torch.library.custom_op("path_attn::tree_forward", mutates_args=())
def tree_forward(q: Tensor, k: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Move queries and keys up the tree.

    Args:
        q: Queries at the start of their block, `[N, G, n, b, K]`.
        k: Keys at the end of their block, `[N, n, b, K]`.
        p: Products over the blocks, `[N, n, K, K]`, float32.
        dtype: Compute dtype: of the result and of the moves. Products of products stay float32.

    Returns:
        queries: `[N, G, rows, K]`. keys: `[N, rows, K]`; rows is `slot_blocks(n) * b`.
    """
    blocks, block = k.shape[1:3]
    rows = slot_blocks(blocks) * block
    queries = q.new_empty(*q.shape[:2], rows, q.shape[-1], dtype=dtype)
    keys = k.new_empty(k.shape[0], rows, k.shape[-1], dtype=dtype)
    q, k = (x.to(dtype, memory_format=torch.contiguous_format, copy=True) for x in (q, k))
    products = _products(p)
    for level, all_pairs in enumerate(pairs_of(blocks)):
        moves_on = level + 1 < levels_of(blocks)
        for pairs in all_pairs:
            late, early = _members(q, pairs)[1], _members(k, pairs)[0]
            slots(queries, pairs, block, pairs.right).copy_(late)
            slots(keys, pairs, block, pairs.left).copy_(early)
            if pairs.right < pairs.left:  # no query has these rows
                slots(queries, pairs, block, pairs.left)[..., pairs.right * block :, :].zero_()
            if moves_on:
                late.copy_(late @ _across(products, level, pairs, False, dtype).unsqueeze(1))
                if pairs.right == pairs.left:  # nothing lies to the right of a ragged end
                    early.copy_(early @ _across(products, level, pairs, True, dtype).mT)
    return queries, keys


@tree_forward.register_fake
def _(q, k, p, dtype):
    rows = slot_blocks(k.shape[1]) * k.shape[2]
    return (
        q.new_empty(*q.shape[:2], rows, q.shape[-1], dtype=dtype),
        k.new_empty(k.shape[0], rows, k.shape[-1], dtype=dtype),
    )


@torch.library.custom_op("path_attn::tree_backward", mutates_args=())
def tree_backward(
    d_queries: Tensor, d_keys: Tensor, queries: Tensor, keys: Tensor, p: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tree_forward` for q, k, p; the slots hold all the chain rule needs."""
    dtype, blocks = queries.dtype, p.shape[1]
    dq = p.new_zeros(*queries.shape[:2], blocks, block, queries.shape[-1])
    dk = p.new_zeros(keys.shape[0], blocks, block, keys.shape[-1])
    products = _products(p)
    d_products = [torch.zeros_like(x) for x in products]
    for level, all_pairs in reversed(list(enumerate(pairs_of(blocks)))):
        if level + 1 < len(products):
            low, high = products[level], d_products[level + 1]
            whole = 2 * high.shape[1]
            d_products[level][:, 1:whole:2] += high @ low[:, 0:whole:2].mT
            d_products[level][:, 0:whole:2] += low[:, 1:whole:2].mT @ high
        moves_on = level + 1 < levels_of(blocks)
        for pairs in all_pairs:
            late, early = _members(dq, pairs)[1], _members(dk, pairs)[0]
            first = pairs.first // pairs.left
            if moves_on:
                arriving = late.to(dtype)
                moved = slots(queries, pairs, block, pairs.right)
                d_products[level][:, first : first + 2 * pairs.number : 2] += (
                    moved.mT @ arriving
                ).sum(1)
                late.copy_(arriving @ _across(products, level, pairs, False, dtype).mT.unsqueeze(1))
                if pairs.right == pairs.left:
                    arriving = early.to(dtype)
                    moved = slots(keys, pairs, block, pairs.left)
                    d_products[level][:, first + 1 : first + 1 + 2 * pairs.number : 2] += (
                        arriving.mT @ moved
                    )
                    early.copy_(arriving @ _across(products, level, pairs, True, dtype))
            late += slots(d_queries, pairs, block, pairs.right)
            early += slots(d_keys, pairs, block, pairs.left)
    return dq, dk, d_products[0]


@tree_backward.register_fake
def _(d_queries, d_keys, queries, keys, p, block):
    return (
        p.new_empty(*queries.shape[:2], p.shape[1], block, queries.shape[-1]),
        p.new_empty(keys.shape[0], p.shape[1], block, keys.shape[-1]),
        torch.empty_like(p, memory_format=torch.contiguous_format),
    )


def _save(ctx, inputs, output):
    ctx.block = inputs[1].shape[2]
    ctx.save_for_backward(*output, inputs[2])


def _backward(ctx, d_queries, d_keys):
    return *tree_backward(d_queries, d_keys, *ctx.saved_tensors, ctx.block), None


tree_forward.register_autograd(_backward, setup_context=_save)


def tree_gates(gates: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of log gates that go with the slots of queries and keys, and inside the blocks.

    Args:
        gates: Log gates, `[N, G, T]`, T a multiple of `block`, float32.
        block: Tokens per block.

    Returns:
        queries: From the run's start to the query, `[N, G, rows]`.
        keys: From after the key to its run's end, `[N, G, rows]`.
        inside: From the block's start, `[N, G, n, b]`.
    """
    g = gates.unflatten(-1, (-1, block))
    blocks = g.shape[-2]
    inside = g.cumsum(-1)
    totals = inside[..., -1]
    after = _before(g.flip(-1)).flip(-1)
    queries, keys = [], []
    for level, all_pairs in enumerate(pairs_of(blocks)):
        runs = F.pad(totals, (0, -blocks % (1 << level))).unflatten(-1, (-1, 1 << level))
        to_query = inside + _before(runs).flatten(-2)[..., :blocks, None]
        from_key = after + _before(runs.flip(-1)).flip(-1).flatten(-2)[..., :blocks, None]
        for pairs in all_pairs:
            late, early = (
                _members(to_query.unsqueeze(-1), pairs)[1],
                _members(from_key.unsqueeze(-1), pairs)[0],
            )
            queries.append(
                F.pad(late.squeeze(-1), (0, (pairs.left - pairs.right) * block)).flatten(-2)
            )
            keys.append(early.squeeze(-1).flatten(-2))
    empty = [gates[..., :0]]
    return torch.cat(queries or empty, -1), torch.cat(keys or empty, -1), inside


def _before(x: Tensor) -> Tensor:
    """Running sum of what lies before each entry of the last dimension."""
    return F.pad(x[..., :-1], (1, 0)).cumsum(-1)
