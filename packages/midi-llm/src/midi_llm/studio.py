"""What the web page's requests may say, the queue they wait in, and the takes that come of them.

One piece is written at a time, in a thread of its own; a few more wait, others are turned away. A
piece that nobody waits for any more stops at its next note. HTTP is the matter of `app`.
"""

import asyncio
import logging
import math
import secrets
import shutil
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np

from midi_llm.captions import style_of_prompt
from midi_llm.decode import MidiOutput, OnNote, Sampling
from midi_llm.grammar import GenerationConstraints
from midi_llm.midi_read import read_piece
from midi_llm.midi_write import Style, style_of_score
from midi_llm.notes import Note, Notes
from midi_llm.render import (
    MAX_AUDIO,
    choose_engine,
    instrument_colours,
    piano_roll_svg,
    to_wav,
)
from midi_llm.vocab import instrument_name
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from midi_llm.decode import Composer

MAX_TAKES_AT_ONCE = 4
MAX_PROMPT = 4000  # characters
MAX_SECONDS = 120  # of one continuation
MAX_UPLOADED_NOTES = 20_000
_DRAWN, _RENDERED = 16, 16  # that wait at most: uploads and pictures, and sounds
_TONE = 10  # seconds of a preview's tone; endless ones of an upload would keep it busy for hours
_CLOSING = "the server is shutting down"
logger = logging.getLogger(__name__)
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------
# What may be asked for; FastAPI checks the types, and unknown fields are refused


@dataclass(kw_only=True)
class Wish:
    """What all requests for music may say; `Sampling`, `GenerationConstraints` and `Style`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    temperature: float = 1.0
    top_p: float = 0.98
    seed: int = 0
    instruments: list[int | str] | None = None
    key: str | None = None
    tempo: float | None = None
    pitch_range: tuple[int, int] | None = None
    max_polyphony: int | None = None
    notes_per_second: float | None = None

    def check(self) -> None:
        """Check the fields before the request waits for its turn; raises UserError."""
        Sampling(self.temperature, self.top_p)
        if not -(2**63) < self.seed < 2**63:
            raise UserError(f"seed must be under 2**63, not {self.seed}")
        self.style(Style())

    def constraints(self, **more: Any) -> GenerationConstraints:
        """Return what the music must keep to; raises UserError."""
        return GenerationConstraints(
            instruments=self.instruments, key=self.key or None, pitch_range=self.pitch_range,
            max_polyphony=self.max_polyphony, notes_per_second=self.notes_per_second, **more,
        )  # fmt: skip

    def style(self, old: Style) -> Style:
        """Return tempo and key of the file, those not wished for from `old`; raises UserError."""
        tempo = old.tempo if self.tempo is None else self.tempo
        return Style(tempo=tempo, time_signature=old.time_signature, key=self.key or old.key)


@dataclass(kw_only=True)
class GenerateWish(Wish):
    """A request for new music."""

    prompt: str
    seconds: float | None = None
    max_notes: int | None = None
    min_notes: int = 1
    n: int = 1


@dataclass(kw_only=True)
class ContinueWish(Wish):
    """A request to go on with a take; without a prompt with the take's."""

    take: str
    seconds: float
    prompt: str | None = None


@dataclass(kw_only=True)
class InfillWish(Wish):
    """A request to write a span of a take anew; without a prompt with the take's."""

    take: str
    start: float
    end: float
    prompt: str | None = None
    keep_instruments: list[int | str] = field(default_factory=list)


