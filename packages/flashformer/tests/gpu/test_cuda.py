"""The CUDA back-end on a GPU, against the CPU's and against itself."""

import threading
import time

import pytest
import torch

from flashformer.backends import cuda
from flashformer.backends.cpu import CPUBackend
from flashformer.cache import KVCache
from flashformer.plan import Plan
from tenfold_common.errors import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOM = 256
FORMATS = ("fp32", "bf16", "int8", "int4")
SIZES = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}  # int4 divides them


def cache_on(device, spec, format, room=ROOM):
    cache = KVCache(spec, room, format=format)
    cache.keys = [t.fill_(torch.nan).to(device) for t in cache.keys]
    cache.values = [t.fill_(torch.nan).to(device) for t in cache.values]
    return cache


def decode(backend, given, new, *, cache=None, every=True, **options):
    """Return logits and tokens, on the CPU."""
    spec, device = backend.plan.spec, backend.device
    cache = cache or cache_on(device, spec, backend.cache_format)
    steps = len(given) + max(new - 1, 0)
    logits = torch.full((steps, spec.vocab) if every else (spec.vocab,), torch.nan, device=device)
    chosen = backend.decode(
        cache.keys, cache.values, torch.tensor(given, device=device), position=0, new=new,
        logits=logits, threads=1, **options,
    )  # fmt: skip
    return logits.cpu(), chosen.tolist()


def both(kit, kind, format, mode, *, workers=None, symmetric=True, **changes):
    """Return a back-end on the GPU and one on the CPU of the same weights."""
    model = kit.model(kind, **changes)
    spec, weights = kit.weights(model, format, symmetric=symmetric, positions=ROOM)
    cache = "fp32" if format == "fp32" else "bf16"
    workers = workers or torch.cuda.get_device_properties(0).multi_processor_count
    plan = Plan.make(spec, workers, chunk=32)
    gpu = cuda.CUDABackend(plan, weights, cache_format=cache, device="cuda:0", mode=mode)
    return gpu, CPUBackend(Plan.make(spec, 1), weights, cache_format=cache)


@pytest.mark.parametrize("mode", cuda.MODES[::-1])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "kind", ["llama", "llama-biases", "qwen3", "qwen2-window", "smollm3", "phi3"]
)
def test_logits_and_tokens_equal_those_of_the_cpu(kit, kind, format, mode):
    gpu, cpu = both(kit, kind, format, mode, symmetric=kind != "qwen3", **SIZES)
    given = kit.tokens(100)
    logits, chosen = decode(gpu, given, 1)
    expected, same = decode(cpu, given, 1)
    error = (logits - expected).abs() / expected.abs().max()
    assert error.flatten().median() < 2e-6
    assert error.max() < (1e-4 if format in ("fp32", "bf16") else 2e-2)
    assert chosen == same


@pytest.mark.parametrize("mode", cuda.MODES)
def test_many_tokens_a_launch_and_the_same_bits_every_time(kit, mode):
    gpu, cpu = both(kit, "llama", "fp32", mode)
    given = kit.tokens(5)
    first = decode(gpu, given, 200)
    assert first[1] == decode(cpu, given, 200)[1]
    for _ in range(3):
        logits, chosen = decode(gpu, given, 200)
        assert chosen == first[1]
        assert torch.equal(logits, first[0])


