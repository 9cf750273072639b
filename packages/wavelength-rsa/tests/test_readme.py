"""The tables in the READMEs are those that the committed results give."""

from pathlib import Path

from tenfold_common.testing import stale_tables


def test_tables_come_from_the_results():
    """If not: run python benchmarks/report.py."""
    assert stale_tables(Path(__file__).resolve().parents[1]) == []
