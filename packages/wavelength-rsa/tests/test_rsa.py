import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rsa_games import BARE, SHAPES, Null, game, keyed, logs, matrix, table, with_null

from tenfold_common.errors import UserError
from wavelength_rsa.reference import (
    naive_listener,
    naive_metric_speaker,
    naive_production,
    naive_trace,
)
from wavelength_rsa.rsa import RSA, production

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
