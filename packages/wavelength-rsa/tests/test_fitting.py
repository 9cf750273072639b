"""Alpha fitted to people: whose responses, which alternatives, and what cannot be fitted."""

import numpy as np
import pytest

from tenfold_common.errors import UserError
from wavelength_rsa.data import Item, load_items, random_halves
from wavelength_rsa.fitting import fit_games, fit_rsa
from wavelength_rsa.listeners import TableListener
from wavelength_rsa.rsa import RSA
from wavelength_rsa.scales import Scale, project

STEP = 20
N = 100 // STEP + 1
POSITIONS = np.arange(0, 101, STEP)
SCALES = [Scale(f"L{i}", f"R{i}") for i in range(12)]


def literal(seed=0, clues=3):
    """A listener with a random row for every clue of every scale."""
    random = np.random.default_rng(seed)
    rows = {(s.left, s.right, f"c{k}"): random.dirichlet(np.full(N, 0.7)) + 0.01
            for s in SCALES for k in range(clues)}  # fmt: skip
    return TableListener({key: row / row.sum() for key, row in rows.items()}, step=STEP)


def answered(listener, alpha, clues=3, people=4000):
    """Items whose people are RSA listeners of a given alpha."""
    items = []
    for scale in SCALES:
        rows = listener.listen([(scale, f"c{k}") for k in range(clues)])
        heard = RSA(alpha).listener(np.log(rows))
        for k in range(clues):
            counts = np.round(heard[k] * people).astype(int)
            responses = tuple(np.repeat(POSITIONS, counts).astype(float))
            items.append(Item(scale, f"c{k}", 0.0, responses))
    return items


