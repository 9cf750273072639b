"""The grammar against a brute-force checker: whatever a walk through it gives keeps every rule."""

import functools
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midi_llm.anticipate import REST
from midi_llm.grammar import Allowed, GenerationConstraints, Grammar, Rules, scale_of
from midi_llm.tokenizer import AMTTokenizer
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError

SMALL, FULL = AMTConfig.small(), AMTConfig()
ANTICIPATING = AMTConfig(20, 20, 4, 17, 128, True)
GRIDS = {"small": SMALL, "full": FULL}
# Written out by hand, both sevenths in minor.
KEYS = {
    "C major": {0, 2, 4, 5, 7, 9, 11},
    "A minor": {9, 11, 0, 2, 4, 5, 7, 8},
    "Eb major": {3, 5, 7, 8, 10, 0, 2},
    "F# minor": {6, 8, 9, 11, 1, 2, 4, 5},
}


@functools.cache
def tokenizer(config):
    return AMTTokenizer(config)


# ------------------------------------------------------------------------------------------------
# The checker, which shares nothing with the grammar but the ids


def drums_of(config):
    return {17: 16, 129: 128}[config.instruments]


def legal_notes(config, wanted):
    """Return the set of instrument * 128 + pitch that constraints leave."""
    found = set()
    instruments = wanted.instruments
    if instruments is None:
        instruments = range(129)
    for instrument in {i // 8 if config.instruments == 17 else i for i in instruments}:
        for pitch in range(128):
            if instrument != drums_of(config):
                if wanted.key is not None and pitch % 12 not in KEYS[wanted.key]:
                    continue
                if wanted.pitch_range is not None and not (
                    wanted.pitch_range[0] <= pitch <= wanted.pitch_range[1]
                ):
                    continue
            found.add(instrument * 128 + pitch)
    return found


def fits(config, wanted, legal, events, time, eps=0.0):
    """Whether one more note, of some kind, may begin at a tick, by the words of the docstrings."""
    notes = [e for e in events if e[2] != REST]
    last = events[-1][0] if events else 0
    if time < last or time >= end_of(config, wanted):
        return False
    here = [e for e in notes if e[0] == time]
    if len(here) >= 64 or not legal - {e[2] for e in here}:
        return False
    if wanted.notes_per_second is not None:
        rate = wanted.notes_per_second
        most = rate * time / config.resolution + max(1, math.ceil(rate))
        if len(notes) + 1 > most + eps:
            return False
    if wanted.max_polyphony is not None:
        sounding = sum(e[0] <= time < e[0] + e[1] for e in notes)
        if sounding >= wanted.max_polyphony:
            return False
    return True


def end_of(config, wanted):
    ticks = config.resolution * config.max_time
    if wanted.end_time is not None:
        ticks = min(ticks, math.floor(wanted.end_time * config.resolution))
    return ticks


def check(config, wanted, events, before=()):
    """Assert that every constraint is kept by events that come behind others."""
    pitched = {e[2] // 128 for e in before if e[2] != REST} - {drums_of(config)}
    legal, sounding = legal_notes(config, wanted), [e for e in before if e[2] != REST]
    last, at_tick = (before[-1][0] if before else 0), {(e[0], e[2]) for e in before}
    for time, duration, note in events:
        assert time >= last, "times fall"
        last = time
        assert (duration == 0) == (note == REST), "duration 0 goes with rests alone"
        assert 0 <= duration < config.durations
        if wanted.end_time is not None:
            assert time / config.resolution < wanted.end_time
            assert (time + duration) / config.resolution <= wanted.end_time + 1e-9
        if note == REST:
            continue
        assert note in legal, "instrument, key or range"
        assert (time, note) not in at_tick, "an equal note twice at one tick"
        at_tick.add((time, note))
        sounding.append((time, duration, note))
        if note // 128 != drums_of(config):
            pitched.add(note // 128)
        assert sum(t == time for t, _, _ in sounding) <= 64
        if wanted.max_polyphony is not None:
            assert sum(t <= time < t + d for t, d, _ in sounding) <= wanted.max_polyphony
        if wanted.notes_per_second is not None:
            most = wanted.notes_per_second * time / config.resolution
            most += max(1, math.ceil(wanted.notes_per_second))
            assert len(sounding) <= most + 1e-9, "notes_per_second"
    assert len(pitched) <= max(
        15, len({e[2] // 128 for e in before if e[2] != REST} - {drums_of(config)})
    )


# ------------------------------------------------------------------------------------------------
# Random walks


def pick(rng, allowed, config, slot, *, stop=0.02, stride=12):
    """Choose one of what is allowed; near onsets often, so that chords and overlaps come about."""
    ids = allowed.ids().tolist()
    assert ids == sorted(set(ids))
    assert ids, "nothing is allowed, and no error says so"
    if allowed.extra is not None and (len(ids) == 1 or rng.random() < stop):
        return allowed.extra
    ids = [i for i in ids if i != allowed.extra]
    if slot == 0 and rng.random() < 0.97:
        return ids[min(int(rng.expovariate(1) * rng.choice([0, 1, stride])), len(ids) - 1)]
    if slot == 2 and rng.random() < 0.3:
        return ids[rng.randrange(min(len(ids), 3))]
    return rng.choice(ids)


def walk(grammar, config, rng, *, probes=0, exact=None, **named):
    """Go through a grammar to its end; return the ids, and the error if it cannot end."""
    ids = []
    while not grammar.finished:
        slot = grammar.slot
        try:
            allowed = grammar.allowed()
        except UserError as error:
            return ids, error
        if exact is not None and slot == 0:
            exact(allowed)
        for _ in range(probes):
            wrong = rng.randrange(-2, config.size + 3)
            if wrong not in set(allowed.ids().tolist()):
                assert wrong not in allowed
                with pytest.raises(UserError, match="may not come here"):
                    grammar.push(wrong)
                assert grammar.slot == slot
                assert grammar.allowed().ids().tolist() == allowed.ids().tolist()
        one = pick(rng, allowed, config, slot, **named)
        assert one in allowed
        grammar.push(one)
        ids.append(one)
    return ids, None


def triples(ids, config):
    """Return events of ids without a separator, by hand."""
    rows = [ids[i : i + 3] for i in range(0, len(ids) // 3 * 3, 3)]
    return [
        (t, d - config.times, REST if n == config.rest else n - config.times - config.durations)
        for t, d, n in rows
    ]


@st.composite
def constraints(draw):
    pair = st.tuples(st.integers(0, 127), st.integers(0, 127)).map(lambda p: tuple(sorted(p)))
    return GenerationConstraints(
        instruments=draw(st.none() | st.lists(st.integers(0, 128), min_size=1, max_size=20)),
        key=draw(st.none() | st.sampled_from(list(KEYS))),
        pitch_range=draw(st.none() | pair),
        max_polyphony=draw(st.none() | st.integers(1, 5)),
        end_time=draw(st.none() | st.floats(0.02, 25)),
        notes_per_second=draw(st.none() | st.floats(0.2, 15)),
        min_notes=draw(st.integers(0, 8)),
    )


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=80)
@given(wanted=constraints(), seed=st.integers(0, 2**32), most=st.integers(1, 40))
def test_walks_keep_every_constraint(grid, wanted, seed, most):
    config, rng = GRIDS[grid], random.Random(seed)
    legal = legal_notes(config, wanted)
    if not legal or end_of(config, wanted) < 1:
        with pytest.raises(UserError, match="end_time" if legal else "instruments|key|pitch_range"):
            Rules(config, wanted)
        return
    rules = Rules(config, wanted)
    grammar = Grammar(rules, max_events=most)

    def exact(allowed):
        """The first onset is the first at which a note fits."""
        pitched = {e[2] // 128 for e in grammar.events if e[2] != REST} - {drums_of(config)}
        left = legal
        if len(pitched) == 15:
            left = {n for n in legal if n // 128 in pitched | {drums_of(config)}}
        start = allowed.start
        if start == config.separator:
            start = end_of(config, wanted)
            assert grammar.events
        else:
            assert allowed.stop == end_of(config, wanted)
            assert fits(config, wanted, left, grammar.events, start, 1e-9)
        last = grammar.events[-1][0] if grammar.events else 0
        for time in range(max(last, start - 40), start):
            assert not fits(config, wanted, left, grammar.events, time, -1e-9)
        count = sum(e[2] != REST for e in grammar.events)
        assert (config.separator in allowed) == (count >= wanted.min_notes)

    ids, error = walk(grammar, config, rng, probes=1, exact=exact)
    ended = ids[-1:] == [config.separator]
    body = ids[:-1] if ended else ids
    events = triples(body, config)
    assert len(body) % 3 == 0
    assert events == grammar.events
    assert tokenizer(config).to_events(ids).tolist() == [list(e) for e in events]
    check(config, wanted, events)
    count = sum(note != REST for _, _, note in events)
    assert len(events) <= most
    if error is not None:
        assert count < wanted.min_notes
        assert "min_notes" in str(error)
        names = ("end_time", "notes_per_second", "max_polyphony")
        given_ = [n for n in names if getattr(wanted, n) is not None]
        assert all(n in str(error) for n in given_)
        return
    assert grammar.finish_reason == ("length" if not ended else grammar.finish_reason)
    if ended:
        assert count >= wanted.min_notes
        assert grammar.finish_reason in ("stop", "end_time")
    else:
        assert len(events) == most
    for wrong in (0, config.separator, config.rest):
        with pytest.raises(UserError, match="has ended"):
            grammar.push(wrong)


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32))
def test_walks_have_at_most_15_pitched_instruments_and_drums_always(grid, seed):
    config, rng = GRIDS[grid], random.Random(seed)
    grammar = Grammar(Rules(config), max_events=150)
    while not grammar.finished:
        allowed = grammar.allowed()
        ids = allowed.ids().tolist()
        if grammar.slot == 0:
            ids = ids[:2]
        elif grammar.slot == 1:
            ids = ids[1:]
        elif len(ids) > 1:
            seen = {e[2] // 128 for e in grammar.events if e[2] != REST}
            ids = [i for i in ids if (i - config.note_offset) // 128 not in seen] or ids
        grammar.push(rng.choice(ids))
    pitched = {e[2] // 128 for e in grammar.events if e[2] != REST} - {drums_of(config)}
    assert len(pitched) == 15
    grammar = Grammar(Rules(config), max_events=200, given=np.array(grammar.events))
    grammar.push(grammar.allowed().stop - 1)
    grammar.push(config.duration_offset + 1)
    left = {(i - config.note_offset) // 128 for i in grammar.allowed().ids().tolist()}
    assert left == pitched | {drums_of(config)}


def test_the_walks_reach_every_rule():
    """Were chords, overlaps and rests never tried, the walks would show little."""
    rng, config = random.Random(5), SMALL
    chords = overlaps = rests = stops = 0
    for _ in range(30):
        grammar = Grammar(Rules(config), max_events=40)
        ids, _ = walk(grammar, config, rng)
        events = grammar.events
        rests += sum(e[2] == REST for e in events)
        stops += ids[-1] == config.separator
        pairs = list(itertools.pairwise(events))
        chords += sum(a[0] == b[0] for a, b in pairs)
        overlaps += sum(a[0] < b[0] < a[0] + a[1] for a, b in pairs)
    assert min(chords, overlaps, rests, stops) >= 5


# ------------------------------------------------------------------------------------------------
# Single rules


def push_event(grammar, config, time, duration, note):
    grammar.push(time)
    grammar.push(config.duration_offset + duration)
    grammar.push(config.rest if note == REST else config.note_offset + note)


def test_slots_and_the_first_sets():
    grammar = Grammar(Rules(SMALL), max_events=3)
    assert grammar.slot == 0
    assert grammar.allowed().ids().tolist() == list(range(400))  # no separator before a note
    grammar.push(7)
    assert grammar.slot == 1
    assert grammar.allowed().ids().tolist() == list(range(400, 480))
    grammar.push(400)
    assert grammar.slot == 2
    assert grammar.allowed().ids().tolist() == [SMALL.rest]
    grammar.push(SMALL.rest)
    assert grammar.allowed().ids().tolist() == list(range(7, 400))
    grammar.push(7)
    assert 400 not in grammar.allowed()  # a rest does not move on
    grammar.push(403)
    assert grammar.allowed().ids().tolist() == list(range(480, 480 + 17 * 128))
    grammar.push(480 + 5)
    assert grammar.events == [(7, 0, REST), (7, 3, 5)]
    assert grammar.allowed().ids().tolist() == [*range(7, 400), SMALL.separator]
    grammar.push(7)
    grammar.push(401)
    assert 485 not in grammar.allowed()
    assert 486 in grammar.allowed()
    grammar.push(486)
    assert grammar.finish_reason == "length"


def test_a_separator_ends_with_stop_and_at_the_end_of_time_with_end_time():
    grammar = Grammar(Rules(SMALL), max_events=9)
    push_event(grammar, SMALL, 3, 1, 60)
    grammar.push(SMALL.separator)
    assert grammar.finished
    assert grammar.finish_reason == "stop"
    wanted = GenerationConstraints(end_time=1, max_polyphony=1)
    grammar = Grammar(Rules(SMALL, wanted), max_events=9)
    push_event(grammar, SMALL, 3, 17, 60)
    assert grammar.allowed().ids().tolist() == [SMALL.separator]
    grammar.push(SMALL.separator)
    assert grammar.finish_reason == "end_time"


def test_end_time_binds_onsets_and_ends():
    grammar = Grammar(Rules(SMALL, GenerationConstraints(end_time=0.5)), max_events=9)
    assert grammar.allowed().ids().tolist() == list(range(10))
    grammar.push(8)
    assert grammar.allowed().ids().tolist() == [400, 401, 402]


def test_max_polyphony_counts_what_sounds():
    grammar = Grammar(Rules(SMALL, GenerationConstraints(max_polyphony=2)), max_events=9)
    push_event(grammar, SMALL, 0, 10, 60)
    push_event(grammar, SMALL, 0, 4, 64)
    assert grammar.allowed().start == 4  # where the second has ended
    push_event(grammar, SMALL, 4, 20, 65)
    assert grammar.allowed().start == 10


def test_notes_per_second_bounds_the_mean():
    grammar = Grammar(Rules(SMALL, GenerationConstraints(notes_per_second=2)), max_events=9)
    for note, first in enumerate((0, 0, 10, 20, 30)):
        assert grammar.allowed().start == first
        push_event(grammar, SMALL, first, 1, note)


def test_a_rate_near_0_leaves_one_note():
    grammar = Grammar(Rules(SMALL, GenerationConstraints(notes_per_second=1e-308)), max_events=9)
    push_event(grammar, SMALL, 0, 1, 60)
    assert grammar.allowed().ids().tolist() == [SMALL.separator]


def test_a_tick_has_at_most_64_notes():
    grammar = Grammar(Rules(SMALL), max_events=99)
    for note in range(64):
        push_event(grammar, SMALL, 5, 1, note)
    assert grammar.allowed().start == 6


def test_one_note_alone_does_not_sound_twice_at_a_tick():
    wanted = GenerationConstraints(instruments=[0], pitch_range=(60, 60))
    grammar = Grammar(Rules(SMALL, wanted), max_events=9)
    push_event(grammar, SMALL, 5, 1, 60)
    assert grammar.allowed().start == 6


def test_drums_have_no_pitch():
    wanted = GenerationConstraints(instruments=["drums"], key="C major", pitch_range=(60, 60))
    assert Rules(SMALL, wanted).notes.nonzero()[0].tolist() == list(range(16 * 128, 17 * 128))


def test_scales():
    for key, scale in KEYS.items():
        assert scale_of(key) == scale
    with pytest.raises(UserError):
        scale_of("H major")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({"instruments": [0], "key": "C major", "pitch_range": (61, 61)},
         ["instruments", "key", "pitch_range"]),
        ({"instruments": [0, 40], "key": "C major", "pitch_range": (61, 61)}, ["key"]),
        ({"end_time": 0.04}, ["end_time"]),
    ],
)  # fmt: skip
def test_an_empty_set_names_the_constraints(wanted, names):
    with pytest.raises(UserError) as error:
        Rules(SMALL, GenerationConstraints(**wanted))
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({"end_time": 0.1, "max_polyphony": 1}, ["end_time", "max_polyphony", "min_notes"]),
        ({"end_time": 1, "notes_per_second": 1}, ["end_time", "notes_per_second", "min_notes"]),
    ],
)
def test_too_few_notes_by_the_end_name_the_constraints(wanted, names):
    grammar = Grammar(Rules(SMALL, GenerationConstraints(**wanted, min_notes=9)), max_events=50)
    with pytest.raises(UserError) as error:  # noqa: PT012
        for note in range(9):
            time = grammar.allowed().start
            push_event(grammar, SMALL, time, 1, note)
    assert all(name in str(error.value) for name in names)
    assert "after 1 notes" in str(error.value) or "after 2 notes" in str(error.value)


def test_15_instruments_before_and_another_wanted_never_lead_into_an_empty_set():
    before = np.array([[i, 1, i * 128 + 60] for i in range(15)])
    grammar = Grammar(
        Rules(FULL, GenerationConstraints(instruments=[100], min_notes=0)),
        max_events=20, given=before,
    )  # fmt: skip
    for seed in range(20):
        rng = random.Random(seed)
        try:
            grammar = Grammar(grammar.rules, max_events=20, given=before)
            _, error = walk(grammar, FULL, rng)  # asserts that no set is empty
        except UserError as one:
            error = one
        if error is not None:
            assert "instruments" in str(error)


def test_a_piece_of_rests_alone_is_not_what_min_notes_lets_end():
    """`max_events` may cut a piece short, but min_notes holds where there is room for the notes."""
    grammar = Grammar(Rules(SMALL, GenerationConstraints(min_notes=3)), max_events=3)
    while not grammar.finished:
        ids = grammar.allowed().ids().tolist()
        grammar.push(ids[1] if grammar.slot == 0 else ids[0])  # a rest wherever one may stand
    assert sum(note != REST for _, _, note in grammar.events) == 3


# ------------------------------------------------------------------------------------------------
# What stands before, and controls


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["small", "full"])
@given(wanted=constraints(), seed=st.integers(0, 2**32), start=st.integers(0, 200))
def test_given_events_count_and_start_binds(config, wanted, seed, start):
    rng = random.Random(seed)
    try:
        rules = Rules(config, wanted)
    except UserError:
        return
    first = Grammar(Rules(config, GenerationConstraints(end_time=4)), max_events=rng.randrange(12))
    if first.max_events:
        walk(first, config, rng)
    before = [e for e in first.events if e[2] != REST]
    grammar = Grammar(
        rules, max_events=15, start=start, given=np.array(before).reshape(-1, 3) if before else None
    )
    ids, error = walk(grammar, config, rng)
    ended = ids[-1:] == [config.separator]
    events = triples(ids[: len(ids) - ended], config)
    assert events == grammar.events
    assert all(time >= start for time, _, _ in events)
    count = sum(e[2] != REST for e in before + events)
    assert count >= wanted.min_notes or not ended
    begins = max(start, before[-1][0] if before else 0)
    if error is None or events:
        # what was given may break the constraints of what is new: more sounds than may
        given_keeps = wanted.max_polyphony is None and wanted.notes_per_second is None
        if given_keeps:
            check(config, wanted, events, before)
        for i, (time, _, note) in enumerate(events):
            everything = [e for e in before + events[: i + 1] if e[2] != REST]
            if note == REST:
                continue
            if wanted.max_polyphony is not None:
                sounding = sum(t <= time < t + d for t, d, _ in everything)
                assert sounding <= wanted.max_polyphony
            if wanted.notes_per_second is not None:
                most = wanted.notes_per_second * (time - begins) / config.resolution
                most += max(1, math.ceil(wanted.notes_per_second))
                assert len(everything) - len(before) <= most + 1e-9


@pytest.mark.parametrize("config", [ANTICIPATING, FULL], ids=["small", "full"])
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_controls_come_exactly_when_due_and_in_order(config, data, seed):
    rng = random.Random(seed)
    times = sorted(data.draw(st.lists(st.integers(0, config.times - 1), max_size=8)))
    controls = np.array(
        [[t, rng.randrange(config.durations), rng.randrange(config.notes)] for t in times], int
    ).reshape(-1, 3)
    before = data.draw(st.sampled_from([0, config.resolution, 3 * config.resolution]))
    grammar = Grammar(
        Rules(config), max_events=60, controls=controls,
        given=np.array([[before, 4, 60]]) if before else None,
    )  # fmt: skip
    stride = config.times // 10
    ids, error = walk(grammar, config, rng, stop=0, stride=stride, probes=1)
    assert error is None
    body = ids[:-1] if ids[-1] == config.separator else ids
    rows = [body[i : i + 3] for i in range(0, len(body), 3)]
    last, told, events = before, [], 0
    for time, duration, note in rows:
        due = [c for c in controls.tolist() if c[0] - 5 * config.resolution <= last]
        if time >= config.control_offset:  # a control: in order, and due
            control = [
                time - config.control_offset,
                duration - config.control_offset - config.duration_offset,
                note - config.control_offset - config.note_offset,
            ]
            assert control == controls[len(told)].tolist()
            told.append(control)
            assert len(told) <= len(due)
        else:
            assert len(told) == len(due), "an event stands where a control is due"
            last, events = time, events + 1
    due = [c for c in controls.tolist() if c[0] - 5 * config.resolution <= last]
    assert len(told) == len(due)
    assert events == len(grammar.events)
    found = tokenizer(config).to_events(ids, controls="merge")
    assert len(found) == len(rows)
    if last >= config.times - 1 - 5 * config.resolution:
        assert len(told) == len(controls)


@pytest.mark.parametrize(("tick", "due"), [(100, True), (101, False)])
def test_a_control_is_due_at_five_seconds_exactly(tick, due):
    offset = ANTICIPATING.control_offset
    controls = np.array([[tick, 3, 61], [tick + 7, 3, 61]])
    grammar = Grammar(Rules(ANTICIPATING), max_events=9, controls=controls)
    assert (grammar.allowed().ids().tolist() == [offset + tick]) is due
    before = np.array([[7, 2, 60]])
    grammar = Grammar(Rules(ANTICIPATING), max_events=9, controls=controls, given=before)
    for _ in range(3 * (1 + due)):
        assert len(grammar.allowed().ids()) == 1
        grammar.push(grammar.allowed().start)
    assert len(grammar.allowed().ids()) > 1


def test_max_events_holds_where_a_control_falls_due_with_the_last_event():
    controls = np.array([[120, 3, 61]])
    grammar = Grammar(Rules(ANTICIPATING), max_events=1, controls=controls)
    push_event(grammar, ANTICIPATING, 30, 2, 60)
    for _ in range(3):
        if not grammar.finished:
            grammar.push(grammar.allowed().start)
    assert grammar.finish_reason == "length"
    assert len(grammar.events) == 1


def test_instruments_of_controls_count_among_the_15():
    """They sound in the same file."""
    grid = AMTConfig(20, 20, 4, 129, 128, True)
    controls = np.array([[200 + i, 3, i * 128 + 60] for i in range(15)])
    grammar = Grammar(Rules(grid), max_events=9, controls=controls, start=190)
    grammar.push(190)
    grammar.push(grid.duration_offset + 1)
    left = {(i - grid.note_offset) // 128 for i in grammar.allowed().ids().tolist()}
    assert left == {*range(15), 128}


# ------------------------------------------------------------------------------------------------
# Allowed


@given(
    start=st.integers(0, 30),
    mask=st.none() | st.lists(st.booleans(), min_size=1, max_size=20),
    length=st.integers(1, 20),
    extra=st.none() | st.integers(60, 70),
)
def test_ids_and_contains_agree(start, mask, length, extra):
    made = None if mask is None else np.array(mask)
    length = length if mask is None else len(mask)
    allowed = Allowed(start, start + length, made, extra)
    inside = [i for i in range(-3, 80) if i in allowed]
    assert allowed.ids().tolist() == inside
    expected = {start + i for i in range(length) if mask is None or mask[i]}
    assert set(inside) == expected | ({extra} if extra is not None else set())
    for other in (None, "5", 5.5, object()):
        assert other not in allowed


def test_what_ids_returns_is_contained():
    allowed = Allowed(3, 6, None, 9)
    assert all(i in allowed for i in allowed.ids())  # numpy's whole numbers


# ------------------------------------------------------------------------------------------------
# Constraints as values


@given(wanted=constraints())
def test_constraints_round_trip_through_json(wanted):
    values = wanted.to_dict()
    assert None not in values.values()
    assert GenerationConstraints.from_dict(values) == wanted
    assert GenerationConstraints.from_dict(json.loads(json.dumps(values))) == wanted


def test_an_unknown_constraint_suggests_the_nearest():
    with pytest.raises(UserError, match="max_polyphony"):
        GenerationConstraints.from_dict({"max_polyphonie": 3})


@pytest.mark.parametrize(
    "wrong",
    [
        {"instruments": "piano"}, {"instruments": []}, {"instruments": ["pianoo"]},
        {"instruments": [129]}, {"instruments": [-1]}, {"instruments": [True]},
        {"instruments": [1.5]}, {"instruments": 5},
        {"key": "H major"}, {"key": "C dorian"}, {"key": ""}, {"key": 5},
        {"pitch_range": (60, 50)}, {"pitch_range": (-1, 50)}, {"pitch_range": (0, 128)},
        {"pitch_range": (1, 2, 3)}, {"pitch_range": 5}, {"pitch_range": ("a", "b")},
        {"pitch_range": (1.5, 3.5)}, {"pitch_range": (60,)},
        {"max_polyphony": 0}, {"max_polyphony": -1}, {"max_polyphony": 1.5},
        {"max_polyphony": True}, {"max_polyphony": "2"},
        {"min_notes": -1}, {"min_notes": 1.0}, {"min_notes": False},
        {"end_time": 0}, {"end_time": -1.0}, {"end_time": math.inf}, {"end_time": math.nan},
        {"end_time": "5"}, {"end_time": True},
        {"notes_per_second": 0}, {"notes_per_second": math.inf}, {"notes_per_second": math.nan},
        {"notes_per_second": "5"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_constraints_are_refused(wrong):
    with pytest.raises(UserError) as error:
        GenerationConstraints(**wrong)
    name = next(iter(wrong))
    assert name in str(error.value) or name in ("instruments", "key")
    with pytest.raises(UserError):
        GenerationConstraints.from_dict(wrong)


def test_min_notes_none_is_refused_or_leaves_it_free():
    try:
        wanted = GenerationConstraints(min_notes=None)
    except UserError:
        return
    assert SMALL.separator in Grammar(Rules(SMALL, wanted), max_events=2).allowed()
