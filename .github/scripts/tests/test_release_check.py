import shutil
import subprocess
import zipfile

import pytest

import release_check
from release_check import RefusedError, changelog_section, parse_tag

TAGS = [
    ("path-attn-v0.1.0", "path-attn", "0.1.0"),
    ("tenfold-common-v1.20.3", "tenfold-common", "1.20.3"),
    ("rlcr-v0.1.0rc1", "rlcr", "0.1.0rc1"),
    ("some-vision-v2.0.0", "some-vision", "2.0.0"),
    ("some-v2-tool-v2.0.0", "some-v2-tool", "2.0.0"),
]


@pytest.mark.parametrize(("tag", "package", "version"), TAGS)
def test_names_with_hyphens_are_parsed_right(tag, package, version):
    assert parse_tag(tag) == (package, version)


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
@pytest.mark.parametrize(("tag", "package", "version"), TAGS)
def test_the_shell_forms_in_the_docstring_agree(tag, package, version):
    script = 'TAG=$1; printf "%s %s" "${TAG%-v*}" "${TAG##*-v}"'
    done = subprocess.run(["sh", "-c", script, "sh", tag], capture_output=True, text=True)
    assert done.stdout == f"{package} {version}"


@pytest.mark.parametrize(
    "tag",
    ["v0.1.0", "path-attn", "path-attn-0.1.0", "path-attn-v", "path-attn-v1", "-v0.1.0",
     "Path-v0.1.0", "path--attn-v0.1.0", "path-attn-v0.1.0; rm x", "path-attn-v0.1.0\n",
     "../x-v0.1.0", "path-attn-v0.1.0-dev"],
)  # fmt: skip
def test_other_tags_are_refused(tag):
    with pytest.raises(RefusedError, match="is not <distribution>-v<version>"):
        parse_tag(tag)


@pytest.mark.parametrize("tag", ["dit-v0.1.0", "seal-v1.0.0"])
def test_names_of_other_projects_are_refused(tag, capsys):
    with pytest.raises(RefusedError, match="another project's name"):
        parse_tag(tag)
    assert release_check.main(["parse", tag]) == 1
    assert capsys.readouterr().out == ""


CHANGELOG = """# Changelog

## [Unreleased]

## [0.1.0] - 2026-01-31
### Added
- the first

## [0.0.9] - 2025-12-01

[0.1.0]: https://example.org
"""


def test_the_changelog_section_is_found():
    assert changelog_section(CHANGELOG, "0.1.0") == "### Added\n- the first"


@pytest.mark.parametrize(
    ("version", "said"), [("0.2.0", "no section"), ("0.0.9", "empty"), ("0.1", "no section")]
)
def test_a_missing_or_empty_section_is_refused(version, said):
    with pytest.raises(RefusedError, match=said):
        changelog_section(CHANGELOG, version)


def test_an_undated_section_is_refused():
    with pytest.raises(RefusedError, match="no section"):
        changelog_section("## [0.1.0]\n- x\n", "0.1.0")


def wheel(dist, name, version):
    dist.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(dist / f"{stem}-py3-none-any.whl", "w") as archive:
        text = f"Metadata-Version: 2.5\nName: {name}\nVersion: {version}\n\nText\n"
        archive.writestr(f"{stem}.dist-info/METADATA", text)


@pytest.fixture
def release(tree):
    tree.write("packages/path-attn/CHANGELOG.md", CHANGELOG)
    wheel(tree.root / "dist", "path-attn", "0.1.0")
    return tree


def check(release, tag):
    dist = str(release.root / "dist")
    return release_check.main(["check", tag, "--root", str(release.root), "--dist", dist])


def test_a_good_release_passes(release, tmp_path_factory, monkeypatch, capsys):
    output = tmp_path_factory.mktemp("gh") / "output"
    monkeypatch.setenv("GITHUB_OUTPUT", str(output))
    assert check(release, "path-attn-v0.1.0") == 0
    assert output.read_text() == "package=path-attn\nversion=0.1.0\n"


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("path-attn-v0.2.0", "the built wheel path-attn 0.1.0"),
        ("no-such-v0.1.0", "packages/no-such does not exist"),
        ("two-words-more-v0.1.0", "the built wheel path-attn 0.1.0"),
        ("dit-v0.1.0", "another project's name"),
    ],
)
def test_what_does_not_fit_is_refused(tag, said, release, capsys):
    assert check(release, tag) == 1
    assert said in capsys.readouterr().err


def test_two_wheels_are_refused(release, capsys):
    wheel(release.root / "dist", "two-words-more", "0.1.0")
    assert check(release, "path-attn-v0.1.0") == 1
    assert "2 wheels" in capsys.readouterr().err


def test_no_changelog_is_refused(release, capsys):
    release.remove("packages/path-attn/CHANGELOG.md")
    assert check(release, "path-attn-v0.1.0") == 1
    assert "CHANGELOG.md does not exist" in capsys.readouterr().err
