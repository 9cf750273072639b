import math
from collections.abc import Callable

import numpy as np
import pytest

from tenfold_common.errors import UserError
from wavelength_rsa.reference import naive_production, naive_trace, naive_with_null
from wavelength_rsa.rerank import PragmaticReranker, Ranked, pragmatic_rerank

# Three functions and comments that might stand above one of them.
COMMENTS = ["reads a file", "reads a table", "writes a table", "does things"]
FUNCTIONS = ["read_text", "read_csv", "write_csv"]
FITS = {
    "reads a file": [0.5, 0.5, 0.0],
    "reads a table": [0.0, 1.0, 0.0],
    "writes a table": [0.0, 0.0, 1.0],
    "does things": [1 / 3, 1 / 3, 1 / 3],
}
MEANINGS = {c: dict(zip(FUNCTIONS, row, strict=True)) for c, row in FITS.items()}


def fit(comment: str, function: str) -> float:
    """Log-scores up to a constant per comment."""
    p = MEANINGS[comment][function]
    return math.log(p) + 7.0 * len(comment) if p else -math.inf


def matrix() -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(list(FITS.values())))


def probs(ranked: list[Ranked[str]]) -> dict[str, float]:
    return {r.candidate: r.prob for r in ranked}


@pytest.mark.parametrize("log_l0", [fit, matrix()], ids=["function", "matrix"])
def test_depth_1_is_production(log_l0: object) -> None:
    ranked = pragmatic_rerank(
        COMMENTS,
        FUNCTIONS,
        "read_csv",
        log_l0,  # pyright: ignore[reportArgumentType]
        prior=[2, 1, 1, 4],
        alpha=2.0,
        prior_weight=0.5,
        cost=lambda comment: 0.1 * len(comment.split()),
    )
    wanted = naive_production(
        {c: row["read_csv"] for c, row in MEANINGS.items()},
        dict(zip(COMMENTS, [2, 1, 1, 4], strict=True)),
        alpha=2.0,
        lam=0.5,
        cost={c: 0.1 * len(c.split()) for c in COMMENTS},
    )
    assert probs(ranked) == pytest.approx(wanted)
    assert [r.candidate for r in ranked] == sorted(COMMENTS, key=lambda c: -wanted[c])
    assert ranked[0].candidate == "reads a table"
    assert {r.candidate: r.listener_prob for r in ranked} == pytest.approx(
        {c: row["read_csv"] for c, row in MEANINGS.items()}
    )
    assert {r.candidate: r.prior for r in ranked} == pytest.approx(
        dict(zip(COMMENTS, [0.25, 0.125, 0.125, 0.5], strict=True))
    )


