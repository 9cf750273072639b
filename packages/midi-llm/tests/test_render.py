import os
import shutil
import stat
import subprocess
import wave
from pathlib import Path

import numpy as np
import pytest
from midi_files import midi, off, on, tempo

from midi_llm import render
from midi_llm.decode import MidiOutput
from midi_llm.midi_read import read_score
from midi_llm.midi_write import Style, to_score, write_midi
from midi_llm.notes import Notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import MissingDependencyError, UserError

FONT = next((f for f in render.SOUNDFONTS if Path(f).is_file()), None)
needs_fluidsynth = pytest.mark.skipif(
    shutil.which("fluidsynth") is None or FONT is None,
    reason="needs the Debian packages fluidsynth and timgm6mb-soundfont",
)
ENGINES = [pytest.param("fluidsynth", marks=needs_fluidsynth), "preview"]
# A piano note, the same again, a silence, a trumpet note.
PIECE = Notes.of([0.5, 1.0, 5.0], [0.45, 0.45, 0.5], [0, 0, 56], [69, 69, 60], 100)


def loudness(wav: np.ndarray, rate: int, start: float, end: float) -> float:
    return float(
        np.sqrt((wav[int(start * rate) : int(end * rate)] ** 2).sum() / rate / (end - start))
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_sound_is_where_the_notes_are(tmp_path: Path, engine: str) -> None:
    sound = render.to_wav(PIECE, tmp_path / "a.wav", engine=engine)
    assert sound.engine == engine
    wav, rate = render.read_wav(sound.path)
    assert rate == 44100
    assert len(wav) / rate == pytest.approx(sound.seconds)
    assert PIECE.end <= sound.seconds <= PIECE.end + 3
    assert loudness(wav, rate, 0, 0.49) < 1e-4
    assert loudness(wav, rate, 0.5, 0.9) > 1e-3
    assert loudness(wav, rate, 3.5, 4.9) < 1e-4
    assert loudness(wav, rate, 5.05, 5.4) > 1e-3
    assert abs(wav).max() == pytest.approx(sound.peak, rel=0.3)  # the mean of two channels


@pytest.mark.parametrize("engine", ENGINES)
def test_a_repeated_note_is_two_attacks(tmp_path: Path, engine: str) -> None:
    """The second begins at the tick where the first ends, which the reference's writer silences."""
    twice = Notes.of([0, 0.5], 0.5, 0, 69, 100)
    once = Notes.of([0], 0.5, 0, 69, 100)
    both, rate = render.read_wav(render.to_wav(twice, tmp_path / "a.wav", engine=engine).path)
    one, _ = render.read_wav(render.to_wav(once, tmp_path / "b.wav", engine=engine).path)
    first = loudness(both, rate, 0.02, 0.2)
    assert loudness(both, rate, 0.52, 0.7) > 0.6 * first
    assert loudness(one, rate, 0.55, 0.7) < 0.3 * first
    # Between the two it had died down a little: the second was struck anew.
    assert loudness(both, rate, 0.44, 0.49) < loudness(both, rate, 0.52, 0.57)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_source_sounds_alike(tmp_path: Path, engine: str) -> None:
    file = tmp_path / "in.mid"
    write_midi(PIECE, file)
    sources = [PIECE, to_score(PIECE), MidiOutput("", PIECE, (), "stop"), file, str(file)]
    found = []
    for source in sources:
        render.to_wav(source, tmp_path / "a.wav", engine=engine)
        found.append((tmp_path / "a.wav").read_bytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_loud_music_is_turned_down_and_never_clipped(tmp_path: Path, engine: str) -> None:
    chord = Notes.of(np.zeros(40), 1.0, 16, np.arange(40, 80), 127)
    sound = render.to_wav(chord, tmp_path / "a.wav", engine=engine, gain=10)
    assert sound.peak == pytest.approx(render.PEAK)
    with wave.open(str(sound.path)) as file:
        samples = np.frombuffer(file.readframes(10**9), "<i2")
    assert abs(samples.astype(int)).max() == round(render.PEAK * 32767)
    assert (abs(samples.astype(int)) > 32000).mean() < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_normalize_brings_the_peak_to_a_level(tmp_path: Path, engine: str) -> None:
    for level in (-1.0, -20.0):
        sound = render.to_wav(PIECE, tmp_path / "a.wav", engine=engine, normalize=level)
        assert sound.peak == pytest.approx(10 ** (level / 20))


def test_the_preview_plays_the_pitch(tmp_path: Path) -> None:
    for pitch, instrument in ((69, 0), (69, 73), (33, 19), (100, 40), (60, 33)):
        wav, rate = render.read_wav(
            render.to_wav(
                Notes.of([0], 2.0, instrument, pitch), tmp_path / "a.wav", engine="preview"
            ).path
        )
        spectrum = abs(np.fft.rfft(wav * np.hanning(len(wav)), 2**20))
        peak = spectrum.argmax() * rate / 2**20
        assert peak == pytest.approx(440 * 2 ** ((pitch - 69) / 12), abs=0.3)


def test_the_preview_has_no_sound_above_half_the_rate(tmp_path: Path) -> None:
    """A harmonic above it would come back as a wrong, low one."""
    notes = Notes.of([0], 1.0, 0, 108)  # 4186 Hz; the second harmonic is above 4000 Hz
    sound = render.to_wav(notes, tmp_path / "a.wav", engine="preview", rate=10000)
    wav, rate = render.read_wav(sound.path)
    spectrum = abs(np.fft.rfft(wav * np.hanning(len(wav))))
    far = abs(np.fft.rfftfreq(len(wav), 1 / rate) - 4186) > 100
    assert spectrum[far].max() < 0.01 * spectrum.max()


def test_the_preview_is_the_sum_of_its_notes() -> None:
    rate = 8000
    whole = render._preview(PIECE, rate)
    total = np.zeros_like(whole)
    for i in range(len(PIECE)):
        one = render._preview(PIECE[i : i + 1], rate)
        total[: len(one)] += one
    np.testing.assert_allclose(whole, total, atol=1e-6)


def test_the_preview_has_drums(tmp_path: Path) -> None:
    for pitch in (36, 38, 42, 49, 60):
        notes = Notes.of([0.1], 0.01, DRUMS, pitch, 100)
        wav, rate = render.read_wav(render.to_wav(notes, tmp_path / "a.wav", engine="preview").path)
        assert loudness(wav, rate, 0, 0.09) == 0
        assert loudness(wav, rate, 0.1, 0.15) > 1e-3


def test_the_preview_is_fast_enough() -> None:
    from time import perf_counter

    count = 2000
    rng = np.random.default_rng(0)
    notes = Notes.of(
        np.sort(rng.uniform(0, 100, count)), rng.uniform(0.1, 1, count),
        rng.integers(0, 129, count), rng.integers(30, 100, count),
    )  # fmt: skip
    start = perf_counter()
    render._preview(notes, 44100)
    assert perf_counter() - start < 30  # about a second; a loop over samples would take minutes


def test_auto_falls_back_to_the_preview_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(render.PreviewWarning, match="fluidsynth|soundfont") as seen:
        sound = render.to_wav(PIECE, tmp_path / "a.wav")
    assert len(seen) == 1
    assert sound.engine == "preview"
    with pytest.raises(MissingDependencyError, match="apt-get install"):
        render.to_wav(PIECE, tmp_path / "a.wav", engine="fluidsynth")


def test_the_soundfont_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "1.sf2", tmp_path / "2.sf2"
    for file in (first, second):
        file.write_bytes(b"RIFF\0\0\0\0sfbk")
    monkeypatch.setattr(render, "SOUNDFONTS", (str(tmp_path / "none"), str(second)))
    monkeypatch.delenv(render.SOUNDFONT_VARIABLE, raising=False)
    assert render.find_soundfont() == second
    monkeypatch.setenv(render.SOUNDFONT_VARIABLE, str(first))
    assert render.find_soundfont() == first
    assert render.find_soundfont(second) == second
    monkeypatch.setenv(render.SOUNDFONT_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"MIDI_LLM_SOUNDFONT .*gone.* is not there"):
        render.find_soundfont()
    monkeypatch.delenv(render.SOUNDFONT_VARIABLE)
    monkeypatch.setattr(render, "SOUNDFONTS", ())
    with pytest.raises(MissingDependencyError, match="timgm6mb-soundfont"):
        render.find_soundfont()


def test_a_wrong_soundfont_is_refused_even_by_auto(tmp_path: Path) -> None:
    file = tmp_path / "a.sf2"
    file.write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(UserError, match="is no soundfont"):
        render.to_wav(PIECE, tmp_path / "a.wav", soundfont=file)
    assert not (tmp_path / "a.wav").exists()


@needs_fluidsynth
def test_a_broken_soundfont_is_an_error_and_not_silence(tmp_path: Path) -> None:
    """FluidSynth itself plays silence without a font and says that all went well."""
    file = tmp_path / "a.sf2"
    whole = Path(FONT or "").read_bytes()
    for data in (b"RIFF\0\0\0\0sfbk", whole[: len(whole) // 2]):
        file.write_bytes(data)
        with pytest.raises(UserError, match="FluidSynth failed"):
            render.to_wav(PIECE, tmp_path / "a.wav", soundfont=file)
    assert not (tmp_path / "a.wav").exists()


@needs_fluidsynth
def test_an_empty_hour_behind_the_music_is_not_rendered(tmp_path: Path) -> None:
    file = tmp_path / "a.mid"
    late = [on(0), off(480), tempo(960 * 3600, 500_000)]
    file.write_bytes(midi(late))
    sound = render.to_wav(file, tmp_path / "a.wav", engine="fluidsynth", rate=8000)
    assert sound.seconds <= 0.5 + render._TAIL


@needs_fluidsynth
def test_names_with_anything_in_them_are_only_names(tmp_path: Path) -> None:
    file = tmp_path / "-o $(touch x); 'a\" b.mid"
    write_midi(PIECE, file)
    target = tmp_path / "-q `b`.wav"
    assert render.to_wav(file, target, engine="fluidsynth").seconds > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([file.name, target.name])


@needs_fluidsynth
def test_a_renderer_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "fluidsynth", "exec sleep 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    now = iter(range(0, 10**6, 50))
    monkeypatch.setattr(render.time, "monotonic", lambda: next(now))
    with pytest.raises(UserError, match="did not finish"):
        render.to_wav(PIECE, tmp_path / "a.wav", engine="fluidsynth")


def fake(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"rate": 1}, "rate must be 8000"),
        ({"rate": 44100.0}, "whole number"),
        ({"gain": 0}, "gain must be"),
        ({"gain": float("nan")}, "gain must be"),
        ({"engine": "previews"}, "Did you mean 'preview'"),
        ({"normalize": 3}, "normalize must be"),
    ],
)
def test_wrong_arguments(tmp_path: Path, named: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render.to_wav(PIECE, tmp_path / "a.wav", **named)


def test_wrong_music(tmp_path: Path) -> None:
    target = tmp_path / "a.wav"
    broken = tmp_path / "a.mid"
    broken.write_bytes(b"no midi")
    for source, message in (
        (Notes.of([], 0.0, 0, 0), "has no notes"),
        (Notes.of([1000.0], 1.0, 0, 60), "at most 900 s"),
        (broken, "not a MIDI file"),
        (tmp_path / "gone.mid", "is not there"),
        (7, "not int"),
        (to_score(PIECE).to("second"), "must be in ticks"),
    ):
        with pytest.raises(UserError, match=message):
            render.to_wav(source, target, engine="preview")
    assert not target.exists()


def test_a_target_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        render.to_wav(PIECE, tmp_path / "no" / "a.wav", engine="preview")


def test_read_wav_refuses_what_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    with pytest.raises(UserError, match="is not there"):
        render.read_wav(file)
    file.write_bytes(b"RIFF")
    with pytest.raises(UserError, match="no WAV file"):
        render.read_wav(file)
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 1, 8000, 0, "NONE", ""))
        out.writeframes(b"\0" * 8)
    with pytest.raises(UserError, match="8 bits"):
        render.read_wav(file)


