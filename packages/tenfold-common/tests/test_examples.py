"""The example and the benchmark run as the README says."""

import subprocess
import sys
from pathlib import Path

from tenfold_common import Result, load_bench

ROOT = Path(__file__).parents[1]


def run(*words) -> str:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_example_runs(tmp_path):
    written = run(ROOT / "examples" / "01_result_and_report.py", "--smoke", "--out", tmp_path)
    assert "| fair coin | heads in half of the tosses |" in written
    assert Result.load(tmp_path / "coin").passed
    assert "coin" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_benchmark_runs(tmp_path):
    script = ROOT / "benchmarks" / "bench_import.py"
    run(script, "--json", tmp_path / "b.json", "--repeats", "2")
    bench = load_bench(tmp_path / "b.json")
    assert {row["name"] for row in bench["rows"]} >= {"tenfold_common", "tenfold_common.results"}


def test_committed_results_follow_the_schema():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert paths
    for path in paths:
        assert load_bench(path)["package"] == "tenfold-common"
