"""What a token costs: bytes, the time they take at least, barriers, balance; no model needed."""

from dataclasses import dataclass

from flashformer.config import ModelSpec
from flashformer.pack import bytes_of
from flashformer.plan import CHUNK, KINDS, TILE, Plan
from flashformer.quant import default_head
from tenfold_common.errors import UserError, suggest


@dataclass(frozen=True)
class GPU:
    """A GPU as the roofline sees it.

    Attributes:
        name: What it is called.
        units: Streaming multiprocessors, one worker each.
        bandwidth: Bytes a second that a copy reaches, not the number in the data sheet.
    """

    name: str
    units: int
    bandwidth: float


GPUS = {
    "h200": GPU("NVIDIA H200", 132, 4.3e12),
    "h100": GPU("NVIDIA H100 SXM", 132, 3.0e12),
    "a100": GPU("NVIDIA A100 80 GB SXM", 108, 1.75e12),
    "l40s": GPU("NVIDIA L40S", 142, 0.78e12),
    "rtx4090": GPU("NVIDIA RTX 4090", 128, 0.92e12),
    "rtx3090": GPU("NVIDIA RTX 3090", 82, 0.86e12),
}


@dataclass(frozen=True)
class Row:
    """One kind of stage, over all layers.

    Attributes:
        kind: Of the stage.
        count: How many there are.
        bytes: Read by all of them, in a token: weights with their scales; of the attention keys
            and values.
        seconds: The least time they take at the bandwidth; None where that is not known.
        barriers: Waits before these stages.
        imbalance: The largest share of a worker over the mean one.
    """

    kind: str
    count: int
    bytes: int
    seconds: float | None
    barriers: int
    imbalance: float


@dataclass(frozen=True)
class Explanation:
    """The cost of a token.

    Attributes:
        rows: By kind of stage.
        workers: Of the plan.
        bandwidth: Bytes a second, or None.
        position: For which the attention is counted.
    """

    rows: tuple[Row, ...]
    workers: int
    bandwidth: float | None
    position: int

    @property
    def bytes(self) -> int:
        """Bytes read for a token."""
        return sum(row.bytes for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """The least time of a token."""
        return None if self.bandwidth is None else self.bytes / self.bandwidth

    def __str__(self) -> str:
        known = self.bandwidth is not None
        names = ("count", "MB", "floor us", "barriers", "imbalance")
        head = f"{'stage':10} " + " ".join(
            f"{name:>{width}}" for name, width in zip(names, (6, 10, 10, 9, 10), strict=True)
        )
        lines = [head, "-" * len(head)]
        for row in self.rows:
            floor = f"{row.seconds * 1e6:10.1f}" if row.seconds is not None else " " * 10
            lines.append(
                f"{row.kind:10} {row.count:6d} {row.bytes / 1e6:10.3f} {floor} {row.barriers:9d} "
                f"{row.imbalance:10.3f}"
            )
        total = f"{self.seconds * 1e6:10.1f}" if self.seconds is not None else " " * 10
        barriers = sum(row.barriers for row in self.rows)
        lines.append(f"{'token':10} {'':6} {self.bytes / 1e6:10.3f} {total} {barriers:9d}")
        note = f"{self.workers} workers, position {self.position}"
        if known:
            assert self.bandwidth is not None
            assert self.seconds is not None
            note += f", {self.bandwidth / 1e9:.0f} GB/s: at most {1 / self.seconds:.0f} tokens/s"
        return "\n".join([*lines, note])


def explain(
    spec: ModelSpec,
    *,
    weights: str = "bf16",
    head: str | None = None,
    group: int = 128,
    cache: str = "bf16",
    gpu: str | None = None,
    workers: int | None = None,
    bandwidth: float | None = None,
    position: int = 0,
) -> Explanation:
    """Return what a token of a model costs.

    Args:
        spec: The model.
        weights: Format of the matrices of the layers.
        head: Format of the head. Defaults to int8 for int4, else that of the weights.
        group: Of int4.
        cache: Format of keys and values.
        gpu: A key of `GPUS`, whose bandwidth and number of units are taken.
        workers: Of the plan. Defaults to the units of the GPU, else 1.
        bandwidth: Bytes a second; defaults to that of the GPU.
        position: Positions before this one are read by the attention.

    Raises:
        UserError: an unknown GPU.
    """
    if gpu is not None:
        if gpu.lower() not in GPUS:
            raise UserError(
                f"gpu must be one of {', '.join(GPUS)}, not {gpu!r}.{suggest(gpu.lower(), GPUS)}"
            )
        chosen = GPUS[gpu.lower()]
        workers, bandwidth = workers or chosen.units, bandwidth or chosen.bandwidth
    head = head or default_head(weights)
    chunk = CHUNK if gpu is None else gpu_chunk(spec, workers or 1, position)
    plan = Plan.make(spec, workers or 1, chunk=chunk)
    rows = []
    for kind in KINDS:
        stages = [s for s in plan.stages if s.kind == kind]
        if kind == "attention":
            size = sum(_cache_bytes(spec, layer, position, cache) for layer in range(spec.layers))
            parts = len(plan.parts(0, position))
            share = -(-parts // plan.workers) * plan.workers / parts
        else:
            format = head if kind == "head" else weights
            k = -(-stages[0].k // 32) * 32
            size = sum(s.first[-1] * bytes_of(format, k, group) for s in stages)
            share = plan.imbalance(kind)
        barriers = len(stages) if plan.workers > 1 else 0
        seconds = None if bandwidth is None else size / bandwidth
        rows.append(Row(kind, len(stages), size, seconds, barriers, share))
    return Explanation(tuple(rows), plan.workers, bandwidth, position)


def gpu_chunk(spec: ModelSpec, workers: int, position: int) -> int:
    """Return a chunk that gives every worker of a GPU a part of the attention, at least 16 long."""
    wanted = (position + 1) * spec.kv_heads / workers
    return max(TILE, min(CHUNK, -(-int(wanted) // TILE) * TILE))


def _cache_bytes(spec: ModelSpec, layer: int, position: int, cache: str) -> int:
    window = spec.windows[layer]
    seen = position + 1 if window is None else min(position + 1, window)
    return 2 * seen * spec.kv_heads * spec.head_dim * (4 if cache == "fp32" else 2)
