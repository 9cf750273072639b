"""A text model with a music vocabulary, and prompts that lead from text into music."""

import json
import math
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
Init = Literal["normal", "mean", "amt", "factored"]


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
            copies `source`, "factored" (ours, for small data) makes the row of a note the sum of
            one for its instrument, its octave and its pitch class, and those of times smooth.
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
    if init not in (known := ("normal", "mean", "amt", "factored")):
        raise UserError(f"init must be one of {', '.join(known)}, not {init!r}")
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
    embedding = model.get_input_embeddings()
    new = embedding.weight.shape[0] - rows
    generator = torch.Generator().manual_seed(seed)
    tables: list[Any] = [embedding.weight]
    head: Any = model.get_output_embeddings()
    if not tied and head is not None:
        tables.append(head.weight)
    for table in tables:
        if init == "mean":
            continue
        std = getattr(model.config, "initializer_range", 0.02)
        drawn = torch.randn(new, width, generator=generator) * std
        if init == "factored":
            drawn[: amt.size] = _factored(amt, width, generator) * std
        if source is not None:
            drawn[: amt.size] = _projected(source[: amt.size].float().cpu(), width, generator)
        with torch.no_grad():
            table[rows:] = drawn.to(table)
    if tied and head is not None and head.weight is not embedding.weight:
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


def _factored(amt: AMTConfig, width: int, generator: Any) -> "Tensor":
    """Return rows `[amt.size, width]` of mean square 1 that say what ids have in common."""
    import torch

    def drawn(count: int) -> "Tensor":
        return torch.randn(count, width, generator=generator)

    def smooth(count: int) -> "Tensor":
        """Waves from two ticks to twice the block long: near times have near rows."""
        periods = torch.logspace(math.log10(2), math.log10(2 * count + 2), width // 2)
        angles = torch.arange(count)[:, None] / periods * 2 * math.pi
        rows = torch.cat([angles.sin(), angles.cos(), torch.zeros(count, width % 2)], 1)
        return rows * 2**0.5

    pitch = torch.arange(amt.pitches)
    heights = drawn(12)[pitch % 12] + drawn(amt.pitches // 12 + 1)[pitch // 12]
    notes = (drawn(amt.instruments)[:, None] + heights[None]).flatten(0, 1) / 3**0.5
    basis = torch.linalg.qr(drawn(width))[0]  # the waves along directions of their own
    parts = [smooth(amt.times) @ basis, smooth(amt.durations) @ basis.T, notes]
    parts = [(part + drawn(1)) / 2**0.5 for part in parts[:2]] + [notes]
    rows = [torch.cat(parts), drawn(1)]
    if amt.anticipation:
        rows.append((rows[0] + drawn(1)) / 2**0.5)
    rows.append(drawn(amt.size - sum(map(len, rows))))
    return torch.cat(rows)


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
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is no text from letter {error.start} on") from error
        if self.system and prompt.strip().startswith(self.system.strip()):
            raise UserError("the prompt begins with the system sentence, which is added to it")
        text = self.system + prompt.strip() + " "
        ids: Any = self.tokenizer(text, add_special_tokens=False).input_ids
        start: Any = self.tokenizer.bos_token_id
        return list(ids) if start is None else [start, *ids]

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
                f"{folder} has no {SETTINGS}: it holds no text-to-music model. `midi-llm expand` "
                "makes one of a text model, `midi-llm convert` of the public checkpoint"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            amt = AMTConfig.from_dict(values["amt"])
            offset, system = values["offset"], values["system"]
            if not isinstance(system, str):
                raise TypeError(f"system is {system!r}, must be a text")
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
        embedding: Any = model.get_input_embeddings()
        rows = int(embedding.weight.shape[0])
        if rows < self.offset + self.amt.size:
            raise UserError(
                f"the model has {rows} rows, but text and music need {self.offset} + "
                f"{self.amt.size}; expand it with expand_vocabulary, or load its own processor"
            )


def convert(
    folder: "str | PathLike[str]", out: "str | PathLike[str]", *, amt: AMTConfig | None = None
) -> Path:
    """Make a folder of the public checkpoint one that this package loads: `amt.json` is added.

    That checkpoint is a Llama whose last rows are AMT's ids and two spare ones, with the text
    tokenizer of the model it was made from.

    Args:
        folder: With `config.json`, safetensors and a tokenizer.
        out: A new or empty folder; the weights are linked where the file system can, else copied.
        amt: The grid. Defaults to AMT's.

    Returns:
        The new folder.

    Raises:
        UserError: the folder is no such checkpoint; the message has the numbers.
    """
    import os
    import shutil

    from transformers import AutoConfig, AutoTokenizer

    from tenfold_common.atomic import prepare_output_dir

    folder, amt = Path(folder), amt or AMTConfig()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; download the checkpoint into one first")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no checkpoint that can be read: {error}") from error
    offset = config.vocab_size - amt.size - SPARE
    if offset != len(tokenizer):
        raise UserError(
            f"{folder} has vocab_size {config.vocab_size} and a text tokenizer of "
            f"{len(tokenizer)} ids; with this grid it must be {len(tokenizer)} + {amt.size} + "
            f"{SPARE} = {len(tokenizer) + amt.size + SPARE}"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors; pickles are not read")
    out = prepare_output_dir(out)
    for file in [*files, *folder.glob("*.safetensors.index.json")]:
        try:
            os.link(file.resolve(), out / file.name)  # in a hub's cache they are links themselves
        except OSError:
            shutil.copy2(file, out / file.name)
    config.music_offset = offset
    config.save_pretrained(out)
    if (folder / "generation_config.json").is_file():
        shutil.copy2(folder / "generation_config.json", out)
    TextMidiProcessor(tokenizer, amt, offset).save_pretrained(out)
    return out
