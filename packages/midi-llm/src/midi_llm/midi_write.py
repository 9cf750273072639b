"""Notes as a `symusic.Score` or a MIDI file."""

import logging
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.notes import Notes
from midi_llm.vocab import DRUMS, instrument_name
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from symusic.core import ScoreTick

PPQ = 480
OVERFLOW = ("merge", "drop", "error")
_KEYS = {"major": 0, "minor": 1}
_FIFTHS = "FCGDAEB"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Style:
    """What a file says beside its notes. None of it moves a note in real time.

    Attributes:
        tempo: Beats (quarter notes) a minute, 4 to 1000.
        time_signature: Beats of a bar, and the note that is one (a power of 2).
        key: Such as "C minor" or "F# major"; None writes none.
        accents: Louder on the first beat of each bar (velocity + 12) and on beats (+ 6): an
            invention of the writer, since tokens hold no velocities.
        on_overflow: What to do with more than 15 pitched instruments, as MIDI has 16 channels:
            "merge" (those with the fewest notes share a channel where their notes do not overlap,
            the others go to the nearest kept instrument), "drop" them, or "error".
    """

    tempo: float = 120.0
    time_signature: tuple[int, int] = (4, 4)
    key: str | None = None
    accents: bool = False
    on_overflow: str = "merge"

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        number = isinstance(self.tempo, int | float) and not isinstance(self.tempo, bool)
        if not (number and 4 <= self.tempo <= 1000):
            raise UserError(f"tempo must be 4 to 1000 beats a minute, not {self.tempo!r}")
        metre = self.time_signature
        pair = isinstance(metre, tuple | list) and len(metre) == 2
        if not (
            pair
            and all(isinstance(part, int) and not isinstance(part, bool) for part in metre)
            and 1 <= metre[0] <= 255
            and metre[1] in (1, 2, 4, 8, 16, 32)
        ):
            raise UserError(f"time_signature must be such as (3, 4), not {metre!r}")
        if self.on_overflow not in OVERFLOW:
            raise UserError(
                f"on_overflow must be one of {', '.join(OVERFLOW)}, not {self.on_overflow!r}."
                f"{suggest(str(self.on_overflow), OVERFLOW)}"
            )
        if self.key is not None:
            key_signature(self.key)


def style_of_score(score: Any) -> Style:
    """Return the tempo, metre and key with which a `symusic.Score` begins.

    What a score does not say, or says in a way that no `Style` can, stays as `Style` has it.
    """
    said: dict[str, Any] = {}
    if len(score.tempos):
        said["tempo"] = float(score.tempos[0].qpm)
    if len(score.time_signatures):
        metre = score.time_signatures[0]
        said["time_signature"] = (int(metre.numerator), int(metre.denominator))
    if len(score.key_signatures):
        said["key"] = _name_of_key(score.key_signatures[0])
    return with_what_fits(Style(), **said)


def with_what_fits(style: Style, **wished: Any) -> Style:
    """Return a style with other fields, but for those that are None or that no file can have.

    For what files and prompts say, which may be anything; none of it moves a note.
    """
    for name, value in wished.items():
        if value is not None:
            with suppress(UserError):
                style = replace(style, **{name: value})
    return style


def _name_of_key(signature: Any) -> str:
    """Return such as "Eb minor" for a signature of sharps (flats: negative) and mode."""
    place = int(signature.key) + 1 + 3 * int(signature.tonality)
    tonic = _FIFTHS[place % 7]
    sign = place // 7
    mode = "minor" if signature.tonality else "major"
    return f"{tonic}{'#' * sign}{'b' * -sign} {mode}"


def key_signature(key: str) -> tuple[int, int]:
    """Return the sharps (flats: negative) and 0 major or 1 minor of a key such as "Eb minor".

    Raises:
        UserError: it is no key, or one of more than seven sharps or flats.
    """
    tonic, mode = parse_key(key)
    sharps = _FIFTHS.index(tonic[0]) - 1 + 7 * (tonic.count("#") - tonic[1:].count("b"))
    sharps -= 3 * _KEYS[mode]
    if not -7 <= sharps <= 7:
        raise UserError(f"{key} has {abs(sharps)} sharps or flats; write it as its enharmonic")
    return sharps, _KEYS[mode]


