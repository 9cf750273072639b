import json
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import Prompt, ScriptedModel, TransformersModel
from tenfold_common.tiny import byte_tokenizer, tiny_llama
from wavelength_rsa.listeners import (
    Listener,
    LogprobListener,
    Question,
    SamplingListener,
    TableListener,
)
from wavelength_rsa.prompts import WavelengthPrompts
from wavelength_rsa.rules import Rules
from wavelength_rsa.scales import Scale, grid
from wavelength_rsa.speakers import (
    Candidates,
    RSAListener,
    RSASpeaker,
    SamplingSpeaker,
    Speaker,
    Task,
)
from wavelength_rsa.toy import ToyPrompts, World

SPEED, HEAT = Scale("Slow", "Fast"), Scale("Hot", "Cold")


def target_of(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text.rpartition("Target: ")[2].split("\n")[0]


def prompts_of(call: dict) -> list[Prompt]:
    return call["prompts"]


def saying(*replies: str) -> ScriptedModel:
    return ScriptedModel(lambda prompt, seed, j: replies[j % len(replies)], name="scripted")


def clues(*said: str) -> ScriptedModel:
    return saying(*(f"<clue>{clue}</clue>" for clue in said))


class Fixed(Speaker):
    """Gives the same clues with the same counts for every target; remembers what it was asked."""

    def __init__(self, counts: Mapping[str, int], probs: list[float] | None = None) -> None:
        self.name, self.counts, self.probs = "fixed", dict(counts), probs
        self.asked: list[tuple[list[Task], int]] = []

    def describe(self) -> dict:
        return {"class": "Fixed", "counts": self.counts}

    def _propose(self, tasks: list[Task], seed: int) -> list[Candidates]:
        self.asked.append((tasks, seed))
        n = np.array(list(self.counts.values()))
        prior = n / n.sum()
        probs = prior if self.probs is None else np.array(self.probs)
        return [
            Candidates(tuple(self.counts), n, prior, probs, None, ((),) * len(n), 0) for _ in tasks
        ]


class Table(TableListener):
    """A table that remembers its calls."""

    def __init__(self, table: Mapping[str, list[float]], scale: Scale = SPEED, **options) -> None:
        rows = {(scale.left, scale.right, clue): row for clue, row in table.items()}
        super().__init__(rows, step=50, **options)
        self.calls: list[list[Question]] = []

    def listen(self, questions: list[Question], *, seed: int = 0) -> np.ndarray:
        self.calls.append(list(questions))
        return super().listen(questions, seed=seed)


L0 = {"snail": [0.8, 0.15, 0.05], "bus": [0.2, 0.6, 0.2], "jet": [0.0, 0.1, 0.9]}


# --------------------------------------------------------------------------------------------------
# Sampling


def test_counts_make_the_prior_and_spellings_are_one_candidate() -> None:
    model = clues("race car", "Race car", "bus", "Race  car ", "jet", "bus", "RACE CAR", "Race car")
    [found] = SamplingSpeaker(model, num_candidates=8).propose([(SPEED, 80)])
    assert found.clues == ("Race car", "bus", "jet")  # the most frequent spelling
    assert found.counts.tolist() == [5, 2, 1]
    assert found.counts.dtype == np.int64
    assert found.prior.tolist() == found.probs.tolist() == [5 / 8, 2 / 8, 1 / 8]
    assert found.listener is None
    assert found.violations == ((), (), ())
    assert found.refused == 0


def test_all_tasks_are_sampled_in_one_call() -> None:
    model = ScriptedModel(
        lambda prompt, seed, j: f"<clue>{'slug' if target_of(prompt) == '5' else 'jet'}</clue>"
    )
    speaker = SamplingSpeaker(model, num_candidates=3)
    found = speaker.propose([(SPEED, 95), (SPEED, 5.0), (HEAT, 95)], seed=11)
    assert [c.clues for c in found] == [("jet",), ("slug",), ("jet",)]
    [call] = model.calls
    assert call["n"] == 3
    assert call["seed"] == 11
    assert call["stop"] == ("</clue>",)
    assert call["max_tokens"] == 24
    assert call["prompts"][1] == WavelengthPrompts().speaker(SPEED, 5)
    assert speaker.propose([]) == []


def test_reasoning_is_not_stopped_and_has_more_room() -> None:
    model = saying("maybe <clue>bus</clue>, no: <clue>jet</clue>")
    [found] = SamplingSpeaker(model, cot=True, num_candidates=2).propose([(SPEED, 95)])
    assert found.clues == ("jet",)
    [call] = model.calls
    assert call["stop"] == ()
    assert call["max_tokens"] == 1024
    assert call["prompts"] == [WavelengthPrompts().speaker(SPEED, 95, cot=True)]


def test_refusals_are_counted_and_leave_the_prior() -> None:
    model = saying("<clue>jet</clue>", "I would rather not.", "<clue>bus</clue>", "<clue> </clue>")
    [found] = SamplingSpeaker(model, num_candidates=4).propose([(SPEED, 80)])
    assert found.refused == 2
    assert found.prior.tolist() == [1 / 2, 1 / 2]
    assert len(model.calls) == 1


def test_only_tasks_without_any_clue_are_asked_again_with_another_seed() -> None:
    def reply(prompt: Prompt, seed: int, j: int) -> str:
        silent = target_of(prompt) == "5" and seed == 4
        return "no" if silent or j else "<clue>jet</clue>"

    model = ScriptedModel(reply)
    found = SamplingSpeaker(model, num_candidates=2).propose([(SPEED, 95), (SPEED, 5)], seed=4)
    assert [c.refused for c in found] == [1, 3]
    first, second = model.calls
    assert [target_of(p) for p in prompts_of(second)] == ["5"]
    assert second["seed"] != first["seed"]


def test_no_clue_at_all_is_an_error_that_shows_the_replies() -> None:
    speaker = SamplingSpeaker(saying("pass a", "pass b"), num_candidates=2, max_retries=1)
    with pytest.raises(UserError) as caught:
        speaker.propose([(SPEED, 95)])
    assert "none of 4 replies for target 95 on Slow .. Fast held a clue" in str(caught.value)
    assert "pass a" in str(caught.value)
    assert "pass b" in str(caught.value)


def test_a_clue_cut_off_is_no_clue() -> None:
    model = saying("<clue>a very long winded clue", "<clue>jet</clue>")
    [found] = SamplingSpeaker(model, num_candidates=2, max_tokens=3).propose([(SPEED, 95)])
    assert found.clues == ("jet",)
    assert found.refused == 1


BREAKERS = ("fast", "very fast", "jet", "7 very fast jets", "jet")


def test_keep_says_rule_breakers_like_others() -> None:
    [found] = SamplingSpeaker(clues(*BREAKERS), num_candidates=5).propose([(SPEED, 95)])
    assert found.clues == ("fast", "very fast", "jet", "7 very fast jets")
    assert found.violations == (
        ("equals_end",), ("end_word", "hedge"), (), ("end_word", "number", "hedge"),
    )  # fmt: skip
    assert found.probs.tolist() == found.prior.tolist() == [0.2, 0.2, 0.4, 0.2]


def test_drop_gives_rule_breakers_no_probability() -> None:
    for policy in ("drop", "raise"):
        speaker = SamplingSpeaker(clues(*BREAKERS), num_candidates=5, on_violation=policy)
        [found] = speaker.propose([(SPEED, 95)])
        assert found.counts.tolist() == [1, 1, 2, 1]
        assert found.probs.tolist() == found.prior.tolist() == [0, 0, 1, 0]
        said = speaker.speak(SPEED, 95)
        assert (said.clue, said.flagged) == ("jet", False)


def test_if_all_break_the_rules_the_least_bad_is_said_and_flagged() -> None:
    model = clues("very fast", "very fast", "fast", "7 very fast jets", "7", "fast")
    speaker = SamplingSpeaker(model, num_candidates=6, on_violation="drop")
    [found] = speaker.propose([(SPEED, 95)])
    assert found.clues == ("very fast", "fast", "7 very fast jets", "7")
    np.testing.assert_allclose(found.probs, [0, 2 / 3, 0, 1 / 3])
    said = speaker.speak(SPEED, 95)
    assert said.flagged
    assert said.clue in ("fast", "7")
    strict = SamplingSpeaker(model, num_candidates=6, on_violation="raise")
    with pytest.raises(
        UserError, match=r"every clue for target 95 on Slow .. Fast.*'fast': equals"
    ):
        strict.propose([(SPEED, 95)])


def test_rules_can_be_others_or_none() -> None:
    [free] = SamplingSpeaker(clues("fast"), rules=None, on_violation="raise").propose([(SPEED, 95)])
    assert free.violations == ((),)
    own = SamplingSpeaker(clues("big jet"), rules=Rules(max_words=1))
    assert own.propose([(SPEED, 95)])[0].violations == (("too_many_words",),)


def test_a_clue_is_drawn_by_its_probability_and_the_seed() -> None:
    speaker = Fixed({"a": 1, "b": 7, "c": 2}, probs=[0.1, 0.0, 0.9])
    [found] = speaker.propose([(SPEED, 50)])
    drawn = [speaker.draw(found, seed=s) for s in range(1000)]
    assert drawn == [speaker.draw(found, seed=s) for s in range(1000)]
    share = Counter(drawn)
    assert share["b"] == 0
    assert share["a"] == pytest.approx(100, abs=40)
    assert [speaker.speak(SPEED, 50, seed=s).clue for s in range(20)] == drawn[:20]
    assert speaker.asked[-1] == ([(SPEED, 50.0)], 19)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ((SPEED, 101), "target must be a number from 0 to 100, not 101"),
        ((SPEED, math.nan), "target must be"),
        ((SPEED, "5"), "target must be"),
        (("Slow", 5), "a task is a pair"),
        ((SPEED, 5, 1), "a task is a pair"),
    ],
)
def test_what_is_no_task_is_refused(task: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Fixed({"a": 1}).propose([task])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1, not 0"),
        ({"max_retries": -1}, "max_retries must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"on_violation": "dropp"}, "on_violation must be one of .* Did you mean 'drop'"),
    ],
)
def test_bad_settings_of_a_speaker_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingSpeaker(ScriptedModel(), **options)


