"""Specs of every kind of model, refusals that name their key, and logits equal to transformers."""

import contextlib
import copy

import pytest
import torch

import flashformer as ff
from flashformer.config import MODEL_TYPES, ModelSpec, supported
from tenfold_common import UserError
from tenfold_common.testing import rms_ratio

CASES = (
    "llama", "llama-wide-heads", "llama-one-kv-head", "llama-no-groups", "llama-groups-of-7",
    "llama-biases", "llama-tied", "qwen2", "qwen2-window", "qwen3", "mistral", "smollm3",
    "smollm3-window", "phi3", "phi3-partial", "rope-linear", "rope-llama3", "rope-yarn",
    "rope-dynamic", "rope-longrope",
)  # fmt: skip


def test_every_kind_is_in_a_case(kit):
    assert set(CASES) == set(kit.KINDS)
    seen = {kit.config(kind).model_type for kind in CASES}
    assert seen == set(MODEL_TYPES)


@pytest.mark.parametrize("kind", CASES)
def test_logits_equal_transformers(kit, kind):
    model = kit.model(kind)
    tokens = kit.tokens(16 if kind == "rope-longrope" else 40)
    one_by_one = kind == "rope-dynamic"  # 40 tokens are beyond the original 16
    theirs = kit.logits(copy.deepcopy(model).double(), tokens, one_by_one=one_by_one)
    beyond = pytest.warns(UserWarning, match="max_len 64 is longer than the 16 positions")
    with beyond if kind == "rope-dynamic" else contextlib.nullcontext():
        room = 16 if kind == "rope-longrope" else 64
        compiled = ff.compile(model, max_len=room, threads=2, backend="cpu")
    ours = compiled.feed(tokens, compiled.new_cache(), every=True)
    assert rms_ratio(ours, theirs) < 3e-6
    assert ours.argmax(1).tolist() == theirs.argmax(1).tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_context_of_several_chunks_equals_transformers(kit, kind):
    changes = {"sliding_window": 300} if kind == "mistral" else {}
    model = kit.model(kind, max_position_embeddings=1024, **changes)
    tokens = kit.tokens(600)
    compiled = ff.compile(model, max_len=640, threads=2, backend="cpu")
    assert len(compiled.plan.parts(0, 599)) > compiled.spec.kv_heads
    ours = compiled.feed(tokens, compiled.new_cache(), every=True)
    assert rms_ratio(ours, kit.logits(copy.deepcopy(model).double(), tokens)) < 3e-6


@pytest.mark.parametrize("kind", CASES)
def test_compiling_leaves_the_model_as_it_was(kit, kind):
    model = kit.model(kind)
    tokens = kit.tokens(30)
    before = kit.logits(model, tokens)
    model = kit.model(kind)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    room = min(48, ModelSpec.from_config(model.config).max_positions)
    ff.compile(model, weights="bf16", max_len=room, threads=1, backend="cpu")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())
    assert torch.equal(kit.logits(model, tokens), before)


def test_a_model_longer_than_it_was_made_for_still_leaves_it_as_it_was(kit):
    tokens = kit.tokens(30)
    before = kit.logits(kit.model("rope-dynamic"), tokens)
    model = kit.model("rope-dynamic")
    with pytest.warns(UserWarning, match="longer than the 16"):
        ff.compile(model, max_len=64, threads=1, backend="cpu")
    assert torch.equal(kit.logits(model, tokens), before)


# --------------------------------------------------------------------------------------------------
# Specs

SPECS = {
    # kind: what its spec must say
    "llama": {"head_dim": 12, "rotary": 12, "qkv_rows": 96, "attended": 48, "layers": 2},
    "llama-wide-heads": {"head_dim": 20, "attended": 80, "qkv_rows": 160},
    "llama-one-kv-head": {"kv_heads": 1, "qkv_rows": 72},
    "llama-biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "llama-tied": {"tied": True},
    "qwen2": {"qkv_bias": True, "output_bias": False, "windows": (None, None), "qk_norm": False},
    "qwen2-window": {"windows": (None, 7)},
    "qwen3": {"qk_norm": True, "qkv_bias": False, "head_dim": 24},
    "mistral": {"windows": (5, 5)},
    "smollm3": {"rotates": (True, False), "windows": (None, None)},
    "smollm3-window": {"rotates": (False, True), "windows": (None, 7)},
    "phi3": {"rotary": 12, "model_type": "phi3"},
    "phi3-partial": {"rotary": 6},
}


@pytest.mark.parametrize("kind", SPECS)
def test_spec(kit, kind):
    spec = ModelSpec.from_config(kit.config(kind))
    for name, value in SPECS[kind].items():
        assert getattr(spec, name) == value, name
    sizes = kit.SIZES
    assert (spec.hidden, spec.intermediate, spec.vocab) == (
        sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"],
    )  # fmt: skip
    assert (spec.eps, spec.heads) == (0.02, kit.config(kind).num_attention_heads)
    assert ModelSpec.from_dict(spec.to_dict()) == spec


def test_a_spec_survives_json(kit):
    import json

    spec = ModelSpec.from_config(kit.config("qwen2-window"))
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("change", [{"extra": 1}, {"hidden": None}])
def test_a_spec_of_another_version_is_refused_by_field(kit, change):
    values = ModelSpec.from_config(kit.config()).to_dict()
    name = next(iter(change))
    if change[name] is None:
        del values[name]
    else:
        values |= change
    with pytest.raises(UserError, match=name):
        ModelSpec.from_dict(values)


# --------------------------------------------------------------------------------------------------
# Refusals

REFUSED = {
    # case: (fields set on a Llama config, words of the reason)
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "kv-heads": ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
    "head-dim": (
        {"head_dim": None, "hidden_size": 50},
        ["hidden_size 50", "num_attention_heads 4"],
    ),
    "experts": ({"num_local_experts": 8}, ["num_local_experts is 8"]),
    "experts-2": ({"num_experts": 4}, ["num_experts is 4"]),
    "capped-scores": ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0"]),
    "capped-logits": ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
    "layers": (
        {"layer_types": ["full_attention", "linear_attention"]},
        ["layer_types", "linear_attention", "sliding_attention"],
    ),
    "tensor-parallel": ({"pretraining_tp": 2}, ["pretraining_tp is 2"]),
    "partial": (
        {
            "model_type": "phi3",
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5},
        },
        ["partial_rotary_factor is 1.5"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_key_and_the_value(kit, case):
    changes, words = REFUSED[case]
    config = kit.config()
    for name, value in changes.items():
        setattr(config, name, value)
    found = supported(config)
    assert not found
    assert not found.ok
    assert len(found.reasons) == 1
    for word in words:
        assert word in found.reasons[0]
    with pytest.raises(UserError, match="not supported") as caught:
        ModelSpec.from_config(config)
    assert found.reasons[0] in str(caught.value)


def test_all_reasons_are_given_at_once(kit):
    config = kit.config()
    config.hidden_act, config.num_key_value_heads = "relu", 3
    assert len(supported(config).reasons) == 2


def test_what_is_supported_has_no_reasons(kit):
    for kind in CASES:
        assert supported(kit.config(kind)) == ff.Support(True, ())


def test_encoder_decoders_and_unknown_kinds_are_refused():
    from transformers import GPT2Config, Qwen3MoeConfig, T5Config

    assert "encoder-decoder" in supported(T5Config()).reasons[0]
    assert "'gpt2'" in supported(GPT2Config()).reasons[0]
    assert "Did you mean 'qwen3'?" in supported(Qwen3MoeConfig()).reasons[0]
