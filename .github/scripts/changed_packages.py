"""Decide which packages a change touches, as the matrix of ci.yml.

    python .github/scripts/changed_packages.py --base origin/main --head HEAD
    python .github/scripts/changed_packages.py --all

Prints one JSON list; appends `packages=<list>` to the file named by GITHUB_OUTPUT where that is
set. It fails closed: whatever it cannot place makes it exit 1, so that CI stops instead of testing
too little. The difference comes from git against the merge base, never from a paged web API.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import house


class CannotDecideError(Exception):
    """The change cannot be mapped to packages with certainty."""


def select(paths: Iterable[str], known: list[str]) -> list[str]:
    """Map changed paths to packages.

    Args:
        paths: Changed paths, relative to the root, with forward slashes.
        known: Names of all packages.

    Returns:
        The packages to test, in the order of `known`. A change to tenfold-common or to anything
        outside `packages/` selects all of them.

    Raises:
        CannotDecideError: a path under `packages/` belongs to no known package.
    """
    chosen: set[str] = set()
    for path in paths:
        parts = PurePosixPath(path).parts
        if not parts or parts[0] != "packages":
            chosen.update(known)
        elif len(parts) < 3 or parts[1] not in known:
            raise CannotDecideError(
                f"{path} is under packages/ but in no known package (known: {', '.join(known)})"
            )
        elif parts[1] == house.COMMON:
            chosen.update(known)
        else:
            chosen.add(parts[1])
    return [name for name in known if name in chosen]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise CannotDecideError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def changed_paths(root: Path, base: str, head: str) -> list[str]:
    """List the paths that differ between the merge base of two commits and the second one.

    Args:
        root: The repository's root.
        base: The commit or branch to compare with.
        head: The commit under test.

    Returns:
        Paths relative to the root; both names of a renamed file.

    Raises:
        CannotDecideError: the history is shallow, or git does not know a commit.
    """
    if _git(root, "rev-parse", "--is-shallow-repository").strip() != "false":
        raise CannotDecideError("the clone is shallow; check out with fetch-depth: 0")
    merge_base = _git(root, "merge-base", base, head).strip()
    listed = _git(root, "diff", "--name-only", "--no-renames", "-z", merge_base, head)
    return [path for path in listed.split("\0") if path]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Print the packages a change touches, as JSON.")
    parser.add_argument("--root", type=Path, default=house.ROOT, help="repository root")
    parser.add_argument("--base", help="commit or branch to compare with")
    parser.add_argument("--head", default="HEAD", help="commit under test (default: HEAD)")
    parser.add_argument("--all", action="store_true", help="every package, whatever has changed")
    options = parser.parse_args(argv)
    if not options.all and not options.base:
        parser.error("give --base COMMIT or --all")
    known = house.packages(options.root)
    try:
        if not known:
            raise CannotDecideError("no packages found under packages/")
        if options.all:
            chosen = known
        else:
            chosen = select(changed_paths(options.root, options.base, options.head), known)
    except CannotDecideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    answer = json.dumps(chosen)
    print(answer)
    if output := os.environ.get("GITHUB_OUTPUT"):
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(f"packages={answer}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
