"""Training data of both stages: samples of text and music, packed into rows, as Arrow.

A row is a list of whole samples with positions that start anew at each, from which transformers
makes document masks: no sample attends to another. Samples are never cut inside an event, so that
id i behind a sample's flag always is of slot (i - flag - 1) mod 3.

Folders of any size go through `write_dataset`: its sources, in random order, are dealt out in
shards of a few hundred. One process makes a whole shard (it reads, samples, shuffles, packs and
writes), and nothing of it depends on the others, so neither do the rows on how many there are.
"""

import json
import logging
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from midi_llm.anticipate import REST, Kind, events_of, kind_of_copy, pad_rests, sequence
from midi_llm.attributes import analyze
from midi_llm.captions import caption_dropout, describe
from midi_llm.midi_read import read_many
from midi_llm.modeling import TextMidiProcessor
from midi_llm.notes import Notes
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from datasets import Dataset
    from torch import Tensor

IGNORED = -100
_SIGN = "midi-llm"
SHARD = 256  # sources of a shard, fewer where each has several copies
TEXT_BYTES = 2**17  # of text make a source: about as many ids as a piece
_BATCH = 256  # rows that are written together
logger = logging.getLogger(__name__)


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
) -> Iterator[np.ndarray]:
    """Cut a piece into samples of model ids: a flag, events from time 0, at the end separators.

    Args:
        notes: The piece.
        processor: Gives the grid and the offset.
        room: Ids that a sample may have.
        kind: How controls are chosen, see `anticipate.choose_controls`.
        rng: Decides.

    Yields:
        `[n]` int32, n at most `room`.

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
        yield (processor.offset + whole).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Sample:
    """Ids of the model, `[n]` int32, and how many of the first are not learnt (the prompt)."""

    ids: np.ndarray
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
    first: int = 0,
) -> Iterator[Sample]:
    """Make samples of captions and their pieces.

    Args:
        pairs: Pieces with captions.
        processor: The processor.
        length: Ids of a sample at most, the caption included.
        copies: Of each piece; by AMT's schedule the copies 1 to 9 of ten have controls (spans,
            random notes, instruments), if the grid has them.
        dropout: Share of captions that lose sentences; those of one sentence never do.
        mask_prompt: Whether the caption is not learnt.
        seed: Fixes all choices; a pair's do not depend on the others.
        first: Number of the first pair: with the seed, the others follow from it.

    Raises:
        UserError: a caption is empty or too long.
    """
    for number, (notes, caption) in enumerate(pairs, first):
        for copy in range(copies):
            rng = np.random.default_rng([seed, number, copy])
            kind = kind_of_copy(copy) if processor.amt.anticipation else "none"
            thinned = rng.random() < dropout
            said = caption_dropout(caption, rng, probability=1, least=1) if thinned else caption
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
                ids = np.concatenate([np.array(text, np.int32), music])
                yield Sample(ids, masked=len(text) + 1 if mask_prompt else 0)


def text_samples(text: str, processor: TextMidiProcessor, *, length: int) -> Iterator[Sample]:
    """Cut a text into samples of at most `length` ids, `<bos>` before the first."""
    start: Any = processor.tokenizer.bos_token_id
    found: Any = processor.tokenizer(text, add_special_tokens=False).input_ids
    ids = np.array(found if start is None else [start, *found], np.int32)
    for i in range(0, len(ids), length):
        yield Sample(ids[i : i + length])


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
    samples = [Sample(m) for notes in pieces for m in music_samples(notes, processor, room=length)]
    samples += [s for text in texts for s in text_samples(text, processor, length=length)]
    yield from _shuffled(samples, seed)


def _shuffled(samples: list[Sample], *seed: int) -> Iterator[Sample]:
    for index in np.random.default_rng(seed).permutation(len(samples)):
        yield samples[index]


def pack(samples: Iterable[Sample], *, length: int, pad: int) -> Iterator[dict[str, np.ndarray]]:
    """Put samples into rows, in their order: a sample begins a row where it does not fit any more.

    Yields:
        `input_ids`, `labels` (-100 where nothing is learnt) and `position_ids` (0 at the start of
        each sample; padding is a sample of its own), each `[length]` int32.

    Raises:
        UserError: a sample is longer than a row.
    """
    row: list[Sample] = []
    size = 0
    for sample in samples:
        if len(sample.ids) > length:
            raise UserError(f"a sample has {len(sample.ids)} ids, more than the {length} of a row")
        if row and size + len(sample.ids) > length:
            yield _row(row, length, pad)
            row, size = [], 0
        row.append(sample)
        size += len(sample.ids)
    if row:
        yield _row(row, length, pad)


def _row(samples: list[Sample], length: int, pad: int) -> dict[str, np.ndarray]:
    ids, labels = np.full(length, pad, np.int32), np.full(length, IGNORED, np.int32)
    positions = np.arange(length, dtype=np.int32)
    start = 0
    for sample in samples:
        stop = start + len(sample.ids)
        # the first id of a sample is not learnt either: it would be predicted from its neighbour
        learnt = slice(start + max(sample.masked, 1), stop)
        ids[start:stop] = sample.ids
        labels[learnt] = ids[learnt]
        positions[stop:] = np.arange(length - stop)
        start = stop
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


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
        pairs: Gone through once, as the other arguments see `sft_samples`.
        processor: The processor.
        length: Ids of a row.
        copies: Of each piece.
        dropout: Share of captions that lose sentences.
        mask_prompt: Whether captions are not learnt.
        seed: Fixes all choices and the order.

    Returns:
        A dataset in memory of `input_ids`, `labels`, `position_ids`, 12 bytes an id.

    Raises:
        UserError: there is nothing, or a caption is empty or too long.
    """
    samples = sft_samples(
        pairs, processor, length=length, copies=copies, dropout=dropout, mask_prompt=mask_prompt,
        seed=seed,
    )  # fmt: skip
    return _dataset(_shuffled(list(samples), seed, 1), processor, length)


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
        pieces: Music; gone through once.
        texts: Texts; may be empty.
        processor: The processor.
        length: Ids of a row.
        seed: Fixes the order.

    Returns:
        A dataset in memory of `input_ids`, `labels`, `position_ids`, 12 bytes an id.

    Raises:
        UserError: there is nothing.
    """
    return _dataset(
        cpt_samples(pieces, texts, processor, length=length, seed=seed), processor, length
    )


def _dataset(samples: Iterable[Sample], processor: TextMidiProcessor, length: int) -> "Dataset":
    import pyarrow as pa
    from datasets import Dataset

    sink = pa.BufferOutputStream()
    if not _write(samples, sink, processor, length):
        raise UserError("there is nothing to learn from: no piece and no text is left")
    return _signed(Dataset.from_buffer(sink.getvalue()), processor)


def _write(samples: Iterable[Sample], sink: Any, processor: TextMidiProcessor, length: int) -> int:
    """Write packed samples as a stream of Arrow, and return how many rows they are."""
    import pyarrow as pa

    rows = pack(samples, length=length, pad=processor.offset + processor.amt.size)
    names = ("input_ids", "labels", "position_ids")
    schema = pa.schema({name: pa.list_(pa.int32(), length) for name in names})
    count = 0
    with pa.ipc.new_stream(sink, schema) as stream:
        while batch := list(islice(rows, _BATCH)):
            flat = (pa.array(np.concatenate([row[name] for row in batch])) for name in names)
            columns = [pa.FixedSizeListArray.from_arrays(values, length) for values in flat]
            stream.write_batch(pa.record_batch(columns, schema=schema))
            count += len(batch)
    return count


# ------------------------------------------------------------------------------------------------
# Folders of any size


@dataclass(frozen=True)
class Source:
    """A MIDI file, or a part of a file of texts.

    Attributes:
        number: Its own among all: with the seed it fixes what is chosen for the piece.
        file: The path.
        caption: Of a MIDI file in the second stage; None to write one from the music.
        span: First byte and the one behind the last, where `file` holds texts.
    """

    number: int
    file: str
    caption: str | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Recipe:
    """How rows are made of sources; see `prepare_cpt` and `prepare_sft`.

    Attributes:
        stage: "cpt" or "sft".
        processor: The processor.
        length: Ids of a row.
        copies: Of each piece, in the second stage.
        dropout: Share of captions that lose sentences, in the second stage.
        seed: Fixes all choices and the order.
        filters: Which pieces are left out.
    """

    stage: Literal["cpt", "sft"]
    processor: TextMidiProcessor
    length: int = 2048
    copies: int = 1
    dropout: float = 0.0
    seed: int = 0
    filters: Filters = field(default_factory=Filters)


Shard = tuple[int, list[Source]]  # numbered


@dataclass
class Tally:
    """What became of sources.

    Attributes:
        rows: Written.
        used: Pieces that are in them.
        left_out: Pieces that are not, by reason.
        warnings: Files with what is wrong with them, where that is not the reason itself.
    """

    rows: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def leave(self, reason: str, warning: str | None = None) -> None:
        """Count a piece that is left out."""
        self.left_out[reason] += 1
        if warning:
            self.warnings.append(warning)


def text_sources(file: "str | PathLike[str]", first: int = 0) -> Iterator[Source]:
    """Cut a file of texts, an empty line between two, into parts of about 128 KiB.

    Args:
        file: In UTF-8.
        first: Number of the first part.

    Raises:
        UserError: it is not UTF-8; the message names the line.
    """
    start = stop = 0
    with Path(file).open("rb") as stream:
        for line, data in enumerate(stream, 1):
            try:
                blank = not data.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}, line {line}: not UTF-8 ({error.reason})") from error
            stop += len(data)
            if blank and stop - start >= TEXT_BYTES:
                yield Source(first, str(file), span=(start, stop))
                first, start = first + 1, stop
    if stop > start:
        yield Source(first, str(file), span=(start, stop))


def write_dataset(
    sources: Sequence[Source],
    folder: "str | PathLike[str]",
    recipe: Recipe,
    *,
    workers: int = 1,
) -> Tally:
    """Make rows of files and write them as a folder that `datasets.load_from_disk` reads.

    Memory does not grow with the number of files, but for their names and captions; on disk the
    rows, 12 bytes an id, are there twice for a while. The state of the folder is written last:
    one that was cut short does not load.

    Args:
        sources: Files, of which some may turn out to be unfit.
        folder: New or empty.
        recipe: What to do with them.
        workers: Processes; the rows are the same for any number. They begin by importing the
            program, which therefore needs its `if __name__ == "__main__"` where they are over 1.

    Returns:
        How many rows there are, and which pieces were left out.

    Raises:
        UserError: nothing is left to learn from, or a process was killed.
    """
    from datasets import Dataset, concatenate_datasets

    order = np.random.default_rng([recipe.seed, 2]).permutation(len(sources)).tolist()
    size = max(1, SHARD // recipe.copies)
    shards = [
        (number, [sources[i] for i in order[start : start + size]])
        for number, start in enumerate(range(0, len(order), size))
    ]
    total = Tally()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="shards-") as place:
        for tally in _run(shards, recipe, Path(place), min(workers, len(shards))):
            total.rows += tally.rows
            total.used += tally.used
            total.left_out += tally.left_out
            total.warnings += tally.warnings
        if not total.rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(total.left_out.items()))
            raise UserError(
                "there is nothing to learn from: no piece and no text is left"
                + (f" ({reasons})" if reasons else "")
            )
        written = sorted(Path(place).iterdir())
        whole = concatenate_datasets([Dataset.from_file(str(file)) for file in written])
        _signed(whole, recipe.processor).save_to_disk(folder)
    return total


def _run(shards: list[Shard], recipe: Recipe, folder: Path, workers: int) -> list[Tally]:
    """Make all shards, each worker every n-th, and end the workers whatever happens.

    The workers of concurrent.futures' pool would outlive a first process that is killed.
    """
    from multiprocessing import get_context
    from multiprocessing.connection import wait

    from tqdm import tqdm

    done: list[Tally] = []
    bar = tqdm(total=len(shards), unit="part", disable=None)

    def add(tally: Tally) -> None:
        done.append(tally)
        bar.update()
        for warning in tally.warnings:
            logger.warning("left out: %s", warning)

    context = get_context("spawn")  # torch and tokenizers have threads, which a fork would break
    running = {}
    try:
        if workers <= 1:
            for shard in shards:
                add(_make_shard(shard, recipe, folder))
            return done
        for first in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            mine = (shards[first::workers], recipe, folder, theirs)
            process = context.Process(target=_work, args=mine, daemon=True)
            try:
                process.start()
            except BrokenPipeError as error:
                raise RuntimeError("a worker ended before it began; see above") from error
            running[ours] = process
            theirs.close()
        while running:
            ready = wait(list(running))
            for pipe in [pipe for pipe in running if pipe in ready]:
                try:
                    found = pipe.recv()
                except EOFError:
                    _check_ended(running.pop(pipe))
                    continue
                if isinstance(found, Exception):
                    raise found
                add(found)
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
            process.join()
    return done


def _work(shards: list[Shard], recipe: Recipe, folder: Path, pipe: "Connection") -> None:
    """Make some of the shards in a process of its own, and tell what became of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the first process ends this one
    try:
        for shard in shards:
            pipe.send(_make_shard(shard, recipe, folder))
    except BrokenPipeError:  # the first process is gone
        return
    except (UserError, OSError) as error:  # any other is a bug, and its traceback is shown here
        pipe.send(error)


