import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rsa_games import BARE, SHAPES, Null, game, logs

from tenfold_common.errors import UserError
from wavelength_rsa import rsa as rsa_module
from wavelength_rsa.rsa import RSA, Utility

# Batches and padding


@pytest.mark.parametrize("alpha", [0.0, 1.5, math.inf])
@pytest.mark.parametrize("null", ["uniform", None])
@pytest.mark.parametrize("utility", ["log_prob", "neg_expected_distance"])
@pytest.mark.parametrize("depth", [1, 2])
def test_padded_batch_equals_single_games(
    alpha: float, null: Null, utility: Utility, depth: int
) -> None:
    sizes, n, rng = [3, 5, 1, 4], 3, np.random.default_rng(0)
    games = [game(i, m, n) for i, m in enumerate(sizes)]
    padded = np.full((4, 6, n), math.nan)  # what stands in the padding does not matter
    cost, weights = rng.normal(size=(4, 6)), rng.random((4, 6)) + 0.1
    states = rng.random((4, n)) + 0.1
    mask = np.zeros((4, 6), dtype=bool)
    for i, probs in enumerate(games):
        where = np.sort(rng.permutation(6)[: len(probs)])  # padding may stand anywhere
        padded[i, where], mask[i, where] = logs(probs), True
    common = {
        "alpha": alpha,
        "null": null,
        "utility": utility,
        "positions": [0, 3, 4],
        "depth": depth,
    }
    batch = RSA(cost=cost, utterance_prior=weights, state_prior=states, **common)
    rows = np.hstack([mask, np.ones((4, 1), dtype=bool)]) if null else mask
    levels = batch.trace(padded, mask=mask)
    for i, probs in enumerate(games):
        alone = RSA(
            cost=cost[i, mask[i]],
            utterance_prior=weights[i, mask[i]],
            state_prior=states[i],
            **common,
        ).trace(logs(probs))
        for level, one in zip(levels, alone, strict=True):
            found = np.exp(level.log_probs[i])
            np.testing.assert_allclose(found[rows[i]], np.exp(one.log_probs), atol=1e-12)
            assert (found[~rows[i]] == 0.0).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.7, math.inf])
