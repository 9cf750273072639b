"""PaTH attention: position encoding by accumulated Householder products (arXiv 2505.16381).

Names are loaded on first use, so importing the package costs no time and pulls in neither torch
nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from path_attn._version import __version__

if TYPE_CHECKING:
    from path_attn.cache import PaTHKVCache
    from path_attn.configuration_path_attn import PaTHConfig
    from path_attn.convert import convert_rope_model
    from path_attn.layers import PaTHAttention
    from path_attn.modeling_path_attn import PaTHForCausalLM, PaTHModel
    from path_attn.ops import parallel_path_attn, path_attention, path_attention_decode
    from path_attn.reference import global_path_attention, naive_path_attention

_HOME = {
    "PaTHAttention": "layers",
    "PaTHConfig": "configuration_path_attn",
    "PaTHForCausalLM": "modeling_path_attn",
    "PaTHKVCache": "cache",
    "PaTHModel": "modeling_path_attn",
    "convert_rope_model": "convert",
    "global_path_attention": "reference",
    "naive_path_attention": "reference",
    "parallel_path_attn": "ops",
    "path_attention": "ops",
    "path_attention_decode": "ops",
}

__all__ = [
    "PaTHAttention",
    "PaTHConfig",
    "PaTHForCausalLM",
    "PaTHKVCache",
    "PaTHModel",
    "__version__",
    "convert_rope_model",
    "global_path_attention",
    "naive_path_attention",
    "parallel_path_attn",
    "path_attention",
    "path_attention_decode",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'path_attn' has no attribute {name!r}")
    return getattr(import_module(f"path_attn.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
