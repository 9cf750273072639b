"""The native back-end computes what the reference does, in all formats, whoever does which part."""

import ctypes
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from flashformer import jit
from flashformer.backends.cpu import CPUBackend
from flashformer.backends.plain import TorchBackend
from flashformer.cache import KVCache
from flashformer.plan import Plan
from flashformer.reference import Reference
from tenfold_common import UserError
from tenfold_common.testing import in_fresh_python, rms_ratio

# The widths are multiples of 128, so that all groups of int4 fit; nothing else is a round number.
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32}
FORMATS = {
    "fp32": ("fp32", 32, True, None),
    "bf16": ("bf16", 32, True, None),
    "int8": ("int8", 32, True, None),
    "int4-g32": ("int4", 32, True, None),
    "int4-g64": ("int4", 64, True, None),
    "int4-g128": ("int4", 128, True, None),
    "int4-g32-zeros": ("int4", 32, False, None),
    "int4-g64-zeros": ("int4", 64, False, "bf16"),
    "int4-g128-zeros": ("int4", 128, False, "int4"),
    "bf16-head-int8": ("bf16", 32, True, "int8"),
}


def flags():
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def isas():
    """Instruction sets this processor has."""
    found = flags()
    has = {
        "avx512": all(f" {f}" in found for f in ("avx512f", "avx512bw", "avx512vl", "avx512_vnni")),
        "avx2": all(f" {f}" in found for f in ("avx2", "fma", "f16c")),
    }
    missing = "this processor has no such instructions"
    return [
        pytest.param(isa, marks=() if has.get(isa, True) else pytest.mark.skip(reason=missing))
        for isa in jit.ISAS
    ]


def backend(kit, model, id="fp32", *, workers=3, isa="auto", chunk=16, cache="fp32", positions=128):
    format, group, symmetric, head = FORMATS[id]
    spec, weights = kit.weights(
        model, format, group=group, head=head, symmetric=symmetric, positions=positions
    )
    plan = Plan.make(spec, workers, chunk=chunk)
    return CPUBackend(plan, weights, cache_format=cache, isa=isa), weights


# --------------------------------------------------------------------------------------------------
# Against the reference


@pytest.mark.parametrize("id", FORMATS)
@pytest.mark.parametrize("isa", isas())
def test_logits_equal_the_reference(kit, id, isa):
    model = kit.model("llama-biases", **WIDE)
    native, weights = backend(kit, model, id, isa=isa)
    tokens = kit.tokens(40)
    wanted, _ = Reference(native.plan, weights, max_len=48).decode(tokens)
    found = kit.fed(native, tokens, threads=2)
    # An activation on the edge between two int8 may fall on either side of it in float32.
    quantised = "int" in id
    assert rms_ratio(found, wanted) < (2e-2 if quantised else 2e-6)
    if quantised:  # and most do not: half of the tokens have no such error
        errors = [rms_ratio(a, b) for a, b in zip(found, wanted, strict=True)]
        assert sorted(errors)[len(errors) // 2] < 1e-2
        first = rms_ratio(found[:1], wanted[:1])
        assert first < 5e-3


@pytest.mark.parametrize("id", ["int8", "int4-g32", "int4-g128-zeros"])
@pytest.mark.parametrize("isa", isas())
def test_one_product_equals_the_reference_to_the_last_bits(kit, id, isa):
    """With no layers there is one rounding of the activations, and no chain of errors."""
    model = kit.model(num_hidden_layers=1, **{**WIDE, "hidden_size": 384})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    format, group, symmetric, _ = FORMATS[id]
    spec, weights = kit.weights(model, format, group=group, head=format, symmetric=symmetric)
    plan = Plan.make(spec, 2, chunk=16)
    tokens = kit.tokens(30)
    wanted, _ = Reference(plan, weights, dtype=torch.float32, max_len=32).decode(tokens)
    found = kit.fed(CPUBackend(plan, weights, cache_format="fp32", isa=isa), tokens)
    exact = [rms_ratio(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True)]
    assert sum(exact) >= 20  # but for the edges


@pytest.mark.parametrize(
    "kind",
    ["llama", "llama-groups-of-7", "llama-one-kv-head", "qwen2-window", "qwen3", "mistral",
     "smollm3-window", "phi3-partial", "llama-tied"],
)  # fmt: skip
@pytest.mark.parametrize("isa", isas())
def test_every_kind_of_model_on_every_instruction_set(kit, kind, isa):
    native, weights = backend(kit, kit.model(kind), isa=isa)
    tokens = kit.tokens(36)
    wanted, _ = Reference(native.plan, weights, max_len=48).decode(tokens)
    assert rms_ratio(kit.fed(native, tokens, threads=3), wanted) < 2e-6


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 8])
def test_any_number_of_query_heads_for_a_kv_head(kit, heads):
    model = kit.model(num_attention_heads=heads, num_key_value_heads=1, hidden_size=40, head_dim=10)
    native, weights = backend(kit, model)
    tokens = kit.tokens(34)
    wanted, _ = Reference(native.plan, weights, max_len=48).decode(tokens)
    assert rms_ratio(kit.fed(native, tokens), wanted) < 2e-6