class Refused(Exception):
    """A request that is turned away with a status and one line."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


# ------------------------------------------------------------------------------------------------
# The takes and the worker


class Line:
    """A thread that does one job at a time; a few more wait, others are turned away.

    Args:
        name: Of the thread.
        waiting: Jobs that wait at most, beside the one at work.
    """

    def __init__(self, name: str, waiting: int) -> None:
        self.waiting, self.pending, self.closed = waiting, 0, False
        self._last = 5.0  # seconds of the last job
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"midi-llm-{name}")

    def close(self) -> None:
        """Drop what waits, and take nothing more."""
        self.closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job when its turn comes; cancelled before, it leaves the line.

        Raises:
            Refused: too many wait already, or the line is closed.
        """
        with self._lock:
            if self.pending > self.waiting:
                seconds = min(600, max(1, math.ceil(self._last * self.pending)))
                raise Refused(
                    503, f"{self.pending} requests are waiting already; try again in {seconds} s",
                    {"Retry-After": str(seconds)},
                )  # fmt: skip
            self.pending += 1

        def timed() -> T:
            start = time.monotonic()
            try:
                return job()
            finally:
                self._last = time.monotonic() - start

        try:
            future = self._thread.submit(timed)
        except RuntimeError:
            self._leave(None)
            raise Refused(503, _CLOSING) from None
        # Where nobody waits any more the job may still run, so it is the job that leaves.
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self.closed:
                raise Refused(503, _CLOSING) from None
            raise

    def _leave(self, future: "Future | None") -> None:
        del future
        with self._lock:
            self.pending -= 1


@dataclass(frozen=True, eq=False)
class Take:
    """A piece that the page shows."""

    id: str
    prompt: str
    notes: Notes
    finish_reason: str
    style: Style


