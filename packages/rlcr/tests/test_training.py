"""`rlcr train`: its options, its folder, and two processes under torchrun."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from rlcr.options import TrainOptions, key_values, kind_of, read_options_file
from rlcr.toy import NoisySensor
from rlcr.trainer import sft_warmup
from rlcr.training import train, training_arguments, training_data
from tenfold_common.atomic import is_complete, locked_folder
from tenfold_common.errors import UserError

# Runs of a few steps from a weak model may look like a failing one.
pytestmark = pytest.mark.filterwarnings("ignore::rlcr.monitor.CalibrationWarning")
TASK = NoisySensor()
ARGS = {"per_device_train_batch_size": 64, "logging_steps": 1, "verifier": "exact_match"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that writes the format, mostly."""
    folder = tmp_path_factory.mktemp("base")
    model = sft_warmup(
        TASK.model(0), TASK.warmup(128 * 70, 7), str(folder / "sft"), TASK.tokenizer(),
        remove_callbacks=(PrinterCallback,), max_steps=70, per_device_train_batch_size=128,
        learning_rate=3e-3, warmup_steps=10, disable_tqdm=True,
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    TASK.tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def options(base, folder, **changes):
    values = {
        "output_dir": str(folder), "model": str(base), "data": "toy", "device": "cpu",
        "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "training_args": dict(ARGS),
    }  # fmt: skip
    return TrainOptions(**{**values, **changes})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    found = [(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss in found]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run; tests copy it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train(options(base, folder)) == folder / "final"
    return folder


class TestFolder:
    def test_what_is_in_it(self, run):
        names = {p.name for p in run.iterdir()}
        assert names == {
            "train_options.json", "metrics.jsonl", "checkpoint-2", "checkpoint-4", "final",
            "README.md",
        }  # fmt: skip
        assert all(is_complete(run / n) for n in ("checkpoint-2", "checkpoint-4", "final"))
        assert len(losses(run)) == 4
        assert isinstance(json.loads((run / "final" / "alarms.json").read_text()), list)
        assert not list(run.rglob("training_args.bin"))  # a pickle that nothing reads

    def test_metrics(self, run):
        for row in rows(run)[:4]:
            assert row["rewards/format_reward/mean"] > 0.3
            assert {"reward", "rlcr/accuracy", "rlcr/brier", "rlcr/ece", "rlcr/auroc",
                    "rlcr/confidence_std", "rlcr/parse/ok"} <= set(row)  # fmt: skip

    def test_options_are_stored_without_this_calls_flags(self, run, base):
        stored = json.loads((run / "train_options.json").read_text())
        assert stored["model"] == str(base.resolve())
        assert stored["max_steps"] == 4
        assert stored["training_args"] == ARGS
        assert not {"resume", "overwrite", "output_dir"} & set(stored)

    def test_final_model_loads_and_differs(self, run, base):
        model = AutoModelForCausalLM.from_pretrained(run / "final")
        tokenizer = AutoTokenizer.from_pretrained(run / "final")
        ids = tokenizer("s3 4 4 4 ?", return_tensors="pt")
        text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
        assert text.startswith("s3 4 4 4 ? <think> </think> <answer>")
        before = load_file(base / "model.safetensors")
        after = load_file(run / "final" / "model.safetensors")
        assert any(not torch.equal(after[name], before[name]) for name in before)

    def test_same_options_give_the_same_run(self, run, base, tmp_path):
        train(options(base, tmp_path / "again"))
        assert losses(tmp_path / "again") == losses(run)
        one, two = (load_file(f / "final" / "model.safetensors") for f in (run, tmp_path / "again"))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_another_seed_gives_another(self, run, base, tmp_path):
        train(options(base, tmp_path / "other", seed=1, max_steps=2))
        assert losses(tmp_path / "other") != losses(run)[:2]


class TestRefusals:
    def test_a_folder_with_something_in_it(self, run, base):
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        with pytest.raises(UserError, match=r"not empty .*--resume .*--overwrite"):
            train(options(base, run))
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before

    def test_overwrite(self, base, tmp_path):
        (tmp_path / "out" / "checkpoint-9").mkdir(parents=True)
        (tmp_path / "out" / "old.txt").write_text("old")
        train(options(base, tmp_path / "out", overwrite=True, max_steps=1))
        assert not (tmp_path / "out" / "old.txt").exists()
        assert not (tmp_path / "out" / "checkpoint-9").exists()
        assert is_complete(tmp_path / "out" / "final")

    def test_both_flags(self, run, base):
        with pytest.raises(UserError, match="exclude each other"):
            train(options(base, run, overwrite=True, resume=True))
        assert is_complete(run / "final")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"learning_rate": 2e-3}, r"learning_rate 0\.001, not 0\.002"),
            ({"seed": 1}, "seed 0, not 1"),
            ({"method": "rlvr"}, "method None, not 'rlvr'"),
            ({"max_steps": 8}, "max_steps 4, not 8"),
            ({"training_args": {**ARGS, "temperature": 0.5}}, r"training_args \{.*temperature"),
            ({"model": "toy"}, "model .*not 'toy'"),
        ],
    )
    def test_resume_with_another_option(self, run, base, changes, message):
        with pytest.raises(UserError, match=message):
            train(options(base, run, resume=True, **changes))

    def test_resume_of_nothing(self, base, tmp_path):
        with pytest.raises(UserError, match="no run to resume"):
            train(options(base, tmp_path / "new", resume=True))
        assert not (tmp_path / "new").exists()

    def test_unreadable_options(self, run, base, tmp_path):
        folder = shutil.copytree(run, tmp_path / "out")
        (folder / "train_options.json").write_text('{"seed": ')
        with pytest.raises(UserError, match="cannot be read"):
            train(options(base, folder, resume=True))

    def test_another_run_holds_the_folder(self, base, tmp_path):
        with locked_folder(tmp_path / "out"), pytest.raises(UserError, match="another run is"):
            train(options(base, tmp_path / "out"))
        assert not list((tmp_path / "out").iterdir())

    def test_a_model_that_is_not_there(self, base, tmp_path):
        with pytest.raises(UserError, match=r"no tokenizer loads from .*nothing"):
            train(options(base, tmp_path / "out", model=str(tmp_path / "nothing")))
        assert not (tmp_path / "out").exists()

    def test_a_damaged_model(self, base, tmp_path):
        folder = shutil.copytree(base, tmp_path / "model")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(UserError, match="no model loads from"):
            train(options(base, tmp_path / "out", model=str(folder)))