def _check_ended(process: Any) -> None:
    process.join()
    if process.exitcode < 0:
        raise UserError(
            f"a worker was killed (signal {-process.exitcode}), perhaps for want of memory; give "
            "fewer workers"
        )
    if process.exitcode:
        raise RuntimeError(f"a worker failed (exit code {process.exitcode}); see above")


def _make_shard(shard: Shard, recipe: Recipe, folder: Path) -> Tally:
    number, sources = shard
    tally = Tally()
    samples = list(_samples(sources, recipe, tally))
    with (folder / f"{number:06d}.arrow").open("wb") as sink:
        shuffled = _shuffled(samples, recipe.seed, 3, number)
        tally.rows = _write(shuffled, sink, recipe.processor, recipe.length)
    return tally


def _samples(sources: list[Source], recipe: Recipe, tally: Tally) -> Iterator[Sample]:
    for source in sources:
        for text in _texts(source):
            yield from text_samples(text, recipe.processor, length=recipe.length)
    music = [source for source in sources if not source.span]
    for source, notes in zip(music, read_many([s.file for s in music]), strict=True):
        if isinstance(notes, UserError):
            tally.leave("not readable", str(notes))
        elif reason := recipe.filters.reason(notes):
            tally.leave(reason)
        elif recipe.stage == "cpt":
            for ids in music_samples(notes, recipe.processor, room=recipe.length):
                yield Sample(ids)
            tally.used += 1
        else:
            try:
                made = _pair(source, notes, recipe)
            except UserError as error:
                tally.leave("without a usable caption", f"{source.file}: {error}")
            else:
                yield from made
                tally.used += 1


