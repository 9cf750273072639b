import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcr import scaling
from tenfold_common.errors import UserError


def naive_vote(answers, confidences, method):
    """Return (answer, confidence, mean, index, votes) by loops over Python lists."""
    voters = [i for i, a in enumerate(answers) if a is not None]
    if not voters:
        return None, math.nan, math.nan, -1, 0
    q = {i: confidences[i] for i in voters}
    classes: dict[str, list[int]] = {}
    for i in voters:
        classes.setdefault(answers[i].strip(), []).append(i)

    def total(members):
        return sum(q[i] for i in members if q[i] is not None)

    def peak(members):
        return max(-1.0 if q[i] is None else q[i] for i in members)

    zero = total(voters) == 0

    def key(members):
        score = len(members)
        if not zero and method == "max":
            score = peak(members)
        if not zero and method == "weighted":
            score = round(total(members), 9)
        return score, peak(members), -members[0]

    won = max(classes.values(), key=key)
    stated = [q[i] for i in won if q[i] is not None]
    index = max(won, key=lambda i: (-1.0 if q[i] is None else q[i], -i))
    share = len(won) / len(voters) if zero else total(won) / total(voters)
    mean = sum(stated) / len(stated) if stated else math.nan
    return answers[index], share, mean, index, len(won)


confidence = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0]), st.floats(0, 1))
answer = st.one_of(st.none(), st.sampled_from(["a", " a", "b", "c", "d "]))
rows = st.lists(st.tuples(answer, confidence), min_size=1, max_size=9)


@given(rows, st.sampled_from(scaling.METHODS))
def test_aggregate_equals_the_plain_loops(row, method):
    answers, stated = map(list, zip(*row, strict=True))
    vote = scaling.aggregate(answers, stated, method)
    expected = naive_vote(answers, stated, method)
    assert (vote.answer, vote.index, vote.votes) == (expected[0], expected[3], expected[4])
    np.testing.assert_allclose(
        [vote.confidence, vote.mean_confidence], [expected[1], expected[2]], atol=1e-12
    )


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.tuples(answer, confidence), min_size=n, max_size=n), min_size=1, max_size=5
        )
    ),
    st.sampled_from(scaling.METHODS),
    st.sampled_from([0, 7, 1000]),
)
def test_many_prompts_equal_row_by_row(table, method, offset):
    ids = [scaling.class_ids([a for a, _ in row]) for row in table]
    ids = np.array(ids)
    ids[ids >= 0] += offset  # ids need not be small
    q = np.array([[math.nan if x is None else x for _, x in row] for row in table])
    many = scaling.aggregate_many(ids, q, method)
    for p, row in enumerate(table):
        one = naive_vote([a for a, _ in row], [x for _, x in row], method)
        assert many.index[p] == one[3]
        assert many.votes[p] == one[4]
        assert many.winner[p] == (ids[p, one[3]] if one[3] >= 0 else -1)
        np.testing.assert_allclose(
            [many.confidence[p], many.mean_confidence[p]], one[1:3], atol=1e-12
        )


def test_hand_worked_votes():
    answers, q = ["4", "4", "5", "6"], [0.2, 0.3, 0.9, 0.4]
    majority = scaling.aggregate(answers, q)
    assert (majority.answer, majority.votes, majority.index) == ("4", 2, 1)
    assert majority.confidence == pytest.approx(0.5 / 1.8)
    assert majority.mean_confidence == pytest.approx(0.25)
    assert scaling.aggregate(answers, q, "max").answer == "5"
    assert scaling.aggregate(answers, q, "weighted").answer == "5"
    assert scaling.aggregate(["4", "4", "5"], [0.5, 0.5, 0.9], "weighted").answer == "4"


