import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcr import metrics, reference
from tenfold_common.errors import UserError

Q4, C4 = [0.9, 0.9, 0.1, 0.1], [1, 1, 0, 1]  # the numbers below are worked by hand
grid_q = st.sampled_from([i / 20 for i in range(21)] + [0.1 + 0.2, 1 / 3, 0.7 - 1e-16])
any_q = st.one_of(grid_q, st.floats(0, 1))
pairs = st.lists(st.tuples(any_q, st.integers(0, 1)), min_size=1, max_size=60)


def drawn(n, seed=0, decimals=None, power=1.0):
    rng = np.random.default_rng(seed)
    q = rng.random(n)
    q = q if decimals is None else q.round(decimals)
    return q, (rng.random(n) < q**power).astype(int)


def test_hand_worked_numbers():
    assert metrics.brier_score(Q4, C4) == pytest.approx(0.21)
    assert metrics.ece(Q4, C4) == pytest.approx(0.25)
    assert metrics.max_calibration_error(Q4, C4) == pytest.approx(0.4)
    assert metrics.auroc(Q4, C4) == pytest.approx(2.5 / 3)
    assert metrics.aurc(Q4, C4) == pytest.approx((1 / 6 + 1 / 4) / 4)
    assert metrics.log_loss(Q4, C4) == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4)
    parts = metrics.murphy_decomposition(Q4, C4)
    assert parts.reliability == pytest.approx((0.01 + 0.16) / 2)
    assert parts.resolution == pytest.approx(0.0625)
    assert parts.uncertainty == pytest.approx(0.1875)
    assert metrics.equal_mass_ece(Q4, C4, n_bins=2) == pytest.approx(0.25)


def test_log_loss_is_clipped():
    assert metrics.log_loss([1.0], [0]) == pytest.approx(-math.log(1e-6))
    assert metrics.log_loss([0.0], [1], eps=1e-3) == pytest.approx(-math.log(1e-3))


@given(pairs, st.sampled_from([1, 2, 3, 7, 10, 15, 100]), st.sampled_from(metrics.BINNINGS))
def test_equal_the_plain_reference(data, n_bins, binning):
    q, c = map(list, zip(*data, strict=True))
    bins = metrics._bin_index(np.array(q), n_bins, binning)
    assert bins.tolist() == reference.naive_bins(q, n_bins, binning)
    close = pytest.approx
    assert metrics.ece(q, c, n_bins, binning) == close(
        reference.naive_ece(q, c, n_bins, binning), abs=1e-12
    )
    assert metrics.brier_score(q, c) == close(reference.naive_brier(q, c), abs=1e-12)
    assert metrics.log_loss(q, c) == close(reference.naive_log_loss(q, c), abs=1e-9)
    assert metrics.aurc(q, c) == close(reference.naive_aurc(q, c), abs=1e-12)
    expected = reference.naive_murphy(q, c)
    parts = metrics.murphy_decomposition(q, c)
    for name, value in expected.items():
        assert getattr(parts, name) == close(value, abs=1e-12)
    total = parts.reliability - parts.resolution + parts.uncertainty
    assert total == close(metrics.brier_score(q, c), abs=1e-12)
    if 0 < sum(c) < len(c):
        assert metrics.auroc(q, c) == close(reference.naive_auroc(q, c), abs=1e-12)


@pytest.mark.parametrize("binning", metrics.BINNINGS)
@pytest.mark.parametrize("n_bins", [*range(1, 40), 64, 97, 1000])
def test_bins_are_exact_at_and_beside_every_edge(n_bins, binning):
    edges = np.concatenate([np.arange(n_bins + 1) / n_bins, np.arange(n_bins + 1) * (1 / n_bins)])
    q = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 1)]).clip(0, 1)
    expected = np.zeros(len(q), dtype=int)
    for i in range(1, n_bins):
        edge = i * (1 / n_bins) if binning == "reference" else i / n_bins
        expected += q > edge if binning == "right" else q >= edge
    np.testing.assert_array_equal(metrics._bin_index(q, n_bins, binning), expected)


