"""What the CUDA kernels are compiled from, and for: structs, memory, spec.h; needs no GPU."""

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashformer.config import ModelSpec
from flashformer.cuda_driver import Build, compile_kernels
from flashformer.pack import STEP
from flashformer.plan import TILE
from flashformer.quant import FORMATS
from flashformer.weights import ModelWeights
from tenfold_common.errors import UserError

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
MODES = ("megakernel", "graph")
PRODUCTS = ("qkv", "output", "up", "down", "head")
WARPS = 7  # of consumers; with that of the producer 256 threads, which may have 255 registers each
THREADS = 32 * (WARPS + 1)
_SLOT = 6144  # bytes of a slot of the ring at least, where there is room for several for each warp
_LEAST_SLOT, _MOST_SLOT = 2304, 16384
_ROUND = 64  # pieces of tiles whose sums are kept until they are added up
_int32, _int64, _uint64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


# --------------------------------------------------------------------------------------------------
# The structs of csrc/cuda/model.cuh


LAYER_VECTORS = (
    "norm1", "norm2", "query_norm", "key_norm", "qkv_bias", "output_bias", "up_bias", "down_bias",
)  # fmt: skip


class Layer(ctypes.Structure):
    """A layer's vectors."""

    _fields_ = (
        *((name, _pointer) for name in LAYER_VECTORS),
        *((name, _int32) for name in ("window", "rotates")),
    )


class Request(ctypes.Structure):
    """What a call asks for."""

    _fields_ = (
        *((name, _int64) for name in ("position", "steps")),
        ("given", _pointer),
        ("given_count", _int64),
        *((name, _pointer) for name in ("chosen", "ends")),
        ("ends_count", _int64),
        *((name, _int32) for name in ("choice", "all_logits")),
        ("logits", _pointer),
        ("temperature", ctypes.c_double),
        ("seed", _uint64),
        *((name, _pointer) for name in ("cancel", "keys", "values")),
        *((name, _int64) for name in ("max_len", "chunks")),
        *((name, _pointer) for name in ("partial", "tops")),
        ("patience", _uint64),
    )


class State(ctypes.Structure):
    """How far the kernels are, and what went wrong."""

    _fields_ = (
        ("arrived", _uint64),
        ("line", _uint64 * 15),
        ("chosen_count", _int64),
        *((name, _int32) for name in ("cancelled", "not_a_number")),
        *((name, _int32) for name in ("hung", "hung_stage", "hung_worker", "hung_padding")),
        *((name, _uint64) for name in ("hung_arrived", "hung_wanted")),
        *((name, _int64) for name in ("step", "token")),
        *((name, _int32) for name in ("stopped", "stopped_padding")),
    )


class Model(ctypes.Structure):
    """Where everything lies."""

    _fields_ = (
        *(
            (name, _pointer)
            for name in ("weights", "starts", "layers", "norm", "embedding", "cos", "sin")
        ),
        *((name, ctypes.c_float) for name in ("eps", "attention_scale")),
        *((name, _pointer) for name in ("x", "qkv", "act", "best", "request", "state")),
    )


# --------------------------------------------------------------------------------------------------
# What the kernels are compiled for


