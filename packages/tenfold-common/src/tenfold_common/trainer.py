"""Checkpoints of a Trainer that survive a kill, and what listens to it: metrics and signals.

The one module here that imports torch and transformers at its top: its classes are subclasses of
theirs. Import it where a Trainer is used.
"""

import json
import logging
import re
import shutil
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tenfold_common.atomic import atomic_write, is_complete, mark_complete, newest_complete
from tenfold_common.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin: the trainer's own class comes after it

logger = logging.getLogger(__name__)


class AtomicCheckpoints(_Trainer):
    """Makes the checkpoint folders of a `transformers.Trainer` complete or unused.

    A checkpoint gets its marker after everything is on the disk, and older ones are deleted after
    that, so a kill at any moment leaves the last complete one. Put it before the trainer's class:
    `class MyTrainer(AtomicCheckpoints, Trainer)`.

    Args:
        keep: How many complete checkpoints to keep, at least 2.
        *arguments: Those of the trainer.
        **named: The same, by name.

    Raises:
        UserError: `keep` is below 2, or the arguments leave the deletion to the Trainer.
    """

    def __init__(self, *arguments: Any, keep: int = 2, **named: Any) -> None:
        """Take the place of the Trainer's own deletion of old checkpoints."""
        if keep < 2:
            raise UserError(f"keep is {keep}; it must be at least 2.")
        super().__init__(*arguments, **named)
        if self.args.save_total_limit is not None:
            raise UserError(
                "AtomicCheckpoints deletes old checkpoints itself; leave save_total_limit at None "
                "and set keep."
            )
        self.keep = keep

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Save the model without the pickle of the arguments, which nothing reads."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or str(self.args.output_dir)) / "training_args.bin").unlink(
            missing_ok=True
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, mark it complete, then delete what is no longer wanted."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            delete_folder(folder)  # what an earlier, killed run left under the same name
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            complete = [p for p in _checkpoints(folder.parent) if is_complete(p)]
            best = self.state.best_model_checkpoint
            keep = {p.resolve() for p in complete[-self.keep :]} | {folder.resolve()}
            keep |= {Path(best).resolve()} if best else set()
            for old in _checkpoints(folder.parent):
                if old.resolve() not in keep:
                    delete_folder(old)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first."""
    found = [
        p
        for p in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def delete_folder(folder: Path) -> None:
    """Delete a folder, its marker first: a kill half way leaves nothing that looks complete."""
    if folder.is_dir():
        (folder / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(folder)


class MetricsFile(TrainerCallback):
    """Writes every log as one JSON line; a resumed run continues where its checkpoint was."""

    def __init__(self, path: Path) -> None:
        """Remember the path."""
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Start the file with the logs up to the checkpoint; later steps will be repeated."""
        if state.is_world_process_zero:
            with atomic_write(self.path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in state.log_history)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Append the newest log."""
        if state.is_world_process_zero:
            row = state.log_history[-1]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if "loss" in row:
                logger.info("step %d of %d: loss %.4f", row["step"], state.max_steps, row["loss"])


class Stopped(KeyboardInterrupt):
    """A training run was stopped by a signal.

    Attributes:
        number: The signal, SIGINT or SIGTERM.
    """

    def __init__(self, number: int) -> None:
        """Remember the signal."""
        super().__init__(number)
        self.number = number


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: save and stop at the next logged step; a second one stops at once.

    Waiting for a logged step keeps the logged losses equal to those of an uninterrupted run. Only
    for a single process: several could stop at different steps and wait for each other for ever.
    """

    def __init__(self) -> None:
        """Nothing received yet."""
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block and put the old handlers back after it."""
        import threading

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Stopped(number)
        self.received = number
        logger.warning("stopping after the next logged step; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Ask the Trainer to save and stop."""
        if self.received is not None and state.global_step % int(args.logging_steps) == 0:
            control.should_save = True
            control.should_training_stop = True


def check_same_run(file: Path, now: Mapping[str, Any], *, free: Collection[str] = ()) -> None:
    """Refuse to go on with another run than the one that a file describes.

    Args:
        file: JSON that the run wrote when it began.
        now: The same of the run that is asked for.
        free: Names of what may differ.

    Raises:
        UserError: there is no such file, it cannot be read, or something else differs; the message
            names it with both values.
    """
    if not file.is_file():
        raise UserError(f"{file.parent} holds no run to resume (no {file.name}).")
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it holds no options")
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    for name, value in json.loads(json.dumps(now)).items():
        if name not in free and before.get(name) != value:
            raise UserError(
                f"{file.parent} was started with {name} {before.get(name)!r}, not {value!r}; a "
                "resumed run cannot change it."
            )


def resume_point(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run's folder and log which were passed over.

    Args:
        folder: Where the `checkpoint-N` folders are.

    Returns:
        The checkpoint, or None where the run has to start from its first step.

    Raises:
        CheckpointError: there is none, and one that was complete is damaged.
    """
    newest, skipped = newest_complete(folder, "checkpoint-*")
    for passed, reason in skipped:
        logger.warning("skipping %s: %s", passed.name, reason)
    damaged = [reason for passed, reason in skipped if (passed / "COMPLETE").exists()]
    if newest is None and damaged:
        raise CheckpointError(
            f"{folder} has no checkpoint to resume from, and one that was complete is damaged: "
            f"{damaged[0]}. Start again with --overwrite."
        )
    if newest is None:
        logger.warning("%s has no complete checkpoint yet; starting from the first step", folder)
    return newest


def train_to_the_end(trainer: "_Trainer", checkpoint: Path | None = None) -> None:
    """Run a Trainer up to `max_steps`; a single process stops cleanly at a signal.

    Beside `trainer.train`, a resumed run saves as often as its arguments say, not as those of the
    checkpoint did, and takes no step more when the checkpoint is of the last step.

    Args:
        trainer: A `transformers.Trainer`.
        checkpoint: Where to go on, see `resume_point`. Defaults to the first step.

    Raises:
        Stopped: a signal came before the last step; a checkpoint was saved.
    """
    stop = StopOnSignal()
    single = trainer.args.world_size == 1
    for callback in (_Resumption(), stop) if single else (_Resumption(),):
        trainer.add_callback(callback)
    with stop.listening() if single else nullcontext(), suppress(_AllStepsDone):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        logger.warning("stopped at step %d; go on with --resume", trainer.state.global_step)
        raise Stopped(stop.received)


class _AllStepsDone(Exception):
    """The checkpoint resumed from is the last."""


class _Resumption(TrainerCallback):
    """Mends what a resumed Trainer does on its own."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Save as often as is asked for now, not as when the checkpoint was written."""
        state.save_steps = int(args.save_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Take no step after the last one: the Trainer asks only after a step whether to stop."""
        if state.global_step >= state.max_steps:
            raise _AllStepsDone


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Make one line of what the writers of weights and optimisers say when the disk is full.

    Raises:
        UserError: a writer inside the block failed for want of room; its own error is no OSError.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if not any(word in text for word in ("os error", "inline_container", "StreamWriter")):
            raise
        raise UserError(
            f"cannot write to {folder}; the disk may be full: {text[:200]}. What was complete "
            "before stays; make room and go on with --resume."
        ) from error
