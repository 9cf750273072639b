"""The oracle against numbers worked out by hand."""

import math
from fractions import Fraction

import pytest

from wavelength_rsa.reference import (
    NULL,
    naive_listener,
    naive_metric_speaker,
    naive_production,
    naive_speaker,
    naive_trace,
    naive_with_null,
)

# Frank and Goodman (2012): a blue square, a blue circle and a green square.
SHAPES = {
    "blue": {"bs": 1 / 2, "bc": 1 / 2, "gs": 0.0},
    "square": {"bs": 1 / 2, "bc": 0.0, "gs": 1 / 2},
    "circle": {"bs": 0.0, "bc": 1.0, "gs": 0.0},
    "green": {"bs": 0.0, "bc": 0.0, "gs": 1.0},
}
# Goodman and Frank (2016): how many of three apples are red.
SCALAR = {
    "none": {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0},
    "some": {0: 0.0, 1: 1 / 3, 2: 1 / 3, 3: 1 / 3},
    "all": {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0},
}


def test_production_is_proposals_times_what_the_listener_hears() -> None:
    got = naive_production(
        {"a": 0.1, "b": 0.3, "c": 0.0}, prior={"a": 3 / 8, "b": 4 / 8, "c": 1 / 8}
    )
    assert got == pytest.approx({"a": 0.3 / 1.5, "b": 1.2 / 1.5, "c": 0.0})
    squared = naive_production({"a": 0.1, "b": 0.3}, prior={"a": 2.0, "b": 1.0}, alpha=2.0, lam=3.0)
    assert squared == pytest.approx({"a": 0.08 / 0.17, "b": 0.09 / 0.17})
    dear = naive_production({"a": 0.5, "b": 0.5}, cost={"a": math.log(3.0), "b": 0.0})
    assert dear == pytest.approx({"a": 0.25, "b": 0.75})
    assert naive_production({"a": 0.0, "b": 0.3}, prior={"a": 2.0, "b": 1.0}, alpha=0.0) == (
        pytest.approx({"a": 2 / 3, "b": 1 / 3})
    )


def test_reference_game_of_frank_and_goodman() -> None:
    speaker = naive_speaker(SHAPES)
    assert speaker["bs"] == pytest.approx({"blue": 1 / 2, "square": 1 / 2, "circle": 0, "green": 0})
    assert speaker["bc"] == pytest.approx({"blue": 1 / 3, "square": 0, "circle": 2 / 3, "green": 0})
    assert speaker["gs"] == pytest.approx({"blue": 0, "square": 1 / 3, "circle": 0, "green": 2 / 3})
    listener = naive_listener(speaker)
    assert listener["blue"] == pytest.approx({"bs": 3 / 5, "bc": 2 / 5, "gs": 0.0})
    assert listener["square"] == pytest.approx({"bs": 3 / 5, "bc": 0.0, "gs": 2 / 5})
    salient = naive_listener(speaker, {"bs": 1.0, "bc": 3.0, "gs": 1.0})
    assert salient["blue"] == pytest.approx({"bs": 1 / 3, "bc": 2 / 3, "gs": 0.0})


def test_scalar_implicature() -> None:
    assert naive_speaker(SCALAR)[3] == pytest.approx({"none": 0.0, "some": 1 / 4, "all": 3 / 4})
    listener = naive_listener(naive_speaker(SCALAR))
    assert listener["some"] == pytest.approx({0: 0.0, 1: 4 / 9, 2: 4 / 9, 3: 1 / 9})
    sharp = naive_listener(naive_speaker(SCALAR, alpha=2.0))
    assert sharp["some"] == pytest.approx({0: 0.0, 1: 10 / 21, 2: 10 / 21, 3: 1 / 21})


def test_second_level_by_hand() -> None:
    levels = dict(naive_trace(SCALAR, 2))
    assert list(levels) == ["L0", "S1", "L1", "S2", "L2"]
    assert levels["S2"][3] == pytest.approx({"none": 0.0, "some": 1 / 10, "all": 9 / 10})
    third = Fraction(1, 10) / (2 + Fraction(1, 10))
    assert levels["L2"]["some"][3] == pytest.approx(float(third))


def test_null_utterance_fits_every_state_alike() -> None:
    table = naive_with_null({"high": {0: 0.25, 1: 0.75}})
    assert table[NULL] == {0: 0.5, 1: 0.5}
    listener = naive_listener(naive_speaker(table))
    assert listener["high"][1] == pytest.approx((3 / 5) / (3 / 5 + 1 / 3))


def test_metric_speaker_prefers_the_near_miss() -> None:
    # Neither utterance can mean state 1, but "near" is one off and "far" is two off.
    table = {"near": {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0}, "far": {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0}}
    speaker = naive_metric_speaker(table, lambda a, b: abs(a - b) * math.log(2.0))
    assert speaker[1] == pytest.approx({"near": 2 / 3, "far": 1 / 3})
    assert naive_metric_speaker(table, lambda a, b: abs(a - b), alpha=0.0)[1]["far"] == 0.5
