"""Keys and values: to and from transformers, cropped, copied, and never beyond their end."""

import pytest
import torch

import flashformer as ff
from tenfold_common import UserError
from tenfold_common.testing import rms_ratio


@pytest.fixture(scope="module")
def pair(kit):
    """A transformers model and the same compiled, with a cache in float32."""
    model = kit.model("qwen3")
    return model, ff.compile(model, threads=2, max_len=64, backend="cpu")


def theirs_of(model, tokens, cache=None):
    with torch.inference_mode():
        return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_from_a_dynamic_cache_and_on(pair, kit, length):
    model, compiled = pair
    tokens = kit.tokens(length + 3)
    cache = ff.KVCache.from_transformers(
        theirs_of(model, tokens[:length]).past_key_values, compiled.spec, 64, format="fp32"
    )
    assert (cache.length, len(cache), cache.max_len) == (length, length, 64)
    logits = compiled.feed(tokens[length:], cache, every=True)
    assert rms_ratio(logits, kit.logits(model, tokens)[length:]) < 1e-5


def test_from_a_static_cache(pair, kit):
    from transformers import StaticCache

    model, compiled = pair
    tokens = kit.tokens(20)
    static = StaticCache(config=model.config, max_cache_len=40)
    theirs_of(model, tokens[:17], static)
    cache = ff.KVCache.from_transformers(static, compiled.spec, 64, format="fp32")
    assert cache.length == 17
    logits = compiled.feed(tokens[17:], cache, every=True)
    assert rms_ratio(logits, kit.logits(model, tokens)[17:]) < 1e-5


def test_to_transformers_and_on(pair, kit):
    model, compiled = pair
    tokens = kit.tokens(21)
    cache = compiled.new_cache()
    compiled.feed(tokens[:18], cache)
    other = cache.to_transformers()
    assert other.get_seq_length() == 18
    rest = theirs_of(model, tokens[18:], other).logits[0]
    assert rms_ratio(rest, kit.logits(model, tokens)[18:]) < 1e-5
    assert cache.length == 18  # it has memory of its own


def test_there_and_back_is_the_same(pair, kit):
    _, compiled = pair
    cache = compiled.new_cache()
    compiled.feed(kit.tokens(19), cache)
    back = ff.KVCache.from_transformers(cache.to_transformers(), compiled.spec, 32, format="fp32")
    for number in range(compiled.spec.layers):
        for a, b in zip(cache.layer(number), back.layer(number), strict=True):
            assert torch.equal(a, b)
            assert a.shape == (2, 19, 24)


def test_cropping_forgets(pair, kit):
    _, compiled = pair
    tokens = kit.tokens(30)
    cache = compiled.new_cache()
    compiled.feed(tokens, cache)
    assert cache.crop(12) is cache
    assert cache.length == 12
    fresh = compiled.new_cache()
    compiled.feed(tokens[:12], fresh)
    assert torch.equal(compiled.feed([7, 8], cache), compiled.feed([7, 8], fresh))
    assert cache.crop(-4).length == 10
    assert cache.crop(10).length == 10
    assert cache.crop(0).length == 0
    for wrong in (1, -1):
        with pytest.raises(UserError, match=f"cannot crop to {wrong}: 0 positions are filled"):
            cache.crop(wrong)


def test_a_copy_goes_its_own_way(pair, kit):
    _, compiled = pair
    cache = compiled.new_cache(48)
    compiled.feed(kit.tokens(20), cache)
    other = cache.copy()
    assert (other.length, other.max_len, other.format) == (20, 48, "fp32")
    a = compiled.decode(cache, 3, steps=10)
    b = compiled.decode(other, 3, steps=10)
    assert torch.equal(a, b)
    compiled.feed(kit.tokens(15, seed=6), cache.crop(5))
    c = compiled.decode(other.crop(20), 3, steps=10)
    assert torch.equal(c, a)  # what the first read at positions 5 to 19 is not seen here


def test_putting_overwrites_just_the_positions_given(pair):
    _, compiled = pair
    cache = compiled.new_cache()
    for t in (*cache.keys, *cache.values):
        t.fill_(5.0)
    noise = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 2, 19, 24, generator=noise)
    cache.put(1, keys, values)
    cache.length = 64
    found = cache.layer(1)
    assert torch.equal(found[0][:, :19], keys)
    assert torch.equal(found[1][:, :19], values)
    assert all((t[:, 19:] == 5).all() for t in found)
    assert all((t == 5).all() for t in cache.layer(0))


def test_room_is_checked(pair):
    _, compiled = pair
    cache = compiled.new_cache(20)
    cache.length = 15
    cache.check_room(5)
    with pytest.raises(UserError, match=r"15 positions are filled and 6 more .* room for 20"):
        cache.check_room(6)


def test_bytes_and_repr(pair):
    _, compiled = pair
    cache = compiled.new_cache(20)
    assert cache.nbytes == 2 * 2 * 2 * 32 * 32 * 4  # layers, both, heads, padded room and width
    assert repr(cache) == "KVCache(length=0, max_len=20, format='fp32')"
    assert ff.KVCache(compiled.spec, 20).nbytes * 2 == cache.nbytes


@pytest.mark.parametrize("max_len", [0, -1, 2.0, True, None])
def test_a_wrong_size_is_refused(pair, max_len):
    with pytest.raises(UserError, match="max_len must be a whole number of at least 1"):
        ff.KVCache(pair[1].spec, max_len)


def test_a_wrong_format_is_refused(pair):
    with pytest.raises(UserError, match="format must be 'fp32' or 'bf16', not 'fp16'"):
        ff.KVCache(pair[1].spec, 4, format="fp16")


def test_caches_of_other_models_are_refused(pair, kit):
    model, compiled = pair
    tokens = kit.tokens(9)

    def converted(cache, max_len=64):
        return ff.KVCache.from_transformers(cache, compiled.spec, max_len)

    other = theirs_of(kit.model("llama"), tokens).past_key_values  # heads of 12
    with pytest.raises(
        UserError, match=r"layer 0 of the cache .*\[1, 2, 9, 12\], expected \[1, 2, 9, 24\]"
    ):
        converted(other)
    other = theirs_of(kit.model("qwen3", num_hidden_layers=3), tokens).past_key_values
    with pytest.raises(UserError, match="the cache has 3 layers, the model 2"):
        converted(other)
    with torch.inference_mode():
        other = model(torch.tensor([tokens, tokens]), use_cache=True).past_key_values
    with pytest.raises(UserError, match="of a batch"):
        converted(other)
    with pytest.raises(UserError, match="room for 8"):
        converted(theirs_of(model, tokens).past_key_values, 8)


def test_a_cache_that_slides_is_refused(kit):
    from transformers import DynamicCache

    model = kit.model("mistral")
    compiled = ff.compile(model, threads=1, max_len=64, backend="cpu")
    sliding = DynamicCache(config=model.config)
    theirs_of(model, kit.tokens(12), sliding)
    with pytest.raises(UserError, match="slides"):
        ff.KVCache.from_transformers(sliding, compiled.spec, 64)
