"""MIDI files and scores as notes in seconds.

What a note is depends on the order of messages: the program of a channel is the one in force when
the note begins, in whichever track it was set. Files are cut into messages one by one; all that
comes after that is done for many files at once, on arrays, since most files are small.
"""

import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.notes import MAX_SECONDS, Notes, empty_notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from symusic.core import ScoreTick

MAX_BYTES, MAX_NOTES = 16 * 2**20, 1_000_000
MAX_ODD = 200_000  # messages of a file that are not of the usual form
UNCLOSED = 0.25  # seconds that a note lasts that nothing ends
BATCH_BYTES, BATCH_FILES = 2**18, 1000  # of files that are read together
_PROGRAM, _META = 0xC, 0xFF
# A time, then perhaps a status that two bytes of data follow, then the data: what nearly all
# messages are. Cutting them out with these is several times faster than byte by byte in Python.
_TIME, _DATA = rb"[\x80-\xff]{0,3}+[\x00-\x7f]", rb"[\x00-\x7f]{2}"
_STATUS = rb"[\x80-\xbf\xe0-\xef]"
_MESSAGE = _TIME + _STATUS + b"?+" + _DATA
_ORDINARY = re.compile(b"(?:" + _MESSAGE + b")++")
_EXPLICIT = re.compile(_TIME + _STATUS + _DATA + b"(?:" + _MESSAGE + b")*+")
_SHORT = "a message cut short or with data over 127"
Source = str | PathLike[str] | bytes


def read_notes(source: Source, *, max_notes: int = MAX_NOTES) -> Notes:
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
    [found] = read_many([source], max_notes=max_notes)
    if isinstance(found, UserError):
        raise found
    return found


def read_many(
    sources: Iterable[Source], *, max_notes: int = MAX_NOTES
) -> Iterator[Notes | UserError]:
    """Read many files, small ones several times faster than `read_notes` one by one.

    Args:
        sources: Files, or their bytes.
        max_notes: More in one file are refused.

    Yields:
        What `read_notes` returns or raises, in the order of the sources.
    """
    batch = _Batch()
    for source in sources:
        batch.add(source)
        if batch.bytes >= BATCH_BYTES or len(batch.results) >= BATCH_FILES:
            yield from batch.notes(max_notes)
            batch = _Batch()
    yield from batch.notes(max_notes)


def read_score(source: Source) -> "ScoreTick":
    """Read a MIDI file as a `symusic.Score`, refusing what `read_notes` refuses.

    symusic leaves out notes that nothing ends, which `read_notes` gives 250 ms, and gives a channel
    the programs of its own track only.

    Raises:
        UserError: as of `read_notes`.
    """
    return read_piece(source)[1]


def read_piece(source: Source, *, max_notes: int = MAX_NOTES) -> "tuple[Notes, ScoreTick]":
    """Read a MIDI file both ways: what sounds, and a `symusic.Score` for tempo, metre and key.

    Args:
        source: A file, or its bytes.
        max_notes: More are refused.

    Raises:
        UserError: as of `read_notes`.
    """
    from symusic import Score

    notes = read_notes(source, max_notes=max_notes)
    data, name = _bytes(source)
    reader: Any = Score
    try:
        return notes, reader.from_midi(data)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def _bytes(source: Source) -> tuple[bytes, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "these bytes"
    elif not isinstance(source, str | PathLike):
        raise UserError(f"a source must be a file or its bytes, not {type(source).__name__}")
    else:
        path, name = Path(source), str(source)
        try:
            found = path.stat()
        except (OSError, ValueError):
            raise UserError(f"{name} is not there") from None
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{name} is a folder; name a MIDI file")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{name} is no file")
        if found.st_size > MAX_BYTES:
            raise UserError(f"{name} has {found.st_size} bytes; at most {MAX_BYTES} are read")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: {len(data)} bytes; at most {MAX_BYTES} are read")
    if not data:
        raise UserError(f"{name}: empty, not a MIDI file")
    if data[:4] == b"RIFF":
        raise UserError(f"{name}: RIFF-MIDI (.rmi); save it as a Standard MIDI File (.mid)")
    if data[:4] != b"MThd":
        raise UserError(f"{name}: not a MIDI file, it begins with {data[:4]!r}, not with b'MThd'")
    return data, name


# ------------------------------------------------------------------------------------------------
# Files into messages


