"""Reading as the slow reference reads, bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import symusic
from hypothesis import given, settings
from hypothesis import strategies as st
from midi_files import (
    midi,
    midi_files,
    off,
    on,
    parse,
    program,
    raw,
    tempo,
    text,
    variable_length,
)

from midi_llm.midi_read import notes_of_score, read_many, read_notes, read_score
from midi_llm.notes import MAX_SECONDS, Notes
from midi_llm.reference import naive_notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError


def rows(notes: Notes) -> list[tuple[float, float, int, int]]:
    columns = (notes.onset, notes.duration, notes.instrument, notes.pitch)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def assert_close(found: list, wanted: list, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-9, atol=atol)


def naive_rows(data: bytes) -> list[tuple[float, float, int, int]]:
    return [(t, 0.25 if d is None else d, i, p) for t, d, i, p in naive_notes(parse(data))]


def assert_parity(data: bytes) -> None:
    assert rows(read_notes(data)) == naive_rows(data)  # floats equal bit for bit


# Reading


def test_a_note_worked_by_hand():
    notes = read_notes(midi([program(0, 40, 3), on(480, 64, 3, 99), off(960, 64, 3)]))
    assert rows(notes) == [(0.5, 1.0, 40, 64)]
    assert notes.velocity.tolist() == [99]
    assert [c.dtype for c in notes.columns] == [np.float64] * 2 + [np.int64] * 3
    assert len(notes) == 1
    assert notes.end == 1.5


CRAFTED = {
    "overlapping equal pitches end in the order they began": (
        [on(0), on(480), off(480), off(480)],
        [(0.0, 1.0, 0, 60), (0.5, 1.0, 0, 60)],
    ),
    "what nothing ends lasts 250 ms": ([on(0), text(9600)], [(0.0, 0.25, 0, 60)]),
    "velocity 0 ends": ([on(0), on(480, velocity=0)], [(0.0, 0.5, 0, 60)]),
    "an end without a beginning": ([off(0), on(480), off(480), off(0)], [(0.5, 0.5, 0, 60)]),
    "a new program while a note sounds leaves it open": (
        [on(0), program(480, 5), off(480), program(0, 0), off(480)],
        [(0.0, 1.5, 0, 60)],
    ),
    "a new program hides the note from its end": (
        [on(0), program(480, 5), off(480)],
        [(0.0, 0.25, 0, 60)],
    ),
    "a program is that of its channel only": (
        [program(0, 5, 1), on(0), off(480), on(0, channel=1), off(480, channel=1)],
        [(0.0, 0.5, 0, 60), (0.5, 0.5, 5, 60)],
    ),
    "drums have no program": (
        [program(0, 5, 9), on(0, 36, 9), program(1, 6, 9), off(479, 36, 9)],
        [(0.0, 0.5, DRUMS, 36)],
    ),
    "channels do not end each other": (
        [on(0, channel=0), on(0, channel=1), off(480, channel=1), off(480, channel=0)],
        [(0.0, 1.0, 0, 60), (0.0, 0.5, 0, 60)],
    ),
    "a tempo while a note sounds": (
        [on(0), tempo(480, 1_000_000), off(480)],
        [(0.0, 1.5, 0, 60)],
    ),
    "ends and beginnings at one tick in the file's order": (
        [on(0), on(480), off(0), off(480)],
        [(0.0, 0.5, 0, 60), (0.5, 0.5, 0, 60)],
    ),
    "a note without length": (
        [on(0), off(0), on(480), off(480)],
        [(0, 0, 0, 60), (0.5, 0.5, 0, 60)],
    ),
    "ties keep the order of the file": (
        [on(0, 72), on(0, 60), on(0, 66), off(480, 60), off(0, 66), off(0, 72)],
        [(0.0, 0.5, 0, 72), (0.0, 0.5, 0, 60), (0.0, 0.5, 0, 66)],
    ),
    "nothing": ([], []),
    "no notes": ([program(0, 5), tempo(100, 1), text(100)], []),
}


@pytest.mark.parametrize(("track", "wanted"), CRAFTED.values(), ids=CRAFTED)
def test_one_track(track, wanted):
    data = midi(track)
    assert rows(read_notes(data)) == wanted
    assert_parity(data)


def test_programs_and_tempos_of_other_tracks_count():
    data = midi(
        [tempo(0, 1_000_000), program(480, 7), tempo(0, 250_000)],
        [on(0), off(240), on(240), off(480)],
        [off(960), program(0, 3, 9), on(0, 36, 9), off(10, 36, 9)],
    )
    assert rows(read_notes(data))[:2] == [(0.0, 0.5, 0, 60), (1.0, 0.25, 7, 60)]
    assert_parity(data)


def test_ties_of_tracks_keep_their_order():
    data = midi([on(480, 61), off(480, 61)], [on(480, 60), off(480, 60)], [on(0, 62), off(960, 62)])
    assert [pitch for *_, pitch in rows(read_notes(data))] == [62, 61, 60]
    assert_parity(data)


def test_an_end_in_another_track_counts():
    data = midi([on(0), on(480)], [off(240), off(720)])
    assert rows(read_notes(data)) == [(0.0, 0.25, 0, 60), (0.5, 0.5, 0, 60)]


def test_seconds_add_up_over_every_message():
    """Many short steps in a tempo that is no binary fraction: the sum depends on the steps."""
    track = [tempo(0, 618_557)]
    for i in range(500):
        track += [on(7, 60 + i % 5), text(11), off(3, 60 + i % 5)]
    data = midi(track, [text(13)] * 400)
    assert_parity(data)
    onset = read_notes(data).onset[-1]
    direct = (7 + 499 * 21) * 618_557 / 480 / 1e6
    assert onset != direct
    assert onset == pytest.approx(direct)


@settings(max_examples=250)
@given(midi_files())
def test_any_file_reads_as_the_reference_reads_it(data):
    length = parse(data).length
    if length > MAX_SECONDS + 1:
        with pytest.raises(UserError, match=str(MAX_SECONDS)):
            read_notes(data)
    elif length < MAX_SECONDS - 1:
        assert_parity(data)


def test_running_status_over_meta_messages():
    """Equal status bytes left out; mido reads on after a meta message, and so do players."""
    events = (
        b"\x00\xc0\x05"
        b"\x00\x90\x3c\x40"
        b"\x83\x60\x3c\x00"  # 480 ticks later velocity 0 without a status
        b"\x00\x40\x40"
        b"\x00\xff\x01\x02hi"
        b"\x83\x60\x40\x00"
    )
    data = raw(events)
    assert rows(read_notes(data)) == [(0.0, 0.5, 5, 60), (0.5, 0.5, 5, 64)]
    assert_parity(data)


def test_sysex_in_pieces_and_unknown_meta():
    events = (
        b"\x00\xf0\x03\x01\x02\xf7"
        b"\x00\xf0\x02\x01\x02"  # not ended
        b"\x81\x70\xf7\x02\x03\xf7"  # its other half, 240 ticks later
        b"\x00\xff\x7f\x03abc"
        b"\x00\xff\x60\x01\x00"  # a meta message nobody knows
        b"\x00\xff\x01\x00"  # without text
        b"\x00\x90\x3c\x40\x83\x60\x80\x3c\x40"
    )
    data = raw(events)
    assert rows(read_notes(data)) == [(0.25, 0.5, 0, 60)]


def test_every_kind_of_channel_message_is_stepped_over():
    events = (
        b"\x00\xa0\x3c\x01\x00\xb0\x40\x7f\x00\xd0\x11\x00\xe0\x00\x40\x00\xc0\x02"
        b"\x00\x90\x3c\x40\x00\xa0\x3c\x05\x00\x3c\x06\x00\xd0\x05\x00\x06\x83\x60\x80\x3c\x00"
    )
    data = raw(events)
    assert rows(read_notes(data)) == [(0.0, 0.5, 2, 60)]
    assert_parity(data)


def test_long_forms_of_times():
    events = variable_length(480, size=4) + b"\x90\x3c\x40" + variable_length(0, size=3)
    events += b"\x90\x3d\x40" + variable_length(200_000) + b"\x80\x3c\x40"
    data = raw(events)
    assert rows(read_notes(data))[0] == (0.5, 200_000 * 500_000 * 1e-6 / 480, 0, 60)
    assert_parity(data)


def test_kind_0_is_read():
    data = raw(b"\x00\x90\x3c\x40\x83\x60\x80\x3c\x00", kind=0)
    assert rows(read_notes(data)) == [(0.0, 0.5, 0, 60)]


@pytest.mark.parametrize("kind", [Path, str, bytes])
def test_sources(tmp_path, kind):
    path = tmp_path / "a.mid"
    path.write_bytes(midi([on(0), off(480)]))
    source = path.read_bytes() if kind is bytes else kind(path)
    assert rows(read_notes(source)) == [(0.0, 0.5, 0, 60)]
    assert read_score(source).note_num() == 1


# Many files


def outcome(found: Notes | UserError) -> object:
    return str(found) if isinstance(found, UserError) else [c.tolist() for c in found.columns]


def alone(source: Any, **named: Any) -> object:
    try:
        return outcome(read_notes(source, **named))
    except UserError as error:
        return str(error)


@settings(max_examples=100)
@given(st.lists(midi_files() | st.binary(max_size=40), max_size=6), st.integers(1, 200))
def test_many_files_read_as_each_alone(files, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midi_llm.midi_read.BATCH_BYTES", size)
        assert [outcome(f) for f in read_many(files)] == [alone(f) for f in files]


def test_a_bad_file_ends_nothing(tmp_path):
    good = tmp_path / "good.mid"
    good.write_bytes(midi([on(0, 60), off(480, 60)], [on(0, 64), off(960, 64)]))
    (tmp_path / "bad.mid").write_bytes(b"MThd")
    held = midi([program(0, 40), on(0, 60)])  # its note and program must not reach the next file
    sources = [good, tmp_path / "bad.mid", held, tmp_path / "none.mid", tmp_path, good]
    first, bad, second, none, folder, third = read_many(sources)
    assert [len(n) for n in (first, second, third)] == [2, 1, 2]
    assert second.duration.tolist() == [0.25]
    assert second.instrument.tolist() == [40]
    assert rows(first) == rows(third)
    for found, words in ((bad, "bad.mid: truncated"), (none, "is not there"), (folder, "a folder")):
        assert isinstance(found, UserError)
        assert words in str(found)


def test_limits_are_of_each_file():
    three = midi([on(0, 60), on(1, 61), on(2, 62)])
    long = midi([on(0, 60), off(2**27, 60)])
    found = list(read_many([three, midi([on(0, 60)]), long], max_notes=2))
    assert "3 notes; at most 2" in str(found[0])
    assert len(found[1]) == 1
    assert "at most 14400 s" in str(found[2])


def test_files_are_read_when_they_are_wanted():
    def sources():
        yield midi([on(0, 60)] * 40)
        yield midi([on(0, 61)])
        raise RuntimeError("no further file was asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midi_llm.midi_read.BATCH_BYTES", 10)
        found = read_many(sources())
        assert len(next(found)) == 40
        assert len(next(found)) == 1


def test_no_files():
    assert list(read_many([])) == []


# Scores


@settings(max_examples=100)
@given(midi_files())
def test_scores_nearly_read_as_files(data):
    """Where nothing overlaps itself a Score holds the same notes, up to the float sums."""
    if parse(data).length > MAX_SECONDS - 1:
        return
    notes = read_notes(data)
    score = read_score(data)
    found = notes_of_score(score)
    assert (np.diff(found.onset) >= 0).all()
    simple = len(score.tracks) == len({(t.program, t.is_drum) for t in score.tracks})
    spans = sorted(zip(notes.instrument, notes.pitch, notes.onset, notes.duration, strict=True))
    lonely = all(
        a[:2] != b[:2] or a[2] + a[3] < b[2] for a, b in itertools.pairwise(spans)
    ) and not any(d == 0.25 or d == 0 for *_, d in spans)
    if simple and lonely and len(found) == len(notes):
        again = sorted(zip(found.instrument, found.pitch, found.onset, found.duration, strict=True))
        np.testing.assert_allclose(np.array(again), np.array(spans), rtol=1e-9, atol=1e-9)


def score_of(tpq: int = 480) -> Any:
    score = symusic.Score(tpq)
    track = symusic.Track("a", 5, False)
    track.notes.append(symusic.Note(tpq, tpq, 60, 99))
    score.tracks.append(track)
    return score


def test_notes_of_a_score_with_tempos():
    score = score_of()
    score.tempos.append(symusic.Tempo(0, 60.0))
    score.tempos.append(symusic.Tempo(720, 240.0))
    notes = notes_of_score(score)
    assert_close(rows(notes), [(1.0, 0.5 + 0.125, 5, 60)])
    assert notes.velocity.tolist() == [99]


def test_notes_of_a_score_without_tempos():
    assert rows(notes_of_score(score_of())) == [(0.5, 0.5, 5, 60)]


def test_scores_in_seconds_or_quarters_are_refused():
    for unit in ("second", "quarter"):
        with pytest.raises(UserError, match="tick"):
            notes_of_score(score_of().to(unit))


def test_a_score_with_a_tempo_of_0_is_refused():
    score = score_of()
    score.tempos.append(symusic.Tempo(0, mspq=0))
    with pytest.raises(UserError, match="tempo"):
        notes_of_score(score)


def test_a_score_longer_than_four_hours_is_refused():
    score = score_of()
    score.tracks[0].notes.append(symusic.Note(960 * 14401, 480, 60, 99))
    with pytest.raises(UserError, match=str(MAX_SECONDS)):
        notes_of_score(score)


@pytest.mark.parametrize(
    ("note", "number"),
    [
        ((-1, 480, 60, 99), 5),
        ((0, -1, 60, 99), 5),
        ((480, -40, 60, 99), 5),
        ((0, 480, -1, 99), 5),
        ((0, 480, 60, 0), 5),
        ((0, 480, 60, -9), 5),
        ((0, 480, 60, 99), 128),
        ((0, 480, 60, 99), 255),
    ],
    ids=str,
)
def test_scores_of_what_is_no_midi_are_refused(note, number):
    score = symusic.Score(480)
    track = symusic.Track("a", number, False)
    track.notes.append(symusic.Note(*note))
    score.tracks.append(track)
    with pytest.raises(UserError):
        notes_of_score(score)


def test_a_score_without_a_resolution_is_refused():
    with pytest.raises(UserError):
        notes_of_score(score_of(tpq=0))


@pytest.mark.parametrize("other", [None, 5, "Score", object()], ids=repr)
def test_what_is_no_score(other):
    with pytest.raises(UserError):
        notes_of_score(other)


def test_a_score_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "odd.mid").write_bytes(b"MThd\0\0")
    with pytest.raises(UserError, match=r"odd\.mid"):
        read_score(tmp_path / "odd.mid")


@pytest.mark.parametrize("source", [3, None, ["a.mid"]])
def test_what_is_no_source_is_one_line(source):
    with pytest.raises(UserError, match="a file or its bytes"):
        read_notes(source)


def test_odd_messages_are_counted_over_all_tracks(monkeypatch):
    monkeypatch.setattr("midi_llm.midi_read.MAX_ODD", 30)
    text = b"\0\xff\x01\x01x"
    track = text * 20 + b"\0\xff\x2f\0"
    chunk = b"MTrk" + len(track).to_bytes(4, "big") + track
    head = b"MThd\0\0\0\6\0\1"
    assert len(read_notes(head + b"\0\1\0\x60" + chunk)) == 0
    with pytest.raises(UserError, match="messages that are neither"):
        read_notes(head + b"\0\2\0\x60" + chunk * 2)


def test_files_are_read_in_batches_of_some_number(monkeypatch):
    monkeypatch.setattr("midi_llm.midi_read.BATCH_FILES", 2)
    taken = []

    def sources():
        for _ in range(4):
            taken.append(1)
            yield b"MThd"

    next(iter(read_many(sources())))
    assert len(taken) == 2


def test_a_tempo_is_of_its_own_file():
    played = [on(480), off(480)]
    fast, plain = midi([tempo(0, 250_000), *played]), midi(played)
    for files in ([fast, plain], [plain, fast], [fast, plain, plain]):
        for data, notes in zip(files, read_many(files), strict=True):
            assert isinstance(notes, Notes)
            assert notes.onset[0] == pytest.approx(0.25 if data is fast else 0.5)


def test_as_many_notes_as_are_allowed_are_read():
    data = midi([on(0), off(10), on(0), off(10)])
    assert len(read_notes(data, max_notes=2)) == 2
    with pytest.raises(UserError, match="2 notes; at most 1"):
        read_notes(data, max_notes=1)
