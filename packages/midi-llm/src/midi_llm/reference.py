"""What arrival-time tokens are, message by message and note by note in plain Python, through mido.

Slow on purpose: everything fast in this package is compared with it.
"""

from collections import defaultdict, deque
from os import PathLike
from typing import Any

from midi_llm.vocab import DRUMS, AMTConfig

Event = tuple[int, int, int]  # onset and duration in ticks of the grid, instrument * 128 + pitch


def naive_notes(midi: Any) -> list[list[Any]]:
    """Return `[onset s, duration s or None, instrument, pitch]` of a `mido.MidiFile`.

    Time adds up over all messages; the program is that of the channel when the note begins.
    """
    import mido

    notes: list[list[Any]] = []
    now, tempo, programs = 0.0, 500_000, [0] * 16
    opened: dict[tuple[int, int, int], deque[int]] = defaultdict(deque)
    for message in mido.merge_tracks(midi.tracks):
        now += mido.tick2second(message.time, midi.ticks_per_beat, tempo)
        if message.type == "set_tempo":
            tempo = message.tempo
        elif message.type == "program_change":
            programs[message.channel] = message.program
        elif message.type in ("note_on", "note_off"):
            instrument = DRUMS if message.channel == 9 else programs[message.channel]
            key = instrument, message.note, message.channel
            if message.type == "note_on" and message.velocity > 0:
                opened[key].append(len(notes))
                notes.append([now, None, instrument, message.note])
            elif opened[key]:
                note = notes[opened[key].popleft()]
                note[1] = now - note[0]
    return notes


def naive_events(notes: list[list[Any]], config: AMTConfig) -> list[Event]:
    """Round notes to the grid: onset and duration each from its own float, to even at ties."""
    events = []
    for onset, duration, instrument, pitch in notes:
        length = round(config.resolution * (0.25 if duration is None else duration))
        note = config.of_instrument(instrument) * config.pitches + pitch
        events.append((round(config.resolution * onset), min(length, config.durations - 1), note))
    return events


def naive_pad(events: list[Event], config: AMTConfig) -> list[tuple[int, int, int | None]]:
    """Fill silences of more than a second with rests, one a second; a rest is (time, 0, None)."""
    padded: list[Any] = []
    previous = 0
    for event in events:
        while event[0] - previous > config.second:
            previous += config.second
            padded.append((previous, 0, None))
        padded.append(event)
        previous = event[0]
    return padded


def naive_tokenize(path: "str | PathLike[str]", config: AMTConfig) -> list[int]:
    """Return the ids of a file: events in the order of onsets, with rests, as they are long."""
    import mido

    events = naive_events(naive_notes(mido.MidiFile(path)), config)
    ids: list[int] = []
    for time, duration, note in naive_pad(events, config):
        third = config.rest if note is None else config.note_offset + note
        ids += [time, config.duration_offset + duration, third]
    return ids


def naive_interleave(
    events: list[Event], controls: list[Event], config: AMTConfig
) -> list[tuple[bool, Event]]:
    """Put controls 5 s before the events around them; True marks a control (Thickstun, section 3).

    Before an event, every control is written whose time is at most 5 s behind the event before.
    """
    written, left, previous = [], deque(controls), 0
    for event in events:
        while left and previous >= left[0][0] - config.delta:
            written.append((True, left.popleft()))
        written.append((False, event))
        previous = event[0]
    return written + [(True, control) for control in left]
