"""Music made audible and visible: WAV by FluidSynth or a small synthesiser, MP3, pictures.

FluidSynth sounds as players do and needs a soundfont. Where either is missing a few sines a note,
the engine "preview", still tell right notes from wrong ones; results say which engine it was.
"""

import os
import shutil
import subprocess
import tempfile
import time
import warnings
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from midi_llm.decode import MidiOutput
from midi_llm.midi_read import notes_of_score, read_notes, read_score
from midi_llm.midi_write import Style, write_midi
from midi_llm.notes import Notes
from midi_llm.vocab import DRUMS, instrument_name
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import MissingDependencyError, UserError, suggest
from tenfold_common.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from symusic.core import ScoreTick

    Source = ScoreTick | Notes | MidiOutput | str | os.PathLike[str]

MAX_AUDIO = 900  # seconds of a piece that is rendered
SOUNDFONT_VARIABLE = "MIDI_LLM_SOUNDFONT"
SOUNDFONTS = (  # where Debian's packages put them, the better ones first
    "/usr/share/sounds/sf2/FluidR3_GM.sf2",
    "/usr/share/sounds/sf2/TimGM6mb.sf2",
    "/usr/share/sounds/sf2/default-GM.sf2",
    "/usr/share/sounds/sf3/default-GM.sf3",
)
ENGINES = ("auto", "fluidsynth", "preview")
PEAK = 0.98  # of full scale; louder music is turned down, never clipped
# Okabe and Ito's palette, then Paul Tol's muted one: colours that colour-blind readers tell apart.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255",
    "#44AA99", "#999933", "#AA4499", "#117733", "#DDCC77", "#88CCEE", "#CC6677",
)  # fmt: skip
DRUM_COLOUR = "#777777"
MAX_DRAWN = 20_000  # notes of an instrument in an SVG
_TAIL = 5  # seconds that FluidSynth may add to a piece at most
_MAX_BARS = 4000
# Of the preview: loudness of the harmonics and decay a second, by the kinds of families below.
_KINDS = {
    "struck": ((1, 0.5, 0.25, 0.12, 0.06, 0.03), 2.0),
    "bass": ((1, 0.6, 0.2, 0.1), 1.5),
    "organ": ((1, 0.5, 0.4, 0.2, 0.0, 0.1), 0.0),
    "bowed": ((1, 0.5, 0.33, 0.25, 0.2, 0.17), 0.2),
    "reed": ((1, 0.1, 0.4, 0.05, 0.3, 0.05), 0.2),
    "pipe": ((1, 0.2, 0.05), 0.2),
}
_OF_FAMILY = (
    "struck", "struck", "organ", "struck", "bass", "bowed", "bowed", "bowed", "reed", "pipe",
    "reed", "organ", "organ", "struck", "struck", "struck",
)  # fmt: skip
_ATTACK, _RELEASE, _DRUM = 0.005, 0.03, 0.4  # seconds; a drum rings out
_HATS, _KICKS, _CYMBALS, _SNARES = (42, 44, 46, 54), (35, 36), (49, 51, 52, 55, 57, 59), (38, 40)


class PreviewWarning(UserWarning):
    """Sound comes from the built-in synthesiser, since FluidSynth or a soundfont is missing."""


@dataclass(frozen=True)
class Sound:
    """What `to_wav` wrote.

    Attributes:
        path: The file.
        engine: "fluidsynth" or "preview".
        seconds: How long it is.
        rate: Samples a second.
        peak: Largest sample as a fraction of full scale.
    """

    path: Path
    engine: str
    seconds: float
    rate: int
    peak: float


# ------------------------------------------------------------------------------------------------
# Sound