class Studio:
    """A model, its queue, and the takes it made; safe to use from several threads.

    Args:
        lm: The model.
        max_queue: Requests that wait at most, beside the one at work.
        max_notes: Events of a piece at most.
        max_takes: Takes that are kept; the oldest goes first.
        render: Whether takes become sound.
        soundfont: As of `find_soundfont`.

    Attributes:
        notes: How many the piece at work has so far.
    """

    def __init__(
        self,
        lm: "Composer",
        *,
        max_queue: int,
        max_notes: int,
        max_takes: int,
        render: bool,
        soundfont: "str | Path | None" = None,
    ) -> None:
        for name, value, low in (
            ("max_queue", max_queue, 0), ("max_notes", max_notes, 1),
            ("max_takes", max_takes, MAX_TAKES_AT_ONCE),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"{name} must be a whole number of at least {low}, not {value!r}")
        self.lm, self.max_queue = lm, max_queue
        self.max_notes, self.max_takes, self.soundfont = max_notes, max_takes, soundfont
        self.engine = "none"
        if render:
            self.engine, reason = choose_engine("auto", soundfont)
            if self.engine == "preview":
                logger.warning("takes get a preview sound: %s", reason)
        self.folder = Path(tempfile.mkdtemp(prefix="midi-llm-takes-"))
        self._clean = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._takes: OrderedDict[str, Take] = OrderedDict()
        self._lock = Lock()
        self.notes = 0
        self._composer = Line("compose", max_queue)
        self._drawer, self._renderer = Line("draw", _DRAWN), Line("render", _RENDERED)

    def stop(self) -> None:
        """Drop what waits; the piece at work ends at its next note."""
        for line in (self._composer, self._drawer, self._renderer):
            line.close()

    def close(self) -> None:
        """Stop, and delete the files of takes."""
        self.stop()
        self._clean()

    @property
    def pending(self) -> int:
        """How many pieces are at work or wait."""
        return self._composer.pending

    @property
    def infills(self) -> bool:
        """Whether the model's grid has controls."""
        return self.lm.processor.amt.anticipation

    async def work(self, job: Callable[[OnNote], T]) -> T:
        """Run a job when its turn comes; cancelled, it ends at its next note.

        Args:
            job: Called with what is to be told of every note.

        Raises:
            Refused: too many wait already, or the server is shutting down.
        """
        unwanted = Event()

        def on_note(piece: int, note: Note) -> None:
            del piece, note
            if unwanted.is_set() or self._composer.closed:
                raise Refused(503, _CLOSING)  # in the first case nobody hears it
            self.notes += 1

        def begin() -> T:
            self.notes = 0
            return job(on_note)

        try:
            return await self._composer.run(begin)
        except asyncio.CancelledError:
            unwanted.set()
            raise

    def add(self, prompt: str, notes: Notes, finish_reason: str, style: Style) -> Take:
        """Keep a piece, written as a file already, and drop the oldest if there are too many."""
        take = Take(secrets.token_hex(8), prompt, notes, finish_reason, style)
        MidiOutput(prompt, notes, (), finish_reason, style).save(self.path(take, "mid"))
        with self._lock:
            self._takes[take.id] = take
            old = []
            while len(self._takes) > self.max_takes:
                old.append(self._takes.popitem(last=False)[1])
        for one in old:
            self._delete(one)
        return take

    def take(self, id: str) -> Take:
        """Return a take; raises Refused where there is none."""
        with self._lock:
            if id in self._takes:
                return self._takes[id]
        raise Refused(
            404, f"there is no take {id[:40]!r}; the server keeps the last {self.max_takes}"
        )

    def path(self, take: Take, kind: str) -> Path:
        """Return where a take's file of a kind is."""
        return self.folder / f"{take.id}.{kind}"

    def _delete(self, take: Take) -> None:
        for kind in ("mid", "wav"):
            self.path(take, kind).unlink(missing_ok=True)

    async def sound(self, id: str) -> Take:
        """Return a take that has a WAV file, made when it is first asked for."""
        take = self.take(id)
        if self.engine == "none":
            raise Refused(404, "this server was started without sound")
        path = self.path(take, "wav")

        def make() -> None:
            self.take(id)
            if path.exists():
                return
            notes, engine = take.notes, cast("Any", self.engine)
            if engine == "preview":
                onset, duration, *others = notes.columns
                notes = Notes(onset, np.minimum(duration, _TONE), *others)
            to_wav(
                MidiOutput("", notes, (), "", take.style), path, engine=engine,
                soundfont=self.soundfont, normalize=-3,
            )  # fmt: skip

        try:
            await self._renderer.run(make)
        except UserError as error:
            self.take(id)
            logger.warning("take %s has no sound: %s", id, error)
            raise Refused(500, f"this take has no sound: {error}") from error
        finally:
            if id not in self._takes:
                self._delete(take)  # it was dropped while it was made
        return take

    async def picture(self, id: str) -> str:
        """Return the piano roll of a take as SVG."""
        take = self.take(id)
        drawn = await self._drawer.run(lambda: piano_roll_svg(take.notes, style=take.style))
        self.take(id)
        return drawn

    # Music

    async def generate(self, wish: GenerateWish) -> dict[str, Any]:
        """Write new takes."""
        wish.check()
        _check_prompt(wish.prompt)
        longest = self.lm.processor.amt.max_time
        if wish.seconds is not None and not 0 < wish.seconds <= longest:
            raise UserError(f"seconds must be over 0 and at most {longest}, not {wish.seconds:g}")
        if not 1 <= wish.n <= MAX_TAKES_AT_ONCE:
            raise UserError(f"n must be 1 to {MAX_TAKES_AT_ONCE}, not {wish.n}")
        if wish.max_notes is not None and not 1 <= wish.max_notes <= self.max_notes:
            raise UserError(f"max_notes must be 1 to {self.max_notes}, not {wish.max_notes}")
        constraints = wish.constraints(end_time=wish.seconds, min_notes=wish.min_notes)

        def job(on_note: OnNote) -> dict[str, Any]:
            found, remarks = _with_remarks(
                lambda: self.lm.generate(
                    [wish.prompt], n=wish.n, temperature=wish.temperature, top_p=wish.top_p,
                    max_notes=wish.max_notes or self.max_notes, constraints=constraints,
                    style=wish.style(style_of_prompt(wish.prompt)), seed=wish.seed, on_note=on_note,
                ),
                limited=wish.max_notes is not None,
            )  # fmt: skip
            return self._answer(found, wish.prompt, remarks)

        return await self.work(job)

    async def continue_(self, wish: ContinueWish) -> dict[str, Any]:
        """Go on with a take."""
        old, prompt = self._begin(wish.take, wish.prompt)
        wish.check()
        constraints = wish.constraints()
        if not 0 < wish.seconds <= MAX_SECONDS:
            raise UserError(
                f"seconds must be over 0 and at most {MAX_SECONDS}, not {wish.seconds:g}"
            )
        if old.notes.end + wish.seconds > MAX_AUDIO - 10:
            raise UserError(
                f"the take lasts {old.notes.end:.0f} s; with {wish.seconds:g} s more it would be "
                f"longer than {MAX_AUDIO - 10} s"
            )

        def job(on_note: OnNote) -> dict[str, Any]:
            found, remarks = _with_remarks(
                lambda: self.lm.continue_(
                    old.notes, seconds=wish.seconds, prompt=prompt, temperature=wish.temperature,
                    top_p=wish.top_p, max_notes=self.max_notes, constraints=constraints,
                    style=wish.style(old.style), seed=wish.seed, on_note=on_note,
                )
            )  # fmt: skip
            if len(found.notes) == len(old.notes):
                remarks.append("Nothing was added: the model ends the piece here.")
            return self._answer([found], prompt, remarks)

        return await self.work(job)

    async def infill(self, wish: InfillWish) -> dict[str, Any]:
        """Write a span of a take anew."""
        old, prompt = self._begin(wish.take, wish.prompt)
        wish.check()
        constraints = wish.constraints()
        if not self.infills:
            raise UserError("this model cannot rewrite a span: its grid has no controls")

        def job(on_note: OnNote) -> dict[str, Any]:
            found, remarks = _with_remarks(
                lambda: self.lm.infill(
                    old.notes, start=wish.start, end=wish.end, prompt=prompt,
                    keep_instruments=wish.keep_instruments, temperature=wish.temperature,
                    top_p=wish.top_p, max_notes=self.max_notes, constraints=constraints,
                    style=wish.style(old.style), seed=wish.seed, on_note=on_note,
                )
            )  # fmt: skip
            return self._answer([found], prompt, remarks)

        return await self.work(job)

    async def upload(self, data: bytes, name: str) -> dict[str, Any]:
        """Make a take of a MIDI file."""
        return await self._drawer.run(lambda: self._uploaded(data, name))

    def _uploaded(self, data: bytes, name: str) -> dict[str, Any]:
        name = "".join(c for c in name if c.isprintable())[:100] or "a MIDI file"
        try:
            notes, score = read_piece(data, max_notes=MAX_UPLOADED_NOTES)
        except UserError as error:
            raise UserError(str(error).replace("these bytes", name, 1)) from error
        if not len(notes):
            raise UserError(f"{name} has no notes")
        if notes.end > MAX_AUDIO:
            raise UserError(f"{name} lasts {notes.end:.0f} s; at most {MAX_AUDIO} s are accepted")
        take = self.add(name, notes, "upload", style_of_score(score))
        return {"takes": [self.describe(take)], "remarks": []}

    def _begin(self, id: str, prompt: str | None) -> tuple[Take, str]:
        take = self.take(id)
        prompt = take.prompt if prompt is None else prompt
        _check_prompt(prompt)
        return take, prompt

    def _answer(
        self, found: Sequence[MidiOutput], prompt: str, remarks: list[str]
    ) -> dict[str, Any]:
        takes = [self.add(prompt, one.notes, one.finish_reason, one.style) for one in found]
        return {"takes": [self.describe(take) for take in takes], "remarks": remarks}

    def describe(self, take: Take) -> dict[str, Any]:
        """Return a take as the page gets it."""
        base = f"/api/takes/{take.id}"
        links = {"midi": f"{base}.mid", "roll": f"{base}.svg"}
        if self.engine != "none" and len(take.notes):
            links["wav"] = f"{base}.wav"
        colours = instrument_colours(take.notes)
        return {
            "id": take.id,
            "prompt": take.prompt,
            "seconds": round(take.notes.end, 3),
            "notes": len(take.notes),
            "finish_reason": take.finish_reason,
            "tempo": take.style.tempo,
            "key": take.style.key,
            "instruments": [
                {"number": i, "name": instrument_name(i), "colour": c} for i, c in colours.items()
            ],
            "links": links,
        }


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty; describe the music in a few words")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters; at most {MAX_PROMPT} are read")


def _with_remarks(job: Callable[[], T], *, limited: bool = False) -> tuple[T, list[str]]:
    """Run a job and return what it warned of beside its result; for the one composer only.

    `limited`: whether max_notes was wished for; of our own limit nobody asked.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = job()
    remarks = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return result, [one for one in remarks if limited or not one.startswith("max_notes")]
