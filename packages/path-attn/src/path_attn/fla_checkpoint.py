"""Load `path_attn` checkpoints of flash-linear-attention (fla)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from path_attn.configuration_path_attn import PaTHConfig
from path_attn.modeling_path_attn import PaTHForCausalLM
from tenfold_common.errors import CheckpointError, UserError

_FLA_NAMES = (
    ("model.embeddings.", "model.embed_tokens."),
    (".attn_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attn.maybe_q_norm.", ".self_attn.q_norm."),
    (".attn.maybe_k_norm.", ".self_attn.k_norm."),
    (".attn.", ".self_attn."),
)


def fla_config(values: Mapping[str, object]) -> PaTHConfig:
    """Translate the `config.json` of an fla `path_attn` model.

    The result has `gate_scale="fla"` and `max_beta=2` (no clipping), as fla computes it.

    Args:
        values: The file's content.

    Returns:
        The configuration of the same model here.

    Raises:
        UserError: it is not a `path_attn` configuration, or uses what this package lacks.
    """
    kind = values.get("model_type", "path_attn")
    if kind != "path_attn":
        raise UserError(f"model_type is {kind!r}; expected fla's 'path_attn'.")
    if values.get("attnres_block_size") is not None:
        raise UserError("attnres_block_size is set; attention residuals are not supported.")
    activation = values.get("hidden_act", "swish")
    if activation not in ("swish", "silu"):
        raise UserError(f"hidden_act is {activation!r}; only 'swish' is supported.")

    def number(name: str, default: int) -> int:
        value = values.get(name, default)
        if not isinstance(value, int):
            raise UserError(
                f"{name} is {value!r} in the fla configuration; expected a whole number."
            )
        return value

    hidden, heads = number("hidden_size", 2048), number("num_heads", 32)
    inner = values.get("intermediate_size")
    if inner is None:
        ratio = values.get("hidden_ratio") or 4
        inner = -(-int(hidden * ratio * 2 / 3) // 256) * 256  # type: ignore[operator]
    return PaTHConfig(
        vocab_size=number("vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=inner,  # type: ignore[arg-type]
        num_hidden_layers=number("num_hidden_layers", 24),
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_kv_heads") or heads,  # type: ignore[arg-type]
        rms_norm_eps=values.get("norm_eps", 1e-6),  # type: ignore[arg-type]
        position_encoding="path_fox" if values.get("use_forget_gate", False) else "path",
        gate_scale="fla",
        low_rank_w=32 if values.get("use_low_rank_w", True) else None,
        conv_size=3 if values.get("use_w_shortconv", True) else None,
        max_beta=2.0,
        initializer_range=values.get("initializer_range", 0.02),  # type: ignore[arg-type]
        tie_word_embeddings=values.get("tie_word_embeddings", False),  # type: ignore[arg-type]
        pad_token_id=values.get("pad_token_id"),  # type: ignore[arg-type]
        bos_token_id=values.get("bos_token_id", 1),  # type: ignore[arg-type]
        eos_token_id=values.get("eos_token_id", 2),  # type: ignore[arg-type]
    )


def load_fla_state_dict(
    state_dict: Mapping[str, Tensor], config: Mapping[str, object] | PaTHConfig
) -> PaTHForCausalLM:
    """Build a model from the weights of an fla `path_attn` language model.

    Args:
        state_dict: Weights under fla's names; one floating dtype, which the model takes over.
        config: Content of fla's `config.json`, or an equivalent `PaTHConfig`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape; the message names all of
            them.
        UserError: the configuration does not fit.
    """
    path_config = config if isinstance(config, PaTHConfig) else fla_config(config)
    if any("maybe_q_norm" in name for name in state_dict):
        path_config = PaTHConfig(**{**path_config.to_dict(), "qk_norm": True})
    weights = {_here(name): tensor for name, tensor in state_dict.items()}
    if path_config.tie_word_embeddings:
        weights.setdefault(
            "lm_head.weight", weights.get("model.embed_tokens.weight", torch.empty(0))
        )
    model = PaTHForCausalLM(path_config)
    expected = model.state_dict()
    faults = [f"missing: {_there(name)}" for name in expected if name not in weights]
    faults += [f"unexpected: {_there(name)}" for name in weights if name not in expected]
    faults += [
        f"{_there(name)} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(
            "the fla weights do not fit the configuration: " + "; ".join(faults) + "."
        )
    model.to(dtype=next(iter(weights.values())).dtype)  # type: ignore[call-overload]
    model.load_state_dict(weights)
    model.tie_weights()
    return model.eval()


def from_fla(folder: str | Path) -> PaTHForCausalLM:
    """Load an fla `path_attn` model folder (`config.json` and safetensors files).

    Args:
        folder: The folder. Pickled weights (`.bin`) are refused.

    Returns:
        The model, in the dtype of the file and in evaluation mode.

    Raises:
        UserError: the folder or its configuration is absent, or of another kind.
        CheckpointError: weights are absent, unreadable, or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    settings = folder / "config.json"
    if not settings.is_file():
        raise UserError(
            f"{settings} does not exist; from_fla needs a folder that fla's save_pretrained wrote."
        )
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{settings} is not valid JSON: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file; pickled weights are not loaded.")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return load_fla_state_dict(weights, values)


def _here(name: str) -> str:
    for theirs, ours in _FLA_NAMES:
        name = name.replace(theirs, ours)
    return name


def _there(name: str) -> str:
    for theirs, ours in reversed(_FLA_NAMES):
        name = name.replace(ours, theirs)
    return name
