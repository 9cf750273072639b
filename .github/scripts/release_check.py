"""Read a release tag and refuse what must not be published.

    python .github/scripts/release_check.py parse path-attn-v0.1.0
    python .github/scripts/release_check.py check path-attn-v0.1.0 --dist dist

A tag is `<distribution>-v<version>`. Distribution names contain hyphens, so the tag is split at
the last `-v`: in shell, `${TAG%-v*}` and `${TAG##*-v}`. `check` compares the tag with the wheel
that was built and with the changelog. Both print `package=` and `version=` lines and append them
to the file named by GITHUB_OUTPUT where that is set.
"""

import argparse
import email.parser
import os
import re
import sys
import zipfile
from pathlib import Path

import house

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.post\d+)?")


class RefusedError(Exception):
    """The release must not go out; the message says why."""


def parse_tag(tag: str) -> tuple[str, str]:
    """Split a tag into distribution and version.

    Args:
        tag: Such as `path-attn-v0.1.0`.

    Returns:
        The distribution's name and the version.

    Raises:
        RefusedError: the tag has not that form, or the name is another project's.
    """
    package, separator, version = tag.rpartition("-v")
    if not separator or not _NAME.fullmatch(package) or not _VERSION.fullmatch(version):
        raise RefusedError(f"tag {tag!r} is not <distribution>-v<version>, as path-attn-v0.1.0")
    if package in house.STRANGERS:
        raise RefusedError(
            f"{package!r} is another project's name on the public index; "
            "choose a publishable name first (distribution and import together)"
        )
    return package, version


def changelog_section(text: str, version: str) -> str:
    """The text of one release in a changelog.

    Args:
        text: The whole changelog; releases are headed `## [0.1.0] - 2026-01-31`.
        version: The release to find.

    Returns:
        What stands below that heading.

    Raises:
        RefusedError: there is no dated section for the version, or it is empty.
    """
    heading = rf"^## \[?{re.escape(version)}\]? - \d{{4}}-\d{{2}}-\d{{2}}[ \t]*$"
    match = re.search(rf"{heading}\n(.*?)(?=^## |^\[[^\]]+\]:|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise RefusedError(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'")
    if not match[1].strip():
        raise RefusedError(f"the section of {version} in CHANGELOG.md is empty")
    return match[1].strip()


def wheel_metadata(wheel: Path) -> tuple[str, str]:
    """Name and version as a built wheel states them."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        if len(inside) != 1:
            raise RefusedError(f"{wheel.name} has {len(inside)} METADATA files, expected 1")
        metadata = email.parser.Parser().parsestr(archive.read(inside[0]).decode("utf-8"))
    return metadata["Name"], metadata["Version"]


def check(tag: str, dist: Path, root: Path = house.ROOT) -> tuple[str, str]:
    """Check a tag against folder, wheel and changelog.

    Args:
        tag: The release tag.
        dist: The folder with the one wheel that was built for it.
        root: The repository's root.

    Returns:
        The distribution's name and the version.

    Raises:
        RefusedError: something does not fit; the message says what.
    """
    package, version = parse_tag(tag)
    if package not in house.packages(root):
        raise RefusedError(f"packages/{package} does not exist or has no pyproject.toml")
    wheels = sorted(dist.glob("*.whl"))
    if len(wheels) != 1:
        raise RefusedError(f"{dist} holds {len(wheels)} wheels, expected exactly 1")
    name, built = wheel_metadata(wheels[0])
    if (name, built) != (package, version):
        raise RefusedError(f"the tag says {package} {version}, the built wheel {name} {built}")
    changelog = house.folder(package, root) / "CHANGELOG.md"
    if not changelog.is_file():
        raise RefusedError(f"packages/{package}/CHANGELOG.md does not exist")
    changelog_section(changelog.read_text("utf-8"), version)
    return package, version


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Read a release tag; refuse what must not go out.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("parse", "split the tag"), ("check", "compare it with the built wheel")):
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("tag")
        sub.add_argument("--root", type=Path, default=house.ROOT, help="repository root")
        if verb == "check":
            sub.add_argument("--dist", type=Path, required=True, help="folder with the wheel")
    options = parser.parse_args(argv)
    try:
        if options.verb == "parse":
            package, version = parse_tag(options.tag)
        else:
            package, version = check(options.tag, options.dist, options.root)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = f"package={package}\nversion={version}\n"
    print(lines, end="")
    if output := os.environ.get("GITHUB_OUTPUT"):
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
