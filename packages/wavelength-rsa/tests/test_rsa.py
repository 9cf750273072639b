import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold_common.errors import UserError
from wavelength_rsa import rsa as rsa_module
from wavelength_rsa.fitting import FitResult, fit_rsa
from wavelength_rsa.reference import (
    naive_listener,
    naive_metric_speaker,
    naive_production,
    naive_trace,
)
from wavelength_rsa.rsa import RSA, Utility, production

BARE = RSA(null=None)
Null = Literal["uniform"] | None


def logs(probs: object) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, dtype=np.float64))


def game(seed: int, m: int, n: int, zeros: float = 0.0) -> np.ndarray:
    """Probabilities [m, n]; a share of exact zeros, but no empty row or column."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(n, 0.7), size=m)
    gaps = rng.random((m, n)) < zeros
    gaps[np.arange(m), np.arange(m) % n] = False
    gaps[np.arange(n) % m, np.arange(n)] = False
    probs = np.where(gaps, 0.0, probs + 1e-9)
    return probs / probs.sum(1, keepdims=True)


def table(matrix: np.ndarray) -> dict[int, dict[int, float]]:
    return {i: dict(enumerate(row)) for i, row in enumerate(matrix.tolist())}


def keyed(values: np.ndarray | None) -> dict[int, float] | None:
    return None if values is None else dict(enumerate(values.tolist()))


def matrix(levels: dict[int, dict[int, float]], speaker: bool) -> np.ndarray:
    rows = np.array([[row[key] for key in sorted(row)] for _, row in sorted(levels.items())])
    return rows.T if speaker else rows


def with_null(probs: np.ndarray) -> np.ndarray:
    return np.vstack([probs, np.full(probs.shape[1], 1 / probs.shape[1])])


# Equations


@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 6),
    n=st.integers(1, 5),
    zeros=st.sampled_from([0.0, 0.4]),
    depth=st.integers(0, 3),
    alpha=st.sampled_from([0.5, 1.0, 1.7, 4.0]),
    lam=st.sampled_from([0.0, 1.0, 2.5]),
    extras=st.booleans(),
    null=st.booleans(),
)
def test_every_level_is_that_of_the_plain_equations(
    seed: int,
    m: int,
    n: int,
    zeros: float,
    depth: int,
    alpha: float,
    lam: float,
    extras: bool,
    null: bool,
) -> None:
    rng = np.random.default_rng(seed)
    probs = game(seed, m, n, zeros)
    cost, weights, states = rng.normal(size=m), rng.random(m) + 0.1, rng.random(n) + 0.1
    if not extras:
        cost = weights = states = None
    rsa = RSA(
        alpha=alpha,
        depth=depth,
        cost=cost,
        state_prior=states,
        utterance_prior=weights,
        prior_weight=lam,
        null="uniform" if null else None,
    )
    full = with_null(probs) if null else probs
    if null and cost is not None and weights is not None:
        cost, weights = np.append(cost, 0.0), np.append(weights, weights.mean())
    expected = naive_trace(
        table(full),
        depth,
        prior=keyed(weights),
        state_prior=keyed(states),
        alpha=alpha,
        lam=lam,
        cost=keyed(cost),
    )
    got = rsa.trace(logs(probs))
    assert [level.name for level in got] == [name for name, _ in expected]
    for level, (name, wanted) in zip(got, expected, strict=True):
        speaker = name.startswith("S")
        found = np.exp(level.log_probs)
        np.testing.assert_allclose(found, matrix(wanted, speaker), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.sum(0 if speaker else 1), 1.0, atol=1e-12)
    last = {level.name[0]: level.log_probs for level in got}
    np.testing.assert_array_equal(rsa.log_listener(logs(probs)), last["L"])
    if depth:
        np.testing.assert_array_equal(rsa.log_speaker(logs(probs)), last["S"])
        np.testing.assert_array_equal(rsa.speaker(logs(probs)), np.exp(last["S"]))
        np.testing.assert_array_equal(rsa.listener(logs(probs)), np.exp(last["L"]))


SHAPES = logs([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def test_reference_game_of_frank_and_goodman() -> None:
    np.testing.assert_allclose(
        BARE.speaker(SHAPES),
        [[1 / 2, 1 / 3, 0], [1 / 2, 0, 1 / 3], [0, 2 / 3, 0], [0, 0, 2 / 3]],
        atol=1e-15,
    )
    listener = BARE.listener(SHAPES)
    np.testing.assert_allclose(listener[:2], [[0.6, 0.4, 0.0], [0.6, 0.0, 0.4]], atol=1e-15)
    salient = replace(BARE, state_prior=[1, 3, 1]).listener(SHAPES)
    np.testing.assert_allclose(salient[0], [1 / 3, 2 / 3, 0.0], atol=1e-15)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_scalar_implicature_grows_with_alpha(alpha: float) -> None:
    some = logs([[1, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 1]])
    said = 1 / (1 + 3**alpha)  # S1(some | all three)
    rsa = replace(BARE, alpha=alpha)
    assert rsa.speaker(some)[1, 3] == pytest.approx(said, rel=1e-12)
    expected = np.array([0.0, 1.0, 1.0, said]) / (2 + said)
    np.testing.assert_allclose(rsa.listener(some)[1], expected, atol=1e-15)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 21))
def test_one_utterance_alone_teaches_nothing(seed: int, n: int) -> None:
    only = logs(game(seed, 1, n))
    prior = np.random.default_rng(seed).random(n) + 0.1
    found = replace(BARE, state_prior=prior).listener(only)
    np.testing.assert_allclose(found[0], prior / prior.sum(), rtol=1e-12)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 21), zeros=st.sampled_from([0.0, 0.5]))
def test_one_utterance_or_silence_is_flatter_than_its_literal_meaning(
    seed: int, n: int, zeros: float
) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(n, 0.5)) + 1e-9
    p[1:][np.random.default_rng(seed + 1).random(n - 1) < zeros] = 0.0
    p /= p.sum()
    found = RSA().listener(logs(p[None]))[0]
    expected = p / (p + 1 / n)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-12)
    # Its largest k states never hold more mass than those of p (majorisation).
    more = np.cumsum(np.sort(p)[::-1]) - np.cumsum(np.sort(found)[::-1])
    assert more.min() >= -1e-12


@given(seed=st.integers(0, 10**6), depth=st.integers(1, 3))
def test_order_of_utterances_and_states_does_not_matter(seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    probs = logs(game(seed, 5, 4, 0.3))
    us, ts = rng.permutation(5), rng.permutation(4)
    cost, weights, states = rng.normal(size=5), rng.random(5) + 0.1, rng.random(4) + 0.1
    rsa = RSA(2.0, depth, cost, states, weights)
    moved = RSA(2.0, depth, cost[us], states[ts], weights[us])
    for a, b in zip(rsa.trace(probs), moved.trace(probs[us][:, ts]), strict=True):
        expected = np.exp(a.log_probs)[[*us, 5]][:, ts]
        np.testing.assert_allclose(np.exp(b.log_probs), expected, atol=1e-12)


# The null utterance


def test_null_utterance_is_the_last_row_and_can_be_dropped() -> None:
    probs = game(0, 4, 3)
    for name in ("log_speaker", "log_listener"):
        full = getattr(RSA(), name)(logs(probs))
        assert full.shape == (5, 3)
        np.testing.assert_array_equal(full, getattr(BARE, name)(logs(with_null(probs))))
        np.testing.assert_array_equal(getattr(RSA(), name)(logs(probs), keep_null=False), full[:-1])
        assert getattr(BARE, name)(logs(probs), keep_null=False).shape == (4, 3)


def test_null_utterance_weighs_like_the_mean_of_the_others_and_costs_nothing() -> None:
    probs, cost, weights = game(1, 3, 4), np.array([0.5, -1.0, 2.0]), np.array([1.0, 3.0, 8.0])
    found = RSA(cost=cost, utterance_prior=weights).speaker(logs(probs))
    by_hand = RSA(cost=[*cost, 0.0], utterance_prior=[1, 3, 8, 4], null=None)
    np.testing.assert_allclose(found, by_hand.speaker(logs(with_null(probs))), rtol=1e-12)
    scaled = RSA(cost=cost, utterance_prior=10 * weights).speaker(logs(probs))
    np.testing.assert_allclose(found, scaled, rtol=1e-12)


# Limits of alpha and lam


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, torch.tensor(0.0)])
def test_alpha_0_gives_the_priors_even_of_what_is_impossible(
    depth: int, alpha: "float | torch.Tensor"
) -> None:
    rsa = RSA(
        alpha,
        depth,
        cost=np.log([1, 2, 1, 1]),
        state_prior=[1, 2, 1],
        utterance_prior=[1, 4, 3, 2],
        null=None,
    )
    wanted = np.array([1, 2, 3, 2]) / 8
    np.testing.assert_allclose(rsa.speaker(SHAPES), np.tile(wanted[:, None], 3), rtol=1e-12)
    np.testing.assert_allclose(rsa.listener(SHAPES), np.tile([0.25, 0.5, 0.25], (4, 1)), rtol=1e-12)


def test_alpha_inf_says_the_best_utterance_and_shares_ties() -> None:
    probs = logs([[0.7, 0.2, 0.1], [0.7, 0.1, 0.2], [0.2, 0.6, 0.2]])
    sharp = replace(BARE, alpha=math.inf)
    np.testing.assert_allclose(
        sharp.speaker(probs), [[0.5, 0, 0], [0.5, 0, 0.5], [0, 1, 0.5]], atol=1e-15
    )
    np.testing.assert_allclose(
        sharp.listener(probs), [[1, 0, 0], [0.5, 0, 0.5], [0, 2 / 3, 1 / 3]], atol=1e-15
    )
    weighted = replace(sharp, utterance_prior=[1, 3, 2]).speaker(probs)
    np.testing.assert_allclose(weighted[:, 0], [0.25, 0.75, 0], atol=1e-15)


@pytest.mark.parametrize("near", [1e-7, 1e-9, 1e-11])
def test_alpha_inf_decides_what_differs_by_more_than_rounding(near: float) -> None:
    """A clear difference, however small, is no tie; logarithms of equal sums are one."""
    a, b = 0.5 - near, 0.5 + near
    sharp = replace(BARE, alpha=math.inf)
    probs = logs([[a, b], [b, a]])
    np.testing.assert_array_equal(sharp.speaker(probs), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(sharp.listener(probs), [[0, 1], [1, 0]])
    positions = replace(sharp, utility="neg_expected_distance", positions=[0.0, 1.0])
    np.testing.assert_array_equal(positions.speaker(probs), [[0, 1], [1, 0]])


def test_alpha_inf_shares_what_differs_by_rounding() -> None:
    sharp = replace(BARE, alpha=math.inf)
    rows = np.array([[0.1 + 0.2, 0.7], [0.3, 1 - 0.3], [0.7 - 0.4, 0.7]])
    assert len(set(rows[:, 0])) == 3
    np.testing.assert_allclose(sharp.speaker(logs(rows)), np.full((3, 2), 1 / 3), rtol=1e-14)
    np.testing.assert_allclose(
        sharp.listener(logs([[0.1 + 0.2, 0.3, 0.4], [0.2, 0.2, 0.6]])),
        [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]],
        rtol=1e-14,
    )


@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 7),
    zeros=st.sampled_from([0.0, 0.4]),
    metric=st.booleans(),
    null=st.sampled_from(["uniform", None]),
    certain=st.booleans(),
)
def test_alpha_inf_is_the_limit_also_for_utterances_never_said(
    seed: int, m: int, zeros: float, metric: bool, null: Null, certain: bool
) -> None:
    rng = np.random.default_rng(seed)
    rounded = np.round(8 * game(seed, m, 4, zeros)) + (game(seed, m, 4, zeros) > 0)  # has ties
    probs = rounded / rounded.sum(1, keepdims=True)
    states = rng.random(4) + 0.1
    states[0] *= zeros > 0 or not certain  # a prior of 0 where every row fits other states too
    settings = {
        "cost": rng.normal(size=m),
        "utterance_prior": rng.random(m) + 0.1,
        "state_prior": states,
        "null": null,
        "positions": range(4),
        "utility": "neg_expected_distance" if metric else "log_prob",
    }
    limit, near = RSA(math.inf, **settings), RSA(1e5, **settings)
    for name in ("speaker", "listener"):
        found = getattr(limit, name)(logs(probs))
        np.testing.assert_allclose(found, getattr(near, name)(logs(probs)), atol=1e-9)
    by_tensor = RSA(torch.tensor(math.inf), **settings).listener(logs(probs))
    np.testing.assert_array_equal(by_tensor, limit.listener(logs(probs)))


def test_prior_weight_0_forgets_the_prior_even_where_it_is_0() -> None:
    probs = logs(game(3, 3, 4))
    rsa = RSA(utterance_prior=[0.0, 1.0, 3.0], prior_weight=0.0)
    np.testing.assert_allclose(rsa.speaker(probs), RSA().speaker(probs), rtol=1e-12)


def test_utterance_of_prior_0_is_not_said_but_understood_as_a_rare_one() -> None:
    probs = logs(game(4, 3, 4))
    never, rare = (RSA(utterance_prior=[p, 1.0, 3.0]) for p in (0.0, 1e-13))
    assert never.speaker(probs)[0].max() == 0.0
    np.testing.assert_allclose(never.listener(probs), rare.listener(probs), atol=1e-9)


def test_state_prior_of_0_is_never_understood() -> None:
    probs = game(5, 3, 4)
    prior = np.array([0.0, 1.0, 2.0, 3.0])
    listener = RSA(state_prior=prior).listener(logs(probs))
    assert listener[:, 0].max() == 0.0
    np.testing.assert_allclose(listener.sum(1), 1.0)
    wanted = naive_listener(naive_trace(table(with_null(probs)), 1)[1][1], keyed(prior))
    np.testing.assert_allclose(listener, matrix(wanted, speaker=False), atol=1e-12)


# Utilities that measure distances


@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0.0, 1.0, 2.5]),
    tau=st.sampled_from([1.0, 10.0]),
)
def test_metric_speaker_is_that_of_the_plain_equations(seed: int, alpha: float, tau: float) -> None:
    rng = np.random.default_rng(seed)
    probs, positions = game(seed, 4, 6, 0.5), np.sort(rng.random(6)) * 20
    cost, weights = rng.normal(size=4), rng.random(4) + 0.1
    rsa = RSA(
        alpha,
        cost=cost,
        utterance_prior=weights,
        null=None,
        utility="neg_expected_distance",
        positions=positions,
        tau=tau,
    )
    settings = {"prior": keyed(weights), "alpha": alpha, "cost": keyed(cost)}

    def away(a: int, b: int) -> float:
        return abs(positions[a] - positions[b]) / tau

    first = naive_metric_speaker(table(probs), away, **settings)
    heard = naive_listener(first)
    second = naive_metric_speaker(heard, away, **settings)
    np.testing.assert_allclose(rsa.speaker(logs(probs)), matrix(first, True), atol=1e-12)
    np.testing.assert_allclose(rsa.listener(logs(probs)), matrix(heard, False), atol=1e-12)
    deep = replace(rsa, depth=2)
    np.testing.assert_allclose(deep.speaker(logs(probs)), matrix(second, True), atol=1e-12)


def test_neg_w1_is_the_wasserstein_distance_to_the_state() -> None:
    from scipy.stats import wasserstein_distance

    probs, positions = game(6, 3, 5), np.array([0.0, 10.0, 15.0, 40.0, 100.0])
    rsa = RSA(2.0, null=None, utility="neg_w1", positions=positions, tau=7.0)
    away = [[wasserstein_distance(positions, [t], row) for t in positions] for row in probs]
    wanted = np.exp(-2.0 * np.array(away) / 7.0)
    np.testing.assert_allclose(rsa.speaker(logs(probs)), wanted / wanted.sum(0), rtol=1e-10)


def test_metric_utility_needs_no_reachable_states() -> None:
    rsa = RSA(null=None, utility="neg_expected_distance", positions=[0, 1, 2])
    found = rsa.speaker(logs([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(found[1, 2], 1 / (1 + math.exp(-1.0)))


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


# Mistakes


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def wrong(rows: Callable[[np.ndarray], object]) -> Callable[[], object]:
    return lambda: RSA().listener(rows(logs(game(0, 3, 4))))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (wrong(lambda x: np.exp(x)), r"holds probabilities; pass their logarithms"),
        (wrong(lambda x: x.T), r"columns sum to 1.*transposed.*swapaxes"),
        (wrong(lambda x: x + 0.1), r"row \(0,\) has probabilities that sum to 1.105"),
        (wrong(lambda x: x + column(0, 0, 2e-6)), r"row \(2,\) has probabilities that sum to"),
        (wrong(lambda x: np.stack([x, x + column(0, 1, 0)])), r"row \(1, 1\)"),
        (wrong(lambda x: np.where(x == x[1, 1], math.nan, x)), r"row \(1,\) has NaN"),
        (wrong(lambda x: x * 0 + math.inf), r"sum to inf"),
        (wrong(lambda x: x[0]), r"axes \[\.\.\., utterances, states\].*\[4\]"),
        (wrong(lambda x: x[:0]), r"none of them empty.*\[0, 4\]"),
        (wrong(lambda x: [["a", "b"]]), r"expected numbers"),
        (lambda: RSA(-0.1), r"alpha must be .* at least 0.*-0\.1"),
        (lambda: RSA(math.nan), r"alpha .*nan"),
        (lambda: RSA(True), r"alpha .*True"),
        (lambda: RSA("1"), r"alpha .*'1'"),  # pyright: ignore[reportArgumentType]
        (lambda: RSA(torch.ones(2)), r"alpha must be one number"),
        (lambda: RSA(depth=-1), r"depth must be a whole number of at least 0, not -1"),
        (lambda: RSA(depth=1.0), r"depth .*1\.0"),  # pyright: ignore[reportArgumentType]
        (lambda: RSA(prior_weight=-1.0), r"prior_weight .*-1"),
        (lambda: RSA(null="silence"), r'null must be "uniform" or None'),  # pyright: ignore[reportArgumentType]
        (lambda: RSA(utility="log_probs"), r"Did you mean 'log_prob'"),  # pyright: ignore[reportArgumentType]
        (lambda: RSA(utility="neg_w1"), r"needs positions"),
        (lambda: RSA(tau=0.0), r"tau must be .* above 0"),
        (lambda: RSA(cost=[0.0]).listener(SHAPES), r"cost has the shape \[1\].*\[4\]"),
        (lambda: RSA(cost=[[0.0] * 4] * 2).listener(SHAPES), r"cost has the shape \[2, 4\]"),
        (
            lambda: RSA(cost=np.zeros((3, 4))).listener(np.stack([SHAPES] * 2)),
            r"cost has the shape \[3, 4\].*\[2, 4\]",
        ),
        (lambda: RSA(cost=[0, 0, 0, math.inf]).listener(SHAPES), r"cost must be finite"),
        (lambda: RSA(state_prior=[1, 1]).listener(SHAPES), r"state_prior has the shape \[2\]"),
        (lambda: RSA(state_prior=[1, 1, -1]).listener(SHAPES), r"state_prior must be finite and"),
        (lambda: RSA(state_prior=[0, 0, 0]).listener(SHAPES), r"state_prior must not be 0"),
        (lambda: RSA(utterance_prior=[1, 1, 1]).listener(SHAPES), r"utterance_prior has the sh"),
        (lambda: RSA(utterance_prior=[1, 1, 1, math.nan]).listener(SHAPES), r"utterance_prior mu"),
        (
            lambda: RSA(utility="neg_w1", positions=[0, 1]).listener(SHAPES),
            r"positions must be 3 finite numbers",
        ),
        (lambda: RSA().listener(SHAPES, mask=[1, 1, 1, 0]), r"mask must be bool"),
        (lambda: RSA().listener(SHAPES, mask=[True, False]), r"mask has the shape \[2\]"),
        (lambda: BARE.listener(SHAPES, mask=[False] * 4), r"no utterance that can be said"),
        (
            lambda: BARE.trace(SHAPES, levels=["S2"]),
            r"levels at depth 1 are L0, S1, L1, not 'S2'",
        ),
        (lambda: replace(BARE, depth=0).speaker(SHAPES), r"no speaker at depth 0.*depth=1"),
        (lambda: BARE.speaker(SHAPES[:1]), r"no utterance can mean state 2: .*null=.*smooth L0"),
        (
            lambda: BARE.speaker(np.stack([SHAPES] * 2), mask=[[True] * 4, [True, False] * 2]),
            r"state 2 of game \(1,\)",
        ),
        (
            lambda: replace(BARE, alpha=math.inf).speaker(SHAPES[:1]),
            r"no utterance can mean state 2",
        ),
        (
            lambda: replace(BARE, utterance_prior=[1, 0, 1, 0]).speaker(SHAPES),
            r"no utterance can mean state 2",
        ),
        (
            lambda: RSA(depth=2, state_prior=[1, 1, 0], null=None).speaker(SHAPES[:3]),
            r"S2 cannot speak of state 2.*state_prior is 0",
        ),
        (
            lambda: RSA(state_prior=[1, 1, 0]).listener(SHAPES),
            r"utterance 3 fits only states whose state_prior is 0",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


# Production


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 8),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    lam=st.sampled_from([0.0, 1.0, 2.0]),
    extras=st.booleans(),
)
def test_production_is_that_of_the_plain_equation(
    seed: int, k: int, alpha: float, lam: float, extras: bool
) -> None:
    rng = np.random.default_rng(seed)
    heard = np.where(rng.random(k) < 0.3, 0.0, rng.random(k))
    heard[0] = 0.5
    counts, cost = rng.integers(1, 9, size=k), rng.normal(size=k)
    prior, costs = (counts, cost) if extras else (None, None)
    found = production(logs(heard), prior, alpha, lam, costs)
    wanted = naive_production(
        dict(enumerate(heard.tolist())), keyed(prior), alpha, lam, keyed(costs)
    )
    np.testing.assert_allclose(np.exp(found), list(wanted.values()), rtol=1e-10, atol=1e-12)


def test_production_by_hand_and_in_the_limit() -> None:
    heard = np.log([0.2, 0.2, 0.1])
    np.testing.assert_allclose(np.exp(production(heard, [1, 3, 4])), [1 / 6, 1 / 2, 1 / 3])
    np.testing.assert_allclose(np.exp(production(heard, [1, 3, 4], math.inf)), [0.25, 0.75, 0.0])
    np.testing.assert_allclose(np.exp(production(heard, alpha=math.inf)), [0.5, 0.5, 0.0])
    assert production(logs([0.0]), alpha=0.0).tolist() == [0.0]
    near_misses = production([-0.5, -2.0])  # another utility, such as minus a distance
    np.testing.assert_allclose(np.exp(near_misses[0] - near_misses[1]), np.exp(1.5))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: production([]), r"k >= 1.*\[0\]"),
        (lambda: production([[-1.0]]), r"\[1, 1\]"),
        (lambda: production([0.3]), r"the value 0\.3.*at most 0; pass np\.log"),
        (lambda: production([math.nan]), r"the value nan"),
        (lambda: production([-1.0, -1.0], [1]), r"prior has the shape \[1\]"),
        (lambda: production([-1.0], [-1]), r"prior must be finite and at least 0"),
        (lambda: production([-1.0], [0]), r"prior must not be 0 throughout"),
        (lambda: production([-1.0], alpha=-1), r"alpha"),
        (lambda: production([-1.0], lam=math.inf), r"lam"),
        (lambda: production([-1.0], cost=[1, 2]), r"cost has the shape \[2\]"),
        (lambda: production([-math.inf] * 2), r"every candidate's target probability 0; smooth"),
        (lambda: production([-math.inf, -1.0], [1, 0]), r"every candidate's"),
        (lambda: production([-math.inf] * 2, alpha=math.inf), r"every candidate's"),
    ],
)
def test_mistakes_in_production_are_named(call: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


# Fitting


def played(
    alpha: float, games: int = 30, people: int = 60, n: int = 7, **settings: object
) -> tuple[list, list, list, list]:
    """Games of different sizes, and responses drawn from a pragmatic listener."""
    rng = np.random.default_rng(1)
    l0s, heard, human, groups = [], [], [], []
    for i in range(games):
        l0s.append(logs(game(i, int(rng.integers(2, 6)), n)))
        heard.append(int(rng.integers(len(l0s[-1]))))
        probs = RSA(alpha, **settings).listener(l0s[-1])[heard[-1]]  # pyright: ignore[reportArgumentType]
        human.append(rng.multinomial(people, probs / probs.sum()))
        groups.append(f"pair {i // 2}")
    return l0s, heard, human, groups


@pytest.fixture(scope="module")
def fitted() -> FitResult:
    return fit_rsa(*played(2.5))


def likelihood(alpha: float, l0s: list, heard: list, human: list, **settings: object) -> float:
    """Sum of log-likelihoods by the plain equations."""
    total = 0.0
    for l0, row, counts in zip(l0s, heard, human, strict=True):
        full = with_null(np.exp(l0))
        level = naive_trace(table(full), 1, alpha=alpha, **settings)[2][1][row]  # pyright: ignore[reportArgumentType]
        total += sum(c * math.log(level[t]) for t, c in enumerate(counts) if c)
    return total


def test_fit_finds_the_alpha_of_the_people(fitted: FitResult) -> None:
    l0s, heard, human, _ = played(2.5)
    assert fitted.low < 2.5 < fitted.high
    assert fitted.low < fitted.alpha < fitted.high < 4.0
    assert fitted.log_likelihood == pytest.approx(likelihood(fitted.alpha, l0s, heard, human))
    for other in (0.97, 1.03):
        assert likelihood(other * fitted.alpha, l0s, heard, human) < fitted.log_likelihood - 1e-3
    near = [likelihood(fitted.alpha * (1 + s), l0s, heard, human) for s in (-1e-3, 1e-3)]
    assert abs(near[1] - near[0]) < 1e-3 * abs(near[0] + near[1] - 2 * fitted.log_likelihood) + 1e-3
    for alpha, value in fitted.curve[::9]:
        assert value == pytest.approx(likelihood(alpha, l0s, heard, human))
    assert max(value for _, value in fitted.curve) <= fitted.log_likelihood
    assert not fitted.at_bound


def test_fit_beats_the_literal_listener_on_games_held_out(fitted: FitResult) -> None:
    l0s, heard, human, groups = played(2.5)
    literal = sum(float(c @ l0[row]) for l0, row, c in zip(l0s, heard, human, strict=True))
    assert fitted.baseline_log_likelihood == pytest.approx(literal)
    assert fitted.cv_baseline == pytest.approx(literal)
    assert literal < fitted.cv_log_likelihood < fitted.log_likelihood
    assert len(fitted.folds) == 10
    assert sum(fold.groups for fold in fitted.folds) == len(set(groups))
    assert sum(f.log_likelihood for f in fitted.folds) == pytest.approx(fitted.cv_log_likelihood)


def test_every_fold_is_fitted_without_what_it_holds_out() -> None:
    l0s, heard, human, groups = played(2.5, games=6, people=20)
    found = fit_rsa(l0s, heard, human, groups, folds=3, resamples=10)
    expected = set()
    for pair in ("pair 0", "pair 1", "pair 2"):
        keep = [i for i, group in enumerate(groups) if group != pair]
        kept = [[values[i] for i in keep] for values in (l0s, heard, human, groups)]
        alpha = fit_rsa(*kept, resamples=1, folds=2).alpha
        out = [i for i, group in enumerate(groups) if group == pair]
        lost = [[values[i] for i in out] for values in (l0s, heard, human)]
        expected.add((round(alpha, 5), round(likelihood(alpha, *lost), 4)))
    assert {(round(f.alpha, 5), round(f.log_likelihood, 4)) for f in found.folds} == expected


def test_interval_is_that_of_refitted_resamples() -> None:
    l0s, heard, human, groups = played(2.5, games=12)
    found = fit_rsa(l0s, heard, human, groups, resamples=4000)
    rng, pairs, refitted = np.random.default_rng(5), sorted(set(groups)), []
    alphas = np.geomspace(1.0, 6.0, 400)
    curves = np.zeros((len(pairs), len(alphas)))
    for l0, row, counts, pair in zip(l0s, heard, human, groups, strict=True):
        curves[pairs.index(pair)] += [counts @ RSA(a).log_listener(l0)[row] for a in alphas]
    for _ in range(4000):
        drawn = rng.integers(len(pairs), size=len(pairs))
        refitted.append(alphas[curves[drawn].sum(0).argmax()])
    low, high = np.quantile(refitted, [0.025, 0.975])
    assert found.low == pytest.approx(low, rel=0.03)
    assert found.high == pytest.approx(high, rel=0.03)


def test_fit_keeps_all_other_settings() -> None:
    settings = {"cost": [0.5, -0.5, 0.2], "state_prior": [1, 2, 3, 4, 5, 6, 7], "depth": 2}
    rng = np.random.default_rng(0)
    l0s = [logs(game(i, 3, 7)) for i in range(8)]
    truth = RSA(1.5, **settings)  # pyright: ignore[reportArgumentType]
    human = [1e5 * truth.listener(l0)[0] for l0 in l0s]  # expected counts: no noise
    groups = list(rng.permutation(8))
    found = fit_rsa(l0s, [0] * 8, human, groups, rsa=replace(truth, alpha=99.0), folds=2)
    assert found.alpha == pytest.approx(1.5, rel=1e-5)
    assert all(fold.alpha == pytest.approx(1.5, rel=1e-5) for fold in found.folds)
    assert found.low == pytest.approx(1.5, rel=0.02)
    padded = np.pad(np.tile([0.5, -0.5, 0.2], (8, 1)), ((0, 0), (0, 1)), constant_values=9.0)
    l0s[3] = logs(with_null(np.exp(l0s[3])))
    padded[3, 3] = 0.7
    ragged = replace(truth, cost=[*settings["cost"], 0.7])  # pyright: ignore[reportGeneralTypeIssues]
    human[3] = 1e5 * ragged.listener(l0s[3])[0]
    again = fit_rsa(l0s, [0] * 8, human, groups, rsa=replace(truth, cost=padded), folds=2)
    assert again.alpha == pytest.approx(1.5, rel=1e-5)


def test_fit_says_when_alpha_lies_beyond_the_grid() -> None:
    data = played(6.0, games=8)
    found = fit_rsa(*data, alphas=[0.5, 1.0, 2.0], resamples=50)
    assert found.at_bound
    assert found.alpha == pytest.approx(2.0)
    flat = fit_rsa(
        data[0], data[1], [np.ones(7)] * 8, data[3], alphas=[1.0, 2.0, 4.0], resamples=50
    )
    assert flat.at_bound
    assert flat.alpha == pytest.approx(1.0)
    assert flat.log_likelihood < flat.baseline_log_likelihood + 1000


def test_one_group_gives_no_interval_and_no_folds() -> None:
    l0s, heard, human, _ = played(2.5, games=4)
    found = fit_rsa(l0s, heard, human, ["all"] * 4)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(found.cv_log_likelihood)
    assert math.isnan(found.cv_baseline)
    assert found.folds == ()
    assert 1.5 < found.alpha < 4.0


def test_fit_depends_on_the_seed_alone(fitted: FitResult) -> None:
    data = played(2.5)
    assert fit_rsa(*data) == fitted
    other = fit_rsa(*data, seed=1)
    assert other.alpha == fitted.alpha
    assert other.folds != fitted.folds


def test_states_nobody_chose_may_be_impossible() -> None:
    scores = [SHAPES, SHAPES]
    found = fit_rsa(scores, [0, 1], [[6, 4, 0], [6, 0, 4]], [0, 1], rsa=BARE, resamples=10)
    assert found.alpha == pytest.approx(1.0, rel=1e-5)  # L1 = 3/5, 2/5 at alpha = 1
    assert found.log_likelihood == pytest.approx(2 * (6 * math.log(0.6) + 4 * math.log(0.4)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heard": [0]}, r"heard has 1 entries for 2 games"),
        ({"human": [[1, 1, 1]] * 3}, r"human has 3 entries"),
        ({"groups": []}, r"groups has 0 entries"),
        ({"heard": [0, 4]}, r"heard\[1\] is 4, but game 1 has 4 utterances"),
        ({"heard": [-1, 0]}, r"heard\[0\] is -1"),
        ({"human": [[1, 1, 0], [1, 1]]}, r"human\[1\] must be 3 counts"),
        ({"human": [[1, -1, 0], [1, 1, 0]]}, r"human\[0\] must be 3 counts"),
        ({"human": [[1, 1, 0], [1, 1, 1]]}, r"in game 1 that the listener gives .*log_l0s\[1\]"),
        ({"log_l0s": [SHAPES, SHAPES[0]]}, r"log_l0s\[1\] must be \[utterances, states\]"),
        ({"log_l0s": [SHAPES, np.exp(SHAPES)]}, r"row \(1, 0\)"),
        ({"rsa": RSA(depth=0)}, r"depth 0 is the literal listener"),
        ({"alphas": [0.0, 1.0, 2.0]}, r"alphas must be at least 3"),
        ({"alphas": [1.0, 2.0]}, r"alphas must be at least 3"),
        ({"alphas": [1.0, 3.0, 2.0]}, r"alphas must be .*ascending"),
        ({"folds": 1}, r"folds must be a whole number of at least 2, not 1"),
        ({"resamples": 0}, r"resamples must be .* at least 1"),
        (
            {"log_l0s": [SHAPES, logs(np.exp(SHAPES[:2]))], "rsa": RSA(cost=[0.0] * 4)},
            r"cost is one list, but the games have 2 to 4 utterances",
        ),
    ],
)
def test_mistakes_in_fitting_are_named(change: dict, says: str) -> None:
    good = {
        "log_l0s": [SHAPES, SHAPES],
        "heard": [0, 0],
        "human": [[1, 1, 0]] * 2,
        "groups": ["a", "b"],
        "rsa": RSA(),
    }
    with pytest.raises(UserError, match=says):
        fit_rsa(**(good | change))


# The package


def test_importing_the_module_loads_no_torch() -> None:
    code = "import sys, wavelength_rsa.rsa, wavelength_rsa.rerank, wavelength_rsa.reference\n"
    code += "assert not {'torch', 'scipy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.realdata
def test_silence_as_the_only_alternative_makes_people_less_exact(data_folder: object) -> None:
    """Human responses as L0: the pragmatic listener that knows only {clue, null} gets worse."""
    import csv
    import json
    from pathlib import Path

    with Path(str(data_folder), "wavelength", "data.csv").open(encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    edges = np.arange(-2.5, 105, 5)
    grid = np.arange(0, 101, 5)
    counts = np.array([np.histogram(json.loads(r["response_list"]), edges)[0] for r in rows])
    literal = (counts + 0.5 / 21) / (counts + 0.5 / 21).sum(1, keepdims=True)
    targets = np.array([float(r["target"]) for r in rows])
    alone = RSA().listener(logs(literal)[:, None], keep_null=False)[:, 0]
    entropy = [-(p * np.log(p)).sum(1) for p in (literal, alone)]
    assert (entropy[1] > entropy[0]).all()
    off = [np.abs(p @ grid - targets).mean() for p in (literal, alone)]
    assert off[1] > off[0] + 1.0
