import asyncio
import io
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mido
import pytest
from midi_files import midi, off, on, raw, tempo

from midi_llm import app as app_module
from midi_llm import studio as studio_module
from midi_llm.decode import MidiOutput
from midi_llm.midi_read import read_notes
from midi_llm.midi_write import Style
from midi_llm.notes import Note, Notes
from midi_llm.render import to_wav
from midi_llm.vocab import AMTConfig
from tenfold_common.errors import UserError

pytest.importorskip("fastapi", reason="needs midi-llm[serve]")
pytest.importorskip("httpx", reason="needs httpx, which starlette's TestClient uses")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette announces another client for its tests
    from starlette.testclient import TestClient

HOST = "http://127.0.0.1:8000"


class FakeLM:
    """Writes one note a second, remembers what it was asked, and waits where it is told to.

    While it is `endless` it writes notes until it is stopped.
    """

    def __init__(self, amt: AMTConfig | None = None) -> None:
        self.processor = SimpleNamespace(amt=amt or AMTConfig())
        self.asked: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0
        self.fails: Exception | None = None
        self.warns, self.endless = "", False

    def _begin(self, *, on_note: Callable[[int, Note], None], **asked: Any) -> None:
        self.asked.append(asked)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            assert self.gate.wait(60)
            on_note(0, Note(0, 0.5, 0, 60))
            while self.endless:
                time.sleep(0.01)
                on_note(0, Note(0, 0.5, 0, 60))
        finally:
            self.at_once -= 1
        if self.warns:
            warnings.warn(self.warns, stacklevel=2)
        if self.fails:
            raise self.fails

    def generate(self, prompts: list[str], *, n: int, style: Style, **asked: Any) -> list:
        self._begin(prompts=prompts, n=n, style=style, **asked)
        notes = Notes.of([0, 1, 2], 0.5, [0, 0, 128], [60, 64, 36])
        return [MidiOutput(prompts[0], notes, (), "stop", style) for _ in range(n)]

    def continue_(self, notes: Notes, *, prompt: str, style: Style, **asked: Any) -> MidiOutput:
        self._begin(prompt=prompt, style=style, **asked)
        more = Notes.of([*notes.onset, notes.end], 0.5, [*notes.instrument, 40], [*notes.pitch, 67])
        return MidiOutput(prompt, more, (), "length", style)

    def infill(self, notes: Notes, *, prompt: str, style: Style, **asked: Any) -> MidiOutput:
        self._begin(prompt=prompt, style=style, **asked)
        return MidiOutput(prompt, notes, (), "end_time", style)


@pytest.fixture
def lm() -> FakeLM:
    return FakeLM()


Make = Callable[..., TestClient]


@pytest.fixture
def make(lm: FakeLM) -> Iterator[Make]:
    clients = []

    def made(**named: Any) -> TestClient:
        app = app_module.make_app(named.pop("lm", lm), **{"max_takes": 8, **named})
        client = TestClient(app, base_url=HOST, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield made
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make: Make) -> TestClient:
    return make()


def take(client: TestClient, **wish: Any) -> dict:
    answer = client.post("/api/generate", json={"prompt": "a tune", **wish})
    assert answer.status_code == 200, answer.text
    return answer.json()["takes"][0]


def studio_of(client: TestClient) -> Any:
    app: Any = client.app
    return app.state.studio