def test_mp3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wav = render.to_wav(PIECE, tmp_path / "a.wav", engine="preview").path
    with pytest.raises(UserError, match="bitrate"):
        render.to_mp3(wav, tmp_path / "a.mp3", bitrate=1)
    with pytest.raises(UserError, match="is not there"):
        render.to_mp3(tmp_path / "gone.wav", tmp_path / "a.mp3")
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="apt-get install ffmpeg"):
        render.to_mp3(wav, tmp_path / "a.mp3")
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    fake(tmp_path, "ffmpeg", 'for last; do :; done; echo "$@" > "${last#file:}"')
    made = render.to_mp3(wav, tmp_path / "a.mp3", bitrate=128).read_text()
    assert f"-i file:{wav.resolve()} " in made
    assert "-b:a 128k" in made
    fake(tmp_path, "ffmpeg", "echo no codec >&2; exit 1")
    with pytest.raises(UserError, match="ffmpeg failed: no codec"):
        render.to_mp3(wav, tmp_path / "a.mp3")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the Debian package ffmpeg")
def test_mp3_by_ffmpeg(tmp_path: Path) -> None:
    wav = render.to_wav(PIECE, tmp_path / "a.wav", engine="preview").path
    made = render.to_mp3(wav, tmp_path / "a.mp3").read_bytes()
    assert made[:3] == b"ID3" or made[0] == 0xFF
    probe = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.mp3"), "-f", "null", "-"]
    assert subprocess.run(probe, check=False).returncode == 0


