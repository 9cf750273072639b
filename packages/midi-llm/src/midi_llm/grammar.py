"""Which music ids may come next: the grammar of events, and what a user asks for on top of it.

One state machine serves every engine. Apart from notes, whose sets have gaps, what is allowed is
one range of ids and perhaps the separator: nothing as long as the vocabulary is ever built.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from midi_llm.anticipate import REST
from midi_llm.midi_write import parse_key
from midi_llm.vocab import DRUMS, AMTConfig, instrument_number
from tenfold_common.errors import UserError, suggest

MOST_AT_ONCE = 64  # notes that begin at one tick; the public script refuses pieces with more
CHANNELS = 15  # pitched instruments that a MIDI file has room for
_TONICS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
# The minor scale with both sevenths, since the raised one belongs to its harmony.
_SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10, 11)}


def scale_of(key: str) -> frozenset[int]:
    """Return the pitch classes 0 (C) to 11 of a key; in minor both sevenths belong to it.

    Raises:
        UserError: it is no key.
    """
    tonic, mode = parse_key(key)
    root = _TONICS[tonic[0]] + tonic.count("#") - tonic[1:].count("b")
    return frozenset((root + step) % 12 for step in _SCALES[mode])


@dataclass(frozen=True)
class GenerationConstraints:
    """What generated music must keep to, whatever the model would like. None leaves it free.

    Attributes:
        instruments: Numbers 0 to 128 or names; no other sounds.
        key: Such as "C minor"; pitched notes are of its scale, drums are free.
        pitch_range: Lowest and highest pitch, 0 to 127, of pitched notes.
        max_polyphony: How many notes sound at once at most.
        end_time: Seconds before which every note begins and ends.
        notes_per_second: From the beginning of what is new to any moment there are at most so many
            in the mean, and one second's worth more, rounded up.
        min_notes: The piece may not end with fewer.
    """

    instruments: "Sequence[int | str] | None" = None
    key: str | None = None
    pitch_range: "tuple[int, int] | None" = None
    max_polyphony: int | None = None
    end_time: float | None = None
    notes_per_second: float | None = None
    min_notes: int = 1

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        if self.instruments is not None and (
            isinstance(self.instruments, str) or not isinstance(self.instruments, Sequence)
        ):
            raise UserError(
                f"instruments is a list, such as ['piano', 'drums'], not {self.instruments!r}"
            )
        if self.instruments is not None:
            if not self.instruments:
                raise UserError("instruments is empty, so that no note is left")
            for name in self.instruments:
                instrument_number(name)
        if self.key is not None:
            parse_key(self.key)
        if self.pitch_range is not None:
            pair = self.pitch_range
            if (
                not isinstance(pair, tuple | list)
                or len(pair) != 2
                or any(isinstance(p, bool) or not isinstance(p, int) for p in pair)
                or not 0 <= pair[0] <= pair[1] <= 127
            ):
                raise UserError(
                    f"pitch_range must be two pitches that rise within 0 to 127: {pair!r}"
                )
        for name in ("max_polyphony", "min_notes"):
            value = getattr(self, name)
            low = 0 if name == "min_notes" else 1
            free = value is None and name != "min_notes"
            if not free and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UserError(f"{name} must be a whole number of at least {low}, not {value!r}")
        for name in ("end_time", "notes_per_second"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise UserError(f"{name} must be over 0 and finite, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationConstraints":
        """Rebuild constraints from their fields.

        Raises:
            UserError: a field is unknown or wrong.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"there is no constraint {name!r}.{suggest(name, known)}")
        values = dict(values)
        if isinstance(values.get("pitch_range"), list):  # as JSON has it
            values["pitch_range"] = tuple(values["pitch_range"])
        return cls(**values)


class Allowed(NamedTuple):
    """What may come next: `start` to before `stop`, of those where `mask` is true; and `extra`.

    Attributes:
        start: First id.
        stop: The id behind the last.
        mask: `[stop - start]` bool, or None for all.
        extra: One more id (the separator), or None.
    """

    start: int
    stop: int
    mask: np.ndarray | None = None
    extra: int | None = None

    def ids(self) -> np.ndarray:
        """Return all of them, rising."""
        found = np.arange(self.start, self.stop)
        found = found if self.mask is None else found[self.mask]
        return found if self.extra is None else np.append(found, self.extra)

    def __contains__(self, id: object) -> bool:
        """Whether an id is among them."""
        if not isinstance(id, int | np.integer):
            return False
        if id == self.extra:
            return True
        inside = self.start <= id < self.stop
        return bool(inside and (self.mask is None or self.mask[id - self.start]))


