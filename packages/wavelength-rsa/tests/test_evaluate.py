"""Reports: figures worked by hand, roles named, equal bytes, paired comparison."""

import itertools
import json
import math

import numpy as np
import pytest

from tenfold_common.errors import UserError
from tenfold_common.lm import ScriptedModel, ServerModel
from wavelength_rsa.cache import CachedModel, fingerprint
from wavelength_rsa.data import Item
from wavelength_rsa.evaluate import (
    Report,
    compare,
    different_settings,
    evaluate_listener,
    evaluate_speaker,
    shared_rows,
)
from wavelength_rsa.listeners import LogprobListener, SamplingListener, TableListener
from wavelength_rsa.metrics import cluster_bootstrap
from wavelength_rsa.scales import Scale
from wavelength_rsa.speakers import Candidates, RSAListener, RSASpeaker, SamplingSpeaker, Speaker

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
        self.listener = listener

    def describe(self):
        inner = {"listener": self.listener.describe()} if self.listener else {}
        return {"class": "Fixed", **inner}

    def _propose(self, tasks, seed):
        one = Candidates(
            ("lava", "tea"), np.array([2, 6]), np.array([0.25, 0.75]), np.array([0.75, 0.25]),
            np.array([1.0, 0.0]), ((), ("words",)), 2,
        )  # fmt: skip
        return [one] * len(tasks)


class Even(Speaker):
    """Says any of two hundred clues."""

    name = "even"

    def describe(self):
        return {"class": "Even"}

    def _propose(self, tasks, seed):
        clues, even = tuple(f"c{i}" for i in range(200)), np.full(200, 1 / 200)
        ones = np.ones(200, dtype=np.int64)
        return [Candidates(clues, ones, even, even, None, ((),) * 200, 0)] * len(tasks)


def shared(one, other):
    """Return how many places hold the same."""
    return sum(a == b for a, b in zip(one, other, strict=True))


def player(name):
    """A model that says 'lava' and takes every clue for everything."""
    return ScriptedModel(
        lambda prompt, *_: "<clue>lava" if "<clue>" in str(prompt) else "<answer>50",
        score=lambda *_: -1.0, name=name,
    )  # fmt: skip


