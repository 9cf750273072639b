"""More calls a token: the same tokens."""

import pytest

import flashformer as ff
from flashformer.ablation import WAYS, ablation, decode_by_parts
from tenfold_common.errors import UserError
from tenfold_common.tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    return ff.compile(tiny_llama(50, max_position_embeddings=128), threads=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_ways_choose_the_same_tokens(model, threads):
    found = {}
    for way in WAYS:
        cache = model.new_cache()
        model.feed([5, 6, 7], cache)
        found[way] = decode_by_parts(model, cache, 8, way, 12, threads=threads)
        assert len(cache) == 15
    cache = model.new_cache()
    model.feed([5, 6, 7], cache)
    expected = model.decode(cache, 8, steps=12).tolist()
    assert all(tokens == expected for tokens in found.values())


def test_times_of_all_ways(model):
    times = ablation(model, context=4, steps=4, rounds=1)
    assert list(times) == list(WAYS)
    assert all(seconds > 0 for seconds in times.values())


def test_refusals(model):
    with pytest.raises(UserError, match="way must be one of"):
        decode_by_parts(model, model.new_cache(), 1, "half", 1, threads=1)
    with pytest.raises(UserError, match="room for 128"):
        ablation(model, context=120, steps=32)
    plain = ff.compile(tiny_llama(50, max_position_embeddings=128), backend="torch")
    with pytest.raises(UserError, match="on the CPU back-end, not on torch"):
        decode_by_parts(plain, plain.new_cache(), 1, "stage", 1, threads=1)