class TestResume:
    def test_a_finished_run_has_nothing_to_do(self, run, base, tmp_path):
        folder = shutil.copytree(run, tmp_path / "out")
        before = (folder / "metrics.jsonl").read_bytes()
        assert train(options(base, folder, resume=True)) == folder / "final"
        assert (folder / "metrics.jsonl").read_bytes() == before

    def test_save_steps_may_differ(self, run, base, tmp_path):
        folder = shutil.copytree(run, tmp_path / "out")
        shutil.rmtree(folder / "final")
        shutil.rmtree(folder / "checkpoint-4")
        train(options(base, folder, resume=True, save_steps=1))
        assert losses(folder) == losses(run)
        assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


class TestArguments:
    def arguments(self, **changes):
        return training_arguments(options("toy", "out", **changes))

    @pytest.mark.parametrize("name", ["learning_rate", "seed", "max_steps", "method", "use_cpu"])
    def test_what_has_an_option_of_its_own(self, name):
        with pytest.raises(UserError, match=f"training_args has {name}; use --"):
            self.arguments(training_args={name: 1})

    def test_unknown_name(self):
        with pytest.raises(UserError, match=r"unknown name 'temperatur'.*'temperature'"):
            self.arguments(training_args={"temperatur": 1})

    def test_values_that_do_not_fit(self):
        with pytest.raises(UserError, match=r"do not fit: .*divisible"):
            self.arguments(training_args={"per_device_train_batch_size": 33})

    def test_negative_margin(self):
        with pytest.raises(UserError, match=r"-0\.9722"):
            self.arguments(
                training_args={"rule": "log", "rule_parameters": {"eps": 0.05, "scaled": False}}
            )

    def test_the_toy_starts_from_tiny_and_arguments_win(self):
        made = self.arguments(learning_rate=None)
        assert made.temperature == 1.0
        assert made.learning_rate == 2e-3
        made = self.arguments(training_args={**ARGS, "temperature": 0.9})
        assert (made.temperature, made.per_device_train_batch_size) == (0.9, 64)

    def test_preset_on_a_cpu(self):
        made = self.arguments(preset="hotpot", learning_rate=None, training_args={})
        assert (made.learning_rate, made.num_generations) == (1e-6, 32)
        assert (made.bf16, made.gradient_checkpointing) == (False, False)

    def test_method(self):
        assert self.arguments(method="rlvr").reward().weights[2] == 0.0
        assert self.arguments().method == "rlcr"


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"output_dir": None}, "train needs --output_dir"),
            ({"model": None}, "train needs --model"),
            ({"data": None}, "train needs --data"),
            ({"method": "grpo"}, "method is 'grpo'"),
            ({"preset": "hotpo"}, "Did you mean 'hotpot'"),
            ({"max_steps": 0}, "max_steps is 0"),
            ({"save_steps": 0}, "save_steps is 0"),
            ({"peft_rank": 0}, "peft_rank is 0"),
            ({"learning_rate": 0.0}, "learning_rate is 0.0"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"seed": -1}, "at least 0"),
            ({"warmup_steps": 3}, "needs --warmup_data"),
            ({"model": "toy", "data": "x.jsonl"}, "use --data toy"),
            ({"data": "/nowhere/x.jsonl"}, "'/nowhere/x.jsonl' is not there"),
            ({"data": "/tmp"}, "'/tmp' is a folder"),  # noqa: S108 - any folder
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(UserError, match=message):
            options("some/model", "out", **changes).checked()

    def test_from_dict(self):
        made = TrainOptions.from_dict({"learning_rate": 1, "seed": 2, "plain": True}, "x")
        assert (made.learning_rate, made.seed, made.plain) == (1, 2, True)
        with pytest.raises(UserError, match=r"x has an unknown option 'sede'.*'seed'"):
            TrainOptions.from_dict({"sede": 1}, "x")
        for values in ({"seed": "1"}, {"seed": True}, {"plain": 1}, {"training_args": [1]},
                       {"seed": 1.5}):  # fmt: skip
            with pytest.raises(UserError, match="must be a"):
                TrainOptions.from_dict(values, "x")

    def test_kinds(self):
        kinds = {n: kind_of(n) for n in ("seed", "model", "learning_rate", "plain", "peft_rank",
                                         "training_args")}  # fmt: skip
        assert kinds == {"seed": int, "model": str, "learning_rate": float, "plain": bool,
                         "peft_rank": int, "training_args": dict}  # fmt: skip

    def test_key_values(self):
        found = key_values(["a=1", "b=1e-5", "c=[1, 2]", "d=exact_match", "e=true", "f=x=y", "g="])
        assert found == {"a": 1, "b": 1e-5, "c": [1, 2], "d": "exact_match", "e": True, "f": "x=y",
                         "g": None}  # fmt: skip
        for pair in ("a", "=1", "a=[1"):
            with pytest.raises(UserError):
                key_values([pair])

    def test_files(self, tmp_path):
        (tmp_path / "o.yaml").write_text("seed: 3\ntraining_args: {temperature: 0.5}\n")
        (tmp_path / "o.json").write_text('{"seed": 3, "training_args": {"temperature": 0.5}}')
        expected = {"seed": 3, "training_args": {"temperature": 0.5}}
        assert read_options_file(tmp_path / "o.yaml") == expected
        assert read_options_file(tmp_path / "o.json") == expected
        (tmp_path / "list.yaml").write_text("- 1\n")
        (tmp_path / "bad.yaml").write_text("a: [1\n")
        (tmp_path / "bad.json").write_text("{")
        for name in ("list.yaml", "bad.yaml", "bad.json", "none.yaml"):
            with pytest.raises(UserError, match=name):
                read_options_file(tmp_path / name)