def test_a_fold_is_fitted_to_the_other_concept_pairs_alone():
    """One scale a fold, whose people are of another alpha than the rest."""
    listener = literal()
    items = [
        item
        for scale, alpha in zip(SCALES[:4], (0.4, 1.0, 2.0, 6.0), strict=True)
        for item in answered(listener, alpha, people=400)
        if item.scale == scale
    ]
    found = fit_games(items, listener=listener, folds=4)
    wanted = {}
    for scale in SCALES[:4]:
        rest = [item for item in items if item.scale != scale]
        held = [item for item in items if item.scale == scale]
        alpha = fit_games(rest, listener=listener, folds=2).alpha
        rows = listener.listen([(scale, item.clue) for item in held])
        heard = RSA(alpha).log_listener(np.log(rows), keep_null=False)
        score = sum(
            float(np.sum(log[(np.array(item.responses) // STEP).astype(int)]))
            for log, item in zip(heard, held, strict=True)
        )
        wanted[alpha] = score
    alphas = sorted(fold.alpha for fold in found.folds)
    assert alphas == pytest.approx(sorted(wanted), rel=1e-4)
    assert alphas[-1] > 1.2 * found.alpha  # without those of 0.4; all pairs give found.alpha
    assert alphas[0] < found.alpha / 1.05
    by_alpha = [fold.log_likelihood for fold in sorted(found.folds, key=lambda f: f.alpha)]
    assert by_alpha == pytest.approx([wanted[a] for a in sorted(wanted)], rel=1e-6)
    assert found.cv_log_likelihood == pytest.approx(sum(wanted.values()), rel=1e-6)
    assert found.cv_log_likelihood < found.log_likelihood - 10


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_alpha_of_the_people_is_found(alpha):
    listener = literal()
    found = fit_games(answered(listener, alpha), listener=listener, folds=4)
    assert found.alpha == pytest.approx(alpha, rel=0.02)
    assert found.low <= alpha * 1.03
    assert found.high >= alpha * 0.97
    assert not found.at_bound
    assert len(found.folds) == 4
    assert found.log_likelihood >= found.cv_log_likelihood > found.cv_baseline


def test_figures_are_those_of_the_games_worked_by_hand():
    listener = literal()
    items = answered(listener, 2.0, people=30)
    games, heard, counts, groups = [], [], [], []
    for scale in SCALES:
        rows = np.log(listener.listen([(scale, f"c{k}") for k in range(3)]))
        for k in range(3):
            games.append(rows)
            heard.append(k)
            counts.append(project(items[len(counts)].responses, STEP))
            groups.append(scale.left)
    wanted = fit_rsa(games, heard, counts, groups, folds=3, seed=5)
    found = fit_games(items, listener=listener, folds=3, seed=5)
    for name in ("alpha", "low", "high", "log_likelihood", "cv_log_likelihood", "cv_baseline"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-6), name


def test_people_as_the_listener_explain_the_other_half():
    items = answered(literal(), 1.0, people=21)
    firsts, others = random_halves(items, 1, 3, STEP)
    rows = firsts[0] + 0.5 / N
    rows /= rows.sum(1, keepdims=True)
    games = [np.log(rows[3 * (i // 3) : 3 * (i // 3) + 3]) for i in range(len(items))]
    wanted = fit_rsa(
        games, [i % 3 for i in range(len(items))], list(others[0]), [i // 3 for i in range(36)],
        folds=2, seed=3,
    )  # fmt: skip
    found = fit_games(items, step=STEP, folds=2, seed=3)
    assert found.alpha == pytest.approx(wanted.alpha, rel=1e-6)
    assert found.baseline_log_likelihood == pytest.approx(wanted.baseline_log_likelihood)
    assert fit_games(items, step=STEP, folds=2, seed=3) == found
    assert fit_games(items, step=STEP, folds=2, seed=4).alpha != found.alpha


@pytest.mark.parametrize("spelt", ["c0", " c0 ", "Caf\u00e9", "Cafe\u0301 "])
def test_a_clue_given_twice_is_one_utterance(spelt):
    """Two items with one clue: a game of two utterances, not three."""
    first = "c0" if "c0" in spelt else "Caf\u00e9"
    random = np.random.default_rng(1)
    table, items, games = {}, [], []
    for scale in SCALES[:4]:
        rows = random.dirichlet(np.ones(N), 2)
        for clue, row in zip((first, "x"), rows, strict=True):
            table[scale.left, scale.right, clue] = row
        answers = [tuple(random.choice(POSITIONS, 9).astype(float)) for _ in range(3)]
        for clue, responses in zip((first, "x", spelt), answers, strict=True):
            items.append(Item(scale, clue, 0.0, responses))
        games += [np.log(rows)] * 3
    heard = [0, 1, 0] * 4
    counts = [project(item.responses, STEP) for item in items]
    wanted = fit_rsa(games, heard, counts, [i // 3 for i in range(12)], folds=2)
    found = fit_games(items, listener=TableListener(table, step=STEP), folds=2)
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-9)
    assert found.alpha == pytest.approx(wanted.alpha, rel=1e-6)


def test_the_listener_s_step_counts():
    listener = literal()
    items = answered(listener, 1.0, people=30)
    a, b = (fit_games(items, listener=listener, step=step, folds=2) for step in (5, 50))
    assert a == b


def test_fewer_pairs_than_folds():
    listener = literal()
    items = answered(listener, 1.0, people=30)[:6]  # two concept pairs
    found = fit_games(items, listener=listener, folds=10)
    assert [fold.groups for fold in found.folds] == [1, 1]


def test_what_cannot_be_fitted():
    listener = literal()
    items = answered(listener, 1.0, people=30)
    with pytest.raises(UserError, match="no items"):
        fit_games([])
    bare = Item(SCALES[0], "x", 5.0, id="bare")
    with pytest.raises(UserError, match="1 items have fewer, first 'bare'"):
        fit_games([*items, bare])
    with pytest.raises(UserError, match=r"all items are on L0 .. R0; give items of at least two"):
        fit_games(items[:3], listener=listener)
    with pytest.raises(UserError, match="does not know the clue 'c2'"):
        fit_games(items, listener=literal(clues=2))
    with pytest.raises(UserError, match="folds"):
        fit_games(items, listener=listener, folds=1)
    table = {key: np.eye(N)[0] for key in (("L0", "R0", "c0"), ("L1", "R1", "c0"))}
    spikes = TableListener(table, step=STEP)
    answers = [Item(s, "c0", 0.0, (100.0, 80.0)) for s in SCALES[:2]]
    with pytest.raises(UserError, match="smooth"):
        fit_games(answers, listener=spikes)


@pytest.mark.realdata
def test_people_of_the_published_data(data_folder):
    """Half of the responses as listener: the fit beats it on pairs it was not fitted to."""
    items = load_items(data_folder / "wavelength" / "data.csv")
    found = fit_games(items)
    assert len(found.folds) == 10
    assert sum(fold.groups for fold in found.folds) == 50
    assert found.cv_log_likelihood > found.cv_baseline
    assert found.low < found.alpha < found.high
    assert not found.at_bound
