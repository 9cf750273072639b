"""The arrival-time vocabulary of the Anticipatory Music Transformer (AMT), on any grid.

A note is three ids: onset, duration, instrument and pitch (Thickstun et al., arXiv 2306.08620).
Ids stand in blocks: TIME, DUR, NOTE, REST, then the same three blocks again for controls (the
"anticipated" notes of infilling), then the specials. REST has no copy among the controls.
"""

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    import numpy as np

DRUMS = 128  # the instrument of channel 10; 0 to 127 are the programs of General MIDI
FAMILIES = (
    "piano", "chromatic percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass",
    "reed", "pipe", "synth lead", "synth pad", "synth effects", "ethnic", "percussive",
    "sound effects",
)  # fmt: skip
# The program that stands for a family on a grid of 17 instruments.
_OF_FAMILY = (0, 11, 19, 24, 33, 40, 48, 56, 65, 73, 80, 89, 96, 104, 114, 122)
PROGRAMS = (
    "acoustic grand piano", "bright acoustic piano", "electric grand piano", "honky-tonk piano",
    "electric piano 1", "electric piano 2", "harpsichord", "clavinet", "celesta", "glockenspiel",
    "music box", "vibraphone", "marimba", "xylophone", "tubular bells", "dulcimer",
    "drawbar organ", "percussive organ", "rock organ", "church organ", "reed organ", "accordion",
    "harmonica", "bandoneon", "nylon guitar", "steel guitar", "jazz guitar", "clean guitar",
    "muted guitar", "overdriven guitar", "distortion guitar", "guitar harmonics", "acoustic bass",
    "fingered bass", "picked bass", "fretless bass", "slap bass 1", "slap bass 2", "synth bass 1",
    "synth bass 2", "violin", "viola", "cello", "contrabass", "tremolo strings",
    "pizzicato strings", "harp", "timpani", "string ensemble 1", "string ensemble 2",
    "synth strings 1", "synth strings 2", "choir aahs", "voice oohs", "synth voice",
    "orchestra hit", "trumpet", "trombone", "tuba", "muted trumpet", "french horn",
    "brass section", "synth brass 1", "synth brass 2", "soprano sax", "alto sax", "tenor sax",
    "baritone sax", "oboe", "english horn", "bassoon", "clarinet", "piccolo", "flute", "recorder",
    "pan flute", "blown bottle", "shakuhachi", "whistle", "ocarina", "square lead",
    "sawtooth lead", "calliope lead", "chiff lead", "charang lead", "voice lead", "fifths lead",
    "bass and lead", "new age pad", "warm pad", "polysynth pad", "choir pad", "bowed pad",
    "metallic pad", "halo pad", "sweep pad", "rain", "soundtrack", "crystal", "atmosphere",
    "brightness", "goblins", "echoes", "sci-fi", "sitar", "banjo", "shamisen", "koto", "kalimba",
    "bagpipe", "fiddle", "shanai", "tinkle bell", "agogo", "steel drums", "woodblock",
    "taiko drum", "melodic tom", "synth drum", "reverse cymbal", "guitar fret noise",
    "breath noise", "seashore", "bird tweet", "telephone ring", "helicopter", "applause",
    "gunshot",
)  # fmt: skip


def instrument_name(instrument: int) -> str:
    """Return the name of an instrument: of a General MIDI program 0 to 127, or "drums" for 128.

    Raises:
        UserError: it is no such number.
    """
    if not 0 <= instrument <= DRUMS:
        raise UserError(f"instrument {instrument} is none: programs are 0 to 127, drums 128")
    return "drums" if instrument == DRUMS else PROGRAMS[instrument]


def instrument_number(name: "str | int") -> int:
    """Return the number 0 to 128 of an instrument.

    Args:
        name: A number; or a name as in `PROGRAMS`, that of a family (one of its programs), or
            "drums"; capitals, hyphens and underscores do not matter.

    Raises:
        UserError: there is no such instrument; the message suggests the nearest.
    """
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(f"an instrument is a number 0 to 128 or a name, not {name!r}")
    if isinstance(name, int) or name.strip().isdecimal():
        number = int(name)
        if not 0 <= number <= DRUMS:
            raise UserError(f"instrument {number} is none: programs are 0 to 127, drums 128")
        return number
    key = " ".join(name.lower().replace("-", " ").replace("_", " ").split())
    known = {n.replace("-", " "): i for i, n in enumerate(PROGRAMS)}
    known |= {n: _OF_FAMILY[i] for i, n in enumerate(FAMILIES) if n not in known}
    known |= {"drums": DRUMS, "drum": DRUMS, "percussion": DRUMS, "drum kit": DRUMS}
    if key not in known:
        raise UserError(
            f"{name!r} is no instrument of General MIDI.{suggest(key, known)} "
            "`midi-llm inspect --instruments` lists them"
        )
    return known[key]


