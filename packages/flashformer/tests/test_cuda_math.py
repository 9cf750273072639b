"""The CUDA sources executed on the CPU (tests/emulator): every stage, both modes, all formats."""

import ctypes
import hashlib
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from flashformer import sampling
from flashformer.backends import cuda, cuda_build
from flashformer.backends.cpu import CPUBackend
from flashformer.cache import KVCache
from flashformer.config import ModelSpec
from flashformer.jit import cache_folder, compiler
from flashformer.plan import Plan
from flashformer.reference import Reference
from flashformer.weights import read_weights, rotary_tables
from tenfold_common.errors import UserError

EMULATOR = Path(__file__).parent / "emulator"
WORKERS, CHUNK, ROOM = 3, 16, 64

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)


def build(text: str) -> ctypes.CDLL:
    """Compile the emulator for a spec.h, or take it from the cache."""
    digest = hashlib.sha256(text.encode())
    for file in sorted([*EMULATOR.iterdir(), *cuda_build.SOURCES.iterdir()]):
        if file.is_file():
            digest.update(file.read_bytes())
    folder = cache_folder() / f"emulator-{digest.hexdigest()[:20]}"
    library = folder / "emulator.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.h").write_text(text)
        subprocess.run(
            [
                compiler(), "-std=c++20", "-O1", "-g", "-fno-strict-aliasing", "-shared", "-fPIC",
                "-w", "-U_FORTIFY_SOURCE", f"-I{folder}", f"-I{cuda_build.SOURCES}",
                f"-I{EMULATOR}", str(EMULATOR / "emulate.cpp"), "-o", str(library),
            ],
            check=True,
        )  # fmt: skip
    return ctypes.CDLL(str(library))


class Emulated:
    """Takes the place of `cuda.Runner`."""

    def __init__(self, backend: cuda.CUDABackend, chip: cuda_build.Chip) -> None:
        model, plan = backend.model, backend.plan
        shape = cuda_build.geometry(plan.spec, model.forms, chip, backend.mode)
        self.library = build(
            cuda_build.header(
                plan.spec, model.forms, shape, workers=plan.workers, chunk=plan.chunk,
                embedding=model.embedding_format, cache=backend.cache_format,
            )
        )  # fmt: skip
        assert self.library.ff_shared_bytes() == shape.shared
        self.model, self.mode, self.seed, self.silent = model, backend.mode, 1, 0

    def run(self, heads: list[bool]) -> None:
        struct = ctypes.byref(self.model.struct)
        self.seed += 1000
        if self.mode == "megakernel":
            assert not self.library.ff_emulate_decode(struct, self.seed, self.silent), "hangs"
            return
        for head in heads:
            self.seed += 100
            assert not self.library.ff_emulate_step(struct, self.seed, int(head)), "hangs"


SMALL = cuda_build.Chip("sm_90a", 48 * 1024, 104 * 1024)  # so little room that the ring turns often


def compiled(model, mode, *, workers=WORKERS, cache="fp32", **formats):
    """Return back-ends of the same weights: emulated CUDA, CPU; and the weights."""
    spec = ModelSpec.from_config(model.config)
    formats = {"format": "fp32", "group": 32, "head": "fp32", **formats}
    weights = read_weights(spec, model.state_dict(), rotary_tables(model, ROOM), **formats)
    plan = Plan.make(spec, workers, chunk=CHUNK)
    emulated = cuda.CUDABackend(
        plan, weights, cache_format=cache, device="cpu", mode=mode,
        runner=lambda backend: Emulated(backend, SMALL),
    )  # fmt: skip
    return emulated, CPUBackend(plan, weights, cache_format=cache), weights


def decode(backend, given, new, **options):
    """Return logits of every step, tokens and cache."""
    spec = backend.plan.spec
    cache = KVCache(spec, ROOM, format=backend.cache_format)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    logits = torch.full((len(given) + max(new - 1, 0), spec.vocab), torch.nan)
    chosen = backend.decode(
        cache.keys, cache.values, torch.tensor(given), position=0, new=new, logits=logits,
        threads=1, **options,
    )  # fmt: skip
    cache.length = len(given) + max(len(chosen) - 1, 0)
    return logits, chosen.tolist(), cache


@pytest.fixture(autouse=True)
def _tight(monkeypatch):
    """Make slots and rounds so small that tiles of tiny models come in pieces and rounds."""
    monkeypatch.setattr(cuda_build, "_MOST_SLOT", cuda_build._LEAST_SLOT)
    monkeypatch.setattr(cuda_build, "_ROUND", 8)