def test_the_float_trap_of_round_confidences():
    q = np.array([0.3, 0.6, 0.7])
    assert metrics._bin_index(q, 10, "left").tolist() == [3, 6, 7]
    assert metrics._bin_index(q, 10, "reference").tolist() == [2, 5, 6]
    assert metrics._bin_index(q, 10, "right").tolist() == [2, 5, 6]
    assert metrics._bin_index(np.array([0.0, 1.0]), 10, "right").tolist() == [0, 9]


@given(pairs, st.randoms(use_true_random=False))
def test_order_of_examples_does_not_matter(data, random):
    shuffled = data.copy()
    random.shuffle(shuffled)
    (q1, c1), (q2, c2) = (zip(*d, strict=True) for d in (data, shuffled))
    for f in (metrics.equal_mass_ece, metrics.smooth_ece, metrics.debiased_ece, metrics.aurc):
        np.testing.assert_allclose(f(q1, c1), f(q2, c2), atol=1e-9)


def test_ece_in_chunks_equals_ece_at_once():
    q, c = drawn(3 * metrics._CHUNK + 17, power=2)
    bins = metrics.reliability_bins(q, c)
    weights = bins.count / len(q)
    assert metrics.ece(q, c) == pytest.approx(weights @ np.abs(bins.confidence - bins.accuracy))


def test_reliability_bins():
    bins = metrics.reliability_bins([0.05, 0.15, 0.95], [0, 1, 1], n_bins=10)
    assert bins.count.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert bins.confidence[[0, 1, 9]].tolist() == pytest.approx([0.05, 0.15, 0.95])
    assert bins.accuracy[[0, 1, 9]].tolist() == [0, 1, 1]
    assert np.isnan(bins.accuracy[2:9]).all()
    assert bins.lower[3] == 0.3
    assert bins.upper[-1] == 1.0


def test_equal_mass_bins_hold_equal_numbers_without_ties():
    q, c = drawn(1000)
    order = np.argsort(q)
    gaps = (q - c)[order].reshape(10, 100).sum(1)
    assert metrics.equal_mass_ece(q, c, 10) == pytest.approx(np.abs(gaps).sum() / 1000)


def test_debiased_square_is_unbiased_where_plain_is_not():
    q = np.repeat([0.2, 0.5, 0.8], 20)
    truth = np.repeat([0.5, 0.5, 0.5], 20)  # squared error (0.09 + 0 + 0.09) / 3 = 0.06
    rng = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(800):
        c = (rng.random(60) < truth).astype(int)
        rate = c.reshape(3, 20).mean(1)
        kumar = ((np.array([0.2, 0.5, 0.8]) - rate) ** 2 - rate * (1 - rate) / 19).mean()
        assert metrics.debiased_ece(q, c) == pytest.approx(math.sqrt(max(0, kumar)))
        plain.append(((np.array([0.2, 0.5, 0.8]) - rate) ** 2).mean())
        debiased.append(kumar)
    assert np.mean(debiased) == pytest.approx(0.06, abs=0.003)
    assert np.mean(plain) > 0.068
    assert math.isnan(metrics.debiased_ece([0.05, 0.95], [0, 1]))


def naive_smooth(q, c, width, points=2001):
    t = (np.arange(points) + 0.5) / points
    total = np.zeros(points)
    for one, right in zip(q, c, strict=True):
        for image in [s * one + 2 * k for s in (1, -1) for k in range(-4, 5)]:
            total += (right - one) * np.exp(-((t - image) ** 2) / (2 * width**2))
    return np.abs(total).mean() / (width * math.sqrt(2 * math.pi)) / len(q)


