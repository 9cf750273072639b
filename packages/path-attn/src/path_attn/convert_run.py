"""`path-attn convert`: a saved RoPE or fla model in, a distilled PaTH model folder out."""

import dataclasses
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from path_attn.convert import ConvertConfig, convert_rope_model, distill
from path_attn.evaluate import position_losses
from path_attn.fla_checkpoint import from_fla
from path_attn.tasks import TextChunks, read_text, split_text, text_tokens
from tenfold_common.atomic import atomic_dir, locked_folder, prepare_output_dir, write_json
from tenfold_common.device import resolve_device
from tenfold_common.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _OnDevice(ConvertConfig):
    """The settings, with the device that was chosen and progress bars on a terminal only."""

    device: str = "cpu"

    def training_arguments(self, stage: int, output_dir: str | Path) -> TrainingArguments:
        return dataclasses.replace(
            super().training_arguments(stage, output_dir),
            use_cpu=self.device == "cpu",
            dataloader_pin_memory=self.device == "cuda",
            disable_tqdm=not sys.stderr.isatty(),
        )


def convert_folder(
    model: str,
    output_dir: str | Path,
    *,
    data: str | None = None,
    length: int = 256,
    position_encoding: str = "path",
    device: str = "auto",
    settings: ConvertConfig | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a model and, for RoPE models, distil it on a text.

    Args:
        model: Folder (or hub name) of a Llama, Mistral, Qwen2, Qwen3 or SmolLM model, or a folder
            of fla's `path_attn`.
        output_dir: New folder; `output_dir/final` gets the model, the tokenizer and
            `conversion.json`.
        data: UTF-8 text to distil on. Needed for RoPE models unless both stages have 0 steps; not
            used for fla.
        length: Tokens per training chunk.
        position_encoding: "path", "path_fox", "fox" or "nope"; not used for fla.
        device: "auto", "cpu" or "cuda".
        settings: Steps and learning rates. Defaults to `ConvertConfig()`.
        overwrite: Delete what is in `output_dir` first.

    Returns:
        What `conversion.json` holds: kind, and for RoPE models the validation loss in nats of
        teacher and student.

    Raises:
        UserError: the model, the data or a setting does not fit.
        CheckpointError: the weights do not load.
    """
    settings = settings or ConvertConfig()
    settings.validate()
    source = _config(model)
    if source.get("model_type") == "path_attn":
        report: dict[str, Any] = {"kind": "fla", "source": model}
        with locked_folder(output_dir) as out:
            prepare_output_dir(out, overwrite=overwrite, inputs=[model, data])
            _save(out / "final", from_fla(model), _tokenizer(model), report)
        return report
    steps = settings.stage1_steps + settings.stage2_steps
    if steps and data is None:
        raise UserError(
            "a converted model must be distilled: give --data FILE, or --stage1_steps 0 "
            "--stage2_steps 0 to only carry the weights over."
        )
    chosen, why = resolve_device(device)
    logger.info("device %s (%s)", chosen, why)
    tokenizer = _tokenizer(model)
    if tokenizer is None and data is not None:
        raise UserError(f"{model} has no tokenizer; it is needed to read {data}.")
    training = validation = None
    if data is not None and tokenizer is not None:
        train_tokens, held_out = split_text(text_tokens(read_text(data), tokenizer))
        training = TextChunks(train_tokens, length, where=f"the train part of {data}")
        validation = TextChunks(
            held_out[: 64 * length], length, where=f"the validation part of {data}"
        )
    try:
        teacher = AutoModelForCausalLM.from_pretrained(model)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{model} does not load: {' '.join(str(error).split())[:300]}"
        ) from error
    teacher = teacher.to(chosen).eval()  # pyright: ignore[reportArgumentType]
    student = convert_rope_model(teacher, position_encoding=position_encoding, seed=settings.seed)
    report = {
        "kind": "rope",
        "source": model,
        "position_encoding": position_encoding,
        "settings": dataclasses.asdict(settings),
    }
    losses = {}
    with locked_folder(output_dir) as out:
        prepare_output_dir(out, overwrite=overwrite, inputs=[model, data])
        if validation is not None:
            losses["teacher"] = _mean_loss(teacher, validation)
            losses["student before"] = _mean_loss(student, validation)
        if training is not None and steps:
            own = _OnDevice(**dataclasses.asdict(settings), device=chosen.type)
            logger.info("distilling: %d + %d steps", settings.stage1_steps, settings.stage2_steps)
            report["log"] = distill(teacher, student.train(), training, out, config=own)
        if validation is not None:
            losses["student after"] = _mean_loss(student.to(chosen), validation)  # pyright: ignore[reportArgumentType]
        report["validation_loss"] = losses
        _save(out / "final", student.eval(), tokenizer, report)
    return report


def _mean_loss(model: torch.nn.Module, data: TextChunks) -> float:
    total, count = position_losses(model, data)
    mean = float(total.sum() / count.sum())
    if not math.isfinite(mean):
        raise UserError(
            "the loss on the validation text is not finite; try a smaller learning rate."
        )
    return mean


def _config(model: str) -> dict[str, Any]:
    """Read config.json; a folder's directly, since transformers does not know fla's type."""
    folder = Path(model)
    if folder.is_file():
        raise UserError(f"{model} is a file; give the folder of a model.")
    if folder.is_dir():
        file = folder / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model} is not a model folder: cannot read config.json ({error})."
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{file} must hold a mapping.")
        return values
    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model} is neither a folder nor a model the hub gives: {str(error).splitlines()[0]}"
        ) from error


def _tokenizer(model: str) -> Any:
    """Load the tokenizer beside a model; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        return None


def _save(folder: Path, model: Any, tokenizer: Any, report: dict[str, Any]) -> None:
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(temporary / "conversion.json", report)
