"""Rests, windows and controls against the plain reference and against what AMT's paper says."""

import dataclasses
from itertools import groupby

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from midi_files import grid_events

from midi_llm.anticipate import (
    REST,
    choose_controls,
    events_of,
    ids_of,
    interleave,
    kind_of_copy,
    notes_of_events,
    pad_rests,
    sequence,
    windows,
)
from midi_llm.notes import Notes, empty_notes
from midi_llm.reference import naive_events, naive_interleave, naive_pad
from midi_llm.vocab import DRUMS, AMTConfig
from tenfold_common.errors import UserError

AMT = AMTConfig()
SMALL = AMTConfig.small()
SMALL_ANTICIPATING = dataclasses.replace(SMALL, anticipation=True)
GRIDS = pytest.mark.parametrize("grid", [AMT, SMALL_ANTICIPATING], ids=["amt", "small"])
Rows = list[tuple[int, int, int]]


def array(rows: Rows) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def tuples(events: np.ndarray) -> Rows:
    assert events.dtype == np.int64
    assert events.shape == (len(events), 3)
    return [tuple(row) for row in events.tolist()]


def at(*times: int) -> np.ndarray:
    return array([(t, 10, 60) for t in times])


def on_grid(
    grid: AMTConfig, *, max_gap: int | None = None, max_size: int = 40
) -> st.SearchStrategy:
    return grid_events(
        times=grid.times,
        durations=grid.durations,
        instruments=grid.instruments,
        max_gap=max_gap,
        max_size=max_size,
    )


# Rounding


def test_rounding_is_to_even_and_of_each_by_itself():
    notes = Notes.of([0.005, 0.015, 0.025, 0.994, 1.0], [0.025, 0.015, 20.0, 0.012, 9.994], 1, 60)
    events = events_of(notes, AMT)
    assert events[:, 0].tolist() == [round(100 * t) for t in notes.onset.tolist()]
    assert events[:, 1].tolist() == [2, 2, 999, 1, 999]
    assert events[:, 2].tolist() == [188] * 5
    assert events[3, 0] == 99  # its end, 1.006 s, is 1 tick later, though 101 - 99 is 2


@GRIDS
@given(data=st.data())
def test_rounding_as_the_reference_rounds(grid, data):
    seconds = st.floats(0, 12, allow_subnormal=False) | st.integers(0, 2400).map(lambda n: n / 200)
    rows = data.draw(
        st.lists(st.tuples(seconds, seconds, st.integers(0, 128), st.integers(0, 127)), max_size=20)
    )
    rows.sort(key=lambda r: r[0])
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    events = events_of(Notes.of(*map(list, columns)), grid)
    assert tuples(events) == naive_events([list(r) for r in rows], grid)


