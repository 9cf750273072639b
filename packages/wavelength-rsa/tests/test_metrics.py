import functools
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from tenfold_common.errors import UserError
from wavelength_rsa import metrics
from wavelength_rsa.scales import Distribution, grid

G = grid(5)
numbers = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=2, max_size=30)


def rows(n=8, seed=0, step=5):
    rng = np.random.default_rng(seed)
    p = rng.random((n, len(grid(step)))) * (rng.random((n, len(grid(step)))) < 0.6)
    p[:, 0] += 0.01
    return p / p.sum(1, keepdims=True)


def grouped(n=40, size=2, seed=0, spread=1.0):
    """Return values whose clusters differ, and the clusters."""
    rng = np.random.default_rng(seed)
    c = np.repeat(np.arange(n), size)
    return spread * rng.normal(size=n)[c] + rng.normal(size=n * size), c


# --- a listener against targets and people


def test_batches_equal_one_distribution_at_a_time():
    p, q = rows(), rows(seed=1)
    targets = np.array([0, 100, 35, 35, 50, 5, 95, 60])
    found = metrics.listener_metrics(p, G, targets)
    compared = metrics.human_metrics(p, G, q)
    close = functools.partial(pytest.approx, rel=1e-12, abs=1e-12)
    for i, t in enumerate(targets):
        d, h = Distribution(G, p[i]), Distribution(G, q[i])
        expected = {
            "mean_error": abs(d.mean - t),
            "map_error": abs(d.argmax - t),
            "expected_distance": d.expected_distance(t),
            "crps": d.crps(t),
            "nll": d.neg_log_prob(t),
            "squared_error": (d.mean - t) ** 2,
            "entropy": d.entropy,
            "sd": d.sd,
            "tied": float(d.tied),
        }
        assert {k: v[i] for k, v in found.items()} == close(expected)
        expected = {
            "w1": d.w1(h),
            "js": d.js(h),
            "tv": d.tv(h),
            "mean_difference": d.mean - h.mean,
            "entropy_difference": d.entropy - h.entropy,
            "sd_difference": d.sd - h.sd,
        }
        assert {k: v[i] for k, v in compared.items()} == pytest.approx(
            expected, rel=1e-12, abs=1e-12
        )


def test_batches_equal_scipy():
    p, q = rows(20), rows(20, seed=1)
    found, scored = metrics.human_metrics(p, G, q), metrics.listener_metrics(p, G, np.full(20, 35))
    for i in range(20):
        assert found["w1"][i] == pytest.approx(stats.wasserstein_distance(G, G, p[i], q[i]))
        assert found["js"][i] == pytest.approx(jensenshannon(p[i], q[i]) ** 2)
        assert scored["entropy"][i] == pytest.approx(stats.entropy(p[i]))
        away = stats.wasserstein_distance(G, [35], p[i])
        assert scored["expected_distance"][i] == pytest.approx(away)
        gap = stats.energy_distance(G, [35], p[i])  # sqrt of 2 E|X - t| - E|X - X'|
        assert scored["crps"][i] == pytest.approx(gap**2 / 2)


def test_hand_worked_numbers():
    found = metrics.listener_metrics([[0.5, 0, 0.5], [0, 1, 0]], grid(50), [50, 100])
    assert {k: v.tolist() for k, v in found.items()} == {
        "mean_error": [0, 50],
        "map_error": [0, 50],
        "expected_distance": [50, 50],
        "crps": [25, 50],
        "nll": [math.inf, math.inf],
        "squared_error": [0, 2500],
        "entropy": [pytest.approx(math.log(2)), 0],
        "sd": [50, 0],
        "tied": [1, 0],
    }
    too_sure = metrics.human_metrics([[0, 1, 0]], grid(50), [[0.25, 0.25, 0.5]])
    assert too_sure["mean_difference"].tolist() == [-12.5]
    assert too_sure["sd_difference"][0] < 0
    assert too_sure["entropy_difference"] == pytest.approx([-1.5 * math.log(2)])


def test_what_does_not_fit_is_named():
    p = rows(2)
    cases = [
        (p, G, [35], "targets has 1 values for 2 items"),
        (p, G, [35, 47], r"targets\[1\] is 47, not a position of the grid 0, 5, \.\.\., 100"),
        (p, G, [35, math.nan], r"targets\[1\] is nan"),
        (p, G, [35, 105], r"targets\[1\] is 105"),
        (p[0], G, [35], r"shape \[21\]; it must be \[items, positions\]"),
        (p.T, G, [35] * 21, r"shape \[21, 2\] but the grid has 21 positions"),
        (p * 2, G, [35, 35], r"probs\[0\] does not sum to 1"),
        (np.log(p + 1e-9), G, [35, 35], "logarithms need exp first"),
        (p, G, ["a", "b"], "targets must be numbers"),
    ]
    for probs, positions, targets, message in cases:
        with pytest.raises(UserError, match=message):
            metrics.listener_metrics(probs, positions, targets)
    bad = rows(3)
    bad[2, 4] = math.nan
    with pytest.raises(UserError, match=r"human\[2\] holds NaN"):
        metrics.human_metrics(rows(3), G, bad)
    with pytest.raises(UserError, match="probs has 2 rows but human has 3"):
        metrics.human_metrics(p, G, rows(3))


