import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcr import scoring
from rlcr.reference import naive_expected_reward, naive_margin, naive_rlcr_reward
from rlcr.scoring import BetaFamily, Brier, ClippedLog, RankedBins, ScoringRule, Spherical
from tenfold_common.errors import UserError

RULES: list[ScoringRule] = [
    Brier(),
    Spherical(),
    ClippedLog(),
    ClippedLog(eps=0.2),
    ClippedLog(scaled=False),
    BetaFamily(),
    BetaFamily(a=3.0, b=1.0),
    BetaFamily(a=0.5, b=0.5),
    BetaFamily(a=7.5, b=2.25),
    RankedBins(),
    RankedBins(bins=2),
    RankedBins(bins=6),
]
IDS = [repr(rule) for rule in RULES]


def as_function(rule: ScoringRule) -> Callable[[float, int], float]:
    return lambda q, c: float(rule.score(q, c))


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_the_honest_confidence_scores_best(rule: ScoringRule) -> None:
    grid = np.linspace(0.0, 1.0, 1001)
    right, wrong = rule._scores(grid)  # float64: near p the expected score is flat
    for p in np.linspace(0.0, 1.0, 101):
        expected = p * right + (1.0 - p) * wrong
        best = grid[expected >= expected.max() - 1e-12]
        at_p = expected[np.argmin(np.abs(grid - p))]
        assert at_p == pytest.approx(expected.max(), abs=1e-12)
        if isinstance(rule, RankedBins):
            levels = np.floor(best * (rule.bins - 1) + 0.5) / (rule.bins - 1)
            assert np.abs(levels - p).max() <= 0.5 / (rule.bins - 1) + 0.0011
        elif isinstance(rule, ClippedLog):
            inside = np.clip(best, rule.eps, 1 - rule.eps)
            assert np.abs(inside - np.clip(p, rule.eps, 1 - rule.eps)).max() <= 0.0011
        elif 0.2 <= p <= 0.95:  # a large a or b makes the ends flat
            assert np.abs(best - p).max() <= 0.0011


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_margin_is_that_of_the_definition(rule: ScoringRule, weight: float) -> None:
    expected = naive_margin(as_function(rule), weight, points=101)
    assert rule.margin(weight) == pytest.approx(expected, abs=1e-6)
    assert rule.margin(weight, 1.75) == pytest.approx(expected + 0.75, abs=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_largest_weight_leaves_a_margin_of_zero(rule: ScoringRule) -> None:
    for correctness in (1.0, 0.5, 3.0):
        weight = rule.max_weight(correctness)
        assert rule.margin(weight, correctness) == pytest.approx(0.0, abs=1e-12)
        assert rule.margin(1.01 * weight, correctness) < 0.0


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_least_score_is_zero_and_bounds_are_reached(rule: ScoringRule) -> None:
    grid = np.linspace(0.0, 1.0, 1001)
    scores = np.concatenate([rule.score(grid, 0), rule.score(grid, 1)])
    low, high = rule.bounds()
    assert low == pytest.approx(0.0, abs=1e-12)
    assert (scores.min(), scores.max()) == (pytest.approx(low, abs=1e-7), pytest.approx(high))


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_margin_of_zero_or_more_pays_the_likelier_answer_more(rule: ScoringRule) -> None:
    weight = rule.max_weight()
    values = [naive_expected_reward(p, p, as_function(rule), weight) for p in np.linspace(0, 1, 41)]
    assert np.diff(values).min() >= -1e-6


def test_unscaled_clipped_log_pays_a_hopeless_answer_more_than_a_fair_one() -> None:
    rule = ClippedLog(eps=0.05, scaled=False)
    assert rule.margin(1.0) == pytest.approx(1.0 - math.log(19.0))
    assert rule.margin(1.0) == pytest.approx(-1.94, abs=0.005)
    assert rule.max_weight() == pytest.approx(1.0 / math.log(19.0))
    hopeless = naive_expected_reward(0.0, 0.0, as_function(rule), 1.0)
    fair = naive_expected_reward(0.5, 0.5, as_function(rule), 1.0)
    shift = math.log(0.05)  # the score starts at 0 instead of ln eps
    assert hopeless + shift == pytest.approx(-0.05, abs=0.002)
    assert fair + shift == pytest.approx(-0.19, abs=0.005)
    assert ClippedLog(eps=0.05).margin(1.0) == pytest.approx(0.0, abs=1e-12)


def test_brier_is_the_papers_reward_plus_one() -> None:
    for q in (0.0, 0.3, 0.5, 1.0):
        for c in (0, 1):
            assert c + float(Brier().score(q, c)) == pytest.approx(naive_rlcr_reward(c, q) + 1.0)
    assert Brier().score([0.0, 1.0, 0.25], [0, 0, 1]).tolist() == [1.0, 0.0, 0.4375]
    assert Brier().margin(1.0) == 0.0
    assert Brier().margin(1.0, correctness_weight=1.5) == 0.5
    assert Brier().margin(-1.0) == 0.0  # the worst is then at q = 1


def test_spherical_by_hand() -> None:
    assert float(Spherical().score(0.6, 1)) == pytest.approx(0.6 / math.sqrt(0.52))
    assert float(Spherical().score(0.6, 0)) == pytest.approx(0.4 / math.sqrt(0.52))


def test_clipped_log_by_hand() -> None:
    assert float(ClippedLog(0.1, scaled=False).score(0.5, 1)) == pytest.approx(math.log(5.0))
    assert float(ClippedLog(0.1).score(0.5, 0)) == pytest.approx(math.log(5.0) / math.log(9.0))
    assert float(ClippedLog(0.1).score(0.03, 1)) == 0.0


def test_ranked_bins_average_the_thresholds() -> None:
    levels = 5
    thresholds = [(j + 0.5) / (levels - 1) for j in range(levels - 1)]
    for k in range(levels):
        v = k / (levels - 1)
        missed = sum(1 - t for t in thresholds if v < t)
        alarmed = sum(t for t in thresholds if v > t)
        for nearby in (v - 0.1, v, v + 0.1):
            q = min(max(nearby, 0.0), 1.0)
            scores = RankedBins(bins=levels).score(q, [1, 0])
            assert scores[0] == pytest.approx(1 - 2 * missed / (levels - 1))
            assert scores[1] == pytest.approx(1 - 2 * alarmed / (levels - 1))
    tenths = np.arange(11) / 10
    assert RankedBins().score(tenths, 1) == pytest.approx(Brier().score(tenths, 1))


def midpoint(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """Integrate over [low, high] after t = (1 - cos u) / 2, which tames the ends of [0, 1]."""
    start, end = math.acos(1 - 2 * low), math.acos(1 - 2 * high)
    u = start + (end - start) * (np.arange(200_000) + 0.5) / 200_000
    t = np.clip((1 - np.cos(u)) / 2, 1e-300, 1 - 1e-16)
    return float((function(t) * np.sin(u) / 2).mean() * (end - start))


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 1), (1.5, 3.25), (0.5, 0.75), (10, 4), (40, 60)])
def test_beta_family_against_its_integrals(a: float, b: float) -> None:
    def missed(t: np.ndarray) -> np.ndarray:
        return t ** (a - 1) * (1 - t) ** b

    def alarmed(t: np.ndarray) -> np.ndarray:
        return t**a * (1 - t) ** (b - 1)

    largest = max(midpoint(missed, 0, 1), midpoint(alarmed, 0, 1))
    for q in (0.0, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0):
        right, wrong = BetaFamily(a, b)._scores(np.array([q]))
        assert right[0] == pytest.approx(1 - midpoint(missed, q, 1) / largest, abs=1e-8)
        assert wrong[0] == pytest.approx(1 - midpoint(alarmed, 0, q) / largest, abs=1e-8)


