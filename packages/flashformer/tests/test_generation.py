"""`generate` says what transformers says, natively or through its processors."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import flashformer as ff
from flashformer import generation
from tenfold_common import UserError
from tenfold_common.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def pair(kit):
    """A transformers model and the same compiled."""
    model = kit.model("llama-biases", seed=4)
    return model, ff.compile(model, threads=2, max_len=128, backend="cpu")


@pytest.fixture
def prompt(kit):
    return torch.tensor([kit.tokens(7)])


@pytest.fixture
def through(monkeypatch):
    """Which of the two ways was taken."""
    taken = []
    for name in ("_natively", "_by_transformers"):
        made = getattr(generation, name)

        def noted(*args, made=made, name=name):
            taken.append(name)
            return made(*args)

        monkeypatch.setattr(generation, name, noted)
    return taken


GREEDY = {
    # case: (arguments, whether it is done natively)
    "plain": ({}, True),
    "none-sampled": ({"do_sample": False, "use_cache": True}, True),
    "repetition": ({"repetition_penalty": 1.7}, False),
    "ngrams": ({"no_repeat_ngram_size": 2}, False),
    "bad-words": ({"bad_words_ids": [[t] for t in range(0, 97, 3)] + [[7, 10]]}, False),
    "at-least": ({"min_new_tokens": 12, "eos_token_id": list(range(0, 97, 2))}, False),
    "at-least-in-all": ({"min_length": 15, "eos_token_id": list(range(0, 97, 2))}, False),
    "end": ({"eos_token_id": 30}, True),
    "ends": ({"eos_token_id": list(range(0, 97, 7))}, True),
    "suppressed": ({"suppress_tokens": list(range(40))}, False),
    "forced-end": ({"forced_eos_token_id": 3}, False),
    "bias": ({"sequence_bias": [[[20], 9.0], [[21], -9.0]]}, False),
    "renormalised": ({"renormalize_logits": True}, False),
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_tokens_equal_transformers(pair, prompt, through, case):
    model, compiled = pair
    named, native = GREEDY[case]
    wanted = model.generate(prompt, max_new_tokens=30, **copy.deepcopy(named))
    found = compiled.generate(prompt, max_new_tokens=30, **named)
    assert torch.equal(found, wanted)
    assert found.dtype == torch.int64
    assert through == ["_natively" if native else "_by_transformers"]


def test_the_cases_change_something(pair, prompt):
    """A processor that were left out would show."""
    _, compiled = pair
    plain = compiled.generate(prompt, max_new_tokens=30)
    same = [
        case
        for case, (named, _) in GREEDY.items()
        if torch.equal(compiled.generate(prompt, max_new_tokens=30, **named), plain)
    ]
    assert set(same) <= {"plain", "none-sampled", "renormalised", "end"}


@pytest.mark.parametrize("named", [{"max_length": 18}, {"max_new_tokens": 3, "max_length": 99}])
def test_lengths_mean_what_they_mean_in_transformers(pair, prompt, named):
    model, compiled = pair
    assert torch.equal(compiled.generate(prompt, **named), model.generate(prompt, **named))


def test_without_a_length_there_are_twenty_new_tokens_as_in_transformers(pair, prompt):
    model, compiled = pair
    with pytest.warns(UserWarning, match="model-agnostic default"):
        wanted = model.generate(prompt)
    found = compiled.generate(prompt)
    assert torch.equal(found, wanted)
    assert found.shape == (1, 27)


def test_calling_the_model_is_generating(pair, prompt):
    _, compiled = pair
    assert torch.equal(
        compiled(prompt, max_new_tokens=5), compiled.generate(prompt, max_new_tokens=5)
    )


def test_a_list_and_a_row_are_prompts_too(pair, prompt):
    _, compiled = pair
    wanted = compiled.generate(prompt, max_new_tokens=5)
    assert torch.equal(compiled.generate(prompt[0], max_new_tokens=5), wanted)
    assert torch.equal(compiled.generate(prompt.tolist(), max_new_tokens=5), wanted)
    mask = torch.ones_like(prompt)
    assert torch.equal(compiled.generate(prompt, attention_mask=mask, max_new_tokens=5), wanted)


def test_settings_of_a_generation_config_and_of_the_model(pair, prompt):
    model, compiled = pair
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.5)
    wanted = model.generate(prompt, config)
    assert torch.equal(compiled.generate(prompt, config), wanted)
    assert wanted.shape == (1, 16)
    own = copy.copy(compiled)
    own.generation_config = GenerationConfig(max_new_tokens=4)
    assert own.generate(prompt).shape == (1, 11)
    assert compiled.generation_config.max_new_tokens is None  # and nothing was written into it


# --------------------------------------------------------------------------------------------------
# Stopping, streaming, scores


class After(StoppingCriteria):
    """Stops once a token was seen so many times."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_) -> Any:
        return torch.full((1,), input_ids.shape[1] >= self.length)


