"""The page in a real browser: Debian's Chromium without a screen, driven by Playwright."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from midi_files import midi, off, on
from tiny_model import tiny_lm

from midi_llm.app import make_app
from midi_llm.decode import MidiLM, OnNote
from midi_llm.midi_read import read_notes
from midi_llm.notes import Note
from midi_llm.vocab import AMTConfig

uvicorn = pytest.importorskip("uvicorn", reason="needs midi-llm[serve]")
pytest.importorskip("fastapi", reason="needs midi-llm[serve]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium"),
]
PATIENCE = 60_000  # milliseconds


@contextmanager
def served(lm: MidiLM | None = None, **named: Any) -> Iterator[str]:
    """The page of a model, by default of random weights, on a free port; yields its address."""
    config = uvicorn.Config(make_app(lm or tiny_lm(), **named), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, address: str) -> Iterator[Any]:
    """A page; the test fails if it complains, or asks for anything that is not from the server."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    complaints, strangers = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text)
            if message.type == "error" and "status of 4" not in message.text
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((address, "data:")) else strangers.append(request.url)
        ),
    )
    page.goto(address)
    wait(page, "about.status === 'ok'")
    yield page
    context.close()
    assert not complaints
    assert not strangers


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as found:
        yield found


def wait(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; Playwright's own way is barred by the page's policy."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def compose(page: Any, *, takes: int = 1, seconds: int = 6) -> Any:
    """Type, press the button, and return the newest take."""
    page.get_by_label("What should it sound like?").fill("a calm piano piece")
    page.get_by_label("Takes", exact=True).fill(str(takes))
    page.get_by_label("Length").fill(str(seconds))
    before = page.locator("article").count()
    page.get_by_role("button", name="Generate").click()
    wait(page, f"document.querySelectorAll('article').length === {before + takes}")
    return page.locator("article").first


def test_type_generate_see_hear_and_keep(page: Any, tmp_path: Path) -> None:
    page.get_by_label("Only these instruments").fill("piano, drums")
    page.get_by_label("Key").fill("C major")
    take = compose(page)
    assert page.locator("#error").is_hidden()
    assert take.locator(".text").inner_text() == "a calm piano piece"
    # The roll is there.
    wait(page, "document.querySelector('article img').naturalWidth > 0")
    roll = take.get_by_role("img")
    assert "Piano roll of Take 1" in roll.get_attribute("alt")
    assert roll.bounding_box()["width"] > 300
    assert "acoustic grand piano" in take.locator(".legend").inner_text()
    # It sounds.
    take.get_by_role("button", name="Play").click()
    wait(page, "document.querySelector('audio').currentTime > 0.3")
    take.get_by_role("button", name="Pause").click()
    first = page.evaluate("document.querySelector('audio').currentTime")
    assert page.evaluate("document.querySelector('audio').duration") > 3
    assert page.evaluate("document.querySelector('audio').paused")
    assert float(take.get_by_label("Position in Take 1").input_value()) == pytest.approx(
        first, abs=0.3
    )
    # It can be kept.
    with page.expect_download() as download:
        take.get_by_role("link", name="Download .mid").click()
    assert download.value.suggested_filename.endswith(".mid")
    file = tmp_path / "a.mid"
    download.value.save_as(file)
    notes = read_notes(file)
    assert f"{len(notes)} notes" in take.locator(".top").inner_text()
    pitched = notes.pitch[notes.instrument != 128]
    assert set((pitched % 12).tolist()) <= {0, 2, 4, 5, 7, 9, 11}
    assert set(notes.instrument.tolist()) <= {0, 128}


def test_a_click_on_the_roll_plays_from_there(page: Any) -> None:
    take = compose(page)
    length = float(take.locator(".bar input").get_attribute("max"))
    box = take.locator(".roll").bounding_box()
    take.locator(".roll").click(position={"x": box["width"] / 2, "y": 20})
    wait(page, f"document.querySelector('audio').currentTime > {length / 2 + 0.2}")
    assert page.evaluate("document.querySelector('.head').style.left") > "50%"


def test_only_one_take_plays(page: Any) -> None:
    compose(page, takes=2)
    takes = page.locator("article")
    assert page.locator("article h2").all_inner_texts() == ["Take 1", "Take 2"]
    takes.nth(0).get_by_role("button", name="Play").click()
    wait(page, "document.querySelectorAll('audio')[0].currentTime > 0.1")
    takes.nth(1).get_by_role("button", name="Play").click()
    wait(page, "document.querySelectorAll('audio')[1].currentTime > 0.1")
    assert page.evaluate("document.querySelectorAll('audio')[0].paused")


def test_wrong_input_is_told_and_can_be_mended(page: Any) -> None:
    error = page.get_by_role("alert")
    page.get_by_role("button", name="Generate").click()
    error.wait_for()
    assert "the prompt is empty" in error.inner_text()
    page.get_by_label("What should it sound like?").fill("a calm piano piece")
    for label, wrong, message, right in (
        ("Key", "H minor", "is no key", ""),
        ("Only these instruments separated by commas", "pianno", "no instrument", ""),
        ("Tempo of the bar lines", "fast", "Tempo must be a number", ""),
        ("Seed equal ones repeat", "1.5", "Seed must be a whole number", "1"),
        ("Takes", "9", "n must be 1 to 4", "1"),
    ):
        page.get_by_label(label, exact=True).fill(wrong)
        page.get_by_role("button", name="Generate").click()
        sync_api.expect(error).to_contain_text(message, timeout=PATIENCE)
        assert page.get_by_role("button", name="Generate").is_enabled()
        page.get_by_label(label, exact=True).fill(right)
    assert page.locator("article").count() == 0
    compose(page)
    assert error.is_hidden()


def test_the_button_says_that_it_works(page: Any) -> None:
    page.route("**/api/generate", lambda route: None)  # held back
    page.get_by_label("What should it sound like?").fill("a calm piano piece")
    page.get_by_role("button", name="Generate").click()
    button = page.locator("#go")
    sync_api.expect(button).to_have_text("Working\u2026")
    assert button.is_disabled()
    assert "Composing" in page.locator("#status").inner_text()


def test_cancel_ends_the_piece_and_shows_how_far_it_is(
    browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm()

    def endless(*_: Any, on_note: OnNote, **__: Any) -> Any:
        while True:
            time.sleep(0.02)
            on_note(0, Note(0, 1, 0, 60))

    monkeypatch.setattr(lm, "generate", endless)
    with served(lm) as address, opened(browser, address) as page:
        cancel = page.get_by_role("button", name="Cancel")
        assert cancel.is_hidden()
        page.get_by_label("What should it sound like?").fill("a calm piano piece")
        page.get_by_role("button", name="Generate").click()
        sync_api.expect(page.locator("#progress")).to_contain_text("notes so far", timeout=PATIENCE)
        cancel.click()
        wait(page, "!busy")
        assert cancel.is_hidden()
        assert page.locator("#progress").is_hidden()
        assert page.locator("#error").is_hidden()
        assert page.locator("article").count() == 0
        health = f"{address}api/health"
        start = time.monotonic()
        while page.request.get(health).json()["pending"]:
            assert time.monotonic() - start < 5
        monkeypatch.undo()
        compose(page)


def test_the_page_begins_with_the_seed_of_the_server(browser: Any) -> None:
    with served(seed=7) as address, opened(browser, address) as page:
        assert page.get_by_label("Seed").input_value() == "7"
        assert compose(page).locator(".top p").inner_text().endswith("seed 7")


def test_a_seed_repeats_a_take_and_none_is_new(page: Any) -> None:
    def played(seed: str) -> bytes:
        page.get_by_label("Seed").fill(seed)
        link = compose(page).locator(".midi").get_attribute("href")
        return page.request.get(page.url.rstrip("/") + link).body()

    assert played("7") == played("7")
    assert played("") != played("")
    shown = page.locator("article .top p").all_inner_texts()
    assert [text.endswith("seed 7") for text in shown] == [False, False, True, True]


def test_examples_fill_the_prompt(page: Any) -> None:
    page.get_by_role("group", name="Example prompts").get_by_role("button").first.click()
    text = page.get_by_label("What should it sound like?").input_value()
    assert "piano" in text


def test_continue(page: Any) -> None:
    compose(page, seconds=4)
    page.locator("article .for").fill("3")
    page.get_by_role("button", name="Continue Take 1").click()
    wait(page, "document.querySelectorAll('article').length === 2")
    newest, oldest = (
        float(page.locator("article").nth(i).locator(".bar input").get_attribute("max"))
        for i in (0, 1)
    )
    assert newest >= oldest


def test_upload(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "<b>my tune.mid"
    file.write_bytes(midi([on(0, 62), off(480, 62)]))
    page.locator("#file").set_input_files(file)
    page.locator("article").wait_for()
    assert page.locator("article .text").inner_text() == file.name
    broken = tmp_path / "b.mid"
    broken.write_bytes(b"no midi")
    page.locator("#file").set_input_files(broken)
    sync_api.expect(page.get_by_role("alert")).to_contain_text("not a MIDI file")
    large = tmp_path / "c.mid"
    large.write_bytes(b"x" * (2**20 + 1))
    page.locator("#file").set_input_files(large)
    sync_api.expect(page.get_by_role("alert")).to_contain_text("at most 1048576")


def test_a_span_is_rewritten_where_the_grid_has_controls(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        compose(page, seconds=4)
        assert page.get_by_role("button", name="Rewrite").count() == 0
    amt = AMTConfig(20, 20, 4, 17, 128, True)
    with served(tiny_lm(amt)) as other, opened(browser, other) as page:
        compose(page, seconds=4)
        page.locator(".from").fill("1")
        page.locator(".to").fill("3")
        page.get_by_role("button", name="Rewrite a span of Take 1").click()
        wait(page, "document.querySelectorAll('article').length === 2")


def test_a_small_screen_needs_no_sideways_scrolling(page: Any) -> None:
    compose(page)
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_every_control_has_a_name(page: Any) -> None:
    compose(page)
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button, a')].filter((e) =>
        !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()
        ).map((e) => e.outerHTML)"""
    )
    assert nameless == []