def parse_key(key: str) -> tuple[str, str]:
    """Return tonic and mode of a key: "c min", "C minor" and "Cm" give ("C", "minor").

    Raises:
        UserError: it is no key.
    """
    found = re.fullmatch(r"\s*([A-Ga-g])\s*([#b\u266f\u266d]?)[\s-]*(\w*)\s*", str(key))
    modes = {"": "major", "M": "major", "maj": "major", "major": "major",
             "m": "minor", "min": "minor", "minor": "minor"}  # fmt: skip
    if not found or (found[3] not in modes and found[3].lower() not in modes):
        raise UserError(f"{key!r} is no key; write one such as 'C minor', 'F# major' or 'Bb'")
    sign = found[2].replace("\u266f", "#").replace("\u266d", "b")
    mode = found[3] if found[3] in modes else found[3].lower()
    return found[1].upper() + sign, modes[mode]


def to_score(notes: Notes, style: Style | None = None) -> "ScoreTick":
    """Return notes as a `symusic.Score` of 480 ticks a quarter note, one track an instrument.

    Onsets and ends are moved by at most half a tick (0.5 ms at 120 beats a minute). A note that
    would last no tick lasts one. Of more than 15 pitched instruments those with the fewest notes
    are merged, dropped or refused, as the style says: in a Score they cannot share a channel, which
    `write_midi` lets them.

    Raises:
        UserError: there are too many instruments and `on_overflow` is "error".
    """
    from symusic import KeySignature, Note, Score, Tempo, TimeSignature, Track

    style = style or Style()
    notes, _ = _channels(notes, style, share=False)
    begin, length, velocity = _in_ticks(notes, style)
    score: Any = Score(PPQ)
    score.tempos.append(Tempo(0, mspq=_mspq(style)))
    score.time_signatures.append(TimeSignature(0, *style.time_signature))
    if style.key is not None:
        score.key_signatures.append(KeySignature(0, *key_signature(style.key)))
    for instrument in _by_entry(notes.instrument):
        here = notes.instrument == instrument
        track: Any = Track(
            name=instrument_name(instrument),
            program=0 if instrument == DRUMS else int(instrument),
            is_drum=bool(instrument == DRUMS),
        )
        columns = (begin[here], length[here], notes.pitch[here], velocity[here])
        kinds = (np.int32, np.int32, np.int8, np.int8)
        track.notes = Note.from_numpy(*(c.astype(k) for c, k in zip(columns, kinds, strict=True)))
        score.tracks.append(track)
    return score


def write_midi(
    notes: Notes,
    path: "str | PathLike[str]",
    style: Style | None = None,
    *,
    writer: str = "symusic",
) -> None:
    """Write notes as a MIDI file, whole or not at all.

    Args:
        notes: May be empty.
        path: Where to; what is there is replaced.
        style: Tempo, metre, key, and what to do with too many instruments.
        writer: "symusic", or "mido", which gives the same music, slower.

    Raises:
        UserError: there are too many instruments and `on_overflow` is "error".
    """
    if writer not in ("symusic", "mido"):
        raise UserError(f"writer must be 'symusic' or 'mido', not {writer!r}")
    style = style or Style()
    if writer == "mido" or _crowded(notes):
        data = _through_mido(notes, style)
    else:
        data = to_score(notes, style).dumps_midi()
    with atomic_write(Path(path), "wb") as stream:
        stream.write(data)


def _mspq(style: Style) -> int:
    return round(60e6 / style.tempo)


