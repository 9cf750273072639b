"""Examples and the README's Python blocks run as they are, and print what their comments say."""

import re
from pathlib import Path

import pytest

from midi_llm.cli import _parser
from tenfold_common.testing import promised, python_blocks, script_output

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text("utf-8")


def test_there_are_examples():
    assert [path.stem for path in EXAMPLES] == ["01_tokens_and_files", "02_your_own_decoding"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_print_what_they_promise(example, tmp_path):
    expected = promised(example.read_text("utf-8"))
    assert expected
    assert script_output(example, tmp_path) == expected


def test_blocks_of_the_readme(tmp_path):
    """The block that names no model runs and prints what it says; the other compiles."""
    complete, other = python_blocks(README)
    compile(other, "README", "exec")
    script = tmp_path / "block.py"
    script.write_text(complete, encoding="utf-8")
    assert script_output(script, tmp_path) == promised(complete)


def test_every_command_of_the_readme_is_one():
    """The options in the README's commands exist; nothing is run."""
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    commands = re.findall(r"^(?:\| `)?midi-llm ([\w-]+)([^`\n]*)", README, re.MULTILINE)
    assert {verb for verb, _ in commands} == set(verbs)
    for verb, rest in commands:
        known = set(verbs[verb]._option_string_actions)
        assert set(re.findall(r"--[a-z0-9_]+", rest)) <= known, verb
