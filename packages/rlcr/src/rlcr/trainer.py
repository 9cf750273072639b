"""`RLCRTrainer`: TRL's GRPOTrainer with a reward for well-placed confidence, and its warm-up."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlcr.config import RLCRConfig
from rlcr.data import check_columns, drop_long
from rlcr.monitor import Alarm, CalibrationWarning, Monitor, window_metrics
from rlcr.parsing import parse_completion, render_completion
from rlcr.rewards import RLCRReward
from tenfold_common.errors import UserError
from tenfold_common.optional import require
from tenfold_common.trainer import AtomicCheckpoints

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class RLCRTrainer(AtomicCheckpoints, GRPOTrainer):
    """GRPO with the reward R = correctness + calibration, gated by the format (arXiv 2507.16806).

    Everything else is `trl.GRPOTrainer`: generation with transformers or vLLM, accelerate, peft,
    checkpoints. Of the reward's metrics, accuracy, Brier score and confidence are taken over all
    completions since the last log and joined by `rlcr/ece` and `rlcr/auroc`; known failures raise
    a `CalibrationWarning` once (`trainer.monitor.alarms`). A checkpoint gets a marker when it is
    whole; the newest two are kept.

    Args:
        model: A causal language model or the folder or hub name of one.
        args: The settings.
        train_dataset: Columns `prompt` (text, or a list of messages) and the gold column.
        eval_dataset: The same, for evaluation. Defaults to none.
        processing_class: The tokenizer. Defaults to the model's own.
        reward: The reward, for a verifier that a name cannot give. Defaults to what `args` says;
            `args.method` then still decides between `rlcr` and `rlvr` by the reward's own weights.
        extra_reward_funcs: Reward functions added to ours; `args.reward_weights` are theirs.
        callbacks: More callbacks.
        optimizers: Optimizer and scheduler. Defaults to TRL's.
        quantization_config: As for GRPOTrainer.
        peft_config: Train an adapter (needs peft).
        monitor: What raises the alarms. Defaults to `Monitor()`.

    Raises:
        UserError: a column is missing; the tokenizer loses the tags; the shortest legal completion
            does not fit into `max_completion_length`; no prompt is short enough.
        MissingDependencyError: vLLM or peft is asked for and not installed.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RLCRConfig,
        train_dataset: "Dataset",
        eval_dataset: "Dataset | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        reward: RLCRReward | None = None,
        extra_reward_funcs: Sequence[Callable] = (),
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: "PeftConfig | None" = None,
        monitor: Monitor | None = None,
    ) -> None:
        """Check everything that would fail after minutes, then build TRL's trainer."""
        if not isinstance(args, RLCRConfig):
            raise UserError(f"args must be an RLCRConfig, not a {type(args).__name__}.")
        if args.use_vllm:
            require("vllm", extra="vllm", package="rlcr", purpose="use_vllm")
        if peft_config is not None:
            require("peft", extra="peft", package="rlcr", purpose="peft_config")
        self.calibration_reward = reward or args.reward()
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None:
                columns = ["prompt", self.calibration_reward.gold_column]
                if self.calibration_reward.verifier_column is not None:
                    columns.append(self.calibration_reward.verifier_column)
                check_columns(dataset, columns)
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            if not name:
                raise UserError("the model was not loaded from anywhere; give processing_class.")
            processing_class = AutoTokenizer.from_pretrained(
                name, trust_remote_code=args.trust_remote_code, padding_side="left"
            )
        assert processing_class is not None
        shortest = check_tokenizer(processing_class, self.calibration_reward.format)
        limit = args.max_completion_length
        if limit is not None and limit < shortest:
            raise UserError(
                f"max_completion_length is {limit}, but the shortest legal completion has "
                f"{shortest} tokens with this tokenizer (end of text included)."
            )
        if args.max_prompt_tokens is not None:
            train_dataset = drop_long(train_dataset, processing_class, args.max_prompt_tokens)
            if eval_dataset is not None:
                eval_dataset = drop_long(eval_dataset, processing_class, args.max_prompt_tokens)
        extra = list(extra_reward_funcs)
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(extra)
        if len(weights) != len(extra):
            raise UserError(
                f"reward_weights has {len(weights)} values for {len(extra)} extra reward "
                "functions; the weights of format, correctness and calibration have names of "
                "their own."
            )
        self.monitor = monitor or Monitor()
        self._window: dict[str, list[tuple[list[float], list[float]]]] = {"train": [], "eval": []}
        given = args.reward_weights
        args.reward_weights = [*self.calibration_reward.weights, *weights]
        try:
            super().__init__(
                model=model,
                reward_funcs=[*self.calibration_reward.functions(), *extra],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[*callbacks],
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        finally:
            args.reward_weights = given  # the caller's object stays as it was
        self.add_callback(_MonitorHistory(self.monitor))
        if args.calibration_ramp_steps:
            self.add_callback(_CalibrationRamp(self, args.calibration_ramp_steps))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate and score, and remember what was stated and what was right."""
        output = super()._generate_and_score_completions(inputs)
        extra = self._logs["extra"]  # gathered over all processes; the newest batch is at the end
        mode = self._mode()
        size = len(inputs) * self.accelerator.num_processes
        newest = [
            [_nan(v) for v in list(extra[name])[-size:]]
            for name in ("rlcr_confidence", "rlcr_correct")
        ]
        self._window[mode].append((newest[0], newest[1]))
        return output

    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the live metrics, then look for known failures."""
        mode = self._mode()
        if self._window[mode]:
            confidence = np.array([v for batch, _ in self._window[mode] for v in batch])
            correct = np.array([v for _, batch in self._window[mode] for v in batch])
            self._window[mode].clear()
            for name, value in window_metrics(confidence, correct).items():
                self._metrics[mode][f"rlcr/{name}"] = [value]
        super().log(logs, start_time)
        if mode == "train" and "rlcr/accuracy" in logs:
            for alarm in self.monitor.update(self.state.global_step, logs):
                _announce(alarm)


def _announce(alarm: Alarm) -> None:
    warnings.warn(f"step {alarm.step}: {alarm.message}", CalibrationWarning, stacklevel=3)


def _nan(value: object) -> float:
    return float("nan") if value is None else float(value)  # pyright: ignore[reportArgumentType]


class _MonitorHistory(TrainerCallback):
    """Shows a resumed run's monitor what was logged before; old alarms are not raised again."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Go through the history of the checkpoint."""
        for row in state.log_history:
            if "rlcr/accuracy" in row:
                self.monitor.update(int(row["step"]), row)


class _CalibrationRamp(TrainerCallback):
    """Raises the calibration weight from 0 to its full value over the first steps."""

    def __init__(self, trainer: RLCRTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        names = [f.__name__ for f in trainer.calibration_reward.functions()]
        self.place = names.index("calibration_reward")
        self.full = float(trainer.reward_weights[self.place])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Set the weight of the step that begins; it depends on nothing but the step."""
        share = min(1.0, state.global_step / self.steps)
        self.trainer.reward_weights[self.place] = share * self.full


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, format: str) -> int:
    """Check that a completion comes back from encoding and decoding with its tags.

    TRL decodes completions without special tokens, so tags that are special tokens are lost and
    every completion would count as malformed.

    Args:
        tokenizer: The tokenizer of the policy.
        format: The format of completions.

    Returns:
        The number of tokens of the shortest legal completion, end of text included.

    Raises:
        UserError: the tags do not survive; the message shows what came back.
    """
    text = render_completion(format=format, answer="1", confidence=1.0)
    ids = tokenizer.encode(text, add_special_tokens=False)
    back = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not parse_completion(back, format).ok:
        special = [t for t in tokenizer.all_special_tokens if t in text]
        reason = (
            f"it treats {', '.join(special)} as special tokens, which decoding drops. Register "
            "them as ordinary tokens"
            if special
            else "its vocabulary cannot write them"
        )
        raise UserError(
            f"the tokenizer does not keep the tags: {text!r} comes back as {back!r}; {reason}."
        )
    return len(ids) + 1


def sft_warmup(
    model: str | PreTrainedModel,
    dataset: "Dataset",
    output_dir: str,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    peft_config: "PeftConfig | None" = None,
    callbacks: Sequence[TrainerCallback] = (),
    remove_callbacks: Sequence[type[TrainerCallback]] = (),
    **settings: Any,
) -> PreTrainedModel:
    """Finetune on worked completions before RL, through TRL's SFTTrainer.

    A policy that states confidences at random, or is rarely right, teaches RL nothing; a few
    hundred examples mend both.

    Args:
        model: A causal language model or the folder or hub name of one.
        dataset: Columns `prompt` and `completion`, or tokenised `input_ids` and `labels`.
        output_dir: Folder for SFTTrainer's files.
        processing_class: The tokenizer. Defaults to the model's own.
        peft_config: Train an adapter (needs peft).
        callbacks: More callbacks.
        remove_callbacks: Kinds of callbacks to leave out, such as the printer of logs.
        **settings: Fields of `trl.SFTConfig` that differ from its defaults.

    Returns:
        The trained model.

    Raises:
        UserError: a setting is unknown or the columns do not fit.
    """
    if "input_ids" not in dataset.column_names:
        check_columns(dataset, ["prompt", "completion"])
    unknown = [name for name in settings if name not in SFTConfig.__dataclass_fields__]
    if unknown:
        raise UserError(f"trl.SFTConfig has no field {unknown[0]!r}.")
    defaults: dict[str, Any] = {"save_strategy": "no", "report_to": "none"}
    if not torch.cuda.is_available():
        defaults |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=output_dir, **{**defaults, **settings}),
        train_dataset=dataset,
        processing_class=processing_class,
        peft_config=peft_config,
        callbacks=[*callbacks],
    )
    for kind in remove_callbacks:
        trainer.remove_callback(kind)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    # SFTTrainer puts a forward of its own on the model, which later trainers would wrap and which a
    # copy of the model would share with it.
    base = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
    vars(base).pop("forward", None)
    return trained