def _texts(source: Source) -> list[str]:
    if not source.span:
        return []
    start, stop = source.span
    with Path(source.file).open("rb") as stream:
        stream.seek(start)
        text = stream.read(stop - start).decode("utf-8").replace("\r\n", "\n")
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def _pair(source: Source, notes: Notes, recipe: Recipe) -> list[Sample]:
    caption = source.caption
    if caption is None:
        caption = describe(analyze(source.file), seed=recipe.seed + source.number)
    return list(
        sft_samples(
            [(notes, caption)], recipe.processor, length=recipe.length, copies=recipe.copies,
            dropout=recipe.dropout, seed=recipe.seed, first=source.number,
        )
    )  # fmt: skip


def _signed(dataset: "Dataset", processor: TextMidiProcessor) -> "Dataset":
    """Write into a dataset, where saving keeps it, which ids its rows are of."""
    dataset.info.description = json.dumps({_SIGN: _ids_of(processor)})
    return dataset


def check_rows(dataset: "Dataset", processor: TextMidiProcessor) -> None:
    """Refuse rows that were prepared with the ids of another model.

    Raises:
        UserError: they were. Rows of other makers are not known, and pass.
    """
    try:
        made = json.loads(dataset.info.description)[_SIGN]
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if made != (wanted := _ids_of(processor)):
        raise UserError(
            f"the rows are of other ids than the model's: music begins at {made.get('offset')}, "
            f"not {wanted['offset']}, or the grids differ. Prepare them with this model"
        )


def _ids_of(processor: TextMidiProcessor) -> dict[str, Any]:
    return {"offset": processor.offset, "grid": processor.amt.to_dict()}


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
