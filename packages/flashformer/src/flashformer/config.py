"""What of a transformers model the plan needs to know, and which models are refused, and why."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
_ATTENTIONS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a Llama-family decoder.

    Attributes:
        model_type: As transformers calls it, one of `MODEL_TYPES`.
        hidden: Width of the residual stream, H.
        intermediate: Width of the MLP, I.
        heads: Query heads, Hq.
        kv_heads: Key and value heads, Hkv, a divisor of `heads`.
        head_dim: Width of a head, D; may differ from H / Hq.
        vocab: Number of tokens, V.
        eps: Of every RMS norm.
        rotary: Leading elements of a head that the rotary position embedding turns, even.
        max_positions: The longest context the model was made for; with longrope that up to which
            its angles do not change.
        windows: For each layer how many positions it sees, itself included; None for all.
        rotates: For each layer whether it has rotary positions.
        qkv_bias: Whether queries, keys and values have biases.
        output_bias: Whether the attention's output has one.
        mlp_bias: Whether the three matrices of the MLP have.
        qk_norm: Whether queries and keys are normalised head by head.
        tied: Whether the head's weights are the embedding's.
        longrope: Whether longer texts would change the angles of all positions.
        growing: Whether the angles of longer texts grow with the text (dynamic scaling), so that
            they depend on how it was cut into calls.
    """

    model_type: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    rotary: int
    max_positions: int
    windows: tuple[int | None, ...]
    rotates: tuple[bool, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    longrope: bool = False
    growing: bool = False

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return len(self.windows)

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection to queries, keys and values, (Hq + 2 Hkv) D."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attended(self) -> int:
        """Width of what the attention returns, Hq D."""
        return self.heads * self.head_dim

    @classmethod
    def from_config(cls, config: "PretrainedConfig") -> Self:
        """Read a transformers config.

        Raises:
            UserError: the model is not supported; the message gives every reason.
        """
        found = supported(config)
        if not found.ok:
            raise UserError(f"this model is not supported: {'; '.join(found.reasons)}")
        kind = config.model_type
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            model_type=kind,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            vocab=config.vocab_size,
            eps=float(config.rms_norm_eps),
            rotary=int(head_dim * _partial(config)) // 2 * 2,
            max_positions=_positions(config),
            longrope=_rope_type(config) == "longrope",
            growing=_rope_type(config) == "dynamic",
            windows=_windows(config),
            rotates=tuple(bool(r) for r in getattr(config, "no_rope_layers", None) or [1] * layers),
            qkv_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
            tied=bool(config.tie_word_embeddings),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return what `to_dict` made.

        Raises:
            UserError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(names ^ set(values)))
            raise UserError(f"the model description does not fit this version: {odd}")
        lists = {name: tuple(values[name]) for name in ("windows", "rotates")}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class Support:
    """Whether a model can be compiled.

    Attributes:
        ok: Whether it can.
        reasons: What stands in the way, each naming the key of the config; empty if nothing does.
    """

    ok: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok


def supported(config: "PretrainedConfig") -> Support:
    """Say whether a model of this config can be compiled, and if not, everything in the way.

    Args:
        config: A transformers config; of a model of several parts that of the language model.

    Example:
        >>> from transformers import LlamaConfig
        >>> supported(LlamaConfig(hidden_act="gelu")).reasons
        ("hidden_act is 'gelu', must be 'silu'",)
    """
    if not hasattr(config, "model_type") and hasattr(getattr(config, "config", None), "model_type"):
        raise UserError("supported takes a config; call it with model.config")
    kind = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        return Support(False, (f"model_type {kind!r} is an encoder-decoder, must be a decoder",))
    if kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        return Support(
            False, (f"model_type is {kind!r}, must be one of {known}.{suggest(kind, MODEL_TYPES)}",)
        )
    return Support(not (reasons := tuple(_reasons(config))), reasons)


def _reasons(config: Any) -> Sequence[str]:
    found = []
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "max_position_embeddings"):  # fmt: skip
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return [f"{name} is {value!r}, must be a whole number of at least 1"]
    if config.hidden_act not in ("silu", "swish"):
        found.append(f"hidden_act is {config.hidden_act!r}, must be 'silu'")
    if heads % kv_heads:
        found.append(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        found.append(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads}"
        )
    for name in ("num_local_experts", "num_experts"):
        if getattr(config, name, None):
            found.append(
                f"{name} is {getattr(config, name)}: mixtures of experts are not supported"
            )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            found.append(f"{name} is {getattr(config, name)}: capped logits are not supported")
    for kind in sorted(set(getattr(config, "layer_types", None) or ())):
        if kind not in _ATTENTIONS:
            found.append(f"layer_types has {kind!r}, must be of {', '.join(_ATTENTIONS)}")
    if getattr(config, "pretraining_tp", 1) not in (None, 1):
        found.append(f"pretraining_tp is {config.pretraining_tp}, must be 1")
    if not 0 < _partial(config) <= 1:
        found.append(f"partial_rotary_factor is {_partial(config)}, must be over 0 and at most 1")
    return found


def _rope_type(config: Any) -> str:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def _positions(config: Any) -> int:
    """Return up to where the model may go.

    Behind its original context longrope changes the angles of the whole text, and transformers
    reads it anew; a cache cannot.
    """
    if _rope_type(config) != "longrope":
        return config.max_position_embeddings
    return int(config.rope_parameters["original_max_position_embeddings"])


def _partial(config: Any) -> float:
    if config.model_type != "phi3":  # transformers heeds it in no other of these
        return 1.0
    parameters = getattr(config, "rope_parameters", None) or {}
    value = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return 1.0 if value is None else float(value)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Return each layer's window as transformers applies it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return (window,) * config.num_hidden_layers