@dataclass
class _Track:
    """A track as runs of ordinary messages, and the odd ones between them.

    Attributes:
        runs: Messages that are two bytes of data behind a time and perhaps a status.
        odd: Of each other message: how many runs stand before it, time, status (255 a tempo, -1 the
            end of the track, 0 what only passes time), data, data.
    """

    runs: list[bytes] = field(default_factory=list)
    odd: list[tuple[int, int, int, int, int]] = field(default_factory=list)


def _tracks(data: bytes) -> tuple[list[_Track], int]:
    """Return the tracks of a file, and its ticks a quarter note."""
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
    place, found, left = 8 + length, [], MAX_ODD
    while place < len(data) and len(found) < tracks:
        size = int.from_bytes(data[place + 4 : place + 8], "big")
        start = place + 8
        if start + size > len(data):
            raise UserError(
                f"truncated: the chunk at byte {place} says {size} bytes, but "
                f"{max(0, len(data) - start)} follow"
            )
        if data[place : place + 4] == b"MTrk":  # other chunks are to be passed over
            try:
                found.append(_split(data[start : start + size], left))
                left -= len(found[-1].odd)
            except IndexError:
                raise UserError(f"the track at byte {start} ends within a message") from None
            except ValueError as error:
                reason, where = error.args
                raise UserError(f"{reason} at byte {start + where}") from None
        place = start + size
    if len(found) < tracks:
        raise UserError(f"truncated: {tracks} tracks are announced, {len(found)} are there")
    return found, division


def _split(data: bytes, left: int) -> _Track:
    """Cut a track with so many odd messages at most.

    Raises IndexError where it ends within a message, else ValueError(reason, place).
    """
    track = _Track()
    status = i = 0
    while i < len(data):
        ordinary = _ORDINARY if status and not 0xC0 <= status < 0xE0 else _EXPLICIT
        if run := ordinary.match(data, i):
            track.runs.append(run[0])
            i, status = run.end(), 0x80
            continue
        time, i = _number(data, i, "time")
        byte = data[i]
        if byte > 127:
            i += 1
        elif 0xC0 <= status < 0xE0:
            byte = status
        else:
            raise ValueError(_SHORT if status else "data without a status", i)
        message = (len(track.runs), time, 0, 0, 0)
        if 0xC0 <= byte < 0xE0:
            message = (len(track.runs), time, byte, data[i], 0)
            if data[i] > 127:
                raise ValueError("data over 127", i)
            status, i = byte, i + 1
        elif byte == 0xFF:
            kind = data[i]
            size, i = _number(data, i + 1, "length")
            if kind == 0x51:
                message = (len(track.runs), time, byte, _tempo(data, i, size), 0)
            elif kind == 0x2F:
                message = (len(track.runs), time, -1, 0, 0)
            i += size
        elif byte in (0xF0, 0xF7):
            size, i = _number(data, i, "length")
            i, status = i + size, 0  # running status does not go on behind these
        elif byte >= 0xF0:
            raise ValueError(f"status {byte:#x} has no place in a file", i - 1)
        else:
            raise ValueError(_SHORT, i)
        if len(track.odd) >= left:
            raise ValueError(f"more than {MAX_ODD} messages that are neither notes nor controls", i)
        track.odd.append(message)
    if i > len(data):
        raise IndexError
    return track


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


# ------------------------------------------------------------------------------------------------
# Messages into notes


@dataclass(frozen=True)
class _Messages:
    """Messages of several files in the order of files and ticks; arrays `[n]` of int64.

    Attributes:
        file: The file each is of.
        tick: When it comes, from the start of its file.
        status: 255 a tempo, 0 what only passes time.
        first: Its data; of a tempo the microseconds a beat.
        second: Its data.
        starts: `[files + 1]` where each file's begin.
    """

    file: np.ndarray
    tick: np.ndarray
    status: np.ndarray
    first: np.ndarray
    second: np.ndarray
    starts: np.ndarray


