import json
import subprocess

import pytest

import changed_packages
from changed_packages import CannotDecideError, select

KNOWN = ["tenfold-common", "path-attn", "two-words-more"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], []),
        (["packages/path-attn/src/path_attn/ops.py"], ["path-attn"]),
        (["packages/two-words-more/README.md"], ["two-words-more"]),
        (
            ["packages/two-words-more/a b.py", "packages/path-attn/x"],
            ["path-attn", "two-words-more"],
        ),
        (["packages/tenfold-common/src/tenfold_common/cli.py"], KNOWN),
        ([".github/workflows/ci.yml"], KNOWN),
        (["noxfile.py"], KNOWN),
        (["README.md"], KNOWN),
        (["constraints.txt", "packages/path-attn/x"], KNOWN),
    ],
)
def test_paths_select_packages(paths, expected):
    assert select(paths, KNOWN) == expected


@pytest.mark.parametrize(
    "path",
    [
        "packages/unknown/src/x.py",
        "packages/path/src/x.py",
        "packages/path-attn-more/x.py",
        "packages/loose.txt",
        "packages/path-attn",
    ],
)
def test_an_unknown_path_under_packages_is_an_error(path):
    with pytest.raises(CannotDecideError, match="no known package"):
        select(["packages/path-attn/ok.py", path], KNOWN)


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tree):
    git(tree.root, "init", "-q", "-b", "main")
    git(tree.root, "add", "-A")
    git(tree.root, "commit", "-q", "-m", "first")
    git(tree.root, "checkout", "-q", "-b", "work")
    return tree


def commit(tree, message="more"):
    git(tree.root, "add", "-A")
    git(tree.root, "commit", "-q", "-m", message)


def run(tree, *arguments):
    return changed_packages.main(["--root", str(tree.root), *arguments])


def test_the_difference_is_taken_from_the_merge_base(repository, capsys):
    repository.source("x = 1\n")
    commit(repository)
    git(repository.root, "checkout", "-q", "main")
    repository.source("y = 1\n", package="two-words-more")  # on main only: not this branch's change
    commit(repository)
    assert run(repository, "--base", "main", "--head", "work") == 0
    assert json.loads(capsys.readouterr().out) == ["path-attn"]


def test_a_rename_between_packages_selects_both(repository, capsys):
    root = repository.root
    git(root, "mv", "packages/path-attn/README.md", "packages/two-words-more/OTHER.md")
    commit(repository)
    assert run(repository, "--base", "main") == 0
    assert json.loads(capsys.readouterr().out) == ["path-attn", "two-words-more"]


def test_odd_file_names_are_read_right(repository, capsys):
    repository.write('packages/path-attn/a "quoted" ünï\nline.txt', "")
    commit(repository)
    assert run(repository, "--base", "main") == 0
    assert json.loads(capsys.readouterr().out) == ["path-attn"]


def test_all_and_the_output_file(repository, tmp_path_factory, monkeypatch, capsys):
    output = tmp_path_factory.mktemp("gh") / "output"
    monkeypatch.setenv("GITHUB_OUTPUT", str(output))
    assert run(repository, "--all") == 0
    assert output.read_text() == f"packages={json.dumps(KNOWN)}\n"


def test_it_fails_closed(repository, capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
    assert run(repository, "--base", "no-such-branch") == 1
    repository.write("packages/stray/file.txt", "")
    commit(repository)
    assert run(repository, "--base", "main") == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "packages/stray/file.txt" in caught.err


def test_a_shallow_clone_is_refused(repository, tmp_path_factory, capsys):
    repository.source("x = 1\n")
    commit(repository)
    clone = tmp_path_factory.mktemp("clone") / "c"
    url = repository.root.as_uri()
    subprocess.run(["git", "clone", "-q", "--depth", "1", url, str(clone)], check=True)
    assert changed_packages.main(["--root", str(clone), "--base", "HEAD"]) == 1
    assert "shallow" in capsys.readouterr().err


def test_no_base_is_a_wrong_command():
    with pytest.raises(SystemExit) as caught:
        changed_packages.main([])
    assert caught.value.code == 2
