"""Training: learning rates, kill and resume, two processes, LoRA with the music rows alone."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from midi_llm.data import MidiDataCollator, prepare_sft
from midi_llm.decode import MidiLM
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.notes import Notes
from midi_llm.train import TrainConfig, lora_config, make_trainer, parameter_groups, train
from midi_llm.vocab import AMTConfig
from tenfold_common.atomic import locked_folder
from tenfold_common.errors import UserError
from tenfold_common.tiny import tiny_llama, word_tokenizer

SMALL = AMTConfig.small()
FIELDS = (
    "output_dir", "max_steps", "learning_rate", "per_device_train_batch_size", "weight_decay",
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "logging_steps",
    "use_cpu", "seed", "data_seed", "report_to", "remove_unused_columns", "disable_tqdm",
    "average_tokens_across_devices",
)  # fmt: skip


def tune(seed, count=12):
    rng = np.random.default_rng(seed)
    return Notes.of(np.arange(count) * 0.25, 0.2, 0, rng.integers(50, 70, count))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model's folder and the folder of its data."""
    return begin(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*command(start, out))
    return out


def begin(folder, tied=True):
    tokenizer = word_tokenizer(["slow", "fast", "jazz"])
    made = TextMidiProcessor(tokenizer, SMALL, len(tokenizer), system="")
    model = tiny_llama(
        made.offset, hidden=16, layers=1, heads=2, kv_heads=2, tie_word_embeddings=tied, seed=3
    )
    expand_vocabulary(model, SMALL)
    MidiLM(model, made).save_pretrained(folder / "start")
    words = ("slow jazz", "fast")
    pairs = [(tune(i), words[i % 2]) for i in range(16)]
    prepare_sft(pairs, made, length=64, seed=0).save_to_disk(str(folder / "data"))
    return folder / "start", folder / "data"


def command(start, out, *options):
    return [
        "-m", "midi_llm", "train", "--model", str(start[0]), "--data", str(start[1]),
        "--out", str(out), "--steps", "8", "--save_every", "2", "--log_every", "1",
        "--batch_size", "2", "--lr", "0.01", "--music_lr", "0.01", *options,
    ]  # fmt: skip


def run(*arguments, launcher=()):
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_it_learns_and_the_model_loads(whole):
    found = losses(whole)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.1
    loaded = MidiLM.from_pretrained(whole / "model", device="cpu")
    assert loaded.model.config.use_cache is True
    assert loaded.generate("slow jazz", max_notes=5, seed=1)[0].notes is not None


