"""What a token costs: bytes, the time they take at least, barriers, balance; no model needed."""

from dataclasses import dataclass

from flashformer.config import ModelSpec
from flashformer.pack import bytes_of
from flashformer.plan import CHUNK, KINDS, Plan, chunk_for
from flashformer.quant import check_format, default_head
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
    zeros: bool = False,
    cache: str = "bf16",
    gpu: str | None = None,
    workers: int | None = None,
    bandwidth: float | None = None,
    position: int = 0,
    max_len: int | None = None,
) -> Explanation:
    """Return what a token of a model costs.

    Args:
        spec: The model.
        weights: Format of the matrices of the layers.
        head: Format of the head. Defaults to int8 for int4, else that of the weights.
        group: Of int4.
        zeros: Whether int4 has zero points.
        cache: Format of keys and values.
        gpu: A key of `GPUS`, whose bandwidth and number of units are taken.
        workers: Of the plan. Defaults to the units of the GPU, else 1.
        bandwidth: Bytes a second; defaults to that of the GPU.
        position: The attention reads this position and those before it.
        max_len: The longest sequence, on which the parts of a GPU's attention depend. Defaults to
            what the model was made for, at most 4096, and to no less than the position needs.

    Raises:
        UserError: an unknown GPU or format, or a number that is out of range.
    """
    check_format(weights, group)
    head = head or default_head(weights)
    check_format(head, group, "head")
    if cache not in ("fp32", "bf16"):
        raise UserError(f"cache must be 'fp32' or 'bf16', not {cache!r}")
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise UserError(f"position must be a whole number of at least 0, not {position!r}")
    if position >= spec.max_positions:
        raise UserError(
            f"position {position} is behind the {spec.max_positions} that the model was made for"
        )
    if workers is not None and (
        isinstance(workers, bool) or not isinstance(workers, int) or workers < 1
    ):
        raise UserError(f"workers must be a whole number of at least 1, not {workers!r}")
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise UserError(f"bandwidth must be over 0 bytes a second and finite, not {bandwidth!r}")
    if gpu is not None:
        if gpu.lower() not in GPUS:
            raise UserError(
                f"gpu must be one of {', '.join(GPUS)}, not {gpu!r}.{suggest(gpu.lower(), GPUS)}"
            )
        chosen = GPUS[gpu.lower()]
        workers, bandwidth = workers or chosen.units, bandwidth or chosen.bandwidth
    room = max(max_len or min(spec.max_positions, 4096), position + 1)
    chunk = CHUNK if gpu is None else chunk_for(spec, workers or 1, room)
    plan = Plan.make(spec, workers or 1, chunk=chunk)
    rows = []
    for kind in KINDS:
        stages = [s for s in plan.stages if s.kind == kind]
        if kind == "attention":
            size = sum(_cache_bytes(spec, layer, position, cache) for layer in range(spec.layers))
            counts = [len(plan.parts(layer, position)) for layer in range(spec.layers)]
            share = max(-(-parts // plan.workers) * plan.workers / parts for parts in counts)
        else:
            format = head if kind == "head" else weights
            k = -(-stages[0].k // 32) * 32
            size = sum(s.first[-1] * bytes_of(format, k, group, zeros) for s in stages)
            share = plan.imbalance(kind)
        barriers = len(stages) if plan.workers > 1 else 0
        seconds = None if bandwidth is None else size / bandwidth
        rows.append(Row(kind, len(stages), size, seconds, barriers, share))
    return Explanation(tuple(rows), plan.workers, bandwidth, position)


def _cache_bytes(spec: ModelSpec, layer: int, position: int, cache: str) -> int:
    window = spec.windows[layer]
    seen = position + 1 if window is None else min(position + 1, window)
    return 2 * seen * spec.kv_heads * spec.head_dim * (4 if cache == "fp32" else 2)