def test_a_bf16_cache_costs_what_rounding_keys_and_values_costs(kit):
    model = kit.model("llama", **WIDE)
    native, weights = backend(kit, model, "fp32", cache="bf16")
    tokens = kit.tokens(40)
    found = kit.fed(native, tokens)
    plain = TorchBackend(native.plan, weights, cache_format="bf16")
    assert rms_ratio(found, kit.fed(plain, tokens)) < 2e-3  # a key may round to either side
    exact, _ = Reference(native.plan, weights, max_len=48).decode(tokens)
    assert 1e-4 < rms_ratio(found, exact) < 2e-2


def test_the_torch_back_end_is_the_reference_without_rounded_activations(kit):
    for id in ("fp32", "bf16"):
        native, weights = backend(kit, kit.model("llama-biases", **WIDE), id)
        tokens = kit.tokens(20)
        wanted, _ = Reference(native.plan, weights, max_len=48).decode(tokens)
        plain = TorchBackend(native.plan, weights, cache_format="fp32")
        assert rms_ratio(kit.fed(plain, tokens), wanted) < 2e-6
        assert plain.streamed == sum(p.tiles.numel() for p in native.packed.values())


# --------------------------------------------------------------------------------------------------
# Whoever does which part


@pytest.mark.parametrize("id", ["fp32", "bf16", "int8", "int4-g64-zeros"])
def test_threads_and_workers_change_no_bit(kit, id):
    model = kit.model("llama-biases", **WIDE)
    tokens = kit.tokens(40)
    first = None
    for workers in (1, 2, 3, 4, 5):
        native, _ = backend(kit, model, id, workers=workers)
        for threads in range(1, workers + 1):
            found = kit.fed(native, tokens, threads=threads)
            first = found if first is None else first
            assert torch.equal(found, first), (workers, threads)


def test_more_workers_than_rows(kit):
    model = kit.model(num_hidden_layers=1)
    few, _ = backend(kit, model, workers=1)
    many, _ = backend(kit, model, workers=33)
    tokens = kit.tokens(20)
    assert torch.equal(kit.fed(many, tokens, threads=33), kit.fed(few, tokens))


