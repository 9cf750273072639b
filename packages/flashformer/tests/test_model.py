"""The compiled model: its low level, its defaults, changed weights, and how near it is."""

import copy

import pytest
import torch

import flashformer as ff
from flashformer.sampling import surprise
from tenfold_common import UserError
from tenfold_common.testing import rms_ratio


@pytest.fixture(scope="module")
def compiled(kit):
    return ff.compile(kit.model(), threads=2, max_len=64, backend="cpu")


def test_step_feed_and_decode_fit_together(compiled, kit):
    tokens = kit.tokens(6)
    cache, logits = compiled.new_cache(), torch.empty(0)
    for token in tokens:
        logits, same = compiled.step(token, cache)
        assert same is cache
        assert (logits.shape, logits.dtype) == ((97,), torch.float32)
    assert cache.length == 6
    other = compiled.new_cache()
    every = compiled.feed(tokens, other, every=True)
    assert every.shape == (6, 97)
    assert torch.equal(every[-1], logits)
    assert torch.equal(compiled.feed(torch.tensor(tokens), compiled.new_cache()), logits)
    first = int(logits.argmax())
    chosen = compiled.decode(cache, first, steps=5)
    assert chosen.dtype == torch.int64
    assert cache.length == 6 + 5  # `first` and all but the last one chosen
    text = [*tokens, first, *chosen.tolist()]
    rows = compiled.feed(text[:-1], compiled.new_cache(), every=True)
    assert rows[5:].argmax(1).tolist() == text[6:]
    assert (
        compiled.decode(other, torch.tensor(first), steps=5, ends=[text[8]]).tolist() == text[7:9]
    )
    assert other.length == 6 + 2


def test_calls_have_a_limit_and_say_what_they_decoded(kit, monkeypatch):
    """Those that return early are not taken for whole ones, and what is only read is not timed."""
    model = ff.compile(kit.model(), threads=2, max_len=200, backend="cpu")
    cache = model.new_cache()
    limits, native = [], model.backend.decode

    def early(*args, **options):
        limits.append(options.pop("limit", None))
        return native(*args, **options, limit=0.0 if limits[-1] is not None else 60.0)

    monkeypatch.setattr(model.backend, "decode", early)
    model.feed(range(1, 71), cache)
    assert limits == [None] * 3  # no call reads more than 32: Ctrl-C waits for no longer
    assert model._threads._cold
    limits.clear()
    monkeypatch.setattr(type(model._threads), "most", None)
    monkeypatch.setattr("flashformer.threads.SLICE", 1e6)  # no trial ends meanwhile
    whole = model.decode(cache, 5, steps=8)
    assert len(whole) == len(limits) == 8
    assert min(limits) > 0
    assert model._threads._recent.tokens == 7  # the first one is not counted
    monkeypatch.undo()
    assert torch.equal(model.decode(cache.crop(70), 5, steps=8), whole)


def test_reading_in_parts_changes_no_bit(kit):
    model = ff.compile(kit.model(), threads=2, max_len=200, backend="cpu")
    tokens = kit.tokens(70)
    every = model.feed(tokens, model.new_cache(), every=True)
    one, cache = [], model.new_cache()
    for token in tokens:
        one.append(model.step(token, cache)[0])
    assert torch.equal(every, torch.stack(one))
    model.feed(tokens, cache)
    with pytest.raises(UserError, match="positions"):
        model.feed(tokens, cache)
    assert len(cache) == 140  # nothing was read


def test_defaults_follow_the_model(kit):
    model = kit.model()
    made = ff.compile(model, threads=1)
    assert (made.weights, made.head, made.backend.cache_format) == ("fp32", "fp32", "fp32")
    assert made.max_len == 512
    assert made.source is model
    half = ff.compile(copy.deepcopy(model).bfloat16(), threads=1)
    assert (half.weights, half.head, half.backend.cache_format) == ("bf16", "bf16", "bf16")
    assert half.backend.weights.embedding.dtype == torch.bfloat16
    four = ff.compile(
        kit.model(hidden_size=64, intermediate_size=64), weights="int4", group_size=32
    )
    assert (four.weights, four.head, four.backend.cache_format) == ("int4", "int8", "bf16")
    assert four.plan.workers == torch.get_num_threads()
    long = kit.model(max_position_embeddings=10_000, num_hidden_layers=1)
    assert ff.compile(long, threads=1).max_len == 4096


def test_what_it_says_of_itself(compiled):
    assert repr(compiled).startswith(
        "FlashModel(llama, 2 layers, weights='fp32', head='fp32', max_len=64"
    )
    assert compiled.device == torch.device("cpu")
    assert compiled.dtype == torch.float32
    assert compiled.config.model_type == "llama"


def test_the_number_of_threads_can_be_set(compiled, kit):
    tokens = kit.tokens(5)
    assert compiled.threads is None
    found = []
    for threads in (1, 2, None):
        compiled.threads = threads
        assert compiled.threads == threads
        found.append(compiled.feed(tokens, compiled.new_cache()))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for wrong in (0, 3, True, 1.0):
        with pytest.raises(UserError, match="from 1 to 2"):
            compiled.threads = wrong


