"""Training through `transformers.Trainer`: torchrun, accelerate and FSDP work as elsewhere.

out/run/train_config.json   what was asked for
out/run/metrics.jsonl       one line per log
out/run/checkpoint-N/       complete only with its COMPLETE marker; resume takes the newest complete
one out/run/final/              model, tokenizer, train_config.json, evaluation.json: for `generate`
and `eval`
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from path_attn.config import TrainConfig
from path_attn.configuration_path_attn import (
    PaTHConfig,
    count_parameters,
    matched_intermediate_size,
)
from path_attn.modeling_path_attn import PaTHForCausalLM
from path_attn.tasks import task_dataset, task_tokenizer
from tenfold_common.atomic import (
    atomic_write,
    is_complete,
    mark_complete,
    newest_complete,
    prepare_output_dir,
    verify,
)
from tenfold_common.device import resolve_device, resolve_dtype
from tenfold_common.errors import CheckpointError, UserError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.json"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
FINAL = "final"

# What may differ between a run and its continuation without changing the losses of the steps
# already asked for.
_FREE_ON_RESUME = {
    "save_steps", "save_total_limit", "device", "training_args", "backend",
}  # fmt: skip
# TrainingArguments that `TrainConfig` decides, and the option that does it.
_OWN_ARGUMENTS = {
    "output_dir": "output_dir",
    "max_steps": "max_steps",
    "num_train_epochs": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_ratio",
    "lr_scheduler_type": "lr_scheduler_type",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "logging_steps": "logging_steps",
    "logging_strategy": "logging_steps",
    "save_steps": "save_steps",
    "save_strategy": "save_steps",
    "save_total_limit": "save_total_limit",
    "save_only_model": "save_steps",
    "resume_from_checkpoint": "resume",
    "use_cpu": "device",
    "bf16": "dtype",
    "fp16": "dtype",
}


class AtomicTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoint folders are either marked complete or never used.

    A checkpoint gets its marker after everything is on the disk, and older ones are deleted after
    that, so a kill at any moment leaves the last complete one.

    Args:
        keep: How many complete checkpoints to keep, at least 2.
        **arguments: Those of `transformers.Trainer`.
    """

    def __init__(self, *, keep: int = 2, **arguments: Any) -> None:
        """Take the place of the Trainer's own deletion of old checkpoints."""
        if keep < 2:
            raise UserError(f"keep is {keep}; it must be at least 2.")
        super().__init__(**arguments)
        if self.args.save_total_limit is not None:
            raise UserError(
                "AtomicTrainer deletes old checkpoints itself; leave save_total_limit at None and "
                "set keep."
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
            _delete(folder)  # what an earlier, killed run left under the same name
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
                    _delete(old)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first."""
    found = [
        p
        for p in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _delete(folder: Path) -> None:
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


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: save and stop at the next logged step; a second one stops at once.

    Waiting for a logged step keeps the logged losses equal to those of an uninterrupted run. Only
    for a single
    process: several could stop at different steps and wait for each other for ever.
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
            raise KeyboardInterrupt
        self.received = number
        logger.warning("stopping after the next logged step; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Ask the Trainer to save and stop."""
        if self.received is not None and state.global_step % int(args.logging_steps) == 0:
            control.should_save = True
            control.should_training_stop = True


def train(config: TrainConfig) -> Path:
    """Train one model and return its final folder.

    Args:
        config: What to do; None fields take the task's defaults. `output_dir` is needed.

    Returns:
        `output_dir/final`: loads with `PaTHForCausalLM.from_pretrained` and `AutoTokenizer`.

    Raises:
        UserError: an option, the data or the output folder does not fit.
        CheckpointError: `resume` was asked for and every checkpoint that was complete is damaged.
        KeyboardInterrupt: stopped by a signal, after saving a checkpoint.
    """
    from path_attn.evaluate import evaluate_model

    config = config.resolved()
    if config.output_dir is None:
        raise UserError("output_dir is needed: the folder for checkpoints and the final model.")
    out = Path(config.output_dir)
    arguments = training_arguments(config)
    main = arguments.process_index == 0
    tokenizer = task_tokenizer(config)
    steps_data = (
        (config.max_steps or 1) * arguments.train_batch_size * arguments.gradient_accumulation_steps
    )
    data = task_dataset(config, tokenizer, size=steps_data * arguments.world_size)
    validation = task_dataset(
        config, tokenizer, split="validation", size=4 * arguments.eval_batch_size
    )

    with arguments.main_process_first(desc="preparing the output folder"):
        if main:
            _prepare_folder(config, out)
    final = out / FINAL
    if config.resume and is_complete(final):
        logger.info("%s is complete; nothing to do", final)
        return final
    checkpoint = _resume_point(out) if config.resume else None

    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    stop = StopOnSignal()
    callbacks: list[TrainerCallback] = [MetricsFile(out / METRICS_FILE)]
    single = arguments.world_size == 1
    trainer = AtomicTrainer(
        keep=config.save_total_limit,
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[*callbacks, stop] if single else callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if main:
        _log_start(config, model, arguments, checkpoint)
    if single:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        logger.warning("stopped at step %d; go on with --resume", trainer.state.global_step)
        raise KeyboardInterrupt

    unfinished = out / f".{FINAL}.unfinished"
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if main:
        tokenizer.save_pretrained(unfinished)
        _write_json(unfinished / CONFIG_FILE, _portable(config))
        logger.info("evaluating")
        report = evaluate_model(_whole_model(unfinished, arguments.device), tokenizer, config)
        report["training"] = {
            "steps": trainer.state.global_step,
            "loss_last_logged": next(
                (r["loss"] for r in reversed(trainer.state.log_history) if "loss" in r), None
            ),
            "parameters": count_parameters(model.config),
        }
        _write_json(unfinished / EVALUATION_FILE, report)
        mark_complete(unfinished)
        _delete(final)
        unfinished.replace(final)
    trainer.accelerator.wait_for_everyone()
    return final


def train_each(config: TrainConfig, position_encodings: list[str]) -> Path:
    """Train one model per position encoding: same data, steps and number of parameters.

    Args:
        config: As for `train`; each model goes to `output_dir/<encoding>`.
        position_encodings: Which ones, each once.

    Returns:
        `output_dir/comparison.json`; beside it `comparison.md` and, with the extra `plot`, a
        figure.

    Raises:
        UserError: as `train`, or an encoding comes twice.
    """
    from path_attn.evaluate import comparison_markdown, write_comparison_plot
    from tenfold_common.optional import is_available

    if len(set(position_encodings)) < len(position_encodings):
        raise UserError(f"position_encoding names one twice: {' '.join(position_encodings)}.")
    if config.output_dir is None:
        raise UserError("output_dir is needed: the folder for the models and the comparison.")
    configs = [
        dataclasses.replace(
            config,
            position_encoding=name,
            output_dir=str(Path(config.output_dir) / name),
            overwrite=False,
        )
        for name in position_encodings
    ]
    for one in configs:
        one.resolved()
    out = Path(config.output_dir)
    if int(os.environ.get("RANK", "0")) == 0:
        prepare_output_dir(out, resume=config.resume, overwrite=config.overwrite)
    reports = {}
    for one in configs:
        logger.info("position encoding %s", one.position_encoding)
        fresh = config.resume and not Path(one.output_dir or "").exists()
        final = train(dataclasses.replace(one, resume=config.resume and not fresh))
        reports[one.position_encoding] = json.loads(
            (final / EVALUATION_FILE).read_text(encoding="utf-8")
        )
    settings = _portable(config.resolved())
    if config.data is not None:
        settings["data"] = Path(config.data).name  # the file goes to others; a path would not fit
    del settings["position_encoding"]
    comparison = {"config": settings, "results": reports}
    if int(os.environ.get("RANK", "0")) == 0:
        _write_json(out / "comparison.json", comparison)
        with atomic_write(out / "comparison.md", "w") as file:
            file.write(comparison_markdown(comparison))
        if is_available("matplotlib"):
            write_comparison_plot(comparison, out)
        else:
            logger.warning("no figure: it needs matplotlib (pip install 'path-attn[plot]')")
    return out / "comparison.json"


def build_model(config: TrainConfig, tokenizer: "PreTrainedTokenizerBase") -> PaTHForCausalLM:
    """Make the model of a resolved config, with as many parameters as the PaTH model.

    Weights come from torch's global random generator: seed it first.
    """
    return PaTHForCausalLM(model_config(config, tokenizer))


def model_config(config: TrainConfig, tokenizer: "PreTrainedTokenizerBase") -> PaTHConfig:
    """Return the model configuration, its MLP width chosen for equal parameter counts."""
    special: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }

    def make(position_encoding: str, intermediate_size: int | None) -> PaTHConfig:
        return PaTHConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size or 0,
            intermediate_size=intermediate_size,
            num_hidden_layers=config.num_hidden_layers or 0,
            num_attention_heads=config.num_attention_heads or 0,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.length or 0,
            position_encoding=position_encoding,
            gate_scale=config.gate_scale,
            num_reflections=config.num_reflections,
            window=config.window,
            backend=config.backend,
            **special,
        )

    reference = make("path", config.intermediate_size)
    if config.position_encoding == "path":
        return reference
    own = make(config.position_encoding, reference.intermediate_size)
    return make(config.position_encoding, matched_intermediate_size(own, reference))


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Translate a resolved config into `transformers.TrainingArguments`."""
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    for name in config.training_args:
        if name in _OWN_ARGUMENTS:
            raise UserError(
                f"training_args has {name}; use the option {_OWN_ARGUMENTS[name]} instead."
            )
        if name not in known:
            raise UserError(
                f"training_args has an unknown name {name!r}.{suggest(name, sorted(known))}"
            )
    device, why = resolve_device(config.device)
    dtype, why_dtype = resolve_dtype(config.dtype, device)
    logger.info("device %s (%s), %s (%s)", device, why, dtype, why_dtype)
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "warmup_steps": max(1, round(config.warmup_ratio * (config.max_steps or 1)))
        if config.warmup_ratio
        else 0,
        "lr_scheduler_type": config.lr_scheduler_type,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
        **config.training_args,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the training arguments do not fit: {' '.join(str(error).split())}"
        ) from error


def read_run_config(folder: str | Path) -> TrainConfig:
    """Read the `train_config.json` of a run or of its final folder.

    Raises:
        UserError: there is none, or it is not valid.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not a training run of path-attn: cannot read {CONFIG_FILE} ({error})."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping.")
    return TrainConfig.from_dict(values, source=str(path))


