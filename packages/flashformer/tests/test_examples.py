"""Examples and the README's Python blocks run as they are, and print what their comments say."""

import re
from pathlib import Path

import pytest

from flashformer.cli import _parser
from tenfold_common.testing import promised, python_blocks, script_output

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text("utf-8")


def test_there_are_examples():
    names = [path.stem for path in EXAMPLES]
    assert names == ["01_compile", "02_your_own_loop", "03_save_and_continue"]


def test_compile(tmp_path):
    lines = script_output(EXAMPLES[0], tmp_path)
    assert lines[0] == "True"
    assert [line.split()[0] for line in lines[1:4]] == ["bf16", "int8", "int4"]
    assert "4300 GB/s" in lines[-1]


@pytest.mark.parametrize("number", [1, 2])
def test_they_print_what_they_say(tmp_path, number):
    expected = promised(EXAMPLES[number].read_text("utf-8"))
    assert expected
    assert script_output(EXAMPLES[number], tmp_path) == expected


def test_blocks_of_the_readme(tmp_path):
    """Blocks that name no model run and print what they say; the others compile."""
    blocks = python_blocks(README)
    complete = [block for block in blocks if "Qwen" not in block]
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        compile(block, f"README block {number}", "exec")
    (block,) = complete
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    chosen, last = script_output(script, tmp_path)
    assert len(chosen.split(",")) == 4
    assert last == "3 True"


def test_every_command_of_the_readme_is_one():
    """The options in the README's commands exist; nothing is run."""
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    commands = re.findall(r"^(?:\| `)?flashformer ([\w-]+)([^`\n]*)", README, re.MULTILINE)
    assert {verb for verb, _ in commands} == set(verbs)
    for verb, rest in commands:
        known = set(verbs[verb]._option_string_actions)
        assert set(re.findall(r"--[a-z_]+", rest)) <= known, verb


def test_the_readme_says_what_it_must():
    assert "not yet measured on a GPU" in README
