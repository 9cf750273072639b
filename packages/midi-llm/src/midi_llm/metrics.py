"""How well music follows what was asked for, and how like real music it is.

Control metrics hold one output against one request, distribution metrics and Frechet distances
many outputs against many real pieces. `evaluation.evaluate` puts them into one report.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midi_llm.attributes import (
    COARSE_EDGES,
    COARSE_WORDS,
    TEMPO_EDGES,
    TEMPO_WORDS,
    MusicAttributes,
    analyze,
    density_word,
    duration_word,
    key_number,
    pitch_classes,
)
from midi_llm.captions import Request
from midi_llm.grammar import GenerationConstraints, Grammar, Rules
from midi_llm.midi_read import notes_of_score, read_notes
from midi_llm.notes import Notes, empty_notes
from midi_llm.vocab import DRUMS, AMTConfig
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import require

if TYPE_CHECKING:
    from symusic.core import ScoreTick

Floats = NDArray[np.float64]
Audio = tuple[np.ndarray, int]  # samples [n] or [n, channels], samples a second
CONTROL = (
    "instrument_precision", "instrument_recall", "instrument_f1", "instrument_exact", "family_f1",
    "TB", "TBT", "tempo_error", "tempo_error_octave", "CK", "CKD", "in_key", "density_bin",
    "density_log_ratio", "duration_bin", "empty",
)  # fmt: skip
INTERVAL_EDGES = np.concatenate([[0, 0.005], np.geomspace(0.02, 5.12, 17), [np.inf]])  # seconds
DURATION_EDGES = np.concatenate([[0], np.geomspace(0.02, 10.24, 19), [np.inf]])  # seconds
_SCALE = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
_LEAST_DENSITY = 0.1  # notes a second; what has fewer counts as that, or its logarithm is infinite
_BANDS, _LOW, _HIGH = 32, 60.0, 7600.0  # of mel_embedding; Hz


# ------------------------------------------------------------------------------------------------
# One output against one request


def instrument_scores(
    requested: Sequence[int], produced: Sequence[int], *, families: bool = False
) -> dict[str, float]:
    """Compare sets of instruments.

    Args:
        requested: Numbers 0 to 128, at least one.
        produced: Numbers 0 to 128; none gives 0 for all.
        families: Compare the 16 families of General MIDI (and drums) in place of programs.

    Returns:
        `precision`, `recall`, `f1`, and `exact`: 1 where the sets are equal.

    Raises:
        UserError: nothing was requested.
    """
    if not len(requested):
        raise UserError("no instrument was requested; there is nothing to compare")
    step = 8 if families else 1
    asked, got = ({int(i) // step for i in some} for some in (requested, produced))
    both = len(asked & got)
    return {
        "precision": both / len(got) if got else 0.0,
        "recall": both / len(asked),
        "f1": 2 * both / (len(asked) + len(got)),
        "exact": float(asked == got),
    }


def tempo_match(requested: "float | str", produced: float | None) -> tuple[bool, bool]:
    """Return TB and TBT: whether the tempo lies in the bin asked for, or that or a neighbour.

    Args:
        requested: Beats a minute, or a tempo word of MidiCaps: one of its nine, or one of its four
            coarse ones, whose bins are wider.
        produced: Beats a minute, measured from the onsets; None matches nothing.

    Raises:
        UserError: there is no such word.
    """
    words, edges = TEMPO_WORDS, TEMPO_EDGES
    if isinstance(requested, str):
        if requested in COARSE_WORDS:
            words, edges = COARSE_WORDS, COARSE_EDGES
        elif requested not in TEMPO_WORDS:
            known = [*TEMPO_WORDS, *COARSE_WORDS]
            raise UserError(f"{requested!r} is no tempo word.{suggest(requested, known)}")
        asked = words.index(requested)
    else:
        asked = int(np.searchsorted(edges, requested, side="left"))
    if produced is None:
        return False, False
    gap = abs(int(np.searchsorted(edges, produced, side="left")) - asked)
    return gap == 0, gap <= 1


def tempo_error(requested: float, produced: float, *, octave: bool = False) -> float:
    """Return |produced - requested| / requested.

    With `octave` it is the least of that for the tempo produced, its half, third, double and
    triple: what is wrong beyond the level on which a tempo estimator counts beats.
    """
    factors = (1.0, 0.5, 1 / 3, 2.0, 3.0) if octave else (1.0,)
    return min(abs(f * produced - requested) for f in factors) / requested


def key_match(requested: str, produced: str | None) -> tuple[bool, bool]:
    """Return CK and CKD: whether keys are equal, or equal or relative (C major, A minor).

    Enharmonics are equal: C# minor is Db minor. None matches nothing.

    Raises:
        UserError: one is no key.
    """
    tonic, mode = key_number(requested)
    if produced is None:
        return False, False
    got, other = key_number(produced)
    same = (tonic, mode) == (got, other)
    shift = 9 if mode == "major" else 3
    return same, same or (mode != other and got == (tonic + shift) % 12)


def in_key_ratio(notes: Notes, key: str) -> float:
    """Return the share of notes, drums excluded, on the scale of a key; NaN without such notes.

    The scale of a minor key is the natural one. Pitches drawn evenly give 7/12 = 0.583.

    Raises:
        UserError: it is no key.
    """
    return _in_key(pitch_classes(notes, weighted=False), key)


def _in_key(classes: np.ndarray, key: str) -> float:
    tonic, mode = key_number(key)
    scale = (np.array(_SCALE[mode]) + tonic) % 12
    return float(classes[scale].sum() / classes.sum()) if classes.any() else float("nan")


def compression_ratio(notes: Notes, *, resolution: int = 100) -> float:
    """Return how far notes can be compressed: the more they repeat, the larger; NaN of none.

    It is len(text) / len(zlib.compress(text, 9)) of an ASCII text with one line a note: ticks since
    the onset before, duration in ticks, instrument and pitch, in decimal with single spaces.
    Pieces of equal length only can be compared, as zlib writes 11 bytes around everything and
    finds more the more there is. This is NOT the CR that Text2midi publishes (2.31 for its own
    files): that one runs Omnisia's geometric COSIATEC, a Java program, on points of onset and
    pitch.

    Args:
        notes: In the order of their onsets.
        resolution: Ticks a second.
    """
    if not len(notes):
        return float("nan")
    onset = np.rint(notes.onset * resolution).astype(np.int64)
    length = np.rint(notes.duration * resolution).astype(np.int64)
    rows = np.stack([np.diff(onset, prepend=onset[0]), length, notes.instrument, notes.pitch], 1)
    text = "".join(f"{a} {b} {c} {d}\n" for a, b, c, d in rows.tolist()).encode()
    return len(text) / len(zlib.compress(text, 9))


def self_similarity(notes: Notes, *, window: float = 2.0) -> float:
    """Return the mean cosine of the pitch classes of every two windows: 0 to 1.

    It is the mean of the self-similarity matrix off its diagonal: 1 where one harmony lasts, 0
    where no pitch class ever comes back. A window counts how many notes of each pitch class begin
    in it; drums are left out, and so are windows in which nothing begins. NaN with fewer than two.

    Args:
        notes: In the order of their onsets.
        window: Seconds. They are no bars, as notes have no tempo.

    Raises:
        UserError: the window is not over 0.
    """
    if not window > 0:
        raise UserError(f"window must be over 0 seconds, not {window!r}")
    pitched = notes[notes.instrument < DRUMS]
    found, which = np.unique(np.floor(pitched.onset / window), return_inverse=True)
    n = len(found)
    if n < 2:
        return float("nan")
    counts = np.zeros((n, 12))
    np.add.at(counts, (which, pitched.pitch % 12), 1)
    total = _unit(counts).sum(0)  # its square is the sum of the whole matrix, whose diagonal is 1
    return float((total @ total - n) / (n * (n - 1)))


def most_at_once(notes: Notes, *, resolution: int = 100) -> int:
    """Return how many notes begin at one tick at most.

    The public script refuses pieces with more than 64 (`grammar.MOST_AT_ONCE`).

    Args:
        notes: Any.
        resolution: Ticks a second.
    """
    ticks = np.rint(notes.onset * resolution)
    return int(np.unique(ticks, return_counts=True)[1].max(initial=0))


def grammar_errors(ids: "Sequence[int] | np.ndarray", config: AMTConfig) -> tuple[int, int]:
    """Count the ids that the grammar of events does not allow where they stand.

    Behind an error the music is read as if it began there, with that id if it may. So a time that
    falls is one error; an onset that is missing is two, as neither the duration nor the note
    behind it can begin an event.

    Args:
        ids: Music ids `[n]` of one window, as `MidiLM.generate` gives them: `continue_` begins
            anew at each window and `infill` has controls, which would count as errors.
        config: The grid they are of.

    Returns:
        The errors, and how many ids there are up to the first separator that ends the music.
    """
    rules = Rules(config, GenerationConstraints(min_notes=0))  # an empty piece is no error here
    grammar = Grammar(rules, max_events=len(ids) + 1)
    errors = read = 0
    for id in ids:
        read += 1
        if id not in grammar.allowed():
            errors += 1
            grammar = Grammar(rules, max_events=len(ids) + 1)
            if id not in grammar.allowed():
                continue
        grammar.push(int(id))
        if grammar.finished:
            break
    return errors, read


def real_time_factor(music_seconds: float, wall_seconds: float) -> float:
    """Return seconds of music made in a second of waiting; bigger is faster.

    Raises:
        UserError: the music is of negative length, or no time was taken.
    """
    if not (wall_seconds > 0 and music_seconds >= 0):
        raise UserError(
            f"{music_seconds!r} s of music in {wall_seconds!r} s: the first must be 0 or more, the "
            "second over 0"
        )
    return music_seconds / wall_seconds


@dataclass(frozen=True, eq=False)
class Heard:
    """An output as the control metrics need it.

    Attributes:
        notes: What sounds.
        attributes: With the tempo measured from the onsets.
        instruments: All of them, not only the prominent.
        classes: Number of notes of each pitch class, `[12]`, without drums.
    """

    notes: Notes
    attributes: MusicAttributes
    instruments: tuple[int, ...]
    classes: np.ndarray

    @classmethod
    def of(cls, output: "Output") -> "Heard":
        """Measure an output; raises UserError as `notes_of` does."""
        notes = notes_of(output)
        attributes = analyze(notes)  # the tempo from the onsets, whatever a file says
        instruments = tuple(np.unique(notes.instrument).tolist())
        return cls(notes, attributes, instruments, pitch_classes(notes, weighted=False))


class HasScore(Protocol):
    """What `MidiLM.generate` returns."""

    @property
    def score(self) -> "ScoreTick":
        """The music."""
        ...


Output: TypeAlias = "Notes | ScoreTick | HasScore | str | PathLike[str] | bytes"
Asked: TypeAlias = "Request | MusicAttributes | str"


def notes_of(output: "Output") -> Notes:
    """Return the notes of an output: notes, a score, a MIDI file or its bytes, or a `.score`.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    if isinstance(output, Notes):
        return output
    if isinstance(output, str | PathLike | bytes | bytearray | memoryview):
        return read_notes(output)
    found = getattr(output, "score", output)
    if not hasattr(found, "tracks"):
        raise UserError(
            "an output must be Notes, a score, a MIDI file or have .score, not "
            f"{type(output).__name__}"
        )
    return notes_of_score(found)


