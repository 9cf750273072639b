"""The transformers model behind a compiled one: what it may hold, and what happens to it later."""

import copy
import math

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

import flashformer as ff
from flashformer.model import FEED
from tenfold_common import UserError

KINDS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")


def ours(compiled, tokens, **named):
    named = {"max_new_tokens": 8, "do_sample": False, **named}
    return compiled.generate(torch.tensor([tokens]), **named)[0, len(tokens) :].tolist()


def theirs(model, tokens, **named):
    named = {"max_new_tokens": 8, "do_sample": False, **named}
    ids = torch.tensor([tokens])
    return model.generate(ids, **named)[0, len(tokens) :].tolist()


# --------------------------------------------------------------------------------------------------
# A source that is being trained


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_in_eval_mode_and_the_mode_is_put_back(kit, kind):
    model = kit.model(kind, attention_dropout=0.5)
    compiled = ff.compile(model, threads=1, max_len=64)
    tokens = kit.tokens(2 * FEED)
    before = ours(compiled, tokens)
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    assert [ours(compiled, tokens) for _ in range(2)] == [before, before]
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.generate(torch.tensor([[1, 2]]), max_new_tokens=1),
        lambda c: c.prefill(torch.tensor([1, 2]), c.new_cache()),
        lambda c: ff.verify(c, c.source, n=2),
    ],
    ids=["generate", "prefill", "verify"],
)
@pytest.mark.parametrize(
    "change", [lambda w: w.mul_(2), lambda w: w.data.mul_(-1)], ids=["in-place", "data"]
)
def test_changed_weights_are_noticed(kit, call, change):
    compiled = ff.compile(kit.model(), threads=1, max_len=16)
    call(compiled)
    with torch.no_grad():
        change(compiled.source.lm_head.weight)
    with pytest.raises(UserError, match=r"refresh\(\)"):
        call(compiled)
    compiled.refresh()
    call(compiled)


def test_changed_weights_are_not_saved(kit, tmp_path):
    compiled = ff.compile(kit.model(), threads=1, max_len=16)
    with torch.no_grad():
        compiled.source.lm_head.weight.mul_(2)
    with pytest.raises(UserError, match=r"refresh\(\)"):
        compiled.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_made_in_inference_mode_compiles(kit):
    with torch.inference_mode():
        model = kit.model()
    compiled = ff.compile(model, threads=1, max_len=64)
    tokens = kit.tokens(5)
    assert ours(compiled, tokens) == theirs(kit.model(), tokens)


# --------------------------------------------------------------------------------------------------
# Weights that the config does not tell of


def test_a_bias_that_the_config_does_not_tell_of_is_refused(kit):
    model = kit.model()
    for name in ("lm_head", "model.layers.1.mlp.down_proj"):
        changed = copy.deepcopy(model)
        changed.get_submodule(name).bias = torch.nn.Parameter(torch.ones(97))
        with pytest.raises(UserError, match=rf"the model has {name}.bias, of which its config"):
            ff.compile(changed, threads=1)


def test_a_tied_config_with_a_head_of_its_own_is_refused(kit):
    model = kit.model("llama-tied")
    ff.compile(model, threads=1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    with pytest.raises(UserError, match="tie_word_embeddings is true"):
        ff.compile(model, threads=1)


def test_a_forward_pass_of_its_own_is_refused(kit):
    class Mine(LlamaForCausalLM):
        def forward(self, *args, **named):
            return super().forward(*args, **named)

    with pytest.raises(UserError, match="Mine has a forward pass of its own"):
        ff.compile(Mine(kit.config()), threads=1)


def test_a_folder_with_more_layers_than_its_config_is_refused(kit, tmp_path):
    kit.model().save_pretrained(tmp_path / "m")
    kit.config(num_hidden_layers=1).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"unexpected model\.layers\.1\."):
        ff.from_pretrained(tmp_path / "m", threads=1)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("Qwen/Qwen3-0.6B", "call from_pretrained"),
        (None, "a causal LM of transformers, not NoneType"),
        (torch.nn.Linear(2, 2), "a causal LM of transformers, not Linear"),
    ],
)
def test_what_is_no_model_is_refused(what, says):
    with pytest.raises(UserError, match=says):
        ff.compile(what)


def test_a_model_without_a_head_and_a_compiled_one_are_refused(kit):
    with pytest.raises(UserError, match="LlamaModel has no head"):
        ff.compile(kit.model().model)
    with pytest.raises(UserError, match=r"torch\.compile"):
        ff.compile(torch.compile(kit.model(), backend="eager"))


# --------------------------------------------------------------------------------------------------
# Rotary positions


