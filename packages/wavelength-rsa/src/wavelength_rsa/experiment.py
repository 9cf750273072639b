"""The toy experiment: one world, two models trained in it, and every way of speaking and listening.

The first model proposes the clues and is the listener that RSA imagines. Three judges decide: the
true meanings, a second model with weights and lines of its own, and the first model (self-play).
Speakers are asked for targets that no speaker's line of the corpus has.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wavelength_rsa.cache import CachedModel
from wavelength_rsa.data import Item, clusters
from wavelength_rsa.evaluate import evaluate_speaker
from wavelength_rsa.listeners import Listener, LogprobListener, TableListener
from wavelength_rsa.metrics import (
    Interval,
    correlations,
    human_metrics,
    listener_metrics,
    paired_bootstrap,
)
from wavelength_rsa.scales import Distribution, Scale, grid
from wavelength_rsa.speakers import RSAListener, RSASpeaker, SamplingSpeaker, Speaker
from wavelength_rsa.toy import STEP, ToyPrompts, World

logger = logging.getLogger(__name__)

PROMPTS = ToyPrompts()
JUDGES = ("exact", "second model", "itself")
SPEAKERS = (
    "direct", "CoT", "RSA", "RSA, alpha 4", "RSA, argmax", "RSA, distance", "RSA over CoT",
    "RSA, exact listener", "RSA, 50-step listener", "RSA, untrained listener",
    "RSA, shuffled listener",
)  # fmt: skip
# What is compared, item by item: the first should have the greater error.
PAIRS = (
    *(("direct", name) for name in SPEAKERS[1:]),
    ("RSA", "RSA, alpha 4"),
    ("CoT", "RSA"),
    ("CoT", "RSA over CoT"),
)
_SECOND = 1_000_003  # added to the seed of the second model
METRICS = ("mean_error", "expected_distance")
Row = dict[str, float]
Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class ToySettings:
    """Settings of the experiment.

    Attributes:
        steps: Training steps of the two models.
        lines: Lines of each model's corpus.
        weak_steps: Training steps of the listener that has seen too little.
        clues: Clues of each scale.
        num_candidates: k, clues sampled for a target.
        curve: The k of the curves, the first of them 1.
        alphas: The alpha of the curves.
        resamples: Bootstrap samples of the intervals.
    """

    steps: int = 1200
    lines: int = 60_000
    weak_steps: int = 50
    clues: int = 20
    num_candidates: int = 32
    curve: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    alphas: tuple[float, ...] = (1.0, 4.0)
    resamples: int = 10_000


class Example(NamedTuple):
    """One task: what speakers say (clue and probability), how RSA's likeliest clue is heard."""

    scale: Scale
    target: float
    said: dict[str, list[tuple[str, float]]]
    clue: str
    heard: dict[str, Distribution]


@dataclass(frozen=True, eq=False)
class Run:
    """What one seed gave; errors in points of the scale.

    Attributes:
        seed: The seed.
        listening: For each listener `mean_error` and `expected_distance` (exact expectations over
            the targets that a clue can mean), `tv` (total variation from the meaning), `spearman`
            and `pearson` of its means with the true ones.
        means: For each listener its mean of every clue, `[S W]`; those of `"exact"` are true.
        speaking: For each judge and speaker `METRICS`: expected over the clues the speaker may
            say, averaged over the held-out tasks.
        seen: As `speaking`, by the exact judge, on tasks that the corpus has.
        gains: For each judge and pair of `PAIRS` the interval of the first's `mean_error` less
            the second's, resampling scales.
        curve: For `"direct"` and each alpha (`"RSA, alpha 1"`) the error by k, exact judge.
        changed_at_one: The most that RSA changed the error of a task with k = 1.
        hearing: For the literal and the pragmatic listener the errors about speakers' clues.
        hearing_gains: For each speaker the interval of literal less pragmatic listener.
        examples: A few tasks.
    """

    seed: int
    listening: dict[str, Row]
    means: Columns
    speaking: dict[str, dict[str, Row]]
    seen: dict[str, Row]
    gains: dict[str, dict[tuple[str, str], Interval]]
    curve: dict[str, list[float]]
    changed_at_one: float
    hearing: dict[str, dict[str, Row]]
    hearing_gains: dict[str, Interval]
    examples: list[Example]