class Rules:
    """Constraints on a grid, ready for use; made once for all sequences that keep to them.

    Args:
        config: The grid.
        constraints: What the user asks for.

    Raises:
        UserError: nothing is left that could be played; the message names the constraints.
    """

    def __init__(self, config: AMTConfig, constraints: GenerationConstraints | None = None) -> None:
        self.config = config
        self.constraints = constraints = constraints or GenerationConstraints()
        instruments = np.ones(config.instruments, bool)
        if constraints.instruments is not None:
            numbers = [instrument_number(name) for name in constraints.instruments]
            instruments[:] = False
            instruments[[config.of_instrument(n) for n in numbers]] = True
        pitches = np.ones(config.pitches, bool)
        if constraints.key is not None:
            scale = scale_of(constraints.key)
            pitches &= [p % 12 in scale for p in range(config.pitches)]
        if constraints.pitch_range is not None:
            low, high = constraints.pitch_range
            pitches[:low] = pitches[high + 1 :] = False
        notes = instruments[:, None] & pitches[None, :]
        self.drums = config.of_instrument(DRUMS)
        notes[self.drums] = instruments[self.drums]  # drums have no pitch
        if not notes.any():
            given = [n for n in ("instruments", "key", "pitch_range") if getattr(constraints, n)]
            raise UserError(f"no note is left by {' and '.join(given)} together")
        self.notes = notes.ravel()
        self.all = bool(self.notes.all())
        end = config.times
        if constraints.end_time is not None:
            end = min(end, math.floor(constraints.end_time * config.resolution))
            if end < 1:
                raise UserError(
                    f"end_time {constraints.end_time:g} s is before the first tick of the grid, "
                    f"{1 / config.resolution:g} s"
                )
        self.end = end
        self.burst = max(1, math.ceil(constraints.notes_per_second or 0))


