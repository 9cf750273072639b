import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from midi_llm.attributes import (
    MusicAttributes,
    analyze,
    coarse_tempo_word,
    density,
    density_word,
    duration_word,
    estimate_key,
    estimate_tempo,
    key_number,
    mood_words,
    pitch_classes,
    prominent,
    tempo_word,
)
from midi_llm.captions import (
    STYLES,
    Request,
    caption_dropout,
    describe,
    parse_caption,
    style_of_prompt,
)
from midi_llm.metrics import tempo_error
from midi_llm.midi_read import read_notes
from midi_llm.midi_write import Style, to_score, write_midi
from midi_llm.notes import Notes, empty_notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)


def notes_of(onset, pitch, *, duration=0.5, instrument=0) -> Notes:
    return Notes.of(onset, duration, instrument, pitch)


def scale(tonic: int, steps=MAJOR, *, beat=0.5) -> Notes:
    """A scale up and down that dwells on the tonic, its third and its fifth."""
    pitch = [60 + tonic + s for s in (*steps, 12, *steps[::-1], 0, steps[2], steps[4], 0)]
    length = [2 * beat if (p - 60 - tonic) % 12 in (0, steps[2], steps[4]) else beat for p in pitch]
    onset = np.concatenate([[0], np.cumsum(length)[:-1]])
    return Notes.of(onset, length, 0, pitch)


@st.composite
def pieces(draw, *, smallest=1) -> Notes:
    n = draw(st.integers(smallest, 30))
    gaps = draw(st.lists(st.integers(0, 150), min_size=n, max_size=n))
    columns = [
        draw(st.lists(values, min_size=n, max_size=n))
        for values in (st.integers(0, 300), st.integers(0, DRUMS), st.integers(0, 127))
    ]
    return Notes.of(np.cumsum(gaps) / 100, np.array(columns[0]) / 100, *columns[1:])


# Words


@pytest.mark.parametrize(
    ("tempo", "word"),
    [(20, "Grave"), (40, "Grave"), (40.1, "Largo"), (60, "Largo"), (70, "Adagio"), (90, "Andante"),
     (110, "Moderato"), (110.5, "Allegro"), (120, "Allegro"), (140, "Allegro"), (160, "Vivace"),
     (210, "Presto"), (211, "Prestissimo")],
)  # fmt: skip
def test_a_tempo_on_an_edge_belongs_to_the_bin_below(tempo, word):
    assert tempo_word(tempo) == word


def test_coarse_words_durations_and_densities_have_the_edges_of_midicaps():
    coarse = [coarse_tempo_word(t) for t in (80, 81, 120, 121, 160, 161)]
    assert coarse == ["Slow", "Moderate tempo", "Moderate tempo", "Fast", "Fast", "Very fast"]
    lengths = [duration_word(s) for s in (30, 31, 120, 121, 300, 301)]
    assert lengths[:3] == ["Short fragment", "Short song", "Short song"]
    assert lengths[3:] == ["Song", "Song", "Long piece"]
    assert [density_word(d) for d in (2, 3, 7, 13)] == [
        "sparse", "moderately dense", "busy", "very dense"
    ]  # fmt: skip


def test_mood_words_follow_the_rule():
    assert mood_words("C major", 120, 4) == ("happy",)
    assert mood_words("C major", 121, 6.5) == ("cheerful", "energetic")
    assert mood_words("A minor", 80, 2) == ("sad", "relaxing")
    assert mood_words("A minor", 200, 4) == ("dramatic",)
    assert mood_words(None, 100, 4) == mood_words("C major", None, 4) == ()


# Instruments, density, polyphony, range


def test_instruments_are_ranked_by_notes_and_by_time():
    # 0: 3 of 6 notes, 3 of 10 s; 48: 1 note, 6 s; 32: 2 notes, 1 s
    notes = Notes.of(
        [0, 0, 0, 1, 2, 3], [1, 6, 0.5, 1, 1, 0.5], [0, 48, 32, 0, 0, 32], [60, 64, 40, 60, 60, 40]
    )
    assert prominent(notes) == (0, 48, 32)  # 0.8, 0.767, 0.433
    assert prominent(notes, 1) == (0,)
    assert analyze(Notes.of(range(7), 1.0, range(7), 60)).instruments == (0, 1, 2, 3, 4)