def run_experiment(seed: int = 0, settings: ToySettings | None = None) -> Run:
    """Make a world, train the models and measure them.

    Args:
        seed: Fixes the world, the models and the samples.
        settings: The settings. Defaults to `ToySettings()`.
    """
    settings = settings or ToySettings()
    world = World.make(seed, clues=settings.clues)
    logger.info("seed %d: training", seed)
    models = (
        world.train(seed, steps=settings.steps, lines=settings.lines),
        world.train(seed + _SECOND, steps=settings.steps, lines=settings.lines),
        world.train(seed, steps=settings.weak_steps, lines=settings.lines),
        world.train(seed, steps=0, lines=1),
    )
    logger.info("seed %d: speaking and listening", seed)
    # The same questions come up under many settings: each is answered once.
    with tempfile.TemporaryDirectory(prefix="wavelength-rsa-") as folder, ExitStack() as stack:
        cached = (
            stack.enter_context(CachedModel(model, Path(folder) / f"{i}.sqlite"))
            for i, model in enumerate(models)
        )
        return _measure(world, *cached, settings=settings, seed=seed)


def _measure(
    world: World,
    first: CachedModel,
    second: CachedModel,
    weak: CachedModel,
    untrained: CachedModel,
    *,
    settings: ToySettings,
    seed: int,
) -> Run:
    exact = world.judge()
    listeners: dict[str, Listener] = {
        "exact": exact,
        "itself": LogprobListener(first, PROMPTS),
        "second model": LogprobListener(second, PROMPTS),
        "50 steps": LogprobListener(weak, PROMPTS),
        "untrained": LogprobListener(untrained, PROMPTS),
        "shuffled": _shuffled(world, seed),
    }
    listening, means = _listening(listeners, world)
    speakers = _speakers(first, listeners, settings)
    items = world.items(held_out=True, seed=seed)
    groups = clusters(items)
    rows = {
        judge: {name: _judged(s, items, listeners[judge], seed) for name, s in speakers.items()}
        for judge in JUDGES
    }
    curve, changed = _curve(first, listeners["itself"], exact, items, settings, seed)
    literal = listeners["second model"]
    pragmatic = RSAListener(literal, _sampling(second, settings.num_candidates))
    hearing = {
        name: {one: _judged(speakers[one], items, judge, seed) for one in ("direct", "RSA")}
        for name, judge in (("literal", literal), ("pragmatic", pragmatic))
    }
    known = world.items(held_out=False, seed=seed)
    return Run(
        seed=seed,
        listening=listening,
        means=means,
        speaking={judge: _averages(found) for judge, found in rows.items()},
        seen=_averages({n: _judged(speakers[n], known, exact, seed) for n in ("direct", "RSA")}),
        gains={
            judge: {(a, b): _gain(found[a], found[b], groups, settings.resamples) for a, b in PAIRS}
            for judge, found in rows.items()
        },
        curve=curve,
        changed_at_one=changed,
        hearing={name: _averages(found) for name, found in hearing.items()},
        hearing_gains={
            name: _gain(
                hearing["literal"][name], hearing["pragmatic"][name], groups, settings.resamples
            )
            for name in ("direct", "RSA")
        },
        examples=_examples(
            speakers,
            {
                "true meaning": exact,
                "literal listener L0": literal,
                "pragmatic listener L1": pragmatic,
            },
            items,
            seed,
        ),
    )


def _sampling(model: CachedModel, k: int, *, cot: bool = False) -> SamplingSpeaker:
    return SamplingSpeaker(model, PROMPTS, num_candidates=k, cot=cot, max_tokens=5)


def _shuffled(world: World, seed: int) -> TableListener:
    """Return a listener as sure as the exact one that takes every clue for another."""
    random = np.random.default_rng([seed, 3])
    table = {
        (scale.left, scale.right, clue): row
        for scale, clues, meanings in zip(world.scales, world.clues, world.meanings(), strict=True)
        for clue, row in zip(clues, random.permutation(meanings), strict=True)
    }
    return TableListener(table, step=STEP, default="uniform", name="shuffled meanings")


