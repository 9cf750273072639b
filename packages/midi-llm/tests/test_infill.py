"""Infilling and going on: true to what is given, legal, within what is asked."""

import math

import numpy as np
import pytest
from singers import ANTICIPATING, Told, as_told, same, singer, tokenizer

from midi_llm.decode import Composer
from midi_llm.grammar import GenerationConstraints
from midi_llm.midi_write import Style
from midi_llm.modeling import TextMidiProcessor
from midi_llm.notes import Notes
from tenfold_common.errors import UserError
from tenfold_common.tiny import byte_tokenizer


def song(*, count=36, gap=0.5, seed=1):
    rng = np.random.default_rng(seed)
    onset = np.arange(count) * gap + rng.random(count) * 0.4
    onset = np.sort(onset).clip(0, 17.9)
    return Notes.of(
        onset, rng.random(count) * 2, rng.choice([0, 33, 128], count), rng.integers(30, 90, count),
        rng.integers(1, 128, count),
    )  # fmt: skip


def minus(piece, known):
    """Return the notes of a piece that are not known, all columns compared bit for bit."""
    left = [tuple(r) for r in zip(*piece.columns, strict=True)]
    for row in zip(*known.columns, strict=True):
        assert tuple(row) in left, "a note that should be kept is gone or changed"
        left.remove(tuple(row))
    return Notes.of(*map(np.array, zip(*left, strict=True))) if left else None


# ------------------------------------------------------------------------------------------------
# Infilling


@pytest.mark.parametrize("keep", [(), ("bass",), (0, "drums")])
@pytest.mark.parametrize(("start", "end"), [(6.0, 8.0), (0.0, 1.5), (17.0, 20.0), (0.0, 20.0)])
def test_infill_keeps_what_is_outside_and_stays_within(keep, start, end):
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    numbers = {(): [], ("bass",): [33], (0, "drums"): [0, 128]}[keep]
    outside = (notes.onset < start) | (notes.onset >= end)
    kept = notes[outside | np.isin(notes.instrument, numbers)]
    total = 0
    for seed in range(2 if end - start < 20 else 1):
        out = made.infill(notes, start=start, end=end, prompt="a", keep_instruments=keep, seed=seed)
        new = minus(out.notes, kept)
        assert (np.diff(out.notes.onset) >= 0).all()
        tokenizer(ANTICIPATING).to_events(out.ids, controls="merge")
        assert out.finish_reason in ("stop", "length", "end_time")
        if new is None:
            continue
        total += len(new)
        assert new.onset.min() >= start
        assert new.onset.max() < end
        assert new.end <= end + 1e-9
    assert total > 0


def test_infill_of_a_span_off_the_grid_stays_within():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    start, end = 6.0375, 9.0375  # 120.75 and 180.75 ticks
    kept = notes[(notes.onset < start) | (notes.onset >= end)]
    out = made.infill(notes, start=start, end=end, prompt="a", temperature=0)
    new = minus(out.notes, kept)
    assert new is not None
    assert new.onset.min() >= start
    assert new.end <= end


