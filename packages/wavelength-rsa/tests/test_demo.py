"""The demo: its claims can fail, notes say what went wrong, (slow) three seeds hold."""

import math

import numpy as np
import pytest
import torch

from tenfold_common.errors import UserError
from tenfold_common.results import Result
from wavelength_rsa import demo
from wavelength_rsa.demo import run_demo
from wavelength_rsa.experiment import (
    JUDGES,
    PAIRS,
    SPEAKERS,
    Example,
    Run,
    ToySettings,
    run_experiment,
)
from wavelength_rsa.metrics import Interval
from wavelength_rsa.scales import Distribution, Scale

TINY = ToySettings(
    steps=100, lines=4000, weak_steps=2, clues=2, num_candidates=4, curve=(1, 4), resamples=50
)  # fmt: skip
SCALE = Scale("slow", "fast")


def interval(value, half=1.0):
    return Interval(value, half / 2, value - half, value + half)


def made_up(**changes):
    """A run in which every claim holds with room to spare."""
    errors = dict(zip(SPEAKERS, (18, 14, 11, 8, 7, 11.5, 10, 10.6, 17.9, 18, 19), strict=True))
    rows = {n: {"mean_error": e, "expected_distance": e + 3} for n, e in errors.items()}
    gains = {(a, b): interval(errors[a] - errors[b]) for a, b in PAIRS}
    listening = {"exact": 10.07, "itself": 10.16, "second model": 10.19, "50 steps": 24.6,
                 "untrained": 24.5, "shuffled": 27.8}  # fmt: skip
    heard = {name: {one: {"mean_error": 10.0, "expected_distance": 12.0} for one in
             ("direct", "RSA")} for name in ("literal", "pragmatic")}  # fmt: skip
    said = {name: [("bazulo", 0.75), ("kimoki", 0.25)] for name in ("direct", "RSA")}
    values = {
        "seed": 0,
        "listening": {
            name: {"mean_error": e, "expected_distance": e + 4, "tv": 0.1, "spearman": 0.99,
                   "pearson": 0.99}
            for name, e in listening.items()
        },
        "means": {name: np.linspace(10, 90, 9) for name in listening},
        "speaking": dict.fromkeys(JUDGES, rows),
        "seen": {name: rows[name] for name in ("direct", "RSA")},
        "gains": dict.fromkeys(JUDGES, gains),
        "curve": {"direct": [18.0, 18.1], "RSA, alpha 1": [18.0, 11.0]},
        "changed_at_one": 0.0,
        "hearing": heard,
        "hearing_gains": {"direct": interval(0.1), "RSA": interval(1.5)},
        "examples": [Example(SCALE, 30.0, said, "bazulo", {"L0": Distribution.point(30)})],
    }  # fmt: skip
    return Run(**{**values, **changes})


def failed(runs):
    return {claim.name for claim in demo._claims(runs) if not claim.passed}


def gains(judge, pair, value):
    run = made_up()
    return {**run.gains, judge: {**run.gains[judge], pair: value}}


def listening(name, **columns):
    run = made_up()
    return {**run.listening, name: {**run.listening[name], **columns}}


def test_claims_hold_where_they_should():
    claims = demo._claims([made_up()] * 3)
    assert len(claims) == 12
    assert [claim.name for claim in claims if not claim.passed] == []
    assert all(claim.margin > 0 for claim in claims)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trained listener", {"listening": listening("itself", mean_error=10.6)}),
        ("trained listener", {"listening": listening("second model", mean_error=10.6)}),
        ("listener after 50 steps", {"listening": listening("50 steps", mean_error=15.0)}),
        ("trained listener's order", {"listening": listening("itself", spearman=0.9)}),
        ("trained listener's order", {"listening": listening("itself", spearman=math.nan)}),
        ("RSA over direct", {"gains": gains("exact", ("direct", "RSA"), interval(1.0))}),
        ("RSA over direct, another model judges",
         {"gains": gains("second model", ("direct", "RSA"), interval(0.5))}),
        ("alpha 4 over alpha 1", {"gains": gains("exact", ("RSA", "RSA, alpha 4"), interval(-2))}),
        ("CoT over direct", {"gains": gains("exact", ("direct", "CoT"), interval(0.9))}),
        ("RSA on CoT's clues", {"gains": gains("exact", ("CoT", "RSA over CoT"), interval(0))}),
        ("RSA over CoT", {"gains": gains("exact", ("CoT", "RSA"), interval(1.0))}),
        ("k = 1", {"changed_at_one": 1e-6}),
        ("chance listener",
         {"gains": gains("exact", ("direct", "RSA, untrained listener"), interval(0.6))}),
        ("chance listener",
         {"gains": gains("exact", ("direct", "RSA, untrained listener"), interval(-0.6))}),
        ("misled listener",
         {"gains": gains("exact", ("direct", "RSA, shuffled listener"), interval(3.5))}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 2])
