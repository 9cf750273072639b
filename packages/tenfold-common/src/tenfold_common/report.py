"""One page for all results: `python -m tenfold_common.report DIR` reads DIR/*/result.json.

It prints a summary table, writes DIR/index.html and exits with 1 if a claim failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tenfold_common import __version__
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError
from tenfold_common.results import (
    Claim,
    Figure,
    Result,
    Table,
    pass_word,
    show_cell,
    show_measured,
)

_CSS = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2128; --soft: #59636e; --line: #d5dae0;
  --head: #f4f6f8; --link: #0a58b8; --good: #116329; --goodbg: #dcf5e3; --bad: #a40e26;
  --badbg: #ffe3e3; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171c; --fg: #e4e8ec; --soft: #9aa4af;
  --line: #343b44; --head: #1e232a; --link: #7ab7ff; --good: #7ee2a0; --goodbg: #12351f;
  --bad: #ff9aa2; --badbg: #4a161c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.35rem; margin: 0 0 .2rem; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } a { color: var(--link); }
section { margin-top: 3rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top; overflow-wrap: normal; }
th { background: var(--head); font-weight: 600; white-space: nowrap; }
tr + tr td, thead + tbody td { border-top: 1px solid var(--line); }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.PASS, .FAIL { display: inline-block; padding: 0 .55rem; border-radius: 1rem; font-size: .8rem;
  font-weight: 700; } .PASS { color: var(--good); background: var(--goodbg); }
.FAIL { color: var(--bad); background: var(--badbg); }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: 6px; } audio { width: 100%; }
pre { overflow-x: auto; background: var(--head); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; white-space: pre-wrap;
  font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--soft); } details { margin-top: 1.2rem; }
"""
_MEDIA = {".png": "image/png", ".wav": "audio/wav"}