# --- correlations


@given(numbers, st.integers(0, 1000))
def test_correlations_equal_scipy(x, seed):
    y = np.random.default_rng(seed).integers(0, 5, len(x)).astype(float)
    found = metrics.correlations(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found["pearson"])
        assert math.isnan(found["spearman"])
        assert f"{'x' if len(set(x)) == 1 else 'y'} is constant" in str(found["reason"])
    else:
        assert found["pearson"] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
        assert found["spearman"] == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
        assert found["reason"] is None


def test_a_correlation_far_from_zero_keeps_its_digits():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50))
    assert metrics.correlations(1e9 + x, y)["pearson"] == pytest.approx(
        stats.pearsonr(x, y)[0], abs=1e-5
    )


def test_rounding_noise_is_no_correlation():
    means = np.full((6, 21), 1 / 21) @ G + [0, 1e-14, -1e-14, 2e-14, 0, 1e-14]
    assert "x is constant (50)" in str(metrics.correlations(means, range(6))["reason"])
    assert "two or more items, not 1" in str(metrics.correlations([1], [2])["reason"])
    with pytest.raises(UserError, match="must be finite"):
        metrics.correlations([1, math.nan], [1, 2])


# --- order within a pair


@given(st.integers(0, 10_000))
def test_pair_order_equals_counting_by_hand(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(2, 12)
    m, t = rng.integers(0, 4, n) * 1.0, rng.integers(0, 4, n) * 25.0
    c = rng.integers(0, 3, n)
    score = []
    for i, j in itertools.combinations(range(n), 2):
        if c[i] == c[j] and t[i] != t[j]:
            score.append(0.5 if m[i] == m[j] else float((m[i] < m[j]) == (t[i] < t[j])))
    found = metrics.pair_order_accuracy(m, t, c)
    assert found == pytest.approx(np.mean(score)) if score else math.isnan(found)


def test_pair_order_of_a_listener_that_always_says_the_same_is_a_half():
    means = np.array([50, 50 + 1e-14, 50 - 1e-14, 50])
    assert metrics.pair_order_accuracy(means, [10, 20, 20, 30], [0, 0, 1, 1]) == 0.5
    assert metrics.pair_order_accuracy([10, 20, 20, 10], [10, 20, 30, 20], [7, 7, 3, 3]) == 1
    assert metrics.pair_order_accuracy([20, 10, 20, 10], [10, 20, 30, 20], [7, 7, 3, 3]) == 0.5
    assert math.isnan(metrics.pair_order_accuracy([1, 2], [3, 4], [0, 1]))


# --- intervals


def test_the_standard_error_is_that_of_the_cluster_means():
    """Of clusters of equal size the mean of resampled clusters has the variance s^2 / n."""
    values, c = grouped(50, 2, spread=2.0)
    found = metrics.cluster_bootstrap(values, c, resamples=40_000)
    means = values.reshape(50, 2).mean(1)
    expected = means.std(ddof=0) / math.sqrt(50)
    naive = values.std(ddof=1) / math.sqrt(100)
    assert found.value == pytest.approx(values.mean())
    assert found.se == pytest.approx(expected, rel=0.02)
    assert found.se > 1.15 * naive
    assert found.low == pytest.approx(found.value - 1.96 * expected, abs=0.1 * expected)
    assert found.high == pytest.approx(found.value + 1.96 * expected, abs=0.1 * expected)


def test_every_resample_of_two_clusters_is_enumerated():
    """(A, A), (A, B), (B, A), (B, B): the mean of all rows, not of the cluster means."""
    values, c = [0, 0, 0, 12], [5, 5, 5, -1]
    found = metrics.cluster_bootstrap(values, c, resamples=40_000, level=0.4)
    assert found.value == 3
    outcomes = np.array([0, 3, 3, 12])
    assert found.se == pytest.approx(outcomes.std(), rel=0.02)
    assert (found.low, found.high) == (3, 3)  # quantiles 0.3 and 0.7
    wide = metrics.cluster_bootstrap(values, c, resamples=1000, level=0.95)
    assert (wide.low, wide.high) == (0, 12)


def test_the_se_divides_by_one_less_than_the_resamples():
    found = metrics.cluster_bootstrap(np.arange(6.0) ** 2, range(6), resamples=2)
    assert found.high > found.low
    # Quantiles of two values a < b are linear between them, and their sd (ddof 1) is (b-a)/sqrt 2.
    gap = (found.high - found.low) / 0.95
    assert found.se == pytest.approx(gap / math.sqrt(2))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        values, c = grouped(40, 3, seed=seed)
        found = metrics.cluster_bootstrap(values, c, resamples=400, seed=seed, level=0.9)
        hits += found.low <= 0 <= found.high
    assert 0.82 <= hits / 200 <= 0.95


def test_order_and_names_of_clusters_do_not_matter_but_the_seed_does():
    values, c = grouped()
    found = metrics.cluster_bootstrap(values, c, resamples=500)
    order = np.random.default_rng(0).permutation(len(values))
    shuffled = metrics.cluster_bootstrap(values[order], 7 * c[order], resamples=500)
    assert shuffled.to_dict() == pytest.approx(found.to_dict())
    assert metrics.cluster_bootstrap(values, c, resamples=500) == found
    assert metrics.cluster_bootstrap(values, c, resamples=500, seed=1).se != found.se


def test_blocks_of_resamples_are_the_same_as_all_at_once(monkeypatch):
    values, c = grouped()
    found = metrics.cluster_bootstrap(values, c, resamples=500)
    monkeypatch.setattr(metrics, "_DRAWS", 7 * 40)
    assert metrics.cluster_bootstrap(values, c, resamples=500) == found


def test_pairing_removes_what_both_share():
    common, c = grouped(30, 2, spread=10)
    noise = np.random.default_rng(5).normal(size=60) * 0.1
    found = metrics.paired_bootstrap(common + 1 + noise, common, c, resamples=1000)
    assert found == metrics.cluster_bootstrap(common + 1 + noise - common, c, resamples=1000)
    assert found.value == pytest.approx(1, abs=0.05)
    assert 0 < found.low < 1 < found.high + 0.05
    assert metrics.cluster_bootstrap(common, c, resamples=1000).se > 50 * found.se
    swapped = metrics.paired_bootstrap(common, common + 1 + noise, c, resamples=1000)
    assert swapped.low == pytest.approx(-found.high)


def test_statistics_of_means_resample_as_means_do():
    x, c = grouped(20)
    y = x + np.random.default_rng(1).normal(size=40)
    found = metrics.bootstrap_of_means(metrics.moments(x, y), c, metrics.pearson_of, resamples=3000)
    assert found.value == pytest.approx(stats.pearsonr(x, y)[0])
    rng = np.random.default_rng(9)
    brute = []
    for _ in range(2000):
        drawn = rng.integers(20, size=20)
        at = np.concatenate([np.flatnonzero(c == d) for d in drawn])
        brute.append(np.corrcoef(x[at], y[at])[0, 1])
    assert found.se == pytest.approx(np.std(brute), rel=0.1)
    assert (found.low, found.high) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.02)


