"""The game: points, rules, both roles, and every way to stop."""

import pytest

from tenfold_common.errors import UserError
from wavelength_rsa.listeners import TableListener
from wavelength_rsa.play import SCALES, Score, play
from wavelength_rsa.scales import Scale
from wavelength_rsa.speakers import Candidates, Speaker

HOT = Scale("Cold", "Hot")


class Terminal:
    """Answers questions from a list and keeps what was shown."""

    def __init__(self, *lines):
        self.lines, self.shown, self.asked = list(lines), [], []

    def ask(self, question):
        self.asked.append(question)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def say(self, line):
        self.shown.append(line)

    @property
    def text(self):
        return "\n".join(self.shown)


class Says(Speaker):
    name = "says"

    def describe(self):
        return {}

    def _propose(self, tasks, seed):
        import numpy as np

        one = np.ones(1)
        return [
            Candidates((f"clue {t:g}",), one.astype(int), one, one, None, ((),), 0)
            for _, t in tasks
        ]


def middling():
    return TableListener({}, step=50, default="uniform")


def run(*lines, role="speak", rounds=2, **named):
    terminal = Terminal(*lines)
    score = play(
        role=role, ask=terminal.ask, say=terminal.say, scales=[HOT], rounds=rounds,
        listener=middling() if role == "speak" else None,
        speaker=Says() if role == "listen" else None, **named,
    )  # fmt: skip
    return score, terminal


@pytest.mark.parametrize(
    ("off", "points"), [(0, 4), (2.5, 4), (3, 3), (7.5, 3), (8, 2), (12.5, 2), (13, 0), (100, 0)]
)
def test_points(off, points):
    score = Score()
    assert score.add(off, 0.0) == points
    assert (score.points, score.rounds, score.error) == (points, 1, off)
    assert score.add(100.0 - off, 100.0) == points


def test_you_speak():
    score, terminal = run("lava", "fridge")
    assert score.rounds == 2
    assert terminal.text.count("The model guesses 50.") == 2
    assert terminal.shown[-1].startswith(f"{score.points} of 8 points, rounds: 2")
    targets = [float(t.split()[3].rstrip(".")) for t in terminal.shown if "The target is" in t]
    assert score.error == pytest.approx(sum(abs(t - 50) for t in targets))
    _, again = run("lava", "fridge")
    assert again.text == terminal.text


def test_a_clue_that_breaks_a_rule_is_asked_for_again():
    score, terminal = run("very hot", "50", "lava", rounds=1)
    assert score.rounds == 1
    assert terminal.text.count("That breaks a rule") == 2


def test_you_listen():
    score, terminal = run("warm", "101", "nan", "-1", "30", rounds=1, role="listen")
    assert score.rounds == 1
    assert terminal.text.count("is not a number from 0 to 100") == 4
    target = next(float(t.split()[-1].rstrip(".")) for t in terminal.shown if "target was" in t)
    assert f"The clue is: clue {target:g}" in terminal.text
    assert score.error == pytest.approx(abs(30 - target))


@pytest.mark.parametrize("lines", [(), ("q",), ("Quit",), ("exit",)])
def test_stopping_before_the_first_round_is_over(lines):
    score, terminal = run(*lines)
    assert score.rounds == 0
    assert "points, rounds" not in terminal.text


def test_stopping_later_keeps_the_score():
    score, terminal = run("lava", "q", rounds=5)
    assert score.rounds == 1
    assert "rounds: 1" in terminal.shown[-1]


def test_each_scale_once_before_any_comes_again():
    terminal = Terminal(*["lava"] * 24)
    play(role="speak", ask=terminal.ask, say=terminal.say, listener=middling(), rounds=24)
    rounds = [line.split(": ", 1)[1] for line in terminal.shown if line.startswith("Round")]
    assert len(set(rounds[:12])) == len(set(rounds[12:])) == len(SCALES) == 12


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"role": "watch"}, "role must be speak or listen, not 'watch'"),
        ({"role": "listen"}, "needs a speaker"),
        ({"role": "speak"}, "needs a listener"),
        ({"role": "speak", "listener": middling(), "rounds": 0}, "0 rounds"),
        ({"role": "speak", "listener": middling(), "scales": []}, "on 0 scales"),
        ({"role": "speak", "listener": middling(), "step": 7}, "step"),
    ],
)
def test_bad_input(named, message):
    terminal = Terminal("x")
    with pytest.raises(UserError, match=message):
        play(ask=terminal.ask, say=terminal.say, **named)
