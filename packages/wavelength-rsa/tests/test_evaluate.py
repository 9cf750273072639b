"""Reports: figures worked by hand, roles named, equal bytes, paired comparison."""

import json
import math

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel
from wavelength_rsa.cache import CachedModel
from wavelength_rsa.data import Item
from wavelength_rsa.evaluate import Report, compare, evaluate_listener, evaluate_speaker
from wavelength_rsa.listeners import LogprobListener, SamplingListener, TableListener
from wavelength_rsa.scales import Scale
from wavelength_rsa.speakers import Candidates, RSASpeaker, SamplingSpeaker, Speaker

HOT, LOUD = Scale("Cold", "Hot"), Scale("Quiet", "Loud")
STEP = 50  # positions 0, 50, 100
ITEMS = [
    Item(HOT, "fire", 100, (100.0, 50.0), id="a"),
    Item(HOT, "ice", 0, (0.0, 0.0), id="b"),
    Item(LOUD, "siren", 50, (100.0, 100.0), id="c"),
]
TABLE = {
    ("Cold", "Hot", "fire"): [0.0, 0.5, 0.5],
    ("Cold", "Hot", "ice"): [1.0, 0.0, 0.0],
    ("Quiet", "Loud", "siren"): [0.25, 0.25, 0.5],
    ("Cold", "Hot", "lava"): [0.0, 0.0, 1.0],
    ("Cold", "Hot", "tea"): [0.0, 1.0, 0.0],
}


def table(name="judge"):
    return TableListener(TABLE, step=STEP, name=name)


class Fixed(Speaker):
    """Says 'lava' with probability 0.75 and 'tea' with 0.25, sampled two and six times."""

    name = "fixed"

    def __init__(self, listener=None):
        self.inner = listener

    def describe(self):
        return {"class": "Fixed", **({"listener": self.inner.describe()} if self.inner else {})}

    def _propose(self, tasks, seed):
        one = Candidates(
            ("lava", "tea"), np.array([2, 6]), np.array([0.25, 0.75]), np.array([0.75, 0.25]),
            np.array([1.0, 0.0]), ((), ("words",)), 2,
        )  # fmt: skip
        return [one] * len(tasks)


class TestListener:
    def test_figures_by_hand(self):
        report = evaluate_listener(table(), ITEMS, resamples=200)
        assert [row["mean"] for row in report.rows] == [75.0, 0.0, 62.5]
        assert [row["mean_error"] for row in report.rows] == [25.0, 0.0, 12.5]
        assert report.summary["mean_error"].value == pytest.approx(12.5)
        assert report.scalars["rmse"] == pytest.approx(math.sqrt((625 + 156.25) / 3))
        assert report.rows[0]["nll"] == pytest.approx(math.log(2))
        assert report.rows[0]["expected_distance"] == pytest.approx(25.0)
        assert report.rows[2]["expected_distance"] == pytest.approx(37.5)
        assert report.scalars["pair_order_accuracy"] == 1.0
        assert report.references["always 50"] == pytest.approx((50 + 50 + 0) / 3)
        assert report.references["mean of the human responses"] == pytest.approx((25 + 0 + 50) / 3)
        assert report.references["a single human"] == pytest.approx((25 + 0 + 50) / 3)
        assert report.rows[0]["w1"] == pytest.approx(0.0)
        assert report.rows[2]["w1"] == pytest.approx(0.25 * 100 + 0.25 * 50)
        means, human = np.array([75, 0, 62.5]), np.array([75, 0, 100.0])
        wanted = np.corrcoef(means, human)[0, 1]
        assert report.scalars["pearson with human mean"] == pytest.approx(wanted)

    def test_intervals_resample_concept_pairs(self):
        report = evaluate_listener(table(), ITEMS, resamples=2000)
        found = report.summary["mean_error"]
        assert found.low == pytest.approx(12.5)  # only the first pair: (25 + 0) / 2
        assert found.high == pytest.approx(12.5)

    def test_without_responses_nothing_human_is_reported(self):
        items = [Item(i.scale, i.clue, i.target, id=i.id) for i in ITEMS]
        report = evaluate_listener(table(), items, resamples=50)
        assert "w1" not in report.summary
        assert "a single human" not in report.references

    def test_bad_input(self):
        with pytest.raises(UserError, match="no item"):
            evaluate_listener(table(), [])
        with pytest.raises(UserError, match=r"47"):
            evaluate_listener(table(), [Item(HOT, "fire", 47)])


