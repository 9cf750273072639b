"""The paper's claims in a world whose meanings are known (`wavelength_rsa.toy`), and people's data.

A language model made on the spot speaks directly, after reasoning, and with Rational Speech Acts on
top (arXiv 2509.06952); the true meanings and another model judge. Where the paper's human responses
are at hand, people are measured by the same code.
"""

import logging
import operator
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_common.optional import is_available
from tenfold_common.results import Claim, Figure, Result, Sample, Table, environment
from wavelength_rsa.data import Item, human_baseline, load_items
from wavelength_rsa.experiment import (
    JUDGES,
    SPEAKERS,
    Row,
    Run,
    ToySettings,
    run_experiment,
)
from wavelength_rsa.human import METRICS, human_rsa
from wavelength_rsa.metrics import Interval

logger = logging.getLogger(__name__)

FILE = Path("wavelength", "data.csv")
_GET = (
    "No table of people's guesses: put data.csv of the paper's repository (linlu-qiu/"
    f"wavelength-eval on GitHub) into {FILE.parent.as_posix()}/ of a folder and name the folder in "
    "TENFOLD_DATA."
)
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


def run_demo(
    out_dir: Path,
    *,
    seed: int = 0,
    full: bool = False,
    data: str | os.PathLike[str] | None = None,
) -> Result:
    """Train the toy's models, let them speak and listen, and measure people if their data are here.

    Args:
        out_dir: Folder for the figures, made if missing.
        seed: First seed.
        full: Three seeds in place of one.
        data: Folder that holds `wavelength/data.csv`. Defaults to the one that the environment
            variable TENFOLD_DATA names, if it has the file.

    Returns:
        Claims, tables, figures and notes. Two to three minutes a seed on one CPU thread.

    Raises:
        UserError: `data` is given and has no such file, or the file is broken.
    """
    started = time.monotonic()
    people = _people(data)  # errors come before the work
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    settings = ToySettings()
    seeds = [seed, seed + 1, seed + 2] if full else [seed]
    runs = [run_experiment(one, settings) for one in seeds]
    human_tables, human_notes = ([], [_GET]) if people is None else _human(people)
    return Result(
        package="wavelength-rsa",
        title="Toy world with known meanings: direct, reasoning and pragmatic speakers",
        summary=_summary(runs, settings),
        seeds=seeds,
        claims=_claims(runs),
        tables=[*_tables(runs, settings), *human_tables],
        figures=_figures(out_dir, runs[0], settings),
        samples=[_sample(runs[0])],
        notes=[*_notes(runs), *human_notes],
        seconds=time.monotonic() - started,
        environment=environment(),
    )


def _people(data: str | os.PathLike[str] | None) -> list[Item] | None:
    folder = data or os.environ.get("TENFOLD_DATA")
    if folder is None:
        return None
    file = Path(folder) / FILE
    if data is None and not file.is_file():
        return None
    return load_items(file)