def control_scores(requested: "Asked", produced: "Output") -> dict[str, float]:
    """Return all control metrics of an output; NaN is: not asked for, or not defined.

    Args:
        requested: A caption (read by `parse_caption`), attributes or a request.
        produced: See `notes_of`. Its tempo is measured from its onsets.

    Returns:
        `instrument_precision`, `_recall`, `_f1`, `_exact` (of the at most five that were asked
        for against all that sound), `family_f1`, `TB`, `TBT`, `tempo_error`, `tempo_error_octave`
        (see `tempo_match`, `tempo_error`), `CK`, `CKD`, `in_key` (in the key asked for),
        `density_bin` and `duration_bin` (1 if the words agree), `density_log_ratio`
        (|log2(produced / requested)|) and `empty` (1 if there are no notes).

    Raises:
        UserError: an argument is of another kind, or cannot be read.
    """
    return control_of(Request.of(requested), Heard.of(produced))


def control_of(asked: Request, heard: Heard) -> dict[str, float]:
    """Return what `control_scores` does, of a request and an output already measured."""
    got = heard.attributes
    found: dict[str, float] = dict.fromkeys(map(str, CONTROL), float("nan"))
    some = len(heard.notes) > 0
    if asked.instruments:
        scores = instrument_scores(asked.instruments, heard.instruments)
        found |= {f"instrument_{name}": value for name, value in scores.items()}
        found["family_f1"] = instrument_scores(asked.instruments, heard.instruments, families=True)[
            "f1"
        ]
    if (tempo := asked.tempo or asked.tempo_word) is not None:
        found["TB"], found["TBT"] = map(float, tempo_match(tempo, got.tempo))
    if asked.tempo is not None and got.tempo is not None:
        found["tempo_error"] = tempo_error(asked.tempo, got.tempo)
        found["tempo_error_octave"] = tempo_error(asked.tempo, got.tempo, octave=True)
    if asked.key is not None:
        found["CK"], found["CKD"] = map(float, key_match(asked.key, got.key))
        found["in_key"] = _in_key(heard.classes, asked.key)
    if asked.density_word is not None:
        word = density_word(got.notes_per_second)
        found["density_bin"] = float(some and word == asked.density_word)
    if asked.notes_per_second is not None:
        rates = np.maximum([got.notes_per_second, asked.notes_per_second], _LEAST_DENSITY)
        found["density_log_ratio"] = float(abs(np.diff(np.log2(rates))[0]))
    if asked.duration_word is not None:
        found["duration_bin"] = float(some and duration_word(got.seconds) == asked.duration_word)
    found["empty"] = float(not some)
    return found