def error(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    line = answer.json()["error"]
    assert line
    assert "\n" not in line
    return line


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.text
    assert "http://" not in page
    assert "https://" not in page
    assert "src=" not in page.replace('"data:,"', "")
    for name in ("prompt", "seconds", "temperature", "top_p", "instruments", "key", "seed", "n"):
        assert f'<label for="{name}"' in page
        assert f'id="{name}"' in page
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_every_answer_has_the_headers_of_security(client: TestClient, lm: FakeLM) -> None:
    lm.fails = RuntimeError("inside")
    broken = client.post("/api/generate", json={"prompt": "a tune"})
    assert broken.status_code == 500
    for answer in (
        broken,
        client.get("/"), client.get("/api/health"), client.get("/nothing"),
        client.post("/api/generate", json={}), client.get("/", headers={"host": "evil.example"}),
    ):  # fmt: skip
        for name, value in {
            "x-content-type-options": "nosniff", "x-frame-options": "DENY",
            "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin",
        }.items():  # fmt: skip
            assert answer.headers[name] == value
        assert "content-security-policy" in answer.headers


def test_health(client: TestClient) -> None:
    found = client.get("/api/health").json()
    assert found["status"] == "ok"
    assert found["infill"] is True
    assert found["max_seconds"] == 100
    assert found["max_notes"] == 682
    assert found["sound"] in ("fluidsynth", "preview")
    assert found["seed"] is None


def test_the_seed_that_the_page_begins_with(make: Make) -> None:
    assert make(seed=7).get("/api/health").json()["seed"] == 7


def test_generate_passes_on_what_is_wished(client: TestClient, lm: FakeLM) -> None:
    answer = client.post(
        "/api/generate",
        json={
            "prompt": "Jazz für drei", "seconds": 20, "max_notes": 99, "min_notes": 3, "n": 2,
            "temperature": 0.7, "top_p": 0.9, "seed": 5, "instruments": ["piano", 128],
            "key": "C minor", "tempo": 90, "pitch_range": [40, 80], "max_polyphony": 4,
            "notes_per_second": 8.5,
        },
    )  # fmt: skip
    takes = answer.json()["takes"]
    assert len(takes) == 2
    assert takes[0]["id"] != takes[1]["id"]
    one = takes[0]
    assert one["prompt"] == "Jazz für drei"
    assert one["seconds"] == 2.5
    assert one["notes"] == 3
    assert one["finish_reason"] == "stop"
    assert one["key"] == "C minor"
    assert one["tempo"] == 90
    assert [i["name"] for i in one["instruments"]] == ["acoustic grand piano", "drums"]
    asked = lm.asked[0]
    assert asked["prompts"] == ["Jazz für drei"]
    assert (asked["n"], asked["temperature"], asked["top_p"]) == (2, 0.7, 0.9)
    assert (asked["max_notes"], asked["seed"]) == (99, 5)
    assert asked["constraints"].to_dict() == {
        "instruments": ["piano", 128], "key": "C minor", "pitch_range": (40, 80),
        "max_polyphony": 4, "end_time": 20.0, "notes_per_second": 8.5, "min_notes": 3,
    }  # fmt: skip
    assert asked["style"] == Style(tempo=90, key="C minor")


def test_a_take_can_be_had_as_midi_as_sound_and_as_a_picture(client: TestClient) -> None:
    one = take(client, tempo=90)
    answer = client.get(one["links"]["midi"])
    assert answer.headers["content-type"] == "audio/midi"
    assert one["id"] in answer.headers["content-disposition"]
    notes = read_notes(answer.content)
    assert notes.pitch.tolist() == [60, 64, 36]
    assert notes.instrument.tolist() == [0, 0, 128]
    answer = client.get(one["links"]["wav"])
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.content[:4] == b"RIFF"
    part = client.get(one["links"]["wav"], headers={"range": "bytes=0-99"})
    assert part.status_code == 206  # browsers seek with these
    assert part.content == answer.content[:100]
    answer = client.get(one["links"]["roll"])
    assert answer.headers["content-type"].startswith("image/svg+xml")
    drawing = ET.fromstring(answer.text)  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{space}g/{space}rect")) == 3


def test_continue(client: TestClient, lm: FakeLM) -> None:
    one = take(client, tempo=90, key="D minor")
    answer = client.post("/api/continue", json={"take": one["id"], "seconds": 7, "seed": 3})
    more = answer.json()["takes"][0]
    assert more["notes"] == 4
    assert more["finish_reason"] == "length"
    assert more["prompt"] == "a tune"
    assert lm.asked[1]["seconds"] == 7
    assert lm.asked[1]["style"] == Style(tempo=90, key="D minor")
    assert lm.asked[1]["max_notes"] == 682
    other = {"take": one["id"], "seconds": 7, "prompt": "other"}
    client.post("/api/continue", json=other)
    assert lm.asked[2]["prompt"] == "other"


def test_infill(client: TestClient, lm: FakeLM) -> None:
    one = take(client)
    wish = {"take": one["id"], "start": 1, "end": 2, "keep_instruments": ["drums"]}
    assert client.post("/api/infill", json=wish).json()["takes"][0]["finish_reason"] == "end_time"
    assert lm.asked[1]["start"] == 1
    assert lm.asked[1]["keep_instruments"] == ["drums"]
    assert lm.asked[1]["max_notes"] == 682
    lm.warns = "max_notes is 682, but 100 fit behind the prompt"  # our own limit
    assert client.post("/api/infill", json=wish).json()["remarks"] == []


def test_a_grid_without_controls_has_no_infill(make: Make) -> None:
    client = make(lm=FakeLM(AMTConfig.small()))
    assert client.get("/api/health").json()["infill"] is False
    one = take(client)
    answer = client.post("/api/infill", json={"take": one["id"], "start": 1, "end": 2})
    assert "no controls" in error(answer, 400)


def test_upload_and_go_on(client: TestClient, lm: FakeLM) -> None:
    data = midi([tempo(0, 1_000_000), on(0, 62), off(480, 62)])
    answer = client.post("/api/upload?name=my%20tune.mid", content=data)
    one = answer.json()["takes"][0]
    assert (one["prompt"], one["notes"], one["seconds"]) == ("my tune.mid", 1, 1.0)
    assert one["tempo"] == 60
    assert read_notes(client.get(one["links"]["midi"]).content).pitch.tolist() == [62]
    wish = {"take": one["id"], "seconds": 5, "prompt": "more of it"}
    assert client.post("/api/continue", json=wish).json()["takes"][0]["notes"] == 2
    assert lm.asked[0]["style"].tempo == pytest.approx(60)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, not a MIDI file"),
        (b"hello", "not a MIDI file"),
        (raw(b"\x00\x90\x3c")[:-6], "truncated"),
        (midi([]), "has no notes"),
        (midi([on(0), off(480 * 3600)]), "lasts 1800 s"),
        (midi([m for _ in range(20_001) for m in (on(0), off(1))]), "20001 notes"),
    ],
    ids=["empty", "text", "truncated", "no notes", "long", "many"],
)
def test_wrong_uploads(client: TestClient, data: bytes, message: str) -> None:
    line = error(client.post("/api/upload?name=a.mid", content=data), 400)
    assert message in line
    assert line.startswith("a.mid")


