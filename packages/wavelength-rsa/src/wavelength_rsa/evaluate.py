"""Listeners against targets and people, speakers against a judge: one report from end to end.

A report holds every row, so that another can be compared with it row by row, and nothing that
differs between two equal runs: same models, seed and cache give the same bytes.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError
from tenfold_common.lm.base import stream_seed
from wavelength_rsa._version import __version__
from wavelength_rsa.cache import fingerprint
from wavelength_rsa.data import Item, clusters
from wavelength_rsa.metrics import (
    Interval,
    cluster_bootstrap,
    correlations,
    human_metrics,
    listener_metrics,
    pair_order_accuracy,
    paired_bootstrap,
)
from wavelength_rsa.scales import Scale, grid, grid_index

if TYPE_CHECKING:
    from tenfold_common.lm import TextModel
    from wavelength_rsa.listeners import Listener
    from wavelength_rsa.speakers import Candidates, Speaker

RESAMPLES = 10_000
LISTENER_METRICS = (
    "mean_error", "map_error", "expected_distance", "crps", "nll", "entropy", "sd",
)  # fmt: skip
HUMAN_METRICS = ("w1", "js", "tv", "mean_difference", "entropy_difference", "sd_difference")
SPEAKER_METRICS = (
    "mean_error", "expected_distance", "base_mean_error", "base_expected_distance", "gain",
    "drawn_mean_error", "violations", "base_violations", "refused", "distinct",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        task: "listener" or "speaker".
        settings: What was evaluated and how: models, prompt hashes, seed, data.
        summary: For each metric its mean over rows with standard error and 95 % interval, from a
            bootstrap that resamples concept pairs.
        scalars: What is no mean over rows: correlations, share of ordered pairs, rmse.
        references: The same error for people and for trivial players, on the same rows.
        rows: One per item (listener) or per scale and target (speaker).
        notes: What a reader must know, such as that speaker and judge are one model.
    """

    task: str
    settings: dict[str, Any]
    summary: dict[str, Interval]
    scalars: dict[str, float]
    references: dict[str, float]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report as JSON; equal runs give equal bytes. NaN becomes null."""
        return json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the JSON, whole or not at all."""
        with atomic_write(Path(path), "w") as stream:
            stream.write(self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Report":
        """Read a report.

        Raises:
            UserError: there is no such file, or it is no report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            summary = {
                name: Interval(**{key: _number(x) for key, x in interval.items()})
                for name, interval in values.pop("summary").items()
            }
            scalars, references = (
                {name: _number(x) for name, x in values.pop(key).items()}
                for key in ("scalars", "references")
            )
            for row in values["rows"]:
                hash(_row_key(row))
                for name in summary:
                    _number(row.get(name))
            if not all(isinstance(note, str) for note in values["notes"]):
                raise ValueError("notes are no text")
            if values["task"] not in ("listener", "speaker"):
                raise ValueError(f"task {values['task']!r}")
            return cls(**values, summary=summary, scalars=scalars, references=references)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            lacks = isinstance(error, KeyError)
            reason = f"it lacks {error}" if lacks else str(error)
            raise UserError(
                f"{path} is no report; wavelength-rsa eval writes them ({reason})"
            ) from error

    def table(self) -> str:
        """Return the figures as a markdown table."""
        lines = ["| metric | mean | 95 % interval |", "|---|---|---|"]
        lines += [
            f"| {name} | {number_text(i.value)} | {interval_text(i)} |"
            for name, i in self.summary.items()
        ]
        lines += [f"| {name} | {number_text(value)} | |" for name, value in self.scalars.items()]
        lines += [
            f"| reference: {name} | {number_text(v)} | |" for name, v in self.references.items()
        ]
        return "\n".join(lines)


def evaluate_listener(
    listener: "Listener",
    items: Sequence[Item],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Report:
    """Let a listener guess every item, and compare it with the targets and with people.

    Args:
        listener: The listener.
        items: The clues; where all have human responses, the distributions are compared as well.
        seed: Fixes the samples and the bootstrap.
        resamples: Bootstrap samples.

    Returns:
        The report. `mean_error` is |E[position] - target|, the paper's headline.

    Raises:
        UserError: there is no item, or a target is not on the listener's grid.
    """
    check_targets(items, listener.step)
    positions = grid(listener.step)
    targets = np.array([positions[grid_index(i.target, listener.step)] for i in items])
    groups = clusters(items)
    probs = listener.listen([(item.scale, item.clue) for item in items], seed=seed)
    values = listener_metrics(probs, positions, targets)
    means = probs @ positions
    scalars = {
        "rmse": math.sqrt(float(values["squared_error"].mean())),
        **_correlated("target", means, targets),
        "pair_order_accuracy": pair_order_accuracy(means, targets, groups),
    }
    references = {"always 50": float(np.abs(50.0 - targets).mean())}
    names: list[str] = list(LISTENER_METRICS)
    if all(item.responses for item in items):
        human = np.stack([item.human(listener.step).probs for item in items])
        human_means = np.array([np.mean(item.responses or ()) for item in items], dtype=np.float64)
        values |= human_metrics(probs, positions, human)
        names += HUMAN_METRICS
        scalars |= _correlated("human mean", means, human_means)
        single = [np.abs(np.array(i.responses) - i.target).mean() for i in items]
        references["mean of the human responses"] = float(np.abs(human_means - targets).mean())
        references["a single human"] = float(np.mean(single))
    rows = [
        {
            **_place(item),
            "clue": item.clue,
            "mean": float(means[k]),
            **{name: float(values[name][k]) for name in names},
            "tied": bool(values["tied"][k]),
            "probs": [float(p) for p in probs[k]],
        }
        for k, item in enumerate(items)
    ]
    return Report(
        task="listener",
        settings=_settings(
            {"listener": listener.describe()},
            {"listener": _prints(listener.models())},
            len(items),
            seed,
            resamples,
        ),
        summary=_summary(rows, names, groups, resamples, seed),
        scalars=scalars,
        references=references,
        rows=rows,
    )


def evaluate_speaker(
    speaker: "Speaker",
    items: Sequence[Item],
    *,
    judge: "Listener",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Report:
    """Let a speaker give clues for every target, and let a judge guess them.

    The primary figures are expectations over the speaker's distribution, sum_u p(u) error(u), which
    carry no noise of drawing a clue; `drawn_mean_error` is that of one drawn clue. `base_...` is
    the same for the speaker that proposes, before any pragmatic choice, and `gain` is the base's
    expected distance less the speaker's. `violations` is the probability of a clue that breaks a
    rule, `refused` the share of samples with no clue in them, `distinct` the share of different
    clues.

    Args:
        speaker: The speaker.
        items: Their scales and targets are the tasks; their clues are judged as a reference.
        judge: The listener that decides. It should not be the one the speaker imagines.
        seed: Fixes the samples and the bootstrap.
        resamples: Bootstrap samples.

    Returns:
        The report; a note says so where speaker and judge share a model.

    Raises:
        UserError: there is no item, or a target is not on the judge's grid.
    """
    check_targets(items, judge.step)
    positions = grid(judge.step)
    first: dict[tuple[Scale, float], Item] = {}
    for item in items:
        first.setdefault((item.scale, item.target), item)
    tasks, chosen = list(first), list(first.values())
    groups = clusters(chosen)
    proposals = speaker.propose(tasks, seed=seed)
    drawn = [speaker.draw(c, seed=stream_seed(seed, k, 0)) for k, c in enumerate(proposals)]
    questions = [
        (scale, clue)
        for (scale, _), candidates in zip(tasks, proposals, strict=True)
        for clue in candidates.clues
    ]
    everything = list(dict.fromkeys([*questions, *((i.scale, i.clue) for i in items)]))
    heard = dict(zip(everything, judge.listen(everything, seed=seed), strict=True))
    rows = []
    for (scale, target), item, candidates, clue in zip(
        tasks, chosen, proposals, drawn, strict=True
    ):
        judged = np.stack([heard[scale, one] for one in candidates.clues])
        rows.append({**_place(item), **_judged(candidates, judged, positions, target, clue)})
    human = listener_metrics(
        np.stack([heard[i.scale, i.clue] for i in items]),
        positions,
        np.array([float(i.target) for i in items]),
    )
    imagined = _imagined(speaker)
    models = {
        "speaker": _prints(speaker.models()),
        "imagined listener": _prints([model for each in imagined for model in each.models()]),
        "judge": _prints(judge.models()),
    }
    return Report(
        task="speaker",
        settings=_settings(
            {"speaker": speaker.describe(), "judge": judge.describe()},
            models,
            len(tasks),
            seed,
            resamples,
        ),
        summary=_summary(rows, SPEAKER_METRICS, groups, resamples, seed),
        scalars={},
        references={
            "clues in the data, mean_error": float(human["mean_error"].mean()),
            "clues in the data, expected_distance": float(human["expected_distance"].mean()),
        },
        rows=rows,
        notes=_roles(models, same=any(i.describe() == judge.describe() for i in imagined)),
    )


def check_targets(items: Sequence[Item], step: int) -> None:
    """Refuse items that cannot be evaluated on a grid.

    Raises:
        UserError: there is no item, or a target is not on the grid; the message names the item.
    """
    if not len(items):
        raise UserError("there is no item to evaluate")
    for item in items:
        try:
            grid_index(item.target, step)
        except UserError as error:
            raise UserError(f"item {item.id!r} ({item.clue!r}): {error}") from error


def compare(
    first: Report, second: Report, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return the mean differences, first less second, over the rows that both reports have.

    Args:
        first: A report.
        second: Another of the same task.
        resamples: Bootstrap samples; concept pairs are resampled, rows stay paired.
        seed: Fixes them.

    Returns:
        For each metric both have the interval of the difference.

    Raises:
        UserError: the tasks differ, or no row is in both.
    """
    if first.task != second.task:
        raise UserError(f"one report is of a {first.task}, the other of a {second.task}")
    pairs = shared_rows(first, second)
    if not pairs:
        raise UserError("the two reports have no row in common; they must be of the same data")
    names: dict[tuple[str, str], int] = {}
    groups = np.array([names.setdefault((a["left"], a["right"]), len(names)) for a, _ in pairs])
    metrics = LISTENER_METRICS + HUMAN_METRICS if first.task == "listener" else SPEAKER_METRICS
    return {
        name: paired_bootstrap(
            np.array([_number(a[name]) for a, _ in pairs]),
            np.array([_number(b[name]) for _, b in pairs]),
            groups,
            resamples=resamples,
            seed=seed,
        )
        for name in metrics
        if all(name in a and name in b for a, b in pairs)
    }


def shared_rows(first: Report, second: Report) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows that two reports have of the same scale, target and clue, in pairs.

    Where a report has several such rows, the first goes with the first of the other, and so on.
    """
    other = _numbered(second)
    return [(row, other[key]) for key, row in _numbered(first).items() if key in other]


def _numbered(report: Report) -> dict[tuple[object, ...], dict[str, Any]]:
    seen: Counter[tuple[object, ...]] = Counter()
    found = {}
    for row in report.rows:
        key = _row_key(row)
        found[*key, seen[key]] = row
        seen[key] += 1
    return found


def different_settings(first: Report, second: Report) -> list[str]:
    """Return the settings in which two reports differ, such as `listener.step: 5, 1`."""
    one, other = (_flat(report.settings) for report in (first, second))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name}: {one.get(name, '-')}, {other.get(name, '-')}" for name in names]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _judged(
    candidates: "Candidates",
    judged: NDArray[np.float64],
    positions: NDArray[np.float64],
    target: float,
    drawn: str,
) -> dict[str, Any]:
    """Return the figures of one task; `judged` is `[c, n]`, one row per candidate."""
    errors = listener_metrics(judged, positions, np.full(len(judged), float(target)))
    broken = np.array([bool(v) for v in candidates.violations], dtype=np.float64)
    p, base = candidates.probs, candidates.prior

    def mean(weights: NDArray[np.float64], values: NDArray[np.float64]) -> float:
        return float(weights @ values)

    distance = errors["expected_distance"]
    asked = int(candidates.counts.sum()) + candidates.refused
    return {
        "mean_error": mean(p, errors["mean_error"]),
        "expected_distance": mean(p, distance),
        "base_mean_error": mean(base, errors["mean_error"]),
        "base_expected_distance": mean(base, distance),
        "gain": mean(base, distance) - mean(p, distance),
        "drawn": drawn,
        "drawn_mean_error": float(errors["mean_error"][candidates.clues.index(drawn)]),
        "violations": mean(p, broken),
        "base_violations": mean(base, broken),
        "refused": candidates.refused / asked,
        "distinct": len(candidates.clues) / int(candidates.counts.sum()),
        "candidates": [
            {**row, "judged_mean": float(judged[k] @ positions)}
            for k, row in enumerate(candidates.to_rows())
        ],
    }


def _imagined(speaker: "Speaker") -> "list[Listener]":
    """Return the listeners that a speaker imagines, and the speaker it chooses from, and so on."""
    found: list[Listener] = []
    current: Any = speaker
    while getattr(current, "listener", None) is not None:
        found.append(current.listener)
        current = getattr(current, "speaker", None)
    return found


def _prints(models: "Sequence[TextModel]") -> list[str]:
    """Return the fingerprints of some models, each once."""
    distinct = {id(model): model for model in models}.values()
    return list(dict.fromkeys(fingerprint(model) for model in distinct))


def _roles(models: Mapping[str, list[str]], *, same: bool) -> list[str]:
    """Say which of the three roles are played by one model.

    `same`: judge and imagined listener describe themselves alike.
    """
    speaking, imagined, judging = (  # a copy under another name is the same model
        {known.rpartition(":")[2] for known in models[role]}
        for role in ("speaker", "imagined listener", "judge")
    )
    notes = []
    if same and imagined >= judging:
        notes.append(
            "Self-play: the judge is the listener that the speaker imagines, so the speaker is "
            "graded by what it optimises. Use another judge for a claim."
        )
    elif imagined & judging:
        notes.append(
            "Self-play: the judge and the imagined listener are the same model, used differently."
        )
    if speaking & judging:
        notes.append("Self-play: the speaker and the judge are the same model.")
    if speaking & imagined:
        notes.append("The speaker imagines a listener of its own model.")
    return notes


def _place(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "left": item.scale.left,
        "right": item.scale.right,
        "target": float(item.target),
    }


def _row_key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return row["left"], row["right"], row["target"], row.get("clue")


def _settings(
    players: dict[str, Any], models: dict[str, list[str]], count: int, seed: int, resamples: int
) -> dict[str, Any]:
    return {
        **players,
        "models": models,
        "items": count,
        "seed": seed,
        "resamples": resamples,
        "version": __version__,
    }


def _summary(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    groups: NDArray[np.int64],
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    return {
        name: cluster_bootstrap(
            np.array([row[name] for row in rows], dtype=np.float64),
            groups,
            resamples=resamples,
            seed=seed,
        )
        for name in names
    }


def _correlated(what: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float]:
    found = correlations(x, y)
    return {f"{kind} with {what}": float(found[kind]) for kind in ("pearson", "spearman")}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def interval_text(interval: Interval) -> str:
    """Write the ends of an interval; a dash where one concept pair leaves none."""
    if math.isnan(interval.low):
        return "-"
    return f"{number_text(interval.low)} to {number_text(interval.high)}"


def number_text(value: float) -> str:
    """Write a figure with three decimals; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}".replace("-0.000", "0.000")
