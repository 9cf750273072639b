import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from tenfold_common.errors import UserError
from wavelength_rsa.scales import (
    HIGH,
    LOW,
    STEPS,
    Distribution,
    Scale,
    check_position,
    fold,
    grid,
    grid_index,
    project,
    tidy,
)

steps = st.sampled_from(STEPS)
samples = st.lists(st.one_of(st.integers(0, 100), st.floats(0, 100)), min_size=1, max_size=30)


def random_distribution(seed, step=5, zeros=False):
    rng = np.random.default_rng(seed)
    p = rng.random(100 // step + 1)
    if zeros:
        p *= rng.random(len(p)) < 0.5
        p[rng.integers(len(p))] = 1.0
    return Distribution(grid(step), p / p.sum())


# --- Scale


def test_a_scale_reads_as_its_ends():
    assert str(Scale("Slow", "Fast")) == "Slow .. Fast"
    assert Scale("Slow", "Fast") == Scale("Slow", "Fast") != Scale("Fast", "Slow")
    assert len({Scale("Slow", "Fast"), Scale("Slow", "Fast")}) == 1


@pytest.mark.parametrize(("left", "right"), [("", "Fast"), ("Slow", " \t"), ("Slow", None), (3, 4)])
def test_an_end_must_be_words(left, right):
    with pytest.raises(UserError, match="it must be a word or a phrase"):
        Scale(left, right)


@pytest.mark.parametrize(
    ("left", "right"), [("Hot", "Hot"), ("hot ", "HOT"), ("CAFE\u0301", "café"), ("ß", "SS")]
)
def test_the_ends_must_differ_whatever_their_form(left, right):
    with pytest.raises(UserError, match="they must differ"):
        Scale(left, right)


def test_an_end_keeps_its_bytes():
    assert Scale(" cafe\u0301", "Tea").left == " cafe\u0301"


@given(st.text())
def test_folding_twice_is_folding_once(text):
    assert fold(fold(text)) == fold(text)
    assert tidy(tidy(text)) == tidy(text)


def test_texts_are_the_same_up_to_case_form_and_white_space():
    assert fold("race car") == fold("Race  car ")
    assert fold("café") == fold("CAFE\u0301")
    assert fold("Straße") == fold("STRASSE")
    assert fold("race car") != fold("racecar")
    assert fold("cafe") != fold("café")
    assert tidy(" Race \t car\n") == "Race car"
    assert tidy("CAFE\u0301") == "CAFÉ"


# --- the grid


@pytest.mark.parametrize("step", STEPS)
def test_the_grid_runs_from_end_to_end(step):
    positions = grid(step)
    assert positions.dtype == np.float64
    assert positions.tolist() == [i * step for i in range(100 // step + 1)]
    assert (positions[0], positions[-1]) == (LOW, HIGH)
    assert [grid_index(t, step) for t in positions] == list(range(len(positions)))


@pytest.mark.parametrize("step", [0, 3, -5, 7, 100, 2.5, 5.0, "5", None, True, math.nan])
def test_a_step_that_does_not_fit_is_named_with_those_that_do(step):
    message = f"step must be one of 1, 2, 4, 5, 10, 20, 25, 50, not {step!r}"
    for use in (grid, lambda s: grid_index(50, s), lambda s: project([50], s)):
        with pytest.raises(UserError, match=re.escape(message)):
            use(step)


def test_numpy_integers_are_steps_and_positions():
    assert len(grid(np.int64(5))) == 21
    assert grid_index(np.int64(45)) == grid_index(np.float32(45)) == 9


def test_a_target_off_the_grid_is_refused_with_its_remedy():
    with pytest.raises(
        UserError, match=r"^target 47 is not a multiple of step 5; use step 1 \(--step 1\)"
    ):
        grid_index(47)


@pytest.mark.parametrize("target", [-1, 100.5, math.nan, math.inf, "50", None, True])
def test_a_target_must_be_a_number_in_range(target):
    for snap in (None, "nearest"):
        with pytest.raises(UserError, match=f"from 0 to 100, not {re.escape(repr(target))}"):
            grid_index(target, snap=snap)
    with pytest.raises(UserError, match=r"^place must be"):
        check_position(target, "place")


def test_snapping_goes_to_the_nearest_and_upwards_from_the_middle():
    assert [grid_index(t, snap="nearest") for t in (47, 47.5, 48, 2.4, 2.5, 99, 0)] == [
        *(9, 10, 10, 0, 1, 20, 0)
    ]
    with pytest.raises(UserError, match="snap must be 'nearest' or None, not 'up'"):
        grid_index(47, snap="up")


@given(st.floats(0, 100), steps)
def test_snapping_never_moves_further_than_half_a_step(target, step):
    assert abs(grid(step)[grid_index(target, step, snap="nearest")] - target) <= step / 2


# --- projecting samples


def test_a_sample_is_split_between_its_neighbours():
    counts = project([47, 100, 0, 5])
    expected = np.zeros(21)
    expected[[9, 10]] = 0.6, 0.4
    expected[[0, 1, 20]] = 1.0
    np.testing.assert_allclose(counts, expected, atol=1e-12)


@given(samples, steps)
def test_projection_keeps_number_and_mean_and_reaches_the_neighbours_only(values, step):
    counts = project(values, step)
    expected = [Fraction(0)] * (100 // step + 1)
    for value in map(Fraction, values):
        for i in range(len(expected)):
            expected[i] += max(0, 1 - abs(value - i * step) / step)
    assert (counts >= 0).all()
    np.testing.assert_allclose(counts, [float(c) for c in expected], atol=1e-10)
    assert counts.sum() == pytest.approx(len(values))
    assert counts @ grid(step) == pytest.approx(sum(values), abs=1e-8)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_samples_on_the_grid_are_counted_exactly(cells):
    counts = project([5 * c for c in cells])
    assert counts.tolist() == [cells.count(i) for i in range(21)]


@pytest.mark.parametrize("bad", [-0.001, 100.001, math.nan, math.inf])
def test_samples_out_of_range_are_refused_not_clipped(bad):
    with pytest.raises(UserError, match=rf"sample 1 is {bad:g}; samples must lie from 0 to 100"):
        project([50, bad, -3])


def test_samples_must_be_a_list_of_numbers():
    with pytest.raises(UserError, match="must be numbers"):
        project(["many"])
    with pytest.raises(UserError, match=r"not of shape \[1, 2\]"):
        project([[1, 2]])
    assert project([]).tolist() == [0] * 21


# --- Distribution


def test_hand_worked_numbers():
    d = Distribution(grid(50), [0.25, 0.5, 0.25])
    assert d.mean == 50
    assert d.sd == pytest.approx(math.sqrt(1250))
    assert d.entropy == pytest.approx(1.5 * math.log(2))
    assert (d.argmax, d.tied) == (50, False)
    assert d.expected_distance(50) == 25
    assert d.expected_distance(60) == pytest.approx(0.25 * 60 + 0.5 * 10 + 0.25 * 40)
    # F is 1/4 then 3/4: 50 / 16 on either side of the target 50.
    assert d.crps(50) == pytest.approx(100 / 16)
    # Target 0: (F - 1)^2 = 9/16 and 1/16.
    assert d.crps(0) == pytest.approx(50 * 10 / 16)
    assert d.neg_log_prob(0) == pytest.approx(math.log(4))


def test_distances_worked_by_hand():
    p, q = Distribution(grid(50), [1, 0, 0]), Distribution(grid(50), [0, 0.5, 0.5])
    assert p.w1(q) == q.w1(p) == 75
    assert p.js(q) == pytest.approx(math.log(2))
    assert p.tv(q) == 1
    assert p.w1(p) == p.js(p) == p.tv(p) == 0


@pytest.mark.parametrize("seed", range(12))
def test_distances_equal_scipy(seed):
    p, q = random_distribution(seed, zeros=seed % 2 == 0), random_distribution(seed + 99)
    close = pytest.approx
    assert p.w1(q) == close(wasserstein_distance(p.grid, q.grid, p.probs, q.probs), abs=1e-9)
    assert p.js(q) == close(jensenshannon(p.probs, q.probs) ** 2, abs=1e-12)
    assert p.tv(q) == close(max((p.probs - q.probs)[p.probs > q.probs].sum(), 0), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0, 100, 35, 47.3, 2])
def test_crps_is_the_integral_of_the_squared_gap(seed, target):
    d = random_distribution(seed, zeros=seed % 2 == 0)
    edges = sorted({*d.grid.tolist(), float(target)})
    area = 0.0
    for left, right in pairwise(edges):
        below = d.probs[d.grid <= left].sum() - (left >= target)
        area += (right - left) * below**2
    assert d.crps(target) == pytest.approx(area, abs=1e-10)


@given(samples, st.integers(0, 100))
def test_crps_lies_between_nothing_and_the_expected_distance(values, target):
    d = Distribution.from_samples(values)
    assert -1e-10 <= d.crps(target) <= d.expected_distance(target) + 1e-10
    assert abs(d.mean - target) <= d.expected_distance(target) + 1e-10
    assert d.mean == pytest.approx(np.mean(values), abs=1e-9)


def test_crps_is_proper_and_the_expected_distance_is_not():
    truth = random_distribution(3)
    score = lambda d, name: truth.probs @ [getattr(d, name)(t) for t in truth.grid]  # noqa: E731
    median = Distribution.point(truth.quantile(0.5))
    for seed in range(20):
        assert score(truth, "crps") < score(random_distribution(seed + 50), "crps")
    assert score(truth, "crps") < score(median, "crps")
    assert score(median, "expected_distance") < score(truth, "expected_distance")


def test_a_point_is_certain():
    d = Distribution.point(35)
    assert (d.mean, d.sd, d.entropy, d.argmax, d.tied) == (35, 0, 0, 35, False)
    assert (d.crps(35), d.crps(60), d.expected_distance(60)) == (0, 25, 25)
    assert (d.neg_log_prob(35), d.neg_log_prob(40)) == (0, math.inf)
    with pytest.raises(UserError, match="not a multiple of step 5"):
        Distribution.point(36)


def test_the_uniform_one_knows_nothing():
    d = Distribution.uniform(step=25)
    assert d.entropy == pytest.approx(math.log(5))
    assert (d.mean, d.argmax, d.tied) == (50, 50, True)


def test_ties_give_their_mean_and_a_flag():
    d = Distribution(grid(25), [0.4, 0.0, 0.2, 0.0, 0.4])
    assert (d.argmax, d.tied) == (50, True)
    # Sums of the same numbers in another order are still a tie; a real difference is none.
    sums = np.array([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.1])
    assert sums[0] != sums[1]
    noisy = Distribution(grid(50), sums / sums.sum())
    assert (noisy.argmax, noisy.tied) == (25, True)
    assert Distribution(grid(50), [0.4001, 0.3999, 0.2]).argmax == 0


def test_quantiles():
    d = Distribution(grid(25), [0.0, 0.3, 0.2, 0.0, 0.5])
    assert [d.quantile(p) for p in (0, 0.1, 0.3, 0.31, 0.5, 0.51, 1)] == [
        *(25, 25, 25, 50, 50, 100, 100)
    ]
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=r"p must be in \[0, 1\]"):
            d.quantile(p)


@given(samples, st.floats(0, 1))
def test_quantiles_of_samples_on_a_fine_grid(values, p):
    values = [float(round(v)) for v in values]
    d = Distribution.from_samples(values, step=1)
    assert d.quantile(p) == sorted(values)[max(math.ceil(p * (1 - 1e-12) * len(values)) - 1, 0)]


def test_smoothing_adds_to_every_cell():
    d = Distribution.from_samples([0, 0, 100], step=50, smoothing=0.5)
    np.testing.assert_allclose(d.probs, np.array([2.5, 0.5, 1.5]) / 4.5)
    assert Distribution.from_samples([], smoothing=1).entropy == pytest.approx(math.log(21))
    with pytest.raises(UserError, match="there are no samples"):
        Distribution.from_samples([])
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(UserError, match="smoothing must be a finite number >= 0"):
            Distribution.from_samples([50], smoothing=bad)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([0.5, 0.6, 0.0], "does not sum to 1.*1.1"),
        ([0.5, math.nan, 0.5], "NaN or infinite"),
        ([-0.5, 1.0, 0.5], "negative"),
        ([0.5, 0.5], r"shape \[2\] but the grid has 3 positions"),
        ([[0.5, 0.5, 0.0]], r"one distribution is \[n\]"),
        (["a", "b", "c"], "must be arrays of numbers"),
        (1.0, r"shape \[\]"),
    ],
)
def test_what_is_no_distribution_is_refused(probs, message):
    with pytest.raises(UserError, match=message):
        Distribution(grid(50), probs)


