"""The command: every verb on a tiny model, and one line with exit code 2 for what is wrong."""

import io
import json
import shutil
from typing import Any

import pytest
import torch

from flashformer.cli import main
from tenfold_common.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = byte_tokenizer()
    tiny_llama(
        len(tokenizer), hidden=64, layers=2, heads=4, kv_heads=2, max_position_embeddings=256
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def call(*arguments, code=0):
    assert main([str(a) for a in arguments]) == code


def said(capsys, *arguments):
    """Return the one line of a refusal."""
    capsys.readouterr()
    call(*arguments, code=2)
    out, err = capsys.readouterr()
    assert not out
    [line] = err.strip().splitlines()
    return line


def test_info(model, tmp_path, capsys):
    call("info", model, "--json", tmp_path / "a.json")
    assert capsys.readouterr().out.startswith("supported\n")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["supported"]
    assert (found["spec"]["hidden"], len(found["spec"]["windows"])) == (64, 2)


def test_info_names_the_reasons_of_a_refusal(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    call("info", tmp_path / "odd", "--json", tmp_path / "a.json", code=1)
    assert "relu" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert not found["supported"]
    assert "relu" in found["reasons"][0]


def test_generate_equals_transformers_and_is_the_same_from_a_compiled_folder(
    model, tmp_path, capsys
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = ("--prompt", "To be", "--max_new_tokens", 12)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    call("generate", model, *asked, "--weights", "fp32", "--json", one)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("To be", return_tensors="pt").input_ids
    made: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.inference_mode():
        expected = made.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert json.loads(one.read_text())["tokens"] == expected.tolist()
    call("quantize", model, "--weights", "fp32", "--out", tmp_path / "compiled")
    capsys.readouterr()
    call("generate", tmp_path / "compiled", *asked, "--json", two)
    assert json.loads(two.read_text()) == json.loads(one.read_text())
    assert json.loads(two.read_text())["text"] in capsys.readouterr().out


def test_a_prompt_may_come_by_a_pipe_and_seeds_fix_samples(model, tmp_path, monkeypatch):
    found = []
    for number, seed in enumerate((3, 3, 4)):
        monkeypatch.setattr("sys.stdin", io.StringIO("To be"))
        file = tmp_path / f"{number}.json"
        call("generate", model, "--sample", "--seed", seed, "--max_new_tokens", 16, "--json", file)
        found.append(json.loads(file.read_text()))
    assert found[0]["prompt"] == "To be"
    assert found[0] == found[1] != found[2]


def test_quantize_replaces_only_if_told(model, tmp_path, capsys):
    out = tmp_path / "out"
    call("quantize", model, "--weights", "int8", "--out", out)
    assert "MB a token" in capsys.readouterr().out
    assert "--overwrite" in said(capsys, "quantize", model, "--out", out)
    call("quantize", model, "--weights", "int4", "--group_size", 32, "--out", out, "--overwrite")
    call("info", model)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    said(capsys, "quantize", model, "--out", other, "--overwrite")
    said(capsys, "quantize", model, "--out", model, "--overwrite")
    assert (other / "mine.txt").exists()
    call("verify", model, "--weights", "fp32", "--n", 4)


def test_verify(model, tmp_path, capsys):
    file = tmp_path / "a.json"
    call("verify", model, "--weights", "fp32", "--n", 16, "--prompt", "To", "--json", file)
    found = json.loads(file.read_text())
    assert (found["tokens"], found["same"], found["first_difference"]) == (16, 16, None)
    assert found["max_error"] < 1e-5
    call("quantize", model, "--out", tmp_path / "compiled")
    line = said(capsys, "verify", tmp_path / "compiled")
    assert "no transformers model to compare with" in line


def test_explain_needs_neither_weights_nor_a_gpu(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*.safetensors"):
        file.unlink()
    call("explain", tmp_path / "bare", "--gpu", "h200", "--json", tmp_path / "a.json")
    assert "4300 GB/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("layers", ["int4", "bf16"])
def test_explain_of_a_compiled_folder_has_its_formats(model, tmp_path, capsys, layers):
    four = ("--weights", layers, "--head", "int4", "--group_size", 32)
    call("quantize", model, *four, "--out", tmp_path / "q4")
    call("explain", tmp_path / "q4", "--json", tmp_path / "a.json")
    call("explain", model, *four, "--json", tmp_path / "b.json")
    call("explain", model, "--json", tmp_path / "c.json")
    one, same, other = (json.loads((tmp_path / f"{x}.json").read_text()) for x in "abc")
    assert one == same != other
    settings = json.loads((tmp_path / "q4/flashformer.json").read_text())
    del settings["head"]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/flashformer.json").write_text(json.dumps(settings))
    assert "it lacks 'head'" in said(capsys, "explain", tmp_path / "broken")
    for option in (("--weights", "bf16"), ("--group_size", 64)):
        assert "compiled already" in said(capsys, "explain", tmp_path / "q4", *option)


def test_bench(model, tmp_path, capsys):
    call("bench", model, "--contexts", 8, "--json", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len({row["impl"] for row in rows}) == 2
    assert all(row["median_ms"] > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out


MISTAKES = {
    "absent": (["info", "absent/model"], "absent/model"),
    "verb": (["generat", "x"], "Did you mean 'generate'?"),
    "option": (["info", "MODEL", "--jsn", "a"], "Did you mean '--json'?"),
    "weights": (["generate", "MODEL", "--prompt", "x", "--weights", "int5"], "invalid choice"),
    "greedy": (["generate", "MODEL", "--prompt", "x", "--top_k", "3"], "is for --sample"),
    "top_p": (["generate", "MODEL", "--prompt", "x", "--sample", "--top_p", "1.5"], "at most 1"),
    "temperature": (
        ["generate", "MODEL", "--prompt", "x", "--sample", "--temperature", "nan"],
        "a finite number above 0",
    ),
    "empty": (["generate", "MODEL", "--prompt", " "], "the prompt is empty"),
    "chat": (["generate", "MODEL", "--prompt", "x", "--chat"], "no chat template"),
    "count": (["generate", "MODEL", "--prompt", "x", "--max_new_tokens", "0"], "whole number"),
    "group": (["generate", "MODEL", "--prompt", "x", "--group_size", "64"], "is for int4"),
    "explain": (["explain", "MODEL", "--group_size", "64"], "is for int4"),
    "long": (["generate", "MODEL", "--prompt", "x" * 300], "max_len"),
    "gpu": (["explain", "MODEL", "--gpu", "h2000"], "h200"),
    "json": (["info", "MODEL", "--json", "none/a.json"], "there is no folder"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_end_in_one_line(what, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, part = MISTAKES[what]
    line = said(capsys, *(model if a == "MODEL" else a for a in arguments))
    assert line.startswith("error: ")
    assert part in line


def test_options_of_compiling_are_refused_for_a_compiled_folder(model, tmp_path, capsys):
    call("quantize", model, "--out", tmp_path / "out")
    for options in (["--weights", "int8"], ["--max_len", "64"], ["--asymmetric"]):
        line = said(capsys, "generate", tmp_path / "out", "--prompt", "x", *options)
        assert "compiled already" in line