class TestSpeaker:
    def test_figures_by_hand(self):
        items = [ITEMS[0], Item(HOT, "tea", 100, id="again"), ITEMS[1]]
        report = evaluate_speaker(Fixed(), items, judge=table(), resamples=50)
        assert [(row["target"], row["id"]) for row in report.rows] == [(100, "a"), (0, "b")]
        hot = report.rows[0]
        assert hot["mean_error"] == pytest.approx(0.25 * 50)
        assert hot["base_mean_error"] == pytest.approx(0.75 * 50)
        assert hot["gain"] == pytest.approx(25.0)
        assert hot["violations"] == pytest.approx(0.25)
        assert hot["base_violations"] == pytest.approx(0.75)
        assert hot["refused"] == pytest.approx(0.2)
        assert hot["distinct"] == pytest.approx(2 / 8)
        assert hot["drawn_mean_error"] == {"lava": 0.0, "tea": 50.0}[hot["drawn"]]
        assert report.rows[1]["mean_error"] == pytest.approx(0.75 * 100 + 0.25 * 50)
        assert [c["judged_mean"] for c in hot["candidates"]] == [100.0, 50.0]
        said = report.references["clues in the data, mean_error"]
        assert said == pytest.approx((25 + 50 + 0) / 3)
        assert report.notes == []

    @pytest.mark.parametrize("seed", [0, 1, 2, 3])
    def test_draws_follow_the_seed(self, seed):
        drawn = [
            [r["drawn"] for r in evaluate_speaker(
                Fixed(), ITEMS[:2] * 1, judge=table(), seed=seed, resamples=10).rows]
            for _ in range(2)
        ]  # fmt: skip
        assert drawn[0] == drawn[1]

    def test_who_judges_is_said(self):
        judge = table()
        report = evaluate_speaker(Fixed(judge), ITEMS[:1], judge=table(), resamples=10)
        assert "Self-play" in report.notes[0]
        report = evaluate_speaker(Fixed(judge), ITEMS[:1], judge=table("other"), resamples=10)
        assert report.notes == []
        model = ScriptedModel(lambda *_: "<clue>lava</clue>", score=lambda p, t: -1.0, name="m")
        speaker = SamplingSpeaker(model, num_candidates=2)
        judge = LogprobListener(model, step=STEP)
        report = evaluate_speaker(speaker, ITEMS[:1], judge=judge, resamples=10)
        assert report.notes == ["Self-play: the speaker and the judge are the same model."]
        pragmatic = RSASpeaker(speaker, LogprobListener(model, step=STEP))
        report = evaluate_speaker(pragmatic, ITEMS[:1], judge=judge, resamples=10)
        assert "the listener that the speaker imagines" in report.notes[0]
        other = SamplingListener(
            ScriptedModel(lambda *_: "<answer>50</answer>", name="n"), step=STEP, num_samples=2
        )
        assert evaluate_speaker(pragmatic, ITEMS[:1], judge=other, resamples=10).notes == []

    def test_a_clue_the_judge_cannot_read_is_an_error(self):
        with pytest.raises(UserError):
            evaluate_speaker(Fixed(), [Item(LOUD, "siren", 50)], judge=table(), resamples=10)


class TestReport:
    def test_round_trip_and_equal_bytes(self, tmp_path):
        report = evaluate_listener(table(), ITEMS, resamples=100)
        again = evaluate_listener(table(), ITEMS, resamples=100)
        assert report.to_json() == again.to_json()
        json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
        report.save(tmp_path / "r.json")
        assert Report.load(tmp_path / "r.json").to_json() == report.to_json()
        assert "| mean_error | 12.500 |" in report.table()

    def test_equal_bytes_from_the_cache(self, tmp_path):
        def reply(prompt, seed, sample):
            return f"<answer>{[0, 50, 100][(seed + sample) % 3]}</answer>"

        found = []
        for model in (ScriptedModel(reply), ScriptedModel(reply), ScriptedModel()):
            with CachedModel(model, tmp_path / "c.db", identity="one") as cached:
                listener = SamplingListener(cached, step=STEP, num_samples=4)
                found.append(evaluate_listener(listener, ITEMS, seed=5, resamples=50).to_json())
        assert found[0] == found[1] == found[2]

    def test_what_is_no_report(self, tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            Report.load(tmp_path / "none.json")
        for text in ("{}", "[1]", "junk", '{"summary": 3}'):
            (tmp_path / "x.json").write_text(text)
            with pytest.raises(UserError, match="is no report"):
                Report.load(tmp_path / "x.json")


class TestCompare:
    def test_difference_of_equal_rows_is_zero(self):
        report = evaluate_listener(table(), ITEMS, resamples=50)
        for one in compare(report, report, resamples=50).values():
            assert one.value == pytest.approx(0.0)

    def test_rows_are_matched_not_counted_off(self):
        first = evaluate_listener(table(), ITEMS, resamples=50)
        uniform = TableListener({}, step=STEP, default="uniform")
        second = evaluate_listener(uniform, [*ITEMS[::-1]][:2], resamples=50)
        found = compare(first, second, resamples=50)["mean_error"]
        assert found.value == pytest.approx(((0 + 12.5) - (50 + 0)) / 2)

    def test_what_cannot_be_compared(self):
        listener = evaluate_listener(table(), ITEMS, resamples=10)
        speaker = evaluate_speaker(Fixed(), ITEMS[:1], judge=table(), resamples=10)
        with pytest.raises(UserError, match="one report is of a listener, the other of a speaker"):
            compare(listener, speaker)
        other = evaluate_listener(
            TableListener({}, step=STEP, default="uniform"), [Item(HOT, "x", 0)], resamples=10
        )
        with pytest.raises(UserError, match="no row in common"):
            compare(listener, other)