class TestData:
    def test_toy_by_seed(self):
        one, same, other = (training_data(options("toy", "out", seed=s)) for s in (0, 0, 1))
        assert one.column_names == ["prompt", "answer"]
        assert one[:20] == same[:20] != other[:20]

    def test_a_file(self, base, tmp_path):
        draws = TASK.draw(16, 0)
        file = tmp_path / "data.jsonl"
        lines = [{"prompt": p, "answer": str(d)} for p, d in zip(TASK.prompts(draws), draws.digit,
                                                                  strict=True)]  # fmt: skip
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        train(options(base, tmp_path / "out", data=str(file), preset="tiny", max_steps=1))
        assert rows(tmp_path / "out")[0]["rewards/format_reward/mean"] > 0.3
        stored = json.loads((tmp_path / "out" / "train_options.json").read_text())
        assert stored["data"] == str(file.resolve())


def test_adapter(base, tmp_path):
    peft = pytest.importorskip("peft")
    final = train(options(base, tmp_path / "out", peft_rank=2, max_steps=2))
    assert (final / "adapter_model.safetensors").is_file()
    assert not (final / "model.safetensors").exists()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(final)
    assert model.peft_config["default"].r == 2
    lora = load_file(final / "adapter_model.safetensors")
    assert any(w.abs().sum() > 0 for n, w in lora.items() if "lora_B" in n)


