"""Live metrics of a window, and alarms: each when it should be raised, and once."""

import math

import numpy as np
import pytest

from rlcr.monitor import Monitor, window_metrics
from rlcr.reference import naive_auroc, naive_brier, naive_ece

NAN = math.nan
HEALTHY = {"rlcr/accuracy": 0.6, "rlcr/brier": 0.2, "rlcr/confidence_std": 0.2}


def feed(monitor, rows, first=1):
    """Give the rows at steps first, first + 1, ...; return the alarms as (kind, step)."""
    raised = []
    for step, row in enumerate(rows, first):
        raised += monitor.update(step, row)
    return [(alarm.kind, alarm.step) for alarm in raised]


def log(**changes):
    return {**HEALTHY, **{f"rlcr/{name}": value for name, value in changes.items()}}


class TestWindowMetrics:
    @pytest.mark.parametrize("seed", range(5))
    def test_against_the_reference(self, seed):
        random = np.random.default_rng(seed)
        q = random.integers(0, 11, 300) / 10
        c = (random.random(300) < q).astype(float)
        found = window_metrics(q, c)
        assert found["brier"] == pytest.approx(naive_brier(q.tolist(), c.tolist()), abs=1e-12)
        assert found["ece"] == pytest.approx(naive_ece(q.tolist(), c.tolist()), abs=1e-9)
        assert found["auroc"] == pytest.approx(naive_auroc(q.tolist(), c.tolist()), abs=1e-12)
        assert found["accuracy"] == pytest.approx(sum(c) / 300)
        assert found["confidence"] == pytest.approx(sum(q) / 300)
        mean = sum(q) / 300
        variance = sum((v - mean) ** 2 for v in q) / 300
        assert found["confidence_std"] == pytest.approx(math.sqrt(variance))
        assert found["distinct_confidences"] == len(set(q.tolist()))
        assert found["stated"] == 1.0

    def test_nan_by_hand(self):
        """Five judged rows of six, three of them with a confidence."""
        q = np.array([0.9, 0.2, NAN, NAN, 0.6, 0.5])
        c = np.array([1.0, 0.0, 0.0, 1.0, 1.0, NAN])
        found = window_metrics(q, c)
        assert found["accuracy"] == pytest.approx(3 / 5)
        assert found["stated"] == pytest.approx(3 / 5)
        assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.16) / 3)
        assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.4) / 3)
        assert found["auroc"] == 1.0
        assert found["confidence"] == pytest.approx(1.7 / 3)
        assert found["distinct_confidences"] == 3

    @pytest.mark.parametrize("c", [0.0, 1.0])
    def test_one_class(self, c):
        found = window_metrics(np.array([0.5, 0.7]), np.array([c, c]))
        assert math.isnan(found["auroc"])
        assert found["accuracy"] == c
        assert not math.isnan(found["brier"])

    def test_soft_grades_have_no_auroc(self):
        found = window_metrics(np.array([0.5, 0.7, 0.1]), np.array([0.5, 1.0, 0.0]))
        assert math.isnan(found["auroc"])
        assert found["brier"] == pytest.approx((0 + 0.09 + 0.01) / 3)

    def test_nothing_stated(self):
        found = window_metrics(np.array([NAN, NAN]), np.array([1.0, 0.0]))
        assert found["accuracy"] == 0.5
        assert found["stated"] == 0.0
        rest = set(found) - {"accuracy", "stated"}
        assert rest == {"brier", "ece", "auroc", "confidence", "confidence_std",
                        "distinct_confidences"}  # fmt: skip
        assert all(math.isnan(found[name]) for name in rest)

    @pytest.mark.parametrize("n", [0, 3])
    def test_nothing_judged(self, n):
        found = window_metrics(np.full(n, 0.5), np.full(n, NAN))
        assert len(found) == 8
        assert all(math.isnan(value) for value in found.values())


class TestConfidenceCollapse:
    def test_at_the_twentieth_narrow_log_and_once(self):
        monitor = Monitor()
        rows = [log(confidence_std=0.009)] * 60
        assert feed(monitor, rows) == [("confidence_collapse", 20)]
        assert [a.kind for a in monitor.alarms] == ["confidence_collapse"]
        message = monitor.alarms[0].message
        assert "0.01" in message
        assert "20 logs" in message
        assert "0.009" in message
        assert "AUROC" in message

    def test_nineteen_are_not_enough(self):
        rows = ([log(confidence_std=0.0)] * 19 + [log(confidence_std=0.01)]) * 3
        assert feed(Monitor(), rows) == []

    def test_unknown_spread_starts_over(self):
        rows = [log(confidence_std=0.0)] * 19 + [log(confidence_std=NAN)]
        assert feed(Monitor(), rows * 2) == []
        rows = [log(confidence_std=0.0)] * 19 + [log(confidence_std=None)]
        assert feed(Monitor(), rows * 2) == []

    def test_settings(self):
        monitor = Monitor(collapse_std=0.1, collapse_logs=2)
        rows = [log(confidence_std=0.09), log(confidence_std=0.2), *[log(confidence_std=0.09)] * 2]
        assert feed(monitor, rows, first=10) == [("confidence_collapse", 13)]


