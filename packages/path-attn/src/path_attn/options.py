"""The checks of an attention layer's options, shared by `PaTHAttention` and `PaTHConfig`."""

import math
from collections.abc import Mapping
from typing import Any

from path_attn.checks import BACKENDS
from path_attn.config import POSITION_ENCODINGS
from tenfold_common.errors import UserError, suggest

GATE_SCALES = ("paper", "fla")
_CHOICES = {
    "position_encoding": POSITION_ENCODINGS,
    "gate_scale": GATE_SCALES,
    "backend": BACKENDS,
}


def check_attention(
    options: Mapping[str, Any],
    *,
    heads: str = "num_heads",
    kv_heads: str = "num_kv_heads",
    eps: str = "norm_eps",
) -> None:
    """Refuse values that no attention layer can have.

    Args:
        options: Values by name: those of `PaTHAttention`, or the fields of a `PaTHConfig`; more
            names are ignored.
        heads: Name of the number of query heads.
        kv_heads: Name of the number of key/value heads.
        eps: Name of the epsilon of the RMS norms.

    Raises:
        UserError: a value does not fit; the message names it, what was seen and what is accepted.
    """
    for name in ("hidden_size", heads, "num_reflections", "block_size"):
        check_integer(name, options[name])
    for name in (kv_heads, "head_dim", "low_rank_w", "conv_size", "window"):
        check_integer(name, options[name], optional=True)
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise UserError(
                f"{name} is {options[name]!r}; it must be one of {', '.join(choices)}."
                f"{suggest(str(options[name]), choices)}"
            )
    for name in ("w_norm_eps", eps):
        check_positive(name, options[name])
    if options["softcap"] is not None:
        check_positive("softcap", options["softcap"], "be > 0 or None")
    if options["max_beta"] is not None:
        check_positive("max_beta", options["max_beta"], "lie in (0, 2] or be None", limit=2)
    _check_shape(options, heads, kv_heads)


def check_integer(name: str, value: object, *, optional: bool = False) -> None:
    """Require a whole number >= 1, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        allowed = "a whole number >= 1" + (" or None" if optional else "")
        raise UserError(f"{name} is {value!r}; it must be {allowed}.")


def check_positive(name: str, value: Any, rule: str = "be > 0", *, limit: float = math.inf) -> None:
    """Require a finite number > 0 and <= `limit`; `rule` says so in the message."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 < value <= limit):
        raise UserError(f"{name} is {value!r}; it must {rule}.")


def _check_shape(options: Mapping[str, Any], heads: str, kv_heads: str) -> None:
    hidden_size, count, groups = options["hidden_size"], options[heads], options[kv_heads]
    head_dim = options["head_dim"]
    if groups is not None and count % groups:
        raise UserError(f"{heads} {count} is not a multiple of {kv_heads} {groups}.")
    if head_dim is None:
        if hidden_size % count:
            raise UserError(
                f"hidden_size {hidden_size} is not a multiple of {heads} {count}; give head_dim "
                "or change one of them."
            )
        head_dim = hidden_size // count
    if options["position_encoding"] == "rope" and head_dim % 2:
        raise UserError(f"head_dim {head_dim} is odd; 'rope' rotates pairs of channels.")
