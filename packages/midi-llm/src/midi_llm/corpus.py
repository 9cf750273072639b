"""Pairs of music and captions for tiny models: etudes, and real tunes where their folder is there.

Captions are computed from the music. Real tunes are transposed, played on other instruments and at
other tempos; their captions follow, as they are computed after that.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from midi_llm.attributes import MusicAttributes, analyze
from midi_llm.captions import describe
from midi_llm.etudes import CHORDS, LEADS, TEMPOS, plan_etude, play
from midi_llm.midi_read import notes_of_score, read_score
from midi_llm.midi_write import Style, to_score
from midi_llm.notes import Notes
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOICES = ((40, 48, 19, 33), (73, 65, 0, 33), (56, 11, 24, 33))  # of four-part chorales
SIXTEENTHS = 4  # a quarter note has


@dataclass(frozen=True, eq=False)
class Pair:
    """A piece with its caption.

    Attributes:
        notes: The piece.
        attributes: Computed from it.
        caption: Written of them.
        source: "etude", "nottingham" or "jsb".
        tune: Which one of the source it is: pairs of one tune differ in key, tempo and instruments.
    """

    notes: Notes
    attributes: MusicAttributes
    caption: str
    source: str
    tune: int


def etude_pairs(count: int, seed: int, *, seconds: float = 12.0) -> Iterator[Pair]:
    """Yield etudes with captions."""
    for number in range(count):
        rng = np.random.default_rng([seed, 0, number])
        plan = plan_etude(rng, seconds=seconds)
        style = Style(tempo=plan.tempo, time_signature=(plan.beats, 4))
        yield _pair(play(plan, rng), style, rng, "etude", number)


def nottingham_pairs(
    folder: Path, count: int, seed: int, *, seconds: float = 12.0
) -> Iterator[Pair]:
    """Yield beginnings of folk tunes: melody and chords on other instruments, keys and tempos.

    Raises:
        UserError: the folder has no tunes.
    """
    files = sorted((folder / "nottingham" / "MIDI").glob("*.mid"))
    if not files:
        raise UserError(f"{folder} has no nottingham/MIDI/*.mid")
    order = np.random.default_rng([seed, 1]).permutation(len(files))
    made = 0
    while made < count:
        rng = np.random.default_rng([seed, 2, made])
        tune = int(order[made % len(files)])
        score = read_score(files[tune])
        metre = score.time_signatures[0] if len(score.time_signatures) else None
        tempo = score.tempos[0].qpm if len(score.tempos) else 120.0
        tracks = [track for track in score.tracks if len(track.notes)]
        lead, chords = int(rng.choice(LEADS)), int(rng.choice(CHORDS))
        for place, track in enumerate(tracks):
            track.is_drum = False
            track.program = lead if place == 0 else chords
        notes = notes_of_score(score)
        wanted = float(rng.choice(TEMPOS[1:-1]))
        scale = tempo / wanted
        shift = int(rng.integers(-5, 7))
        start = float(notes.onset[0])
        kept = notes[(notes.onset - start) * scale < seconds]
        piece = Notes.of(
            (kept.onset - start) * scale, kept.duration * scale, kept.instrument,
            np.clip(kept.pitch + shift, 0, 127),
        )  # fmt: skip
        signature = (metre.numerator, metre.denominator) if metre else (4, 4)
        made += 1
        style = Style(tempo=wanted, time_signature=signature)
        yield _pair(piece, style, rng, "nottingham", tune)


def jsb_pairs(folder: Path, count: int, seed: int, *, seconds: float = 12.0) -> Iterator[Pair]:
    """Yield beginnings of chorales, each voice on an instrument of its own.

    Raises:
        UserError: the file is missing or broken.
    """
    file = folder / "jsb" / "jsb-chorales-16th.json"
    try:
        pieces = [p for part in json.loads(file.read_text("utf-8")).values() for p in part]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    order = np.random.default_rng([seed, 3]).permutation(len(pieces))
    for made in range(count):
        rng = np.random.default_rng([seed, 4, made])
        tune = int(order[made % len(pieces)])
        piece = pieces[tune]
        rows = np.array([(*row, -1, -1, -1, -1)[:4] for row in piece])  # -1 is silence
        tempo = float(rng.choice(TEMPOS[:4]))
        step = 60.0 / tempo / SIXTEENTHS
        rows = rows[: int(seconds / step)]
        voices = VOICES[rng.integers(len(VOICES))]
        shift = int(rng.integers(-5, 7))
        found = []
        for voice, program in enumerate(voices[: rows.shape[1]]):
            column = rows[:, voice]
            starts = np.flatnonzero(np.diff(column, prepend=-2) != 0)
            ends = np.append(starts[1:], len(column))
            found += [
                (a * step, (b - a) * step * 0.95, program, int(column[a]) + shift)
                for a, b in zip(starts, ends, strict=True)
                if column[a] >= 0
            ]
        found.sort(key=lambda row: (row[0], row[2]))
        if not found:
            continue
        style = Style(tempo=tempo, time_signature=(4, 4))
        yield _pair(Notes.of(*zip(*found, strict=True)), style, rng, "jsb", tune)


def _pair(notes: Notes, style: Style, rng: np.random.Generator, source: str, tune: int) -> Pair:
    attributes = analyze(to_score(notes, style))
    caption = describe(attributes, style="short", seed=int(rng.integers(2**31)))
    return Pair(notes, attributes, caption, source, tune)


def text_tokenizer(captions: list[str], *, size: int = 512) -> "PreTrainedTokenizerFast":
    """Return a byte-pair tokenizer trained on captions, with `<bos>` and `<eos>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<bos>", "<eos>"], show_progress=False,  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")  # noqa: S106
