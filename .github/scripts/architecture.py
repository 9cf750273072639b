"""The rules of the house that no ready-made tool checks, as functions that list what breaks them.

    python .github/scripts/architecture.py

Each check takes the repository's root and returns one line per violation: `path:line: what`. The
tests run every check on this tree and on small trees with a violation planted in them.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import house

# Importing a package must bring none of these in: they cost seconds or may be missing.
HEAVY = ("torch", "transformers", "triton", "numpy", "matplotlib", "vllm", "datasets", "peft")
LARGEST = 500_000  # bytes; the same limit as in .pre-commit-config.yaml
_PICKLES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"})
_FORBIDDEN_CALLS = {
    "eval": "eval() runs text as code",
    "exec": "exec() runs text as code",
    "yaml.load": "yaml.load() builds arbitrary objects; use yaml.safe_load",
    "yaml.unsafe_load": "yaml.unsafe_load() builds arbitrary objects; use yaml.safe_load",
    "yaml.full_load": "yaml.full_load() is wider than needed; use yaml.safe_load",
    "pandas.read_pickle": "pandas.read_pickle() runs code from the file",
    "os.system": "os.system() goes through a shell; use subprocess with a list",
    "os.popen": "os.popen() goes through a shell; use subprocess with a list",
}
_OBJECT_ARRAYS = "allow_pickle=True runs code from the file"


def _sources(root: Path, package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((house.folder(package, root) / "src").rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text("utf-8"), str(path))


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of every module a file imports, in functions too, also by a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(name, str):
                yield node.lineno, name


def sibling_imports(root: Path) -> list[str]:
    """No package imports another; all may import tenfold_common, which imports none of them."""
    names = house.packages(root)
    modules = {house.import_name(name) for name in names}
    common = house.import_name(house.COMMON)
    found = []
    for package in names:
        barred = modules - {house.import_name(package), common}
        for path, tree in _sources(root, package):
            for line, name in _imported(tree):
                if name.partition(".")[0] in barred:
                    found.append(f"{path}:{line}: {package} imports its sibling {name}")
    return found


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What each name in a file stands for: `import torch as t` gives t -> torch."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _called_name(call: ast.Call, aliases: dict[str, str]) -> str:
    """The full dotted name of what is called, with aliases resolved; empty for anything else."""
    parts: list[str] = []
    target: ast.expr = call.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    if not isinstance(target, ast.Name):
        return ""
    parts.append(aliases.get(target.id, target.id))
    name = ".".join(reversed(parts))
    return name.removeprefix("builtins.")


def _is(keyword: ast.keyword, name: str, value: bool) -> bool:
    constant = isinstance(keyword.value, ast.Constant) and keyword.value.value is value
    return keyword.arg == name and constant


def _call_problems(call: ast.Call, name: str) -> Iterator[str]:
    if name in _FORBIDDEN_CALLS:
        yield _FORBIDDEN_CALLS[name]
    if name in {"torch.load", "torch.serialization.load"} and not any(
        _is(k, "weights_only", True) for k in call.keywords
    ):
        yield "torch.load without weights_only=True runs code from the file"
    for keyword in call.keywords:
        if _is(keyword, "shell", True):
            yield "shell=True; use a list of arguments"
        if _is(keyword, "trust_remote_code", True):
            yield "trust_remote_code=True runs code of others; pass on the user's own flag"
        if _is(keyword, "allow_pickle", True):
            yield _OBJECT_ARRAYS


def _default_problems(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Iterator[str]:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    pairs = [
        *zip(with_default, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        is_true = isinstance(default, ast.Constant) and default.value is True
        if argument.arg == "trust_remote_code" and is_true:
            yield "trust_remote_code defaults to True; its default is False"


def _dict_problems(node: ast.Dict) -> Iterator[str]:
    for key, value in zip(node.keys, node.values, strict=True):
        named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
        if named and isinstance(value, ast.Constant) and value.value is True:
            yield "trust_remote_code=True runs code of others; pass on the user's own flag"


def unsafe_code(root: Path) -> list[str]:
    """No bare torch.load, pickle, eval, exec, shell=True, yaml.load or trust_remote_code=True.

    Read from the syntax tree, so that comments, docstrings and `model.eval()` do not count.
    """
    found = []
    for package in house.packages(root):
        for path, tree in _sources(root, package):
            for line, name in _imported(tree):
                if name.partition(".")[0] in _PICKLES:
                    found.append(f"{path}:{line}: imports {name}; unpickling runs code")
            aliases = _aliases(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    problems = _call_problems(node, _called_name(node, aliases))
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                    problems = _default_problems(node)
                elif isinstance(node, ast.Dict):
                    problems = _dict_problems(node)
                else:
                    continue
                found += [f"{path}:{node.lineno}: {problem}" for problem in problems]
    return found


# Runs in a fresh interpreter: notes every attempt to import a heavy module, also one that a
# `try` swallows, whether or not that module is installed there.
_PROBE = """
import importlib, sys
heavy, noted = set(sys.argv[2:]), []
class Watch:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in heavy:
            noted.append(top)
            raise ModuleNotFoundError(f"{top} must not be imported here", name=top)
