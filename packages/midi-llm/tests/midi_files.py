"""MIDI files for tests: message by message with mido, or byte by byte by hand."""

import io
from collections.abc import Iterable

import mido
from hypothesis import strategies as st

END = b"\x00\xff\x2f\x00"
Events = list[tuple[int, int, int]]


def on(time: int, pitch: int = 60, channel: int = 0, velocity: int = 64) -> mido.Message:
    """A note_on, `time` ticks behind the message before it."""
    return mido.Message("note_on", note=pitch, channel=channel, velocity=velocity, time=time)


def off(time: int, pitch: int = 60, channel: int = 0) -> mido.Message:
    return mido.Message("note_off", note=pitch, channel=channel, velocity=0, time=time)


def program(time: int, number: int, channel: int = 0) -> mido.Message:
    return mido.Message("program_change", program=number, channel=channel, time=time)


def tempo(time: int, microseconds: int) -> mido.MetaMessage:
    return mido.MetaMessage("set_tempo", tempo=microseconds, time=time)


def text(time: int, words: str = "la") -> mido.MetaMessage:
    return mido.MetaMessage("text", text=words, time=time)


def midi(*tracks: Iterable[mido.Message | mido.MetaMessage], ppq: int = 480) -> bytes:
    """The bytes of a file of these tracks; mido writes it and ends every track."""
    file = mido.MidiFile(type=1, ticks_per_beat=ppq)
    file.tracks.extend(mido.MidiTrack(track) for track in tracks)
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def parse(data: bytes) -> mido.MidiFile:
    return mido.MidiFile(file=io.BytesIO(data))


def ticked(track: Iterable[mido.Message | mido.MetaMessage]) -> list:
    """Pairs of absolute tick and message, the end of the track left out."""
    now, found = 0, []
    for message in track:
        now += message.time
        if message.type != "end_of_track":
            found.append((now, message.copy(time=0)))
    return found


def variable_length(number: int, *, size: int = 1) -> bytes:
    """A time as MIDI writes it, with at least `size` bytes."""
    digits = [number & 127]
    while number > 127 or len(digits) < size:
        number >>= 7
        digits.append(number & 127 | 128)
    return bytes(reversed(digits))


def chunk(name: bytes, body: bytes, length: int | None = None) -> bytes:
    """A chunk; `length` lies about its size."""
    return name + (len(body) if length is None else length).to_bytes(4, "big") + body


def header(tracks: int, *, kind: int = 1, division: int = 480) -> bytes:
    body = b"".join(n.to_bytes(2, "big") for n in (kind, tracks, division))
    return chunk(b"MThd", body)


def raw(*tracks: bytes, kind: int = 1, division: int = 480) -> bytes:
    """A file of tracks given as bytes without their ends."""
    written = b"".join(chunk(b"MTrk", track + END) for track in tracks)
    return header(len(tracks), kind=kind, division=division) + written


_times = st.sampled_from([0, 0, 0, 1, 2, 7, 59, 120, 480, 5000])
_channels = st.sampled_from([0, 1, 9])
_pitches = st.sampled_from([60, 61])
# Few channels and pitches, so that equal ones overlap, end twice or are left open.
_messages = st.one_of(
    st.builds(on, _times, _pitches, _channels, st.sampled_from([64, 64, 127, 1, 0])),
    st.builds(on, _times, _pitches, _channels),
    st.builds(off, _times, _pitches, _channels),
    st.builds(program, _times, st.sampled_from([0, 5, 127]), _channels),
    st.builds(tempo, _times, st.sampled_from([500_000, 618_557, 1, 333_333, 16_777_215])),
    st.builds(text, _times),
    st.builds(lambda t: mido.Message("control_change", control=64, value=9, time=t), _times),
    st.builds(lambda t: mido.Message("pitchwheel", pitch=99, time=t), _times),
    st.builds(lambda t: mido.Message("sysex", data=(1, 2, 3), time=t), _times),
    st.builds(lambda t: mido.MetaMessage("key_signature", key="Ebm", time=t), _times),
)


@st.composite
def midi_files(draw: st.DrawFn) -> bytes:
    """Files of one to four tracks of all that notes depend on, in any order."""
    tracks = draw(st.lists(st.lists(_messages, max_size=30), min_size=1, max_size=4))
    return midi(*tracks, ppq=draw(st.sampled_from([1, 96, 480, 960, 32767])))


@st.composite
def grid_events(
    draw: st.DrawFn,
    *,
    times: int,
    durations: int,
    instruments: int,
    max_size: int = 40,
    max_gap: int | None = None,
) -> Events:
    """Events in rising order: onset, duration and instrument * 128 + pitch."""
    gap = st.integers(0, max_gap or times)
    ends = st.integers(0, durations - 1) | st.sampled_from([0, durations - 1])
    notes = st.tuples(st.integers(0, instruments - 1), st.integers(0, 127))
    now, events = 0, []
    for step, duration, (instrument, pitch) in draw(
        st.lists(st.tuples(gap, ends, notes), max_size=max_size)
    ):
        now = min(now + step, times - 1)
        events.append((now, duration, instrument * 128 + pitch))
    return events
