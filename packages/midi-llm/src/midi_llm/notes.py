"""`Notes`: a piece as arrays, in seconds, exactly as arrival-time tokens want it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from midi_llm.vocab import DRUMS
from tenfold_common.errors import UserError

MAX_SECONDS = 4 * 3600


class Note(NamedTuple):
    """One note.

    Attributes:
        onset: Seconds.
        duration: Seconds.
        instrument: 0 to 127 the program, 128 drums.
        pitch: 0 to 127.
    """

    onset: float
    duration: float
    instrument: int
    pitch: int


@dataclass(frozen=True, eq=False)
class Notes:
    """Notes in the order of their onsets, ties in the order of the file; arrays of one length.

    Attributes:
        onset: Seconds, float64.
        duration: Seconds, float64, >= 0.
        instrument: 0 to 127 the program, 128 drums; int64.
        pitch: 0 to 127, int64.
        velocity: 1 to 127, int64.
    """

    onset: np.ndarray
    duration: np.ndarray
    instrument: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    def __len__(self) -> int:
        """How many notes there are."""
        return len(self.onset)

    def __getitem__(self, which: "np.ndarray | slice") -> "Notes":
        """Return some of the notes, by a mask, indices or a slice."""
        return Notes(*(values[which] for values in self.columns))

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """The five arrays."""
        return self.onset, self.duration, self.instrument, self.pitch, self.velocity

    @property
    def end(self) -> float:
        """When the last note ends, in seconds; 0 if there is none."""
        return float((self.onset + self.duration).max()) if len(self) else 0.0

    @classmethod
    def of(
        cls, onset: Any, duration: Any, instrument: Any, pitch: Any, velocity: Any = 72
    ) -> "Notes":
        """Make notes of anything that becomes arrays, as many as there are onsets.

        Of the other columns a single number stands for all notes.

        Args:
            onset: `[n]` seconds, rising.
            duration: Seconds, `[n]` or one for all.
            instrument: 0 to 127 the program, 128 drums; `[n]` or one for all.
            pitch: 0 to 127, 60 middle C; `[n]` or one for all.
            velocity: 1 to 127, `[n]` or one for all.

        Raises:
            UserError: a value is out of range or, but for seconds, no whole number, or the onsets
                do not rise.
        """
        try:
            onset = np.atleast_1d(np.asarray(onset, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise UserError(f"onsets must be seconds: {error}") from error
        rest = {
            "duration": duration, "instrument": instrument, "pitch": pitch, "velocity": velocity,
        }  # fmt: skip
        made = [onset]
        for name, values in rest.items():
            dtype = np.float64 if name == "duration" else np.int64
            try:
                found = np.asarray(values, dtype=dtype)
                if dtype is np.int64 and (found != np.asarray(values)).any():
                    raise UserError(f"{name} must be whole numbers")
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{name} must be numbers: {error}") from error
            if found.ndim and found.shape != onset.shape:
                raise UserError(f"{name} has shape {found.shape}, onset {onset.shape}")
            made.append(np.broadcast_to(found, onset.shape).copy())
        limits = {"onset": (0, MAX_SECONDS), "duration": (0, MAX_SECONDS), "instrument": (0, DRUMS),
                  "pitch": (0, 127), "velocity": (1, 127)}  # fmt: skip
        for (name, (low, high)), values in zip(limits.items(), made, strict=True):
            bad = ~((values >= low) & (values <= high))
            if bad.any():
                raise UserError(f"{name} must be {low} to {high}, not {values[bad][0]}")
        if (np.diff(onset) < 0).any():
            raise UserError("onsets must not fall; sort the notes by onset")
        return cls(*made)


def empty_notes() -> Notes:
    """Return no notes."""
    return Notes.of([], 0.0, 0, 0)
