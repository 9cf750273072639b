"""Prediction files: written record by record, resumed after a kill, read from many layouts.

A prediction file is JSON lines, one object a completion: `id`, `prompt`, `completion`, `answer`,
`confidence` (in [0, 1], null when missing), `correct` (true, false, or null when it could not be
graded) and `source`. What it was made with lies beside it in `<file>.meta.json`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from rlcr.data import final_answer
from rlcr.files import decimal_number, json_object, numbered_rows, short
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from os import PathLike

    from rlcr.verify import Verifier

FIELDS = ("id", "prompt", "completion", "answer", "confidence", "correct", "source")


@dataclass(frozen=True, slots=True)
class Predictions:
    """The rows of a prediction file and the columns the metrics read.

    Attributes:
        rows: The rows as they are in the file.
        confidence: `[n]`, float64, in [0, 1]; NaN where missing.
        correct: `[n]`, float64, in [0, 1]; NaN where the row could not be graded.
        source: `[n]`, str; "" where the file names none.
        weights: `[n]`, float64, >= 0; ones where no weight column was asked for.
    """

    rows: list[dict[str, object]]
    confidence: np.ndarray
    correct: np.ndarray
    source: np.ndarray
    weights: np.ndarray


class PredictionWriter:
    """Append predictions to a JSON lines file that survives a kill at any point.

    Each record goes to the file in one write, so after a kill at most the last line is cut off;
    resuming removes that half line and goes on. The settings are kept in `<path>.meta.json`, and
    a run with other settings cannot be resumed into the same file.

    Args:
        path: The file to write; its folder must exist.
        metadata: What the predictions were made with (model, prompt hash, seed, settings): JSON
            values under str keys.
        resume: Go on with a file that is there. Otherwise a file with content is refused.

    Raises:
        UserError: the file has content and `resume` is off; it was made with other settings (the
            message names them); a line other than a cut-off last one is broken (the message names
            the line); an id repeats; the metadata are not JSON; or the folder is missing.

    Example:
        >>> with PredictionWriter(
        ...     "preds.jsonl", {"seed": 0}, resume=True
        ... ) as writer:  # doctest: +SKIP
        ...     for row in (r for r in data if r["id"] not in writer.done):
        ...         writer.write({"id": row["id"], "answer": "4", "confidence": 0.9})
    """

    def __init__(
        self, path: str | PathLike[str], metadata: Mapping[str, object], *, resume: bool = False
    ) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path}: the folder {str(self.path.parent)!r} does not exist")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder; name a file")
        meta = _json_text(dict(metadata), "the metadata", indent=1)
        data = self.path.read_bytes() if self.path.exists() else b""
        if data and not resume:
            raise UserError(
                f"{self.path}: the file has content; resume the run, or name another file"
            )
        records, keep = _complete_records(self.path, data)
        if records:
            _check_same_settings(self.path, json.loads(meta))
        self._done: set[str] = set()
        for number, record in enumerate(records, 1):
            self._add(record, f"{self.path}, record {number}")
        if not records:
            with atomic_write(metadata_path(self.path), "w") as stream:
                stream.write(meta + "\n")
        self._file = self.path.open("ab", buffering=0)
        if keep < len(data):
            os.ftruncate(self._file.fileno(), keep)
        elif data and not data.endswith(b"\n"):  # whole, only its line feed was not written
            self._file.write(b"\n")

    @property
    def done(self) -> frozenset[str]:
        """The ids in the file."""
        return frozenset(self._done)

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record; it is in the file when this returns.

        Args:
            record: JSON values under str keys, with a str `id` that is not in the file yet.

        Raises:
            UserError: the id is missing or repeats, or a value is not JSON (NaN and infinity are
                not: write None for a missing confidence).
        """
        line = _json_text(dict(record), f"the record {record.get('id')!r}").encode() + b"\n"
        self._add(record, f"{self.path}")
        start = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:  # a full disk or Ctrl-C must not leave half a line before the next
            os.ftruncate(self._file.fileno(), start)
            self._done.discard(str(record["id"]))
            raise

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, record: Mapping[str, object], where: str) -> None:
        row_id = record.get("id")
        if not isinstance(row_id, str) or not row_id:
            raise UserError(f"{where}: a record needs a non-empty str 'id', got {row_id!r}")
        if row_id in self._done:
            raise UserError(f"{where}: the id {row_id!r} is in the file already")
        self._done.add(row_id)