@pytest.mark.parametrize("null", ["uniform", None])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_of_a_batch_equal_the_whole(
    alpha: float, null: Null, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    probs = logs(np.stack([game(i, 5, 4, 0.3) for i in range(6)])).reshape(2, 3, 5, 4)
    mask = np.ones((2, 3, 5), dtype=bool)
    if padded:
        probs[0, 1, 4], mask[0, 1, 4] = math.nan, False
    rsa = RSA(alpha, 2, cost=rng.normal(size=(3, 5)), state_prior=[1, 2, 3, 4], null=null)
    whole = rsa.trace(probs, mask=mask)
    for size in (1, 48, 72):  # 1, 2 and 3 games of 6 x 4
        monkeypatch.setattr("wavelength_rsa.rsa.BLOCK", size)
        for one, level in zip(rsa.trace(probs, mask=mask), whole, strict=True):
            assert one.name == level.name
            np.testing.assert_allclose(one.log_probs, level.log_probs, rtol=1e-13, atol=1e-15)
            assert not np.shares_memory(one.log_probs, probs)
        two = rsa.trace(probs, mask=mask, levels=("L2", "S1"))
        assert [level.name for level in two] == ["S1", "L2"]
        np.testing.assert_allclose(two[1].log_probs, whole[-1].log_probs, rtol=1e-13, atol=1e-15)
        np.testing.assert_array_equal(rsa.log_listener(probs, mask=mask), two[1].log_probs)
    probs[1, 2, 3] += 0.1
    with pytest.raises(UserError, match=r"its row \(1, 2, 3\) has probabilities that sum"):
        rsa.listener(probs, mask=mask)


def test_batches_may_have_any_number_of_axes() -> None:
    probs = np.stack([game(i, 3, 4) for i in range(6)]).reshape(2, 3, 3, 4)
    found = RSA(cost=[0.1, 0.2, 0.3]).listener(logs(probs))
    assert found.shape == (2, 3, 4, 4)
    one = RSA(cost=[0.1, 0.2, 0.3]).listener(logs(probs[1, 2]))
    np.testing.assert_allclose(found[1, 2], one, rtol=1e-12)


# Torch


def test_torch_in_torch_out_and_numpy_in_numpy_out() -> None:
    probs = logs(game(0, 3, 4))
    tensor = torch.from_numpy(probs)
    for name in ("speaker", "log_speaker", "listener", "log_listener"):
        ours, theirs = getattr(RSA(), name)(probs), getattr(RSA(), name)(tensor)
        assert type(ours) is np.ndarray
        assert ours.dtype == np.float64
        assert type(theirs) is torch.Tensor
        assert theirs.dtype == torch.float64
        np.testing.assert_array_equal(ours, theirs.numpy())
    half = RSA(np.float32(2.0)).listener(tensor.float())  # pyright: ignore[reportArgumentType]
    assert half.dtype == torch.float64
    assert type(RSA().trace(tensor)[0].log_probs) is torch.Tensor


@pytest.mark.parametrize("utility", ["log_prob", "neg_expected_distance"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1.0, 1.7])
def test_gradients(utility: Utility, depth: int, value: float) -> None:
    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    mask = np.array([[True, True, False], [True, True, True]])
    kinds = ["log_speaker", "log_listener"]

    def run(scores: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rsa = RSA(
            alpha, depth, utility=utility, positions=range(4), state_prior=[1, 2, 3, 4], tau=2.0
        )
        found = [getattr(rsa, k)(scores.log_softmax(-1), mask=mask) for k in kinds]
        return tuple(f[f.detach().isfinite()] for f in found)

    if value == 0.0:  # at the edge of the domain only one side can be probed
        moved = torch.autograd.grad(run(scores, alpha)[1].square().sum(), alpha)[0]
        step = torch.tensor(1e-6, dtype=torch.float64)
        change = run(scores, step)[1].square().sum() - run(scores, 0.0 * step)[1].square().sum()
        assert float(moved) == pytest.approx(float(change.detach() / step), abs=1e-4)
    else:
        assert torch.autograd.gradcheck(run, (scores, alpha))


WEIGHTS = ("cost", "utterance_prior", "state_prior")


def weights_of(batch: tuple[int, ...], m: int, n: int) -> dict[str, torch.Tensor]:
    """Return cost, utterance_prior and state_prior of a batch, positive, with gradients."""
    generator = torch.Generator().manual_seed(3)
    sizes = dict(zip(WEIGHTS, (m, m, n), strict=True))
    return {
        name: torch.rand(*batch, size, generator=generator, dtype=torch.float64)
        .add(0.2)
        .requires_grad_()
        for name, size in sizes.items()
    }


def pulled(name: str, logs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return one number that depends on all weights, of a speaker or listener of depth 2."""
    rsa = RSA(1.3, 2, prior_weight=0.7, **given)  # pyright: ignore[reportArgumentType]
    found = getattr(rsa, name)(logs)
    return (found * torch.arange(found.shape[-1]) ** 2).sum(-1).sin().sum()


@pytest.mark.parametrize("name", ["log_speaker", "log_listener", "listener"])
@pytest.mark.parametrize("only", [None, *WEIGHTS])
def test_gradients_of_costs_and_priors_in_a_batch_of_more_than_a_block(
    name: str, only: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time too: where only a cost asks for gradients, the batch is one graph as well."""
    probs = torch.from_numpy(logs(np.stack([game(i, 4, 5) for i in range(6)]))).view(2, 3, 4, 5)
    given = weights_of((2, 3), 4, 5)
    names = [only] if only else list(given)
    for key in set(given) - set(names):
        given[key].requires_grad_(False)
    wanted = {key: torch.zeros_like(given[key]) for key in names}
    for i, j in np.ndindex(2, 3):  # games by themselves
        one = {key: w[i, j].detach().requires_grad_(key in names) for key, w in given.items()}
        found = torch.autograd.grad(pulled(name, probs[i, j], one), [one[key] for key in names])
        for key, gradient in zip(names, found, strict=True):
            wanted[key][i, j] = gradient
    for block in (1, 50, 2**18):  # one game, two games, all
        monkeypatch.setattr("wavelength_rsa.rsa.BLOCK", block)
        value = pulled(name, probs, given)
        found = torch.autograd.grad(value, [given[key] for key in names])
        for key, gradient in zip(names, found, strict=True):
            assert float(gradient.abs().sum()) > 0
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(pulled(name, probs, given), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["log_speaker", "log_listener"])
def test_gradients_of_costs_and_priors_are_those_of_small_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wavelength_rsa.rsa.BLOCK", 1)
    probs = torch.from_numpy(logs(np.stack([game(i, 3, 4) for i in range(2)])))
    given = weights_of((2,), 3, 4)
    assert torch.autograd.gradcheck(
        lambda *w: pulled(name, probs, dict(zip(given, w, strict=True))), tuple(given.values())
    )


def test_gradients_of_shared_weights_in_a_batch_that_really_is_large() -> None:
    """Shared by 2200 games of 6 x 21, more than fit a block; in parts that do, the sum."""
    n = 21
    probs = torch.from_numpy(logs(np.random.default_rng(0).dirichlet(np.ones(n), (2200, 5))))
    assert probs.shape[0] * 6 * n > rsa_module.BLOCK
    given = weights_of((), 5, n)
    whole = torch.autograd.grad(pulled("log_listener", probs, given), list(given.values()))
    parts = [
        torch.autograd.grad(pulled("log_listener", part, given), list(given.values()))
        for part in probs.split(550)
    ]
    for gradient, *each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(gradient, sum(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("utility", ["log_prob", "neg_expected_distance"])
@pytest.mark.parametrize("null", ["uniform", None])
def test_gradients_stay_finite_where_probabilities_are_0(utility: Utility, null: Null) -> None:
    table = torch.from_numpy(np.stack([SHAPES, SHAPES]))
    table[1, 3] = math.nan  # padding
    table[1, 0] = torch.tensor([1 / 4, 1 / 4, 1 / 2]).log()
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    table.requires_grad_()
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def objective(alpha: torch.Tensor) -> torch.Tensor:
        rsa = RSA(alpha, 2, null=null, utility=utility, positions=range(3))
        wanted = torch.arange(1.0, 4.0)
        return (rsa.listener(table, mask=mask) * wanted).square().sum() + (
            rsa.speaker(table, mask=mask) * wanted
        ).square().sum()

    by_table, by_alpha = torch.autograd.grad(objective(alpha), (table, alpha))
    assert by_table.isfinite().all()
    assert by_table[0].abs().max() > 0
    assert (by_table[1, 3] == 0).all()
    with torch.no_grad():
        slope = (objective(alpha + 1e-6) - objective(alpha - 1e-6)) / 2e-6
    assert float(by_alpha) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("writeable", [True, False])
def test_inputs_are_neither_changed_nor_shared(writeable: bool) -> None:
    probs = logs(game(0, 3, 4))
    before = probs.copy()
    probs.flags.writeable = writeable
    for level in (*RSA(depth=2).trace(probs), *replace(BARE, depth=0).trace(probs)):
        assert not np.shares_memory(level.log_probs, probs)
        level.log_probs[:] = 7.0
    np.testing.assert_array_equal(probs, before)


# Extreme numbers


def test_tiny_probabilities_do_not_underflow() -> None:
    scores = np.array([[0.0, -900.0, -2000.0], [-900.0, 0.0, -2100.0], [-800.0, -700.0, 0.0]])
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    found = replace(BARE, alpha=3.0).log_speaker(scores[:2])
    assert found[0, 2] == pytest.approx(0.0, abs=1e-12)
    assert found[1, 2] == pytest.approx(-300.0)
    assert found[1, 0] == pytest.approx(-2700.0)
    assert np.isfinite(replace(BARE, alpha=3.0, depth=3).log_listener(scores)).all()


def test_huge_costs_and_weights_do_not_overflow() -> None:
    probs = logs(game(2, 4, 3))
    wanted = RSA(cost=[0.0, 1.0, 2.0, 3.0], null=None).trace(probs)
    for shift in (-5000.0, -700.0, 700.0, 5000.0):
        found = RSA(cost=shift + np.arange(4.0), null=None).trace(probs)
        for one, level in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one.log_probs, level.log_probs, atol=1e-11)
    # At alpha = 1000 the first utterance is worth exp(-750), 0 in float64, to the second state; yet
    # with its weight of exp(700) it is the likelier one.
    low = math.exp(-0.75)
    found = RSA(1000.0, cost=[-700.0, 60.0], null=None).log_speaker(logs([[1 - low, low], [0, 1]]))
    np.testing.assert_allclose(np.exp(found[:, 1]), [1 / (1 + np.exp(-10)), 1 / (1 + np.exp(10))])