@settings(max_examples=150, deadline=None)
@given(st.floats(0.01, 101), st.floats(0.01, 101), st.floats(0, 1))
def test_incomplete_beta_against_scipy(a: float, b: float, x: float) -> None:
    special = pytest.importorskip("scipy.special")
    ours = scoring._incomplete_beta(a, b, np.array([x]))[0]
    assert ours == pytest.approx(special.betainc(a, b, x), abs=1e-11)


def test_beta_one_one_is_brier_and_symmetry_swaps_the_outcomes() -> None:
    q = np.linspace(0, 1, 21)
    assert BetaFamily()._scores(q)[0] == pytest.approx(Brier()._scores(q)[0], abs=1e-12)
    assert BetaFamily()._scores(q)[1] == pytest.approx(Brier()._scores(q)[1], abs=1e-12)
    there, back = BetaFamily(2.5, 0.7)._scores(q), BetaFamily(0.7, 2.5)._scores(1 - q)
    assert there[0] == pytest.approx(back[1], abs=1e-12)


def test_scores_are_float32_of_the_broadcast_shape() -> None:
    scores = Brier().score(np.full((3, 1), 0.5), np.array([0, 1]))
    assert scores.dtype == np.float32
    assert scores.shape == (3, 2)
    assert Brier().score(0.5, True).shape == ()


def test_partial_correctness_interpolates() -> None:
    for rule in RULES:
        half = 0.5 * float(rule.score(0.3, 0)) + 0.5 * float(rule.score(0.3, 1))
        assert float(rule.score(0.3, 0.5)) == pytest.approx(half)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        (1.2, 1, "confidence must be between 0 and 1, not 1.2"),
        ([0.5, math.nan], 1, "confidence must be between 0 and 1, not nan"),
        (0.5, [1, -1], "correct must be between 0 and 1, not -1"),
        ("high", 1, "confidence must be numbers, not 'high'"),
        (80, 1, "not 80"),
    ],
)
def test_values_outside_are_refused(confidence: object, correct: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Brier().score(confidence, correct)  # pyright: ignore[reportArgumentType]


def test_rules_by_name() -> None:
    assert scoring.scoring_rule("brier") == Brier()
    assert scoring.scoring_rule("spherical") == Spherical()
    assert scoring.scoring_rule("log", eps=0.1, scaled=False) == ClippedLog(0.1, False)
    assert scoring.scoring_rule("beta", a=2, b=3) == BetaFamily(2, 3)
    assert scoring.scoring_rule("bins", bins=5) == RankedBins(5)
    assert scoring.scoring_rule(Spherical()) == Spherical()
    for rule in RULES:
        assert type(scoring.scoring_rule(rule.name)) is type(rule)


@pytest.mark.parametrize(
    ("spec", "parameters", "message"),
    [
        ("breir", {}, "not 'breir'. Did you mean 'brier'"),
        ("log", {"epsi": 0.1}, "Did you mean 'eps'"),
        ("brier", {"eps": 0.1}, "takes no parameters"),
        (Brier(), {"eps": 0.1}, "is made already"),
        ("log", {"eps": 0.5}, "eps must be between 0 and 0.5"),
        ("log", {"eps": math.nan}, "eps must be between"),
        ("beta", {"a": 0.0}, "a must be between 0.01 and 100"),
        ("bins", {"bins": 1}, "at least 2"),
        ("bins", {"bins": 2.5}, "whole number"),
    ],
)
def test_unknown_rules_and_parameters_are_refused(
    spec: str, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        scoring.scoring_rule(spec, **parameters)