@dataclass(frozen=True)
class AMTConfig:
    """A grid, from which every id follows. The default is that of AMT and of MIDI-LLM.

    Attributes:
        resolution: Ticks a second.
        max_time: Seconds of a sequence.
        max_duration: Seconds of a note; longer ones are cut to one tick less.
        instruments: 129 (the programs and drums) or 17 (their 16 families and drums).
        pitches: 128.
        anticipation: Whether there are controls.
    """

    resolution: int = 100
    max_time: int = 100
    max_duration: int = 10
    instruments: int = 129
    pitches: int = 128
    anticipation: bool = True

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "anticipation":
                if not isinstance(value, bool):
                    raise UserError(f"anticipation must be true or false, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{field.name} must be a whole number of at least 1, not {value!r}")
        if self.instruments not in (17, 129):
            raise UserError(f"instruments must be 129 or 17, not {self.instruments}")
        if self.pitches != 128:
            raise UserError(f"pitches must be 128, not {self.pitches}")
        if self.max_duration > self.max_time:
            raise UserError(
                f"max_duration {self.max_duration} is longer than max_time {self.max_time}"
            )
        if self.durations < 2:
            raise UserError(
                f"resolution {self.resolution} and max_duration {self.max_duration} leave only "
                "notes of no length; one of them must be at least 2"
            )

    @classmethod
    def small(cls) -> "AMTConfig":
        """Return the grid for tiny models: 20 ticks a second, 20 s, 17 instruments, no controls."""
        return cls(20, 20, 4, 17, 128, False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AMTConfig":
        """Rebuild a grid from its fields.

        Raises:
            UserError: a field is unknown or wrong.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"a grid has no field {name!r}.{suggest(name, known)}")
        return cls(**values)

    # Blocks of ids

    @cached_property
    def times(self) -> int:
        """How many onsets there are; they are the ids from 0."""
        return self.resolution * self.max_time

    @cached_property
    def durations(self) -> int:
        """How many durations there are."""
        return self.resolution * self.max_duration

    @cached_property
    def notes(self) -> int:
        """How many pairs of instrument and pitch there are."""
        return self.instruments * self.pitches

    @cached_property
    def duration_offset(self) -> int:
        """First id of the durations."""
        return self.times

    @cached_property
    def note_offset(self) -> int:
        """First id of the notes."""
        return self.times + self.durations

    @cached_property
    def rest(self) -> int:
        """The id that stands in place of a note in a rest."""
        return self.note_offset + self.notes

    @cached_property
    def control_offset(self) -> int:
        """What is added to the ids of an event to make a control of it; the first such id."""
        return self.rest + 1

    @cached_property
    def separator(self) -> int:
        """The id that stands three times between pieces; the first of the specials."""
        copies = self.times + self.durations + self.notes if self.anticipation else 0
        return self.control_offset + copies

    @cached_property
    def autoregress(self) -> int:
        """First id of a sequence without controls."""
        return self.separator + 1

    @cached_property
    def anticipate(self) -> int:
        """First id of a sequence with controls.

        Raises:
            UserError: the grid has none.
        """
        if not self.anticipation:
            raise UserError(
                "this grid has no controls (anticipation is false), which infilling needs; AMT's "
                "own grid has them, that of --small has not"
            )
        return self.separator + 2

    @cached_property
    def size(self) -> int:
        """How many ids there are."""
        return self.autoregress + (2 if self.anticipation else 1)

    # Times that the method fixes in seconds

    @cached_property
    def second(self) -> int:
        """Ticks after which a silence is filled with rests."""
        return self.resolution

    @cached_property
    def delta(self) -> int:
        """Ticks by which controls come before the events around them: 5 s."""
        return 5 * self.resolution

    # Instruments

    def of_instrument(self, instrument: "np.ndarray | int") -> Any:
        """Return the index on this grid of an instrument 0 to 128; arrays are possible."""
        if self.instruments == 129:
            return instrument
        return instrument // 8  # drums, 128, become 16

    def to_instrument(self, index: "np.ndarray | int") -> Any:
        """Return the instrument 0 to 128 that an index on this grid stands for."""
        if self.instruments == 129:
            return index
        import numpy as np

        found = np.array([*_OF_FAMILY, DRUMS])[index]
        return found if isinstance(index, np.ndarray) else int(found)

    def block(self, id: int) -> str:
        """Return what an id is: time, duration, note, rest, one of those as a control, special."""
        if not 0 <= id < self.size:
            return "outside"
        if id >= self.separator:
            return ("separator", "autoregress", "anticipate")[id - self.separator]
        control = id >= self.control_offset
        id -= self.control_offset if control else 0
        kind = (
            "time" if id < self.duration_offset
            else "duration" if id < self.note_offset
            else "note" if id < self.rest
            else "rest"
        )  # fmt: skip
        return f"control {kind}" if control else kind
