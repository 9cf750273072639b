import argparse
import errno
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from tenfold_common import (
    CheckpointError,
    MissingDependencyError,
    UserError,
    base_parser,
    run,
    setup_logging,
)
from tenfold_common.cli import run_verb, seed_number, whole, write_found
from tenfold_common.testing import in_fresh_python

PROGRAM = """
import logging, os, signal, sys, time
from tenfold_common import CheckpointError, MissingDependencyError, UserError
from tenfold_common.cli import base_parser, run, setup_logging

def main(argv):
    parser = base_parser("tool", "Does things.", "1.2.3")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train")
    train.add_argument("--learning_rate", type=float, default=0.1)
    fail = verbs.add_parser("fail", help="fail")
    fail.add_argument("--how", choices=["user", "missing", "checkpoint", "bug", "text", "file"])
    verbs.add_parser("lines", help="print")
    verbs.add_parser("sleep", help="wait")
    args = parser.parse_args(argv)
    setup_logging(-1 if args.quiet else args.verbose, package="tool")
    if args.verb == "train":
        log = logging.getLogger("tool")
        log.debug("detail")
        log.info("information")
        log.warning("warning")
        logging.getLogger("other").info("noise")
        print("rate", args.learning_rate)
        return 3 if args.learning_rate == 3 else None
    if args.verb == "lines":
        for i in range(200000):
            print(i)
    if args.verb == "sleep":
        # a parent that ignores Ctrl-C (nohup, some CI runners) hands that down
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("ready", flush=True)
        time.sleep(60)
    if args.verb == "fail":
        if args.how == "user":
            raise UserError("q has 3 heads;\\n give 4")
        if args.how == "missing":
            raise MissingDependencyError("tool needs x")
        if args.how == "checkpoint":
            raise CheckpointError("model.bin is torn")
        if args.how == "text":
            sys.exit("leaving")
        if args.how == "file":
            open("/no/such/file")
        raise ZeroDivisionError("a bug")

sys.exit(run(main))
"""


