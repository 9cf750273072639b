"""AMT's ids behind miditok's interface: there and back, and what is no piece."""

import json
import warnings

import miditok
import numpy as np
import pytest
import symusic
from hypothesis import given, settings
from hypothesis import strategies as st
from midi_files import grid_events, midi, midi_files, off, on, parse, program, tempo

from midi_llm.anticipate import REST, events_of, ids_of, pad_rests, sequence
from midi_llm.midi_read import read_notes, read_score
from midi_llm.midi_write import Style
from midi_llm.notes import MAX_SECONDS, Notes, empty_notes
from midi_llm.reference import naive_tokenize
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import DRUMS, AMTConfig
from tenfold_common.errors import UserError

AMT = AMTConfig()
SMALL = AMTConfig.small()
TOKENIZERS = {"amt": AMTTokenizer(), "small": AMTTokenizer(SMALL)}
TOK = TOKENIZERS["amt"]
EACH = pytest.mark.parametrize("tok", TOKENIZERS.values(), ids=TOKENIZERS)
FILE = midi(
    [
        tempo(0, 618_557),
        program(0, 40),
        on(0, 60),
        on(0, 64),
        off(480, 60),
        on(60, 60),
        off(99, 64),
    ],
    [on(480, 36, 9), off(1, 36, 9), on(9600, 38, 9)],
)
CLOSED = midi(
    [tempo(0, 618_557), program(0, 40), on(0, 60), on(0, 64), off(480, 60), off(99, 64)],
    [on(480, 36, 9), off(1, 36, 9), tempo(100, 400_001), on(9600, 38, 9), off(70, 38, 9)],
)


def pieces(grid: AMTConfig, *, max_size: int = 40) -> st.SearchStrategy:
    """Events of at most 15 pitched instruments, so that a score has channels for all."""
    return grid_events(
        times=grid.times,
        durations=grid.durations,
        instruments=15,
        max_gap=4 * grid.second,
        max_size=max_size,
    ).map(lambda rows: np.array(rows, dtype=np.int64).reshape(-1, 3))


def ids_with_rests(events: np.ndarray, grid: AMTConfig) -> list[int]:
    return ids_of(pad_rests(events, grid), grid).tolist()


# The vocabulary


@EACH
def test_padding_is_last_and_shifts_nothing(tok):
    assert isinstance(tok, miditok.MusicTokenizer)
    assert tok.pad_token_id == tok.amt.size == len(tok) - 1
    assert tok["PAD_None"] == tok.pad_token_id
    assert list(tok.special_tokens) == ["PAD_None"]
    assert len(tok.vocab) == len(tok)
    assert sorted(tok.vocab.values()) == list(range(len(tok)))


def test_names_of_ids():
    assert TOK.pad_token_id == 55028
    kinds = {
        0: "Time_0",
        9999: "Time_9999",
        10000: "Duration_0",
        10999: "Duration_999",
        11000: "Note_0.0",
        27511: "Note_128.127",
        27512: "Rest_None",
        27513: "AnticipatedTime_0",
        38512: "AnticipatedDuration_999",
        55024: "AnticipatedNote_128.127",
        55025: "Separator_None",
        55026: "Autoregress_None",
        55027: "Anticipate_None",
        55028: "PAD_None",
    }
    for id, name in kinds.items():
        assert TOK[id] == name
        assert TOK[name] == id


def test_the_grid_by_default_is_that_of_amt():
    assert TOK.amt == AMT
    assert AMTTokenizer(SMALL).amt == SMALL


# There


def test_ids_of_a_file_worked_by_hand():
    ids = TOK.encode(midi([program(0, 40), on(0, 60), off(480, 60), on(960, 62), off(48, 62)])).ids
    assert ids == (
        [0, 10050, 11000 + 40 * 128 + 60, 100, 10000, 27512, 150, 10005, 11000 + 40 * 128 + 62]
    )
    assert all(type(i) is int for i in ids)


