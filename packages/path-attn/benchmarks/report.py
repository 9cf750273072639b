"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import json
import sys
from pathlib import Path

from tenfold_common.cli import run
from tenfold_common.errors import UserError
from tenfold_common.results import Result, load_bench, update_between_markers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
READMES = {HERE.parent / "README.md": "benchmarks/", HERE / "README.md": ""}
OURS, GLOBAL, SDPA, FLA = "path-attn", "path-attn global form", "SDPA with RoPE", "fla naive"
GATED = "path-attn (gates)"
NAMES = {"path": "PaTH", "path_fox": "PaTH-FoX", "fox": "FoX", "rope": "RoPE", "nope": "NoPE"}


def newest(kind: str) -> Path | None:
    """The newest result of a kind; file names end in the date."""
    found = sorted(RESULTS.glob(f"{kind}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1])
    return found[-1] if found else None


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def source(path: Path, folder: str) -> str:
    """One line that says where the numbers come from."""
    bench = load_bench(path)
    env = bench["environment"]
    return (
        f"[{path.name}]({folder}results/{path.name}): {env['cpu']}, {env['threads']} threads, "
        f"torch {env['torch']}; made by `{bench['command']}`."
    )


def _by(rows: list[dict], value: str) -> dict[tuple[str, str, str], dict[str, float]]:
    """`{(name, shape, dtype): {impl: value}}`."""
    grouped: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        grouped.setdefault((row["name"], row["shape"], row["dtype"]), {})[row["impl"]] = row[value]
    return grouped


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def attention_table(path: Path) -> str:
    """Milliseconds, and ours relative to the peers."""
    rows = []
    for (name, shape, _), ms in _by(load_bench(path)["rows"], "median_ms").items():
        cells = [f"{ms[i]:.1f}" if i in ms else "-" for i in (OURS, GATED, SDPA, FLA, GLOBAL)]
        ratios = [
            _ratio(ms[OURS], ms.get(SDPA)),
            _ratio(ms.get(FLA), ms[GATED]),
            _ratio(ms.get(GLOBAL), ms[OURS]),
        ]
        rows.append([shape.split()[1], name, *cells, *ratios])
    columns = ["T", "pass", "PaTH ms", "PaTH-FoX ms", "SDPA+RoPE ms", "fla naive ms", "global ms"]
    ratios = ["PaTH / SDPA", "fla / PaTH-FoX", "global / PaTH"]
    return table([*columns, *ratios], rows)


def memory_table(path: Path) -> str:
    """MiB of peak memory, and the global form's relative to ours."""
    rows = []
    for (name, shape, _), size in _by(load_bench(path)["rows"], "bytes").items():
        cells = [f"{size[i] / 2**20:.0f}" if i in size else "-" for i in (OURS, SDPA, FLA, GLOBAL)]
        rows.append([shape.split()[1], name, *cells, _ratio(size.get(GLOBAL), size[OURS])])
    columns = ["T", "pass", "PaTH MiB", "SDPA+RoPE MiB", "fla naive MiB", "global MiB"]
    return table([*columns, "global / PaTH"], rows)


def decode_table(path: Path) -> str:
    """Milliseconds a token, and ours relative to the peers."""
    lazy, rewrite = "path-attn (lazy fold)", "keys rewritten each token"
    plain, matmul = "softmax (SDPA)", "softmax (matmul)"
    rows = []
    for (_, shape, dtype), ms in _by(load_bench(path)["rows"], "median_ms").items():
        cells = [f"{ms[i]:.3f}" for i in (lazy, plain, matmul, rewrite)]
        ratios = [_ratio(ms[lazy], ms[plain]), _ratio(ms[lazy], ms[matmul])]
        rows.append([shape, dtype, *cells, *ratios, _ratio(ms[rewrite], ms[lazy])])
    columns = ["shape", "dtype", "lazy fold", "SDPA", "matmul softmax", "rewriting"]
    return table([*columns, "lazy / SDPA", "lazy / matmul", "rewriting / lazy"], rows)


def demo_table(path: Path) -> str:
    """The demo's tables and claims."""
    result = Result.load(path)
    rows = [[c.name, c.claimed, f"{c.measured:.4g} {c.unit}", c.expected] for c in result.claims]
    tables = [table(t.columns, [[_cell(x) for x in row] for row in t.rows]) for t in result.tables]
    return "\n\n".join([tables[0], table(["claim", "claimed", "measured", "expected"], rows)])


def text_table(path: Path) -> str:
    """Loss by length of the main job on the plays."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, report in data["results"].items():
        losses = [f"{row['loss']:.3f}" for row in report["rows"]]
        last = report["rows"][-1]["positions"][-1]
        rows.append(
            [NAMES[name], *losses, f"{last['loss']:.3f}", str(report["training"]["parameters"])]
        )
    lengths = [f"{row['length']} tokens" for row in report["rows"]]
    last = f"tokens {last['start']} to {last['end']}"
    return table(["encoding", *lengths, last, "parameters"], rows)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


TABLES = {
    "attention": attention_table,
    "memory": memory_table,
    "decode": decode_table,
    "demo": demo_table,
    "text": text_table,
}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    path = newest(kind)
    if path is None:
        raise UserError(f"results/ has no {kind}_<hardware>_<yyyymmdd>.json")
    line = f"[{path.name}]({folder}results/{path.name})"
    if kind in ("attention", "memory", "decode"):
        line = source(path, folder)
    return f"{TABLES[kind](path)}\n\n{line}"


def main(argv: list[str]) -> int:
    """Rewrite both files."""
    if argv:
        raise UserError(f"report.py takes no arguments, got {' '.join(argv)}")
    for kind in TABLES:
        for readme, folder in READMES.items():
            changed = update_between_markers(readme, kind, text_of(kind, folder))
            print(
                f"{readme.relative_to(HERE.parent)}: {kind} {'updated' if changed else 'as it was'}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