def test_density_polyphony_range_and_length_by_hand():
    # two notes sound over 0-2 s, one of them till 4 s; silence till 6 s; then one of 2 s
    notes = Notes.of([0, 0, 6, 7], [2, 4, 2, 1], [0, 0, 0, DRUMS], [60, 72, 65, 36])
    found = analyze(notes)
    assert found.notes_per_second == 4 / 8
    assert found.polyphony == pytest.approx(8 / 6)  # drums excluded
    assert found.pitch_range == (60, 72)
    assert found.seconds == 8
    assert found.duration_word == "Short fragment"
    assert found.drums
    assert found.time_signature is None


def test_density_counts_from_the_first_onset_over_a_second_at_least():
    assert density(notes_of([10.0, 11, 12, 13], 60, duration=1.0)) == 1
    assert density(notes_of([0.0], 60, duration=0.01)) == 1
    assert density(empty_notes()) == 0


def test_no_notes_and_only_drums_leave_out_what_is_unknown():
    nothing = analyze(empty_notes())
    assert nothing.key is None
    assert nothing.tempo is None
    assert nothing.instruments == nothing.mood == ()
    assert nothing.seconds == nothing.polyphony == nothing.key_margin == 0
    beat = analyze(Notes.of(np.arange(32) / 2, 0.1, DRUMS, [36, 38] * 16))
    assert beat.key is None
    assert beat.pitch_range is None
    assert beat.drums
    assert beat.instruments == (DRUMS,)
    assert tempo_error(beat.tempo, 120, octave=True) < 0.02


# Key


@pytest.mark.parametrize("tonic", range(12))
@pytest.mark.parametrize(("steps", "mode"), [(MAJOR, "major"), (MINOR, "minor")])
def test_the_key_of_a_scale_is_found_in_every_transposition(tonic, steps, mode):
    key, margin = estimate_key(scale(tonic, steps))
    assert key_number(key) == (tonic, mode)
    assert 0 < margin < 2


def test_the_key_is_weighted_by_duration_and_without_drums():
    pitch = [60, 64, 67, 61, 63, 66, 68, 70] * 2
    long = np.where(np.isin(pitch, [60, 64, 67]), 4.0, 0.05)
    tonic = Notes.of(np.arange(16.0), long, 0, pitch)
    assert estimate_key(tonic)[0] == "C major"
    drums = Notes.of(np.arange(16.0), 9.0, DRUMS, 61)
    both = Notes.of(
        np.repeat(np.arange(16.0), 2), *(np.stack(c, 1).ravel() for c in zip(
            tonic.columns[1:4], drums.columns[1:4], strict=True))
    )  # fmt: skip
    assert estimate_key(both) == estimate_key(tonic)


def test_the_correlation_is_that_of_pearson():
    from midi_llm.attributes import _MAJOR, _MINOR

    notes = scale(3, MINOR)
    weights = pitch_classes(notes)
    by_hand = sorted(
        np.corrcoef(weights, np.roll(profile, tonic))[0, 1]
        for profile in (_MAJOR, _MINOR)
        for tonic in range(12)
    )
    assert estimate_key(notes)[1] == pytest.approx(by_hand[-1] - by_hand[-2])


def test_equal_pitch_classes_have_no_key():
    assert estimate_key(notes_of(np.arange(12.0), range(60, 72))) == (None, 0.0)
    assert estimate_key(empty_notes()) == (None, 0.0)
    assert estimate_key(notes_of([0.0, 1, 2], [60, 64, 67], duration=0.0))[0] == "C major"


