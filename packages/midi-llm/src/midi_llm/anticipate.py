"""Events on the grid as id sequences: rests, windows, and the controls of infilling.

Events are `[n, 3]` int64 arrays of onset, duration and instrument * 128 + pitch, all on the grid,
in the order of their onsets; a rest has -1 in place of the note. Section numbers are those of the
Anticipatory Music Transformer (arXiv 2306.08620).
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from midi_llm.notes import Notes

REST = -1
SPAN_RATE, SPAN_SECONDS = 0.05, 5.0  # of infilled spans: starts a second, length
Kind = Literal["none", "span", "random", "instrument"]


def events_of(notes: "Notes", config: AMTConfig, *, cut: bool = True) -> np.ndarray:
    """Round notes to the grid, onset and duration each by itself, ties to even.

    Durations are cut to the longest of the grid, unless `cut` is False.
    """
    made = np.empty((len(notes), 3), np.int64)
    made[:, 0] = np.rint(config.resolution * notes.onset)
    made[:, 1] = np.rint(config.resolution * notes.duration)
    if cut:
        made[:, 1] = np.minimum(made[:, 1], config.durations - 1)
    made[:, 2] = config.of_instrument(notes.instrument) * config.pitches + notes.pitch
    return made


def notes_of_events(events: np.ndarray, config: AMTConfig) -> "Notes":
    """Return the notes that events stand for, without the rests."""
    from midi_llm.notes import Notes

    events = events[events[:, 2] != REST]
    return Notes.of(
        events[:, 0] / config.resolution,
        events[:, 1] / config.resolution,
        config.to_instrument(events[:, 2] // config.pitches),
        events[:, 2] % config.pitches,
    )


def pad_rests(events: np.ndarray, config: AMTConfig, *, end: int | None = None) -> np.ndarray:
    """Put a rest into every second of silence, so that controls find their place (section 3.4).

    Args:
        events: With rising onsets.
        config: The grid.
        end: Tick up to which to go on behind the last event.

    Returns:
        The events with rests: where the next onset is over a second away, one a second.
    """
    onset = events[:, 0]
    stops = onset if end is None else np.append(onset, end)
    before = np.concatenate([[0], onset])[: len(stops)]
    count = np.maximum(-(-(stops - before) // config.second) - 1, 0)
    if not count.any():
        return events
    which = np.repeat(np.arange(len(stops)), count)
    number = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + 1
    rests = np.zeros((len(which), 3), np.int64)
    rests[:, 0] = before[which] + number * config.second
    rests[:, 2] = REST
    return np.insert(events, which, rests, axis=0)


def ids_of(
    events: np.ndarray, config: AMTConfig, *, control: bool | np.ndarray = False
) -> np.ndarray:
    """Return the ids of events, three each, `[3 n]` int64.

    Args:
        events: Rests included.
        config: The grid.
        control: Whether they are controls, for all or `[n]` for each.

    Raises:
        UserError: an onset or a duration lies outside the grid, or a rest is a control.
    """
    onset, duration, note = events.T
    bad = (onset < 0) | (onset >= config.times)
    if bad.any():
        raise UserError(
            f"an onset at tick {onset[bad][0]} ({onset[bad][0] / config.resolution:g} s) does not "
            f"fit into the {config.max_time} s of the grid; cut the piece into windows"
        )
    if ((duration < 0) | (duration >= config.durations)).any():
        raise UserError(f"durations must be 0 to {config.durations - 1} ticks")
    ids = np.empty((len(events), 3), np.int64)
    ids[:, 0] = onset
    ids[:, 1] = config.duration_offset + duration
    ids[:, 2] = np.where(note == REST, config.rest, config.note_offset + note)
    if np.any(control):
        control = np.broadcast_to(control, len(events))
        if not config.anticipation:
            raise UserError("this grid has no controls (anticipation is false)")
        if (note[control] == REST).any():
            raise UserError("a rest cannot be a control: the vocabulary has none")
        ids += config.control_offset * control[:, None]
    return ids.ravel()


def windows(ids: np.ndarray, config: AMTConfig, *, events: int = 341) -> list[np.ndarray]:
    """Cut ids of events into windows, each shifted in time so that it begins at 0.

    Args:
        ids: `[3 n]`, as `ids_of` makes them but for times, which may be of any size; events may be
            controls, separators stand three in a row.
        config: The grid.
        events: How many a window holds; the last may be shorter.

    Returns:
        The windows whose times fit the grid, in their order; others are left out.
    """
    made = []
    rows = ids.reshape(-1, 3)
    for start in range(0, len(rows), events):
        window = rows[start : start + events].copy()
        timed = ~(window == config.separator).all(1)
        control = timed & (window[:, 2] >= config.control_offset)  # times may be behind the grid
        time = window[:, 0] - np.where(control, config.control_offset, 0)
        if timed.any():
            time = time - time[timed].min()
            if time[timed].max() >= config.times:
                continue
            window[:, 0] = np.where(
                timed, time + np.where(control, config.control_offset, 0), window[:, 0]
            )
        made.append(window.ravel())
    return made


def interleave(
    events: np.ndarray, controls: np.ndarray, config: AMTConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Put every control five seconds before the events around it (section 3.2).

    Before an event is written, so are all controls whose onset is at most five seconds behind that
    of the event before it (0 for the first).

    Args:
        events: `[n, 3]`, with rests, rising.
        controls: `[m, 3]`, rising.
        config: The grid.

    Returns:
        All in their order, `[n + m, 3]`, and which are controls, `[n + m]` bool.
    """
    before = np.concatenate([[0], events[:-1, 0]])[: len(events)]
    ready = np.searchsorted(np.maximum.accumulate(before), controls[:, 0] - config.delta)
    order = np.concatenate([np.arange(len(events)) + 0.5, ready.astype(float)])
    places = np.argsort(order, kind="stable")
    flags = np.concatenate([np.zeros(len(events), bool), np.ones(len(controls), bool)])
    return np.concatenate([events, controls])[places], flags[places]