@dataclass(frozen=True)
class Form:
    """How the matrix of a stage is stored, the same in every layer.

    Attributes:
        format: One of `quant.FORMATS`.
        group: Of int4, else 0.
        zeros: Whether int4 has zero points.
    """

    format: str
    group: int = 0
    zeros: bool = False

    def fits(self, slot: int) -> int:
        """Return how many units (csrc/cuda/shape.cuh) fit a slot of so many bytes."""
        if self.format == "int8":
            return (slot - 4 * TILE) // 2048 * 4
        size = 512 if self.format != "int4" else 8 * self.group + TILE * (3 if self.zeros else 2)
        return slot // size

    def pieces(self, k: int, slot: int) -> int:
        """Return into how many pieces at most a tile is cut; 1 more for the scales of int8."""
        unit = {"fp32": 8, "bf16": 16, "int8": 32, "int4": self.group}[self.format]
        return -(-(-(-k // STEP) * STEP) // unit // self.fits(slot)) + 1


@dataclass(frozen=True)
class Chip:
    """What a kind of GPU allows.

    Attributes:
        arch: As compilers call it.
        block: Bytes of shared memory a block may have.
        unit: Bytes a multiprocessor has for all its blocks; each costs 1024 more.
    """

    arch: str
    block: int
    unit: int

    @classmethod
    def of(cls, arch: str) -> "Chip":
        """Return the chip of an architecture such as `sm_90a`.

        Raises:
            UserError: it is older than sm_80 or no architecture.
        """
        digits = arch.removeprefix("sm_").rstrip("af")
        if not arch.startswith("sm_") or not digits.isdigit() or int(digits) < 80:
            raise UserError(f"the CUDA back-end needs a GPU of sm_80 or newer, not {arch}")
        kilobytes = {80: 164, 87: 164, 90: 228, 100: 228, 103: 228, 110: 228}.get(int(digits), 100)
        return cls(arch, 1024 * (kilobytes - 1), 1024 * kilobytes)


def arch_of(major: int, minor: int) -> str:
    """Return the architecture of a compute capability.

    Example:
        >>> arch_of(9, 0)
        'sm_90a'
    """
    return f"sm_{major}{minor}{'a' if major in (9, 10) else ''}"


@dataclass(frozen=True)
class Geometry:
    """How a block uses its shared memory.

    Attributes:
        slots: Of the ring, a multiple of `WARPS`.
        slot: Bytes of one.
        round: Pieces whose sums are kept at a time.
        shared: Bytes of shared memory of a block.
        per_unit: Blocks that fit a multiprocessor.
    """

    slots: int
    slot: int
    round: int
    shared: int
    per_unit: int


def geometry(spec: ModelSpec, forms: dict[str, Form], chip: Chip, mode: str) -> Geometry:
    """Choose the ring: as large as the chip allows, in graph mode so that two blocks fit.

    The sizes are a guess from the numbers of the hardware, not yet measured on a GPU.

    Raises:
        UserError: the model's vectors leave no room for a ring.
    """
    per_unit = 2 if mode == "graph" else 1
    limit = min(chip.block, chip.unit // per_unit - 1024)
    ks = _ks(spec)
    fixed = _scratch(spec, forms) + 512
    for slot in range(_MOST_SLOT, _LEAST_SLOT - 1, -128):
        most = max(_ROUND, *(forms[name].pieces(ks[name], slot) for name in PRODUCTS))
        room = limit - fixed - 2 * 4 * TILE * most
        turns = room // (WARPS * (slot + 16))
        wanted = max(1, (room - 16 * 4 * WARPS) // (WARPS * _SLOT))
        if turns >= wanted:
            slots = WARPS * turns
            shared = fixed + 2 * 4 * TILE * most + slots * (slot + 16)
            return Geometry(slots, slot, most, shared, per_unit)
    if per_unit == 2:  # no overlap of kernels then
        return replace(geometry(spec, forms, chip, "megakernel"), per_unit=1)
    raise UserError(
        f"the vectors of this model need {fixed} of the {limit} bytes of shared memory that "
        f"{chip.arch} has, which leaves no room for its weights; use int8 or int4, or the CPU"
    )


def _ks(spec: ModelSpec) -> dict[str, int]:
    return {
        "qkv": spec.hidden, "output": spec.attended, "up": spec.hidden,
        "down": spec.intermediate, "head": spec.hidden,
    }  # fmt: skip


def _rows(spec: ModelSpec) -> dict[str, int]:
    return {
        "qkv": spec.qkv_rows, "output": spec.hidden, "up": 2 * spec.intermediate,
        "down": spec.hidden, "head": spec.vocab,
    }  # fmt: skip


def _scratch(spec: ModelSpec, forms: dict[str, Form]) -> int:
    """Return SCRATCH_BYTES of csrc/cuda/shape.cuh, which checks that its own is not larger."""

    def padded(size: int) -> int:
        return -(-size // 32) * 32

    floats, narrow = padded(max(spec.hidden, spec.attended)), 0
    for name, k in _ks(spec).items():
        if forms[name].format in ("fp32", "bf16"):
            floats = max(floats, padded(k))
        else:
            narrow = max(narrow, padded(k))
    group, width = spec.heads // spec.kv_heads, -(-spec.head_dim // 16) * 16
    merged = 4 if group >= 4 else 2 if group >= 2 else 1
    attention = (group + 1) * width + WARPS * merged * (width + 2) + WARPS * merged * TILE
    return -(-max(4 * floats + narrow + narrow // 8, 4 * attention) // 128) * 128


def header(
    spec: ModelSpec,
    forms: dict[str, Form],
    shape: Geometry,
    *,
    workers: int,
    chunk: int,
    embedding: str,
    cache: str,
) -> str:
    """Return spec.h: all that the kernels know of a model, numbers only."""
    numbers = {
        **{name: getattr(spec, name) for name in (
            "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "layers", "rotary",
        )},
        "embedding_format": FORMATS.index(embedding),
        "cache_format": FORMATS.index(cache),
        "workers": workers,
        "chunk": chunk,
        "warps": WARPS,
        "slots": shape.slots,
        "slot_bytes": shape.slot,
        "round": shape.round,
        "shared_limit": shape.shared,
        **{
            f"{kind.__name__.lower()}_size": ctypes.sizeof(kind)
            for kind in (Layer, Request, State, Model)
        },
    }  # fmt: skip
    ordered = [forms[name] for name in PRODUCTS]
    tables = {
        "format": [FORMATS.index(form.format) for form in ordered],
        "group": [form.group for form in ordered],
        "zeros": [int(form.zeros) for form in ordered],
        "rows": list(_rows(spec).values()),
        "k": list(_ks(spec).values()),
    }
    lines = ["// Written by flashformer for one model on one kind of GPU.", "#pragma once"]
    lines += ["namespace spec {"]
    lines += [f"constexpr int {name.upper()} = {value};" for name, value in numbers.items()]
    lines += [f"// {', '.join(PRODUCTS)}"]
    lines += [
        f"constexpr int {name.upper()}[] = {{{', '.join(map(str, row))}}};"
        for name, row in tables.items()
    ]
    return "\n".join([*lines, "}  // namespace spec", ""])


def sources(header_text: str) -> dict[str, str]:
    """Return all that the compiler reads, by file name."""
    texts = {p.name: p.read_text(encoding="utf-8") for p in sorted(SOURCES.iterdir())}
    return {**texts, "spec.h": header_text}


def forms_of(weights: ModelWeights) -> dict[str, Form]:
    """Return the form of each product's matrix.

    Raises:
        UserError: it is not the same in every layer.
    """
    forms: dict[str, Form] = {}
    for number, layer in enumerate(weights.layers):
        for name in PRODUCTS[:-1]:
            matrix = getattr(layer, name)
            form = Form(matrix.format, matrix.group, matrix.zeros)
            if forms.setdefault(name, form) != form:
                raise UserError(
                    f"layer {number} has its {name} weights as {form}, layer 0 as {forms[name]}; "
                    "the CUDA back-end needs one form for all layers"
                )
    head = weights.head
    return {**forms, "head": Form(head.format, head.group, head.zeros)}


@dataclass(frozen=True)
class Compiled:
    """Kernels for one model on one kind of GPU.

    Attributes:
        build: Cubin, registers, spills.
        geometry: Shared memory and more.
        chip: The kind of GPU.
    """

    build: Build
    geometry: Geometry
    chip: Chip


def compile_for(
    spec: ModelSpec,
    forms: dict[str, Form],
    chip: Chip,
    mode: str,
    *,
    workers: int,
    chunk: int,
    embedding: str,
    cache: str,
    **options: Any,
) -> Compiled:
    """Compile the kernels of a mode; `options` are those of `cuda_driver.compile_kernels`."""
    shape = geometry(spec, forms, chip, mode)
    text = header(
        spec, forms, shape, workers=workers, chunk=chunk, embedding=embedding, cache=cache
    )
    defines = [f"FF_MODE={MODES.index(mode)}", f"FF_BLOCKS={shape.per_unit}"]
    build = compile_kernels(sources(text), "kernels.cu", chip.arch, defines=defines, **options)
    return Compiled(build, shape, chip)
