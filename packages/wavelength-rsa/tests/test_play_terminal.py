"""The command `play` as a player has it: a process of its own in a pseudo-terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest

LAUNCH = (  # the pseudo-terminal becomes the process's own, so that Ctrl-C reaches it, which a test
    # run in the background has told its children to ignore
    "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from wavelength_rsa.cli import main; sys.exit(main())"
)
CTRL_A, CTRL_C, CTRL_D, LEFT, RUBOUT = "\x01", "\x03", "\x04", "\x1b[D", "\x7f"
GUESS = "Your guess (0 to 100): "


class Terminal:
    """A terminal with `wavelength-rsa play` in it."""

    def __init__(self, *arguments):
        self.end, other = pty.openpty()
        self.shown = self.unread = ""
        self.child = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "play", *map(str, arguments)],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(other)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait(30)
        os.close(self.end)

    def interrupt(self):
        """Press Ctrl-C, as a person would again: before the line editor waits none is noticed."""
        for _ in range(20):
            self.type(CTRL_C)
            stop = time.monotonic() + 2
            while "interrupted" not in self.shown and time.monotonic() < stop:
                self._read(stop)
            if "interrupted" in self.shown:
                return

    def until(self, text):
        """Read until a text is shown, and return what was shown up to its end."""
        stop = time.monotonic() + 240
        while text not in self.unread:
            assert self._read(stop), f"{text!r} did not come: {self.shown!r}"
        seen, self.unread = self.unread.split(text, 1)
        return seen + text

    def type(self, keys):
        os.write(self.end, keys.encode())

    def leaves(self):
        """Return the exit code after reading all that is left."""
        stop = time.monotonic() + 240
        while self._read(stop):
            pass
        return self.child.wait(60)

    def _read(self, stop):
        ready, _, _ = select.select([self.end], [], [], max(0.0, stop - time.monotonic()))
        try:
            data = os.read(self.end, 65536) if ready else b""
        except OSError:  # the other end is closed
            data = b""
        new = data.decode().replace("\r\n", "\n")
        self.shown, self.unread = self.shown + new, self.unread + new
        return bool(data)

    @property
    def lines(self):
        return self.shown.splitlines()


def readable(terminal):
    assert all(c.isprintable() or c == "\n" for c in terminal.shown), repr(terminal.shown)
    assert max(map(len, terminal.lines)) <= 100
    assert "Traceback" not in terminal.shown
    assert "rror" not in terminal.shown


def mean(peak):
    """Where the server's listener guesses."""
    positions = np.arange(0, 101, 5)
    weights = np.exp(-np.abs(positions - peak) / 20)
    return float(weights @ positions / weights.sum())


def test_you_give_the_clues(server):
    with Terminal(f"--model={server.url}", "--rounds=2", "--seed=3") as terminal:
        start = terminal.until("Your clue: ")
        assert start.startswith("2 rounds; q ends the game.\n\nRound 1: 0 = ")
        target = int(re.search(r"The target is (\d+)\.", start)[1])
        bar = re.search(r"^0 ([-T]{51}) 100$", start, re.M)[1]
        assert bar.index("T") == round(target / 2)
        terminal.type("very hot things\n")
        assert "That breaks a rule: " in terminal.until("Your clue: ")
        terminal.type("  \n")
        assert "That breaks a rule: " in terminal.until("Your clue: ")
        assert server.asked() == 0
        terminal.type("fire\n")
        second = terminal.until("Your clue: ")
        guess = mean(90)
        assert f"The model guesses {guess:.0f}." in second
        assert re.search(rf"^{abs(guess - target):.0f} off: [0234] points", second, re.M)
        assert server.asked() == 22
        terminal.type("ice\n")
        assert terminal.leaves() == 0
        assert re.fullmatch(
            r"\d of 8 points, rounds: 2, [0-9.]+ off on average\.", terminal.lines[-1]
        )
        readable(terminal)