def _speakers(
    model: CachedModel, listeners: Mapping[str, Listener], settings: ToySettings
) -> dict[str, Speaker]:
    """Make the speakers of `SPEAKERS`; all propose with one model."""
    direct = _sampling(model, settings.num_candidates)
    cot = _sampling(model, settings.num_candidates, cot=True)
    own = listeners["itself"]
    made = (
        direct,
        cot,
        RSASpeaker(direct, own),
        RSASpeaker(direct, own, alpha=4.0),
        RSASpeaker(direct, own, select="argmax", prior_weight=0.0),
        RSASpeaker(direct, own, utility="neg_expected_distance", tau=10.0),
        RSASpeaker(cot, own),
        *(
            RSASpeaker(direct, listeners[name])
            for name in ("exact", "50 steps", "untrained", "shuffled")
        ),
    )
    return dict(zip(SPEAKERS, made, strict=True))


def _judged(speaker: Speaker, items: Sequence[Item], judge: Listener, seed: int) -> Columns:
    """Return the errors of every task, `[N]` each."""
    report = evaluate_speaker(speaker, items, judge=judge, seed=seed, resamples=2)
    return {name: np.array([row[name] for row in report.rows]) for name in METRICS}


def _averages(found: Mapping[str, Columns]) -> dict[str, Row]:
    return {name: {m: float(columns[m].mean()) for m in METRICS} for name, columns in found.items()}


def _gain(first: Columns, second: Columns, groups: NDArray[np.int64], resamples: int) -> Interval:
    return paired_bootstrap(first["mean_error"], second["mean_error"], groups, resamples=resamples)


def _curve(
    model: CachedModel,
    listener: Listener,
    judge: Listener,
    items: Sequence[Item],
    settings: ToySettings,
    seed: int,
) -> tuple[dict[str, list[float]], float]:
    """Return the error for every k, and the most that RSA changes with the first k."""
    curve: dict[str, list[float]] = {"direct": []}
    changed = 0.0
    for k in settings.curve:
        direct = _sampling(model, k)
        base = _judged(direct, items, judge, seed)["mean_error"]
        curve["direct"].append(float(base.mean()))
        for alpha in settings.alphas:
            speaker = RSASpeaker(direct, listener, alpha=alpha)
            error = _judged(speaker, items, judge, seed)["mean_error"]
            curve.setdefault(f"RSA, alpha {alpha:g}", []).append(float(error.mean()))
            if k == settings.curve[0]:
                changed = max(changed, float(np.abs(error - base).max()))
    return curve, changed


def _listening(listeners: Mapping[str, Listener], world: World) -> tuple[dict[str, Row], Columns]:
    """Compare every listener with the true meanings, over all clues alike."""
    positions, true = grid(STEP), world.meanings().reshape(-1, len(grid(STEP)))
    rows: dict[str, Row] = {}
    means: Columns = {"exact": true @ positions}
    for name, listener in listeners.items():
        probs = listener.listen(world.questions())
        means[name] = probs @ positions
        by_target = [listener_metrics(probs, positions, np.full(len(probs), t)) for t in positions]
        rows[name] = {
            metric: float((np.stack([m[metric] for m in by_target], 1) * true).sum(1).mean())
            for metric in METRICS
        }
        rows[name]["tv"] = float(human_metrics(probs, positions, true)["tv"].mean())
        found = correlations(means[name], means["exact"])
        rows[name] |= {"spearman": found["spearman"], "pearson": found["pearson"]}
    return rows, means


def _examples(
    speakers: Mapping[str, Speaker],
    listeners: Mapping[str, Listener],
    items: Sequence[Item],
    seed: int,
) -> list[Example]:
    """Show tasks near the left end, the middle and the right end."""
    examples = []
    for wanted in (15.0, 50.0, 85.0):
        item = min(items, key=lambda item: abs(item.target - wanted))
        said = {}
        for name in ("direct", "CoT", "RSA", "RSA, alpha 4"):
            [found] = speakers[name].propose([(item.scale, item.target)], seed=seed)
            ranked = sorted(zip(found.clues, found.probs.tolist(), strict=True),
                            key=lambda pair: -pair[1])  # fmt: skip
            said[name] = ranked[:4]
        clue = said["RSA"][0][0]
        heard = {n: one.distribution(item.scale, clue, seed=seed) for n, one in listeners.items()}
        examples.append(Example(item.scale, item.target, said, clue, heard))
    return examples
