"""`RLCRConfig`: TRL's GRPOConfig, the reward, and the settings of the paper as presets."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from rlcr.parsing import FORMATS
from rlcr.rewards import RLCRReward
from rlcr.scoring import scoring_rule
from tenfold_common.errors import UserError, suggest

METHODS = ("rlcr", "rlvr")

_PAPER: dict[str, Any] = {
    "num_generations": 32,
    "temperature": 0.7,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "max_grad_norm": 1.0,
    "seed": 43,
    "bf16": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
_MATH: dict[str, Any] = {
    **_PAPER,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.2,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 64,
    "max_prompt_tokens": 1024,
    "max_completion_length": 4096,
    "mask_truncated_completions": True,
    "num_train_epochs": 0.5,
    "verifier": "math",
}
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2507.16806 and the configurations published with it: 4 and 6 processes
    "hotpot": {
        **_PAPER,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 64,
        "max_prompt_tokens": 3072,
        "max_completion_length": 1536,
        "num_train_epochs": 1,
        "verifier": "exact_match",
    },
    "math": _MATH,
    "math_sft": _MATH,  # the same settings, from a checkpoint of the SFT warm-up
    # minutes on a CPU, for the toy task and for trying things out
    "tiny": {
        "num_generations": 8,
        "per_device_train_batch_size": 256,
        "max_completion_length": 12,
        "temperature": 1.0,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "entropy_coef": 0.02,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "report_to": "none",
        "verifier": "exact_match",
    },
}


@dataclass
class RLCRConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what the calibration reward needs.

    Three defaults differ from TRL's: `loss_type="bnpo"`, `scale_rewards="none"` and
    `temperature=0.7`, as in arXiv 2507.16806. Dividing by the standard deviation of a group's
    rewards weighs prompts differently, and the expected reward is then no proper score across
    prompts. `reward_weights` are those of the reward functions given in addition, if any.

    Attributes:
        method: `"rlcr"`, or `"rlvr"`: the same with calibration weight exactly 0; calibration is
            still logged.
        format: Blocks a completion must have, `"tabc"`, `"tbac"`, `"tac"` or `"ta"` (only for
            `"rlvr"`, it states no confidence).
        gold_column: Column of the data set with the right answer.
        verifier: Name of the verifier, see `rlcr.get_verifier`.
        verifier_column: Column that names a verifier for each row. Defaults to none.
        rule: Scoring rule of the confidence: brier, spherical, log, beta or bins.
        rule_parameters: Its parameters, such as `{"eps": 0.05}`.
        correctness_weight: Weight of the right answer.
        calibration_weight: Weight of the scoring rule.
        format_weight: Weight of a well-formed completion.
        calibration_ramp_steps: Raise the calibration weight linearly from 0 over so many steps
            (accuracy first, against hedging).
        allow_incorrect_incentive: Accept a rule under which a wrong answer can pay more than a
            right one.
        max_prompt_tokens: Drop rows with longer prompts, since TRL does not truncate. Defaults to
            keeping all.

    Raises:
        UserError: a value is unknown, or the rule's incentive margin is negative.
    """

    loss_type: str = field(default="bnpo", metadata={"help": "Loss; bnpo as in the paper."})
    scale_rewards: str = field(
        default="none", metadata={"help": "No division by the group's standard deviation."}
    )
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    method: str = field(default="rlcr", metadata={"help": "rlcr or rlvr."})
    format: str = field(default="tabc", metadata={"help": "Blocks of a completion."})
    gold_column: str = field(default="answer", metadata={"help": "Column of the right answer."})
    verifier: str = field(default="auto", metadata={"help": "Verifier of answers."})
    verifier_column: str | None = field(
        default=None, metadata={"help": "Column that names a verifier for each row."}
    )
    rule: str = field(default="brier", metadata={"help": "Scoring rule of the confidence."})
    rule_parameters: dict[str, float] | None = field(
        default=None, metadata={"help": "Parameters of the rule."}
    )
    correctness_weight: float = field(default=0.5, metadata={"help": "Weight of correctness."})
    calibration_weight: float = field(default=0.5, metadata={"help": "Weight of calibration."})
    format_weight: float = field(default=0.5, metadata={"help": "Weight of the format."})
    calibration_ramp_steps: int = field(
        default=0, metadata={"help": "Steps over which calibration ramps up from 0."}
    )
    allow_incorrect_incentive: bool = field(
        default=False, metadata={"help": "Accept a rule that can reward wrong answers."}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Drop rows with longer prompts."}
    )

    def __post_init__(self) -> None:
        """Check the values, then let TRL check its own."""
        if self.method not in METHODS:
            raise UserError(
                f"method must be 'rlcr' or 'rlvr', not {self.method!r}."
                f"{suggest(str(self.method), METHODS)}"
            )
        if self.format not in FORMATS:
            raise UserError(
                f"format must be one of {', '.join(FORMATS)}, not {self.format!r}."
                f"{suggest(str(self.format), FORMATS)}"
            )
        for name, least, why in (
            ("calibration_ramp_steps", 0, ""),
            ("max_prompt_tokens", 1, ""),
            ("max_completion_length", 1, ""),
            ("num_generations", 2, "; advantages compare the completions of one prompt"),
        ):
            value = getattr(self, name)
            if value is None and name != "calibration_ramp_steps":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}{why}."
                )
        self.reward()  # refuses a wrong rule, weight or format before anything is loaded
        super().__post_init__()

    def reward(self) -> RLCRReward:
        """Make the reward these settings describe."""
        return RLCRReward(
            verifier=self.verifier,
            rule=scoring_rule(self.rule, **(self.rule_parameters or {})),
            correctness_weight=self.correctness_weight,
            calibration_weight=self.calibration_weight,
            format_weight=self.format_weight,
            format=self.format,
            gold_column=self.gold_column,
            verifier_column=self.verifier_column,
            method=self.method,
            allow_incorrect_incentive=self.allow_incorrect_incentive,
        )

    @classmethod
    def preset(cls, name: str, output_dir: str, **changes: Any) -> "RLCRConfig":
        """Return the settings of a preset, with changes.

        Args:
            name: `"hotpot"`, `"math"`, `"math_sft"` (the paper's) or `"tiny"`.
            output_dir: Folder of the run.
            **changes: Fields that differ.

        Raises:
            UserError: the preset or a field is unknown, or values do not fit.
        """
        if name not in PRESETS:
            raise UserError(
                f"there is no preset {name!r}; choose from {', '.join(PRESETS)}."
                f"{suggest(name, PRESETS)}"
            )
        known = cls.__dataclass_fields__
        for field_name in changes:
            if field_name not in known:
                raise UserError(
                    f"RLCRConfig has no field {field_name!r}.{suggest(field_name, known)}"
                )
        return cls(output_dir=output_dir, **{**PRESETS[name], **changes})
