"""Rewrites the tables of README.md and benchmarks/README.md from the newest JSON in results/.

Usage: python benchmarks/report.py   (nothing to type into a README by hand)
"""

import json
import sys
from pathlib import Path

from tenfold_common.cli import run
from tenfold_common.readme import link, machine, newest, update_readmes
from tenfold_common.results import Result, claims_table, load_bench, markdown_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
READMES = {HERE.parent / "README.md": "benchmarks/", HERE / "README.md": ""}
OURS, GLOBAL, SDPA, FLA = "path-attn", "path-attn global form", "SDPA with RoPE", "fla naive"
GATED = "path-attn (gates)"
NAMES = {"path": "PaTH", "path_fox": "PaTH-FoX", "fox": "FoX", "rope": "RoPE", "nope": "NoPE"}


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
    return markdown_table([*columns, *ratios], rows)


def memory_table(path: Path) -> str:
    """MiB of peak memory, and the global form's relative to ours."""
    rows = []
    for (name, shape, _), size in _by(load_bench(path)["rows"], "bytes").items():
        cells = [f"{size[i] / 2**20:.0f}" if i in size else "-" for i in (OURS, SDPA, FLA, GLOBAL)]
        rows.append([shape.split()[1], name, *cells, _ratio(size.get(GLOBAL), size[OURS])])
    columns = ["T", "pass", "PaTH MiB", "SDPA+RoPE MiB", "fla naive MiB", "global MiB"]
    return markdown_table([*columns, "global / PaTH"], rows)


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
    return markdown_table([*columns, "lazy / SDPA", "lazy / matmul", "rewriting / lazy"], rows)


def demo_table(path: Path) -> str:
    """The demo's tables and claims."""
    result = Result.load(path)
    first = result.tables[0]
    claims = claims_table(result.claims, verdict=False)
    return f"{markdown_table(first.columns, first.rows)}\n\n{claims}"


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
    return markdown_table(["encoding", *lengths, last, "parameters"], rows)


TABLES = {
    "attention": attention_table,
    "memory": memory_table,
    "decode": decode_table,
    "demo": demo_table,
    "text": text_table,
}


def text_of(kind: str, folder: str) -> str:
    """What stands between the markers of a kind; `folder` leads from the file to benchmarks/."""
    path = newest(RESULTS, kind)
    line = link(path, folder)
    if kind in ("attention", "memory", "decode"):
        bench = load_bench(path)
        line += f": {machine(bench)}; made by `{bench['command']}`."
    return f"{TABLES[kind](path)}\n\n{line}"


if __name__ == "__main__":
    files = {readme: (folder, TABLES) for readme, folder in READMES.items()}
    sys.exit(run(lambda argv: update_readmes(argv, files, text_of, HERE.parent)))
