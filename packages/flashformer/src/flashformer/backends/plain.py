"""The plan in plain torch, for machines without a C++ compiler: right, and slow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashformer.pack import Packed, gate_order, unpack
from flashformer.plan import Plan
from flashformer.reference import rms_norm, rotate
from flashformer.weights import ModelWeights

if TYPE_CHECKING:
    from torch import Tensor


class TorchBackend:
    """Decodes by torch operations, with the numbers the packed weights stand for.

    Activations are not rounded to int8: results are nearer to exact ones than those of the native
    back-ends.

    Args:
        plan: The plan.
        weights: Of the model.
        cache_format: Of keys and values.
    """

    name = "torch"

    def __init__(self, plan: Plan, weights: ModelWeights, *, cache_format: str) -> None:
        import torch

        self.plan, self.cache_format, self.weights = plan, cache_format, weights
        self.device = torch.device("cpu")
        self.packed: dict[str, Packed] = {}
        self.group = 0
        self._dense: dict[tuple[str, int], Tensor] = {}
        for stage in plan.stages:
            if stage.kind == "attention":
                continue
            matrix: Any = weights.head
            if stage.kind != "head":
                matrix = getattr(weights.layers[stage.layer], stage.kind)
            self.group = self.group or matrix.group
            self._dense[stage.kind, stage.layer] = _rows(matrix, stage.kind, plan)
            tiles = matrix.tiles if isinstance(matrix, Packed) else None
            if tiles is None:
                from flashformer.pack import pack

                order = gate_order(plan.spec.intermediate) if stage.kind == "up" else None
                tiles = pack(matrix, order)
            self.packed[stage.name] = Packed(
                matrix.format, matrix.group, matrix.zeros, matrix.shape, tiles
            )

    @property
    def streamed(self) -> int:
        """Bytes of weights that a token would read packed."""
        return sum(p.tiles.numel() for p in self.packed.values())

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
    ) -> "Tensor":
        """Read tokens and choose new ones; see `CPUBackend.decode`."""
        import torch

        from flashformer.sampling import choose

        chosen: list[int] = []
        steps = len(given) + max(new - 1, 0)
        for step in range(steps):
            token = int(given[step]) if step < len(given) else chosen[-1]
            row = self._forward(token, position + step, keys, values)
            (logits[step] if logits.ndim == 2 else logits).copy_(row)
            if new and step >= len(given) - 1:
                chosen.append(choose(row, temperature, seed, position + step))
                if chosen[-1] in ends or (cancel is not None and int(cancel[0])):
                    break
        return torch.tensor(chosen, dtype=torch.int64)

    def _forward(
        self, token: int, position: int, keys: "Sequence[Tensor]", values: "Sequence[Tensor]"
    ) -> "Tensor":
        import torch

        spec, weights = self.plan.spec, self.weights
        kv = spec.kv_heads * spec.head_dim
        x = weights.embedding[token].float()
        for number, layer in enumerate(weights.layers):
            qkv = self._times("qkv", number, rms_norm(x, layer.norm1, spec.eps), layer.qkv_bias)
            q, k, v = (t.view(-1, spec.head_dim) for t in qkv.split([spec.attended, kv, kv]))
            if layer.query_norm is not None and layer.key_norm is not None:
                q = rms_norm(q, layer.query_norm, spec.eps)
                k = rms_norm(k, layer.key_norm, spec.eps)
            if spec.rotates[number]:
                angles = weights.cos[position], weights.sin[position]
                q, k = rotate(q, *angles), rotate(k, *angles)
            _write(keys[number], values[number], position, k, v)
            window = spec.windows[number]
            start = max(0, position + 1 - window) if window else 0
            where = slice(start, position + 1), slice(spec.head_dim)
            past = keys[number].transpose(2, 3).flatten(1, 2)[:, *where]
            seen = values[number][:, *where]
            out = torch.nn.functional.scaled_dot_product_attention(
                q.view(spec.kv_heads, -1, spec.head_dim), past.float(), seen.float()
            )
            x = x + self._times("output", number, out.flatten(), layer.output_bias)
            both = self._times("up", number, rms_norm(x, layer.norm2, spec.eps), layer.up_bias)
            gate, up = both.split(spec.intermediate)
            hidden = torch.nn.functional.silu(gate) * up
            x = x + self._times("down", number, hidden, layer.down_bias)
        return self._times("head", spec.layers, rms_norm(x, weights.norm, spec.eps), None)

    def _times(self, kind: str, layer: int, x: "Tensor", bias: "Tensor | None") -> "Tensor":
        result = self._dense[kind, layer] @ x
        return result if bias is None else result + bias


def _rows(matrix: Any, kind: str, plan: Plan) -> "Tensor":
    """Return what a matrix means `[N, K]`, its rows in the model's order."""
    import torch

    if not isinstance(matrix, Packed):
        return matrix.dense()
    dense = unpack(matrix.tiles, matrix).dense()
    if kind != "up":
        return dense[: matrix.shape[0]]
    order = gate_order(plan.spec.intermediate)
    found = torch.empty(matrix.shape)
    found[order[order >= 0]] = dense[order >= 0]
    return found


def _write(keys: "Tensor", values: "Tensor", position: int, k: "Tensor", v: "Tensor") -> None:
    size = k.shape[1]
    keys[:, position // 16, :size, position % 16] = k.to(keys)
    values[:, position, :size] = v.to(values)