def _in_ticks(notes: Notes, style: Style) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return begin, length and velocity of notes, in ticks of the file."""
    rate = PPQ * 1e6 / _mspq(style)
    begin = np.rint(notes.onset * rate).astype(np.int64)
    end = np.rint((notes.onset + notes.duration) * rate).astype(np.int64)
    if len(end) and end.max() >= 2**31:
        raise UserError(f"the music is too long for one file at tempo {style.tempo:g}")
    velocity = notes.velocity
    if style.accents:
        beats, unit = style.time_signature
        beat = PPQ * 4 // unit
        accent = np.where(begin % (beat * beats) == 0, 12, np.where(begin % beat == 0, 6, 0))
        velocity = np.minimum(velocity + accent, 127)
    return begin, np.maximum(end - begin, 1), velocity


def _by_entry(instrument: np.ndarray) -> list[int]:
    """Return the instruments in the order in which they come in."""
    found, first = np.unique(instrument, return_index=True)
    return [int(i) for i in found[np.argsort(first)]]


def _crowded(notes: Notes) -> bool:
    return len(np.unique(notes.instrument[notes.instrument != DRUMS])) > 15


def _channels(notes: Notes, style: Style, *, share: bool = True) -> tuple[Notes, dict[int, int]]:
    """Give every instrument a channel; see `Style.on_overflow` for when there are too few.

    `share`: whether instruments may take turns on one.
    """
    pitched = [i for i in _by_entry(notes.instrument) if i != DRUMS]
    free = [c for c in range(16) if c != 9]
    if len(pitched) <= len(free):
        return notes, {DRUMS: 9, **dict(zip(pitched, free, strict=False))}
    count = {i: int((notes.instrument == i).sum()) for i in pitched}
    ranked = sorted(pitched, key=lambda i: (-count[i], i))
    channel = {DRUMS: 9, **dict(zip(ranked[:15], free, strict=True))}
    begin, length, _ = _in_ticks(notes, style)
    instrument = notes.instrument.copy()
    dropped = np.zeros(len(notes), bool)
    left = []
    for one in ranked[15:]:
        mine = instrument == one
        for number in free if share else ():
            on = np.isin(instrument, [i for i, c in channel.items() if c == number])
            if not _overlap(begin[on], length[on], begin[mine], length[mine]):
                channel[one] = number
                break
        else:
            left.append(one)
    if left and style.on_overflow == "error":
        raise UserError(
            f"{len(pitched)} pitched instruments, but a MIDI file has channels for 15: "
            f"{', '.join(instrument_name(i) for i in left)} do not fit; set on_overflow to 'merge' "
            "or 'drop'"
        )
    for one in left:
        if style.on_overflow == "drop":
            dropped |= instrument == one
        else:
            near = min(ranked[:15], key=lambda i: (i // 8 != one // 8, abs(i - one)))
            instrument[instrument == one] = near
    if left:
        logger.warning(
            "%d instruments have no channel of their own: %s %s",
            len(left), style.on_overflow, ", ".join(instrument_name(i) for i in left),
        )  # fmt: skip
    kept = ~dropped
    columns = (notes.onset, notes.duration, instrument, notes.pitch, notes.velocity)
    return Notes(*(c[kept] for c in columns)), channel


def _overlap(
    begin: np.ndarray, length: np.ndarray, begin2: np.ndarray, length2: np.ndarray
) -> bool:
    """Whether a note of the first (sorted by begin) sounds together with one of the second."""
    latest = np.maximum.accumulate(begin + length)
    before = np.searchsorted(begin, begin2 + length2)  # those that begin before it ends
    some = before > 0
    return bool((latest[before[some] - 1] > begin2[some]).any())


def _through_mido(notes: Notes, style: Style) -> bytes:
    """Write one track a channel, so that instruments can take turns on it."""
    import io

    import mido

    notes, channel = _channels(notes, style)
    begin, length, velocity = _in_ticks(notes, style)
    of = np.array([channel[int(i)] for i in notes.instrument], np.int64)
    midi = mido.MidiFile(type=1, ticks_per_beat=PPQ)
    midi.tracks.append(_head(style))
    for number in dict.fromkeys(of.tolist()):
        here = np.flatnonzero(of == number)
        names = [instrument_name(i) for i in _by_entry(notes.instrument[here])]
        track = mido.MidiTrack([mido.MetaMessage("track_name", name=" / ".join(names))])
        # note_offs come first at a tick, then programs, then note_ons
        rows = [
            (tick, kind, order)
            for order, note in enumerate(here)
            for tick, kind in ((int(begin[note] + length[note]), 0), (int(begin[note]), 2))
        ]
        now, program = 0, None
        for tick, kind, order in sorted(rows):
            note = here[order]
            wanted = int(notes.instrument[note])
            if kind and wanted not in (program, DRUMS):
                track.append(
                    mido.Message("program_change", channel=number, program=wanted, time=tick - now)
                )
                now, program = tick, wanted
            track.append(
                mido.Message(
                    "note_on" if kind else "note_off", channel=number, note=int(notes.pitch[note]),
                    velocity=int(velocity[note]) if kind else 0, time=tick - now,
                )
            )  # fmt: skip
            now = tick
        midi.tracks.append(track)
    stream = io.BytesIO()
    midi.save(file=stream)
    return stream.getvalue()


def _head(style: Style) -> Any:
    import mido

    beats, unit = style.time_signature
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("set_tempo", tempo=_mspq(style)))
    track.append(mido.MetaMessage("time_signature", numerator=beats, denominator=unit))
    if style.key is not None:
        tonic, mode = parse_key(style.key)
        track.append(mido.MetaMessage("key_signature", key=tonic + "m" * (mode == "minor")))
    return track