def test_smooth_ece_is_the_fixed_point_of_the_reflected_kernel():
    for power, n in ((1.0, 150), (2.0, 150), (0.3, 40)):
        q, c = drawn(n, seed=3, power=power)
        found = metrics.smooth_ece(q, c)
        assert naive_smooth(q, c, found) == pytest.approx(found, abs=2e-3)
    # One confidence: the smoothed residual has one sign, its integral is the gap at every width.
    assert metrics.smooth_ece([0.7] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.2, abs=1e-6)
    assert metrics.smooth_ece([1.0, 0.0], [0, 1]) == pytest.approx(
        naive_smooth([1.0, 0.0], [0, 1], metrics.smooth_ece([1.0, 0.0], [0, 1])), abs=2e-3
    )
    assert metrics.smooth_ece([1.0, 0.0], [1, 0]) < 1e-6


def test_auroc_edges():
    assert metrics.auroc([0.5] * 4, [0, 1, 0, 1]) == 0.5
    assert metrics.auroc([0.1, 0.9], [0, 1]) == 1.0
    assert metrics.auroc([0.9, 0.1], [0, 1]) == 0.0
    assert metrics.auroc([-0.0, 0.0], [0, 1]) == 0.5
    with pytest.warns(metrics.MetricsWarning, match="all 2 answers are right"):
        assert math.isnan(metrics.auroc([0.2, 0.4], [1, 1]))