def test_one_call_of_many_tokens_is_many_calls_of_one(kit):
    model = kit.model("qwen2-window")
    native, _ = backend(kit, model, workers=2)
    tokens = kit.tokens(50)
    whole = kit.fed(native, tokens, threads=2)
    cache = KVCache(native.plan.spec, 128, format="fp32")
    last = torch.empty(97)
    for position, token in enumerate(tokens):
        native.decode(cache.keys, cache.values, torch.tensor([token]), position=position, new=0,
                      logits=last, threads=1 + position % 2)  # fmt: skip
        assert torch.equal(last, whole[position])


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_tokens_chosen_in_one_call_are_those_of_many(kit, temperature):
    native, _ = backend(kit, kit.model(), workers=2)
    given = torch.tensor(kit.tokens(6))
    caches = [KVCache(native.plan.spec, 64, format="fp32") for _ in range(2)]
    every = torch.empty(25, 97)
    at_once = native.decode(
        caches[0].keys, caches[0].values, given, position=0, new=20, logits=every, threads=2,
        temperature=temperature, seed=3,
    ).tolist()  # fmt: skip
    one = torch.empty(97)
    found, token = [], given
    for position in [0, *range(6, 25)]:
        more = native.decode(
            caches[1].keys, caches[1].values, token, position=position, new=1, logits=one,
            threads=1, temperature=temperature, seed=3,
        )  # fmt: skip
        found += more.tolist()
        token = more
        assert torch.equal(one, every[5 + len(found) - 1])
    assert found == at_once
    assert len(set(found)) > 5
    if temperature is None:
        assert every[5:].argmax(1).tolist() == at_once
    for a, b in zip(
        caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True
    ):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("cache_format", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_garbage_beyond_the_length_changes_nothing(kit, cache_format, kind):
    native, _ = backend(kit, kit.model(kind), cache=cache_format, workers=2)
    tokens = kit.tokens(40)
    clean = kit.fed(native, tokens)
    for bad in (float("nan"), float("inf"), 1e30):
        cache = KVCache(native.plan.spec, 128, format=cache_format)
        for t in (*cache.keys, *cache.values):
            t.fill_(bad)
        out = torch.empty(40, 97)
        native.decode(cache.keys, cache.values, torch.tensor(tokens), position=0, new=0,
                      logits=out, threads=2)  # fmt: skip
        assert torch.equal(out, clean)


@pytest.mark.parametrize("cache_format", ["fp32", "bf16"])
def test_only_the_new_positions_of_the_cache_are_written(kit, cache_format):
    native, _ = backend(kit, kit.model("qwen3"), cache=cache_format, workers=2)
    cache = KVCache(native.plan.spec, 64, format=cache_format)
    tokens = kit.tokens(30)
    out = torch.empty(97)
    native.decode(cache.keys, cache.values, torch.tensor(tokens[:20]), position=0, new=0,
                  logits=out, threads=2)  # fmt: skip
    for t in (*cache.keys, *cache.values):
        mark = torch.full_like(t, 7.0)
        positions = (torch.arange(64) >= 20) & (torch.arange(64) != 20)
        if t.ndim == 4:  # [Hkv, 4, D, 16]
            where = positions.reshape(1, 4, 1, 16).expand_as(t)
        else:
            where = positions.reshape(1, 64, 1).expand_as(t)
        t[where] = mark[where]
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    native.decode(cache.keys, cache.values, torch.tensor(tokens[20:21]), position=20, new=0,
                  logits=out, threads=2)  # fmt: skip
    cache.length = 64
    other = KVCache(native.plan.spec, 64, format=cache_format)
    other.keys, other.values, other.length = before[:2], before[2:], 64
    for number in range(2):
        for now, old in zip(cache.layer(number), other.layer(number), strict=True):
            same = (now == old).all(2).all(0)
            assert same[:20].all()
            assert not same[20]
            assert same[21:].all()


def test_keys_and_values_are_those_of_transformers(kit):
    model = kit.model("qwen3")
    native, _ = backend(kit, model)
    tokens = kit.tokens(20)
    cache = KVCache(native.plan.spec, 32, format="fp32")
    native.decode(cache.keys, cache.values, torch.tensor(tokens), position=0, new=0,
                  logits=torch.empty(97), threads=1)  # fmt: skip
    cache.length = 20
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens]), use_cache=True).past_key_values
    for number, layer in enumerate(theirs.layers):
        keys, values = cache.layer(number)
        assert rms_ratio(keys, layer.keys[0]) < 1e-5
        assert rms_ratio(values, layer.values[0]) < 1e-5


def test_all_logits_or_the_last_ones(kit):
    native, _ = backend(kit, kit.model())
    tokens = kit.tokens(10)
    every = kit.fed(native, tokens)
    cache = KVCache(native.plan.spec, 32, format="fp32")
    last = torch.empty(97)
    found = native.decode(cache.keys, cache.values, torch.tensor(tokens), position=0, new=0,
                          logits=last, threads=1)  # fmt: skip
    assert torch.equal(last, every[-1])
    assert found.tolist() == []


# --------------------------------------------------------------------------------------------------
# Choosing


def greedy(native, tokens, new, **options):
    cache = KVCache(native.plan.spec, 128, format=native.cache_format)
    out = torch.empty(native.plan.spec.vocab)
    return native.decode(
        cache.keys, cache.values, torch.tensor(tokens), position=0, new=new, logits=out,
        **{"threads": 2, **options},
    ).tolist()  # fmt: skip


