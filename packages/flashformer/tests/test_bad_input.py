"""What does not fit is refused in one line that says what was seen and what to do."""

import copy

import pytest
import torch

import flashformer as ff
from tenfold_common import UserError


@pytest.fixture(scope="module")
def pair(kit):
    model = kit.model()
    return model, ff.compile(model, threads=1, max_len=32, backend="cpu")


def refused(call, *words):
    """Every word must be in the message, and it must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------
# Models


def test_models_of_another_kind():
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    small = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    refused(lambda: ff.compile(small), "model_type is 'gpt2'", "llama, mistral")
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 9}
    encoder = T5ForConditionalGeneration(T5Config(**sizes))
    refused(lambda: ff.compile(encoder), "'t5'", "encoder-decoder")


def test_a_feature_that_is_not_supported(kit):
    model = kit.model()
    model.config.hidden_act = "gelu"
    refused(lambda: ff.compile(model), "hidden_act is 'gelu', must be 'silu'")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weights_are_named(kit, name, bad):
    model = kit.model("llama-biases")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = bad
    refused(lambda: ff.compile(model), f"{name} holds NaN or infinity")


def test_groups_that_do_not_divide(kit):
    refused(
        lambda: ff.compile(kit.model(), weights="int4", group_size=32),
        "model.layers.0.self_attn.q_proj.weight has K = 48, which group_size 32 does not divide",
    )


def test_offloaded_weights(kit):
    model = kit.model()
    model.lm_head.to("meta")
    refused(lambda: ff.compile(model), "meta device", "load it whole")


def test_a_model_on_several_devices(kit, monkeypatch):
    from types import SimpleNamespace

    model = kit.model()
    spread = [SimpleNamespace(device=torch.device(d)) for d in ("cpu", "cuda:0")]
    monkeypatch.setattr(model, "parameters", lambda: spread)
    refused(lambda: ff.compile(model), "several devices", "cuda:0")


def test_a_model_with_an_adapter(kit):
    model = kit.model()
    model.peft_config = {}
    refused(lambda: ff.compile(model), "peft adapter", "merge_and_unload()")


def test_a_model_quantised_by_someone_else(kit):
    from types import SimpleNamespace

    model = kit.model()
    model.is_quantized = True
    model.config.quantization_config = SimpleNamespace(quant_method="bitsandbytes")
    refused(lambda: ff.compile(model), "quantised by bitsandbytes", "from_pretrained")


def test_a_weight_that_is_missing_or_has_another_shape(kit):
    spec, _ = kit.weights(kit.model())
    from flashformer.weights import read_weights

    state = kit.model().state_dict()
    tables = torch.zeros(4, 6), torch.zeros(4, 6)
    named = {"format": "fp32", "group": 32, "head": "fp32"}
    del state["model.layers.1.mlp.gate_proj.weight"]
    refused(
        lambda: read_weights(spec, state, tables, **named),
        "the model has no weight 'model.layers.1.mlp.gate_proj.weight'",
    )
    state["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(3, 48)
    refused(
        lambda: read_weights(spec, state, tables, **named),
        "model.layers.1.mlp.gate_proj.weight has the shape [3, 48], expected [76, 48]",
    )


def test_training_mode_is_warned_about(kit):
    model = kit.model().train()
    with pytest.warns(UserWarning, match=r"training mode; .* no dropout. Call model.eval\(\)"):
        ff.compile(model, threads=1, max_len=8)


OPTIONS = {
    "weights": ({"weights": "int5"}, ["weights must be one of fp32, bf16, int8, int4, not 'int5'"]),
    "head": ({"head": "fp8"}, ["fp32, bf16, int8, int4", "'fp8'"]),
    "group": ({"group_size": 100}, ["group_size must be one of 32, 64, 128, not 100"]),
    "cache": ({"cache": "int8"}, ["cache must be 'fp32' or 'bf16', not 'int8'"]),
    "max-len-0": ({"max_len": 0}, ["max_len must be a whole number of at least 1, not 0"]),
    "max-len-float": ({"max_len": 8.0}, ["max_len", "8.0"]),
    "max-len-true": ({"max_len": True}, ["max_len", "True"]),
    "threads-0": ({"threads": 0}, ["threads must be a whole number from 1 to 1024, not 0"]),
    "threads-many": ({"threads": 1025}, ["1 to 1024, not 1025"]),
    "threads-float": ({"threads": 2.0}, ["threads", "2.0"]),
    "backend": ({"backend": "tpu"}, ["backend must be one of auto, cpu, torch, cuda, not 'tpu'"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_compile(kit, case):
    options, words = OPTIONS[case]
    refused(lambda: ff.compile(kit.model(), **options), *words)


def test_a_length_beyond_the_model_s_is_warned_about(kit):
    with pytest.warns(UserWarning, match="max_len 600 is longer than the 512 positions"):
        ff.compile(kit.model(), threads=1, max_len=600)


# --------------------------------------------------------------------------------------------------
# Tokens and caches


TOKENS = {
    "over": ([3, 97], ["token 97 is out of range", "0 to 96"]),
    "under": ([-1], ["token -1 is out of range"]),
    "empty": ([], ["at least one", "[0]"]),
    "floats": ([1.5], ["whole numbers", "float32"]),
    "bools": ([True], ["whole numbers", "bool"]),
    "none": (None, ["whole numbers"]),
    "words": (["a"], ["whole numbers"]),
    "large": ([2**70], ["whole numbers"]),
    "batch": ([[1, 2]], ["list of at least one", "[1, 2]"]),
}


@pytest.mark.parametrize("case", TOKENS)
def test_tokens(pair, case):
    _, compiled = pair
    tokens, words = TOKENS[case]
    cache = compiled.new_cache()
    refused(lambda: compiled.feed(tokens, cache), *words)
    assert cache.length == 0


def test_a_token_out_of_range_in_every_call(pair):
    _, compiled = pair
    cache = compiled.new_cache()
    refused(lambda: compiled.step(97, cache), "token 97")
    refused(lambda: compiled.decode(cache, 97, steps=2), "token 97")
    for token in (None, "a", torch.tensor([1, 2]), 1.0):
        refused(lambda token=token: compiled.decode(cache, token, steps=2), "whole number")
    for end in ("a", 1.5):
        refused(lambda end=end: compiled.decode(cache, 1, steps=2, ends=[end]), "whole number")
    refused(lambda: compiled.generate([[97]], max_new_tokens=2), "token 97")
    refused(lambda: compiled.prefill(torch.tensor([97] * 20), cache), "token 97")


def test_caches_of_another_model_or_format(pair, kit):
    _, compiled = pair
    other = ff.compile(kit.model("qwen3"), threads=1, max_len=32, backend="cpu")
    half = ff.compile(kit.model(), weights="bf16", threads=1, max_len=32, backend="cpu")
    for foreign in (other.new_cache(), half.new_cache()):
        refused(
            lambda foreign=foreign: compiled.step(1, foreign),
            "another model or format",
            "new_cache()",
        )


def test_a_transformers_cache_where_ours_is_wanted(pair, kit):
    from transformers import DynamicCache

    _, compiled = pair
    prompt = torch.tensor([kit.tokens(4)])
    refused(
        lambda: compiled.generate(prompt, past_key_values=DynamicCache(), max_new_tokens=2),
        "DynamicCache", "from_transformers",
    )  # fmt: skip


@pytest.mark.parametrize("steps", [0, -3, 1.0, True, None])
def test_steps(pair, steps):
    _, compiled = pair
    refused(
        lambda: compiled.decode(compiled.new_cache(), 1, steps=steps), "steps must be", repr(steps)
    )


@pytest.mark.parametrize("temperature", [0, -1.0, 1e-300, float("inf"), float("nan")])
def test_temperatures(pair, temperature):
    _, compiled = pair
    refused(
        lambda: compiled.decode(compiled.new_cache(), 1, steps=1, temperature=temperature),
        "temperature must be at least 0.0001",
    )


def test_nothing_is_read_where_too_much_is_asked(pair):
    _, compiled = pair
    cache = compiled.new_cache()
    compiled.feed([1, 2, 3], cache)
    refused(lambda: compiled.decode(cache, 4, steps=30), "3 positions are filled and 30 more", "32")
    refused(lambda: compiled.feed([1] * 30, cache), "3 positions are filled and 30 more", "32")
    assert cache.length == 3
    assert len(compiled.decode(cache, 4, steps=29)) == 29


# --------------------------------------------------------------------------------------------------
# generate


PROMPTS = {
    "none": (None, {}, ["needs input_ids"]),
    "empty": (torch.zeros(1, 0, dtype=torch.int64), {}, ["[1, n] with n >= 1", "[1, 0]"]),
    "batch": (torch.ones(3, 4, dtype=torch.int64), {}, ["3 sequences", "one at a time"]),
    "3-d": (torch.ones(1, 1, 4, dtype=torch.int64), {}, ["[1, 1, 4]"]),
    "padded": (
        torch.ones(1, 4, dtype=torch.int64),
        {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
        ["attention_mask has zeros", "leave the padding out"],
    ),
    "mask-shape": (
        torch.ones(1, 4, dtype=torch.int64),
        {"attention_mask": torch.ones(1, 5)},
        ["[1, 5]", "[1, 4]"],
    ),
    "too-long": (
        torch.ones(1, 20, dtype=torch.int64),
        {"max_new_tokens": 13},
        ["20 tokens and 13 more", "max_len 32"],
    ),
    "longer-than-all": (torch.ones(1, 40, dtype=torch.int64), {}, ["40 tokens", "max_len 32"]),
    "none-left": (
        torch.ones(1, 20, dtype=torch.int64),
        {"max_length": 20},
        ["20 tokens", "none may follow", "max_new_tokens"],
    ),
    "misspelt": (
        torch.ones(1, 4, dtype=torch.int64),
        {"max_new_token": 3},
        ["'max_new_token'", "Did you mean 'max_new_tokens'?"],
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(pair, case):
    _, compiled = pair
    prompt, named, words = PROMPTS[case]
    refused(lambda: compiled.generate(prompt, **named), *words)


MODES = {
    "beams": ({"num_beams": 3}, ["num_beams is 3", "beam search"]),
    "sequences": ({"num_return_sequences": 2, "do_sample": True}, ["num_return_sequences is 2"]),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, ["penalty_alpha is 0.6", "contrastive"]),
    "lookup": ({"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens is 3", "prompt lookup"]),
    "dola": ({"dola_layers": "low"}, ["dola_layers is 'low'", "DoLa"]),
    "attentions": ({"output_attentions": True}, ["output_attentions", "attention weights"]),
    "hidden": ({"output_hidden_states": True}, ["output_hidden_states", "hidden states"]),
    "assistant": ({"assistant_model": object()}, ["assisted generation"]),
    "prefix": ({"prefix_allowed_tokens_fn": len}, ["prefix_allowed_tokens_fn"]),
}


@pytest.mark.parametrize("case", MODES)
def test_generation_modes(pair, kit, case):
    _, compiled = pair
    named, words = MODES[case]
    prompt = torch.tensor([kit.tokens(4)])
    refused(lambda: compiled.generate(prompt, max_new_tokens=3, **named), *words)


@pytest.mark.parametrize(
    "named", [{"temperature": 0.0}, {"temperature": -1.0}, {"seed": 1.5}, {"seed": "x"}]
)
@pytest.mark.parametrize("top_k", [0, 5])
def test_settings_of_sampling(pair, kit, named, top_k):
    _, compiled = pair
    prompt = torch.tensor([kit.tokens(4)])
    refused(
        lambda: compiled.generate(prompt, max_new_tokens=3, do_sample=True, top_k=top_k, **named),
        next(iter(named)),
    )


def test_weights_that_changed(kit):
    model = kit.model()
    compiled = ff.compile(model, threads=1, max_len=32, backend="cpu")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    refused(lambda: compiled.generate([[1]], max_new_tokens=1), "changed", "refresh()")


def test_numbers_that_overflow(kit):
    """Finite weights whose logits are not: an error, never a token."""
    model = kit.model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    compiled = ff.compile(model, threads=1, max_len=32, backend="cpu")
    for call in (
        lambda: compiled.generate([[1]], max_new_tokens=3),
        lambda: compiled.decode(compiled.new_cache(), 1, steps=3),
    ):
        refused(call, "a logit is NaN")


def test_the_caller_s_objects_are_left_as_they_were(pair, kit):
    from transformers import GenerationConfig

    _, compiled = pair
    prompt = torch.tensor([kit.tokens(4)])
    config = GenerationConfig(max_new_tokens=3, repetition_penalty=1.2)
    before, ids = copy.deepcopy(config.to_dict()), prompt.clone()
    compiled.generate(prompt, config)
    compiled.generate(prompt, config, top_k=3, do_sample=True)
    assert config.to_dict() == before
    assert torch.equal(prompt, ids)
