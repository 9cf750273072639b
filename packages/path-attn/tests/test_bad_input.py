"""What does not fit is refused in one line that names it, what was seen and what is accepted."""

import pickle
import warnings

import pytest
import torch
from torch.nn.functional import normalize

from path_attn import (
    PaTHKVCache,
    parallel_path_attn,
    path_attention,
    path_attention_decode,
)
from path_attn.checks import PaTHWarning
from tenfold_common import UserError

NAMES = ("q", "k", "v", "w", "beta", "g")


def make(B=2, T=5, HQ=4, H=2, K=8, V=6, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=gen)

    given = {
        "q": rand(B, T, HQ, K),
        "k": rand(B, T, H, K),
        "v": rand(B, T, H, V),
        "w": normalize(rand(B, T, H, K), dim=-1),
        "beta": torch.rand(B, T, H, generator=gen),
        "g": -torch.rand(B, T, HQ, generator=gen),
    }
    return {name: x.to(dtype) for name, x in given.items()}


def refused(given, *words, call=path_attention, **options):
    """The message of the UserError; every word must be in it, and it must be one line."""
    copies = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(UserError) as caught:
        call(**given, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert "\n" not in message
    for name, copy in copies.items():
        assert torch.equal(given[name], copy) or copy.isnan().any()
    return message


SHAPES = {
    # name: (changes of the inputs, words the message must hold)
    "q-3-d": (lambda x: {"q": x["q"][0]}, ["q ", "(5, 4, 8)", "[B, T"]),
    "k-length": (lambda x: {"k": x["k"][:, :3]}, ["k ", "(2, 3, 2, 8)", "(2, 5, 2, 8)"]),
    "k-rows": (lambda x: {"k": x["k"][:1]}, ["k ", "(1, 5, 2, 8)", "(2, 5, 2, 8)"]),
    "k-dim": (lambda x: {"k": x["k"][..., :4]}, ["k ", "(2, 5, 2, 4)", "(2, 5, 2, 8)"]),
    "v-length": (lambda x: {"v": x["v"][:, :3]}, ["v ", "(2, 3, 2, 6)", "(2, 5, 2, 6)"]),
    "v-heads": (lambda x: {"v": x["v"][:, :, :1]}, ["v ", "(2, 5, 1, 6)", "(2, 5, 2, 6)"]),
    "w-dim": (lambda x: {"w": x["w"][..., :4]}, ["w ", "(2, 5, 2, 4)", "(2, 5, 2, 8)"]),
    "w-heads": (lambda x: {"w": x["w"][:, :, :1]}, ["w ", "(2, 5, 1, 8)", "(2, 5, 2, 8)"]),
    "w-per-query-head": (
        lambda x: {"w": x["w"].repeat(1, 1, 2, 1)},
        ["w ", "(2, 5, 4, 8)", "(2, 5, 2, 8)"],
    ),
    "w-3-d": (lambda x: {"w": x["w"][0]}, ["w ", "(5, 2, 8)"]),
    "beta-heads": (
        lambda x: {"beta": x["beta"][..., :1]},
        ["beta ", "(2, 5, 1)", "(2, 5, 2)"],
    ),
    "beta-4-d": (lambda x: {"beta": x["beta"][..., None]}, ["beta ", "(2, 5, 2, 1)", "(2, 5, 2)"]),
    "beta-without-reflection-axis": (
        lambda x: {"w": x["w"][:, :, :, None].repeat(1, 1, 1, 3, 1)},
        ["beta ", "(2, 5, 2)", "(2, 5, 2, 3)"],
    ),
    "no-reflections-in-w": (
        lambda x: {
            "w": x["w"].new_zeros(2, 5, 2, 0, 8),
            "beta": x["beta"].new_zeros(2, 5, 2, 0),
        },
        ["w ", "(2, 5, 2, 0, 8)"],
    ),
    "g-per-key-head": (
        lambda x: {"g": x["g"][..., :2]},
        ["g ", "(2, 5, 2)", "(2, 5, 4)", "query head"],
    ),
    "g-length": (lambda x: {"g": x["g"][:, :1]}, ["g ", "(2, 1, 4)", "(2, 5, 4)"]),
    "heads-not-a-multiple": (lambda x: {"q": x["q"][:, :, :3]}, ["3 heads", "2", "multiple"]),
    "fewer-query-heads": (lambda x: {"q": x["q"][:, :, :1]}, ["1 heads", "2", "multiple"]),
    "no-tokens": (lambda x: {n: t[:, :0] for n, t in x.items()}, ["q ", "(2, 0, 4, 8)"]),
    "no-rows": (lambda x: {n: t[:0] for n, t in x.items()}, ["q ", "(0, 5, 4, 8)"]),
    "no-dims": (lambda x: {n: x[n][..., :0] for n in "qkw"}, ["q ", "(2, 5, 4, 0)"]),
    "no-value-dims": (lambda x: {"v": x["v"][..., :0]}, ["v ", "(2, 5, 2, 0)"]),
    "beta-alone": (lambda x: {"w": None}, ["w", "beta", "both"]),
    "w-alone": (lambda x: {"beta": None}, ["w", "beta", "both"]),
    "integer-q": (lambda x: {"q": x["q"].long()}, ["q ", "int64", "float32"]),
    "integer-w": (lambda x: {"w": x["w"].long()}, ["w ", "int64", "float32"]),
    "complex-v": (lambda x: {"v": x["v"].to(torch.complex64)}, ["v ", "complex64", "float32"]),
    "double-k": (lambda x: {"k": x["k"].double()}, ["k ", "float64", "float32"]),
    "half-v": (lambda x: {"v": x["v"].half()}, ["v ", "float16", "float32"]),
    "k-elsewhere": (lambda x: {"k": x["k"].to("meta")}, ["k ", "meta", "cpu"]),
    "g-elsewhere": (lambda x: {"g": x["g"].to("meta")}, ["g ", "meta", "cpu"]),
    "beta-above-2": (lambda x: {"beta": x["beta"] + 2.5}, ["beta ", "[0, 2]", "3.4"]),
    "beta-below-0": (lambda x: {"beta": x["beta"] - 1.5}, ["beta ", "[0, 2]", "-1."]),
    "positive-g": (lambda x: {"g": -x["g"]}, ["g ", "<= 0", "0.9"]),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_tensors_that_do_not_fit(case, backend):
    change, words = SHAPES[case]
    given = make()
    given.update(change(given))
    if "elsewhere" in case:
        with pytest.raises(UserError) as caught:
            path_attention(**given, backend=backend)
        assert all(word in str(caught.value) for word in words)
    else:
        refused(given, *words, backend=backend)


@pytest.mark.parametrize("case", ["w-dim", "g-per-key-head", "heads-not-a-multiple", "no-tokens"])
def test_the_other_entry_points_refuse_the_same(case):
    change, words = SHAPES[case]
    given = make()
    cache = PaTHKVCache()
    with torch.no_grad():
        path_attention(**given, cache=cache)
        given.update(change(given))
        refused(given, *words, call=parallel_path_attn)
        refused(given, *words, call=path_attention_decode, cache=cache)
    assert cache.length == 5


def test_heads_first_tensors_get_a_hint():
    given = {n: x.transpose(1, 2) for n, x in make(HQ=4, H=2).items()}
    assert "[B, H, T, K]" in refused(given, "This library uses [B, T, H, K]")


def test_heads_that_do_not_divide_get_no_hint_about_axes():
    given = make(HQ=8, H=8)
    given["k"] = given["k"][:, :, :3]
    assert "Did you pass" not in refused(given, "q has 8 heads but k has 3")


@pytest.mark.parametrize("name", ["q", "k", "v", "w", "beta", "g", "attention_mask", "cu_seqlens"])
def test_what_is_not_a_tensor_is_refused(name):
    given = make(B=1)
    options = {} if name in given else {name: [0, 5]}
    if name in given:
        given[name] = given[name].tolist()
    refused(given, f"{name} must be a torch.Tensor, got list", **options)


@pytest.mark.parametrize("option", ["window", "block_size"])
def test_true_is_not_a_number(option):
    refused(make(), option, "True", **{option: True})


def test_a_cache_that_is_none_of_ours_is_refused():
    refused(make(), "cache must be a PaTHKVCache, got dict", cache={})


def test_another_scale_on_a_filled_cache_is_refused():
    cache = PaTHKVCache()
    with torch.no_grad():
        path_attention(**make(), cache=cache, scale=0.5)
        refused(make(), "its scale is 0.5", "have None", cache=cache)


def test_rows_that_the_cache_has_not():
    cache = PaTHKVCache()
    path_attention(**make(), cache=cache)
    for wrong in ([0], torch.tensor([0.0]), torch.tensor([0, 9]), torch.tensor([-1])):
        with pytest.raises(UserError, match="reorder"):
            cache.reorder(wrong)
    with pytest.raises(UserError, match="repeat"):
        cache.repeat(0)
    with pytest.raises(UserError, match="crop"):
        cache.crop(2.5)


OPTIONS = {
    "gate_scale": ({"gate_scale": "flaa"}, ["gate_scale", "'flaa'", "'paper'", "Did you mean"]),
    "backend": ({"backend": "tritn"}, ["backend", "'tritn'", "reference", "Did you mean 'triton'"]),
    "scale-0": ({"scale": 0.0}, ["scale", "positive", "0.0"]),
    "scale-negative": ({"scale": -1.0}, ["scale", "positive", "-1.0"]),
    "scale-nan": ({"scale": float("nan")}, ["scale", "positive", "nan"]),
    "window-0": ({"window": 0}, ["window", "at least 1", "0"]),
    "window-negative": ({"window": -3}, ["window", "at least 1", "-3"]),
    "window-fraction": ({"window": 2.5}, ["window", "2.5"]),
    "softcap-0": ({"softcap": 0.0}, ["softcap", "positive", "0.0"]),
    "softcap-negative": ({"softcap": -2.0}, ["softcap", "positive", "-2.0"]),
    "block-0": ({"block_size": 0}, ["block_size", "1", "256", "0"]),
    "block-large": ({"block_size": 257}, ["block_size", "1", "256", "257"]),
    "max_beta-large": ({"max_beta": 2.5}, ["max_beta", "[0, 2]", "2.5"]),
    "max_beta-negative": ({"max_beta": -0.1}, ["max_beta", "[0, 2]", "-0.1"]),
    "triton-on-a-cpu": ({"backend": "triton"}, ["triton", "cpu", "backend='torch'"]),
    "mask-3-d": (
        {"attention_mask": torch.ones(2, 5, 5, dtype=torch.bool)},
        ["attention_mask", "(2, 5, 5)", "(2, 5)"],
    ),
    "mask-length": (
        {"attention_mask": torch.ones(2, 4, dtype=torch.bool)},
        ["attention_mask", "(2, 4)", "(2, 5)"],
    ),
    "mask-rows": (
        {"attention_mask": torch.ones(1, 5, dtype=torch.bool)},
        ["attention_mask", "(1, 5)", "(2, 5)"],
    ),
    "mask-float": ({"attention_mask": torch.ones(2, 5)}, ["attention_mask", "float32", "bool"]),
    "mask-values": (
        {"attention_mask": torch.full((2, 5), 2)},
        ["attention_mask", "0 and 1"],
    ),
    "mask-additive": (
        {"attention_mask": torch.full((2, 5), -10000)},
        ["attention_mask", "0 and 1"],
    ),
    "packed-rows": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ["cu_seqlens", "B = 1", "B = 2"],
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit(case):
    options, words = OPTIONS[case]
    refused(make(), *words, **options)


BOUNDS = {
    "late-start": (torch.tensor([1, 5]), ["0 to T = 5", "1"]),
    "early-end": (torch.tensor([0, 3]), ["0 to T = 5", "3"]),
    "late-end": (torch.tensor([0, 3, 9]), ["0 to T = 5", "9"]),
    "falling": (torch.tensor([0, 4, 2, 5]), ["rise", "[0, 4, 2, 5]"]),
    "empty-sequence": (torch.tensor([0, 2, 2, 5]), ["rise", "[0, 2, 2, 5]"]),
    "float": (torch.tensor([0.0, 5.0]), ["int32", "float32"]),
    "2-d": (torch.tensor([[0, 5]]), ["[N + 1]", "(1, 2)"]),
    "one-number": (torch.tensor([0]), ["[N + 1]", "(1,)"]),
}


@pytest.mark.parametrize("call", [path_attention, parallel_path_attn])
@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_that_do_not_fit(case, call):
    bounds, words = BOUNDS[case]
    refused(make(B=1), "cu_seqlens", *words, cu_seqlens=bounds, call=call)


@pytest.mark.parametrize(
    "other",
    [
        {"attention_mask": torch.ones(1, 5, dtype=torch.bool)},
        {"cache": PaTHKVCache()},
        {"return_cache": True},
    ],
    ids=["mask", "cache", "return_cache"],
)
def test_packing_does_not_mix_with_padding_or_a_cache(other):
    refused(make(B=1), "cu_seqlens", cu_seqlens=torch.tensor([0, 5]), **other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan")])
def test_strict_finds_nan_and_says_where(name, bad):
    given = make()
    given[name][1, 3, 0] = bad
    place = "(1, 3, 0, 0)" if name in "qkvw" else "(1, 3, 0"
    refused(given, f"{name} contains NaN", place, strict=True)


def test_strict_finds_directions_of_another_norm():
    given = make()
    given["w"][1, 3, 1] *= 1.25
    refused(given, "w ", "norm 1", "1.25", strict=True)


def test_strict_accepts_zero_directions_and_rounded_ones():
    given = make(dtype=torch.bfloat16)
    given["w"][0, 2] = 0
    path_attention(**given, strict=True)


def test_a_nan_does_not_switch_the_range_check_off():
    given = make()
    given["beta"][0, 0], given["beta"][1, 3] = float("nan"), 5.0
    with pytest.raises(UserError, match="beta"):
        path_attention(**given)


def test_what_lies_under_the_mask_is_not_checked():
    """Padding may hold anything: the strengths of padded tokens are never used."""
    given = make()
    expected = path_attention(**given, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]))[0]
    given["beta"][1, 4], given["g"][1, 4] = 7.0, 7.0
    seen = path_attention(**given, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]))[0]
    assert torch.equal(seen, expected)


