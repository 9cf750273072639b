"""What can be measured of music from its notes: key, tempo, metre, instruments, density, range.

Nothing here hears: the mood words come from a rule. Captions of all this are in `captions`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.midi_read import notes_of_score, read_piece
from midi_llm.midi_write import parse_key
from midi_llm.notes import Notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from symusic.core import ScoreTick

# Bins of the MidiCaps pipeline: a value on an edge belongs to the bin below it.
TEMPO_WORDS = (
    "Grave", "Largo", "Adagio", "Andante", "Moderato", "Allegro", "Vivace", "Presto", "Prestissimo",
)  # fmt: skip
TEMPO_EDGES = (40, 60, 70, 90, 110, 140, 160, 210)  # beats a minute
COARSE_WORDS, COARSE_EDGES = ("Slow", "Moderate tempo", "Fast", "Very fast"), (80, 120, 160)
DURATION_WORDS = ("Short fragment", "Short song", "Song", "Long piece")
DURATION_EDGES = (30, 120, 300)  # seconds
# Ours, not those of MidiCaps, which says nothing of density.
DENSITY_WORDS, DENSITY_EDGES = ("sparse", "moderately dense", "busy", "very dense"), (2, 6, 12)
TOP = 5  # instruments that are named
_MOODS = {
    ("major", 0): "peaceful", ("major", 1): "happy", ("major", 2): "cheerful",
    ("minor", 0): "sad", ("minor", 1): "melancholic", ("minor", 2): "dramatic",
}  # fmt: skip
# Krumhansl and Kessler 1982, as in Krumhansl 1990: how well each degree fits the key.
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
TONICS = {
    "major": ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),
    "minor": ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"),
}
_LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_FRAMES = 100  # a second, of the onset curve
_HEARD = 300  # seconds of the onset curve


def tempo_word(tempo: float) -> str:
    """Return the Italian word of a tempo in beats a minute: 120 is "Allegro", 110 "Moderato"."""
    return TEMPO_WORDS[bin_of(tempo, TEMPO_EDGES)]


def coarse_tempo_word(tempo: float) -> str:
    """Return "Slow", "Moderate tempo", "Fast" or "Very fast" for a tempo in beats a minute."""
    return COARSE_WORDS[bin_of(tempo, COARSE_EDGES)]


def duration_word(seconds: float) -> str:
    """Return "Short fragment", "Short song", "Song" or "Long piece"; 30 s is a fragment."""
    return DURATION_WORDS[bin_of(seconds, DURATION_EDGES)]


def density_word(notes_per_second: float) -> str:
    """Return "sparse" (up to 2 notes a second), "moderately dense", "busy" or "very dense"."""
    return DENSITY_WORDS[bin_of(notes_per_second, DENSITY_EDGES)]


def bin_of(value: float, edges: Sequence[float]) -> int:
    """Return the number of the bin of a value; one on an edge belongs to the bin below it."""
    return int(np.searchsorted(edges, value, side="left"))


@dataclass(frozen=True)
class MusicAttributes:
    """What `analyze` found.

    Attributes:
        key: Such as "C minor"; None if no pitched note tells.
        key_margin: By how much its correlation exceeds that of the next best key, 0 to 2.
        tempo: Beats (from a file: quarter notes) a minute; None if unknown.
        tempo_word: Of the nine of MidiCaps.
        time_signature: Beats of a bar and the note that is one; None if the source has none.
        instruments: Numbers 0 to 128 of the five most prominent, the most prominent first.
        notes_per_second: Between the first onset and the last end, taken as 1 s at least.
        polyphony: Mean number of pitched notes that sound while one does.
        pitch_range: Lowest and highest pitch, drums excluded; None without pitched notes.
        seconds: When the last note ends.
        duration_word: Of the four of MidiCaps.
        drums: Whether there are any.
        mood: Words by the rule of `mood_words`, which are no ground truth.
    """

    key: str | None
    key_margin: float
    tempo: float | None
    tempo_word: str | None
    time_signature: tuple[int, int] | None
    instruments: tuple[int, ...]
    notes_per_second: float
    polyphony: float
    pitch_range: tuple[int, int] | None
    seconds: float
    duration_word: str
    drums: bool
    mood: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MusicAttributes":
        """Rebuild them from their fields.

        Raises:
            UserError: a field is unknown, missing or of the wrong kind.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"attributes have no field {name!r}.{suggest(str(name), known)}")
        if missing := [name for name in known if name not in values]:
            raise UserError(f"attributes lack {', '.join(missing)}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        made = cls(**plain)
        if made.key is not None:
            parse_key(made.key)
        for name in ("tempo", "key_margin", "notes_per_second", "polyphony", "seconds"):
            value = getattr(made, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not ((number and 0 <= value < float("inf")) or (name == "tempo" and value is None)):
                raise UserError(f"{name} must be a number of at least 0, not {value!r}")
        if made.tempo == 0:
            raise UserError("tempo must be over 0 beats a minute, or null")
        sizes = {"instruments": range(TOP + 1), "mood": range(9), "time_signature": (2,)}
        for name, size in {**sizes, "pitch_range": (2,)}.items():
            value = getattr(made, name)
            if value is None and name in ("time_signature", "pitch_range"):
                continue
            kind = str if name == "mood" else int
            if not isinstance(value, tuple) or len(value) not in size:
                raise UserError(f"{name} cannot be {value!r}")
            if not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
                raise UserError(f"{name} cannot be {value!r}")
        if bad := [i for i in made.instruments if not 0 <= i <= DRUMS]:
            raise UserError(f"instruments must be numbers 0 to {DRUMS}, not {bad[0]}")
        return made


# ------------------------------------------------------------------------------------------------
# From notes to attributes


def analyze(
    source: "ScoreTick | Notes | str | PathLike[str] | bytes", *, use_file_tempo: bool = True
) -> MusicAttributes:
    """Measure the attributes of music.

    Args:
        source: A `symusic.Score` in ticks, a MIDI file or its bytes, or notes.
        use_file_tempo: Take the tempo from the tempo map (the median, weighted by how long each
            is in force). Where that is False, or nothing sets a tempo, it is estimated from the
            onsets: a generated file has no tempo but the one its writer invented.

    Returns:
        The attributes. Those of a piece without notes have no key, tempo, instruments and range.

    Raises:
        UserError: the source cannot be read, or is something else.
    """
    score = None
    if isinstance(source, Notes):
        notes = source
    else:
        if isinstance(source, str | PathLike | bytes | bytearray | memoryview):
            notes, score = read_piece(source)
        elif hasattr(source, "tracks") and hasattr(source, "tempos"):
            notes, score = notes_of_score(source), source
        else:
            raise UserError(
                "the source must be a symusic.Score in ticks, a MIDI file or Notes, not "
                f"{type(source).__name__}"
            )
    tempo = _file_tempo(score) if score is not None and use_file_tempo and len(notes) else None
    if tempo is None:
        tempo = estimate_tempo(notes)
    pitched = notes[notes.instrument != DRUMS]
    key, margin = estimate_key(pitched)
    rate = density(notes)
    return MusicAttributes(
        key=key,
        key_margin=margin,
        tempo=tempo,
        tempo_word=None if tempo is None else tempo_word(tempo),
        time_signature=None if score is None else _metre(score),
        instruments=prominent(notes),
        notes_per_second=rate,
        polyphony=_polyphony(pitched),
        pitch_range=(int(pitched.pitch.min()), int(pitched.pitch.max())) if len(pitched) else None,
        seconds=notes.end,
        duration_word=duration_word(notes.end),
        drums=len(pitched) < len(notes),
        mood=mood_words(key, tempo, rate) if len(notes) else (),
    )


def mood_words(key: str | None, tempo: float | None, notes_per_second: float) -> tuple[str, ...]:
    """Return mood words by a rule; it is no ground truth, no one has listened.

    Mode and tempo (to 80, to 120, above, in beats a minute) give "peaceful", "happy" and
    "cheerful" in major, "sad", "melancholic" and "dramatic" in minor; up to 2 notes a second add
    "relaxing", more than 6 "energetic".
    """
    words = []
    if key is not None and tempo is not None:
        words.append(_MOODS[parse_key(key)[1], min(bin_of(tempo, COARSE_EDGES), 2)])
    place = bin_of(notes_per_second, DENSITY_EDGES)
    if place != 1:
        words.append("relaxing" if place == 0 else "energetic")
    return tuple(words)


def density(notes: Notes) -> float:
    """Return the notes a second between first onset and last end, taken as 1 s at least."""
    return len(notes) / max(notes.end - float(notes.onset[0]), 1.0) if len(notes) else 0.0


def prominent(notes: Notes, top: int = TOP) -> tuple[int, ...]:
    """Return the most prominent instruments: by share of notes plus share of sounding time."""
    if not len(notes):
        return ()
    count = np.bincount(notes.instrument, minlength=DRUMS + 1)
    time = np.bincount(notes.instrument, notes.duration, DRUMS + 1)
    weight = count / count.sum() + time / max(time.sum(), 1e-9)
    order = np.argsort(-weight, kind="stable")[:top]
    return tuple(int(i) for i in order if count[i])


def pitch_classes(notes: Notes, *, weighted: bool = True) -> np.ndarray:
    """Return the seconds (or the number) of notes of each pitch class, `[12]`, without drums."""
    pitched = notes.instrument != DRUMS
    weight = notes.duration[pitched] if weighted else None
    return np.bincount(notes.pitch[pitched] % 12, weight, 12)


def estimate_key(notes: Notes) -> tuple[str | None, float]:
    """Return the key and its margin (Krumhansl and Schmuckler; Krumhansl 1990, chapter 4).

    The key is the one of 24 whose profile correlates best with how long each pitch class sounds,
    drums excluded (how often, if no note lasts), the margin what it is ahead of the next. Relative
    and parallel keys and those a fifth apart are what it confuses.

    Returns:
        Such as ("D major", 0.05); (None, 0.0) without pitched notes or if all classes are equal.
    """
    weights = pitch_classes(notes)
    if not weights.any():
        weights = pitch_classes(notes, weighted=False)
    weights = weights - weights.mean()
    norm = np.linalg.norm(weights)
    if norm < 1e-9 * max(1.0, np.abs(weights).max()) or not len(notes):
        return None, 0.0
    fit = _profiles() @ (weights / norm)  # [24]
    order = np.argsort(-fit, kind="stable")
    best = int(order[0])
    mode = ("major", "minor")[best // 12]
    return f"{TONICS[mode][best % 12]} {mode}", float(fit[order[0]] - fit[order[1]])


@cache
def _profiles() -> np.ndarray:
    """Return the profiles of 12 major and 12 minor keys, `[24, 12]`, of mean 0 and norm 1."""
    rows = np.array([np.roll(p, tonic) for p in (_MAJOR, _MINOR) for tonic in range(12)])
    rows -= rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def key_number(key: str) -> tuple[int, str]:
    """Return the pitch class 0 to 11 of the tonic, and the mode; enharmonics are equal.

    Raises:
        UserError: it is no key.
    """
    tonic, mode = parse_key(key)
    sign = tonic[1:].count("#") - tonic[1:].count("b")
    return (_LETTERS[tonic[0]] + sign) % 12, mode


def _polyphony(notes: Notes) -> float:
    end = notes.onset + notes.duration
    before = np.concatenate([[0.0], np.maximum.accumulate(end)])[: len(notes)]
    some = float(np.maximum(end - np.maximum(notes.onset, before), 0).sum())
    return float(notes.duration.sum()) / some if some > 0 else 0.0


def _file_tempo(score: "ScoreTick") -> float | None:
    """Return the median of the tempo map, weighted by seconds; None if nothing sets a tempo."""
    if not len(score.tempos):
        return None
    values = score.tempos.numpy()
    time, mspq = (np.asarray(values[k], np.int64) for k in ("time", "mspq"))
    if time.min() > 0:
        time, mspq = np.insert(time, 0, 0), np.insert(mspq, 0, 500_000)
    order = np.argsort(time, kind="stable")
    time, mspq = time[order], mspq[order]
    length = np.diff(np.minimum(time, end := _last_tick(score)), append=end)
    weight = length * mspq
    if not weight.any():
        return 60e6 / float(mspq[0])
    order = np.argsort(-mspq)
    total = np.cumsum(weight[order])
    return 60e6 / float(mspq[order][np.searchsorted(total, total[-1] / 2)])


def _metre(score: "ScoreTick") -> tuple[int, int] | None:
    """Return the time signature that is longest in force; of equal ticks the last counts."""
    if not len(score.time_signatures):
        return None
    signs = sorted(score.time_signatures, key=lambda s: s.time)
    end = _last_tick(score)
    stops = [*(sign.time for sign in signs[1:]), end]
    held: dict[tuple[int, int], int] = {}
    for sign, stop in zip(signs, stops, strict=True):
        name = (int(sign.numerator), int(sign.denominator))
        held[name] = held.get(name, 0) + min(stop, end) - min(sign.time, end)
    return max(held, key=lambda name: held[name])


def _last_tick(score: "ScoreTick") -> int:
    """Return where the last note ends; the end of a score counts tempos behind it."""
    ends = [0]
    for track in score.tracks:
        if len(track.notes):
            columns = track.notes.numpy()
            ends.append(int((columns["time"].astype(np.int64) + columns["duration"]).max()))
    return max(ends)


def estimate_tempo(notes: Notes) -> float | None:
    """Return the beats a minute, 40 to 240, that fit the onsets; None if there are too few.

    The autocorrelation of the onsets (100 frames a second, of the first 300 s) is averaged over
    one to four beats and weighted by how natural a tempo is (log-normal around 120 a minute, 0.9
    octaves wide; after Ellis 2007). Half or double the tempo fits many pieces as well, and beats of
    6/8 are dotted: an error of an octave is what it commits.
    """
    frame = np.rint((notes.onset - notes.onset[0]) * _FRAMES) if len(notes) else np.zeros(0)
    frame = frame[frame < _HEARD * _FRAMES].astype(np.int64)
    if len(np.unique(frame)) < 4 or frame[-1] < _FRAMES:
        return None
    curve = np.log1p(np.bincount(frame))
    curve = np.convolve(curve, _SMOOTH, mode="same") if len(curve) > len(_SMOOTH) else curve
    curve = curve - curve.mean()
    size = 1 << (2 * len(curve) - 1).bit_length()
    spectrum = np.fft.rfft(curve, size)
    match = np.fft.irfft(spectrum.real**2 + spectrum.imag**2, size)[: len(curve)]
    match /= match[0]  # at lags that only part of the piece has it falls, which is as it should be
    tempos = np.geomspace(40, 240, 400)
    prior = np.exp(-0.5 * (np.log2(tempos / 120) / 0.9) ** 2)
    best = tempos[np.argmax(prior * _periodic(match, tempos, 4))]
    near = best * np.linspace(0.98, 1.02, 161)
    return float(near[np.argmax(_periodic(match, near, 16))])


_SMOOTH = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)  # 20 ms wide


def _periodic(match: np.ndarray, tempos: np.ndarray, beats: int) -> np.ndarray:
    """Return the mean autocorrelation over 1 to `beats` beats of each tempo."""
    lags = np.arange(1, beats + 1)[:, None] * (60 * _FRAMES / tempos)
    return np.interp(lags, np.arange(len(match)), match, right=0.0).mean(0)
