"""The runner behind `make demo`, `make test`, `make gpu` and their like.

    python .github/scripts/run.py test [PACKAGE]
    python .github/scripts/run.py demo [PACKAGE] [--full]

`test` and `demo` run nox sessions, two at a time with one thread each. Each step gives one line
when it ends; what it printed is in out/logs/; the end of a failed step's log is shown. A table
closes the run, and for `test` a line `N passed, N failed, N skipped` that adds up the counts of
all pytest runs (a failed step without failed tests, such as lint, counts as one).

Exit status: 0 all well, 1 something failed, 2 the command was wrong, 130 interrupted.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree  # reads only files that pytest has just written
from dataclasses import dataclass, field
from pathlib import Path

import house

OUT = house.ROOT / "out"
LOGS = OUT / "logs"
SIDE_BY_SIDE = 2
TAIL = 40
HEARTBEAT = 60.0
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class WrongCommandError(Exception):
    """What was asked for does not exist; the message names what does."""


@dataclass(eq=False)  # one step is itself only, so that it can be a key
class Step:
    """One nox session and what came of it."""

    session: str
    posargs: list[str] = field(default_factory=list)
    limit: float = 1800.0
    skipped: str = ""
    status: str = "waiting"
    seconds: float = 0.0
    counts: tuple[int, int, int] | None = None  # passed, failed, skipped

    @property
    def log(self) -> Path:
        """Where the step's output goes."""
        return LOGS / f"{house.slug(self.session)}.log"

    def count_files(self) -> list[Path]:
        """The reports that the step's pytest runs leave."""
        pattern = "vllm-*.xml" if self.session == "vllm" else f"{house.slug(self.session)}.xml"
        return sorted(LOGS.glob(pattern))


def read_counts(reports: list[Path]) -> tuple[int, int, int] | None:
    """Add up passed, failed and skipped over pytest's JUnit reports.

    Args:
        reports: The XML files; a missing or torn one counts as nothing.

    Returns:
        The three counts, or None if no report could be read.
    """
    passed = failed = skipped = 0
    readable = False
    for report in reports:
        try:
            root = ElementTree.parse(report).getroot()  # noqa: S314  see the import
        except (OSError, ElementTree.ParseError):
            continue
        readable = True
        for suite in root.iter("testsuite"):
            tests, left_out = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            passed += max(0, tests - left_out - bad)
            failed += bad
            skipped += left_out
    return (passed, failed, skipped) if readable else None


def totals(steps: list[Step]) -> tuple[int, int, int]:
    """Passed, failed and skipped over all steps; a step that failed for itself counts as one."""
    passed = failed = skipped = 0
    for step in steps:
        counts = step.counts or (0, 0, 0)
        passed, skipped = passed + counts[0], skipped + counts[2]
        failed += max(counts[1], 1) if step.status == "FAIL" else counts[1]
    return passed, failed, skipped


def choose(package: str | None, known: list[str]) -> list[str]:
    """The packages a command is about.

    Raises:
        WrongCommandError: there is no package of that name.
    """
    if not package:
        return known
    if package not in known:
        raise WrongCommandError(f"no package {package!r}; there are: {', '.join(known)}")
    return [package]


def plan_tests(chosen: list[str], known: list[str]) -> list[Step]:
    """The steps of `make test`: what says the most first, the longest (vllm) early, beside it."""
    only = [] if chosen == known else chosen
    with_vllm = [name for name in chosen if house.has_marked_tests(name, "vllm")]
    reason = "" if with_vllm else "no tests are marked vllm"
    steps = [Step("lint"), Step("vllm", only, skipped=reason), Step("types", only)]
    steps += [Step(f"tests({name})") for name in chosen]
    marked = [name for name in chosen if house.has_marked_tests(name, "interpret")]
    steps += [Step(f"interpret({name})") for name in marked]
    steps += [Step(f"install({name})") for name in chosen]
    return [*steps, Step("scripts")]


def plan_demos(chosen: list[str], full: bool) -> list[Step]:
    """The steps of `make demo`."""
    return [Step(f"demo({name})", ["--full"] if full else []) for name in chosen]


def child_environment() -> dict[str, str]:
    """The environment of a step: uv finds what pip would find, and one thread each."""
    environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    environment.update(house.uv_settings(environment))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