def test_candidates_and_speakers_are_json() -> None:
    speaker = SamplingSpeaker(saying("no", "<clue>fast</clue>"), num_candidates=2)
    [found] = speaker.propose([(SPEED, 95)])
    assert found.to_dict() == {
        "refused": 1,
        "candidates": [
            {"clue": "fast", "count": 1, "prior": 1.0, "prob": 1.0, "listener": None,
             "violations": ["equals_end"]}
        ],
    }  # fmt: skip
    json.dumps(found.to_dict())
    described = speaker.describe()
    json.dumps(described)
    assert described["model"] == "scripted"
    assert described["rules"]["max_words"] == 5
    other = SamplingSpeaker(saying("x"), num_candidates=2, rules=Rules(max_words=3)).describe()
    assert other["rules"] != described["rules"]


# --------------------------------------------------------------------------------------------------
# The pragmatic speaker

COUNTS = {"snail": 1, "bus": 4, "jet": 3}


def s1(target: int, alpha: float = 1.0, lam: float = 1.0, cost: Mapping[str, float] | None = None):
    """By hand: P(u)^lam L0(t|u)^alpha exp(-cost(u)), normalised over the clues."""
    place = target // 50
    weight = {
        clue: (n / 8) ** lam * L0[clue][place] ** alpha * math.exp(-(cost or {}).get(clue, 0))
        for clue, n in COUNTS.items()
    }
    return [w / sum(weight.values()) for w in weight.values()]


