"""The CPU back-end: one native call for any number of tokens (csrc/cpu/decode.cpp)."""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashformer import jit
from flashformer.pack import Packed, gate_order, pack, padded_k, tile_bytes
from flashformer.plan import Plan, Stage
from flashformer.quant import Matrix
from flashformer.weights import ModelWeights
from tenfold_common.errors import TenfoldError, UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_CODES = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
NONE, GREEDY, GUMBEL = 0, 1, 2
_int32, _int64, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Gemv(ctypes.Structure):
    _fields_ = (
        *((name, _int32) for name in ("format", "group", "zeros", "rows", "k", "k_padded")),
        ("tile_bytes", _int64),
        *((name, _pointer) for name in ("first", "stream", "bias")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Gemv) for name in ("qkv", "output", "up", "down")),
        *((name, _pointer) for name in ("norm1", "norm2", "query_norm", "key_norm")),
        *((name, _int32) for name in ("window", "rotates")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, _int32)
            for name in (
                "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "layers",
                "workers", "rotary", "chunk", "embedding_format", "cache_format",
            )
        ),
        *((name, _float) for name in ("eps", "attention_scale")),
        ("layer", _pointer),
        ("head", _Gemv),
        *((name, _pointer) for name in ("norm", "embedding", "cos", "sin")),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _pointer), ("values", _pointer), ("max_len", _int64))


