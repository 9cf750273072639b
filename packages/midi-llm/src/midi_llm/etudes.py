"""Little pieces made on the spot, whose key, tempo, metre and instruments are known.

Melody, chords, bass and drums over a chord progression: unlimited pairs of music and description
without anybody's licence. They teach a model what words mean; they are no music to listen to.
"""

from dataclasses import dataclass

import numpy as np

from midi_llm.notes import Notes
from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError

TONICS = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
MINOR_TONICS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B")
TEMPOS = (54, 66, 80, 100, 125, 150, 185)  # one in each of MidiCaps' bins from Largo to Presto
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = {
    "major": ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 3, 0, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 4), (0, 3, 0, 4)),
}
# Of different families, so that they stay apart on a grid of 17 instruments.
LEADS = (73, 65, 56, 40, 11, 80)  # flute, alto sax, trumpet, violin, vibraphone, square lead
CHORDS = (0, 24, 19, 48, 89)  # piano, nylon guitar, church organ, strings, warm pad
BASS = 33
KICK, SNARE, HAT = 36, 38, 42


@dataclass(frozen=True)
class Plan:
    """What an etude is made of.

    Attributes:
        key: Such as "C minor".
        tempo: Quarter notes a minute.
        beats: Quarter notes of a bar: 3 or 4.
        lead: Program of the melody.
        chords: Program of the chords, or None.
        bass: Whether there is one.
        drums: Whether there are any.
        busy: Notes of the melody in a quarter: 1 or 2.
        seconds: How long.
    """

    key: str
    tempo: int
    beats: int
    lead: int
    chords: int | None
    bass: bool
    drums: bool
    busy: int
    seconds: float

    @property
    def instruments(self) -> tuple[int, ...]:
        """Numbers of all that sound."""
        found = [self.lead, *([] if self.chords is None else [self.chords])]
        return (*found, *([BASS] if self.bass else []), *([DRUMS] if self.drums else []))


def plan_etude(rng: np.random.Generator, *, seconds: float = 18.0) -> Plan:
    """Draw what an etude is made of; everything is drawn by itself."""
    mode = str(rng.choice(["major", "minor"]))
    tonic = int(rng.integers(12))
    name = (TONICS if mode == "major" else MINOR_TONICS)[tonic]
    return Plan(
        key=f"{name} {mode}",
        tempo=int(rng.choice(TEMPOS)),
        beats=int(rng.choice([3, 4, 4])),
        lead=int(rng.choice(LEADS)),
        chords=int(rng.choice(CHORDS)) if rng.random() < 0.8 else None,
        bass=bool(rng.random() < 0.5),
        drums=bool(rng.random() < 0.5),
        busy=int(rng.choice([1, 2])),
        seconds=seconds,
    )


def play(plan: Plan, rng: np.random.Generator) -> Notes:
    """Write the notes of an etude.

    Args:
        plan: What it is made of.
        rng: Chooses the progression and the melody.

    Raises:
        UserError: it is shorter than a bar.
    """
    beat = 60.0 / plan.tempo
    bars = int(plan.seconds / (beat * plan.beats))
    if bars < 1:
        raise UserError(f"{plan.seconds:g} s are shorter than a bar at {plan.tempo}")
    tonic, mode = plan.key.split()
    root = (TONICS if mode == "major" else MINOR_TONICS).index(tonic)
    scale = SCALES[mode]
    progression = PROGRESSIONS[mode][rng.integers(len(PROGRESSIONS[mode]))]
    rows: list[tuple[float, float, int, int]] = []  # onset, duration, instrument, pitch

    def pitch(degree: int, octave: int) -> int:
        return 12 * (octave + 1) + root + scale[degree % 7] + 12 * (degree // 7)

    step = int(rng.integers(7))
    for bar in range(bars):
        start = bar * plan.beats * beat
        chord = progression[bar % 4]
        last = bar == bars - 1
        degrees = [chord, chord + 2, chord + 4]
        if plan.chords is not None:
            length = plan.beats * beat * 0.95
            rows += [(start, length, plan.chords, pitch(d, 3)) for d in degrees]
        if plan.bass:
            for at in range(0, plan.beats, 2):
                rows.append((start + at * beat, beat * 0.9, BASS, pitch(chord, 1)))
        for at in range(plan.beats):
            if plan.drums:
                rows.append((start + at * beat, 0.1, DRUMS, KICK if at % 2 == 0 else SNARE))
                rows.append((start + (at + 0.5) * beat, 0.1, DRUMS, HAT))
            for part in range(plan.busy):
                onset = start + (at + part / plan.busy) * beat
                if last and at == plan.beats - 1:  # it ends on the tonic
                    rows.append((onset, beat * 0.9, plan.lead, pitch(0, 4)))
                    break
                strong = part == 0 and at % 2 == 0
                if strong:  # a tone of the chord on strong beats, steps between them
                    step = min(degrees, key=lambda d: abs(d % 7 - step % 7))
                else:
                    step += int(rng.integers(-2, 3))
                step = int(np.clip(step, -3, 9))
                rows.append((onset, beat / plan.busy * 0.9, plan.lead, pitch(step, 4)))
    rows.sort(key=lambda row: (row[0], row[2], row[3]))
    onset, duration, instrument, pitches = zip(*rows, strict=True)
    return Notes.of(onset, duration, instrument, pitches)
