"""Examples and the README's Python blocks run as they are, and print what their comments say."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rlcr.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output_of(script, folder, timeout=300):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def promised(source):
    """Return what the comments behind the prints of a script say they print."""
    return [
        re.split(r": [a-zA-Z]", comment)[0].strip()
        for comment in re.findall(r"^print\(.*\)  # (.+)$", source, re.MULTILINE)
    ]


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_there_are_examples():
    names = [path.stem for path in EXAMPLES]
    assert names == ["01_reward_in_stock_trl", "02_measure_confidences", "03_votes"]


def test_promises_are_found():
    text = 'print(1)\nprint("a")  # a\nprint(f(x))  # [2.99]: format 1, answer 1\n'
    assert promised(text) == ["a", "[2.99]"]


def test_reward_in_stock_trl(tmp_path):
    script = EXAMPLES[0]
    out = output_of(script, tmp_path)
    expected = promised(script.read_text("utf-8"))
    assert expected == ["Brier() margin 0.00", "True"]
    lines = out.splitlines()
    assert lines[0] == expected[0]
    assert lines[-1] == expected[1]


def test_measure_confidences(tmp_path):
    out = output_of(EXAMPLES[1], tmp_path)
    assert re.search(r"^examples +2000$", out, re.MULTILINE)
    before, after = map(float, re.findall(r"[0-9]\.[0-9]{3}", out.splitlines()[-1]))
    assert out.splitlines()[-1] == f"ECE {before:.3f} before, {after:.3f} after"
    # 0.5 + 0.6 t, cut at 1, against t of beta(2, 1): E[q - t] is 0.213 (worked by hand below).
    # For t < 5/6 the gap is 0.5 - 0.4 t, above it 1 - t; the density is 2 t.
    a = 5 / 6
    gap = 0.5 * a**2 - 0.8 / 3 * a**3 + (1 - a**2) - 2 / 3 * (1 - a**3)
    assert before == pytest.approx(gap, abs=0.03)
    assert after < before / 3


def test_votes(tmp_path):
    script = EXAMPLES[2]
    out = output_of(script, tmp_path)
    stated = re.findall(r"^# ((?:majority|max|weighted) .*)$", script.read_text("utf-8"), re.M)
    assert len(stated) == 3
    assert [line.rstrip() for line in out.splitlines()] == stated


def test_complete_blocks_of_the_readme(tmp_path):
    """Blocks that name no model of seven billion parameters run and print what they say."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = python_blocks(text)
    assert len(blocks) == 3
    complete = [block for block in blocks if "Qwen" not in block]
    assert len(complete) == 2
    for number, block in enumerate(complete):
        script = tmp_path / f"block{number}.py"
        script.write_text(block, encoding="utf-8")
        lines = output_of(script, tmp_path).splitlines()
        expected = promised(block)
        assert expected
        for line, said in zip(lines, expected, strict=True):
            assert as_number(line) == pytest.approx(as_number(said), abs=1e-6)


def as_number(text):
    return float(text.strip("[]"))


def test_the_other_block_s_settings_are_accepted(tmp_path):
    """The preset and its change are taken; neither vLLM nor the model is asked for here."""
    from rlcr import RLCRConfig

    (block,) = [b for b in python_blocks((ROOT / "README.md").read_text("utf-8")) if "Qwen" in b]
    compile(block, "README", "exec")
    preset = re.search(r'RLCRConfig\.preset\("(\w+)", "[\w/]+", use_vllm=True\)', block)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine without a GPU
        found = RLCRConfig.preset(preset, str(tmp_path), use_vllm=True, use_cpu=True, bf16=False)
    assert (found.use_vllm, found.num_generations, found.loss_type) == (True, 32, "bnpo")


def test_every_command_of_the_readme_is_one():
    """The options in the table of commands exist; nothing is run."""
    text = (ROOT / "README.md").read_text("utf-8")
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    commands = re.findall(r"`rlcr (\w+)([^`]*)`", text)
    assert {verb for verb, _ in commands} == set(verbs)
    for verb, rest in commands:
        known = set(verbs[verb]._option_string_actions)
        assert set(re.findall(r"--[a-z_]+", rest)) <= known
    described = re.findall(r"^\| `rlcr (\w+)[^|]*\| (.*) \|$", text, re.MULTILINE)
    assert {verb for verb, _ in described} == set(verbs)
    for verb, what in described:
        known = {*verbs[verb]._option_string_actions}
        assert set(re.findall(r"`(--[a-z_]+)", what)) <= known, verb