def find_soundfont(path: "str | os.PathLike[str] | None" = None) -> Path:
    """Find a soundfont: the argument, else the variable MIDI_LLM_SOUNDFONT, else Debian's paths.

    Args:
        path: A file. Defaults to looking for one.

    Raises:
        UserError: what was named is not there or is no soundfont.
        MissingDependencyError: nothing was named and none is installed.
    """
    named = path if path is not None else os.environ.get(SOUNDFONT_VARIABLE) or None
    if named is not None:
        origin = "the soundfont" if path is not None else SOUNDFONT_VARIABLE
        file = Path(named)
        if not file.is_file():
            raise UserError(f"{origin} {str(file)!r} is not there")
        with file.open("rb") as stream:
            head = stream.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"sfbk":
            raise UserError(f"{origin} {str(file)!r} is no soundfont (.sf2 or .sf3)")
        return file.resolve()
    for known in SOUNDFONTS:
        if Path(known).is_file():
            return Path(known)
    raise MissingDependencyError(
        "no soundfont is installed. On Debian or Ubuntu: apt-get install timgm6mb-soundfont (5 MB) "
        f"or fluid-soundfont-gm (120 MB); elsewhere set {SOUNDFONT_VARIABLE} to an .sf2 file"
    )


def choose_engine(
    engine: str = "auto", soundfont: "str | os.PathLike[str] | None" = None
) -> tuple[str, str]:
    """Settle which engine renders, and why not FluidSynth if it is not.

    Args:
        engine: "auto", "fluidsynth" or "preview".
        soundfont: As of `find_soundfont`.

    Returns:
        "fluidsynth" and "", or "preview" and the reason.

    Raises:
        UserError: the engine is unknown, or the soundfont named is not there.
        MissingDependencyError: "fluidsynth" was asked for and it or a soundfont is missing.
    """
    if engine not in ENGINES:
        raise UserError(
            f"engine must be one of {', '.join(ENGINES)}, not {engine!r}."
            f"{suggest(str(engine), ENGINES)}"
        )
    if engine == "preview":
        return "preview", "it was asked for"
    try:
        find_soundfont(soundfont)
        if shutil.which("fluidsynth") is None:
            raise MissingDependencyError(
                "the program fluidsynth is missing. On Debian or Ubuntu: apt-get install fluidsynth"
            )
    except MissingDependencyError as error:
        if engine == "fluidsynth":
            raise
        return "preview", str(error)
    return "fluidsynth", ""


def to_wav(
    source: "Source",
    path: "str | os.PathLike[str]",
    *,
    soundfont: "str | os.PathLike[str] | None" = None,
    rate: int = 44100,
    gain: float = 0.6,
    engine: Literal["auto", "fluidsynth", "preview"] = "auto",
    normalize: float | None = None,
) -> Sound:
    """Render a piece to a WAV file of 16 bits, whole or not at all.

    Music is never clipped: where it would be, all of it is turned down.

    Args:
        source: A `symusic.Score`, `Notes`, a `MidiOutput`, or a MIDI file, whose pedals and bends
            FluidSynth plays too.
        path: Where to; what is there is replaced.
        soundfont: As of `find_soundfont`.
        rate: Samples a second, 8000 to 96000.
        gain: Loudness, over 0 to 10; FluidSynth's own scale.
        engine: "fluidsynth"; "preview", sums of sines without a soundfont, in mono; or "auto", the
            first where it and a soundfont are installed, else the second with a warning.
        normalize: Peak in dB below full scale that the result is brought to, such as -1. Defaults
            to the loudness that `gain` gives.

    Raises:
        UserError: an argument is out of range, the piece is empty, not to be read or longer than
            15 minutes, or FluidSynth fails.
        MissingDependencyError: "fluidsynth" was asked for and it or a soundfont is missing.
    """
    for name, value, low, high in (("rate", rate, 8000, 96000), ("gain", gain, 0, 10)):
        if isinstance(value, bool) or not (low <= value <= high and value):
            raise UserError(f"{name} must be {low} to {high}, not {value!r}")
    if not isinstance(rate, int):
        raise UserError(f"rate must be a whole number, not {rate!r}")
    if normalize is not None and not -60 <= normalize <= 0:
        raise UserError(f"normalize must be -60 to 0 dB, not {normalize!r}")
    chosen, reason = choose_engine(engine, soundfont)
    if chosen == "preview" and engine == "auto":
        warnings.warn(f"a preview sound is made: {reason}", PreviewWarning, stacklevel=2)
    notes = _notes(source)
    if not len(notes):
        raise UserError("the piece has no notes; there is nothing to hear")
    if notes.end > MAX_AUDIO:
        raise UserError(f"the piece lasts {notes.end:.0f} s; at most {MAX_AUDIO} s are rendered")
    if chosen == "preview":
        return _write(_preview(notes, rate) * (gain / 2), path, rate, chosen, normalize)
    with tempfile.TemporaryDirectory(prefix="midi-llm-") as folder:
        file = Path(folder) / "in.mid"
        _write_file(source, file)
        samples = _fluidsynth(file, find_soundfont(soundfont), rate, gain, notes.end)
        return _write(samples, path, rate, chosen, normalize)


