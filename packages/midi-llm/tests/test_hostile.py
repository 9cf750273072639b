"""Files that are no MIDI files, or want to do harm: UserError, soon, and in little memory."""

import contextlib
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from midi_files import (
    END,
    chunk,
    header,
    midi,
    midi_files,
    off,
    on,
    program,
    raw,
    tempo,
    variable_length,
)

from midi_llm.midi_read import MAX_BYTES, read_notes, read_score
from midi_llm.notes import MAX_SECONDS
from midi_llm.tokenizer import AMTTokenizer
from tenfold_common.errors import UserError

NOTE = b"\x00\x90\x3c\x40\x60\x80\x3c\x40"
GOOD = midi(
    [tempo(0, 618_557)],
    [program(0, 5), on(0), on(10, 62), off(300), off(5, 62)],
    [on(480, 36, 9), off(1, 36, 9)],
)
TOKENIZER = AMTTokenizer()
READERS: dict[str, Callable] = {
    "read_notes": read_notes,
    "read_score": read_score,
    "encode": TOKENIZER.encode,
}
EACH = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def assert_well_formed(notes) -> None:
    """What a reader accepts must be notes."""
    assert len({len(c) for c in notes.columns}) == 1
    assert np.isfinite(notes.onset).all()
    assert np.isfinite(notes.duration).all()
    assert (notes.duration >= 0).all()
    assert all(a <= b for a, b in pairwise(notes.onset.tolist()))
    for column, low, high in (
        (notes.instrument, 0, 128),
        (notes.pitch, 0, 127),
        (notes.velocity, 1, 127),
    ):
        assert ((column >= low) & (column <= high)).all()
    assert notes.end <= MAX_SECONDS + 1


def read_or_refuse(data: bytes) -> bool:
    """Whether it is accepted; only UserError may come, and what is refused is so by all."""
    try:
        notes = read_notes(data)
    except UserError:
        for read in (read_score, TOKENIZER.encode):
            with pytest.raises(UserError):
                read(data)
        return False
    assert_well_formed(notes)
    with contextlib.suppress(UserError):  # symusic is stricter, about headers for one
        read_score(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ notes begin after", UserWarning)
        assert len(TOKENIZER.encode(data).ids) >= 3 * bool(len(notes) and notes.onset[0] < 99.9)
    return True


def test_the_good_file_is_good():
    assert len(read_notes(GOOD)) == 3
    assert read_or_refuse(GOOD)


@EACH
def test_cut_at_every_byte(read):
    for end in range(len(GOOD)):
        with pytest.raises(UserError):
            read(GOOD[:end])


REFUSED = {
    "empty": b"",
    "one byte": b"M",
    "zeros": bytes(1000),
    "text": b"C D E F | G A B c\n" * 20,
    "RIFF": b"RIFF" + struct.pack("<I", len(GOOD) + 12) + b"RMIDdata" + b"\0\0\0\0" + GOOD,
    "a WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
    "header of tracks that are not there": header(3),
    "tracks without a header": chunk(b"MTrk", NOTE + END),
    "a short header": chunk(b"MThd", b"\x00\x01\x00\x01") + chunk(b"MTrk", NOTE + END),
    "SMPTE times": raw(NOTE, division=0xE728),
    "division 0": raw(NOTE, division=0),
    "format 2": raw(NOTE, NOTE, kind=2),
    "one track too few": header(3) + chunk(b"MTrk", NOTE + END) * 2,
    "a chunk longer than the file": header(1) + chunk(b"MTrk", NOTE + END, length=1000),
    "a chunk of 4 GiB": header(1) + chunk(b"MTrk", NOTE + END, length=0xFFFFFFFF),
    "a header of 4 GiB": chunk(b"MThd", header(1)[8:], length=0xFFFFFFFF)
    + chunk(b"MTrk", NOTE + END),
    "a chunk that ends within a message": header(1) + chunk(b"MTrk", NOTE + END, length=3),
    "a data byte without a status": raw(b"\x00\x3c\x40"),
    "running status behind sysex": raw(b"\x00\xf0\x01\xf7\x00\x3c\x40"),
    "running status of before sysex": raw(b"\x00\x90\x3c\x40\x00\xf0\x01\xf7\x00\x3e\x40"),
    "a pitch over 127": raw(b"\x00\x90\x80\x40"),
    "a velocity over 127": raw(b"\x00\x90\x3c\x80"),
    "a program over 127": raw(b"\x00\xc0\xff"),
    "a controller over 127": raw(b"\x00\xb0\x07\xc0"),
    "a time of five bytes": raw(b"\x81\x80\x80\x80\x00\x90\x3c\x40"),
    "a time of five bytes that is small": raw(b"\x80\x80\x80\x80\x00\x90\x3c\x40"),
    "a time without end": header(1) + chunk(b"MTrk", b"\xff" * 50),
    "sysex longer than its track": raw(b"\x00\xf0\x8f\xff\xff\x7f\x01"),
    "a meta message longer than its track": raw(b"\x00\xff\x01\x8f\xff\xff\x7f\x01"),
    "a tempo of two bytes": raw(b"\x00\xff\x51\x02\x07\xa1" + NOTE),
    "a tempo of 0": raw(b"\x00\xff\x51\x03\x00\x00\x00" + NOTE),
    "longer than four hours": raw(NOTE + variable_length(0x0FFFFFFF) + NOTE[1:]),
    "years": raw((variable_length(0x0FFFFFFF) + NOTE[1:4]) * 4000),
    "years of text": raw((variable_length(0x0FFFFFFF) + b"\xff\x01\x00") * 4000 + NOTE),
    "years in slow beats": raw(
        b"\x00\xff\x51\x03\xff\xff\xff" + (variable_length(0x0FFFFFFF) + NOTE[1:4]) * 9, division=1
    ),
}


@EACH
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_refused(data, read):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        read(data)
    assert time.perf_counter() - start < 20
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("empty", "empty|0 bytes|MIDI"),
        ("text", "MIDI"),
        ("RIFF", "RIFF"),
        ("SMPTE times", "SMPTE"),
        ("format 2", "format 2|type 2|songs"),
        ("longer than four hours", str(MAX_SECONDS)),
    ],
)
def test_the_message_says_what_it_is(name, word):
    with pytest.raises(UserError, match=word):
        read_notes(REFUSED[name])