def test_ties_go_to_the_largest_confidence_then_to_the_first():
    assert scaling.aggregate(["a", "b"], [0.2, 0.3]).answer == "b"
    assert scaling.aggregate(["a", "b"], [0.3, 0.3]).answer == "a"
    # 0.1 + 0.2 is not 0.3 in floats, yet it is a tie; b has the larger single q.
    assert scaling.aggregate(["a", "a", "b"], [0.1, 0.2, 0.3], "weighted").answer == "b"


@pytest.mark.parametrize("method", scaling.METHODS)
def test_zero_or_absent_confidences_give_the_majority(method):
    for q in ([0.0] * 3, [None] * 3):
        vote = scaling.aggregate(["a", "b", "b"], q, method)
        assert vote.answer == "b"
        assert vote.confidence == pytest.approx(2 / 3)
    assert math.isnan(vote.mean_confidence)


def test_nobody_votes():
    vote = scaling.aggregate([None, None], [0.5, None])
    assert (vote.answer, vote.index, vote.votes) == (None, -1, 0)
    assert math.isnan(vote.confidence)


def test_classes_by_normal_form():
    answers, q = ["1/2", "0.5", "2"], [0.3, 0.3, 0.5]
    assert scaling.aggregate(answers, q, "weighted").answer == "2"
    forms = {"1/2": 0.5, "0.5": 0.5, "2": 2.0}
    assert scaling.aggregate(answers, q, "weighted", forms.__getitem__).answer == "1/2"


@pytest.mark.parametrize(
    ("answers", "q", "method", "words"),
    [
        (["a"], [0.1, 0.2], "max", "1 answers but 2"),
        ([], [], "max", "no samples"),
        (["a"], [1.5], "max", r"lie in \[0, 1\]"),
        (["a"], [0.5], "wieghted", "Did you mean 'weighted'"),
    ],
)
def test_bad_votes(answers, q, method, words):
    with pytest.raises(UserError, match=words):
        scaling.aggregate(answers, q, method)


@pytest.mark.parametrize(
    ("answers", "q", "words"),
    [
        ([1, 2], [0.5, 0.5], "answer 0 must be a str, .* not 1"),
        (["a", b"b"], [0.5, 0.5], "answer 1 must be a str, .* not b'b'"),
        ("ab", [0.5, 0.5], "a list of texts, one for each sample, not 'ab'"),
        (None, [0.5], "a list of texts, .* not None"),
        ({"a", "b"}, [0.5, 0.5], "a list of texts"),
        (["a", "b"], ["0.5", "0.5"], "numbers in .* not '0.5'"),
        (["a", "b"], [0.5, "0.5"], "numbers in .* not '0.5'"),
        (["a", "b"], np.array(["0.5", "0.5"]), "numbers in .* not '0.5'"),
        (["a", "b"], [0.5, [0.5]], r"numbers in .* not \[0.5\]"),
        (["a"], 0.5, "1 answers but 1"),
    ],
)
def test_answers_and_confidences_of_another_kind(answers, q, words):
    for method in scaling.METHODS:
        with pytest.raises(UserError, match=words):
            scaling.aggregate(answers, q, method)
    with pytest.raises(UserError, match=words):
        scaling.consistency([answers], [q])


def test_numbers_of_every_kind_are_confidences():
    answers = np.array(["a", "b", None], dtype=object)
    for q in ([0, 1, None], np.array([0, 1, 0]), np.float32([0, 1, 0]), [np.float16(0), True, 0]):
        assert scaling.aggregate(answers, q, "max").answer == "b"
    with pytest.raises(UserError, match="not '1'"):
        scaling.aggregate_many([[0, 1]], [["1", "0"]])


def test_bad_arrays():
    with pytest.raises(UserError, match="integer ids"):
        scaling.aggregate_many([[0.5]], [[0.5]])
    with pytest.raises(UserError, match="one shape"):
        scaling.aggregate_many([[1, 2]], [[0.5]])


# The curve ----------------------------------------------------------------------------------------