def test_infill_has_the_controls_after_the_span_in_order():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    out = made.infill(notes, start=6.0, end=11.0, prompt="a", temperature=0)
    amt = ANTICIPATING
    rows = np.array(out.ids[: len(out.ids) // 3 * 3]).reshape(-1, 3)
    told = rows[rows[:, 0] >= amt.control_offset]
    told = told[told[:, 0] < amt.separator] - amt.control_offset
    after = notes[notes.onset >= 11.0]
    expected = np.rint(after.onset * 20).astype(int)
    assert len(told) > 0
    assert (np.diff(told[:, 0]) >= 0).all()
    behind = expected[expected.searchsorted(told[0, 0]) :][: len(told)]
    assert told[:, 0].tolist() == behind.tolist()


def test_infill_copes_with_a_note_at_the_very_end_of_the_grid():
    """19.98 s rounds to tick 400, which the grid does not have."""
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([1.0, 14.5, 19.98], 0.1, 0, [60, 61, 62])
    out = made.infill(notes, start=14.0, end=19.0, prompt="a", temperature=0)
    tokenizer(ANTICIPATING).to_events(out.ids, controls="merge")
    assert 19.98 in out.notes.onset


def test_infill_keeps_what_is_behind_the_grid():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([1.0, 5.5, 30.0, 300.0], 0.1, 0, [60, 61, 62, 63])
    out = made.infill(notes, start=5.0, end=8.0, prompt="a", seed=2)
    minus(out.notes, notes[np.array([0, 2, 3])])


def test_infill_of_silence_and_of_a_score():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    out = made.infill(Notes.of([], 0.0, 0, 0), start=0, end=5, prompt="a", seed=1)
    assert len(out.notes)
    source = made.generate("a", max_notes=15, seed=2)[0].score
    assert len(made.infill(source, start=1, end=3, prompt="a").notes)


def test_infill_honours_constraints():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    wanted = GenerationConstraints(instruments=[40], key="C major", end_time=9)
    kept = notes[(notes.onset < 6) | (notes.onset >= 11)]
    new = minus(
        made.infill(notes, start=6, end=11, prompt="a", constraints=wanted, seed=1).notes, kept
    )
    assert new is not None
    assert set(new.instrument.tolist()) == {40}
    assert {p % 12 for p in new.pitch.tolist()} <= {0, 2, 4, 5, 7, 9, 11}
    assert new.end <= 9


def test_infill_never_reads_past_the_model():
    """Controls take ids as events do: 50 of them fall due with the first new note."""
    made = singer(ANTICIPATING, stop=-1e4, room=128)
    notes = Notes.of([0.5, *np.linspace(6, 7.5, 50)], 0.1, 0, np.arange(51) + 40)
    length = len(made.processor.encode("a", controls=True))
    try:
        out = made.infill(notes, start=3.0, end=4.0, prompt="a", temperature=0)
    except UserError:
        return
    assert length + 3 + len(out.ids) <= 128


def test_infill_doubles_no_note_that_is_kept():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    wanted = GenerationConstraints(instruments=[0], pitch_range=(60, 61))
    onset = np.arange(4.0, 5.0, 0.05)
    out = made.infill(
        Notes.of(onset, 0.1, 0, 60), start=4.0, end=5.0, prompt="a", keep_instruments=[0],
        constraints=wanted, temperature=0,
    )  # fmt: skip
    assert len(out.notes) > len(onset)
    rows = list(
        zip(np.rint(out.notes.onset * 20), out.notes.instrument, out.notes.pitch, strict=True)
    )
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5), (-1, 5), (15, 21), (math.nan, 5)])
def test_infill_refuses_wrong_spans(start, end):
    with pytest.raises(UserError, match="span"):
        singer(ANTICIPATING, stop=-1e4, room=1024).infill(song(), start=start, end=end, prompt="a")


def test_infill_needs_controls_and_known_instruments():
    with pytest.raises(UserError, match="no controls"):
        singer().infill(song(), start=0, end=5, prompt="a")
    with pytest.raises(UserError, match="no instrument"):
        singer(ANTICIPATING, stop=-1e4, room=1024).infill(
            song(), start=0, end=5, prompt="a", keep_instruments=["kazoo"]
        )


def test_the_context_of_an_infill_reaches_the_span():
    """Silence before the span is rests, as in training, and controls come five seconds ahead."""
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([1.0, 13.0], 0.5, 0, [60, 72])
    seen = []
    hook = made.model.base_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        made.infill(notes, start=9.0, end=11.0, prompt="a", temperature=0)
    finally:
        hook.remove()
    prompt = made.processor.encode("a", controls=True)
    amt, ids = ANTICIPATING, [i - made.processor.offset for i in seen[0][len(prompt) :]]
    rows = np.array(ids).reshape(-1, 3)
    rests = rows[rows[:, 2] == amt.rest]
    assert rests[:, 0].tolist() == [20 * s for s in (2, 3, 4, 5, 6, 7, 8)]
    controls = rows[rows[:, 0] >= amt.control_offset]
    assert (controls[:, 0] - amt.control_offset).tolist() == [260]
    place = (rows[:, 0] >= amt.control_offset).argmax()
    assert rows[place - 1, 0] == 160, "the first event from which it is at most five seconds away"


# ------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("seconds", [2.0, 25.0])
def test_continue_keeps_the_old_notes_and_adds_time(seconds):
    made, notes = singer(stop=-1e4, room=400), song()
    out = made.continue_(notes, seconds=seconds, prompt="a", seed=3)
    new = minus(out.notes, notes)
    assert new is not None
    assert (np.diff(out.notes.onset) >= 0).all()
    assert out.seconds >= notes.end + seconds
    assert out.seconds <= notes.end + seconds + 5
    # nothing is squeezed in before what was there has begun
    assert new.onset.min() >= notes.onset.max() - 0.05


def test_continue_goes_on_from_far_behind_the_grid():
    made = singer(stop=-1e4, room=400)
    notes = Notes.of(np.arange(100) * 1.1, 0.4, 0, 60 + np.arange(100) % 7)
    out = made.continue_(notes, seconds=12, prompt="a", seed=3)
    new = minus(out.notes, notes)
    assert new.onset.min() >= notes.onset.max() - 0.05
    assert out.seconds >= notes.end + 12


def test_continue_is_reproducible_and_stops_where_the_model_does():
    made, notes = singer(stop=-1e4, room=400), song()
    one, two, three = (
        made.continue_(notes, seconds=3, prompt="a", seed=seed) for seed in (1, 1, 2)
    )
    assert same(one.notes, two.notes)
    assert one.ids != three.ids
    out = singer(stop=1e3).continue_(notes, seconds=8, prompt="a", temperature=0)
    assert out.finish_reason == "stop"
    assert same(out.notes, notes)