def test_key_numbers_of_enharmonics_are_equal():
    assert key_number("C# minor") == key_number("Db minor") == (1, "minor")
    assert key_number("Cb major") == key_number("B") == (11, "major")
    assert key_number("Bm") == (11, "minor")


@given(pieces(), st.integers(-11, 11))
def test_transposing_moves_the_key_alone(notes, by):
    moved = Notes.of(
        notes.onset, notes.duration, notes.instrument, np.clip(notes.pitch, 12, 115) + by
    )
    notes = Notes.of(notes.onset, notes.duration, notes.instrument, np.clip(notes.pitch, 12, 115))
    (key, margin), (other, other_margin) = estimate_key(notes), estimate_key(moved)
    assert other_margin == pytest.approx(margin, abs=1e-9)
    if margin > 1e-6:
        assert key_number(other) == ((key_number(key)[0] + by) % 12, key_number(key)[1])


# Tempo and metre


@pytest.mark.parametrize("tempo", [84, 90, 100, 120, 133, 150])
def test_the_tempo_of_a_pulse_with_chords_is_measured_from_its_onsets(tempo):
    beat = 60 / tempo
    eighths = np.arange(64) * beat / 2
    onset = np.sort(np.concatenate([eighths, *[np.arange(32) * beat] * 3]))
    assert estimate_tempo(notes_of(np.round(onset, 2), 60)) == pytest.approx(tempo, rel=0.01)


def test_half_or_double_the_tempo_is_the_error_that_is_made():
    onset = np.arange(64) * 60 / 50
    assert estimate_tempo(notes_of(onset, 60)) == pytest.approx(100, rel=0.01)


def test_too_few_onsets_have_no_tempo():
    assert estimate_tempo(empty_notes()) is None
    assert estimate_tempo(notes_of([0.0, 0.5, 1.0], 60)) is None
    assert estimate_tempo(notes_of([0.0] * 20, 60)) is None
    assert estimate_tempo(notes_of([0.0, 0.1, 0.2, 0.3, 0.4], 60)) is None  # less than a second


def test_the_written_tempo_is_taken_only_if_asked_for():
    notes = notes_of(np.arange(64) * 0.5, 60)
    score = to_score(notes, Style(tempo=97))
    assert analyze(score).tempo == pytest.approx(97, abs=0.01)
    assert analyze(score, use_file_tempo=False).tempo == pytest.approx(120, rel=0.01)
    assert analyze(notes).tempo == pytest.approx(120, rel=0.01)


def test_of_several_tempos_the_median_by_seconds_counts():
    from symusic import Tempo

    score = to_score(notes_of(np.arange(16.0), 60, duration=1.0), Style(tempo=60))
    assert score.end() == 16 * 480
    score.tempos.append(Tempo(5 * 480, qpm=200))
    score.tempos.append(Tempo(9 * 480, qpm=150))
    assert analyze(score).tempo == pytest.approx(60)  # 5 s, 7 beats of 0.4 s, 4 beats of 0.3 s
    score.tempos.append(Tempo(400 * 480, qpm=30))  # behind the last note
    assert analyze(score).tempo == pytest.approx(60)


def test_a_tempo_map_that_begins_late_has_120_before():
    from symusic import Tempo

    score = to_score(notes_of(np.arange(16.0), 60, duration=1.0), Style(tempo=60))
    score.tempos.clear()
    score.tempos.append(Tempo(15 * 480, qpm=60))
    assert analyze(score).tempo == 120


def test_the_metre_is_the_one_longest_in_force():
    from symusic import TimeSignature

    score = to_score(notes_of(np.arange(16.0), 60, duration=1.0), Style(time_signature=(6, 8)))
    assert analyze(score).time_signature == (6, 8)
    score.time_signatures.append(TimeSignature(4 * 480, 3, 4))
    assert analyze(score).time_signature == (3, 4)
    score.time_signatures.append(TimeSignature(400 * 480, 5, 4))  # behind the last note
    assert analyze(score).time_signature == (3, 4)
    score.time_signatures.clear()
    assert analyze(score).time_signature is None