def _claims(runs: Sequence[Run]) -> list[Claim]:
    """State the claims on the worst seed."""

    def claim(name: str, said: str, values: Iterable[float], sign: str, bound: float) -> Claim:
        low = sign[0] == ">"
        found = [float(value) for value in values]
        worst = float(np.min(found) if low else np.max(found))  # NaN stays NaN, and fails
        return Claim(
            name=name,
            claimed=f"{said}, worst seed",
            measured=worst,
            expected=f"{sign} {bound:g}",
            passed=bool(_COMPARE[sign](worst, bound)),
            margin=worst - bound if low else bound - worst,
        )

    def lower(judge: str, first: str, second: str) -> list[float]:
        return [run.gains[judge][first, second].low for run in runs]

    def gain(first: str, second: str) -> list[float]:
        return [run.gains["exact"][first, second].value for run in runs]

    def behind(name: str) -> list[float]:
        errors = [{n: row["mean_error"] for n, row in run.listening.items()} for run in runs]
        return [row[name] - row["exact"] for row in errors]

    interval = "points of error, lower end of the 95 % interval by scale"
    return [
        claim("trained listener", "its error less the exact listener's, points",
              np.maximum(behind("itself"), behind("second model")), "<=", 0.5),
        claim("listener after 50 steps", "its error less the exact listener's, points",
              behind("50 steps"), ">=", 5),
        claim("trained listener's order", "Spearman, its means with the true ones",
              [run.listening["itself"]["spearman"] for run in runs], ">", 0.9),
        claim("RSA over direct", f"exact judge, k = 32: direct less RSA, {interval}",
              lower("exact", "direct", "RSA"), ">", 0),
        claim("RSA over direct, another model judges", f"the same, {interval}",
              lower("second model", "direct", "RSA"), ">", 0),
        claim("alpha 4 over alpha 1", f"exact judge: alpha 1 less alpha 4, {interval}",
              lower("exact", "RSA", "RSA, alpha 4"), ">", 0),
        claim("CoT over direct", f"exact judge: direct less CoT, {interval}",
              lower("exact", "direct", "CoT"), ">", 0),
        claim("RSA over CoT", f"exact judge: CoT less RSA, {interval}",
              lower("exact", "CoT", "RSA"), ">", 0),
        claim("RSA on CoT's clues", f"exact judge: CoT less RSA on it, {interval}",
              lower("exact", "CoT", "RSA over CoT"), ">", 0),
        claim("k = 1", "the most that RSA changes a task's error with one clue, points",
              [run.changed_at_one for run in runs], "<=", 1e-9),
        claim("chance listener", "gain if RSA imagines an untrained model, points either way",
              np.abs(gain("direct", "RSA, untrained listener")), "<=", 0.5),
        claim("misled listener", "gain if RSA imagines shuffled meanings, points",
              gain("direct", "RSA, shuffled listener"), "<=", 3),
    ]  # fmt: skip


def _mean(rows: Iterable[Mapping[str, float]], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))


