import pytest

import architecture
import house


@pytest.mark.parametrize("check", architecture.CHECKS, ids=lambda check: check.__name__)
def test_this_repository_keeps_the_rule(check):
    assert house.packages(), "no packages found: the check would pass by looking at nothing"
    assert check(house.ROOT) == []


@pytest.mark.parametrize("check", architecture.CHECKS, ids=lambda check: check.__name__)
def test_a_good_tree_passes(check, tree):
    assert check(tree.root) == []


@pytest.mark.parametrize(
    "text",
    [
        "import two_words_more",
        "from two_words_more.ops import f",
        "def f():\n    import two_words_more.ops as o\n",
        "import importlib\nimportlib.import_module('two_words_more.ops')\n",
    ],
)
def test_a_sibling_import_is_found(text, tree):
    tree.source(text)
    [line] = architecture.sibling_imports(tree.root)
    assert line.startswith("packages/path-attn/src/path_attn/planted.py:")
    assert "two_words_more" in line


def test_common_may_be_imported_but_may_not_import(tree):
    tree.source("import tenfold_common.errors\n")
    assert architecture.sibling_imports(tree.root) == []
    tree.source("import path_attn\n", package="tenfold-common")
    assert len(architecture.sibling_imports(tree.root)) == 1


def test_a_name_that_only_begins_like_a_sibling_is_no_sibling(tree):
    tree.source("import two_words\nimport two_words_more_things\n")
    assert architecture.sibling_imports(tree.root) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch\ntorch.load('x', weights_only=False)", "torch.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("from torch import load as get\nget('x')", "torch.load"),
        (
            "def f():\n    import torch\n    return torch.load('x', map_location='cpu')",
            "torch.load",
        ),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import dill", "dill"),
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("import builtins\nbuiltins.eval('1')", "eval"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("import os\nos.system('ls')", "os.system"),
        ("import yaml\nyaml.load('x')", "yaml.load"),
        ("from yaml import load\nload('x')", "yaml.load"),
        ("from t import A\nA.from_pretrained('x', trust_remote_code=True)", "trust_remote_code"),
        ("def f(*, trust_remote_code=True): ...", "trust_remote_code"),
        ("def f(trust_remote_code=True): ...", "trust_remote_code"),
        ("options = {'trust_remote_code': True}", "trust_remote_code"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
    ],
)
def test_unsafe_code_is_found(text, said, tree):
    tree.source(text)
    [line] = architecture.unsafe_code(tree.root)
    assert line.startswith("packages/path-attn/src/path_attn/planted.py:")
    assert said in line


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "model.eval()",
        "self.model.eval()",
        "# eval('1'), pickle, shell=True\n",
        '"""torch.load(x), exec(x), trust_remote_code=True."""',
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "def f(trust_remote_code=False): ...",
        "f(trust_remote_code=options.trust_remote_code)",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load('x')",
        "from safetensors.torch import load\nload(b'x')",
    ],
)
def test_safe_code_passes(text, tree):
    tree.source(text)
    assert architecture.unsafe_code(tree.root) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import torch", "imports torch"),
        ("from transformers import AutoModel", "imports transformers"),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", "imports triton"),
        ("import path_attn.demo\nimport numpy as np", "imports numpy"),
        ("raise RuntimeError('broken')", "broken"),
    ],
)
def test_a_heavy_import_is_found(text, said, tree):
    tree.init(text)
    [line] = architecture.heavy_imports(tree.root)
    assert line.startswith("packages/path-attn:")
    assert said in line


def test_a_heavy_import_in_a_function_passes(tree):
    tree.init("def f():\n    import torch\n    return torch\n")
    assert architecture.heavy_imports(tree.root) == []


@pytest.mark.parametrize(
    "missing",
    [
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "src/path_attn/py.typed",
        "src/path_attn/_version.py",
        "src/path_attn/demo.py",
        "src/path_attn/cli.py",
        "src/path_attn/__main__.py",
        "tests",
        "tests/conftest.py",
        "tests/test_demo.py",
        "benchmarks",
        "examples",
        "pyproject.toml",
    ],
)
def test_a_missing_part_is_found(missing, tree):
    tree.remove(f"packages/path-attn/{missing}")
    found = architecture.anatomy(tree.root)
    assert any(line.startswith("packages/path-attn: no ") and missing in line for line in found)