sys.meta_path.insert(0, Watch())
failed = ""
try:
    importlib.import_module(sys.argv[1])
except Exception as error:
    failed = f"{type(error).__name__}: {error}"
print("noted " + " ".join(sorted(set(noted))))
if failed and not noted:
    print("failed " + failed)
"""


def heavy_imports(root: Path) -> list[str]:
    """Importing a package brings in none of the heavy libraries."""
    names = house.packages(root)
    path = [str(house.folder(name, root) / "src") for name in names]
    start = f"import sys; sys.path[:0] = {path!r}\n{_PROBE}"
    found = []
    for package in names:
        module = house.import_name(package)
        done = subprocess.run(
            [sys.executable, "-c", start, module, *HEAVY],
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = done.stdout.splitlines() or [f"failed {done.stderr.strip()[-300:]}"]
        for line in lines:
            kind, _, what = line.partition(" ")
            if kind == "noted" and what:
                found.append(f"packages/{package}: importing {module} imports {what}")
            if kind == "failed":
                found.append(f"packages/{package}: importing {module} fails: {what}")
    return found


def anatomy(root: Path) -> list[str]:
    """Every package has the same parts; all but tenfold-common a command and a demo."""
    found = []
    for entry in sorted((root / "packages").iterdir()):
        if entry.name.startswith("."):
            continue
        if not (entry / "pyproject.toml").is_file():
            found.append(f"packages/{entry.name}: no pyproject.toml")
            continue
        found += [f"packages/{entry.name}: {what}" for what in _missing_parts(root, entry.name)]
    return found


def _missing_parts(root: Path, package: str) -> Iterator[str]:
    home, module = house.folder(package, root), house.import_name(package)
    project = house.pyproject(package, root)["project"]
    files = ["README.md", "CHANGELOG.md", "LICENSE", f"src/{module}/__init__.py"]
    files += [f"src/{module}/py.typed", f"src/{module}/_version.py", "tests/conftest.py"]
    if package != house.COMMON:
        files += [f"src/{module}/{name}.py" for name in ("demo", "cli", "__main__")]
        files += ["tests/test_public_api.py", "tests/test_demo.py"]
        if project.get("scripts", {}).get(package) != f"{module}.cli:main":
            yield f'[project.scripts] lacks {package} = "{module}.cli:main"'
        for place, pattern in (("benchmarks", "bench_*.py"), ("examples", "[0-9][0-9]_*.py")):
            if not any((home / place).glob(pattern)):
                yield f"no {place}/{pattern}"
    yield from (f"no {name}" for name in files if not (home / name).is_file())
    if not any((home / "tests").glob("test_*.py")):
        yield "no tests/test_*.py"
    if project.get("name") != package:
        yield f"the distribution is called {project.get('name')!r}, the folder {package!r}"
    if project.get("requires-python") != ">=3.11":
        yield 'requires-python is not ">=3.11"'
    if project.get("license") != "Apache-2.0":
        yield 'license is not "Apache-2.0"'
    licence = home / "LICENSE"
    if licence.is_file() and licence.read_bytes() != (root / "LICENSE").read_bytes():
        yield "LICENSE differs from the root's"


def _requirements(package: str, root: Path) -> Iterator[str]:
    settings = house.pyproject(package, root)
    project = settings["project"]
    yield from settings.get("build-system", {}).get("requires", [])
    yield from project.get("dependencies", [])
    for group in project.get("optional-dependencies", {}).values():
        yield from group
    for group in settings.get("dependency-groups", {}).values():
        yield from (item for item in group if isinstance(item, str))


def requirements(root: Path) -> list[str]:
    """No package requires `dit`, `seal` or a sibling; none pins; none names torch's CUDA builds."""
    names = set(house.packages(root))
    found = []
    for package in sorted(names):
        for text in _requirements(package, root):
            name = re.split(r"[^A-Za-z0-9._-]", text.strip(), maxsplit=1)[0]
            name = re.sub(r"[-_.]+", "-", name).lower()
            where = f"packages/{package}/pyproject.toml: requires {text!r}"
            own = name == package and re.match(r"[A-Za-z0-9._-]+\[", text.strip())
            if name in house.STRANGERS:
                found.append(f"{where}: on the public index that is another project")
            elif name in names - {house.COMMON} and not own:
                found.append(f"{where}: packages do not depend on each other")
            version = text.partition(";")[0]  # what follows says where it is required
            if re.search(r"(?<![<>!~=])={2,3}(?!=)", version) or "@" in text:
                found.append(f"{where}: packages give floors; pins belong in constraints.txt")
    return found


