"""Results and benchmarks as strict JSON with provenance, and what is generated from them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest

RESULT_SCHEMA = "tenfold-result/1"
BENCH_SCHEMA = 1

Cell = str | int | float | bool | None


class _Record:
    """Base of the dataclasses below: every field is checked against its annotation when made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name, hint in hints.items():
            value = _parse(hint, getattr(self, name), f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Claim(_Record):
    """One statement that a demo checks.

    Attributes:
        name: Short name, unique within a result.
        claimed: The statement in words, from the paper or the README.
        measured: What this run gave; numbers of numpy and torch are converted.
        expected: The condition in words, such as `"< 1"`.
        passed: Whether the condition held. A claim that measured NaN cannot pass.
        unit: Unit of `measured` and `margin`. Defaults to none.
        margin: Distance from the limit, positive on the good side. Defaults to unknown.
    """

    name: str
    claimed: str
    measured: float
    expected: str
    passed: bool
    unit: str = ""
    margin: float | None = None

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        super().__post_init__()
        if self.passed and math.isnan(self.measured):
            raise UserError(f"claim {self.name!r} measured NaN and cannot have passed")


@dataclass(frozen=True)
class Table(_Record):
    """A table; each row has one cell (text, number, bool or None) per column."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        super().__post_init__()
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise UserError(
                    f"table {self.title!r}: row {number} has {len(row)} cells for "
                    f"{len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Figure(_Record):
    """A picture (.png) or sound (.wav); the path is relative to result.json, with slashes."""

    path: str
    caption: str

    def __post_init__(self) -> None:
        """Check the fields; raises UserError."""
        super().__post_init__()
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or path.suffix not in (".png", ".wav"):
            raise UserError(
                f"figure path {self.path!r} must be a .png or .wav below the folder of result.json"
            )


@dataclass(frozen=True)
class Sample(_Record):
    """A piece of text to show, such as what a model wrote."""

    title: str
    text: str


@dataclass(frozen=True)
class Result(_Record):
    """What a demo found. `load(save(r))` equals `r`, bit for bit.

    Attributes:
        package: Distribution name.
        title: What was tried, one line.
        summary: What came out, a sentence or two.
        seeds: The seeds it was run with.
        claims, tables, figures, samples, notes: The findings; may be empty.
        seconds: How long it took.
        environment: Provenance, see `environment()`. Values are texts, numbers, bools or None.
    """

    package: str
    title: str
    summary: str
    seeds: list[int]
    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, Cell] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there is a claim and every claim held."""
        return bool(self.claims) and all(claim.passed for claim in self.claims)

    def to_dict(self) -> dict:
        """Return what strict JSON can hold; NaN becomes `{"nonfinite": "nan"}`."""
        return {"schema": RESULT_SCHEMA, **_plain(dataclasses.asdict(self))}

    @classmethod
    def from_dict(cls, data: dict) -> Result:
        """Rebuild a result; an unknown, missing or ill-typed field is named in a UserError."""
        if not isinstance(data, dict) or data.get("schema") != RESULT_SCHEMA:
            raise UserError(f"this is not a result of schema {RESULT_SCHEMA}")
        fields = {key: value for key, value in data.items() if key != "schema"}
        return _parse(cls, _from_plain(fields), "result")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `folder/result.json` atomically; the figures must already be in the folder.

        Returns:
            The path of the file.

        Raises:
            UserError: a figure is missing.
        """
        folder = Path(folder)
        for figure in self.figures:
            if not (folder / figure.path).is_file():
                raise UserError(f"figure {figure.path!r} is not in {str(folder)!r}")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "result.json", self.to_dict())
        return folder / "result.json"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a result.json, or the one in a folder; raises UserError naming the file."""
        path = Path(path)
        path = path / "result.json" if path.is_dir() else path
        try:
            return cls.from_dict(_read_json(path))
        except UserError as error:
            raise UserError(f"{str(path)!r}: {error}") from error

    def markdown(self) -> str:
        """Return the result as GitHub-flavoured markdown, without a heading of its own."""
        parts = [self.summary] if self.summary else []
        if self.claims:
            parts.append(claims_table(self.claims, rule=" --- "))
        for table in self.tables:
            shown = markdown_table(table.columns, table.rows, rule=" --- ")
            parts.append(f"**{table.title}**\n\n{shown}")
        parts += [f"![{figure.caption}]({figure.path})" for figure in self.figures]
        parts += [f"**{s.title}**\n\n{_fence(s.text)}" for s in self.samples]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"


def environment() -> dict[str, Cell]:
    """Describe the machine and the software, from a fixed list of harmless facts.

    No variable of the environment, host, user or path is read. `threads`, `gpu` and `driver` are
    known only once torch has been imported.

    Returns:
        cpu, cores, threads, gpu, driver, torch, triton, transformers, python, os, commit, dirty;
        None where unknown.
    """
    import platform
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output_of(query) if gpu else None
    status = _output_of(["git", "status", "--porcelain"])
    return {
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": gpu,
        "driver": driver.splitlines()[0] if driver else None,
        "torch": version("torch"),
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _output_of(["git", "rev-parse", "HEAD"]),
        "dirty": None if status is None else bool(status),
    }


_ROW_TEXTS = ("name", "impl", "shape", "dtype")
_ROW_NUMBERS = (
    *("median_ms", "p20_ms", "p80_ms", "n", "bytes", "flops"),
    *("achieved", "limit", "fraction_of_limit"),
)
_BENCH_FIELDS = (
    *("schema", "package", "version", "commit", "dirty", "created_at", "command"),
    *("environment", "correctness", "rows", "notes"),
)


def write_bench(
    path: str | os.PathLike[str],
    *,
    package: str,
    version: str,
    command: str,
    correctness: dict,
    rows: list[dict],
    notes: list[str],
) -> None:
    """Write a benchmark file of schema 1 atomically, with commit, time and environment filled in.

    Args:
        path: The JSON file.
        package: Distribution name.
        version: Its version.
        command: What to type to get these numbers again.
        correctness: `{"gate": text or True, "max_err": number or None}`. A gate of False is
            refused: there are no numbers without right results.
        rows: Each has the texts `name`, `impl`, `shape`, `dtype` and any of the numbers
            `median_ms`, `p20_ms`, `p80_ms`, `n`, `bytes`, `flops`, `achieved`, `limit`,
            `fraction_of_limit`. Other facts go into a dict `extra`.
        notes: Remarks, such as what the limit is.

    Raises:
        UserError: a field is missing, unknown or of the wrong type.
    """
    from datetime import UTC, datetime

    facts = environment()
    bench = {
        "schema": BENCH_SCHEMA,
        "package": package,
        "version": version,
        "commit": facts.pop("commit"),
        "dirty": facts.pop("dirty"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "environment": facts,
        "correctness": correctness,
        "rows": rows,
        "notes": notes,
    }
    _check_bench(bench)
    _write_json(Path(path), bench)


def load_bench(path: str | os.PathLike[str]) -> dict:
    """Read and check a file of `write_bench`; raises UserError naming the file and the field."""
    bench = _read_json(Path(path))
    try:
        _check_bench(bench)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    return bench


def update_between_markers(path: str | os.PathLike[str], name: str, markdown: str) -> bool:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->` in a text file.

    Args:
        path: The file, UTF-8; its other lines stay as they are, byte for byte.
        name: Lower-case letters, digits and hyphens.
        markdown: The new text; it must not contain the markers.

    Returns:
        Whether the file changed.

    Raises:
        UserError: the name is not allowed, or the markers are not there exactly once and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise UserError(
            f"marker name {name!r} may hold lower-case letters, digits and hyphens only"
        )
    if begin in markdown or end in markdown:
        raise UserError(f"the text for marker {name!r} contains the marker itself")
    path = Path(path)
    text = path.read_bytes().decode("utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"{str(path)!r} must hold {begin} and then {end}, each once")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    ending = "\r\n" if "\r\n" in text else "\n"
    body = ending.join(markdown.strip("\r\n").splitlines())
    new = f"{before}{begin}{ending}{body}{ending}{end}{after}"
    if new == text:
        return False
    with atomic_write(path, "wb") as stream:
        stream.write(new.encode("utf-8"))
    return True


def show_cell(value: Cell) -> str:
    """Format a table cell for people: floats with four significant digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def pass_word(passed: bool) -> str:
    """Return "PASS" or "FAIL"."""
    return "PASS" if passed else "FAIL"


def show_measured(claim: Claim) -> str:
    """Format what a claim measured, with its unit."""
    return f"{show_cell(claim.measured)} {claim.unit}".strip()


def markdown_table(
    columns: typing.Sequence[Cell],
    rows: typing.Iterable[typing.Sequence[Cell]],
    *,
    rule: str = "---",
) -> str:
    """Return a table as markdown; bars are escaped and white space in a cell becomes one blank.

    Args:
        columns: The heads.
        rows: Cells, shown as `show_cell` does.
        rule: What stands under each head. Defaults to three dashes without blanks.
    """

    def line(cells: typing.Sequence[Cell]) -> str:
        escaped = (" ".join(show_cell(cell).split()).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(escaped) + " |"

    return "\n".join([line(columns), f"|{rule}" * len(columns) + "|", *map(line, rows)])


def claims_table(claims: list[Claim], *, rule: str = "---", verdict: bool = True) -> str:
    """Return claims as a markdown table, see `markdown_table`.

    Args:
        claims: One row each.
        rule: What stands under each head.
        verdict: Whether there is a column with PASS or FAIL. Defaults to yes.
    """
    columns = ["claim", "claimed", "measured", "expected", "result"]
    rows = [[c.name, c.claimed, show_measured(c), c.expected, pass_word(c.passed)] for c in claims]
    shown = len(columns) if verdict else -1
    return markdown_table(columns[:shown], [row[:shown] for row in rows], rule=rule)


def _parse(hint: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """Check a value against a type hint, rebuilding records and converting array scalars."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _record(hint, value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list | tuple):
        return [_parse(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _parse(str, k, where): _parse(inner[1], v, f"{where}[{k!r}]") for k, v in value.items()
        }
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    allowed = inner if origin is types.UnionType else (hint,)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:
        return float(value)
    raise UserError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r}")


def _record(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """Make a dataclass from a dict that has all of its fields and no other."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with fields, not {value!r}")
    names = [item.name for item in dataclasses.fields(kind)]
    _check_keys(value, required=names, optional=[], where=where)
    return kind(**value)


def _check_keys(
    value: dict, *, required: typing.Sequence[str], optional: typing.Sequence[str], where: str
) -> None:
    for key in value:
        if key not in required and key not in optional:
            near = suggest(str(key), [*required, *optional])
            raise UserError(f"{where} has an unknown field {key!r}.{near}")
    for name in required:
        if name not in value:
            raise UserError(f"{where} lacks the field {name!r}")


def _check_bench(bench: typing.Any) -> None:
    if not isinstance(bench, dict) or bench.get("schema") != BENCH_SCHEMA:
        raise UserError(f"this is not a benchmark of schema {BENCH_SCHEMA}")
    _check_keys(bench, required=_BENCH_FIELDS, optional=[], where="benchmark")
    for name in ("package", "version", "created_at", "command"):
        _parse(str, bench[name], name)
    _parse(str | None, bench["commit"], "commit")
    _parse(bool | None, bench["dirty"], "dirty")
    _parse(dict[str, Cell], bench["environment"], "environment")
    _parse(list[str], bench["notes"], "notes")
    gate = _parse(dict[str, Cell], bench["correctness"], "correctness")
    _check_keys(gate, required=["gate", "max_err"], optional=[], where="correctness")
    _parse(float | None, gate["max_err"], "correctness.max_err")
    if gate["gate"] is not True and not (isinstance(gate["gate"], str) and gate["gate"]):
        raise UserError("correctness.gate must say which check passed; no numbers without one")
    for i, row in enumerate(_parse(list[dict], bench["rows"], "rows")):
        where = f"rows[{i}]"
        _check_keys(row, required=_ROW_TEXTS, optional=(*_ROW_NUMBERS, "extra"), where=where)
        for name in _ROW_TEXTS:
            _parse(str, row[name], f"{where}.{name}")
        for name in _ROW_NUMBERS:
            number = _parse(float | None, row.get(name), f"{where}.{name}")
            if number is not None and not 0 <= number < math.inf:
                raise UserError(f"{where}.{name} must be a finite number >= 0, not {number}")
        _parse(dict[str, Cell], row.get("extra", {}), f"{where}.extra")


def _plain(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"nonfinite": str(value)}
    return value


def _from_plain(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        if value.keys() == {"nonfinite"} and value["nonfinite"] in ("nan", "inf", "-inf"):
            return float(value["nonfinite"])
        return {key: _from_plain(item) for key, item in value.items()}
    return [_from_plain(item) for item in value] if isinstance(value, list) else value


def _write_json(path: Path, data: dict) -> None:
    def scalar(value: typing.Any) -> Cell:
        if hasattr(value, "item"):
            return value.item()
        raise UserError(f"{value!r} does not fit into JSON")

    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False, default=scalar)
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from error
    with atomic_write(path, "w") as stream:
        stream.write(text + "\n")


def _read_json(path: Path) -> typing.Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None
    )


def _output_of(command: list[str]) -> str | None:
    """Run a fixed, known program; None if it is absent, fails or takes long."""
    import subprocess

    try:
        done = subprocess.run(  # noqa: S603 - only the commands written out above
            command, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
