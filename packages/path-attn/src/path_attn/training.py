"""Training through `transformers.Trainer`, in one process or several.

The tests run one process, and two gloo processes started by torchrun. Other options of
`TrainingArguments`, those of FSDP and DeepSpeed among them, are passed through untested.

What a run leaves in its folder:

    train_config.json   what was asked for
    metrics.jsonl       one line per log
    checkpoint-N/       complete only with its COMPLETE marker; resume takes the newest complete one
    final/              for `generate` and `eval`: model, tokenizer, train_config.json and
                        evaluation.json
"""

import dataclasses
import json
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from path_attn.checks import choose_backend
from path_attn.config import COMPARISON_FILE, TrainConfig, read_config_file
from path_attn.configuration_path_attn import (
    PaTHConfig,
    count_parameters,
    matched_intermediate_size,
)
from path_attn.files import check_model_folder
from path_attn.modeling_path_attn import PaTHForCausalLM
from path_attn.tasks import task_dataset, task_tokenizer
from tenfold_common.atomic import (
    atomic_write,
    is_complete,
    locked_folder,
    mark_complete,
    prepare_output_dir,
    verify,
    write_json,
)
from tenfold_common.device import resolve_device, resolve_dtype
from tenfold_common.errors import CheckpointError, UserError, suggest
from tenfold_common.trainer import (
    AtomicCheckpoints,
    MetricsFile,
    check_same_run,
    delete_folder,
    disk_errors,
    resume_point,
    train_to_the_end,
)

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


class AtomicTrainer(AtomicCheckpoints, Trainer):
    """A `transformers.Trainer` whose checkpoint folders are either marked complete or unused."""


def train(config: TrainConfig) -> Path:
    """Train one model and return its final folder.

    Args:
        config: What to do; None fields take the task's defaults. `output_dir` is needed.

    Returns:
        `output_dir/final`: loads with `PaTHForCausalLM.from_pretrained` and `AutoTokenizer`.

    Raises:
        UserError: an option, the data or the output folder does not fit, or another run writes to
            the folder. Nothing was written.
        CheckpointError: `resume` was asked for and every checkpoint that was complete is damaged.
        Stopped: a signal came; a checkpoint was saved. It is a `KeyboardInterrupt`.
    """
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

    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)  # before anything is written: it may not fit
    _check_backend(model.config, arguments.device)

    if main and config.resume:
        _check_same_run(config, out)
    with locked_folder(out) if main else nullcontext():
        with arguments.main_process_first(desc="preparing the output folder"):
            if main:
                _prepare_folder(config, out)
        with disk_errors(out):
            return _train_in(out, config, arguments, tokenizer, model, data, validation)


def _train_in(
    out: Path,
    config: TrainConfig,
    arguments: TrainingArguments,
    tokenizer: "PreTrainedTokenizerBase",
    model: PaTHForCausalLM,
    data: Dataset[dict[str, torch.Tensor]],
    validation: Dataset[dict[str, torch.Tensor]],
) -> Path:
    """Train, evaluate and save in a folder that is ready; return its final folder."""
    from path_attn.evaluate import evaluate_model

    main = arguments.process_index == 0
    final = out / FINAL
    if config.resume and is_complete(final):
        logger.info("%s is complete; nothing to do", final)
        return final
    checkpoint = resume_point(out) if config.resume else None

    trainer = AtomicTrainer(
        keep=config.save_total_limit,
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[MetricsFile(out / METRICS_FILE)],
    )
    trainer.remove_callback(PrinterCallback)
    if main:
        _log_start(config, model, arguments, checkpoint)
    train_to_the_end(trainer, checkpoint)
    unfinished = out / f".{FINAL}.unfinished"
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if main:
        tokenizer.save_pretrained(unfinished)
        write_json(unfinished / CONFIG_FILE, _portable(config))
        report = evaluate_model(_whole_model(unfinished, arguments.device), tokenizer, config)
        report["training"] = {
            "steps": trainer.state.global_step,
            "loss_last_logged": next(
                (r["loss"] for r in reversed(trainer.state.log_history) if "loss" in r), None
            ),
            "parameters": count_parameters(model.config),
        }
        write_json(unfinished / EVALUATION_FILE, report)
        mark_complete(unfinished)
        delete_folder(final)
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
    out = Path(config.output_dir)
    main = int(os.environ.get("RANK", "0")) == 0
    for one in configs:  # before anything is written
        checked = one.resolved()
        built = model_config(checked, task_tokenizer(checked))
        _check_backend(built, resolve_device(config.device).value)
        folder = Path(one.output_dir or "")
        if main and config.resume and (folder / CONFIG_FILE).is_file():
            _check_same_run(checked, folder)
    with locked_folder(out) if main else nullcontext():
        if main:
            prepare_output_dir(
                out,
                resume=config.resume,
                overwrite=config.overwrite,
                inputs=[config.data, config.tokenizer],
            )
            told = {**_portable(config.resolved()), "position_encoding": position_encodings}
            write_json(out / COMPARISON_FILE, told)
        return _train_each_in(out, config, configs)


def _train_each_in(out: Path, config: TrainConfig, configs: list[TrainConfig]) -> Path:
    """Train the models of a comparison in a folder that is ready, and write the comparison."""
    from path_attn.evaluate import comparison_markdown, write_comparison_plot
    from tenfold_common.optional import is_available

    reports = {}
    for one in configs:
        logger.info("position encoding %s", one.position_encoding)
        fresh = config.resume and not (out / one.position_encoding / CONFIG_FILE).is_file()
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
        write_json(out / "comparison.json", comparison)
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
    accumulation = config.training_args.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise UserError(
            f"training_args has gradient_accumulation_steps {accumulation!r}; it must be a whole "
            "number of at least 1."
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


def _check_backend(config: PaTHConfig, device: torch.device) -> None:
    """Raise `UserError` if the back-end that was asked for does not run on the device."""
    if config.backend == "triton":
        head = torch.zeros(1, 1, 1, config.head_dim or 1, device=device)
        choose_backend(config.backend, head, head)


def _check_same_run(config: TrainConfig, out: Path) -> None:
    """Raise `UserError` unless the run in a folder is the one being resumed."""
    if (out / COMPARISON_FILE).is_file():
        names = " ".join(read_config_file(out / COMPARISON_FILE).get("position_encoding", []))
        raise UserError(
            f"{out} holds a comparison of {names}; go on with all of them, or with one in its own "
            f"folder: --output_dir {out / config.position_encoding}."
        )
    check_same_run(out / CONFIG_FILE, _portable(config), free=_FREE_ON_RESUME)


def _prepare_folder(config: TrainConfig, out: Path) -> None:
    """Empty the folder or leave its content, as asked for, and store the configuration."""
    prepare_output_dir(
        out,
        resume=config.resume,
        overwrite=config.overwrite,
        inputs=[config.data, config.tokenizer],
    )
    try:
        write_json(out / CONFIG_FILE, _portable(config))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


def _portable(config: TrainConfig) -> dict[str, Any]:
    """Return the config as stored: the data path absolute, flags of this one call left out."""
    values = config.to_dict()
    if config.data is not None:
        values["data"] = str(Path(config.data).resolve())
    return {k: v for k, v in values.items() if k not in ("resume", "overwrite", "output_dir")}


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
    check_model_folder(path)
    models = [p.parent.parent for p in sorted(path.glob(f"*/{FINAL}/config.json"))]
    if models and not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} holds several models; give one of {', '.join(str(p) for p in models)}."
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