def test_a_new_cache_may_be_smaller_and_not_larger(compiled, kit):
    cache = compiled.new_cache(5)
    compiled.feed(kit.tokens(5), cache)
    with pytest.raises(UserError, match=r"5 positions are filled and 1 more .* room for 5"):
        compiled.step(1, cache)
    assert cache.length == 5
    with pytest.raises(UserError, match="max_len is 65, but the model was compiled for 64"):
        compiled.new_cache(65)
    wide = ff.KVCache(compiled.spec, 80, format="fp32")
    with pytest.raises(UserError, match="room for 80 positions, but the model was compiled for 64"):
        compiled.step(1, wide)


# --------------------------------------------------------------------------------------------------
# Changed weights


CHANGES = {
    "in-place": lambda m: m.lm_head.weight.mul_(-1),
    "one-number": lambda m: m.model.layers[1].mlp.down_proj.weight[3, 4].add_(1.0),
    "norm": lambda m: m.model.norm.weight.mul_(0.5),
    "replaced": lambda m: setattr(
        m.lm_head, "weight", torch.nn.Parameter(-m.lm_head.weight.detach().clone())
    ),
    "loaded": lambda m: m.load_state_dict({k: -v for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed_and_can_be_packed_anew(kit, change):
    model = kit.model()
    compiled = ff.compile(model, threads=1, max_len=64, backend="cpu")
    prompt = torch.tensor([kit.tokens(5)])
    before = compiled.feed(prompt[0], compiled.new_cache())
    compiled.check_fresh()
    with torch.no_grad():
        CHANGES[change](model)
    for call in (compiled.check_fresh, lambda: compiled.generate(prompt, max_new_tokens=3)):
        with pytest.raises(UserError, match=r"changed since it was compiled; call refresh\(\)"):
            call()
    compiled.refresh()
    compiled.check_fresh()
    after = compiled.feed(prompt[0], compiled.new_cache())
    assert not torch.equal(after, before)
    assert rms_ratio(after, kit.logits(model, prompt[0].tolist())[-1]) < 1e-5
    assert torch.equal(
        compiled.generate(prompt, max_new_tokens=9), model.generate(prompt, max_new_tokens=9)
    )


def test_the_matrices_are_copies(kit):
    """What happens to those of the transformers model later does not reach the native code."""
    model = kit.model("llama-tied")
    compiled = ff.compile(model, threads=1, max_len=64, backend="cpu")
    tokens = kit.tokens(5)
    before = compiled.feed(tokens, compiled.new_cache())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.fill_(float("nan"))
    assert torch.equal(compiled.feed(tokens, compiled.new_cache()), before)


# --------------------------------------------------------------------------------------------------
# How near it is


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bf16_is_nearer_to_float32_than_transformers_bf16_is(kit, kind, seed):
    """The numerical gate: KL from the float32 model, and the change of the loss of each token."""
    half = kit.model(
        kind, seed=seed, hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=4
    ).bfloat16()
    exact = copy.deepcopy(half).float()
    tokens = kit.tokens(96, seed=seed)
    compiled = ff.compile(half, weights="bf16", threads=2, max_len=128, backend="cpu")
    wanted = kit.logits(exact, tokens)
    ours = compiled.feed(tokens, compiled.new_cache(), every=True)
    theirs = kit.logits(half, tokens).float()
    assert surprise(wanted, ours) < 0.7 * surprise(wanted, theirs)

    def loss(logits):
        target = torch.tensor(tokens[1:])
        return torch.nn.functional.cross_entropy(logits[:-1].double(), target, reduction="none")

    changes = [(loss(x) - loss(wanted)).abs().mean() for x in (ours, theirs)]
    assert changes[0] < changes[1]


def test_coarser_formats_are_farther_off(kit):
    model = kit.model(hidden_size=128, intermediate_size=256, head_dim=32)
    tokens = kit.tokens(100)
    exact = kit.logits(model, tokens)
    found = []
    formats = (
        {"weights": "fp32"}, {"weights": "bf16"}, {"weights": "int8"},
        {"weights": "int4", "group_size": 32}, {"weights": "int4", "group_size": 128},
    )  # fmt: skip
    for options in formats:
        compiled = ff.compile(model, threads=2, max_len=128, backend="cpu", **options)
        found.append(surprise(exact, compiled.feed(tokens, compiled.new_cache(), every=True)))
    assert found == sorted(found)
    assert found[0] < 1e-9
    assert found[1] < 1e-4
    assert found[2] < 1e-2
    assert found[4] < 1.5  # random weights are as hard as it gets


def test_verify_measures_it(kit):
    model = kit.model()
    compiled = ff.compile(model, threads=2, max_len=64, backend="cpu")
    found = ff.verify(compiled, model, prompt=torch.tensor([kit.tokens(5)]), n=40)
    assert found.equal
    assert (found.tokens, found.same, found.first_difference, found.gap) == (40, 40, None, None)
    assert found.max_error < 1e-4
    assert found.kl < 1e-9
    assert "40 of 40 tokens the same" in str(found)
    other = ff.verify(compiled, kit.model(seed=9), n=40)
    assert not other.equal
    assert other.same < 40
    assert other.gap > 0
    assert other.kl > 0.1
    assert f"first differs at {other.first_difference}" in str(other)


def test_verify_refuses_what_does_not_fit(kit, compiled):
    model = kit.model()
    with pytest.raises(UserError, match="the reference has 98 tokens, the model 97"):
        ff.verify(compiled, kit.model(vocab_size=98))
    with pytest.raises(UserError, match="n must be a whole number of at least 1, not 0"):
        ff.verify(compiled, model, n=0)
    with pytest.raises(UserError, match="1 tokens and 64 more are over max_len 64"):
        ff.verify(compiled, model, n=64)