def _cell(values: Sequence[float], digits: int = 2) -> str:
    """Write a mean over seeds, with the range where there are several."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def _interval(intervals: Sequence[Interval]) -> str:
    """Write the mean over seeds and the widest interval."""
    value = np.mean([i.value for i in intervals])
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def _tables(runs: Sequence[Run], settings: ToySettings) -> list[Table]:
    def cells(rows: Sequence[Row], columns: Sequence[str], digits: int = 2) -> list[str]:
        return [_cell([row[c] for row in rows], digits) for c in columns]

    errors = ("mean_error", "expected_distance")
    listening = Table(
        "Listeners, all clues of the world (error: |mean - target| in points, target drawn from "
        "the clue's meaning)",
        ["listener", "error", "expected distance", "TV from the meaning", "Spearman"],
        [
            [
                _LISTENERS[name],
                *cells([run.listening[name] for run in runs], errors),
                *cells([run.listening[name] for run in runs], ("tv", "spearman"), 3),
            ]
            for name in runs[0].listening
        ],
    )
    speaking = Table(
        f"Speakers, targets held out of the corpus, k = {settings.num_candidates} (expected error "
        "over the clues they may say, points; gain: direct less this one, exact judge, widest 95 % "
        "interval by scale)",
        ["speaker", *(f"judge: {_JUDGES[judge]}" for judge in JUDGES), "expected distance, exact",
         "gain"],
        [
            [
                name,
                *(_cell([run.speaking[j][name]["mean_error"] for run in runs]) for j in JUDGES),
                _cell([run.speaking["exact"][name]["expected_distance"] for run in runs]),
                _interval([run.gains["exact"]["direct", name] for run in runs])
                if name != "direct"
                else None,
            ]
            for name in SPEAKERS
        ],
    )  # fmt: skip
    curve = Table(
        "Error by number of clues k, exact judge",
        ["speaker", *(f"k = {k}" for k in settings.curve)],
        [
            [name, *(f"{np.mean([run.curve[name][i] for run in runs]):.2f}"
                     for i in range(len(settings.curve)))]
            for name in runs[0].curve
        ],
    )  # fmt: skip
    hearing = Table(
        "Listening to the first model's speakers with the second model (error in points; gain: "
        "literal less pragmatic, widest 95 % interval by scale)",
        ["clues by", "literal L0", "pragmatic L1", "gain"],
        [
            [
                speaker,
                *(
                    _cell([run.hearing[kind][speaker]["mean_error"] for run in runs])
                    for kind in ("literal", "pragmatic")
                ),
                _interval([run.hearing_gains[speaker] for run in runs]),
            ]
            for speaker in runs[0].hearing_gains
        ],
    )
    return [listening, speaking, curve, hearing]


_LISTENERS = {
    "exact": "true meanings",
    "itself": "first model",
    "second model": "second model",
    "50 steps": "first model after 50 steps",
    "untrained": "untrained model",
    "shuffled": "shuffled meanings",
}
_JUDGES = {"exact": "true meanings", "second model": "second model", "itself": "self-play"}


def _summary(runs: Sequence[Run], settings: ToySettings) -> str:
    def error(name: str) -> str:
        return f"{_mean([run.speaking['exact'][name] for run in runs], 'mean_error'):.1f}"

    count = len(runs)
    return (
        f"{settings.steps} steps of training, {count} seed{'s' * (count > 1)}, k = "
        f"{settings.num_candidates}. Error of the exact judge in points: direct {error('direct')}, "
        f"CoT {error('CoT')}, RSA {error('RSA')}, with alpha 4 {error('RSA, alpha 4')}."
    )


def _notes(runs: Sequence[Run]) -> list[str]:
    """Say what the figures do not show by themselves."""
    seen, hidden = (
        {name: _mean([rows[name] for rows in found], "mean_error") for name in ("direct", "RSA")}
        for found in ([run.seen for run in runs], [run.speaking["exact"] for run in runs])
    )
    notes = [
        "What this does not show: anything about real language or about large models. The speakers "
        "of the corpus are vague by construction, which is the fault that RSA repairs.",
        "CoT is better than direct because the corpus says so: its speakers choose better clues "
        "after naming the region of the target. The model has to learn and use that, no more.",
        f"Targets that the corpus has for speakers: direct {seen['direct']:.2f}, RSA "
        f"{seen['RSA']:.2f} points; held-out ones {hidden['direct']:.2f} and {hidden['RSA']:.2f}.",
        *(_heard(runs, speaker) for speaker in runs[0].hearing_gains),
        "Settings and bounds were chosen on seeds 0 to 2: only later seeds are fresh.",
    ]
    if not is_available("matplotlib"):
        notes.append("No figures: they need matplotlib (pip install 'wavelength-rsa[plot]').")
    return notes


def _heard(runs: Sequence[Run], speaker: str) -> str:
    """Say what pragmatic listening did to one speaker's clues, whichever way it went."""
    gains = [run.hearing_gains[speaker] for run in runs]
    helped, hurt = sum(g.low > 0 for g in gains), sum(g.high < 0 for g in gains)
    value = np.mean([g.value for g in gains])
    return (
        f"Listening with RSA to {speaker} clues {'raises' if value < 0 else 'lowers'} the error by "
        f"{abs(value):.2f} points (significantly better in {helped}, worse in {hurt} of "
        f"{len(gains)} seed{'s' * (len(gains) > 1)})."
    )


