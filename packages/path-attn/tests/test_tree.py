"""The binary tree of boundaries: plain torch, any dtype, against walking block by block."""

import pytest
import torch

from path_attn.tree import levels_of, slot_blocks, tree_forward, tree_gates

SIZES = [1, 2, 3, 5, 8, 13, 16]


def blocks_of(n: int, rows: int = 2, heads: int = 2, block: int = 2, dim: int = 3):
    generator = torch.Generator().manual_seed(n)
    q, k, p = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in [(rows, heads, n, block, dim), (rows, n, block, dim), (rows, n, dim, dim)]
    )
    return q, k, p / 2


def slots_of(n: int, i: int, j: int) -> tuple[int, int]:
    """First slot block of query block i and of key block j < i, by their own definition."""
    level = (i ^ j).bit_length() - 1
    before = sum(((n + (1 << x) - 1) >> (x + 1)) << x for x in range(level))
    size, pair = 1 << level, i >> (level + 1)
    start = before + pair * size
    return start + i - (2 * pair + 1) * size, start + j - 2 * pair * size


@pytest.mark.parametrize("n", SIZES)
def test_any_two_blocks_meet_in_one_dot_product(n):
    q, k, p = blocks_of(n)
    queries, keys = tree_forward(q, k, p, torch.float64)
    block = q.shape[-2]
    assert queries.shape[2] == keys.shape[1] == slot_blocks(n) * block
    for i in range(1, n):
        state = q[:, :, i]
        for j in range(i - 1, -1, -1):
            a, b = (block * x for x in slots_of(n, i, j))
            got = queries[:, :, a : a + block] @ keys[:, None, b : b + block].mT
            torch.testing.assert_close(got, state @ k[:, None, j].mT, rtol=1e-12, atol=1e-12)
            state = state @ p[:, None, j]


@pytest.mark.parametrize("n", SIZES)
def test_the_gradient_is_that_of_finite_differences(n):
    inputs = [x.requires_grad_() for x in blocks_of(n, rows=1, block=1, dim=2)]
    torch.autograd.gradcheck(lambda q, k, p: tree_forward(q, k, p, torch.float64), inputs)


def test_a_projection_on_the_path_is_never_inverted():
    q, k, p = blocks_of(8)
    p[:, 3] = 0
    inputs = [x.requires_grad_() for x in (q, k, p)]
    queries, keys = tree_forward(*inputs, torch.float64)
    (queries.sum() + keys.sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


@pytest.mark.parametrize("n", SIZES)
def test_gates_between_two_tokens_sum_to_their_path(n):
    block = 3
    gates = -torch.rand(2, 2, n * block, dtype=torch.float64)
    to_query, from_key, inside = tree_gates(gates, block)
    torch.testing.assert_close(inside, gates.unflatten(-1, (n, block)).cumsum(-1))
    assert to_query.shape[-1] == from_key.shape[-1] == slot_blocks(n) * block
    for i in range(1, n):
        for j in range(i):
            a, b = (block * x for x in slots_of(n, i, j))
            got = to_query[..., a : a + block, None] + from_key[..., None, b : b + block]
            for x in range(block):
                for y in range(block):
                    want = gates[..., j * block + y + 1 : i * block + x + 1].sum(-1)
                    torch.testing.assert_close(got[..., x, y], want)


def test_strong_gates_lose_no_precision_far_from_the_start():
    """One running sum would be near -80000 here and lose everything below 0.004."""
    n, block = 64, 16
    gates = torch.full((1, 1, n * block), -80.0)
    gates[..., -2 * block :] = -1e-3
    to_query, from_key, _ = tree_gates(gates, block)
    a, b = (block * x for x in slots_of(n, n - 1, n - 2))
    between = to_query[..., a : a + block] + from_key[..., b + block - 1, None]
    torch.testing.assert_close(
        between[0, 0], -1e-3 * torch.arange(1.0, block + 1), rtol=1e-6, atol=0
    )


def test_levels():
    assert [levels_of(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