def sampled(p=400, n=16, seed=0):
    """Right answer 0 with chance 0.4, else one of 1..3; q is high when right."""
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((p, n)) < 0.4, 0, rng.integers(1, 4, (p, n)))
    q = (0.3 + 0.3 * (ids == 0) + 0.4 * rng.random((p, n))).clip(0, 1)
    return ids, q, (ids == 0).astype(int)


def test_vote_curve():
    ids, q, right = sampled()
    curve = scaling.vote_curve(ids, q, right, [1, 4, 16])
    at_one = [values[0] for values in curve.accuracy.values()]
    assert at_one == [at_one[0]] * 3  # one sample leaves nothing to vote on
    assert at_one[0] == pytest.approx(right.mean(), abs=0.02)
    for method, values in curve.accuracy.items():
        index = scaling.aggregate_many(ids, q, method).index
        assert values[-1] == pytest.approx(right[np.arange(len(ids)), index].mean())
        assert values[-1] > values[0] + 0.2
        assert all(v <= best + 0.02 for v, best in zip(values, curve.pass_at_n, strict=True))
    assert curve.accuracy["weighted"][-1] >= curve.accuracy["majority"][-1]
    assert curve == scaling.vote_curve(ids, q, right, [1, 4, 16])
    assert curve != scaling.vote_curve(ids, q, right, [1, 4, 16], seed=1)


@pytest.mark.parametrize("samples", [[], [0], [17]])
def test_bad_curve(samples):
    with pytest.raises(UserError, match="samples must be"):
        scaling.vote_curve(*sampled(), samples)
    with pytest.raises(UserError, match="correct must hold"):
        scaling.vote_curve([[0]], [[0.5]], [[2]], [1])


# Analyses -----------------------------------------------------------------------------------------


class Writer:
    """A text model that writes given continuations and remembers what it was asked."""

    name = "writer"

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.asked, self.settings = texts, [], {}

    def sample(self, prompts, *, n=1, **settings):
        from types import SimpleNamespace

        self.asked, self.settings = list(prompts), {"n": n, **settings}
        texts = [self.texts[i % len(self.texts)] for i in range(n)]
        return [[SimpleNamespace(text=t, finish_reason="stop", tokens=3) for t in texts]]


KEPT = "<think>2+2</think> <answer>4</answer>"
REST = " <analysis>{}</analysis> <confidence>{}</confidence>"


def test_analyses_are_sampled_after_the_kept_answer():
    model = Writer([REST.format("sure", 0.8), REST.format("less", 0.6), " <analysis>cut"])
    with pytest.warns(scaling.AnalysisWarning, match="1 of 3 continuations .*<analysis>cut"):
        ensemble = scaling.ensemble_analyses(
            model, "Q: ", KEPT + REST.format("old", 0.1), 3, temperature=0.5, seed=9
        )
    assert model.asked == ["Q: " + KEPT]
    assert model.settings == {"n": 3, "temperature": 0.5, "max_tokens": 512, "seed": 9}
    np.testing.assert_array_equal(ensemble.confidences, [0.8, 0.6, math.nan])
    assert ensemble.mean == pytest.approx(0.7)
    assert ensemble.std == pytest.approx(0.1)
    assert ensemble.missing == 1


@pytest.mark.parametrize(
    ("kept", "rest", "q"),
    [
        ("2+2 <answer>4</answer>", REST.format("no think", 0.8), 0.8),
        ("2+2 <answer>4</answer>", " well <confidence>80%</confidence> that is all", 0.8),
        (KEPT, " <confidence>85</confidence>", 0.85),
        (KEPT, REST.format("", "8/10"), None),
        # What the reasoning or another answer says of itself is not this answer's confidence.
        (f"<confidence>0.3</confidence> {KEPT}", " <analysis>cut", None),
        (KEPT, " no: <answer>5</answer> <confidence>0.9</confidence>", None),
        (
            KEPT,
            " <confidence>0.2</confidence> or <answer>5</answer> <confidence>1</confidence>",
            0.2,
        ),
    ],
)
def test_analyses_are_read_leniently(kept, rest, q):
    model = Writer([rest])
    if q is None:
        with pytest.warns(scaling.AnalysisWarning):
            ensemble = scaling.ensemble_analyses(model, "Q: ", kept, 2)
    else:
        ensemble = scaling.ensemble_analyses(model, "Q: ", kept, 2)
    np.testing.assert_array_equal(ensemble.confidences, [math.nan if q is None else q] * 2)
    assert ensemble.missing == (2 if q is None else 0)


