import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcr.parsing import ERROR_CODES, FORMATS, parse_completion
from tenfold_common.errors import UserError

BLOCKS = {
    "tabc": ("answer", "analysis", "confidence"),
    "tbac": ("analysis", "answer", "confidence"),
    "tac": ("answer", "confidence"),
    "ta": ("answer",),
}
GOOD = (
    "<think> 6 * 7 </think>\n<answer> 42 </answer>\n"
    "<analysis>easy</analysis> <confidence> 0.9 </confidence>\n"
)
TAIL = "<answer>1</answer><analysis>b</analysis><confidence>.5</confidence>"


def block(name: str, content: str) -> str:
    return f"<{name}>{content}</{name}>"


def tabc(answer: str = "42", analysis: str = "b", confidence: str = "0.9") -> str:
    parts = [block("think", "t"), block("answer", answer), block("analysis", analysis)]
    return " ".join([*parts, block("confidence", confidence)])


def test_well_formed_completion_gives_every_part_and_its_span() -> None:
    parsed = parse_completion(GOOD)
    assert (parsed.ok, parsed.error, parsed.detail) == (True, None, "")
    assert parsed.think == "6 * 7"
    assert parsed.answer == "42"
    assert parsed.analysis == "easy"
    assert parsed.confidence == 0.9
    assert parsed.confidence_source == "stated"
    assert {name: GOOD[a:b] for name, (a, b) in parsed.spans.items()} == {
        "think": "6 * 7",
        "answer": "42",
        "analysis": "easy",
        "confidence": "0.9",
    }


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_reads_its_own_order_and_no_other(format: str) -> None:
    contents = {"answer": "x", "analysis": "y", "confidence": "1"}
    texts = {
        other: "t</think>" + "".join(block(name, contents[name]) for name in BLOCKS[other])
        for other in FORMATS
    }
    assert [other for other in FORMATS if parse_completion(texts[other], format).ok] == [format]
    parsed = parse_completion(texts[format], format)
    assert parsed.confidence == (None if format == "ta" else 1.0)
    assert parsed.confidence_source == ("missing" if format == "ta" else "stated")


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("0", 0.0),
        ("1", 1.0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1.0", 1.0),
        ("1.", 1.0),
        ("0.", 0.0),
        ("\n 0.25\t", 0.25),
        ("1.000", 1.0),
        ("0.30000000000000000001", 0.3),
    ],
)
def test_numbers_that_are_confidences(number: str, value: float) -> None:
    assert parse_completion(tabc(confidence=number)).confidence == value


@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("high", "not_a_number"),
        ("80%", "not_a_number"),
        ("0,8", "not_a_number"),
        ("nan", "not_a_number"),
        ("inf", "not_a_number"),
        ("1e-1", "not_a_number"),
        ("0_5", "not_a_number"),
        ("+0.5", "not_a_number"),
        ("-0", "not_a_number"),
        ("", "not_a_number"),
        (".", "not_a_number"),
        ("00.5", "not_a_number"),
        ("٠.٥", "not_a_number"),
        ("0.٥", "not_a_number"),
        ("0.5 0.6", "not_a_number"),
        ("½", "not_a_number"),
        ("-0.1", "out_of_range"),
        ("1.2", "out_of_range"),
        ("80", "out_of_range"),
        ("1.00000000000000000001", "out_of_range"),
        ("9" * 400, "out_of_range"),
        ("٣", "not_a_number"),
    ],
)
def test_numbers_that_are_not(number: str, code: str) -> None:
    parsed = parse_completion(tabc(confidence=number))
    assert (parsed.ok, parsed.error, parsed.confidence) == (False, code, None)
    assert parsed.detail.endswith(".")
    assert number[:10] in parsed.detail


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "missing_think"),
        ("just text", "missing_think"),
        (TAIL, "missing_think"),
        ("<think>never closed " + TAIL, "unclosed_tag"),
        ("t</think>", "missing_answer"),
        ("t</think><analysis>b</analysis><confidence>1</confidence>", "missing_answer"),
        ("t</think><answer>1</answer><confidence>1</confidence>", "missing_analysis"),
        ("t</think><answer>1</answer><analysis>b</analysis>", "missing_confidence"),
        ("t</think><answer>1", "unclosed_tag"),
        ("t</think><answer>1 <analysis>b</analysis><confidence>1</confidence>", "unclosed_tag"),
        ("t</think></answer>" + TAIL, "unclosed_tag"),
        ("t</think>" + TAIL + "<confidence>.6</confidence>", "duplicate_tag"),
        ("t</think><answer>0</answer>" + TAIL, "duplicate_tag"),
        (
            "t</think><analysis>b</analysis><answer>1</answer><confidence>1</confidence>",
            "wrong_order",
        ),
        (
            "t</think><answer>1</answer><confidence>1</confidence><analysis>b</analysis>",
            "wrong_order",
        ),
        (
            "t</think><answer>1<analysis>b</analysis></answer><confidence>1</confidence>",
            "nested_tag",
        ),
        ("t</think>" + TAIL.replace(">b<", "><answer>2</answer><"), "nested_tag"),
        ("t</think>" + TAIL.replace(">b<", "><think>b</think><"), "nested_tag"),
        ("t</think>" + TAIL + " done", "trailing_text"),
        ("t</think>" + TAIL + "</think>", "trailing_text"),
        ("t</think> so " + TAIL, "text_between"),
        ("t</think>" + TAIL.replace("<analysis>", "and <analysis>"), "text_between"),
        ("t</think>" + TAIL.replace("<confidence>", "</think><confidence>"), "text_between"),
        ("t</think>" + TAIL.replace(">1<", "> \n <"), "empty_answer"),
        ("t</THINK>" + TAIL, "missing_think"),
        ("t</think>" + TAIL.replace("answer", "Answer"), "missing_answer"),
    ],
)
def test_error_codes(text: str, code: str) -> None:
    parsed = parse_completion(text)
    assert (parsed.ok, parsed.error) == (False, code)
    assert parsed.answer is None
    assert parsed.confidence is None
    assert parsed.spans == {}
    assert code in ERROR_CODES


