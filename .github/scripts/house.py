"""What is in this repository, read from the tree: the packages, their commands and markers.

Nothing here is a list typed by hand. The noxfile, the runner behind `make`, the CI scripts and the
architecture test all ask this module. Standard library only, Python 3.11 or later.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMON = "tenfold-common"
# Other projects own these two names on the public index, so they must never be asked for by name.
STRANGERS = frozenset({"dit", "seal"})

_PIP_TO_UV = {
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_CERT": "SSL_CERT_FILE",
}
_UV_OLD_NAMES = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}


def packages(root: Path = ROOT) -> list[str]:
    """Names of the packages: the folders of `packages/` that hold a `pyproject.toml`.

    Args:
        root: The repository's root.

    Returns:
        Sorted names, tenfold-common first because the others need it.
    """
    found = [p.parent.name for p in (root / "packages").glob("*/pyproject.toml")]
    return sorted(found, key=lambda name: (name != COMMON, name))


def import_name(package: str) -> str:
    """The import name of a distribution: `path-attn` gives `path_attn`."""
    return package.replace("-", "_")


def slug(session: str) -> str:
    """A file name for a nox session: `tests(path-attn)` gives `tests-path-attn`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", session).strip("-")


def folder(package: str, root: Path = ROOT) -> Path:
    """The folder of a package."""
    return root / "packages" / package


def pyproject(package: str, root: Path = ROOT) -> dict:
    """The parsed `pyproject.toml` of a package."""
    with (folder(package, root) / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def extras(package: str, root: Path = ROOT) -> list[str]:
    """The optional extras a package declares."""
    return sorted(pyproject(package, root)["project"].get("optional-dependencies", {}))


def has_demo(package: str, root: Path = ROOT) -> bool:
    """Whether a package has a command of its own and a `demo.py` behind its `demo` verb."""
    scripts = pyproject(package, root)["project"].get("scripts", {})
    demo = folder(package, root) / "src" / import_name(package) / "demo.py"
    return package in scripts and demo.is_file()


def marked_tests(package: str, marker: str, root: Path = ROOT) -> list[Path]:
    """The test files of a package that use `pytest.mark.<marker>`."""
    pattern = re.compile(rf"\bmark\.{re.escape(marker)}\b")
    tests = folder(package, root) / "tests"
    return [p for p in sorted(tests.rglob("*.py")) if pattern.search(p.read_text("utf-8"))]


def has_marked_tests(package: str, marker: str, root: Path = ROOT) -> bool:
    """Whether any test file of a package uses `pytest.mark.<marker>`."""
    return bool(marked_tests(package, marker, root))


def benchmarks(package: str, *, gpu: bool, root: Path = ROOT) -> list[Path]:
    """The benchmark scripts of a package; those for a GPU have `gpu` as a word of their name."""
    found = sorted((folder(package, root) / "benchmarks").glob("bench_*.py"))
    return [p for p in found if ("gpu" in p.stem.split("_")) == gpu]


def pins(root: Path = ROOT) -> dict[str, str]:
    """The pins of `constraints.txt`: name to version."""
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])
    return {name.strip(): version.strip() for name, version in pairs}


def uv_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment so that uv looks where pip would look.

    uv does not read pip's settings. A setting of uv's own always wins.

    Args:
        environ: The environment to read, such as `os.environ`.

    Returns:
        The variables to set; empty if there is nothing to carry over.
    """
    added = {}
    for pip_name, uv_name in _PIP_TO_UV.items():
        own = (uv_name, _UV_OLD_NAMES.get(uv_name, uv_name))
        if environ.get(pip_name) and not any(environ.get(name) for name in own):
            added[uv_name] = environ[pip_name]
    if "UV_INDEX" in added and not environ.get("UV_INDEX_STRATEGY"):
        # pip takes the best version of all its indexes; uv stops at the first that has the name.
        added["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if "UV_FIND_LINKS" in added:
        added["UV_FIND_LINKS"] = ",".join(added["UV_FIND_LINKS"].split())  # pip splits at spaces
    return added
