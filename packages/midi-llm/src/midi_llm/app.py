"""A web page and a small HTTP interface over one model: type words, see, hear and keep music.

FastAPI with one page of our own rather than Gradio: the page is a single file that works without
any network (no CDN, fonts or scripts from elsewhere), nothing is reported to anybody, the server
brings a few dependencies instead of dozens, and every endpoint is tested like any function.

One piece is written at a time, in a thread of its own; a few more wait, others are turned away. A
piece that nobody waits for any more, since the browser went away, stops at its next note. Only this
machine is served unless another address is asked for.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import math
import re
import secrets
import shutil
import socket
import tempfile
import time
import warnings
import weakref
from base64 import b64encode
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    MutableMapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np

from midi_llm._version import __version__
from midi_llm.captions import style_of_prompt
from midi_llm.decode import DEFAULT_NOTES, MidiOutput, OnNote, Sampling
from midi_llm.grammar import GenerationConstraints
from midi_llm.midi_read import read_notes, read_score
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
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import require

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from midi_llm.decode import Composer

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_TAKES_AT_ONCE = 4
MAX_PROMPT = 4000  # characters
MAX_SECONDS = 120  # of one continuation
MAX_UPLOADED_NOTES = 20_000
_DRAWN, _RENDERED = 16, 16  # that wait at most: uploads and pictures, and sounds
_TONE = 10  # seconds of a preview's tone; endless ones of an upload would keep it busy for hours
_BODY = 64 * 1024  # bytes of a request that is no upload
_CLOSING = "the server is shutting down"
_PATIENCE = 30  # seconds that a request's body may take to come
logger = logging.getLogger(__name__)
T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
            notes = read_notes(data, max_notes=MAX_UPLOADED_NOTES)
            style = style_of_score(read_score(data))
        except UserError as error:
            raise UserError(str(error).replace("these bytes", name, 1)) from error
        if not len(notes):
            raise UserError(f"{name} has no notes")
        if notes.end > MAX_AUDIO:
            raise UserError(f"{name} lasts {notes.end:.0f} s; at most {MAX_AUDIO} s are accepted")
        take = self.add(name, notes, "upload", style)
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


# ------------------------------------------------------------------------------------------------
# HTTP


class Guard:
    """What every request passes through: names of hosts, origins, sizes, headers of security.

    Args:
        app: What is behind.
        hosts: Names by which the server may be called, against DNS rebinding; None is any.
        max_upload: Bytes of an upload at most.
        policy: The Content-Security-Policy.
    """

    def __init__(
        self, app: Any, *, hosts: "frozenset[str] | None", max_upload: int, policy: str
    ) -> None:
        self.app, self.hosts, self.max_upload = app, hosts, max_upload
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cross-origin-opener-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            if scope["method"] not in ("GET", "HEAD"):
                receive = await self._body(scope, headers, receive)
        except Refused as refused:
            await _refuse(refused, guarded)
            return
        try:
            await self.app(scope, receive, guarded)
        except Exception as error:
            if not begun:
                await _refuse(_failure(error), guarded)
            raise  # into the log

    def _check(self, scope: Message, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "").lower()
        name = host[: host.find("]") + 1] if host.startswith("[") else host.split(":")[0]
        if self.hosts is not None and name not in self.hosts:
            raise Refused(
                403, f"this server answers as {', '.join(sorted(self.hosts))}, not as {host[:80]!r}"
            )
        origin = headers.get(b"origin")
        own = (None, f"http://{host}", f"https://{host}")
        if scope["method"] not in ("GET", "HEAD") and origin not in own:
            raise Refused(403, "requests from pages of other sites are not served")

    async def _body(self, scope: Message, headers: dict[bytes, str], receive: Receive) -> Receive:
        """Read the body, and return a `receive` that gives it once more."""
        limit = self.max_upload if scope["path"] == "/api/upload" else _BODY
        close = {"Connection": "close"}
        said = headers.get(b"content-length", "0")
        too_large = Refused(413, f"the request is too large; at most {limit} bytes are read", close)
        if not re.fullmatch(r"\d{1,18}", said) or int(said) > limit:
            raise too_large
        body = bytearray()
        deadline = time.monotonic() + _PATIENCE
        more = True
        while more:
            try:
                left = max(0.0, deadline - time.monotonic())
                message = await asyncio.wait_for(receive(), left)
            except TimeoutError:
                raise Refused(
                    408, f"the request did not come within {_PATIENCE} s", close
                ) from None
            if message["type"] == "http.disconnect":
                raise Refused(400, "the request broke off", close)
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise too_large
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return again


def _failure(error: Exception) -> Refused:
    """Return what is told of an error that nothing expected."""
    if type(error).__name__ == "OutOfMemoryError":
        return Refused(503, "out of memory; ask for fewer takes, or shorter ones")
    return Refused(500, "the server failed; its log says why")


async def _refuse(refused: Refused, send: Send) -> None:
    body = json.dumps({"error": str(refused)}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    headers |= refused.headers
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def page() -> tuple[str, str]:
    """Return the page and the Content-Security-Policy that lets it run and nothing else."""
    text = files("midi_llm").joinpath("page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inside = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        return b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def make_app(
    lm: "Composer",
    *,
    max_queue: int = 4,
    max_notes: int = DEFAULT_NOTES,
    max_upload: int = 1 << 20,
    render: bool = True,
    max_takes: int = 32,
    hosts: "Sequence[str] | None" = LOOPBACK,
    soundfont: "str | Path | None" = None,
    seed: int | None = None,
) -> "FastAPI":
    """Make the web application of a model.

    Args:
        lm: The model, on any engine.
        max_queue: Requests that wait at most, beside the one at work; more get status 503.
        max_notes: Events of a piece at most.
        max_upload: Bytes of a MIDI file at most; larger ones get status 413.
        render: Whether takes become sound.
        max_takes: Takes that are kept; the oldest goes first.
        hosts: Names by which browsers may call the server. Defaults to those of this machine,
            against pages that point a name of theirs here; None is any name.
        soundfont: As of `find_soundfont`.
        seed: That the page begins with. None for a new one with every request.

    Raises:
        UserError: a number is out of range, or the soundfont is not there.
        MissingDependencyError: FastAPI is not installed.
    """
    require("fastapi", extra="serve", package="midi-llm", purpose="the web page")
    from contextlib import asynccontextmanager

    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException

    if isinstance(max_upload, bool) or not isinstance(max_upload, int) or max_upload < 1:
        raise UserError(f"max_upload must be a whole number of at least 1, not {max_upload!r}")
    studio = Studio(
        lm, max_queue=max_queue, max_notes=max_notes, max_takes=max_takes, render=render,
        soundfont=soundfont,
    )  # fmt: skip
    text, policy = page()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        studio.close()

    # The interactive documentation would load its scripts from elsewhere.
    app = FastAPI(
        title="midi-llm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.studio = studio
    names = None if hosts is None else frozenset(name.lower() for name in hosts)
    app.add_middleware(Guard, hosts=names, max_upload=max_upload, policy=policy)  # pyright: ignore[reportArgumentType]
    kept = {"Cache-Control": "private, max-age=3600, immutable"}

    def failed(status: int, message: str, headers: Any = None) -> Response:
        return JSONResponse({"error": message}, status, headers)

    @app.exception_handler(UserError)
    async def _(request: Request, error: UserError) -> Response:
        del request
        return failed(400, str(error))

    @app.exception_handler(Refused)
    async def _(request: Request, error: Refused) -> Response:
        del request
        return failed(error.status, str(error), error.headers)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return failed(400, _sentence(error.errors(), request.url.path))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        line = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return failed(error.status_code, line, error.headers)

    @app.get("/", response_class=HTMLResponse)
    async def _() -> Response:
        return HTMLResponse(text, headers={"Cache-Control": "no-cache"})

    @app.get("/api/health")
    async def _() -> dict[str, Any]:
        return {
            "status": "ok", "version": __version__, "pending": studio.pending,
            "max_queue": max_queue, "max_notes": max_notes, "max_upload": max_upload,
            "max_seconds": lm.processor.amt.max_time, "infill": studio.infills,
            "sound": studio.engine, "notes": studio.notes, "seed": seed,
        }  # fmt: skip

    @app.post("/api/generate")
    async def _(wish: GenerateWish, request: Request) -> dict[str, Any]:
        return await _while_wanted(request, studio.generate(wish))

    @app.post("/api/continue")
    async def _(wish: ContinueWish, request: Request) -> dict[str, Any]:
        return await _while_wanted(request, studio.continue_(wish))

    @app.post("/api/infill")
    async def _(wish: InfillWish, request: Request) -> dict[str, Any]:
        return await _while_wanted(request, studio.infill(wish))

    @app.post("/api/upload")
    async def _(request: Request, name: str = "") -> dict[str, Any]:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise Refused(415, "send the file itself as the body, not as a form")
        return await studio.upload(await request.body(), name)

    def file(take: Take, kind: str, media: str, name: str | None = None) -> Response:
        path = studio.path(take, kind)
        try:
            found = path.stat()
        except FileNotFoundError:
            studio.take(take.id)  # it was dropped meanwhile
            raise
        return FileResponse(path, 200, kept, media, filename=name, stat_result=found)

    @app.get("/api/takes/{id}.mid", response_class=FileResponse)
    async def _(id: str) -> Response:
        return file(studio.take(id), "mid", "audio/midi", f"midi-llm-{id}.mid")

    @app.get("/api/takes/{id}.wav", response_class=FileResponse)
    async def _(id: str) -> Response:
        return file(await studio.sound(id), "wav", "audio/wav")

    @app.get("/api/takes/{id}.svg", response_class=Response)
    async def _(id: str) -> Response:
        return Response(await studio.picture(id), 200, kept, "image/svg+xml")

    return app


async def _while_wanted(request: "Request", answer: Coroutine[Any, Any, T]) -> T:
    """Await an answer; where the browser goes away first, cancel it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Refused(499, "the request was given up")  # nobody hears it
    finally:
        for task in tasks:
            task.cancel()


