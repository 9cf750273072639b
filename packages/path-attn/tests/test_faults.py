"""Killed, cut short, full disk: what is left resumes with the losses of an undisturbed run."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from path_attn import evaluate
from path_attn.config import TrainConfig
from path_attn.training import train
from tenfold_common.errors import CheckpointError

OPTIONS = {
    "task": "fflm",
    "length": 16,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "batch_size": 4,
    "max_steps": 16,
    "logging_steps": 1,
    "save_steps": 4,
    "device": "cpu",
}

SLOW_STEPS = """
import time
from transformers import Trainer
from path_attn.training import train
from path_attn.config import TrainConfig
step = Trainer.training_step
def slow(self, *args, **named):
    time.sleep(0.1)
    return step(self, *args, **named)
Trainer.training_step = slow
"""
KILL_IN_SAVE = """
import os, signal
from transformers import Trainer
from path_attn.training import train
from path_attn.config import TrainConfig
save = Trainer._save_rng_state
def killed(self, folder):
    if folder.endswith("checkpoint-8"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = killed
"""


@pytest.fixture(autouse=True)
def _small_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_SET", 1024)


def run(folder, **changes):
    return train(TrainConfig(**{**OPTIONS, "output_dir": str(folder), **changes}))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss in found]


def start(script, folder):
    call = f"{script}\ntrain(TrainConfig(**{OPTIONS!r}, output_dir={str(folder)!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", call], env=environment, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "TOKENS_PER_SET", 1024)
        run(folder)
    return folder


def test_killed_at_a_random_step_and_resumed(undisturbed, tmp_path):
    folder = tmp_path / "run"
    wanted = random.randrange(5, 14)
    child = start(SLOW_STEPS, folder)
    try:
        metrics = folder / "metrics.jsonl"
        end = time.monotonic() + 120
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < wanted:
            assert child.poll() is None, child.stderr.read().decode()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (folder / "final").exists()
    run(folder, resume=True)
    assert losses(folder) == losses(undisturbed)


def test_killed_before_the_final_folder_was_whole(undisturbed, tmp_path):
    """All steps done, the last save cut short: resuming writes it, without another step."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    (folder / "final").rename(folder / ".final.unfinished")
    (folder / ".final.unfinished" / "COMPLETE").unlink()
    run(folder, resume=True)
    assert losses(folder) == losses(undisturbed)
    weights = "final/model.safetensors"
    assert (folder / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_full_disk_is_one_line(tmp_path):
    """A limit on the size of files stands for a full disk; safetensors raises no OSError."""
    command = [sys.executable, "-m", "path_attn", "train", f"--output_dir={tmp_path / 'run'}"]
    for name, value in {**OPTIONS, "max_steps": 2, "save_steps": 1}.items():
        command.append(f"--{name}={value}")
    child = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000)),
    )  # fmt: skip
    assert child.returncode == 2, child.stderr[-2000:]
    assert "Traceback" not in child.stderr
    last = child.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "disk" in last or "too large" in last
    assert not list((tmp_path / "run").glob("checkpoint-*/COMPLETE"))


def test_killed_inside_a_save_and_resumed(undisturbed, tmp_path, caplog):
    folder = tmp_path / "run"
    child = start(KILL_IN_SAVE, folder)
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    torn = folder / "checkpoint-8"
    assert (torn / "model.safetensors").is_file()
    assert not (torn / "COMPLETE").exists()
    assert len(losses(folder)) == 8
    run(folder, resume=True)
    assert any("skipping checkpoint-8" in r.getMessage() for r in caplog.records)
    assert losses(folder) == losses(undisturbed)
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-12", "checkpoint-16"}


def test_altered_checkpoint_is_passed_over_and_named(undisturbed, tmp_path, caplog):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "final")
    optimizer = folder / "checkpoint-16" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    run(folder, resume=True)
    assert any(
        "skipping checkpoint-16" in r.getMessage() and "optimizer.pt" in r.getMessage()
        for r in caplog.records
    )
    assert losses(folder) == losses(undisturbed)


def test_no_checkpoint_left_whole(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "final")
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        CheckpointError, match=r"damaged: .*model\.safetensors.* has 5 bytes.*--overwrite"
    ):
        run(folder, resume=True)


def test_killed_before_the_first_checkpoint(undisturbed, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(undisturbed / "train_config.json", folder)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    run(folder, resume=True)
    assert any("starting from the first step" in r.getMessage() for r in caplog.records)
    assert losses(folder) == losses(undisturbed)


def test_full_disk_leaves_the_last_checkpoint(undisturbed, tmp_path, monkeypatch):
    """The third save fails half way; the two before stay complete and resume goes on."""
    import errno

    from transformers import Trainer

    save = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("checkpoint-12"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(undisturbed)
