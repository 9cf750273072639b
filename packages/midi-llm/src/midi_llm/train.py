"""Training by transformers' Trainer: checkpoints that survive a kill, two learning rates, LoRA."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midi_llm.data import MidiDataCollator, check_rows
from midi_llm.modeling import TextMidiProcessor
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, TrainingArguments


RUN_FILE = "train_config.json"
_FREE = ("steps", "save_every", "log_every")  # may change when a run goes on


@dataclass(frozen=True)
class TrainConfig:
    """How to train; AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1.

    MIDI-LLM's own settings are not published: these are ours.

    Attributes:
        steps: Optimiser steps.
        lr: Of all weights but the embeddings; cosine to a tenth, after warming up.
        music_lr: Of the embeddings and the head, where the new rows are.
        batch_size: Rows of a step on one process.
        accumulation: Steps of gradients that are added up.
        warmup: Share of the steps.
        save_every: Steps between checkpoints.
        log_every: Steps between logs.
        bf16: Whether to compute in bfloat16.
        seed: Of the order.
    """

    steps: int = 1000
    lr: float = 1e-4
    music_lr: float = 3e-4
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.02
    save_every: int = 500
    log_every: int = 10
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        for name in ("steps", "batch_size", "accumulation", "save_every", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("lr", "music_lr"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} must be over 0 and under 1, not {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup must be a share from 0 to under 1, not {self.warmup!r}")

    def arguments(self, folder: Path) -> "TrainingArguments":
        """Return what transformers' Trainer takes."""
        import torch
        from transformers import TrainingArguments

        return TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            learning_rate=self.lr,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=max(1, round(self.warmup * self.steps)),
            save_steps=self.save_every,
            logging_steps=self.log_every,
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=self.seed,
            data_seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            average_tokens_across_devices=True,
        )


def make_trainer(
    model: "PreTrainedModel", dataset: "Dataset", folder: "str | Path", config: TrainConfig
) -> Any:
    """Return a Trainer of transformers for packed rows; `train` runs it, and so may you.

    Args:
        model: With music ids.
        dataset: Of `prepare_cpt` or `prepare_sft`.
        folder: For checkpoints and `metrics.jsonl`.
        config: How to train.
    """
    import torch
    from transformers import PrinterCallback, Trainer

    from tenfold_common.trainer import AtomicCheckpoints, MetricsFile

    class MidiTrainer(AtomicCheckpoints, Trainer):
        def create_optimizer(self, *arguments: Any, **named: Any) -> Any:
            if self.optimizer is None:
                groups = parameter_groups(model, config)
                self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
            return self.optimizer

    folder = Path(folder)
    trainer = MidiTrainer(
        model=model,
        args=config.arguments(folder),
        train_dataset=dataset,
        data_collator=MidiDataCollator(),
    )
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    trainer.remove_callback(PrinterCallback)  # it repeats what is logged
    return trainer


def parameter_groups(model: "PreTrainedModel", config: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: embeddings and head at `music_lr`; norms and biases do not decay."""
    tables = {id(model.get_input_embeddings().weight)}
    head: Any = model.get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    groups: dict[tuple[float, float], list[Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            lr = config.music_lr if id(parameter) in tables else config.lr
            groups.setdefault((lr, 0.1 if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()
    ]


def train(
    model: "PreTrainedModel",
    processor: TextMidiProcessor,
    dataset: "Dataset",
    folder: "str | Path",
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train a model and write it, with its processor, into `folder/model`.

    Under torchrun or accelerate every process calls it with the same arguments.

    Args:
        model: With music ids.
        processor: Saved beside it.
        dataset: Of `prepare_cpt` or `prepare_sft`.
        folder: New or empty.
        config: How to train.
        resume: Go on from the newest complete checkpoint of the folder; only the number of steps
            and how often to log and save may change.
        overwrite: Start anew where the folder holds an earlier run, which is deleted; refused if
            the model or the dataset was loaded from there.

    Returns:
        The folder of the model.

    Raises:
        UserError: the folder is in use or of another run, or the model, the data and the
            processor do not fit.
        CheckpointError: a checkpoint to resume from is damaged.
    """
    from tenfold_common.atomic import locked_folder, prepare_output_dir, write_json
    from tenfold_common.trainer import (
        check_same_run,
        disk_errors,
        resume_point,
        train_to_the_end,
    )

    config, folder, main = config or TrainConfig(), Path(folder), not _is_worker()
    processor.check_model(model)
    check_rows(dataset, processor)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no weight of the model is to be trained; is it an adapter's folder? Merge it with its "
            "model first, or train that one"
        )
    described = _described(config, model, dataset)
    read = [model.config.name_or_path or None, *(f["filename"] for f in dataset.cache_files)]
    with locked_folder(folder) if main else nullcontext(), disk_errors(folder):
        if main:
            if resume and any(folder.iterdir()):
                check_same_run(folder / RUN_FILE, described, free=_FREE)
            prepare_output_dir(folder, resume=resume, overwrite=overwrite, inputs=read)
        model.config.use_cache = False
        trainer = make_trainer(model, dataset, folder, config)
        point = resume_point(folder) if resume else None
        if point is not None and int(point.name.rpartition("-")[2]) > config.steps:
            raise UserError(f"the run is at {point.name} already, beyond {config.steps} steps")
        if trainer.args.should_save:
            write_json(folder / RUN_FILE, described)
        train_to_the_end(trainer, point)
        model.config.use_cache = True
        target = folder / "model"
        if trainer.args.should_save:
            model.save_pretrained(target)
            processor.save_pretrained(target)
    return target


def _described(config: TrainConfig, model: "PreTrainedModel", dataset: "Dataset") -> dict[str, Any]:
    """Return what a run is, as its folder keeps it; of the data three rows stand for all."""
    some = [dataset[i]["input_ids"] for i in (0, len(dataset) // 2, len(dataset) - 1)]
    return {
        **asdict(config),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows": len(dataset),
        "data": sha256(repr(some).encode()).hexdigest(),
    }


def _is_worker() -> bool:
    """Whether this is one of several processes, and not the first."""
    import os

    return int(os.environ.get("RANK", "0")) > 0


def lora_config(
    processor: TextMidiProcessor, model: "PreTrainedModel", *, rank: int = 16, alpha: int = 32
) -> "LoraConfig":
    """Return a LoRA config that also trains the music rows of the embedding, and no other row.

    Args:
        processor: Says which rows are music.
        model: Expanded; tied heads follow the embedding.
        rank: Of the adapters of all linear layers but the head.
        alpha: Their scale times the rank.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    from tenfold_common.optional import require

    require("peft", extra="peft", package="midi-llm")
    from peft import LoraConfig

    rows = list(range(processor.offset, processor.offset + processor.amt.size))
    names = {"embed_tokens": rows}
    if not model.config.tie_word_embeddings:
        names["lm_head"] = rows
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=names,
    )  # fmt: skip
