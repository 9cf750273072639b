"""The command `path-attn`: every verb, exit codes, and one clear line for every wrong input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from path_attn import evaluate
from path_attn.cli import main
from tenfold_common.tiny import byte_tokenizer, tiny_llama

SMALL = [
    "--length=16", "--hidden_size=16", "--num_attention_heads=2", "--batch_size=4", "--max_steps=4",
    "--logging_steps=2", "--save_steps=4", "--num_hidden_layers=1", "--device=cpu",
]  # fmt: skip
TEXT = "the quick brown fox jumps over the lazy dog; " * 60


@pytest.fixture(autouse=True)
def _small_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_SET", 1024)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A finished run on text, in a folder with a space and an umlaut."""
    folder = tmp_path_factory.mktemp("mit Umläuten und Leerzeichen")
    data = folder / "ein Täxt.txt"
    data.write_text(TEXT, encoding="utf-8")
    code = main(
        ["-q", "train", "--task=text", f"--data={data}", f"--output_dir={folder / 'run'}", *SMALL]
    )
    assert code == 0
    return folder / "run"


def refused(capsys, *arguments):
    """Run a command that must be refused, and return its one line."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = captured.err.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[-1].removeprefix("error: ")


def in_process(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "path_attn", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


class TestHelp:
    def test_help_costs_little_and_imports_nothing_heavy(self):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = (
            "import sys; from path_attn.cli import main; code = main(['train', '--help']); "
            "assert not {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules); "
            "sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "--position_encoding" in done.stdout
        assert (
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
        )  # seconds of CPU time

    @pytest.mark.parametrize("verb", ["train", "eval", "generate", "convert", "check", "demo"])
    def test_every_verb_explains_itself(self, verb, capsys):
        assert main([verb, "--help"]) == 0
        assert f"usage: path-attn {verb}" in capsys.readouterr().out

    def test_no_verb_prints_help(self, capsys):
        assert main([]) == 2
        assert "VERB" in capsys.readouterr().out

    def test_version(self, capsys):
        from path_attn import __version__

        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"path-attn {__version__}\n"

    def test_reader_that_stops_after_one_line(self):
        command = f"set -o pipefail; {sys.executable} -m path_attn train --help | head -n 1"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.startswith("usage: path-attn train")
        assert done.stdout.count("\n") == 1
        assert done.stderr == ""


class TestVerbs:
    def test_train_wrote_a_folder_for_the_others(self, text_run):
        assert (text_run / "final" / "model.safetensors").is_file()

    def test_eval_at_lengths(self, text_run, capsys, tmp_path):
        target = tmp_path / "e.json"
        assert (
            main(["-q", "eval", str(text_run), "--lengths", "1", "2x", "80", "--json", str(target)])
            == 0
        )
        rows = json.loads(target.read_text())["rows"]
        assert [row["length"] for row in rows] == [16, 32, 80]
        table = capsys.readouterr().out.splitlines()
        assert len(table) == 5
        assert table[-1].startswith("| 80 | 5 | ")

    def test_eval_on_another_text(self, text_run, capsys, tmp_path):
        (tmp_path / "t").write_text("zzz qqq " * 200)
        assert (
            main(
                [
                    "-q",
                    "eval",
                    str(text_run / "final"),
                    "--data",
                    str(tmp_path / "t"),
                    "--lengths=1",
                ]
            )
            == 0
        )
        assert float(capsys.readouterr().out.splitlines()[-1].split("|")[3]) > 2

    def test_generate(self, text_run, capsys):
        command = ["-q", "generate", str(text_run), "--prompt", "the qu", "--max_new_tokens=8"]
        assert main([*command, "--seed=1"]) == 0
        first = capsys.readouterr().out
        assert first.startswith("the qu")
        assert main([*command, "--seed=1"]) == 0
        assert capsys.readouterr().out == first
        assert main([*command, "--temperature=0"]) == 0
        assert main([*command, "--num_beams=2"]) == 0

    def test_generate_from_a_prompt_file(self, text_run, capsys, tmp_path):
        (tmp_path / "p").write_text("the quick")
        assert (
            main(
                [
                    "-q",
                    "generate",
                    str(text_run),
                    "--prompt_file",
                    str(tmp_path / "p"),
                    "--max_new_tokens=2",
                ]
            )
            == 0
        )
        assert capsys.readouterr().out.startswith("the quick")

    def test_train_several_from_a_config_file(self, tmp_path, capsys):
        (tmp_path / "c.json").write_text(
            json.dumps({"task": "a5", "group": "s3", "position_encoding": ["path"]})
        )
        command = [
            "-q",
            "train",
            "--config",
            str(tmp_path / "c.json"),
            "--output_dir",
            str(tmp_path / "o"),
        ]
        assert main([*command, *SMALL, "--length=4", "--position_encoding", "path,fox"]) == 0
        out = capsys.readouterr().out
        assert "| path | " in out
        assert "| fox | " in out
        assert (
            json.loads((tmp_path / "o" / "comparison.json").read_text())["config"]["group"] == "s3"
        )
        shutil.rmtree(tmp_path / "o" / "fox")  # as if killed before the second
        (tmp_path / "o" / "comparison.json").unlink()
        before = (tmp_path / "o" / "path" / "final" / "COMPLETE").stat().st_mtime_ns
        assert main(["-q", "train", "--resume", "--output_dir", str(tmp_path / "o")]) == 0
        assert (tmp_path / "o" / "path" / "final" / "COMPLETE").stat().st_mtime_ns == before
        comparison = json.loads((tmp_path / "o" / "comparison.json").read_text())
        assert list(comparison["results"]) == ["path", "fox"]
        capsys.readouterr()
        line = refused(capsys, "-q", "eval", tmp_path / "o")
        assert f"several models; give one of {tmp_path}/o/fox, {tmp_path}/o/path." in line

    def test_flags_win_over_the_config_file(self, tmp_path):
        (tmp_path / "c.json").write_text(
            json.dumps({"task": "a5", "group": "a4", "seed": 3, "max_steps": 7, "length": 4})
        )
        command = ["-q", "train", f"--config={tmp_path / 'c.json'}", "--output_dir"]
        small = [a for a in SMALL if not a.startswith("--length")]
        assert main([*command, str(tmp_path / "o"), *small, "--group=s3"]) == 0
        stored = json.loads((tmp_path / "o" / "train_config.json").read_text())
        assert (stored["group"], stored["max_steps"]) == ("s3", 4)  # both given twice
        assert (stored["seed"], stored["length"]) == (3, 4)  # in the file alone

    def test_flags_win_over_what_a_resumed_run_stored(self, text_run, tmp_path, capsys):
        copy = shutil.copytree(text_run, tmp_path / "copy")
        command = ["-q", "train", "--resume", f"--output_dir={copy}"]
        assert main([*command, "--save_total_limit=5"]) == 0
        assert json.loads((copy / "train_config.json").read_text())["save_total_limit"] == 5
        capsys.readouterr()
        assert "was started with seed 0, not 1" in refused(capsys, *command, "--seed=1")
        (tmp_path / "c.json").write_text('{"max_steps": 9}')
        line = refused(capsys, *command, f"--config={tmp_path / 'c.json'}")
        assert "was started with max_steps 4, not 9" in line

    def test_resume_needs_no_other_option(self, text_run, tmp_path, capsys):
        copy = shutil.copytree(text_run, tmp_path / "copy")
        shutil.rmtree(copy / "final")
        assert main(["-q", "train", "--resume", "--output_dir", str(copy)]) == 0
        assert (copy / "final" / "COMPLETE").is_file()

    def test_convert_a_rope_model(self, tmp_path, capsys):
        tokenizer = byte_tokenizer()
        tiny_llama(len(tokenizer), hidden=16, layers=1, heads=2, kv_heads=1).save_pretrained(
            tmp_path / "llama"
        )
        tokenizer.save_pretrained(tmp_path / "llama")
        (tmp_path / "t").write_text(TEXT)
        command = [
            "-q",
            "convert",
            str(tmp_path / "llama"),
            "--output_dir",
            str(tmp_path / "o"),
            "--device=cpu",
        ]
        steps = ["--stage1_steps=2", "--stage2_steps=2", "--batch_size=2", "--length=16"]
        assert main([*command, "--data", str(tmp_path / "t"), *steps]) == 0
        assert "validation loss, student after: " in capsys.readouterr().out
        assert (
            main(["-q", "generate", str(tmp_path / "o"), "--prompt=a", "--max_new_tokens=3"]) == 0
        )
        capsys.readouterr()
        assert "must be distilled: give --data FILE" in refused(capsys, *command)
        assert "is not empty" in refused(capsys, *command, "--stage1_steps=0", "--stage2_steps=0")

    def test_check_agrees_on_this_machine(self, capsys, tmp_path):
        assert main(["check", "--device=cpu", "--json", str(tmp_path / "c.json")]) == 0
        rows = json.loads((tmp_path / "c.json").read_text())
        assert {row["backend"] for row in rows} == {"reference", "torch", "triton"}
        assert "all back-ends that run here agree" in capsys.readouterr().out

    def test_check_notices_a_wrong_backend(self, capsys, monkeypatch):
        """The comparison is not idle: a 0.1 % error in the output fails it."""
        from path_attn import check

        right = check.path_attention

        def wrong(*args, **named):
            out, cache = right(*args, **named)
            return (out * 1.001 if named["backend"] == "torch" else out), cache

        monkeypatch.setattr(check, "path_attention", wrong)
        assert main(["check", "--device=cpu"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert all(line.split()[0] == "torch" for line in lines if "DISAGREES" in line)
        assert "disagree" in lines[-1]


class TestRefused:
    def test_missing_file(self, capsys, tmp_path):
        line = refused(
            capsys,
            "train",
            "--task=text",
            "--data",
            tmp_path / "no",
            "--output_dir",
            tmp_path / "o",
        )
        assert "no: No such file or directory" in line
        assert not (tmp_path / "o").exists()

    def test_directory_instead_of_a_file(self, capsys, tmp_path):
        assert "is a directory" in refused(
            capsys, "train", "--task=text", "--data", tmp_path, "--output_dir=o"
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"\x80\x00\xff" * 50, "is not UTF-8 text: byte 0x80 at position 0"),
            (b"tiny", "fewer than"),
        ],
        ids=["empty", "binary", "short"],
    )
    def test_file_that_does_not_do(self, capsys, tmp_path, content, message):
        (tmp_path / "f").write_bytes(content)
        line = refused(
            capsys,
            "-q",
            "train",
            "--task=text",
            "--data",
            tmp_path / "f",
            "--output_dir",
            tmp_path / "o",
            *SMALL,
        )
        assert message in line
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["trian"], "Did you mean 'train'?"),
            (["train", "--max_step=3"], "Did you mean '--max_steps'?"),
            (["train", "--task=fflmm"], "Did you mean 'fflm'?"),
            (["train", "--position_encoding", "pahth", "--output_dir=o"], "Did you mean 'path'?"),
            (
                ["train", "--max_steps=-5", "--output_dir=o"],
                "max_steps is -5; it must be at least 1.",
            ),
            (["train", "--length=0", "--output_dir=o"], "length is 0"),
            (["train", "--max_steps=many"], "invalid int value: 'many'"),
            (["train", "--task=fflm"], "--output_dir"),
            (["train", "--task=text", "--output_dir=o"], "--data FILE"),
            (["train", "--training_args", "fsdp", "--output_dir=o"], "KEY=VALUE"),
            (
                ["train", "--output_dir=o", "--training_args", "adam_betal=1"],
                "Did you mean 'adam_beta",
            ),
            (
                ["train", "--config=nothing.json", "--output_dir=o"],
                "cannot read the configuration nothing.json",
            ),
            (["train", "--resume", "--output_dir=nothing"], "nothing to resume in nothing"),
            (["train", "--device=cud", "--output_dir=o"], "unknown device 'cud'"),
            (["eval", "nothing"], "nothing is not there"),
            (["generate", "nothing", "--prompt=a"], "nothing is not there"),
            (["generate", "nothing"], "--prompt"),
            (["generate", "x", "--prompt=a", "--max_new_tokens=0"], "max_new_tokens is 0"),
            (["generate", "x", "--prompt=a", "--temperature=-1"], "temperature is -1.0"),
            (["generate", "x", "--prompt=a", "--temperature=1e-45"], "temperature is 1e-45; it"),
            (["generate", "x", "--prompt=a", "--temperature=nan"], "nan; it must be 0 (the most"),
            (["generate", "x", "--prompt=a", "--top_p=0"], "top_p is 0.0"),
            (["eval", "x", "--json=no/e.json"], "cannot write no/e.json: there is no folder no."),
            (["check", "--json=no/c.json"], "cannot write no/c.json: there is no folder no."),
            (["check", "--json=x"], "cannot write x: it is a directory."),
            (
                ["convert", "nothing", "--output_dir=o"],
                "nothing is neither a folder nor a model the hub gives",
            ),
            (["check", "--device=gpu"], "unknown device 'gpu'"),
            (["check", "--seed=-1"], "seed is -1"),
            (["demo", "--seed=-1"], "seed is -1"),
            (["demo", "--out=setup.cfg/x"], "setup.cfg"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_wrong_options(self, capsys, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "setup.cfg").write_text("a file")
        (tmp_path / "x").mkdir()
        assert message in refused(capsys, *arguments)
        assert not (tmp_path / "o").exists()

    def test_output_folder_in_use(self, capsys, text_run):
        line = refused(capsys, "-q", "train", "--task=fflm", "--output_dir", text_run, *SMALL)
        assert "is not empty" in line
        assert "--overwrite" in line

    def test_output_folder_that_cannot_be_made(self, capsys, tmp_path):
        (tmp_path / "f").write_text("a file")
        assert "f" in refused(
            capsys, "-q", "train", "--task=fflm", "--output_dir", tmp_path / "f" / "o", *SMALL
        )
        assert "is a file" in refused(
            capsys, "-q", "train", "--task=fflm", "--output_dir", tmp_path / "f", *SMALL
        )

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_output_folder(self, capsys, tmp_path):
        (tmp_path / "ro").mkdir(mode=0o555)
        assert "Permission denied" in refused(
            capsys, "-q", "train", "--output_dir", tmp_path / "ro" / "o", *SMALL
        )

    def test_folder_that_is_no_model(self, capsys, tmp_path):
        assert "has no config.json" in refused(capsys, "-q", "eval", tmp_path)
        (tmp_path / "config.json").write_text("{}")
        assert "does not load" in refused(capsys, "-q", "generate", tmp_path, "--prompt=a")

    def test_truncated_model(self, capsys, text_run, tmp_path):
        copy = shutil.copytree(text_run / "final", tmp_path / "copy")
        (copy / "model.safetensors").write_bytes(b"x" * 10)
        assert "model.safetensors' has 10 bytes instead of" in refused(capsys, "-q", "eval", copy)

    def test_output_file_is_checked_before_the_work(self, capsys, text_run, monkeypatch):
        from path_attn import training

        monkeypatch.setattr(training, "load_run", None)  # a model that is loaded would be a bug
        line = refused(capsys, "-q", "eval", text_run, "--json", text_run / "no" / "e.json")
        assert "there is no folder" in line

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_output_file_in_a_read_only_folder(self, capsys, tmp_path):
        (tmp_path / "ro").mkdir(mode=0o555)
        assert "is not writable" in refused(capsys, "check", "--json", tmp_path / "ro" / "c.json")

    @pytest.mark.parametrize("length", ["0", "-1", "nan", "0x", "one", "1e400x", "0.001x"])
    def test_lengths(self, capsys, text_run, length):
        assert f"length '{length}'" in refused(
            capsys, "-q", "eval", text_run, f"--lengths={length}"
        )

    def test_length_beyond_the_text(self, capsys, text_run):
        assert "fewer than one chunk of 5000" in refused(
            capsys, "-q", "eval", text_run, "--lengths", "1", "5000"
        )

    def test_prompts(self, capsys, text_run, tmp_path):
        assert "the prompt is empty" in refused(capsys, "-q", "generate", text_run, "--prompt=")
        assert main(["-q", "train", "--task=fflm", f"--output_dir={tmp_path / 'o'}", *SMALL]) == 0
        capsys.readouterr()
        line = refused(capsys, "-q", "generate", tmp_path / "o", "--prompt=w 1 hello")
        assert "words the tokenizer does not know" in line
        line = refused(capsys, "-q", "eval", tmp_path / "o", f"--data={Path(__file__)}")
        assert "makes its own data" in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_run_that_resumes(tmp_path, number, code):
    """A signal after a logged step: 128 + its number, a complete checkpoint, --resume ends it."""
    out = tmp_path / "run"
    small = [a for a in SMALL if not a.startswith(("--max_steps", "--save_steps"))]
    child = in_process(
        "train", "--task=fflm", f"--output_dir={out}", *small, "--max_steps=150", "--save_steps=50"
    )
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(number)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == code, errors
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < 150
    assert (checkpoint / "COMPLETE").is_file()
    if number == signal.SIGTERM:
        return  # the rest is the same for both
    assert main(["-q", "train", "--resume", f"--output_dir={out}"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 151, 2))