@pytest.mark.parametrize("target", [0, 50, 100])
def test_s1_is_the_papers_formula(target: int) -> None:
    [found] = RSASpeaker(Fixed(COUNTS), Table(L0)).propose([(SPEED, target)])
    np.testing.assert_allclose(found.probs, s1(target), rtol=1e-12)
    assert found.listener is not None
    assert found.listener.tolist() == [L0[clue][target // 50] for clue in COUNTS]
    assert found.prior.tolist() == [1 / 8, 4 / 8, 3 / 8]
    assert found.counts.tolist() == [1, 4, 3]


def test_the_prior_is_what_was_probable_before_the_last_choice() -> None:
    """After the rule filter, and over another pragmatic speaker after its choice."""
    dropping = SamplingSpeaker(clues(*BREAKERS, "bus"), num_candidates=6, on_violation="drop")
    rows = {"jet": [0.0, 0.1, 0.9], "bus": [0.2, 0.6, 0.2]}
    pragmatic = RSASpeaker(dropping, Table(rows, default="uniform"))
    [found] = pragmatic.propose([(SPEED, 100)])
    assert found.clues == ("fast", "very fast", "jet", "7 very fast jets", "bus")
    assert found.prior.tolist() == [0, 0, 2 / 3, 0, 1 / 3]
    np.testing.assert_allclose(found.probs, [0, 0, 0.9, 0, 0.1], rtol=1e-12)
    [again] = RSASpeaker(pragmatic, Table(rows, default="uniform")).propose([(SPEED, 100)])
    assert again.prior.tolist() == found.probs.tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 3.0}, s1(50, alpha=3)),
        ({"alpha": 0.0}, s1(50, alpha=0)),
        ({"alpha": 0.0, "prior_weight": 0.0}, [1 / 3] * 3),
        ({"prior_weight": 0.0}, s1(50, lam=0)),
        ({"prior_weight": 2.0}, s1(50, lam=2)),
        (
            {"cost": lambda clue: 0.3 * len(clue)},
            s1(50, cost={"snail": 1.5, "bus": 0.9, "jet": 0.9}),
        ),
        ({"alpha": math.inf}, [0, 1, 0]),
        ({"select": "argmax"}, [0, 1, 0]),
    ],
)
def test_every_term_of_s1_counts(options: dict, expected: list[float]) -> None:
    [found] = RSASpeaker(Fixed(COUNTS), Table(L0), **options).propose([(SPEED, 50)])
    np.testing.assert_allclose(found.probs, expected, rtol=1e-12, atol=1e-15)


