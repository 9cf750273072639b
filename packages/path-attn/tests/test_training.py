"""Training: it learns, repeats exactly, resumes exactly, and splits over processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from path_attn import evaluate
from path_attn.config import TrainConfig, read_config_file
from path_attn.configuration_path_attn import count_parameters
from path_attn.tasks import task_tokenizer
from path_attn.training import (
    build_model,
    load_run,
    model_config,
    train,
    train_each,
    training_arguments,
)
from tenfold_common.atomic import locked_folder
from tenfold_common.errors import CheckpointError, UserError
from tenfold_common.trainer import StopOnSignal, Stopped

TINY = {
    "task": "fflm",
    "length": 16,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "batch_size": 4,
    "max_steps": 12,
    "logging_steps": 1,
    "save_steps": 4,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _small_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_SET", 1024)


def run(folder, **changes):
    return train(TrainConfig(**{**TINY, "output_dir": str(folder), **changes}))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps without interruption."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "TOKENS_PER_SET", 1024)
        run(folder)
    return folder


class TestOneRun:
    def test_loss_falls(self, tmp_path):
        run(tmp_path / "r", max_steps=60, logging_steps=10, save_steps=60)
        curve = losses(tmp_path / "r")
        assert curve[60] < 0.6 * curve[10]

    def test_files_of_a_finished_run(self, finished):
        assert {p.name for p in finished.iterdir()} == {
            "train_config.json", "metrics.jsonl", "checkpoint-8", "checkpoint-12", "final",
        }  # fmt: skip
        assert not list(finished.rglob("training_args.bin"))
        report = json.loads((finished / "final" / "evaluation.json").read_text())
        assert [(r["set"], r["length"]) for r in report["rows"]] == [
            ("in distribution", 16), ("sparse", 16), ("dense", 16),
            ("in distribution", 32), ("in distribution", 64),
        ]  # fmt: skip
        assert report["training"]["steps"] == 12

    def test_final_folder_generates_with_auto_classes(self, finished):
        model = AutoModelForCausalLM.from_pretrained(finished / "final")
        tokenizer = AutoTokenizer.from_pretrained(finished / "final")
        ids = tokenizer("w 1 i 0 r", return_tensors="pt")["input_ids"]
        assert ids.shape == (1, 5)
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > 5

    def test_same_seed_is_bit_equal_and_another_is_not(self, finished, tmp_path):
        run(tmp_path / "same")
        assert losses(tmp_path / "same") == losses(finished)
        one = load_run(finished, "cpu")[0].state_dict()
        other = load_run(tmp_path / "same", "cpu")[0].state_dict()
        assert all(torch.equal(one[k], other[k]) for k in one)
        run(tmp_path / "other", seed=1, max_steps=4)
        assert losses(tmp_path / "other")[1] != losses(finished)[1]

    def test_accumulated_batches_equal_one_batch(self, finished, tmp_path):
        run(tmp_path / "r", batch_size=1, training_args={"gradient_accumulation_steps": 4})
        assert losses(tmp_path / "r") == pytest.approx(losses(finished), abs=2e-5)


class TestResume:
    def test_interrupted_by_a_signal_and_resumed(self, finished, tmp_path, monkeypatch):
        """SIGTERM at step 6: stops with a checkpoint; resumed losses equal uninterrupted ones."""

        def interrupt(self, args, state, control, **more):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(StopOnSignal, "on_step_begin", interrupt)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "r")
        assert signal.getsignal(signal.SIGTERM) is before
        assert (tmp_path / "r" / "checkpoint-7" / "COMPLETE").is_file()
        assert not (tmp_path / "r" / "final").exists()
        monkeypatch.undo()
        monkeypatch.setattr(evaluate, "TOKENS_PER_SET", 1024)
        run(tmp_path / "r", resume=True)
        assert losses(tmp_path / "r") == losses(finished)

    def test_resume_of_a_finished_run_changes_nothing(self, finished):
        before = (finished / "final" / "COMPLETE").stat().st_mtime_ns
        assert run(finished, resume=True) == finished / "final"
        assert (finished / "final" / "COMPLETE").stat().st_mtime_ns == before

    def test_stops_at_a_logged_step(self, tmp_path, monkeypatch):
        """SIGTERM in step 5 of a run that logs every second: it stops after 6, not after 5."""

        def interrupt(self, args, state, control, **more):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        options = {"logging_steps": 2, "max_steps": 8}
        run(tmp_path / "whole", **options)
        with monkeypatch.context() as patch:
            patch.setattr(StopOnSignal, "on_step_begin", interrupt)
            with pytest.raises(Stopped) as stopped:
                run(tmp_path / "r", **options)
        assert stopped.value.number == signal.SIGTERM
        assert {p.name for p in (tmp_path / "r").glob("checkpoint-*")} == {
            "checkpoint-4", "checkpoint-6",
        }  # fmt: skip
        run(tmp_path / "r", **options, resume=True)
        assert losses(tmp_path / "r") == losses(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("name", "before", "now"), [("learning_rate", 0.003, 0.1), ("seed", 0, 1)]
    )
    def test_resume_refuses_other_settings(self, finished, name, before, now):
        with pytest.raises(UserError, match=rf"was started with {name} {before}, not {now}"):
            run(finished, resume=True, **{name: now})

    def test_resume_of_nothing(self, tmp_path):
        with pytest.raises(UserError, match="holds no run to resume"):
            run(tmp_path / "r", resume=True)

    def test_output_folder_that_holds_something(self, finished):
        with pytest.raises(UserError, match=r"not empty .*--resume.*--overwrite"):
            run(finished)


class TestFolder:
    def test_second_run_on_a_folder_is_refused_and_harms_nothing(self, finished, tmp_path):
        """What holds the folder is another process; it lets go when it is killed."""
        code = (
            "import sys, time; from tenfold_common.atomic import locked_folder\n"
            "with locked_folder(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
        )
        for folder in (tmp_path, finished):
            command = [sys.executable, "-c", code, str(folder)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
                try:
                    assert holder.stdout.readline() == b"held\n"
                    with pytest.raises(UserError, match="another run is writing to"):
                        run(folder, resume=folder == finished, overwrite=folder != finished)
                finally:
                    holder.kill()
        assert list(tmp_path.iterdir()) == []
        assert run(finished, resume=True) == finished / "final"

    def test_run_holds_its_folder_while_it_trains(self, tmp_path, monkeypatch):
        refused = []

        def second(self, args, state, control, **more):
            with (
                pytest.raises(UserError, match="another run is writing") as error,
                locked_folder(tmp_path / "r"),
            ):
                pass
            refused.append(error)

        monkeypatch.setattr(StopOnSignal, "on_step_begin", second)
        run(tmp_path / "r", max_steps=2)
        assert len(refused) == 2
        with locked_folder(tmp_path / "r"):  # let go of at the end
            pass

    def test_comparison_holds_its_folder(self, tmp_path):
        config = TrainConfig(**{**TINY, "output_dir": str(tmp_path), "overwrite": True})
        with locked_folder(tmp_path), pytest.raises(UserError, match="another run is writing"):
            train_each(config, ["path", "rope"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"position_encoding": "rope", "hidden_size": 18}, "head_dim 9 is odd"),
            ({"backend": "triton"}, "backend 'triton' does not fit"),
        ],
        ids=["odd", "backend"],
    )
    def test_model_that_does_not_fit_leaves_no_folder(
        self, tmp_path, changes, message, monkeypatch
    ):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(UserError, match=message):
            run(tmp_path / "r", **changes)
        config = TrainConfig(**{**TINY, "output_dir": str(tmp_path / "c"), **changes})
        with pytest.raises(UserError, match=message):
            train_each(config, ["path", "rope"])
        assert list(tmp_path.iterdir()) == []


class TestEqualParameters:
    @pytest.mark.parametrize("name", ["path_fox", "rope", "fox", "nope"])
    @pytest.mark.parametrize("task", ["fflm", "mqrar"])
    def test_within_a_percent_of_path(self, name, task):
        config = TrainConfig(task=task).resolved()
        tokenizer = task_tokenizer(config)
        path = count_parameters(model_config(config, tokenizer))
        other = build_model(dataclasses.replace(config, position_encoding=name), tokenizer)
        assert sum(p.numel() for p in other.parameters()) == pytest.approx(path, rel=0.01)

    def test_comparison_of_several(self, tmp_path):
        config = TrainConfig(**{**TINY, "output_dir": str(tmp_path / "c"), "max_steps": 4})
        comparison = json.loads(train_each(config, ["path", "rope"]).read_text())
        assert list(comparison["results"]) == ["path", "rope"]
        table = (tmp_path / "c" / "comparison.md").read_text()
        assert table.count("\n| path | ") == table.count("\n| rope | ") == 1
        assert (tmp_path / "c" / "comparison.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(UserError, match=r"several models; give one of .*c/path, .*c/rope"):
            load_run(tmp_path / "c")
        with pytest.raises(UserError, match=r"comparison of path rope; .*--output_dir .*c/path"):
            run(tmp_path / "c", max_steps=4, resume=True)
        with pytest.raises(UserError, match="names one twice"):
            train_each(config, ["path", "path"])


def test_two_processes_equal_one(tmp_path):
    """torchrun with two gloo processes against one process with the same global batch."""
    options = [f"--{k}={v}" for k, v in TINY.items() if k != "batch_size"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "path_attn", "train", *options, "--batch_size=2", f"--output_dir={tmp_path / 'two'}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert len(losses(tmp_path / "two")) == 12
    two, one = (load_run(tmp_path / n, "cpu")[0].state_dict() for n in ("two", "one"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0)


@pytest.mark.realdata
def test_plays_train_and_generate(data_folder, tmp_path):
    """The main job on a real text: four encodings, loss by position, a continuation."""
    config = TrainConfig(
        task="text",
        data=str(data_folder / "shakespeare" / "input.txt"),
        output_dir=str(tmp_path / "plays"),
        length=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_steps=120,
        save_steps=120,
        learning_rate=6e-3,
        device="cpu",
    )
    names = ["path", "rope", "fox", "path_fox"]
    comparison = json.loads(train_each(config, names).read_text())
    assert comparison["config"]["data"] == "input.txt"
    parameters = [r["training"]["parameters"] for r in comparison["results"].values()]
    assert max(parameters) < 1.01 * min(parameters)
    for report in comparison["results"].values():
        assert [row["length"] for row in report["rows"]] == [64, 128, 256]
        assert report["rows"][0]["loss"] < 3.1  # 3.3: byte frequencies alone
    model, tokenizer, _ = load_run(tmp_path / "plays" / "path", "cpu")
    text = evaluate.continue_text(model, tokenizer, "ROMEO:", max_new_tokens=20)
    assert text.startswith("ROMEO:")
    assert len(text) > 10


class TestOptions:
    def test_training_args_pass_through(self, tmp_path):
        config = TrainConfig(**TINY, output_dir=str(tmp_path), training_args={"adam_beta2": 0.95})
        assert training_arguments(config.resolved()).adam_beta2 == 0.95

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"adam_beta": 0.9}, r"unknown name 'adam_beta'\. Did you mean 'adam_beta[12]'\?"),
            ({"max_steps": 3}, "use the option max_steps instead"),
            ({"optim": "adamm"}, "do not fit"),
            ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0; it must be"),
            ({"gradient_accumulation_steps": "2x"}, "gradient_accumulation_steps '2x'; it must"),
        ],
        ids=["unknown", "own", "value", "zero", "text"],
    )
    def test_training_args_that_do_not_fit(self, tmp_path, given, message):
        config = TrainConfig(**TINY, output_dir=str(tmp_path), training_args=given)
        with pytest.raises(UserError, match=message):
            training_arguments(config.resolved())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task": "flfm"}, "Did you mean 'fflm'"),
            ({"position_encoding": "ropee"}, "Did you mean 'rope'"),
            ({"length": 0}, "length is 0; it must be at least 1"),
            ({"length": 7}, "even length"),
            ({"batch_size": -1}, "batch_size is -1"),
            ({"max_steps": 0}, "max_steps is 0"),
            ({"learning_rate": 0.0}, "learning_rate is 0.0"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"ignore_probability": -0.1}, "between 0 and 1"),
            ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
            ({"seed": -1}, "must not be negative"),
            ({"save_steps": 5, "logging_steps": 2}, "must be a multiple of logging_steps"),
            ({"save_total_limit": 1}, "at least 2"),
            ({"hidden_size": 30, "num_attention_heads": 4}, "multiple of num_attention_heads"),
            (
                {"num_attention_heads": 4, "num_key_value_heads": 3},
                "multiple of num_key_value_heads",
            ),
            ({"task": "text"}, "needs a text file"),
            ({"data": "x"}, "makes its own data"),
            ({"resume": True, "overwrite": True}, "exclude each other"),
        ],
        ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
    )
    def test_values_that_do_not_fit(self, changes, message):
        with pytest.raises(UserError, match=message):
            TrainConfig(**{**TINY, **changes}).resolved()

    def test_config_file(self, tmp_path):
        (tmp_path / "c.yaml").write_text("task: a5\nlearning_rate: 1e-3\nmax_steps: 7\n")
        values = read_config_file(tmp_path / "c.yaml")
        config = TrainConfig.from_dict(values, source="c.yaml")
        assert (config.task, config.learning_rate, config.max_steps) == ("a5", 1e-3, 7)
        assert TrainConfig.from_dict(config.to_dict()) == config

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("c.json", "{", "not valid json"),
            ("c.json", "[1]", "must hold a mapping"),
            ("c.yaml", "a: [", "not valid YAML"),
            ("c.toml", "", "must end in"),
            ("c.json", '{"max_step": 3}', "unknown name 'max_step'. Did you mean 'max_steps'"),
            ("c.json", '{"max_steps": "3"}', "must be of type int"),
            ("c.json", '{"max_steps": true}', "must be of type int"),
            ("c.yaml", "seed: null", "must be of type int"),
        ],
    )
    def test_config_file_that_does_not_fit(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            TrainConfig.from_dict(read_config_file(tmp_path / name), source=name)


class TestLoadRun:
    def test_folder_that_is_no_model(self, tmp_path):
        with pytest.raises(UserError, match=r"not a model folder: it has no config.json"):
            load_run(tmp_path)
        with pytest.raises(UserError, match="is not there"):
            load_run(tmp_path / "nowhere")

    def test_unfinished_run_says_so(self, tmp_path):
        (tmp_path / "train_config.json").write_text("{}")
        with pytest.raises(UserError, match="not finished; go on with --resume"):
            load_run(tmp_path)

    def test_truncated_weights(self, finished, tmp_path):
        import shutil

        copy = shutil.copytree(finished / "final", tmp_path / "copy")
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors.* bytes instead of"):
            load_run(copy)
        (copy / "COMPLETE").unlink()  # even without the marker to compare with
        with pytest.raises(CheckpointError, match="does not load"):
            load_run(copy)