def tool(*words, **named) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **named)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("user", "error: q has 3 heads; give 4\n"),
        ("missing", "error: tool needs x\n"),
        ("checkpoint", "error: model.bin is torn\n"),
        ("file", "error: No such file or directory: '/no/such/file'\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(how, line):
    done = tool("-q", "fail", "--how", how)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == line
    debug = tool("fail", "-q", "--how", how, "--debug")
    assert debug.returncode == 2
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(line)


def test_a_bug_shows_its_traceback_and_exits_with_1():
    done = tool("fail", "--how", "bug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "ZeroDivisionError: a bug" in done.stderr


def test_leaving_with_a_text_exits_with_1():
    done = tool("-q", "fail", "--how", "text")
    assert done.returncode == 1
    assert done.stderr == "leaving\n"


def test_success_and_a_code_of_the_command():
    assert tool("train").stdout == "rate 0.1\n"
    assert tool("train").returncode == 0
    assert tool("train", "--learning_rate", "3").returncode == 3


def test_help_and_version():
    for words in (["--help"], ["train", "--help"]):
        done = tool(*words)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: tool")
    done = tool("--version")
    assert (done.returncode, done.stdout) == (0, "tool 1.2.3\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["train", "--learning-rate", "3"],
            ["--learning-rate 3", "Did you mean '--learning_rate'?"],
        ),
        (["train", "--lerning_rate=3"], ["--lerning_rate=3", "Did you mean '--learning_rate'?"]),
        (["train", "--learning"], ["unrecognized arguments: --learning."]),
        (["train", "extra"], ["unrecognized arguments: extra. (see tool train --help)"]),
        (["train", "--model", "x"], ["arguments: --model x. (see tool train --help)"]),
        (["fail", "--learning_rate=3"], ["arguments: --learning_rate=3. (see tool fail --help)"]),
        (["--learning_rate=3", "train"], ["arguments: --learning_rate=3. (see tool --help)"]),
        (["train", "--verbos"], ["Did you mean '--verbose'? (see tool train --help)"]),
        (["--vresion", "train"], ["Did you mean '--version'?"]),
        (["lines", "--learning-rate"], ["unrecognized arguments: --learning-rate. (see"]),
        (["trian"], ["invalid choice 'trian'", "Did you mean 'train'?"]),
        (["fail", "--how", "usr"], ["Did you mean 'user'?", "(see tool fail --help)"]),
        (["train", "--learning_rate", "fast"], ["invalid float value: 'fast'"]),
        (["train", "--learning_rate"], ["expected one argument"]),
        ([], ["required: verb"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_line_with_the_nearest_name(words, parts):
    done = tool(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in parts), done.stderr


def test_a_reader_that_goes_away_is_no_complaint():
    command = f'{sys.executable} -c "$PROGRAM" -q lines | head -1'
    environment = {**os.environ, "PROGRAM": PROGRAM}
    done = subprocess.run(
        ["bash", "-c", f'{command}; echo "${{PIPESTATUS[0]}}"'],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.stdout == "0\n141\n"
    assert done.stderr == ""


def test_ctrl_c_exits_with_130():
    command = [sys.executable, "-c", PROGRAM, "-q", "sleep"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted\n"


# run in this process --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("x"), 2),
        (MissingDependencyError("x"), 2),
        (CheckpointError("x"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 2),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "f"), 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (OSError(errno.EIO, "Input/output error"), 1),
        (FileNotFoundError("no details"), 2),
        (ConnectionResetError("x"), 1),
        (ValueError("x"), 1),
        (SystemExit(), 0),
        (SystemExit(4), 4),
        (SystemExit("bye"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
    ],
    ids=repr,
)
def test_every_exception_has_its_code(raised, code, capsys):
    def main(argv):
        raise raised

    assert run(main, []) == code
    errors = capsys.readouterr().err
    assert ("Traceback" in errors) == (code == 1 and not isinstance(raised, SystemExit))
    assert errors.startswith("error: ") == (code == 2)


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["tool", "a", "b"])
    assert run(lambda argv: seen.extend(argv)) == 0
    assert seen == ["a", "b"]
    parser = base_parser("tool", "x", "1")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args().words == ["a", "b"]


def test_common_options_work_before_and_after_the_verb():
    parser = base_parser("tool", "x", "1")
    parser.add_subparsers(dest="verb").add_parser("go")
    args = parser.parse_args(["go"])
    assert (args.verbose, args.quiet, args.debug) == (0, False, False)
    for words in (["-vv", "-q", "--debug", "go"], ["go", "-vv", "-q", "--debug"]):
        args = parser.parse_args(words)
        assert (args.verbose, args.quiet, args.debug) == (2, True, True)


# logging --------------------------------------------------------------------------------------


@pytest.fixture
def _restored_logging():
    root = logging.getLogger()
    names = ("tool", "tenfold_common")
    before = root.level, root.handlers[:], [logging.getLogger(name).level for name in names]
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for name, level in zip(names, before[2], strict=True):
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_restored_logging")
@pytest.mark.parametrize(
    ("verbosity", "ours", "others"),
    [(-1, 30, 30), (0, 20, 30), (1, 10, 30), (2, 10, 10)],
)
def test_levels(verbosity, ours, others):
    setup_logging(verbosity, package="tool")
    assert logging.getLogger("tool.part").getEffectiveLevel() == ours
    assert logging.getLogger("tenfold_common").getEffectiveLevel() == ours
    assert logging.getLogger("other").getEffectiveLevel() == others
    assert len(logging.getLogger().handlers) == 1


@pytest.mark.usefixtures("_restored_logging")
def test_without_a_package_all_loggers_follow():
    setup_logging(1)
    assert logging.getLogger("other").getEffectiveLevel() == logging.DEBUG
    setup_logging()
    assert logging.getLogger("other").getEffectiveLevel() == logging.INFO


def test_plain_lines_on_a_pipe():
    lines = [line.split(" ", 1)[1] for line in tool("train", "-v").stderr.splitlines()]
    assert lines == ["DEBUG detail", "INFO information", "WARNING warning"]
    lines = [line.split(" ", 1)[1] for line in tool("train").stderr.splitlines()]
    assert lines == ["INFO information", "WARNING warning"]


def on_a_terminal(code: str) -> str:
    """Run a program with stderr on a pseudo-terminal and return what it wrote there."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=slave, env={**os.environ, "COLUMNS": "100"}
    ) as process:
        os.close(slave)
        data = b""
        while select.select([master], [], [], 30)[0]:
            try:
                piece = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            data += piece
    os.close(master)
    assert process.returncode == 0
    return data.decode()


SPEAK = "import logging; from tenfold_common import setup_logging; setup_logging(); {}; " + (
    "logging.info('hello [bold]x')"
)


def test_rich_writes_on_a_terminal_if_it_is_there():
    handler = "assert type(logging.getLogger().handlers[0]).__name__ == 'RichHandler'"
    written = on_a_terminal(SPEAK.format(handler))
    assert "hello" in written
    assert "x" in written
    assert "INFO" in written


def test_plain_lines_on_a_terminal_without_rich():
    written = on_a_terminal("import sys; sys.modules['rich'] = None; " + SPEAK.format("pass"))
    assert written.strip().endswith("INFO hello [bold]x")


# verbs ----------------------------------------------------------------------------------------


def verbs_of_a_tool():
    parser = base_parser("tool", "Does things.", "1.2.3")
    verb = parser.add_subparsers(dest="verb", required=True).add_parser("do")
    verb.add_argument("--json")
    verb.add_argument("--n", type=whole(2, 5), default=2)
    verb.add_argument("--seed", type=seed_number, default=0)
    verb.set_defaults(verb_function=do)
    return parser


def do(arguments):
    DONE.append((arguments.n, arguments.seed, logging.getLogger("tool").level))
    write_found(arguments, {"n": arguments.n})
    return 7


DONE: list = []


def call(*arguments):
    DONE.clear()
    return run(lambda argv: run_verb(verbs_of_a_tool(), argv, package="tool"), list(arguments))


def test_a_verb_runs_with_its_arguments_and_logging(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert call("do", "--n", "5", "--seed", "4294967295", "--json", str(file), "-q") == 7
    assert DONE == [(5, 2**32 - 1, logging.WARNING)]
    assert json.loads(file.read_text()) == {"n": 5}
    assert f"written: {file}" in capsys.readouterr().out
    assert call("do") == 7
    assert "written" not in capsys.readouterr().out


def test_no_arguments_are_help_and_2(capsys):
    assert call() == 2
    assert "usage: tool" in capsys.readouterr().out
    assert not DONE


def test_a_json_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    assert call("do", "--json", str(tmp_path / "absent" / "a.json")) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not DONE


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", v) for v in ("1", "6", "-3", "2.0", "x", "", "1e3", "\u0663", "9" * 4000)]
    + [("seed", v) for v in ("-1", "4294967296", "0x1")],
)
def test_numbers_out_of_range_are_one_line(name, value, capsys):
    assert call("do", f"--{name}={value}") == 2
    said = capsys.readouterr().err
    assert "must be a whole number from" in said
    assert len(said.splitlines()) == 1
    assert not DONE


def test_an_open_range_names_its_least():
    with pytest.raises(argparse.ArgumentTypeError, match="of at least 3, not '2'"):
        whole(3)("2")
    assert whole(3)("12345678") == 12345678


@pytest.mark.parametrize("warnings", [False, True])
def test_libraries_are_quiet_in_a_pipe(warnings):
    pytest.importorskip("transformers")
    code = (
        "import sys; from tenfold_common.cli import quiet_libraries\n"
        f"quiet_libraries(warnings={warnings})\n"
        "from transformers.utils import logging\n"
        "print(logging.is_progress_bar_enabled(), logging.get_verbosity() == logging.ERROR)"
    )
    assert in_fresh_python(code) == f"False {not warnings}"
