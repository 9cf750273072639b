"""The transformers model: caches, padding, generation, saving, training."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from path_attn.configuration_path_attn import (
    PaTHConfig,
    count_parameters,
    matched_intermediate_size,
)
from path_attn.modeling_path_attn import PaTHCache, PaTHForCausalLM, PaTHModel
from path_attn.reference import naive_path_attention
from tenfold_common.errors import UserError
from tenfold_common.testing import rms_ratio

ENCODINGS = ["path", "path_fox", "rope", "fox", "nope"]
TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_size": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make(encoding: str = "path", **options) -> PaTHForCausalLM:
    torch.manual_seed(1)
    config = PaTHConfig(**{**TINY, "position_encoding": encoding, **options})
    return PaTHForCausalLM(config).eval()


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = torch.randint(1, 40, (len(lengths), width))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


# -- configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_encoding": "pth"}, "Did you mean 'path'"),
        ({"gate_scale": "papr"}, "Did you mean 'paper'"),
        ({"backend": "trton"}, "Did you mean 'triton'"),
        ({"low_rnk_w": 3}, "no field 'low_rnk_w'. Did you mean 'low_rank_w'"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"window": 0}, "window is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"max_beta": 2.5}, r"max_beta is 2.5; it must lie in \(0, 2\]"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"position_encoding": "rope", "head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PaTHConfig(**{**TINY, **options})


def test_config_round_trip_keeps_none_and_everything_else(tmp_path):
    config = PaTHConfig(
        **TINY, low_rank_w=None, conv_size=None, window=5, softcap=3.0, position_encoding="rope",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PaTHConfig
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert (again.low_rank_w, again.conv_size, again.eos_token_id) == (None, None, None)
    assert again.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"low_rank_w": None, "conv_size": None, "num_reflections": 2, "qk_norm": True},
     {"tie_word_embeddings": True, "mlp_bias": True, "qkv_bias": True, "o_bias": True}],
)  # fmt: skip
def test_parameters_are_counted_and_matched(encoding, options):
    like = make(**options)
    width = matched_intermediate_size(make(encoding, **options).config, like.config)
    model = make(encoding, intermediate_size=width, **options)
    total = sum(p.numel() for p in model.parameters())
    assert total == count_parameters(model.config)
    reference = sum(p.numel() for p in like.parameters())
    assert abs(total - reference) <= 0.005 * reference


def test_only_attention_may_differ_when_matching():
    with pytest.raises(UserError, match="num_hidden_layers"):
        matched_intermediate_size(make().config, make(num_hidden_layers=3).config)


# -- forward ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_changes_nothing(encoding):
    model = make(encoding, num_reflections=2 if encoding == "path" else 1).double()
    ids, mask = left_padded(9, 30)
    mask = torch.nn.functional.pad(mask, (0, 4))
    ids = torch.nn.functional.pad(ids, (0, 4))
    logits = model(ids, attention_mask=mask).logits
    for row in range(2):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_cached_pieces_equal_the_full_forward(encoding):
    model = make(encoding, qk_norm=True).double()
    ids, mask = left_padded(98, 150)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        cache, start, outs = PaTHCache(model.config), 0, []
        for size in (1, 63, 2, 1, 1, 70, 9, 3):
            seen = start + size
            step = model(ids[:, start:seen], attention_mask=mask[:, :seen], past_key_values=cache)
            outs.append(step.logits)
            start = seen
    assert start == 150
    assert cache.get_seq_length() == 150
    real = mask.bool()
    torch.testing.assert_close(torch.cat(outs, 1)[real], full[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoding", ["path_fox", "rope"])
def test_packed_rows_by_cu_seqlens_and_by_position_ids(encoding):
    model = make(encoding).double()
    ids = torch.randint(1, 40, (1, 20))
    bounds = [0, 6, 7, 20]
    parts = [model(ids[:, a:b]).logits for a, b in pairwise(bounds)]
    positions = torch.cat([torch.arange(n) for n in (6, 1, 13)])[None]
    packed = {
        "cu_seqlens": {"cu_seqlens": torch.tensor(bounds)},
        "collator without positions": {"cu_seq_lens_q": torch.tensor(bounds)},
        "collator": {"cu_seq_lens_q": torch.tensor(bounds), "position_ids": positions},
        "positions": {"position_ids": positions},
    }
    for options in packed.values():
        logits = model(ids, **options).logits
        torch.testing.assert_close(logits, torch.cat(parts, 1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("gate_scale", ["paper", "fla"])
def test_model_follows_its_gate_convention_with_and_without_cache(gate_scale):
    model = make("path_fox", gate_scale=gate_scale).double()
    ids = torch.randint(1, 40, (2, 13))
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids)
        for block in model.model.layers:
            *inputs, _ = block.self_attn.project(block.input_layernorm(hidden))
            o = naive_path_attention(*inputs, gate_scale=gate_scale)
            hidden = hidden + block.self_attn.o_proj(o.flatten(2))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        expected = model.lm_head(model.model.norm(hidden))
        whole = model(ids, use_cache=False).logits
        cache = PaTHCache(model.config)
        parts = [
            model(ids[:, a:b], past_key_values=cache).logits
            for a, b in pairwise((0, 9, 10, 11, 13))
        ]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-11)


def test_the_past_does_not_see_the_future():
    model = make("path_fox")
    ids = torch.randint(1, 40, (1, 50))
    other = ids.clone()
    other[:, 31:] = torch.randint(1, 40, (1, 19))
    assert torch.equal(model(ids).logits[:, :31], model(other).logits[:, :31])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bfloat16_runs_and_stays_close(encoding):
    model = make(encoding, initializer_range=0.1)
    ids, mask = left_padded(70, 40)
    exact = model(ids, attention_mask=mask).logits
    low = model.to(torch.bfloat16)
    with torch.no_grad():
        logits = low(ids, attention_mask=mask).logits
        cache = PaTHCache(model.config)
        low(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
        last = low(ids[:, 60:], attention_mask=mask, past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16
    real = mask.bool()
    assert rms_ratio(logits[real].float(), exact[real]) < 0.03
    assert rms_ratio(last.float(), exact[:, 60:]) < 0.03


def test_hidden_states_tuples_and_logits_to_keep():
    model = make()
    ids = torch.randint(1, 40, (2, 8))
    out = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 8, 32)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)


def test_bad_input_is_named():
    model = make()
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(UserError, match="exactly one of"):
        model()
    with pytest.raises(UserError, match="attention_maps"):
        model(ids, output_attentions=True)
    with pytest.raises(UserError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(UserError, match="4 dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(UserError, match="cache_implementation is 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    cache = PaTHCache(model.config)
    with pytest.raises(UserError, match="negative number"):
        cache.crop(3)
    with pytest.raises(UserError, match="filled by PaTHAttention"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


# -- generation ---------------------------------------------------------------------------

GREEDY = {"do_sample": False, "max_new_tokens": 70}


@pytest.mark.parametrize("encoding", ["path", "path_fox", "rope"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=["greedy", "beams", "chunks"]
)
def test_left_padded_generation_equals_each_row_alone(encoding, options):
    model = make(encoding).double()
    ids, mask = left_padded(13, 20)
    out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    for row, real in enumerate(mask.bool()):
        alone = model.generate(ids[row : row + 1, real], **GREEDY, **options)[0]
        assert torch.equal(out[row, 20 - int(real.sum()) :], alone)


def test_cache_sampling_streaming_and_continuation():
    model = make("path_fox").double()
    ids, mask = left_padded(20, 20)
    greedy = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(greedy, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5}
    torch.manual_seed(0)
    first = model.generate(ids, attention_mask=mask, **settings)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(ids, attention_mask=mask, use_cache=False, **settings))
    assert first.shape == (6, 25)

    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Recorder()
    model.generate(ids[:1], streamer=streamer, **GREEDY)
    assert streamer.tokens == [*greedy[0].tolist(), -1]

    part = model.generate(ids[:1], do_sample=False, max_new_tokens=9, return_dict_in_generate=True)
    rest = model.generate(
        part.sequences, past_key_values=part.past_key_values, do_sample=False, max_new_tokens=61
    )
    assert torch.equal(rest, greedy[:1])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 12}, {"assistant": True}])
def test_assisted_decoding_takes_rejected_tokens_back(options):
    model = make().double()
    ids = torch.randint(1, 40, (1, 20))
    crops = []
    expected = model.generate(ids, **GREEDY)
    if options.get("assistant"):
        helper = make(num_hidden_layers=1).double()
        helper.load_state_dict(model.state_dict(), strict=False)
        options = {"assistant_model": helper}
    original = PaTHCache.crop

    def counted(self: PaTHCache, tokens_to_remove: int) -> None:
        crops.append(tokens_to_remove)
        original(self, tokens_to_remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PaTHCache, "crop", counted)
        out = model.generate(ids, **GREEDY, **options)
    assert torch.equal(out, expected)
    assert min(crops) < 0


def prefilled(model: PaTHForCausalLM, cache: PaTHCache, ids: torch.Tensor) -> PaTHCache:
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_recording_lets_assisted_decoding_take_back_100_tokens():
    model = make(num_hidden_layers=1).double()
    ids = torch.randint(1, 40, (1, 150))
    with pytest.raises(UserError, match="crop"):
        prefilled(model, PaTHCache(model.config), ids).crop(-100)
    cache = PaTHCache(model.config)
    cache.activate_past_recording()
    prefilled(model, cache, ids).crop(-100)
    with torch.no_grad():
        step = model(ids[:, 50:53], past_key_values=cache).logits
        expected = model(ids[:, :53], use_cache=False).logits[:, 50:]
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-11)


def test_an_assistant_that_drafts_more_than_the_default_is_taken_back():
    model = make(num_hidden_layers=1).double()
    helper = make(num_hidden_layers=1).double()
    torch.nn.init.normal_(helper.lm_head.weight)  # nearly all it drafts is rejected
    helper.generation_config.num_assistant_tokens = 90
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    ids = torch.randint(1, 40, (1, 20))
    settings = {"max_new_tokens": 100, "do_sample": False}
    removed = []

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
            return torch.full((1,), input_ids.shape[1] >= 24)

    original = PaTHCache.crop

    def counted(self: PaTHCache, tokens_to_remove: int) -> None:
        removed.append(-tokens_to_remove)
        original(self, tokens_to_remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PaTHCache, "crop", counted)
        criteria = StoppingCriteriaList([AfterFour()])
        out = model.generate(ids, assistant_model=helper, stopping_criteria=criteria, **settings)
    assert out.shape[1] >= 24
    assert torch.equal(out, model.generate(ids, **settings)[:, : out.shape[1]])
    assert max(removed) >= 80


@pytest.mark.parametrize("options", [{"keep_open": 100}, {"history": True}])
def test_reset_keeps_what_the_cache_was_made_with(options):
    model = make(num_hidden_layers=1).double()
    ids = torch.randint(1, 40, (1, 150))
    cache = prefilled(model, PaTHCache(model.config, **options), ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    prefilled(model, cache, ids).crop(-100)
    with torch.no_grad():
        step = model(ids[:, 50:53], past_key_values=cache).logits
        expected = model(ids[:, :53], use_cache=False).logits[:, 50:]
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-11)


def test_a_cache_refuses_another_kind_of_attention():
    layer = PaTHCache(make().config).layers[0]
    x = torch.zeros(1, 2, 3, 8)
    for call in (layer.update, layer.lazy_initialization):
        with pytest.raises(UserError, match="cannot serve another kind of attention"):
            call(x, x)


# -- saving and training ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_load_through_the_auto_classes(tmp_path, tied):
    model = make("path_fox", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    ids = torch.randint(1, 40, (1, 9))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is PaTHForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is PaTHModel
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_loss_follows_num_items_in_batch():
    model = make()
    ids = torch.randint(1, 40, (4, 12))
    labels = ids.clone()
    labels[0, 3:] = -100
    whole = model(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert model(ids, labels=labels).past_key_values is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradient_checkpointing_gives_equal_gradients(encoding):
    ids, mask = left_padded(20, 33)
    labels = ids.masked_fill(mask == 0, -100)
    grads = []
    for checkpointing in (False, True):
        model = make(encoding).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)
    with pytest.raises(UserError, match="gradient checkpointing"):
        model(ids, use_cache=True)


def test_compiled_training_forward_has_no_graph_break():
    model = make("path_fox", num_hidden_layers=1, block_size=32).train()
    ids, mask = left_padded(20, 33)
    labels = ids.masked_fill(mask == 0, -100)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses, grads = [], []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_short_training_learns_to_recall_the_previous_token():
    torch.manual_seed(0)
    model = make(initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        ids = torch.randint(1, 9, (32, 4)).repeat_interleave(2, 1)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.35  # ln(8) * 3 / 7 = 0.89 is the least possible, ln(8) = 2.08 is chance
