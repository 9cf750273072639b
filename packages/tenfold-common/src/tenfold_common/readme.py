"""The tables of READMEs, generated from the JSON files in a package's `benchmarks/results`.

A `benchmarks/report.py` says which tables its READMEs hold and how each is made; it begins with

    TABLES = {"demo": demo_table, "speed": partial(bench_table, ours=is_ours)}
    READMES = {  # the file, the way from it to benchmarks/, and the tables in it
        HERE.parent / "README.md": ("benchmarks/", ("demo",)),
        HERE / "README.md": ("", TABLES),
    }

and ends with `sys.exit(run(lambda argv: update_readmes(argv, READMES, text_of, HERE.parent)))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tenfold_common.errors import UserError
from tenfold_common.results import load_bench, markdown_table, update_between_markers


def newest(results: Path, kind: str) -> Path:
    """Return the newest file of a kind, `<kind>_<hardware>_<yyyymmdd>.json`.

    Args:
        results: The folder of result files.
        kind: What their names start with.

    Raises:
        UserError: there is none.
    """
    found = list(results.glob(f"{kind}_*.json"))
    if not found:
        raise UserError(f"{results.name}/ has no {kind}_<hardware>_<yyyymmdd>.json")
    return max(found, key=lambda path: (path.stem.rsplit("_", 1)[-1], path.name))


def link(path: Path, folder: str) -> str:
    """Return a link to a result file; `folder` leads from the README to benchmarks/."""
    return f"[{path.name}]({folder}results/{path.name})"


def machine(bench: dict) -> str:
    """Return where a benchmark ran: the processor, the threads if known, and torch."""
    env = bench["environment"]
    threads = f"{env['threads']} threads, " if env["threads"] else ""
    return f"{env['cpu']}, {threads}torch {env['torch']}"


def bench_table(
    path: Path, ours: Callable[[dict], bool], *, ratio: str = ".2f", whole: str = ".0f"
) -> str:
    """Return every row of a benchmark, its notes, and the machine and command that made it.

    Args:
        path: A file of `write_bench`.
        ours: Whether a row is this package's; the others, the peers, are compared with the one of
            the same name and shape.
        ratio: Format of a peer's time over ours. Defaults to two decimals.
        whole: Format of 100 ms and more; less has two decimals. Defaults to no separators.
    """
    bench = load_bench(path)
    own = {(row["name"], row["shape"]): row["median_ms"] for row in bench["rows"] if ours(row)}
    rows = []
    for row in bench["rows"]:
        ms, base = row["median_ms"], own.get((row["name"], row["shape"]))
        over = "" if base is None or ours(row) else format(ms / base, ratio)
        shown = format(ms, ".2f" if ms < 100 else whole)
        rows.append([row["name"], row["shape"], row["impl"], shown, over])
    table = markdown_table(["what", "size", "by", "ms", "time over ours"], rows)
    notes = "\n".join(f"- {note}" for note in bench["notes"])
    made = f"{machine(bench)}; `{bench['command']}`."
    return "\n\n".join(part for part in (table, notes, made) if part)


def update_readmes(
    argv: list[str],
    readmes: Mapping[Path, tuple[str, Iterable[str]]],
    text_of: Callable[[str, str], str],
    package: Path,
) -> int:
    """Rewrite what stands between the markers, and print for each place whether it changed.

    Args:
        argv: The arguments of the command, of which there must be none.
        readmes: The files, each with the way from it to benchmarks/ and the kinds in it.
        text_of: Makes the text of a kind from its name and the way to benchmarks/.
        package: The folder of the package; the printed paths are relative to it.

    Returns:
        The exit code 0.

    Raises:
        UserError: there is an argument, or a file lacks the markers.
    """
    if argv:
        raise UserError(f"report.py takes no arguments, got {' '.join(argv)}")
    for readme, (folder, kinds) in readmes.items():
        for kind in kinds:
            changed = update_between_markers(readme, kind, text_of(kind, folder))
            what = "updated" if changed else "as it was"
            print(f"{readme.relative_to(package)}: {kind} {what}")  # noqa: T201 - its job
    return 0