def test_risk_coverage_of_ties():
    coverage, risk = metrics.risk_coverage([0.5, 0.9, 0.5], [1, 1, 0])
    np.testing.assert_allclose(coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(risk, [0, 0.25, 1 / 3])


@given(st.integers(1, 40), st.data())
def test_pass_at_k_equals_binomials(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert metrics.pass_at_k(n, right, k) == pytest.approx(
        reference.naive_pass_at_k(n, right, k), abs=1e-12
    )


def test_pass_at_k_vectorised_and_large():
    values = metrics.pass_at_k([10, 10, 20], [0, 10, 1], 5)
    np.testing.assert_allclose(values, [0, 1, 0.25])
    assert metrics.pass_at_k(10**9, 1, 1) == pytest.approx(1e-9, rel=1e-12)
    assert metrics.pass_at_k(10**6, 10**3, 100) == pytest.approx(
        reference.naive_pass_at_k(10**6, 10**3, 100)
    )
    for n, right, k in ((5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0), (5.0, 2, 1)):
        with pytest.raises(UserError):
            metrics.pass_at_k(n, right, k)


# Cross-checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 1])
def test_against_scikit_learn(decimals):
    from sklearn import metrics as sk

    q, c = drawn(2000, decimals=decimals, power=1.7)
    assert metrics.auroc(q, c) == pytest.approx(sk.roc_auc_score(c, q), abs=1e-12)
    assert metrics.brier_score(q, c) == pytest.approx(sk.brier_score_loss(c, q), abs=1e-12)
    inside = q.clip(1e-6, 1 - 1e-6)
    assert metrics.log_loss(q, c) == pytest.approx(sk.log_loss(c, inside), abs=1e-9)


@pytest.mark.parametrize("n_bins", [10, 15])
def test_against_torchmetrics(n_bins):
    import torch

    q, c = drawn(3000, power=2.0)  # continuous: no q on an edge, where its convention differs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.classification import BinaryCalibrationError

        kinds = {norm: BinaryCalibrationError(n_bins=n_bins, norm=norm) for norm in ("l1", "max")}
        found = {k: float(m(torch.tensor(q), torch.tensor(c))) for k, m in kinds.items()}
    assert metrics.ece(q, c, n_bins) == pytest.approx(found["l1"], abs=1e-6)
    assert metrics.max_calibration_error(q, c, n_bins) == pytest.approx(found["max"], abs=1e-6)


def test_against_netcal():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from netcal.metrics import ECE

        q, c = drawn(3000, power=2.0)
        assert metrics.ece(q, c, 10) == pytest.approx(float(ECE(10).measure(q, c)), abs=1e-9)


# Intervals ----------------------------------------------------------------------------------------


def naive_bootstrap(q, c, n_boot, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_boot):
        pick = rng.integers(0, len(q), len(q))
        a, b = q[pick], c[pick]
        rows.append([b.mean(), metrics.brier_score(a, b), metrics.ece(a, b), metrics.auroc(a, b)])
    return np.quantile(np.array(rows), [0.025, 0.975], axis=0)


@pytest.mark.parametrize("decimals", [None, 1])  # both ways of drawing the counts
def test_intervals_equal_those_of_resampled_rows(decimals):
    q, c = drawn(400, decimals=decimals, power=1.5)
    found = metrics.bootstrap_intervals(q, c, n_boot=3000, seed=1)
    expected = naive_bootstrap(q, c, 1500, seed=2)
    for i, name in enumerate(("accuracy", "brier", "ece", "auroc")):
        np.testing.assert_allclose(found[name], expected[:, i], atol=0.008, err_msg=name)


@pytest.mark.parametrize("decimals", [None, 1])
def test_counts_are_multinomial(decimals):
    q, c = drawn(300, decimals=decimals)
    values, count, right = metrics._groups(q, c.astype(float))
    cells = np.stack([count - right, right], 1).astype(np.int64).ravel()
    rng = np.random.default_rng(0)
    counts = np.concatenate(list(metrics._resamples(cells, 4000, rng)))
    assert counts.shape == (4000, 2 * len(values))
    assert (counts.sum(1) == 300).all()
    assert (counts[:, cells == 0] == 0).all()
    np.testing.assert_allclose(counts.mean(0), cells, atol=5 * math.sqrt(cells.max() / 4000))
    np.testing.assert_allclose(counts.var(0), cells * (1 - cells / 300), rtol=0.2, atol=0.05)


def test_intervals_cover_the_truth():
    # q uniform, P(right | q) = q: accuracy 1/2, Brier 1/6, AUROC 5/6.
    truth = {"accuracy": 0.5, "brier": 1 / 6, "auroc": 5 / 6}
    inside = dict.fromkeys(truth, 0)
    for seed in range(200):
        q, c = drawn(200, seed=seed)
        found = metrics.bootstrap_intervals(q, c, n_boot=200, seed=seed)
        for name, value in truth.items():
            inside[name] += found[name][0] <= value <= found[name][1]
    for name, hits in inside.items():
        assert 0.88 <= hits / 200 <= 0.99, (name, hits)


def test_intervals_are_seeded_and_narrow_with_ci():
    q, c = drawn(500)
    one = metrics.bootstrap_intervals(q, c, seed=5)
    assert one == metrics.bootstrap_intervals(q, c, seed=5)
    assert one != metrics.bootstrap_intervals(q, c, seed=6)
    low, high = metrics.bootstrap_intervals(q, c, ci=0.5, seed=5)["brier"]
    assert one["brier"][0] < low < high < one["brier"][1]


def test_intervals_of_one_class():
    found = metrics.bootstrap_intervals([0.5, 0.7], [1, 1], n_boot=10)
    assert all(map(math.isnan, found["auroc"]))
    assert found["accuracy"] == (1.0, 1.0)


# The report ---------------------------------------------------------------------------------------


def test_report_agrees_with_the_functions():
    q, c = drawn(800, decimals=2, power=1.5)
    report = metrics.calibration_report(q, c, n_bins=7, binning="right", n_boot=200)
    assert report.n == 800
    assert report.ece == metrics.ece(q, c, 7, "right")
    assert report.auroc == metrics.auroc(q, c)
    assert report.overconfidence == pytest.approx(q.mean() - c.mean())
    assert report.confidence_std == pytest.approx(q.std())
    assert report.distinct_confidences == len(set(q))
    assert report.brier == pytest.approx(
        report.reliability - report.resolution + report.uncertainty
    )
    assert report.intervals["ece"][0] < report.intervals["ece"][1]
    assert report.ece_informative
    text = str(report)
    for part in ("accuracy", "AUROC", "std of q", "distinct q", "ECE, 7 bins (right)", "95%"):
        assert part in text
    assert "uninformative" not in text
    assert json.loads(json.dumps(report.to_dict()))["intervals"]["brier"] == list(
        report.intervals["brier"]
    )


def test_report_marks_constant_confidence_as_uninformative():
    c = [1] * 70 + [0] * 30
    report = metrics.calibration_report([0.7] * 100, c, ci=None)
    assert report.ece == pytest.approx(0, abs=1e-12)  # "perfectly calibrated"
    assert report.auroc == 0.5
    assert report.resolution == pytest.approx(0)
    assert not report.ece_informative
    assert "uninformative" in str(report)
    assert report.intervals == {}


def test_report_of_one_class():
    with pytest.warns(metrics.MetricsWarning, match="all 3 answers are wrong"):
        report = metrics.calibration_report([0.2, 0.4, 0.6], [0, 0, 0], n_boot=20)
    assert math.isnan(report.auroc)
    assert report.to_dict()["auroc"] is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_percentages():
    q, c = drawn(100)
    one = metrics.calibration_report(q, c, ci=None)
    hundred = metrics.calibration_report(100 * q, c, ci=None, scale=100)
    assert hundred.brier == pytest.approx(one.brier)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "c", "words"),
    [
        ([0.1], [0, 1], "1 values but correct has 2"),
        ([], [], "empty"),
        ([0.1, 87.0], [0, 1], "maximum is 87.*scale=100"),
        ([0.1, 1.2], [0, 1], r"maximum is 1.2"),
        ([-0.1, 0.5], [0, 1], "minimum is -0.1"),
        ([math.inf, 0.5], [0, 1], "maximum is inf"),
        ([math.nan, 0.5], [0, 1], "1 NaN or None of 2"),
        ([None, 0.5], [0, 1], "1 NaN or None of 2"),
        (["0.5", "high"], [0, 1], "must be numbers"),
        ([[0.5, 0.5]], [0, 1], "one dimension"),
        ([0.5, 0.5], [0, 2], "correct must lie in"),
        ([0.5, 0.5], [0, None], "correct holds 1 NaN"),
        ([0.5, 0.5], [0, 0.5], "0 or 1.*0.5.*Soft labels"),
        (object(), [0], "numbers"),
    ],
)
def test_bad_inputs_say_what_is_wrong(q, c, words):
    with pytest.raises(UserError, match=words):
        metrics.calibration_report(q, c)


