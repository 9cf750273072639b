"""The demo: its claims can fail, notes say what went wrong, (slow) three seeds hold."""

import pytest
import torch

from path_attn import demo
from path_attn.config import TrainConfig
from path_attn.demo import ENCODINGS, SETS, run_demo
from path_attn.tasks import task_tokenizer
from path_attn.training import build_model
from tenfold_common.results import Result


def made_up(path_error=0.0, rope_error=0.3):
    errors = {"path": path_error, "path_fox": 0.0, "fox": 0.2, "rope": rope_error}
    return {
        name: [
            {
                "errors": dict.fromkeys(SETS, errors[name]),
                "scored": dict.fromkeys(SETS, 1000),
                "losses": [(50, 1.0), (300, 0.5)],
                "parameters": 59000,
            }
        ]
        for name in ENCODINGS
    }


def means(runs):
    return {name: results[0]["errors"] for name, results in runs.items()}


def test_claims_hold_where_they_should():
    runs = made_up()
    assert all(claim.passed for claim in demo._claims(runs, means(runs)))


def test_each_claim_can_fail():
    runs = made_up(path_error=0.02)
    failed = {c.name for c in demo._claims(runs, means(runs)) if not c.passed}
    assert failed == {f"PaTH, {s}" for s in SETS}
    runs = made_up(rope_error=0.03)
    failed = {c.name for c in demo._claims(runs, means(runs)) if not c.passed}
    assert failed == {"PaTH ahead of RoPE and FoX"}
    runs = made_up()
    runs["fox"][0]["parameters"] = 50000
    failed = {c.name for c in demo._claims(runs, means(runs)) if not c.passed}
    assert failed == {"equal parameter counts"}


def test_worst_seed_counts():
    runs = made_up()
    runs["path"].append({**runs["path"][0], "errors": dict.fromkeys(SETS, 0.5)})
    claim = demo._claims(runs, means(runs))[0]
    assert (claim.passed, claim.measured) == (False, 50.0)


def test_notes_state_what_went_wrong():
    runs = made_up(path_error=0.4)
    notes = "\n".join(demo._notes(runs, means(runs), 300))
    assert "under-trained" in notes
    assert "PaTH did worse than 1% on sparse: 40.00 %" in notes
    assert "PaTH was not better than RoPE" in notes


def test_figures_and_table(tmp_path):
    runs = made_up()
    tokenizer = task_tokenizer(TrainConfig())
    models = {
        name: build_model(TrainConfig(position_encoding=name).resolved(), tokenizer).eval()
        for name in ENCODINGS
    }
    figures = demo._figures(tmp_path, runs, means(runs), models, 0)
    assert [(tmp_path / f.path).read_bytes()[:4] for f in figures] == [b"\x89PNG"] * 2
    table = demo._table(runs, means(runs), 300)
    assert [row[0] for row in table.rows] == ["PaTH", "PaTH-FoX", "FoX", "RoPE"]
    assert table.rows[3][1] == "30.00 [paper 6.9]"
    sample = demo._sample(models, 0)
    assert sample.text.splitlines()[0].split()[-1] in ("0)", "1)")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claims_hold(tmp_path, seed):
    torch.set_num_threads(1)
    result = run_demo(tmp_path, seed=seed)
    result.save(tmp_path)
    assert Result.load(tmp_path) == result
    assert {c.name: c.passed for c in result.claims} == {c.name: True for c in result.claims}