def html_report(results: Sequence[tuple[Result, Path]]) -> str:
    """Make one self-contained page: a summary of all claims, then a section for each result.

    Pictures and sounds are embedded; nothing is fetched and nothing runs. All texts are escaped.

    Args:
        results: Each result with the folder that its figures are relative to.

    Returns:
        The HTML document.

    Raises:
        UserError: a figure cannot be read, or lies outside its folder.
    """
    good = sum(result.passed for result, _ in results)
    word = "package holds what it claims" if len(results) == 1 else "packages hold what they claim"
    rows = [
        [
            f'<a href="#r{i}">{_escape(result.package)}</a>',
            *_claim_cells(claim, full=False),
            seconds,
        ]
        for i, (result, _) in enumerate(results)
        for claim, seconds in _claims_and_seconds(result)
    ]
    head = ["package", "claim", "measured", "expected", "result", "seconds"]
    sections = "".join(
        _section(i, result, Path(place)) for i, (result, place) in enumerate(results)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>Results</title><style>{_CSS}</style></head>
<body><main><h1>Results</h1>
<p>{_badge(good == len(results))} {good} of {len(results)} {word}.</p>
{_table("Summary of all claims", head, rows, numeric={2, 5})}{sections}
</main></body></html>
"""


def summary_text(results: Sequence[Result]) -> str:
    """Return the table of all claims as plain text, one line for each."""
    lines = [["package", "claim", "measured", "expected", "result", "seconds"]]
    for result in results:
        for claim, seconds in _claims_and_seconds(result):
            lines.append([result.package, *_claim_texts(claim), seconds])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "".join(f"{line.rstrip()}\n" for line in padded)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m tenfold_common.report DIR`; returns the exit code."""
    from tenfold_common.cli import run

    return run(_main, argv)


def _main(argv: list[str]) -> int:
    from tenfold_common.cli import base_parser

    parser = base_parser("tenfold_common.report", __doc__ or "", __version__)
    parser.add_argument("folder", type=Path, help="holds one folder with a result.json per package")
    folder = parser.parse_args(argv).folder
    paths = sorted(folder.glob("*/result.json"))
    if not paths:
        raise UserError(f"there is no */result.json in {str(folder)!r}; run a demo first")
    results = [(Result.load(path), path.parent) for path in paths]
    page = html_report(results)
    with atomic_write(folder / "index.html", "w") as stream:
        stream.write(page)
    sys.stdout.write(summary_text([result for result, _ in results]))
    sys.stdout.write(f"\n{folder / 'index.html'}\n")
    return 0 if all(result.passed for result, _ in results) else 1


def _claims_and_seconds(result: Result) -> list[tuple[Claim, str]]:
    """Pair the claims with the seconds (on the first line only); a result without claims fails."""
    none = Claim("no claim was checked", "", 0.0, "at least one", passed=False)
    claims = result.claims or [none]
    return [(claim, "" if i else f"{result.seconds:.1f}") for i, claim in enumerate(claims)]


def _claim_texts(claim: Claim) -> list[str]:
    return [claim.name, show_measured(claim), claim.expected, pass_word(claim.passed)]


def _claim_cells(claim: Claim, *, full: bool) -> list[str]:
    name, measured, expected, _ = map(_escape, _claim_texts(claim))
    middle = [_escape(claim.claimed)] if full else []
    return [name, *middle, measured, expected, _badge(claim.passed)]


def _section(number: int, result: Result, folder: Path) -> str:
    seeds = ", ".join(map(str, result.seeds)) or "none"
    parts = [
        f"<h2>{_escape(result.package)} {_badge(result.passed)}</h2>",
        f"<p><strong>{_escape(result.title)}</strong></p><p>{_escape(result.summary)}</p>",
        f'<p class="soft">Seeds: {seeds}. Time: {result.seconds:.1f} s.</p>',
    ]
    if result.claims:
        head = ["claim", "claimed", "measured", "expected", "result", "margin"]
        rows = [
            [*_claim_cells(claim, full=True), _escape(show_cell(claim.margin))]
            for claim in result.claims
        ]
        parts.append("<h3>Claims</h3>" + _table("Claims", head, rows, numeric={2, 5}))
    parts += [_data_table(table) for table in result.tables]
    parts += [_figure(figure, folder) for figure in result.figures]
    parts += [f"<h3>{_escape(s.title)}</h3><pre>{_escape(s.text)}</pre>" for s in result.samples]
    if result.notes:
        items = "".join(f"<li>{_escape(note)}</li>" for note in result.notes)
        parts.append(f"<h3>Notes</h3><ul>{items}</ul>")
    if result.environment:
        rows = [[_escape(key), _escape(show_cell(v))] for key, v in result.environment.items()]
        table = _table("Environment", ["fact", "value"], rows, numeric=set())
        parts.append(f"<details><summary>Where this ran</summary>{table}</details>")
    return f'<section id="r{number}">{"".join(parts)}</section>'


def _data_table(table: Table) -> str:
    numeric = {
        i
        for i in range(len(table.columns))
        if table.rows and all(type(row[i]) in (int, float, type(None)) for row in table.rows)
    }
    rows = [[_escape(show_cell(cell)) for cell in row] for row in table.rows]
    head = [_escape(column) for column in table.columns]
    return f"<h3>{_escape(table.title)}</h3>{_table(table.title, head, rows, numeric=numeric)}"


def _table(
    label: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: set[int]
) -> str:
    """Lay out cells that are HTML already; a wide table scrolls inside its own box."""
    css = ['class="num"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f'<th scope="col" {c}>{cell}</th>' for c, cell in zip(css, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td {c}>{cell}</td>" for c, cell in zip(css, row, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_escape(label)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _figure(figure: Figure, folder: Path) -> str:
    from base64 import b64encode

    path = (folder / figure.path).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"figure {figure.path!r} lies outside {str(folder)!r}")
    try:
        data = b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise UserError(f"figure {str(path)!r} cannot be read: {error.strerror}") from error
    source = f"data:{_MEDIA[path.suffix]};base64,{data}"
    caption = _escape(figure.caption)
    if path.suffix == ".wav":
        content = f'<audio controls src="{source}"></audio>'
    else:
        content = f'<img alt="{caption}" src="{source}">'
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _badge(passed: bool) -> str:
    word = pass_word(passed)
    return f'<span class="{word}">{word}</span>'


def _escape(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


if __name__ == "__main__":
    sys.exit(main())