def test_soft_labels():
    q, soft = [0.2, 0.8], [0.25, 0.5]
    assert metrics.brier_score(q, soft) == pytest.approx((0.05**2 + 0.3**2) / 2)
    assert metrics.ece(q, soft) == pytest.approx(0.175)
    assert metrics.log_loss(q, soft) == pytest.approx(reference.naive_log_loss(q, soft))
    for f in (metrics.auroc, metrics.murphy_decomposition, metrics.bootstrap_intervals):
        with pytest.raises(UserError, match="Soft labels"):
            f(q, soft)


def test_bad_settings():
    with pytest.raises(UserError, match=r"not 'rihgt'\. Did you mean 'right'"):
        metrics.ece(Q4, C4, binning="rihgt")
    for call in (
        lambda: metrics.ece(Q4, C4, n_bins=0),
        lambda: metrics.log_loss(Q4, C4, eps=0.5),
        lambda: metrics.smooth_ece(Q4, C4, grid=1),
        lambda: metrics.bootstrap_intervals(Q4, C4, ci=95),
        lambda: metrics.bootstrap_intervals(Q4, C4, n_boot=1),
        lambda: metrics.calibration_report(Q4, C4, scale=0),
    ):
        with pytest.raises(UserError):
            call()


def test_inputs_may_be_bool_torch_or_float32():
    import torch

    expected = metrics.brier_score([0.5, 0.25], [1, 0])
    assert metrics.brier_score(torch.tensor([0.5, 0.25]), torch.tensor([True, False])) == expected
    assert metrics.brier_score(np.float32([0.5, 0.25]), np.array([True, False])) == expected