@pytest.mark.parametrize("bad", [[0, 50, 50], [0, 100, 50], [0, math.nan, 100], [[0, 50, 100]]])
def test_what_is_no_grid_is_refused(bad):
    with pytest.raises(UserError, match="rising positions"):
        Distribution(bad, [0.5, 0.25, 0.25])


def test_small_errors_of_the_sum_are_divided_out():
    d = Distribution(grid(50), [0.25, 0.5, 0.25 + 5e-7])
    assert d.probs.sum() == pytest.approx(1, abs=1e-15)
    with pytest.raises(UserError, match="does not sum to 1"):
        Distribution(grid(50), [0.25, 0.5, 0.25 + 2e-6])


def test_a_distribution_cannot_be_changed_from_outside():
    probs = np.array([0.25, 0.5, 0.25])
    d = Distribution(grid(50), probs)
    probs[0] = 9
    assert d.probs[0] == 0.25
    with pytest.raises(ValueError, match="read-only"):
        d.probs[0] = 1


def test_different_grids_do_not_mix():
    for name in ("w1", "js", "tv"):
        with pytest.raises(UserError, match="5 and 21 positions from different grids"):
            getattr(Distribution.uniform(25), name)(Distribution.uniform(5))


def test_methods_refuse_a_target_out_of_range_or_off_the_grid():
    d = Distribution.uniform()
    for name in ("crps", "expected_distance", "neg_log_prob"):
        with pytest.raises(UserError, match="from 0 to 100, not 101"):
            getattr(d, name)(101)
    with pytest.raises(UserError, match=r"not a position of the grid 0, 5, \.\.\., 100"):
        d.neg_log_prob(47)


@given(samples, steps)
def test_written_and_read_it_is_the_same(values, step):
    d = Distribution.from_samples(values, step, smoothing=0.1)
    again = Distribution.from_dict(d.to_dict())
    np.testing.assert_allclose(again.probs, d.probs, rtol=1e-15)
    assert again.grid.tolist() == d.grid.tolist()


def test_a_dictionary_without_a_key_is_refused():
    with pytest.raises(UserError, match="needs 'probs', but there is grid"):
        Distribution.from_dict({"grid": [0, 100]})
