"""vLLM for real: an engine in this process, then a server on loopback, with one tiny model."""

import os

import pytest

from tenfold_common import ServerModel, TransformersModel, UserError, VLLMModel, tiny_llama
from tenfold_common.testing import no_network, vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it brings warn at import and at start
]

PROMPTS = ["the quick", "hello", "AB CD 12", "the lazy dog. hello world, hello", "fox jumps over"]
CHAT = [{"role": "user", "content": "hello there"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "the quick"}]
CONTINUATIONS = [" brown", " fox jumps", ".", "est dog", " hello world, hello there!"]


@pytest.fixture(autouse=True)
def _offline():
    with no_network(allow_loopback=True):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, merging_tokenizer):
    path = tmp_path_factory.mktemp("lm") / "tiny"
    tiny_llama(len(merging_tokenizer), hidden=256, heads=4, initializer_range=0.2).save_pretrained(
        path
    )
    merging_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder):
    return TransformersModel(folder, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def engine(folder):
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = VLLMModel(folder, engine={"enforce_eager": True, "max_model_len": 256})
    yield model
    model.close()


@pytest.fixture(scope="module")
def server(folder):
    pytest.importorskip("vllm")
    log = folder.parent / "server.log"
    with vllm_server(folder, log=log, arguments=("--max-model-len", "256")) as address:
        yield address


def same_scores(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def _as_plain(results):
    return [[(g.text, g.finish_reason, g.tokens) for g in row] for row in results]


@pytest.mark.parametrize("prompts", [PROMPTS, [CHAT, PREFILLED]], ids=["texts", "messages"])
@pytest.mark.parametrize("stop", [(), ("o", "e d")], ids=["to the end", "stop strings"])
def test_engine_greedy_equals_transformers(engine, local, prompts, stop):
    named = {"temperature": 0, "max_tokens": 24, "stop": stop, "n": 2}
    assert _as_plain(engine.sample(prompts, **named)) == _as_plain(local.sample(prompts, **named))


@pytest.mark.parametrize("prefix", ["the quick", CHAT, PREFILLED], ids=["text", "chat", "prefill"])
def test_engine_scores_equal_transformers(engine, local, prefix):
    found, wanted = engine.score(prefix, CONTINUATIONS), local.score(prefix, CONTINUATIONS)
    same_scores(found, wanted)
    assert [s.offsets for s in found] == [s.offsets for s in wanted]


def test_scores_of_many_prefixes_equal_transformers(engine, server, local):
    prefixes = ["the quick", PREFILLED, CHAT, "the quick brown fox"]
    texts = [CONTINUATIONS, CONTINUATIONS[:2], [], CONTINUATIONS[2:]]
    wanted = local.score_many(prefixes, texts)
    for model in (engine, ServerModel(server)):
        for one, other in zip(model.score_many(prefixes, texts), wanted, strict=True):
            same_scores(one, other)


def test_engine_samples_are_reproducible_and_different(engine):
    first = engine.sample(PROMPTS, n=4, max_tokens=16, seed=3)
    assert first == engine.sample(PROMPTS, n=4, max_tokens=16, seed=3)
    assert first != engine.sample(PROMPTS, n=4, max_tokens=16, seed=4)
    assert all(len({g.text for g in row}) > 1 for row in first)


def test_engine_refuses_what_does_not_fit(engine, folder):
    assert engine.sample([]) == []
    assert engine.score("the", []) == []
    assert engine.context == 256
    assert engine.name == "tiny"
    with pytest.raises(UserError, match=r"has 300 tokens .* context is 256"):
        engine.sample(["<bos>" * 300])
    [[cut]] = engine.sample(["<bos>" * 250], max_tokens=50, temperature=0)
    assert cut.tokens <= 6
    with pytest.raises(UserError, match=r"vLLM does not start with .*max_model_len"):
        VLLMModel(folder, engine={"enforce_eager": True, "max_model_len": 10**6})
    with pytest.raises(UserError, match=r"vLLM does not start with .*no_such"):
        VLLMModel(folder, engine={"no_such": 1})


@pytest.mark.parametrize("prompts", [PROMPTS, [CHAT, PREFILLED]], ids=["texts", "messages"])
@pytest.mark.parametrize("stop", [(), ("o", "e d")], ids=["to the end", "stop strings"])
def test_server_greedy_equals_transformers(server, local, prompts, stop):
    model = ServerModel(server, "tiny")
    named = {"temperature": 0, "max_tokens": 24, "stop": stop, "n": 2}
    assert _as_plain(model.sample(prompts, **named)) == _as_plain(local.sample(prompts, **named))


@pytest.mark.parametrize("prefix", ["the quick", CHAT, PREFILLED], ids=["text", "chat", "prefill"])
def test_server_scores_equal_transformers(server, local, prefix):
    found = ServerModel(server).score(prefix, CONTINUATIONS)
    wanted = local.score(prefix, CONTINUATIONS)
    same_scores(found, wanted)
    for text, one, other in zip(CONTINUATIONS, found, wanted, strict=True):
        words = [text[a:b].strip() for a, b in one.offsets]
        assert words == [text[a:b].strip() for a, b in other.offsets]


def test_server_samples_are_reproducible_and_different(server):
    model = ServerModel(server)
    first = model.sample(PROMPTS, n=4, max_tokens=16, seed=3)
    assert first == model.sample(PROMPTS, n=4, max_tokens=16, seed=3)
    assert first != model.sample(PROMPTS, n=4, max_tokens=16, seed=4)
    assert all(len({g.text for g in row}) > 1 for row in first)


def test_server_says_what_is_wrong(server):
    assert ServerModel(server).name == "tiny"
    with pytest.raises(UserError, match=r"no model 'tinny'; it offers tiny. Did you mean 'tiny'"):
        ServerModel(server, "tinny").sample(["the"])
    with pytest.raises(UserError, match=r"400 to /v1/completions: .*256"):
        ServerModel(server).sample(["<bos>" * 300])