def _notes(source: Any) -> Notes:
    if isinstance(source, Notes):
        return source
    if isinstance(source, MidiOutput):
        return source.notes
    if isinstance(source, str | os.PathLike):
        return read_notes(source)
    if type(source).__name__.startswith("Score"):
        return notes_of_score(source)
    raise UserError(
        f"music is a symusic.Score, Notes, a MidiOutput or a MIDI file, not {type(source).__name__}"
    )


def _write_file(source: Any, file: Path) -> None:
    """Write the MIDI file that FluidSynth reads; the name is ours and holds nothing strange."""
    if isinstance(source, Notes):
        write_midi(source, file)
    elif isinstance(source, MidiOutput):
        source.save(file)
    elif isinstance(source, str | os.PathLike):
        shutil.copyfile(source, file)
    else:
        file.write_bytes(source.dumps_midi())


def _fluidsynth(file: Path, soundfont: Path, rate: int, gain: float, seconds: float) -> np.ndarray:
    """Return what FluidSynth makes of a file: `[samples, 2]` float32, not clipped."""
    raw = file.with_name("out.raw")
    # An empty configuration, since a user's own could load other fonts; options before files.
    command = [
        "fluidsynth", "-n", "-i", "-q", "-f", os.devnull, "-F", str(raw), "-T", "raw",
        "-O", "float", "-E", "little", "-r", str(rate), "-g", f"{gain:g}",
        str(soundfont), str(file),
    ]  # fmt: skip
    limit = int((seconds + _TAIL) * rate) * 8
    patience = 60 + 2 * seconds
    deadline = time.monotonic() + patience
    complaints = file.with_name("stderr")
    with (
        complaints.open("wb") as errors,
        subprocess.Popen(  # noqa: S603 - a list, and no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        ) as process,
    ):
        whole = True
        try:
            while process.poll() is None:
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    # A file may hold an empty hour behind its last note, which nobody needs.
                    whole = not raw.exists() or raw.stat().st_size <= limit
                    if not whole:
                        break
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"FluidSynth did not finish within {patience:.0f} s; the piece may be "
                            "too dense"
                        ) from None
        finally:
            if process.poll() is None:
                process.kill()
    said = complaints.read_text(errors="replace").strip()
    # Without a font it plays silence and says that all went well.
    silent = "not a SoundFont" in said or "Failed to load" in said
    if whole and (process.returncode or not raw.exists() or silent):
        last = said.splitlines()[-1] if said else f"exit status {process.returncode}"
        raise UserError(f"FluidSynth failed: {last}")
    size = min(raw.stat().st_size, limit) // 8
    return np.fromfile(raw, "<f4", size * 2).reshape(-1, 2)