def test_a_cost_per_word_counts_words() -> None:
    rows = {"jet": [0, 0, 1], "a big jet": [0, 0, 1]}
    speaker = RSASpeaker(Fixed({"jet": 1, "a big jet": 1}), Table(rows), cost={"words": 0.5})
    [found] = speaker.propose([(SPEED, 100)])
    np.testing.assert_allclose(found.probs[1] / found.probs[0], math.exp(-1.0), rtol=1e-12)


@pytest.mark.parametrize("utility", ["neg_expected_distance", "neg_w1"])
def test_near_misses_count_for_the_distance_utilities(utility: str) -> None:
    rows = {"near": [0.0, 1.0, 0.0], "far": [1.0, 0.0, 0.0], "hit": [0.5, 0.0, 0.5]}
    speaker = RSASpeaker(
        Fixed({"near": 1, "far": 2, "hit": 1}), Table(rows), utility=utility, tau=20, alpha=2
    )
    [found] = speaker.propose([(SPEED, 100)])
    weight = [1 * math.exp(-2 * 50 / 20), 2 * math.exp(-2 * 100 / 20), math.exp(-2 * 50 / 20)]
    np.testing.assert_allclose(found.probs, np.array(weight) / sum(weight), rtol=1e-12)
    assert found.listener is not None
    assert found.listener.tolist() == [0, 0, 0.5]


def test_argmax_shares_ties() -> None:
    rows = {"a": [0.5, 0.5, 0], "b": [0.5, 0.5, 0], "c": [0.4, 0.6, 0]}
    speaker = RSASpeaker(Fixed({"a": 1, "b": 1, "c": 1}), Table(rows), select="argmax")
    [found] = speaker.propose([(SPEED, 0)])
    assert found.probs.tolist() == [0.5, 0.5, 0]


