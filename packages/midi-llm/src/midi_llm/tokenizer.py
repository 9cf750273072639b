"""`AMTTokenizer`: arrival-time tokens behind miditok's interface, with the ids of AMT."""

import json
import warnings
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from miditok import MusicTokenizer, TokenizerConfig, TokSequence

from midi_llm.anticipate import REST, events_of, ids_of, notes_of_events, pad_rests
from midi_llm.midi_read import notes_of_score, read_notes
from midi_llm.midi_write import Style, to_score
from midi_llm.notes import Notes
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from symusic.core import ScoreTick

PAD = "PAD_None"
SLOTS = ("time", "duration", "note or rest")


class AMTTokenizer(MusicTokenizer):
    """Speaks the ids of the Anticipatory Music Transformer, or those of another grid.

    Special tokens of miditok come first in a vocabulary and would shift every id by one; here the
    only one, for padding, comes last.

    Args:
        amt: The grid. Defaults to that of AMT: 100 ticks a second, 100 s, 129 instruments.
        params: A file of `save`, in place of the grid.
    """

    def __init__(self, amt: AMTConfig | None = None, params: "str | Path | None" = None) -> None:
        if amt is not None and not isinstance(amt, AMTConfig):
            raise UserError(f"the grid must be an AMTConfig, not {type(amt).__name__}")
        self.amt = amt or AMTConfig()
        super().__init__(_settings(), params)

    @property
    def special_tokens(self) -> list[str]:
        """Only padding; none while the vocabulary is made, so that it does not come first."""
        return [PAD] if self._vocab_base else []

    @property
    def pad_token_id(self) -> int:
        """The id behind the last of AMT; MIDI-LLM has two unused rows there."""
        return self.amt.size

    # What miditok asks of a tokenizer

    def _tweak_config_before_creating_voc(self) -> None:
        self.config.use_programs = self.config.one_token_stream_for_programs = True

    def _create_base_vocabulary(self) -> list[str | list[str]]:
        amt = self.amt
        notes = [f"{i}.{p}" for i in range(amt.instruments) for p in range(amt.pitches)]
        vocabulary: list[str | list[str]] = []
        for prefix in ("", "Anticipated")[: 1 + amt.anticipation]:
            vocabulary += [f"{prefix}Time_{t}" for t in range(amt.times)]
            vocabulary += [f"{prefix}Duration_{t}" for t in range(amt.durations)]
            vocabulary += [f"{prefix}Note_{n}" for n in notes]
            vocabulary += [] if prefix else ["Rest_None"]
        vocabulary += ["Separator_None", "Autoregress_None"]
        vocabulary += ["Anticipate_None"] if amt.anticipation else []
        return [*vocabulary, PAD]

    def _create_token_types_graph(self) -> dict[str, set[str]]:
        begins = {"Time", "Separator"} | ({"AnticipatedTime"} if self.amt.anticipation else set())
        graph = {
            "Time": {"Duration"},
            "Duration": {"Note", "Rest"},
            "Note": begins,
            "Rest": begins,
            "Separator": {*begins, "Autoregress"},
            "Autoregress": begins,
        }
        if self.amt.anticipation:
            graph["AnticipatedTime"] = {"AnticipatedDuration"}
            graph["AnticipatedDuration"] = {"AnticipatedNote"}
            graph["AnticipatedNote"] = begins
            graph["Anticipate"] = begins
            graph["Separator"] |= {"Anticipate"}
        return graph

    def _tokens_errors(self, tokens: list[Any]) -> int:
        """Count the tokens that may not follow the one before, and times that fall."""
        errors, previous, latest, lasts = 0, None, -1, False
        for token in tokens:
            kind, _, value = token.partition("_")
            if previous is not None and kind not in self.tokens_types_graph.get(previous, ()):
                errors += 1
            elif kind == "Time":
                errors += int(value) < latest
                latest = int(value)
            elif kind == "Duration":
                lasts = value != "0"
            elif kind == "Rest":
                errors += lasts
            elif kind in ("Separator", "Autoregress", "Anticipate"):
                latest = -1
            previous = kind
        return errors

    def _add_time_events(self, events: list[Any], time_division: int) -> list[Any]:
        raise UserError("arrival-time tokens are made of whole scores; call encode")

    def preprocess_score(self, score: Any) -> Any:
        """Return the score as it is: nothing is moved to a grid of beats, times are in seconds."""
        return score

    # Encoding

    def notes(self, source: "ScoreTick | Notes | str | PathLike[str] | bytes") -> Notes:
        """Return the notes of a file (exactly as AMT reads it), its bytes, a Score, or notes.

        Raises:
            UserError: see `read_notes` and `notes_of_score`.
        """
        if isinstance(source, Notes):
            return source
        if isinstance(source, str | bytes | PathLike):
            return read_notes(source)
        return notes_of_score(source)

    def events(self, source: "ScoreTick | Notes | str | PathLike[str] | bytes") -> np.ndarray:
        """Return `[n, 3]` int64: onset, duration, note, on the grid; see `anticipate`."""
        return events_of(self.notes(source), self.amt)

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        score: "ScoreTick | Notes | str | PathLike[str] | bytes",
        encode_ids: bool = True,
        no_preprocess_score: bool = False,
        attribute_controls_indexes: Any = None,
        *,
        too_long: str = "truncate",
    ) -> TokSequence:
        """Return the ids of a piece: three an event, with rests in long silences.

        Args:
            score: A `symusic.Score` in ticks, a MIDI file or its bytes, or notes. A file is read as
                AMT reads it; a Score has lost the order of messages, which matters for ties.
            encode_ids: Of miditok; nothing to do here.
            no_preprocess_score: Of miditok; nothing to do here.
            attribute_controls_indexes: Of miditok; must be None.
            too_long: "truncate" leaves out, with a warning, notes that begin behind the end of the
                grid; "error" refuses them. `encode_windows` keeps them all.

        Returns:
            A sequence whose `ids` are AMT's; `complete_sequence` adds their names.

        Raises:
            UserError: the source cannot be read, or is too long.
        """
        if attribute_controls_indexes is not None:
            raise UserError("arrival-time tokens have no attribute controls")
        if too_long not in ("truncate", "error"):
            raise UserError(f"too_long must be 'truncate' or 'error', not {too_long!r}")
        events = self.events(score)
        kept = events[events[:, 0] < self.amt.times]
        if len(kept) < len(events):
            text = (
                f"{len(events) - len(kept)} of {len(events)} notes begin after the "
                f"{self.amt.max_time} s of the grid"
            )
            if too_long == "error":
                raise UserError(f"{text}; cut the piece with encode_windows")
            warnings.warn(f"{text} and are left out", stacklevel=2)
        return TokSequence(ids=ids_of(pad_rests(kept, self.amt), self.amt).tolist())

    def encode_windows(
        self, source: "ScoreTick | Notes | str | PathLike[str] | bytes", *, events: int = 341
    ) -> list[np.ndarray]:
        """Return a piece of any length as windows, each from time 0: no note is left out.

        Args:
            source: See `notes`.
            events: How many a window has at most, rests included; fewer where they would not fit
                the seconds of the grid.

        Raises:
            UserError: see `notes`, or `events` is not at least 1.
        """
        if isinstance(events, bool) or not isinstance(events, int) or events < 1:
            raise UserError(f"events must be a whole number of at least 1, not {events!r}")
        rows = pad_rests(self.events(source), self.amt)
        found, start = [], 0
        while start < len(rows):
            window = rows[start : start + events].copy()
            window[:, 0] -= window[0, 0]
            window = window[window[:, 0] < self.amt.times]
            found.append(ids_of(window, self.amt))
            start += len(window)
        return found

    # Decoding

    def to_events(
        self, ids: "Sequence[int] | np.ndarray | TokSequence", *, controls: str = "error"
    ) -> np.ndarray:
        """Check ids and return their events, `[n, 3]` int64, rests included, sorted by onset.

        Args:
            ids: From a flag or from the first event; what stands behind a separator is left out.
            controls: "error" refuses anticipated notes, "merge" takes them as notes.

        Raises:
            UserError: an id is outside the music ids, does not fit its slot, or times fall; the
                message names the place and the slot. A last event that is cut short is dropped with
                a warning.
        """
        if isinstance(ids, TokSequence):
            self.complete_sequence(ids)
            ids = np.asarray(ids.ids)
        found = np.asarray(ids)
        if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
            raise UserError("ids must be one list of whole numbers")
        if controls not in ("error", "merge"):
            raise UserError(f"controls must be 'error' or 'merge', not {controls!r}")
        amt, found = self.amt, found.astype(np.int64)
        bad = np.flatnonzero((found < 0) | (found > amt.size))
        if len(bad):
            raise UserError(
                f"id {found[bad[0]]} at place {bad[0]} is no music id of this grid (0 to "
                f"{amt.size - 1}); ids of a model are shifted by the size of its text vocabulary"
            )
        skip = int(len(found) > 0 and found[0] in (amt.autoregress, amt.size - 1))
        body = found[skip:]
        ends = np.flatnonzero(body == amt.separator)
        body = body[: ends[0]] if len(ends) else body
        rows = body[: len(body) // 3 * 3].reshape(-1, 3)
        anticipated = (rows[:, 0] >= amt.control_offset) & (rows[:, 0] < amt.separator)
        rows = rows - np.where(anticipated, amt.control_offset, 0)[:, None]
        edges = (0, amt.duration_offset, amt.note_offset, amt.rest + 1)
        for slot, name in enumerate(SLOTS):
            here = rows[:, slot]
            wrong = np.flatnonzero((here < edges[slot]) | (here >= edges[slot + 1]))
            if len(wrong):
                place = skip + 3 * int(wrong[0]) + slot
                raise UserError(
                    f"id {found[place]} at place {place} ({amt.block(int(found[place]))}) stands "
                    f"in slot {slot} of event {wrong[0]}, which wants a {name}"
                )
        if anticipated.any() and controls == "error":
            place = skip + 3 * int(np.flatnonzero(anticipated)[0])
            raise UserError(
                f"a control stands at place {place} where an event is required; decode with "
                "controls='merge' to take anticipated notes as notes"
            )
        events = rows - np.array([0, amt.duration_offset, amt.note_offset])
        events[rows[:, 2] == amt.rest, 2] = REST
        sounding = np.flatnonzero((events[:, 2] == REST) & (events[:, 1] > 0))
        if len(sounding):
            place = skip + 3 * int(sounding[0]) + 2
            raise UserError(f"a rest at place {place} has a duration; only duration 0 goes with it")
        falls = np.flatnonzero(np.diff(events[~anticipated, 0]) < 0)
        if len(falls):
            event = int(np.flatnonzero(~anticipated)[falls[0] + 1])
            raise UserError(f"times fall at event {event} (place {skip + 3 * event})")
        if len(body) % 3:
            warnings.warn(
                f"the last event is cut short: {len(body) % 3} ids are dropped", stacklevel=2
            )
        return events[np.argsort(events[:, 0], kind="stable")] if anticipated.any() else events

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: "Sequence[int] | np.ndarray | TokSequence",
        programs: Any = None,
        output_path: Any = None,
        *,
        controls: str = "error",
        style: Style | None = None,
    ) -> "ScoreTick":
        """Return the score that ids stand for; times in seconds are kept to half a tick of it.

        Args:
            tokens: See `to_events`.
            programs: Of miditok; must be None, as ids name their instruments.
            output_path: Of miditok; must be None, use `write_midi` or `dump_midi`.
            controls: See `to_events`.
            style: Tempo, metre and key of the score.

        Raises:
            UserError: the ids are not legal.
        """
        if programs is not None or output_path is not None:
            raise UserError("decode takes ids alone; write the score with its dump_midi")
        return to_score(notes_of_events(self.to_events(tokens, controls=controls), self.amt), style)

    def _tokens_to_score(self, tokens: Any, programs: Any = None) -> Any:
        return self.decode(tokens)

    # Files

    def train(self, *args: Any, **named: Any) -> None:
        """Refuse: merges would join ids of different slots, and AMT's ids would be lost.

        Raises:
            UserError: always.
        """
        raise UserError("arrival-time ids cannot be merged (BPE, Unigram, WordPiece)")

    @classmethod
    def from_pretrained(cls, folder: "str | PathLike[str]", **named: Any) -> "AMTTokenizer":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read what `save` or `save_pretrained` wrote into a folder or file, or a name of the hub.

        Raises:
            UserError: it is not there, or is no tokenizer of this kind.
        """
        place = Path(folder)
        file = place / "tokenizer.json" if place.is_dir() else place
        if file.is_file():
            return cls(params=file)
        try:
            return super().from_pretrained(str(folder), **named)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{place} holds no tokenizer of AMTTokenizer.save: {reason}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return what `save` writes."""
        return {**super().to_dict(), "amt": self.amt.to_dict()}

    def _load_from_json(self, file_path: "str | Path") -> None:
        try:
            values = json.loads(Path(file_path).read_text(encoding="utf-8"))
            self.amt = AMTConfig.from_dict(values["amt"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file_path} is no tokenizer of AMTTokenizer.save: {error}") from error
        self.config = _settings()


def _settings() -> TokenizerConfig:
    return TokenizerConfig(special_tokens=["PAD"], use_programs=True)
