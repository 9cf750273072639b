"""Draws: the generator's published numbers, the right distribution, and the native draws."""

import math

import numpy as np
import pytest
import torch

import flashformer as ff
from flashformer.backends.cpu import CPUBackend
from flashformer.cache import KVCache
from flashformer.plan import Plan
from flashformer.sampling import choose, gumbel, philox, surprise
from tenfold_common import UserError


def test_philox_gives_the_published_words_for_zeros():
    found = [f"{w:08x}" for w in philox(0, 0, 4)]
    assert found == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def words(counter, key):
    """Philox 4x32-10 word by word in plain numbers, as the paper has it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_is_that_of_the_paper_for_any_key_and_step():
    ones = 0xFFFFFFFF
    published = words([ones] * 4, [ones] * 2)  # a counter that no token reaches
    assert [f"{w:08x}" for w in published] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    digits = words([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])
    assert [f"{w:08x}" for w in digits] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]
    for seed, step in ((1, 0), (2**64 - 1, 5), (2**33 + 7, 2**35 + 3)):
        found = philox(seed, step, 11)
        key, upper = [seed % 2**32, seed >> 32], [step % 2**32, step >> 32]
        wanted = [w for block in range(3) for w in words([block, 0, *upper], key)]
        assert found.tolist() == wanted[:11]


def test_seeds_and_steps_give_other_words():
    made = {tuple(philox(seed, step, 8)) for seed in range(20) for step in range(20)}
    assert len(made) == 400


def test_gumbel_noise_has_its_mean_and_variance():
    noise = np.concatenate([gumbel(7, step, 4000) for step in range(25)])
    error = math.sqrt(math.pi**2 / 6 / len(noise))
    assert abs(noise.mean() - 0.5772156649) < 4 * error
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert np.isfinite(noise).all()
    assert noise.max() < 22.9  # MOST_NOISE in decode.cpp


def test_no_word_gives_infinite_noise(monkeypatch):
    words = np.array([0, 2**32 - 1], dtype=np.uint32)
    monkeypatch.setattr("flashformer.sampling.philox", lambda seed, step, count: words)
    noise = gumbel(0, 0, 2)
    assert np.isfinite(noise).all()
    assert 22.0 < noise.max() < 22.9  # MOST_NOISE in decode.cpp


def test_native_draws_are_these_draws_also_where_the_noise_is_large(kit):
    """Of 4096 tokens the best noise is over 8 in most draws."""
    spec, weights = kit.weights(kit.model(vocab_size=4096))
    native = CPUBackend(Plan.make(spec, 1), weights, cache_format="fp32")
    cache, logits = KVCache(spec, 64, format="fp32"), torch.empty(60, 4096)
    found = native.decode(
        cache.keys, cache.values, torch.tensor([3]), position=0, new=60, logits=logits, threads=1,
        temperature=50.0, seed=1,
    )  # fmt: skip
    assert found.tolist() == [choose(logits[s], 50.0, 1, s) for s in range(60)]
    assert sum(gumbel(1, s, 4096).max() > 8 for s in range(60)) > 30


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_distributed_as_the_softmax(temperature):
    noise = torch.Generator().manual_seed(3)
    logits = torch.randn(12, generator=noise) * 1.5
    count = 3000
    drawn = np.bincount([choose(logits, temperature, 11, s) for s in range(count)], minlength=12)
    expected = torch.softmax(logits.double() / temperature, 0).numpy() * count
    chi = ((drawn - expected) ** 2 / expected).sum()
    assert chi < 31.26  # 11 degrees of freedom, p = 0.001
    wrong = torch.softmax(logits.double() / (1.3 * temperature), 0).numpy() * count
    assert ((drawn - wrong) ** 2 / wrong).sum() > 31.26  # and another temperature would show


@pytest.mark.parametrize("isa", ["auto", "portable"])
@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (3, 3)])
def test_native_draws_are_these_draws(kit, isa, workers, threads):
    spec, weights = kit.weights(kit.model(), positions=256)
    native = CPUBackend(Plan.make(spec, workers), weights, cache_format="fp32", isa=isa)
    for temperature, seed in ((1.0, 0), (0.3, 123), (50.0, 2**64 - 1), (1.7, -5), (1e-3, 9)):
        cache = KVCache(spec, 256, format="fp32")
        logits = torch.empty(100, spec.vocab)
        found = native.decode(
            cache.keys, cache.values, torch.tensor([3, 4, 5]), position=0, new=98, logits=logits,
            threads=threads, temperature=temperature, seed=seed,
        )  # fmt: skip
        wanted = [choose(logits[s], temperature, seed, s) for s in range(2, 100)]
        assert found.tolist() == wanted
        if temperature == 50.0:
            assert len(set(wanted)) > 40


def test_steps_beyond_32_bits_are_drawn_apart(kit):
    """The counter holds the position whole."""
    assert philox(1, 2**32 + 1, 4).tolist() != philox(1, 1, 4).tolist()


def test_a_low_temperature_is_greedy_and_a_high_one_is_not():
    logits = torch.tensor([0.0, 1.0, 0.9])
    assert {choose(logits, 1e-3, 5, s) for s in range(50)} == {1}
    assert {choose(logits, 1e3, 5, s) for s in range(50)} == {0, 1, 2}
    assert choose(logits, None, 5, 0) == 1


def test_among_equals_greedy_takes_the_first():
    assert choose(torch.tensor([1.0, 5.0, 5.0, 5.0]), None, 0, 0) == 1
    assert (
        choose(torch.full((7,), -math.inf).index_fill(0, torch.tensor([4]), 0.0), None, 0, 0) == 4
    )


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_nan_is_an_error(temperature):
    with pytest.raises(UserError, match="a logit is NaN"):
        choose(torch.tensor([0.0, math.nan]), temperature, 0, 0)


def test_tokens_at_minus_infinity_are_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 0.0])
    assert {choose(logits, 1.0, 1, s) for s in range(100)} == {0, 2}


def test_surprise_by_hand():
    p, q = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    assert surprise(p, q) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert surprise(p, p) == 0.0
    assert ff.verify  # what it is for
