"""Pragmatic reasoning for language models: Wavelength (arXiv 2509.06952) and Rational Speech Acts.

Names are loaded on first use, so importing the package costs no time and pulls in neither torch
nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from wavelength_rsa._version import __version__

if TYPE_CHECKING:
    from wavelength_rsa.cache import CachedModel
    from wavelength_rsa.data import Item, human_baseline, load_items, save_items
    from wavelength_rsa.evaluate import Report, compare, evaluate_listener, evaluate_speaker
    from wavelength_rsa.fitting import fit_rsa
    from wavelength_rsa.listeners import Listener, LogprobListener, SamplingListener, TableListener
    from wavelength_rsa.prompts import WavelengthPrompts, prompts_for
    from wavelength_rsa.rerank import PragmaticReranker, pragmatic_rerank
    from wavelength_rsa.rsa import RSA
    from wavelength_rsa.rules import Rules, check_clue
    from wavelength_rsa.scales import Distribution, Scale, grid
    from wavelength_rsa.speakers import RSAListener, RSASpeaker, SamplingSpeaker, Speaker

_MODULES = {
    "cache": "CachedModel",
    "data": "Item human_baseline load_items save_items",
    "evaluate": "Report compare evaluate_listener evaluate_speaker",
    "fitting": "fit_rsa",
    "listeners": "Listener LogprobListener SamplingListener TableListener",
    "prompts": "WavelengthPrompts prompts_for",
    "rerank": "PragmaticReranker pragmatic_rerank",
    "rsa": "RSA",
    "rules": "Rules check_clue",
    "scales": "Distribution Scale grid",
    "speakers": "RSAListener RSASpeaker SamplingSpeaker Speaker",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "RSA",
    "CachedModel",
    "Distribution",
    "Item",
    "Listener",
    "LogprobListener",
    "PragmaticReranker",
    "RSAListener",
    "RSASpeaker",
    "Report",
    "Rules",
    "SamplingListener",
    "SamplingSpeaker",
    "Scale",
    "Speaker",
    "TableListener",
    "WavelengthPrompts",
    "__version__",
    "check_clue",
    "compare",
    "evaluate_listener",
    "evaluate_speaker",
    "fit_rsa",
    "grid",
    "human_baseline",
    "load_items",
    "pragmatic_rerank",
    "prompts_for",
    "save_items",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wavelength_rsa' has no attribute {name!r}")
    return getattr(import_module(f"wavelength_rsa.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