def test_of_time_signatures_at_one_tick_the_last_counts():
    from symusic import TimeSignature

    score = to_score(notes_of(np.arange(16.0), 60, duration=1.0), Style(time_signature=(6, 8)))
    score.time_signatures.append(TimeSignature(0, 3, 4))
    assert analyze(score).time_signature == (3, 4)


def test_notes_scores_files_and_bytes_agree(tmp_path):
    notes = scale(2)
    path = tmp_path / "a.mid"
    write_midi(notes, path, Style(tempo=120))
    of_file = analyze(path)
    assert of_file == analyze(str(path)) == analyze(path.read_bytes())
    assert of_file == analyze(to_score(notes, Style(tempo=120)))
    assert of_file.key == analyze(notes).key == "D major"


@pytest.mark.parametrize("source", [3, None, [1, 2], np.zeros(3)])
def test_what_is_no_music_is_refused(source):
    with pytest.raises(UserError, match=r"must be a symusic\.Score"):
        analyze(source)


def test_bad_files_and_scores_in_seconds_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        analyze(tmp_path / "none.mid")
    with pytest.raises(UserError, match="not a MIDI file"):
        analyze(b"hello")
    with pytest.raises(UserError, match="must be in ticks"):
        analyze(to_score(scale(0)).to("second"))


@given(pieces())
@example(Notes.of([0.0], 0.0, DRUMS, 0))
def test_attributes_are_in_range_and_survive_json(notes):
    found = analyze(notes)
    assert 0 <= found.key_margin <= 2
    assert found.tempo is None or 39 <= found.tempo <= 246
    assert found.notes_per_second > 0
    assert found.polyphony >= 0
    assert len(found.instruments) == min(5, len(np.unique(notes.instrument)))
    assert MusicAttributes.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tempi": 3}, "no field 'tempi'.*'tempo'"), ({"key": "H major"}, "is no key"),
     ({"tempo": -1}, "tempo must be"), ({"tempo": 0}, "over 0"), ({"tempo": "fast"}, "tempo must"),
     ({"instruments": [129]}, "0 to 128"), ({"instruments": 3}, "instruments cannot be"),
     ({"instruments": [0, "a"]}, "instruments cannot be"), ({"seconds": None}, "seconds must be"),
     ({"time_signature": [4]}, "time_signature cannot"), ({"mood": "sad"}, "mood cannot")],
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        MusicAttributes.from_dict({**analyze(scale(0)).to_dict(), **change})


def test_missing_fields_are_named():
    values = analyze(scale(0)).to_dict()
    del values["drums"]
    with pytest.raises(UserError, match="lack drums"):
        MusicAttributes.from_dict(values)


# Captions


def full(**change) -> MusicAttributes:
    values = {
        "key": "F# minor", "key_margin": 0.1, "tempo": 87.6, "tempo_word": "Andante",
        "time_signature": (6, 8), "instruments": (0, 33, DRUMS), "notes_per_second": 7.25,
        "polyphony": 2.0, "pitch_range": (36, 84), "seconds": 95.2, "duration_word": "Short song",
        "drums": True, "mood": ("melancholic", "energetic"),
    }  # fmt: skip
    return MusicAttributes(**{**values, **change})


def test_plain_captions_say_everything_in_order():
    assert describe(full(), style="plain") == (
        "The mood is melancholic and energetic. It is played by acoustic grand piano, fingered "
        "bass and drums. It is in F# minor. It is in 6/8 time. It goes at 88 bpm. The texture is "
        "busy. Its pitches range from C2 to C6. It lasts about 95 seconds."
    )


def test_short_captions_are_lists():
    assert describe(full(), style="short") == (
        "melancholic and energetic, piano, bass and drums, F# minor, 6/8 time, 88 bpm"
    )


def test_captions_differ_by_seed_and_by_nothing_else():
    texts = [describe(full(), seed=seed) for seed in range(40)]
    assert texts == [describe(full(), seed=seed) for seed in range(40)]
    assert len(set(texts)) > 35
    assert all(t[0].isupper() and t.endswith(".") and "  " not in t for t in texts)
    assert not any(re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiouA]|\bis with\b", t) for t in texts)


