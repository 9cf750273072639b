import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavelength_rsa.parsing import MAX_CLUE, read_clue, read_position

POSITIONS = [
    ("45", 45.0),
    ("0", 0.0),
    ("100", 100.0),
    ("007", 7.0),
    ("45.5", 45.5),
    ("45.0", 45.0),
    (" 45 \n", 45.0),
    ("**70**", 70.0),
    ("`70`", 70.0),
    ("70.", 70.0),
    ("70%", 70.0),
    ("70 %", 70.0),
    ("70 percent", 70.0),
    ("50/100", 50.0),
    ("50 / 100", 50.0),
    ("50 out of 100", 50.0),
    ("50 of 100", 50.0),
    ("100/100", 100.0),
    ("0.5%", 0.5),
    ("around 70", 70.0),
    ("~70", 70.0),
    ("≈ 70, I think", 70.0),
    ("Position: 70", 70.0),
    ("- 70", 70.0),  # an item of a list
    ("60-70", None),
    ("60–70", None),
    ("60 to 70", None),
    ("between 60 and 70", None),
    ("45, 50", None),
    ("4 5", None),
    ("8/10", None),
    ("50/1000", None),
    ("50/100.5", None),
    ("8 out of 10", None),
    ("1:3", None),
    ("5/", None),
    ("1e1", None),
    ("1,000", None),
    ("45,5", None),
    (",5", None),
    ("1.2.3", None),
    ("7th", None),
    ("x7", None),
    ("0.7", None),
    (".7", None),
    ("1.0", None),
    ("-5", None),
    ("−5", None),
    ("+5", None),
    ("100.5", None),
    ("101", None),
    ("1000", None),
    ("99999999999999999999", None),
    ("9" * 5000, None),
    ("seventy", None),
    ("nan", None),
    ("inf", None),
    ("", None),
    ("٤٥", None),
    ("４５", None),
]


@pytest.mark.parametrize(("text", "expected"), POSITIONS, ids=[t[:20] for t, _ in POSITIONS])
def test_the_table_of_positions(text: str, expected: float | None) -> None:
    assert read_position(f"<answer>{text}</answer>") == expected
    assert read_position(f"<answer>{text}") == expected  # the stop string was cut off
    assert read_position(f"Let me see, 12. <answer>{text}</answer> 13", cot=True) == expected
    assert read_position(text) == expected  # no tag


@pytest.mark.parametrize(
    ("text", "direct", "reasoned"),
    [
        ("<answer>10</answer> or <answer>20</answer>", 10, 20),
        ("<answer>10</answer> or <answer>20", 10, 10),
        ("<answer>10", 10, None),
        ("I say <answer>10", 10, None),
        ("10", 10, None),
        ("</answer> <answer>10</answer>", 10, 10),
        ("<answer>10</answer> </answer>", 10, 10),
        ("</answer> 10", 10, None),
        ("<answer></answer><answer>20</answer>", None, 20),
        ("<think>30</think><answer>10</answer>", 10, 10),
        ("30, <answer>40</answer></think><answer>10</answer>", 10, 10),
        ("<think><answer>30</answer></think> 10", 10, None),
        ("<think>a</think> <think>b</think><answer>10</answer>", 10, 10),
        ("<think>so <answer>10</answer>", None, None),
        ("<answer>10</answer><think>", None, None),
        ("<think>30</think>", None, None),
        ("<ANSWER>10</ANSWER> 20", None, None),
    ],
)
def test_which_tag_counts(text: str, direct: float | None, reasoned: float | None) -> None:
    assert read_position(text) == direct
    assert read_position(text, cot=True) == reasoned


def test_reasoning_of_a_base_model_is_read_from_the_front_and_needs_a_whole_tag() -> None:
    text = "So <answer>10</answer>\n\nClue: x\n<answer>20</answer>"
    assert read_position(text, cot=True, last=False) == 10
    assert read_position("So <answer>10", cot=True, last=False) is None
    assert read_position("So 10", cot=True, last=False) is None
    assert read_clue("So <clue>a</clue> <clue>b</clue>", cot=True, last=False) == "a"


CLUES = [
    ("race car", "race car"),
    (" Race  car\t", "Race car"),
    ("\nrace car\n", "race car"),
    ('"race car"', "race car"),
    ("'race car'", "race car"),
    ("“race car”", "race car"),
    ("**race car**", "race car"),
    ("*`race car`*", "race car"),
    ("race car.", "race car"),
    ("Macy's", "Macy's"),
    ("dogs'", "dogs'"),
    ("U.S.", "U.S."),
    ("3", "3"),
    ("CAFE\u0301", "CAFÉ"),
    ('"', None),
    ("", None),
    ("  ", None),
    ("...", None),
    ("***", None),
    ("race car\nbecause it is fast", None),
    ("race car\rbecause", None),
    ("<b>race car</b>", None),
    ("a > b", None),
    ("race\x00car", None),
    ("\ud800x", None),
    ("x" * MAX_CLUE, "x" * MAX_CLUE),
    ("x" * (MAX_CLUE + 1), None),
    ("'" * 1000 + "x" + "'" * 1000, None),
]


@pytest.mark.parametrize(("text", "expected"), CLUES, ids=[ascii(t)[:20] for t, _ in CLUES])
def test_the_table_of_clues(text: str, expected: str | None) -> None:
    assert read_clue(f"<clue>{text}</clue>") == expected
    assert read_clue(f"<clue>{text}") == expected
    assert read_clue(f"Hm, say boat. <clue>{text}</clue>", cot=True) == expected


def test_a_clue_needs_its_tag() -> None:
    assert read_clue("race car") is None
    assert read_clue("I cannot do that.") is None
    assert read_clue("<clue>race c", cot=True) is None
    assert read_clue("<think><clue>a</clue></think> b") is None
    assert read_clue("<clue>a</clue><clue>b</clue>") == "a"
    assert read_clue("<clue>a</clue><clue>b</clue>", cot=True) == "b"


PIECES = st.sampled_from(
    ["<answer>", "</answer>", "<clue>", "</clue>", "<think>", "</think>", "45", "/100", "%", ".",
     "-", " ", "\n", "race car", '"', "**", "1e9", "\u0301", "\ud800", "100", " out of "]
)  # fmt: skip
REPLIES = st.text() | st.lists(PIECES, max_size=12).map("".join)


@given(REPLIES, st.booleans(), st.booleans())
def test_any_reply_is_read_or_not_but_never_raises(text: str, cot: bool, last: bool) -> None:
    position = read_position(text, cot=cot, last=last)
    assert position is None or 0 <= position <= 100
    clue = read_clue(text, cot=cot, last=last)
    if clue is not None:
        assert 0 < len(clue) <= MAX_CLUE
        assert clue.encode()
        assert read_clue(f"<clue>{clue}</clue>") is not None


@given(st.integers(0, 100), REPLIES)
def test_a_complete_last_tag_is_read_whatever_comes_before(position: int, before: str) -> None:
    text = f"{before}</think><answer>{position}</answer>"
    assert read_position(text, cot=True) == position


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "</answer>", "<think>", "</think>", "1", "1.", "-", " ", "1 of ", "%", "'",
     "<clue>", "1 percent", "5" + " " * 50],
)  # fmt: skip
def test_long_replies_take_little_time(unit: str) -> None:
    text = unit * (500_000 // len(unit))
    start = time.process_time()
    for cot in (False, True):
        read_position(text, cot=cot)
        read_clue(text, cot=cot)
        read_position(f"<answer>{text}</answer>", cot=cot)
        read_clue(f"<clue>{text}</clue>", cot=cot)
    assert time.process_time() - start < 4