class TestHedgingCollapse:
    START = (log(accuracy=0.5), log(accuracy=0.6), log(accuracy=0.7))  # mean .6, Brier .2

    def test_accuracy_stays_low_while_brier_does_not_rise(self):
        monitor = Monitor()
        rows = [*self.START, log(accuracy=0.49, brier=0.1), *[log(accuracy=0.47, brier=0.1)] * 5]
        assert feed(monitor, rows) == [("hedging_collapse", 7)]  # the third log below .48
        message = monitor.alarms[0].message
        assert "0.600 to 0.470" in message
        assert "0.200 to 0.100" in message
        assert "calibration_ramp_steps" in message

    def test_a_log_or_two_are_chance(self):
        low, fine = log(accuracy=0.1, brier=0.1), log(accuracy=0.6, brier=0.1)
        assert feed(Monitor(), [*self.START, *[low, low, fine] * 5]) == []
        assert feed(Monitor(hedging_logs=2), [*self.START, low, fine, low, low]) == [
            ("hedging_collapse", 7)
        ]

    def test_just_above_the_share(self):
        assert feed(Monitor(), [*self.START, *[log(accuracy=0.4801, brier=0.1)] * 5]) == []

    def test_brier_rises_as_well(self):
        """A run that simply fails is no hedging."""
        assert feed(Monitor(), [*self.START, *[log(accuracy=0.2, brier=0.21)] * 5]) == []

    def test_brier_as_at_the_start(self):
        assert feed(Monitor(), [*self.START, *[log(accuracy=0.2, brier=0.2)] * 3]) == [
            ("hedging_collapse", 6)
        ]

    def test_doubt_without_discrimination(self):
        """Accuracy holds, but q says nothing and is low: three logs after the start."""
        doubting = log(confidence=0.2, auroc=0.55, brier=0.15)
        monitor = Monitor()
        rows = [*self.START, *[doubting] * 2, log(confidence=0.2, auroc=0.9), *[doubting] * 4]
        assert feed(monitor, rows) == [("hedging_collapse", 9)]
        assert "q is 0.20" in monitor.alarms[0].message
        assert "AUROC 0.55" in monitor.alarms[0].message
        for fine in ({"confidence": 0.25}, {"auroc": 0.6}, {"brier": 0.21}, {"auroc": NAN}):
            changes = {"confidence": 0.2, "auroc": 0.55, "brier": 0.15, **fine}
            assert feed(Monitor(), [*self.START, *[log(**changes)] * 6]) == []

    def test_not_during_the_start(self):
        rows = [log(accuracy=0.9), *[log(accuracy=0.1)] * 4]
        assert feed(Monitor(), rows) == []

    def test_logs_without_numbers_are_no_start(self):
        low = log(accuracy=0.1, brier=0.1)
        rows = [log(accuracy=NAN), log(brier=None), {}, *self.START, low, low, low]
        assert feed(Monitor(), rows) == [("hedging_collapse", 9)]
        assert feed(Monitor(), [*self.START, log(accuracy=NAN, brier=0.1)] * 3) == []


class TestOthers:
    def test_no_variance(self):
        rows = [
            {**HEALTHY, "frac_reward_zero_std": 0.99},
            {**HEALTHY, "frac_reward_zero_std": 1.0},
            {**HEALTHY, "frac_reward_zero_std": 1.0},
        ]
        monitor = Monitor()
        assert feed(monitor, rows) == [("no_variance", 2)]
        assert "num_generations" in monitor.alarms[0].message

    def test_truncated(self):
        rows = [{**HEALTHY, "completions/clipped_ratio": v} for v in (0.5, 0.51, 0.9)]
        monitor = Monitor()
        assert feed(monitor, rows) == [("truncated", 2)]
        assert "51%" in monitor.alarms[0].message
        assert "max_completion_length" in monitor.alarms[0].message

    def test_truncated_share(self):
        row = {"completions/clipped_ratio": 0.3}
        assert feed(Monitor(truncated_share=0.2), [row]) == [("truncated", 1)]

    def test_several_at_once_each_once(self):
        row = {"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 1.0}
        monitor = Monitor()
        assert sorted(feed(monitor, [row, row])) == [("no_variance", 1), ("truncated", 1)]
        assert len(monitor.alarms) == 2

    def test_a_healthy_run_raises_nothing(self):
        random = np.random.default_rng(0)
        rows = [
            {
                **log(
                    accuracy=0.6 + 0.05 * random.standard_normal(),
                    brier=0.2 - 0.001 * i,
                    confidence_std=0.2,
                ),
                "frac_reward_zero_std": 0.3,
                "completions/clipped_ratio": 0.01,
            }
            for i in range(100)
        ]
        assert feed(Monitor(), rows) == []

    @pytest.mark.parametrize("row", [{}, {"loss": 1.0}, dict.fromkeys(HEALTHY, NAN)])
    def test_missing_and_nan(self, row):
        assert feed(Monitor(), [row] * 30) == []

    def test_monitors_share_nothing(self):
        one, two = Monitor(), Monitor()
        one.update(1, {"frac_reward_zero_std": 1.0})
        assert two.alarms == []