def test_the_kept_part_ends_at_the_close_of_the_answer_itself():
    """Not at a `</answer>` in the reasoning, nor at one in the old analysis."""
    kept = "<think>it ends with </answer>, maybe <answer>3</answer></think> <answer>4</answer>"
    model = Writer([REST.format("sure", 0.8)])
    for rest in (REST, " see </answer>" + REST):
        scaling.ensemble_analyses(model, "Q: ", kept + rest.format("old", 0.1), 1)
        assert model.asked == ["Q: " + kept]


def test_cut_off_analyses_are_counted():
    from tenfold_common.lm import ScriptedModel

    model = ScriptedModel(lambda prompt, seed, sample: " <analysis>one two three")
    with pytest.warns(scaling.AnalysisWarning, match=r"\(2 of all were cut off at max_tokens=2\)"):
        scaling.ensemble_analyses(model, "Q", KEPT, 2, max_tokens=2)


def test_messages_are_continued_as_the_assistant():
    model = Writer([" <confidence>0.25</confidence>"])
    messages = [{"role": "user", "content": "2+2?"}]
    ensemble = scaling.ensemble_analyses(model, messages, KEPT, 2, format="tac")
    assert model.asked == [[*messages, {"role": "assistant", "content": KEPT}]]
    assert messages == [{"role": "user", "content": "2+2?"}]
    assert ensemble.confidences.tolist() == [0.25, 0.25]


def test_ensembles_refuse_what_they_cannot_do():
    model = Writer(["no confidence"])
    with pytest.warns(scaling.AnalysisWarning, match=r"2 of 2 .*\(0 of all were cut"):
        nothing = scaling.ensemble_analyses(model, "Q", KEPT, 2)
    assert nothing.missing == 2
    assert math.isnan(nothing.mean)
    with pytest.raises(UserError, match="k must"):
        scaling.ensemble_analyses(model, "Q", KEPT, 0)
    with pytest.raises(UserError, match="'tbac'"):
        scaling.ensemble_analyses(model, "Q", KEPT, 1, format="tbac")
    with pytest.raises(UserError, match="no answer"):
        scaling.ensemble_analyses(model, "Q", "hm", 1)


def test_intra_solution_std():
    q = [[0.2, 0.4, math.nan], [0.5, 0.5, 0.5], [0.1, math.nan, math.nan]]
    assert scaling.intra_solution_std(q) == pytest.approx(0.05)
    assert math.isnan(scaling.intra_solution_std([[0.5]]))
    with pytest.raises(UserError):
        scaling.intra_solution_std([0.5])


def test_consistency():
    found = scaling.consistency(
        [["a", " a", "b"], ["x", "y"], [None, "z"], ["u"]],
        [[0.6, 0.2, 0.3], [0.8, 0.7], [0.9, None], [1.0]],
    )
    np.testing.assert_allclose(found.sums, [0.7, 1.5, math.nan, 1.0])
    assert found.mean == pytest.approx(3.2 / 3)
    assert found.share_above_one == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="prompt 0 has 1"):
        scaling.consistency([["a"]], [[0.1, 0.2]])
    with pytest.raises(UserError, match="prompt 0 must lie"):
        scaling.consistency([["a"]], [[1.1]])
    with pytest.raises(UserError, match="at least one"):
        scaling.consistency([], [])