@pytest.mark.parametrize("mode", cuda.MODES)
@pytest.mark.parametrize("workers", [1, 7, 64])
def test_any_number_of_workers(kit, mode, workers):
    gpu, cpu = both(kit, "llama-groups-of-7", "fp32", mode, workers=workers)
    given = kit.tokens(70)
    torch.testing.assert_close(
        decode(gpu, given, 0)[0], decode(cpu, given, 0)[0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("mode", cuda.MODES)
def test_draws_are_those_of_the_cpu(kit, mode):
    gpu, cpu = both(kit, "llama", "fp32", mode)
    options = {"temperature": 0.8, "seed": 2**63 + 3, "every": False}
    assert (
        decode(gpu, kit.tokens(3), 50, **options)[1] == decode(cpu, kit.tokens(3), 50, **options)[1]
    )


@pytest.mark.parametrize("mode", cuda.MODES)
def test_stops_after_an_end(kit, mode):
    gpu, cpu = both(kit, "llama", "fp32", mode)
    tokens = decode(cpu, kit.tokens(3), 40)[1]
    end = next(t for t in tokens[10:] if tokens.index(t) >= 10)
    options = {"ends": [96, end], "every": False}
    logits, chosen = decode(gpu, kit.tokens(3), 40, **options)
    expected, same = decode(cpu, kit.tokens(3), 40, **options)
    assert chosen == same
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", cuda.MODES)
def test_stops_where_another_thread_asks_for_it(kit, mode):
    gpu, _ = both(kit, "llama", "bf16", mode, max_position_embeddings=65536)
    room = 16384
    model = kit.model("llama", max_position_embeddings=65536)
    spec, weights = kit.weights(model, "bf16", positions=room)
    plan = Plan.make(spec, gpu.plan.workers, chunk=256)
    gpu = cuda.CUDABackend(plan, weights, cache_format="bf16", device="cuda:0", mode=mode)
    cancel = torch.zeros(1, dtype=torch.int32)
    timer = threading.Timer(0.05, lambda: cancel.fill_(1))
    timer.start()
    begin = time.monotonic()
    cache = cache_on("cuda:0", spec, "bf16", room)
    _, chosen = decode(gpu, [1], room - 1, cache=cache, every=False, cancel=cancel)
    timer.join()
    assert 0 < len(chosen) < room - 1
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("mode", cuda.MODES)
def test_nan_among_the_logits_is_an_error_and_the_next_call_is_fine(kit, mode):
    gpu, cpu = both(kit, "llama", "fp32", mode)
    cache = cache_on("cuda:0", gpu.plan.spec, "fp32")
    with pytest.raises(UserError, match="a logit is NaN"):
        gpu.decode(
            cache.keys, cache.values, torch.tensor([1], device="cuda:0"), position=3, new=2,
            logits=torch.zeros(97, device="cuda:0"),
        )  # fmt: skip
    assert decode(gpu, [5], 8)[1] == decode(cpu, [5], 8)[1]


def test_a_worker_that_does_not_come_is_reported_and_the_next_call_is_fine(kit, monkeypatch):
    gpu, cpu = both(kit, "llama", "fp32", "megakernel", workers=8)
    whole = gpu._runner._launch

    def one_less(name, blocks, *arguments, **options):
        whole(name, blocks - 1, *arguments, **options)

    monkeypatch.setattr(gpu.model, "patience", 0.2)
    monkeypatch.setattr(gpu._runner, "_launch", one_less)
    with pytest.raises(cuda.CudaError, match=r"after layer 0 qkv .* 7 arrivals of 8 by 8 workers"):
        decode(gpu, [5], 8)
    monkeypatch.undo()
    assert decode(gpu, [5], 8)[1] == decode(cpu, [5], 8)[1]


def test_falls_back_to_the_graph_with_a_warning(kit, monkeypatch):
    gpu, cpu = both(kit, "llama", "fp32", "megakernel", workers=8)

    def refused(heads):
        raise cuda.CudaError("refused", cuda.TOO_LARGE)

    monkeypatch.setattr(gpu._runner, "run", refused)
    with pytest.warns(RuntimeWarning, match="using a CUDA graph"):
        chosen = decode(gpu, [5], 8)[1]
    assert gpu.mode == "graph"
    assert chosen == decode(cpu, [5], 8)[1]


def test_probes(kit):
    gpu, _ = both(kit, "llama", "fp32", "megakernel")
    decode(gpu, kit.tokens(4), 0)
    gpu._runner.probe_stream()
    gpu.model.state.zero_()
    gpu._runner.probe_waits(100)
    assert gpu.model.answer().arrived == 100 * gpu.plan.workers
