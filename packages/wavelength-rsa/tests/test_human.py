import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from tenfold_common.errors import UserError
from wavelength_rsa.data import Item, load_items, random_halves
from wavelength_rsa.human import METRICS, human_rsa
from wavelength_rsa.scales import Distribution, Scale, grid

HOT, FAST = Scale("Cold", "Hot"), Scale("Slow", "Fast")
ITEMS = [
    Item(HOT, "soup", 70, (60, 70, 75, 80, 90)),
    Item(HOT, "tea", 85, (70, 75, 85, 90, 100)),
    Item(HOT, "ice", 0, (0, 0, 5, 10, 40)),
    Item(FAST, "bicycle", 30, (20, 35, 35, 50, 55)),
]


def naive(items, alpha, splits, seed, smoothing, others=True):
    """Follow the equations one probability at a time; alpha None is L0."""
    positions = grid(5)
    n = len(positions)
    halves = random_halves(items, splits, seed)
    sums = [dict.fromkeys(METRICS, 0.0) for _ in items]
    for first, second in zip(*halves, strict=True):
        literal = [[(c + smoothing) / (sum(row) + n * smoothing) for c in row] for row in first]
        for k, item in enumerate(items):
            heard = literal[k]
            if alpha is not None:
                game = [
                    literal[i]
                    for i, other in enumerate(items)
                    if i == k or (others and other.scale == item.scale and other.clue != item.clue)
                ]
                game.append([1 / n] * n)
                speaker = [heard[t] ** alpha / sum(u[t] ** alpha for u in game) for t in range(n)]
                heard = [s / sum(speaker) for s in speaker]
            d = Distribution(positions, heard)
            people = second[k] / second[k].sum()
            for name, value in {
                "mean_error": abs(d.mean - item.target),
                "expected_distance": d.expected_distance(item.target),
                "crps": d.crps(item.target),
                "entropy": d.entropy,
                "w1": wasserstein_distance(positions, positions, heard, people),
                "log_likelihood": sum(
                    p * math.log(q) for p, q in zip(people, heard, strict=True) if p
                ),
            }.items():
                sums[k][name] += value / splits
    return {name: np.mean([s[name] for s in sums]) for name in METRICS}


def values(row):
    return {name: row[name]["value"] for name in METRICS}


@pytest.mark.parametrize("smoothing", [None, 0.3])
def test_equal_the_equations_followed_one_by_one(smoothing):
    found: Any = human_rsa(
        ITEMS, alphas=(0.5, 1, 4), splits=3, seed=5, smoothing=smoothing, resamples=10
    )
    eps = 0.5 / 21 if smoothing is None else smoothing
    assert found["smoothing"] == eps
    literal = naive(ITEMS, None, 3, 5, eps)
    assert values(found["literal"]) == pytest.approx(literal)
    assert [row["alpha"] for row in found["pragmatic"]] == [0.5, 1, 4]
    for row in found["pragmatic"]:
        pragmatic = naive(ITEMS, row["alpha"], 3, 5, eps)
        alone = naive(ITEMS, row["alpha"], 3, 5, eps, others=False)
        assert values(row) == pytest.approx(pragmatic)
        for name in METRICS:
            gain, contrast = (row[key][name]["value"] for key in ("difference", "contrast"))
            assert gain == pytest.approx(pragmatic[name] - literal[name], abs=1e-9)
            assert contrast == pytest.approx(pragmatic[name] - alone[name], abs=1e-9)


def test_without_another_clue_there_is_no_contrast():
    found = human_rsa([ITEMS[0], ITEMS[3]], alphas=(1,), splits=2, resamples=10)
    row = found["pragmatic"][0]
    assert all(row["contrast"][name]["value"] == 0 for name in METRICS)
    assert row["difference"]["entropy"]["value"] > 0  # the null utterance alone flattens


def test_a_clue_given_twice_is_considered_once():
    again = Item(HOT, " soup ", 65, (50, 55, 65, 70, 80))
    twice = human_rsa([ITEMS[0], again], alphas=(2,), splits=2, resamples=10)
    assert all(cell["value"] == 0 for cell in twice["pragmatic"][0]["contrast"].values())


