import pytest

import house


def test_packages_are_read_from_the_tree(tree):
    assert house.packages(tree.root) == ["tenfold-common", "path-attn", "two-words-more"]
    (tree.root / "packages" / "no-project").mkdir()
    assert "no-project" not in house.packages(tree.root)


def test_a_demo_needs_a_command_and_a_file(tree):
    assert house.has_demo("path-attn", tree.root)
    tree.remove("packages/path-attn/src/path_attn/demo.py")
    assert not house.has_demo("path-attn", tree.root)
    tree.edit("packages/two-words-more/pyproject.toml", "two-words-more =", "other =")
    assert not house.has_demo("two-words-more", tree.root)


def test_marked_tests_are_found(tree):
    assert not house.has_marked_tests("path-attn", "vllm", tree.root)
    tree.write("packages/path-attn/tests/sub/test_x.py", "pytestmark = pytest.mark.vllm\n")
    assert house.has_marked_tests("path-attn", "vllm", tree.root)
    assert not house.has_marked_tests("path-attn", "vl", tree.root)


def test_benchmarks_for_a_gpu_are_told_apart(tree):
    for name in ("bench_decode_gpu", "bench_gpu_ops", "bench_gpus", "other"):
        tree.write(f"packages/path-attn/benchmarks/{name}.py", "")
    gpu = [p.stem for p in house.benchmarks("path-attn", gpu=True, root=tree.root)]
    cpu = [p.stem for p in house.benchmarks("path-attn", gpu=False, root=tree.root)]
    assert gpu == ["bench_decode_gpu", "bench_gpu_ops"]
    assert cpu == ["bench_gpus", "bench_x"]


def test_pins_are_read(tree):
    tree.write("constraints.txt", "# a==1\n\ntorch==2.13.0\ntwine==7.0.0  # why\n")
    assert house.pins(tree.root) == {"torch": "2.13.0", "twine": "7.0.0"}


@pytest.mark.parametrize(
    ("environ", "added"),
    [
        ({}, {}),
        ({"PIP_FIND_LINKS": "/a /b"}, {"UV_FIND_LINKS": "/a,/b"}),
        ({"PIP_FIND_LINKS": "/a", "UV_FIND_LINKS": "/c"}, {}),
        ({"PIP_INDEX_URL": "u"}, {"UV_DEFAULT_INDEX": "u"}),
        ({"PIP_INDEX_URL": "u", "UV_INDEX_URL": "v"}, {}),
        (
            {"PIP_EXTRA_INDEX_URL": "u v"},
            {"UV_INDEX": "u v", "UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        ({"PIP_EXTRA_INDEX_URL": "u", "UV_EXTRA_INDEX_URL": "v"}, {}),
        (
            {"PIP_EXTRA_INDEX_URL": "u", "UV_INDEX_STRATEGY": "first-index"},
            {"UV_INDEX": "u"},
        ),
        ({"PIP_CERT": "/c.pem"}, {"SSL_CERT_FILE": "/c.pem"}),
    ],
)
def test_pip_settings_reach_uv(environ, added):
    assert house.uv_settings(environ) == added


def test_slugs_are_file_names():
    assert house.slug("tests(path-attn)") == "tests-path-attn"
    assert house.slug("lint") == "lint"
