"""Clues with their scale, their target and, where known, where people placed them."""

import ast
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest
from wavelength_rsa import metrics
from wavelength_rsa.scales import Distribution, Scale, check_position, fold, grid

Floats = NDArray[np.float64]

COLUMNS = ("left", "right", "clue", "target")
_RESPONSES = ("responses", "response_list")
# float() also takes "nan", "1_0" and digits of other scripts; none of them is a position.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SPLITS = 100  # random halves over which the split-half row is averaged


@dataclass(frozen=True)
class Item:
    """A clue for a target on a scale.

    Args:
        scale: The two ends.
        clue: What the speaker said, as it was written.
        target: The position meant, from 0 to 100.
        responses: Where people placed the clue, two or more positions; None if nobody was asked.
        id: A name, for files and reports.

    Raises:
        UserError: the clue is blank or is an end of the scale, or a position does not fit.
    """

    scale: Scale
    clue: str
    target: float
    responses: tuple[float, ...] | None = None
    id: str = ""

    def __post_init__(self) -> None:
        """Check the fields and turn positions into floats."""
        if not isinstance(self.clue, str) or not self.clue.strip():
            raise UserError(f"the clue is {self.clue!r}; it must be a word or a phrase")
        if fold(self.clue) in (fold(self.scale.left), fold(self.scale.right)):
            raise UserError(
                f"the clue {self.clue!r} is an end of the scale {self.scale}; it must differ"
            )
        object.__setattr__(self, "target", check_position(self.target))
        if self.responses is not None:
            if len(self.responses) < 2:
                raise UserError(
                    f"there must be at least 2 responses, or none at all, not {self.responses!r}"
                )
            named = (check_position(r, f"response {i}") for i, r in enumerate(self.responses))
            object.__setattr__(self, "responses", tuple(named))

    def human(self, step: int = 5, smoothing: float = 0.0) -> Distribution:
        """Return the distribution of people's responses, see `Distribution.from_samples`.

        Raises:
            UserError: the item has no responses.
        """
        return Distribution.from_samples(self._responses(), step, smoothing)

    def _responses(self) -> tuple[float, ...]:
        if self.responses is None:
            raise UserError(
                f"item {self.id or self.clue!r} has no human responses; give a column 'responses', "
                "or leave out what compares with people"
            )
        return self.responses


# --------------------------------------------------------------------------------------------------
# Files


def load_items(path: str | PathLike[str]) -> list[Item]:
    """Read items from a .csv, .jsonl or .json file (UTF-8, with or without a byte order mark).

    Args:
        path: The file. Its columns or keys are `left`, `right`, `clue` and `target`, and may be
            `responses` or `response_list` (a list of positions, in a CSV cell written as JSON or
            as a Python list; empty if nobody was asked), `response_mean` (checked against the
            list) and `id`. Others are ignored. A .json file is an array of objects, or JSON lines.

    Returns:
        The items in the order of the file, with ids "0", "1", ... if it has none.

    Raises:
        UserError: the file is missing, empty or broken, or a row is wrong; the message names the
            file and the row.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name a file in it")
    if reader is None:
        known = ", ".join(_READERS)
        raise UserError(f"{file}: the name must end in {known}, not {file.suffix!r}")
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    items: list[Item] = []
    seen: dict[str, str] = {}
    for place, row in reader(file):
        try:
            item = _item(row, len(items))
            if item.id in seen:
                raise UserError(f"id {item.id!r} is that of {seen[item.id]} too")
        except UserError as error:
            raise UserError(f"{file}, {place}: {error}") from error
        seen[item.id] = place
        items.append(item)
    if not items:
        raise UserError(f"{file}: the file has no rows")
    return items


def save_items(items: Sequence[Item], path: str | PathLike[str]) -> None:
    """Write items as JSON lines that `load_items` reads back, whole or not at all.

    Raises:
        UserError: the name does not end in .jsonl, or its folder does not exist.
    """
    if Path(path).suffix.lower() != ".jsonl":
        raise UserError(f"{path}: items are written as JSON lines; name the file *.jsonl")
    with atomic_write(path, "w") as stream:
        for number, item in enumerate(items):
            row = {
                "id": item.id or str(number),
                "left": item.scale.left,
                "right": item.scale.right,
                "clue": item.clue,
                "target": item.target,
                "responses": item.responses,
            }
            stream.write(json.dumps(row) + "\n")


def _item(row: Mapping[str, object], number: int) -> Item:
    for name in COLUMNS:
        if name not in row:
            raise UserError(
                f"column {name!r} is missing; there is {', '.join(row) or 'nothing'}."
                f"{suggest(name, row)}"
            )
    responses = _response_list(row)
    stated = row.get("response_mean")
    if responses is not None and stated not in (None, ""):
        actual = sum(responses) / len(responses) if responses else np.nan
        if not abs(actual - _number(stated, "response_mean")) < 1e-9:
            raise UserError(
                f"response_mean is {stated} but the responses have the mean {actual:.12g}; was the "
                "list cut off?"
            )
    label = row.get("id", str(number))
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise UserError(f"id must be a name or a whole number, not {label!r}")
    return Item(
        Scale(_text(row["left"]), _text(row["right"])),
        _text(row["clue"]),
        _number(row["target"], "target"),
        responses,
        str(label),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"left, right and clue must be text, not {value!r:.80}")
    return value


def _number(value: object, name: str) -> float:
    """Return a position, given as a number or, in a CSV cell, as its digits."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    return check_position(value, name)


