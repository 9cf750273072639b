import math
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_common import (
    Generation,
    MissingDependencyError,
    Score,
    ScriptedModel,
    ServerModel,
    TextModel,
    TransformersModel,
    UserError,
    VLLMModel,
    byte_tokenizer,
    load_text_model,
    tiny_llama,
    tiny_qwen,
    word_tokenizer,
)
from tenfold_common.lm.base import first_stop, stream_seed
from tenfold_common.lm.prefixes import Prefixes, past_length
from tenfold_common.lm.transformers_model import _Chooser

BYTES = byte_tokenizer()
LLAMA = tiny_llama(259)
CHAT = [{"role": "user", "content": "hi"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "so"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def model():
    return TransformersModel(LLAMA, BYTES, batch_size=3)


def chatty():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def plain_logprobs(model, ids, first):
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [rows[k - 1, ids[k]].item() for k in range(first, len(ids))]


START = "The same start for all, "
PREFIXES = [START + "then", START, START + "then something that goes on", START + "but", "T", START]
TEXTS = [["a", "bcd"], ["x" * 33, "no"], ["q"], [], ["hello"], ["no", "wörld", "y"]]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
    config = GPT2Config(vocab_size=259, eos_token_id=2, initializer_range=0.2, **sizes)
    return GPT2LMHeadModel(config).eval()


def with_states():
    """Layers of attention and layers whose cache is no keys and values."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        **{"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "full_attn_idxs": [1]},
        **{"initializer_range": 0.2, "eos_token_id": 2},
    )
    return Lfm2ForCausalLM(config).eval()


NETWORKS = {
    "llama": tiny_llama(259, initializer_range=0.2),
    "qwen": tiny_qwen(259, initializer_range=0.2),
    "sliding": tiny_qwen(
        **{"vocab_size": 259, "use_sliding_window": True, "sliding_window": 8},
        **{"max_window_layers": 1, "initializer_range": 0.2},
    ),
    "learned positions": gpt2(),
    "states": with_states(),
}


def watch(network, monkeypatch):
    """The shapes of what a network is given and gives from now on, run by run."""
    seen = []
    plain = network.forward

    def forward(*args, **named):
        out = plain(*args, **named)
        seen.append((tuple(named["input_ids"].shape), out.logits.shape[1]))
        return out

    forward.__signature__ = __import__("inspect").signature(plain)
    monkeypatch.setattr(network, "forward", forward)
    return seen


# --- sampling -------------------------------------------------------------------------------------


def test_greedy_equals_a_plain_loop(model):
    prompts = ["a", "hello there", "some longer prompt than the rest", "b"]
    expected = []
    for prompt in prompts:
        ids = BYTES(prompt)["input_ids"]
        for _ in range(9):
            with torch.no_grad():
                ids = [*ids, LLAMA(torch.tensor([ids])).logits[0, -1].argmax().item()]
        expected.append(BYTES.decode(ids)[len(prompt) :])
    found = model.sample(prompts, temperature=0, max_tokens=9, n=2)
    assert [[g.text for g in row] for row in found] == [[text, text] for text in expected]
    assert all(g.finish_reason == "length" and g.tokens == 9 for row in found for g in row)


def test_samples_do_not_depend_on_batches_and_come_in_order(model):
    prompts = ["x" * length for length in (7, 1, 30, 2, 7)]
    named = {"n": 3, "max_tokens": 8, "seed": 5}
    found = model.sample(prompts, **named)
    assert found == TransformersModel(LLAMA, BYTES, batch_size=64).sample(prompts, **named)
    assert found == TransformersModel(LLAMA, BYTES, batch_size=1).sample(prompts, **named)
    assert found == model.sample(prompts, **named)
    assert found != model.sample(prompts, **{**named, "seed": 6})
    assert found[:2] == model.sample(prompts[:2], **named)
    assert len({g.text for row in found for g in row}) == 15
    assert [row[:2] for row in found] == model.sample(prompts, **{**named, "n": 2})


def test_sampled_frequencies_are_those_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    count = 20_000
    stream = Random(0)
    draws = [[stream.random()] for _ in range(count)]
    rows = logits.expand(count, -1)

    def frequencies(temperature, top_p):
        chooser = _Chooser(0, draws, temperature, top_p)
        chosen = chooser(torch.zeros(count, 0), rows).argmax(-1)
        return torch.bincount(chosen, minlength=5) / count

    for temperature in (1.0, 0.5, 3.0):
        expected = (logits / temperature).softmax(-1)
        assert (frequencies(temperature, 1.0) - expected).abs().max() < 0.012
    # By hand: the softmax is 0.0871, 0.2369, 0.0321, 0.6439; the first two of it hold 0.8808.
    kept = torch.tensor([0.0, 0.26894, 0.0, 0.73106, 0.0])
    assert (frequencies(1.0, 0.88) - kept).abs().max() < 0.012
    assert frequencies(1.0, 0.89)[0] > 0.05
    assert frequencies(1.0, 0.64)[3] == 1
    assert frequencies(1e-30, 1.0)[3] == 1


def test_the_draw_at_either_end_picks_a_token_with_a_chance():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for draw, token in ((0.0, 1), (0.4999, 1), (0.5001, 2), (1 - 2**-53, 2)):
        for top_p in (1.0, 0.999):
            chosen = _Chooser(0, [[draw]], 1.0, top_p)(torch.zeros(1, 0), logits)
            assert chosen.argmax(-1).item() == token


def test_top_p_near_zero_is_greedy(model):
    greedy = model.sample(["abc", "d"], temperature=0, max_tokens=6)
    assert model.sample(["abc", "d"], top_p=1e-9, max_tokens=6) == greedy


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), stop=st.sampled_from(["e", "no", "yes no", "c d"]))
def test_stop_strings_cut_what_would_have_come(seed, stop):
    tokenizer = word_tokenizer(["yes", "no", "c", "d", "e"])
    model = TransformersModel(tiny_qwen(len(tokenizer), hidden=32), tokenizer)
    named = {"n": 2, "max_tokens": 30, "seed": seed}
    for free, cut in zip(
        model.sample(["yes", "no c d"], **named),
        model.sample(["yes", "no c d"], stop=["zz", stop], **named),
        strict=True,
    ):
        for whole, part in zip(free, cut, strict=True):
            end = first_stop(whole.text, [stop])
            if end is None:
                assert part == whole
            else:
                words = (whole.text[: end + len(stop)]).split()
                assert (part.text, part.finish_reason) == (whole.text[:end], "stop")
                # Special tokens in between have no text, but they were generated.
                assert len(words) <= part.tokens <= whole.tokens


def test_end_token_ends_a_reply_and_is_counted():
    tokenizer = word_tokenizer(["a", "b"])
    network = tiny_llama(len(tokenizer), hidden=32)
    model = TransformersModel(network, tokenizer)
    replies = model.sample(["a"], n=40, max_tokens=20)[0]
    ended = [g for g in replies if g.finish_reason == "stop"]
    assert len(ended) > 30
    assert all("eos" not in g.text for g in replies)
    assert any(g.tokens == 1 and g.text == "" for g in ended)
    network.generation_config.eos_token_id = [2, 5]  # b ends a reply too
    both = TransformersModel(network, tokenizer).sample(["a"], n=40, max_tokens=20)[0]
    assert all("b" not in g.text for g in both)


def test_special_tokens_are_kept_if_asked():
    tokenizer = word_tokenizer(["a"], ["<think>"])
    network = tiny_llama(len(tokenizer), hidden=32)
    kept = TransformersModel(network, tokenizer, skip_special_tokens=False)
    texts = [g.text for g in kept.sample(["a"], n=30, max_tokens=8)[0]]
    assert any("<think>" in text for text in texts)
    assert not any("<eos>" in text for text in texts)
    gone = TransformersModel(network, tokenizer).sample(["a"], n=30, max_tokens=8)[0]
    assert not any("<" in g.text for g in gone)


def test_settings_of_the_model_are_left_aside_and_restored():
    network = tiny_llama(259)
    free = TransformersModel(network, BYTES).sample(["ab"], max_tokens=20, temperature=0)
    network.generation_config.repetition_penalty = 50.0
    network.generation_config.max_length = 3
    network.generation_config.do_sample = True
    config = network.generation_config
    network.train()
    network.model.norm.eval()
    state = torch.random.get_rng_state()
    model = TransformersModel(network, BYTES)
    assert model.sample(["ab"], max_tokens=20, temperature=0) == free
    model.score("ab", ["c"])
    model.sample(["abc", "abd"], max_tokens=2, n=3)
    assert network.generation_config is config
    assert network.training
    assert not network.model.norm.training
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UserError, match="context"):
        model.sample(["a" * 600])
    assert network.training


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("llama", {"n": 5, "max_tokens": 6, "temperature": 0.7}),
        ("llama", {"n": 3, "max_tokens": 30}),  # up to the context, at other numbers of tokens
        ("llama", {"n": 3, "max_tokens": 5, "temperature": 0}),
        ("qwen", {"n": 4, "max_tokens": 10, "top_p": 0.6, "stop": ["a", "<"]}),
        ("sliding", {"n": 3, "max_tokens": 6}),
        ("learned positions", {"n": 3, "max_tokens": 6}),
        ("states", {"n": 3, "max_tokens": 6}),
    ],
    ids=["temperature", "context", "greedy", "stop", "sliding", "learned positions", "states"],
)
def test_shared_prompts_give_the_tokens_of_rows_run_one_by_one(name, named, monkeypatch):
    prompts = [START + "then", START, "T", START + "some more", START]
    alone = TransformersModel(NETWORKS[name], BYTES, batch_size=1, context=44)
    monkeypatch.setattr(alone, "_shared_prompts", lambda prompts: None)
    wanted = alone.sample(prompts, seed=3, **named)
    for batch_size in (1, 4, 64):
        model = TransformersModel(NETWORKS[name], BYTES, batch_size=batch_size, context=44)
        assert model.sample(prompts, seed=3, **named) == wanted


def test_a_prompt_is_run_once_for_all_its_samples(monkeypatch):
    network = NETWORKS["llama"]
    seen = watch(network, monkeypatch)
    model = TransformersModel(network, BYTES, batch_size=4)
    monkeypatch.setattr(model, "_ends", frozenset())
    model.sample(["p" * 50], n=10, max_tokens=2)
    step = ((4, 1), 1)
    assert seen == [((1, 49), 1), step, step, step, step, ((2, 1), 1), ((2, 1), 1)]
    seen.clear()
    prompts = ["p" * 50 + rest for rest in ("ab", "cdefg", "ab")]
    model.sample(prompts, n=2, max_tokens=1)  # two of the prompts are equal
    assert seen == [((1, 50), 1), ((2, 4), 1), step, ((2, 1), 1)]
    seen.clear()
    model.sample(["abcd", "xyz"], max_tokens=1)  # nothing to share
    assert seen == [((2, 4), 1)]
    model.sample(["a", "b"], n=2, max_tokens=1)  # nothing before the last token
    assert seen[1:] == [((4, 1), 1)]


def test_only_the_pasts_of_the_call_before_are_held(model, monkeypatch):
    rows = [BYTES(START + rest)["input_ids"] for rest in "ab"]
    prefixes = Prefixes(model._forward, rows, batch_size=2)
    seen = watch(LLAMA, monkeypatch)
    for asked, runs in ((rows[:1], 1), (rows, 2), (rows[1:] * 3, 2), (rows[:1], 3)):
        pasts = prefixes.pasts(asked)
        assert len(seen) == runs
        assert [past_length(past) for past in pasts] == [len(START) + 1] * len(asked)


def test_what_was_run_before_is_forgotten_when_the_weights_change():
    network = tiny_llama(259, initializer_range=0.2)
    other = tiny_llama(259, initializer_range=0.2, seed=1)
    model = TransformersModel(network, BYTES)
    named = {"n": 4, "max_tokens": 8}
    before = model.sample(["hello"], **named), model.score("hello", ["a", "b"])
    network.load_state_dict(other.state_dict())
    after = model.sample(["hello"], **named), model.score("hello", ["a", "b"])
    fresh = TransformersModel(other, BYTES)
    assert after == (fresh.sample(["hello"], **named), fresh.score("hello", ["a", "b"]))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_dropout_is_off_during_a_call():
    network = tiny_llama(259, attention_dropout=0.5)
    model = TransformersModel(network, BYTES)
    calm = model.score("ab", ["cde"])
    shared = model.sample(["abc"], n=4, max_tokens=5)
    network.train()
    assert model.score("ab", ["cde"]) == calm
    assert model.sample(["abc"], n=4, max_tokens=5) == shared


def test_the_context_is_respected(model):
    with pytest.raises(UserError, match=r"has 600 tokens .* context is 512 tokens"):
        model.sample(["a", "a" * 600])
    with pytest.raises(UserError, match=r"512 tokens and needs room for 1 more"):
        model.sample(["a" * 512])
    found = model.sample(["a" * 508, "b", "a" * 510], max_tokens=6, temperature=0)
    assert [row[0].tokens for row in found] == [4, 6, 2]
    assert found[1] == model.sample(["b"], max_tokens=6, temperature=0)[0]
    assert len(model.score("a" * 500, ["b" * 12])[0].logprobs) == 12
    with pytest.raises(UserError, match=r"has 513 tokens, but the model's context is 512"):
        model.score("a" * 500, ["b" * 13])
    small = TransformersModel(LLAMA, BYTES, context=10)
    with pytest.raises(UserError, match="context is 10"):
        small.sample(["a" * 10])


def test_nothing_in_nothing_out(model):
    assert model.sample([]) == []
    assert model.score("a", []) == []


def test_messages_go_through_the_chat_template():
    tokenizer = chatty()
    model = TransformersModel(LLAMA, tokenizer)
    named = {"temperature": 0, "max_tokens": 5}
    spelled = ["[user]hi<eos>[assistant]", "[user]hi<eos>[assistant]so"]
    wanted = model.sample(spelled, **named)
    assert model.sample([CHAT, PREFILLED], **named) == wanted
    begun = [*CHAT, {"role": "assistant", "content": ""}]
    assert model.sample([begun], **named) == wanted[:1]
    assert model.score(PREFILLED, ["me"]) == model.score(spelled[1], ["me"])
    assert model.score(CHAT, ["me"]) == model.score(spelled[0], ["me"])


def test_template_problems_are_named(model):
    with pytest.raises(UserError, match="no chat template"):
        model.sample([CHAT])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        TransformersModel(LLAMA, tokenizer).sample([CHAT])
    tokenizer.chat_template = "{% if loud %}A{% else %}B{% endif %}"
    loud = TransformersModel(LLAMA, tokenizer, template_options={"loud": True})
    assert loud.sample([CHAT], max_tokens=3) == model.sample(["A"], max_tokens=3)


def test_special_tokens_are_not_added_twice():
    from tokenizers.processors import TemplateProcessing

    tokenizer = chatty()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("a")["input_ids"][::2] == [1, 2]
    encode = TransformersModel(LLAMA, tokenizer)._tokens.encode
    assert encode("a") == [1, *BYTES("a")["input_ids"]]  # begun, and not closed
    assert encode("<bos>a") == encode("a")
    assert encode("a<eos>") == [*encode("a"), 2]
    assert encode(CHAT) == BYTES("[user]hi<eos>[assistant]")["input_ids"]
    joint = TransformersModel(LLAMA, tokenizer).score("a", ["bc"])[0]
    assert joint.logprobs == pytest.approx(plain_logprobs(LLAMA, encode("abc"), 2), abs=1e-4)
    assert joint.offsets == ((0, 1), (1, 2))
    assert len(TransformersModel(LLAMA, tokenizer).score("", ["bc"])[0].logprobs) == 2


@pytest.mark.parametrize(
    ("prompts", "named", "message"),
    [
        ("abc", {}, "put the one prompt in a list"),
        ([""], {}, "has no tokens"),
        ([3], {}, r"prompts\[0\] must be a text"),
        (["a", []], {}, r"prompts\[1\] must be a text or a list"),
        ([[{"role": "user"}]], {}, "a message is a dict with the texts role and content"),
        (["a"], {"n": 0}, "n must be an integer of at least 1, not 0"),
        (["a"], {"max_tokens": 1.5}, "max_tokens must be an integer"),
        (["a"], {"temperature": -1}, "temperature must be"),
        (["a"], {"temperature": math.nan}, "temperature must be"),
        (["a"], {"top_p": 0}, "top_p must be above 0"),
        (["a"], {"top_p": 1.1}, "top_p must be above 0"),
        (["a"], {"stop": "x"}, "stop must be a list"),
        (["a"], {"stop": [""]}, "none of them empty"),
        (["a"], {"seed": -1}, "seed must be an integer"),
        (["a"], {"seed": True}, "seed must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(model, prompts, named, message):
    with pytest.raises(UserError, match=message):
        model.sample(prompts, **named)


def test_logits_that_are_no_numbers_are_refused():
    network = tiny_llama(259)
    with torch.no_grad():
        network.lm_head.weight.fill_(math.nan)
    model = TransformersModel(network, BYTES)
    for temperature in (0, 1):
        with pytest.raises(UserError, match="NaN"):
            model.sample(["a"], temperature=temperature)
    with pytest.raises(UserError, match="NaN"):
        model.score("a", ["b"])


# --- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize(
    "network",
    [
        LLAMA,
        tiny_qwen(259, family="qwen2"),
        tiny_qwen(259, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ],
    ids=["llama", "qwen2", "sliding"],
)
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_scores_equal_whole_forwards(network, batch_size, length):
    prefix = "The answer is certainly this one, I think"[-length:]
    texts = ["a", "bcd", "wörld of many bytes", "x" * 33, "bcd", "no"]
    scores = TransformersModel(network, BYTES, batch_size=batch_size).score(prefix, texts)
    for text, score in zip(texts, scores, strict=True):
        expected = plain_logprobs(network, BYTES(prefix + text)["input_ids"], length)
        assert score.logprobs == pytest.approx(expected, abs=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-3)
        assert len(score.offsets) == len(text.encode())


def test_offsets_are_characters_of_the_continuation(model):
    [score] = model.score("ü: ", ["aöb"])
    assert score.offsets == ((0, 1), (1, 2), (1, 2), (2, 3))


def test_a_token_across_the_boundary_is_scored_whole(merging_tokenizer):
    network = tiny_llama(len(merging_tokenizer))
    model = TransformersModel(network, merging_tokenizer)
    prefix, texts = "the hel", ["lo world", "p", " fox"]
    alone = merging_tokenizer(prefix)["input_ids"]
    scores = model.score(prefix, texts)
    firsts = []
    for text, score in zip(texts, scores, strict=True):
        both = merging_tokenizer(prefix + text, return_offsets_mapping=True)
        ids = both["input_ids"]
        first = next(k for k, token in enumerate(ids) if k == len(alone) or token != alone[k])
        firsts.append(first)
        assert score.logprobs == pytest.approx(plain_logprobs(network, ids, first), abs=1e-4)
        spans = [(max(0, a - 7), max(0, b - 7)) for a, b in both["offset_mapping"][first:]]
        assert list(score.offsets) == spans
        assert score.offsets[-1][1] == len(text)
    assert firsts[0] < len(alone) == firsts[1]  # " hello" is one token, so " hel" went with it
    assert scores[0].offsets[0] == (0, 2)


def test_the_prefix_is_run_once_and_without_its_logits(model, monkeypatch):
    seen = []
    plain = LLAMA.forward

    def forward(*args, **named):
        out = plain(*args, **named)
        seen.append((tuple(named["input_ids"].shape), tuple(out.logits.shape[:2])))
        return out

    forward.__signature__ = __import__("inspect").signature(plain)
    monkeypatch.setattr(LLAMA, "forward", forward)
    model.score("p" * 50, ["a", "bb", "ccc", "dddd"])
    assert seen == [((1, 49), (1, 1)), ((3, 4), (3, 4)), ((1, 1), (1, 1))]


def test_a_model_without_a_cache_is_scored_by_whole_forwards(monkeypatch):
    network = tiny_llama(259)
    plain = network.forward
    monkeypatch.setattr(
        network,
        "forward",
        lambda **named: SimpleNamespace(
            logits=plain(**{**named, "use_cache": False}).logits, past_key_values=None
        ),
    )
    found = TransformersModel(network, BYTES).score("abc", ["d", "efg"])
    wanted = TransformersModel(LLAMA, BYTES).score("abc", ["d", "efg"])
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def whole_forwards(network, prefixes, texts):
    return [
        [plain_logprobs(network, BYTES(prefix + text)["input_ids"], len(prefix)) for text in row]
        for prefix, row in zip(prefixes, texts, strict=True)
    ]


def same_scores(found, wanted):
    for scores, rows in zip(found, wanted, strict=True):
        for score, row in zip(scores, rows, strict=True):
            assert score.logprobs == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_of_many_prefixes_equal_whole_forwards(name, batch_size):
    network = NETWORKS[name]
    model = TransformersModel(network, BYTES, batch_size=batch_size)
    same_scores(model.score_many(PREFIXES, TEXTS), whole_forwards(network, PREFIXES, TEXTS))
    other = ["Z then", *PREFIXES]  # nothing is common to all
    texts = [["w", "vu"], *TEXTS]
    same_scores(model.score_many(other, texts), whole_forwards(network, other, texts))


def test_nothing_is_scored_of_nothing(model):
    assert model.score_many([], []) == []
    assert model.score_many(["a", "b"], [[], []]) == [[], []]


def test_what_prefixes_share_is_run_once_and_logits_are_of_the_continuations(monkeypatch):
    network = NETWORKS["llama"]
    seen = watch(network, monkeypatch)
    prefixes = ["p" * 50 + rest for rest in ("ab", "cdefg", "h", "ab")]
    model = TransformersModel(network, BYTES, batch_size=4)
    model.score_many(prefixes, [["1", "22"], ["1", "22"], ["333"], ["4"]])
    # The rests but for the last token: a, cdef and none; then 6 texts, 4 at a time.
    assert seen == [((1, 50), 1), ((2, 4), 1), ((4, 3), 3), ((2, 1), 1)]
    seen.clear()
    model.score_many(["ab" * 20, "xy"], [["1", "2"], ["3"]])
    assert seen == [((1, 1), 1), ((2, 39), 1), ((3, 1), 1)]  # nothing common: one token as a probe


def test_without_a_cache_to_share_the_head_is_still_for_the_continuations_only(monkeypatch):
    network = NETWORKS["states"]
    seen = watch(network, monkeypatch)
    TransformersModel(network, BYTES).score_many(["p" * 50, "p" * 48], [["abc"], ["de"]])
    assert seen == [((1, 47), 1), ((2, 52), 5)]


def test_a_cache_with_more_than_the_tokens_is_not_shared(monkeypatch):
    network = NETWORKS["llama"]
    wanted = whole_forwards(network, PREFIXES, TEXTS)
    plain = network.forward

    def forward(**named):  # as a PEFT model with learned tokens before the first
        out = plain(**named)
        if out.past_key_values is not None:
            for layer in out.past_key_values.layers:
                layer.keys = torch.cat([layer.keys[..., :1, :], layer.keys], -2)
                layer.values = torch.cat([layer.values[..., :1, :], layer.values], -2)
        return out

    monkeypatch.setattr(network, "forward", forward)
    same_scores(TransformersModel(network, BYTES).score_many(PREFIXES, TEXTS), wanted)


def test_tokens_across_the_boundary_are_scored_whole_among_many(merging_tokenizer):
    network = tiny_llama(len(merging_tokenizer), initializer_range=0.2)
    model = TransformersModel(network, merging_tokenizer)
    prefixes = ["the hel", "the", "the quick brown", "the hello wor"]
    texts = [["lo world", "p"], [" fox", " hello"], [" fox"], ["ld", "k"]]
    found = model.score_many(prefixes, texts)
    for prefix, row, scores in zip(prefixes, texts, found, strict=True):
        alone = merging_tokenizer(prefix)["input_ids"]
        for text, score in zip(row, scores, strict=True):
            ids = merging_tokenizer(prefix + text)["input_ids"]
            first = next(k for k, token in enumerate(ids) if alone[k : k + 1] != [token])
            assert score.logprobs == pytest.approx(plain_logprobs(network, ids, first), abs=1e-5)
            assert score.offsets[-1][1] == len(text)


def test_padding_never_lies_beyond_the_context():
    network = NETWORKS["learned positions"]  # 64 of them; one more would be an index error
    model = TransformersModel(network, BYTES)
    prefixes, texts = ["p" * 60, "p" * 10], [["abcd"], ["x" * 54]]
    same_scores(model.score_many(prefixes, texts), whole_forwards(network, prefixes, texts))


def test_scores_that_cannot_be_are_refused(model):
    with pytest.raises(UserError, match=r"continuations\[1\] must be a text that is not empty"):
        model.score("a", ["b", ""])
    with pytest.raises(UserError, match="put the one text in a list"):
        model.score("a", "b")
    with pytest.raises(UserError, match="no token comes before"):
        model.score("", ["b"])
    words = word_tokenizer(["a", "b"])
    with pytest.raises(UserError, match="adds no token"):
        TransformersModel(tiny_llama(len(words)), words).score("a", [" "])
    for prefixes, texts, message in (
        ("a", [["b"]], "put the one prompt in a list"),
        (["a"], "b", "continuations must be a list of lists"),
        (["a", "b"], [["c"]], "2 prefixes, but 1 lists of continuations"),
        (["a", 3], [["c"], ["d"]], r"prefixes\[1\] must be a text"),
        (["a", "b"], [["c"], "d"], r"continuations\[1\] must be a list of texts"),
        (["a", "b"], [["c"], ["d", ""]], r"continuations\[1\]\[1\] must be a text .* not ''"),
    ):
        with pytest.raises(UserError, match=message):
            model.score_many(prefixes, texts)
    slow = SimpleNamespace(
        is_fast=False, eos_token_id=2, pad_token_id=0, chat_template=None, bos_token=None
    )
    with pytest.raises(UserError, match="fast tokenizer"):
        TransformersModel(LLAMA, slow).score("a", ["b"])


# --- loading --------------------------------------------------------------------------------------


def test_a_saved_folder_gives_the_same_model(tmp_path, model):
    LLAMA.save_pretrained(tmp_path / "tiny")
    BYTES.save_pretrained(tmp_path / "tiny")
    for spec in (tmp_path / "tiny", str(tmp_path / "tiny")):
        loaded = load_text_model(spec, device="cpu", dtype="float32")
        assert isinstance(loaded, TransformersModel)
        assert loaded.name == "tiny"
        assert loaded.sample(["ab"], max_tokens=5) == model.sample(["ab"], max_tokens=5)


def test_folders_without_a_model_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{not json")
    LLAMA.save_pretrained(tmp_path / "bare")
    LLAMA.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cases = [
        (tmp_path / "gone", "there is no folder"),
        (str(tmp_path / "gone"), "there is no folder"),
        ("./gone", "there is no folder"),
        (tmp_path / "empty", "it has no config.json"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "bad", "cannot load a language model"),
        (tmp_path / "cut", "cannot load a language model"),
        (tmp_path / "bare", "cannot load a tokenizer"),
        ("nobody/no-such-model", "cannot load a language model from 'nobody/no-such-model'"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            TransformersModel(source, device="cpu")
        assert "\n" not in str(caught.value)


def test_wrong_constructions_are_refused():
    with pytest.raises(UserError, match="needs its tokenizer"):
        TransformersModel(LLAMA)
    with pytest.raises(UserError, match="leave out device and dtype"):
        TransformersModel(LLAMA, BYTES, dtype="float32")
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        TransformersModel(LLAMA, BYTES, batch_size=0)


def test_a_missing_vllm_is_explained(tmp_path, monkeypatch):
    LLAMA.save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tenfold-common\[vllm\]'"):
        load_text_model(tmp_path, "vllm")
    with pytest.raises(UserError, match="there is no folder"):
        VLLMModel(tmp_path / "gone")


@pytest.mark.parametrize(
    ("spec", "named", "message"),
    [
        ("m", {"backend": "vlm"}, "unknown backend 'vlm'.*Did you mean 'vllm'"),
        ("m", {"backend": "server"}, "needs the http:// or https:// address"),
        ("http://h", {"backend": "vllm"}, "needs a folder or name"),
        ("m", {"model": "x"}, "backend 'transformers' takes no model"),
        ("m", {"engine": {}}, "takes no engine; it takes device, dtype, "),
        ("http://h", {"device": "cpu"}, "backend 'server' takes no device"),
        ("http://h", {"dtype": "float32"}, "backend 'server' takes no dtype"),
        ("http://h", {"template_options": {}}, "backend 'server' takes no template_options"),
        ("http://h", {"trust_remote_code": True}, "takes no trust_remote_code"),
    ],
)
def test_load_refuses_what_does_not_go_together(spec, named, message):
    with pytest.raises(UserError, match=message):
        load_text_model(spec, **named)


def test_load_makes_a_server_model():
    for spec, named in (("http://h:1#org/m", {}), ("https://h/v1", {"model": "org/m"})):
        found = load_text_model(spec, **named)
        assert isinstance(found, ServerModel)
        assert found.name == "org/m"


# --- small parts and the scripted model -----------------------------------------------------------


def test_every_backend_follows_the_protocol(model):
    assert isinstance(model, TextModel)
    assert isinstance(ScriptedModel(), TextModel)
    assert isinstance(ServerModel("http://h", "m"), TextModel)
    assert issubclass(VLLMModel, object)
    for name in ("sample", "score", "score_many"):
        assert callable(getattr(VLLMModel, name))


def test_stream_seeds_are_pinned_and_differ():
    assert stream_seed(0, 0, 0) == stream_seed(0, 0, 0) < 2**48
    seeds = {stream_seed(s, i, j) for s in range(5) for i in range(12) for j in range(12)}
    assert len(seeds) == 5 * 12 * 12


def test_first_stop():
    assert first_stop("abcabc", ["c", "bc"]) == 1
    assert first_stop("abc", ["x"]) is None
    assert first_stop("abc", []) is None


def test_score_total():
    assert Score((-1.0, -0.5), ((0, 1), (1, 2))).total == -1.5


def test_scripted_list_is_used_in_order():
    model = ScriptedModel(["one two three", "b", "c"])
    assert model.sample(["p"], max_tokens=2) == [[Generation("one two", "length", 2)]]
    assert [[g.text for g in r] for r in model.sample(["p", "q"])] == [["b"], ["c"]]
    with pytest.raises(UserError, match=r"all 3 replies .* used up"):
        model.sample(["p"])
    assert model.calls[0]["max_tokens"] == 2
    assert model.calls[1]["prompts"] == ["p", "q"]
    assert [call["method"] for call in model.calls] == ["sample"] * 3


def test_scripted_dict_and_function():
    table = ScriptedModel({"hi": ["x", "y"], "p": "same"})
    assert [g.text for g in table.sample([CHAT], n=2)[0]] == ["x", "y"]
    assert [g.text for g in table.sample(["p"], n=2)[0]] == ["same", "same"]
    with pytest.raises(UserError, match="sample 2 of 'hi'"):
        table.sample([CHAT], n=3)
    with pytest.raises(UserError, match="no reply to 'z'"):
        table.sample(["z"])
    function = ScriptedModel(lambda prompt, seed, index: f"{prompt}/{seed}/{index} END more")
    assert [g.text for g in function.sample(["p"], n=2, seed=7, stop=[" END"])[0]] == [
        "p/7/0",
        "p/7/1",
    ]
    with pytest.raises(UserError, match="not one text"):
        ScriptedModel("abc")
    with pytest.raises(UserError, match="n must be"):
        function.sample(["p"], n=0)


def test_scripted_scores():
    model = ScriptedModel(score=lambda prefix, text: -float(len(f"{prefix}{text}")))
    assert model.score("ab", ["cd e"]) == [Score((-6.0,), ((0, 4),))]
    words = ScriptedModel(score=lambda prefix, text: [-1, -2])
    assert words.score("ab", ["cd e"]) == [Score((-1.0, -2.0), ((0, 2), (2, 4)))]
    assert words.calls == [{"method": "score", "prefix": "ab", "continuations": ["cd e"]}]
    with pytest.raises(UserError, match="has 1 words, but the scores are 2"):
        words.score("ab", ["cd"])
    with pytest.raises(UserError, match="has no scores"):
        ScriptedModel().score("a", ["b"])


def test_scripted_scores_of_many_are_one_call_per_prefix():
    model = ScriptedModel(score=lambda prefix, text: -float(len(f"{prefix}{text}")))
    found = model.score_many(["ab", CHAT, "c"], [["cd e"], [], ["f", "gh"]])
    assert [[score.total for score in row] for row in found] == [[-6], [], [-2, -3]]
    assert model.calls == [
        {"method": "score", "prefix": "ab", "continuations": ["cd e"]},
        {"method": "score", "prefix": CHAT, "continuations": []},
        {"method": "score", "prefix": "c", "continuations": ["f", "gh"]},
    ]
    assert model.score_many([], []) == []