class Grammar:
    """The state of one sequence: what it may go on with, id by id.

    Args:
        rules: What it keeps to.
        max_events: Events after which it ends; rests count, those given do not.
        given: `[n, 3]` events that stand before, within the same window; their durations may be
            longer than the grid's.
        controls: `[m, 3]` events to anticipate: each is forced in, as three ids of a control, as
            soon as an event is at most five seconds before it. They are not doubled and count
            among the 15 instruments, but not for `max_polyphony` or `max_events`.
        placed: How many of the controls, the first ones, the prompt holds already.
        start: Tick before which no event may begin.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        max_events: int,
        given: np.ndarray | None = None,
        controls: np.ndarray | None = None,
        placed: int = 0,
        start: int = 0,
    ) -> None:
        self.rules, self.max_events = rules, max_events
        self.given, self.controls, self.placed, self.start = given, controls, placed, start
        self.events: list[tuple[int, int, int]] = []  # those pushed, without controls
        self.finish_reason: str | None = None  # "stop", "end_time", "length" or "stuck"
        self.error: UserError | None = None  # why it is stuck
        self._slot = self._time = self._duration = 0
        self._last, self._start = 0, start
        self._notes = 0
        self._ends: list[int] = []  # of the notes that may still sound, rising
        self._now: set[int] = set()  # notes that begin at the last onset
        self._seen: set[int] = set()  # pitched instruments
        self._mask = rules.notes
        self._free = self._count()
        self._left = [] if controls is None else controls.tolist()[::-1]
        self._kept: dict[int, set[int]] = {}  # notes of the controls by onset
        for time, _, note in self._left:
            self._kept.setdefault(time, set()).add(note)
            self._hear(note // rules.config.pitches)
        del self._left[len(self._left) - placed :]
        self._forced: list[int] = []
        for event in [] if given is None else given.tolist():
            self._enter(*event)
        self._begins, self._given = max(self._last, start), self._notes
        self._force()

    @property
    def slot(self) -> int:
        """0 before an onset, 1 before a duration, 2 before a note."""
        return self._slot

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def allowed(self) -> Allowed:
        """Return what may come next.

        Raises:
            UserError: nothing may, since a constraint keeps it from going on and from ending.
        """
        if self._forced:
            return Allowed(self._forced[-1], self._forced[-1] + 1)
        config = self.rules.config
        if self._slot == 0:
            low = self._earliest() if self._free else self.rules.end
            extra = config.separator if self._notes >= self.rules.constraints.min_notes else None
            if low >= self.rules.end:
                if extra is None:
                    if not self._free:
                        raise UserError(
                            f"no note is left: {CHANNELS} other instruments sound already, and "
                            "a MIDI file has no more channels; loosen instruments"
                        )
                    raise UserError(
                        f"the music ends after {self._notes} notes, but min_notes is "
                        f"{self.rules.constraints.min_notes}: {self._blame()}"
                    )
                return Allowed(extra, extra + 1)
            return Allowed(low, self.rules.end, None, extra)
        if self._slot == 1:
            # Each event that may still come is a note if that many notes are still wanted.
            wanted = self.rules.constraints.min_notes - self._notes
            rest = self._time > self._last and self.max_events - len(self.events) > wanted
            longest = config.durations
            if self.rules.constraints.end_time is not None:
                longest = min(longest, self.rules.end - self._time + 1)
            first = config.duration_offset
            return Allowed(first + (not rest), first + longest)
        if self._duration == 0:
            return Allowed(config.rest, config.rest + 1)
        mask = self._mask
        if taken := self._taken(self._time):
            mask = mask.copy()
            mask[list(taken)] = False
            if not mask.any():  # others play all of them here: doubling one is all that is left
                mask = self._mask
        whole = mask is self.rules.notes and self.rules.all
        return Allowed(config.note_offset, config.rest, None if whole else mask)

    def proceed(self) -> Allowed | None:
        """Return what may come next, or None where it has ended or, as nothing may, ends here."""
        if self.finished:
            return None
        try:
            return self.allowed()
        except UserError as error:
            self.finish_reason, self.error = "stuck", error
            return None

    def push(self, id: int) -> None:
        """Go on with an id.

        Raises:
            UserError: it is not allowed.
        """
        if self.finished:
            raise UserError(f"the sequence has ended ({self.finish_reason})")
        if id not in self.allowed():
            name = ("an onset", "a duration", "a note")[self._slot]
            raise UserError(
                f"id {id} ({self.rules.config.block(id)}) may not come here: the slot is that of "
                f"{name}"
            )
        config = self.rules.config
        if self._forced:
            self._forced.pop()
            self._slot = (self._slot + 1) % 3
            self._end_if_full()
            return
        if id == config.separator:
            self.finish_reason = "stop" if self._earliest() < self.rules.end else "end_time"
        elif self._slot == 0:
            self._time, self._slot = id, 1
        elif self._slot == 1:
            self._duration, self._slot = id - config.duration_offset, 2
        else:
            note = REST if id == config.rest else id - config.note_offset
            self.events.append((self._time, self._duration, note))
            self._enter(self._time, self._duration, note)
            self._slot = 0
            self._force()
            self._end_if_full()

    def _end_if_full(self) -> None:
        if len(self.events) >= self.max_events and not self._forced:
            self.finish_reason = "length"

    def _taken(self, time: int) -> set[int]:
        """Return the notes that begin at a tick already."""
        own = self._now if time == self._last else set()
        return own | self._kept.get(time, set())

    def _enter(self, time: int, duration: int, note: int) -> None:
        if time != self._last:
            self._now = set()
        self._last = time
        if note == REST:
            return
        self._notes += 1
        self._now.add(note)
        insort(self._ends, time + duration)
        self._hear(note // self.rules.config.pitches)

    def _hear(self, instrument: int) -> None:
        """Note an instrument; from the fifteenth on no other pitched one may join."""
        if instrument != self.rules.drums and instrument not in self._seen:
            self._seen.add(instrument)
            if len(self._seen) == CHANNELS:
                kept = np.zeros(self.rules.config.instruments, bool)
                kept[[*self._seen, self.rules.drums]] = True
                self._mask = self._mask & np.repeat(kept, self.rules.config.pitches)
                self._free = self._count()

    def _force(self) -> None:
        """Queue the controls that are due, the next id last."""
        config = self.rules.config
        while self._left and self._last >= self._left[-1][0] - config.delta:
            time, duration, note = self._left.pop()
            ids = (time, config.duration_offset + duration, config.note_offset + note)
            self._forced[:0] = [i + config.control_offset for i in reversed(ids)]

    def _count(self) -> int:
        return int(self._mask.sum())

    def _earliest(self) -> int:
        """Return the first tick at which an event may begin."""
        constraints, config = self.rules.constraints, self.rules.config
        low = max(self._last, self._start)
        if low == self._last and len(self._now) >= MOST_AT_ONCE:
            low += 1
        while low < self.rules.end and (taken := self._taken(low)):
            if sum(bool(self._mask[note]) for note in taken) < self._free:
                break
            low += 1  # every note that is left begins there already
        if constraints.notes_per_second is not None:
            due = (self._notes - self._given + 1 - self.rules.burst) / constraints.notes_per_second
            due = min(due * config.resolution, self.rules.end)  # a tiny rate may give infinity
            low = max(low, self._begins + math.ceil(due))
        if constraints.max_polyphony is not None:
            sounding = len(self._ends) - bisect_right(self._ends, low)
            if sounding >= constraints.max_polyphony:
                low = self._ends[-constraints.max_polyphony]
        return low

    def _blame(self) -> str:
        names = ("end_time", "notes_per_second", "max_polyphony")
        given = [n for n in names if getattr(self.rules.constraints, n) is not None]
        return f"loosen {' or '.join(given)}" if given else "the grid is too short"