@EACH
@settings(max_examples=100)
@given(data=midi_files())
def test_ids_are_those_of_the_reference(tok, data, tmp_path_factory):
    if parse(data).length > MAX_SECONDS - 1:
        return
    path = tmp_path_factory.getbasetemp() / "some.mid"
    path.write_bytes(data)
    assert_naive(tok, path)


def assert_naive(tok: AMTTokenizer, path) -> None:
    """Equal to the reference as far as the grid goes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* begin after", UserWarning)
        ids = tok.encode(path).ids
    wanted = np.array(naive_tokenize(path, tok.amt), dtype=np.int64).reshape(-1, 3)
    inside = wanted[wanted[:, 0] < tok.amt.times]
    while len(inside) < len(wanted) and len(inside) and inside[-1, 2] == tok.amt.rest:
        inside = inside[:-1]  # a silence before what is left out
    assert ids == inside.ravel().tolist()


@EACH
@settings(max_examples=40)
@given(data=st.data())
def test_all_sources_give_the_same(tok, data, tmp_path_factory):
    events = data.draw(pieces(tok.amt, max_size=15))
    score = tok.decode(ids_of(events, tok.amt))
    path = tmp_path_factory.getbasetemp() / "source.mid"
    score.dump_midi(path)
    ids = tok.encode(path).ids
    for source in (str(path), path.read_bytes(), read_notes(path)):
        assert tok.encode(source).ids == ids
    assert tok(path).ids == ids
    assert (tok.events(path) == events_of(read_notes(path), tok.amt)).all()
    if len(set(events[:, 2])) == len(events):  # else ends of equal pitches may be exchanged
        by_score = tok.events(read_score(path))
        assert sorted(by_score.tolist()) == sorted(tok.events(path).tolist())


@EACH
def test_scores_in_ticks(tok):
    score = read_score(CLOSED)
    assert sorted(tok.events(score).tolist()) == sorted(tok.events(CLOSED).tolist())
    before = score.copy()
    tok.encode(score)
    assert score == before
    with pytest.raises(UserError, match="tick"):
        tok.encode(score.to("second"))


def test_nothing_is_moved_to_beats():
    score = read_score(midi([tempo(0, 618_557), on(7, 60), off(13, 60), on(1, 61), off(333, 61)]))
    assert TOK.preprocess_score(score) == score
    assert TOK.encode(score).ids[:3] == [round(100 * 7 * 0.618557 / 480), 10002, 11060]


def test_empty_pieces():
    for source in (empty_notes(), midi([]), symusic.Score(480)):
        assert TOK.encode(source).ids == []
        assert TOK.events(source).shape == (0, 3)
    assert TOK.decode([]).note_num() == 0


def test_attribute_controls_are_refused():
    with pytest.raises(UserError, match="attribute"):
        TOK.encode(FILE, attribute_controls_indexes={})


@pytest.mark.parametrize("source", [None, 3, 0.5, object()], ids=repr)
def test_what_is_no_source(source):
    with pytest.raises((UserError, TypeError)):
        TOK.encode(source)


# And back


@EACH
@settings(max_examples=100)
@given(data=st.data())
def test_round_trip(tok, data):
    events = data.draw(pieces(tok.amt))
    ids = ids_with_rests(events, tok.amt)
    score = tok.decode(ids)
    assert score.note_num() == len(events)
    again = tok.events(score)
    assert sorted(again.tolist()) == sorted(events.tolist())
    seq = tok.encode(score)
    found = tok.to_events(seq)
    assert sorted(found[found[:, 2] != REST].tolist()) == sorted(events.tolist())
    assert tok.tokens_errors(seq) == 0
    assert tok.encode(tok.decode(seq)).ids == seq.ids


@EACH
@settings(max_examples=60)
@given(data=st.data())
def test_to_events_and_ids_of_are_inverse(tok, data):
    events = pad_rests(data.draw(pieces(tok.amt)), tok.amt)
    ids = ids_of(events, tok.amt)
    for form in (ids, ids.tolist(), miditok.TokSequence(ids=ids.tolist()), ids.astype(np.int32)):
        found = tok.to_events(form)
        assert found.dtype == np.int64
        assert found.tolist() == events.tolist()


def test_decoded_seconds_do_not_depend_on_the_tempo():
    ids = [33, 10123, 11060, 99, 10000 + 999, 11000 + 128 * 128 + 36, 133, 10001, 11061]
    for style in (None, Style(tempo=97, key="C minor"), Style(tempo=333, time_signature=(6, 8))):
        score = TOK.decode(ids, style=style)
        assert sorted(TOK.events(score).tolist()) == sorted(TOK.to_events(ids).tolist())
        if style is not None:
            assert score.tempos[0].mspq == round(60e6 / style.tempo)
            assert score.time_signatures[0].numerator == style.time_signature[0]


def test_decoded_instruments():
    score = TOK.decode([0, 10010, 11000 + 40 * 128 + 60, 0, 10010, 11000 + DRUMS * 128 + 36])
    found = {(t.program, t.is_drum, t.notes[0].pitch) for t in score.tracks if len(t.notes)}
    assert found == {(40, False, 60), (0, True, 36)}


def test_rests_alone_decode_to_nothing():
    ids = [100, 10000, 27512, 200, 10000, 27512]
    assert TOK.to_events(ids).tolist() == [[100, 0, REST], [200, 0, REST]]
    assert TOK.decode(ids).note_num() == 0


def test_decode_refuses_what_it_does_not_do(tmp_path):
    with pytest.raises(UserError, match="ids alone"):
        TOK.decode([0, 10000, 11000], programs=[(0, False)])
    with pytest.raises(UserError, match="dump_midi"):
        TOK.decode([0, 10000, 11000], output_path=tmp_path / "a.mid")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_called_both_ways():
    seq = TOK(read_score(FILE))
    assert isinstance(seq, miditok.TokSequence)
    assert TOK(seq).note_num() == read_score(FILE).note_num()


def test_flags_and_what_stands_behind_a_separator():
    note = [5, 10010, 11060]
    for ids in (note, [55026, *note], [55027, *note], [*note, *[55025] * 3, 1, 2, 3]):
        assert TOK.to_events(ids).tolist() == [[5, 10, 60]]
    for ids in ([], [55026], [55025] * 3, [55026, 55025, 55025, 55025]):
        assert TOK.to_events(ids).shape == (0, 3)


@settings(max_examples=60)
@given(
    events=pieces(AMT),
    kind=st.sampled_from(["span", "random", "instrument"]),
    seed=st.integers(0, 99),
)
def test_controls_are_merged_or_refused(events, kind, seed):
    ids = sequence(events, AMT, kind=kind, rng=np.random.default_rng(seed))
    assert TOK.tokens_errors(ids.tolist()) == 0
    found = TOK.to_events(ids, controls="merge")
    assert (np.diff(found[:, 0]) >= 0).all()
    notes = found[found[:, 2] != REST]
    assert sorted(notes.tolist()) == sorted(events.tolist())
    assert TOK.decode(ids, controls="merge").note_num() == len(events)
    if (ids[1:] >= AMT.control_offset).any():
        place = int(np.argmax(ids[1:] >= AMT.control_offset)) + 1
        for act in (TOK.to_events, TOK.decode):
            with pytest.raises(UserError, match=rf"control .*\b{place}\b"):
                act(ids)


def test_controls_must_be_an_error_or_merged():
    with pytest.raises(UserError, match="merge"):
        TOK.to_events([], controls="keep")


# Ids that are no piece

A = [0, 10010, 11060]
B = [5, 10000, 11061]


@pytest.mark.filterwarnings("ignore:the last event is cut short:UserWarning")
@pytest.mark.parametrize(
    ("ids", "place", "slot"),
    [
        ([10000, 0, 0], 0, "time"),
        ([11000, 0, 0], 0, "time"),
        ([27512, 0, 0], 0, "time"),
        ([55026, 55026, *A], 1, "time"),
        ([*A, 55026, *A], 3, "time"),
        ([*A, 10010, 11060, 7], 3, "time"),
        ([0, 0, 11060], 1, "duration"),
        ([0, 11060, 11060], 1, "duration"),
        ([0, 27512, 11060], 1, "duration"),
        ([0, 37513, 11060], 1, "duration"),
        ([*A, 0, 9999, 11060], 4, "duration"),
        ([55026, *A, 0, 9999, 11060], 5, "duration"),
        ([0, 10010, 10010], 2, "note or rest"),
        ([0, 10010, 0], 2, "note or rest"),
        ([0, 10010, 38513], 2, "note or rest"),
        ([*A, *B, 5, 10010, 55027], 8, "note or rest"),
        ([55028, *A], 0, "time"),
        ([*A, 55028, 55028, 55028], 3, "time"),
    ],
    ids=str,
)
def test_ids_that_do_not_fit_their_slot(ids, place, slot):
    for act in (TOK.to_events, TOK.decode):
        with pytest.raises(UserError, match=rf"\b{ids[place]}\b.*\b{place}\b.*{slot}"):
            act(ids)


@pytest.mark.parametrize(
    ("ids", "place"),
    [
        ([*A, -1, 10010, 11060], 3),
        ([-5, 10010, 11060], 0),
        ([*A, 5, 10010, 55029], 5),
        ([*A, 5, 128256, 11060], 4),
        ([128256 + i for i in A], 0),
        ([*A, 2**40, 10010, 11060], 3),
    ],
    ids=str,
)
def test_ids_outside_of_music(ids, place):
    with pytest.raises(UserError, match=rf"{ids[place]}\b.*\b{place}\b"):
        TOK.to_events(ids)


def test_times_that_fall():
    with pytest.raises(UserError, match=r"fall.*\b3\b"):
        TOK.to_events([*B, *A])
    with pytest.raises(UserError, match=r"fall.*\b7\b"):
        TOK.to_events([55026, *B, *B, *A])
    with pytest.raises(UserError, match="fall"):
        TOK.to_events([100, 10000, 27512, *A])
    assert len(TOK.to_events([*B, *B])) == 2


@pytest.mark.parametrize(
    "ids", [[[0, 10000, 11000]], ["Time_0"], [0.5, 1, 2], None, 7, [None], [True, False]], ids=str
)
def test_what_is_no_list_of_ids(ids):
    with pytest.raises(UserError):
        TOK.to_events(ids)


@pytest.mark.parametrize(("more", "count"), [([7], 1), ([7, 10010], 2)])
def test_an_event_cut_short_is_dropped_with_a_warning(more, count):
    for start in ([], [55026], [55026, *A]):
        with pytest.warns(UserWarning, match=rf"\b{count}\b"):
            found = TOK.to_events([*start, *A, *more])
        assert found[-1].tolist() == [0, 10, 60]
    with pytest.warns(UserWarning, match=rf"\b{count}\b"):
        assert TOK.decode([*A, *more]).note_num() == 1
    with pytest.warns(UserWarning, match=rf"\b{count}\b"):
        assert len(TOK.to_events([*A, *more, *[55025] * 3])) == 1


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [*A, *B, 27512, 27513, 37513, 38513, 55025, 55026, 55027, 55028, -1, 60000]
        ),
        max_size=9,
    )
)
def test_any_ids_are_events_or_a_user_error(ids):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cut short", UserWarning)
        try:
            found = TOK.to_events(ids, controls="merge")
        except UserError:
            return
    assert found.shape == (len(found), 3)
    assert (np.diff(found[:, 0]) >= 0).all()


# Errors as miditok counts them


@EACH
def test_no_errors_in_what_is_legal(tok):
    grid = tok.amt
    seq = tok.encode(FILE)
    assert tok.tokens_errors(seq) == 0
    assert tok.tokens_errors(seq.ids) == 0
    assert tok.tokens_errors([grid.autoregress, *seq.ids]) == 0
    assert tok.tokens_errors([grid.autoregress, *seq.ids, *[grid.separator] * 3]) == 0


@pytest.mark.parametrize(
    "ids",
    [
        [0, 0, 11060],
        [0, 11060, 10010],
        [*A, 10010],
        [*A, 11060],
        [0, 10010, 10010],
        [*B, *A],
        [*A, 55026, *A],
        [0, 55025, 11060],
        [0, 37513, 11060],
        [0, 10010, 38513],
        [27513, 37513, 11060],
        [100, 10000, 27512, *A],
    ],
    ids=str,
)
def test_errors_in_what_is_not(ids):
    count = TOK.tokens_errors(ids) * len(ids)
    assert count == pytest.approx(round(count))
    assert 1 <= round(count) <= len(ids)


def test_more_errors_count_more():
    assert TOK.tokens_errors([*B, *A]) == pytest.approx(1 / 6)
    assert TOK.tokens_errors([*B, *A, *B, *A]) == pytest.approx(2 / 12)
    assert float(TOK.tokens_errors([0, 0, 0, 0])) > float(TOK.tokens_errors([*A, 0, 0]))


def test_complete_sequence_adds_names():
    seq = TOK.encode(FILE)
    assert seq.tokens == []
    ids = list(seq.ids)
    TOK.complete_sequence(seq)
    assert seq.ids == ids
    assert seq.tokens == [TOK[i] for i in ids]
    back = miditok.TokSequence(tokens=list(seq.tokens))
    TOK.complete_sequence(back)
    assert back.ids == ids
    assert TOK.to_events(back).tolist() == TOK.to_events(ids).tolist()
    unfinished = miditok.TokSequence(tokens=list(seq.tokens))  # names alone
    assert TOK.to_events(unfinished).tolist() == TOK.to_events(ids).tolist()


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from([0, 5, 10000, 10010, 11060, 27512, 27513, 27520, 37513, 38513, 55026]),
        max_size=9,
    )
)
def test_errors_are_counted_where_to_events_finds_one(more):
    ids = [55027, *more[: len(more) // 3 * 3]]
    try:
        TOK.to_events(ids, controls="merge")
    except UserError:
        assert float(TOK.tokens_errors(ids)) > 0
    else:
        assert TOK.tokens_errors(ids) == 0


def test_training_is_refused(tmp_path):
    (tmp_path / "a.mid").write_bytes(FILE)
    for named in ({}, {"vocab_size": 60000, "files_paths": [tmp_path / "a.mid"]}):
        with pytest.raises(UserError):
            TOK.train(**named)
    assert not TOK.is_trained
    assert len(TOK) == 55029


# Saving


@pytest.mark.parametrize(
    "grid",
    [AMT, SMALL, AMTConfig(resolution=50, max_time=40, max_duration=3, anticipation=False)],
    ids=["amt", "small", "other"],
)
def test_saved_and_loaded(grid, tmp_path):
    tok = AMTTokenizer(grid)
    tok.save(tmp_path / "one.json")
    tok.save_pretrained(tmp_path / "two")
    loaded = [
        AMTTokenizer(params=tmp_path / "one.json"),
        AMTTokenizer(params=str(tmp_path / "one.json")),
        AMTTokenizer.from_pretrained(tmp_path / "two"),
        AMTTokenizer.from_pretrained(str(tmp_path / "two"), local_files_only=True),
    ]
    for other in loaded:
        assert type(other) is AMTTokenizer
        assert other.amt == grid
        assert other.vocab == tok.vocab
        assert other.pad_token_id == tok.pad_token_id
        assert other.encode(FILE, too_long="error").ids == tok.encode(FILE, too_long="error").ids
        assert other == tok
    loaded[-1].save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(
        (tmp_path / "one.json").read_text()
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"amt": 3}', '{"amt": {"resolutoin": 3}}'])
def test_broken_saved_files(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError):
        AMTTokenizer(params=path)


def test_a_saved_file_that_is_not_there(tmp_path):
    with pytest.raises((UserError, FileNotFoundError), match="nowhere"):
        AMTTokenizer(params=tmp_path / "nowhere.json")


# Too long

LONG = Notes.of([0.0, 50, 99.9949, 99.996, 150, 300], 1, 0, [60, 61, 62, 63, 64, 65])


def test_notes_behind_the_grid_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"\b3\b.*\b6\b"):
        seq = TOK.encode(LONG)
    found = TOK.to_events(seq)
    assert found[found[:, 2] != REST].tolist() == [
        [0, 100, 60],
        [5000, 100, 61],
        [9999, 100, 62],
    ]
    assert found[-1].tolist() == [9999, 100, 62]


def test_or_refused():
    with pytest.raises(UserError, match=r"\b3\b.*\b6\b"):
        TOK.encode(LONG, too_long="error")
    TOK.encode(LONG[:3], too_long="error")
    with pytest.raises(UserError, match="truncate"):
        TOK.encode(LONG, too_long="cut")


def window_events(window: np.ndarray) -> np.ndarray:
    found = TOK.to_events(window)
    return found[found[:, 2] != REST]


def test_windows_of_a_long_piece_keep_every_note():
    onset = np.arange(0, 900, 0.4)
    notes = Notes.of(onset, 0.3, 0, 36 + np.arange(len(onset)) % 61)
    cut = TOK.encode_windows(notes, events=100)
    whole = events_of(notes, AMT)
    place = 0
    for window in cut:
        ids = np.asarray(window)
        triples = ids[len(ids) % 3 :].reshape(-1, 3)
        assert len(triples) <= 100
        assert triples[0, 0] == 0
        assert ((triples[:, 0] >= 0) & (triples[:, 0] < AMT.times)).all()
        got = window_events(ids)
        wanted = whole[place : place + len(got)]
        assert (got[:, 1:] == wanted[:, 1:]).all()
        assert (np.diff(got[:, 0]) == np.diff(wanted[:, 0])).all()
        place += len(got)
    assert place == len(whole)


def test_a_window_of_341_events():
    notes = Notes.of(np.arange(1000) * 0.1, 0.3, 0, 60)
    sizes = [len(w) // 3 for w in TOK.encode_windows(notes)]
    assert sizes == [341, 341, 318]


def test_windows_of_a_piece_with_long_silences_keep_every_note():
    notes = Notes.of([0.0, 200, 290, 500, 1000], 1, 0, [60, 61, 62, 63, 64])
    for events in (341, 50):
        cut = TOK.encode_windows(notes, events=events)
        found = [n for w in cut for n in window_events(w)[:, 2].tolist()]
        assert found == [60, 61, 62, 63, 64]


def test_windows_of_a_slow_piece_keep_every_note():
    """Two hundred notes in two hundred seconds: one window would be longer than the grid."""
    notes = Notes.of(np.arange(200.0), 0.5, 0, 60)
    cut = TOK.encode_windows(notes)
    assert sum(len(window_events(w)) for w in cut) == 200


@pytest.mark.parametrize("events", [0, -1, 2.5, None])
def test_windows_hold_at_least_an_event(events):
    with pytest.raises(UserError):
        TOK.encode_windows(FILE, events=events)


def test_windows_of_short_and_empty_pieces():
    (window,) = TOK.encode_windows(FILE)
    ids = TOK.encode(FILE).ids
    assert window[len(window) % 3 :].tolist() == ids
    assert TOK.encode_windows(empty_notes()) == []


# Real pieces


@pytest.mark.realdata
def test_real_files_as_the_reference_reads_them(data_folder):
    files = sorted((data_folder / "nottingham" / "MIDI").glob("*.mid"))
    assert len(files) > 1000
    for path in files[::20]:
        assert_naive(TOK, path)
        assert_naive(TOKENIZERS["small"], path)


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.* begin after:UserWarning")
def test_real_files_come_back(data_folder):
    files = sorted((data_folder / "nottingham" / "MIDI").glob("*.mid"))
    for path in files:
        seq = TOK.encode(path)
        assert len(seq.ids) > 0
        score = TOK.decode(seq)
        again = TOK.events(score)
        events = TOK.to_events(seq)
        notes = events[events[:, 2] != REST]
        assert sorted(again.tolist()) == sorted(notes.tolist()), path.name
