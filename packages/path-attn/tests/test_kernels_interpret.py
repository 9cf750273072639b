"""The Triton kernels on the CPU, in Triton's interpreter, against the float64 definition.

The interpreter is right for float32 and float16 and wrong for bfloat16; it models no race, no
shared memory and no tensor core, so `tests/gpu` repeats these checks on a GPU.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from path_attn.blockwise import cut
from path_attn.reference import global_path_attention, naive_path_attention
from tenfold_common.testing import assert_matches_reference

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before import"
    ),
]
NAMES = ("q", "k", "v", "w", "beta", "g")


def make(
    batch=1, length=64, heads=1, group=1, k_dim=16, v_dim=16, reflections=1, gated=False, beta=None
):
    generator = torch.Generator().manual_seed(length + 7 * k_dim + group)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    w = torch.nn.functional.normalize(normal(batch, length, heads, reflections, k_dim), dim=-1)
    strength = 2 * torch.sigmoid(normal(batch, length, heads, reflections) + 1)
    return [
        normal(batch, length, heads * group, k_dim),
        normal(batch, length, heads, k_dim),
        normal(batch, length, heads, v_dim),
        w,
        strength if beta is None else torch.full_like(strength, beta),
        torch.nn.functional.logsigmoid(normal(batch, length, heads * group) + 2) if gated else None,
    ]


def fast(q, k, v, w, beta, g, *, softcap=0.0, window=0, block=64, dtype=torch.float32):
    """`cut` in float32, then the kernels; arguments and result as those of the references."""
    from path_attn.kernels.attention import attend_triton

    batch, length, heads = k.shape[:3]
    group = q.shape[2] // heads

    def rows(x):
        return x.float().transpose(1, 2).flatten(0, 1)

    queries = rows(q * q.shape[-1] ** -0.5).unflatten(0, (batch * heads, group))
    prepared = cut(queries, rows(k), rows(v), rows(w), rows(beta), softcap=softcap, block=block)
    gates = None if g is None else rows(g).unflatten(0, (batch * heads, group))
    out, _ = attend_triton(prepared, gates, softcap=softcap, window=window, compute_dtype=dtype)
    return out[:, :, :length].unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


def results(function, inputs, **options):
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out.backward(grad.to(out.dtype))
    return {
        "o": out,
        **{"d" + n: x.grad for n, x in zip(NAMES, leaves, strict=True) if x is not None},
    }


def check(inputs, low_function, dtype, *, softcap=0.0, window=0, block=64):
    rules = {"softcap": softcap or None, "window": window or None}
    low_inputs = [x if x is None else x.to(dtype) for x in inputs]
    truth = results(
        global_path_attention, [x if x is None else x.double() for x in low_inputs], **rules
    )
    low = results(low_function, low_inputs, **rules)
    ours = results(fast, low_inputs, softcap=softcap, window=window, block=block, dtype=dtype)
    assert truth.keys() == ours.keys()
    for name, ref in truth.items():
        assert_matches_reference(ours[name], ref, low[name], name=name)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param({"length": 17, "gated": True}, {}, id="T17-gates"),
        pytest.param(
            {"length": 64, "group": 2, "v_dim": 24, "gated": True}, {}, id="T64-G2-V24-gates"
        ),
        pytest.param(
            {"batch": 2, "length": 100, "group": 2, "k_dim": 24},
            {"softcap": 5.0},
            id="B2-T100-K24-cap",
        ),
        pytest.param({"length": 300, "reflections": 2, "gated": True}, {}, id="T300-R2-gates"),
        pytest.param(
            {"length": 300, "gated": True},
            {"softcap": 3.0, "window": 70},
            id="T300-gates-cap-window",
        ),
        pytest.param({"length": 200, "k_dim": 80, "v_dim": 32}, {}, id="T200-K80"),
        pytest.param({"length": 600, "group": 2, "gated": True}, {}, id="T600-G2-gates"),
        pytest.param(
            {"length": 600, "k_dim": 24, "v_dim": 80},
            {"softcap": 4.0, "window": 150},
            id="T600-window",
        ),
        pytest.param({"length": 1100, "gated": True}, {}, id="T1100-gates"),
        pytest.param(
            {"length": 90, "heads": 2, "gated": True},
            {"block": 16, "softcap": 4.0},
            id="T90-block16",
        ),
        pytest.param(
            {"length": 100, "gated": True}, {"block": 24, "window": 9}, id="T100-block24-window9"
        ),
        pytest.param({"length": 260, "beta": 1.0}, {}, id="T260-projections"),
        pytest.param({"length": 260, "beta": 0.0}, {}, id="T260-no-reflection"),
    ],
)
def test_float32_output_and_all_gradients(shape, options):
    check(make(**shape), global_path_attention, torch.float32, **options)


@pytest.mark.parametrize(("length", "window"), [(1, 0), (130, 1)])
def test_a_query_that_sees_only_itself(length, window):
    """The reference is exact here, so the two-times rule would leave no room at all."""
    inputs = [x.float() for x in make(length=length, gated=True)]
    got = results(fast, inputs, window=window)
    torch.testing.assert_close(got["o"], inputs[2])
    grad = torch.randn(
        got["o"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    torch.testing.assert_close(got["dv"], grad.float())
    for name in ("dq", "dk", "dw", "dbeta", "dg"):
        torch.testing.assert_close(got[name], torch.zeros_like(got[name]), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param({"length": 70, "group": 2, "gated": True}, {"block": 16}, id="T70-odd-blocks"),
        pytest.param(
            {"length": 90, "gated": True},
            {"block": 16, "softcap": 4.0, "window": 40},
            id="T90-even-blocks",
        ),
    ],
)
def test_float16_output_and_all_gradients(shape, options):
    check(make(**shape), naive_path_attention, torch.float16, **options)


def operator_inputs(length=300, group=2, gated=True, block=64):
    """Inputs of `tree_attention_forward` with a ragged tree."""
    from path_attn.tree import tree_forward, tree_gates

    block = min(block, length)
    q, k, v, w, beta, g = (
        x.float().transpose(1, 2) for x in make(length=length, group=group, gated=gated)
    )
    prepared = cut(q / 4, k[:, 0], v[:, 0], w[:, 0], beta[:, 0], block=block)
    level = prepared.level
    queries, keys = tree_forward(level.q, level.k, level.p, torch.float32)
    gates = torch.nn.functional.pad(g, (0, prepared.v.shape[1] - length))
    gate_q, gate_k, _ = tree_gates(gates, block)
    return [queries, keys, prepared.logits, prepared.v, gate_q, gate_k]


@contextmanager
def guard_bands(width=4096, sentinel=-12345.0):
    """Put every buffer made inside between two guard bands, and check these at the end."""
    made = []

    def guarded(shape, dtype, device):
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * width,), sentinel, dtype=dtype, device=device)
        made.append(whole)
        return whole[width : width + size].view(shape).fill_(torch.nan)

    def empty_like(x, **_):
        return guarded(x.shape, x.dtype, x.device)

    def zeros_like(x, **_):
        return guarded(x.shape, x.dtype, x.device).zero_()

    def new_empty(x, *shape, dtype=None, device=None):
        shape = shape[0] if not isinstance(shape[0], int) else shape
        if shape == (0,):  # the interpreter's own bookkeeping
            return torch.zeros(0, dtype=x.dtype)
        return guarded(shape, dtype or x.dtype, device or x.device)

    def empty(*shape, dtype=None, device=None):
        shape = shape[0] if not isinstance(shape[0], int) else shape
        return guarded(shape, dtype, device)

    with (
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(torch, "zeros_like", zeros_like),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty", empty),
    ):
        yield made
    assert made
    for whole in made:
        assert (whole[:width] == sentinel).all()
        assert (whole[-width:] == sentinel).all()


def surrounded(x, width=4096):
    """The same tensor with NaN on both sides: what is read beyond it shows."""
    whole = torch.full((x.numel() + 2 * width,), torch.nan, dtype=x.dtype)
    inner = whole[width : width + x.numel()].view(x.shape)
    return inner.copy_(x)


@pytest.mark.parametrize(
    ("length", "block", "window"), [(17, 64, 0), (300, 64, 70), (160, 24, 0), (570, 64, 200)]
)
def test_kernels_stay_inside_their_buffers(length, block, window):
    from path_attn.kernels.attention import tree_attention_backward, tree_attention_forward

    inputs = operator_inputs(length, block=block)
    rules = (0.0, window, "ieee")
    out, lse = tree_attention_forward(*inputs, *rules)
    grad = torch.randn_like(out)
    grads = tree_attention_backward(grad, *inputs, out, lse, *rules)
    fenced = [surrounded(x) for x in inputs]
    with guard_bands() as made:
        out_, lse_ = tree_attention_forward(*fenced, *rules)
        assert len(made) >= 2
        grads_ = tree_attention_backward(
            surrounded(grad), *fenced, surrounded(out), surrounded(lse), *rules
        )
        assert len(made) >= 8
    for got, want in zip([out_, lse_, *grads_], [out, lse, *grads], strict=True):
        assert torch.equal(got, want)
        assert torch.isfinite(got).all()


def test_the_future_changes_nothing():
    inputs = make(length=330, gated=True)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 200:] *= 0.5
    before, after = fast(*inputs), fast(*changed)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_gradients_are_bit_equal_from_run_to_run():
    inputs = [x.float() for x in make(length=300, group=3, gated=True)]
    first, second = results(fast, inputs), results(fast, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_queries_without_keys_get_zeros():
    from path_attn.kernels.attention import tree_attention_backward, tree_attention_forward

    inputs = operator_inputs(50)
    inputs[2][:, :, :, :10] = -torch.inf
    out, lse = tree_attention_forward(*inputs, 0.0, 0, "ieee")
    assert (out[:, :, :10] == 0).all()
    assert (lse[:, :, :10] == -torch.inf).all()
    assert torch.isfinite(out).all()
    grads = tree_attention_backward(torch.ones_like(out), *inputs, out, lse, 0.0, 0, "ieee")
    assert all(torch.isfinite(x).all() for x in grads)


def test_operators_are_declared_as_they_behave():
    from path_attn.kernels.attention import tree_attention_forward
    from path_attn.tree import tree_forward

    inputs = [x.detach().requires_grad_() for x in operator_inputs(40, block=16)]
    torch.library.opcheck(tree_attention_forward, (*inputs, 3.0, 20, "ieee"))
    without = (*inputs[:4], None, None, 0.0, 0, "ieee")
    torch.library.opcheck(tree_attention_forward, without)
    q = torch.randn(1, 2, 5, 4, 3, requires_grad=True)
    k, p = torch.randn(1, 5, 4, 3, requires_grad=True), torch.randn(1, 5, 3, 3, requires_grad=True)
    torch.library.opcheck(tree_forward, (q, k, p, torch.float32))


def test_torch_compile_takes_the_whole_operation():
    inputs = [x.float() for x in make(length=70, gated=True)]
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    eager, graph = results(fast, inputs), results(compiled, inputs)
    for name, want in eager.items():
        torch.testing.assert_close(graph[name], want)


def test_the_kernels_compile_for_real_gpus():
    """They compile only where they are not interpreted: `test_kernels_compile.py`, in a child."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = Path(__file__).with_name("test_kernels_compile.py")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        str(file),
    ]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, cwd=file.parents[1]
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