# ------------------------------------------------------------------------------------------------
# Many outputs against many real pieces


def pitch_class_entropy(notes: Notes) -> float:
    """Return the entropy of the pitch classes in bits, 0 to 3.585, without drums; NaN of none."""
    classes = pitch_classes(notes, weighted=False)
    if not classes.any():
        return float("nan")
    p = classes[classes > 0] / classes.sum()
    return float(-(p * np.log2(p)).sum() + 0.0)


def overlapped_area(p: ArrayLike, q: ArrayLike) -> float:
    """Return the sum of the lesser of two histograms `[n]`, each divided by its sum: 0 to 1.

    Raises:
        UserError: a histogram is empty, has negative values, or the lengths differ.
    """
    a, b = _histograms(p, q)
    return float(np.minimum(a / a.sum(), b / b.sum()).sum())


def kl_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Return KL(p || q) in nats of two histograms of counts `[n]`, each bin plus one half.

    Raises:
        UserError: see `overlapped_area`.
    """
    a, b = (h + 0.5 for h in _histograms(p, q))
    a, b = a / a.sum(), b / b.sum()
    return float(max((a * np.log(a / b)).sum(), 0.0))


def _histograms(p: ArrayLike, q: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise UserError(f"histograms have the shapes {a.shape} and {b.shape}; both must be [n]")
    for h in (a, b):
        if not (np.isfinite(h).all() and (h >= 0).all() and h.sum() > 0):
            raise UserError("a histogram must be finite, of no negative values, and not empty")
    return a, b


def interval_histogram(notes: Notes) -> Floats:
    """Return how many onsets follow the one before by how much, `[len(INTERVAL_EDGES) - 1]`.

    Onsets within 5 ms are in the first bin; the others are logarithmic, 20 ms to 5.12 s.
    """
    return np.histogram(np.diff(notes.onset), INTERVAL_EDGES)[0].astype(np.float64)


def duration_histogram(notes: Notes) -> Floats:
    """Return how many notes last how long, drums excluded, `[len(DURATION_EDGES) - 1]`.

    Bins are logarithmic, two an octave, 20 ms to 10.24 s.
    """
    pitched = notes.instrument < 128
    return np.histogram(notes.duration[pitched], DURATION_EDGES)[0].astype(np.float64)


HISTOGRAMS: dict[str, Callable[[Notes], Floats]] = {
    "pitch_class": lambda notes: pitch_classes(notes, weighted=False).astype(np.float64),
    "interval": interval_histogram,
    "duration": duration_histogram,
}


def distribution_scores(outputs: Sequence[Notes], real: Sequence[Notes]) -> dict[str, float]:
    """Compare the pooled histograms of outputs with those of real pieces.

    Returns:
        `pitch_class_oa`, `interval_oa` and `duration_oa`, overlapped areas of 0 to 1 (of pooled
        notes, not of the densities of pairwise distances that mgeval overlaps), the same with
        `_kl`, KL(real || outputs) in nats, and `pitch_class_entropy`, the mean of the outputs less
        the mean of the real, in bits. NaN where one side has nothing to count.
    """
    found: dict[str, float] = {}
    for name, count in HISTOGRAMS.items():
        bins = len(count(empty_notes()))
        got, true = (np.sum([np.zeros(bins), *map(count, some)], 0) for some in (outputs, real))
        both = bool(got.any() and true.any())
        found[f"{name}_oa"] = overlapped_area(got, true) if both else float("nan")
        found[f"{name}_kl"] = kl_divergence(true, got) if both else float("nan")
    means = [mean_of([pitch_class_entropy(n) for n in some]) for some in (outputs, real)]
    found["pitch_class_entropy"] = means[0] - means[1]
    return found


def mean_of(values: ArrayLike) -> float:
    """Return the mean of what is finite; NaN of nothing."""
    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    return float(x.mean()) if len(x) else float("nan")


def frechet_distance(a: ArrayLike, b: ArrayLike, shrinkage: float | None = None) -> float:
    """Return the squared Frechet distance of two normal distributions fitted to embeddings.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2): the trace of the last root is the
    sum of the roots of the eigenvalues of a symmetric matrix, so nothing becomes complex; negative
    ones, which rounding makes, count as 0.

    Args:
        a: `[n, dim]`.
        b: `[m, dim]`.
        shrinkage: 0 to 1: how far each covariance is drawn to its mean variance times identity.
            With few embeddings the distance is biased upwards; this lessens it, and is another
            measure: give it with the figure.

    Raises:
        UserError: shapes differ, a value is not finite, or one side has fewer than dim + 1 rows
            and no shrinkage was chosen.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage must be 0 to 1 or None, not {shrinkage!r}")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise UserError(f"embeddings have the shapes {x.shape} and {y.shape}; must be [n, dim]")
    for name, rows in (("a", x), ("b", y)):
        if not np.isfinite(rows).all():
            raise UserError(f"{name} holds NaN or infinite values")
        if len(rows) < (2 if shrinkage is not None else x.shape[1] + 1):
            raise UserError(
                f"{name} has {len(rows)} embeddings of dimension {x.shape[1]}: their covariance "
                f"has no full rank; give {x.shape[1] + 1} or more, or choose a shrinkage, say 0.1"
            )
    s, t = (_covariance(rows, shrinkage or 0.0) for rows in (x, y))
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ t @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    gap = x.mean(0) - y.mean(0)
    return float(max(gap @ gap + np.trace(s) + np.trace(t) - 2 * cross, 0.0))