def test_it_stops_after_any_of_the_ends(kit):
    native, _ = backend(kit, kit.model(), workers=2)
    found = greedy(native, [5], 40)
    assert len(found) == 40
    for place in (0, 3, 20):
        end = found[place]
        assert greedy(native, [5], 40, ends=[1000, end]) == found[: found.index(end) + 1]


def test_it_stops_where_it_is_told_to(kit):
    native, _ = backend(kit, kit.model(), workers=2)
    cancel = torch.ones(1, dtype=torch.int32)
    assert len(greedy(native, [5], 40, cancel=cancel)) == 1
    cancel.zero_()
    assert len(greedy(native, [5], 40, cancel=cancel)) == 40


def test_a_call_returns_when_its_time_is_up(kit):
    native, _ = backend(kit, kit.model())
    whole = greedy(native, [5, 6, 7], 40)
    assert greedy(native, [5, 6, 7], 40, limit=0.0) == whole[:1]  # all that was given is read
    assert greedy(native, [5, 6, 7], 40, limit=60.0) == whole


def test_it_is_stopped_by_another_thread(kit):
    model = kit.model(max_position_embeddings=200_000, num_hidden_layers=4)
    native, _ = backend(kit, model, workers=2, positions=60_000, chunk=256)
    cancel = torch.zeros(1, dtype=torch.int32)
    cache = KVCache(native.plan.spec, 60_000, format="fp32")
    timer = threading.Timer(0.2, lambda: cancel.fill_(1))
    timer.start()
    found = native.decode(cache.keys, cache.values, torch.tensor([1]), position=0, new=59_000,
                          logits=torch.empty(97), threads=2, cancel=cancel)  # fmt: skip
    timer.join()
    assert 0 < len(found) < 59_000


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_among_equals_the_lowest_number_is_chosen(kit, workers):
    model = kit.model()
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[:1]  # all 97 logits are the same
    native, _ = backend(kit, model, workers=workers)
    assert greedy(native, [5], 3, threads=workers) == [0, 0, 0]
    with torch.no_grad():
        model.lm_head.weight[:60] *= -1  # two groups of equals
    native, _ = backend(kit, model, workers=workers)
    logits = kit.fed(native, [5])[0]
    assert set(greedy(native, [5], 3, threads=workers)) <= {0, 60}
    assert greedy(native, [5], 1, threads=workers) == [int(logits.argmax())]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("row", [0, 50, 96])
def test_a_logit_that_is_nan_is_an_error(kit, workers, row):
    model = kit.model()
    spec, weights = kit.weights(model)
    weights.head.values[row, 7] = float("nan")  # after the weights were checked
    native = CPUBackend(Plan.make(spec, workers), weights, cache_format="fp32")
    for new in (0, 3):
        with pytest.raises(UserError, match="a logit is NaN"):
            greedy(native, [5], new, threads=workers)


@pytest.mark.parametrize("id", ["int8", "int4-g32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("isa", isas())
def test_an_activation_that_is_not_finite_is_no_silent_zero(kit, id, bad, isa):
    native, weights = backend(kit, kit.model(**WIDE), id, isa=isa)
    weights.layers[1].norm1[7] = bad  # packed already, read at every token
    with pytest.raises(UserError, match="a logit is NaN"):
        greedy(native, [5], 1)


def test_denormal_numbers_are_zeros_to_it_and_nobody_else(kit):
    model = kit.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(1e-42)
    native, _ = backend(kit, model)
    tiny = torch.tensor([1e-40])
    assert (kit.fed(native, [5]) == 0).all() or native.isa == "portable"
    assert float(tiny * 0.5) != 0  # the state of this thread is as it was
    assert torch.isfinite(kit.fed(native, [5])).all()


# --------------------------------------------------------------------------------------------------
# Living with others


def test_other_python_threads_run_meanwhile(kit):
    model = kit.model(max_position_embeddings=200_000, num_hidden_layers=4)
    native, _ = backend(kit, model, workers=1, positions=20_000, chunk=256)
    cache = KVCache(native.plan.spec, 20_000, format="fp32")
    cancel = torch.zeros(1, dtype=torch.int32)
    counted = []

    def count():
        for _ in range(20):
            time.sleep(0.005)
            counted.append(time.monotonic())
        cancel.fill_(1)

    thread = threading.Thread(target=count)
    thread.start()
    native.decode(cache.keys, cache.values, torch.tensor([1]), position=0, new=19_000,
                  logits=torch.empty(97), threads=1, cancel=cancel)  # fmt: skip
    ended = time.monotonic()
    thread.join(timeout=60)
    assert len(counted) == 20
    assert counted[0] < counted[-1] <= ended  # all of it within one native call


def test_calls_from_several_threads_do_not_disturb_one_another(kit):
    native, _ = backend(kit, kit.model(), workers=2)
    wanted = {n: greedy(native, [n], 30) for n in range(6)}
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: greedy(native, [n], 30)}))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == wanted