def test_an_extra_block_is_text_that_does_not_belong() -> None:
    assert parse_completion("t</think>" + TAIL, "tac").error == "text_between"
    assert parse_completion("t</think>" + TAIL, "ta").error == "trailing_text"


@pytest.mark.parametrize(
    "think",
    [
        "I must write <answer> and </confidence> later",
        TAIL,
        "so </think> is how to end it",
        "</think></think></think>",
        f"</think>{TAIL} no, wrong </think>",
        f"</think>{TAIL}\n</think>",
        "<think><think>",
    ],
)
def test_tags_inside_the_reasoning_are_text(think: str) -> None:
    parsed = parse_completion(f"<think>{think}</think> {TAIL}")
    assert parsed.ok
    assert parsed.answer == "1"
    assert parsed.think == think.strip()


def test_opening_think_tag_may_be_in_the_prompt() -> None:
    assert parse_completion("why</think>" + TAIL).think == "why"
    assert parse_completion("</think>" + TAIL).think == ""
    assert parse_completion("\n <think></think>" + TAIL).think == ""


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("0.8", 0.8),
        ("80%", 0.8),
        ("1%", 0.01),
        ("1", 1.0),
        ("80", 0.8),
        ("100", 1.0),
        ("about 0.7, I think", 0.7),
        ("0,8", 0.8),
        ("85 percent", 0.85),
        ("0", 0.0),
        ("1.2", 0.012),
        ("high", None),
        ("", None),
        ("101", None),
        ("-0.1", None),
        ("-0", 0.0),
        ("1e-1", None),
        ("8/10", None),
        ("8 out of 10", None),
        ("0_5", None),
        ("nan", None),
        ("1,000", None),
        ("0.9.1", None),
        ("0.9.", 0.9),
        ("200%", None),
        ("x2", None),
        ("9" * 400, None),
        ("1 in 2", None),
        ("1 in two", None),
        ("8 of 10", None),
        ("8 of a hundred", None),
        ("1:3", None),
        ("8 : 10", None),
        ("3 to 1", None),
        ("very high: 9", None),
        ("9, very high", None),
        ("10 I think", None),
        ("9", 0.09),
        (" (9.) ", 0.09),
        ("about 9%", 0.09),
        ("very high: 90", 0.9),
        ("very high: 1", 1.0),
        ("0.7: I checked 2 steps", 0.7),
        ("0.7 in my view", 0.7),
        ("0.7 of tentative steps", 0.7),
    ],
)
def test_lenient_numbers(content: str, value: float | None) -> None:
    parsed = parse_completion(tabc(confidence=content), mode="lenient")
    assert parsed.ok
    assert parsed.answer == "42"
    assert parsed.confidence == (value if value is None else pytest.approx(value, abs=1e-15))
    assert parsed.confidence_source == ("missing" if value is None else "stated")


def test_lenient_mode_recovers_an_answer_and_says_what_strict_mode_would() -> None:
    for text in (
        "no think <answer>7</answer> <confidence>60</confidence>",
        "t</think> so <answer>6</answer> or <answer>7</answer><confidence>.6</confidence>!",
        "<answer>7</answer><confidence>.6</confidence> t</think> truncated",
    ):
        parsed = parse_completion(text, mode="lenient")
        assert (parsed.ok, parsed.answer, parsed.confidence) == (True, "7", 0.6)
        assert parsed.error == parse_completion(text).error != None  # noqa: E711
        assert text[slice(*parsed.spans["answer"])] == "7"