def test_resamples_in_which_a_correlation_is_undefined_are_left_out():
    x, c = np.array([1.0, 2.0, 4.0]), [0, 1, 2]
    found = metrics.bootstrap_of_means(metrics.moments(x, x), c, metrics.pearson_of, resamples=200)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


def test_no_interval_from_one_cluster_or_infinite_values():
    one = metrics.cluster_bootstrap([1, 2, 3], [4, 4, 4])
    assert one.value == 2
    assert np.isnan([one.se, one.low, one.high]).all()
    endless = metrics.cluster_bootstrap([1, math.inf], [0, 1])
    assert endless.value == math.inf
    assert np.isnan([endless.se, endless.low, endless.high]).all()
    assert math.isnan(metrics.paired_bootstrap([math.inf, 1], [math.inf, 1], [0, 1]).value)
    assert endless.to_dict() == dict.fromkeys(("value", "se", "low", "high"))
    assert json.dumps(one.to_dict(), allow_nan=False) == (
        '{"value": 2.0, "se": null, "low": null, "high": null}'
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([], []), {}, "no values to resample"),
        (([1, 2], [0]), {}, "clusters has 1 values for 2 items"),
        (([[1, 2]], [0]), {}, r"values has the shape \[1, 2\]"),
        (([1, 2], [0, 1]), {"resamples": 1}, "at least 2, not 1"),
        (([1, 2], [0, 1]), {"level": 95}, "between 0 and 1, such as 0.95, not 95"),
        (([1, 2], ["x", "y"]), {}, "clusters must be numbers"),
    ],
)
def test_arguments_that_do_not_fit(arguments, settings, message):
    with pytest.raises(UserError, match=message):
        metrics.cluster_bootstrap(*arguments, **settings)


def test_pairs_must_pair():
    with pytest.raises(UserError, match="b has 1 values for 2 items"):
        metrics.paired_bootstrap([1, 2], [1], [0, 1])