class Runner:
    """Runs steps side by side, quietly."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.running: dict[Step, tuple[subprocess.Popen, float]] = {}
        self.done = 0
        self.interrupted = False

    def run(self) -> None:
        """Run every step to its end, or stop all of them when interrupted."""
        # Only noted here and heeded between steps: raised at once, it could come after a process
        # is started and before anyone knows of it.
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note_interrupt) for number in numbers}
        try:
            self._run()
        finally:
            for process, _ in self.running.values():
                _stop(process)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_interrupt(self, number: int, frame: object) -> None:
        self.interrupted = True

    def _run(self) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        waiting = []
        for step in self.steps:
            if step.skipped:
                self._finish(step, "skip")
            else:
                waiting.append(step)
        beat = time.monotonic()
        while waiting or self.running:
            while waiting and len(self.running) < SIDE_BY_SIDE:
                self._start(waiting.pop(0))
            time.sleep(0.1)
            if self.interrupted:
                raise KeyboardInterrupt
            self._collect()
            if time.monotonic() - beat > HEARTBEAT and self.running:
                beat = time.monotonic()
                now = (f"{s.session} {beat - t:.0f} s" for s, (_, t) in self.running.items())
                print(f"        running: {', '.join(now)}", flush=True)

    def _start(self, step: Step) -> None:
        for report in step.count_files():
            report.unlink()
        command = [sys.executable, "-m", "nox", "--no-stop-on-first-error", "-s", step.session]
        command += ["--", *step.posargs] if step.posargs else []
        with step.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=house.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(),
                start_new_session=True,  # so that the whole family can be stopped
            )
        self.running[step] = (process, time.monotonic())

    def _collect(self) -> None:
        for step, (process, started) in list(self.running.items()):
            step.seconds = time.monotonic() - started
            late = step.seconds > step.limit
            if process.poll() is None and not late:
                continue
            del self.running[step]
            if late and process.poll() is None:
                _stop(process)
                with step.log.open("a") as log:
                    log.write(f"\nstopped after {step.limit:.0f} s\n")
            step.counts = read_counts(step.count_files())
            self._finish(step, "ok" if process.returncode == 0 else "FAIL")

    def _finish(self, step: Step, status: str) -> None:
        step.status = status
        self.done += 1
        place = f"[{self.done}/{len(self.steps)}]"
        note = f"  {step.skipped}" if step.skipped else ""
        print(f"{place:>7} {step.session:<28} {status:<4} {step.seconds:7.1f} s{note}", flush=True)
        if status == "FAIL":
            print(_tail(step.log), flush=True)


def _stop(process: subprocess.Popen) -> None:
    """End a step and everything it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").rstrip().splitlines()[-TAIL:]
    shown = "\n".join(f"        | {line}" for line in lines)
    return f"{shown}\n        the whole log: {log.relative_to(house.ROOT)}"


def table(rows: list[tuple[str, ...]]) -> str:
    """A plain table: the first row is the heading, the first column is text, others are figures."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row, widths, strict=True))]
        return "  ".join([cells[0], *cells[2:]]).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def summary(steps: list[Step]) -> str:
    """The table that closes `make test`."""
    rows: list[tuple[str, ...]] = [("step", "result", "passed", "failed", "skipped", "seconds")]
    for step in steps:
        counts = ["", "", ""] if step.counts is None else [str(n) for n in step.counts]
        rows.append((step.session, step.status, *counts, f"{step.seconds:.1f}"))
    return table(rows)


def failures(steps: list[Step]) -> list[str]:
    """What pytest called failed, said once more where the run ends, for whoever sees only that."""
    logs = [s.log.read_text("utf-8", errors="replace") for s in steps if s.status == "FAIL"]
    found = [line for log in logs for line in log.splitlines()]
    return [line for line in found if line.startswith(("FAILED ", "ERROR "))]


def test(package: str | None) -> int:
    """`make test`: lint, types, every suite, both install forms, the repository's own tests."""
    known = house.packages()
    chosen = choose(package, known)
    steps = plan_tests(chosen, known)
    started = time.monotonic()
    print(f"make test: {', '.join(chosen)}; {len(steps)} steps, two at a time", flush=True)
    Runner(steps).run()
    print(f"\n{summary(steps)}\n\n{time.monotonic() - started:.0f} s; logs in out/logs/")
    for line in failures(steps):
        print(line)
    passed, failed, skipped = totals(steps)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if any(step.status == "FAIL" for step in steps) else 0