def choose_controls(
    events: np.ndarray, config: AMTConfig, kind: Kind, rng: np.random.Generator
) -> np.ndarray:
    """Choose the events that become controls in training (section 3.5).

    Args:
        events: Without rests.
        config: The grid.
        kind: "span": all within spans of 5 s whose starts are exponentially far apart, 20 s in the
            mean; "random": each with one probability of 0.1 to 0.9; "instrument": those of some
            instruments, at least one and not all; "none".
        rng: Decides.

    Returns:
        `[n]` bool; nothing is chosen by "instrument" where there is only one.
    """
    chosen = np.zeros(len(events), bool)
    if kind == "span":
        start, last = 0.0, events[-1, 0] / config.resolution if len(events) else -1.0
        while True:
            start += rng.exponential(1 / SPAN_RATE)
            if start > last:
                break
            stop = start + SPAN_SECONDS
            seconds = events[:, 0] / config.resolution
            chosen |= (seconds >= start) & (seconds < stop)
            start = stop
    elif kind == "random":
        chosen = rng.random(len(events)) < rng.integers(1, 10) / 10
    elif kind == "instrument":
        instrument = events[:, 2] // config.pitches
        present = np.unique(instrument)
        if len(present) > 1:
            count = rng.integers(1, len(present))
            chosen = np.isin(instrument, rng.choice(present, count, replace=False))
    elif kind != "none":
        raise UserError(f"controls are chosen by none, span, random or instrument, not {kind!r}")
    return chosen


def kind_of_copy(copy: int) -> Kind:
    """Return how the controls of the n-th augmented copy of a piece are chosen (AMT's schedule)."""
    copy %= 10
    return "none" if copy == 0 else "span" if copy == 1 else "random" if copy < 6 else "instrument"


def sequence(
    events: np.ndarray, config: AMTConfig, *, kind: Kind = "none",
    rng: np.random.Generator | None = None,
) -> np.ndarray:  # fmt: skip
    """Return a piece as ids: the flag, then events with rests, perhaps with controls.

    Args:
        events: `[n, 3]`, without rests, all within the grid.
        config: The grid.
        kind: How controls are chosen.
        rng: Decides; needed unless `kind` is "none".

    Returns:
        `[1 + 3 m]` int64.
    """
    if kind == "none":
        return np.concatenate([[config.autoregress], ids_of(pad_rests(events, config), config)])
    if rng is None:
        raise UserError("to choose controls a random generator is needed (rng)")
    chosen = choose_controls(events, config, kind, rng)
    end = int(events[-1, 0]) if len(events) else None
    rest = pad_rests(events[~chosen], config, end=end)
    both, control = interleave(rest, events[chosen], config)
    return np.concatenate([[config.anticipate], ids_of(both, config, control=control)])