def test_continue_from_silence():
    out = singer(stop=-1e4).continue_(Notes.of([], 0.0, 0, 0), seconds=4, prompt="a")
    assert out.seconds >= 4


def test_continue_honours_constraints():
    made, notes = singer(stop=-1e4, room=400), song()
    wanted = GenerationConstraints(instruments=[40], key="C major", end_time=6)
    out = made.continue_(notes, seconds=30, prompt="a", constraints=wanted, seed=1)
    new = minus(out.notes, notes)
    assert set(new.instrument.tolist()) == {40}
    assert {p % 12 for p in new.pitch.tolist()} <= {0, 2, 4, 5, 7, 9, 11}
    assert new.end <= notes.end + 6 + 1e-9


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 3600])
def test_continue_refuses_wrong_lengths(seconds):
    with pytest.raises(UserError, match="seconds"):
        singer().continue_(song(), seconds=seconds, prompt="a")


def test_what_was_there_does_not_use_up_the_notes_a_second():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    dense = Notes.of(np.arange(0, 3, 0.05), 0.1, 0, np.arange(60) + 30)
    wanted = GenerationConstraints(notes_per_second=2)
    out = made.continue_(dense, seconds=3, prompt="a", constraints=wanted, seed=1)
    new = out.notes.onset[len(dense) :]
    assert len(new) > 2
    assert new[0] < 4
    for time in new:
        assert (new <= time).sum() <= 2 * (time - dense.onset[-1]) + 2


def test_a_drone_does_not_hide_the_context():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    notes = Notes.of([0.0, 0.5, 1.0], [60.0, 0.2, 0.2], 0, [36, 60, 64])
    out = made.continue_(notes, seconds=2, prompt="a", max_notes=6, seed=1)
    minus(out.notes, notes)
    assert out.notes.onset[3] < 3, "it goes on from the last onset"


# ------------------------------------------------------------------------------------------------
# Both


def test_the_new_notes_of_a_continuation_and_an_infill_are_told():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    told = Told()
    out = made.continue_(notes, seconds=25, prompt="a", seed=1, on_note=told)
    new = out.notes[np.arange(len(notes), len(out.notes))]
    assert out.notes.end > notes.end + 25 > 20, "the context should slide"
    assert [n[:3:2] for n in told.of(0)] == [n[:3:2] for n in as_told(new)]
    assert [n.onset for n in told.of(0)] == new.onset.tolist()
    told = Told()
    out = made.infill(notes, start=6, end=9, prompt="a", seed=1, on_note=told)
    new = minus(out.notes, notes[(notes.onset < 6) | (notes.onset >= 9)])
    assert new is not None
    assert told.of(0) == as_told(new)


def test_max_notes_caps_what_is_new():
    made, notes = singer(ANTICIPATING, stop=-1e4, room=1024), song()
    out = made.continue_(notes, seconds=200, prompt="a", max_notes=7, seed=1)
    assert len(out.notes) <= len(notes) + 7
    assert out.finish_reason == "length"
    kept = notes[(notes.onset < 2) | (notes.onset >= 15)]
    out = made.infill(notes, start=2, end=15, prompt="a", max_notes=3, seed=1)
    assert len(out.notes) <= len(kept) + 3
    for call in (
        lambda: made.continue_(notes, seconds=5, prompt="a", max_notes=0),
        lambda: made.infill(notes, start=2, end=5, prompt="a", max_notes=0),
    ):
        with pytest.raises(UserError, match="max_notes must be a whole number"):
            call()


def test_files_of_what_is_changed_keep_tempo_metre_and_key():
    made = singer(ANTICIPATING, stop=-1e4, room=1024)
    style = Style(tempo=96, time_signature=(3, 4), key="Eb minor")
    source = made.generate("a", max_notes=15, seed=2, style=style)[0].score
    for out in (
        made.infill(source, start=1, end=3, prompt="a"),
        made.continue_(source, seconds=2, prompt="a"),
    ):
        assert out.style.tempo == pytest.approx(96)
        assert (out.style.time_signature, out.style.key) == ((3, 4), "Eb minor")
    assert made.infill(source, start=1, end=3, prompt="a", style=Style()).style == Style()


# ------------------------------------------------------------------------------------------------
# What engines are asked for