def _prepare_folder(config: TrainConfig, out: Path) -> None:
    """Make the folder, or check that the run in it is the one being resumed."""
    if config.resume and (out / CONFIG_FILE).is_file():
        before, now = read_run_config(out).to_dict(), _portable(config)
        for name in now:
            if name not in _FREE_ON_RESUME and before[name] != now[name]:
                raise UserError(
                    f"{out} was started with {name} {before[name]!r}, not {now[name]!r}; a resumed "
                    "run cannot change it."
                )
    elif config.resume:
        raise UserError(f"{out} holds no run to resume (no {CONFIG_FILE}).")
    prepare_output_dir(out, resume=config.resume, overwrite=config.overwrite)
    try:
        _write_json(out / CONFIG_FILE, _portable(config))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


def _portable(config: TrainConfig) -> dict[str, Any]:
    """Return the config as stored: the data path absolute, flags of this one call left out."""
    values = config.to_dict()
    if config.data is not None:
        values["data"] = str(Path(config.data).resolve())
    return {k: v for k, v in values.items() if k not in ("resume", "overwrite", "output_dir")}


def _resume_point(out: Path) -> Path | None:
    """Return the newest complete checkpoint and say which were passed over."""
    newest, skipped = newest_complete(out, "checkpoint-*")
    for folder, reason in skipped:
        logger.warning("skipping %s: %s", folder.name, reason)
    damaged = [(folder, reason) for folder, reason in skipped if (folder / "COMPLETE").exists()]
    if newest is None and damaged:
        raise CheckpointError(
            f"{out} has no checkpoint to resume from, and one that was complete is damaged: "
            f"{damaged[0][1]}. "
            "Start again with --overwrite."
        )
    if newest is None:
        logger.warning("%s has no complete checkpoint yet; starting from the first step", out)
    return newest


