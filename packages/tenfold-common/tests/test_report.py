import base64
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tenfold_common import Claim, Figure, Result, Sample, Table, UserError, html_report
from tenfold_common.report import main, summary_text

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = "<script>alert(1)</script>\"'&<b>"


def result(package="path-attn", passed=True, **changes) -> Result:
    made = Result(
        package=package,
        title="Flip-flop",
        summary="It remembers.",
        seeds=[0, 1],
        claims=[
            Claim("sparse error", "under 1 %", 0.25, "< 1", passed, "%", 0.75),
            Claim("dense error", "under 1 %", 0.5, "< 1", True, "%"),
        ],
        tables=[Table("Errors", ["model", "error"], [["PaTH", 0.123456], ["RoPE", None]])],
        seconds=1.54,
        environment={"cpu": "Some CPU", "gpu": None},
    )
    return dataclasses.replace(made, **changes)


class Page(HTMLParser):
    """Checks that tags are balanced and collects tags, attributes and texts."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def test_the_page_is_self_contained_and_balanced(tmp_path):
    (tmp_path / "f.png").write_bytes(PNG)
    (tmp_path / "s.wav").write_bytes(b"RIFF")
    figures = [Figure("f.png", "A map"), Figure("s.wav", "A tune")]
    page = html_report([(result(figures=figures), tmp_path), (result("rlcr"), tmp_path)])
    seen = Page(page)
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|<script|<link|url\(|@import", page)
    assert [a["src"] for a in seen.all("img")] == [
        "data:image/png;base64," + base64.b64encode(PNG).decode()
    ]
    assert seen.all("img")[0]["alt"] == "A map"
    assert seen.all("audio")[0]["src"] == "data:audio/wav;base64,UklGRg=="
    assert seen.all("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in page
    targets = {a["href"].removeprefix("#") for a in seen.all("a")}
    assert targets == {a["id"] for a in seen.all("section")} == {"r0", "r1"}
    tables, boxes = seen.all("table"), [a for a in seen.all("div") if a["class"] == "scroll"]
    assert len(tables) == len(boxes) == 7
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_the_summary_comes_first_and_says_what_failed(tmp_path):
    page = html_report([(result(), tmp_path), (result("rlcr", passed=False), tmp_path)])
    texts = Page(page).texts
    assert "1 of 2 packages hold what they claim." in texts
    assert texts.index("expected") < texts.index("Flip-flop")
    summary = page[page.index("<table>") : page.index("</table>")]
    assert summary.count('class="PASS"') == 3
    assert summary.count('class="FAIL"') == 1
    assert "1.5" in summary


def test_one_package_is_singular_and_no_claim_is_a_failure(tmp_path):
    texts = Page(html_report([(result(), tmp_path)])).texts
    assert "1 of 1 package holds what it claims." in texts
    texts = Page(html_report([(result(claims=[]), tmp_path)])).texts
    assert "0 of 1 package holds what it claims." in texts
    assert "no claim was checked" in texts
    assert "Where this ran" in texts
    bare = Page(html_report([(result(environment={}), tmp_path)])).texts
    assert "Where this ran" not in bare


def test_every_text_is_escaped(tmp_path):
    (tmp_path / "f.png").write_bytes(PNG)
    evil = Result(
        package=EVIL,
        title=EVIL,
        summary=EVIL,
        seeds=[],
        claims=[Claim(EVIL, EVIL, 1.0, EVIL, True, EVIL)],
        tables=[Table(EVIL, [EVIL], [[EVIL]])],
        figures=[Figure("f.png", EVIL)],
        samples=[Sample(EVIL, EVIL)],
        notes=[EVIL],
        environment={EVIL: EVIL},
    )
    page = html_report([(evil, tmp_path)])
    seen = Page(page)
    tags = {tag for tag, _ in seen.seen}
    assert not tags & {"script", "b"}
    assert {name for _, attributes in seen.seen for name in attributes} <= {
        *("alt", "aria-label", "charset", "class", "content", "href", "http-equiv", "id", "lang"),
        *("name", "role", "scope", "src", "tabindex"),
    }
    assert seen.texts.count(EVIL) >= 12


def test_numbers_are_aligned_and_shortened(tmp_path):
    rows = [["PaTH", 0.123456, 3], ["RoPE", None, True]]
    table = Table("t", ["model", "error", "mixed"], rows)
    page = html_report([(result(tables=[table], claims=[]), tmp_path)])
    assert '<td class="num">0.1235</td>' in page
    assert '<td class="num">-</td>' in page
    assert "<td >3</td>" in page
    assert "<td >yes</td>" in page


def test_a_figure_that_cannot_be_shown_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"f\.png' cannot be read: No such file"):
        html_report([(result(figures=[Figure("f.png", "")]), tmp_path)])
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "f.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="lies outside"):
        html_report([(result(figures=[Figure("f.png", "")]), tmp_path / "inner")])


def test_summary_text_lines_up():
    assert summary_text([result(), result("rlcr", claims=[])]) == (
        "package    claim                 measured  expected      result  seconds\n"
        "---------  --------------------  --------  ------------  ------  -------\n"
        "path-attn  sparse error          0.25 %    < 1           PASS    1.5\n"
        "path-attn  dense error           0.5 %     < 1           PASS\n"
        "rlcr       no claim was checked  0         at least one  FAIL    1.5\n"
    )


def collect(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tenfold_common.report", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_collects_writes_and_passes(tmp_path):
    result().save(tmp_path / "path-attn")
    result("rlcr").save(tmp_path / "rlcr")
    done = collect(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{summary_text([result(), result('rlcr')])}\n{tmp_path / 'index.html'}\n"
    places = [(result(), tmp_path / "path-attn"), (result("rlcr"), tmp_path / "rlcr")]
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == html_report(places)


def test_the_command_fails_with_one_failed_claim(tmp_path):
    result().save(tmp_path / "path-attn")
    result("rlcr", passed=False).save(tmp_path / "rlcr")
    done = collect(tmp_path)
    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert (tmp_path / "index.html").exists()


def test_the_command_in_this_process(tmp_path, capsys):
    result().save(tmp_path / "path-attn")
    assert main([str(tmp_path)]) == 0
    assert "sparse error" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "{}", '{"schema": "tenfold-result/1"}'])
def test_nothing_or_junk_is_one_line_and_exit_code_2(tmp_path, content):
    if content is not None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "result.json").write_text(content)
    done = collect(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "result.json" in done.stderr