def test_too_wide_heads_and_wrong_dtypes_are_refused():
    from path_attn.kernels.attention import attend_triton

    q = torch.zeros(1, 1, 8, 257)
    wide = cut(q, q[0], q[0], None, None)
    with pytest.raises(ValueError, match="257"):
        attend_triton(wide)
    with pytest.raises(ValueError, match="float64"):
        attend_triton(wide, compute_dtype=torch.float64)


# ------------------------------------------------------------------------------------------
# Decoding


def decode_inputs(batch=2, heads=2, group=3, length=150, k_dim=24, v_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    shapes = [
        (batch, heads, group, k_dim),
        (batch, heads, length, k_dim),
        (batch, heads, length, v_dim),
    ]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def plain_decode(q, k, v, bias=None, valid=None, softcap=0.0):
    q, k, v = (x.double() for x in (q, k, v))
    logits = q @ k.mT
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double().reshape(logits.shape)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse.clamp_min(-1e300)[..., None]) @ v, lse


@pytest.mark.parametrize(
    ("shape", "bias", "masked", "softcap"),
    [
        pytest.param({}, False, False, 0.0, id="plain"),
        pytest.param({}, True, True, 5.0, id="bias-mask-cap"),
        pytest.param({"length": 1, "group": 1}, True, False, 0.0, id="L1"),
        pytest.param({"length": 64, "group": 20, "heads": 1}, True, True, 0.0, id="G20"),
        pytest.param({"length": 1500, "batch": 1, "heads": 1}, False, True, 0.0, id="L1500"),
        pytest.param({"k_dim": 80, "v_dim": 136}, False, False, 0.0, id="K80-V136"),
    ],
)
def test_decoding_equals_plain_softmax(shape, bias, masked, softcap):
    from path_attn.kernels.decode import decode_triton

    q, k, v = decode_inputs(**shape)
    bias = -torch.rand(q.shape[0], q.shape[1] * q.shape[2], k.shape[2]) if bias else None
    valid = torch.rand(k.shape[0], k.shape[2]) > 0.3 if masked else None
    out, lse = decode_triton(q, k, v, bias, valid, softcap=softcap)
    want, want_lse = plain_decode(q, k, v, bias, valid, softcap)
    assert out.dtype == lse.dtype == torch.float32
    # A logit is a float32 sum of products: its rounding grows with the sum of their sizes. Weights
    # move by it once above and once below the fraction, outputs by that times the values.
    unit = torch.finfo(torch.float32).eps / 2
    logit = unit * (q.abs() @ k.abs().mT).max().item()
    atol = 2e-6 + 2 * logit * v.abs().max().item()
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=atol)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6 + logit)