def test_lenient_mode_prefers_what_follows_the_reasoning() -> None:
    text = "<think><answer>1</answer></think><confidence>.1</confidence><answer>2</answer> x"
    assert parse_completion(text, mode="lenient").answer == "2"


def test_lenient_mode_without_an_answer_is_not_ok() -> None:
    parsed = parse_completion("t</think><confidence>1</confidence>", mode="lenient")
    assert (parsed.ok, parsed.answer, parsed.confidence) == (False, None, 1.0)
    parsed = parse_completion(tabc(answer=" "), mode="lenient")
    assert (parsed.ok, parsed.answer, parsed.error) == (False, None, "empty_answer")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="must be a str, not NoneType"):
        parse_completion(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="Did you mean 'tabc'"):
        parse_completion("", format="tab")
    with pytest.raises(UserError, match="mode must be 'strict' or 'lenient'"):
        parse_completion("", mode="loose")


PIECES = st.sampled_from(
    [f"<{slash}{name}>" for slash in ("", "/") for name in ("think", *BLOCKS["tabc"])]
    + [" ", "\n", "0.5", "80%", "nan", "x", "<", ">", "</", "\x00", "٣", "é", TAIL, "</think>"]
)
TEXTS = st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=40)


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.sampled_from(FORMATS), st.sampled_from(("strict", "lenient")))
def test_any_text_gives_a_consistent_result(text: str, format: str, mode: str) -> None:
    parsed = parse_completion(text, format, mode)
    assert parsed.text == text
    assert (parsed.error is None) == (parsed.detail == "")
    assert parsed.error is None or parsed.error in ERROR_CODES
    if mode == "strict":
        assert parsed.ok == (parsed.error is None)
    else:
        assert parsed.ok == (parsed.answer is not None)
        assert parsed.error == parse_completion(text, format).error
    for name, (start, end) in parsed.spans.items():
        assert 0 <= start <= end <= len(text)
        content = text[start:end]
        assert content == content.strip()
        if name != "confidence":
            assert content == getattr(parsed, name)
    if parsed.confidence is not None:
        assert math.isfinite(parsed.confidence)
        assert 0.0 <= parsed.confidence <= 1.0
    assert parsed.answer != ""


CONTENT = st.text(st.characters(blacklist_characters="<"), max_size=20)
SPACE = st.text(" \n\t", max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.booleans(),
    TEXTS.filter(lambda text: "<think>" not in text),
    CONTENT.filter(str.strip),
    CONTENT,
    st.integers(0, 1000),
    SPACE,
)
def test_rendered_completions_are_read_back(
    format: str, opened: bool, think: str, answer: str, analysis: str, thousandths: int, space: str
) -> None:
    q = thousandths / 1000
    contents = {"answer": answer, "analysis": analysis, "confidence": f"{space}{q}{space}"}
    text = "<think>" * opened + think + "</think>"
    text += "".join(space + block(name, contents[name]) for name in BLOCKS[format]) + space
    for mode in ("strict", "lenient"):
        parsed = parse_completion(text, format, mode)
        assert parsed.ok, parsed.detail
        assert parsed.error is None
        assert parsed.answer == answer.strip()
        assert parsed.think == think.strip()
        assert parsed.confidence == (None if format == "ta" else q)
        assert parsed.analysis == (analysis.strip() if "analysis" in BLOCKS[format] else None)


HOSTILE = {
    "closed thinks": "</think>",
    "closed thinks and space": "</think> " + " " * 40,
    "opened thinks": "<think>",
    "chains": "</think>" + TAIL,
    "starts of chains": "</think><answer>",
    "answers": "<answer>1</answer>",
    "opened answers": "<answer>",
    "closed answers": "</answer>",
    "pairs in the wrong order": "</confidence><confidence>",
    "half tags": "</thin",
    "digits": "0",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("mode", ["strict", "lenient"])
def test_time_is_linear_in_hostile_text(piece: str, mode: str) -> None:
    def seconds(size: int) -> float:
        text = "</think><answer>1</answer><confidence>" + piece * (size // len(piece))
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            parse_completion(text, "tac", mode)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(100_000) < 0.1
    # 8 times the text: 8 times the time if linear, 64 times if quadratic.
    assert seconds(800_000) < 24 * seconds(100_000) + 0.002


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("</think><answer>4</answer> note </answer>", "4"),
        ("<answer><answer>4</answer></answer>", "4"),
        ("<think>maybe <answer>3 hmm</think> so 4</answer>", None),
        ("<answer>3</answer></think> so <answer>4</answer> <answer>5", "4"),
    ],
)
def test_lenient_reading_takes_no_block_apart(text, answer):
    assert parse_completion(text, mode="lenient").answer == answer