ACCEPTED = {
    "a chunk nobody knows": header(1) + chunk(b"XFIH", b"abc") + chunk(b"MTrk", NOTE + END),
    "such a chunk between tracks": header(2)
    + chunk(b"MTrk", NOTE + END)
    + chunk(b"junk", bytes(99))
    + chunk(b"MTrk", END),
    "a longer header": chunk(b"MThd", header(1)[8:] + b"later") + chunk(b"MTrk", NOTE + END),
    "messages behind the end": raw(NOTE + END + b"\x00\xff\x01\x02hi"),
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_odd_but_legal(data):
    notes = read_notes(data)
    assert notes.pitch.tolist() == [60]
    assert notes.duration.tolist() == pytest.approx([0.1])


DEBATABLE = {
    "header alone": header(0),
    "format 3": raw(NOTE, kind=3),
    "no end of a track": header(1) + chunk(b"MTrk", NOTE),
    "an empty track": header(1) + chunk(b"MTrk", b""),
    "one track too many": header(1) + chunk(b"MTrk", NOTE + END) * 2,
    "junk at the end": GOOD + b"\xff" * 7,
    "half a chunk at the end": GOOD + b"MTr",
    "real-time messages": raw(b"\x00\x90\x3c\x40\x10\xf8\x50\x3c\x00"),
    "undefined messages": raw(b"\x00\xf4\x00\xf5\x00\xfd" + NOTE),
    "song position": raw(b"\x00\xf2\x01\x02\x00\xf3\x05\x00\xf6" + NOTE),
    "an end with a body": header(1) + chunk(b"MTrk", NOTE + b"\x00\xff\x2f\x02ab"),
    "a tempo of four bytes": raw(b"\x00\xff\x51\x04\x07\xa1\x20\x00" + NOTE),
    "a metre of one byte": raw(b"\x00\xff\x58\x01\x04" + NOTE),
    "a metre with a denominator of 2 ** 255": raw(b"\x00\xff\x58\x04\x04\xff\x18\x08" + NOTE),
    "a key of 99 sharps": raw(b"\x00\xff\x59\x02\x63\x07" + NOTE),
    "a name that is no text": raw(b"\x00\xff\x03\x03\xff\xfe\x80" + NOTE),
    "several tracks in format 0": raw(NOTE, NOTE, kind=0),
    "division 32767": raw(NOTE, division=32767),
    "5000 empty tracks": header(5000) + chunk(b"MTrk", END) * 5000,
    "200000 chunks nobody knows": header(1) + chunk(b"XFIH", b"") * 200_000 + chunk(b"MTrk", END),
    "100000 programs": raw(b"\x00\xc0\x05" + b"\x00\x05" * 100_000),
    "100000 tempos": raw(b"\x00\xff\x51\x03\x07\xa1\x20" * 100_000),
}


@pytest.mark.parametrize("data", DEBATABLE.values(), ids=DEBATABLE)
def test_read_or_refused_but_no_other_error(data):
    start = time.perf_counter()
    read_or_refuse(data)
    assert time.perf_counter() - start < 20


def test_lies_about_sizes_take_no_memory():
    for name in ("a chunk of 4 GiB", "a header of 4 GiB", "sysex longer than its track"):
        tracemalloc.start()
        try:
            with pytest.raises(UserError):
                read_notes(REFUSED[name])
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


@EACH
def test_missing_files(read, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.mid"):
        read(tmp_path / "nowhere.mid")
    with pytest.raises(UserError):
        read(tmp_path)


@EACH
def test_a_large_file_is_not_even_read(read, tmp_path):
    path = tmp_path / "large.mid"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(2**40)  # a hole, takes no space
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"16 MiB|large"):
        read(path)
    assert time.perf_counter() - start < 5


@EACH
def test_large_bytes_are_refused(read):
    with pytest.raises(UserError):
        read(GOOD + bytes(MAX_BYTES))


def many(count: int, *, pairs: bool = False) -> bytes:
    """`count` notes at once, then their ends if `pairs`; three bytes each by running status."""
    return raw(
        b"\x00\x90\x3c\x40" + b"\x00\x3c\x40" * (count - 1) + b"\x01\x3c\x00" * count * pairs
    )


def test_a_million_notes_and_one_more():
    start = time.perf_counter()
    assert len(read_notes(many(10**6))) == 10**6
    with pytest.raises(UserError, match=r"1,?000,?000"):
        read_notes(many(10**6 + 1))
    assert time.perf_counter() - start < 60


def test_many_open_notes_of_one_pitch_take_no_square_of_time():
    start = time.perf_counter()
    notes = read_notes(many(300_000, pairs=True))
    assert (np.diff(notes.duration) > 0).all()
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("limit", [1, 3])
def test_the_limit_can_be_chosen(limit):
    assert len(read_notes(many(limit, pairs=True), max_notes=limit)) == limit
    with pytest.raises(UserError, match=str(limit)):
        read_notes(many(limit + 1, pairs=True), max_notes=limit)


@EACH
@pytest.mark.parametrize("source", [None, 5, 1.5, ["a.mid"], object()], ids=repr)
def test_what_is_no_source(read, source):
    with pytest.raises((UserError, TypeError)):
        read(source)


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"MThd")
def test_random_bytes(data):
    assert not read_or_refuse(data)