# Pictures


def test_a_piano_roll_shows_every_note(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs midi-llm[plot]")
    notes = Notes.of([0, 1, 2, 2], 0.5, [0, 40, DRUMS, 0], [60, 64, 36, 67])
    figure = render.piano_roll(notes, tmp_path / "a.png", title="four notes")
    axes = figure.axes[0]
    assert sum(len(c.get_paths()) for c in axes.collections) == 4
    colours = [tuple(c.get_facecolor()[0]) for c in axes.collections if len(c.get_facecolor())]
    assert len(set(colours)) == 3
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["acoustic grand piano", "violin", "drums"]
    assert axes.get_xlim() == (0, 2.5)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_bar_lines_come_from_where_the_metre_is(tmp_path: Path) -> None:
    notes = Notes.of([0, 3.5], 0.5, 0, 60)
    slow = Style(tempo=60, time_signature=(3, 4))  # a bar lasts three seconds
    output = MidiOutput("", notes, (), "stop", slow)
    score = to_score(notes, slow)
    file = tmp_path / "a.mid"
    write_midi(notes, file, slow)
    for source in (output, score, file):
        assert render._bars(source, None, 4.0) == pytest.approx([0, 3])
    assert len(render._bars(notes, None, 4.0)) == 0
    assert render._bars(notes, Style(), 4.0) == pytest.approx([0, 2])
    assert len(render.bar_lines(Style(tempo=1000, time_signature=(1, 32)), 900)) == 0


def test_bar_lines_follow_changes_of_tempo_and_metre(tmp_path: Path) -> None:
    from symusic import TimeSignature

    file = tmp_path / "a.mid"
    # Two bars of 4/4: the first at 120, the second at 60; then 2/4.
    file.write_bytes(midi([on(0), tempo(1920, 1_000_000), off(1920 + 3840)]))
    score = read_score(file)
    score.time_signatures.append(TimeSignature(3840, 2, 4))
    assert render._bars(score, None, 9.0) == pytest.approx([0, 2, 6, 8])


def test_many_instruments_and_none_have_a_picture() -> None:
    pytest.importorskip("matplotlib", reason="needs midi-llm[plot]")
    notes = Notes.of(np.arange(20) / 4, 0.2, np.arange(20) * 6, np.arange(50, 70))
    assert len(render.piano_roll(notes).legends[0].get_texts()) == 20
    assert not render.piano_roll(Notes.of([], 0.0, 0, 0)).legends


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs midi-llm[plot]")
    with pytest.raises(UserError, match="does not exist"):
        render.piano_roll(PIECE, tmp_path / "no" / "a.png")
    with pytest.raises(UserError, match="cannot write"):
        render.piano_roll(PIECE, tmp_path / "a.xyz")


def test_log_mel_finds_a_sine() -> None:
    rate = 22050
    wav = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    loudness_, middles = render.log_mel(wav, rate)
    assert loudness_.shape == (96, 1 + rate // 512)
    loudest = middles[loudness_[:, 20].argmax()]
    assert loudest == pytest.approx(1000, rel=0.05)
    assert loudness_.max() == 0
    assert loudness_.min() >= -80
    assert render.log_mel(np.zeros(100), rate)[0].max() == -80


def test_a_spectrogram_of_samples_or_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs midi-llm[plot]")
    wav = render.to_wav(PIECE, tmp_path / "a.wav", engine="preview").path
    figure = render.spectrogram(wav, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    samples, rate = render.read_wav(wav)
    again = render.spectrogram(np.stack([samples, samples], 1), rate)
    for one in (figure, again):
        axes, scale = one.axes
        assert axes.get_xlim()[1] == pytest.approx(len(samples) / rate)
        assert axes.get_xlabel() == "time, s"
        assert axes.get_ylabel() == "frequency, Hz (mel scale)"
        assert scale.get_ylabel() == "dB below the loudest"
    for wrong, rate_ in ((samples, None), (np.zeros(0), 8000), (np.zeros((2, 2, 2)), 8000)):
        with pytest.raises(UserError):
            render.spectrogram(wrong, rate_)