@pytest.mark.parametrize("missing", ["README.md", "CHANGELOG.md", "src/tenfold_common/py.typed"])
def test_common_needs_its_parts_too(missing, tree):
    tree.remove(f"packages/tenfold-common/{missing}")
    assert architecture.anatomy(tree.root) == [f"packages/tenfold-common: no {missing}"]


def test_common_needs_no_demo(tree):
    tree.remove("packages/tenfold-common/src/tenfold_common/demo.py")
    tree.edit("packages/tenfold-common/pyproject.toml", "[project.scripts]", "[tool.other]")
    assert architecture.anatomy(tree.root) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "path-attn"', 'name = "path_attn"', "is called 'path_attn'"),
        ('">=3.11"', '">=3.10"', "requires-python"),
        ('"Apache-2.0"', '"MIT"', "license"),
        ("path_attn.cli:main", "path_attn.demo:main", "[project.scripts]"),
    ],
)
def test_a_wrong_project_table_is_found(old, new, said, tree):
    tree.edit("packages/path-attn/pyproject.toml", old, new)
    [line] = architecture.anatomy(tree.root)
    assert said in line


def test_another_licence_is_found(tree):
    tree.write("packages/path-attn/LICENSE", "another\n")
    assert architecture.anatomy(tree.root) == [
        "packages/path-attn: LICENSE differs from the root's"
    ]


@pytest.mark.parametrize(
    "required",
    [
        '"dit"', '"dit>=0.1"', '"seal"', '"SEAL[vllm]>=0.1"', '"two-words-more>=0.1"',
        '"two_words_more"', '"torch==2.13.0"', '"x @ file:///tmp/x"', '"torch===2.13.0"',
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["dependencies", "extra"])
def test_a_forbidden_requirement_is_found(required, place, tree):
    old, new = {
        "dependencies": ('"torch>=2.9"', f'"torch>=2.9", {required}'),
        "extra": ('"pytest>=8.4"', required),
    }[place]
    tree.edit("packages/path-attn/pyproject.toml", old, new)
    found = architecture.requirements(tree.root)
    assert len(found) == 1
    assert found[0].startswith("packages/path-attn/pyproject.toml: requires ")


@pytest.mark.parametrize(
    "required",
    [
        '"path-attn[plot]"',
        '"sealed>=1"',
        '"dither"',
        '"numpy!=2.3"',
        "\"numpy>=2; sys_platform == 'linux'\"",
    ],
)
def test_an_allowed_requirement_passes(required, tree):
    tree.edit("packages/path-attn/pyproject.toml", '"pytest>=8.4"', required)
    assert architecture.requirements(tree.root) == []


def test_a_readme_without_an_install_line_is_found(tree):
    tree.write("packages/path-attn/README.md", "pip install ./packages/path-attn\n")
    assert len(architecture.readme_installs(tree.root)) == 2


def test_a_readme_that_installs_a_stranger_by_name_is_found(tree):
    tree.package("dit")
    tree.edit("packages/dit/README.md", "--find-links dist dit", "./packages/dit")
    assert architecture.readme_installs(tree.root) == []
    for line in ("pip install dit", "pip install -U dit", "pip install 'dit[vllm]'"):
        tree.write(
            "packages/dit/README.md",
            f"pip install ./packages/tenfold-common ./packages/dit\n{line}\n",
        )
        assert architecture.readme_installs(tree.root) == [
            "packages/dit/README.md: installs 'dit' by name"
        ]


def test_another_top_level_folder_is_found(tree):
    (tree.root / ".github").mkdir()
    (tree.root / "out").mkdir()
    assert architecture.top_level(tree.root) == []
    (tree.root / "scripts").mkdir()
    assert len(architecture.top_level(tree.root)) == 1


def test_a_large_file_is_found(tree):
    tree.write("packages/path-attn/tests/data.txt", "x" * architecture.LARGEST)
    assert architecture.large_files(tree.root) == []
    tree.write("packages/path-attn/tests/data.txt", "x" * (architecture.LARGEST + 1))
    assert len(architecture.large_files(tree.root)) == 1
