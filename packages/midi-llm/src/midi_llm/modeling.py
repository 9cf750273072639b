"""A text model with a music vocabulary, and prompts that lead from text into music."""

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from midi_llm.vocab import AMTConfig
from tenfold_common.atomic import write_json
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS = "amt.json"
SPARE = 2  # rows behind AMT's ids: padding, and one unused, as in MIDI-LLM
# Part of the public checkpoint: its training texts begin with these words.
SYSTEM = (
    "You are a world-class composer. Please compose some music according to the following "
    "description: "
)
Init = Literal["normal", "mean", "amt"]


def expand_vocabulary(
    model: "PreTrainedModel",
    amt: AMTConfig,
    *,
    init: Init = "normal",
    source: "Tensor | None" = None,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> "PreTrainedModel":
    """Give a causal LM one more row for every music id; music id m becomes rows + m.

    Args:
        model: Of transformers; changed in place. Tied heads stay tied.
        amt: The grid.
        init: The new rows: "normal" draws them with the config's initializer_range (as MIDI-LLM
            does), "mean" from the mean and covariance of the old ones (as transformers does), "amt"
            copies `source`.
        source: For "amt": `[amt.size, d]`, the embedding of an AMT checkpoint; where d is not the
            model's width it is projected by a random orthogonal matrix.
        pad_to_multiple_of: Unused rows are added up to this multiple; ids do not change.
        seed: Of the draws.

    Returns:
        The model, whose config says `vocab_size`.

    Raises:
        UserError: the model has been expanded already, or `source` does not fit.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    rows, width = embedding.weight.shape
    if getattr(model.config, "music_offset", None) is not None:
        raise UserError(f"this model has music ids already, from {model.config.music_offset} on")
    if init not in ("normal", "mean", "amt"):
        raise UserError(f"init must be 'normal', 'mean' or 'amt', not {init!r}")
    if (init == "amt") != (source is not None):
        raise UserError("init='amt' needs source, the embedding of an AMT checkpoint, others none")
    if source is not None and (source.ndim != 2 or len(source) < amt.size):
        raise UserError(
            f"source must be [{amt.size} or more, d], not of shape {list(source.shape)}"
        )
    tied = bool(model.config.tie_word_embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(
            rows + amt.size + SPARE, pad_to_multiple_of=pad_to_multiple_of,
            mean_resizing=init == "mean",
        )  # fmt: skip
    new = model.get_input_embeddings().weight.shape[0] - rows
    generator = torch.Generator().manual_seed(seed)
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if not tied and head is not None:
        tables.append(head.weight)
    for table in tables:
        if init == "mean":
            continue
        std = getattr(model.config, "initializer_range", 0.02)
        drawn = torch.randn(new, width, generator=generator) * std
        if source is not None:
            drawn[: amt.size] = _projected(source[: amt.size].float().cpu(), width, generator)
        with torch.no_grad():
            table[rows:] = drawn.to(table)
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        model.tie_weights()
    model.config.music_offset = rows
    model.config.vocab_size = rows + new
    return model


def _projected(source: "Tensor", width: int, generator: Any) -> "Tensor":
    """Return rows in another width, distances between them kept in the mean."""
    import torch

    if source.shape[1] == width:
        return source
    square = torch.randn(
        max(source.shape[1], width), max(source.shape[1], width), generator=generator
    )
    basis = torch.linalg.qr(square)[0][: source.shape[1], :width]
    return source @ basis * (source.shape[1] / width) ** 0.5 if width < source.shape[1] else (
        source @ basis
    )  # fmt: skip


class TextMidiProcessor:
    """The text tokenizer, the grid, and the layout of a prompt.

    A prompt is `<bos>`, the system sentence, the text, a space, and then the first music id.

    Args:
        tokenizer: Of the text model. It does not know the music ids, so that no text gives one.
        amt: The grid.
        offset: The id of music id 0: rows of the text model's embedding before it was expanded.
        system: Words before every text; "" for none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        amt: AMTConfig,
        offset: int,
        *,
        system: str = SYSTEM,
    ) -> None:
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < len(tokenizer):
            raise UserError(
                f"offset is {offset!r}, but the text tokenizer has {len(tokenizer)} ids: music ids "
                "begin behind them"
            )
        self.tokenizer, self.amt, self.offset, self.system = tokenizer, amt, offset, system

    def encode_text(self, prompt: str) -> list[int]:
        """Return the ids of the text part of a prompt, `<bos>` first.

        Raises:
            UserError: the text is empty, or begins with the system sentence, which is added here.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"the prompt must be a text, not {prompt!r}")
        if self.system and prompt.strip().startswith(self.system.strip()):
            raise UserError("the prompt begins with the system sentence, which is added to it")
        ids = self.tokenizer(self.system + prompt.strip() + " ", add_special_tokens=False).input_ids
        start = self.tokenizer.bos_token_id
        return ids if start is None else [start, *ids]

    def encode(self, prompt: str, *, controls: bool = False) -> list[int]:
        """Return a whole prompt: the text and the first music id.

        Args:
            prompt: The text.
            controls: Whether controls follow (infilling).

        Raises:
            UserError: see `encode_text`.
        """
        first = self.amt.anticipate if controls else self.amt.autoregress
        return [*self.encode_text(prompt), self.offset + first]

    def save_pretrained(self, folder: "str | PathLike[str]") -> None:
        """Write the tokenizer and `amt.json` into a folder, beside a model or not."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = {"amt": self.amt.to_dict(), "offset": self.offset, "system": self.system}
        write_json(folder / SETTINGS, settings)

    @classmethod
    def from_pretrained(cls, folder: "str | PathLike[str]") -> "TextMidiProcessor":
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: the folder is missing, has no `amt.json` or no tokenizer, or they are broken.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        file = folder / SETTINGS
        if not file.is_file():
            raise UserError(
                f"{folder} has no {SETTINGS}: it holds no text-to-music model. `midi-llm convert` "
                "makes one of the public checkpoint"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            amt = AMTConfig.from_dict(values["amt"])
            offset, system = values["offset"], values["system"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is broken: {error}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} has no text tokenizer that can be read: {error}") from error
        return cls(tokenizer, amt, offset, system=system)

    def check_model(self, model: "PreTrainedModel") -> None:
        """Refuse a model whose vocabulary is not text and music of this processor.

        Raises:
            UserError: it has too few rows.
        """
        rows = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        if rows < self.offset + self.amt.size:
            raise UserError(
                f"the model has {rows} rows, but text and music need {self.offset} + "
                f"{self.amt.size}; expand it with expand_vocabulary, or load its own processor"
            )