@st.composite
def attributes(draw) -> MusicAttributes:
    tempo = draw(st.none() | st.floats(30, 250))
    metres = [(4, 4), (3, 4), (6, 8), (2, 2), (12, 8)]
    instruments = st.lists(st.integers(0, DRUMS), min_size=1, max_size=5, unique=True)
    keys = [f"{tonic} {mode}" for tonic in ("C", "Db", "F#", "A", "Bb") for mode in
            ("major", "minor")]  # fmt: skip
    return full(
        key=draw(st.none() | st.sampled_from(keys)),
        tempo=tempo,
        tempo_word=None if tempo is None else tempo_word(tempo),
        time_signature=draw(st.none() | st.sampled_from(metres)),
        instruments=tuple(draw(instruments)),
        notes_per_second=draw(st.floats(0.1, 30)),
        seconds=draw(st.floats(1, 900)),
        pitch_range=draw(st.none() | st.just((40, 80))),
        mood=draw(st.sampled_from([(), ("sad",), ("happy", "energetic")])),
    )


@given(attributes(), st.integers(0, 2**40), st.sampled_from(STYLES), st.floats(0, 1))
def test_what_a_caption_says_is_found_in_it_again(asked, seed, style, dropout):
    text = describe(asked, style=style, seed=seed, dropout=dropout)
    got = parse_caption(text)
    assert text.strip()
    assert got.key in (None, asked.key)
    assert got.time_signature in (None, asked.time_signature)
    assert got.instruments is None or set(got.instruments) == set(asked.instruments)
    if got.tempo is not None:
        assert abs(got.tempo - asked.tempo) <= 0.5
    elif got.tempo_word is not None:
        assert got.tempo_word in (tempo_word(asked.tempo), coarse_tempo_word(asked.tempo))
    if got.seconds is not None:
        assert abs(got.seconds - asked.seconds) <= 0.5
    if got.notes_per_second is not None:
        assert abs(got.notes_per_second - asked.notes_per_second) <= 0.051
    elif got.density_word is not None:
        assert got.density_word == density_word(asked.notes_per_second)
    if dropout == 0:
        assert (got.key, got.time_signature) == (asked.key, asked.time_signature)
        assert (got.tempo_word is None) == (asked.tempo is None)
        assert got.instruments is not None


@pytest.mark.parametrize("number", range(DRUMS + 1))
def test_every_instrument_is_found_under_each_of_its_names(number):
    from midi_llm.captions import _spoken

    for name in _spoken(number):
        text = f"A dark piece with {name}, and more."
        assert parse_caption(text).instruments == (number,), name


def test_dropout_leaves_out_but_never_all():
    always = [describe(full(), style="plain", seed=s, dropout=1.0) for s in range(20)]
    assert all(t.count(".") <= 2 for t in always)  # one sentence; a number has a stop too
    assert len(set(always)) > 3
    some = [len(describe(full(), style="plain", seed=s, dropout=0.5)) for s in range(20)]
    assert max(map(len, always)) < np.mean(some) < len(describe(full(), style="plain"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"style": "midcaps"}, "style must be one of"), ({"dropout": 1.5}, "dropout must be 0 to 1"),
     ({"dropout": float("nan")}, "dropout must be")],
)  # fmt: skip
def test_bad_arguments_of_describe_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        describe(full(), **change)


def test_silence_cannot_be_described():
    with pytest.raises(UserError, match="has no notes"):
        describe(analyze(empty_notes()))


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_caption_dropout_keeps_order_and_some(count, seed):
    sentences = [f"Sentence {i} at 1.5 of it." for i in range(count)]
    text = " ".join(sentences)
    left = caption_dropout(text, np.random.default_rng(seed))
    kept = [s for s in sentences if s in left]
    assert left == " ".join(kept)
    gone = count - len(kept)
    assert gone <= (np.floor if count < 4 else np.ceil)(0.5 * count)
    assert kept


