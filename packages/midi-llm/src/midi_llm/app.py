"""A web page and a small HTTP interface over one model: type words, see, hear and keep music.

FastAPI with one page of our own rather than Gradio: the page is a single file that works without
any network (no CDN, fonts or scripts from elsewhere), nothing is reported to anybody, the server
brings a few dependencies instead of dozens, and every endpoint is tested like any function.

The takes and the queue are in `studio`; here is what speaks HTTP. Only this machine is served
unless another address is asked for.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import re
import socket
import time
from base64 import b64encode
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    MutableMapping,
    Sequence,
)
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from midi_llm._version import __version__
from midi_llm.decode import DEFAULT_NOTES
from midi_llm.studio import ContinueWish, GenerateWish, InfillWish, Refused, Studio, Take
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import require

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from midi_llm.decode import Composer

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_BODY = 64 * 1024  # bytes of a request that is no upload
_PATIENCE = 30  # seconds that a request's body may take to come
logger = logging.getLogger(__name__)
T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