CASES = {  # kind, changes of the config, format, head, group, symmetric, cache
    "fp32-llama": ("llama", {}, "fp32", "fp32", 32, True, "fp32"),
    "fp32-biases": ("llama-biases", {}, "fp32", "fp32", 32, True, "fp32"),
    "bf16-qwen3": ("qwen3", {"hidden_size": 160}, "bf16", "bf16", 32, True, "bf16"),
    "int8-mistral": (
        "mistral", {"hidden_size": 160, "intermediate_size": 200}, "int8", "int8", 32, True, "bf16",
    ),
    "int4-g32": (
        "llama-groups-of-7", {"hidden_size": 448, "intermediate_size": 384, "head_dim": 16,
        "num_attention_heads": 14}, "int4", "bf16", 32, False, "fp32",
    ),
    "int4-g128": (
        "smollm3", {"hidden_size": 384, "intermediate_size": 256, "head_dim": 64,
        "num_attention_heads": 4}, "int4", "int8", 128, True, "bf16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", cuda.MODES)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_equal_those_of_the_cpu(kit, case, mode):
    kind, changes, format, head, group, symmetric, cache = CASES[case]
    model = kit.model(kind, **changes)
    emulated, cpu, _ = compiled(
        model, mode, cache=cache, format=format, head=head, group=group, symmetric=symmetric
    )
    given = kit.tokens(20 if mode == "megakernel" else 3)
    logits, chosen, filled = decode(emulated, given, 4)
    expected, same, other = decode(cpu, given, 4)
    error = (logits - expected).abs() / expected.abs().max()
    # A sum in another order may round an int8 activation the other way: rare, and then visible.
    assert error.flatten().median() < 1e-6
    assert error.max() < (2e-5 if format in ("fp32", "bf16") else 1e-2)
    assert chosen == same
    for mine, theirs in zip(filled.layer(1), other.layer(1), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("wait", ["5 * l", *(f"5 * l + {n}" for n in range(1, 5))])
def test_every_wait_is_needed(kit, wait, monkeypatch, tmp_path):
    changed = tmp_path / "cuda"
    shutil.copytree(cuda_build.SOURCES, changed)
    text = (changed / "decode.cuh").read_text()
    line = f"    if (!grid.wait({wait})) return false;\n"
    assert text.count(line) == 1
    (changed / "decode.cuh").write_text(text.replace(line, ""))
    monkeypatch.setattr(cuda_build, "SOURCES", changed)
    emulated, cpu, _ = compiled(kit.model("llama"), "megakernel")
    given = kit.tokens(12)
    with suppress(UserError):  # a logit is NaN
        logits, _, _ = decode(emulated, given, 0)
        assert (logits - decode(cpu, given, 0)[0]).abs().max() > 0.1


def test_logits_equal_those_of_the_reference_also_where_workers_have_nothing_to_do(kit):
    emulated, _, weights = compiled(kit.model("qwen2-window"), "megakernel", workers=6)
    given = kit.tokens(18)
    logits, _, _ = decode(emulated, given, 0)
    expected, _ = Reference(emulated.plan, weights).decode(given)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def pairs(kit):
    """Return back-ends in both modes that share one library."""
    model = kit.model("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_build, "_MOST_SLOT", cuda_build._LEAST_SLOT)
        patch.setattr(cuda_build, "_ROUND", 8)
        return {mode: compiled(model, mode)[:2] for mode in cuda.MODES}


@pytest.mark.parametrize("mode", cuda.MODES)
def test_draws_are_those_of_the_cpu(kit, pairs, mode):
    emulated, cpu = pairs[mode]
    options = {"temperature": 0.9, "seed": 2**63 + 11}
    assert (
        decode(emulated, kit.tokens(2), 6, **options)[1]
        == decode(cpu, kit.tokens(2), 6, **options)[1]
    )


@pytest.mark.parametrize("mode", cuda.MODES)
def test_stops_after_an_end_and_leaves_its_logits(kit, pairs, mode):
    emulated, cpu = pairs[mode]
    given = torch.tensor(kit.tokens(2))
    tokens = decode(cpu, given.tolist(), 6)[1]
    end = next(t for t in tokens[2:] if tokens.index(t) >= 2)
    results = []
    for backend in (emulated, cpu):
        cache, logits = KVCache(backend.plan.spec, ROOM, format="fp32"), torch.zeros(97)
        chosen = backend.decode(
            cache.keys, cache.values, given, position=0, new=6, logits=logits, threads=1,
            ends=[96, end],
        )  # fmt: skip
        results.append((chosen.tolist(), logits))
    assert results[0][0] == results[1][0] == tokens[: tokens.index(end) + 1]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", cuda.MODES)
def test_goes_on_from_a_cache_of_the_cpu(kit, pairs, mode):
    emulated, cpu = pairs[mode]
    given = kit.tokens(9)
    _, _, cache = decode(cpu, given[:7], 0)
    logits = torch.zeros(2, 97)
    emulated.decode(
        cache.keys, cache.values, torch.tensor(given[7:]), position=7, new=0, logits=logits
    )
    torch.testing.assert_close(logits, decode(cpu, given, 0)[0][7:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", cuda.MODES)
def test_stops_where_the_host_asks_for_it(kit, pairs, mode, monkeypatch):
    emulated, _ = pairs[mode]
    monkeypatch.setattr(emulated._flag, "zero_", lambda: emulated._flag.fill_(1), raising=False)
    assert len(decode(emulated, kit.tokens(2), 6)[1]) == 1
    emulated._flag.fill_(0)


@pytest.mark.parametrize("mode", cuda.MODES)
def test_nan_among_the_logits_is_an_error(kit, pairs, mode):
    emulated, _ = pairs[mode]
    spec = emulated.plan.spec
    cache = KVCache(spec, ROOM, format="fp32")
    cache.keys[0].fill_(torch.nan)
    with pytest.raises(UserError, match="a logit is NaN"):
        emulated.decode(
            cache.keys, cache.values, torch.tensor([1]), position=3, new=2, logits=torch.zeros(97)
        )


def test_a_worker_that_does_not_come_is_reported(kit, pairs, monkeypatch):
    emulated, _ = pairs["megakernel"]
    monkeypatch.setattr(emulated.model, "patience", 0.05)
    monkeypatch.setattr(emulated._runner, "silent", 1)
    with pytest.raises(cuda.CudaError, match=r"after layer 0 qkv .* 2 arrivals of 3 by 3 workers"):
        decode(emulated, kit.tokens(2), 3)
    monkeypatch.undo()
    assert len(decode(emulated, kit.tokens(2), 3)[1]) == 3  # the next call starts afresh


def test_probes_come_to_an_end(kit, pairs):
    emulated, _ = pairs["megakernel"]
    decode(emulated, kit.tokens(3), 0)  # leaves a request of three steps
    library, struct = emulated._runner.library, ctypes.byref(emulated.model.struct)
    assert library.ff_emulate_stream(struct, 1) == 0
    emulated.model.state.zero_()
    assert library.ff_emulate_waits(struct, 1, 20) == 0
    assert emulated.model.answer().arrived == 20 * WORKERS


def test_packed_gives_the_tiles_back(pairs):
    emulated, cpu = pairs["megakernel"]
    assert emulated.packed.keys() == cpu.packed.keys()
    for name, packed in cpu.packed.items():
        assert torch.equal(emulated.packed[name].tiles, packed.tiles)


def test_tensors_of_another_device_are_refused(pairs):
    emulated, _ = pairs["graph"]
    cache = KVCache(emulated.plan.spec, ROOM, format="fp32")
    with pytest.raises(UserError, match="must be on cpu, not meta"):
        emulated.decode(
            cache.keys, cache.values, torch.tensor([1]), position=0, new=1,
            logits=torch.zeros(97, device="meta"),
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Single functions


@pytest.fixture(scope="module")
def library(pairs):
    return pairs["megakernel"][0]._runner.library


def test_random_words_and_noise(library):
    count, seed, step = 203, 2**64 - 5, 2**33 + 7
    words, noise = (ctypes.c_uint32 * count)(), (ctypes.c_double * count)()
    arguments = (ctypes.c_uint64(seed), ctypes.c_uint64(step), count)
    library.ff_philox(*arguments, words)
    library.ff_gumbel(*arguments, noise)
    assert list(words) == sampling.philox(seed, step, count).tolist()
    np.testing.assert_allclose(list(noise), sampling.gumbel(seed, step, count), rtol=1e-14)


def test_rounding_to_bfloat16(library):
    values = torch.cat([torch.randn(500), torch.tensor([0.0, -0.0, torch.inf, 1e-41, 3.4e38])])
    out = torch.zeros(len(values), dtype=torch.bfloat16)
    library.ff_to_bf16(
        ctypes.c_void_p(values.data_ptr()), len(values), ctypes.c_void_p(out.data_ptr())
    )
    assert torch.equal(out.view(torch.int16), values.bfloat16().view(torch.int16))
    payloads = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF], np.uint32)
    out = torch.zeros(len(payloads), dtype=torch.bfloat16)
    library.ff_to_bf16(
        ctypes.c_void_p(payloads.ctypes.data), len(payloads), ctypes.c_void_p(out.data_ptr())
    )
    assert out.isnan().all()


def test_silu(library):
    values = torch.linspace(-100, 100, 999)
    out = torch.zeros_like(values)
    library.ff_silu(
        ctypes.c_void_p(values.data_ptr()), len(values), ctypes.c_void_p(out.data_ptr())
    )
    torch.testing.assert_close(out, torch.nn.functional.silu(values))


@pytest.mark.parametrize(
    ("a", "i", "b", "j", "wins"),
    [
        (1.0, 5, 0.5, 2, True),
        (1.0, 5, 1.0, 2, False),  # among equals the first, as torch.argmax
        (1.0, 2, 1.0, 5, True),
        (-np.inf, 0, 0.0, -1, True),  # -1: nothing yet
        (np.nan, 3, 1.0, 4, False),
        (1.0, -1, 0.0, 3, False),
    ],
)
def test_who_beats_whom(library, a, i, b, j, wins):
    beats = library.ff_beats
    beats.argtypes = [ctypes.c_float, ctypes.c_int] * 2
    assert bool(beats(a, i, b, j)) == wins
