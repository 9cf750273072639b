"""The tables in the READMEs are those that the committed results give."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("flashformer_report", BENCHMARKS / "report.py")
assert spec is not None
assert spec.loader is not None
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


@pytest.mark.parametrize("kind", report.TABLES)
def test_tables_come_from_the_results(kind):
    for readme, (folder, kinds) in report.READMES.items():
        if kind not in kinds:
            continue
        text = readme.read_text(encoding="utf-8")
        begin, end = f"<!-- {kind}:begin -->\n", f"\n<!-- {kind}:end -->"
        shown = text.split(begin)[1].split(end)[0]
        assert shown == report.text_of(kind, folder), f"run python benchmarks/report.py ({readme})"