class TestWarmup:
    CHANGES = {  # noqa: RUF012
        "model": "toy", "warmup_data": "toy", "warmup_steps": 6, "warmup_learning_rate": 3e-3,
        "max_steps": 3, "save_steps": 3,
    }  # fmt: skip

    def test_once_per_folder_and_reused(self, base, tmp_path, monkeypatch):
        folder = tmp_path / "out"
        train(options(base, folder, **self.CHANGES))
        assert is_complete(folder / "warmup")
        first = losses(folder)
        # As if killed before the first checkpoint: the warm-up stays and is not done again.
        shutil.rmtree(folder / "final")
        shutil.rmtree(folder / "checkpoint-3")
        monkeypatch.setattr("rlcr.training.sft_warmup", lambda *a, **n: pytest.fail("done again"))
        train(options(base, folder, resume=True, **self.CHANGES))
        assert losses(folder) == first

    def test_from_a_file(self, base, tmp_path):
        from rlcr.parsing import render_completion

        draws = TASK.draw(16, 0)
        file = tmp_path / "sft.jsonl"
        lines = [{"prompt": f"{p} ", "completion": render_completion(str(d), 0.5), "more": 1}
                 for p, d in zip(TASK.prompts(draws), draws.digit, strict=True)]  # fmt: skip
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        train(options(base, tmp_path / "out", warmup_data=str(file), warmup_steps=2, max_steps=1))
        before = load_file(base / "model.safetensors")
        after = load_file(tmp_path / "out" / "warmup" / "model.safetensors")
        assert any(not torch.equal(after[name], before[name]) for name in before)


def torchrun(folder, base, *more, steps=6):
    """Two gloo processes on the CPU; the launcher picks a free port by itself."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "rlcr", "train", f"--output_dir={folder}", f"--model={base}", "--data=toy",
        "--device=cpu", f"--max_steps={steps}", "--save_steps=2", "--learning_rate=1e-3",
        *more, "--training_args", "per_device_train_batch_size=32", "logging_steps=1",
        "verifier=exact_match",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment, check=False
    )


@pytest.mark.slow
def test_two_processes(base, tmp_path):
    """Two processes, the same global batch as one.

    TRL seeds the sampling of every process differently (`set_seed(device_specific=True)`; equal
    seeds would sample the same completions twice), so two processes draw other completions than
    one does and the losses cannot be equal number for number. What must hold: both processes see
    the whole batch's metrics, so shares are multiples of 1/64 and the first step is one draw of the
    same policy on the same prompts; and the run is repeatable to the last bit.
    """
    done = torchrun(tmp_path / "two", base)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: ") == 1
    two = tmp_path / "two"
    assert len(losses(two)) == 6
    assert len({row["step"] for row in rows(two)[:6]}) == 6
    assert is_complete(two / "final")
    assert {p.name for p in two.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    train(options(base, tmp_path / "one", max_steps=6))
    first, single = rows(two)[0], rows(tmp_path / "one")[0]
    for name in ("rlcr/accuracy", "rlcr/parse/ok", "rewards/format_reward/mean"):
        assert first[name] * 64 == pytest.approx(round(first[name] * 64), abs=1e-3)
        assert abs(first[name] - single[name]) < 0.3  # two draws of 64 from one policy
    assert any(round(row["rlcr/accuracy"] * 64) % 2 for row in rows(two)[:6])  # not 32 rows twice
    again = torchrun(tmp_path / "again", base)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "again") == losses(two)


RANKS = """
import sys
from pathlib import Path
from safetensors.torch import save_file
import rlcr.training as training
from rlcr.cli import main

class Kept(training.RLCRTrainer):
    def train(self, **named):
        result = super().train(**named)
        rank = self.accelerator.process_index
        weights = {n: p.detach().clone().contiguous() for n, p in
                   self.accelerator.unwrap_model(self.model).named_parameters()}
        save_file(weights, str(Path(sys.argv[1]) / f"rank{rank}.safetensors"))
        return result

training.RLCRTrainer = Kept
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_both_processes_end_with_the_same_weights(base, tmp_path):
    """With a warm-up, which both processes do together, and learning the format."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(script), str(tmp_path), "train", f"--output_dir={tmp_path / 'out'}", f"--model={base}",
        "--data=toy", "--device=cpu", "--max_steps=20", "--learning_rate=2e-3",
        "--warmup_data=toy", "--warmup_steps=4", "--warmup_learning_rate=1e-4",
        "--training_args", "per_device_train_batch_size=64", "logging_steps=1",
        "verifier=exact_match",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"rank{r}.safetensors") for r in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    saved = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(torch.equal(saved[name], one[name]) for name in saved if name in one)
    assert is_complete(tmp_path / "out" / "warmup")
    form = [row["rewards/format_reward/mean"] for row in rows(tmp_path / "out")[:20]]
    assert sum(form[-5:]) / 5 > max(0.5, sum(form[:5]) / 5)
    assert len(losses(tmp_path / "out")) == 20