def test_all_candidates_of_all_tasks_are_asked_of_the_listener_at_once() -> None:
    listener = Table({**L0, "x": [1, 0, 0]})

    class ByTarget(Fixed):
        def _propose(self, tasks: list[Task], seed: int) -> list[Candidates]:
            [low], [high] = (
                Fixed({"x": 1, "bus": 1}).propose(tasks[:1]),
                super()._propose([tasks[1]], seed),
            )
            return [low, high]

    found = RSASpeaker(ByTarget({"jet": 1, "bus": 2, "snail": 1}), listener).propose(
        [(SPEED, 0), (SPEED, 100)]
    )
    assert listener.calls == [[(SPEED, c) for c in ("x", "bus", "jet", "bus", "snail")]]
    np.testing.assert_allclose(found[0].probs, [1 / 1.2, 0.2 / 1.2])
    weight = np.array([0.9, 2 * 0.2, 0.05])
    np.testing.assert_allclose(found[1].probs, weight / weight.sum())


def test_the_seed_reaches_both_the_speaker_and_the_listener() -> None:
    base = Fixed(COUNTS)
    literal = ScriptedModel(lambda prompt, seed, j: "50")
    speaker = RSASpeaker(base, SamplingListener(literal, num_samples=1))
    speaker.propose([(SPEED, 50)], seed=12)
    assert base.asked == [([(SPEED, 50.0)], 12)]
    assert [call["seed"] for call in literal.calls] == [12]


def test_what_the_rules_dropped_stays_dropped() -> None:
    for lam in (1.0, 0.0):
        base = Fixed(COUNTS, probs=[0.4, 0.6, 0.0])
        [found] = RSASpeaker(base, Table(L0), prior_weight=lam).propose([(SPEED, 100)])
        weight = [0.4**lam * 0.05, 0.6**lam * 0.2]
        np.testing.assert_allclose(found.probs[:2], np.array(weight) / sum(weight), rtol=1e-12)
        assert found.probs[2] == 0


def test_a_target_no_clue_can_reach_is_an_error_that_names_it() -> None:
    listener = Table({"snail": [1, 0, 0], "slug": [1, 0, 0]})
    with pytest.raises(UserError, match=r"target 100 on Slow .. Fast: .*probability 0"):
        RSASpeaker(Fixed({"snail": 1, "slug": 2}), listener).propose([(SPEED, 100)])


def test_a_target_off_the_grid_is_an_error_before_anything_is_sampled() -> None:
    base = Fixed(COUNTS)
    with pytest.raises(UserError, match="target 30 is not a multiple of step 50"):
        RSASpeaker(base, Table(L0)).propose([(SPEED, 30)])
    assert base.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha must be a number of at least 0, not -1"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"alpha": "2"}, "alpha must be"),
        ({"prior_weight": -1}, "prior_weight must be"),
        ({"prior_weight": math.inf}, "prior_weight must be"),
        ({"tau": 0}, "tau must be a number above 0"),
        ({"utility": "logprob"}, "utility must be one of .* Did you mean 'log_prob'"),
        ({"select": "max"}, "select must be one of sample, argmax"),
        ({"cost": {"word": 1}}, "cost must be a function or"),
    ],
)
def test_bad_settings_of_an_rsa_speaker_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RSASpeaker(Fixed(COUNTS), Table(L0), **options)


def test_an_rsa_speaker_describes_all_who_take_part() -> None:
    speaker = RSASpeaker(Fixed(COUNTS), Table(L0), alpha=math.inf, cost={"words": 1})
    described = json.loads(json.dumps(speaker.describe(), allow_nan=False))
    assert described["alpha"] == "inf"
    assert described["cost"] == {"words": 1}
    assert described["speaker"] == Fixed(COUNTS).describe()
    assert described["listener"] == Table(L0).describe()


# --------------------------------------------------------------------------------------------------
# The pragmatic listener