class Scripted(Composer):
    """An engine that plays what it is told: functions of a grammar, one a call."""

    def __init__(self, *plays, amt=ANTICIPATING, room=600):
        text = byte_tokenizer()
        self.processor = TextMidiProcessor(text, amt, len(text), system="")
        self.plays, self.room, self.calls = list(plays), room, []

    def _context(self, text):
        return self.room - text

    def _decode(self, rows, sampling, batch_size, seed, each):
        found = []
        for ids, grammar in rows:
            self.calls.append((list(ids), grammar, seed))
            play = self.plays[min(len(self.calls), len(self.plays)) - 1]
            found.append([])
            for id in play(grammar):
                allowed = grammar.proceed()
                if allowed is None or id not in allowed:
                    break
                grammar.push(id)
                found[-1].append(id)
            if grammar.proceed() is not None:
                grammar.finish_reason = "length"
        return found


def notes_at(*onsets, note=60, lasts=2, gap=0):
    """Play notes at ticks behind where the grammar is."""

    def play(grammar):
        amt, start = grammar.rules.config, grammar.allowed().start
        for onset in onsets:
            yield start + onset
            yield amt.duration_offset + lasts
            yield amt.note_offset + note

    return play


def then_end(play):
    def both(grammar):
        yield from play(grammar)
        yield grammar.rules.config.separator

    return both


def test_every_window_draws_anew_until_the_time_is_full():
    made = Scripted(notes_at(1, 30, 60))
    made.continue_(song(), seconds=9, prompt="a", seed=5)
    seeds = [seed for _, _, seed in made.calls]
    assert len(seeds) >= 3
    assert seeds == list(range(5, 5 + len(seeds)))


def test_what_the_model_ends_is_not_gone_on_with():
    made = Scripted(then_end(notes_at(1, 20)))
    out = made.continue_(song(), seconds=60, prompt="a")
    assert len(made.calls) == 1
    assert out.finish_reason == "stop"
    assert len(out.notes) == len(song()) + 2


def test_rests_count_among_the_most():
    def play(grammar):
        amt, start = grammar.rules.config, grammar.allowed().start
        for number in range(1, 9):
            yield start + 20 * number
            yield from (amt.duration_offset, amt.rest)
        yield from notes_at(1)(grammar)

    made = Scripted(play)
    out = made.continue_(song(), seconds=60, prompt="a", max_notes=12)
    assert out.finish_reason == "length"
    assert sum(len(grammar.events) for _, grammar, _ in made.calls) == 12


@pytest.mark.parametrize("room", [120, 300])
def test_half_of_what_the_model_reads_is_left_to_go_on(room):
    made = Scripted(notes_at(1), room=room)
    dense = Notes.of(np.arange(200) * 0.08, 0.1, 0, 60)
    made.continue_(dense, seconds=1, prompt="a", max_notes=1)
    [(ids, grammar, _)] = made.calls
    text = len(made.processor.encode("a"))
    assert len(ids) - text == 3 * ((room - text) // 6)
    assert grammar.max_events == 1


def test_an_infill_leaves_room_for_what_is_kept():
    made = Scripted(notes_at(1), room=120)
    notes = Notes.of([0.5, *np.linspace(12, 14, 12)], 0.1, 0, np.arange(13) + 40)
    made.infill(notes, start=1.0, end=2.0, prompt="a")
    [(ids, grammar, _)] = made.calls
    assert grammar.placed == 0
    assert grammar.max_events == (120 - len(ids)) // 3 - 12
    with pytest.raises(UserError, match="then 12 notes that are kept"):
        Scripted(notes_at(1), room=42).infill(notes, start=1.0, end=2.0, prompt="a")


def test_instruments_that_are_not_heard_keep_their_channels():
    """15 families at the start, then one alone for a minute: no sixteenth may join."""
    families = [8 * i for i in range(15)]
    onset = [0.0] * 15 + list(np.arange(40.0, 42.0, 0.25))
    notes = Notes.of(onset, 0.2, families + [0] * 8, 60)
    made = Scripted(notes_at(1))
    made.continue_(notes, seconds=1, prompt="a")
    ids, grammar, _ = made.calls[0]
    allowed = {int(i) // 128 for i in np.flatnonzero(grammar._mask)}
    used = {int(ANTICIPATING.of_instrument(i)) for i in families}
    assert allowed == used | {grammar.rules.drums}
    assert len(ids) == len(made.processor.encode("a")) + 3 * 8, "they are not in the context"


def test_notes_that_sound_on_count_for_the_polyphony():
    wanted = GenerationConstraints(max_polyphony=1)
    drone = Notes.of([0.0, *np.arange(30.0, 31.0, 0.25)], [35.0, *[0.2] * 4], 0, 60)
    made = Scripted(notes_at(0))
    out = made.continue_(drone, seconds=3, prompt="a", constraints=wanted)
    assert out.notes.onset[5] >= 35
    inside = Notes.of([0.0, 1.0], [18.0, 0.2], 0, [40, 60])
    made = Scripted(notes_at(0))
    out = made.infill(inside, start=2.0, end=19.5, prompt="a", constraints=wanted)
    assert out.notes.onset[2] >= 18