def test_a_line_can_be_edited(server):
    pytest.importorskip("readline")
    with Terminal(f"--model={server.url}", "--rounds=1") as terminal:
        terminal.until("Your clue: ")
        terminal.type(f"irxe{LEFT}{RUBOUT}{CTRL_A}f\n")
        assert f"The model guesses {mean(90):.0f}." in terminal.until("off on average")
        assert terminal.leaves() == 0
        assert server.requests[0][1]["messages"][0]["content"].count("Clue: fire\n") == 1


def test_you_guess_and_leave(server):
    command = [f"--model={server.url}", "--role=listen", "--on_violation=drop", "--seed=1"]
    with Terminal(*command) as terminal:
        start = terminal.until(GUESS)
        clue = re.search(r"^The clue is: (.+)$", start, re.M)[1]
        assert clue in ("warm", "lukewarm", "boiling", "freezing", "hot")
        assert "target" not in start
        for wrong in ("abc", "101", "nan", "-1"):
            terminal.type(f"{wrong}\n")
            assert f"'{wrong}' is not a number from 0 to 100." in terminal.until(GUESS)
        terminal.type("50\n")
        second = terminal.until(GUESS)
        target = int(re.search(r"The target was (\d+)\.", second)[1])
        assert f"{abs(50 - target)} off: " in second
        assert "Round 2: " in second
        terminal.type("q\n")
        assert terminal.leaves() == 0
        assert "of 4 points, rounds: 1" in terminal.lines[-1]
        readable(terminal)


@pytest.mark.parametrize("role", ["speak", "listen"])
def test_ctrl_d_ends_the_game(server, role):
    with Terminal(f"--model={server.url}", f"--role={role}") as terminal:
        terminal.until("Your clue: " if role == "speak" else GUESS)
        terminal.type(CTRL_D)
        assert terminal.leaves() == 0
        assert "points, rounds" not in terminal.shown
        assert terminal.shown.endswith("\n")
        readable(terminal)


def test_ctrl_c_ends_it_too(server):
    with Terminal(f"--model={server.url}") as terminal:
        terminal.until("Your clue: ")
        terminal.interrupt()
        assert terminal.leaves() == 130
        assert terminal.shown.endswith("interrupted\n")
        assert "Traceback" not in terminal.shown


def test_ctrl_c_while_the_model_thinks(server):
    server.held = 3
    with Terminal(f"--model={server.url}") as terminal:
        terminal.until("Your clue: ")
        terminal.type("fire\n")
        assert server.full.wait(60)
        terminal.type(CTRL_C)
        time.sleep(0.2)
        server.go.set()
        assert terminal.leaves() == 130
        assert terminal.shown.endswith("interrupted\n")
        assert "Traceback" not in terminal.shown


def test_both_roles_with_real_models(player, base_player):
    """A chat model guesses, a base model gives the clue; both processes at once."""
    with (
        Terminal(f"--model={player}", "--rounds=1") as speaking,
        Terminal(f"--model={base_player}", "--rounds=1", "--role=listen") as listening,
    ):
        speaking.until("Your clue: ")
        speaking.type("a stone\n")
        positions = np.arange(0, 101, 5)
        weights = np.exp(positions / 50)  # as the model is rigged, whatever the clue
        assert f"The model guesses {weights @ positions / weights.sum():.0f}." in speaking.until(
            "off on average"
        )
        listening.until("The clue is: ")
        listening.until(GUESS)
        listening.type("30\n")
        listening.until("off on average")
        for terminal in (speaking, listening):
            assert terminal.leaves() == 0
            assert terminal.shown.startswith("1 round; q ends the game.")  # and nothing of loading
            readable(terminal)


def test_without_a_terminal(server, tmp_path):
    """Clues from a pipe, on scales of one's own; the end of the input ends the game."""
    (tmp_path / "i.jsonl").write_text('{"left":"Dull","right":"Bright","clue":"a","target":5}')
    done = subprocess.run(
        [sys.executable, "-m", "wavelength_rsa", "play", f"--model={server.url}",
         f"--data={tmp_path / 'i.jsonl'}"],
        input="fire\nice\n", capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": 0 = Dull, 100 = Bright") == 3
    assert f"The model guesses {mean(10):.0f}." in done.stdout
    assert "of 8 points, rounds: 2" in done.stdout.splitlines()[-1]