def _covariance(rows: Floats, shrinkage: float) -> Floats:
    centred = rows - rows.mean(0)
    s = centred.T @ centred / (len(rows) - 1)
    return (1 - shrinkage) * s + shrinkage * np.trace(s) / len(s) * np.eye(len(s))


# ------------------------------------------------------------------------------------------------
# Audio


class Embedder(Protocol):
    """Turns audio into a vector. `evaluate` names the figure after its `name`, if it has one."""

    def __call__(self, wav: np.ndarray, rate: int) -> np.ndarray:
        """Return `[dim]` of `[samples]` or `[samples, channels]`."""
        ...


def mel_embedding(wav: np.ndarray, rate: int) -> Floats:
    """Return statistics of log-mel bands and chroma: for "mel-FAD", which needs no network.

    mel-FAD is not comparable with published FAD, whose embeddings come from trained networks.

    Args:
        wav: `[samples]` or `[samples, channels]`, real; channels are averaged. Its level does
            not matter.
        rate: Samples a second, at least 16000.

    Returns:
        `[120]`: mean, standard deviation and mean absolute change from frame to frame of 32 bands
        (natural logarithm of the share of power, 60 to 7600 Hz), then mean and standard deviation
        of 12 chroma; frames of about 46 ms, half overlapping. What is shorter than a frame is
        filled with silence; silence gives equal values.

    Raises:
        UserError: the shape or the rate does not fit, or a value is not finite.
    """
    mono = _mono(wav)
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or rate < 16_000:
        raise UserError(
            f"rate must be a whole number of at least 16000 samples a second, not {rate!r}"
        )
    size = 1 << round(np.log2(rate * 0.046))
    mono = np.pad(mono, (0, max(size - len(mono), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(mono, size)[:: size // 2]
    bank, chroma = _filters(int(rate), size)
    mel, tone = [], []
    for start in range(0, len(frames), 512):  # so that an hour needs no more memory than 12 s
        power = np.abs(np.fft.rfft(frames[start : start + 512] * np.hanning(size))) ** 2
        mel.append(power @ bank.T)
        tone.append(power @ chroma.T)
    mels, tones = np.concatenate(mel), np.concatenate(tone)
    level = max(float(mels.mean()), 1e-30)
    bands = np.log(mels / level + 1e-5)  # [frames, 32]
    tones = tones / np.maximum(tones.sum(1, keepdims=True), 1e-9 * level * 12)  # [frames, 12]
    change = np.abs(np.diff(bands, axis=0)).mean(0) if len(bands) > 1 else np.zeros(_BANDS)
    return np.concatenate([bands.mean(0), bands.std(0), change, tones.mean(0), tones.std(0)])


mel_embedding.name = "mel-FAD, not comparable with published FAD"  # type: ignore[attr-defined]


def _filters(rate: int, size: int) -> tuple[Floats, Floats]:
    """Return triangular mel bands `[32, size / 2 + 1]` and pitch classes `[12, size / 2 + 1]`."""
    hertz = np.fft.rfftfreq(size, 1 / rate)
    ends = 2595 * np.log10(1 + np.array([_LOW, _HIGH]) / 700)
    edges = 700 * (10 ** (np.linspace(ends[0], ends[1], _BANDS + 2) / 2595) - 1)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.maximum(np.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)), 0)
    near = np.abs(hertz[None] - mid)
    bank[np.arange(_BANDS), near.argmin(1)] += 1e-3  # the lowest are narrower than a bin
    with np.errstate(divide="ignore"):
        pitch = 12 * np.log2(hertz / 440) + 69
    inside = (hertz >= 100) & (hertz <= 5000)
    name = np.where(inside, np.rint(np.where(inside, pitch, 0)), -1).astype(np.int64)
    chroma = (name % 12 == np.arange(12)[:, None]) & inside
    return bank, chroma.astype(np.float64)


def _mono(wav: np.ndarray) -> Floats:
    x = np.asarray(wav, np.float64)
    if x.ndim == 2:
        x = x.mean(1)
    if x.ndim != 1 or not len(x):
        raise UserError(
            f"wav has the shape {np.shape(wav)}; must be [samples] or [samples, channels]"
        )
    if not np.isfinite(x).all():
        raise UserError("wav holds NaN or infinite values")
    return x


def clap_scores(
    texts: Sequence[str],
    audios: Sequence[Audio],
    *,
    checkpoint: str | None = None,
    model: Any = None,
) -> Floats:
    """Return 100 times the cosine of CLAP embeddings of text and audio, `[n]`, pair by pair.

    Args:
        texts: Captions.
        audios: Samples and rate of each.
        checkpoint: File with weights of LAION-CLAP. None lets `laion_clap` fetch its own.
        model: A loaded `laion_clap.CLAP_Module`, in place of making one.

    Raises:
        UserError: the lengths differ or an audio does not fit.
        MissingDependencyError: `laion_clap` is not installed.
    """
    if len(texts) != len(audios):
        raise UserError(f"{len(texts)} texts but {len(audios)} audios; they must pair")
    text, audio = clap_embeddings(texts, audios, checkpoint, model)
    return 100 * (text * audio).sum(1)


def clap_embeddings(
    texts: Sequence[str], audios: Sequence[Audio], checkpoint: str | None, model: Any
) -> tuple[Floats, Floats]:
    """Return the embeddings of texts and audios, `[n, dim]` each, of norm 1."""
    if model is None:
        clap = require("laion_clap", extra="clap", package="midi-llm", purpose="CLAP scores")
        model = clap.CLAP_Module(enable_fusion=False)
        model.load_ckpt(checkpoint) if checkpoint is not None else model.load_ckpt()
    text = np.asarray(model.get_text_embedding(list(texts)), np.float64)
    rows = [
        np.asarray(model.get_audio_embedding_from_data(x=_resampled(w, r)[None]), np.float64)[0]
        for w, r in audios
    ]
    return _unit(text), _unit(np.stack(rows))


def _unit(rows: Floats) -> Floats:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _resampled(wav: np.ndarray, rate: int) -> np.ndarray:
    """Return audio at the 48 kHz of CLAP, float32."""
    from scipy.signal import resample_poly

    step = int(np.gcd(48_000, rate))
    return resample_poly(_mono(wav), 48_000 // step, rate // step).astype(np.float32)