def test_no_rationality_leaves_the_prior():
    found = human_rsa(ITEMS, alphas=(0,), splits=2, resamples=10)
    assert found["pragmatic"][0]["entropy"]["value"] == pytest.approx(math.log(21))


def test_differences_are_paired_and_intervals_by_concept_pair():
    found = human_rsa(ITEMS, alphas=(1,), splits=2, resamples=500)
    assert (found["items"], found["clusters"]) == (4, 2)
    gain = found["pragmatic"][0]["difference"]["entropy"]
    assert gain["low"] < gain["value"] < gain["high"]
    # Of two clusters a resample may hold one alone: its mean is a bound of the interval.
    alone = human_rsa(ITEMS[:3], alphas=(1,), splits=2, resamples=500)["pragmatic"][0]
    one = alone["difference"]["entropy"]
    assert one["low"] is None  # one scale, no interval
    assert min(abs(one["value"] - gain[end]) for end in ("low", "high")) < 1e-9


def test_it_is_json_and_repeats():
    run = lambda seed: human_rsa(ITEMS, alphas=(1,), splits=2, seed=seed, resamples=20)  # noqa: E731
    found = run(1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert run(1) == found
    assert run(2)["literal"] != found["literal"]


def test_without_smoothing_the_likelihood_may_be_nothing():
    found = human_rsa(ITEMS, alphas=(1,), splits=2, smoothing=0, resamples=20)
    assert found["literal"]["log_likelihood"]["value"] is None
    row = found["pragmatic"][0]
    assert row["difference"]["log_likelihood"]["value"] is None
    assert row["difference"]["mean_error"]["value"] is not None
    assert json.dumps(found, allow_nan=False)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="there are no items"):
        human_rsa([])
    with pytest.raises(UserError, match="has no human responses"):
        human_rsa([Item(HOT, "tea", 80)])
    with pytest.raises(UserError, match="not a position of the grid"):
        human_rsa([Item(HOT, "tea", 81, (70, 90))])
    for settings, message in (
        ({"smoothing": -1}, "smoothing must be a finite number >= 0, not -1"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"alphas": (-1,)}, "alpha"),
        ({"step": 3}, "step must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            human_rsa(ITEMS, **settings)


@pytest.fixture(scope="module")
def real(data_folder):
    return human_rsa(load_items(data_folder / "wavelength" / "data.csv"), resamples=2000)


@pytest.mark.realdata
def test_at_alpha_1_rsa_makes_human_listeners_worse(real):
    """The null utterance flattens: guesses lie further from targets and from people's."""
    row = real["pragmatic"][1]
    assert row["alpha"] == 1
    gain = row["difference"]
    assert gain["mean_error"]["low"] > 0
    assert gain["expected_distance"]["low"] > 1
    assert gain["w1"]["low"] > 0.5
    assert gain["entropy"]["low"] > 0.1


@pytest.mark.realdata
def test_at_alpha_2_rsa_changes_errors_by_less_than_can_be_seen(real):
    gain = real["pragmatic"][2]["difference"]
    assert real["pragmatic"][2]["alpha"] == 2
    for name in ("mean_error", "expected_distance", "crps"):
        assert gain[name]["low"] < 0 < gain[name]["high"]
    assert gain["log_likelihood"]["high"] < 0
    assert gain["w1"]["low"] > 0


@pytest.mark.realdata
def test_large_alphas_come_nearer_to_targets_and_leave_people(real):
    for row in real["pragmatic"][3:]:
        assert row["difference"]["mean_error"]["high"] < 0
        assert row["difference"]["log_likelihood"]["high"] < -1
        assert row["difference"]["w1"]["low"] > 0


@pytest.mark.realdata
def test_the_other_clue_of_a_pair_helps_at_every_alpha(real):
    """Held against the null utterance alone, the other clue brings guesses nearer to targets."""
    for row in real["pragmatic"]:
        assert row["contrast"]["mean_error"]["high"] < -0.5
        assert row["contrast"]["crps"]["high"] < -0.2


@pytest.mark.realdata
def test_the_literal_listener_of_twenty_people(real):
    found = values(real["literal"])
    assert found["mean_error"] == pytest.approx(7.72, abs=0.15)
    assert found["w1"] == pytest.approx(6.41, abs=0.15)
    assert found["log_likelihood"] == pytest.approx(-2.71, abs=0.03)
