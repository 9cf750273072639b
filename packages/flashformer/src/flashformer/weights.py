"""The weights of a model as the plan wants them: fused, checked, in the formats asked for."""

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashformer.config import ModelSpec
from flashformer.pack import Packed
from flashformer.quant import Matrix, quantize
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; biases and the norms of heads are None where the model has none.

    Attributes:
        qkv: `[(Hq + 2 Hkv) D, H]`, queries, keys, values.
        output: `[H, Hq D]`.
        up: `[2 I, H]`, the gate, then up.
        down: `[H, I]`.
        norm1: `[H]` float32, before the attention.
        norm2: `[H]` float32, before the MLP.
        query_norm: `[D]` float32.
        key_norm: `[D]` float32.
        qkv_bias: `[(Hq + 2 Hkv) D]` float32.
        output_bias: `[H]` float32.
        up_bias: `[2 I]` float32.
        down_bias: `[H]` float32.
    """

    qkv: Matrix | Packed
    output: Matrix | Packed
    up: Matrix | Packed
    down: Matrix | Packed
    norm1: "Tensor"
    norm2: "Tensor"
    query_norm: "Tensor | None" = None
    key_norm: "Tensor | None" = None
    qkv_bias: "Tensor | None" = None
    output_bias: "Tensor | None" = None
    up_bias: "Tensor | None" = None
    down_bias: "Tensor | None" = None


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """A whole model.

    Attributes:
        layers: L of them.
        norm: `[H]` float32, before the head.
        head: `[V, H]`.
        embedding: `[V, H]` float32 or bfloat16, never quantised.
        cos: `[positions, rotary / 2]` float32, the attention factor of the model included.
        sin: The same.
    """

    layers: tuple[LayerWeights, ...]
    norm: "Tensor"
    head: Matrix | Packed
    embedding: "Tensor"
    cos: "Tensor"
    sin: "Tensor"


Quantizer = Callable[[str], "Matrix | None"]


def read_weights(
    spec: ModelSpec,
    state: "Mapping[str, Tensor]",
    cos_sin: "tuple[Tensor, Tensor]",
    *,
    format: str,
    group: int,
    head: str,
    symmetric: bool = True,
    ready: Quantizer = lambda name: None,
) -> ModelWeights:
    """Read a model's weights from its state dict, one matrix after the other.

    Args:
        spec: The model.
        state: Names as transformers has them (`model.layers.0.self_attn.q_proj.weight`, ...).
        cos_sin: Of `rotary_tables`.
        format: Of the matrices of the layers.
        group: Of int4.
        head: Format of the head.
        symmetric: Of int4.
        ready: Returns the matrix of a linear layer (`model.layers.0.self_attn.q_proj`) that is
            quantised already, or None.

    Raises:
        UserError: a weight is missing, has the wrong shape, or holds NaN; the message names it.
    """
    import torch

    def tensor(name: str, *shape: int) -> "Tensor":
        if name not in state:
            raise UserError(f"the model has no weight {name!r}")
        found = state[name].detach()
        if tuple(found.shape) != shape:
            raise UserError(f"{name} has the shape {list(found.shape)}, expected {list(shape)}")
        if not torch.isfinite(found).all():
            raise UserError(f"{name} holds NaN or infinity; mend the checkpoint")
        return found

    def vector(name: str, size: int, *, wanted: bool = True) -> "Tensor | None":
        return tensor(name, size).to(torch.float32, copy=True) if wanted else None

    def matrix(name: str, rows: int, k: int, kind: str) -> Matrix:
        found = ready(name)
        if found is None:
            weight = tensor(f"{name}.weight", rows, k)
            found = quantize(weight, kind, group=group, symmetric=symmetric, name=f"{name}.weight")
        elif found.shape != (rows, k):
            raise UserError(f"{name} has the shape {list(found.shape)}, expected {[rows, k]}")
        return found

    def fused(parent: str, names: Mapping[str, int], k: int) -> Matrix:
        return Matrix.stack([matrix(f"{parent}.{n}", r, k, format) for n, r in names.items()])

    def biases(parent: str, names: Mapping[str, int], *, wanted: bool) -> "Tensor | None":
        if not wanted:
            return None
        return torch.cat([tensor(f"{parent}.{n}.bias", r) for n, r in names.items()]).float()

    q, kv = spec.attended, spec.kv_heads * spec.head_dim
    queries = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    gates = {"gate_proj": spec.intermediate, "up_proj": spec.intermediate}
    if spec.model_type == "phi3":  # fused already, in the same order
        queries, gates = {"qkv_proj": spec.qkv_rows}, {"gate_up_proj": 2 * spec.intermediate}
    layers = []
    for number in range(spec.layers):
        layer = f"model.layers.{number}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        output = {"o_proj": spec.hidden}
        down = {"down_proj": spec.hidden}
        norm1, norm2 = (
            tensor(f"{layer}.{name}_layernorm.weight", spec.hidden).to(torch.float32, copy=True)
            for name in ("input", "post_attention")
        )
        layers.append(
            LayerWeights(
                qkv=fused(attention, queries, spec.hidden),
                output=fused(attention, output, q),
                up=fused(mlp, gates, spec.hidden),
                down=fused(mlp, down, spec.intermediate),
                norm1=norm1,
                norm2=norm2,
                query_norm=vector(f"{attention}.q_norm.weight", spec.head_dim, wanted=spec.qk_norm),
                key_norm=vector(f"{attention}.k_norm.weight", spec.head_dim, wanted=spec.qk_norm),
                qkv_bias=biases(attention, queries, wanted=spec.qkv_bias),
                output_bias=biases(attention, output, wanted=spec.output_bias),
                up_bias=biases(mlp, gates, wanted=spec.mlp_bias),
                down_bias=biases(mlp, down, wanted=spec.mlp_bias),
            )
        )
    if cos_sin[0].shape[1] != spec.rotary // 2:
        raise UserError(
            f"the model's rotary module turns {2 * cos_sin[0].shape[1]} elements of a head, its "
            f"config says {spec.rotary}: a transformers version that this one does not know"
        )
    embedding = tensor("model.embed_tokens.weight", spec.vocab, spec.hidden)
    wide = embedding.dtype != torch.bfloat16 or format == "fp32"
    embedding = embedding.to(torch.float32 if wide else torch.bfloat16, copy=True)
    source = "model.embed_tokens" if spec.tied else "lm_head"
    norm = tensor("model.norm.weight", spec.hidden).to(torch.float32, copy=True)
    return ModelWeights(
        layers=tuple(layers),
        norm=norm,
        head=matrix(source, spec.vocab, spec.hidden, head),
        embedding=embedding.contiguous(),
        cos=cos_sin[0],
        sin=cos_sin[1],
    )


def left_out(spec: ModelSpec, names: "Iterable[str]", used: "Container[str]") -> list[str]:
    """Return the weights that a model of this spec does not use, of those by name."""
    return [
        name
        for name in sorted(names)
        if name not in used
        and not name.endswith("rotary_emb.inv_freq")
        and not (spec.tied and name == "lm_head.weight")
    ]


class Seen(dict[str, "Tensor"]):
    """A state dict that notes what was asked for, in `used`."""

    def __init__(self, state: "Mapping[str, Tensor]") -> None:
        super().__init__(state)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> "Tensor":
        self.used.add(name)
        return super().__getitem__(name)


def rotary_tables(model: "PreTrainedModel", positions: int) -> "tuple[Tensor, Tensor]":
    """Return cos and sin of every position as the model's own rotary module computes them.

    Each position is asked for by itself, as decoding does: with dynamic scaling the frequencies
    depend on the length so far.

    Args:
        model: A decoder of transformers.
        positions: How many.

    Returns:
        Two of `[positions, rotary / 2]`, float32.
    """
    import torch

    rotary: Any = copy.deepcopy(model.get_decoder().rotary_emb)  # some remember the longest length
    device = rotary.inv_freq.device
    like = torch.zeros(1, 1, 1, device=device, dtype=torch.float32)
    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    with torch.no_grad():
        if "dynamic" in kind or kind == "longrope":
            rows = [rotary(like, torch.tensor([[p]], device=device)) for p in range(positions)]
            cos, sin = (torch.cat([row[i][0] for row in rows]) for i in (0, 1))
        else:
            where = torch.arange(positions, device=device)[None]
            cos, sin = (table[0] for table in rotary(like, where))
    half = cos.shape[1] // 2
    return tuple(table[:, :half].float().cpu().contiguous() for table in (cos, sin))  # type: ignore[return-value]


def check_model(model: "PreTrainedModel") -> None:
    """Refuse a model whose weights cannot be read as they are.

    Raises:
        UserError: it is no causal LM of transformers, has a forward pass of its own, is wrapped by
            peft or torch.compile, quantised, offloaded or spread over devices.
    """
    import torch
    from transformers import PreTrainedModel

    if isinstance(model, str):
        raise UserError(f"compile takes a model; for the name {model!r} call from_pretrained")
    if hasattr(model, "_orig_mod"):
        raise UserError("the model is wrapped by torch.compile; pass it as it was before")
    if hasattr(model, "peft_config") or type(model).__module__.startswith("peft."):
        raise UserError(
            "the model carries a peft adapter; merge it first: model = model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"compile takes a causal LM of transformers, not {type(model).__name__}")
    if model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} has no head; load the model with AutoModelForCausalLM"
        )
    if not type(model).forward.__module__.startswith("transformers."):
        raise UserError(
            f"{type(model).__name__} has a forward pass of its own, which would be left out"
        )
    if getattr(model, "is_quantized", False):
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "?")
        raise UserError(
            f"the model is quantised by {method}; load its folder with from_pretrained, which "
            "reads AWQ, GPTQ and compressed-tensors, or compile the unquantised model"
        )
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices:
        raise UserError("the model has weights on the meta device (offloaded); load it whole")
    if len(devices) > 1:
        raise UserError(f"the model lies on several devices ({', '.join(map(str, devices))})")
