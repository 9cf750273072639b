import logging
import pickle
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcr import verify
from rlcr.verify import (
    AutoVerifier,
    Choice,
    ExactMatch,
    FunctionVerifier,
    Grader,
    Judge,
    MathVerifier,
    Verifier,
    get_verifier,
)
from tenfold_common.errors import MissingDependencyError, UserError

MATH = MathVerifier()


def in_thread(function, *args):
    results: list = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return results[0]


# Exact match


@pytest.mark.parametrize(
    ("answer", "gold", "grade"),
    [
        ("The  Eiffel Tower!", "eiffel tower", 1.0),
        ("Eiffel-Tower", "eiffeltower", 1.0),
        ("a an the cat", "cat", 1.0),
        ("another", "other", 0.0),
        ("théâtre", "theatre", 0.0),
        ("THÉÂTRE", "théâtre", 1.0),
        ("ｆｕｌｌ", "full", 1.0),
        ("«Paris»", "paris", 1.0),
        ("Straße", "STRASSE", 1.0),
        ("The", "the", 1.0),
        ("+", "-", 0.0),
        ("+", "+", 1.0),
        ("", "x", 0.0),
    ],
)
def test_exact_match(answer: str, gold: str, grade: float) -> None:
    assert ExactMatch().grade([answer], [gold]) == [grade]
    same = ExactMatch().normal_form(answer) == ExactMatch().normal_form(gold)
    assert same == bool(grade)


@given(st.text(max_size=30))
def test_every_text_equals_itself_and_normalising_again_changes_nothing(text: str) -> None:
    assert ExactMatch().equal(text, text) == 1.0
    once = verify.normalise_answer(text)
    assert once == " ".join(once.split()) or once == text.strip().casefold()


# Gold answers


def test_any_of_several_gold_answers_will_do() -> None:
    golds = [["Rome", "Paris"], ["Rome"], ("paris", None), [None, " "], [], None, float("nan"), ""]
    assert ExactMatch().grade(["Paris"] * 8, golds) == [1, 0, 1, None, None, None, None, None]


def test_numbers_are_gold_answers() -> None:
    golds = [7, 7.0, np.int64(7), np.float32(7), 0.5, [8, 7]]
    assert MATH.grade(["7", "7", "7", "7", "1/2", "7"], golds) == [1.0] * 6
    assert ExactMatch().grade(["7"], [7.0]) == [1.0]


def test_no_answer_is_wrong_unless_there_is_no_gold_answer() -> None:
    for verifier in (ExactMatch(), MATH, AutoVerifier(), FunctionVerifier(lambda a, g: True)):
        assert verifier.grade([None, None], ["7", None]) == [0.0, None]


def test_impossible_gold_answers_and_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="not dict"):
        ExactMatch().grade(["7"], [{"answer": 7}])
    with pytest.raises(UserError, match="2 answers do not fit 1"):
        ExactMatch().grade(["7", "8"], ["7"])


# Mathematics


@pytest.mark.parametrize(
    ("gold", "answer", "grade"),
    [
        ("0.5", "1/2", 1.0),
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"\dfrac{2}{4}", "$1/2$", 1.0),
        ("1,000", "1000", 1.0),
        ("007", "7", 1.0),
        ("7", "8", 0.0),
        ("0.5", "0.6", 0.0),
        ("1/3", "0.3333333", 1.0),
        ("1/3", "0.33", 0.0),
        ("1e5", "100000", 1.0),
        ("50%", "0.5", 1.0),
        (r"\sqrt{2}", "2^{1/2}", 1.0),
        (r"2\pi", "2", 0.0),
        ("x+1", "1+x", 1.0),
        ("(1, 2)", "(1,2)", 1.0),
        ("(1, 2)", "(2, 1)", 0.0),
        ("(1, 2)", "(1, 2, 3)", 0.0),
        ("(1, 0.5)", r"$(1.0, \frac{1}{2})$", 1.0),
        ("(1, 2)", "[1, 2]", 0.0),
        ("(1, 2)", "1", 0.0),
        ("1,234", "(1,234)", 0.0),
        (r"\{1, 2\}", r"\{2, 1\}", 1.0),
        ("x = 5", "5", 1.0),
        ("7", r"\boxed{7}", 1.0),
        (r"\text{yes}", "Yes", 1.0),
        ("7", "the answer is 7", 1.0),
        ("Paris", "paris", 1.0),
        ("Paris", "London", 0.0),
        ("7", "seven", 0.0),
        ("7", "", 0.0),
        ("-5", "5", 0.0),
        ("1/0", "2", 0.0),
    ],
)
def test_mathematical_equality(gold: str, answer: str, grade: float) -> None:
    assert MATH.grade([answer], [gold]) == [grade]
    assert in_thread(MathVerifier().grade, [answer], [gold]) == [grade]


