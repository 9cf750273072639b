"""The options of `rlcr train`. Standard library only, so that help is there at once."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold_common.errors import UserError, suggest

PRESET_NAMES = ("hotpot", "math", "math_sft", "tiny")
METHOD_NAMES = ("rlcr", "rlvr")


def _option(help: str, default: Any = None, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass
class TrainOptions:
    """What one training run does; every field is a flag of `rlcr train` of the same name."""

    output_dir: str | None = _option("folder of the run; it must be empty or new")
    model: str | None = _option("folder or hub name of a causal language model, or toy")
    data: str | None = _option(
        "file with prompt or problem, and answer (.jsonl .json .csv .parquet; rlcr data makes "
        "them), or toy"
    )
    preset: str | None = _option(
        "settings to start from (default tiny for the toy, else TRL's)", choices=PRESET_NAMES
    )
    method: str | None = _option("reward calibration or only answers", choices=METHOD_NAMES)
    max_steps: int | None = _option("optimiser steps")
    learning_rate: float | None = _option("peak learning rate")
    save_steps: int | None = _option("steps between checkpoints (default 50)")
    seed: int = _option("fixes weights, data order and sampling", 0)
    warmup_data: str | None = _option(
        "file with prompt and completion for an SFT warm-up before RL, or toy"
    )
    warmup_steps: int = _option("steps of the SFT warm-up; 0 for none", 0)
    warmup_learning_rate: float = _option("learning rate of the SFT warm-up", 1e-5)
    peft_rank: int | None = _option("train a LoRA adapter of this rank on all linear layers")
    plain: bool = _option("prompts of problems without a chat template, for base models", False)
    long_prompt: bool = _option("the longer system prompt, which says what to analyse", False)
    device: str = _option("auto, cpu or cuda", "auto")
    trust_remote_code: bool = _option("run code that comes with the model", False)
    training_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "any other field of RLCRConfig: KEY=VALUE ..."}
    )
    resume: bool = _option("go on with the run in output_dir", False)
    overwrite: bool = _option("delete what is in output_dir first", False)

    def checked(self) -> "TrainOptions":
        """Return the options; raise `UserError` for what cannot be."""
        for name in ("output_dir", "model", "data"):
            if not getattr(self, name):
                raise UserError(f"train needs --{name}: {_fields()[name].metadata['help']}.")
        if self.method is not None and self.method not in METHOD_NAMES:
            raise UserError(
                f"method is {self.method!r}; it must be rlcr or rlvr."
                f"{suggest(str(self.method), METHOD_NAMES)}"
            )
        if self.preset is not None and self.preset not in PRESET_NAMES:
            raise UserError(
                f"preset is {self.preset!r}; it must be one of {', '.join(PRESET_NAMES)}."
                f"{suggest(str(self.preset), PRESET_NAMES)}"
            )
        for name in ("max_steps", "save_steps", "peft_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        for name in ("learning_rate", "warmup_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}; it must be a finite number above 0.")
        if self.warmup_steps < 0 or self.seed < 0:
            raise UserError(
                f"warmup_steps and seed must be at least 0, not {self.warmup_steps}, {self.seed}."
            )
        if self.warmup_steps and not self.warmup_data:
            raise UserError("warmup_steps needs --warmup_data: what to finetune on before RL.")
        if self.model == "toy" and self.data != "toy":
            raise UserError("the toy model knows only the toy's words; use --data toy with it.")
        for name, value in (("data", self.data), ("warmup_data", self.warmup_data)):
            if value and value != "toy" and not Path(value).is_file():
                kind = "a folder" if Path(value).is_dir() else "not there"
                raise UserError(f"{name} {value!r} is {kind}; give a file, or toy.")
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "TrainOptions":
        """Make options from a mapping; an unknown name or a wrong type raises `UserError`."""
        known = _fields()
        for name, value in values.items():
            if name not in known:
                raise UserError(
                    f"{source} has an unknown option {name!r}.{suggest(str(name), known)}"
                )
            kind = kind_of(name)
            fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                fits = True
            if value is not None and not fits:
                raise UserError(f"{source}: {name} must be a {kind.__name__}, not {value!r}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored with a run: without the flags of this one call."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in ("resume", "overwrite", "output_dir")}


def _fields() -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(TrainOptions)}


def kind_of(name: str) -> type:
    """Return the type of an option: bool, int, float, str or dict."""
    kind = _fields()[name].type
    text = kind.__name__ if isinstance(kind, type) else str(kind)  # such as "int | None"
    kinds = (("bool", bool), ("int", int), ("float", float), ("dict", dict))
    return next((kind for word, kind in kinds if text.startswith(word)), str)


def read_options_file(path: str | Path) -> dict[str, Any]:
    """Read a JSON or YAML mapping of options.

    Raises:
        UserError: the file cannot be read, or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the options in {path}: {error}") from error
    try:
        if str(path).endswith(".json"):
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("yaml", "json"):
            raise
        raise UserError(
            f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of options, not {type(values).__name__}.")
    return values


def key_values(pairs: list[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` pairs; values are YAML, so that numbers and lists are what they look like.

    Raises:
        UserError: a pair has no `=`.
    """
    import yaml

    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"training_args takes KEY=VALUE, not {pair!r}.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value in {pair!r} cannot be read.") from error
        if isinstance(parsed, str):  # YAML reads 1e-5 as text
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        result[name] = parsed
    return result
