import shutil
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SCRIPTS))
sys.dont_write_bytecode = True

PROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
[project]
name = "{name}"
dynamic = ["version"]
requires-python = ">=3.11"
license = "Apache-2.0"
dependencies = [{requires}]
[project.optional-dependencies]
test = ["pytest>=8.4"]
[project.scripts]
{name} = "{module}.cli:main"
"""


class Tree:
    """A small repository that keeps every rule, for tests to break one at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("LICENSE", "the licence\n")
        self.package("tenfold-common", requires="")
        self.package("path-attn")
        self.package("two-words-more")

    def write(self, path: str, text: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
        return target

    def package(
        self, name: str, requires: str = '"tenfold-common>=0.1,<0.2", "torch>=2.9"'
    ) -> None:
        module, home = name.replace("-", "_"), f"packages/{name}"
        lines = [f"pip install ./packages/tenfold-common ./packages/{name}"]
        lines.append(f"pip install --find-links dist {name}")
        if name == "tenfold-common":
            lines = ["pip install ./packages/tenfold-common"]
        project = PROJECT.format(name=name, module=module, requires=requires)
        self.write(f"{home}/pyproject.toml", project)
        self.write(f"{home}/README.md", "\n".join(lines))
        self.write(f"{home}/LICENSE", "the licence\n")
        empty = ["CHANGELOG.md", f"src/{module}/py.typed", "benchmarks/bench_x.py"]
        empty += [f"src/{module}/{n}.py" for n in ("__init__", "_version", "demo", "cli")]
        empty += [f"src/{module}/__main__.py", "examples/01_first.py", "tests/conftest.py"]
        empty += ["tests/test_public_api.py", "tests/test_demo.py"]
        for path in empty:
            self.write(f"{home}/{path}", "")

    def source(self, text: str, package: str = "path-attn") -> None:
        module = package.replace("-", "_")
        self.write(f"packages/{package}/src/{module}/planted.py", text)

    def init(self, text: str, package: str = "path-attn") -> None:
        module = package.replace("-", "_")
        self.write(f"packages/{package}/src/{module}/__init__.py", text)

    def edit(self, path: str, old: str, new: str) -> None:
        target = self.root / path
        text = target.read_text("utf-8")
        assert old in text
        target.write_text(text.replace(old, new), "utf-8")

    def remove(self, path: str) -> None:
        target = self.root / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)