def metadata_path(path: str | PathLike[str]) -> Path:
    """Return `<path>.meta.json`, where the settings of a prediction file are kept."""
    return Path(f"{os.fspath(path)}.meta.json")


def read_metadata(path: str | PathLike[str]) -> dict[str, object]:
    """Return the settings a prediction file was made with.

    Args:
        path: The prediction file.

    Raises:
        UserError: there is no `<path>.meta.json`, or it is broken.
    """
    file = metadata_path(path)
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; the settings of {path} are not known")
    return json_object(file.read_bytes(), str(file))


def read_predictions(
    path: str | PathLike[str],
    *,
    confidence: str = "confidence",
    correct: str = "correct",
    source: str = "source",
    weight: str | None = None,
    scale: float = 1.0,
) -> Predictions:
    """Read confidences and correctness from a .jsonl, .json, .csv or .parquet file.

    Args:
        path: The file; see `rlcr.files.numbered_rows`.
        confidence: Column of the confidences: numbers in [0, scale]. Null, or an empty CSV cell,
            is a missing one.
        correct: Column of the correctness: booleans, numbers in [0, 1], "true" or "false". Null,
            or an empty CSV cell, is a row that could not be graded.
        source: Column of the source; a file without it has "" everywhere.
        weight: Column of the weights, finite numbers >= 0. Defaults to weights of one.
        scale: The confidence that means certainty: 1, or 100 for percentages. The confidences
            returned are divided by it.

    Returns:
        The rows and the four columns.

    Raises:
        UserError: the file is missing, empty or broken, a column is missing, or a value is not
            accepted; the message names the line and the value.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(f"scale must be a finite number > 0, such as 1 or 100, got {scale!r}")
    placed = numbered_rows(path)
    rows = [row for _, row in placed]
    n = len(rows)
    q, c, w = np.full(n, np.nan), np.full(n, np.nan), np.ones(n)
    sources = []
    for i, (place, row) in enumerate(placed):
        where = f"{path}, {place}"
        q[i] = _confidence(_value(row, confidence, where), scale, where, confidence)
        c[i] = _correct(_value(row, correct, where), where, correct)
        if weight is not None:
            w[i] = _weight(_value(row, weight, where), where, weight)
        name = row.get(source)
        sources.append("" if name is None else str(name))
    return Predictions(rows, q, c, np.array(sources, dtype=str), w)


def grade_predictions(
    rows: Iterable[Mapping[str, object]],
    *,
    verifier: str | Verifier = "auto",
    gold: str = "answer",
    completion: str = "completion",
    prompt: str | None = None,
    format: str = "tabc",
    mode: str = "lenient",
) -> list[dict[str, object]]:
    """Parse and grade completions that lie beside their gold answers.

    Args:
        rows: Rows with a completion (str) and a gold answer (str, number, or a list of which any
            one is right; a GSM8K solution stands for the number after its last `####`).
        verifier: How answers are compared; see `rlcr.verify.get_verifier`.
        gold: Column of the golds.
        completion: Column of the completions.
        prompt: Column of the questions; only a judge reads them. Defaults to none.
        format: Blocks of the completions, see `rlcr.parsing`.
        mode: "lenient" as in the paper's evaluation, or "strict" as in training: a malformed
            completion then has no answer and no confidence.

    Returns:
        The rows with `gold` (the gold answer), `answer` (the one parsed), `confidence`, `correct`
        (bool; None where the gold cannot be scored) and `error` (the parser's code, or None).

    Raises:
        UserError: a column is missing or of another type (the message names the row), or the
            verifier, format or mode is unknown.
    """
    from rlcr.parsing import parse_completion
    from rlcr.verify import Grader

    grader = Grader(verifier)
    rows = list(rows)
    parsed, golds = [], []
    for number, row in enumerate(rows, 1):
        text = _value(row, completion, f"row {number}")
        if not isinstance(text, str):
            raise UserError(f"row {number}: column {completion!r} must be text, got {short(text)}")
        parsed.append(parse_completion(text, format=format, mode=mode))  # type: ignore[arg-type]
        target = _value(row, gold, f"row {number}")
        if isinstance(target, str) and "####" in target:
            target = final_answer(target)
        golds.append(target)
    grades, _ = grader.grade([p.answer for p in parsed], golds, _prompts(rows, prompt))
    return [
        {
            **row,
            "gold": target,
            "answer": p.answer,
            "confidence": p.confidence,
            "correct": graded_value(grade),
            "error": p.error,
        }
        for row, target, p, grade in zip(rows, golds, parsed, grades, strict=True)
    ]


def graded_value(grade: float | None) -> bool | float | None:
    """Return a grade as it is written: true or false, or the fraction a verifier gave."""
    return bool(grade) if grade in (0, 1) else grade


def _complete_records(path: Path, data: bytes) -> tuple[list[dict[str, object]], int]:
    """Return the records of a file, and how many bytes of it to keep.

    A last line without its line feed is kept if it is whole, else cut: it is the one record a kill
    can leave unfinished. No prefix of a JSON object is itself one, so the two cannot be confused.
    """
    *lines, tail = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        records.append(json_object(line, f"{path}, line {number}"))
    if not tail:
        return records, len(data)
    try:
        return [*records, json_object(tail, "")], len(data)
    except UserError:
        return records, len(data) - len(tail)


def _check_same_settings(path: Path, settings: dict[str, object]) -> None:
    before = read_metadata(path)
    keys = sorted({*before, *settings})
    changed = [key for key in keys if before.get(key, _ABSENT) != settings.get(key, _ABSENT)]
    if changed:
        shown = "; ".join(
            f"{key}: {_show(before, key)} in the file, {_show(settings, key)} now"
            for key in changed
        )
        raise UserError(
            f"{path}: made with other settings, so it cannot be resumed ({shown}); use the same "
            "settings, or name another file"
        )


_ABSENT = object()


def _show(settings: Mapping[str, object], key: str) -> str:
    return repr(settings[key]) if key in settings else "absent"


def _json_text(value: dict[str, object], what: str, indent: int | None = None) -> str:
    if not all(isinstance(key, str) for key in value):
        raise UserError(f"{what}: the keys must be str, got {list(value)}")
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what} cannot be written as JSON: {error}; use str, bool, int, finite float, None, "
            "lists and dictionaries"
        ) from error


def _value(row: Mapping[str, object], name: str, where: str) -> object:
    if name not in row:
        raise UserError(
            f"{where}: column {name!r} is missing (write null for a missing value); available: "
            f"{', '.join(map(str, row)) or 'none'}.{suggest(name, map(str, row))}"
        )
    return row[name]


def _real(value: object) -> float | None:
    """Read a finite number, also from a CSV cell; None for anything else."""
    if isinstance(value, str):
        return decimal_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # false for NaN too


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _confidence(value: object, scale: float, where: str, name: str) -> float:
    if _missing(value):
        return math.nan
    number = _real(value)
    if number is None or not 0.0 <= number <= scale:
        hint = "; for percentages pass scale=100" if number and 1 < number <= 100 else ""
        raise UserError(
            f"{where}: {name} must be a number in [0, {scale:g}] or null, got {value!r}{hint}"
        )
    return number / scale


def _correct(value: object, where: str, name: str) -> float:
    if _missing(value):
        return math.nan
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    number = _real(value)
    if number is None or not 0.0 <= number <= 1.0:
        raise UserError(
            f"{where}: {name} must be true, false, a number in [0, 1] or null, got {value!r}"
        )
    return number


def _weight(value: object, where: str, name: str) -> float:
    number = _real(value)
    if number is None or number < 0.0:
        raise UserError(f"{where}: {name} must be a finite number >= 0, got {value!r}")
    return number


def _prompts(rows: Sequence[Mapping[str, object]], prompt: str | None) -> list[str] | None:
    if prompt is None:
        return None
    return [str(_value(row, prompt, f"row {number}")) for number, row in enumerate(rows, 1)]
