"""The row of a single human: the mean error of people one by one, worked by hand."""

import numpy as np
import pytest

from wavelength_rsa.data import Item, human_baseline
from wavelength_rsa.evaluate import evaluate_listener
from wavelength_rsa.listeners import TableListener
from wavelength_rsa.scales import Scale

HOT, LOUD = Scale("Cold", "Hot"), Scale("Quiet", "Loud")

# One person far off, an even number, and sides that cancel in the mean of the responses.
ITEMS = [
    Item(HOT, "soup", 50, (50.0, 50.0, 50.0, 100.0, 0.0), id="a"),  # off by 0 0 0 50 50
    Item(HOT, "lava", 100, (100.0, 95.0, 80.0, 5.0), id="b"),  # 0 5 20 95
    Item(LOUD, "drum", 75, (75.0, 0.0), id="c"),  # 0 75
]
MEANS = (100 / 5, 120 / 4, 75 / 2)
SQUARES = ((2 * 50**2) / 5, (5**2 + 20**2 + 95**2) / 4, 75**2 / 2)


def test_baseline():
    found = human_baseline(ITEMS, resamples=50)["rows"]["single_human"]
    for name in ("mean_error", "expected_distance", "crps"):
        assert found[name]["value"] == pytest.approx(np.mean(MEANS))  # each item weighs the same
    assert found["rmse"]["value"] == pytest.approx(np.sqrt(np.mean(SQUARES)))
    # Of all eleven responses 0 0 0 0 0 5 20 50 50 75 95.
    assert found["median_error"] == {"value": 5.0, "se": None, "low": None, "high": None}


def test_baseline_is_no_crowd():
    """The crowd's mean is on the target, each person is off."""
    items = [Item(HOT, "tea", 50, (0.0, 100.0)), Item(LOUD, "hum", 50, (25.0, 75.0))]
    rows = human_baseline(items, resamples=50)["rows"]
    assert rows["humans"]["mean_error"]["value"] == 0
    assert rows["single_human"]["mean_error"]["value"] == pytest.approx((50 + 25) / 2)


def test_reference_of_a_report():
    uniform = TableListener({}, step=5, default="uniform")
    references = evaluate_listener(uniform, ITEMS, resamples=10).references
    assert references["a single human"] == pytest.approx(np.mean(MEANS))
    crowd = (0, 100 - 280 / 4, 75 - 75 / 2)
    assert references["mean of the human responses"] == pytest.approx(np.mean(crowd))