def test_the_small_grid_knows_families():
    notes = Notes.of([0, 0, 0], 1, [7, 8, DRUMS], [60, 61, 36])
    events = events_of(notes, SMALL)
    assert events[:, 2].tolist() == [60, 128 + 61, 16 * 128 + 36]
    back = notes_of_events(events, SMALL)
    assert back.instrument[-1] == DRUMS
    assert (back.instrument[:2] // 8).tolist() == [0, 1]


@GRIDS
@given(data=st.data())
def test_events_are_their_notes(grid, data):
    events = array(data.draw(on_grid(grid)))
    notes = notes_of_events(pad_rests(events, grid), grid)
    assert len(notes) == len(events)
    assert tuples(events_of(notes, grid)) == tuples(events)


def test_no_events():
    assert tuples(events_of(empty_notes(), AMT)) == []
    assert len(notes_of_events(array([]), AMT)) == 0
    assert len(notes_of_events(array([(0, 0, REST)]), AMT)) == 0


# Ids


def test_ids_of_events_notes_and_rests():
    events = array([(0, 25, 60), (100, 0, REST), (9999, 999, 128 * 128 + 127)])
    assert ids_of(events, AMT).tolist() == (
        [0, 10025, 11060, 100, 10000, 27512, 9999, 10999, 27511]
    )
    assert ids_of(events, AMT).dtype == np.int64
    mixed = ids_of(events, AMT, control=np.array([True, False, True]))
    assert mixed.tolist() == ([27513, 37538, 38573, 100, 10000, 27512, 37512, 38512, 55024])
    assert ids_of(events[[0, 2]], AMT, control=True).tolist() == (
        [27513, 37538, 38573, 37512, 38512, 55024]
    )
    assert ids_of(array([]), AMT).tolist() == []


@pytest.mark.parametrize(
    "event",
    [(-1, 0, 0), (10000, 0, 0), (0, -1, 0), (0, 1000, 0)],
    ids=str,
)
def test_events_outside_the_grid_have_no_ids(event):
    with pytest.raises(UserError):
        ids_of(array([(0, 0, 0), event]), AMT)


def test_a_rest_is_never_a_control():
    events = array([(0, 1, 60), (100, 0, REST)])
    for control in (True, np.array([False, True])):
        with pytest.raises(UserError, match="rest"):
            ids_of(events, AMT, control=control)


def test_a_grid_without_controls_writes_none():
    with pytest.raises(UserError):
        ids_of(at(0), SMALL, control=True)


# Rests


@pytest.mark.parametrize(
    ("times", "rests"),
    [
        ([], []),
        ([0], []),
        ([100], []),
        ([101], [100]),
        ([200], [100]),
        ([201], [100, 200]),
        ([0, 100, 200], []),
        ([0, 101], [100]),
        ([50, 150, 251], [250]),
        ([7, 7, 400], [107, 207, 307]),
        ([350], [100, 200, 300]),
    ],
    ids=str,
)
def test_rests_in_silences_of_more_than_a_second(times, rests):
    padded = pad_rests(at(*times), AMT)
    assert padded[padded[:, 2] == REST].tolist() == [[t, 0, REST] for t in rests]
    assert padded[:, 0].tolist() == sorted(times + rests)
    assert padded[padded[:, 2] != REST].tolist() == at(*times).tolist()


@pytest.mark.parametrize(
    ("end", "rests"),
    [(50, []), (150, []), (151, [150]), (250, [150]), (351, [150, 250, 350]), (0, [])],
)
def test_rests_up_to_the_end(end, rests):
    padded = pad_rests(at(50), AMT, end=end)
    assert padded[1:].tolist() == [[t, 0, REST] for t in rests]


def test_rests_of_nothing_up_to_an_end():
    assert pad_rests(at(), AMT, end=250).tolist() == [[100, 0, REST], [200, 0, REST]]
    assert pad_rests(at(), AMT, end=100).tolist() == []


@GRIDS
@settings(max_examples=100)
@given(data=st.data())
def test_rests_as_the_reference_puts_them(grid, data):
    rows = data.draw(on_grid(grid, max_gap=6 * grid.second))
    wanted = [(e[0], 0, REST) if e[2] is None else e for e in naive_pad(rows, grid)]
    padded = pad_rests(array(rows), grid)
    assert tuples(padded) == wanted
    steps = np.diff(padded[:, 0], prepend=0)
    assert ((steps >= 0) & (steps <= grid.second)).all()


# Interleaving


def test_controls_stand_five_seconds_before():
    events = at(0, 100, 200, 300)
    controls = at(500, 501, 600, 601, 700)
    merged, control = interleave(events, controls, AMT)
    assert merged[:, 0].tolist() == [500, 0, 100, 501, 600, 200, 601, 700, 300]
    assert control.tolist() == [True, False, False, True, True, False, True, True, False]
    assert control.dtype == bool


def test_controls_before_the_first_event():
    merged, control = interleave(at(400), at(0, 500), AMT)
    assert merged[:, 0].tolist() == [0, 500, 400]
    assert control.tolist() == [True, True, False]


def test_interleaving_nothing():
    for events, controls in ((at(), at()), (at(1, 2), at()), (at(), at(1, 2))):
        merged, control = interleave(events, controls, AMT)
        assert sorted(merged[:, 0].tolist()) == sorted([*events[:, 0], *controls[:, 0]])
        assert control.sum() == len(controls)


@GRIDS
@settings(max_examples=100)
@given(data=st.data())
def test_interleaving_as_the_reference_does(grid, data):
    rows = data.draw(on_grid(grid, max_gap=3 * grid.second))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    events = pad_rests(array([r for r, c in zip(rows, chosen, strict=True) if not c]), grid)
    controls = [r for r, c in zip(rows, chosen, strict=True) if c]
    merged, control = interleave(events, array(controls), grid)
    wanted = naive_interleave(tuples(events), controls, grid)
    assert list(zip(control.tolist(), tuples(merged), strict=True)) == wanted


@GRIDS
@settings(max_examples=100)
@given(data=st.data())
def test_padded_events_use_up_all_controls(grid, data):
    """No control is left for the end, where the events go on to the last of them."""
    rows = data.draw(on_grid(grid, max_gap=10 * grid.second))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    events = array([r for r, c in zip(rows, chosen, strict=True) if not c])
    controls = array([r for r, c in zip(rows, chosen, strict=True) if c])
    padded = pad_rests(events, grid, end=rows[-1][0] if rows else 0)
    assume(len(padded))
    merged, control = interleave(padded, controls, grid)
    assert not control[-1]
    assert control.sum() == len(controls)
    before = 0  # no control later than it must be
    for (time, *_), is_control in zip(tuples(merged), control.tolist(), strict=True):
        if is_control:
            assert before >= time - grid.delta
        else:
            before = time


# Choosing controls


def dense(seconds: int, *, per_second: int = 20, instruments: int = 1) -> np.ndarray:
    """Regular notes, instruments in turn."""
    count = seconds * per_second
    times = np.arange(count) * 100 // per_second
    notes = np.arange(count) % instruments * 128 + 60
    return np.stack([times, np.full(count, 5), notes], axis=1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", ["none", "span", "random", "instrument"])
def test_choices_are_masks_and_repeat_with_their_seed(kind):
    events = dense(90, instruments=5)
    one, other = (choose_controls(events, AMT, kind, rng(3)) for _ in range(2))
    assert one.dtype == bool
    assert one.shape == (len(events),)
    assert (one == other).all()
    if kind != "none":
        masks = {choose_controls(events, AMT, kind, rng(s)).tobytes() for s in range(30)}
        assert len(masks) > 5
    assert choose_controls(events[:0], AMT, kind, rng()).shape == (0,)


def test_none_chooses_nothing():
    assert not choose_controls(dense(90), AMT, "none", rng()).any()


def test_spans_last_five_seconds_and_start_exponentially_apart():
    events = dense(40_000, per_second=4)  # longer than any grid, for the statistics
    chosen = choose_controls(events, AMT, "span", rng())
    runs, place = [], 0
    for value, group in groupby(chosen.tolist()):
        size = len(list(group))
        runs.append((value, place, size))
        place += size
    spans = [size for value, _, size in runs if value][1:-1]
    gaps = np.array([size for value, _, size in runs if not value][1:-1]) / 4
    assert len(spans) > 1300
    assert min(spans) >= 20  # 5 s of 4 notes; two that touch give more
    assert np.median(spans) == 20
    assert np.mean(np.array(spans) <= 20) > 0.85
    # An exponential law of 20 s, seen behind what a span itself takes: its deviation is its mean.
    assert 18 < gaps.mean() < 22
    assert 0.9 < gaps.std() / gaps.mean() < 1.1
    assert 0.17 < chosen.mean() < 0.23
    assert np.exp(-1) - 0.05 < np.mean(gaps > 20) < np.exp(-1) + 0.05


def test_random_choices_have_one_of_nine_probabilities():
    events = dense(100, per_second=100)
    shares = np.array([choose_controls(events, AMT, "random", rng(s)).mean() for s in range(150)])
    nearest = np.round(shares * 10).astype(int)
    assert np.abs(shares * 10 - nearest).max() < 0.25
    counts = np.bincount(nearest, minlength=11)
    assert counts[0] == counts[10] == 0
    assert (counts[1:10] >= 5).all()


def test_random_choices_do_not_depend_on_the_neighbour():
    chosen = choose_controls(dense(100, per_second=100), AMT, "random", rng(1))
    p = chosen.mean()
    assert abs((chosen[1:] & chosen[:-1]).mean() - p * p) < 0.03


def test_instruments_are_chosen_whole_at_least_one_and_not_all():
    events = dense(20, instruments=4)
    events[:, 2] += 7 * (np.arange(len(events)) // 4 % 3)  # other pitches of the same instruments
    seen = set()
    for seed in range(200):
        chosen = choose_controls(events, AMT, "instrument", rng(seed))
        inside = {n // 128 for n in events[chosen, 2]}
        outside = {n // 128 for n in events[~chosen, 2]}
        assert inside
        assert outside
        assert not inside & outside
        seen.add(frozenset(inside))
    assert {len(s) for s in seen} == {1, 2, 3}
    assert len(seen) == 4 + 6 + 4


def test_of_two_instruments_each_is_chosen():
    events = dense(5, instruments=2)
    firsts = {bool(choose_controls(events, AMT, "instrument", rng(s))[0]) for s in range(40)}
    assert firsts == {True, False}


def test_a_single_instrument_is_not_chosen():
    assert not choose_controls(dense(20), AMT, "instrument", rng()).any()


def test_kinds_of_copies():
    wanted = ["none", "span"] + ["random"] * 4 + ["instrument"] * 4
    assert [kind_of_copy(k) for k in range(30)] == wanted * 3


# Sequences


def split(ids: np.ndarray, grid: AMTConfig) -> tuple[int, list[tuple[bool, tuple[int, int, int]]]]:
    """Flag and triples of a sequence, read id by id; checks that every id fits its slot."""
    flag, triples = int(ids[0]), []
    assert (len(ids) - 1) % 3 == 0
    for i in range(1, len(ids), 3):
        time, duration, note = ids[i : i + 3].tolist()
        control = time >= grid.duration_offset
        prefix = "control " if control else ""
        assert grid.block(time) == prefix + "time"
        assert grid.block(duration) == prefix + "duration"
        assert grid.block(note) in ({prefix + "note"} if control else {"note", "rest"})
        shift = grid.control_offset if control else 0
        rest = note == grid.rest
        triples.append(
            (
                control,
                (
                    time - shift,
                    duration - shift - grid.duration_offset,
                    REST if rest else note - shift - grid.note_offset,
                ),
            )
        )
    return flag, triples


@GRIDS
@pytest.mark.parametrize("kind", ["none", "span", "random", "instrument"])
@settings(max_examples=40)
@given(data=st.data())
def test_sequences(grid, kind, data):
    rows = data.draw(on_grid(grid, max_gap=4 * grid.second))
    ids = sequence(array(rows), grid, kind=kind, rng=rng(data.draw(st.integers(0, 99))))
    assert ids.dtype == np.int64
    flag, triples = split(ids, grid)
    assert flag == (grid.autoregress if kind == "none" else grid.anticipate)
    notes = sorted(t for _, t in triples if t[2] != REST)
    assert notes == sorted(rows)
    controls = [t for c, t in triples if c]
    events = [t for c, t in triples if not c]
    assert REST not in {t[2] for t in controls}
    assert [t[0] for t in events] == sorted(t[0] for t in events)
    wanted = [(e[0], 0, REST) if e[2] is None else e for e in naive_pad(
        [t for t in events if t[2] != REST], grid
    )]  # fmt: skip
    assert events[: len(wanted)] == wanted
    assert all(t[2] == REST for t in events[len(wanted) :])
    assert triples == naive_interleave(events, controls, grid)
    if events:
        assert not triples[-1][0]
    if kind == "none":
        assert not controls


def test_a_sequence_worked_by_hand():
    ids = sequence(array([(0, 25, 60), (150, 50, 128 * 128 + 36)]), AMT)
    assert ids[:10].tolist() == ([55026, 0, 10025, 11060, 100, 10000, 27512, 150, 10050, 27420])


def test_the_flag_follows_the_kind_not_the_luck():
    events = dense(3)
    assert sequence(events, AMT, kind="instrument", rng=rng())[0] == AMT.anticipate
    assert sequence(events, AMT)[0] == AMT.autoregress


def test_sequences_need_a_generator_and_a_grid_with_controls():
    with pytest.raises(UserError, match="rng"):
        sequence(dense(3), AMT, kind="span")
    with pytest.raises(UserError, match="control"):
        sequence(dense(3), SMALL, kind="span", rng=rng())
    assert sequence(array([(0, 1, 60)]), SMALL).tolist()[:1] == [SMALL.autoregress]
    with pytest.raises(UserError):
        sequence(dense(3), AMT, kind="spans", rng=rng())  # type: ignore[arg-type]


def test_an_empty_piece():
    assert sequence(array([]), AMT).tolist() == [AMT.autoregress]


# Windows


def times_of(window: np.ndarray) -> list[int]:
    found = []
    for time, _, note in window.reshape(-1, 3).tolist():
        if time != AMT.separator:
            found.append(time - (AMT.control_offset if note >= AMT.control_offset else 0))
    return found


def strip(window: np.ndarray) -> np.ndarray:
    """The triples, without a flag should there be one."""
    return window[len(window) % 3 :]


def test_windows_are_cut_and_shifted():
    ids = ids_of(at(*range(40, 40 + 10 * 50, 10)), AMT)
    cut = [strip(w) for w in windows(ids, AMT, events=20)]
    assert [len(w) for w in cut] == [60, 60, 30]
    for w in cut:
        assert min(times_of(w)) == 0
        assert times_of(w) == list(range(0, 10 * len(w) // 3, 10))
        assert (w.reshape(-1, 3)[:, 1:] == ids[:3][1:]).all()


def test_a_window_is_341_events():
    ids = ids_of(at(*range(1000)), AMT)
    assert [len(strip(w)) for w in windows(ids, AMT)] == [1023, 1023, 954]


def test_windows_do_not_change_what_they_cut():
    ids = ids_of(at(50, 60), AMT)
    before = ids.copy()
    windows(ids, AMT)
    assert (ids == before).all()


def test_controls_are_shifted_too():
    merged = array([(700, 5, 60), (300, 5, 61), (310, 5, 62)])
    ids = ids_of(merged, AMT, control=np.array([True, False, False]))
    (window,) = windows(ids, AMT)
    assert strip(window).tolist() == (
        [27513 + 400, 37518, 38573, 0, 10005, 11061, 10, 10005, 11062]
    )


def test_an_early_control_is_the_beginning():
    merged = array([(300, 5, 60), (350, 5, 61)])
    (window,) = windows(ids_of(merged, AMT, control=np.array([True, False])), AMT)
    assert strip(window).tolist() == [27513, 37518, 38573, 50, 10005, 11061]


def test_windows_longer_than_the_grid_are_left_out():
    rows = [[0, 10005, 11060], [9999, 10005, 11061], [10000, 10005, 11062], [20000, 10005, 11063]]
    ids = np.array(rows).ravel()  # times as a long piece has them, before it is cut
    kept = [strip(w).tolist() for w in windows(ids, AMT, events=2)]
    assert kept == [[0, 10005, 11060, 9999, 10005, 11061]]


@pytest.mark.parametrize("start", [20000, 27512, 27513, 60000])
def test_windows_far_behind_the_grid(start):
    """Whether a triple is a control its last id says, which is no matter of time."""
    rows = [[start, 10005, 11060], [start + 1, 10005, 11061]]
    (window,) = windows(np.array(rows).ravel(), AMT)
    assert strip(window).tolist() == [0, 10005, 11060, 1, 10005, 11061]


def test_separators_stay_and_are_not_shifted():
    ids = [55025] * 3 + [30, 10005, 11060] + [55025] * 3 + [10, 10005, 11061, 20, 10005, 11062]
    (window,) = windows(np.array(ids), AMT)
    assert strip(window).tolist() == (
        [55025] * 3 + [20, 10005, 11060] + [55025] * 3 + [0, 10005, 11061, 10, 10005, 11062]
    )


def test_windows_of_nothing():
    assert windows(np.array([], dtype=np.int64), AMT) == []


@settings(max_examples=60)
@given(rows=on_grid(AMT, max_gap=300), size=st.integers(1, 12))
def test_windows_hold_every_event_once(rows, size):
    cut = [strip(w) for w in windows(ids_of(array(rows), AMT), AMT, events=size)]
    assert [len(w) // 3 for w in cut] == [
        min(size, len(rows) - i) for i in range(0, len(rows), size)
    ]
    for i, w in enumerate(cut):
        part = array(rows[i * size : (i + 1) * size])
        part[:, 0] -= part[:, 0].min()
        assert w.tolist() == ids_of(part, AMT).tolist()