class _Batch:
    """Files that are read together."""

    def __init__(self) -> None:
        self.bytes = 0
        self.results: list[tuple[str, UserError | None]] = []
        self.files: list[list[_Track]] = []
        self.division: list[int] = []

    def add(self, source: Source) -> None:
        """Take in a file; one that cannot be read is remembered with the reason."""
        name = ""
        try:
            data, name = _bytes(source)
            self.bytes += len(data)
            tracks, division = _tracks(data)
        except UserError as error:
            # what `_bytes` says names the file
            self.results.append((name, UserError(f"{name}: {error}") if name else error))
            return
        self.results.append((name, None))
        self.files.append(tracks)
        self.division.append(division)

    def notes(self, max_notes: int) -> Iterator[Notes | UserError]:
        """Yield what the files hold, in their order."""
        pieces = iter(_notes(self.files, self.division) if self.files else ())
        for name, error in self.results:
            if error is not None:
                yield error
                continue
            notes, lasts = next(pieces)
            if len(notes) > max_notes:
                yield UserError(f"{name}: {len(notes)} notes; at most {max_notes} are read")
            elif lasts > MAX_SECONDS:
                yield UserError(f"{name}: lasts {lasts:.0f} s; at most {MAX_SECONDS} s are read")
            else:
                yield notes


def _merged(files: list[list[_Track]]) -> _Messages:
    """Return the messages of all files, each file's tracks merged by tick, ties in their order."""
    tracks = [track for file in files for track in file]
    runs = [run for track in tracks for run in track.runs]
    raw = np.frombuffer(b"".join(runs), np.uint8)
    # An ordinary message has exactly three bytes under 128: the last of its time and its data.
    last, data, end = np.flatnonzero(raw < 128).reshape(-1, 3).T
    begin = np.concatenate([[0], end[:-1] + 1])[: len(end)]
    time = raw[last].astype(np.int64)
    longer = last - begin
    for more in range(1, int(longer.max(initial=0)) + 1):
        byte = (raw[last - more] & 127).astype(np.int64)
        time += np.where(longer >= more, byte << 7 * more, 0)
    # What stands between is a status; where it is none, the last that was one goes on running.
    given = data - last == 2
    status = raw[data - 1].astype(np.int64)
    if not given.all():
        status = status[np.maximum.accumulate(np.where(given, np.arange(len(given)), 0))]
    ordinary = (time, status, raw[data].astype(np.int64), raw[end].astype(np.int64))

    # The odd ones go in between: how many ordinary ones stand before each run, then before each.
    before = np.concatenate([[0], np.searchsorted(end, np.cumsum([len(run) for run in runs]))])
    first_run = np.cumsum([0] + [len(track.runs) for track in tracks])
    first_odd = np.cumsum([0] + [len(track.odd) for track in tracks])
    starts = before[first_run] + first_odd  # of the tracks
    rows = [row for track in tracks for row in track.odd]
    odd = np.array(rows, np.int64).reshape(-1, 5)
    run = odd[:, 0] + np.repeat(first_run[:-1], np.diff(first_odd))
    place = before[run] + np.arange(len(odd))
    plain = np.ones(len(end) + len(odd), bool)
    plain[place] = False
    made = np.empty((4, len(plain)), np.int64)
    for column, usual, rare in zip(made, ordinary, odd[:, 1:].T, strict=True):
        column[plain] = usual
        column[place] = rare
    time, status, first, second = made

    total = np.concatenate([[0], np.cumsum(time)])
    tick = total[1:] - np.repeat(total[starts[:-1]], np.diff(starts))
    starts = starts[np.cumsum([0] + [len(file) for file in files])]  # of the files
    size = np.diff(starts)
    file = np.repeat(np.arange(len(files)), size)
    if any(len(tracks) > 1 for tracks in files):
        # Files are kept apart by numbers that no tick of the files before reaches.
        apart = total[starts[:-1]] + np.arange(len(files))
        order = np.argsort(tick + apart[file], kind="stable")
        tick, status, first, second = tick[order], status[order], first[order], second[order]
    kept = status >= 0
    ended = np.concatenate([[0], np.cumsum(kept)])
    columns = (file, tick, status, first, second)
    return _Messages(*(column[kept] for column in columns), starts=ended[starts])


