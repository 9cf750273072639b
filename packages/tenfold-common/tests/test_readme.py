from functools import partial

import pytest

from tenfold_common.cli import run
from tenfold_common.errors import UserError
from tenfold_common.readme import bench_table, link, machine, newest, update_readmes
from tenfold_common.results import load_bench, write_bench

ROWS = [("forward", "ours", 2.0), ("forward", "peer", 3.0), ("backward", "peer", 12345.6)]


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "speed_cpu_20260102.json"
    rows = [
        {"name": name, "impl": impl, "shape": "T=4", "dtype": "float32", "median_ms": ms}
        for name, impl, ms in ROWS
    ]
    write_bench(
        path, package="path-attn", version="0.1.0", command="python bench.py", rows=rows,
        correctness={"gate": True, "max_err": 0.0}, notes=["slow", "idle"],
    )  # fmt: skip
    return path


def is_ours(row):
    return row["impl"] == "ours"


def test_the_newest_file_is_that_of_the_last_date(tmp_path):
    names = ("speed_z_20260101", "speed_a_20260203", "speed_b_20260203", "speeds_a_20270101")
    for name in names:
        (tmp_path / f"{name}.json").touch()
    assert newest(tmp_path, "speed") == tmp_path / "speed_b_20260203.json"
    with pytest.raises(UserError, match=r"/ has no memory_<hardware>_<yyyymmdd>\.json"):
        newest(tmp_path, "memory")


def test_links_lead_from_the_readme_to_the_results(tmp_path):
    path = tmp_path / "a_b_1.json"
    assert link(path, "benchmarks/") == "[a_b_1.json](benchmarks/results/a_b_1.json)"
    assert link(path, "") == "[a_b_1.json](results/a_b_1.json)"


def test_a_machine_is_named_without_threads_that_are_not_known():
    facts = {"cpu": "Some CPU", "threads": 2, "torch": "2.9"}
    assert machine({"environment": facts}) == "Some CPU, 2 threads, torch 2.9"
    assert machine({"environment": {**facts, "threads": None}}) == "Some CPU, torch 2.9"


def test_peers_are_compared_with_ours_of_the_same_name_and_shape(bench):
    made = f"{machine(load_bench(bench))}; `python bench.py`."
    assert bench_table(bench, is_ours) == (
        "| what | size | by | ms | time over ours |\n"
        "|---|---|---|---|---|\n"
        "| forward | T=4 | ours | 2.00 |  |\n"
        "| forward | T=4 | peer | 3.00 | 1.50 |\n"
        "| backward | T=4 | peer | 12346 |  |\n"
        f"\n- slow\n- idle\n\n{made}"
    )
    shown = bench_table(bench, is_ours, ratio=".1f", whole=",.0f")
    assert "| peer | 3.00 | 1.5 |\n" in shown
    assert "| 12,346 |  |" in shown


def test_what_stands_between_the_markers_is_rewritten_once(bench, tmp_path, capsys):
    outer, inner = tmp_path / "README.md", tmp_path / "benchmarks" / "README.md"
    inner.parent.mkdir()
    for path in (outer, inner):
        path.write_text("a\n<!-- speed:begin -->\n<!-- speed:end -->\nb\n")
    table = partial(bench_table, ours=is_ours)

    def text_of(kind, folder):
        return f"{table(newest(tmp_path, kind))}\n\n{link(bench, folder)}"

    readmes = {outer: ("benchmarks/", ("speed",)), inner: ("", ("speed",))}
    for what in ("updated", "as it was"):
        assert update_readmes([], readmes, text_of, tmp_path) == 0
        assert capsys.readouterr().out == (
            f"README.md: speed {what}\nbenchmarks/README.md: speed {what}\n"
        )
    begin, end = "a\n<!-- speed:begin -->\n", "\n<!-- speed:end -->\nb\n"
    assert outer.read_text() == begin + text_of("speed", "benchmarks/") + end
    assert inner.read_text() == begin + text_of("speed", "") + end


def test_a_report_takes_no_arguments(tmp_path, capsys):
    assert run(lambda argv: update_readmes(argv, {}, str.join, tmp_path), ["--fast"]) == 2
    assert capsys.readouterr().err == "error: report.py takes no arguments, got --fast\n"
