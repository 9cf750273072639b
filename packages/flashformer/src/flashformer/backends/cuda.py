"""The CUDA back-end: the same plan and the same tiles as on the CPU, a worker a thread block.

`mode="megakernel"` runs a whole call, of any number of tokens, in one cooperative launch
(csrc/cuda/decode.cuh); `mode="graph"` has one kernel a stage in a CUDA graph (csrc/cuda/graph.cuh).
Keys and values have the layout of the CPU (`KVCache`), only on the GPU.

The kernels compile, and run in the tests thread by thread on the CPU; they have not yet been run or
measured on a GPU.
"""

import copy
import ctypes
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer.backends.cpu import small
from flashformer.config import ModelSpec
from flashformer.cuda_driver import (
    TOO_LARGE,
    Build,
    CudaError,
    Graph,
    Module,
    blocks_per_unit,
    compile_kernels,
    launch,
)  # fmt: skip
from flashformer.pack import STEP, Packed, gate_order, pack, tile_bytes
from flashformer.plan import TILE, Plan
from flashformer.quant import FORMATS, default_head
from flashformer.weights import ModelWeights
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flashformer.quant import Matrix

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
MODES = ("megakernel", "graph")
PRODUCTS = ("qkv", "output", "up", "down", "head")
STAGES = ("qkv", "attention", "output", "up", "down")
PATIENCE = 2.0  # seconds until a wait for the other workers is taken for a hang
WARPS = 7  # of consumers; with that of the producer 256 threads, which may have 255 registers each
THREADS = 32 * (WARPS + 1)
NONE, GREEDY, GUMBEL = 0, 1, 2
_SLOT = 6144  # bytes of a slot of the ring at least, where there is room for several for each warp
_LEAST_SLOT, _MOST_SLOT = 2304, 16384
_ROUND = 64  # pieces of tiles whose sums are kept until they are added up
_int32, _int64, _uint64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


# --------------------------------------------------------------------------------------------------
# The structs of csrc/cuda/model.cuh


_LAYER_VECTORS = (
    "norm1", "norm2", "query_norm", "key_norm", "qkv_bias", "output_bias", "up_bias", "down_bias",
)  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in _LAYER_VECTORS),
        *((name, _int32) for name in ("window", "rotates")),
    )


class _Request(ctypes.Structure):
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


class _State(ctypes.Structure):
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


class _Model(ctypes.Structure):
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
            f"{kind.__name__[1:].lower()}_size": ctypes.sizeof(kind)
            for kind in (_Layer, _Request, _State, _Model)
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


def chunk_for(spec: ModelSpec, workers: int, max_len: int) -> int:
    """Return the chunk of the attention that gives a long sequence's parts to all workers.

    Between 32 and 256 positions: a guess, not yet measured on a GPU.
    """
    chunk = 32
    while chunk < 256 and 2 * chunk * workers <= max_len * spec.kv_heads:
        chunk *= 2
    return chunk


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


# --------------------------------------------------------------------------------------------------
# A model in the memory of a device