def test_each_claim_fails_by_one_bad_seed(name, change, place):
    runs = [made_up() for _ in range(3)]
    runs[place] = made_up(**change)
    assert failed(runs) == {name}


def test_claims_state_what_was_measured():
    run = made_up(listening=listening("itself", mean_error=11.07))
    claim = next(c for c in demo._claims([run]) if c.name == "trained listener")
    assert claim.measured == pytest.approx(1.0)
    assert (claim.expected, claim.passed) == ("<= 0.5", False)
    assert claim.margin == pytest.approx(-0.5)
    claim = next(c for c in demo._claims([run]) if c.name == "RSA over direct")
    assert (claim.measured, claim.expected, claim.margin) == (6.0, "> 0", 6.0)


def test_tables_show_one_value_or_mean_and_range():
    settings = ToySettings(curve=(1, 32))
    one = demo._tables([made_up()], settings)
    assert [row[0] for row in one[1].rows] == list(SPEAKERS)
    assert one[1].rows[0] == ["direct", "18.00", "18.00", "18.00", "21.00", None]
    assert one[1].rows[2][-1] == "+7.00 (+6.00 to +8.00)"
    assert one[0].rows[1][1:] == ["10.16", "14.16", "0.100", "0.990"]
    assert one[2].rows == [["direct", "18.00", "18.10"], ["RSA, alpha 1", "18.00", "11.00"]]
    assert one[3].rows[1] == ["RSA", "10.00", "10.00", "+1.50 (+0.50 to +2.50)"]
    other = made_up(listening=listening("itself", mean_error=10.36))
    two = demo._tables([made_up(), other], settings)
    assert two[0].rows[1][1] == "10.26 (10.16 to 10.36)"


def test_notes_say_which_way_listening_went():
    runs = [made_up(), made_up(hearing_gains={"direct": interval(-2), "RSA": interval(1.5)})]
    notes = "\n".join(demo._notes(runs))
    assert "to RSA clues lowers the error by 1.50 points (significantly better in 2, worse" in notes
    assert (
        "to direct clues raises the error by 0.95 points (significantly better in 0, worse" in notes
    )
    assert "worse in 1 of 2 seeds" in notes


def test_notes_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "is_available", lambda name: False)
    assert "No figures" in "\n".join(demo._notes([made_up()]))
    assert demo._figures(tmp_path, made_up(), ToySettings()) == []


def test_figures_sample_and_summary(tmp_path):
    run, settings = made_up(), ToySettings(steps=7, curve=(1, 32))
    figures = demo._figures(tmp_path, run, settings)
    assert [(tmp_path / f.path).read_bytes()[:4] for f in figures] == [b"\x89PNG"] * 3
    text = demo._sample(run).text
    assert "slow .. fast, target 30" in text
    assert "bazulo 0.75  kimoki 0.25" in text
    assert '"bazulo" means: L0 30' in text
    assert demo._summary([run] * 3, settings).startswith("7 steps of training, 3 seeds, k = 32.")
    assert "direct 18.0, CoT 14.0, RSA 11.0, with alpha 4 8.0" in demo._summary([run], settings)


@pytest.fixture(scope="module")
def run():
    return run_experiment(5, TINY)


