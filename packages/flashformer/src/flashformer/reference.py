"""A plan executed in plain torch, worker by worker: slow, obvious, what back-ends must equal.

Workers are generators that pause before they read, between reading and writing, and while they
wait; a scheduler decides who goes on. In order it is a plain forward pass. In random order it shows
what a missing wait would do: buffers start as NaN and keep what the token before left in them.
"""

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from flashformer.pack import Packed
from flashformer.plan import TILE, Plan, PlanError, Stage
from flashformer.quant import Matrix
from flashformer.weights import ModelWeights
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ACTIVATION_GROUP = 128


def rms_norm(x: "Tensor", weight: "Tensor", eps: float) -> "Tensor":
    """X / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x)


def rotate(x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
    """Turn the pairs (d, d + rotary / 2) of heads `[..., D]` by the angles of one position."""
    import torch

    half = len(cos)
    cos, sin = cos.to(x), sin.to(x)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def quantized_activation(x: "Tensor", matrix: Matrix | Packed) -> "Tensor":
    """Round a vector as the products with int8 and int4 see it: to max |x| / 127 of each group.

    Groups are those of the weights for int4 and 128 neighbours for int8; others change nothing.
    """
    if matrix.format in ("fp32", "bf16"):
        return x
    import torch

    return torch.cat([_rounded(p) for p in x.split(matrix.group or ACTIVATION_GROUP, -1)], -1)


def _dense(matrix: Matrix | Packed) -> "Tensor":
    """Return what a matrix means; the rows of a packed one are in the order of the plan."""
    if isinstance(matrix, Matrix):
        return matrix.dense()
    raise UserError("the reference wants weights that are not packed; read them from the model")


def _rounded(part: "Tensor") -> "Tensor":
    scale = part.abs().amax(-1, keepdim=True) / 127
    return (part / scale.where(scale > 0, 1.0 + 0 * scale)).round() * scale


class Reference:
    """Decodes by a plan in one dtype.

    Args:
        plan: The plan.
        weights: Of the model; dequantised here.
        dtype: torch.float64 or torch.float32.
        max_len: Positions of the cache.
    """

    def __init__(
        self,
        plan: Plan,
        weights: ModelWeights,
        *,
        dtype: "torch.dtype | None" = None,
        max_len: int = 256,
    ) -> None:
        import torch

        self.plan, self.weights = plan, weights
        spec = plan.spec
        self.dtype = torch.float64 if dtype is None else dtype
        self.dense = {
            (stage.kind, stage.layer): _dense(self._matrix(stage)).to(self.dtype)
            for stage in plan.stages
            if stage.kind != "attention"
        }
        nan: dict[str, Any] = {"dtype": self.dtype, "fill_value": math.nan}
        parts = -(-max_len // plan.chunk) * spec.kv_heads
        group = spec.heads // spec.kv_heads
        self.buffers = {
            "x": torch.full((spec.hidden,), **nan),
            "qkv": torch.full((spec.qkv_rows,), **nan),
            "partial": torch.full((parts, group, spec.head_dim + 2), **nan),
            "act": torch.full((spec.intermediate,), **nan),
            "choice": torch.full((plan.workers, 2), **nan),
        }
        cache = (spec.layers, spec.kv_heads, max_len, spec.head_dim)
        self.keys, self.values = (torch.full(cache, **nan) for _ in range(2))
        self.position = 0

    def decode(
        self, given: Sequence[int], new: int = 0, *, random: Random | None = None
    ) -> "tuple[Tensor, list[int]]":
        """Read tokens and choose greedily.

        Args:
            given: At least one token.
            new: How many to choose.
            random: Decides which worker goes on; None takes them in turn.

        Returns:
            Logits `[len(given) + max(new - 1, 0), V]` of every step, and the tokens chosen.

        Raises:
            PlanError: all workers wait, and nobody will come.
        """
        import torch

        steps = len(given) + max(new - 1, 0)
        self.given, self.steps = list(given), steps
        self.arrived = [0] * (len(self.plan.stages) * steps)
        self.logits = torch.full((steps, self.plan.spec.vocab), math.nan, dtype=self.dtype)
        self.chosen: list[int | None] = [None] * steps
        running = [self._work(w) for w in range(self.plan.workers)]
        while running:
            stuck = True
            order = random.sample(running, len(running)) if random else list(running)
            for worker in order:
                state = next(worker, None)
                if state is None:
                    running.remove(worker)
                stuck &= state == "waits"
                if random and state != "waits":
                    break  # the others are asked anew
            if stuck and running:
                raise PlanError("all workers wait and nobody arrives: the plan would hang")
        if new:
            self.chosen[-1] = self._best()
        self.position += steps
        return self.logits, [c for c in self.chosen if c is not None]

    def _work(self, worker: int) -> Iterator[str]:
        size = len(self.plan.stages)
        for step in range(self.steps):
            for number, stage in enumerate(self.plan.stages):
                wait = stage.wait
                if wait is not None and (step or not wait.previous):
                    target = (step - wait.previous) * size + wait.stage
                    while self.arrived[target] < wait.arrivals:
                        yield "waits"
                yield "starts"
                writes = self._run(stage, worker, step)
                yield "writes"
                for buffer, place, value in writes:
                    buffer[place] = value
                self.arrived[step * size + number] += 1

    def _run(
        self, stage: Stage, worker: int, step: int
    ) -> "list[tuple[Tensor, Any, Tensor | float]]":
        """Compute what a worker writes in a stage: (tensor, index, value)."""
        import torch

        spec, buffers = self.plan.spec, self.buffers
        position = self.position + step
        if stage.kind == "attention":
            return self._attention(stage.layer, worker, position)
        stream = buffers["x"]
        if stage.layer == 0:
            stream = self.weights.embedding[self._token(step)].to(self.dtype)
        if stage.kind in ("qkv", "up", "head"):
            x = buffers["x"] if stage.kind == "up" else stream
            norm = self._norm(stage)
            x = rms_norm(x, norm, spec.eps)
        elif stage.kind == "output":
            x = self._combined(stage.layer, position)
        else:
            x, stream = buffers["act"], buffers["x"]
        rows = self._rows(stage, worker)
        if not len(rows):
            none = torch.tensor([-math.inf, spec.vocab], dtype=self.dtype)
            return [(buffers["choice"], worker, none)] if stage.kind == "head" else []
        x = quantized_activation(x.clone(), self._matrix(stage))
        result = self.dense[stage.kind, stage.layer][rows] @ x
        if stage.kind != "head":
            bias = getattr(self.weights.layers[stage.layer], f"{stage.kind}_bias")
            if bias is not None:
                result = result + bias[rows].to(result)
        if stage.kind == "qkv":
            return [(buffers["qkv"], rows, result)]
        if stage.kind == "up":
            gate, up = result.split(len(rows) // 2)
            return [(buffers["act"], rows[: len(rows) // 2], torch.nn.functional.silu(gate) * up)]
        if stage.kind == "head":
            top = result.max()
            first = float(rows[result == top][0]) if torch.isfinite(top) else math.nan
            best = torch.stack([top, top.new_tensor(first)])
            return [(self.logits[step], rows, result), (buffers["choice"], worker, best)]
        return [(buffers["x"], rows, stream[rows] + result)]

    def _attention(
        self, layer: int, worker: int, position: int
    ) -> "list[tuple[Tensor, Any, Tensor | float]]":
        import torch

        spec, weights = self.plan.spec, self.weights.layers[layer]
        q, k, v = self.buffers["qkv"].split(
            [spec.attended, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
        )
        q, k, v = (t.reshape(-1, spec.head_dim) for t in (q, k, v))
        if spec.qk_norm:
            assert weights.query_norm is not None
            assert weights.key_norm is not None
            q = rms_norm(q, weights.query_norm, spec.eps)
            k = rms_norm(k, weights.key_norm, spec.eps)
        if spec.rotates[layer]:
            angles = self.weights.cos[position], self.weights.sin[position]
            q, k = (rotate(t, *angles) for t in (q, k))
        group = spec.heads // spec.kv_heads
        writes: list[tuple[Tensor, Any, Tensor | float]] = []
        for number, (head, _, start, stop) in enumerate(self.plan.parts(layer, position)):
            if number % self.plan.workers != worker:
                continue
            keys = self.keys[layer, head, start:stop].clone()
            values = self.values[layer, head, start:stop].clone()
            if stop == position + 1:
                keys[-1], values[-1] = k[head], v[head]
                writes.append((self.keys, (layer, head, position), k[head].clone()))
                writes.append((self.values, (layer, head, position), v[head].clone()))
            scores = q[head * group : (head + 1) * group] @ keys.T * spec.head_dim**-0.5
            top = scores.amax(1, keepdim=True)
            weight = (scores - top).exp()
            part = torch.cat([weight @ values, top, weight.sum(1, keepdim=True)], 1)
            writes.append((self.buffers["partial"], number, part))
        return writes

    def _combined(self, layer: int, position: int) -> "Tensor":
        spec = self.plan.spec
        parts = self.plan.parts(layer, position)
        part = self.buffers["partial"][: len(parts)]  # [chunks * Hkv, group, D + 2]
        part = part.reshape(-1, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim + 2)
        values, top, total = part[..., :-2], part[..., -2:-1], part[..., -1:]
        scale = (top - top.amax(0)).exp()
        return ((values * scale).sum(0) / (total * scale).sum(0)).flatten()

    def _token(self, step: int) -> int:
        if step < len(self.given):
            return self.given[step]
        self.chosen[step - 1] = self._best()
        return self._best()

    def _best(self) -> int:
        best = self.buffers["choice"]
        chosen = best[best[:, 0] == best[:, 0].max(), 1]
        return int(chosen.min()) if len(chosen) else 0  # NaN where a wait is missing

    def _norm(self, stage: Stage) -> "Tensor":
        if stage.kind == "head":
            return self.weights.norm
        layer = self.weights.layers[stage.layer]
        return layer.norm1 if stage.kind == "qkv" else layer.norm2

    def _matrix(self, stage: Stage) -> Matrix | Packed:
        if stage.kind == "head":
            return self.weights.head
        return getattr(self.weights.layers[stage.layer], stage.kind)

    def _rows(self, stage: Stage, worker: int) -> "Tensor":
        """Rows of a worker; of the up stage those of the gate, then the same of up."""
        import torch

        up = stage.kind == "up"
        size, tile = (stage.rows // 2, TILE // 2) if up else (stage.rows, TILE)
        low, high = (min(t * tile, size) for t in stage.first[worker : worker + 2])
        rows = torch.arange(low, high)
        return torch.cat([rows, rows + size]) if up else rows
