import math
from dataclasses import replace

import numpy as np
import pytest
from rsa_games import BARE, SHAPES, game, logs, table, with_null

from tenfold_common.errors import UserError
from wavelength_rsa.fitting import FitResult, fit_rsa
from wavelength_rsa.reference import (
    naive_trace,
)
from wavelength_rsa.rsa import RSA


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