def _preview(notes: Notes, rate: int) -> np.ndarray:
    """Return the notes as sums of sines, `[samples]` float32; each tone is made once."""
    drums = notes.instrument == DRUMS
    duration = np.where(drums, _DRUM, notes.duration)
    begin = np.rint(notes.onset * rate).astype(np.int64)
    held = np.maximum(np.rint(duration * rate).astype(np.int64), 1)
    fade = round(_RELEASE * rate)
    rise = np.linspace(0, 1, round(_ATTACK * rate), dtype=np.float32)
    fall = np.linspace(1, 0, fade, dtype=np.float32)
    mix = np.zeros(int((begin + held).max()) + fade, np.float32)
    key = np.where(drums, len(_OF_FAMILY), notes.instrument // 8) * 128 + notes.pitch
    order = np.argsort(key, kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        family, pitch = divmod(int(key[same[0]]), 128)
        longest = int(held[same].max()) + fade
        made = _drum if family == len(_OF_FAMILY) else _tone
        tone = made(family, pitch, longest, rate).astype(np.float32)
        for i in same:
            size = int(held[i]) + fade
            one = tone[:size] * (notes.velocity[i] / 127) ** 2
            attack = min(len(rise), size)
            one[:attack] *= rise[:attack]
            one[-fade:] *= fall
            mix[begin[i] : begin[i] + size] += one
    return mix


def _tone(family: int, pitch: int, size: int, rate: int) -> np.ndarray:
    loudness, decay = _KINDS[_OF_FAMILY[family]]
    seconds = np.arange(size) / rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    tone = np.zeros(size)
    for number, loud in enumerate(loudness, 1):
        if number * frequency < 0.45 * rate:  # what is above would come back as another pitch
            envelope = loud * np.exp(-decay * number**0.5 * seconds)
            tone += envelope * np.sin(2 * np.pi * number * frequency * seconds)
    return tone / 2


def _drum(family: int, pitch: int, size: int, rate: int) -> np.ndarray:
    del family
    seconds = np.arange(size) / rate
    if pitch in _KICKS:
        sweep = 45 * seconds + 75 / 30 * (1 - np.exp(-30 * seconds))  # from 120 to 45 Hz
        return np.sin(2 * np.pi * sweep) * np.exp(-12 * seconds)
    noise = np.random.default_rng(pitch).uniform(-0.4, 0.4, size + 1)
    bright = np.diff(noise) if pitch in _HATS + _CYMBALS else noise[:-1]
    decay = 60 if pitch in _HATS else 8 if pitch in _CYMBALS else 18 if pitch in _SNARES else 25
    return bright * np.exp(-decay * seconds)


def _write(
    samples: np.ndarray,
    path: "str | os.PathLike[str]",
    rate: int,
    engine: str,
    normalize: float | None,
) -> Sound:
    peak = max(float(samples.max()), -float(samples.min()), 1e-9) if samples.size else 1e-9
    scale = min(1.0, PEAK / peak) if normalize is None else 10 ** (normalize / 20) / peak
    block = 2**20
    with atomic_write(path, "wb") as stream, wave.open(stream, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.setnframes(len(samples))
        for start in range(0, len(samples), block):
            part = samples[start : start + block] * np.float32(scale * 32767)
            out.writeframes(np.rint(part).clip(-32768, 32767).astype("<i2").tobytes())
    return Sound(Path(path), engine, len(samples) / rate, rate, min(1.0, peak * scale))


def read_wav(path: "str | os.PathLike[str]") -> tuple[np.ndarray, int]:
    """Read a WAV file of 16 bits.

    Args:
        path: The file.

    Returns:
        `[samples]` float32 within -1 to 1, the mean of the channels, and samples a second.

    Raises:
        UserError: it is missing, or no WAV file of 16 bits.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not there")
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise UserError(f"{path} has {8 * file.getsampwidth()} bits a sample, must be 16")
            channels, rate = file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path} is no WAV file that can be read: {error}") from error
    whole = len(data) // (2 * channels) * channels
    samples = np.frombuffer(data, "<i2", whole).reshape(-1, channels)
    return samples.mean(1, dtype=np.float32) / np.float32(32768), rate


def to_mp3(
    wav: "str | os.PathLike[str]", path: "str | os.PathLike[str]", *, bitrate: int = 192
) -> Path:
    """Make an MP3 of a WAV file with ffmpeg.

    Args:
        wav: The WAV file.
        path: Where to; what is there is replaced.
        bitrate: Kilobits a second, 32 to 320.

    Raises:
        UserError: the WAV file is missing, the bit rate is out of range, or ffmpeg fails.
        MissingDependencyError: ffmpeg is not installed.
    """
    if isinstance(bitrate, bool) or not isinstance(bitrate, int) or not 32 <= bitrate <= 320:
        raise UserError(f"bitrate must be a whole number 32 to 320, not {bitrate!r}")
    if not Path(wav).is_file():
        raise UserError(f"{wav} is not there")
    if shutil.which("ffmpeg") is None:
        raise MissingDependencyError(
            "MP3 needs the program ffmpeg. On Debian or Ubuntu: apt-get install ffmpeg"
        )
    with tempfile.TemporaryDirectory(prefix="midi-llm-") as folder:
        made = Path(folder) / "out.mp3"
        command = [
            "ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-f", "wav",
            "-i", f"file:{Path(wav).resolve()}", "-codec:a", "libmp3lame", "-b:a", f"{bitrate}k",
            "-f", "mp3", f"file:{made}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, timeout=600, check=False)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise UserError("ffmpeg did not finish within 600 s") from error
        if done.returncode or not made.is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise UserError(f"ffmpeg failed: {said[-1] if said else done.returncode}")
        with atomic_write(path, "wb") as stream, made.open("rb") as source:
            shutil.copyfileobj(source, stream)
    return Path(path)


# ------------------------------------------------------------------------------------------------
# Pictures


def instrument_colours(notes: Notes) -> dict[int, str]:
    """Give every instrument a colour, in the order in which they come in; drums are grey."""
    found, first = np.unique(notes.instrument, return_index=True)
    ordered = [int(i) for i in found[np.argsort(first)]]
    pitched = [i for i in ordered if i != DRUMS]
    colours = {i: COLOURS[n % len(COLOURS)] for n, i in enumerate(pitched)}
    return {i: colours.get(i, DRUM_COLOUR) for i in ordered}


def piano_roll(
    source: "Source",
    path: "str | os.PathLike[str] | None" = None,
    *,
    style: Style | None = None,
    title: str = "",
) -> "Figure":
    """Draw a piece: time to the right, pitch upwards, a colour for each instrument, bar lines.

    Args:
        source: As of `to_wav`.
        path: Where to save it; the ending names the format. Defaults to nowhere.
        style: Tempo and metre for the bar lines. Defaults to those of the file, the Score or the
            MidiOutput; bare `Notes` have none, and get no bar lines.
        title: Above the picture.

    Raises:
        UserError: the piece cannot be read, or the format is unknown.
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _figure(8, 4)
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    notes = _notes(source)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    colours = instrument_colours(notes)
    end = max(notes.end, 1.0)
    low, high = (int(notes.pitch.min()), int(notes.pitch.max())) if len(notes) else (60, 72)
    for instrument, colour in colours.items():
        some = notes[notes.instrument == instrument]
        left, right = some.onset, some.onset + np.maximum(some.duration, end / 500)
        x = np.stack([left, left, right, right], 1)
        y = some.pitch[:, None] + np.array([-0.45, 0.45, 0.45, -0.45])
        axes.add_collection(
            PolyCollection(
                list(np.stack([x, y], 2)), facecolors=colour, edgecolors="white", linewidths=0.3,
                zorder=2,
            )
        )  # fmt: skip
    axes.vlines(
        _bars(source, style, end), low - 2, high + 2, colors="0.85", linewidth=0.8, zorder=1
    )
    axes.set_xlim(0, end)
    axes.set_ylim(low - 2, high + 2)
    step = 12 if high - low >= 12 else 1
    ticks = [p for p in range(low - 2, high + 3) if p % step == 0]
    names = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    axes.set_yticks(ticks, [f"{names[p % 12]}{p // 12 - 1}" for p in ticks])
    axes.set_xlabel("time, s")
    axes.set_ylabel("pitch")
    axes.set_title(title, fontsize=10)
    if colours:
        figure.legend(
            handles=[Patch(color=c, label=instrument_name(i)) for i, c in colours.items()],
            loc="outside lower center", ncols=min(4, len(colours)), frameon=False, fontsize=8,
        )  # fmt: skip
    return _saved(figure, path)


def piano_roll_svg(source: "Source", *, style: Style | None = None) -> str:
    """Return a small piano roll as SVG, without matplotlib; it stretches to any size.

    Args:
        source: As of `to_wav`.
        style: As of `piano_roll`.

    Raises:
        UserError: the piece cannot be read.
    """
    notes = _notes(source)
    width, height = 1000.0, 240.0
    end = max(notes.end, 1e-3)
    low, high = (int(notes.pitch.min()), int(notes.pitch.max())) if len(notes) else (60, 72)
    low, high = low - 2, max(high, low + 10) + 3
    row = height / (high - low)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'preserveAspectRatio="none">',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
        '<g stroke="#ececec">',
    ]
    for pitch in range(-(-low // 12) * 12, high, 12):  # a line below every C
        y = (high - pitch) * row
        lines.append(f'<path d="M0 {y:.2f}H{width:g}" vector-effect="non-scaling-stroke"/>')
    lines.append('</g><g stroke="#d5d5d5">')
    for second in _bars(source, style, end):
        x = second / end * width
        lines.append(f'<path d="M{x:.2f} 0V{height:g}" vector-effect="non-scaling-stroke"/>')
    lines.append("</g>")
    for instrument, colour in instrument_colours(notes).items():
        some = notes[notes.instrument == instrument][:MAX_DRAWN]
        left = some.onset / end * width
        right = np.maximum((some.onset + some.duration) / end * width, left + 2)
        tall = max(0.9 * row, 3.5)
        top = (high - 0.5 - some.pitch) * row - tall / 2
        lines.append(f'<g fill="{colour}" fill-opacity="0.85">')
        lines += [
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{tall:.2f}" rx="1"/>'
            for x, y, w in zip(left, top, right - left - 0.6, strict=True)
        ]
        lines.append("</g>")
    lines.append("</svg>")
    return "\n".join(lines)


def bar_lines(style: Style, end: float) -> np.ndarray:
    """Return the seconds of bar lines up to `end`; none where they would be too many to see."""
    beats, unit = style.time_signature
    length = beats * 4 / unit * 60 / style.tempo
    return np.arange(0, end, length) if end / length <= _MAX_BARS else np.zeros(0)


def _bars(source: Any, style: Style | None, end: float) -> np.ndarray:
    if style is None and isinstance(source, MidiOutput):
        style = source.style
    if style is not None:
        return bar_lines(style, end)
    if isinstance(source, Notes):
        return np.zeros(0)
    score = read_score(source) if isinstance(source, str | os.PathLike) else source
    return _bars_of_score(score, end)


def _bars_of_score(score: Any, end: float) -> np.ndarray:
    """Return the seconds of bar lines by the metres and tempos of a score."""
    ppq = score.ticks_per_quarter
    metres = sorted((m.time, m.numerator, m.denominator) for m in score.time_signatures)
    if not metres or metres[0][0] > 0:
        metres.insert(0, (0, 4, 4))
    tempos = dict(sorted((t.time, t.mspq) for t in score.tempos))
    tempos = {0: 500_000, **tempos}
    at = np.array(sorted(tempos), np.float64)
    pace = np.array([tempos[int(t)] for t in at]) * 1e-6 / ppq
    before = np.concatenate([[0], np.cumsum(np.diff(at) * pace[:-1])])
    last = at[-1] + max(0.0, end - before[-1]) / pace[-1]
    found, count = [], 0
    for i, (start, beats, unit) in enumerate(metres):
        stop = min(metres[i + 1][0] if i + 1 < len(metres) else last, last)
        length = max(1, beats * 4 * ppq // max(1, unit))
        count += max(0, int((stop - start) / length))
        if count > _MAX_BARS:
            return np.zeros(0)
        found.append(np.arange(start, stop, length, dtype=np.float64))
    ticks = np.concatenate(found)
    which = np.searchsorted(at, ticks, "right") - 1
    seconds = before[which] + (ticks - at[which]) * pace[which]
    return seconds[seconds <= end]


def log_mel(
    wav: np.ndarray, rate: int, *, bands: int = 96, size: int = 2048, hop: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loudness of mel bands over time.

    Args:
        wav: `[samples]`.
        rate: Samples a second.
        bands: How many, from 30 Hz to half the rate.
        size: Samples of a frame.
        hop: Samples between frames.

    Returns:
        `[bands, frames]` float32, dB below the loudest, not under -80; and `[bands]` their middles
        in Hz.
    """
    edges = _mel_to_hz(np.linspace(_hz_to_mel(30.0), _hz_to_mel(rate / 2), bands + 2))
    bins = np.fft.rfftfreq(size, 1 / rate)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clip(0)
    nearest = np.abs(bins - middle).argmin(1)  # a band narrower than a bin still hears one
    bank[np.arange(bands), nearest] = np.maximum(bank[np.arange(bands), nearest], 0.5)
    bank /= bank.sum(1, keepdims=True)
    padded = np.pad(np.asarray(wav, np.float32), size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    window = np.hanning(size).astype(np.float32)
    power = np.empty((bands, len(frames)), np.float32)
    for start in range(0, len(frames), 256):  # so that long music needs no long memory
        spectrum = np.abs(np.fft.rfft(frames[start : start + 256] * window)) ** 2
        power[:, start : start + 256] = bank @ spectrum.T
    top = max(float(power.max()), 1e-20)
    # Both limits: of zero there is no logarithm, and that of 1e-8 may be a little under -80.
    decibels = np.maximum(10 * np.log10(np.maximum(power / top, 1e-8)), -80)
    return decibels.astype(np.float32), edges[1:-1]


def spectrogram(
    wav: "np.ndarray | str | os.PathLike[str]",
    rate: int | None = None,
    path: "str | os.PathLike[str] | None" = None,
    *,
    title: str = "",
) -> "Figure":
    """Draw the loudness of mel bands over time.

    Args:
        wav: `[samples]` or `[samples, channels]`, or a WAV file of 16 bits.
        rate: Samples a second; a file knows its own.
        path: Where to save it; the ending names the format. Defaults to nowhere.
        title: Above the picture.

    Raises:
        UserError: the sound is empty, cannot be read, or has no rate.
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _figure(8, 4)
    if isinstance(wav, str | os.PathLike):
        samples, rate = read_wav(wav)
    else:
        samples = np.asarray(wav, np.float32)
    if rate is None or rate < 1000:
        raise UserError(f"rate must be samples a second, at least 1000, not {rate!r}")
    if samples.ndim == 2:
        samples = samples.mean(1)
    if samples.ndim != 1 or not len(samples):
        raise UserError(
            f"wav must be [samples] or [samples, channels], not {list(np.shape(samples))}"
        )
    hop = max(512, len(samples) // 2000)  # no more columns than the picture can show
    loudness, middles = log_mel(samples, rate, hop=hop)
    axes = figure.add_subplot()
    image = axes.imshow(
        loudness, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0,
        extent=(0, len(samples) / rate, -0.5, len(middles) - 0.5), interpolation="nearest",
    )  # fmt: skip
    wanted = np.array([200, 500, 1000, 2000, 5000, 10000, 20000])
    wanted = wanted[(wanted > middles[0]) & (wanted < middles[-1])]
    axes.set_yticks(np.interp(wanted, middles, np.arange(len(middles))), [f"{f:,}" for f in wanted])
    axes.set_xlabel("time, s")
    axes.set_ylabel("frequency, Hz (mel scale)")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="dB below the loudest")
    return _saved(figure, path)


def _hz_to_mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def _figure(width: float, height: float) -> "Figure":
    """Return a figure on the Agg canvas; nothing global is touched."""
    require("matplotlib", extra="plot", package="midi-llm", purpose="pictures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: "Figure", path: "str | os.PathLike[str] | None") -> "Figure":
    if path is None:
        return figure
    target = Path(path)
    if not target.parent.is_dir():
        raise UserError(f"cannot write {str(target)!r}: its folder does not exist; make it first")
    try:
        figure.savefig(target, dpi=150)
    except ValueError as error:
        raise UserError(f"cannot write {str(target)!r}: {error}") from error
    return figure
