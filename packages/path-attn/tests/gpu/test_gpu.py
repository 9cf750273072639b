"""The Triton back-end on a CUDA GPU: against the float64 definition, and against itself."""

import pytest
import torch

from path_attn.blockwise import cut
from path_attn.ops import path_attention, path_attention_decode
from path_attn.reference import global_path_attention
from tenfold_common.testing import assert_matches_reference, rms_ratio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAMES = ("q", "k", "v", "w", "beta", "g")
# RMS of the error over RMS of the truth; the truth is the float64 definition of the rounded inputs.
LIMITS = {
    torch.bfloat16: {
        "o": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3,
        "dw": 15e-3, "dbeta": 2e-2, "dg": 2e-2,
    },
    torch.float16: dict.fromkeys(["o", "dq", "dk", "dv", "dw", "dbeta", "dg"], 4e-3),
}  # fmt: skip


def make(dtype, batch=2, length=300, heads=2, group=2, k_dim=64, v_dim=64, gated=True):
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, device="cuda", generator=generator)

    w = torch.nn.functional.normalize(normal(batch, length, heads, k_dim), dim=-1)
    inputs = [
        normal(batch, length, heads * group, k_dim).to(dtype),
        normal(batch, length, heads, k_dim).to(dtype),
        normal(batch, length, heads, v_dim).to(dtype),
        w.float(),
        (2 * torch.sigmoid(normal(batch, length, heads) + 1)).float(),
        torch.nn.functional.logsigmoid(normal(batch, length, heads * group) + 3).float()
        if gated
        else None,
    ]
    return inputs


def results(function, inputs, **options):
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    generator = torch.Generator("cuda").manual_seed(5)
    grad = torch.randn(out.shape, dtype=torch.float64, device="cuda", generator=generator)
    out.backward(grad.to(out.dtype))
    return {
        "o": out.detach(),
        **{"d" + n: x.grad for n, x in zip(NAMES, leaves, strict=True) if x is not None},
    }


def truth_of(inputs, **options):
    return results(
        global_path_attention, [x if x is None else x.double() for x in inputs], **options
    )


SHAPES = [
    pytest.param({"length": 1}, id="T1"),
    pytest.param({"length": 64}, id="T64"),
    pytest.param({"length": 300}, id="T300"),
    pytest.param({"length": 1100}, id="T1100"),
    pytest.param({"length": 2048, "batch": 1, "heads": 1}, id="T2048"),
    pytest.param({"k_dim": 128, "v_dim": 128}, id="K128"),
    pytest.param({"k_dim": 80, "v_dim": 96, "length": 520}, id="K80-V96"),
    pytest.param({"k_dim": 24, "v_dim": 16}, id="K24-V16"),
    pytest.param({"k_dim": 256, "v_dim": 256, "length": 200}, id="K256"),
    pytest.param({"gated": False, "group": 1}, id="no-gates"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "rules", [{}, {"softcap": 10.0}, {"window": 100}], ids=["causal", "softcap", "window"]
)
def test_half_precision_output_and_gradients(dtype, shape, rules):
    inputs = make(dtype, **shape)
    truth = truth_of(inputs, **rules)
    ours = results(path_attention, inputs, backend="triton", **rules)
    for name, ref in truth.items():
        if shape.get("length") == 1 and name not in ("o", "dv"):
            assert ours[name].abs().max() < 1e-2, name  # one key: the truth is zero
        else:
            assert rms_ratio(ours[name], ref) < LIMITS[dtype][name], name


@pytest.mark.parametrize("length", [17, 300, 1100])
def test_float32_output_and_gradients(length):
    inputs = make(torch.float32, length=length, k_dim=32, v_dim=32)
    truth, low = truth_of(inputs), results(global_path_attention, inputs)
    ours = results(path_attention, inputs, backend="triton")
    for name, ref in truth.items():
        assert_matches_reference(ours[name], ref, low[name], name=name)


def test_backward_is_bit_equal_from_run_to_run():
    inputs = make(torch.bfloat16, length=2000)
    first = results(path_attention, inputs, backend="triton")
    for _ in range(3):
        again = results(path_attention, inputs, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_future_changes_nothing():
    inputs = make(torch.bfloat16, length=1000)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 700:] *= 0.5
    before = path_attention(*inputs, backend="triton")[0]
    after = path_attention(*changed, backend="triton")[0]
    assert torch.equal(before[:, :700], after[:, :700])


def test_addresses_beyond_two_to_the_31():
    """The last row of a batch with more than 2^31 slot elements equals that row alone."""
    inputs = make(torch.bfloat16, batch=1, length=8192, heads=1, group=4, gated=False)
    many = [x if x is None else x.expand(300, *x.shape[1:]).contiguous() for x in inputs]
    with torch.no_grad():
        alone = path_attention(*inputs, backend="triton")[0]
        last = path_attention(*many, backend="triton")[0][-1]
    assert torch.equal(alone[0], last)


def test_long_sequences_agree_with_the_torch_back_end():
    inputs = make(torch.bfloat16, batch=1, length=16384, heads=1, group=2)
    ours = results(path_attention, inputs, backend="triton")
    torch_ = results(
        path_attention, [x if x is None else x.float() for x in inputs], backend="torch"
    )
    for name, ref in torch_.items():
        assert rms_ratio(ours[name], ref) < 2 * LIMITS[torch.bfloat16][name], name


def test_torch_compile_takes_the_whole_operation():
    inputs = make(torch.bfloat16)

    def attention(*args):
        return path_attention(*args, backend="triton")[0]

    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), attention(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("group", [1, 4, 20])
def test_decode_kernel(dtype, group):
    from path_attn.kernels.decode import decode_triton

    generator = torch.Generator("cuda").manual_seed(group)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    q = (normal(2, 3, group, 64) / 8).to(dtype)
    k, v = normal(2, 3, 5000, 64).to(dtype), normal(2, 3, 5000, 80).to(dtype)
    bias = -torch.rand(2, 3 * group, 5000, device="cuda", generator=generator)
    valid = torch.rand(2, 5000, device="cuda", generator=generator) > 0.2
    out, lse = decode_triton(q, k, v, bias, valid, softcap=20.0)
    logits = (
        20 * torch.tanh(q.double() @ k.double().mT / 20) + bias.unflatten(1, (3, group)).double()
    )
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    low = torch.finfo(dtype).eps
    assert rms_ratio(out, logits.softmax(-1) @ v.double()) < 4 * max(low, 1e-6)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_prefill_and_decode_equal_the_whole_sequence():
    inputs = make(torch.bfloat16, length=200)
    whole = path_attention(*inputs, backend="triton")[0]
    head = [x[:, :150] for x in inputs]
    out, cache = path_attention(*head, return_cache=True, backend="triton")
    outs = [out]
    for t in range(150, 200):
        outs.append(path_attention_decode(*(x[:, t : t + 1] for x in inputs), cache=cache))
    assert rms_ratio(torch.cat(outs, 1), whole) < 2e-2


def test_padding_rows_of_cut_reach_no_result():
    from path_attn.kernels.attention import attend_triton

    q = torch.randn(1, 2, 700, 64, device="cuda")
    prepared = cut(q / 8, q[:, 0], q[:, 1], None, None)
    out, lse = attend_triton(prepared, compute_dtype=torch.bfloat16)
    want = torch.nn.functional.scaled_dot_product_attention(
        q / 8, q[:, :1], q[:, 1:], is_causal=True, scale=1.0
    )
    assert out.shape[2] == 1024
    assert torch.isfinite(lse).all()
    assert rms_ratio(out[:, :, :700], want) < 5e-3