class _Request(ctypes.Structure):
    _fields_ = (
        *((name, _int64) for name in ("position", "steps")),
        ("given", _pointer),
        ("given_count", _int64),
        ("chosen", _pointer),
        ("chosen_count", _int64),
        ("ends", _pointer),
        ("ends_count", _int64),
        *((name, _int32) for name in ("choice", "all_logits")),
        ("logits", _pointer),
        ("temperature", ctypes.c_double),
        ("limit", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("cancel", _pointer),
        *((name, _int32) for name in ("not_a_number", "threads", "first", "last")),
    )


_STRUCTURES = (_Gemv, _Layer, _Model, _Cache, _Request)


class _Native:
    """The threads and buffers of this process. A fork has none of the threads and makes its own."""

    def __init__(self, library: ctypes.CDLL, model: _Model, workers: int, max_len: int) -> None:
        self.process, self.max_len = os.getpid(), max_len
        self.pool = library.ff_pool(workers)
        self.session = library.ff_session(ctypes.addressof(model), self.pool, max_len)
        if not self.pool or not self.session:
            raise TenfoldError("no memory for threads and buffers")
        end = weakref.finalize(self, _end, library, self.pool, self.session, self.process)
        end.atexit = False  # the process takes its threads with it


def _end(library: ctypes.CDLL, pool: int, session: int, process: int) -> None:
    if process == os.getpid():
        library.ff_session_delete(session)
        library.ff_pool_delete(pool)


def load_library(isa: str = "auto", extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile and load the library, with the types of its functions.

    Raises:
        jit.CompilerError: see `jit.library`.
    """
    library = jit.library(isa, extra)
    library.ff_isa.restype = ctypes.c_char_p
    library.ff_pool.restype = _pointer
    library.ff_pool.argtypes = [ctypes.c_int]
    library.ff_pool_delete.argtypes = [_pointer]
    library.ff_session.restype = _pointer
    library.ff_session.argtypes = [_pointer, _pointer, _int64]
    library.ff_session_delete.argtypes = [_pointer]
    library.ff_decode.argtypes = [_pointer] * 3
    library.ff_read.argtypes = [_pointer, _int64, _pointer, ctypes.c_int]
    library.ff_read.restype = ctypes.c_double
    sizes = (_int64 * len(_STRUCTURES))()
    library.ff_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(s) for s in _STRUCTURES], "model.hpp and cpu.py differ"
    return library


def aligned(size: int) -> "Tensor":
    """Return zeroed memory, `[size]` uint8, aligned to pages, in huge ones where the system can."""
    import torch

    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 2**21:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class CPUBackend:
    """A plan with its weights packed, ready to decode.

    Args:
        plan: The plan.
        weights: Of the model; the matrices are copied, the vectors kept.
        cache_format: Of keys and values, "fp32" or "bf16".
        isa: One of `jit.ISAS`.

    Raises:
        jit.CompilerError: there is no compiler, or it failed.
    """

    def __init__(
        self, plan: Plan, weights: ModelWeights, *, cache_format: str, isa: str = "auto"
    ) -> None:
        import torch

        self.plan = plan
        self.library = load_library(isa)
        self.isa = self.library.ff_isa().decode()
        self.name = f"cpu ({self.isa})"
        self.cache_format = cache_format
        self.device = torch.device("cpu")
        self.group = weights.layers[0].qkv.group if weights.layers else 0
        self._native: _Native | None = None
        self._busy = threading.Lock()
        self._kept: list[object] = []  # what the native structures point to
        self.packed: dict[str, Packed] = {}
        self.weights = small(weights)
        sizes = [
            _rounded(stage.first[-1] * tile_bytes(_matrix(weights, stage)))
            for stage in plan.stages
            if stage.kind != "attention"
        ]
        self._stream, self._used = aligned(sum(sizes)), 0
        self._model = self._build(weights)

    @property
    def streamed(self) -> int:
        """Bytes of weights that a token reads."""
        return len(self._stream)

    def _build(self, weights: ModelWeights) -> _Model:
        import torch

        spec = self.plan.spec
        layers = (_Layer * spec.layers)()
        model = _Model()
        for stage in self.plan.stages:
            if stage.kind == "attention":
                continue
            matrix = _matrix(weights, stage)
            order = gate_order(spec.intermediate) if stage.kind == "up" else None
            bias = None
            if stage.kind != "head":
                bias = getattr(weights.layers[stage.layer], f"{stage.kind}_bias")
                if bias is not None and order is not None:
                    bias = torch.where(order < 0, 0.0, bias[order.clamp(min=0)])
            gemv = self._gemv(stage, matrix, pack(matrix, order), bias)
            if stage.kind == "head":
                model.head = gemv
            else:
                setattr(layers[stage.layer], stage.kind, gemv)
        for number, (layer, from_) in enumerate(zip(layers, weights.layers, strict=True)):
            for name in ("norm1", "norm2", "query_norm", "key_norm"):
                setattr(layer, name, self._keep(getattr(from_, name)))
            layer.window = spec.windows[number] or 0
            layer.rotates = spec.rotates[number]
        for name in (
            "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "layers", "rotary",
            "eps",
        ):  # fmt: skip
            setattr(model, name, getattr(spec, name))
        model.workers, model.chunk = self.plan.workers, self.plan.chunk
        model.attention_scale = spec.head_dim**-0.5
        model.embedding_format = int(weights.embedding.dtype == torch.bfloat16)
        model.cache_format = FORMAT_CODES[self.cache_format]
        for name in ("norm", "embedding", "cos", "sin"):
            setattr(model, name, self._keep(getattr(weights, name)))
        self._kept.append(layers)
        model.layer = ctypes.addressof(layers)
        return model

    def _gemv(
        self, stage: Stage, matrix: "Matrix | Packed", tiles: "Tensor", bias: "Tensor | None"
    ) -> _Gemv:
        """Put the tiles into the stream, and say where each worker's begin."""
        size = tiles.shape[1]
        place = self._stream[self._used : self._used + tiles.numel()].view_as(tiles)
        place.copy_(tiles)
        self._used += _rounded(tiles.numel())
        self.packed[stage.name] = Packed(
            matrix.format, matrix.group, matrix.zeros, matrix.shape, place
        )
        starts = (_pointer * self.plan.workers)(
            *(place.data_ptr() + tile * size for tile in stage.first[:-1])
        )
        firsts = (_int32 * len(stage.first))(*stage.first)
        self._kept += [starts, firsts]
        return _Gemv(
            format=FORMAT_CODES[matrix.format],
            group=matrix.group,
            zeros=matrix.zeros,
            rows=stage.rows,
            k=matrix.shape[1],
            k_padded=padded_k(matrix),
            tile_bytes=size,
            first=ctypes.addressof(firsts),
            stream=ctypes.addressof(starts),
            bias=self._keep(bias),
        )

    def _keep(self, tensor: "Tensor | None") -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def decode(
        self,
        keys: "Sequence[Tensor]",
        values: "Sequence[Tensor]",
        given: "Tensor",
        *,
        position: int,
        new: int,
        logits: "Tensor",
        threads: int,
        temperature: float | None = None,
        seed: int = 0,
        ends: Sequence[int] = (),
        cancel: "Tensor | None" = None,
        limit: float = float("inf"),
        stages: tuple[int, int] | None = None,
    ) -> "Tensor":
        """Read the tokens given and choose new ones, in one call without the GIL.

        Calls from several threads are carried out one after the other.

        Args:
            keys: For each layer `[Hkv, max_len / 16, D padded, 16]`, see `KVCache`.
            values: For each layer `[Hkv, max_len, D padded]`.
            given: `[n]` int64, n >= 1, already checked.
            position: Of the first of them.
            new: How many tokens to choose, at least 0.
            logits: `[V]` float32 for those of the last step, or `[n + new - 1, V]` for all.
            threads: At most the plan's workers.
            temperature: None is greedy; else the token is drawn at this temperature.
            seed: Of the draws.
            ends: Tokens after which to stop.
            cancel: `[1]` int32; stops after the token during which it becomes 1.
            limit: Seconds after which the token then chosen is the last; all that is given is read.
            stages: Only stages of the plan from the first to before the second, of one token, to
                measure what calls cost; the stages before must have been run for the same token.

        Returns:
            The tokens chosen, `[<= new]` int64.

        Raises:
            UserError: a logit is NaN.
        """
        import torch

        steps = len(given) + max(new - 1, 0)
        chosen = torch.zeros(max(new, 1), dtype=torch.int64)
        ends_ = torch.tensor(list(ends), dtype=torch.int64)
        pointers = [(_pointer * len(t))(*(x.data_ptr() for x in t)) for t in (keys, values)]
        cache = _Cache(*(ctypes.addressof(p) for p in pointers), values[0].shape[1])
        request = _Request(
            position=position,
            steps=steps,
            given=given.data_ptr(),
            given_count=len(given),
            chosen=chosen.data_ptr(),
            ends=ends_.data_ptr(),
            ends_count=len(ends_),
            choice=NONE if not new else GREEDY if temperature is None else GUMBEL,
            all_logits=logits.ndim == 2,
            logits=logits.data_ptr(),
            temperature=temperature or 1.0,
            limit=limit,
            seed=seed % 2**64,
            cancel=None if cancel is None else cancel.data_ptr(),
            threads=threads,
            first=stages[0] if stages else 0,
            last=stages[1] if stages else len(self.plan.stages),
        )
        with self._busy:
            session = self._running(values[0].shape[1]).session
            self.library.ff_decode(session, ctypes.addressof(cache), ctypes.addressof(request))
        if request.not_a_number:
            raise UserError(
                "a logit is NaN: the model's numbers overflow, or its weights changed to NaN after "
                "they were packed"
            )
        return chosen[: request.chosen_count]

    def _running(self, max_len: int) -> _Native:
        """Return the threads and buffers, made anew in a fork or for a longer cache."""
        native = self._native
        if native is None or native.process != os.getpid() or native.max_len < max_len:
            self._native = native = _Native(self.library, self._model, self.plan.workers, max_len)
        return native

    def read_bandwidth(self, threads: int, size: int = 2**29, rounds: int = 5) -> float:
        """Return the bytes a second that threads read from memory, the best of some rounds."""
        import time

        data = aligned(size)
        data.fill_(0)
        best = float("inf")
        for _ in range(rounds):
            start = time.perf_counter()
            self.library.ff_read(data.data_ptr(), size, self._running(16).pool, threads)
            best = min(best, time.perf_counter() - start)
        return size / best


def small(weights: ModelWeights) -> ModelWeights:
    """Return the weights without the matrices of the layers and the head."""
    none: Any = None
    layers = (replace(x, qkv=none, output=none, up=none, down=none) for x in weights.layers)
    return replace(weights, layers=tuple(layers), head=none)


def _rounded(size: int) -> int:
    return -(-size // 64) * 64


def _matrix(weights: ModelWeights, stage: Stage) -> "Matrix | Packed":
    if stage.kind == "head":
        return weights.head
    return getattr(weights.layers[stage.layer], stage.kind)
