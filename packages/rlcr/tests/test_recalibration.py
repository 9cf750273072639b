import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcr import metrics
from rlcr.recalibration import Isotonic, Platt, Temperature
from tenfold_common.errors import UserError

KINDS = [Platt, Temperature, Isotonic]
each = pytest.mark.parametrize("kind", KINDS)


def logit(q):
    return np.log(q / (1 - q))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(n, seed, slope=1.0, shift=0.0):
    """Draw q with P(right | q) = sigmoid(slope * logit q + shift)."""
    rng = np.random.default_rng(seed)
    q = rng.uniform(0.02, 0.98, n)
    return q, (rng.random(n) < sigmoid(slope * logit(q) + shift)).astype(int)


@each
def test_improves_held_out_log_loss_and_ece(kind):
    fitted = kind().fit(*drawn(4000, 0, slope=0.4))
    q, c = drawn(4000, 1, slope=0.4)
    better = fitted.predict(q)
    assert metrics.log_loss(better, c) < metrics.log_loss(q, c) - 0.03
    assert metrics.ece(better, c) < metrics.ece(q, c) / 2


@each
def test_leaves_calibrated_confidences_alone(kind):
    fitted = kind().fit(*drawn(20000, 0))
    q = np.linspace(0.05, 0.95, 50)
    np.testing.assert_allclose(fitted.predict(q), q, atol=0.06)


@each
@given(
    data=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=40).filter(
        lambda d: len({c for _, c in d}) == 2
    )
)
def test_never_reverses_the_order(kind, data):
    q, c = zip(*data, strict=True)
    out = kind().fit(q, c).predict(np.linspace(0, 1, 101))
    assert (np.diff(out) >= -1e-12).all()
    assert ((out >= 0) & (out <= 1)).all()


def test_platt_finds_the_parameters_and_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    q, c = drawn(20000, 0, slope=0.5, shift=-0.7)
    fitted = Platt().fit(q, c)
    assert fitted.slope == pytest.approx(0.5, abs=0.05)
    assert fitted.intercept == pytest.approx(-0.7, abs=0.05)
    peer = LogisticRegression(C=1e9, tol=1e-10).fit(logit(q)[:, None], c)
    assert fitted.slope == pytest.approx(peer.coef_[0, 0], abs=1e-3)
    assert fitted.intercept == pytest.approx(peer.intercept_[0], abs=1e-3)


def test_platt_does_not_turn_the_order_round():
    q, c = drawn(1000, 0)
    fitted = Platt().fit(1 - q, c)
    assert fitted.slope == 0
    np.testing.assert_allclose(fitted.predict([0.1, 0.9]), c.mean(), atol=1e-3)


def test_platt_of_separable_and_of_constant_confidences_is_finite():
    fitted = Platt().fit([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
    assert np.isfinite([fitted.slope, fitted.intercept]).all()
    flat = Platt().fit([0.9] * 40, [1] * 10 + [0] * 30)
    assert flat.predict([0.9])[0] == pytest.approx(0.25, abs=0.02)


def test_temperature_finds_the_parameter():
    assert Temperature().fit(*drawn(20000, 0, slope=0.5)).temperature == pytest.approx(2, abs=0.15)
    assert Temperature(temperature=2.0).predict([0.9])[0] == pytest.approx(sigmoid(logit(0.9) / 2))
    assert Temperature(temperature=7.0).predict([0.5])[0] == pytest.approx(0.5)
    assert Temperature().fit([0.4, 0.6], [0, 1]).temperature == pytest.approx(0.01, rel=1e-6)


def test_isotonic_by_hand():
    fitted = Isotonic().fit([0.1, 0.4, 0.6, 0.9], [0, 1, 0, 1])
    np.testing.assert_allclose(fitted.predict([0.1, 0.4, 0.5, 0.6, 0.9]), [0, 0.5, 0.5, 0.5, 1])
    np.testing.assert_allclose(fitted.predict([0.0, 1.0]), [0, 1])  # constant beyond the ends


@each
def test_saved_and_loaded(kind, tmp_path):
    fitted = kind().fit(*drawn(500, 0))
    fitted.save(tmp_path / "map.json")
    again = kind.load(tmp_path / "map.json")
    q = np.linspace(0, 1, 20)
    np.testing.assert_array_equal(again.predict(q), fitted.predict(q))
    other = next(k for k in KINDS if k is not kind)
    with pytest.raises(UserError, match="recalibration, not a"):
        other.load(tmp_path / "map.json")


@each
def test_refuses_what_does_not_fit(kind, tmp_path):
    with pytest.raises(UserError, match="not fitted"):
        kind().predict([0.5])
    with pytest.raises(UserError, match="not fitted"):
        kind().save(tmp_path / "x.json")
    with pytest.raises(UserError, match="some of both"):
        kind().fit([0.5, 0.6], [1, 1])
    with pytest.raises(UserError, match="scale=100"):
        kind().fit([50, 60], [1, 0])
    fitted = kind().fit([0.2, 0.7, 0.8], [0, 1, 1])
    with pytest.raises(UserError, match="maximum"):
        fitted.predict([1.5])


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (Platt, "not json"),
        (Platt, "[]"),
        (Platt, {"slope": 1.0, "intercept": 0.0}),
        (Platt, {"kind": "platt", "slope": -1.0, "intercept": 0.0}),
        (Platt, {"kind": "platt", "slope": "1", "intercept": 0.0}),
        (Platt, {"kind": "platt", "slope": 1.0, "intercept": 0.0, "more": 1}),
        (Temperature, {"kind": "temperature", "temperature": 0.0}),
        (Temperature, {"kind": "temperature", "temperature": None}),
        (Isotonic, {"kind": "isotonic", "points": [0.5, 0.4], "values": [0.1, 0.2]}),
        (Isotonic, {"kind": "isotonic", "points": [0.5], "values": [1.2]}),
        (Isotonic, {"kind": "isotonic", "points": 3, "values": []}),
        (Isotonic, {"kind": "isotonic", "points": ["a"], "values": [0.5]}),
    ],
)
def test_broken_files(kind, stored, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(stored if isinstance(stored, str) else json.dumps(stored))
    with pytest.raises(UserError, match=r"map\.json"):
        kind.load(path)
    with pytest.raises(UserError, match="not a saved"):
        kind.load(tmp_path / "absent.json")
