"""Training data of both stages: samples of text and music, packed into rows, as Arrow.

A row is a list of whole samples with positions that start anew at each, from which transformers
makes document masks: no sample attends to another. Samples are never cut inside an event, so that
id i behind a sample's flag always is of slot (i - flag - 1) mod 3.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.anticipate import REST, Kind, events_of, kind_of_copy, pad_rests, sequence
from midi_llm.captions import caption_dropout
from midi_llm.modeling import TextMidiProcessor
from midi_llm.notes import Notes
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Filters:
    """Pieces that are worth learning from; the defaults are those of AMT.

    Attributes:
        min_notes: Fewest notes.
        min_seconds: Shortest.
        max_seconds: Longest.
        max_instruments: Most instruments.
    """

    min_notes: int = 100
    min_seconds: float = 10.0
    max_seconds: float = 3600.0
    max_instruments: int = 16

    def reason(self, notes: Notes) -> str | None:
        """Return why a piece is left out, or None."""
        if len(notes) < self.min_notes:
            return f"fewer than {self.min_notes} notes"
        if not self.min_seconds <= notes.end <= self.max_seconds:
            return f"not {self.min_seconds:g} to {self.max_seconds:g} s long"
        if len(np.unique(notes.instrument)) > self.max_instruments:
            return f"more than {self.max_instruments} instruments"
        return None


def music_samples(
    notes: Notes,
    processor: TextMidiProcessor,
    *,
    room: int,
    kind: Kind = "none",
    rng: np.random.Generator | None = None,
) -> Iterator[list[int]]:
    """Cut a piece into samples of model ids: a flag, events from time 0, at the end separators.

    Args:
        notes: The piece.
        processor: Gives the grid and the offset.
        room: Ids that a sample may have.
        kind: How controls are chosen, see `anticipate.choose_controls`.
        rng: Decides.

    Raises:
        UserError: `room` has no place for a single event.
    """
    amt = processor.amt
    count = (room - 1) // 3
    if count < 1:
        raise UserError(f"there is room for {room} ids, but a flag and an event need 4")
    events = events_of(notes, amt)
    start = 0
    while start < len(events):
        # As many events, rests included, as fit into the room and the grid.
        part = events[start : start + count].copy()
        part[:, 0] -= part[0, 0] if start else 0
        padded = pad_rests(part[part[:, 0] < amt.times], amt)[:count]
        part = part[: int((padded[:, 2] != REST).sum())]
        if not len(part):  # a silence at the beginning that is as long as a sample
            events[:, 0] -= events[0, 0]
            continue
        ids = sequence(part, amt, kind=kind, rng=rng)[: 1 + 3 * count]
        start += len(part)
        ends = start >= len(events) and len(ids) + 3 <= room
        whole = np.concatenate([ids, [amt.separator] * (3 * ends)])
        yield (processor.offset + whole).astype(int).tolist()


@dataclass(frozen=True)
class Sample:
    """Ids of the model, and how many of the first are not learnt (the prompt)."""

    ids: list[int]
    masked: int = 0


def sft_samples(
    pairs: Iterable[tuple[Notes, str]],
    processor: TextMidiProcessor,
    *,
    length: int,
    copies: int = 1,
    dropout: float = 0.0,
    mask_prompt: bool = True,
    seed: int = 0,
) -> Iterator[Sample]:
    """Make samples of captions and their pieces.

    Args:
        pairs: Pieces with captions.
        processor: The processor.
        length: Ids of a sample at most, the caption included.
        copies: Of each piece; by AMT's schedule the copies 1 to 9 of ten have controls (spans,
            random notes, instruments), if the grid has them.
        dropout: Share of captions of which sentences are left out.
        mask_prompt: Whether the caption is not learnt.
        seed: Fixes all choices; a pair's do not depend on the others.
    """
    for number, (notes, caption) in enumerate(pairs):
        for copy in range(copies):
            rng = np.random.default_rng([seed, number, copy])
            kind = kind_of_copy(copy) if processor.amt.anticipation else "none"
            said = caption_dropout(caption, rng) if rng.random() < dropout else caption
            text = processor.encode_text(said)
            if len(text) + 4 > length:
                raise UserError(
                    f"caption {number} has {len(text)} ids; with an event that is more than the "
                    f"length {length}"
                )
            for music in music_samples(
                notes, processor, room=length - len(text), kind=kind, rng=rng
            ):
                # the flag is of the prompt: what is learnt begins with the first onset
                yield Sample([*text, *music], masked=len(text) + 1 if mask_prompt else 0)


def cpt_samples(
    pieces: Iterable[Notes],
    texts: Iterable[str],
    processor: TextMidiProcessor,
    *,
    length: int,
    seed: int = 0,
) -> Iterator[Sample]:
    """Make samples of the first stage: bare music, and text cut into pieces, in random order.

    Args:
        pieces: Music.
        texts: Texts about music.
        processor: The processor.
        length: Ids of a sample at most.
        seed: Fixes the order.
    """
    samples = []
    for notes in pieces:
        samples += [Sample(ids) for ids in music_samples(notes, processor, room=length)]
    start = processor.tokenizer.bos_token_id
    for text in texts:
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        ids = ids if start is None else [start, *ids]
        samples += [Sample(ids[i : i + length]) for i in range(0, len(ids), length)]
    order = np.random.default_rng(seed).permutation(len(samples))
    for index in order:
        yield samples[index]


def pack(samples: Iterable[Sample], *, length: int, pad: int) -> Iterator[dict[str, list[int]]]:
    """Put samples into rows, in their order: a sample begins a row where it does not fit any more.

    Yields:
        `input_ids`, `labels` (-100 where nothing is learnt) and `position_ids` (0 at the start of
        each sample; padding is a sample of its own), each of `length`.

    Raises:
        UserError: a sample is longer than a row.
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}

    def filled() -> dict[str, list[int]]:
        rest = length - len(row["input_ids"])
        return {
            "input_ids": row["input_ids"] + [pad] * rest,
            "labels": row["labels"] + [IGNORED] * rest,
            "position_ids": row["position_ids"] + list(range(rest)),
        }

    for sample in samples:
        size = len(sample.ids)
        if size > length:
            raise UserError(f"a sample has {size} ids, more than the {length} of a row")
        if row["input_ids"] and len(row["input_ids"]) + size > length:
            yield filled()
            row = {"input_ids": [], "labels": [], "position_ids": []}
        # the first id of a sample is not learnt either: it would be predicted from its neighbour
        masked = max(sample.masked, 1)
        row["input_ids"] += sample.ids
        row["labels"] += [IGNORED] * masked + sample.ids[masked:]
        row["position_ids"] += range(size)
    if row["input_ids"]:
        yield filled()