def test_a_gate_of_minus_infinity_gives_no_nan():
    """log 0 is refused or cuts the past off; it must not turn outputs into NaN."""
    given = make()
    given["g"][0, 2, 0] = -torch.inf
    try:
        out, _ = path_attention(**given)
    except UserError as refusal:
        assert "g " in str(refusal)  # noqa: PT017
    else:
        assert not out.isnan().any()


def test_max_beta_does_not_excuse_strengths_out_of_range():
    given = make()
    given["beta"] = given["beta"] + 2.5
    refused(given, "beta ", "[0, 2]", max_beta=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_beta_of_two_in_half_precision_is_a_warning(dtype):
    given = make()
    given["beta"] = torch.full_like(given["beta"], 1.9999).to(dtype)
    if float(given["beta"].max()) == 2.0:
        with pytest.warns(PaTHWarning, match=r"beta.*2.*max_beta"):
            path_attention(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path_attention(**given, max_beta=2 - 2**-7)


def test_beta_of_two_in_float32_is_no_warning():
    given = make()
    given["beta"] = torch.full_like(given["beta"], 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path_attention(**given)


def test_unknown_options_are_not_swallowed():
    with pytest.raises(TypeError, match="windw"):
        path_attention(**make(), windw=3)


def test_the_error_is_a_value_error_and_can_be_pickled():
    with pytest.raises(ValueError, match="window") as caught:
        path_attention(**make(), window=0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, UserError)
    assert str(again) == str(caught.value)
