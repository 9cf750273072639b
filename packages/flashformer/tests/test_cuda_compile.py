"""The CUDA kernels compile for every architecture, without spills and within the chip's limits."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from flashformer import cuda_driver
from flashformer.backends import cuda, cuda_build
from flashformer.backends.cuda import CUDABackend
from flashformer.backends.cuda_build import Chip, Form, arch_of, geometry
from flashformer.config import ModelSpec
from flashformer.jit import CompilerError
from flashformer.plan import Plan, chunk_for
from tenfold_common.errors import UserError

needs_compiler = pytest.mark.skipif(
    cuda_driver.nvrtc() is None and cuda_driver.nvcc() is None, reason="needs NVRTC or nvcc"
)


def shape(kind, hidden, intermediate, heads, kv_heads, head_dim, vocab, layers, **fields):
    return ModelSpec(
        kind, hidden, intermediate, heads, kv_heads, head_dim, vocab, 1e-5, head_dim, 131072,
        (None,) * layers, (True,) * layers, **fields,
    )  # fmt: skip


SHAPES = {
    "llama-1b": shape("llama", 2048, 8192, 32, 8, 64, 128256, 16, tied=True),
    "llama-8b": shape("llama", 4096, 14336, 32, 8, 128, 128256, 32),
    "qwen3-0.6b": shape("qwen3", 1024, 3072, 16, 8, 128, 151936, 28, qk_norm=True, tied=True),
}
FORMATS = {
    "fp32": {"weights": "fp32", "cache": "fp32"},
    "bf16": {"weights": "bf16"},
    "int8": {"weights": "int8"},
    "int4-g32": {"weights": "int4", "group": 32, "zeros": True, "head": "bf16"},
    "int4-g64": {"weights": "int4", "group": 64},
    "int4-g128": {"weights": "int4", "group": 128},
}
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
KERNELS = {
    "megakernel": {"ff_decode", "ff_probe_waits", "ff_probe_stream"},
    "graph": {f"ff_{n}" for n in ("qkv", "attention", "output", "up", "down", "head", "advance")},
}
SOME = [  # every architecture, model, format and mode; all of them together are marked slow
    ("sm_80", "llama-1b", "bf16", "megakernel"),
    ("sm_80", "llama-8b", "int8", "graph"),
    ("sm_89", "qwen3-0.6b", "int4-g32", "megakernel"),
    ("sm_90a", "llama-8b", "int4-g128", "megakernel"),
    ("sm_90a", "llama-1b", "bf16", "graph"),
    ("sm_100a", "llama-8b", "bf16", "megakernel"),
    ("sm_100a", "qwen3-0.6b", "fp32", "graph"),
]


def compiled(arch, model, format, mode="megakernel"):
    return CUDABackend.compile_only(SHAPES[model], arch, mode=mode, ptx=True, **FORMATS[format])


once = functools.cache(compiled)


def check(arch, model, format, mode):
    found = once(arch, model, format, mode)
    kernels, shape, chip = found.build.kernels, found.geometry, Chip.of(arch)
    assert found.build.image[:4] == b"\x7fELF"
    assert kernels.keys() == KERNELS[mode]
    for name, kernel in kernels.items():
        assert kernel.spilled == kernel.stack == 0, (name, kernel)
        assert kernel.registers * cuda_build.THREADS * shape.per_unit <= 65536, (name, kernel)
    assert shape.shared <= chip.block
    assert shape.per_unit * (shape.shared + 1024) <= chip.unit


@needs_compiler
@pytest.mark.parametrize("case", SOME, ids="-".join)
def test_compiles_without_spills_within_the_limits_of_the_chip(case):
    check(*case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", cuda.MODES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_all(arch, model, format, mode):
    if (arch, model, format) == ("sm_89", "llama-8b", "fp32"):  # 99 KB of shared memory
        with pytest.raises(UserError, match="leaves no room for its weights"):
            compiled(arch, model, format, mode)
    else:
        check(arch, model, format, mode)


@needs_compiler
def test_hopper_streams_by_the_copy_engine_and_orders_by_acquire_and_release():
    ptx = once("sm_90a", "llama-8b", "int4-g128", "megakernel").build.ptx
    for instruction in (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "mbarrier.try_wait.parity",
        "mbarrier.arrive.expect_tx",
        "red.release.gpu.global.add.u64",
        "ld.acquire.gpu.global.u64",
        "ld.relaxed.gpu.global.v4.f32",
        "%globaltimer",
    ):
        assert instruction in ptx, instruction
    assert "cp.async.cg" not in ptx


@needs_compiler
def test_ampere_streams_by_the_copies_of_its_threads():
    ptx = once("sm_80", "llama-1b", "bf16", "megakernel").build.ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.mbarrier.arrive.noinc" in ptx
    assert "bulk" not in ptx
    assert "griddepcontrol" not in ptx


@needs_compiler
def test_kernels_of_a_graph_begin_early_on_hopper():
    ptx = once("sm_90a", "llama-1b", "bf16", "graph").build.ptx
    assert "griddepcontrol.launch_dependents" in ptx
    assert "griddepcontrol.wait" in ptx


@pytest.mark.skipif(cuda_driver.nvcc() is None, reason="needs nvcc")
def test_nvcc_is_the_fallback(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "nvrtc", lambda: None)
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path))
    found = compiled("sm_90a", "qwen3-0.6b", "int8")
    assert found.build.compiler.startswith("nvcc V")
    assert found.build.kernels["ff_decode"].spilled == 0


@needs_compiler
def test_compiles_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path))
    sources = {"a.cu": '#include "b.cuh"\nextern "C" __global__ void f(int* p) { *p = B; }'}
    header = {"b.cuh": "#define B 5"}
    first = cuda_driver.compile_kernels({**sources, **header}, "a.cu", "sm_90")
    for name in ("_by_nvrtc", "_by_nvcc"):
        monkeypatch.setattr(cuda_driver, name, None)
    again = cuda_driver.compile_kernels({**sources, **header}, "a.cu", "sm_90")
    assert again == first
    assert again.kernels.keys() == {"f"}
    with pytest.raises(TypeError):  # another header: compiled anew
        cuda_driver.compile_kernels({**sources, "b.cuh": "#define B 6"}, "a.cu", "sm_90")


@needs_compiler
def test_what_the_compiler_says_is_in_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path))
    with pytest.raises(CompilerError, match="mistake"):
        cuda_driver.compile_kernels({"a.cu": "mistake"}, "a.cu", "sm_90")


@needs_compiler
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "file"))
    with pytest.raises(CompilerError, match="FLASHFORMER_CACHE"):
        cuda_driver.compile_kernels({"a.cu": "// nothing\n"}, "a.cu", "sm_90")


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda_driver, "nvrtc", lambda: None)
    monkeypatch.setattr(cuda_driver, "nvcc", lambda: None)
    with pytest.raises(CompilerError, match=r"flashformer\[cuda\]"):
        compiled("sm_90a", "llama-1b", "bf16")


@pytest.mark.parametrize("arch", ["sm_75", "sm_70", "gfx942", "sm_"])
def test_older_chips_are_refused(arch):
    with pytest.raises(UserError, match="sm_80 or newer"):
        Chip.of(arch)


def test_names_of_architectures():
    assert [arch_of(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120",
    ]  # fmt: skip


def test_a_model_too_wide_for_the_chip_is_refused():
    wide = shape("llama", 8192, 28672, 64, 8, 128, 128256, 80)
    forms = dict.fromkeys(cuda_build.PRODUCTS, Form("bf16"))
    with pytest.raises(UserError, match="leaves no room for its weights; use int8 or int4"):
        geometry(wide, forms, Chip.of("sm_89"), "megakernel")
    assert geometry(wide, forms, Chip.of("sm_90a"), "megakernel").slots >= cuda_build.WARPS


@pytest.mark.parametrize("mode", cuda.MODES)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("model", SHAPES)
def test_the_ring_has_slots_for_every_warp_and_most_of_the_room(model, arch, mode):
    forms = dict.fromkeys(cuda_build.PRODUCTS, Form("int4", 128))
    found = geometry(SHAPES[model], forms, Chip.of(arch), mode)
    assert found.slots % cuda_build.WARPS == 0
    assert found.slot % 128 == 0
    assert found.slots * found.slot > 0.4 * found.shared


def test_spec_h_holds_numbers_only():
    forms = dict.fromkeys(cuda_build.PRODUCTS, Form("bf16"))
    spec = SHAPES["llama-1b"]
    text = cuda_build.header(
        spec, forms, geometry(spec, forms, Chip.of("sm_90a"), "graph"), workers=132, chunk=64,
        embedding="bf16", cache="bf16",
    )  # fmt: skip
    number = r"constexpr int [A-Z0-9_]+(\[\] = \{[\d, ]+\}| = \d+);"
    for line in text.splitlines():
        assert re.fullmatch(rf"//.*|#pragma once|namespace spec \{{|\}}.*|{number}", line), line


def test_chunks_grow_with_the_context():
    spec = SHAPES["llama-8b"]
    chunks = [chunk_for(spec, 132, length) for length in (128, 1024, 4096, 131072)]
    assert chunks == [32, 32, 128, 256]
    for chunk in chunks:
        Plan.make(spec, 132, chunk=chunk)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_so(kit):
    spec, weights = kit.weights(kit.model("llama"))
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        cuda.make(spec, weights, cache_format="fp32")
    with pytest.raises(UserError, match="needs a CUDA GPU, not cpu"):
        CUDABackend(Plan.make(spec, 2), weights, cache_format="fp32", device="cpu")
    with pytest.raises(UserError, match="mode must be one of megakernel, graph"):
        CUDABackend(Plan.make(spec, 2), weights, cache_format="fp32", device="cpu", mode="fast")


def test_layers_of_different_forms_are_refused(kit):
    _, mixed = kit.weights(kit.model("llama"))
    _, other = kit.weights(kit.model("llama"), "bf16")
    mixed = replace(mixed, layers=(mixed.layers[0], other.layers[1]))
    with pytest.raises(UserError, match="layer 1 has its qkv weights as"):
        cuda_build.forms_of(mixed)