def _response_list(row: Mapping[str, object]) -> tuple[float, ...] | None:
    given = [row[name] for name in _RESPONSES if row.get(name) not in (None, "")]
    if len(given) > 1:
        raise UserError(f"give {' or '.join(_RESPONSES)}, not both")
    if not given:
        return None
    value = _parse_list(given[0]) if isinstance(given[0], str) else given[0]
    if not isinstance(value, list | tuple):
        raise UserError(f"responses must be a list of numbers, not {given[0]!r:.80}")
    return tuple(check_position(r, f"response {i}") for i, r in enumerate(value))


def _parse_list(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())  # literals only: it runs nothing
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(f"{file}: a column name repeats: {', '.join(header)}")
            for cells in filter(None, reader):
                place = f"line {reader.line_num}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{file}, {place}: {len(cells)} values under {len(header)} column names"
                    )
                yield place, dict(zip(header, cells, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}, line {reader.line_num + 1} or later: not UTF-8 text"
            ) from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: broken CSV: {error}") from error


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if file.suffix.lower() == ".json" and data.lstrip()[:1] == b"[":
        array = _decode(data, str(file))
        assert isinstance(array, list)
        rows = [(f"item {number}", value) for number, value in enumerate(array, 1)]
    else:  # split at line feeds only: JSON strings may hold other line separators of Unicode
        lines = ((f"line {i}", line) for i, line in enumerate(data.split(b"\n"), 1))
        rows = ((place, _decode(line, f"{file}, {place}")) for place, line in lines if line.strip())
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file}, {place}: not a JSON object: {row!r:.80}")
        yield place, row


def _decode(data: bytes, where: str) -> object:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON: {error}") from error


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, Mapping[str, object]]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
}


# --------------------------------------------------------------------------------------------------
# What people achieve


def clusters(items: Sequence[Item]) -> NDArray[np.int64]:
    """Return the number of each item's concept pair, `[N]`, counted from 0 as they appear."""
    numbers: dict[Scale, int] = {}
    return np.array([numbers.setdefault(i.scale, len(numbers)) for i in items], dtype=np.int64)


