import csv
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold_common.errors import UserError
from wavelength_rsa import rules
from wavelength_rsa.rules import CODES, Rules, check_clue, stem, words
from wavelength_rsa.scales import Scale


def codes(clue: str, left: str = "Slow", right: str = "Fast", **options: object) -> list[str]:
    return [v.code for v in check_clue(clue, Scale(left, right), Rules(**options))]


@pytest.mark.parametrize(
    "clue",
    [
        "bicycle",
        "Macy's",
        "crème brûlée",
        "self-published poetry book",
        "a b c d e",
        "a - b - c - d - e",  # dashes are no words
        "butter on bread",  # holds but, as letters only
        "someone tired",  # holds one, as letters only
        "breakfast",  # holds fast, as letters only
        "slot machine",
    ],
)
def test_fair_clues_break_no_rule(clue: str) -> None:
    assert codes(clue) == []


@pytest.mark.parametrize(
    ("clue", "expected"),
    [
        ("", ["empty"]),
        ("  \n", ["empty"]),
        ("?!...", ["empty"]),
        ("a b c d e f", ["too_many_words"]),
        ("fast", ["equals_end"]),
        ("  FAST! ", ["equals_end"]),
        ("Slow", ["equals_end"]),
        ("slów", ["equals_end"]),  # accents do not hide it
        ("a fast car", ["end_word"]),
        ("slowly does it", ["end_word"]),
        ("slow-cooked", ["end_word"]),
        ("Fastest runner", ["end_word"]),
        ("7 dwarfs", ["number"]),
        ("boeing747", ["number"]),
        ("seven dwarfs", ["number"]),
        ("Hundred metres", ["number"]),
        ("½ marathon", ["number"]),
        ("Ⅳ", ["number"]),
        ("٣ cats", ["number"]),
        ("x²", ["number"]),
        ("% of it", ["number"]),
        ("one person", ["number"]),
        ("no one", []),
        ("Very bicycle", ["hedge"]),
        ("bicycle, almost", ["hedge"]),
        ("kind of bicycle", ["hedge"]),
        ("kind, of bicycle", ["hedge"]),
        ("poor but honest", ["hedge"]),
        ("a very very slow car of 2 people", ["too_many_words", "end_word", "number", "hedge"]),
    ],
)
def test_each_rule_is_enforced(clue: str, expected: list[str]) -> None:
    assert codes(clue) == expected


def test_function_words_of_an_end_may_be_used_its_other_words_may_not() -> None:
    ends = ("Worst day of the year", "Best day of the year")
    assert codes("first of the month", *ends) == []
    assert codes("Christmas day", *ends) == ["end_word"]
    assert codes("best day of the year", *ends) == ["equals_end"]


def test_negations_of_an_end_are_seen() -> None:
    assert codes("inexpensive", "Cheap", "Expensive") == ["end_word"]
    assert codes("expense", "Cheap", "Expensive") == ["end_word"]
    assert codes("finite", "Limited", "Infinite") == ["end_word"]
    assert codes("under the bridge", "Der", "Die") == []  # too short to be un- with something


@pytest.mark.parametrize(
    "family",
    [
        "easy easily easier easiest easiness ease",
        "safe safer safest safely safes",
        "hot hotter hottest hots",
        "big bigger biggest bigness",
        "dry drier driest dries dried",
        "color colors colorful colorless colored coloring",
        "nature natural naturally natures",
        "health healthy healthier healthily",
        "danger dangers dangerous dangerously",
        "excite exciting excitement excites",
        "run runs running runner",
        "fun funny funnier",
        "macy macy's macy’s",
    ],
)
def test_forms_of_a_word_share_their_stem(family: str) -> None:
    assert len({stem(word) for word in family.split()}) == 1


@pytest.mark.parametrize(
    "pair", ["hot hat", "fast feast", "slow slot", "art party", "light delight", "day dry"]
)
def test_different_words_keep_different_stems(pair: str) -> None:
    first, second = pair.split()
    assert stem(first) != stem(second)


def test_stems_keep_three_letters() -> None:
    assert [stem(w) for w in ("bed", "king", "best", "yes", "less", "bus")] == [
        *("bed", "king", "best", "yes", "less", "bus"),
    ]


def test_rules_can_be_switched_off_and_changed() -> None:
    clue = "a very fast car for 2"
    assert codes(clue) == ["too_many_words", "end_word", "number", "hedge"]
    assert codes(clue, max_words=6, end_words=False, digits=False, banned=()) == []
    assert codes("Sehr schnell", banned=("sehr",)) == ["hedge"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_words": 0}, "max_words must be at least 1, not 0"),
        ({"max_words": 2.5}, "max_words must be a whole number"),
        ({"max_words": True}, "max_words must be a whole number"),
        ({"banned": "but"}, "banned must be a list"),
        ({"banned": ("but", " ")}, "banned must be a list"),
        ({"banned": (3,)}, "banned must be a list"),
    ],
)
def test_bad_rules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rules(**options)


def test_messages_say_what_was_seen() -> None:
    [found] = check_clue("slowly does it", Scale("Slow", "Fast"))
    assert "'slowly'" in found.message
    assert "'Slow'" in found.message


@given(st.text())
def test_any_text_is_checked(text: str) -> None:
    assert {v.code for v in check_clue(text, Scale("Slow", "Fast"))} <= set(CODES)
    assert all(words(word) == [word] for word in words(text))


@pytest.mark.parametrize("unit", ["a'", "y", "ness", "a ", "-", "İ", "bb", "'s"])
def test_long_texts_take_little_time(unit: str) -> None:
    start = time.process_time()
    check_clue(unit * (200_000 // len(unit)), Scale("Slow", "Fast"))
    assert time.process_time() - start < 3


@pytest.mark.realdata
def test_no_human_clue_of_the_data_breaks_a_rule(data_folder: Path) -> None:
    with (data_folder / "wavelength" / "data.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    broken = [
        (row["clue"], check_clue(row["clue"], Scale(row["left"], row["right"]))) for row in rows
    ]
    assert len(rows) == 100
    assert [found for found in broken if found[1]] == []


def test_stems_of_number_words_and_hedges_are_not_needed() -> None:
    # Both lists are compared as `words` gives them: lower case, without accents.
    for listed in (*rules.NUMBER_WORDS, *rules.HEDGES):
        assert " ".join(words(listed)) == listed
