"""A model in the memory of a GPU, and what launches its kernels: one for all, or a graph."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashformer.backends.cuda_build import (
    LAYER_VECTORS,
    THREADS,
    Chip,
    Compiled,
    Layer,
    Model,
    Request,
    State,
    forms_of,
)
from flashformer.cuda_driver import Graph, Module, blocks_per_unit, launch
from flashformer.pack import Packed, gate_order, pack, tile_bytes
from flashformer.plan import Plan
from flashformer.weights import ModelWeights
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flashformer.quant import Matrix

STAGES = ("qkv", "attention", "output", "up", "down")
PATIENCE = 2.0  # seconds
MOST_ENDS = 1024
_int32, _int64 = ctypes.c_int32, ctypes.c_int64


# --------------------------------------------------------------------------------------------------
# A model in the memory of a device


class DeviceModel:
    """The packed weights of a plan and the buffers of a token, as the kernels read them.

    Args:
        plan: The plan; a worker is a thread block.
        weights: Of the model; the matrices are copied.
        cache_format: Of keys and values, "fp32" or "bf16".
        device: Where all of it is; for tests also the CPU.

    Attributes:
        patience: Seconds until a wait for the other workers is taken for a hang.
    """

    def __init__(
        self, plan: Plan, weights: ModelWeights, *, cache_format: str, device: Any
    ) -> None:
        import torch

        spec = plan.spec
        self.plan, self.cache_format = plan, cache_format
        self.patience = PATIENCE
        self.device = torch.device(device)
        self.forms = forms_of(weights)
        if spec.head_dim > 256:
            raise UserError(f"head_dim is {spec.head_dim}; the CUDA back-end has at most 256")
        self._kept: list[Tensor] = []
        self._places: dict[str, list[tuple[int, int]]] = {}  # of a stage: each worker's bytes
        self.weights = self._stream(weights)
        self.embedding_format = "bf16" if weights.embedding.dtype == torch.bfloat16 else "fp32"
        self.request = self._keep(torch.zeros(_REQUEST_BYTES, dtype=torch.uint8))
        self.state = self._keep(torch.zeros(ctypes.sizeof(State), dtype=torch.uint8))
        floats = {
            "x": spec.hidden, "qkv": spec.qkv_rows, "act": spec.intermediate,
            "best": 2 * plan.workers,
        }  # fmt: skip
        self.struct = Model(
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
        layers = (Layer * spec.layers)()
        for number, (layer, from_) in enumerate(zip(layers, weights.layers, strict=True)):
            up_bias = from_.up_bias
            if up_bias is not None:
                up_bias = torch.where(order < 0, 0.0, up_bias.cpu()[order.clamp(min=0)])
            for name in LAYER_VECTORS:
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
        request = Request(
            ends=self.request.data_ptr() + ctypes.sizeof(Request),
            ends_count=len(ends),
            keys=table,
            values=table + 8 * spec.layers,
            max_len=max_len,
            chunks=self._partial[0].shape[1],
            partial=self._partial[0].data_ptr(),
            tops=self._partial[1].data_ptr(),
            patience=int(self.patience * 1e9),
            **rest,
        )
        asked = torch.cat([_bytes(request), _bytes((_int64 * len(ends))(*ends))])
        self.request[: len(asked)] = asked.to(self.device)
        self.state.zero_()

    def answer(self) -> State:
        """Return the state, after the work of the current stream."""
        return State.from_buffer_copy(self.state.cpu().numpy().tobytes())


_REQUEST_BYTES = ctypes.sizeof(Request) + 8 * MOST_ENDS


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


class Runner(ABC):
    """Launches the kernels of one mode.

    Args:
        model: On a GPU.
        compiled: For that GPU.
    """

    def __init__(self, model: DeviceModel, compiled: Compiled) -> None:
        self.model, self.shared = model, compiled.geometry.shared
        self.module = Module(compiled.build.image)

    @abstractmethod
    def run(self, heads: Sequence[bool]) -> None:
        """Launch the steps of the request; `heads` says which of them have logits."""

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