def test_what_an_upload_says_badly_does_not_spoil_the_rest(client: TestClient) -> None:
    metre = mido.MetaMessage("time_signature", numerator=3, denominator=4, time=0)
    key = mido.MetaMessage("key_signature", key="Ebm", time=0)
    slow = tempo(0, 16_777_215)  # less than any Style can say
    data = midi([slow, metre, key, on(0), off(480)])
    one = client.post("/api/upload", content=data).json()["takes"][0]
    studio = studio_of(client)
    assert studio.take(one["id"]).style == Style(time_signature=(3, 4), key="Eb minor")


def test_a_form_is_no_upload(client: TestClient) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert "not as a form" in error(client.post("/api/upload", content=b"x", headers=kind), 415)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 4001}, "4001 characters"),
        ({"prompt": 5}, "prompt: "),
        ({"prompt": "a", "seconds": 0}, "seconds must be over 0"),
        ({"prompt": "a", "seconds": 101}, "at most 100"),
        ({"prompt": "a", "n": 5}, "n must be 1 to 4"),
        ({"prompt": "a", "max_notes": 683}, "max_notes must be 1 to 682"),
        ({"prompt": "a", "temperature": -1}, "temperature must be"),
        ({"prompt": "a", "temperature": "hot"}, "temperature: "),
        ({"prompt": "a", "top_p": 0}, "top_p must be"),
        ({"prompt": "a", "key": "H minor"}, "is no key"),
        ({"prompt": "a", "instruments": ["pianno"]}, "no instrument of General MIDI"),
        ({"prompt": "a", "instruments": []}, "instruments is empty"),
        ({"prompt": "a", "instruments": "piano"}, "instruments: "),
        ({"prompt": "a", "tempo": 2}, "tempo must be"),
        ({"prompt": "a", "seed": 2**63}, "seed must be"),
        ({"prompt": "a", "seed": 10**400}, "seed"),
        ({"prompt": "a", "pitch_range": [80, 40]}, "pitch_range must be two pitches"),
        ({"prompt": "a", "min_notes": -1}, "min_notes must be"),
        ({"prompt": "a", "temperatures": 1}, "Did you mean 'temperature'?"),
        ([], "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "wish",
)
def test_wrong_wishes(client: TestClient, lm: FakeLM, wish: Any, message: str) -> None:
    assert message in error(client.post("/api/generate", json=wish), 400)
    assert not lm.asked


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"prompt": "a", "temperature": NaN}',
     b'{"prompt": "a", "seconds": Infinity}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "bytes", "deep", "nan", "infinite", "digits"],
)  # fmt: skip
def test_bodies_that_are_no_wish(client: TestClient, lm: FakeLM, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    error(client.post("/api/generate", content=body, headers=kind), 400)
    assert not lm.asked


def test_a_body_that_is_not_called_json_is_refused(client: TestClient, lm: FakeLM) -> None:
    """Other sites' forms can send text/plain without asking first."""
    kind = {"content-type": "text/plain"}
    answer = client.post("/api/generate", content=b'{"prompt": "a"}', headers=kind)
    assert "application/json" in error(answer, 400)
    assert not lm.asked


def test_wrong_continuations(client: TestClient) -> None:
    one = take(client)
    for wish, status, message in (
        ({"take": "none", "seconds": 5}, 404, "there is no take 'none'"),
        ({"take": one["id"], "seconds": 0}, 400, "seconds must be over 0"),
        ({"take": one["id"], "seconds": 500}, 400, "at most 120"),
        ({"take": one["id"], "seconds": 5, "prompt": ""}, 400, "the prompt is empty"),
        ({"take": one["id"]}, 400, "seconds is missing"),
        ({"take": one["id"], "seconds": 5, "key": "X"}, 400, "is no key"),
    ):
        assert message in error(client.post("/api/continue", json=wish), status)
    data = midi([on(0), off(960 * 885)])  # 885 s
    long = client.post("/api/upload", content=data).json()["takes"][0]
    wish = {"take": long["id"], "seconds": 50}
    assert "longer than 890 s" in error(client.post("/api/continue", json=wish), 400)


def test_what_is_not_there(client: TestClient) -> None:
    for path in ("/api/takes/none.mid", "/api/takes/none.wav", "/api/takes/none.svg"):
        assert "there is no take" in error(client.get(path), 404)
    for path in ("/nothing", "/docs", "/api/takes/..%2f..%2fetc%2fpasswd.mid"):
        error(client.get(path), 404)
    error(client.get("/api/generate"), 405)


def test_the_oldest_takes_go(make: Make) -> None:
    client = make(max_takes=4)
    takes = [take(client) for _ in range(4)]
    studio = studio_of(client)
    client.get(takes[0]["links"]["wav"])
    assert len(list(studio.folder.iterdir())) == 5
    take(client)
    for kind in ("midi", "wav", "roll"):
        error(client.get(takes[0]["links"][kind]), 404)
        assert client.get(takes[1]["links"][kind]).status_code == 200
    assert len(list(studio.folder.iterdir())) == 5


def test_files_of_takes_go_with_the_server(lm: FakeLM) -> None:
    app = app_module.make_app(lm)  # pyright: ignore[reportArgumentType]
    with TestClient(app, base_url=HOST) as client:
        take(client)
        folder = app.state.studio.folder
        assert len(list(folder.iterdir())) == 1
    assert not folder.exists()


def test_without_sound(make: Make) -> None:
    client = make(render=False)
    assert client.get("/api/health").json()["sound"] == "none"
    one = take(client)
    assert "wav" not in one["links"]
    assert "without sound" in error(client.get(f"/api/takes/{one['id']}.wav"), 404)


def test_without_fluidsynth_the_sound_is_a_preview(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        client = make()
    assert "preview" in caplog.text
    assert client.get("/api/health").json()["sound"] == "preview"
    assert client.get(take(client)["links"]["wav"]).content[:4] == b"RIFF"


def test_a_preview_has_no_endless_tones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio_module, "choose_engine", lambda *_: ("preview", "for this test"))
    heard = []
    monkeypatch.setattr(
        studio_module, "to_wav",
        lambda source, *a, **named: (heard.append(source.notes), to_wav(source, *a, **named)),
    )  # fmt: skip
    client = make()
    data = midi([on(0, 60), on(0, 62), off(960, 62), off(960 * 29, 60)])
    one = client.post("/api/upload", content=data).json()["takes"][0]
    assert one["seconds"] == 30
    assert client.get(one["links"]["wav"]).status_code == 200
    assert sorted(heard[0].duration) == [1, 10]


def evict(studio: Any) -> None:
    for _ in range(studio.max_takes):
        studio.add("", Notes.of([0], 1, 0, 60), "stop", Style())


@pytest.mark.parametrize("name", ["to_wav", "piano_roll_svg"])
def test_a_take_that_goes_while_it_is_made(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    client = make(max_takes=4)
    studio = studio_of(client)
    one = take(client)
    original = getattr(studio_module, name)

    def late(*arguments: Any, **named: Any) -> Any:
        evict(studio)
        return original(*arguments, **named)

    monkeypatch.setattr(studio_module, name, late)
    answer = client.get(one["links"]["wav" if name == "to_wav" else "roll"])
    assert "there is no take" in error(answer, 404)
    assert len(list(studio.folder.iterdir())) == 4


@pytest.mark.parametrize("kind", ["midi", "wav"])
def test_a_take_that_goes_before_it_is_sent(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    client = make(max_takes=4)
    studio = studio_of(client)
    one = take(client)
    original = studio.path

    def late(take: Any, kind: str) -> Path:
        if sys._getframe(1).f_code.co_name == "file":
            monkeypatch.setattr(studio, "path", original)
            evict(studio)
        return original(take, kind)

    monkeypatch.setattr(studio, "path", late)
    assert "there is no take" in error(client.get(one["links"][kind]), 404)


def test_a_sound_that_fails_of_a_take_that_is_gone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(max_takes=4)
    studio = studio_of(client)

    def fails(*_: Any, **__: Any) -> None:
        raise UserError("FluidSynth failed")

    monkeypatch.setattr(studio_module, "to_wav", fails)
    one = take(client)
    assert "no sound: FluidSynth failed" in error(client.get(one["links"]["wav"]), 500)
    monkeypatch.setattr(studio_module, "to_wav", lambda *_, **__: (evict(studio), fails()))
    assert "there is no take" in error(client.get(one["links"]["wav"]), 404)


# One at a time


def in_threads(jobs: list[Callable[[], Any]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    return threads


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_at_a_time_and_a_full_queue_turns_away(make: Make, lm: FakeLM) -> None:
    client = make(max_queue=2)
    lm.gate.clear()
    answers: list[Any] = []
    wish = {"prompt": "a tune"}
    jobs = [lambda: answers.append(client.post("/api/generate", json=wish))] * 3
    threads = in_threads(jobs)
    until(lambda: client.get("/api/health").json()["pending"] == 3)
    answer = client.post("/api/generate", json=wish)
    assert "3 requests are waiting" in error(answer, 503)
    assert 1 <= int(answer.headers["retry-after"]) <= 600
    # What is wrong is said at once, and nothing else has to wait either.
    error(client.post("/api/generate", json={"prompt": ""}), 400)
    assert client.get("/").status_code == 200
    lm.gate.set()
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200] * 3
    assert lm.most_at_once == 1
    until(lambda: client.get("/api/health").json()["pending"] == 0)
    take(client)


@pytest.mark.parametrize("what", ["piano_roll_svg", "to_wav", "read_piece"])
def test_pictures_sounds_and_uploads_wait_in_lines_too(
    make: Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(studio_module, "_DRAWN", 0)
    monkeypatch.setattr(studio_module, "_RENDERED", 0)
    client = make()
    links = take(client)["links"]
    gate, begun = threading.Event(), threading.Event()
    original = getattr(studio_module, what)

    def held(*arguments: Any, **named: Any) -> Any:
        begun.set()
        assert gate.wait(30)
        return original(*arguments, **named)

    monkeypatch.setattr(studio_module, what, held)

    def once() -> Any:
        if what == "read_piece":
            return client.post("/api/upload", content=midi([on(0), off(480)]))
        return client.get(links["wav" if what == "to_wav" else "roll"])

    answers: list[Any] = []
    [thread] = in_threads([lambda: answers.append(once())])
    try:
        assert begun.wait(30)
        assert "1 requests are waiting" in error(once(), 503)
        take(client)  # music has a line of its own
    finally:
        gate.set()
        thread.join()
    assert answers[0].status_code == 200
    assert once().status_code == 200


@contextmanager
def served(lm: Any, host: str = "127.0.0.1", **named: Any) -> Iterator[str]:
    """Serve for real, over a socket; yields the address."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs midi-llm[serve]")
    servers, addresses = [], []
    original = uvicorn.Server.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            uvicorn.Server, "__init__",
            lambda self, config: (original(self, config), servers.append(self))[0],
        )  # fmt: skip
        [thread] = in_threads(
            [lambda: app_module.serve(lm, host, 0, ready=addresses.append, **named)]
        )
        try:
            until(lambda: bool(servers) and servers[0].started)
            yield addresses[0].replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        finally:
            for server in servers:
                server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def ask(address: str, path: str, wish: dict[str, Any] | None = None, timeout: float = 60) -> Any:
    """Ask a server for music, or for something else if there is no wish."""
    import httpx

    with httpx.Client(base_url=address, trust_env=False, timeout=timeout) as client:
        return client.post(path, json=wish) if wish else client.get(path)


def health(address: str) -> dict[str, Any]:
    return ask(address, "/api/health").json()


def give_up(address: str, path: str, wish: dict[str, Any]) -> None:
    """Ask for music and go away before it comes."""
    import httpx

    with pytest.raises(httpx.ReadTimeout):
        ask(address, path, wish, timeout=0.5)


def test_what_nobody_waits_for_is_not_written(lm: FakeLM) -> None:
    with served(lm) as address:
        first = {"prompt": "first"}
        id = ask(address, "/api/generate", first).json()["takes"][0]["id"]
        assert health(address)["notes"] == 1
        lm.endless = True
        for path, wish in (
            ("/api/generate", first),
            ("/api/continue", {"take": id, "seconds": 5}),
            ("/api/infill", {"take": id, "start": 1, "end": 2}),
        ):
            give_up(address, path, wish)
            until(lambda: health(address)["pending"] == 0)
            assert health(address)["notes"] > 5
            assert lm.at_once == 0
        # One that waits leaves the line, though the piece before it goes on.
        answers: list[Any] = []
        [thread] = in_threads([lambda: answers.append(ask(address, "/api/generate", first))])
        until(lambda: lm.at_once == 1)
        give_up(address, "/api/generate", {"prompt": "second"})
        until(lambda: health(address)["pending"] == 1)
        assert lm.at_once == 1
        lm.endless = False
        thread.join(30)
        assert answers[0].status_code == 200
        assert lm.asked[-1]["prompts"] == ["first"]


def test_a_server_that_ends_waits_for_no_piece(lm: FakeLM) -> None:
    lm.endless = True
    answers: list[Any] = []
    with served(lm) as address:
        threads = in_threads(
            [lambda: answers.append(ask(address, "/api/generate", {"prompt": "a"}))] * 2
        )
        until(lambda: health(address)["pending"] == 2)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    for thread in threads:
        thread.join(30)
    assert [error(answer, 503) for answer in answers] == ["the server is shutting down"] * 2
    until(lambda: lm.at_once == 0)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_ends_a_long_piece(name: str) -> None:
    pytest.importorskip("uvicorn", reason="needs midi-llm[serve]")
    program = (
        "from test_app import FakeLM, app_module\n"
        "lm = FakeLM()\n"
        "lm.endless = True\n"
        "app_module.serve(lm, port=0, ready=lambda address: print(address, flush=True))\n"
    )
    answers: list[Any] = []
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            [thread] = in_threads(
                [lambda: answers.append(ask(address, "/api/generate", {"prompt": "a"}))]
            )
            until(lambda: health(address)["notes"] > 3)
            start = time.monotonic()
            process.send_signal(getattr(signal, name))
            process.wait(20)
            assert time.monotonic() - start < 5
            thread.join(30)
            error(answers[0], 503)
        finally:
            process.kill()


def test_errors_of_the_model_are_told(
    client: TestClient, lm: FakeLM, caplog: pytest.LogCaptureFixture
) -> None:
    wish = {"prompt": "a tune"}
    lm.fails = UserError("a prompt has 900 ids; shorten the prompt")
    assert "shorten" in error(client.post("/api/generate", json=wish), 400)
    lm.fails = RuntimeError("secret of the inside")
    line = error(client.post("/api/generate", json=wish), 500)
    assert "secret" not in line
    lm.fails = type("OutOfMemoryError", (RuntimeError,), {})("CUDA")
    assert "out of memory" in error(client.post("/api/generate", json=wish), 503)
    lm.fails = None
    take(client)


def test_warnings_become_remarks(client: TestClient, lm: FakeLM) -> None:
    lm.warns = "max_notes is 600, but 100 fit behind the prompt"
    answer = client.post("/api/generate", json={"prompt": "a", "max_notes": 600}).json()
    assert answer["remarks"] == [lm.warns]
    assert client.post("/api/generate", json={"prompt": "a"}).json()["remarks"] == []


# Who may ask, and how much


def test_another_name_of_this_machine_is_refused(client: TestClient, lm: FakeLM) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:80"):
        answer = client.get("/api/health", headers={"host": host})
        assert "127.0.0.1" in error(answer, 403)
    for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000"):
        assert client.get("/api/health", headers={"host": host}).status_code == 200
    assert not lm.asked


def test_any_name_where_all_are_served(make: Make) -> None:
    client = make(hosts=None)
    assert client.get("/api/health", headers={"host": "my.server"}).status_code == 200


def test_pages_of_other_sites_are_refused(client: TestClient, lm: FakeLM) -> None:
    wish = {"prompt": "a tune"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "http://["):
        answer = client.post("/api/generate", json=wish, headers={"origin": origin})
        assert "other sites" in error(answer, 403)
    assert not lm.asked
    answer = client.post("/api/generate", json=wish, headers={"origin": HOST})
    assert answer.status_code == 200


def test_large_bodies_are_refused(make: Make, lm: FakeLM) -> None:
    client = make(max_upload=1000)
    assert "at most 1000 bytes" in error(client.post("/api/upload", content=b"x" * 1001), 413)
    wish = {"prompt": "x" * 70_000}
    assert "at most 65536 bytes" in error(client.post("/api/generate", json=wish), 413)
    in_parts = (b"x" * 500 for _ in range(10**6))  # no length is announced
    assert "at most 1000" in error(client.post("/api/upload", content=in_parts), 413)
    assert not lm.asked


def through_guard(receive: Callable[[], Any], headers: list[tuple[bytes, bytes]]) -> int:
    async def never(*_: Any) -> None:
        raise AssertionError("the request was let through")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    guard = app_module.Guard(never, hosts=None, max_upload=10, policy="")
    scope = {"type": "http", "method": "POST", "path": "/api/upload", "headers": headers}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


def test_bodies_that_never_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_PATIENCE", 0.05)

    async def silence() -> None:
        await asyncio.sleep(100)

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert through_guard(silence, []) == 408
    assert through_guard(gone, []) == 400
    assert through_guard(gone, [(b"content-length", b"-1")]) == 413
    assert through_guard(gone, [(b"content-length", b"9" * 30)]) == 413


# Starting


@pytest.mark.parametrize(
    "named", [{"max_queue": -1}, {"max_notes": 0}, {"max_takes": 1}, {"max_upload": True}]
)
def test_wrong_numbers(lm: FakeLM, named: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be a whole number"):
        app_module.make_app(lm, **named)  # pyright: ignore[reportArgumentType]


def test_loopback() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert app_module.is_loopback(host)
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.org", ""):  # noqa: S104
        assert not app_module.is_loopback(host)


def test_a_port_that_is_taken_is_one_line(lm: FakeLM) -> None:
    pytest.importorskip("uvicorn", reason="needs midi-llm[serve]")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*choose another port"):
            app_module.serve(lm, port=port)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="port must be"):
        app_module.serve(lm, port=70_000)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_serve(lm: FakeLM, caplog: pytest.LogCaptureFixture, host: str) -> None:
    """Another address than this machine's is warned of."""
    import httpx

    with caplog.at_level(logging.WARNING), served(lm, host) as address:
        found = ask(address, "/api/health")
        assert found.json()["status"] == "ok"
        assert "server" not in found.headers
        strange = httpx.get(f"{address}", headers={"host": "evil.example"}, trust_env=False)
        assert strange.status_code == (403 if host == "127.0.0.1" else 200)
    assert ("no password" in caplog.text) == (host != "127.0.0.1")


def test_a_real_model_behind_the_page() -> None:
    from tiny_model import tiny_lm

    with TestClient(app_module.make_app(tiny_lm()), base_url=HOST) as client:
        one = take(client, seconds=5, key="C major", instruments=["piano"], seed=1)
        notes = read_notes(io.BytesIO(client.get(one["links"]["midi"]).content).getvalue())
        assert len(notes) == one["notes"] > 0
        assert set(notes.pitch.tolist()) <= {
            p for p in range(128) if p % 12 in (0, 2, 4, 5, 7, 9, 11)
        }
        assert notes.end <= 5.01
        wish = {"take": one["id"], "seconds": 5, "seed": 2}
        more = client.post("/api/continue", json=wish).json()["takes"][0]
        assert more["seconds"] >= one["seconds"]
        long = {"prompt": "word " * 600}
        assert "shorten the prompt" in error(client.post("/api/generate", json=long), 400)