def test_caption_dropout_drops_half_of_the_time_as_many_as_text2midi():
    rng = np.random.default_rng(0)
    for count, allowed in ((1, {0}), (2, {0}), (3, {0, 1}), (4, {0, 1, 2}), (10, {0, 3, 4, 5})):
        sentences = [f"It is {i}." for i in range(count)]
        gone = [
            count - len(re.findall("It", caption_dropout(" ".join(sentences), rng)))
            for _ in range(600)
        ]
        assert set(gone) == allowed
        if count >= 4:
            assert np.mean(np.array(gone) > 0) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A slow jazz trio in F# minor, double bass, piano and drum kit, in 3/4",
         Request("F# minor", None, "Slow", (32, 0, DRUMS), (3, 4))),
        ("key of Cm, two takes, Allegro", Request("C minor", None, "Allegro")),
        ("in the key of a minor at 95 bpm", Request("A minor", 95.0, "Moderato")),
        ("A minor key gives it its tone", Request()),
        ("A minor piece for flutes", Request("A minor", instruments=(73,))),  # a guess
        ("a sad tune in a minor key", Request()),
        ("B-flat major, common time", Request("Bb major", time_signature=(4, 4))),
        ("a flat minor", Request("Ab minor")),
        ("chords Am, F, and a C major chord; in E\u266d MAJOR", Request("Eb major")),
        ("The tempo of 132 is fast", Request(tempo=132.0, tempo_word="Allegro")),
        ("at a tempo of 80.", Request(tempo=80.0, tempo_word="Andante")),
        ("160 beats per minute", Request(tempo=160.0, tempo_word="Vivace")),
        ("9000 bpm, 5 bpm", Request()),
        ("a grave mood", Request()),
        ("Grave, then Presto", Request(tempo_word="Grave")),
        ("very fast", Request(tempo_word="Very fast")),
        ("medium tempo, no drums, without a piano", Request(tempo_word="Moderate tempo")),
        ("dark atmosphere, rain on a soundtrack", Request()),
        ("piano, bass and lead guitar", Request(instruments=(0, 33, 27))),
        ("hornpipe with bassoon, harpsichord, steel drums", Request(instruments=(70, 6, 114))),
        ("2 minutes long", Request(seconds=120.0, duration_word="Short song")),
        ("a 20-second loop", Request(seconds=20.0, duration_word="Short fragment")),
        ("a long piece", Request(duration_word="Long piece")),
        ("about 3.5 notes per second", Request(notes_per_second=3.5,
                                               density_word="moderately dense")),
        ("", Request()),
    ],
)  # fmt: skip
def test_captions_are_parsed_by_rule(text, found):
    assert parse_caption(text) == found


@given(st.text(max_size=200))
def test_any_text_can_be_parsed(text):
    found = parse_caption(text)
    assert found.key is None or key_number(found.key)
    assert found.tempo is None or 20 <= found.tempo <= 400


