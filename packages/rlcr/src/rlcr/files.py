"""Rows of JSON lines, JSON, CSV and parquet files, with errors that name the line."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from os import PathLike

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# float() also takes "nan", "1_0" and digits of other scripts; none of them is a numeric answer.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def read_rows(path: str | PathLike[str]) -> list[dict[str, object]]:
    """Read the rows of a .jsonl, .json, .csv or .parquet file; see `numbered_rows`."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str | PathLike[str]) -> list[tuple[str, dict[str, object]]]:
    """Read the rows of a file, each with its place for messages, such as "line 3".

    Args:
        path: A UTF-8 file: .jsonl (one JSON object a line), .json (an array of objects, or JSON
            lines), .csv (with a header; every value is a str) or .parquet.

    Returns:
        Pairs (place, row).

    Raises:
        UserError: the file is missing, empty, of another kind or broken; the message names the
            path and, where there is one, the line.
    """
    rows = list(_rows(Path(path)))
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def check_rows(path: str | PathLike[str]) -> None:
    """Check that a file is there and has a first row, without decoding the rest of JSON lines.

    Raises:
        UserError: see `numbered_rows`.
    """
    if next(_rows(Path(path)), None) is None:
        raise UserError(f"{path}: the file has no rows")


def _rows(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    suffix = file.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"{file}: the name must end in {', '.join(_SUFFIXES)}, got {suffix!r}")
    if not file.is_file():
        raise UserError(f"{file}: {'is a folder' if file.is_dir() else 'there is no such file'}")
    if suffix == ".parquet":
        yield from _parquet_rows(file)
    elif suffix == ".csv":
        yield from _csv_rows(file)
    else:
        data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        array = suffix == ".json" and data.lstrip()[:1] == b"["
        yield from _json_array(file, data) if array else _json_lines(file, data)


def _json_lines(file: Path, data: bytes) -> Iterator[tuple[str, dict[str, object]]]:
    # Split at line feeds only: JSON strings may hold other line separators of Unicode.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", json_object(line, f"{file}, line {number}")


def _json_array(file: Path, data: bytes) -> list[tuple[str, dict[str, object]]]:
    items = _json_value(data, str(file))
    assert isinstance(items, list)
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{file}, item {number}: not a JSON object: {short(item)}")
    return [(f"item {number}", item) for number, item in enumerate(items, 1)]


def json_object(data: bytes, where: str) -> dict[str, object]:
    """Decode one JSON object.

    Raises:
        UserError: the bytes are not UTF-8, not JSON or not an object; the message starts with
            `where`.
    """
    value = _json_value(data, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object: {short(value)}")
    return value


def _json_value(data: bytes, where: str) -> object:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        place = f"{where}, line {line + 1}" if line else where
        raise UserError(f"{place}: not UTF-8 text (a binary file?): {error.reason}") from error
    except json.JSONDecodeError as error:
        # One line of JSON lines carries its place already; an array tells the line within it.
        place = f"{where}, line {error.lineno}" if b"\n" in data.strip() else where
        raise UserError(
            f"{place}: broken JSON at character {error.colno}: {error.msg} (a cut-off line?)"
        ) from error
    except (ValueError, RecursionError) as error:  # an int of thousands of digits; deep nesting
        raise UserError(f"{where}: JSON that cannot be read: {error}") from error


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(f"{file}: a column name repeats: {', '.join(header)}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{file}, line {reader.line_num}: {len(cells)} values under "
                        f"{len(header)} column names"
                    )
                yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}, after line {reader.line_num}: not UTF-8 text (a binary file?)"
            ) from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: broken CSV: {error}") from error


def _parquet_rows(file: Path) -> list[tuple[str, dict[str, object]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {short(str(error))}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def decimal_number(text: str) -> float | None:
    """Return the finite decimal number a text is, blanks around it aside, or None."""
    if not _NUMBER.fullmatch(text.strip()):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def short(value: object) -> str:
    """Return a value for a message: a str as it is, else its repr, at most 120 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