IMAGINED = (
    "Self-play: the judge is the listener that the speaker imagines, so the speaker is graded by "
    "what it optimises. Use another judge for a claim."
)
USED = "Self-play: the judge and the imagined listener are the same model, used differently."
JUDGED = "Self-play: the speaker and the judge are the same model."
OWN = "The speaker imagines a listener of its own model."


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

    def test_tables_that_are_imagined_and_judge(self):
        same = evaluate_speaker(Fixed(table()), ITEMS[:1], judge=table(), resamples=10)
        assert same.notes == [IMAGINED]
        other = evaluate_speaker(Fixed(table()), ITEMS[:1], judge=table("other"), resamples=10)
        assert other.notes == []

    def test_who_judges_is_said(self):
        """Model m proposes; m, n or both are imagined and judge, literally or pragmatically."""
        m, n = player("m"), player("n")
        proposer = SamplingSpeaker(m, num_candidates=2)

        def literal(model):
            return LogprobListener(model, step=STEP)

        def reasoning(literally, speaks):
            clues = SamplingSpeaker(speaks, num_candidates=2)
            return RSAListener(literal(literally), clues)

        pragmatic = RSASpeaker(proposer, literal(m))
        sampled = SamplingListener(m, step=STEP, num_samples=2)
        for speaker, judge, notes in (
            (proposer, literal(m), [JUDGED]),
            (proposer, literal(n), []),
            (proposer, reasoning(m, n), [JUDGED]),
            (proposer, reasoning(n, m), [JUDGED]),
            (proposer, reasoning(n, n), []),
            (pragmatic, literal(m), [IMAGINED, JUDGED, OWN]),
            (pragmatic, sampled, [USED, JUDGED, OWN]),
            (pragmatic, literal(n), [OWN]),
            (pragmatic, reasoning(m, n), [USED, JUDGED, OWN]),
            (RSASpeaker(proposer, literal(n)), literal(n), [IMAGINED]),
            (RSASpeaker(proposer, literal(n)), literal(m), [JUDGED]),
            (RSASpeaker(proposer, literal(n)), literal(player("o")), []),
            (RSASpeaker(proposer, reasoning(n, n)), literal(n), [USED]),
            (RSASpeaker(proposer, reasoning(n, m)), literal(n), [USED, OWN]),
            (RSASpeaker(proposer, reasoning(n, m)), reasoning(n, m), [IMAGINED, JUDGED, OWN]),
            (RSASpeaker(proposer, reasoning(m, n)), literal(player("o")), [OWN]),
            (RSASpeaker(proposer, literal(n)), table(), []),
            (RSASpeaker(RSASpeaker(proposer, literal(n)), literal(m)), literal(n), [IMAGINED, OWN]),
        ):
            report = evaluate_speaker(speaker, ITEMS[:1], judge=judge, resamples=10)
            assert report.notes == notes, (speaker.name, judge.name)

    def test_models_are_recorded_by_role(self):
        m, n, o = player("m"), player("n"), player("o")
        speaker = RSASpeaker(SamplingSpeaker(m, num_candidates=2), LogprobListener(n, step=STEP))
        judge = RSAListener(LogprobListener(o, step=STEP), SamplingSpeaker(m, num_candidates=2))
        report = evaluate_speaker(speaker, ITEMS[:1], judge=judge, resamples=10)
        assert report.settings["models"] == {
            "speaker": [fingerprint(m)],
            "imagined listener": [fingerprint(n)],
            "judge": [fingerprint(o), fingerprint(m)],
        }
        heard = evaluate_listener(judge, ITEMS[:1], resamples=10)
        assert heard.settings["models"] == {"listener": [fingerprint(o), fingerprint(m)]}
        assert evaluate_listener(table(), ITEMS, resamples=10).settings["models"] == {
            "listener": []
        }

    def test_a_name_makes_no_self_play_and_a_cache_hides_none(self, start_server, tmp_path):
        """Two models of one name, each known by its address, also behind a cache."""
        urls = [start_server().url for _ in range(2)]
        one, again, other = (ServerModel(url) for url in (urls[0], *urls))
        assert one.name == other.name
        proposer = SamplingSpeaker(player("m"), num_candidates=2)
        direct = SamplingSpeaker(one, num_candidates=2)
        pragmatic = RSASpeaker(proposer, LogprobListener(one, step=STEP))
        with (
            CachedModel(again, tmp_path / "c.db") as cached,
            CachedModel(other, tmp_path / "c.db") as cached_other,
        ):
            for judging, same in (
                (one, True), (again, True), (cached, True), (other, False), (cached_other, False),
            ):  # fmt: skip
                judge = LogprobListener(judging, step=STEP)
                assert judge.describe() == pragmatic.listener.describe()
                for speaker, note in ((direct, JUDGED), (pragmatic, IMAGINED)):
                    report = evaluate_speaker(speaker, ITEMS[:1], judge=judge, resamples=10)
                    assert report.notes == [note] * same

    def test_every_draw_has_a_stream_of_its_own(self):
        """Neither item k + 1 of one seed nor item k of the next draws what the other does."""
        items = [Item(Scale(f"L{i}", f"R{i}"), "x", 50) for i in range(12)]
        judge = TableListener({}, step=STEP, default="uniform")

        def drawn(seed):
            report = evaluate_speaker(Even(), items, judge=judge, seed=seed, resamples=10)
            return [row["drawn"] for row in report.rows]

        draws = [drawn(seed) for seed in range(4)]
        assert drawn(2) == draws[2]
        for one, following in itertools.pairwise(draws):
            assert shared(one, following) <= 1
            assert shared(one[1:], following[:-1]) <= 1
            assert shared(one[:-1], following[1:]) <= 1
            assert shared(one[1:], one[:-1]) <= 1

    def test_intervals_resample_concept_pairs(self):
        """One target of a pair and three of another: a resample may hold either pair alone."""
        middle = [0.0, 1.0, 0.0]
        rows = {(s.left, s.right, clue): middle for s in (HOT, LOUD) for clue in ("lava", "tea")}
        rows |= {(s.left, s.right, "x"): middle for s in (HOT, LOUD)}
        judge = TableListener({**rows, ("Cold", "Hot", "lava"): [1.0, 0.0, 0.0]}, step=STEP)
        items = [Item(HOT, "x", 100, id="h"), Item(LOUD, "x", 50, id="l")]
        items += [Item(LOUD, "x", 0, id="m"), Item(LOUD, "x", 100, id="n")]
        report = evaluate_speaker(Fixed(), items, judge=judge, resamples=2000)
        errors = [row["mean_error"] for row in report.rows]
        assert errors == pytest.approx([0.75 * 100 + 0.25 * 50, 0.0, 50.0, 50.0])
        found = report.summary["mean_error"]
        assert found.value == pytest.approx(np.mean(errors))
        assert (found.low, found.high) == pytest.approx((100 / 3, 87.5))  # of the pairs alone
        groups = np.array([0, 1, 1, 1])
        for name, one in report.summary.items():
            values = np.array([row[name] for row in report.rows])
            assert one == cluster_bootstrap(values, groups, resamples=2000, seed=0), name

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

    def test_equal_rows_go_together_one_by_one(self):
        """Two groups of people asked about one clue are two rows."""
        twice = [ITEMS[0], Item(HOT, "fire", 100, (0.0, 0.0), id="d"), ITEMS[2]]
        report = evaluate_listener(table(), twice, resamples=50)
        for name, one in compare(report, report, resamples=50).items():
            assert one.value == pytest.approx(0.0), name
        fewer = evaluate_listener(table(), twice[1:], resamples=50)
        assert [len(shared_rows(report, fewer)), len(shared_rows(fewer, report))] == [2, 2]

    def test_pairs_are_resampled_by_both_ends(self):
        """Scales that share one end are two concept pairs."""
        other = Scale("Cold", "Spicy")
        items = [ITEMS[0], Item(other, "fire", 100), Item(other, "ice", 0)]
        listener = TableListener(
            {
                **TABLE,
                ("Cold", "Spicy", "fire"): [0, 0, 1.0],
                ("Cold", "Spicy", "ice"): [1.0, 0, 0],
            },
            step=STEP,
        )
        first = evaluate_listener(listener, items, resamples=50)
        second = evaluate_listener(
            TableListener({}, step=STEP, default="uniform"), items, resamples=50
        )
        assert not math.isnan(compare(first, second, resamples=50)["mean_error"].low)

    def test_settings_that_differ_are_named(self):
        first = evaluate_listener(table("a"), ITEMS, resamples=10)
        second = evaluate_listener(table("b"), ITEMS, resamples=10, seed=3)
        assert different_settings(first, first) == []
        found = different_settings(first, second)
        assert "seed: 0, 3" in found
        assert any(line.startswith("listener.") for line in found)

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