def demo(package: str | None, full: bool) -> int:
    """`make demo`: every package's demo, one table, one page."""
    choose(package, house.packages())
    with_demo = [name for name in house.packages() if house.has_demo(name)]
    if not with_demo or (package and package not in with_demo):
        what = package or "no package"
        verb = "has no demo" if package else "has a demo"
        raise WrongCommandError(f"{what} {verb}; those with one: {', '.join(with_demo) or 'none'}")
    chosen = choose(package, with_demo)
    results = OUT / "demo"
    for name in chosen:  # no old result may stand in for one that does not come
        shutil.rmtree(results / name, ignore_errors=True)
    steps = plan_demos(chosen, full)
    kind = "full demos (three seeds)" if full else "demos"
    print(f"make demo: {kind} of {', '.join(chosen)}, two at a time", flush=True)
    Runner(steps).run()
    source = house.folder(house.COMMON) / "src"
    print(flush=True)
    report = subprocess.run(
        [sys.executable, "-m", "tenfold_common.report", str(results)],
        cwd=house.ROOT,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    bad = [step.session for step in steps if step.status == "FAIL"]
    missing = [name for name in chosen if not (results / name / "result.json").is_file()]
    if missing and not bad:
        print(f"no result.json from: {', '.join(missing)}", file=sys.stderr)
    # With one package asked for, older results of others are shown but do not decide.
    return 1 if bad or missing or (report.returncode and not package) else 0


def one_session(session: str, package: str | None, extra: list[str]) -> int:
    """Run one nox session in the foreground; its output is the answer."""
    name = session
    if package:
        known = house.packages()
        choose(package, known)
        name = f"{session}({package})" if session == "bench" else session
        if session in {"types", "wheels"}:
            extra = [package, *extra]
    elif session == "bench":
        raise WrongCommandError(f"say which: make bench P=... of {', '.join(house.packages())}")
    command = [sys.executable, "-m", "nox", "-s", name, *(["--", *extra] if extra else [])]
    return 1 if subprocess.run(command, cwd=house.ROOT, env=_uv_environment()).returncode else 0


def _uv_environment() -> dict[str, str]:
    return {**os.environ, **house.uv_settings(os.environ)}


def gpu(package: str | None) -> int:
    """`make gpu P=x`: GPU tests and GPU benchmarks with this Python, installing nothing."""
    known = house.packages()
    if not package:
        raise WrongCommandError(f"say which: make gpu P=... of {', '.join(known)}")
    choose(package, known)
    home = house.folder(package)
    out = Path(os.environ.get("OUT") or OUT / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    sources = [home / "src", house.folder(house.COMMON) / "src"]
    path = os.pathsep.join([*map(str, sources), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    report = out / f"{package}-gpu-tests.xml"
    report.unlink(missing_ok=True)
    commands = []
    if importlib.util.find_spec("pytest") is None:
        raise WrongCommandError(f"{sys.executable} has no pytest; say which: make PYTHON=... gpu")
    if house.has_marked_tests(package, "gpu"):
        # Warnings are errors in the suite; here the machine's own versions decide them.
        options = ["-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        commands.append(["-m", "pytest", *options, f"--junitxml={report}", str(home / "tests")])
    else:
        print(f"{package} has no tests marked gpu")
    scripts = house.benchmarks(package, gpu=True)
    for script in scripts:
        commands.append([str(script), "--json", str(out / f"{script.stem}.json")])
    if not scripts:
        print(f"{package} has no benchmarks for a GPU (benchmarks/bench_*_gpu.py)")
    bad = 0
    summary_rows = []
    for words in commands:
        name = "gpu tests" if words[0] == "-m" else Path(words[0]).name
        print(f"== {name}", flush=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, *words], cwd=home, env=environment).returncode
        bad += code != 0
        seconds = round(time.monotonic() - started, 1)
        summary_rows.append({"step": name, "exit": code, "seconds": seconds})
    (out / f"{package}-gpu-summary.json").write_text(json.dumps(summary_rows, indent=1) + "\n")
    if counts := read_counts([report]):
        print("{} passed, {} failed, {} skipped".format(*counts))
    print(f"results in {out}")
    return 1 if bad else 0


def _interrupt(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that nothing that was started is left behind."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    parser = argparse.ArgumentParser(description="The runner behind make.")
    parser.add_argument("job", choices=["test", "demo", "lint", "types", "bench", "wheels", "gpu"])
    parser.add_argument("package", nargs="?", help="one package; all of them if left out")
    parser.add_argument("--full", action="store_true", help="demo: three seeds")
    options = parser.parse_args(argv)
    try:
        if options.job == "test":
            return test(options.package)
        if options.job == "demo":
            return demo(options.package, options.full)
        if options.job == "gpu":
            return gpu(options.package)
        return one_session(options.job, options.package, [])
    except WrongCommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
