"""Killed, stopped, damaged, full disk: what is left resumes with the losses of an undisturbed run.

Runs are started as the command does; where the moment matters, a script slows or kills the steps
and then calls the same command.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback

from rlcr.cli import main
from rlcr.toy import NoisySensor
from rlcr.trainer import sft_warmup
from tenfold_common.atomic import is_complete
from tenfold_common.errors import CheckpointError

# Runs of a few steps from a weak model may look like a failing one.
pytestmark = pytest.mark.filterwarnings("ignore::rlcr.monitor.CalibrationWarning")
TASK = NoisySensor()
STEPS = 8
TRAINING_ARGS = ["per_device_train_batch_size=64", "logging_steps=1", "verifier=exact_match"]

SLOW_STEPS = """
import sys, time
import torch
from transformers import Trainer
from rlcr.cli import main
step = Trainer.training_step
def slow(self, *args, **named):
    time.sleep(0.3)
    return step(self, *args, **named)
Trainer.training_step = slow
sys.exit(main(sys.argv[1:]))
"""
KILL_IN_SAVE = """
import os, signal, sys
from transformers import Trainer
from rlcr.cli import main
save = Trainer._save_rng_state
def killed(self, folder):
    if folder.endswith("checkpoint-8"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = killed
sys.exit(main(sys.argv[1:]))
"""
KILL_IN_WARMUP = """
import os, signal, sys
from transformers import PreTrainedModel
from rlcr.cli import main
save = PreTrainedModel.save_pretrained
def killed(self, folder, **named):
    save(self, folder, **named)
    os.kill(os.getpid(), signal.SIGKILL)
PreTrainedModel.save_pretrained = killed
sys.exit(main(sys.argv[1:]))
"""


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


def arguments(base, folder, *more, steps=STEPS, save=4):
    return [
        "train", f"--output_dir={folder}", f"--model={base}", "--data=toy", "--device=cpu",
        f"--max_steps={steps}", f"--save_steps={save}", "--learning_rate=1e-3", *more,
        "--training_args", *TRAINING_ARGS,
    ]  # fmt: skip


def start(command, **named):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, **named,
    )  # fmt: skip


def wait_for(condition, child, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        if child.poll() is not None or time.monotonic() > end:
            child.kill()
            pytest.fail(f"ended or too late: {child.communicate()[1][-2000:]}")
        time.sleep(0.01)


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def losses(folder):
    found = [row for row in map(json.loads, lines(folder)) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def same_metrics(one, other):
    """Everything logged is equal, times and speeds aside."""
    clocks = ("step_time", "train_runtime", "per_second")

    def kept(folder):
        return [
            {k: v for k, v in json.loads(line).items() if not any(c in k for c in clocks)}
            for line in lines(folder)
            if '"loss"' in line
        ]

    return kept(one) == kept(other)


def assert_same_run(folder, undisturbed):
    assert losses(folder) == losses(undisturbed)
    assert same_metrics(folder, undisturbed)
    one, two = (load_file(f / "final" / "model.safetensors") for f in (folder, undisturbed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(arguments(base, folder)) == 0
    assert len(losses(folder)) == STEPS
    return folder


def test_killed_and_resumed(base, undisturbed, tmp_path):
    folder = tmp_path / "run"
    child = start(["-c", SLOW_STEPS, *arguments(base, folder)])
    wait_for(lambda: (folder / "checkpoint-4" / "COMPLETE").is_file(), child)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (folder / "final").exists()
    assert len(lines(folder)) < STEPS
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 0  # the rest is in the folder
    assert_same_run(folder, undisturbed)


def test_killed_inside_a_save_and_resumed(base, undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    child = start(["-c", KILL_IN_SAVE, *arguments(base, folder)])
    child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert (folder / "checkpoint-8" / "model.safetensors").is_file()
    assert not (folder / "checkpoint-8" / "COMPLETE").exists()
    assert main(arguments(base, folder, "--resume")) == 0
    assert "skipping checkpoint-8" in capsys.readouterr().err
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130,
                                                                       "interrupted")]
)  # fmt: skip
def test_stopped_by_a_signal_and_resumed(number, code, word, base, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = ["-m", "rlcr"] if number == signal.SIGTERM else ["-c", SLOW_STEPS]
    steps = ["--max_steps=400"] if number == signal.SIGTERM else []
    child = start([*command, *arguments(base, folder, *steps)])
    wait_for(lambda: len(lines(folder)) >= 2, child)
    child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == code
    assert errors.splitlines()[-1] == word
    assert "Traceback" not in errors
    assert not (folder / "final").exists()
    step = len(losses(folder))
    assert is_complete(folder / f"checkpoint-{step}")
    if number == signal.SIGINT:
        assert main(["train", "--resume", f"--output_dir={folder}"]) == 0
        assert_same_run(folder, undisturbed)


def test_damaged_newest_checkpoint_is_passed_over(base, undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "final")
    optimizer = folder / "checkpoint-8" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "skipping" in line]
    assert "checkpoint-8" in said[0]
    assert "optimizer.pt" in said[0]
    assert_same_run(folder, undisturbed)


def test_no_checkpoint_left_whole(undisturbed, tmp_path, capsys):
    from rlcr.options import TrainOptions, read_options_file
    from rlcr.training import train

    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "final")
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "model.safetensors").write_bytes(b"short")
    stored = read_options_file(folder / "train_options.json")
    options = TrainOptions(**stored, output_dir=str(folder), resume=True)
    with pytest.raises(CheckpointError, match=r"damaged: .*model\.safetensors.*5 bytes"):
        train(options)
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_killed_before_the_first_checkpoint(undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(undisturbed / "train_options.json", folder)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 0
    assert "starting from the first step" in capsys.readouterr().err
    assert_same_run(folder, undisturbed)


def test_killed_before_the_final_folder_was_whole(undisturbed, tmp_path):
    """All steps done, the last save cut short: resuming writes it, without another step."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    (folder / "final").rename(folder / ".final.unfinished")
    (folder / ".final.unfinished" / "COMPLETE").unlink()
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 0
    assert is_complete(folder / "final")
    assert not (folder / ".final.unfinished").exists()
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_killed_at_the_end_of_the_warm_up(tmp_path):
    more = ["--warmup_data=toy", "--warmup_steps=3", "--warmup_learning_rate=3e-3"]
    folder = tmp_path / "run"
    child = start(["-c", KILL_IN_WARMUP, *arguments("toy", folder, *more, steps=2)])
    child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert not (folder / "warmup").exists()
    assert (folder / ".warmup.unfinished").is_dir()
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 0
    assert is_complete(folder / "warmup")
    assert not (folder / ".warmup.unfinished").exists()
    assert main(arguments("toy", tmp_path / "whole", *more, steps=2)) == 0
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("limit", [pytest.param(100_000, marks=pytest.mark.slow), 1_000_000])
def test_full_disk_is_one_line(limit, base, tmp_path):
    """A limit on the size of files stands for a full disk: the first stops the weights of the
    first checkpoint, the second its optimiser."""
    folder = tmp_path / "run"
    child = start(
        ["-m", "rlcr", *arguments(base, folder, steps=2, save=1)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 2, errors[-2000:]
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(folder) in last
    assert "disk" in last
    assert not any(is_complete(p) for p in folder.glob("checkpoint-*"))


def test_full_disk_leaves_the_last_checkpoint(base, undisturbed, tmp_path, monkeypatch, capsys):
    """The second save fails half way; the one before stays complete and resume goes on."""
    import errno

    from transformers import Trainer

    folder, save = tmp_path / "run", Trainer._save_optimizer_and_scheduler

    def full(self, place):
        if place.endswith("checkpoint-8"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        assert main(arguments(base, folder)) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", "--resume", f"--output_dir={folder}"]) == 0
    assert_same_run(folder, undisturbed)


def test_two_runs_at_once(base, tmp_path, capsys):
    folder = tmp_path / "run"
    child = start(["-c", SLOW_STEPS, *arguments(base, folder, steps=200)])
    try:
        wait_for(lambda: len(lines(folder)) >= 1, child)
        for flag in ("--resume", "--overwrite"):
            assert main(arguments(base, folder, flag, steps=200)) == 2
            assert "another run is writing" in capsys.readouterr().err
            assert child.poll() is None
        assert len(lines(folder)) >= 1
    finally:
        child.kill()
        child.communicate()


@pytest.mark.slow
def test_two_processes_killed_and_resumed(base, tmp_path):
    """Both of torchrun's processes are killed after the first checkpoint; the run goes on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script, numbers = tmp_path / "slow.py", tmp_path / "processes"
    record = f"import os\nopen({str(numbers)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
    script.write_text(record + SLOW_STEPS)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    child = start([*launcher, "-m", "rlcr", *arguments(base, whole)])
    _, errors = child.communicate(timeout=400)
    assert child.returncode == 0, errors[-3000:]
    child = start([*launcher, str(script), *arguments(base, folder)])
    wait_for(lambda: (folder / "checkpoint-4" / "COMPLETE").is_file(), child)
    workers = [int(line) for line in numbers.read_text().split()]
    assert len(workers) == 2
    for number in (child.pid, *workers):
        os.kill(number, signal.SIGKILL)
    child.communicate()
    children_gone(folder)
    assert not (folder / "final").exists()
    assert len(lines(folder)) < STEPS
    child = start([*launcher, "-m", "rlcr", "train", "--resume", f"--output_dir={folder}"])
    _, errors = child.communicate(timeout=400)
    assert child.returncode == 0, errors[-3000:]
    assert_same_run(folder, whole)


def children_gone(folder, seconds=60):
    """Wait until no process holds the folder's lock any more."""
    import fcntl

    end = time.monotonic() + seconds
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)
        finally:
            os.close(handle)