def test_decoding_reads_views_and_never_what_is_not_valid():
    from path_attn.kernels.decode import decode_triton

    q, k, v = decode_inputs(length=200)
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[0, :30] = False
    valid[1] = False
    want = decode_triton(q, k, v, None, valid)
    buffers = []
    for x in (k, v):
        buffer = torch.full((2, 2, 256, x.shape[-1] + 8), torch.nan)
        buffer[:, :, 20:220, : x.shape[-1]] = x.where(valid[:, None, :, None], torch.nan)
        buffers.append(buffer[:, :, 20:220, : x.shape[-1]])
    got = decode_triton(q, *buffers, None, valid)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert (got[0][1] == 0).all()
    assert (got[1][1] == -torch.inf).all()


def test_decoding_from_an_empty_cache():
    from path_attn.kernels.decode import decode_triton

    out, lse = decode_triton(*decode_inputs(length=0))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_decoding_in_float16():
    from path_attn.kernels.decode import decode_triton

    q, k, v = decode_inputs(dtype=torch.float16)
    out, _ = decode_triton(q, k, v)
    want, _ = plain_decode(q, k, v)
    low = ((q @ k.mT).softmax(-1) @ v).float()
    assert_matches_reference(out, want, low, name="out")


def test_decoding_stays_inside_its_buffers():
    from path_attn.kernels.decode import decode_forward

    q, k, v = decode_inputs(length=150, v_dim=24)
    want = decode_forward(q, k, v, None, None, 0.0, "ieee")
    with guard_bands() as made:
        got = decode_forward(surrounded(q), surrounded(k), surrounded(v), None, None, 0.0, "ieee")
        assert len(made) == 4
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_decoding_refuses_what_it_cannot_take():
    from path_attn.kernels.decode import decode_triton

    q, k, v = decode_inputs()
    with pytest.raises(ValueError, match="float64"):
        decode_triton(q, k.double(), v.double())
    with pytest.raises(ValueError, match="both must"):
        decode_triton(q, k.half(), v)
    with pytest.raises(ValueError, match="260"):
        decode_triton(*decode_inputs(k_dim=260))