def _log_start(
    config: TrainConfig,
    model: PaTHForCausalLM,
    arguments: TrainingArguments,
    checkpoint: Path | None,
) -> None:
    logger.info(
        "task %s, position encoding %s, %d parameters (MLP width %d), %d steps of %d sequences of "
        "%d%s",
        config.task,
        config.position_encoding,
        count_parameters(model.config),
        model.config.intermediate_size,
        config.max_steps,
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        config.length,
        f", resuming from {checkpoint.name}" if checkpoint else "",
    )


def _whole_model(folder: Path, device: torch.device) -> PaTHForCausalLM:
    """Load what was just saved: the final check that the folder works, and unsharded under FSDP."""
    return PaTHForCausalLM.from_pretrained(folder).to(device)  # pyright: ignore[reportArgumentType]


def _write_json(path: Path, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def load_run(
    folder: str | Path, device: str = "auto"
) -> "tuple[PaTHForCausalLM, PreTrainedTokenizerBase, Path]":
    """Load model and tokenizer of a run, of its `final` folder or of any saved PaTH model.

    Args:
        folder: `output_dir` of a finished run, its `final`, or a folder with config.json and
            weights.
        device: "auto", "cpu" or "cuda".

    Returns:
        The model in evaluation mode, the tokenizer and the folder they came from.

    Raises:
        UserError: not a folder, no model in it, or no tokenizer.
        CheckpointError: files differ from the folder's marker, or the weights do not load.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{path} is {'a file' if path.exists() else 'not there'}; give the folder of a trained "
            "model."
        )
    if not (path / "config.json").is_file() and (path / FINAL / "config.json").is_file():
        path = path / FINAL
    if not (path / "config.json").is_file():
        hint = (
            " The training run in it is not finished; go on with --resume."
            if (path / CONFIG_FILE).is_file()
            else ""
        )
        raise UserError(f"{path} is not a model folder: it has no config.json.{hint}")
    if (path / "COMPLETE").is_file():
        verify(path)
    try:
        model = PaTHForCausalLM.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not load: {' '.join(str(error).split())[:300]}"
        ) from error
    chosen, why = resolve_device(device)
    logger.info("device %s (%s)", chosen, why)
    return model.to(chosen).eval(), tokenizer, path  # pyright: ignore[reportArgumentType]
