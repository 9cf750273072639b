"""Examples and the README's Python blocks run as they are, and print what their comments say."""

import re
from pathlib import Path

import pytest

from tenfold_common.testing import promised, python_blocks, script_output
from wavelength_rsa.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text("utf-8")


def test_there_are_examples():
    names = [path.stem for path in EXAMPLES]
    assert names == ["01_rerank_anything", "02_a_model_as_listener", "03_reference_game"]


def test_rerank_anything(tmp_path):
    stated = re.findall(r"^# (alpha .*)$", EXAMPLES[0].read_text("utf-8"), re.MULTILINE)
    assert len(stated) == 3
    assert script_output(EXAMPLES[0], tmp_path) == stated


def test_a_model_as_listener(tmp_path):
    lines = script_output(EXAMPLES[1], tmp_path)
    assert len(lines) == 2
    for line in lines:
        mean, sd, crps = map(float, re.findall(r"[0-9.]+(?=,|$|:| )", line.replace("90: ", "")))
        assert 0 < mean < 100
        assert 0 < sd < 51
        assert 0 < crps < 90


def test_reference_game(tmp_path):
    expected = promised(EXAMPLES[2].read_text("utf-8"))
    assert len(expected) == 2
    assert script_output(EXAMPLES[2], tmp_path) == expected


def test_blocks_of_the_readme(tmp_path):
    """Blocks that name no model run and print what they say; the others compile."""
    blocks = python_blocks(README)
    complete = [block for block in blocks if "Qwen" not in block]
    assert len(complete) == 2
    for number, block in enumerate(blocks):
        compile(block, f"README block {number}", "exec")
    for number, block in enumerate(complete):
        script = tmp_path / f"block{number}.py"
        script.write_text(block, encoding="utf-8")
        expected = promised(block)
        assert expected
        assert script_output(script, tmp_path) == expected


def test_every_command_of_the_readme_is_one():
    """The options in the README's commands exist; nothing is run."""
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    commands = re.findall(r"^(?:\| `)?wavelength-rsa ([\w-]+)([^`\n]*)", README, re.MULTILINE)
    assert {verb for verb, _ in commands} == set(verbs)
    for verb, rest in commands:
        known = set(verbs[verb]._option_string_actions)
        assert set(re.findall(r"--[a-z_]+", rest)) <= known, verb


@pytest.mark.parametrize("word", ["self-play", "not yet", "alpha"])
def test_the_readme_says_what_it_must(word):
    assert word in README.lower()