_WISHES = {
    "/api/generate": GenerateWish, "/api/continue": ContinueWish, "/api/infill": InfillWish,
}  # fmt: skip


def _sentence(errors: "Sequence[Any]", path: str) -> str:
    """Return the first error that FastAPI found, as one line."""
    first = errors[0]
    kind, where = first["type"], [str(part) for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return f"the request is no JSON: {reason}"
    if not where:
        return "the request must be a JSON object, sent as application/json"
    if kind == "missing":
        return f"{where[0]} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [one.name for one in fields(_WISHES[path])] if path in _WISHES else []
        return f"there is no field {where[0][:60]!r}.{suggest(where[0], known)}"
    return f"{where[0]}: {first['msg']}, not {str(first.get('input'))[:60]!r}"


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    lm: "Composer",
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    max_queue: int = 4,
    max_notes: int = DEFAULT_NOTES,
    max_upload: int = 1 << 20,
    render: bool = True,
    max_takes: int = 32,
    soundfont: "str | Path | None" = None,
    seed: int | None = None,
    ready: "Callable[[str], None] | None" = None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, which end a piece at its next note.

    Args:
        lm: The model.
        host: Where to listen. Another address than this machine's own lets others in: there is no
            password, and the log says so.
        port: 0 takes any that is free.
        max_queue: As of `make_app`.
        max_notes: As of `make_app`.
        max_upload: As of `make_app`.
        render: As of `make_app`.
        max_takes: As of `make_app`.
        soundfont: As of `make_app`.
        seed: As of `make_app`.
        ready: Called with the page's address when it is about to be served.

    Raises:
        UserError: the address cannot be listened on.
        MissingDependencyError: FastAPI or uvicorn is not installed.
    """
    require("uvicorn", extra="serve", package="midi-llm", purpose="the web page")
    import uvicorn

    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise UserError(f"port must be 0 to 65535, not {port!r}")
    local = is_loopback(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another port"
        ) from error
    with listener:
        shown = f"[{host}]" if ":" in host else host
        if not local:
            logger.warning(
                "listening on %s: whoever reaches this machine can use the model, there is no "
                "password", host,
            )  # fmt: skip
        app = make_app(
            lm, max_queue=max_queue, max_notes=max_notes, max_upload=max_upload, render=render,
            max_takes=max_takes, hosts=(*LOOPBACK, shown) if local else None, soundfont=soundfont,
            seed=seed,
        )  # fmt: skip
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, limit_concurrency=64,
            timeout_keep_alive=10, timeout_graceful_shutdown=1,
        )  # fmt: skip

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: "list[socket.socket] | None" = None) -> None:
                app.state.studio.stop()  # else requests would be waited for
                await super().shutdown(sockets)

        if ready is not None:
            ready(f"http://{shown}:{listener.getsockname()[1]}/")
        Server(config).run(sockets=[listener])
