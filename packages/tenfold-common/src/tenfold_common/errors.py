"""The exceptions of all packages: what a user can mend, told apart from bugs."""

from __future__ import annotations

from collections.abc import Iterable


class TenfoldError(Exception):
    """Base of every error the tenfold packages raise on purpose."""


class UserError(TenfoldError, ValueError):
    """An input does not fit; the message says what was seen, what is accepted and what to do."""


class MissingDependencyError(TenfoldError, ImportError):
    """An optional dependency is absent or broken; the message says how to install it."""


class CheckpointError(TenfoldError, RuntimeError):
    """A saved folder is unfinished, altered or unreadable; the message names the file."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Name the choice nearest to a misspelt one.

    Args:
        name: What the user wrote.
        choices: What is accepted.

    Returns:
        `" Did you mean 'x'?"`, with the leading space, or `""` when nothing is near.

    Example:
        >>> suggest("trian", ["train", "eval"])
        " Did you mean 'train'?"
    """
    from difflib import get_close_matches

    near = get_close_matches(name, list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
