"""Invariants on shapes nobody chose: the native code is the reference, however it is called."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashformer.backends.cpu import CPUBackend
from flashformer.cache import KVCache
from flashformer.config import ModelSpec
from flashformer.plan import Plan
from flashformer.quant import quantize
from flashformer.reference import Reference
from flashformer.weights import LayerWeights, ModelWeights
from tenfold_common.testing import rms_ratio

POSITIONS = 48


@st.composite
def models(draw, *, formats=("fp32",)):
    """A spec, random weights in a format, and a number of workers."""
    format = draw(st.sampled_from(formats))
    symmetric = draw(st.booleans())
    kv_heads, share = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    head_dim = draw(
        st.sampled_from([32]) if format == "int4" else st.integers(1, 20).map(lambda n: 2 * n)
    )
    hidden = 32 * draw(st.integers(1, 3)) if format == "int4" else draw(st.integers(3, 70))
    intermediate = 32 * draw(st.integers(1, 3)) if format == "int4" else draw(st.integers(1, 70))
    layers = draw(st.integers(1, 3))
    windows = tuple(
        draw(st.lists(st.none() | st.integers(1, 30), min_size=layers, max_size=layers))
    )
    rotates = tuple(draw(st.lists(st.booleans(), min_size=layers, max_size=layers)))
    rotary = 2 * draw(st.integers(1, head_dim // 2))
    qkv_bias, output_bias, mlp_bias, qk_norm = draw(st.tuples(*[st.booleans()] * 4))
    vocab = draw(st.integers(2, 120))
    spec = ModelSpec(
        "llama", hidden, intermediate, kv_heads * share, kv_heads, head_dim, vocab, 1e-3, rotary,
        POSITIONS, windows, rotates, qkv_bias, output_bias, mlp_bias, qk_norm,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def matrix(rows, k):
        weight = torch.randn(rows, k, generator=noise) * k**-0.5
        return quantize(weight, format, group=32, symmetric=symmetric)

    def vector(size, wanted=True, base=0.0):
        return base + 0.3 * torch.randn(size, generator=noise) if wanted else None

    def layer():
        return LayerWeights(
            qkv=matrix(spec.qkv_rows, hidden), output=matrix(hidden, spec.attended),
            up=matrix(2 * intermediate, hidden), down=matrix(hidden, intermediate),
            norm1=vector(hidden, base=1.0), norm2=vector(hidden, base=1.0),
            query_norm=vector(head_dim, qk_norm, 1.0), key_norm=vector(head_dim, qk_norm, 1.0),
            qkv_bias=vector(spec.qkv_rows, qkv_bias), output_bias=vector(hidden, output_bias),
            up_bias=vector(2 * intermediate, mlp_bias), down_bias=vector(hidden, mlp_bias),
        )  # fmt: skip

    angles = torch.arange(float(POSITIONS))[:, None] * 0.7 ** torch.arange(rotary // 2)
    weights = ModelWeights(
        tuple(layer() for _ in range(layers)), vector(hidden, base=1.0), matrix(vocab, hidden),
        torch.randn(vocab, hidden, generator=noise), angles.cos(), angles.sin(),
    )  # fmt: skip
    return spec, weights, draw(st.integers(1, 6))


def feed(native, tokens, sizes=None, threads=1):
    """Read tokens in calls of some sizes; all logits and the cache."""
    cache = KVCache(native.plan.spec, POSITIONS, format=native.cache_format)
    rows = []
    for size in sizes or [len(tokens)]:
        out = torch.empty(size, native.plan.spec.vocab)
        native.decode(cache.keys, cache.values, torch.tensor(tokens[:size]), position=cache.length,
                      new=0, logits=out, threads=threads)  # fmt: skip
        tokens, cache.length = tokens[size:], cache.length + size
        rows.append(out)
    return torch.cat(rows), cache


def text(vocab, count, seed):
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count,), generator=noise).tolist()


@given(models(), st.integers(1, 34), st.integers(0, 99))
@settings(max_examples=30)
def test_the_native_code_is_the_reference(made, count, seed):
    spec, weights, workers = made
    plan = Plan.make(spec, workers, chunk=16)
    tokens = text(spec.vocab, count, seed)
    native = CPUBackend(plan, weights, cache_format="fp32")
    found, _ = feed(native, tokens, threads=workers)
    wanted, _ = Reference(plan, weights, max_len=POSITIONS).decode(tokens)
    assert rms_ratio(found, wanted) < 1e-5


@given(models(formats=("fp32", "bf16", "int8", "int4")), st.data())
@settings(max_examples=30)
def test_splits_threads_and_workers_change_no_bit(made, data):
    spec, weights, workers = made
    tokens = text(spec.vocab, 20, 3)
    whole, cache = feed(
        CPUBackend(Plan.make(spec, 1, chunk=16), weights, cache_format="bf16"), tokens
    )
    sizes, left = [], 20
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    native = CPUBackend(Plan.make(spec, workers, chunk=16), weights, cache_format="bf16")
    found, other = feed(native, tokens, sizes, threads=data.draw(st.integers(1, workers)))
    assert torch.equal(found, whole)
    for a, b in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
        assert torch.equal(a, b)


@given(models(formats=("bf16", "int8")), st.integers(1, 19))
@settings(max_examples=20)
def test_the_future_changes_no_bit_of_the_past(made, place):
    spec, weights, workers = made
    native = CPUBackend(Plan.make(spec, workers, chunk=16), weights, cache_format="fp32")
    tokens = text(spec.vocab, 20, 1)
    other = tokens[:place] + text(spec.vocab, 20 - place, 2)
    a, b = (feed(native, t)[0] for t in (tokens, other))
    assert torch.equal(a[:place], b[:place])


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 40), st.sampled_from(["fp32", "bf16"]))
def test_what_is_put_into_a_cache_is_found_there(count, heads, head_dim, format):
    spec = ModelSpec(
        "llama", 8, 8, heads, heads, head_dim, 9, 1e-5, 2, 64, (None,) * 2, (True,) * 2
    )
    cache = KVCache(spec, count + 3, format=format)
    for t in (*cache.keys, *cache.values):
        t.fill_(math.nan)
    noise = torch.Generator().manual_seed(count)
    keys, values = torch.randn(2, heads, count, head_dim, generator=noise)
    cache.put(1, keys, values)
    cache.length = count
    kind = torch.float32 if format == "fp32" else torch.bfloat16
    for found, given_ in zip(cache.layer(1), (keys, values), strict=True):
        assert found.dtype == kind
        assert torch.equal(found, given_.to(kind))
    assert all(t.isnan().all() for t in cache.layer(0))
