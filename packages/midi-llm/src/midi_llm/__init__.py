"""Words in, music out: language models with a music vocabulary (MIDI-LLM, arXiv 2511.03942).

Names are loaded on first use, so importing the package costs no time and pulls in neither torch
nor transformers nor miditok.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from midi_llm._version import __version__

if TYPE_CHECKING:
    from midi_llm.attributes import MusicAttributes, analyze
    from midi_llm.captions import Request, describe, parse_caption
    from midi_llm.data import MidiDataCollator, prepare_cpt, prepare_sft
    from midi_llm.decode import MidiLM, MidiOutput
    from midi_llm.evaluation import EvaluationReport, evaluate
    from midi_llm.grammar import GenerationConstraints
    from midi_llm.midi_read import read_many, read_notes, read_score
    from midi_llm.midi_write import Style, to_score, write_midi
    from midi_llm.modeling import TextMidiProcessor, convert, expand_vocabulary
    from midi_llm.notes import Notes
    from midi_llm.render import piano_roll, spectrogram, to_wav
    from midi_llm.tokenizer import AMTTokenizer
    from midi_llm.vllm_engine import ServerMidiLM, VLLMMidiLM
    from midi_llm.vocab import AMTConfig

_MODULES = {
    "attributes": "MusicAttributes analyze",
    "captions": "Request describe parse_caption",
    "data": "MidiDataCollator prepare_cpt prepare_sft",
    "decode": "MidiLM MidiOutput",
    "evaluation": "EvaluationReport evaluate",
    "grammar": "GenerationConstraints",
    "midi_read": "read_many read_notes read_score",
    "midi_write": "Style to_score write_midi",
    "modeling": "TextMidiProcessor convert expand_vocabulary",
    "notes": "Notes",
    "render": "piano_roll spectrogram to_wav",
    "tokenizer": "AMTTokenizer",
    "vllm_engine": "ServerMidiLM VLLMMidiLM",
    "vocab": "AMTConfig",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AMTConfig",
    "AMTTokenizer",
    "EvaluationReport",
    "GenerationConstraints",
    "MidiDataCollator",
    "MidiLM",
    "MidiOutput",
    "MusicAttributes",
    "Notes",
    "Request",
    "ServerMidiLM",
    "Style",
    "TextMidiProcessor",
    "VLLMMidiLM",
    "__version__",
    "analyze",
    "convert",
    "describe",
    "evaluate",
    "expand_vocabulary",
    "parse_caption",
    "piano_roll",
    "prepare_cpt",
    "prepare_sft",
    "read_many",
    "read_notes",
    "read_score",
    "spectrogram",
    "to_score",
    "to_wav",
    "write_midi",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'midi_llm' has no attribute {name!r}")
    return getattr(import_module(f"midi_llm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
