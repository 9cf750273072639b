"""Every Triton kernel compiles for the GPUs it is meant for; no GPU is needed for that.

Compiling goes down to machine code with the assembler that Triton brings. Shared memory and spills
are printed (`pytest -rP`); what they mean for speed only a GPU can tell.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

A100, L40, H100, B200 = 80, 89, 90, 100
SHARED_MEMORY = {A100: 163 << 10, L40: 99 << 10, H100: 227 << 10, B200: 227 << 10}
ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LOW_PRECISION = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "d_out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"}


def kernels():
    from path_attn.kernels import backward, decode, forward

    return {
        "fwd": forward.tree_attention_fwd_kernel.fn,
        "dq": backward.tree_attention_bwd_kernel_dq.fn,
        "dkv": backward.tree_attention_bwd_kernel_dkv.fn,
        "decode": decode.path_decode_fwd_kernel,
        "join": decode.path_decode_join_kernel,
    }


def tiles_of(name, dtype, dim):
    from path_attn.kernels.tiles import BACKWARD, FORWARD, usable

    width = 2 * triton.next_power_of_2(dim)
    shape = {"blocks": 8, "block": 64, "width": width, "element_size": ELEMENT_SIZE[dtype]}
    return [tile for tile in (FORWARD if name == "fwd" else BACKWARD) if usable(tile, **shape)]


def build(name, dtype, arch, *, dim=32, tile=None, every_option=True):
    """Compile one kernel and return it."""
    from triton.backends.compiler import GPUTarget

    kernel = kernels()[name]
    padded = max(16, triton.next_power_of_2(dim))
    merge, other, warps, stages = tile or (1, 32, 4, 1)
    constants = {
        "BLOCK": 64, "BLOCK_PAD": 64, "K_DIM": dim, "V_DIM": dim, "K_PAD": padded, "V_PAD": padded,
        "GATED": every_option, "CAPPED": every_option, "WINDOWED": every_option,
        "BIASED": every_option, "MASKED": every_option, "PRECISION": "ieee", "BLOCK_N": other,
        "MERGE": merge, "BLOCK_G": 16, "BLOCK_S": 16,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return (
                "*i8"
                if argument == "valid_ptr"
                else f"*{dtype if argument in LOW_PRECISION else 'fp32'}"
            )
        return "fp32" if argument == "softcap" else "i32"

    if name == "join":
        constants["V_DIM"] = dim
    source = triton.compiler.ASTSource(
        kernel,
        {argument: kind(argument) for argument in kernel.arg_names},
        constants,
        {
            (i,): [["tt.divisibility", 16]]
            for i, a in enumerate(kernel.arg_names)
            if a.endswith("_ptr")
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def spilled(compiled, arch, folder: Path) -> str:
    """Registers and spilled bytes as the assembler reports them."""
    name = "ptxas" if arch < H100 else "ptxas-blackwell"
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    target = f"sm_{arch}" + ("a" if arch >= H100 else "")
    words = [
        str(assembler),
        "-v",
        f"--gpu-name={target}",
        str(source),
        "-o",
        str(folder / "kernel.cubin"),
    ]
    report = subprocess.run(words, capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    return " ".join(re.findall(r"(\d+ registers|\d+ bytes spill stores)", text))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compile anew each time, with the default of today for fused multiply-add stated."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize(
    ("dtype", "arch"), [("bf16", A100), ("bf16", H100), ("fp16", H100), ("fp32", H100)]
)
@pytest.mark.parametrize("name", ["fwd", "dq", "dkv", "decode"])
def test_every_kernel_compiles_with_every_option(name, dtype, arch, tmp_path):
    dim = 16 if dtype == "fp32" else 32
    tile = None if name == "decode" else tiles_of(name, dtype, dim)[0]
    compiled = build(name, dtype, arch, dim=dim, tile=tile)
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    if dtype != "fp32":
        assert ("wgmma" if arch == H100 and name != "decode" else "mma.sync") in compiled.asm["ptx"]
    print(name, dtype, arch, tile, compiled.metadata.shared, spilled(compiled, arch, tmp_path))


def test_the_joining_kernel_compiles():
    assert len(build("join", "fp32", A100).asm["cubin"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [A100, L40, H100, B200])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["fwd", "dq", "dkv"])
def test_some_tile_fits_every_gpu(name, dim, dtype, arch, tmp_path):
    """The largest tile that fits is printed; there must be one."""
    for tile in tiles_of(name, dtype, dim):
        compiled = build(name, dtype, arch, dim=dim, tile=tile, every_option=False)
        print(
            name,
            dim,
            dtype,
            arch,
            tile,
            compiled.metadata.shared,
            spilled(compiled, arch, tmp_path),
        )
        if compiled.metadata.shared <= SHARED_MEMORY[arch]:
            return
    pytest.fail(f"no tile of {name} fits {SHARED_MEMORY[arch]} bytes")


def test_importing_the_kernels_needs_no_gpu():
    found = kernels()
    assert sorted(found) == ["decode", "dkv", "dq", "fwd", "join"]
