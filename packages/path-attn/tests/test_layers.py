"""The layer alone: its parameters, short convolution, cache and bad inputs."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from path_attn.configuration_path_attn import PaTHConfig
from path_attn.layers import HALF_MAX_BETA, PaTHAttention, PaTHLayerCache, ShortConv
from path_attn.reference import naive_path_attention
from tenfold_common.errors import UserError
from tenfold_common.testing import rms_ratio

ENCODINGS = ["path", "path_fox", "fox", "nope"]


def make(**options) -> PaTHAttention:
    settings = {"num_heads": 4, "num_kv_heads": 2, "block_size": 16, **options}
    layer = PaTHAttention(32, **settings).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reflections", [1, 3])
def test_layer_is_the_written_equations(encoding, reflections):
    layer = make(position_encoding=encoding, num_reflections=reflections, qk_norm=True)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q = layer.q_norm(layer.q_proj(x).view(2, 11, 4, 8))
    k = layer.k_norm(layer.k_proj(x).view(2, 11, 2, 8))
    v = layer.v_proj(x).view(2, 11, 2, 8)
    w, beta = (
        torch.zeros(2, 11, 2, reflections, 8).double(),
        torch.zeros(2, 11, 2, reflections).double(),
    )
    if layer.uses_reflections:
        raw = F.pad(layer.w_proj(x), (0, 0, 2, 0)).mT
        raw = F.silu(F.conv1d(raw, layer.w_conv1d.weight, groups=raw.shape[1])).mT
        raw = raw.reshape(2, 11, 2, reflections, 8)
        w = raw / (raw.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        beta = 2 * layer.bt_proj(x).sigmoid().view(2, 11, 2, reflections)
    g = F.logsigmoid(layer.g_proj(x)) if layer.uses_gate else None
    expected = layer.o_proj(naive_path_attention(q, k, v, w, beta, g).flatten(2))
    out, cache = layer(x)
    assert cache is None
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoding", ["path_fox", "fox"])
@pytest.mark.parametrize("gate_scale", ["paper", "fla"])
def test_layer_follows_its_gate_convention_with_and_without_cache(encoding, gate_scale):
    layer = make(position_encoding=encoding, gate_scale=gate_scale).eval()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v, w, beta, g, _ = layer.project(x)
    w = torch.zeros_like(k) if w is None else w
    beta = torch.zeros_like(k[..., 0]) if beta is None else beta
    o = naive_path_attention(q, k, v, w, beta, g, gate_scale=gate_scale)
    expected = layer.o_proj(o.flatten(2))
    out, _ = layer(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        first, cache = layer(x[:, :7], return_cache=True)
        rest = [layer(x[:, i : i + 1], cache=cache)[0] for i in range(7, 11)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=0, atol=1e-12)


def test_state_dict_has_fla_names_and_shapes():
    shapes = {n: list(p.shape) for n, p in make(position_encoding="path_fox").state_dict().items()}
    assert shapes == {
        "q_proj.weight": [32, 32],
        "k_proj.weight": [16, 32],
        "v_proj.weight": [16, 32],
        "o_proj.weight": [32, 32],
        "w_proj.0.weight": [32, 32],
        "w_proj.1.weight": [16, 32],
        "w_conv1d.weight": [16, 1, 3],
        "bt_proj.weight": [2, 32],
        "bt_proj.bias": [2],
        "g_proj.weight": [4, 32],
        "g_proj.bias": [4],
    }
    assert list(make(low_rank_w=None).w_proj.state_dict()) == ["weight"]


def test_padding_inside_the_convolution_window_is_stepped_over():
    layer = make(position_encoding="path_fox")
    x = torch.randn(3, 17, 32, dtype=torch.float64)
    mask = torch.rand(3, 17) < 0.6
    mask[2] = False
    out, _ = layer(x, mask.long())
    for row in range(2):
        alone, _ = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(out[row, mask[row]], alone[0], rtol=0, atol=1e-12)
    assert torch.isfinite(out).all()
    assert (out[~mask] == 0).all()


def test_packed_documents_equal_separate_ones():
    layer = make(position_encoding="path_fox")
    x = torch.randn(1, 21, 32, dtype=torch.float64)
    bounds = [0, 1, 9, 11, 21]
    out, _ = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    parts = [layer(x[:, a:b])[0] for a, b in pairwise(bounds)]
    torch.testing.assert_close(out, torch.cat(parts, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"conv_size": None}, {"num_reflections": 2, "window": 5}])
def test_pieces_with_holes_equal_one_call(options):
    layer = make(position_encoding="path_fox", **options).eval()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    mask = torch.rand(2, 40) < 0.7
    with torch.no_grad():
        whole, _ = layer(x, mask)
        cache, outs, start = PaTHLayerCache(), [], 0
        for size in (1, 3, 1, 20, 1, 14):
            piece = slice(start, start + size)
            out, cache = layer(x[:, piece], mask[:, : start + size], cache)
            outs.append(out)
            start += size
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("history", [False, True])
def test_crop_restores_keys_and_convolution_window(masked, history):
    layer = make(position_encoding="path_fox").eval()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    mask = torch.rand(2, 30) < 0.7 if masked else torch.ones(2, 30, dtype=torch.bool)
    with torch.no_grad():
        whole, _ = layer(x, mask)
        cache = PaTHLayerCache(keep_open=30, history=history)
        layer(x[:, :20], mask[:, :20], cache)
        layer(torch.randn(2, 6, 32, dtype=torch.float64), torch.rand(2, 6) < 0.5, cache)
        cache.crop(15)
        out, _ = layer(x[:, 15:], mask[:, 15:], cache)
        torch.testing.assert_close(out, whole[:, 15:], rtol=0, atol=1e-11)
        cache.crop(0)
        assert cache.conv_inputs is None
        again, _ = layer(x, mask, cache)
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-11)


def test_rows_of_the_cache_can_be_chosen_and_repeated():
    layer = make().eval()
    x, y = torch.randn(2, 9, 32).double(), torch.randn(4, 1, 32).double()
    with torch.no_grad():
        _, cache = layer(x, return_cache=True)
        cache.repeat(2)
        cache.reorder(torch.tensor([3, 0, 1, 0]))
        out, _ = layer(y, cache=cache)
        rows = x[[1, 0, 0, 0]]
        expected, _ = layer(torch.cat([rows, y], 1))
    torch.testing.assert_close(out, expected[:, -1:], rtol=0, atol=1e-12)


def test_zero_input_gives_identity_path_and_no_nan():
    layer = make()
    x = torch.zeros(1, 5, 32, dtype=torch.float64, requires_grad=True)
    inputs = layer.project(x)
    assert (inputs.w == 0).all()
    out, _ = layer(x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_clips_beta_and_stays_close(dtype):
    layer = make(position_encoding="path_fox")
    with torch.no_grad():
        layer.bt_proj.bias.fill_(20.0)
    x = torch.randn(2, 33, 32).to(dtype)
    exact, _ = layer(x.double())
    assert layer.project(x.double()).beta.max() > HALF_MAX_BETA
    low = layer.to(dtype)
    inputs = low.project(x)
    assert inputs.beta.max() == HALF_MAX_BETA
    assert {inputs.w.dtype, inputs.beta.dtype, inputs.g.dtype} == {torch.float32}
    out, _ = low(x)
    assert out.dtype == dtype
    assert rms_ratio(out.double(), exact) < 0.06


def test_max_beta_is_configurable_and_not_silent_in_full_precision():
    layer = make(max_beta=1.5)
    with torch.no_grad():
        layer.bt_proj.bias.fill_(20.0)
    assert layer.project(torch.randn(1, 3, 32).double()).beta.max() == 1.5


def test_autocast_trains():
    layer = PaTHAttention(32, 4, position_encoding="path_fox", qk_norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(torch.randn(2, 9, 32))
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in layer.parameters())


def test_past_outputs_do_not_depend_on_the_future():
    layer = PaTHAttention(32, 4, position_encoding="path_fox", block_size=16).eval()
    x = torch.randn(1, 40, 32)
    y = x.clone()
    y[:, 23:] = torch.randn(1, 17, 32)
    assert torch.equal(layer(x)[0][:, :23], layer(y)[0][:, :23])


def test_short_conv_equals_conv1d():
    conv = ShortConv(6, 4).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, last = conv(x, remember=5)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), conv.weight, groups=6)).mT
    torch.testing.assert_close(y, expected)
    assert torch.equal(last, x[:, -5:])


def test_qk_norm_is_computed_in_float32_for_half_inputs():
    layer = make(qk_norm=True, norm_eps=0.5)
    assert {"q_norm.weight", "k_norm.weight"} <= set(layer.state_dict())
    layer = layer.bfloat16()
    x = torch.randn(2, 9, 32).bfloat16()
    q = layer.q_proj(x).view(2, 9, 4, 8).float()
    exact = layer.q_norm.weight.float() * q * (q.square().mean(-1, keepdim=True) + 0.5).rsqrt()
    torch.testing.assert_close(layer.project(x).q, exact.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_encoding": "rpe"}, "position_encoding is 'rpe'; it must be one of path, path_"),
        ({"gate_scale": "x"}, "gate_scale is 'x'; it must be one of paper, fla"),
        ({"backend": "cuda"}, "backend is 'cuda'; it must be one of auto, reference"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number >= 1"),
        ({"num_heads": 0}, "num_heads is 0; it must be a whole number >= 1"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0; it must be a whole number >= 1 or None"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 0}, "head_dim is 0; it must be a whole number >= 1 or None"),
        ({"head_dim": 7, "position_encoding": "rope"}, "head_dim 7 is odd"),
        ({"num_reflections": 0}, "num_reflections is 0; it must be a whole number >= 1"),
        ({"low_rank_w": 0}, "low_rank_w is 0; it must be a whole number >= 1 or None"),
        ({"conv_size": 0}, "conv_size is 0; it must be a whole number >= 1 or None"),
        ({"conv_size": True}, "conv_size is True"),
        ({"window": 0}, "window is 0; it must be a whole number >= 1 or None"),
        ({"block_size": 1.5}, "block_size is 1.5; it must be a whole number >= 1"),
        ({"max_beta": 3}, r"max_beta is 3; it must lie in \(0, 2\] or be None"),
        ({"max_beta": "2"}, "max_beta is '2'"),
        ({"max_beta": float("nan")}, "max_beta is nan"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be > 0 or None"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be > 0"),
        ({"w_norm_eps": -1.0}, "w_norm_eps is -1.0; it must be > 0"),
    ],
)
def test_layer_and_configuration_refuse_the_same_options(options, message):
    with pytest.raises(UserError, match=message):
        PaTHAttention(**{"hidden_size": 32, "num_heads": 4, **options})
    names = {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
    }
    message = " ".join(names.get(word, word) for word in message.split(" "))
    settings = {"hidden_size": 32, "num_attention_heads": 4}
    renamed = {names.get(name, name): value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        PaTHConfig(**{**settings, **renamed})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PaTHAttention(32, 4, 3), "not a multiple of num_kv_heads 3"),
        (lambda: PaTHAttention(30, 4), "hidden_size 30 is not a multiple"),
        (lambda: PaTHAttention(32, 4, position_encoding="pathfox"), "Did you mean 'path_fox'"),
        (lambda: PaTHAttention(32, 4)(torch.randn(2, 3, 31)), r"expected \[B, T, 32\]"),
        (
            lambda: PaTHAttention(32, 4)(torch.randn(2, 3, 32), torch.ones(2, 1, 3, 3)),
            "4 dimensions",
        ),
        (
            lambda: PaTHAttention(32, 4)(torch.randn(2, 3, 32), torch.ones(2, 5)),
            r"\[2, 5\]; expected",
        ),
        (lambda: PaTHAttention(32, 4)(torch.randn(2, 3, 32), cache={}), "PaTHLayerCache"),
        (
            lambda: PaTHAttention(32, 4, position_encoding="rope")(torch.randn(2, 3, 32)),
            "needs position_embeddings",
        ),
        (
            lambda: PaTHAttention(32, 4)(
                torch.randn(1, 3, 32), cu_seqlens=torch.tensor([0, 3]), return_cache=True
            ),
            "cannot be combined",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
