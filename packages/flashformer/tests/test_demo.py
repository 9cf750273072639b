"""The demo: its claims can fail, a short run fills every table, (slow) the claims hold."""

import math

import pytest
import torch

from flashformer import demo
from flashformer.verification import Verification
from tenfold_common.errors import UserError
from tenfold_common.results import Result


def made_up(**changes):
    """A run in which every claim holds with room to spare."""
    names = (
        "transformers fp32",
        "transformers bf16",
        *(f"flashformer {n}" for n in ("fp32", *demo.BOUNDS)),
    )
    values = {
        "seed": 0,
        "loss": 2.0,
        "parameters": 1_600_000,
        "same": Verification(256, 256, None, None, 1e-6, 0.0),
        "perplexity": {"fp32": 10.0, "bf16": 10.001, "int8": 10.01, "int4": 10.2},
        "gate": {"ours": 1e-6, "transformers": 1e-4},
        "speed": {
            n: [100.0, 90.0, 80.0] if "trans" in n else [2000.0, 1500.0, 900.0] for n in names
        },
        "calls": {"many tokens": 9e-5, "token": 1e-4, "layer": 2e-4, "stage": 5e-4},
        "sample": "To be",
    }
    return {**values, **changes}


def failed(*runs):
    return {claim.name for claim in demo._claims(runs) if not claim.passed}


def test_claims_hold_where_they_should():
    assert failed(made_up(), made_up()) == set()


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"same": Verification(256, 200, 200, 0.5, 1e-6, 0.0)}, "same tokens"),
        ({"perplexity": {**made_up()["perplexity"], "bf16": 10.02}}, "perplexity bf16"),
        ({"perplexity": {**made_up()["perplexity"], "int8": 10.06}}, "perplexity int8"),
        ({"perplexity": {**made_up()["perplexity"], "int4": 10.6}}, "perplexity int4"),
        ({"gate": {"ours": 2e-4, "transformers": 1e-4}}, "nearer to float32"),
        ({"calls": {**made_up()["calls"], "stage": 1.1e-4}}, "one call a token"),
        (
            {"speed": {**made_up()["speed"], "flashformer fp32": [400.0, 1, 1]}},
            "faster than transformers",
        ),
    ],
)  # fmt: skip
def test_each_claim_can_fail_by_its_worst_seed(changes, claim):
    assert failed(made_up(), made_up(**changes)) == {claim}


def test_a_tie_is_no_difference():
    tie = Verification(256, 255, 17, 1e-6, 1e-6, 0.0)
    assert failed(made_up(same=tie)) == set()


def test_a_short_run_fills_everything(tmp_path):
    torch.set_num_threads(1)
    result = demo.run_demo(tmp_path, steps=3)
    result.save(tmp_path)
    assert Result.load(tmp_path / "result.json") == result
    assert {c.name for c in result.claims} == {c.name for c in demo._claims([made_up()])}
    assert all(math.isfinite(c.measured) for c in result.claims)
    perplexity, speed, calls = result.tables
    assert [row[0] for row in perplexity.rows] == ["fp32", "bf16", "int8", "int4"]
    assert len(speed.rows) == 6
    assert [row[0] for row in calls.rows] == ["many tokens", "token", "layer", "stage"]
    assert all(isinstance(x, float) and x > 0 for row in calls.rows for x in row[1:])
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    # Equal seeds: what does not depend on time is equal.
    assert result.claims[:5] == demo.run_demo(tmp_path, steps=3).claims[:5]


def test_training_is_reproducible_and_learns():
    ids = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40)) + 3
    one, loss = demo.train(ids, 259, seed=1, steps=4)
    other, _ = demo.train(ids, 259, seed=1, steps=4)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loss < math.log(259)


def test_text_that_is_named_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"has no shakespeare/input\.txt"):
        demo.run_demo(tmp_path, data=tmp_path)


@pytest.mark.slow
def test_the_claims_hold(tmp_path):
    result = demo.run_demo(tmp_path)
    assert result.passed, result.markdown()