def _human(items: list[Item]) -> tuple[list[Table], list[str]]:
    """Measure people as listeners, and RSA on top of their responses."""
    logger.info("people's responses to %d clues", len(items))
    baseline: dict[str, Any] = human_baseline(items)
    rsa: dict[str, Any] = human_rsa(items, alphas=(1.0, 2.0))
    columns = ("mean_error", "rmse", "expected_distance", "crps", "pearson")
    ceilings = Table(
        f"People and trivial listeners on {baseline['items']} clues (points; 95 % interval by "
        "concept pair)",
        ["listener", *(_COLUMNS[c] for c in columns)],
        [
            [name.replace("_", " "), *(_written(row.get(c)) for c in columns)]
            for name, row in baseline["rows"].items()
        ],
    )
    rows = [["literal, a half of the people", *(_written(rsa["literal"][m]) for m in METRICS)]]
    for entry in rsa["pragmatic"]:
        alpha = f"alpha {entry['alpha']:g}"
        rows.append([f"RSA, {alpha}", *(_written(entry[m]) for m in METRICS)])
        for key, name in (("difference", "less literal"), ("contrast", "less silence alone")):
            rows.append([f"{alpha}, {name}", *(_written(entry[key][m]) for m in METRICS)])
    pragmatic = Table(
        "RSA on top of half of the people, judged by the target and by the other half (silence "
        "alone: RSA whose only alternative to the clue is to say nothing)",
        ["listener", *(_COLUMNS[m] for m in METRICS)],
        rows,
    )
    notes = [
        *(_people_note(entry) for entry in rsa["pragmatic"]),
        "People answered knowing that the clue was chosen to help: their answers are no literal "
        "meaning, and RSA on top reasons a second time. Alpha alone flattens or sharpens; what the "
        "other clue of the scale adds is in the rows 'less silence alone'.",
    ]
    return [ceilings, pragmatic], notes


_COLUMNS = {
    "mean_error": "error of the mean",
    "rmse": "RMSE",
    "expected_distance": "expected distance",
    "crps": "CRPS",
    "pearson": "Pearson",
    "log_likelihood": "log-likelihood of the others, nats",
    "w1": "W1 from the others",
    "entropy": "entropy, nats",
}


def _written(found: Mapping[str, float | None] | None) -> str | None:
    """Write an interval that came as JSON."""
    if found is None or found["value"] is None:
        return None
    text = f"{found['value']:.3g}"
    return text if found["low"] is None else f"{text} ({found['low']:.3g} to {found['high']:.3g})"


def _people_note(entry: Mapping[str, Any]) -> str:
    """Say what RSA did to people's answers, whichever way it went."""
    change = entry["difference"]["mean_error"]
    low, high = change["low"], change["high"]
    verdict = "lowers" if high < 0 else "raises" if low > 0 else "does not clearly change"
    return (
        f"People as literal listeners: RSA with alpha {entry['alpha']:g} {verdict} the error of "
        f"their mean ({change['value']:+.2f} points, {low:+.2f} to {high:+.2f})."
    )


def _figures(out_dir: Path, run: Run, settings: ToySettings) -> list[Figure]:
    if not is_available("matplotlib"):
        return []
    from wavelength_rsa import plots

    axes = plots.error_curve(settings.curve, run.curve)
    plots.save(axes.figure, out_dir / "error_by_k.png")
    figure, places = plots.panels(len(run.examples))
    for example, ax in zip(run.examples, places, strict=True):
        plots.distribution_plot(
            example.heard, example.scale, target=example.target, ax=ax, title=f'"{example.clue}"'
        )
    for ax in places[1:]:
        ax.set_ylabel("")
    plots.save(figure, out_dir / "distributions.png")
    shown = {_LISTENERS[name]: run.means[name] for name in ("itself", "50 steps")}
    plots.save(plots.means_plot(run.means["exact"], shown).figure, out_dir / "listeners.png")
    return [
        Figure("error_by_k.png", "Error by number of clues to choose from, exact judge"),
        Figure("distributions.png", "The RSA speaker's likeliest clue for three held-out targets"),
        Figure("listeners.png", "Where the trained and the 50-step listener place each clue"),
    ]


def _sample(run: Run) -> Sample:
    lines = []
    for example in run.examples:
        lines.append(f"{example.scale}, target {example.target:g}")
        for name, said in example.said.items():
            lines.append(f"  {name:14}" + "  ".join(f"{clue} {p:.2f}" for clue, p in said))
        heard = ", ".join(f"{name} {d.mean:.0f}" for name, d in example.heard.items())
        lines.append(f'  "{example.clue}" means: {heard}')
    return Sample("Likeliest clues, with their probabilities", "\n".join(lines))