def _notes(files: list[list[_Track]], division: list[int]) -> Iterator[tuple[Notes, float]]:
    """Yield the notes of each file, and how many seconds its messages last."""
    messages = _merged(files)
    file, starts, first = messages.file, messages.starts, messages.first
    tempo = np.where(messages.status == _META, first, 0)
    seconds = _seconds(messages.tick, tempo, np.array(division), file, starts)
    kind, channel = messages.status >> 4, messages.status & 15
    which = np.flatnonzero((kind == 8) | (kind == 9))
    on = (kind[which] == 9) & (messages.second[which] > 0)
    sets = np.flatnonzero(kind == _PROGRAM)
    player = file * 16 + channel
    program = _in_force(player[sets], sets, first[sets], player[which], which)
    instrument = np.where(channel[which] == 9, DRUMS, program)
    begins, ends = _paired((player[which] * 256 + instrument) * 128 + first[which], on)
    opened = which[begins]
    onset = seconds[opened]
    duration = np.full(len(begins), UNCLOSED)
    closed = ends >= 0
    duration[closed] = seconds[which[ends[closed]]] - onset[closed]
    columns = (onset, duration, instrument[begins], first[opened], messages.second[opened])
    place = np.searchsorted(opened, starts)
    for number in range(len(files)):
        here = slice(place[number], place[number + 1])
        lasts = seconds[starts[number + 1] - 1] if starts[number + 1] > starts[number] else 0.0
        yield Notes(*(column[here] for column in columns)), float(lasts)


def _seconds(
    tick: np.ndarray,
    tempo: np.ndarray,
    division: np.ndarray,
    file: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray:
    """Return when messages come, added up message by message as AMT does, so that ties round alike.

    Args:
        tick: `[n]`, rising in each file.
        tempo: `[n]`, not 0 where a message sets it; it holds for the messages behind.
        division: `[files]`, ticks a quarter note.
        file: `[n]`, the file each message is of.
        starts: `[files + 1]`, where the messages of each begin.
    """
    passed = np.diff(tick, prepend=0)
    begins = starts[:-1][np.diff(starts) > 0]
    passed[begins] = tick[begins]
    last = np.maximum.accumulate(np.where(tempo > 0, np.arange(len(tick)), -1))
    before = np.concatenate([[-1], last[:-1]])[: len(tick)]
    in_force = np.where(before >= starts[file], tempo[before], 500_000)
    step = passed * (in_force * 1e-6 / division[file])
    made = np.empty(len(tick))
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        np.cumsum(step[start:stop], out=made[start:stop])
    return made


def _in_force(
    player: np.ndarray, when: np.ndarray, value: np.ndarray, asked: np.ndarray, now: np.ndarray
) -> np.ndarray:
    """Return the value that a player set last before now, 0 if none.

    Args:
        player: `[m]`, who sets a value.
        when: `[m]`, rising.
        value: `[m]`.
        asked: `[n]`, of whom it is wanted.
        now: `[n]`.
    """
    if not len(when):
        return np.zeros(len(asked), np.int64)
    span = max(int(when[-1]), int(now[-1]) if len(now) else 0) + 1
    order = np.argsort(player, kind="stable")
    player, when, value = player[order], when[order], value[order]
    last = np.searchsorted(player * span + when, asked * span + now) - 1
    return np.where((last >= 0) & (player[last] == asked), value[last], 0)


def _paired(key: np.ndarray, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair note_ons with note_offs of the same key, first in, first out.

    Returns:
        The indices of the note_ons, rising, and of the note_off of each, -1 where there is none.
    """
    order = _order(key)
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


def _order(key: np.ndarray) -> np.ndarray:
    """Return what `np.argsort(key, kind="stable")` does for keys >= 0, 16 bits at a time if it can.

    Numpy sorts 16 bits by radix, more by merging.
    """
    if key.max(initial=0) >= 2**32:
        return np.argsort(key, kind="stable")
    return np.lexsort((key.astype(np.uint16), (key >> 16).astype(np.uint16)))


def _rank(group: np.ndarray) -> np.ndarray:
    """Return the how-manieth of its group each is; groups stand together."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(np.append(first, len(group))))


# ------------------------------------------------------------------------------------------------
# Scores into notes


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
    one = np.zeros(len(ticks), np.int64)
    division = np.array([score.ticks_per_quarter])
    seconds = _seconds(ticks, tempo, division, one, np.array([0, len(ticks)]))
    if seconds[-1] > MAX_SECONDS:
        raise UserError(f"the score lasts {seconds[-1]:.0f} s; at most {MAX_SECONDS} s are read")
    onset = seconds[np.searchsorted(ticks, begin)]
    duration = seconds[np.searchsorted(ticks, begin + length)] - onset
    order = np.argsort(begin, kind="stable")
    return Notes(*(c[order] for c in (onset, duration, instrument, pitch, velocity)))
