"""Tensors of quantised checkpoints that are missing, spoilt or over."""

import pytest
import torch
from checkpoint_files import (
    O,
    drop,
    load,
    pack_gemm,
    put,
    rewrite,
    stage,
)

from flashformer.checkpoints import Shards
from tenfold_common import UserError


def nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


SPOILT = {
    # what: (case, change of the tensors, words of the message)
    "no-qweight": ("gptq", drop(f"{O}.qweight"), [f"no tensor '{O}.qweight'"]),
    "no-zeros": ("awq-gemm", drop(f"{O}.qzeros"), [f"no tensor '{O}.qzeros'"]),
    "no-scales": ("gptq", drop(f"{O}.scales"), [f"no tensor '{O}.scales'"]),
    "no-shape": ("compressed", drop(f"{O}.weight_shape"), [f"no tensor '{O}.weight_shape'"]),
    "no-norm": ("gptq", drop("model.norm.weight"), ["no weight 'model.norm.weight'"]),
    "no-head": ("gptq", drop("lm_head.weight"), ["no weight 'lm_head.weight'"]),
    "no-bias": (
        "gptq-asym",
        drop("model.layers.0.self_attn.q_proj.bias"),
        ["no weight 'model.layers.0.self_attn.q_proj.bias'"],
    ),
    "rows": (
        "gptq",
        put(f"{O}.scales", lambda t: t[:, :-1]),
        [f"{O}.scales has the shape [4, 127], expected [4, 128]"],
    ),
    "groups": (
        "awq-gemm",
        put(f"{O}.scales", lambda t: t[:2]),
        [f"{O}.scales has the shape [2, 128], expected [4, 128]"],
    ),
    "zeros": (
        "awq-gemm",
        put(f"{O}.qzeros", lambda t: t[:, :8]),
        [f"{O}.qzeros has the shape [4, 8], expected [4, 16]"],
    ),
    "gemv-zeros": (
        "awq-gemv",
        put(f"{O}.qzeros", lambda t: t[:, :0]),
        [f"{O}.qzeros has the shape [128, 0], expected [128, 4]"],
    ),
    "gemv-rows": (
        "awq-gemv",
        put(f"{O}.scales", lambda t: t[:8]),
        [f"{O}.scales has the shape [8, 32], expected [128, 32]"],
    ),
    "eight-bits": (
        "gptq",
        put(f"{O}.qweight", lambda t: torch.cat([t, t])),
        [f"{O}.g_idx has the shape [128], expected [256]"],
    ),
    "too-wide": (
        "awq-gemv",
        lambda t: t.update({f"{O}.qweight": t[f"{O}.qweight"].repeat(1, 2)}),
        [f"{O} has the shape [128, 256], expected [128, 128]"],
    ),
    "odd-k": (
        "awq-gemm",
        put(f"{O}.qweight", lambda t: t[:100]),
        [f"{O} has K = 100", "group_size 32"],
    ),
    "packed": (
        "compressed",
        put(f"{O}.weight_packed", lambda t: t[:, :-1]),
        [f"{O}.weight_packed has the shape [128, 15], expected [128, 16]"],
    ),
    "packed-8": (
        "compressed-8",
        put(f"{O}.weight_packed", lambda t: t[:, :-1]),
        [f"{O}.weight_packed has the shape [128, 31], expected [128, 32]"],
    ),
    "shape": (
        "compressed",
        put(f"{O}.weight_shape", lambda t: t[:1]),
        [f"{O}.weight_shape has the shape [1], expected [2]"],
    ),
    "channel": (
        "int-quantized",
        put(f"{O}.weight_scale", lambda t: t[:1]),
        [f"{O}.weight_scale has the shape [1, 1], expected [128, 1]"],
    ),
    "dtype": (
        "gptq",
        put(f"{O}.qweight", lambda t: t.float()),
        [f"{O}.qweight is torch.float32, expected torch.int32"],
    ),
    "dtype-scale": (
        "gptq",
        put(f"{O}.scales", lambda t: t.int()),
        [f"{O}.scales is torch.int32, expected torch.float16 or"],
    ),
    "dtype-int8": (
        "int-quantized",
        put(f"{O}.weight", lambda t: t.half()),
        [f"{O}.weight is torch.float16, expected torch.int8"],
    ),
    "dtype-zero": (
        "compressed-asym",
        put(f"{O}.weight_zero_point", lambda t: t.to(torch.int8)),
        [f"{O}.weight_zero_point is torch.int8, expected torch.int32"],
    ),
    "nan": ("gptq", put(f"{O}.scales", nan), ["a scale of", O, "NaN"]),
    "too-large": (
        "compressed",
        put(f"{O}.weight_scale", lambda t: t * 1e9),
        ["a scale of", O, "65504"],
    ),
    "nan-norm": (
        "gptq",
        put("model.norm.weight", lambda t: t * torch.nan),
        ["model.norm.weight holds NaN"],
    ),
    "act-order": ("gptq", put(f"{O}.g_idx", lambda t: t.flip(0)), [f"{O}.g_idx", "desc_act"]),
    "act-order-2": (
        "compressed",
        put(f"{O}.weight_g_idx", lambda _: torch.arange(128).flip(0) // 32),
        [f"{O}.weight_g_idx", "actorder"],
    ),
    "mixed": (
        "gptq",
        lambda t: (t.pop(f"{O}.qweight"), t.update({f"{O}.weight": torch.zeros(128, 128)})),
        [
            f"{O} is not quantised, but other layers are",
            "modules_to_not_convert, ignore or dynamic",
        ],
    ),
    "mixed-int8": (
        "int-quantized",
        drop(f"{O}.weight_scale"),
        [f"{O} is not quantised, but other layers are"],
    ),
    "layer-too-many": (
        "gptq",
        put("model.layers.7.mlp.down_proj.weight", lambda _: torch.zeros(2)),
        ["has model.layers.7.mlp.down_proj.weight, which a model of this config does not use"],
    ),
    "quantised-stranger": (
        "awq-gemm",
        lambda t: t.update(pack_gemm("vision.proj", [[1] * 32] * 8, [[8]] * 8, torch.ones(8, 1))),
        ["has vision.proj, which"],
    ),
    "bias": (
        "gptq",
        put(f"{O}.bias", lambda _: torch.ones(128)),
        [f"has {O}.bias, which a model of this config does not use"],
    ),
    "key-scale": (
        "compressed",
        put("model.layers.0.self_attn.k_scale", lambda _: torch.ones(1)),
        ["has model.layers.0.self_attn.k_scale, which"],
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_tensor_is_named(fresh, what):
    case, change, expected = SPOILT[what]
    made = fresh(case)
    load(made)  # sound before
    rewrite(made, change)
    with pytest.raises(UserError) as caught:
        load(made)
    for part in expected:
        assert part in str(caught.value)


def test_leftovers_without_meaning_are_no_matter(fresh, kit):
    made = fresh("gptq")
    tokens = kit.tokens(6)
    model = load(made)
    before = model.feed(tokens, model.new_cache())

    def change(tensors):
        tensors[f"{O}.bias"] = torch.zeros(128)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    rewrite(made, change)
    model = load(made)
    assert torch.equal(model.feed(tokens, model.new_cache()), before)


def test_a_tied_head_may_be_stored_twice(fresh):
    made = fresh("compressed-asym")
    rewrite(made, put("lm_head.weight", lambda _: torch.ones(97, 128)))
    assert load(made).spec.tied


def test_gptq_without_an_order_of_columns(fresh):
    made = fresh("gptq")
    rewrite(made, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("g_idx")])
    assert load(made).weights == "int4"


def test_scales_beyond_float16_are_rounded_with_a_warning(fresh):
    made = fresh("compressed")

    def change(tensors):
        for name in (n for n in tensors if n.endswith("weight_scale")):
            tensors[name] = tensors[name].float() * (1 + 2**-12)

    rewrite(made, change)
    with pytest.warns(UserWarning, match="scales of 7 matrices, such as model") as caught:
        model = load(made)
    output = next(s.name for s in model.plan.stages if s.kind == "output")
    meant = made.dense[O] * (1 + 2**-12)
    error = (stage(model, output) - meant).abs()
    assert (error <= meant.abs() * 2**-11).all()
    assert error.max() > 0
    assert len(caught) == 1


def test_scales_too_small_for_float16_go_without_one(fresh):
    made = fresh("compressed")

    def change(tensors):
        tensors[f"{O}.weight_scale"][0, 0] = 1e-9

    rewrite(made, change)
    model = load(made)
    output = next(s.name for s in model.plan.stages if s.kind == "output")
    assert (stage(model, output)[0, :32] == 0).all()


def test_shards_tell_what_was_used(written):
    shards = Shards(written("gptq").folder)
    assert len(shards) == len(list(shards)) == len(written("gptq").tensors)
    assert "nothing" not in shards
    assert not shards.used
    _ = shards["lm_head.weight"]
    assert shards.used == {"lm_head.weight"}