@given(st.fractions(-1000, 1000, max_denominator=50), st.fractions(-9, 9, max_denominator=9))
def test_the_cheap_path_agrees_with_math_verify(gold: Fraction, other: Fraction) -> None:
    from math_verify import parse
    from math_verify import verify as slow

    for answer in (gold, other):
        expected = slow(parse(f"${gold}$"), parse(f"${answer}$"))
        assert MATH.equal(str(answer), str(gold)) == float(expected)


@given(*[st.tuples(*[st.sampled_from(["1", "2", "1/2", "0.5", "-1"])] * 2)] * 2)
def test_points_agree_with_math_verify(gold: tuple, answer: tuple) -> None:
    from math_verify import parse
    from math_verify import verify as slow

    texts = [f"({', '.join(point)})" for point in (gold, answer)]
    expected = slow(*(parse(f"${text}$") for text in texts))
    assert MATH.equal(texts[1], texts[0]) == float(expected)


def test_white_space_that_separates_nothing_makes_no_difference() -> None:
    same = verify._unwrapped
    assert same("x + 1") == same("x  +1") == "x+1"
    assert same(r"$\boxed{( 1, 2 )}$") == "(1,2)"
    for text in ("1 2", r"5\ (2)", r"\pi x", "Paris, France", r"2 \cdot 3"):
        assert same(text) == text
    assert len(same(" " * 200_000 + "1" + " " * 200_000 + "2")) == 3


def test_plain_numbers() -> None:
    read = verify.plain_number
    assert read("-1,234.50") == Fraction(-12345, 10)
    assert read("$ .5 $") == Fraction(1, 2)
    assert read("5.") == 5
    assert read(r"-\tfrac{3}{4}") == Fraction(-3, 4)
    assert read("2e3") == 2000
    for text in ("", "1/0", "12,34", "x", "50%", "1 2", "٣", "1e9999", "nan", "9" * 201, "--1"):
        assert read(text) is None, text


def test_verdicts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    slow = verify._same
    monkeypatch.setattr(verify, "_same", lambda *pair: calls.append(pair) or slow(*pair))
    verifier = MathVerifier(cache_size=2)
    assert verifier.grade(["x+1", "1+x", "1+x", "x+2"], ["x + 1"] * 4) == [1, 1, 1, 0]
    assert len(calls) == 2  # equal texts need no call
    verifier.grade(["x+3", "1+x"], ["x + 1"] * 2)  # the cache holds two verdicts
    assert len(calls) == 4


def test_math_verifier_can_be_sent_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(MathVerifier(cache_size=5)))
    assert (copy.cache_size, copy.equal("0.5", "1/2")) == (5, 1.0)


HOSTILE = [
    "9**9**9**9",
    "9**9**9**9 + " * 300 + "1",
    "9^{9^{9^{9}}}",
    "9^{(1+9^9)}",
    "((9^999)^999)^999",
    "9^{99*99*99*99}",
    r"9^{99 \cdot 99 \cdot 99}",
    "(9**99999999)",
    "2^-9^9^9",
    "99999999!",
    "(99!)!",
    "9!!!!!!",
    "9^{99!}",
    r"\binom{99999999}{49999999}",
    "(x+y+z)^{999}",
    r"\left(x+y+z\right)^{5000}",
    r"\sum_{i=1}^{10^{9}} i^{i}",
    r"\int_0^1 \exp(\exp(\sin x)) dx",
    r"\lim_{x \to 0} x^x",
    "(" * 2000 + "1" + ")" * 2000,
    "{" * 2000,
    "9" * 4000,
    r"\frac{" * 300,
    "1/" * 2000 + "1",
    "$" * 4000,
    "^" * 4000,
    r"\sqrt" * 500,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=[text[:24] for text in HOSTILE])
@pytest.mark.parametrize("wrap", ["{}", "${}$", r"\boxed{{{}}}"], ids=["bare", "dollars", "boxed"])
def test_hostile_answers_end_soon_in_any_thread(answer: str, wrap: str) -> None:
    text = wrap.format(answer)
    start = time.process_time()
    assert in_thread(MathVerifier().grade, [text, text], ["7", r"\sqrt{x}"]) == [0.0, 0.0]
    in_thread(MathVerifier().normal_form, text)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    "text",
    [
        "2^{10}",
        r"2^{3} \cdot 3^{2} \cdot 5",
        "e^{x^2}",
        "x^2+y^2",
        "10!",
        r"\binom{10}{3}",
        "10^{100}",
        "(x+1)^3",
        r"\frac{x^{n+1}}{n+1}",
        "1.05^{12}",
        "2^{2000}",
        r"e^{i\pi}",
    ],
)
def test_ordinary_answers_are_not_too_large(text: str) -> None:
    assert not verify.too_large(text)