def l1(
    heard: str,
    alternatives: list[str],
    *,
    null: bool = True,
    alpha: float = 1.0,
    prior: list[float] | None = None,
) -> list[float]:
    """By hand: S1 over the alternatives and the null utterance, then over the states."""
    rows = [L0[clue] for clue in alternatives] + [[1 / 3] * 3] * null
    own = [L0[heard][t] ** alpha / sum(row[t] ** alpha for row in rows) for t in range(3)]
    weight = [s * p for s, p in zip(own, prior or [1 / 3] * 3, strict=True)]
    return [w / sum(weight) for w in weight]


@pytest.mark.parametrize("heard", list(L0))
@pytest.mark.parametrize("listed", [True, False])
def test_l1_is_the_papers_formula_and_the_heard_clue_counts_once(heard: str, listed: bool) -> None:
    alternatives = list(L0) if listed else [clue for clue in L0 if clue != heard]
    listener = RSAListener(Table(L0), {SPEED: alternatives})
    probs = listener.listen([(SPEED, heard)])
    np.testing.assert_allclose(probs, [l1(heard, list(L0))], rtol=1e-12)
    # Counted twice it would be another distribution.
    assert np.abs(probs[0] - l1(heard, [*L0, heard])).max() > 0.01


def test_several_questions_each_have_their_own_alternatives() -> None:
    table = {("Slow", "Fast", clue): row for clue, row in L0.items()}
    table |= {("Hot", "Cold", clue): row[::-1] for clue, row in L0.items()}
    literal = TableListener(table, step=50)
    listener = RSAListener(literal, {SPEED: ["bus"], HEAT: ["jet", "bus"]})
    probs = listener.listen([(SPEED, "jet"), (HEAT, "snail"), (SPEED, "bus"), (SPEED, "snail")])
    np.testing.assert_allclose(probs[0], l1("jet", ["bus", "jet"]), rtol=1e-12)
    np.testing.assert_allclose(probs[1], l1("snail", ["bus", "jet", "snail"])[::-1], rtol=1e-12)
    np.testing.assert_allclose(probs[2], l1("bus", ["bus"]), rtol=1e-12)
    np.testing.assert_allclose(probs[3], l1("snail", ["bus", "snail"]), rtol=1e-12)


def test_alternatives_that_differ_in_spelling_only_count_once() -> None:
    rows = {**L0, "JET": [0.1, 0.1, 0.8], "Jet": [0.0, 0.2, 0.8]}
    listener = RSAListener(Table(rows), {SPEED: ["bus", "JET", "bus ", "Jet", "Bus", "snail"]})
    probs = listener.listen([(SPEED, "jet")])
    np.testing.assert_allclose(probs, [l1("jet", list(L0))], rtol=1e-12)  # in its own spelling
    others = [L0["snail"], L0["bus"], rows["JET"], [1 / 3] * 3]
    own = [L0["bus"][t] / sum(row[t] for row in others) for t in range(3)]
    np.testing.assert_allclose(
        listener.listen([(SPEED, "bus")])[0], np.array(own) / sum(own), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 2.5}, l1("bus", list(L0), alpha=2.5)),
        ({"null": False}, l1("bus", list(L0), null=False)),
        ({"state_prior": [0.2, 0.3, 0.5]}, l1("bus", list(L0), prior=[0.2, 0.3, 0.5])),
        ({"depth": 0}, L0["bus"]),
    ],
)
def test_every_setting_of_l1_counts(options: dict, expected: list[float]) -> None:
    listener = RSAListener(Table(L0), {SPEED: list(L0)}, **options)
    np.testing.assert_allclose(listener.listen([(SPEED, "bus")])[0], expected, rtol=1e-12)


def test_depth_2_reasons_about_l1() -> None:
    rows = np.array([*(l1(clue, list(L0)) for clue in L0), l1_null()])
    own = rows / rows.sum(0)
    expected = own[1] / own[1].sum()
    listener = RSAListener(Table(L0), {SPEED: list(L0)}, depth=2)
    np.testing.assert_allclose(listener.listen([(SPEED, "bus")])[0], expected, rtol=1e-12)


def l1_null() -> list[float]:
    own = [(1 / 3) / (sum(row[t] for row in L0.values()) + 1 / 3) for t in range(3)]
    return [s / sum(own) for s in own]


