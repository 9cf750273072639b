"""The demo: its claims can fail, notes say what went wrong, (slow) three seeds hold."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch

from rlcr import demo
from rlcr.demo import NAMES, run_demo, run_toy
from rlcr.experiment import ARMS, ToySettings, measures, run_experiment
from rlcr.metrics import MetricsWarning, auroc, brier_score, ece
from rlcr.toy import NoisySensor
from tenfold_common.errors import UserError
from tenfold_common.results import Result

COLUMNS = ("accuracy", "brier", "ece", "auroc", "mean_q", "std_q", "distance")
TINY = ToySettings(
    warmup_steps=2, steps=2, side_steps=3, hedging_warmup_steps=1, test_rows=50, prompts=4,
    num_generations=4,
)  # fmt: skip


def made_up(seeds=1):
    """Rows and alarms of a run in which every claim holds with room to spare."""
    values = {
        "bayes": (0.708, 0.097, 0.016, 0.92, 0.71, 0.2, 0.0),
        "sft": (0.72, 0.17, 0.18, 0.86, 0.9, 0.1, 0.2),
        "sft/probability": (0.72, 0.107, 0.03, 0.91, 0.7, 0.2, 0.1),
        "rlvr": (0.715, 0.28, 0.28, 0.5, 1.0, 0.0, 0.29),
        "rlvr/probability": (0.715, 0.21, 0.22, 0.87, 0.93, 0.1, 0.2),
        "rlcr": (0.713, 0.107, 0.021, 0.9, 0.717, 0.2, 0.048),
        "rlcr/probability": (0.713, 0.2, 0.2, 0.87, 0.9, 0.1, 0.2),
        "log_unscaled": (0.6, 0.1, 0.03, 0.9, 0.6, 0.2, 0.1),
        "log_unscaled/probability": (0.6, 0.2, 0.2, 0.8, 0.8, 0.1, 0.2),
        "hedging": (0.1, 0.089, 0.002, 0.5, 0.1, 0.0, 0.6),
        "hedging/probability": (0.1, 0.3, 0.3, 0.5, 0.4, 0.1, 0.3),
    }
    rows = {name: dict(zip(COLUMNS, v, strict=True)) for name, v in values.items()}
    alarms = {"rlvr": [], "rlcr": [], "log_unscaled": [], "hedging": ["hedging_collapse"]}
    return (
        [copy.deepcopy(rows) for _ in range(seeds)],
        [copy.deepcopy({"sft": [], **alarms}) for _ in range(seeds)],
    )


def failed(runs, alarms):
    return {claim.name for claim in demo._claims(runs, alarms) if not claim.passed}


def test_claims_hold_where_they_should():
    claims = demo._claims(*made_up(3))
    assert len(claims) == 10
    assert [claim.name for claim in claims if not claim.passed] == []
    assert all(claim.margin >= 0 for claim in claims)


@pytest.mark.parametrize(
    ("name", "arm", "column", "value"),
    [
        ("accuracy kept", "rlvr", "accuracy", 0.76),
        ("RLCR: ECE", "rlcr", "ece", 0.071),
        ("RLCR: Brier", "rlcr", "brier", 0.131),
        ("RLCR: AUROC", "rlcr", "auroc", 0.85),
        ("RLCR: AUROC", "rlcr", "auroc", math.nan),
        ("RLCR: |q - Bayes q|", "rlcr", "distance", 0.13),
        ("RLVR: answer probability spoiled", "rlvr/probability", "ece", 0.12),
        ("RLCR ahead of RLVR", "rlvr", "brier", 0.15),
    ],
)
@pytest.mark.parametrize("seed", [0, 2])
def test_each_claim_fails_by_one_bad_seed(name, arm, column, value, seed):
    runs, alarms = made_up(3)
    runs[seed][arm][column] = value
    assert failed(runs, alarms) == {name}


def test_claims_about_alarms_can_fail():
    runs, alarms = made_up(2)
    alarms[1]["hedging"] = ["truncated"]
    assert failed(runs, alarms) == {"hedging alarm"}
    runs[1]["hedging"]["mean_q"] = 0.6  # it does not hedge, so there is nothing to notice
    assert failed(runs, alarms) == set()
    assert "hedged in 1 of 2 seeds" in "\n".join(demo._notes(runs, alarms))
    alarms[0]["rlcr"] = ["truncated"]
    assert failed(runs, alarms) == set()
    runs, alarms = made_up(2)
    alarms[0]["rlcr"] = ["confidence_collapse"]
    assert failed(runs, alarms) == {"no false alarm"}


def test_claims_state_what_was_measured():
    runs, alarms = made_up()
    runs[0]["rlcr"]["ece"] = 0.2
    claim = next(c for c in demo._claims(runs, alarms) if c.name == "RLCR: ECE")
    assert (claim.measured, claim.expected, claim.passed) == (0.2, "<= 0.07", False)
    assert claim.margin == pytest.approx(-0.13)
    rule = next(c for c in demo._claims(runs, alarms) if c.name == "bad rule refused")
    assert rule.measured == pytest.approx(0.5 - math.log(0.95 / 0.05))
    assert rule.passed


def test_the_claim_about_the_bad_rule_fails_if_it_is_accepted(monkeypatch):
    monkeypatch.setattr(demo, "RLCRReward", lambda **named: None)
    runs, alarms = made_up()
    assert failed(runs, alarms) == {"bad rule refused"}


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.6, "It cost accuracy"), (0.72, "It did not cost accuracy here")]
)
def test_what_the_bad_rule_did_is_said_either_way(accuracy, said):
    runs, alarms = made_up()
    runs[0]["log_unscaled"]["accuracy"] = accuracy
    assert said in "\n".join(demo._notes(runs, alarms))


def test_notes_state_what_went_wrong(monkeypatch):
    runs, alarms = made_up(2)
    alarms[1]["log_unscaled"] = ["hedging_collapse", "truncated"]
    notes = "\n".join(demo._notes(runs, alarms))
    assert "Seed 1 of the run, RLCR, log rule unscaled: hedging_collapse, truncated." in notes
    assert "Seed 0 of the run, RLCR, warm-up too short: hedging_collapse." in notes
    assert "Seed 0 of the run, RLCR, log" not in notes
    assert "anything about language" in notes
    assert "The hedging arm ends with accuracy 0.100 and Brier score 0.089" in notes
    assert "matplotlib" not in notes
    monkeypatch.setattr(demo, "is_available", lambda name: False)
    assert "No figures: they need matplotlib" in demo._notes(runs, alarms)[-1]


def test_table_shows_one_value_or_mean_and_range():
    runs, _ = made_up()
    table = demo._table(runs, 2000)
    assert "2,000 test prompts" in table.title
    assert [row[:2] for row in table.rows[:5]] == [
        ["Bayes", "exact"],
        ["warm-up only", "stated"],
        ["warm-up only", "answer probability"],
        ["RLVR", "stated"],
        ["RLVR", "answer probability"],
    ]
    assert table.rows[0][2:] == ["0.708", "0.097", "0.016", "0.920", "0.710", "0.200", "0.000"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    runs, _ = made_up(3)
    runs[2]["rlcr"]["ece"] = 0.051
    row = next(r for r in demo._table(runs, 50).rows if r[:2] == ["RLCR", "stated"])
    assert row[4] == "0.031 (0.021 to 0.051)"


def test_votes_and_summary():
    table = demo._vote_table([{"majority": 0.7, "greedy": 0.6}, {"majority": 0.8, "greedy": 0.6}])
    assert table.rows == [["majority", "0.750"], ["greedy", "0.600"]]
    runs, _ = made_up(3)
    text = demo._summary(runs, ToySettings(warmup_steps=40, steps=50))
    assert "40 steps of SFT, then 50 steps of GRPO" in text
    assert "3 seeds" in text
    assert "RLCR: accuracy 0.713, Brier 0.107, ECE 0.021" in text


def test_measures():
    q, c = np.array([0.9, 0.8, 0.3, 0.6]), np.array([1.0, 1.0, 0.0, 0.0])
    found = measures(q, c, np.array([0.9, 0.9, 0.3, 0.4]))
    assert found["accuracy"] == 0.5
    assert found["brier"] == pytest.approx(0.125) == brier_score(q, c)
    assert (found["ece"], found["auroc"]) == (ece(q, c), auroc(q, c))
    assert found["distance"] == pytest.approx(0.3 / 4)
    assert "distance" not in measures(q, c)


def test_settings_of_the_arms_are_one_experiment():
    settings = ToySettings()
    assert settings.test_rows == 2000
    assert settings.steps > settings.side_steps
    assert settings.hedging_warmup_steps < settings.warmup_steps
    assert set(NAMES) == {"sft", *ARMS}


@pytest.fixture(scope="module")
def tiny():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_experiment(ARMS, settings=TINY, seed=3)


def test_experiment_runs_all_arms_from_one_start(tiny):
    test, results = tiny
    assert list(results) == ["sft", *ARMS]
    assert len(test.digit) == 50
    start = dict(results["sft"].model.named_parameters())
    for name in ARMS:
        result = results[name]
        assert len(result.policy.answers) == 50
        steps = [row["step"] for row in result.history if "loss" in row or "train_loss" in row]
        assert steps[-1] == (2 if name in ("rlvr", "rlcr") else 3)
        changed = [
            not torch.equal(weight, start[key]) for key, weight in result.model.named_parameters()
        ]
        assert all(weight.isfinite().all() for weight in result.model.parameters())
        assert any(changed)
    sft = results["sft"].model
    again = run_experiment((), settings=TINY, seed=3)[1]["sft"].model
    assert all(torch.equal(a, b) for a, b in zip(sft.parameters(), again.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::rlcr.metrics.MetricsWarning")
def test_what_the_demo_makes_of_an_experiment(tiny, tmp_path):
    test, results = tiny
    task = NoisySensor()
    rows = demo.table_rows(task, test, results)
    assert list(rows)[:3] == ["bayes", "sft", "sft/probability"]
    assert len(rows) == 1 + 2 * 5
    assert rows["bayes"]["distance"] == 0
    cells = demo._cells(task, test, results)
    assert sum(int(str(row[2])) for row in cells.rows) == 50
    assert cells.columns[-2:] == ["RLCR, log rule unscaled", "RLCR, warm-up too short"]
    assert {row[1] for row in cells.rows} <= {"all differ", "two agree", "three agree"}
    votes = demo._votes(task, test, results["rlcr"], 3)
    assert set(votes) == {"majority", "max", "weighted", "one sample", "greedy"}
    assert all(0 <= value <= 1 for value in votes.values())
    figures = demo._figures(tmp_path, task, test, results)
    assert [(tmp_path / f.path).read_bytes()[:4] for f in figures] == [b"\x89PNG"] * 2
    text = demo._sample(task, test, results).text
    assert text.splitlines()[0].startswith("s")
    assert "RLVR: " in text


def test_toy_makes_no_claims_and_is_reproducible(tmp_path):
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        with pytest.warns(MetricsWarning):
            found.append(run_toy(tmp_path / name, TINY, ("rlcr",), seed=1))
    result = found[0]
    assert result.claims == []
    assert result.seeds == [1]
    assert result.tables == found[1].tables
    assert "warmup_steps=2" in result.summary
    assert [row[0] for row in result.tables[0].rows] == [
        "Bayes", "warm-up only", "warm-up only", "RLCR", "RLCR",
    ]  # fmt: skip
    result.save(tmp_path / "a")
    assert Result.load(tmp_path / "a").tables == result.tables


def test_toy_refuses_an_unknown_arm(tmp_path):
    with pytest.raises(UserError, match=r"there is no arm 'rlvrr'.*Did you mean 'rlvr'"):
        run_toy(tmp_path, TINY, ("rlvrr",))


@pytest.mark.slow
def test_claims_hold(tmp_path):
    """Three seeds, worst seed; about a quarter of an hour on one free core."""
    torch.set_num_threads(1)
    result = run_demo(tmp_path, full=True)
    result.save(tmp_path)
    assert Result.load(tmp_path) == result
    assert {c.name: c.passed for c in result.claims} == {c.name: True for c in result.claims}
    assert result.passed
