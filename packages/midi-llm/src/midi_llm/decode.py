"""Music from a text-to-music model: batched decoding that the grammar keeps legal.

All sequences of a batch start their music together, so they are always at the same slot of an
event; of the head only the rows of that slot are multiplied.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from midi_llm.anticipate import REST, events_of, ids_of, interleave, notes_of_events, pad_rests
from midi_llm.captions import style_of_prompt
from midi_llm.grammar import Allowed, GenerationConstraints, Grammar, Rules
from midi_llm.midi_read import notes_of_score
from midi_llm.midi_write import Style, style_of_score, to_score, write_midi
from midi_llm.modeling import TextMidiProcessor
from midi_llm.notes import Note, Notes
from midi_llm.vocab import instrument_number
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    import torch
    from symusic.core import ScoreTick
    from torch import Tensor
    from transformers import PreTrainedModel


DEFAULT_NOTES = 682  # as the public script makes: 2046 ids
OnNote = Callable[[int, Note], None]


@dataclass(frozen=True)
class Sampling:
    """How the next id is drawn from those allowed.

    Attributes:
        temperature: 0 always takes the most likely one (the lowest among equals).
        top_p: Draws from the fewest ids whose probabilities reach this sum.
    """

    temperature: float = 1.0
    top_p: float = 0.98

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and low <= value <= high and (value or name != "top_p")):
                raise UserError(f"{name} must be within {low} and {high}, not {value!r}")


@dataclass(frozen=True, eq=False)
class MidiOutput:
    """A piece that was generated.

    Attributes:
        prompt: The text it was generated from.
        notes: What sounds.
        ids: Music ids that were generated, controls among them.
        finish_reason: "stop" (the model ended it), "length" (max_notes), "end_time" (no later
            note is possible), or "stuck" (constraints let it neither go on nor end).
        style: Tempo, metre and key that files get.
    """

    prompt: str
    notes: Notes
    ids: tuple[int, ...]
    finish_reason: str
    style: Style = field(default_factory=Style)

    @property
    def score(self) -> "ScoreTick":
        """The piece as a `symusic.Score`."""
        return to_score(self.notes, self.style)

    @property
    def seconds(self) -> float:
        """When its last note ends."""
        return self.notes.end

    def save(self, path: "str | PathLike[str]") -> Path:
        """Write it as a MIDI file and return where."""
        write_midi(self.notes, path, self.style)
        return Path(path)


class Composer(ABC):
    """What every engine shares: prompts, constraints and the pieces that come out.

    An engine knows how many ids its model reads (`_context`) and how to go on (`_decode`).

    Attributes:
        processor: The model's processor.
    """

    processor: TextMidiProcessor

    def generate(
        self,
        prompts: "str | Sequence[str]",
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.98,
        max_notes: int | None = None,
        constraints: GenerationConstraints | None = None,
        style: Style | None = None,
        batch_size: int = 16,
        seed: int = 0,
        on_note: OnNote | None = None,
    ) -> list[MidiOutput]:
        """Write music for texts.

        Args:
            prompts: A text, or several.
            n: Pieces for each of them.
            temperature: See `Sampling`.
            top_p: See `Sampling`.
            max_notes: Events of a piece at most, rests included. None for 682, or as many as the
                model can read behind the prompt.
            constraints: What every piece must keep to.
            style: Tempo, metre and key written into files; sounds do not depend on it. None for
                what constraints and the prompt say ("90 bpm", "3/4", "in C minor").
            batch_size: Sequences that are decoded together.
            seed: Of the draws; a piece's draws do not depend on the others.
            on_note: Called with the number of a piece and each of its notes, as they come (through
                vLLM all at the end). What it raises ends the call: a way to cancel.

        Returns:
            `len(prompts) * n` pieces, those of the first prompt first.

        Raises:
            UserError: a prompt is empty or too long, an argument is out of range, or the
                constraints leave nothing to play, or let no piece end. Where some pieces can end,
                all are returned, with a warning that names the others.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise UserError("there are no prompts")
        for name, value in (("n", n), ("batch_size", batch_size)):
            _check_count(name, value)
        if n > 1 and temperature == 0:
            raise UserError("with temperature 0 all n pieces would be the same; ask for one")
        sampling = Sampling(temperature, top_p)
        ids = [self.processor.encode(text) for text in texts]
        key = constraints.key if constraints else None
        styles = [style or style_of_prompt(text, key=key) for text in texts]
        rules = Rules(self.processor.amt, constraints)
        room = self._room(ids, max_notes, most=DEFAULT_NOTES)
        if rules.constraints.min_notes > room:
            raise UserError(
                f"min_notes is {rules.constraints.min_notes}, but a piece has {room} events at most"
            )
        rows = [
            (ids[i], Grammar(rules, max_events=room)) for i in range(len(texts)) for _ in range(n)
        ]
        each = self._teller([grammar for _, grammar in rows], on_note)
        found = self._decode(rows, sampling, batch_size, seed, each)
        stuck = [i for i, (_, grammar) in enumerate(rows) if grammar.error is not None]
        if stuck:
            error = rows[stuck[0]][1].error
            if len(stuck) == len(rows) and error is not None:
                raise error
            warnings.warn(
                f"{len(stuck)} of {len(rows)} pieces are stuck, first that at {stuck[0]}: {error}",
                stacklevel=2,
            )
        return [
            self._output(texts[i // n], music, grammar, styles[i // n])
            for i, (music, (_, grammar)) in enumerate(zip(found, rows, strict=True))
        ]

    def infill(
        self,
        source: "ScoreTick | Notes",
        *,
        start: float,
        end: float,
        prompt: str,
        keep_instruments: "Sequence[int | str]" = (),
        temperature: float = 1.0,
        top_p: float = 0.98,
        max_notes: int | None = None,
        constraints: GenerationConstraints | None = None,
        style: Style | None = None,
        seed: int = 0,
        on_note: OnNote | None = None,
    ) -> MidiOutput:
        """Write a span of a piece anew, with everything around it known.

        What stands before the span is the context; what stands behind it, and within it of the
        instruments to keep, is given as controls five seconds ahead (section 3 of AMT).

        Args:
            source: The piece; what is behind the grid's last second is kept as it is.
            start: Second at which the span begins.
            end: Second at which it ends.
            prompt: The text.
            keep_instruments: Of these the notes of the span stay.
            temperature: See `Sampling`.
            top_p: See `Sampling`.
            max_notes: New events at most, rests included. None for as many as the model can read.
            constraints: What the new notes must keep to.
            style: Tempo, metre and key of files. None for those of the source, if it is a score.
            seed: Of the draws.
            on_note: As of `generate`, with new notes only.

        Raises:
            UserError: the grid has no controls, or the span is empty or outside of it.
        """
        amt = self.processor.amt
        amt.anticipate  # noqa: B018 - raises where the grid has no controls
        if not 0 <= start < end <= amt.max_time:
            raise UserError(
                f"the span must rise within 0 to {amt.max_time} s, not {start} to {end}"
            )
        sampling, style = Sampling(temperature, top_p), style or _style(source)
        notes = source if isinstance(source, Notes) else notes_of_score(source)
        inside = (notes.onset >= start) & (notes.onset < end)
        kept = np.isin(notes.instrument, [instrument_number(i) for i in keep_instruments])
        known = notes[~inside | kept]
        events = events_of(known, amt)
        early = known.onset < start
        fits = events[:, 0] < amt.times
        first = math.ceil(start * amt.resolution)
        before, controls = pad_rests(events[early & fits], amt, end=first), events[~early & fits]
        lasting = events_of(known[early & fits], amt, cut=False)  # as long as they sound
        given = dict(constraints.to_dict()) if constraints else {}
        given["end_time"] = min(end, given.get("end_time", end))
        rules = Rules(amt, GenerationConstraints.from_dict({**given, "min_notes": 0}))
        # Controls that are due within the context stand in it; the grammar forces in the others.
        last = int(before[-1, 0]) if len(before) else 0
        due = controls[controls[:, 0] <= last + amt.delta]
        both, flags = interleave(before, due, amt)
        context = ids_of(both, amt, control=flags)
        ids = [*self.processor.encode(prompt, controls=True), *(self.processor.offset + context)]
        left = len(controls) - len(due)
        room = self._room([ids], max_notes, beside=left)
        grammar = Grammar(
            rules,
            max_events=room,
            given=pad_rests(lasting, amt, end=first),
            controls=controls,
            placed=len(due),
            start=first,
        )
        music = self._alone(ids, grammar, sampling, seed, on_note)
        new = notes_of_events(np.array(grammar.events, np.int64).reshape(-1, 3), amt)
        return MidiOutput(
            prompt, _merged(known, new), tuple(music), grammar.finish_reason or "stop", style
        )

    def continue_(
        self,
        source: "ScoreTick | Notes",
        *,
        seconds: float,
        prompt: str,
        temperature: float = 1.0,
        top_p: float = 0.98,
        max_notes: int | None = None,
        constraints: GenerationConstraints | None = None,
        style: Style | None = None,
        seed: int = 0,
        on_note: OnNote | None = None,
    ) -> MidiOutput:
        """Go on with a piece, past the end of the grid too: the context slides along.

        Args:
            source: The piece.
            seconds: How much to add at least, unless the model ends the piece.
            prompt: The text.
            temperature: See `Sampling`.
            top_p: See `Sampling`.
            max_notes: New events at most, rests included. None for no limit.
            constraints: What the new notes must keep to. `end_time` counts from the end of the
                source; `notes_per_second` is counted anew each time that the context slides.
            style: Tempo, metre and key of files. None for those of the source, if it is a score.
            seed: Of the draws.
            on_note: As of `generate`, with new notes only.

        Raises:
            UserError: `seconds` is not above 0, or as of `generate`.
        """
        if not 0 < seconds < 3600:
            raise UserError(f"seconds must be over 0 and under 3600, not {seconds!r}")
        if max_notes is not None:
            _check_count("max_notes", max_notes)
        amt = self.processor.amt
        sampling, style = Sampling(temperature, top_p), style or _style(source)
        notes = source if isinstance(source, Notes) else notes_of_score(source)
        begins, reason, music = notes.end, "stop", []
        wanted = begins + seconds
        given = dict(constraints.to_dict()) if constraints else {}
        text = self.processor.encode(prompt)
        left = math.inf if max_notes is None else max_notes
        while notes.end < wanted:
            # The last half of the grid's time, or as much as fits, is what the model hears.
            last = float(notes.onset[-1]) if len(notes) else 0.0
            since = max(0.0, math.floor(last - amt.max_time / 2))
            heard = notes[notes.onset >= since][-max(1, self._context(len(text)) // 6) :]
            since = float(heard.onset[0]) if len(heard) else since
            since = round(since * amt.resolution) / amt.resolution
            moved = Notes(heard.onset - since, *heard.columns[1:])
            events = events_of(moved, amt)
            context = ids_of(pad_rests(events, amt), amt)
            ids = [*text, *(self.processor.offset + context)]
            until = min(wanted - since + 1.0, float(amt.max_time))
            if "end_time" in given:
                until = min(until, begins + given["end_time"] - since)
            if until * amt.resolution <= events[-1, 0] if len(events) else until <= 0:
                break
            rules = Rules(
                amt, GenerationConstraints.from_dict({**given, "end_time": until, "min_notes": 0})
            )
            room = min(left, self._room([ids], None))
            lasting = events_of(moved, amt, cut=False)
            known = np.concatenate([_before(notes[: len(notes) - len(heard)], since, amt), lasting])
            grammar = Grammar(rules, max_events=int(room), given=known)
            music += self._alone(ids, grammar, sampling, seed, on_note, since)
            new = notes_of_events(np.array(grammar.events, np.int64).reshape(-1, 3), amt)
            reason = grammar.finish_reason or "stop"
            left -= len(grammar.events)
            notes = _merged(notes, Notes(new.onset + since, *new.columns[1:]))
            if not len(new) or reason == "stop" or left < 1:
                break
            seed += 1
        return MidiOutput(prompt, notes, tuple(music), reason, style)

    # Within

    def _alone(
        self,
        ids: list[int],
        grammar: Grammar,
        sampling: Sampling,
        seed: int,
        on_note: OnNote | None,
        since: float = 0.0,
    ) -> list[int]:
        each = self._teller([grammar], on_note, since)
        [music] = self._decode([(ids, grammar)], sampling, 1, seed, each)
        if grammar.error is not None:
            raise grammar.error
        return music

    def _teller(
        self, grammars: Sequence[Grammar], on_note: OnNote | None, since: float = 0.0
    ) -> "Callable[[int], None] | None":
        """Return what is called with a row after each of its ids, and tells of whole notes."""
        if on_note is None:
            return None
        told, amt = [0] * len(grammars), self.processor.amt

        def each(row: int) -> None:
            events = grammars[row].events[told[row] :]
            told[row] += len(events)
            for time, duration, note in events:
                if note != REST:
                    instrument, pitch = divmod(note, amt.pitches)
                    onset, lasts = time / amt.resolution, duration / amt.resolution
                    number = int(amt.to_instrument(instrument))
                    on_note(row, Note(since + onset, lasts, number, pitch))

        return each

    @abstractmethod
    def _context(self, text: int) -> int:
        """Return how many ids fit behind so many."""

    def _room(
        self,
        ids: Sequence[Sequence[int]],
        wanted: int | None,
        *,
        most: int | None = None,
        beside: int = 0,
    ) -> int:
        """Return how many events may follow prompts.

        Args:
            ids: The prompts.
            wanted: By the user; a warning says if not so many fit.
            most: If the user does not say.
            beside: Events that must fit as well.
        """
        if wanted is not None:
            _check_count("max_notes", wanted)
        longest = max(len(row) for row in ids)
        room = self._context(longest) // 3 - beside
        if room < 1:
            more = f" and then {beside} notes that are kept" if beside else ""
            raise UserError(
                f"a prompt has {longest} ids{more}, but the model reads {self._context(0)} and an "
                "event needs 3; shorten the prompt or the piece"
            )
        if wanted is not None and room < wanted:
            warnings.warn(f"max_notes is {wanted}, but {room} fit behind the prompt", stacklevel=3)
        return min(room, wanted or most or room)

    def _output(self, prompt: str, ids: list[int], grammar: Grammar, style: Style) -> MidiOutput:
        events = np.array(grammar.events, np.int64).reshape(-1, 3)
        notes = notes_of_events(events, self.processor.amt)
        return MidiOutput(prompt, notes, tuple(ids), grammar.finish_reason or "stop", style)

    @abstractmethod
    def _decode(
        self,
        rows: "list[tuple[list[int], Grammar]]",
        sampling: Sampling,
        batch_size: int,
        seed: int,
        each: "Callable[[int], None] | None",
    ) -> list[list[int]]:
        """Return the music ids that follow prompts, each by its grammar, which is advanced.

        `each` is called with the number of a row after each of its ids.
        """


class MidiLM(Composer):
    """A text-to-music model of transformers with its processor.

    Args:
        model: A causal LM with music ids, in eval mode.
        processor: Its processor.
    """

    def __init__(self, model: "PreTrainedModel", processor: TextMidiProcessor) -> None:
        processor.check_model(model)
        self.model, self.processor = model, processor

    @classmethod
    def from_pretrained(
        cls, folder: "str | PathLike[str]", *, device: str = "auto", dtype: Any = "auto"
    ) -> "MidiLM":
        """Load a model's folder.

        Raises:
            UserError: the folder is missing, or holds no text-to-music model.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        from tenfold_common.device import resolve_device

        processor = TextMidiProcessor.from_pretrained(folder)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} holds no model that can be read: {error}") from error
        return cls(model.eval().to(resolve_device(device).value), processor)

    def save_pretrained(self, folder: "str | PathLike[str]") -> None:
        """Write the model and its processor into a folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # Within

    def _context(self, text: int) -> int:
        longest = getattr(self.model.config, "max_position_embeddings", None) or 2048
        return int(longest) - text

    def _decode(
        self,
        rows: "list[tuple[list[int], Grammar]]",
        sampling: Sampling,
        batch_size: int,
        seed: int,
        each: "Callable[[int], None] | None",
    ) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            tell = None if each is None else partial(_tell, each, start)
            found += decode(
                self.model, [ids for ids, _ in part], [grammar for _, grammar in part],
                self.processor.offset, sampling,
                seeds=[(seed * 1_000_003 + start + i) % 2**63 for i in range(len(part))],
                pad=self.processor.offset + self.processor.amt.size, each=tell,
            )  # fmt: skip
        return found


def decode(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    grammars: Sequence[Grammar],
    offset: int,
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    pad: int,
    sliced: bool = True,
    each: "Callable[[int, int], None] | None" = None,
) -> list[list[int]]:
    """Decode a batch, every sequence by its own grammar.

    Args:
        model: A causal LM; its head may have a bias.
        prompts: Ids of the model, each ending before an onset.
        grammars: Their states; they are advanced.
        offset: Of the music ids.
        sampling: How ids are drawn.
        seeds: Of each sequence's draws.
        pad: An id to pad prompts with, on the left.
        sliced: Multiply only the head's rows of the slot; else all, for comparison.
        each: Called with (sequence, music id) as ids come.

    Returns:
        The music ids of each.

    Raises:
        UserError: logits are NaN. A sequence that constraints let neither go on nor end is "stuck".
    """
    import torch

    found: list[list[int]] = [[] for _ in prompts]
    ahead = _ahead(grammars, range(len(prompts)))
    if not ahead:
        return found
    device, head = model.device, cast("Any", model.get_output_embeddings())
    width = max(len(prompts[row]) for row in ahead)
    blank = {row: width - len(prompts[row]) for row in ahead}
    ids = torch.tensor([[pad] * n + list(prompts[row]) for row, n in blank.items()], device=device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in blank.values()], device=device)
    draws = [torch.Generator(device=device).manual_seed(s) for s in seeds]
    cache: Any = None
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        while True:
            out = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache, hidden = out.past_key_values, out.last_hidden_state[:, -1]
            chosen = _choose(
                hidden, head, list(ahead.values()), offset, sampling, [draws[r] for r in ahead],
                sliced,
            )  # fmt: skip
            for row, token in zip(ahead, chosen, strict=True):
                grammars[row].push(token)
                found[row].append(token)
                if each is not None:
                    each(row, token)
            left = _ahead(grammars, ahead)
            if not left:
                return found
            kept = [i for i, row in enumerate(ahead) if row in left]
            if len(kept) < len(ahead):
                which = torch.tensor(kept, device=device)
                cache.batch_select_indices(which)
                mask = mask[which]
            ahead = left
            ids = torch.tensor([[offset + chosen[i]] for i in kept], device=device)
            mask = torch.cat([mask, mask.new_ones(len(kept), 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1


def _ahead(grammars: Sequence[Grammar], rows: Iterable[int]) -> dict[int, Allowed]:
    """Return what may come next in each of the rows that go on."""
    found = {row: grammars[row].proceed() for row in rows}
    return {row: allowed for row, allowed in found.items() if allowed is not None}


def _choose(
    hidden: "Tensor",
    head: Any,
    allowed: list[Allowed],
    offset: int,
    sampling: Sampling,
    draws: "list[torch.Generator]",
    sliced: bool,
) -> list[int]:
    """Choose an id for each row from what it may go on with."""
    import torch

    start, stop = min(a.start for a in allowed), max(a.stop for a in allowed)
    if all(a.stop - a.start == 1 and a.extra is None and a.mask is None for a in allowed):
        return [a.start for a in allowed]  # nothing to choose
    extra = next((a.extra for a in allowed if a.extra is not None), None)
    weight, bias = head.weight, getattr(head, "bias", None)
    if sliced:
        rows = weight[offset + start : offset + stop]
        logits = hidden @ rows.T
        logits = logits if bias is None else logits + bias[offset + start : offset + stop]
        logits = logits.float()
        if extra is not None:
            last = hidden @ weight[offset + extra]
            last = last if bias is None else last + bias[offset + extra]
            logits = torch.cat([logits, last.float()[:, None]], 1)
    else:
        whole = head(hidden).float()
        logits = whole[:, offset + start : offset + stop]
        if extra is not None:
            logits = torch.cat([logits, whole[:, offset + extra, None]], 1)
    if not bool((logits.amax(1) < math.inf).all()):  # of rows with NaN that is NaN
        raise UserError(
            "a logit is NaN or infinite: the model's numbers overflow, or its weights are broken"
        )
    chosen = []
    for row, (one, draw) in enumerate(zip(allowed, draws, strict=True)):
        scores = logits[row, one.start - start : one.stop - start]
        if one.mask is not None:
            scores = scores.masked_fill(
                ~torch.from_numpy(one.mask).to(scores.device), -float("inf")
            )
        if one.extra is not None:
            scores = torch.cat([scores, logits[row, -1:]])
        index = _draw(scores, sampling, draw)
        chosen.append(int(one.extra) if index == one.stop - one.start else one.start + index)  # pyright: ignore[reportArgumentType]
    return chosen


def _draw(scores: "Tensor", sampling: Sampling, draw: "torch.Generator") -> int:
    """Draw from softmax(scores / T), of the most likely ids that reach top_p."""
    import torch

    if sampling.temperature == 0:
        return int(scores.argmax())
    temperature = max(sampling.temperature, 1e-30)  # less would be 0 in float32
    probs = torch.softmax((scores - scores.max()) / temperature, 0)
    if sampling.top_p < 1:
        ranked, order = probs.sort(descending=True, stable=True)
        kept = ranked.cumsum(0) - ranked < sampling.top_p
        ranked = ranked * kept
        return int(order[torch.multinomial(ranked, 1, generator=draw)])
    return int(torch.multinomial(probs, 1, generator=draw))


def _tell(each: Callable[[int], None], start: int, row: int, id: int) -> None:
    del id
    each(start + row)


def _merged(first: Notes, second: Notes) -> Notes:
    """Return the notes of both, by onset; among equals the first's come first."""
    columns = [np.concatenate(pair) for pair in zip(first.columns, second.columns, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Notes(*(column[order] for column in columns))


def _before(notes: Notes, since: float, amt: Any) -> np.ndarray:
    """Return what notes before a second are to a grammar: events at 0 with what is left of them.

    They may sound still, and each of their instruments keeps its channel.
    """
    if not len(notes):
        return np.empty((0, 3), np.int64)
    left = Notes(np.zeros(len(notes)), np.maximum(notes.onset + notes.duration - since, 0),
                 *notes.columns[2:])  # fmt: skip
    events = events_of(left, amt, cut=False)
    kept = events[:, 1] > 0
    kept[np.unique(events[:, 2] // amt.pitches, return_index=True)[1]] = True
    return events[kept]


def _style(source: Any) -> Style:
    return Style() if isinstance(source, Notes) else style_of_score(source)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
