"""Words in, music out: language models with a music vocabulary (MIDI-LLM, arXiv 2511.03942).

Names are loaded on first use, so importing the package costs no time and pulls in neither torch
nor transformers nor miditok.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from midi_llm._version import __version__

if TYPE_CHECKING:
    from midi_llm.midi_io import Notes, Style, read_notes, read_score, to_score, write_midi
    from midi_llm.tokenizer import AMTTokenizer
    from midi_llm.vocab import AMTConfig

_MODULES = {
    "midi_io": "Notes Style read_notes read_score to_score write_midi",
    "tokenizer": "AMTTokenizer",
    "vocab": "AMTConfig",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AMTConfig",
    "AMTTokenizer",
    "Notes",
    "Style",
    "__version__",
    "read_notes",
    "read_score",
    "to_score",
    "write_midi",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'midi_llm' has no attribute {name!r}")
    return getattr(import_module(f"midi_llm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