def prepare_sft(
    pairs: Iterable[tuple[Notes, str]],
    processor: TextMidiProcessor,
    *,
    length: int = 2048,
    copies: int = 1,
    dropout: float = 0.0,
    mask_prompt: bool = True,
    seed: int = 0,
) -> "Dataset":
    """Return the second stage's data: captions with their music, packed.

    Args:
        pairs: See `sft_samples`, as the other arguments.
        processor: The processor.
        length: Ids of a row.
        copies: Of each piece.
        dropout: Share of captions of which sentences are left out.
        mask_prompt: Whether captions are not learnt.
        seed: Fixes all choices and the order.

    Returns:
        A dataset of `input_ids`, `labels`, `position_ids`.

    Raises:
        UserError: there is nothing, or a caption is too long.
    """
    samples = list(
        sft_samples(
            pairs, processor, length=length, copies=copies, dropout=dropout,
            mask_prompt=mask_prompt, seed=seed,
        )
    )  # fmt: skip
    order = np.random.default_rng([seed, 1]).permutation(len(samples))
    return _dataset([samples[i] for i in order], processor, length)


def prepare_cpt(
    pieces: Iterable[Notes],
    texts: Iterable[str],
    processor: TextMidiProcessor,
    *,
    length: int = 2048,
    seed: int = 0,
) -> "Dataset":
    """Return the first stage's data: bare music and text, packed.

    Args:
        pieces: Music.
        texts: Texts; may be empty.
        processor: The processor.
        length: Ids of a row.
        seed: Fixes the order.

    Returns:
        A dataset of `input_ids`, `labels`, `position_ids`.

    Raises:
        UserError: there is nothing.
    """
    return _dataset(
        cpt_samples(pieces, texts, processor, length=length, seed=seed), processor, length
    )


def _dataset(samples: Iterable[Sample], processor: TextMidiProcessor, length: int) -> "Dataset":
    from datasets import Dataset, Features, Value
    from datasets import Sequence as Column

    rows = list(pack(samples, length=length, pad=processor.offset + processor.amt.size))
    if not rows:
        raise UserError("there is nothing to learn from: no piece and no text is left")
    column = Column(Value("int32"), length=length)
    features = Features(dict.fromkeys(rows[0], column))
    return Dataset.from_dict({k: [row[k] for row in rows] for k in rows[0]}, features=features)


class MidiDataCollator:
    """Stacks packed rows into `[B, length]` int64.

    There is no attention mask, for which the positions stand. transformers heeds them only without
    a cache: `train` sees to that; in a loop of your own call `model(**batch, use_cache=False)`.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, Tensor]":
        """Return a batch."""
        import torch

        return {
            name: torch.tensor([list(row[name]) for row in rows], dtype=torch.int64)
            for name in ("input_ids", "labels", "position_ids")
        }
