"""Notes of whatever becomes arrays, and what is refused."""

import numpy as np
import pytest

from midi_llm.notes import Notes, empty_notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError


def rows(notes: Notes) -> list[tuple[float, float, int, int]]:
    columns = (notes.onset, notes.duration, notes.instrument, notes.pitch)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def test_notes_of_lists():
    notes = Notes.of([0, 0.5], 1, [0, DRUMS], 60)
    assert rows(notes) == [(0.0, 1.0, 0, 60), (0.5, 1.0, DRUMS, 60)]
    assert notes.velocity.tolist() == [72, 72]
    assert rows(notes[1:]) == rows(notes)[1:]
    assert rows(notes[np.array([True, False])]) == rows(notes)[:1]
    assert rows(notes[np.array([1, 1])]) == rows(notes)[1:] * 2
    assert notes.end == 1.5


def test_no_notes():
    notes = empty_notes()
    assert len(notes) == 0
    assert notes.end == 0
    assert rows(Notes.of([], [], [], [])) == []


def test_the_end_is_that_of_the_longest_note():
    assert Notes.of([0, 1], [9, 1], 0, 60).end == 9


@pytest.mark.parametrize(
    "change",
    [
        {"onset": [1, 0]},
        {"onset": [-0.1, 0]},
        {"onset": [0, float("nan")]},
        {"onset": [0, float("inf")]},
        {"duration": -1},
        {"duration": float("nan")},
        {"duration": [1, 2, 3]},
        {"instrument": 129},
        {"instrument": -1},
        {"pitch": 128},
        {"pitch": -1},
        {"velocity": 0},
        {"velocity": 128},
    ],
    ids=str,
)
def test_wrong_notes(change):
    good = {"onset": [0, 1], "duration": 1, "instrument": 0, "pitch": 60, "velocity": 72}
    Notes.of(**good)
    with pytest.raises(UserError):
        Notes.of(**good | change)


@pytest.mark.parametrize("name", ["instrument", "pitch", "velocity"])
def test_numbers_that_are_cut_are_refused(name):
    named = {"instrument": 0, "pitch": 60, "velocity": 72}
    with pytest.raises(UserError, match=f"{name} must be whole"):
        Notes.of([0.0], 0.4, **{**named, name: 60.7})
    assert Notes.of([0.0], 0.4, **{**named, name: 60.0}).columns[2].dtype == np.int64
