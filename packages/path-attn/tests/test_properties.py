"""Invariants that hold for any input, searched by hypothesis."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, normalize

from path_attn import PaTHKVCache, global_path_attention, path_attention

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=25, database=None)
TIGHT = 1e-11


@st.composite
def problems(draw, min_length=1):
    """Inputs (float64), options and a block size, small and of any shape."""
    H = draw(st.integers(1, 3))
    HQ = H * draw(st.integers(1, 3))
    B, T = draw(st.integers(1, 3)), draw(st.integers(min_length, 150))
    K, V = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    steps = draw(st.sampled_from([(), (1,), (2,)]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    w = normalize(rand(B, T, H, *steps, K), dim=-1)
    beta = 2 * torch.sigmoid(3 * rand(B, T, H, *steps))
    g = logsigmoid(rand(B, T, HQ)) if draw(st.booleans()) else None
    options = {
        "window": draw(st.none() | st.integers(1, 160)),
        "softcap": draw(st.none() | st.floats(0.1, 20)),
        "scale": draw(st.none() | st.floats(0.01, 2)),
        "gate_scale": draw(st.sampled_from(["paper", "fla"])),
    }
    inputs = (rand(B, T, HQ, K), rand(B, T, H, K), rand(B, T, H, V), w, beta, g)
    return inputs, options, draw(st.integers(1, 70))


def each(inputs, change):
    return tuple(None if x is None else change(x) for x in inputs)


def run(inputs, options, block_size=64, **more):
    return path_attention(*inputs, block_size=block_size, **options, **more)[0]


def assert_close(seen, expected, tolerance=TIGHT):
    limit = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(seen, expected, atol=limit, rtol=0)


@given(problems())
@EXAMPLES
def test_agrees_with_the_definition(problem):
    inputs, options, block_size = problem
    assert_close(run(inputs, options, block_size), global_path_attention(*inputs, **options))


@given(problems(), st.randoms(use_true_random=False))
@EXAMPLES
def test_rows_do_not_know_each_other(problem, random):
    inputs, options, block_size = problem
    order = list(range(inputs[0].shape[0]))
    random.shuffle(order)
    moved = run(each(inputs, lambda x: x[order]), options, block_size)
    assert_close(moved, run(inputs, options, block_size)[order], 1e-13)


@given(problems())
@EXAMPLES
def test_key_heads_do_not_know_each_other(problem):
    inputs, options, block_size = problem
    H = inputs[1].shape[2]
    out = run(inputs, options, block_size)
    flipped = each(inputs, lambda x: x.unflatten(2, (H, -1)).flip(2).flatten(2, 3))
    assert_close(
        run(flipped, options, block_size),
        out.unflatten(2, (H, -1)).flip(2).flatten(2, 3),
        1e-13,
    )


@given(problems())
@EXAMPLES
def test_zero_directions_are_zero_strengths_are_no_reflections(problem):
    (q, k, v, w, beta, g), options, block_size = problem
    plain = run((q, k, v, None, None, g), options, block_size)
    assert_close(run((q, k, v, w * 0, beta, g), options, block_size), plain)
    assert_close(run((q, k, v, w, beta * 0, g), options, block_size), plain)


@given(problems(), st.floats(-100, 100))
@EXAMPLES
def test_linear_in_the_values(problem, factor):
    (q, k, v, w, beta, g), options, block_size = problem
    out = run((q, k, v, w, beta, g), options, block_size)
    assert_close(run((q, k, v * factor, w, beta, g), options, block_size), out * factor)
    total = run((q, k, v * factor + v.flip(1), w, beta, g), options, block_size)
    assert_close(total, out * factor + run((q, k, v.flip(1), w, beta, g), options, block_size))


@given(problems())
@EXAMPLES
def test_weights_are_a_mean(problem):
    (q, k, v, w, beta, g), options, block_size = problem
    out = run((q, k, v * 0 + 3, w, beta, g), options, block_size)
    assert_close(out, torch.full_like(out, 3))


@given(problems())
@EXAMPLES
def test_an_orthogonal_change_of_basis_leaves_the_output(problem):
    (q, k, v, w, beta, g), options, block_size = problem
    options = {**options, "scale": options["scale"] or q.shape[-1] ** -0.5}
    gen = torch.Generator().manual_seed(1)
    square = torch.randn(q.shape[-1], q.shape[-1], generator=gen, dtype=q.dtype)
    basis = torch.linalg.qr(square)[0]
    turned = run((q @ basis, k @ basis, v, w @ basis, beta, g), options, block_size)
    assert_close(turned, run((q, k, v, w, beta, g), options, block_size))


@given(problems())
@EXAMPLES
def test_the_sign_of_a_direction_does_not_matter(problem):
    (q, k, v, w, beta, g), options, block_size = problem
    gen = torch.Generator().manual_seed(1)
    coins = torch.rand(w.shape[:-1], generator=gen, dtype=w.dtype) < 0.5
    signs = torch.where(coins, -1.0, 1.0).to(w.dtype)[..., None]
    out = run((q, k, v, w, beta, g), options, block_size)
    assert_close(run((q, k, v, w * signs, beta, g), options, block_size), out)


@given(problems(min_length=2), st.lists(st.integers(1, 90), max_size=6))
@EXAMPLES
def test_the_cache_joins_pieces_of_any_length(problem, pieces):
    inputs, options, block_size = problem
    T = inputs[0].shape[1]
    bounds = sorted({0, T, *(min(T, x) for x in torch.tensor([0, *pieces]).cumsum(0).tolist())})
    cache, outs = PaTHKVCache(), []
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            piece = each(inputs, lambda x, a=start, b=stop: x[:, a:b])
            outs.append(run(piece, options, block_size, cache=cache))
    assert_close(torch.cat(outs, 1), global_path_attention(*inputs, **options))


@given(problems(), st.integers(0, 2**31))
@EXAMPLES
def test_masked_tokens_might_as_well_not_be_there(problem, seed):
    inputs, options, block_size = problem
    B, T = inputs[0].shape[:2]
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=gen) < torch.rand(B, 1, generator=gen)
    out = run(inputs, options, block_size, attention_mask=mask)
    assert not out[~mask].any()
    for b in range(B):
        if mask[b].any():
            row = each(inputs, lambda x, b=b: x[b : b + 1, mask[b]])
            assert_close(out[b, mask[b]], global_path_attention(*row, **options)[0])


@given(problems(), st.integers(1, 8), st.integers(0, 2**31))
@EXAMPLES
def test_packed_sequences_equal_sequences_alone(problem, count, seed):
    inputs, options, block_size = problem
    inputs = each(inputs, lambda x: x[:1])
    T = inputs[0].shape[1]
    gen = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, T + 1, (count,), generator=gen)
    bounds = torch.cat([torch.tensor([0, T]), cuts]).unique()
    lengths = bounds.diff().tolist()
    out = run(inputs, options, block_size, cu_seqlens=bounds)
    pieces = [(None,) * len(lengths) if x is None else x.split(lengths, 1) for x in inputs]
    alone = [global_path_attention(*piece, **options) for piece in zip(*pieces, strict=True)]
    assert_close(out, torch.cat(alone, 1))