@pytest.mark.parametrize("kind", KINDS)
def test_partial_rotary_positions_are_what_transformers_makes_of_them(kit, kind):
    """Phi-3 heeds the key, the others do not."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = kit.model(kind, rope_parameters=rope)
    compiled = ff.compile(model, threads=1, max_len=64)
    assert compiled.spec.rotary < compiled.spec.head_dim or kind != "phi3"
    tokens = kit.tokens(12)
    assert ours(compiled, tokens) == theirs(model, tokens)
    assert ff.verify(compiled, model, n=20).equal


@pytest.mark.parametrize("length", [5, 16, 17, 40])
def test_dynamic_positions_generate_what_transformers_generates(kit, length):
    model = kit.model("rope-dynamic")  # made for 16 positions
    with pytest.warns(UserWarning, match="longer than the 16"):
        compiled = ff.compile(model, threads=1, max_len=80)
    tokens = kit.tokens(length)
    expected = theirs(kit.model("rope-dynamic"), tokens)
    assert ours(compiled, tokens) == expected
    theirs(model, kit.tokens(70))  # leaves long angles in the source
    assert ours(compiled, tokens) == expected


def test_dynamic_positions_of_a_loaded_model_refuse_what_one_pass_alone_reads_right(kit, tmp_path):
    with pytest.warns(UserWarning, match="longer than the 16"):
        compiled = ff.compile(kit.model("rope-dynamic"), threads=1, max_len=80)
    compiled.save(tmp_path / "m")
    loaded = ff.load(tmp_path / "m", threads=1)
    assert ours(loaded, kit.tokens(14)) == ours(compiled, kit.tokens(14))  # and goes on behind 16
    with pytest.raises(UserError, match="up to position 17 is over the 16"):
        ours(loaded, kit.tokens(17))
    with pytest.raises(UserError, match="behind 16 positions the rotary positions"):
        ff.verify(compiled, compiled.source, n=20)


def test_longrope_goes_no_farther_than_its_angles_stay(kit):
    model = kit.model("rope-longrope")
    compiled = ff.compile(model, threads=1)
    assert compiled.max_len == 16
    assert ours(compiled, kit.tokens(8)) == theirs(model, kit.tokens(8))
    with pytest.raises(UserError, match="behind 16 positions longrope changes"):
        ff.compile(model, threads=1, max_len=17)


# --------------------------------------------------------------------------------------------------
# Numbers that overflow, defaults, caches of others


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_activations_that_overflow_are_an_error_in_every_format(kit, weights):
    model = kit.model(hidden_size=64, intermediate_size=64)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e22)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e22)
    if weights == "int4":  # its scales end before
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                getattr(model.model.layers[1].mlp, name).weight.mul_(1e-17)
            model.model.layers[1].post_attention_layernorm.weight.mul_(1e17)
    compiled = ff.compile(model, weights=weights, head="fp32", group_size=32, threads=1, max_len=16)
    assert math.isnan(float(kit.logits(model, [3])[0, 0]))
    with pytest.raises(UserError, match="a logit is NaN"):
        compiled.step(3, compiled.new_cache())


@pytest.mark.parametrize("factor", [1e7, 1e-7])
def test_matrices_whose_int4_scales_float16_cannot_hold_are_refused(factor):
    with pytest.raises(UserError, match=r"the largest number of gate is .*float16"):
        ff.quantize(torch.randn(4, 32) * factor, "int4", group=32, name="gate")
    ff.quantize(torch.zeros(4, 32), "int4", group=32)


def test_a_generation_config_leaves_open_what_the_model_has_set(kit):
    model = kit.model()
    tokens = kit.tokens(6)
    end = theirs(model, tokens)[2]
    model.generation_config.eos_token_id = end
    compiled = ff.compile(model, threads=1, max_len=64)
    given = GenerationConfig(max_new_tokens=8)
    expected = model.generate(torch.tensor([tokens]), given)[0].tolist()
    assert len(expected) == 9
    assert compiled.generate(torch.tensor([tokens]), given)[0].tolist() == expected


def test_prefill_refuses_caches_of_others(kit):
    compiled = ff.compile(kit.model(), threads=1, max_len=64)
    other = ff.compile(kit.model("llama-one-kv-head"), threads=1, max_len=64)
    half = ff.compile(kit.model(), weights="bf16", threads=1, max_len=64)
    for cache in (other.new_cache(), half.new_cache()):
        with pytest.raises(UserError, match="another model or format"):
            compiled.prefill(torch.tensor(kit.tokens(2 * FEED)), cache)
        assert cache.length == 0
    with pytest.raises(UserError, match="a KVCache is needed, not NoneType"):
        compiled.step(3, None)


# --------------------------------------------------------------------------------------------------
# What explain says


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "fp32"},
        {"weights": "int4", "symmetric": False, "group_size": 32},
        {"weights": "bf16", "head": "int4"},
    ],
    ids=["fp32", "zero-points", "int4-head"],
)
def test_explain_counts_what_is_streamed(kit, options):
    model = kit.model(hidden_size=128, intermediate_size=128)
    compiled = ff.compile(model, threads=1, max_len=32, **options)
    found = compiled.explain(position=9)
    attention = next(row for row in found.rows if row.kind == "attention")
    size = 4 if compiled.backend.cache_format == "fp32" else 2
    spec = compiled.spec
    assert attention.bytes == 2 * 10 * spec.layers * spec.kv_heads * spec.head_dim * size
    streamed = sum(packed.tiles.numel() for packed in compiled.backend.packed.values())
    assert found.bytes - attention.bytes == streamed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "int5"}, "weights must be one of"),
        ({"head": "x"}, "head must be one of"),
        ({"workers": 0}, "workers must be"),
        ({"position": -1}, "position must be"),
        ({"position": 512}, "behind the 512"),
        ({"bandwidth": 0}, "bandwidth must be over 0"),
    ],
)
def test_explain_refuses_what_makes_no_sense(kit, options, says):
    with pytest.raises(UserError, match=says):
        ff.explain(ff.ModelSpec.from_config(kit.config()), **options)