def test_stopping_criteria(pair, prompt, through):
    model, compiled = pair
    for criteria in (After(13), MaxLengthCriteria(12)):
        wanted = model.generate(
            prompt, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([criteria])
        )
        found = compiled.generate(
            prompt, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([criteria])
        )
        assert torch.equal(found, wanted)
        assert found.shape[1] < 37
    assert set(through) == {"_by_transformers"}


class Favour(LogitsProcessor):
    """Adds to the logits of one token."""

    def __call__(self, input_ids, scores) -> Any:
        scores = scores.clone()
        scores[:, input_ids.shape[1] % 97] += 30.0
        return scores


def test_logits_processors(pair, prompt):
    model, compiled = pair
    favour = LogitsProcessorList([Favour()])
    wanted = model.generate(prompt, max_new_tokens=6, logits_processor=favour)
    found = compiled.generate(prompt, max_new_tokens=6, logits_processor=favour)
    assert torch.equal(found, wanted)
    assert found[0, 7:].tolist() == [7, 8, 9, 10, 11, 12]


class Heard:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize(
    "named", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 0, "seed": 3}]
)
@pytest.mark.parametrize("new", [1, 2, 11])
def test_streamers_get_the_prompt_and_then_the_tokens_in_order(pair, prompt, named, new):
    _, compiled = pair
    heard = Heard()
    found = compiled.generate(prompt, max_new_tokens=new, streamer=heard, **named)
    assert torch.equal(heard.parts[0], prompt)
    assert torch.cat([p.reshape(-1) for p in heard.parts[1:]]).tolist() == found[0, 7:].tolist()
    assert len(heard.parts) == 1 + new
    assert heard.ended == 1
    assert torch.equal(found, compiled.generate(prompt, max_new_tokens=new, **named))


def test_a_text_streamer_prints_the_text(pair, prompt, capsys):
    from tenfold_common.tiny import byte_tokenizer

    model, compiled = pair
    printed = []
    for each in (model, compiled):
        streamer = TextStreamer(byte_tokenizer(), skip_prompt=True)
        each.generate(prompt, max_new_tokens=20, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0]) >= 10


def test_streaming_stops_at_an_end(pair, prompt):
    _, compiled = pair
    plain = compiled.generate(prompt, max_new_tokens=30)[0, 7:].tolist()
    heard = Heard()
    compiled.generate(prompt, max_new_tokens=30, streamer=heard, eos_token_id=plain[6])
    assert [int(p) for p in heard.parts[1:]] == plain[: plain.index(plain[6]) + 1]


@pytest.mark.parametrize("named", [{}, {"repetition_penalty": 1.5}])
def test_scores_and_logits_on_request(pair, prompt, named):
    model, compiled = pair
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs = model.generate(prompt, max_new_tokens=8, **asked, **named)
    ours = compiled.generate(prompt, max_new_tokens=8, **asked, **named)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        a, b = torch.cat(ours[name]), torch.cat(theirs[name])
        assert a.shape == (8, 97)
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize(
    "named",
    [
        {},  # not nothing: transformers takes the best 50 where top_k is not given
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 2.0},
        {"typical_p": 0.8},
        {"top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2},
    ],
)
def test_sampling_through_processors_draws_what_transformers_draws(pair, prompt, through, named):
    model, compiled = pair
    state = torch.get_rng_state()
    torch.manual_seed(11)
    wanted = model.generate(prompt, max_new_tokens=25, do_sample=True, **named)
    torch.set_rng_state(state)
    found = compiled.generate(prompt, max_new_tokens=25, do_sample=True, seed=11, **named)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.get_rng_state(), state)  # a seed leaves the generator alone
    other = compiled.generate(prompt, max_new_tokens=25, do_sample=True, seed=12, **named)
    assert not torch.equal(other, found)
    assert through[0] == "_by_transformers"


def test_native_sampling_is_reproducible_and_heeds_the_temperature(pair, prompt, through):
    _, compiled = pair

    def sampled(seed=None, temperature=1.0):
        named = {"do_sample": True, "top_k": 0, "temperature": temperature}
        return compiled.generate(prompt, max_new_tokens=40, seed=seed, **named)[0, 7:].tolist()

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    greedy = compiled.generate(prompt, max_new_tokens=40)[0, 7:].tolist()
    assert sampled(1, 1e-4) == greedy
    assert len(set(sampled(1, 50.0))) > 25
    torch.manual_seed(5)
    first = sampled()
    assert sampled() != first  # each call draws anew
    torch.manual_seed(5)
    assert sampled() == first  # from torch's generator
    assert set(through) == {"_natively"}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_native_draw_depends_on_its_place_alone(pair, prompt, streamed):
    _, compiled = pair
    named = {"do_sample": True, "top_k": 0, "seed": 8, "temperature": 1.3}
    whole = compiled.generate(prompt, max_new_tokens=50, **named)
    part = compiled.generate(prompt, max_new_tokens=17, **named)
    more = {"streamer": Heard()} if streamed else {}
    rest = compiled.generate(part, max_new_tokens=33, **more, **named)
    assert torch.equal(rest, whole)


# --------------------------------------------------------------------------------------------------
# Prompts and caches


