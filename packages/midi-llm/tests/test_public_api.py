"""What the package offers by name, with which signatures, and what importing it costs."""

import importlib.util
import inspect
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import midi_llm
from tenfold_common.testing import (
    assert_documented,
    defaults,
    import_time,
    imported_by,
    positional,
)

NAMES = {
    "AMTConfig", "AMTTokenizer", "EvaluationReport", "GenerationConstraints", "MidiDataCollator",
    "MidiLM", "MidiOutput", "MusicAttributes", "Notes", "Request", "ServerMidiLM", "Style",
    "TextMidiProcessor", "VLLMMidiLM", "__version__", "analyze", "convert", "describe", "evaluate",
    "expand_vocabulary", "parse_caption", "piano_roll", "prepare_cpt", "prepare_sft", "read_many",
    "read_notes", "read_score", "spectrogram", "to_score", "to_wav", "write_midi",
}  # fmt: skip
HEAVY = (
    "torch", "transformers", "numpy", "scipy", "miditok", "symusic", "mido", "datasets", "peft",
    "matplotlib", "vllm", "fastapi",
)  # fmt: skip
MODULES = (
    "anticipate", "app", "attributes", "captions", "cli", "corpus", "data", "decode", "demo",
    "etudes", "evaluation", "grammar", "metrics", "midi_read", "midi_write", "modeling", "notes",
    "reference", "render", "train", "vllm_engine", "vocab",
)  # fmt: skip


def test_all_is_the_promised_list():
    assert set(midi_llm.__all__) == NAMES
    assert len(midi_llm.__all__) == len(NAMES)
    assert dir(midi_llm) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_public_name_resolves_and_has_a_docstring(name):
    assert_documented(getattr(midi_llm, name))


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="MidiLLM"):
        midi_llm.MidiLLM  # noqa: B018


def test_version_is_the_distribution_s():
    assert midi_llm.__version__ == version("midi-llm")


def test_no_public_name_is_also_a_module():
    """A module of the same name would take its place once it has been imported."""
    for name in NAMES - {"__version__"}:
        assert importlib.util.find_spec(f"midi_llm.{name}") is None


def test_signatures():
    assert positional(midi_llm.MidiLM.generate) == ["self", "prompts"]
    assert {"n": 1, "temperature": 1.0, "top_p": 0.98, "max_notes": None, "seed": 0}.items() <= (
        defaults(midi_llm.MidiLM.generate).items()
    )
    assert positional(midi_llm.expand_vocabulary) == ["model", "amt"]
    assert defaults(midi_llm.expand_vocabulary)["init"] == "normal"
    assert positional(midi_llm.write_midi) == ["notes", "path", "style"]
    assert positional(midi_llm.prepare_sft) == ["pairs", "processor"]
    assert positional(midi_llm.evaluate) == ["outputs", "requested"]


def test_no_function_swallows_unknown_names():
    takes = {"AMTTokenizer", "VLLMMidiLM"}  # miditok's and vLLM's own options
    for name in NAMES - {"__version__"} - takes:
        kinds = {p.kind for p in inspect.signature(getattr(midi_llm, name)).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_importing_the_package_pulls_in_nothing_heavy():
    assert imported_by("import midi_llm", HEAVY) == []


def test_importing_the_package_takes_under_50_ms():
    assert import_time("midi_llm") < 0.05


def test_no_module_but_the_tokenizer_imports_what_is_heavy():
    """What needs torch asks for it when it is called; miditok's base class imports it."""
    code = (
        f"from importlib import import_module; [import_module('midi_llm.' + m) for m in {MODULES}]"
    )
    assert imported_by(code, ("torch", "transformers", "miditok", "matplotlib", "vllm")) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    found = import_module(f"midi_llm.{module}")
    assert found.__doc__
    assert len(found.__doc__.splitlines()[0]) > 20


def test_it_is_typed():
    assert (Path(midi_llm.__file__).parent / "py.typed").is_file()
