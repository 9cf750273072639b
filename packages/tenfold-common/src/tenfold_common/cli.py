"""The shell around every command: exit codes, one-line errors, common options, logging.

Exit codes: 0 success, 1 a bug (traceback) or whatever the command returns, 2 something the user can
mend (one line), 130 Ctrl-C, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import NoReturn

from tenfold_common.atomic import check_output_file, write_json
from tenfold_common.errors import CheckpointError, MissingDependencyError, UserError, suggest
from tenfold_common.optional import is_available

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call a command's main function and turn what happens into an exit code.

    `UserError`, `MissingDependencyError`, `CheckpointError`, operating-system errors about a path
    or a full disk, and a device without memory become one line `error: ...` on stderr; `--debug`
    among the arguments adds the traceback. Any other exception is a bug and prints its traceback.

    Args:
        main: Takes the arguments, returns an exit code or None for 0.
        argv: The arguments. Defaults to `sys.argv[1:]`.

    Returns:
        The exit code, for `sys.exit`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = main(arguments)
        sys.stdout.flush()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(f"{leaving.code}\n")
            return 1
        return leaving.code or 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except (UserError, MissingDependencyError, CheckpointError) as error:
        return _report(str(error), "--debug" in arguments)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _report(_describe(error), "--debug" in arguments)
    except OSError as error:
        if error.errno in _NO_ROOM:
            return _report(_describe(error), "--debug" in arguments)
        traceback.print_exc()
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort of a command: show the bug, exit 1
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
            text = "the device is out of memory; ask for less at once, or for shorter sequences"
            return _report(text, "--debug" in arguments)
        traceback.print_exc()
        return 1
    return code or 0


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` and names the nearest option or verb.

    Every parser, those of verbs included, takes `-v`, `-q` and `--debug`. Abbreviated options are
    not accepted: they would change meaning when an option is added.
    """

    def __init__(self, *args, **named) -> None:
        """Make a parser; the arguments are those of `argparse.ArgumentParser`."""
        named.setdefault("allow_abbrev", False)
        super().__init__(*args, **named)
        hidden = (
            argparse.SUPPRESS
        )  # so that a verb's parser does not reset what came before the verb
        self.add_argument("-v", "--verbose", action="count", default=hidden, help="log more")
        self.add_argument(
            "-q", "--quiet", action="store_true", default=hidden, help="log warnings only"
        )
        self.add_argument("--debug", action="store_true", default=hidden, help="show tracebacks")

    def add_subparsers(self, **named):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make room for verbs, whose parsers raise `UserError` for what they do not know."""
        named.setdefault("parser_class", _VerbParser)
        return super().add_subparsers(**named)

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse all arguments; an unknown one raises `UserError` with the nearest option."""
        parsed, unknown = self.parse_known_args(args, namespace)
        self._refuse(unknown)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with the message and where to find help."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def _refuse(self, unknown: list[str]) -> None:
        """Raise `UserError` if anything is left over, with the nearest of this parser's options."""
        if not unknown:
            return
        near, name = "", unknown[0].split("=")[0]
        if name.startswith("-"):  # compared without the dashes, which all options share
            options = {option.lstrip("-"): option for option in self._option_string_actions}
            close = get_close_matches(name.lstrip("-"), options, n=1)
            near = f" Did you mean {options[close[0]]!r}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}.{near}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            near = suggest(str(value), names)
            raise argparse.ArgumentError(
                action, f"invalid choice {str(value)!r}; choose from {', '.join(names)}.{near}"
            )


class _VerbParser(Parser):
    """The parser of a verb: it refuses unknown arguments itself, so that the hints are its own."""

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown)
        return parsed, unknown


def base_parser(prog: str, description: str, version: str) -> Parser:
    """Make the top parser of a command, with `-v`, `-q`, `--debug` and `--version`.

    The parsed namespace has `verbose` (a count), `quiet` and `debug`. Verbs added with
    `parser.add_subparsers(...).add_parser(...)` take the same three options.

    Args:
        prog: The command's name.
        description: One sentence for `--help`.
        version: The version for `--version`.

    Returns:
        The parser.
    """
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"{prog} {version}")
    parser.set_defaults(verbose=0, quiet=False, debug=False)
    return parser


def run_verb(parser: argparse.ArgumentParser, argv: Sequence[str], *, package: str) -> int:
    """Parse arguments, set up logging, and call what the verb has set as its `verb_function`.

    A file of `--json` is checked before.

    Args:
        parser: Of `base_parser`; each verb has `set_defaults(verb_function=...)`.
        argv: The arguments. Without any, help is printed.
        package: The import name, for `setup_logging`.

    Returns:
        What the verb returns; 2 without arguments.
    """
    if not argv:
        parser.print_help()
        return 2
    arguments = parser.parse_args(argv)
    setup_logging(-1 if arguments.quiet else arguments.verbose, package=package)
    if getattr(arguments, "json", None):
        check_output_file(arguments.json)
    return arguments.verb_function(arguments)


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """Return a `type` of argparse: whole numbers from `least` up to `most`."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
        if value is None or value < least or (most is not None and value > most):
            limit = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limit}, not {text!r}")
        return value

    return read


seed_number = whole(0, 2**32 - 1)  # what numpy's and torch's generators both take


def write_found(arguments: argparse.Namespace, value: object) -> None:
    """Write what a verb found to the file of `--json`, if it was given, and say so."""
    if arguments.json:
        write_json(arguments.json, value)
        print(f"written: {arguments.json}")


def quiet_libraries(*, warnings: bool = False) -> None:
    """Keep progress bars of transformers, datasets and the hub out of pipes and logs.

    Call it before those are imported.

    Args:
        warnings: Whether transformers still warns, and shows its bars on a terminal: for jobs that
            take long. Else a command's output is its own alone.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not is_available("transformers") or (warnings and sys.stderr.isatty()):
        return
    from transformers.utils import logging as library

    library.disable_progress_bar()
    if not warnings:
        library.set_verbosity_error()


def setup_logging(verbosity: int = 0, *, package: str | None = None) -> None:
    """Send log records to stderr: through rich if stderr is a terminal and rich is installed.

    Args:
        verbosity: -1 for warnings only (`-q`), 0 for information, 1 for details (`-v`), 2 for the
            details of every library.
        package: The import name whose records follow `verbosity`; other loggers then show warnings
            only, below verbosity 2. Defaults to None, which means all loggers.
    """
    level = logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity else logging.INFO
    if sys.stderr.isatty() and is_available("rich"):
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    everything = package is None or verbosity >= 2
    logging.basicConfig(
        level=level if everything else logging.WARNING, handlers=[handler], force=True
    )
    for name in (package, __package__):
        if name and package is not None:
            logging.getLogger(name).setLevel(level)


def _report(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2


def _describe(error: OSError) -> str:
    where = f": {error.filename!r}" if error.filename is not None else ""
    return f"{error.strerror or error}{where}"


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    with suppress(OSError, ValueError):  # a replaced stdout may have no descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