def random_halves(
    items: Sequence[Item], splits: int, seed: int, step: int = 5
) -> tuple[Floats, Floats]:
    """Split every item's responses into two random halves, again and again.

    Each item is shuffled by itself, as the k-th responses of two items need not be of one person.

    Args:
        items: N items with responses.
        splits: How often, at least 1.
        seed: Fixes them.
        step: Distance of neighbouring positions.

    Returns:
        The counts of both halves on the grid, `[splits, N, n]` each; with an odd number of
        responses the second half has one more.

    Raises:
        UserError: an item has no responses, or splits is less than 1.
    """
    if splits < 1:
        raise UserError(f"splits must be at least 1, not {splits!r}")
    rng = np.random.default_rng([seed, 1])
    positions = grid(step)
    halves = np.zeros((2, splits, len(items), len(positions)))
    for number, item in enumerate(items):
        # Each response projected once, [responses, n]: a half is then a sum of rows.
        gaps = np.array(item._responses())[:, None] - positions
        cells = np.maximum(1 - np.abs(gaps) / step, 0)
        for split in range(splits):
            order = rng.permutation(len(cells))
            halves[0, split, number] = cells[order[: len(cells) // 2]].sum(0)
            halves[1, split, number] = cells[order[len(cells) // 2 :]].sum(0)
    return halves[0], halves[1]


def human_baseline(
    items: Sequence[Item], *, step: int = 5, seed: int = 0, resamples: int = 10_000
) -> dict[str, object]:
    """Measure what people, and those who do not read the clue, achieve as listeners.

    Every row is a listener, scored as `metrics.listener_metrics` scores a model, so that the
    columns compare. A listener that gives one position has its mean error, expected distance and
    CRPS equal.

    - `humans`: the distribution of all responses to a clue; its mean is the wisdom of the crowd.
    - `single_human`: one person drawn at random; `median_error` is over all responses.
    - `half`: the distribution of a random half. `other_half_pearson` and `other_half_w1` compare it
      with the other half, as far as people agree with people.
    - `leave_one_out`: one person, with the mean of the others in the place of the target.
    - `always_50`: the middle, whatever the clue.
    - `uniform`: the uniform distribution over the grid, whose mean is the middle.
    - `random_guess`: one position of the grid drawn at random.

    Args:
        items: Items with responses and with targets on the grid.
        step: Distance of neighbouring positions.
        seed: Fixes the random halves and the resamples.
        resamples: For the intervals, see `metrics.cluster_bootstrap`; clusters are concept pairs.

    Returns:
        `items`, `clusters`, `responses` (their number), `step`, `seed`, `resamples`, `splits` and
        `rows`: for each row its `mean_error`, `rmse`, `expected_distance`, `crps` (points) and
        `pearson` (of the means with the targets, where it is defined), each a dictionary
        `{"value", "se", "low", "high"}`. All of it is JSON.

    Raises:
        UserError: there are no items, an item has no responses, or a target is off the grid.
    """
    if not items:
        raise UserError("there are no items; give at least one")
    targets = np.array([item.target for item in items])
    groups = clusters(items)
    responses = [np.array(item._responses()) for item in items]
    positions = grid(step)

    def interval(columns: Floats, statistic: Callable[[Floats], Floats]) -> dict[str, float | None]:
        return metrics.bootstrap_of_means(
            columns, groups, statistic, resamples=resamples, seed=seed
        ).to_dict()

    def average(values: Floats) -> dict[str, float | None]:
        return interval(values[:, None], lambda m: m[..., 0])

    def row(scores: Mapping[str, Floats]) -> dict[str, dict[str, float | None]]:
        table = {n: average(scores[n]) for n in ("mean_error", "expected_distance", "crps")}
        table["rmse"] = interval(scores["squared_error"][:, None], lambda m: np.sqrt(m[..., 0]))
        return table

    def listener(probs: Floats) -> dict[str, Floats]:  # [splits, N, n] -> [N]
        each = [metrics.listener_metrics(p, positions, targets) for p in probs]
        return {name: np.mean([scores[name] for scores in each], 0) for name in each[0]}

    def guesses(gaps: Sequence[Floats]) -> dict[str, Floats]:
        error = np.array([np.abs(gap).mean() for gap in gaps])
        squared = np.array([(gap**2).mean() for gap in gaps])
        same = dict.fromkeys(("mean_error", "expected_distance", "crps"), error)
        return {**same, "squared_error": squared}

    def pooled(x: Sequence[Floats], y: Sequence[Floats]) -> dict[str, float | None]:
        """Correlate all x with all y, each item weighing the same."""
        sizes = np.cumsum([len(one) for one in x])[:-1]
        parts = np.split(metrics.moments(np.concatenate(x), np.concatenate(y)), sizes)
        return interval(np.stack([part.mean(0) for part in parts]), metrics.pearson_of)

    humans = np.stack([item.human(step).probs for item in items])
    first, second = random_halves(items, _SPLITS, seed, step)
    first, second = (h / h.sum(-1, keepdims=True) for h in (first, second))
    half_means, other_means = first @ positions, second @ positions  # [splits, N]
    others = [(r.sum() - r) / (len(r) - 1) for r in responses]
    uniform = np.full_like(humans, 1 / len(positions))
    constant = [np.full(len(r), t) for r, t in zip(responses, targets, strict=True)]

    rows = {
        "humans": row(listener(humans[None])),
        "single_human": row(guesses([r - t for r, t in zip(responses, targets, strict=True)])),
        "half": row(listener(first)),
        "leave_one_out": row(guesses([r - o for r, o in zip(responses, others, strict=True)])),
        "always_50": row(guesses([np.array([50 - t]) for t in targets])),
        "uniform": row(listener(uniform[None])),
        "random_guess": row(guesses([positions - t for t in targets])),
    }
    all_errors = np.concatenate([np.abs(r - t) for r, t in zip(responses, targets, strict=True)])
    rows["single_human"]["median_error"] = metrics.Interval(
        float(np.median(all_errors)), *[np.nan] * 3
    ).to_dict()
    rows["half"]["other_half_w1"] = average(metrics.w1(first, second, positions).mean(0))
    if len(set(targets)) > 1:
        means = np.array([[r.mean()] for r in responses])
        half_targets = np.broadcast_to(targets, half_means.shape)
        rows["humans"]["pearson"] = pooled(list(means), list(targets[:, None]))
        rows["single_human"]["pearson"] = pooled(responses, constant)
        rows["half"]["pearson"] = pooled(list(half_means.T), list(half_targets.T))
        rows["half"]["other_half_pearson"] = pooled(list(half_means.T), list(other_means.T))
        rows["leave_one_out"]["pearson"] = pooled(responses, others)
    return {
        "items": len(items),
        "clusters": int(groups.max()) + 1,
        "responses": int(sum(map(len, responses))),
        "step": step,
        "seed": seed,
        "resamples": resamples,
        "splits": _SPLITS,
        "rows": rows,
    }