@settings(max_examples=500)
@given(st.binary(max_size=60), st.sampled_from([0, 1]))
def test_a_track_of_random_bytes(body, kind):
    read_or_refuse(header(1, kind=kind) + chunk(b"MTrk", body))
    read_or_refuse(raw(body, kind=kind))


_pieces = st.sampled_from(
    [
        NOTE,
        END,
        b"\x00\x90<@",
        b"\x00",
        b"\x81",
        b"\xffQ\x03",
        b"\x00\xffQ\x03\x07\xa1 ",
        b"\x00\xf0\x01\xf7",
        b"\x00\xf7\x01\x01",
        b"<\x00",
        b"\x00\xff\x01\x01a",
        b"\x00\xc0\x05",
        b"\x00\xf8",
        b"\x83`",
        b"\x00\xffX\x04\x04\x02\x18\x08",
        b"\x00\xffY\x02\x03\x00",
    ]
)


@settings(max_examples=300)
@given(st.lists(_pieces, max_size=12))
def test_pieces_of_messages_in_any_order(pieces):
    read_or_refuse(raw(b"".join(pieces)))


@settings(max_examples=250)
@given(data=midi_files(), seed=st.integers(0, 2**32 - 1))
def test_good_files_with_wrong_bytes(data, seed):
    rng = np.random.default_rng(seed)
    wrong = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        wrong[rng.integers(len(wrong))] = rng.integers(256)
    read_or_refuse(bytes(wrong))
    place = int(rng.integers(len(data)))
    read_or_refuse(data[:place] + bytes(rng.integers(256, size=2).astype(np.uint8)) + data[place:])
    read_or_refuse(data[:place] + data[place + 1 :])
