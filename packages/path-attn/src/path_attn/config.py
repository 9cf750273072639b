"""What a training run is told: `TrainConfig`, the defaults of each task, all checks.

Standard library only, so that the command line can list every option without importing torch.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tenfold_common.errors import UserError, suggest

TASKS = ("fflm", "a5", "mqrar", "text")
GROUPS = ("s3", "a4", "a5")
COMPARISON_FILE = "comparison_config.json"  # what several encodings were asked for with
LOWEST_TEMPERATURE = 1e-4  # below it logits divided by the temperature leave the range of float32
POSITION_ENCODINGS = ("path", "path_fox", "rope", "fox", "nope")

# What a task uses where the user names no value; sizes that a 2-core CPU trains in minutes.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "fflm": {
        "length": 128,
        "max_steps": 300,
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
    },
    "a5": {
        "length": 16,
        "max_steps": 2000,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
    },
    "mqrar": {
        "length": 128,
        "max_steps": 2000,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
    },
    "text": {
        "length": 256,
        "max_steps": 1000,
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "batch_size": 16,
        "learning_rate": 2e-3,
    },
}


def _option(default: Any, help: str, **more: Any) -> Any:
    """Make a dataclass field that carries its own help text."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class TrainConfig:
    """One training run. Fields that are None take the task's default (`resolved`).

    Raises:
        UserError: from `validate`, naming the field, its value and what is accepted.
    """

    task: str = _option("fflm", "what to learn", choices=TASKS)
    data: str | None = _option(None, "UTF-8 text file (task text only)")
    output_dir: str | None = _option(None, "folder for checkpoints, metrics and the final model")
    position_encoding: str = _option(
        "path", "how attention knows positions", choices=POSITION_ENCODINGS
    )
    tokenizer: str | None = _option(
        None, "tokenizer folder for task text (default: one token per byte)"
    )
    seed: int = _option(0, "seeds weights, data and data order")

    length: int | None = _option(
        None, "training length: tokens for fflm, mqrar and text, word length for a5"
    )
    max_steps: int | None = _option(None, "optimizer steps")
    batch_size: int | None = _option(None, "sequences per process and step (default 32; text 16)")
    learning_rate: float | None = _option(None, "peak learning rate (default 3e-3; text 2e-3)")
    warmup_ratio: float = _option(0.1, "share of the steps in which the learning rate rises")
    lr_scheduler_type: str = _option("cosine", "learning-rate schedule, a transformers name")
    weight_decay: float = _option(0.01, "AdamW weight decay")
    max_grad_norm: float = _option(1.0, "gradient clipping")

    hidden_size: int | None = _option(None, "model width")
    num_hidden_layers: int | None = _option(None, "layers")
    num_attention_heads: int | None = _option(None, "query heads")
    num_key_value_heads: int | None = _option(
        None, "key/value heads (default: as many as query heads)"
    )
    intermediate_size: int | None = _option(
        None,
        "MLP width of the PaTH model (default about 8/3 hidden_size); other encodings get the "
        "width that gives them the same number of parameters",
    )
    gate_scale: str = _option("paper", "how forget gates enter the logit", choices=("paper", "fla"))
    num_reflections: int = _option(1, "Householder factors per token")
    window: int | None = _option(None, "sliding attention window in tokens")
    backend: str = _option(
        "auto", "attention back-end", choices=("auto", "reference", "torch", "triton")
    )

    ignore_probability: float = _option(0.8, "fflm: probability of an ignore instruction")
    group: str = _option("a5", "a5: the permutation group", choices=GROUPS)
    num_pairs: int = _option(8, "mqrar: different keys in a sequence")
    n_back: int = _option(2, "mqrar: which assignment of the key is asked for, 1 = the latest")
    validation_fraction: float = _option(
        0.1, "text: share of the file, at its end, kept for validation"
    )

    logging_steps: int = _option(10, "steps between two lines of metrics.jsonl")
    save_steps: int = _option(100, "steps between two checkpoints, a multiple of logging_steps")
    save_total_limit: int = _option(2, "complete checkpoints to keep, at least 2")
    device: str = _option("auto", "auto, cpu or cuda")
    dtype: str = _option(
        "auto",
        "auto, float32 or bfloat16 (mixed precision)",
        choices=("auto", "float32", "bfloat16"),
    )
    resume: bool = _option(False, "go on from the newest complete checkpoint in output_dir")
    overwrite: bool = _option(False, "delete what is in output_dir first")
    training_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further transformers.TrainingArguments, key=value (fsdp, optim, ...)"},
    )

    def resolved(self) -> "TrainConfig":
        """Return a checked copy in which every None with a task default is filled in."""
        _one_of("task", self.task, TASKS)
        filled = {"batch_size": 32, "learning_rate": 3e-3, **TASK_DEFAULTS[self.task]}
        config = dataclasses.replace(
            self, **{k: v for k, v in filled.items() if getattr(self, k) is None}
        )
        config.validate()
        return config

    def validate(self) -> None:
        """Check every value; raise `UserError` at the first that does not fit."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if "choices" in item.metadata:
                _one_of(item.name, value, item.metadata["choices"])
        for name in (
            "length", "max_steps", "batch_size", "hidden_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_reflections",
            "window", "num_pairs", "n_back", "logging_steps", "save_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}; it must be a positive number.")
        for name in ("warmup_ratio", "ignore_probability", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1."
            )
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must not be negative.")
        if self.save_total_limit < 2:
            raise UserError(
                f"save_total_limit is {self.save_total_limit}; it must be at least 2, so that one "
                "complete checkpoint is there while the next is written."
            )
        if self.save_steps % self.logging_steps:
            raise UserError(
                f"save_steps ({self.save_steps}) must be a multiple of logging_steps "
                f"({self.logging_steps}); otherwise the logged losses after a resume would differ."
            )
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other; choose one.")
        self._validate_sizes()

    def _validate_sizes(self) -> None:
        """Check what only holds between two fields."""
        if (
            self.hidden_size
            and self.num_attention_heads
            and self.hidden_size % self.num_attention_heads
        ):
            raise UserError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if (
            self.num_attention_heads
            and self.num_key_value_heads
            and self.num_attention_heads % self.num_key_value_heads
        ):
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.task == "text" and self.data is None:
            raise UserError("task text needs a text file: --data FILE.")
        if self.task != "text" and self.data is not None:
            raise UserError(f"task {self.task} makes its own data; --data is for task text.")
        if self.task == "fflm" and self.length and (self.length % 2 or self.length < 4):
            raise UserError(
                f"length is {self.length}; fflm needs an even length of at least 4: pairs of an "
                "instruction and a bit."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, source: str = "the configuration"
    ) -> "TrainConfig":
        """Build a config from plain values; unknown names and wrong types raise `UserError`."""
        kinds = field_types()
        checked = {}
        for name, value in values.items():
            if name not in kinds:
                raise UserError(
                    f"{source} has an unknown name {name!r}.{suggest(name, sorted(kinds))}"
                )
            checked[name] = _typed(name, value, kinds[name], source)
        return cls(**checked)


def field_types() -> dict[str, tuple[type, bool]]:
    """Map each field of `TrainConfig` to its plain type and whether it may be None."""
    kinds = {}
    for name, hint in get_type_hints(TrainConfig).items():
        options = (
            [a for a in get_args(hint) if a is not type(None)]
            if get_origin(hint) is not dict
            else []
        )
        optional = bool(options)
        kind = options[0] if optional else (get_origin(hint) or hint)
        kinds[name] = (kind, optional)
    return kinds


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a `.json`, `.yaml` or `.yml` file of `TrainConfig` fields.

    Raises:
        UserError: the file is not there, not readable, not valid or not a mapping.
    """
    path = Path(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"{path} must end in .json, .yaml or .yml.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid {path.suffix[1:]}: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{path} is not valid YAML: {_first_line(error)}") from error
        raise
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold a mapping of option names to values, not {type(values).__name__}."
        )
    return values


def check_temperature(value: float) -> None:
    """Raise `UserError` unless a sampling temperature is 0 or one that can be divided by."""
    if value != 0 and not LOWEST_TEMPERATURE <= value < float("inf"):
        raise UserError(
            f"temperature is {value}; it must be 0 (the most likely token) or a number from "
            f"{LOWEST_TEMPERATURE:g} up."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} is {value!r}; it must be one of "
            f"{', '.join(choices)}.{suggest(str(value), list(choices))}"
        )


def _typed(name: str, value: Any, kind: tuple[type, bool], source: str) -> Any:
    """Return `value` in the field's type; an int is accepted where a float is wanted."""
    wanted, optional = kind
    if value is None and optional:
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise UserError(f"{source}: {name} is {value!r}; it must be of type {wanted.__name__}.")
    return value
