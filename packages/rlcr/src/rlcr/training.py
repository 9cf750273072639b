"""One training run in one folder, alone or under torchrun: what `rlcr train` does.

train_options.json  what was asked for
metrics.jsonl       one line per log
warmup/             the SFT warm-up's model, if one was asked for; complete with its marker
checkpoint-N/       complete only with its COMPLETE marker; resume takes the newest complete one
final/              model (or adapter) and tokenizer
README.md           TRL's model card
"""

import dataclasses
import logging
import shutil
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from rlcr.config import PRESETS, RLCRConfig
from rlcr.options import TrainOptions
from rlcr.toy import NoisySensor
from rlcr.trainer import RLCRTrainer, sft_warmup
from tenfold_common.atomic import (
    is_complete,
    locked_folder,
    mark_complete,
    prepare_output_dir,
    write_json,
)
from tenfold_common.device import resolve_device
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import require
from tenfold_common.trainer import (
    MetricsFile,
    check_same_run,
    delete_folder,
    disk_errors,
    resume_point,
    train_to_the_end,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OPTIONS_FILE = "train_options.json"
FINAL = "final"
TOY_ROWS = 20_000
_TOY_TRAIN, _TOY_WARMUP = 2_000_003, 1_000_003
# What may differ between a run and its continuation without changing the steps asked for.
_FREE_ON_RESUME = ("save_steps", "device")
_OWN = ("output_dir", "method", "max_steps", "learning_rate", "save_steps", "seed", "use_cpu")


def train(options: TrainOptions) -> Path:
    """Train one model and return its final folder.

    Args:
        options: What to do.

    Returns:
        `output_dir/final`: loads with transformers (or peft, with `peft_rank`).

    Raises:
        UserError: an option, the data, the model or the folder does not fit, and nothing was
            written; or a file cannot be written, as on a full disk.
        CheckpointError: `resume` was asked for and every complete checkpoint is damaged.
        Stopped: a signal came; a checkpoint was saved. It is a `KeyboardInterrupt`.
    """
    options = options.checked()
    out = Path(str(options.output_dir))
    arguments = training_arguments(options)
    main = arguments.process_index == 0
    if main and options.resume:
        check_same_run(out / OPTIONS_FILE, _portable(options), free=_FREE_ON_RESUME)
    tokenizer, dataset = _tokenizer(options), training_data(options)
    with locked_folder(out) if main else nullcontext():
        with arguments.main_process_first(desc="preparing the output folder"):
            if main:
                prepare_output_dir(
                    out, resume=options.resume, overwrite=options.overwrite,
                    inputs=[options.model, options.data, options.warmup_data],
                )  # fmt: skip
                write_json(out / OPTIONS_FILE, _portable(options))
        with disk_errors(out):
            return _train_in(out, options, arguments, tokenizer, dataset)


def _train_in(
    out: Path,
    options: TrainOptions,
    arguments: RLCRConfig,
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset",
) -> Path:
    """Warm up, train and save in a folder that is ready."""
    main = arguments.process_index == 0
    final = out / FINAL
    if options.resume and is_complete(final):
        logger.info("%s is complete; nothing to do", final)
        return final
    checkpoint = resume_point(out) if options.resume else None
    model = _model(options, out, arguments, tokenizer)
    trainer = RLCRTrainer(
        model,
        arguments,
        dataset,
        processing_class=tokenizer,
        callbacks=[MetricsFile(out / "metrics.jsonl")],
        peft_config=_peft_config(options),
    )
    trainer.remove_callback(PrinterCallback)
    logger.info(
        "%s, %d rows, %d steps of %d completions%s",
        arguments.method,
        len(dataset),
        arguments.max_steps,
        arguments.generation_batch_size,
        f", resuming from {checkpoint.name}" if checkpoint else "",
    )
    train_to_the_end(trainer, checkpoint)
    unfinished = out / f".{FINAL}.unfinished"
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if main:
        tokenizer.save_pretrained(unfinished)
        write_json(unfinished / OPTIONS_FILE, _portable(options))
        write_json(
            unfinished / "alarms.json",
            [dataclasses.asdict(alarm) for alarm in trainer.monitor.alarms],
        )
        mark_complete(unfinished)
        delete_folder(final)
        unfinished.replace(final)
    trainer.accelerator.wait_for_everyone()
    return final


def training_arguments(options: TrainOptions) -> RLCRConfig:
    """Translate the options into an `RLCRConfig`.

    Raises:
        UserError: a field is unknown, has an option of its own, or values do not fit.
    """
    known = RLCRConfig.__dataclass_fields__
    for name in options.training_args:
        if name in _OWN:
            raise UserError(f"training_args has {name}; use --{name} instead.")
        if name not in known:
            raise UserError(
                f"training_args has an unknown name {name!r}.{suggest(name, sorted(known))}"
            )
    preset = options.preset or ("tiny" if options.data == "toy" else None)
    device, why = resolve_device(options.device)
    logger.info("device %s (%s)", device, why)
    values: dict[str, Any] = dict(PRESETS[preset]) if preset else {}
    if device.type == "cpu":
        values |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        values.pop("gradient_checkpointing_kwargs", None)
    values |= {
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "trust_remote_code": options.trust_remote_code,
        "seed": options.seed,
        "save_steps": options.save_steps or 50,
    }
    for name in ("method", "max_steps", "learning_rate"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    values |= options.training_args
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*use_cpu.*")
            return RLCRConfig(output_dir=str(options.output_dir), **values)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the training arguments do not fit: {' '.join(str(error).split())}"
        ) from error


def training_data(options: TrainOptions) -> "Dataset":
    """Read the prompts and golds, or draw the toy's.

    Raises:
        UserError: the file does not fit.
    """
    from rlcr.data import from_rows
    from rlcr.files import read_rows

    if options.data == "toy":
        task = NoisySensor()
        return task.dataset(task.draw(TOY_ROWS, _TOY_TRAIN + options.seed))
    return from_rows(
        read_rows(str(options.data)),
        gold_column=str(options.training_args.get("gold_column", "answer")),
        format=str(options.training_args.get("format", "tabc")),
        long=options.long_prompt,
        plain=options.plain,
    )


def _tokenizer(options: TrainOptions) -> "PreTrainedTokenizerBase":
    if options.model == "toy":
        return NoisySensor().tokenizer()
    try:
        return AutoTokenizer.from_pretrained(
            options.model, padding_side="left", trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no tokenizer loads from {options.model!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _model(
    options: TrainOptions,
    out: Path,
    arguments: RLCRConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> "PreTrainedModel":
    """Load or make the model, and warm it up once per folder."""
    folder = out / "warmup"
    if options.warmup_steps and is_complete(folder):
        return _load(str(folder), options, arguments)
    if options.model == "toy":
        model: PreTrainedModel = NoisySensor().model(options.seed)
    else:
        model = _load(str(options.model), options, arguments)
    if not options.warmup_steps:
        return model
    rows = _warmup_data(options)
    unfinished = out / ".warmup.unfinished"
    model = sft_warmup(
        model,
        rows,
        str(unfinished),
        tokenizer,
        remove_callbacks=(PrinterCallback,),
        max_steps=options.warmup_steps,
        learning_rate=options.warmup_learning_rate,
        per_device_train_batch_size=256 if options.warmup_data == "toy" else 8,
        seed=options.seed,
        disable_tqdm=arguments.disable_tqdm,
        use_cpu=arguments.use_cpu,
        bf16=arguments.bf16,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    if arguments.process_index == 0:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        mark_complete(unfinished)
        delete_folder(folder)
        unfinished.replace(folder)
    return model


def _warmup_data(options: TrainOptions) -> "Dataset":
    from datasets import Dataset

    from rlcr.data import check_columns
    from rlcr.files import read_rows

    if options.warmup_data == "toy":
        return NoisySensor().warmup(256 * options.warmup_steps, _TOY_WARMUP + options.seed)
    rows = Dataset.from_list(read_rows(str(options.warmup_data)))
    check_columns(rows, ["prompt", "completion"])
    return rows.select_columns(["prompt", "completion"])


def _load(name: str, options: TrainOptions, arguments: RLCRConfig) -> "PreTrainedModel":
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=options.trust_remote_code,
            dtype=torch.float32 if arguments.use_cpu else "auto",
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"no model loads from {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _peft_config(options: TrainOptions) -> Any:
    if options.peft_rank is None:
        return None
    peft = require("peft", extra="peft", package="rlcr", purpose="--peft_rank")
    return peft.LoraConfig(
        r=options.peft_rank,
        lora_alpha=2 * options.peft_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _portable(options: TrainOptions) -> dict[str, Any]:
    values = options.to_dict()
    for name in ("data", "warmup_data", "model"):
        value = values[name]
        if value and Path(value).exists():
            values[name] = str(Path(value).resolve())
    return values