class TestExperiment:
    def test_everything_is_measured(self, run):
        assert set(run.speaking) == set(run.gains) == set(JUDGES)
        for rows in run.speaking.values():
            assert list(rows) == list(SPEAKERS)
            for row in rows.values():
                assert 0 < row["mean_error"] <= row["expected_distance"] < 100
        assert run.changed_at_one == 0
        assert set(run.curve) == {"direct", "RSA, alpha 1", "RSA, alpha 4"}
        assert len({values[0] for values in run.curve.values()}) == 1  # k = 1
        assert all(len(values) == 2 for values in run.curve.values())
        assert run.listening["exact"]["tv"] == pytest.approx(0, abs=1e-12)
        assert run.listening["exact"]["spearman"] == pytest.approx(1)
        best = min(row["expected_distance"] for row in run.listening.values())
        assert run.means["exact"].shape == (24,)
        assert best > 0
        assert run.listening["exact"]["mean_error"] == min(
            row["mean_error"] for row in run.listening.values()
        )

    def test_gains_are_differences_of_errors(self, run):
        for judge, found in run.gains.items():
            errors = run.speaking[judge]
            for (a, b), gain in found.items():
                expected = errors[a]["mean_error"] - errors[b]["mean_error"]
                assert gain.value == pytest.approx(expected, abs=1e-9)
                assert gain.low <= gain.value <= gain.high
        hearing = run.hearing
        for speaker, gain in run.hearing_gains.items():
            expected = (hearing["literal"][speaker]["mean_error"]
                        - hearing["pragmatic"][speaker]["mean_error"])  # fmt: skip
            assert gain.value == pytest.approx(expected, abs=1e-9)

    def test_what_does_not_depend_on_training(self, run):
        """An exact imagined listener judged by itself beats a shuffled one."""
        rows = run.speaking["exact"]
        assert rows["RSA, exact listener"]["mean_error"] < rows["direct"]["mean_error"]
        assert (
            rows["RSA, exact listener"]["mean_error"]
            < (rows["RSA, shuffled listener"]["mean_error"])
        )
        # Both judges of one speaker see the same clues.
        assert rows["direct"] != run.speaking["itself"]["direct"]

    def test_examples(self, run):
        assert [abs(e.target - wanted) <= 10 for e, wanted in
                zip(run.examples, (15, 50, 85), strict=True)] == [True] * 3  # fmt: skip
        for example in run.examples:
            assert example.clue == example.said["RSA"][0][0]
            assert set(example.heard) == {
                "true meaning", "literal listener L0", "pragmatic listener L1",
            }  # fmt: skip


class TestPeople:
    def test_asked_for_data_that_is_not_there(self, tmp_path, monkeypatch):
        with pytest.raises(UserError, match=r"data\.csv: there is no such file"):
            run_demo(tmp_path / "out", data=tmp_path)
        assert not (tmp_path / "out").exists()
        monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
        assert demo._people(None) is None
        monkeypatch.delenv("TENFOLD_DATA")
        assert demo._people(None) is None

    @pytest.mark.realdata
    def test_tables_of_people(self, data_folder, monkeypatch):
        monkeypatch.setenv("TENFOLD_DATA", str(data_folder))
        items = demo._people(None)
        assert items == demo._people(data_folder)
        tables, notes = demo._human(items)
        assert tables[0].rows[0][0] == "humans"
        assert tables[0].rows[0][1].startswith("7.23 (")
        assert [row[0] for row in tables[1].rows[1:]] == [
            f"{prefix}alpha {alpha}{rest}"
            for alpha in (1, 2)
            for prefix, rest in (
                ("RSA, ", ""),
                ("", ", less literal"),
                ("", ", less silence alone"),
            )
        ]
        assert len(notes) == 3
        assert all("the error of their mean" in note for note in notes[:2])

    def test_verdicts(self):
        def note(low, high):
            change = {"value": (low + high) / 2, "low": low, "high": high}
            return demo._people_note({"alpha": 2, "difference": {"mean_error": change}})

        assert "alpha 2 lowers the error of their mean (-1.50 points, -2.00 to -1.00)" in note(
            -2, -1
        )
        assert "raises the error" in note(1, 2)
        assert "does not clearly change" in note(-1, 2)


def test_the_whole_demo(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    monkeypatch.setattr(demo, "run_experiment", lambda seed, settings: made_up(
        seed=seed, curve={"direct": [18.0] * 7, "RSA, alpha 1": [11.0] * 7}))  # fmt: skip
    result = run_demo(tmp_path, seed=4, full=True)
    assert result.seeds == [4, 5, 6]
    assert result.passed
    assert "linlu-qiu/wavelength-eval" in result.notes[-1]
    result.save(tmp_path)
    assert Result.load(tmp_path) == result


@pytest.mark.slow
def test_claims_hold(tmp_path):
    """Three fresh seeds, worst seed; some ten minutes on one free core."""
    torch.set_num_threads(1)
    result = run_demo(tmp_path, seed=3, full=True)
    assert {c.name: c.passed for c in result.claims} == {c.name: True for c in result.claims}
    assert result.passed