def test_two_models_side_by_side(kit):
    one, _ = backend(kit, kit.model(seed=1), workers=2)
    two, _ = backend(kit, kit.model("qwen3", seed=2), workers=2)
    wanted = greedy(one, [5], 10), greedy(two, [5], 10)
    for _ in range(3):
        assert (greedy(one, [5], 10), greedy(two, [5], 10)) == wanted


def test_more_threads_than_cores_come_to_an_end(kit):
    native, _ = backend(kit, kit.model(), workers=8)
    alone = greedy(native, [5], 30, threads=1)
    start = time.monotonic()
    assert greedy(native, [5], 30, threads=8) == alone
    assert time.monotonic() - start < 30


def test_a_longer_cache_may_follow_a_shorter_one(kit):
    native, _ = backend(kit, kit.model(), workers=2)
    tokens = kit.tokens(40)
    wanted = kit.fed(native, tokens, max_len=128)
    fresh, _ = backend(kit, kit.model(), workers=2)
    assert torch.equal(kit.fed(fresh, tokens[:10], max_len=16), wanted[:10])
    assert torch.equal(kit.fed(fresh, tokens, max_len=48), wanted)
    assert torch.equal(kit.fed(fresh, tokens[:10], max_len=16), wanted[:10])


FORKED = """
import os, sys, warnings, torch
sys.path.insert(0, FOLDER)
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import bare_model
backend = bare_model.make("bf16")
before = bare_model.decode(backend, threads=3)
child = os.fork()
if not child:
    os._exit(0 if bare_model.decode(backend, threads=3) == before else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), bare_model.decode(backend, threads=3) == before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_makes_its_own_threads_and_both_processes_end():
    code = FORKED.replace("FOLDER", repr(str(Path(__file__).parent)))
    assert in_fresh_python(code) == "0 True"


# --------------------------------------------------------------------------------------------------
# What is made


def test_structures_have_the_sizes_the_library_says():
    from flashformer.backends import cpu

    library = cpu.load_library()
    sizes = (ctypes.c_int64 * 5)()
    library.ff_sizes(sizes)
    assert [ctypes.sizeof(s) for s in cpu._STRUCTURES] == list(sizes)


@pytest.mark.parametrize("isa", isas())
def test_the_name_says_the_instruction_set(kit, isa):
    native, _ = backend(kit, kit.model(), isa=isa)
    assert native.name == f"cpu ({native.isa})"
    if isa != "auto":
        assert native.isa == isa


def test_all_weights_of_a_token_are_one_stream(kit):
    native, _ = backend(kit, kit.model(**WIDE), "int4-g128")
    tiles = sum(p.tiles.numel() for p in native.packed.values())
    assert tiles <= native.streamed <= tiles + 4096 * len(native.packed)
    places = [p.tiles.data_ptr() for p in native.packed.values()]
    assert places == sorted(places)
    assert all(place % 64 == 0 for place in places)
    assert list(native.packed) == [s.name for s in native.plan.stages if s.kind != "attention"]
    assert native.group == 128


def test_single_stages_one_after_the_other_are_a_token(kit):
    native, _ = backend(kit, kit.model(), workers=2)
    tokens = kit.tokens(5)
    wanted = kit.fed(native, tokens, threads=2)
    cache = KVCache(native.plan.spec, 128, format="fp32")
    out = torch.empty(97)
    for position, token in enumerate(tokens):
        for number in range(len(native.plan.stages)):
            native.decode(
                cache.keys, cache.values, torch.tensor([token]), position=position, new=0,
                logits=out, threads=2, stages=(number, number + 1),
            )  # fmt: skip
        assert torch.equal(out, wanted[position])


def test_bandwidth_is_measured(kit):
    native, _ = backend(kit, kit.model(), workers=2)
    assert 1e8 < native.read_bandwidth(1, size=2**22, rounds=2) < 1e13