def test_without_alternatives_a_clue_says_nothing_but_the_prior() -> None:
    alone = {SPEED: []}
    rows = {"bus": [0.2, 0.6, 0.2]}
    listener = RSAListener(Table(rows), alone, null=False, state_prior=[0.2, 0.3, 0.5])
    np.testing.assert_allclose(listener.listen([(SPEED, "bus")]), [[0.2, 0.3, 0.5]], rtol=1e-12)
    flatter = RSAListener(Table(rows), alone).listen([(SPEED, "bus")])[0]  # with the null one
    assert flatter.max() < 0.6


def test_a_speaker_is_asked_for_every_target_once_per_scale_and_seed() -> None:
    base = Fixed({"snail": 2, "jet": 1})
    literal = Table(L0)
    listener = RSAListener(literal, base)
    first = listener.listen([(SPEED, "bus"), (SPEED, "jet")], seed=3)
    np.testing.assert_allclose(first[0], l1("bus", list(L0)), rtol=1e-12)
    np.testing.assert_allclose(first[1], l1("jet", ["snail", "jet"]), rtol=1e-12)
    assert base.asked == [([(SPEED, 0.0), (SPEED, 50.0), (SPEED, 100.0)], 3)]
    np.testing.assert_array_equal(listener.listen([(SPEED, "bus")], seed=3), first[:1])
    assert len(base.asked) == 1
    listener.listen([(SPEED, "bus")], seed=4)
    assert [seed for _, seed in base.asked] == [3, 4]
    alternatives = [(SPEED, "snail"), (SPEED, "jet")]
    assert literal.calls == [alternatives, [(SPEED, "bus")], [(SPEED, "bus")],
                             alternatives, [(SPEED, "bus")]]  # fmt: skip


def test_clues_the_speaker_would_not_say_are_no_alternatives() -> None:
    base = Fixed({"snail": 1, "jet": 1}, probs=[1.0, 0.0])
    probs = RSAListener(Table(L0), base).listen([(SPEED, "bus")])
    np.testing.assert_allclose(probs, [l1("bus", ["bus", "snail"])], rtol=1e-12)


def test_answers_do_not_depend_on_the_scales_that_came_before() -> None:
    world = World.make(0, clues=3)
    model = world.train(steps=0, lines=10)

    def fresh() -> RSAListener:
        return RSAListener(
            world.judge(),
            SamplingSpeaker(model, FirstWord(world), rules=None, num_candidates=2, max_tokens=1),
        )

    first, second = world.questions()[0], world.questions()[4]
    listener = fresh()
    both = listener.listen([first, second], seed=1)
    np.testing.assert_array_equal(fresh().listen([second], seed=1), both[1:])
    np.testing.assert_array_equal(listener.listen([second, first], seed=1), both[::-1])


class FirstWord(ToyPrompts):
    """Takes any reply for one of the scale's clues."""

    def __init__(self, world: World) -> None:
        self.clues = [clue for _, clue in world.questions()]

    def read_clue(self, text: str, *, cot: bool = False) -> str | None:
        return self.clues[sum(text.encode()) % len(self.clues)]


def test_missing_and_malformed_alternatives_are_refused() -> None:
    listener = RSAListener(Table(L0, HEAT), {SPEED: "bus"})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"no alternatives for the scale Hot .. Cold; .* 1 scales"):
        listener.listen([(HEAT, "bus")])
    with pytest.raises(UserError, match="must be a list of clues, not 'bus'"):
        listener.listen([(SPEED, "bus")])
    with pytest.raises(UserError, match="is blank"):
        RSAListener(Table(L0), {SPEED: [" "]}).listen([(SPEED, "bus")])
    with pytest.raises(UserError, match="alpha must be"):
        RSAListener(Table(L0), {}, alpha=-1)
    with pytest.raises(UserError, match="depth must be"):
        RSAListener(Table(L0), {}, depth=-1)
    with pytest.raises(UserError, match="state_prior has the shape"):
        RSAListener(Table(L0), {SPEED: []}, state_prior=[1, 2]).listen([(SPEED, "bus")])