def test_a_killed_run_goes_on_as_if_it_had_not_been(start, whole, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *command(start, out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-4" / "COMPLETE").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*command(start, out, "--resume"))
    one, resumed = weights(whole), weights(out)
    assert all(torch.equal(one[name], resumed[name]) for name in one)
    assert losses(out) == losses(whole)


def test_two_processes_equal_one(start, whole, tmp_path):
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    arguments = command(start, tmp_path / "two")
    arguments[arguments.index("--batch_size") + 1] = "1"
    run(*arguments, launcher=two)
    one, both = weights(whole), weights(tmp_path / "two")
    for name, weight in one.items():
        assert torch.allclose(weight, both[name], atol=2e-5), name


def test_the_sft_trainer_of_trl_learns_from_the_same_rows(start, tmp_path):
    """Losses equal those of our Trainer: samples are kept apart there too, prompts masked."""
    data: Any = load_from_disk(str(start[1]))
    settings = TrainConfig(steps=4, lr=0.01, music_lr=0.01, batch_size=2, log_every=1, warmup=0.0)

    def losses(make):
        model = MidiLM.from_pretrained(start[0], device="cpu", dtype="float32").model.train()
        model.config.use_cache = False
        trainer = make(model)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    def ours(model):
        return make_trainer(model, data, tmp_path / "ours", settings)

    def theirs(model):
        arguments = settings.arguments(tmp_path / "theirs").to_dict()
        options = SFTConfig(
            **{k: v for k, v in arguments.items() if k in FIELDS and v is not None},
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        groups = torch.optim.AdamW(parameter_groups(model, settings), betas=(0.9, 0.95))
        return SFTTrainer(
            model=model, args=options, train_dataset=data, data_collator=MidiDataCollator(),
            processing_class=AutoTokenizer.from_pretrained(start[0]),
            optimizers=(groups, None),
        )  # fmt: skip

    one, two = losses(ours), losses(theirs)
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


def test_learning_rates_of_embeddings_and_the_rest(start):
    model = MidiLM.from_pretrained(start[0], device="cpu").model
    config = TrainConfig(lr=1e-4, music_lr=3e-4)
    groups = parameter_groups(model, config)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    of = {id(p): g for g in groups for p in g["params"]}
    assert of[id(model.get_input_embeddings().weight)]["lr"] == 3e-4
    assert of[id(model.model.norm.weight)] | {"params": 0} == {
        "params": 0, "lr": 1e-4, "weight_decay": 0.0,
    }  # fmt: skip
    assert of[id(model.model.layers[0].mlp.up_proj.weight)]["weight_decay"] == 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_music_rows_and_no_others(tmp_path, tied):
    peft = pytest.importorskip("peft")
    loaded = MidiLM.from_pretrained(begin(tmp_path, tied)[0], device="cpu")
    before = loaded.model.get_input_embeddings().weight.detach().clone()
    head = loaded.model.get_output_embeddings().weight.detach().clone()
    model = peft.get_peft_model(loaded.model, lora_config(loaded.processor, loaded.model, rank=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[1, 2, loaded.processor.offset + 5, loaded.processor.offset + 900]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload()
    offset, size = loaded.processor.offset, SMALL.size
    after = merged.get_input_embeddings().weight.detach()
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed
    assert all(offset <= row < offset + size for row in changed)
    rows = (merged.get_output_embeddings().weight.detach() != head).any(1).nonzero().flatten()
    assert all(offset <= row < offset + size for row in rows.tolist())
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps must be"),
        ({"lr": 0.0}, "lr must be over 0"),
        ({"music_lr": 2.0}, "music_lr must be"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"batch_size": 1.5}, "batch_size must be"),
    ],
)
def test_wrong_settings_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(**change)


def test_a_folder_in_use_is_refused(start, tmp_path):
    from datasets import load_from_disk

    loaded = MidiLM.from_pretrained(start[0], device="cpu")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(
            loaded.model, loaded.processor, load_from_disk(str(start[1])), tmp_path / "used",
            TrainConfig(steps=1),
        )  # fmt: skip
    assert Path(tmp_path / "used" / "file").read_text() == "mine"


def short(start, out, *options, code=0):
    from midi_llm.cli import main

    assert main([*command(start, out, *options)[2:]]) == code


@pytest.fixture(scope="module")
def half(start, tmp_path_factory):
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("half") / "run"
    short(start, out, "--steps", "2")
    return out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lr", "0.02"], "with lr 0.01, not 0.02"),
        (["--seed", "1"], "with seed 0, not 1"),
        (["--batch_size", "4"], "with batch_size 2, not 4"),
        (["--lora", "2"], "with parameters"),
        (["--steps", "1"], "checkpoint-2 already, beyond 1 steps"),
    ],
)
def test_a_resumed_run_changes_nothing_unsaid(options, says, start, half, capsys):
    before = (half / "train_config.json").read_bytes()
    short(start, half, "--resume", *options, code=2)
    assert says in capsys.readouterr().err
    assert (half / "train_config.json").read_bytes() == before


def test_a_resumed_run_may_save_more_often_and_last_longer(start, half, tmp_path, capsys):
    shutil.copytree(half, tmp_path / "run")
    options = ("--steps", "4", "--save_every", "1", "--log_every", "2")
    short(start, tmp_path / "run", "--resume", *options)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert "{'loss'" not in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_the_same_data(start, half, tmp_path, capsys):
    made = TextMidiProcessor.from_pretrained(start[0])
    pairs = [(tune(i + 50), "slow jazz") for i in range(16)]
    prepare_sft(pairs, made, length=64, seed=0).save_to_disk(str(tmp_path / "data"))
    short((start[0], tmp_path / "data"), half, "--resume", code=2)
    assert "was started with data" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_not_gone_on_with(start, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("x")
    short(start, tmp_path / "thesis", "--resume", code=2)
    assert "holds no run to resume" in capsys.readouterr().err
    shutil.copytree(start[0], tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    short((tmp_path / "model", start[1]), tmp_path / "model", "--resume", code=2)
    assert "is also an input" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    short(start, tmp_path / "new", "--resume", "--steps", "1")


def test_rows_of_another_model_are_refused(start, tmp_path, capsys):
    tokenizer = word_tokenizer(["slow", "fast", "jazz", "more"])
    made = TextMidiProcessor(tokenizer, SMALL, len(tokenizer), system="")
    data = prepare_sft([(tune(1), "slow")], made, length=64)
    data.save_to_disk(str(tmp_path / "data"))
    short((start[0], tmp_path / "data"), tmp_path / "run", code=2)
    assert "the rows are of other ids than the model's" in capsys.readouterr().err
    assert not (tmp_path / "run" / "train_config.json").exists()


def test_one_run_at_a_time(start, half, capsys):
    with locked_folder(half):
        short(start, half, "--resume", code=2)
    assert "another run is writing" in capsys.readouterr().err


def test_an_adapter_is_not_trained_on(start, tmp_path, capsys):
    short(start, tmp_path / "run", "--steps", "1", "--lora", "2")
    short((tmp_path / "run" / "model", start[1]), tmp_path / "two", "--steps", "1", code=2)
    assert "adapter" in capsys.readouterr().err