def readme_installs(root: Path) -> list[str]:
    """Each README shows how to install: from the tree, and from wheels where the name is ours."""
    found = []
    for package in house.packages(root):
        readme = house.folder(package, root) / "README.md"
        text = readme.read_text("utf-8") if readme.is_file() else ""
        if package == house.COMMON:
            wanted = ["pip install ./packages/tenfold-common"]
        else:
            wanted = [f"pip install ./packages/{house.COMMON} ./packages/{package}"]
        if package not in house.STRANGERS and package != house.COMMON:
            wanted.append(f"pip install --find-links dist {package}")
        found += [
            f"packages/{package}/README.md: no line {line!r}" for line in wanted if line not in text
        ]
        for stranger in sorted(house.STRANGERS):
            by_name = rf"pip3? install (?:-\S+ |dist )*['\"]?{stranger}\b(?![-\w./])"
            if re.search(by_name, text):
                found.append(f"packages/{package}/README.md: installs {stranger!r} by name")
    return found


def top_level(root: Path) -> list[str]:
    """The root holds no folder but `packages` and hidden ones; what make writes is ignored."""
    allowed = {"packages", "out", "dist"}
    return [
        f"{entry.name}/: no other top-level folder than packages/ and .github/"
        for entry in sorted(root.iterdir())
        if entry.is_dir() and entry.name not in allowed and not entry.name.startswith((".", "__"))
    ]


def large_files(root: Path) -> list[str]:
    """No file under packages/ or .github/ is larger than 500 kB."""
    skipped = {"__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache"}
    found = []
    for part in ("packages", ".github"):
        for path in sorted((root / part).rglob("*")):
            if path.is_file() and not skipped.intersection(path.parts):
                size = path.stat().st_size
                if size > LARGEST:
                    found.append(f"{path.relative_to(root).as_posix()}: {size} bytes")
    return found


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    sibling_imports,
    unsafe_code,
    heavy_imports,
    anatomy,
    requirements,
    readme_installs,
    top_level,
    large_files,
)


def main() -> int:
    """Run every check on this tree; returns the exit status."""
    found = [line for check in CHECKS for line in check(house.ROOT)]
    print("\n".join(found) or "nothing breaks the rules of the house")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
