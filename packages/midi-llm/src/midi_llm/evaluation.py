"""One report on a list of outputs: every score with its interval and with its two controls.

A score means little by itself. Beside each stands what the same outputs get with the prompts
shuffled among them (what is reached without reading the prompt), and what real music gets in their
place (what the measure can reach at all, as it errs itself).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from midi_llm.captions import Request
from midi_llm.metrics import (
    CONTROL,
    HISTOGRAMS,
    Asked,
    Audio,
    Embedder,
    Floats,
    Heard,
    Output,
    clap_embeddings,
    compression_ratio,
    control_of,
    distribution_scores,
    frechet_distance,
    grammar_errors,
    mean_of,
    mel_embedding,
    most_at_once,
    notes_of,
    pitch_class_entropy,
    real_time_factor,
    self_similarity,
)
from midi_llm.notes import Notes
from midi_llm.vocab import AMTConfig
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest

METRICS = (
    "control", "validity", "compression", "self_similarity", "distribution", "fad", "clap", "rtf",
)  # fmt: skip
NAN = float("nan")
_SHUFFLES = 10
_STREAM = 2511_03943  # beside the seed: another stream than that of data with the same seed


@dataclass(frozen=True)
class Score:
    """A figure; what is not defined or was not asked for is NaN.

    Attributes:
        value: Of the outputs.
        low: Lower end of the 95 % interval, from a bootstrap over prompts.
        high: Upper end.
        n: Outputs that count: those for whose prompt it is defined.
        shuffled: The same with the prompts shuffled across the outputs.
        real: The same of real music: of the pieces behind the requests where the prompt matters
            (control, CLAP), of the pool elsewhere.
    """

    value: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    shuffled: float = NAN
    real: float = NAN


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        scores: By name.
        settings: How: metrics, numbers of outputs and prompts, resamples, seed, shrinkage.
        notes: What a reader must know.
    """

    scores: dict[str, Score]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON knows it; NaN and infinite become None."""
        plain = {
            name: {k: None if not math.isfinite(v) else v for k, v in asdict(score).items()}
            for name, score in self.scores.items()
        }
        return {"scores": plain, "settings": dict(self.settings), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationReport":
        """Rebuild a report.

        Raises:
            UserError: it is none.
        """
        try:
            scores = {name: _score(score) for name, score in values["scores"].items()}
            return cls(scores, dict(values["settings"]), list(values["notes"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"no evaluation report: {type(error).__name__}: {error}") from error

    def save(self, path: "str | PathLike[str]") -> None:
        """Write it as JSON, whole or not at all; equal runs give equal bytes."""
        with atomic_write(Path(path), "w") as stream:
            stream.write(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: "str | PathLike[str]") -> "EvaluationReport":
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, or it is no report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:  # of JSON or of from_dict
            raise UserError(f"{path}: {error}") from error

    def table(self) -> str:
        """Return the scores as a markdown table, and the notes below it."""
        lines = [
            "| metric | value | 95 % interval | n | prompts shuffled | real music |",
            "|---|---|---|---|---|---|",
        ]
        for name, s in self.scores.items():
            interval = f"{s.low:.3f} to {s.high:.3f}" if math.isfinite(s.low) else "-"
            cells = [name, _text(s.value), interval, str(s.n), _text(s.shuffled), _text(s.real)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def _score(values: Mapping[str, Any]) -> Score:
    plain: dict[str, Any] = {k: NAN if v is None else v for k, v in values.items()}
    for name, value in plain.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}, not a number")
    return Score(**plain)


def _text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def evaluate(
    outputs: "Sequence[Output]",
    requested: "Sequence[Asked]",
    *,
    metrics: Sequence[str] = ("control",),
    references: "Sequence[Output] | None" = None,
    real: "Sequence[Output] | None" = None,
    audio: Sequence[Audio] | None = None,
    reference_audio: Sequence[Audio] | None = None,
    real_audio: Sequence[Audio] | None = None,
    wall_seconds: float | Sequence[float] | None = None,
    amt: AMTConfig | None = None,
    embedder: Embedder | None = None,
    shrinkage: float | None = None,
    clap_model: Any = None,
    resamples: int = 2000,
    seed: int = 0,
) -> EvaluationReport:
    """Score outputs against what was asked for and against real music.

    Real music comes in two ways. `references` are the pieces behind the requests, in their order:
    they show what control and CLAP can reach. `real` is a pool of any size and order, from which
    distributions are taken. Without a pool the references are it.

    Args:
        outputs: Notes, scores, MIDI files or what `MidiLM.generate` returns.
        requested: The caption, attributes or request of each output. Outputs of equal requests
            are takes of one prompt and stay together in the bootstrap.
        metrics: Of "control" (see `metrics.control_scores`), "validity" (`metrics.grammar_errors`
            in 1,000 ids of the outputs that have `ids`, the share of outputs without notes, and
            `metrics.most_at_once`), "compression" (see `metrics.compression_ratio`),
            "self_similarity" (see `metrics.self_similarity`), "distribution" (needs `real`), "fad"
            (needs `audio` and `real_audio`), "clap" (needs captions, `audio` and laion_clap), "rtf"
            (needs `wall_seconds`).
        references: The real piece behind each request.
        real: The pool. Defaults to the references, if `real_audio` is not given either.
        audio: Samples and rate of each output, rendered.
        reference_audio: The same of the references.
        real_audio: The same of the pool. Defaults to `reference_audio`, if `real` is not given
            either.
        wall_seconds: How long all outputs together took, or each of them.
        amt: The grid of the outputs' ids. Defaults to that of AMT and MIDI-LLM.
        embedder: Turns audio into a vector. Defaults to `metrics.mel_embedding`.
        shrinkage: Of the covariances of "fad"; needed with fewer audios than dimensions + 1.
        clap_model: A loaded `laion_clap.CLAP_Module`. None makes one.
        resamples: Of the bootstrap, at least 2.
        seed: Of the bootstrap and of what is shuffled.

    Returns:
        The report. The mean over outputs is that of those for which a metric is defined.

    Raises:
        UserError: lengths differ, a metric is unknown or lacks what it needs, or an output cannot
            be read.
        MissingDependencyError: "clap" without laion_clap.
    """
    paired = {"references": references, "audio": audio, "reference_audio": reference_audio}
    pools = {"real": real, "real_audio": real_audio}
    _check(outputs, requested, metrics, resamples, paired, pools)
    if references is not None:
        references = [notes_of(one) for one in references]
    if real is None and real_audio is None:
        real, real_audio = references, reference_audio
    asked = [Request.of(one) for one in requested]
    prompts = [a if isinstance(a, str) else b for a, b in zip(requested, asked, strict=True)]
    number = {one: i for i, one in enumerate(dict.fromkeys(prompts))}
    cluster = np.array([number[one] for one in prompts])
    run = _Run(asked, cluster, resamples, seed)
    notes: list[str] = []
    scores: dict[str, Score] = {}
    heard = [Heard.of(one) for one in outputs]
    played = [h.notes for h in heard]
    pool = [notes_of(one) for one in real or []]
    if "control" in metrics:
        true = None if references is None else [Heard.of(one) for one in references]
        scores |= run.control(heard, true, notes)
    if "validity" in metrics:
        ids = [getattr(one, "ids", None) for one in outputs]
        # Control's share of empty outputs goes first: its real ones are those asked for.
        scores |= run.validity(played, ids, amt or AMTConfig(), pool, notes) | scores
    if "compression" in metrics:
        scores["CR"] = run.each(compression_ratio, played, pool)
        notes.append(
            "CR: bytes of a text of the notes over those of it compressed by zlib; not the CR of "
            "Text2midi, which is COSIATEC's."
        )
    if "self_similarity" in metrics:
        scores["self_similarity"] = run.each(self_similarity, played, pool)
        notes.append("Self-similarity: mean cosine of the pitch classes of windows of 2 s.")
    if "distribution" in metrics:
        if not pool:
            raise UserError('"distribution" needs real: a list of real pieces')
        scores |= run.distribution(played, pool, notes)
    if "fad" in metrics:
        name, score = run.fad(
            _needed(audio, "audio", "fad"), _needed(real_audio, "real_audio", "fad"),
            embedder or mel_embedding, shrinkage, notes,
        )  # fmt: skip
        scores[name] = score
    if "clap" in metrics:
        if not all(isinstance(one, str) for one in requested):
            raise UserError('"clap" needs captions; give text in requested')
        texts = [one for one in requested if isinstance(one, str)]
        sound = _needed(audio, "audio", "clap")
        scores["CLAP"] = run.clap(texts, sound, reference_audio, clap_model)
    if "rtf" in metrics:
        seconds = np.array([h.attributes.seconds for h in heard])
        scores["RTF"] = run.rtf(seconds, wall_seconds)
        notes.append("RTF: seconds of music a second of waiting; bigger is faster.")
    settings = {
        "metrics": list(metrics), "outputs": len(outputs), "prompts": len(number),
        "references": len(references or reference_audio or []),
        "real": len(real or real_audio or []), "resamples": resamples, "seed": seed,
        "shrinkage": shrinkage,
    }  # fmt: skip
    return EvaluationReport(scores, settings, notes)


@dataclass(frozen=True, eq=False)
class _Run:
    """What all metrics of one evaluation share."""

    asked: list[Request]
    cluster: np.ndarray  # [N]
    resamples: int
    seed: int

    def interval(
        self, columns: Floats, statistic: Callable[[Floats], Floats]
    ) -> tuple[float, float]:
        """Return the 95 % interval of a statistic of sums of columns `[N, k]`, over prompts."""
        prompts = int(self.cluster.max()) + 1
        if prompts < 2:
            return NAN, NAN
        sums = np.zeros((prompts, columns.shape[1]))
        np.add.at(sums, self.cluster, columns)
        rng = np.random.default_rng([self.seed, _STREAM])
        drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), self.resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = statistic(drawn @ sums)
        found = found[np.isfinite(found)]
        if len(found) < 2:
            return NAN, NAN
        low, high = np.quantile(found, [0.025, 0.975])
        return float(low), float(high)

    def mean(self, values: Floats, shuffled: float = NAN, real: float = NAN) -> Score:
        """Return the mean of what is not NaN among one value per output, with its interval."""
        some = np.isfinite(values)
        columns = np.stack([np.where(some, values, 0), some], 1)
        low, high = self.interval(columns, lambda sums: sums[:, 0] / sums[:, 1])
        return Score(mean_of(values), low, high, int(some.sum()), shuffled, real)

    def each(
        self, measure: Callable[[Notes], float], outputs: list[Notes], pool: list[Notes]
    ) -> Score:
        """Return the mean of what needs one piece alone, beside that of the pool."""
        values = np.array([measure(n) for n in outputs], np.float64)
        return self.mean(values, real=mean_of([measure(n) for n in pool]))

    def ratio(self, top: Floats, bottom: Floats, scale: float = 1.0) -> Score:
        """Return `scale` times the ratio of two sums, of one value per output each."""

        def statistic(sums: Floats) -> Floats:
            return scale * sums[..., 0] / sums[..., 1]

        columns = np.stack([top, bottom], 1)
        low, high = self.interval(columns, statistic)
        return Score(float(statistic(columns.sum(0))), low, high, int((bottom > 0).sum()))

    def control(
        self, heard: list[Heard], true: list[Heard] | None, notes: list[str]
    ) -> dict[str, Score]:
        found = _columns(map(control_of, self.asked, heard))
        ceiling = None if true is None else _columns(map(control_of, self.asked, true))
        chance: dict[str, list[float]] = {name: [] for name in CONTROL}
        order = np.random.default_rng([self.seed, _STREAM + 1]).permutation(len(heard))
        for shift in range(1, min(_SHUFFLES, len(heard) - 1) + 1):
            for i, j in zip(order, np.roll(order, shift), strict=True):
                if self.cluster[i] != self.cluster[j]:
                    for name, value in control_of(self.asked[j], heard[i]).items():
                        chance[name].append(value)
        notes.append(
            f"Tempo is measured from onsets. Shuffled: up to {_SHUFFLES} other prompts an output. "
            "Mood words are not scored."
        )
        return {
            name: self.mean(
                found[name], mean_of(chance[name]), mean_of(ceiling[name]) if ceiling else NAN
            )
            for name in CONTROL
        }

    def validity(
        self, outputs: list[Notes], ids: list[Any], amt: AMTConfig, pool: list[Notes],
        notes: list[str],
    ) -> dict[str, Score]:  # fmt: skip
        found: dict[str, Score] = {}
        counts = np.array([(0, 0) if i is None else grammar_errors(i, amt) for i in ids], float)
        if counts[:, 1].any():
            found["grammar_errors"] = self.ratio(counts[:, 0], counts[:, 1], 1000)
            notes.append("Grammar errors: in 1,000 ids of the outputs that have ids.")
        else:
            notes.append("Grammar errors: not counted, as no output has ids.")
        found["empty"] = self.each(lambda n: float(not len(n)), outputs, pool)
        most = partial(most_at_once, resolution=amt.resolution)
        found["most_at_once"] = self.each(most, outputs, pool)
        return found

    def distribution(
        self, outputs: list[Notes], real: list[Notes], notes: list[str]
    ) -> dict[str, Score]:
        found = distribution_scores(outputs, real)
        ceiling = dict.fromkeys(found, NAN)
        if len(real) > 1:
            first, second = self.halves(len(real))
            ceiling = distribution_scores([real[i] for i in first], [real[i] for i in second])
            notes.append("Distributions, real music: one random half of it against the other.")
        notes.append(
            "Distributions: a resample is farther from the real music than all outputs are, so the "
            "intervals lie low (oa) or high (kl) of the value."
        )
        ends: dict[str, tuple[float, float]] = {}
        for name, count in HISTOGRAMS.items():
            rows = np.stack([count(n) for n in outputs])
            pool = np.sum([count(n) for n in real], 0)
            ends[f"{name}_oa"] = self.interval(rows, partial(_overlap, pool=pool))
            ends[f"{name}_kl"] = self.interval(rows, partial(_divergence, pool=pool))
        entropies = np.array([pitch_class_entropy(n) for n in outputs])
        mine, base = self.mean(entropies), mean_of([pitch_class_entropy(n) for n in real])
        ends["pitch_class_entropy"] = (mine.low - base, mine.high - base)
        return {
            name: Score(value, *ends[name], n=len(outputs), real=ceiling[name])
            for name, value in found.items()
        }

    def fad(
        self, audio: Sequence[Audio], real: Sequence[Audio], embedder: Embedder,
        shrinkage: float | None, notes: list[str],
    ) -> tuple[str, Score]:  # fmt: skip
        a, b = (_embedded(some, embedder) for some in (audio, real))
        value = frechet_distance(a, b, shrinkage)
        ceiling = NAN
        if len(b) >= (4 if shrinkage is not None else 2 * b.shape[1] + 2):
            first, second = self.halves(len(b))
            ceiling = frechet_distance(b[first], b[second], shrinkage)
            notes.append("FAD, real music: one random half of it against the other.")
        else:
            notes.append("FAD, real music: too few audios for two halves.")
        notes.append("FAD has no interval: resamples hold doubles and lower its covariances.")
        name = getattr(embedder, "name", getattr(embedder, "__name__", type(embedder).__name__))
        name = name if "FAD" in name else f"FAD ({name})"
        return name, Score(value, n=len(a), real=ceiling)

    def clap(
        self, texts: list[str], audio: Sequence[Audio], real: Sequence[Audio] | None, model: Any
    ) -> Score:
        sounds = [*audio, *(real or [])]
        text, sound = clap_embeddings(texts, sounds, None, model)
        match = 100 * text @ sound[: len(audio)].T  # [text, audio]
        other = self.cluster[:, None] != self.cluster
        ceiling = 100 * (text * sound[len(audio) :]).sum(1) if real else []
        return self.mean(np.diag(match).copy(), mean_of(match[other]), mean_of(ceiling))

    def rtf(self, music: Floats, wall: float | Sequence[float] | None) -> Score:
        try:
            spent = np.asarray(NAN if wall is None else wall, np.float64)
        except (TypeError, ValueError):
            spent = np.asarray(NAN)
        if spent.shape not in ((), music.shape) or not (np.isfinite(spent) & (spent > 0)).all():
            raise UserError(
                f'"rtf" needs wall_seconds over 0: of all {len(music)} outputs together or a list '
                f"with one for each, not {wall!r}"
            )
        if spent.ndim:
            return self.ratio(music, spent)
        return Score(real_time_factor(music.sum(), float(spent)), n=len(music))

    def halves(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.seed, _STREAM + 2]).permutation(n)
        return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def _check(
    outputs: Sequence, requested: Sequence, metrics: Sequence[str], resamples: int,
    paired: dict[str, Sequence | None], pools: dict[str, Sequence | None],
) -> None:  # fmt: skip
    given = {"outputs": outputs, "requested": requested, "metrics": metrics}
    given |= {name: some for name, some in (paired | pools).items() if some is not None}
    for name, some in given.items():
        if isinstance(some, str | bytes) or not isinstance(some, Sequence):
            raise UserError(f"{name} must be a list, not {type(some).__name__}")
    if len(outputs) != len(requested) or not len(outputs):
        raise UserError(
            f"{len(outputs)} outputs but {len(requested)} requests; give one request for each "
            "output, and at least one of both"
        )
    for name in paired:
        if name in given and len(given[name]) != len(outputs):
            raise UserError(
                f"{name} has {len(given[name])} entries, but there are {len(outputs)} outputs; "
                "give one for each, in the same order"
            )
    if not metrics:
        raise UserError(f"metrics is empty; choose of {', '.join(METRICS)}")
    for name in metrics:
        if name not in METRICS:
            raise UserError(
                f"{name!r} is no metric; there are {', '.join(METRICS)}.{suggest(name, METRICS)}"
            )
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 2:
        raise UserError(f"resamples must be a whole number of at least 2, not {resamples!r}")


def _needed(some: Sequence[Audio] | None, name: str, metric: str) -> Sequence[Audio]:
    if not some:
        raise UserError(f'"{metric}" needs {name}: a list of (samples, rate)')
    return some


def _embedded(audio: Sequence[Audio], embedder: Embedder) -> Floats:
    rows = [np.asarray(embedder(wav, rate), np.float64) for wav, rate in audio]
    if len({row.shape for row in rows}) > 1 or rows[0].ndim != 1:
        raise UserError(
            "the embedder must return [dim], the same for all, not "
            f"{sorted({row.shape for row in rows})}"
        )
    return np.stack(rows)


def _columns(rows: Any) -> dict[str, Floats]:
    rows = list(rows)
    return {name: np.array([row[name] for row in rows]) for name in CONTROL}


def _overlap(sums: Floats, pool: Floats) -> Floats:
    """`overlapped_area` of many histograms `[R, n]` with one."""
    return np.minimum(sums / sums.sum(1, keepdims=True), pool / pool.sum()).sum(1)


def _divergence(sums: Floats, pool: Floats) -> Floats:
    """`kl_divergence` of one histogram from many `[R, n]`; NaN of an empty one."""
    p = (pool + 0.5) / (pool + 0.5).sum()
    q = (sums + 0.5) / (sums + 0.5).sum(1, keepdims=True)
    return np.where(sums.any(1), (p * np.log(p / q)).sum(1), NAN)
