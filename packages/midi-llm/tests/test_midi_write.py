"""Writing what players and readers understand."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from midi_files import (
    grid_events,
    ticked,
)

from midi_llm.midi_read import read_notes
from midi_llm.midi_write import (
    Style,
    key_signature,
    parse_key,
    style_of_score,
    to_score,
    write_midi,
)
from midi_llm.notes import Notes, empty_notes
from midi_llm.vocab import DRUMS, instrument_name
from tenfold_common.errors import UserError

BOTH = pytest.mark.parametrize("writer", ["symusic", "mido"])


def rows(notes: Notes) -> list[tuple[float, float, int, int]]:
    columns = (notes.onset, notes.duration, notes.instrument, notes.pitch)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def assert_close(found: list, wanted: list, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-9, atol=atol)


def written(notes: Notes, folder: Path, writer: str, style: Style | None = None) -> mido.MidiFile:
    path = folder / f"{writer}.mid"
    write_midi(notes, path, style, writer=writer)
    return mido.MidiFile(path)


def all_messages(file: mido.MidiFile) -> list:
    return [pair for track in file.tracks for pair in ticked(track)]


def assert_ends_first(file: mido.MidiFile) -> int:
    """No note_off of a pitch behind its note_on at one tick, as the file is played."""
    count = 0
    by_key: dict = {}
    for tick, m in ticked(mido.merge_tracks(file.tracks)):
        if m.type in ("note_on", "note_off"):
            begins = m.type == "note_on" and m.velocity > 0
            by_key.setdefault((tick, m.channel, m.note), []).append(begins)
    for begins in by_key.values():
        assert begins == sorted(begins), "a note_off follows a note_on at its tick"
        count += len(set(begins)) == 2
    return count


@BOTH
def test_repeated_pitches_end_before_they_begin(tmp_path, writer):
    notes = Notes.of(np.arange(20) * 0.5, 0.5, 0, 60)
    file = written(notes, tmp_path, writer)
    assert assert_ends_first(file) == 19
    assert rows(read_notes(tmp_path / f"{writer}.mid")) == rows(notes)


@BOTH
def test_notes_without_length_last_a_tick(tmp_path, writer):
    notes = Notes.of([0, 0, 0.5, 0.5], [0, 0.5, 0, 0.0001], 0, 60)
    file = written(notes, tmp_path, writer)
    assert_ends_first(file)
    again = read_notes(tmp_path / f"{writer}.mid")
    assert again.onset.tolist() == [0, 0, 0.5, 0.5]
    assert sorted(again.duration[2:]) == pytest.approx([1 / 960, 1 / 960])
    assert sorted(again.duration[:2]) == pytest.approx([1 / 960, 0.5])


notes_in_time = st.builds(
    lambda events, scale: Notes.of(
        [t * scale for t, _, _ in events],
        [d * scale for _, d, _ in events],
        [n // 128 for _, _, n in events],
        [n % 128 for _, _, n in events],
    ),
    grid_events(times=3000, durations=500, instruments=15, max_gap=60),
    st.sampled_from([0.01, 0.05, 0.0037, 1 / 3, 0.001]),
)


@settings(max_examples=40)
@given(
    notes=notes_in_time,
    style=st.builds(Style, tempo=st.sampled_from([4, 60, 97, 120, 333, 1000, 123.456])),
)
@example(Notes.of([14000.0, 14000.123], [0.5, 1], 0, [60, 61]), Style(tempo=333.3))
@example(Notes.of([0, 14000.0, 14000.123], [0.5, 3, 1], 3, [60, 61, 63]), Style(tempo=97))
def test_real_time_is_kept_to_half_a_tick(notes, style):
    score = to_score(notes, style)
    tick = Fraction(round(60e6 / style.tempo), 480 * 10**6)
    half = float(tick / 2) + 1e-9
    if len(notes):
        assert score.tpq == 480
        assert [t.mspq for t in score.tempos] == [round(60e6 / style.tempo)]
    found = []
    for track in score.tracks:
        number = DRUMS if track.is_drum else track.program
        for n in track.notes:
            found.append(
                (number, n.pitch, float(n.time * tick), float((n.time + n.duration) * tick))
            )
            assert n.duration >= 1
    found.sort()
    wanted = sorted(
        zip(notes.instrument, notes.pitch, notes.onset, notes.onset + notes.duration, strict=True)
    )
    assert [f[:2] for f in found] == [w[:2] for w in wanted]
    short = {w[:2] for w in wanted if w[3] - w[2] < tick}  # what would last no tick lasts one
    for key in {w[:2] for w in wanted}:  # ends by themselves: short notes may change places
        for column in (2, 3):
            a = np.array(sorted(f[column] for f in found if f[:2] == key))
            b = np.array(sorted(w[column] for w in wanted if w[:2] == key))
            slack = half * 3 if key in short and column == 3 else half
            assert np.abs(a - b).max() <= slack


@settings(max_examples=40)
@given(notes_in_time)
def test_both_writers_give_the_same_music(tmp_path_factory, notes):
    folder = tmp_path_factory.mktemp("writers")
    style = Style(tempo=97, time_signature=(6, 8), key="Eb minor")
    one, other = (written(notes, folder, w, style) for w in ("symusic", "mido"))
    for file in (one, other):
        assert_ends_first(file)

    def music(file: mido.MidiFile) -> list:
        found, programs = [], [0] * 16
        for tick, m in ticked(mido.merge_tracks(file.tracks)):
            if m.type == "program_change":
                programs[m.channel] = m.program
            elif m.type in ("note_on", "note_off"):
                instrument = DRUMS if m.channel == 9 else programs[m.channel]
                loud = m.velocity if m.type == "note_on" else 0
                found.append((tick, instrument, m.note, loud))
        return sorted(found)

    def metas(file: mido.MidiFile) -> list:
        return sorted(str(pair) for pair in all_messages(file) if pair[1].is_meta)

    assert music(one) == music(other)
    assert metas(one) == metas(other)
    assert sorted(rows(read_notes(folder / "symusic.mid"))) == sorted(
        rows(read_notes(folder / "mido.mid"))
    )


@BOTH
def test_tempo_metre_key_and_names_are_written(tmp_path, writer):
    notes = Notes.of([0, 1, 2], 1, [40, DRUMS, 0], [60, 36, 62])
    style = Style(tempo=97, time_signature=(6, 8), key="F# minor")
    file = written(notes, tmp_path, writer, style)
    assert (file.type, file.ticks_per_beat) == (1, 480)
    found = all_messages(file)
    assert [(t, m.tempo) for t, m in found if m.type == "set_tempo"] == [(0, 618557)]
    metres = [(t, m.numerator, m.denominator) for t, m in found if m.type == "time_signature"]
    assert metres == [(0, 6, 8)]
    assert [(t, m.key) for t, m in found if m.type == "key_signature"] == [(0, "F#m")]
    for track in file.tracks:
        sounding = {m.channel for m in track if m.type == "note_on"}
        programs = {m.program for m in track if m.type == "program_change"}
        if sounding:
            number = DRUMS if 9 in sounding else programs.pop()
            assert [m.name for m in track if m.type == "track_name"] == [instrument_name(number)]
    assert sum(m.type == "track_name" for _, m in found) == 3


@BOTH
def test_no_key_is_written_unasked(tmp_path, writer):
    file = written(Notes.of(0, 1, 0, 60), tmp_path, writer)
    found = all_messages(file)
    assert not [m for _, m in found if m.type == "key_signature"]
    assert [m.tempo for _, m in found if m.type == "set_tempo"] == [500000]
    assert [m.numerator for _, m in found if m.type == "time_signature"] == [4]
    assert [m.velocity for _, m in found if m.type == "note_on"] == [72]


@BOTH
def test_velocities_and_accents(tmp_path, writer):
    notes = Notes.of([0, 0.25, 0.5, 1.5, 2], 0.2, 0, 60, [72, 72, 72, 126, 1])

    def loud(style: Style) -> list[int]:
        file = written(notes, tmp_path, writer, style)
        return [m.velocity for _, m in all_messages(file) if m.type == "note_on" and m.velocity]

    assert loud(Style()) == [72, 72, 72, 126, 1]
    assert loud(Style(accents=True)) == [84, 72, 78, 127, 13]
    assert loud(Style(accents=True, time_signature=(3, 4))) == [84, 72, 78, 127, 7]


@BOTH
def test_nothing_to_write(tmp_path, writer):
    file = written(empty_notes(), tmp_path, writer, Style(key="C major"))
    found = all_messages(file)
    assert not [m for _, m in found if m.type in ("note_on", "note_off")]
    assert [m.tempo for _, m in found if m.type == "set_tempo"] == [500000]
    assert rows(read_notes(tmp_path / f"{writer}.mid")) == []
    assert to_score(empty_notes()).note_num() == 0


@BOTH
def test_what_is_there_is_replaced_and_nothing_else_left(tmp_path, writer):
    path = tmp_path / "a.mid"
    path.write_text("old")
    write_midi(Notes.of(0, 1, 0, 60), path, writer=writer)
    write_midi(Notes.of(0, 1, 0, 61), str(path), writer=writer)
    assert read_notes(path).pitch.tolist() == [61]
    assert [p.name for p in tmp_path.iterdir()] == ["a.mid"]


def test_a_refused_piece_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mid"
    path.write_text("old")
    notes = crowd(list(range(16)), [1] * 16)
    with pytest.raises(UserError):
        write_midi(notes, path, Style(on_overflow="error"))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mid"]


def test_unknown_writer(tmp_path):
    with pytest.raises(UserError, match="symusic"):
        write_midi(empty_notes(), tmp_path / "a.mid", writer="pretty")


# More instruments than channels


def crowd(instruments: list[int], counts: list[int]) -> Notes:
    """All play together: `counts` repeated half seconds each."""
    parts = [(k * 0.5, i) for i, c in zip(instruments, counts, strict=True) for k in range(c)]
    parts.sort(key=lambda p: p[0])
    return Notes.of(
        [t for t, _ in parts], 0.5, [i for _, i in parts], 60 + np.arange(len(parts)) % 9
    )


def played(folder: Path, writer: str) -> dict[int, int]:
    notes = read_notes(folder / f"{writer}.mid")
    return {i: int((notes.instrument == i).sum()) for i in np.unique(notes.instrument).tolist()}


@BOTH
def test_fifteen_instruments_and_drums_fit(tmp_path, writer):
    instruments = [*range(0, 120, 8), DRUMS]
    notes = crowd(instruments, [2] * 16)
    file = written(notes, tmp_path, writer, Style(on_overflow="error"))
    assert played(tmp_path, writer) == dict.fromkeys(sorted(instruments), 2)
    channels: dict[int, set[int]] = {}
    for track in file.tracks:
        for m in track:
            if m.type == "program_change":
                channels.setdefault(m.channel, set()).add(m.program)
            elif m.type == "note_on":
                channels.setdefault(m.channel, set())
    assert sorted(channels) == list(range(16))
    assert all(len(programs) == 1 for channel, programs in channels.items() if channel != 9)


@BOTH
@pytest.mark.parametrize("how", ["merge", "drop"])
def test_shared_channels_keep_every_instrument(tmp_path, writer, how):
    """Those with the fewest notes, which play when another is silent."""
    early = crowd(list(range(15)), [3] * 15)
    late = [Notes.of([10.0 + i, 10.5 + i], 0.4, 100 + i, 60) for i in range(5)]
    parts = [early, *late]
    notes = Notes.of(
        np.concatenate([n.onset for n in parts]),
        np.concatenate([n.duration for n in parts]),
        np.concatenate([n.instrument for n in parts]),
        np.concatenate([n.pitch for n in parts]),
    )
    file = written(notes, tmp_path, writer, Style(on_overflow=how))
    assert_ends_first(file)
    found = played(tmp_path, writer)
    assert {i: c for i, c in found.items() if i < 15} == dict.fromkeys(range(15), 3)
    if how == "merge":
        assert found == dict.fromkeys(range(15), 3) | dict.fromkeys(range(100, 105), 2)
        again = sorted(rows(read_notes(tmp_path / f"{writer}.mid")))
        assert_close(again, sorted(rows(notes)), atol=1.1e-3)


@BOTH
def test_merge_gives_notes_that_overlap_to_the_nearest(tmp_path, writer):
    instruments = [*range(0, 30, 2), 125, DRUMS]
    notes = crowd(instruments, [4] * 15 + [1, 3])
    written(notes, tmp_path, writer, Style(on_overflow="merge"))
    found = played(tmp_path, writer)
    assert found == dict.fromkeys(range(0, 28, 2), 4) | {28: 5, DRUMS: 3}


@BOTH
def test_drop_leaves_out_those_with_the_fewest(tmp_path, writer):
    instruments = [*range(0, 34, 2), DRUMS]
    notes = crowd(instruments, [4] * 8 + [1] + [4] * 7 + [2, 3])
    written(notes, tmp_path, writer, Style(on_overflow="drop"))
    kept = [i for i in range(0, 32, 2) if i != 16]
    assert played(tmp_path, writer) == dict.fromkeys(kept, 4) | {DRUMS: 3}


def test_error_counts_the_instruments(tmp_path):
    notes = crowd(list(range(16)), [1] * 16)
    for act in (
        lambda style: to_score(notes, style),
        lambda style: write_midi(notes, tmp_path / "a.mid", style),
        lambda style: write_midi(notes, tmp_path / "a.mid", style, writer="mido"),
    ):
        with pytest.raises(UserError, match="16"):
            act(Style(on_overflow="error"))


@BOTH
def test_all_instruments_at_once(tmp_path, writer):
    notes = crowd(list(range(129)), [1] * 129)
    file = written(notes, tmp_path, writer)
    assert {m.channel for _, m in all_messages(file) if m.type == "note_on"} <= set(range(16))
    found = played(tmp_path, writer)
    assert found[DRUMS] == 1
    assert sum(found.values()) == 129
    assert len(found) == 16


@BOTH
def test_notes_that_touch_share_a_channel(tmp_path, writer):
    """The end of one, the new program, the beginning of the other: all at one tick."""
    early = crowd(list(range(15)), [9] * 15)
    onset = np.arange(5.0, 8, 0.5)
    late = Notes.of(onset, 0.5, 100 + np.arange(6) % 2, 60)
    both = [np.concatenate(pair) for pair in zip(early.columns, late.columns, strict=True)]
    notes = Notes.of(*both)
    assert_ends_first(written(notes, tmp_path, writer))
    assert sorted(rows(read_notes(tmp_path / f"{writer}.mid"))) == sorted(rows(notes))


def test_scores_of_many_instruments_can_be_dumped():
    """A Score has no channels: what it writes by itself must be the instruments it names."""
    notes = Notes.of(np.arange(20.0), 0.5, np.arange(20) * 6, 60)
    score = to_score(notes)
    named = sorted(t.program for t in score.tracks for _ in t.notes)
    assert len(named) == 20
    assert sorted(read_notes(score.dumps_midi()).instrument.tolist()) == named


@settings(max_examples=60)
@given(events=grid_events(times=600, durations=60, instruments=129, max_size=60, max_gap=30))
def test_merge_moves_no_note_in_time(tmp_path_factory, events):
    """Pitches all differ, so that every note can be found again."""
    onset, duration, note = np.array(events, dtype=float).reshape(-1, 3).T
    notes = Notes.of(onset / 96, (duration + 1) / 96, note // 128, np.arange(len(events)))
    folder = tmp_path_factory.mktemp("merge")
    for writer in ("symusic", "mido"):
        written(notes, folder, writer)
        again = read_notes(folder / f"{writer}.mid")
        order = np.argsort(again.pitch)
        assert again.onset[order].tolist() == pytest.approx(notes.onset.tolist(), abs=1e-9)
        assert again.duration[order].tolist() == pytest.approx(notes.duration.tolist(), abs=1e-9)
        drums = again.pitch[again.instrument == DRUMS]
        assert sorted(drums) == notes.pitch[notes.instrument == DRUMS].tolist()
        if len(set(notes.instrument.tolist()) - {DRUMS}) <= 15:
            assert again.instrument[order].tolist() == notes.instrument.tolist()


# Styles and keys


@pytest.mark.parametrize(
    "wrong",
    [
        {"tempo": 3.99},
        {"tempo": 1000.1},
        {"tempo": float("nan")},
        {"tempo": float("inf")},
        {"tempo": -120},
        {"tempo": "fast"},
        {"tempo": None},
        {"time_signature": ("3", "4")},
        {"time_signature": (4, 3)},
        {"time_signature": (0, 4)},
        {"time_signature": (-3, 4)},
        {"time_signature": (256, 4)},
        {"time_signature": (4, 0)},
        {"time_signature": (4,)},
        {"time_signature": 4},
        {"time_signature": "4/4"},
        {"time_signature": (3.5, 4)},
        {"key": "H major"},
        {"key": "C dorian"},
        {"key": ""},
        {"key": "G# major"},
        {"on_overflow": "explode"},
        {"on_overflow": None},
    ],
    ids=str,
)
def test_wrong_styles(wrong):
    with pytest.raises(UserError):
        Style(**wrong)


def test_on_overflow_suggests():
    with pytest.raises(UserError, match="merge"):
        Style(on_overflow="merg")


@BOTH
def test_no_folder_to_write_to(tmp_path, writer):
    for path in (tmp_path / "nowhere" / "a.mid", tmp_path):
        with pytest.raises(UserError, match="folder"):
            write_midi(empty_notes(), path, writer=writer)


@pytest.mark.parametrize("tempo", [4, 1000, 60.5])
def test_outermost_tempos(tmp_path, tempo):
    write_midi(Notes.of(1, 1, 0, 60), tmp_path / "a.mid", Style(tempo=tempo))
    notes = read_notes(tmp_path / "a.mid")
    assert notes.onset[0] == pytest.approx(1, abs=30 / tempo / 480 + 1e-9)


MAJOR = ["Cb", "Gb", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "C#"]
MINOR = ["Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "C#", "G#", "D#", "A#"]


@pytest.mark.parametrize("index", range(15))
def test_all_keys(index, tmp_path):
    fifths = index - 7
    for names, mode, short, number in ((MAJOR, "major", "", 0), (MINOR, "minor", "m", 1)):
        key = f"{names[index]} {mode}"
        assert key_signature(key) == (fifths, number)
        assert parse_key(key) == (names[index], mode)
        for writer in ("symusic", "mido"):
            file = written(Notes.of(0, 1, 0, 60), tmp_path, writer, Style(key=key))
            keys = [m.key for _, m in all_messages(file) if m.type == "key_signature"]
            assert keys == [names[index] + short]


@pytest.mark.parametrize(
    ("key", "tonic", "mode"),
    [
        ("c min", "C", "minor"),
        ("C minor", "C", "minor"),
        ("Cm", "C", "minor"),
        ("C", "C", "major"),
        ("CM", "C", "major"),
        ("c maj", "C", "major"),
        ("F# major", "F#", "major"),
        ("f#m", "F#", "minor"),
        ("Bb", "Bb", "major"),
        ("bb minor", "Bb", "minor"),
        (" A   minor ", "A", "minor"),
    ],
)
def test_spellings_of_keys(key, tonic, mode):
    assert parse_key(key) == (tonic, mode)


@pytest.mark.parametrize("key", ["H major", "C#b", "major", "", " ", "C minorr", "Cmm", "12", "Z"])
def test_what_is_no_key(key):
    for act in (parse_key, key_signature):
        with pytest.raises(UserError):
            act(key)


@pytest.mark.parametrize(
    "key", ["G# major", "D# major", "A# major", "Fb major", "Gb minor", "Db m"]
)
def test_keys_of_more_than_seven_accidentals(key):
    with pytest.raises(UserError):
        key_signature(key)


def test_the_style_of_a_score_is_how_it_begins():
    from symusic import KeySignature, Score, Tempo, TimeSignature

    score: Any = Score(480)
    assert style_of_score(score) == Style()
    for time, qpm in ((0, 90.0), (960, 150.0)):
        score.tempos.append(Tempo(time, qpm))
    for time, beats in ((0, 3), (960, 5)):
        score.time_signatures.append(TimeSignature(time, beats, 4))
    score.key_signatures.append(KeySignature(0, -3, 1))
    found = style_of_score(score)
    assert found.tempo == pytest.approx(90)
    assert (found.time_signature, found.key) == ((3, 4), "C minor")
    score.tempos[0] = Tempo(0, 5000.0)
    found = style_of_score(score)
    assert (found.tempo, found.time_signature, found.key) == (120.0, (3, 4), "C minor")


@pytest.mark.parametrize("sharps", range(-7, 8))
@pytest.mark.parametrize("mode", [0, 1])
def test_keys_come_back_from_their_signatures(sharps, mode):
    from types import SimpleNamespace

    one = SimpleNamespace(key=sharps, tonality=mode)
    score = SimpleNamespace(tempos=[], time_signatures=[], key_signatures=[one])
    key = style_of_score(score).key
    assert key is not None
    assert key_signature(key) == (sharps, mode)