def test_equal_texts_are_right_however_large() -> None:
    assert MATH.equal("9**9**9**9", "9**9**9**9") == 1.0


def test_silence_about_time_limits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        in_thread(MathVerifier().grade, ["x+1"], ["1+x"])
    assert caplog.records == []


def test_missing_math_verify_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rlcr\[math\]'"):
        MathVerifier()
    assert AutoVerifier().grade(["paris"], ["Paris"]) == [1.0]  # needs none


def test_normal_forms_gather_equal_answers() -> None:
    form = MATH.normal_form
    halves = {form(text) for text in ("0.5", "1/2", r"\frac{1}{2}", "$.5$", "x = 1/2", "50%")}
    assert len(halves) == 1
    assert form("x+1") == form("1+x") != form("x+2")
    assert form("Paris") == form("paris!")
    assert len({form(text) for text in ("1", "2", "-1", "x")}) == 4
    form("10^{400}")  # beyond floats


# Automatic choice


@pytest.mark.parametrize(
    ("text", "mathematical"),
    [
        ("7", True),
        ("1/2", True),
        ("50%", True),
        ("x+1", True),
        ("(1, 2)", True),
        ("$x$", True),
        (r"\frac{1}{2}", True),
        (r"\boxed{7}", True),
        (r"5\text{ cm}", True),
        ("2x", True),
        ("Paris", False),
        ("B", False),
        ("3 apples", False),
        ("10 May 1990", False),
        ("", False),
        ("Apollo 11", False),
        ("U.S.", False),
        ("1990s", True),
    ],
)
def test_what_looks_mathematical(text: str, mathematical: bool) -> None:
    assert verify.looks_mathematical(text) == mathematical


def test_auto_verifier_chooses_by_the_gold_answer() -> None:
    answers = ["0.5", "The Paris", "10 May 1991", "-5"]
    golds: list[object] = ["1/2", "paris", "10 May 1990", "5"]
    assert AutoVerifier().grade(answers, golds) == [1, 1, 0, 0]
    assert AutoVerifier().grade(["0.5"], [["half", "1/2"]]) == [1]
    assert AutoVerifier().normal_form("0.50") == AutoVerifier().normal_form("1/2")
    assert AutoVerifier().normal_form("The end") == "end"


# Multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) Paris", "B"),
        ("(b) Paris", "B"),
        ("Option B", "B"),
        ("answer: b", "B"),
        (r"\boxed{B}", "B"),
        ("**B**", "B"),
        ("$B$", "B"),
        ("B: Paris", "B"),
        ("Paris", None),
        ("A cat", None),
        ("", None),
        ("AB", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert Choice().letter(text) == letter


def test_choice() -> None:
    assert Choice().grade(["(B)", "C", "Paris", None], ["b"] * 4) == [1, 0, 0, 0]
    assert Choice().grade(["B"], ["Paris"]) == [None]  # no such option: not scorable
    cities = Choice(["Rome", "Paris", "Oslo"])
    assert cities.grade(["paris", "B", "Oslo", "E"], ["B", "Paris", "B", "B"]) == [1, 1, 0, 0]
    assert cities.grade(["B"], ["E"]) == [None]
    assert cities.normal_form("paris") == cities.normal_form("(B)")
    with pytest.raises(UserError, match="2 to 26 options, not 1"):
        Choice(["Rome"])
    with pytest.raises(UserError, match="read the same"):
        Choice(["Rome", "rome!"])


# Judge


class Model:
    name = "scripted"

    def __init__(self, replies: dict[str, str]) -> None:
        self.replies, self.calls = replies, []

    def sample(self, prompts, *, temperature, max_tokens):
        self.calls.append((list(prompts), temperature, max_tokens))
        texts = [
            next(reply for key, reply in self.replies.items() if f"\n{key}\n" in prompt)
            for prompt in prompts
        ]
        return [[SimpleNamespace(text=text)] for text in texts]


def test_judge_reads_the_first_word_only() -> None:
    replies = {"a1": "YES", "a2": "no.", "a3": "yesterday", "a4": "I say yes", "a5": " **Yes**, it"}
    replies |= {"a6": "", "a7": "Nothing"}
    judge = Judge(Model(replies))  # pyright: ignore[reportArgumentType]
    assert judge.grade(list(replies), ["g"] * 7) == [1.0, 0.0, None, None, 1.0, None, None]


def test_judge_asks_once_about_equal_questions_and_not_without_need() -> None:
    model = Model({"x": "YES", "y": "NO"})
    judge = Judge(model)  # pyright: ignore[reportArgumentType]
    answers = ["x", "x", "y", None, "x", "x"]
    golds: list[object] = ["g", "g", "g", "g", None, ["g", "h"]]
    prompts = ["q", "q", "q", "q", "q", "q"]
    assert judge.grade(answers, golds, prompts) == [1, 1, 0, 0, None, 1]
    ((asked, temperature, max_tokens),) = model.calls
    assert (len(asked), temperature, max_tokens) == (3, 0.0, 20)
    assert "\nq\n" in asked[0]
    assert "\ng\nh\n" in asked[2]
    assert judge.grade([None], ["g"]) == [0]
    assert len(model.calls) == 1


def test_an_answer_cannot_fill_in_the_judges_fields() -> None:
    model = Model({"{gold}": "NO"})
    assert Judge(model).grade(["{gold}"], ["secret"]) == [0]  # pyright: ignore[reportArgumentType]
    assert model.calls[0][0][0].count("secret") == 1
    with pytest.raises(UserError, match=r"must contain \{gold\}"):
        Judge(model, prompt="{answer}?")  # pyright: ignore[reportArgumentType]


# Functions and names


def test_function_verifier_passes_the_gold_answer_as_it_is() -> None:
    seen = []

    def close(answer: str, gold: object) -> float:
        seen.append(gold)
        return 0.25

    verifier = FunctionVerifier(close)
    assert verifier.name == "close"
    golds: list[object] = [["1", "2"], {"unit": "cm"}, None, "", [], float("nan")]
    assert verifier.grade(["x"] * 6, golds) == [0.25, 0.25, None, None, None, None]
    assert seen == [["1", "2"], {"unit": "cm"}]
    with pytest.raises(UserError, match="returned 7"):
        FunctionVerifier(lambda a, g: 7).grade(["x"], ["g"])


def test_verifiers_by_name() -> None:
    for name, kind in (
        ("exact_match", ExactMatch),
        ("math", MathVerifier),
        ("choice", Choice),
        ("auto", AutoVerifier),
    ):
        assert type(get_verifier(name)) is kind
        assert get_verifier(name).name == name
    assert get_verifier(MATH) is MATH
    assert isinstance(get_verifier(lambda answer, gold: True), FunctionVerifier)
    with pytest.raises(UserError, match=r"not 'exact_mach'\. Did you mean 'exact_match'"):
        get_verifier("exact_mach")
    with pytest.raises(UserError, match=r"Judge\(model\)"):
        get_verifier("judge")
    with pytest.raises(UserError, match="a name, a Verifier or a function"):
        get_verifier(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotImplementedError):
        Verifier().equal("a", "b")


class TestGrader:
    def test_each_row_by_its_own_verifier(self) -> None:
        grader = Grader("exact_match")
        grades, failed = grader.grade(["0.5", "0.5", "B"], ["1/2", "1/2", "b"], None,
                                      ["math", None, "choice"])  # fmt: skip
        assert (grades, failed) == ([1.0, 0.0, 1.0], [])
        assert grader.verifier("math") is grader.verifier("math")
        assert grader.verifier("exact_match") is grader.common

    def test_what_raises_costs_its_row_only_and_is_logged_once(self, caplog) -> None:
        def divides(answer: str, gold: object) -> bool:
            return int(str(gold)) % int(answer) == 0

        grader = Grader(divides)
        grades, failed = grader.grade(["3", "0", "5", "x"], [9, 9, 9, 9])
        assert (grades, failed) == ([1.0, None, 0.0, None], [1, 3])
        assert [r.getMessage() for r in caplog.records] == [
            "verifier divides raised ZeroDivisionError: integer modulo by zero. Further failures "
            "are counted, not logged."
        ]

    def test_a_grade_out_of_range_is_a_failure(self) -> None:
        class Percent(ExactMatch):
            def equal(self, answer: str, gold: str) -> float:
                return 100 * (super().equal(answer, gold) or 0)

        assert Grader(Percent()).grade(["a", "b"], ["a", "a"]) == ([None, 0.0], [0])

    def test_a_judge_that_is_gone_ends_the_work_unless_told_otherwise(self) -> None:
        judge = Judge(Model({}))  # pyright: ignore[reportArgumentType]  # knows no reply: raises
        with pytest.raises(StopIteration):
            Grader(judge).grade(["a", "b"], ["g", "g"])
        grades, failed = Grader(judge, keep_going=True).grade(["a", "b"], ["g", "g"])
        assert (grades, failed) == ([None, None], [0, 1])

    def test_prompts_are_wanted_by_a_judge_only(self) -> None:
        grader = Grader("exact_match")
        judge = Judge(Model({}))  # pyright: ignore[reportArgumentType]
        assert not grader.uses_prompts()
        assert grader.uses_prompts([None, judge])
        assert Grader(judge).uses_prompts()
        assert not Grader(judge).uses_prompts(["math", "choice"])