def test_long_prompts_are_read_by_the_source_and_short_ones_fed(kit, pair, monkeypatch):
    model, compiled = pair
    read = []
    forward = type(model).forward

    def noted(self, input_ids=None, **named):
        read.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **named)

    monkeypatch.setattr(type(model), "forward", noted)
    short, long = kit.tokens(16), kit.tokens(60)
    compiled.generate(torch.tensor([short]), max_new_tokens=3)
    assert read == []
    found = compiled.generate(torch.tensor([long]), max_new_tokens=30)
    assert read == [60]
    cache = compiled.new_cache()
    compiled.feed(long[:-1], cache)
    fed = compiled.decode(cache, long[-1], steps=30)
    assert found[0, 60:].tolist() == fed.tolist()


@pytest.mark.parametrize(
    "kind", ["mistral", "qwen2-window", "smollm3-window", "phi3-partial", "qwen3"]
)
def test_prompts_longer_than_the_window_are_read_whole(kit, kind):
    model = kit.model(kind)
    compiled = ff.compile(model, threads=1, max_len=128, backend="cpu")
    prompt = torch.tensor([kit.tokens(50)])
    found = compiled.generate(prompt, max_new_tokens=30)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=30))
    cache = compiled.new_cache()
    compiled.prefill(prompt[0], cache)
    other = compiled.new_cache()
    compiled.feed(prompt[0], other)
    for number in range(compiled.spec.layers):
        for a, b in zip(cache.layer(number), other.layer(number), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "named", [{}, {"repetition_penalty": 1.4}, {"do_sample": True, "top_k": 0, "seed": 2}]
)
def test_going_on_from_a_cache(kit, pair, named):
    _, compiled = pair
    prompt = torch.tensor([kit.tokens(20)])
    wanted = compiled.generate(prompt, max_new_tokens=30, **named)
    cache = compiled.new_cache()
    part = compiled.generate(prompt, max_new_tokens=12, past_key_values=cache, **named)
    assert cache.length == 31  # all but the last token
    found = compiled.generate(part, max_new_tokens=18, past_key_values=cache, **named)
    assert torch.equal(found, wanted)
    assert cache.length == 49


def test_a_cache_that_holds_the_whole_prompt_is_refused(kit, pair):
    _, compiled = pair
    prompt = torch.tensor([kit.tokens(10)])
    cache = compiled.new_cache()
    compiled.feed(prompt[0], cache)
    with pytest.raises(UserError, match="holds 10 positions and input_ids 10"):
        compiled.generate(prompt, max_new_tokens=3, past_key_values=cache)
    assert compiled.generate(prompt, max_new_tokens=3, past_key_values=cache.crop(9)).shape == (
        1,
        13,
    )


def test_the_last_place_of_the_room_can_be_used_and_none_beyond(kit, pair):
    _, compiled = pair
    prompt = torch.tensor([kit.tokens(100)])
    found = compiled.generate(prompt, max_new_tokens=28)
    assert found.shape == (1, 128)
    with pytest.raises(UserError, match=r"has 100 tokens and 29 more are asked for.*max_len 128"):
        compiled.generate(prompt, max_new_tokens=29)
    cache = compiled.new_cache(110)
    with pytest.raises(UserError, match="room for 110"):
        compiled.generate(prompt, max_new_tokens=20, past_key_values=cache)
    assert cache.length == 0
    for named in ({}, {"repetition_penalty": 1.1}):
        full = compiled.new_cache(111)
        assert compiled.generate(
            prompt, max_new_tokens=12, past_key_values=full, **named
        ).shape == (1, 112)


def test_ctrl_c_between_bursts_leaves_a_cache_that_can_be_used(pair, prompt):
    _, compiled = pair
    cache = compiled.new_cache()

    class Interrupted(Heard):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled.generate(prompt, max_new_tokens=30, streamer=Interrupted(), past_key_values=cache)
    whole = compiled.generate(prompt, max_new_tokens=30)
    found = compiled.generate(whole[:, : cache.length + 1], max_new_tokens=5, past_key_values=cache)
    assert torch.equal(found, whole[:, : found.shape[1]])


def test_every_backend_generates_the_same(kit, prompt):
    model = kit.model("qwen3")
    compiled = [
        ff.compile(model, threads=2, max_len=64, backend=backend) for backend in ("cpu", "torch")
    ]
    for named in ({}, {"do_sample": True, "top_k": 0, "seed": 1}, {"no_repeat_ngram_size": 2}):
        a, b = (m.generate(prompt, max_new_tokens=20, **named) for m in compiled)
        assert torch.equal(a, b)


def test_stop_strings_need_a_tokenizer_and_end_the_text():
    tokenizer = byte_tokenizer()
    source = tiny_llama(len(tokenizer), max_position_embeddings=128)
    fast = ff.compile(source, backend="cpu")
    ids = tokenizer("abc", return_tensors="pt").input_ids
    free = fast.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[])
    texts = [tokenizer.decode(token) for token in free[0, 10:, None]]
    stop = next(text for text in texts if text.isascii() and text.isprintable())
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    found = fast.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
    theirs = source.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert torch.equal(found, theirs)
    assert found.shape[1] < free.shape[1]
