"""MIDI files in and out: notes in seconds, exactly as arrival-time tokens want them.

Reading goes message by message in the order of the file, since what a note is depends on it: the
program of a channel is the one in force when the note begins, in whichever track it was set. All
arithmetic after that is on arrays.
"""

import logging
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.vocab import DRUMS, instrument_name
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from symusic.core import ScoreTick

MAX_BYTES, MAX_NOTES, MAX_SECONDS = 16 * 2**20, 1_000_000, 4 * 3600
MAX_ODD = 200_000  # messages of a track that are not of the usual form
UNCLOSED = 0.25  # seconds that a note lasts that nothing ends
PPQ = 480
OVERFLOW = ("merge", "drop", "error")
_NOTE, _PROGRAM, _META = 0x90, 0xC0, 0xFF
_KEYS = {"major": 0, "minor": 1}
_FIFTHS = "FCGDAEB"
# A time, then perhaps a status that two bytes of data follow, then the data: what nearly all
# messages are. Cutting them with these is several times faster than byte by byte in Python.
_TIME, _DATA = rb"[\x80-\xff]{0,3}+[\x00-\x7f]", rb"[\x00-\x7f]{2}"
_STATUS = rb"[\x80-\xbf\xe0-\xef]"
_MESSAGE = re.compile(_TIME + _STATUS + b"?+" + _DATA)
_ORDINARY = re.compile(b"(?:" + _MESSAGE.pattern + b")++")
_EXPLICIT = re.compile(_TIME + _STATUS + _DATA + b"(?:" + _MESSAGE.pattern + b")*+")
_SHORT = "a message cut short or with data over 127"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Notes:
    """Notes in the order of their onsets, ties in the order of the file; arrays of one length.

    Attributes:
        onset: Seconds, float64.
        duration: Seconds, float64, >= 0.
        instrument: 0 to 127 the program, 128 drums; int64.
        pitch: 0 to 127, int64.
        velocity: 1 to 127, int64.
    """

    onset: np.ndarray
    duration: np.ndarray
    instrument: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    def __len__(self) -> int:
        """How many notes there are."""
        return len(self.onset)

    def __getitem__(self, which: "np.ndarray | slice") -> "Notes":
        """Return some of the notes, by a mask, indices or a slice."""
        return Notes(*(values[which] for values in self.columns))

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """The five arrays."""
        return self.onset, self.duration, self.instrument, self.pitch, self.velocity

    @property
    def end(self) -> float:
        """When the last note ends, in seconds; 0 if there is none."""
        return float((self.onset + self.duration).max()) if len(self) else 0.0

    @classmethod
    def of(
        cls, onset: Any, duration: Any, instrument: Any, pitch: Any, velocity: Any = 72
    ) -> "Notes":
        """Make notes of anything that becomes arrays, as many as there are onsets.

        Of the other columns a single number stands for all notes.

        Raises:
            UserError: a value is out of range, or the onsets do not rise.
        """
        try:
            onset = np.atleast_1d(np.asarray(onset, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise UserError(f"onsets must be seconds: {error}") from error
        rest = {
            "duration": duration, "instrument": instrument, "pitch": pitch, "velocity": velocity,
        }  # fmt: skip
        made = [onset]
        for name, values in rest.items():
            dtype = np.float64 if name == "duration" else np.int64
            try:
                found = np.asarray(values, dtype=dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{name} must be numbers: {error}") from error
            if found.ndim and found.shape != onset.shape:
                raise UserError(f"{name} has shape {found.shape}, onset {onset.shape}")
            made.append(np.broadcast_to(found, onset.shape).copy())
        limits = {"onset": (0, MAX_SECONDS), "duration": (0, MAX_SECONDS), "instrument": (0, DRUMS),
                  "pitch": (0, 127), "velocity": (1, 127)}  # fmt: skip
        for (name, (low, high)), values in zip(limits.items(), made, strict=True):
            bad = ~((values >= low) & (values <= high))
            if bad.any():
                raise UserError(f"{name} must be {low} to {high}, not {values[bad][0]}")
        if (np.diff(onset) < 0).any():
            raise UserError("onsets must not fall; sort the notes by onset")
        return cls(*made)


def empty_notes() -> Notes:
    """Return no notes."""
    return Notes.of([], 0.0, 0, 0)


# ------------------------------------------------------------------------------------------------
# Reading


def read_notes(source: "str | PathLike[str] | bytes", *, max_notes: int = MAX_NOTES) -> Notes:
    """Read the notes of a Standard MIDI File.

    As AMT does: seconds add up over all messages in float64; a note_off ends the oldest open note
    of its channel, pitch and instrument; what nothing ends lasts 250 ms.

    Args:
        source: A file, or its bytes.
        max_notes: More are refused.

    Raises:
        UserError: the file is missing, larger than 16 MiB, not a MIDI file, truncated or broken
            (the message says where), of SMPTE times, of several songs, longer than four hours, or
            has too many notes.
    """
    data, name = _bytes(source)
    try:
        ticks, division = _messages(data, max_notes)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return _notes(ticks, division, name)


def read_score(source: "str | PathLike[str] | bytes") -> "ScoreTick":
    """Read a MIDI file as a `symusic.Score`, refusing what `read_notes` refuses.

    symusic leaves out notes that nothing ends, which `read_notes` gives 250 ms, and gives a channel
    the programs of its own track only.

    Raises:
        UserError: as of `read_notes`.
    """
    data, name = _bytes(source)
    read_notes(data)
    from symusic import Score

    reader: Any = Score
    try:
        return reader.from_midi(data)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def _bytes(source: "str | PathLike[str] | bytes") -> tuple[bytes, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "these bytes"
    else:
        path = Path(source)
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a MIDI file")
        if not path.is_file():
            raise UserError(f"{path} is not there")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        data, name = path.read_bytes(), str(path)
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: {len(data)} bytes; at most {MAX_BYTES} are read")
    if not data:
        raise UserError(f"{name}: empty, not a MIDI file")
    if data[:4] == b"RIFF":
        raise UserError(f"{name}: RIFF-MIDI (.rmi); save it as a Standard MIDI File (.mid)")
    if data[:4] != b"MThd":
        raise UserError(f"{name}: not a MIDI file, it begins with {data[:4]!r}, not with b'MThd'")
    return data, name


def _messages(data: bytes, max_notes: int) -> tuple[np.ndarray, int]:
    """Return the messages of all tracks, merged by tick: `[n, 4]` of tick, status, data, data."""
    if len(data) < 14:
        raise UserError("truncated in its header")
    length, kind, tracks, division = (
        int.from_bytes(data[a:b], "big") for a, b in ((4, 8), (8, 10), (10, 12), (12, 14))
    )
    if length < 6:
        raise UserError(f"its header says {length} bytes, must be 6")
    if kind == 2:
        raise UserError("format 2 (several songs in one file); save each song by itself")
    if kind > 2:
        raise UserError(f"format {kind}, which there is not; it must be 0 or 1")
    if division & 0x8000:
        raise UserError("its times are in SMPTE frames; save it with ticks per quarter note")
    if division == 0:
        raise UserError("it says 0 ticks per quarter note")
    place, found, parts = 8 + length, 0, []
    while place < len(data) and found < tracks:
        size = int.from_bytes(data[place + 4 : place + 8], "big")
        if place + 8 + size > len(data):
            raise UserError(
                f"truncated: the chunk at byte {place} says {size} bytes, but "
                f"{max(0, len(data) - place - 8)} follow"
            )
        if data[place : place + 4] == b"MTrk":  # other chunks are to be passed over
            found += 1
            parts.append(_track(data[place + 8 : place + 8 + size], place + 8))
        place += 8 + size
    if found < tracks:
        raise UserError(f"truncated: {tracks} tracks are announced, {found} are there")
    merged = np.concatenate(parts) if parts else np.zeros((0, 4), np.int64)
    if len(parts) > 1:
        merged = merged[np.argsort(merged[:, 0], kind="stable")]
    count = int(((merged[:, 1] >> 4 == _NOTE >> 4) & (merged[:, 3] > 0)).sum())
    if count > max_notes:
        raise UserError(f"{count} notes; at most {max_notes} are read")
    return merged, division


def _track(data: bytes, place: int) -> np.ndarray:
    """Return the messages of a track: tick, status (255 a tempo, 0 what only passes time), data."""
    try:
        sizes, odd = _split(data)
    except IndexError:
        raise UserError(f"the track at byte {place} ends within a message") from None
    except ValueError as error:
        reason, where = error.args
        raise UserError(f"{reason} at byte {place + where}") from None
    if not sizes:
        return np.zeros((0, 4), np.int64)
    # An ordinary message ends with two bytes of data; before them stands its status or, where that
    # goes on running, the last byte of its time, which is under 128.
    raw = np.frombuffer(data, np.uint8).astype(np.int64)
    size = np.array(sizes)
    end = size.cumsum()
    where = list(odd)
    made = np.empty((len(size), 4), np.int64)
    time, status = made[:, 0], made[:, 1]
    status[:] = raw[end - 3]
    explicit = status > 127
    made[:, 2], made[:, 3] = raw[end - 2], raw[end - 1]
    last = end - 3 - explicit  # the last byte of the time
    length = last - end + size + 1
    length[where] = 1
    time[:] = raw[last] & 127
    for more in range(1, int(length.max())):
        time += np.where(length > more, (raw[last - more] & 127) << 7 * more, 0)
    if odd:
        made[where] = list(odd.values())
    explicit[where] = True
    if not explicit.all():  # the others go on with the last status that was one
        channel = explicit & (status < 0xF0) & (status >= 0x80)
        last = np.maximum.accumulate(np.where(channel, np.arange(len(size)), 0))
        status[:] = np.where(explicit, status, status[last])
    time[:] = time.cumsum()
    return made[status >= 0]


def _split(data: bytes) -> tuple[list[int], dict[int, tuple[int, int, int, int]]]:
    """Cut a track into messages.

    Returns:
        The bytes of each, its time included, and of those that are not two bytes of data behind a
        time and perhaps a status: time, status (-1 the end of the track), data, data.
    """
    sizes: list[int] = []
    odd: dict[int, tuple[int, int, int, int]] = {}
    status = i = 0
    while i < len(data):
        ordinary = _ORDINARY if status and not 0xC0 <= status < 0xE0 else _EXPLICIT
        if run := ordinary.match(data, i):
            sizes += map(len, _MESSAGE.findall(data, i, run.end()))
            i, status = run.end(), 0x80
            continue
        start = i
        time, i = _number(data, i, "time")
        byte = data[i]
        if byte > 127:
            i += 1
        elif 0xC0 <= status < 0xE0:
            byte = status
        else:
            raise ValueError(_SHORT if status else "data without a status", i)
        message = (time, 0, 0, 0)
        if 0xC0 <= byte < 0xE0:
            message = (time, byte, data[i], 0)
            if data[i] > 127:
                raise ValueError("data over 127", i)
            status, i = byte, i + 1
        elif byte == 0xFF:
            kind = data[i]
            size, i = _number(data, i + 1, "length")
            if kind == 0x51:
                message = (time, byte, _tempo(data, i, size), 0)
            elif kind == 0x2F:
                message = (time, -1, 0, 0)
            i += size
        elif byte in (0xF0, 0xF7):
            size, i = _number(data, i, "length")
            i, status = i + size, 0  # running status does not go on behind these
        elif byte >= 0xF0:
            raise ValueError(f"status {byte:#x} has no place in a file", i - 1)
        else:
            raise ValueError(_SHORT, i)
        if len(odd) >= MAX_ODD:
            raise ValueError(f"more than {MAX_ODD} messages that are neither notes nor controls", i)
        odd[len(sizes)] = message
        sizes.append(i - start)
    if i > len(data):
        raise IndexError
    return sizes, odd


def _number(data: bytes, i: int, what: str) -> tuple[int, int]:
    """Return the number of variable length at `i`, and where it ends."""
    value = 0
    for at in range(i, i + 4):
        value = value << 7 | data[at] & 127
        if data[at] < 128:
            return value, at + 1
    raise ValueError(f"a {what} of more than four bytes", i)


def _tempo(data: bytes, i: int, size: int) -> int:
    if size != 3:
        raise ValueError(f"a tempo of {size} bytes, must be 3", i)
    data[i + 2]  # raises where the track ends
    if not (tempo := int.from_bytes(data[i : i + 3], "big")):
        raise ValueError("a tempo of 0 microseconds a beat", i)
    return tempo


def _notes(messages: np.ndarray, division: int, name: str) -> Notes:
    tick, status, first, second = messages.T
    seconds = _seconds(tick, np.where(status == _META, first, 0), division)
    if len(seconds) and seconds[-1] > MAX_SECONDS:
        raise UserError(f"{name}: lasts {seconds[-1]:.0f} s; at most {MAX_SECONDS} s are read")
    kind, channel = status >> 4, status & 15
    program = _in_force(kind == _PROGRAM >> 4, channel, first)
    which = np.flatnonzero((kind == 8) | (kind == 9))
    on = (kind[which] == 9) & (second[which] > 0)
    channel, pitch, velocity = channel[which], first[which], second[which]
    instrument = np.where(channel == 9, DRUMS, program[which])
    begins, ends = _paired((instrument * 16 + channel) * 128 + pitch, on)
    onset = seconds[which[begins]]
    duration = np.full(len(begins), UNCLOSED)
    closed = ends >= 0
    duration[closed] = seconds[which[ends[closed]]] - onset[closed]
    return Notes(onset, duration, instrument[begins], pitch[begins], velocity[begins])


def _seconds(tick: np.ndarray, tempo: np.ndarray, division: int) -> np.ndarray:
    """Return when messages come, added up message by message as AMT does, so that ties round alike.

    `tempo` is not 0 where a message sets it; it holds for the messages behind.
    """
    last = np.maximum.accumulate(np.where(tempo > 0, np.arange(len(tick)), -1))
    before = np.concatenate([[-1], last[:-1]])[: len(tick)]
    in_force = np.where(before >= 0, tempo[before], 500_000)
    return np.cumsum(np.diff(tick, prepend=0) * (in_force * 1e-6 / division))


def _in_force(sets: np.ndarray, channel: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the program of a message's channel that was set last before it."""
    program = np.zeros(len(channel), np.int64)
    for one in np.unique(channel[sets]):
        here = channel == one
        last = np.maximum.accumulate(np.where(sets & here, np.arange(len(channel)), -1))
        known = here & (last >= 0)
        program[known] = value[last[known]]
    return program


def _paired(key: np.ndarray, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair note_ons with note_offs of the same key, first in, first out.

    Returns:
        The indices of the note_ons, rising, and of the note_off of each, -1 where there is none.
    """
    order = np.argsort(key, kind="stable")
    starts, key = on[order], key[order]
    fresh = np.diff(key, prepend=-1) != 0  # the first of its key
    group = np.cumsum(fresh) - 1
    # How many began less how many ended; an off that finds no note open takes it to a new minimum
    # of its group. One running minimum does for all groups if they are set apart far enough.
    step = np.where(starts, 1, -1)
    total = np.cumsum(step)
    total = total - (total - step)[fresh][group]
    apart = group * (2 * len(key) + 2)
    lowest = np.minimum.accumulate(np.minimum(total, 0) - apart) + apart
    before = np.where(fresh, 0, np.concatenate([[0], lowest[:-1]])[: len(key)])
    opens, closes = np.flatnonzero(starts), np.flatnonzero(~starts & (total >= before))
    place = len(key) + 1
    of_on, of_off = (group[i] * place + _rank(group[i]) for i in (opens, closes))
    ends = np.full(len(opens), -1, np.int64)
    ends[np.searchsorted(of_on, of_off)] = order[closes]
    begins = order[opens]
    back = np.argsort(begins, kind="stable")
    return begins[back], ends[back]


def _rank(group: np.ndarray) -> np.ndarray:
    """Return the how-manieth of its group each is; groups stand together."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(np.append(first, len(group))))


# ------------------------------------------------------------------------------------------------
# Writing


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


def notes_of_score(score: Any) -> Notes:
    """Return the notes of a `symusic.Score` in ticks, in seconds of float64.

    A Score does not keep the order of messages: among equal onsets tracks come in their order, and
    seconds add up over the onsets and ends of its notes.

    Raises:
        UserError: it is not in ticks, has a tempo of 0, or is longer than four hours.
    """
    if type(score).__name__ != "ScoreTick":
        kind = type(score).__name__
        raise UserError(f"the score must be in ticks (score.to('tick')), not {kind}")
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    for track in score.tracks:
        arrays = track.notes.numpy()
        one = DRUMS if track.is_drum else track.program if track.program < DRUMS else 255
        size = len(arrays["time"])
        for column, values in zip(
            columns,
            (arrays["time"], arrays["duration"], np.full(size, one), arrays["pitch"],
             arrays["velocity"]),
            strict=True,
        ):  # fmt: skip
            column.append(np.asarray(values, np.int64))
    if not columns[0]:
        return empty_notes()
    begin, length, instrument, pitch, velocity = (np.concatenate(c) for c in columns)
    if score.ticks_per_quarter < 1:
        raise UserError(f"the score has {score.ticks_per_quarter} ticks a quarter note")
    for name, values, low, high in (
        ("a program", instrument, 0, DRUMS), ("a pitch", pitch, 0, 127),
        ("a velocity", velocity, 1, 127), ("a duration", length, 0, 2**31),
    ):  # fmt: skip
        bad = (values < low) | (values > high)
        if bad.any():
            raise UserError(f"{name} of the score is {values[bad][0]}, must be {low} to {high}")
    tempos = score.tempos.numpy() if len(score.tempos) else {"time": [], "mspq": []}
    changes, mspq = (np.asarray(tempos[k], np.int64) for k in ("time", "mspq"))
    if (mspq <= 0).any():
        raise UserError("a tempo of 0 microseconds a beat")
    ticks = np.unique(np.concatenate([[0], changes, begin, begin + length]))
    if len(ticks) and ticks[0] < 0:
        raise UserError("a note begins before 0")
    tempo = np.zeros(len(ticks), np.int64)
    tempo[np.searchsorted(ticks, changes)] = mspq
    seconds = _seconds(ticks, tempo, score.ticks_per_quarter)
    if seconds[-1] > MAX_SECONDS:
        raise UserError(f"the score lasts {seconds[-1]:.0f} s; at most {MAX_SECONDS} s are read")
    onset = seconds[np.searchsorted(ticks, begin)]
    duration = seconds[np.searchsorted(ticks, begin + length)] - onset
    order = np.argsort(begin, kind="stable")
    return Notes(*(c[order] for c in (onset, duration, instrument, pitch, velocity)))
