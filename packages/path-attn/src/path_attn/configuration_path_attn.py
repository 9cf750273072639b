"""Configuration of a decoder whose attention layers are PaTH, or one of its baselines."""

from dataclasses import fields

from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from path_attn.options import check_attention, check_integer, check_positive
from tenfold_common.errors import UserError, suggest

# What transformers itself hands to a configuration besides the fields below.
_TRANSFORMERS_EXTRAS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "tie_last_hidden_states",
        "torch_dtype",
    }
)


class PaTHConfig(PreTrainedConfig):
    """Configuration of `PaTHModel` and `PaTHForCausalLM`.

    The five position encodings share one layer, so that they differ in nothing but the encoding:
    "path" (Householder products), "path_fox" (the same with forget gates), "rope", "fox" (forget
    gates only) and "nope" (causal mask only).

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the gated MLP. Defaults to 8/3 D, rounded up to a multiple of
            64.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads HQ.
        num_key_value_heads: Key/value heads H; HQ must be a multiple of H. Defaults to HQ.
        head_dim: Width K of one head. Defaults to D / HQ.
        hidden_act: Activation of the gated MLP, a name transformers knows.
        rms_norm_eps: Epsilon of every RMS norm.
        max_position_embeddings: Longest sequence meant; only RoPE variants with scaling use it.
        position_encoding: "path", "path_fox", "rope", "fox" or "nope".
        gate_scale: "paper" adds the log gates after scaling the scores, "fla" before. A model must
            be served with the convention it was trained with.
        num_reflections: Householder reflections per token (the paper has 1).
        low_rank_w: Rank of the projection that makes w. None: one full matrix.
        conv_size: Width of the causal short convolution on w. None: no convolution.
        w_norm_eps: Added to the squared norm of w before dividing by it; w = 0 stays 0.
        max_beta: beta is clipped to this value. None: 2 - 2^-7 for bfloat16 and float16
            activations, where rounding could push an eigenvalue beyond -1, and no clipping
            otherwise.
        qk_norm: RMS norm of every query and key head.
        window: A query sees the last `window` real tokens, itself included. None: all.
        softcap: Scores become `softcap * tanh(score / softcap)` before the gates. None: no cap.
        rope_parameters: As in every transformers 5 configuration; used by "rope" only.
        qkv_bias: Bias of the query, key and value projections.
        o_bias: Bias of the output projection.
        mlp_bias: Bias of the three MLP projections.
        backend: "auto", "reference", "torch" or "triton": see `path_attn.path_attention`.
        block_size: Tokens per block of the blockwise algorithm.
        initializer_range: Standard deviation of newly made weights.
        use_cache: Whether a forward pass without gradients returns a cache by default.
        tie_word_embeddings: Whether the output matrix is the input embedding.
        pad_token_id: Id of the padding token, or None.
        bos_token_id: Id of the first token, or None.
        eos_token_id: Id (or ids) that end a sequence, or None.

    Raises:
        UserError: a value does not fit, or a name is unknown; the message says which.
    """

    model_type = "tenfold_path_attn"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (a ClassVar of the base class)

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    position_encoding: str = "path"
    gate_scale: str = "paper"
    num_reflections: int = 1
    low_rank_w: int | None = 32
    conv_size: int | None = 3
    w_norm_eps: float = 1e-6
    max_beta: float | None = None
    qk_norm: bool = False
    window: int | None = None
    softcap: float | None = None
    rope_parameters: RopeParameters | dict | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    backend: str = "auto"
    block_size: int = 64
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: object) -> None:
        """Check everything, then fill in what follows from other fields."""
        _refuse_unknown(kwargs)
        for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):
            check_integer(name, getattr(self, name))
        check_integer("intermediate_size", self.intermediate_size, optional=True)
        check_positive("initializer_range", self.initializer_range)
        check_attention(
            vars(self), heads="num_attention_heads", kv_heads="num_key_value_heads",
            eps="rms_norm_eps",
        )  # fmt: skip
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        super().__post_init__(**kwargs)

    @property
    def uses_reflections(self) -> bool:
        """Whether the layers have w and beta ("path" and "path_fox")."""
        return self.position_encoding in ("path", "path_fox")

    @property
    def uses_gate(self) -> bool:
        """Whether the layers have forget gates ("path_fox" and "fox")."""
        return self.position_encoding in ("path_fox", "fox")


def count_parameters(config: PaTHConfig) -> int:
    """Number of parameters of `PaTHForCausalLM(config)`, tied embeddings counted once."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    block = _attention_parameters(config) + _mlp_parameters(config) + 2 * config.hidden_size
    return embeddings + config.num_hidden_layers * block + config.hidden_size


def matched_intermediate_size(config: PaTHConfig, like: PaTHConfig) -> int:
    """MLP width that gives `config` as many parameters as `like`, up to rounding to a whole width.

    Args:
        config: The configuration whose `intermediate_size` is wanted. It is not changed.
        like: The configuration to match; same hidden size, layers, vocabulary and tying.

    Returns:
        The width to put into `config.intermediate_size`. `count_parameters` tells the remaining
        difference, at most 1.5 hidden sizes per layer.

    Raises:
        UserError: the two differ in more than the MLP could make up for.
    """
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "tie_word_embeddings",
        "mlp_bias",
    ):
        if getattr(config, name) != getattr(like, name):
            raise UserError(
                f"{name} is {getattr(config, name)} in config but {getattr(like, name)} in like; "
                "only the attention part may differ when parameters are matched by MLP width."
            )
    per_unit = 3 * like.hidden_size + (2 if like.mlp_bias else 0)
    surplus = _attention_parameters(config) - _attention_parameters(like)
    width = round((like.intermediate_size or 0) - surplus / per_unit)
    if width < 1:
        raise UserError(
            f"config has {surplus} more attention parameters a layer than like's whole MLP."
        )
    return width


def _attention_parameters(config: PaTHConfig) -> int:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or 0
    width, head_dim = config.hidden_size, config.head_dim or 0
    out, kv = heads * head_dim, kv_heads * head_dim
    total = width * (2 * out + 2 * kv)
    total += (out + 2 * kv) * config.qkv_bias + width * config.o_bias
    total += 2 * head_dim * config.qk_norm
    if config.uses_reflections:
        channels, steps = kv * config.num_reflections, kv_heads * config.num_reflections
        total += (
            width * channels
            if config.low_rank_w is None
            else config.low_rank_w * (width + channels)
        )
        total += channels * (config.conv_size or 0)
        total += (width + 1) * steps
    if config.uses_gate:
        total += (width + 1) * heads
    return total


def _mlp_parameters(config: PaTHConfig) -> int:
    inner = config.intermediate_size or 0
    return 3 * config.hidden_size * inner + (2 * inner + config.hidden_size) * config.mlp_bias


def _refuse_unknown(names: dict[str, object]) -> None:
    known = [f.name for f in fields(PaTHConfig)]
    generation = GenerationConfig().to_dict()
    for name in names:
        if name.startswith("_") or name in _TRANSFORMERS_EXTRAS or name in generation:
            continue
        raise UserError(f"PaTHConfig has no field {name!r}.{suggest(name, known)}")