def test_parsing_takes_bounded_time_and_refuses_what_is_no_text():
    for piece in ("A ", "key of ", "1", "120 ", "no ", "c# ", "bass ", "a-", " "):
        start = time.process_time()
        parse_caption(piece * (20_000 // len(piece)))
        assert time.process_time() - start < 2
    with pytest.raises(UserError, match="at most 20000"):
        parse_caption("a" * 20_001)
    with pytest.raises(UserError, match="must be text"):
        parse_caption(3)


def test_requests_are_made_of_attributes_and_captions():
    asked = Request.of(full())
    assert asked == Request(
        "F# minor", 87.6, "Andante", (0, 33, DRUMS), (6, 8), 7.25, "busy", 95.2, "Short song"
    )
    assert Request.of(asked) is asked
    assert Request.of("Presto").tempo_word == "Presto"
    assert Request.of(analyze(empty_notes())) == Request()
    with pytest.raises(UserError, match="must be a caption"):
        Request.of({"key": "C"})


# Real tunes: MIDI/<book><n>.mid is the tune X: n of ABC_cleaned/<book>.abc


def tunes(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each tune's file with the K: and M: fields of its ABC text, the first the header's."""
    for book in sorted((folder / "nottingham" / "ABC_cleaned").glob("*.abc")):
        for tune in re.split(r"(?m)^X:\s*", book.read_text("utf-8", "replace"))[1:]:
            number = re.match(r"\d+", tune)[0]
            keys, metres = (re.findall(rf"(?m)^{letter}:\s*(\S+)", tune) for letter in "KM")
            yield folder / "nottingham" / "MIDI" / f"{book.stem}{number}.mid", keys, metres


@pytest.mark.realdata
def test_keys_and_metres_of_nottingham_agree_with_their_abc(data_folder):
    from midi_llm.metrics import key_match

    found = []
    for path, keys, metres in tunes(data_folder):
        got = analyze(path)
        same, related = key_match(keys[0], got.key)
        metre = "{}/{}".format(*got.time_signature)
        beat = min(tempo_error(bpm, got.tempo) for bpm in (120, 80))
        found.append((same, related, metre == metres[0], metre in metres, beat < 0.02))
    rates = np.mean(found, 0)
    assert len(found) == 1034
    assert rates[0] > 0.82  # 0.837 measured: most others are a fifth off
    assert rates[1] > 0.84  # 0.859
    assert rates[2] > 0.98  # 0.987: the others change metre
    assert rates[3] == 1
    assert rates[4] > 0.98  # 0.999: the files have no tempo, so a quarter note lasts 0.5 s


@pytest.mark.realdata
def test_the_tempo_of_nottingham_is_measured_at_other_speeds(data_folder):
    paths = sorted((data_folder / "nottingham" / "MIDI").glob("*.mid"))[::20]
    for speed, least in ((0.8, 0.95), (1.0, 0.95), (1.25, 0.85)):
        right = []
        for path in paths:
            notes = read_notes(path)
            got = estimate_tempo(
                Notes(notes.onset / speed, notes.duration / speed, *notes.columns[2:])
            )
            right.append(min(tempo_error(bpm * speed, got) for bpm in (120, 80)) < 0.04)
        assert np.mean(right) > least


@pytest.mark.realdata
def test_captions_of_nottingham_are_read_back(data_folder):
    for i, path in enumerate(sorted((data_folder / "nottingham" / "MIDI").glob("*.mid"))[::50]):
        got, asked = analyze(path), parse_caption(describe(analyze(path), seed=i))
        assert (asked.key, asked.time_signature) == (got.key, got.time_signature)
        assert asked.instruments == got.instruments


def test_a_file_is_measured_by_the_notes_it_is_tokenised_by(tmp_path):
    """The program stands in another track than the notes; the last note is never ended."""
    import mido

    midi = mido.MidiFile(type=1, ticks_per_beat=480)
    midi.tracks.append(mido.MidiTrack([mido.Message("program_change", channel=0, program=40)]))
    on = [mido.Message("note_on", channel=0, note=60 + i, time=480 * (i > 0)) for i in range(3)]
    midi.tracks.append(mido.MidiTrack(on))
    midi.save(tmp_path / "a.mid")
    found = analyze(tmp_path / "a.mid")
    assert found.instruments == (40,)
    assert found.pitch_range == (60, 62)
    assert found.seconds == pytest.approx(1.25)


def test_what_no_file_can_have_is_left_out_of_a_prompts_style():
    assert style_of_prompt("at 90 bpm in 7/32 in Eb minor").key == "Eb minor"
    found = style_of_prompt("at 90 bpm, 300/4, in D minor")
    assert (found.tempo, found.key) == (90, "D minor")
    found = style_of_prompt("in 3/4, in G# major at 70 bpm")
    assert (found.tempo, found.time_signature, found.key) == (70, (3, 4), None)
    assert style_of_prompt("in D minor", key="C major").key == "C major"