class DeviceModel:
    """The packed weights of a plan and the buffers of a token, as the kernels read them.

    Args:
        plan: The plan; a worker is a thread block.
        weights: Of the model; the matrices are copied.
        cache_format: Of keys and values, "fp32" or "bf16".
        device: Where all of it is; for tests also the CPU.
    """

    def __init__(
        self, plan: Plan, weights: ModelWeights, *, cache_format: str, device: Any
    ) -> None:
        import torch

        spec = plan.spec
        self.plan, self.cache_format = plan, cache_format
        self.device = torch.device(device)
        self.forms = forms_of(weights)
        if spec.head_dim > 256:
            raise UserError(f"head_dim is {spec.head_dim}; the CUDA back-end has at most 256")
        self._kept: list[Tensor] = []
        self._places: dict[str, list[tuple[int, int]]] = {}  # of a stage: each worker's bytes
        self.weights = self._stream(weights)
        self.embedding_format = "bf16" if weights.embedding.dtype == torch.bfloat16 else "fp32"
        self.request = self._keep(torch.zeros(_REQUEST_BYTES, dtype=torch.uint8))
        self.state = self._keep(torch.zeros(ctypes.sizeof(_State), dtype=torch.uint8))
        floats = {
            "x": spec.hidden, "qkv": spec.qkv_rows, "act": spec.intermediate,
            "best": 2 * plan.workers,
        }  # fmt: skip
        self.struct = _Model(
            weights=self.weights.data_ptr(),
            starts=self._pointer(torch.tensor(self._starts)),
            layers=self._layers(weights),
            eps=spec.eps,
            attention_scale=spec.head_dim**-0.5,
            request=self.request.data_ptr(),
            state=self.state.data_ptr(),
            **{n: self._pointer(torch.zeros(size)) for n, size in floats.items()},
            **{n: self._pointer(getattr(weights, n)) for n in ("norm", "embedding", "cos", "sin")},
        )
        self._caches: tuple[tuple[int, ...], Tensor] | None = None
        self._partial: tuple[Tensor, Tensor] | None = None

    def _stream(self, weights: ModelWeights) -> "Tensor":
        """Lay out every worker's tiles in the order it uses them, one stream after the other."""
        import torch

        stages = [stage for stage in self.plan.stages if stage.kind != "attention"]
        used = [0] * self.plan.workers
        for stage in stages:
            size = tile_bytes(_matrix(weights, stage.kind, stage.layer))
            counts = [b - a for a, b in zip(stage.first, stage.first[1:], strict=False)]
            self._places[stage.name] = [(u, n * size) for u, n in zip(used, counts, strict=True)]
            used = [u + _rounded(n * size) for u, n in zip(used, counts, strict=True)]
        self._starts = [0]
        for size in used:
            self._starts.append(self._starts[-1] + _rounded(size, 256))
        stream = torch.zeros(self._starts.pop(), dtype=torch.uint8, device=self.device)
        self._shapes: dict[str, tuple[int, int]] = {}
        order = gate_order(self.plan.spec.intermediate)
        for stage in stages:
            matrix = _matrix(weights, stage.kind, stage.layer)
            self._shapes[stage.name] = matrix.shape
            tiles = pack(matrix, order if stage.kind == "up" else None).to(self.device).flatten()
            done = 0
            for start, (place, size) in zip(self._starts, self._places[stage.name], strict=True):
                stream[start + place : start + place + size] = tiles[done : done + size]
                done += size
        return stream

    def packed(self) -> dict[str, Packed]:
        """Return copies of the matrices on the CPU, by the name of their stage."""
        import torch

        found = {}
        for stage in self.plan.stages:
            if stage.kind == "attention":
                continue
            form = self.forms[stage.kind]
            parts = [
                self.weights[start + place : start + place + size].cpu()
                for start, (place, size) in zip(self._starts, self._places[stage.name], strict=True)
            ]
            tiles = torch.cat(parts).reshape(stage.first[-1], -1)
            found[stage.name] = Packed(
                form.format, form.group, form.zeros, self._shapes[stage.name], tiles
            )
        return found

    def _layers(self, weights: ModelWeights) -> int:
        import torch

        spec = self.plan.spec
        order = gate_order(spec.intermediate)
        layers = (_Layer * spec.layers)()
        for number, (layer, from_) in enumerate(zip(layers, weights.layers, strict=True)):
            up_bias = from_.up_bias
            if up_bias is not None:
                up_bias = torch.where(order < 0, 0.0, up_bias.cpu()[order.clamp(min=0)])
            for name in _LAYER_VECTORS:
                tensor = up_bias if name == "up_bias" else getattr(from_, name)
                setattr(layer, name, None if tensor is None else self._pointer(tensor))
            layer.window = spec.windows[number] or 0
            layer.rotates = spec.rotates[number]
        return self._pointer(_bytes(layers))

    def _keep(self, tensor: "Tensor") -> "Tensor":
        kept = tensor.contiguous().to(self.device)
        self._kept.append(kept)
        return kept

    def _pointer(self, tensor: "Tensor") -> int:
        return self._keep(tensor).data_ptr()

    def ask(
        self, keys: "Sequence[Tensor]", values: "Sequence[Tensor]", ends: Sequence[int], **rest: Any
    ) -> None:
        """Write the request of a call and clear the state, in the order of the current stream."""
        import torch

        spec, max_len = self.plan.spec, values[0].shape[1]
        chunks = -(-max_len // self.plan.chunk)
        pointers = tuple(t.data_ptr() for t in (*keys, *values))
        if self._caches is None or self._caches[0] != pointers:
            self._caches = pointers, torch.tensor(pointers, device=self.device)
        if self._partial is None or self._partial[0].shape[1] < chunks:
            width = -(-spec.head_dim // 16) * 16
            shapes = (spec.heads, chunks, width), (spec.heads, chunks, 2)
            partial, tops = (torch.zeros(s, device=self.device) for s in shapes)
            self._partial = partial, tops
        table = self._caches[1].data_ptr()
        request = _Request(
            ends=self.request.data_ptr() + ctypes.sizeof(_Request),
            ends_count=len(ends),
            keys=table,
            values=table + 8 * spec.layers,
            max_len=max_len,
            chunks=self._partial[0].shape[1],
            partial=self._partial[0].data_ptr(),
            tops=self._partial[1].data_ptr(),
            patience=int(PATIENCE * 1e9),
            **rest,
        )
        asked = torch.cat([_bytes(request), _bytes((_int64 * len(ends))(*ends))])
        self.request[: len(asked)] = asked.to(self.device)
        self.state.zero_()

    def answer(self) -> _State:
        """Return the state, after the work of the current stream."""
        return _State.from_buffer_copy(self.state.cpu().numpy().tobytes())


_MOST_ENDS = 1024
_REQUEST_BYTES = ctypes.sizeof(_Request) + 8 * _MOST_ENDS


def _bytes(struct: Any) -> "Tensor":
    import torch

    return (
        torch.frombuffer(bytearray(bytes(struct)), dtype=torch.uint8)
        if bytes(struct)
        else (torch.zeros(0, dtype=torch.uint8))
    )


def _rounded(size: int, to: int = 64) -> int:
    return -(-size // to) * to


def _matrix(weights: ModelWeights, kind: str, layer: int) -> "Matrix | Packed":
    return weights.head if kind == "head" else getattr(weights.layers[layer], kind)


# --------------------------------------------------------------------------------------------------
# Running it


class Runner:
    """Launches the kernels of one mode.

    Args:
        model: On a GPU.
        compiled: For that GPU.
    """

    def __init__(self, model: DeviceModel, compiled: Compiled) -> None:
        self.model, self.shared = model, compiled.geometry.shared
        self.module = Module(compiled.build.image)

    def run(self, heads: Sequence[bool]) -> None:
        """Launch the steps of the request; `heads` says which of them have logits."""
        raise NotImplementedError

    def _launch(self, name: str, blocks: int, *arguments: Any, **options: bool) -> None:
        import torch

        stream = torch.cuda.current_stream(self.model.device).cuda_stream
        launch(
            self.module.kernel(name, self.shared), blocks, THREADS, self.shared, stream,
            [self.model.struct, *arguments], **options,
        )  # fmt: skip


class Megakernel(Runner):
    """One cooperative launch for all steps."""

    def run(self, heads: Sequence[bool]) -> None:
        """Launch it; raises CudaError with code TOO_LARGE if the GPU has no room for it all."""
        self._launch("ff_decode", self.model.plan.workers, cooperative=True)

    def probe_waits(self, rounds: int) -> None:
        """Launch so many waits of all workers and nothing else."""
        self._launch("ff_probe_waits", self.model.plan.workers, _int32(rounds), cooperative=True)

    def probe_stream(self) -> None:
        """Launch the stream of weights of the request, without any use of them."""
        self._launch("ff_probe_stream", self.model.plan.workers, cooperative=True)

    def fits(self) -> bool:
        """Whether a multiprocessor has room for a block."""
        return (
            blocks_per_unit(self.module.kernel("ff_decode", self.shared), THREADS, self.shared) > 0
        )


class GraphRunner(Runner):
    """A graph a step, of a kernel a stage; recorded once, with logits and without."""

    def __init__(self, model: DeviceModel, compiled: Compiled) -> None:
        import torch

        super().__init__(model, compiled)
        self.overlap = compiled.geometry.per_unit > 1 and _has_overlap(compiled.chip)
        self.stream = torch.cuda.Stream(model.device)
        self.graphs: dict[bool, Graph] = {}

    def run(self, heads: Sequence[bool]) -> None:
        """Launch a graph for each step."""
        import torch

        current = torch.cuda.current_stream(self.model.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for head in heads:
                if head not in self.graphs:
                    self.graphs[head] = self._record(head)
                self.graphs[head].launch()
        current.wait_stream(self.stream)

    def _record(self, head: bool) -> Graph:
        plan, first = self.model.plan, True
        graph = Graph(self.stream.cuda_stream)
        with graph:
            for layer in range(plan.spec.layers):
                for name in STAGES:
                    self._launch(
                        f"ff_{name}",
                        plan.workers,
                        _int32(layer),
                        overlap=self.overlap and not first,
                    )
                    first = False
            if head:
                self._launch("ff_head", plan.workers, overlap=self.overlap)
            self._launch("ff_advance", 1, overlap=self.overlap)
        return graph


def _has_overlap(chip: Chip) -> bool:
    return chip.unit >= 228 * 1024 or chip.arch.startswith("sm_12")


class CUDABackend:
    """A plan with its weights on a GPU, ready to decode.

    Args:
        plan: The plan; its workers are at most the GPU's multiprocessors.
        weights: Of the model; the matrices are copied, the vectors kept.
        cache_format: Of keys and values, "fp32" or "bf16".
        device: A CUDA device.
        mode: "megakernel", or "graph". Where the GPU refuses the first (it is shared, or a debugger
            is attached), the second is taken with a warning.
        runner: Makes what launches the kernels; for tests.

    Raises:
        UserError: the GPU is too old, or the model does not fit.
        CompilerError: there is neither NVRTC nor nvcc, or it failed.
        CudaError: the driver failed.
    """

    def __init__(
        self,
        plan: Plan,
        weights: ModelWeights,
        *,
        cache_format: str,
        device: Any = "cuda",
        mode: str = "megakernel",
        runner: "Callable[[CUDABackend], Any] | None" = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        self.plan, self.mode, self.cache_format = plan, mode, cache_format
        self.model = DeviceModel(plan, weights, cache_format=cache_format, device=device)
        self.device = self.model.device
        self.group = self.model.forms["qkv"].group
        self.weights = small(weights)
        self._busy = threading.Lock()
        self._runner = (runner or CUDABackend._make_runner)(self)

    def in_mode(self, mode: str) -> "CUDABackend":
        """Return a back-end of the same weights, not copied, in another mode."""
        other = copy.copy(self)
        other.mode = mode
        other._runner = other._make_runner()
        return other

    @property
    def name(self) -> str:
        """What it is and how it runs."""
        return f"cuda ({self.mode})"

    @cached_property
    def packed(self) -> dict[str, Packed]:
        """Copies of the matrices on the CPU."""
        return self.model.packed()

    @property
    def streamed(self) -> int:
        """Bytes of weights that a token reads."""
        return self.model.weights.numel()

    def _make_runner(self) -> Runner:
        import torch

        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise UserError(f"the CUDA back-end needs a CUDA GPU, not {self.device}")
        torch.cuda.init()
        found = torch.cuda.get_device_properties(self.device)
        if self.plan.workers > found.multi_processor_count:
            raise UserError(
                f"the plan has {self.plan.workers} workers, but {found.name} has "
                f"{found.multi_processor_count} multiprocessors"
            )
        chip = Chip.of(arch_of(found.major, found.minor))
        with self._here():
            torch.zeros(1, device=self.device)  # makes the context current
            if self.mode == "megakernel":
                runner = Megakernel(self.model, self.compile(chip, "megakernel"))
                if runner.fits():
                    return runner
                self._fall_back("a block does not fit a multiprocessor")
            return GraphRunner(self.model, self.compile(chip, "graph"))

    def _fall_back(self, why: str) -> None:
        warnings.warn(
            f"one kernel for the whole model is not possible here ({why}); using a CUDA graph",
            RuntimeWarning,
            stacklevel=4,
        )
        self.mode = "graph"

    def compile(self, chip: Chip, mode: str, **options: Any) -> Compiled:
        """Compile the kernels of a mode for a kind of GPU; see `compile_kernels`."""
        model = self.model
        return _compile(
            self.plan.spec, model.forms, chip, mode, workers=self.plan.workers,
            chunk=self.plan.chunk, embedding=model.embedding_format, cache=self.cache_format,
            **options,
        )  # fmt: skip

    @staticmethod
    def compile_only(
        spec: ModelSpec,
        arch: str,
        *,
        weights: str = "bf16",
        head: str | None = None,
        group: int = 128,
        zeros: bool = False,
        cache: str = "bf16",
        mode: str = "megakernel",
        workers: int = 132,
        max_len: int = 4096,
        ptx: bool = False,
        compiler: str = "auto",
    ) -> Compiled:
        """Compile for a model and a kind of GPU, with neither of them here.

        Args:
            spec: The model.
            arch: Such as `sm_90a`.
            weights: Format of the layers' matrices.
            head: Of the head. Defaults to int8 for int4, else that of the weights.
            group: Of int4.
            zeros: Whether int4 has zero points.
            cache: Format of keys and values.
            mode: One of `MODES`.
            workers: Multiprocessors.
            max_len: The longest sequence.
            ptx: Whether the PTX is wanted too.
            compiler: "nvrtc", "nvcc" or "auto".

        Returns:
            The cubin with registers, spills and shared memory.

        Raises:
            UserError: the arguments do not fit.
            CompilerError: there is no compiler, or it failed.
        """

        def form(name: str) -> Form:
            int4 = name == "int4"
            return Form(name, group if int4 else 0, zeros and int4)

        forms = {name: form(weights) for name in PRODUCTS[:-1]}
        return _compile(
            spec, {**forms, "head": form(head or default_head(weights))}, Chip.of(arch), mode,
            workers=workers, chunk=chunk_for(spec, workers, max_len),
            embedding="fp32" if weights == "fp32" else "bf16", cache=cache, ptx=ptx,
            compiler=compiler,
        )  # fmt: skip

    def decode(
        self,
        keys: "Sequence[Tensor]",
        values: "Sequence[Tensor]",
        given: "Tensor",
        *,
        position: int,
        new: int,
        logits: "Tensor",
        threads: int = 0,
        temperature: float | None = None,
        seed: int = 0,
        ends: Sequence[int] = (),
        cancel: "Tensor | None" = None,
    ) -> "Tensor":
        """Read the tokens given and choose new ones, in one launch.

        Args:
            keys: For each layer `[Hkv, max_len / 16, D padded, 16]`, on the device; see `KVCache`.
            values: For each layer `[Hkv, max_len, D padded]`, on the device.
            given: `[n]` int64, n >= 1, on the device, already checked.
            position: Of the first of them.
            new: How many tokens to choose, at least 0.
            logits: On the device, `[V]` float32 for those of the last step, or `[n + new - 1, V]`
                for all.
            threads: Of no meaning here.
            temperature: None is greedy; else the token is drawn at this temperature.
            seed: Of the draws; the same as on the CPU.
            ends: Tokens after which to stop, at most 1024.
            cancel: `[1]` int32 on the CPU; stops after the token during which it becomes 1.

        Returns:
            The tokens chosen, `[<= new]` int64, on the device.

        Raises:
            UserError: a logit is NaN, or there are too many ends.
            CudaError: the driver failed, or a worker did not come to a wait.
        """
        import torch

        if len(ends) > _MOST_ENDS:
            raise UserError(f"there are {len(ends)} ends, at most {_MOST_ENDS} are possible")
        wrong = next((t for t in (*keys, *values, given, logits) if t.device != self.device), None)
        if wrong is not None:
            raise UserError(
                f"cache, tokens and logits must be on {self.device}, not {wrong.device}"
            )
        steps = len(given) + max(new - 1, 0)
        chosen = torch.zeros(max(new, 1), dtype=torch.int64, device=self.device)
        every = logits.ndim == 2
        with self._busy, self._here():
            flag = self._flag
            flag.zero_()
            self.model.ask(
                keys,
                values,
                list(ends),
                position=position,
                steps=steps,
                given=given.data_ptr(),
                given_count=len(given),
                chosen=chosen.data_ptr(),
                choice=NONE if not new else GREEDY if temperature is None else GUMBEL,
                all_logits=every,
                logits=logits.data_ptr(),
                temperature=temperature or 1.0,
                seed=seed % 2**64,
                cancel=flag.data_ptr(),
            )
            place = _State.token.offset
            self.model.state[place : place + 8] = given[:1].view(torch.uint8)
            self._run([every or step + 1 >= len(given) for step in range(steps)])
            if cancel is not None:
                self._watch(cancel, flag)
            state = self.model.answer()
        if state.hung:
            self._report(state)
        if state.not_a_number:
            raise UserError(
                "a logit is NaN: the model's numbers overflow, or its weights changed to NaN after "
                "they were packed"
            )
        return chosen[: state.chosen_count]

    def _here(self) -> AbstractContextManager[object]:
        """Make the device the current one of torch and of the driver."""
        import torch

        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @cached_property
    def _flag(self) -> "Tensor":
        """Where the kernel sees that it is to stop: memory of the host that it can read."""
        import torch

        flag = torch.zeros(1, dtype=torch.int32)
        return flag.pin_memory() if self.device.type == "cuda" else flag

    def _run(self, heads: list[bool]) -> None:
        try:
            self._runner.run(heads)
        except CudaError as error:
            if error.code != TOO_LARGE or self.mode == "graph":
                raise
            self._fall_back("the GPU has no room for all of its blocks at once")
            self._runner = self._make_runner()
            self._runner.run(heads)

    def _watch(self, cancel: "Tensor", flag: "Tensor") -> None:
        """Pass the caller's wish to stop on to the kernel, until it is done."""
        import torch

        if self.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            if int(cancel[0]):
                flag.fill_(1)
            time.sleep(1e-4)

    def _report(self, state: _State) -> None:
        stage = self.plan.stages[min(state.hung_stage, len(self.plan.stages) - 1)]
        raise CudaError(
            f"after {stage.name} worker {state.hung_worker} waited {PATIENCE} s for the others: "
            f"{state.hung_arrived} arrivals of {state.hung_wanted} by {self.plan.workers} workers. "
            "Is the GPU shared with other programs? mode='graph' does without such waits"
        )


def _compile(
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
    shape = geometry(spec, forms, chip, mode)
    text = header(
        spec, forms, shape, workers=workers, chunk=chunk, embedding=embedding, cache=cache
    )
    defines = [f"FF_MODE={MODES.index(mode)}", f"FF_BLOCKS={shape.per_unit}"]
    build = compile_kernels(sources(text), "kernels.cu", chip.arch, defines=defines, **options)
    return Compiled(build, shape, chip)


def make(
    spec: ModelSpec,
    weights: ModelWeights,
    *,
    cache_format: str,
    device: Any = "cuda",
    mode: str = "megakernel",
) -> CUDABackend:
    """Plan a model for all multiprocessors of a GPU and put it there.

    Raises:
        UserError: there is no such GPU; and as `CUDABackend`.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(
            "the CUDA back-end needs a CUDA GPU and a torch built for it; here is none. "
            "Use backend='cpu'"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    workers = torch.cuda.get_device_properties(device).multi_processor_count
    plan = Plan.make(spec, workers, chunk=chunk_for(spec, workers, len(weights.cos)))
    return CUDABackend(plan, weights, cache_format=cache_format, device=device, mode=mode)
