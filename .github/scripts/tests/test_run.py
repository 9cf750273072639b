import os
import signal
import subprocess
import sys
import time

import pytest

import house
import run

REPORT = (
    '<testsuites><testsuite tests="{tests}" failures="{bad}" errors="0" skipped="{skipped}"/>'
    "</testsuites>"
)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOGS", tmp_path / "out" / "logs")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    return tmp_path / "out" / "logs"


@pytest.fixture
def no_nox(tmp_path, monkeypatch):
    """A stand-in for `python -m nox -s SESSION` whose session names are shell commands' names."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "nox.py").write_text(
        "import os, sys, time\n"
        "name = sys.argv[sys.argv.index('-s') + 1]\n"
        "print('said by', name, os.getpid(), flush=True)\n"
        "if name.startswith('slow'):\n    time.sleep(60)\n"
        "bad = name.startswith('bad')\n"
        "print('FAILED tests/test_x.py::test_y' if bad else '1 passed')\n"
        "sys.exit(bad)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fake))


def test_counts_are_added_up_and_torn_reports_ignored(tmp_path):
    good = tmp_path / "a.xml"
    good.write_text(REPORT.format(tests=10, bad=2, skipped=3))
    more = tmp_path / "b.xml"
    more.write_text(REPORT.format(tests=1, bad=0, skipped=0))
    torn = tmp_path / "c.xml"
    torn.write_text("<testsuites><testsu")
    assert run.read_counts([good, more, torn, tmp_path / "none.xml"]) == (6, 2, 3)
    assert run.read_counts([torn]) is None


def test_a_step_that_fails_without_a_failed_test_counts_as_one():
    lint = run.Step("lint", status="FAIL")
    crashed = run.Step("tests(x)", status="FAIL", counts=(5, 0, 1))
    failed = run.Step("tests(y)", status="FAIL", counts=(5, 2, 0))
    fine = run.Step("scripts", status="ok", counts=(7, 0, 0))
    assert run.totals([lint, crashed, failed, fine]) == (17, 4, 1)


def test_steps_run_and_report(logs, no_nox, capsys):
    steps = [run.Step("good"), run.Step("bad"), run.Step("left", skipped="no reason")]
    run.Runner(steps).run()
    assert [step.status for step in steps] == ["ok", "FAIL", "skip"]
    printed = capsys.readouterr().out
    assert "said by bad" in printed  # the end of the failed step's log
    assert "said by good" not in printed  # quiet where nothing is wrong
    assert "the whole log: out/logs/bad.log" in printed
    assert "no reason" in printed
    assert (logs / "good.log").read_text().startswith("said by good ")
    assert run.failures(steps) == ["FAILED tests/test_x.py::test_y"]


def test_a_step_past_its_limit_is_stopped_and_fails(logs, no_nox, capsys):
    step = run.Step("slow", limit=1.0)
    run.Runner([step]).run()
    assert step.status == "FAIL"
    assert step.seconds < 30
    assert "stopped after 1 s" in capsys.readouterr().out


def test_what_was_started_ends_with_the_runner(tmp_path, no_nox):
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import house, run\n"
        "house.ROOT = pathlib.Path(sys.argv[2]); run.LOGS = house.ROOT / 'logs'\n"
        "run.test = lambda package: run.Runner([run.Step('slow')]).run()\n"
        "sys.exit(run.main(['test']))\n"
    )
    scripts = str(house.ROOT / ".github" / "scripts")
    process = subprocess.Popen([sys.executable, "-c", code, scripts, str(tmp_path)])
    log = tmp_path / "logs" / "slow.log"
    deadline = time.monotonic() + 30
    # Unbuffered, print writes word by word: only the line's end says that the number is there.
    while not (log.is_file() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(log.read_text().split()[-1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_table_lines_up():
    steps = [run.Step("tests(path-attn)", status="ok", counts=(12, 0, 3), seconds=4.25)]
    head, rule, row = run.summary([*steps]).splitlines()
    assert head.split() == ["step", "result", "passed", "failed", "skipped", "seconds"]
    assert set(rule) == {"-", " "}
    assert row.split() == ["tests(path-attn)", "ok", "12", "0", "3", "4.2"]
    assert len(head) == len(rule) == len(row)


@pytest.mark.parametrize("job", ["test", "demo", "types", "wheels", "bench", "gpu"])
def test_an_unknown_package_gives_one_line_and_exit_2(job):
    script = house.ROOT / ".github" / "scripts" / "run.py"
    done = subprocess.run([sys.executable, script, job, "no-such"], capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: no package 'no-such'; there are: ")
    assert done.stdout == ""


@pytest.mark.parametrize("job", ["bench", "gpu"])
def test_bench_and_gpu_want_a_package(job, capsys):
    assert run.main([job]) == 2
    assert capsys.readouterr().err.startswith("error: say which: make ")


def test_the_plan_covers_what_is_there():
    known = house.packages()
    names = [step.session for step in run.plan_tests(known, known)]
    for package in known:
        assert f"tests({package})" in names
        assert f"install({package})" in names
        wanted = house.has_marked_tests(package, "interpret")
        assert (f"interpret({package})" in names) == wanted
    assert {"lint", "types", "scripts", "vllm"} <= set(names)


def test_the_plan_for_one_package_leaves_the_others_out():
    known = house.packages()
    steps = run.plan_tests(["tenfold-common"], known)
    others = [name for name in known if name != "tenfold-common"]
    assert not any(name in step.session for step in steps for name in others)
    assert next(s for s in steps if s.session == "types").posargs == ["tenfold-common"]


def test_each_step_has_one_thread_and_uv_reads_pips_folders(monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/somewhere")
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    environment = run.child_environment()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["UV_FIND_LINKS"] == "/somewhere"
    assert os.environ.get("UV_FIND_LINKS") is None