def test_an_rsa_listener_describes_all_who_take_part() -> None:
    listener = RSAListener(Table(L0), Fixed(COUNTS), state_prior=[1, 1, 2], null=False)
    described = json.loads(json.dumps(listener.describe(), allow_nan=False))
    assert described["alternatives"] == Fixed(COUNTS).describe()
    assert described["listener"] == Table(L0).describe()
    assert described["state_prior"] == [1, 1, 2]
    assert described["null"] is False
    one, other = (
        RSAListener(Table(L0), {SPEED: [clue]}).describe()["alternatives"] for clue in ("a", "b")
    )
    assert one["hash"] != other["hash"]


# --------------------------------------------------------------------------------------------------
# Whole games with real models


class AnyText(WavelengthPrompts):
    """The real prompts, cut short, with replies that can always be read."""

    answer_stop = clue_stop = ()

    def _prompt(self, name: str, scale: Scale, cot: bool, **fields: object) -> Prompt:
        prompt = super()._prompt(name, scale, cot, **fields)
        if isinstance(prompt, str):
            return prompt[-80:]
        return [{**message, "content": message["content"][-120:]} for message in prompt]

    def read_answer(self, text: str, *, cot: bool = False) -> float | None:
        return sum(text.encode()) % 101

    def read_clue(self, text: str, *, cot: bool = False) -> str | None:
        return f"thing {'abcdefg'[sum(text.encode()) % 7]}"


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("kind", ["logprob", "samples"])
def test_the_whole_chain_runs_on_a_real_model_and_repeats_itself(chat: bool, kind: str) -> None:
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}:"
    network = tiny_llama(len(tokenizer), layers=1, hidden=32, heads=2, initializer_range=0.2)
    model = TransformersModel(network, tokenizer)
    prompts = AnyText(style="chat" if chat else "plain")

    def chain() -> tuple[RSASpeaker, RSAListener]:
        listener: Listener = LogprobListener(model, prompts, step=50)
        if kind == "samples":
            listener = SamplingListener(model, prompts, step=50, num_samples=3, max_tokens=3)
        speaker = SamplingSpeaker(model, prompts, num_candidates=4, max_tokens=3)
        return RSASpeaker(speaker, listener, alpha=2), RSAListener(listener, speaker)

    def play(seed: int) -> tuple[str, bytes]:
        speaker, listener = chain()
        said = speaker.speak(SPEED, 50, seed=seed)
        assert said.candidates.listener is not None
        heard = listener.listen([(SPEED, said.clue), (HEAT, "tea")], seed=seed)
        assert heard.shape == (2, 3)
        json.dumps([speaker.describe(), listener.describe(), said.candidates.to_dict()])
        return said.clue, heard.tobytes()

    assert play(0) == play(0)
    assert len({play(seed) for seed in range(4)}) > 1


def test_pragmatic_clues_are_understood_better_by_the_exact_judge() -> None:
    """The claim in small: S1 over the corpus's own speaker beats that speaker."""
    world = World.make(0)
    exact = world.speaker()

    class Corpus(Fixed):
        def _propose(self, tasks: list[Task], seed: int) -> list[Candidates]:
            found = []
            for scale, target in tasks:
                s = world.scales.index(scale)
                p = exact[s, int(target / 5)]
                found.append(Candidates(world.clues[s], np.ones(len(p), int), p, p, None,
                                        ((),) * len(p), 0))  # fmt: skip
            return found

    judge = world.judge()
    tasks = world.tasks(held_out=True)
    errors = []
    for candidates, (scale, target) in zip(
        RSASpeaker(Corpus({}), judge, alpha=4).propose(tasks), tasks, strict=True
    ):
        means = judge.listen([(scale, clue) for clue in candidates.clues]) @ grid(5)
        gap = np.abs(means - target)
        errors.append((candidates.prior @ gap, candidates.probs @ gap))
    direct, pragmatic = np.mean(errors, axis=0)
    assert pragmatic < 0.6 * direct
