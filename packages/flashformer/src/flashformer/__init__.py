"""The whole model in one call: fast decoding of one sequence, for Llama-family transformers models.

Importing this package costs next to nothing: every name is looked up in its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from flashformer._version import __version__

if TYPE_CHECKING:
    from flashformer.api import compile, from_pretrained, load
    from flashformer.benchmark import bench
    from flashformer.cache import KVCache
    from flashformer.config import ModelSpec, Support, supported
    from flashformer.jit import CompilerError
    from flashformer.model import FlashModel
    from flashformer.plan import Plan, PlanError
    from flashformer.quant import Matrix, quantize
    from flashformer.roofline import Explanation, explain
    from flashformer.verification import Verification, verify

_MODULES = {
    "api": "compile from_pretrained load",
    "benchmark": "bench",
    "cache": "KVCache",
    "config": "ModelSpec Support supported",
    "roofline": "Explanation explain",
    "jit": "CompilerError",
    "model": "FlashModel",
    "plan": "Plan PlanError",
    "quant": "Matrix quantize",
    "verification": "Verification verify",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "CompilerError",
    "Explanation",
    "FlashModel",
    "KVCache",
    "Matrix",
    "ModelSpec",
    "Plan",
    "PlanError",
    "Support",
    "Verification",
    "__version__",
    "bench",
    "compile",
    "explain",
    "from_pretrained",
    "load",
    "quantize",
    "supported",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # a function may bear its module's name: look it up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
