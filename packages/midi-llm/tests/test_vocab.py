"""Every id of the arrival-time vocabulary on AMT's grid and on others; names of instruments."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midi_llm.vocab import (
    DRUMS,
    FAMILIES,
    PROGRAMS,
    AMTConfig,
    instrument_name,
    instrument_number,
)
from tenfold_common.errors import UserError

AMT = AMTConfig()
SMALL = AMTConfig.small()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("times", 10000),
        ("duration_offset", 10000),
        ("durations", 1000),
        ("note_offset", 11000),
        ("notes", 16512),
        ("rest", 27512),
        ("control_offset", 27513),
        ("separator", 55025),
        ("autoregress", 55026),
        ("anticipate", 55027),
        ("size", 55028),
        ("second", 100),
        ("delta", 500),
    ],
)
def test_ids_of_amt(name, value):
    assert getattr(AMT, name) == value


@pytest.mark.parametrize(
    ("id", "what"),
    [
        (0, "time"),
        (9999, "time"),
        (10000, "duration"),
        (10999, "duration"),
        (11000, "note"),
        (27511, "note"),
        (27512, "rest"),
        (27513, "control time"),
        (37512, "control time"),
        (37513, "control duration"),
        (38512, "control duration"),
        (38513, "control note"),
        (55024, "control note"),
        (55025, "separator"),
        (55026, "autoregress"),
        (55027, "anticipate"),
    ],
)
def test_blocks_of_amt(id, what):
    assert AMT.block(id) == what


def test_blocks_have_the_sizes_of_the_table():
    sizes = {}
    for id in range(AMT.size):
        sizes[AMT.block(id)] = sizes.get(AMT.block(id), 0) + 1
    assert list(sizes.values()) == [10000, 1000, 16512, 1, 10000, 1000, 16512, 1, 1, 1]


def test_nothing_outside_is_an_id():
    for id in (-1, AMT.size, AMT.size + 1, 10**9):
        assert AMT.block(id) not in {AMT.block(i) for i in (0, 10000, 11000, 27512, 27513, 55025)}


def test_rest_stands_between_notes_and_controls_and_has_no_copy():
    assert AMT.note_offset + AMT.notes == AMT.rest
    assert AMT.rest + 1 == AMT.control_offset
    assert AMT.control_offset + AMT.rest == AMT.separator  # what adding the offset would do
    assert AMT.control_offset + AMT.rest - 1 == 55024  # the last control


def test_ids_of_the_small_grid():
    assert dataclasses.asdict(SMALL) == {
        "resolution": 20,
        "max_time": 20,
        "max_duration": 4,
        "instruments": 17,
        "pitches": 128,
        "anticipation": False,
    }
    assert (SMALL.times, SMALL.duration_offset, SMALL.durations) == (400, 400, 80)
    assert (SMALL.note_offset, SMALL.notes, SMALL.rest) == (480, 2176, 2656)
    assert (SMALL.separator, SMALL.autoregress, SMALL.size) == (2657, 2658, 2659)
    assert (SMALL.second, SMALL.delta) == (20, 100)
    with pytest.raises(UserError, match="control"):
        _ = SMALL.anticipate


def test_small_grid_with_controls():
    grid = dataclasses.replace(SMALL, anticipation=True)
    assert (grid.control_offset, grid.separator) == (2657, 2657 + 2656)
    assert (grid.autoregress, grid.anticipate, grid.size) == (5314, 5315, 5316)
    assert [grid.block(i) for i in (2656, 2657, 3057, 3137, 5312, 5313)] == [
        "rest",
        "control time",
        "control duration",
        "control note",
        "control note",
        "separator",
    ]


def test_large_instruments_without_controls():
    grid = AMTConfig(anticipation=False)
    assert (grid.rest, grid.separator, grid.autoregress, grid.size) == (27512, 27513, 27514, 27515)


def test_instruments_of_the_small_grid_are_families():
    assert [SMALL.of_instrument(i) for i in (0, 7, 8, 32, 127, DRUMS)] == [0, 0, 1, 4, 15, 16]
    assert SMALL.to_instrument(16) == DRUMS
    assert [SMALL.to_instrument(i) // 8 for i in range(16)] == list(range(16))


@pytest.mark.parametrize("grid", [AMT, SMALL], ids=["amt", "small"])
def test_instruments_as_arrays_are_those_one_by_one(grid):
    import numpy as np

    every = np.arange(129)
    index = grid.of_instrument(every)
    assert index.tolist() == [int(grid.of_instrument(int(i))) for i in every]
    assert sorted(set(index.tolist())) == list(range(grid.instruments))
    back = grid.to_instrument(np.arange(grid.instruments))
    assert grid.of_instrument(back).tolist() == list(range(grid.instruments))
    assert back[-1] == DRUMS


@given(
    st.builds(
        AMTConfig,
        resolution=st.integers(2, 200),
        max_time=st.integers(10, 200),
        max_duration=st.integers(1, 10),
        instruments=st.sampled_from([17, 129]),
        anticipation=st.booleans(),
    )
)
def test_any_grid_is_blocks_without_gaps(grid):
    assert grid.times == grid.resolution * grid.max_time == grid.duration_offset
    assert grid.durations == grid.resolution * grid.max_duration
    assert grid.notes == grid.instruments * 128
    assert grid.rest == grid.times + grid.durations + grid.notes
    controls = grid.rest if grid.anticipation else 0
    assert grid.separator == grid.rest + 1 + controls
    assert grid.autoregress == grid.separator + 1
    assert grid.size == grid.autoregress + (2 if grid.anticipation else 1)
    assert AMTConfig.from_dict(grid.to_dict()) == grid


def test_from_dict_takes_json_and_refuses_the_unknown():
    import json

    assert AMTConfig.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    with pytest.raises(UserError, match=r"resolutoin.*resolution"):
        AMTConfig.from_dict({"resolutoin": 100})


@pytest.mark.parametrize(
    "fields",
    [
        {"resolution": 0},
        {"resolution": -1},
        {"resolution": 1.5},
        {"resolution": True},
        {"resolution": "100"},
        {"max_time": 0},
        {"max_duration": 0},
        {"instruments": 16},
        {"instruments": 128},
        {"instruments": 130},
        {"pitches": 127},
        {"pitches": 0},
        {"anticipation": 1},
        {"anticipation": None},
    ],
    ids=str,
)
def test_wrong_fields(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        AMTConfig(**fields)
    with pytest.raises(UserError, match=next(iter(fields))):
        AMTConfig.from_dict(fields)


def test_a_grid_cannot_be_changed_but_is_a_key():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AMT.resolution = 7  # type: ignore[misc]
    assert {AMT: 1}[AMTConfig()] == 1
    assert AMT != SMALL


def test_names_of_general_midi():
    assert len(PROGRAMS) == len(set(PROGRAMS)) == 128
    assert len(FAMILIES) == len(set(FAMILIES)) == 16
    known = {
        0: "acoustic grand piano",
        6: "harpsichord",
        9: "glockenspiel",
        24: "nylon guitar",
        40: "violin",
        42: "cello",
        56: "trumpet",
        65: "alto sax",
        73: "flute",
        104: "sitar",
        127: "gunshot",
    }
    for number, name in known.items():
        assert name in instrument_name(number)
    assert instrument_name(DRUMS) == "drums"


def test_names_and_numbers_are_inverse():
    for number in range(129):
        assert instrument_number(instrument_name(number)) == number
        assert instrument_number(number) == number


def test_families_mean_one_program_of_theirs():
    for index, family in enumerate(FAMILIES):
        number = instrument_number(family)
        assert number // 8 == index
        assert number == SMALL.to_instrument(index)
    assert instrument_number("strings") == 40
    assert instrument_number("piano") == 0


@pytest.mark.parametrize(
    "name", ["Distortion Guitar", "distortion-guitar", "DISTORTION_GUITAR", "distortion guitar"]
)
def test_spelling_of_names_does_not_matter(name):
    assert instrument_number(name) == 30


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("trumpte", "trumpet"),
        ("violn", "violin"),
        ("drms", "drums"),
        ("acoustic grand pano", "acoustic grand piano"),
        ("strngs", "strings"),
    ],
)
def test_unknown_instruments_get_a_suggestion(wrong, meant):
    with pytest.raises(UserError, match=f"{wrong}.*{meant}"):
        instrument_number(wrong)


@pytest.mark.parametrize("wrong", [-1, 129, 1000, "", "qqqqqq", "-1", "129"])
def test_what_is_no_instrument(wrong):
    with pytest.raises(UserError):
        instrument_number(wrong)


def test_a_grid_needs_notes_of_some_length():
    with pytest.raises(UserError, match="notes of no length"):
        AMTConfig(resolution=1, max_time=10, max_duration=1)
    assert AMTConfig(resolution=2, max_time=10, max_duration=1).durations == 2