@pytest.mark.parametrize("null", [None, "uniform"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("target", FUNCTIONS)
def test_deeper_speakers_are_those_of_the_plain_equations(
    null: str | None, depth: int, target: str
) -> None:
    ranked = pragmatic_rerank(COMMENTS, FUNCTIONS, target, fit, depth=depth, null=null)  # pyright: ignore[reportArgumentType]
    meanings = naive_with_null(MEANINGS) if null else MEANINGS
    levels = dict(naive_trace(meanings, depth))
    speaker = levels[f"S{depth}"][target]
    listener = levels[f"L{depth - 1}"]
    assert len(ranked) == 4
    for r in ranked:
        assert r.prob == pytest.approx(speaker[r.candidate], abs=1e-12)
        assert r.listener_prob == pytest.approx(listener[r.candidate][target], abs=1e-12)
    said = sum(r.prob for r in ranked)
    assert said == pytest.approx(1.0 - (speaker["<null>"] if null else 0.0))


def test_alpha_goes_from_the_prior_to_the_best() -> None:
    lazy = pragmatic_rerank(COMMENTS, FUNCTIONS, "read_csv", fit, [3, 1, 1, 5], alpha=0.0)
    assert probs(lazy) == pytest.approx(dict(zip(COMMENTS, [0.3, 0.1, 0.1, 0.5], strict=True)))
    assert lazy[0].candidate == "does things"
    sharp = pragmatic_rerank(COMMENTS, FUNCTIONS, "read_csv", fit, [3, 1, 1, 5], alpha=math.inf)
    assert (sharp[0].candidate, sharp[0].prob) == ("reads a table", 1.0)


def test_ties_keep_the_order_given() -> None:
    ranked = pragmatic_rerank("cab", [0, 1], 1, lambda c, s: 0.0)
    assert [r.candidate for r in ranked] == ["c", "a", "b"]


@pytest.mark.parametrize("depth", [1, 2])
def test_equal_candidates_weigh_as_often_as_they_were_drawn(depth: int) -> None:
    drawn = ["reads a file", "does things", "reads a file", "reads a table", "reads a file"]
    ranked = pragmatic_rerank(drawn, FUNCTIONS, "read_text", fit, depth=depth)
    once = pragmatic_rerank(
        ["reads a file", "does things", "reads a table"],
        FUNCTIONS,
        "read_text",
        fit,
        [3, 1, 1],
        depth=depth,
    )
    assert ranked == once
    assert ranked[0].prior == pytest.approx(0.6)
    costly = pragmatic_rerank(drawn, FUNCTIONS, "read_text", fit, cost=[1, 0, 1, 0, 1], depth=depth)
    by_function = pragmatic_rerank(
        drawn, FUNCTIONS, "read_text", fit, cost=lambda c: float(c.endswith("file")), depth=depth
    )
    assert costly == by_function != ranked


def test_a_state_no_candidate_fits_is_no_obstacle_unless_it_is_the_target() -> None:
    few = COMMENTS[:2]
    ranked = pragmatic_rerank(few, FUNCTIONS, "read_csv", fit, depth=2)
    smaller = pragmatic_rerank(few, FUNCTIONS[:2], "read_csv", fit, depth=2)
    assert ranked == smaller
    first = pragmatic_rerank(few, ["write_csv", "read_text", "read_csv"], "read_csv", fit, depth=2)
    assert first == ranked
    with pytest.raises(UserError, match="no candidate fits the target 'write_csv'"):
        pragmatic_rerank(few, FUNCTIONS, "write_csv", fit)
    silent = pragmatic_rerank(few, FUNCTIONS, "write_csv", fit, null="uniform")
    assert [r.prob for r in silent] == [0.0, 0.0]
    wanted = naive_trace(naive_with_null({c: MEANINGS[c] for c in few}), 2)[3][1]["read_csv"]
    quiet = pragmatic_rerank(few, FUNCTIONS, "read_csv", fit, depth=2, null="uniform")
    assert probs(quiet) == pytest.approx({c: wanted[c] for c in few})


def test_candidates_and_states_may_be_of_any_type() -> None:
    images = [np.eye(2), np.ones((2, 2))]
    captions = [["a", "line"], ["all", "white"], ["a", "line"]]  # lists have no hash

    def similar(caption: list[str], image: np.ndarray) -> float:
        return float(image.sum()) * (1 if caption[0] == "all" else -1)

    ranked = pragmatic_rerank(captions, images, images[1], similar)
    assert ranked[0].candidate is captions[1]
    assert len(ranked) == 3
    odds = [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]
    assert ranked[0].listener_prob == pytest.approx(odds[1])
    assert ranked[0].prob == pytest.approx(odds[1] / (odds[1] + 2 * odds[0]))


def test_huge_scores_are_normalised_without_overflow() -> None:
    ranked = pragmatic_rerank([1, 2], [0, 1], 1, lambda c, s: 1e4 * c * s)
    assert [r.listener_prob for r in ranked] == [1.0, 1.0]
    ranked = pragmatic_rerank([1, 2], [0, 1], 0, lambda c, s: 1e3 * c * s, alpha=1e-3)
    assert ranked[0].candidate == 1
    assert ranked[0].prob == pytest.approx(math.e / (math.e + 1))


def test_a_reranker_keeps_its_settings() -> None:
    settings = {"alpha": 2.0, "prior_weight": 0.5, "depth": 2, "null": "uniform"}
    rerank = PragmaticReranker(fit, cost=len, **settings)  # pyright: ignore[reportArgumentType]
    for target in FUNCTIONS:
        once = pragmatic_rerank(
            COMMENTS,
            FUNCTIONS,
            target,
            fit,
            [1, 2, 3, 4],
            cost=[len(c) for c in COMMENTS],
            **settings,  # pyright: ignore[reportArgumentType]
        )
        assert rerank(COMMENTS, FUNCTIONS, target, prior=[1, 2, 3, 4]) == once
    with pytest.raises(UserError, match="alpha"):
        PragmaticReranker(fit, alpha=-1.0)


GOOD = {"candidates": COMMENTS, "states": FUNCTIONS, "target": "read_csv", "log_l0": fit}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidates": []}, r"no candidates"),
        ({"target": "delete"}, r"'delete' must occur once among the 3 states, not 0 times"),
        ({"states": ["a", "a"], "target": "a"}, r"once among the 2 states, not 2 times"),
        ({"depth": 0}, r"depth must be at least 1"),
        ({"depth": -1}, r"depth must be a whole number"),
        ({"alpha": -1.0}, r"alpha"),
        ({"prior_weight": -1.0}, r"prior_weight"),
        ({"null": "silence"}, r"null"),
        ({"prior": [1, 2]}, r"prior must be 4 numbers, one per candidate"),
        ({"prior": [1, 2, 3, -1]}, r"prior must be finite and at least 0"),
        ({"cost": [1.0]}, r"cost must be 4 numbers"),
        ({"cost": lambda c: math.inf}, r"cost must be finite"),
        ({"log_l0": lambda c, s: math.nan}, r"score function gave nan"),
        ({"log_l0": lambda c, s: math.inf}, r"score function gave inf"),
        ({"log_l0": lambda c, s: -math.inf if c[0] == "w" else 0.0}, r"candidate 2 fits no state"),
        ({"log_l0": matrix().T}, r"\[candidates, states\] = \[4, 3\].*\[3, 4\]"),
        ({"log_l0": np.exp(matrix())}, r"holds probabilities"),
        ({"log_l0": matrix() * math.nan}, r"NaN"),
    ],
)
def test_mistakes_are_named(change: dict, says: str) -> None:
    call: Callable[..., object] = pragmatic_rerank
    with pytest.raises(UserError, match=says):
        call(**(GOOD | change))
