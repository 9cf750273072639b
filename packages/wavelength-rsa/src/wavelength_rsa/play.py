"""The game in a terminal: you give the clues and the model guesses, or the other way round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError
from wavelength_rsa.rules import check_clue
from wavelength_rsa.scales import HIGH, LOW, Scale, grid

if TYPE_CHECKING:
    from wavelength_rsa.listeners import Listener
    from wavelength_rsa.speakers import Speaker

SCALES = tuple(
    Scale(*ends.split("/"))
    for ends in (
        "Quiet/Loud", "Cheap/Expensive", "Boring/Exciting", "Wet/Dry", "Round/Pointed",
        "Ordinary/Strange", "Light/Heavy", "Sour/Sweet", "Rough/Smooth", "Useless/Useful",
        "Easy to forget/Hard to forget", "Small animal/Large animal",
    )
)  # fmt: skip
_BANDS = ((2.5, 4), (7.5, 3), (12.5, 2))  # as on the board: the bull's eye and its neighbours
_WIDTH = 51
QUIT = ("q", "quit", "exit")


@dataclass
class Score:
    """What was reached so far.

    Attributes:
        points: Sum of 4, 3, 2 or 0 points a round.
        rounds: Rounds that were finished.
        error: Sum of the distances between guess and target.
    """

    points: int = 0
    rounds: int = 0
    error: float = 0.0

    def add(self, guess: float, target: float) -> int:
        """Count a round and return its points."""
        distance = abs(guess - target)
        points = next((p for reach, p in _BANDS if distance <= reach), 0)
        self.points += points
        self.rounds += 1
        self.error += distance
        return points


class _Quit(Exception):
    """The player wants to stop."""


def play(
    *,
    role: str,
    ask: Callable[[str], str],
    say: Callable[[str], None],
    listener: "Listener | None" = None,
    speaker: "Speaker | None" = None,
    scales: Sequence[Scale] = SCALES,
    rounds: int = 5,
    step: int = 5,
    seed: int = 0,
) -> Score:
    """Play some rounds.

    Args:
        role: What you do: "speak" (the listener guesses your clues) or "listen" (you guess the
            speaker's).
        ask: Shows a question and returns a line; it raises EOFError at the end of the input.
        say: Shows a line.
        listener: Who guesses, with role "speak".
        speaker: Who gives clues, with role "listen".
        scales: Scales to draw from, each once before any comes again.
        rounds: Rounds to play, at least 1.
        step: Targets are multiples of it.
        seed: Fixes scales, targets and what the model says.

    Returns:
        The score; fewer rounds than asked for if the player quit.

    Raises:
        UserError: the role is unknown, its model is missing, or there is nothing to play.
    """
    if role not in ("speak", "listen"):
        raise UserError(f"role must be speak or listen, not {role!r}")
    if rounds < 1 or not scales:
        raise UserError(f"there is nothing to play: {rounds} rounds on {len(scales)} scales")
    if (listener if role == "speak" else speaker) is None:
        raise UserError(f"role {role!r} needs a {'listener' if role == 'speak' else 'speaker'}")
    targets = grid(step).tolist()
    random = Random(seed)
    score = Score()
    deck: list[Scale] = []
    say(f"{rounds} round{'s' * (rounds > 1)}; q ends the game.")
    try:
        for number in range(rounds):
            deck = deck or random.sample(list(scales), len(scales))
            scale, target = deck.pop(), random.choice(targets)
            say("")
            say(f"Round {number + 1}: {LOW} = {scale.left}, {HIGH} = {scale.right}")
            if role == "speak":
                assert listener is not None
                say(_bar({target: "T"}))
                say(f"The target is {target:g}.")
                clue = _clue(ask, say, scale)
                guess = listener.distribution(scale, clue, seed=seed + number).mean
                say(f"The model guesses {guess:.0f}.")
            else:
                assert speaker is not None
                clue = speaker.speak(scale, target, seed=seed + number).clue
                say(f"The clue is: {clue}")
                guess = _position(ask, say)
                say(f"The target was {target:g}.")
            points = score.add(guess, target)
            say(_bar({target: "T", guess: "G"}))
            say(f"{abs(guess - target):.0f} off: {points} points, {score.points} in all.")
    except (EOFError, _Quit):
        say("")
    if score.rounds:
        say(
            f"{score.points} of {4 * score.rounds} points, rounds: {score.rounds}, "
            f"{score.error / score.rounds:.1f} off on average."
        )
    return score


def _clue(ask: Callable[[str], str], say: Callable[[str], None], scale: Scale) -> str:
    """Ask until the clue keeps the rules."""
    while True:
        clue = _line(ask, "Your clue: ")
        broken = check_clue(clue, scale)
        if not broken:
            return clue
        say("That breaks a rule: " + "; ".join(violation.message for violation in broken))


def _position(ask: Callable[[str], str], say: Callable[[str], None]) -> float:
    """Ask until the guess is a number on the scale."""
    while True:
        text = _line(ask, f"Your guess ({LOW} to {HIGH}): ")
        try:
            guess = float(text)
        except ValueError:
            guess = -1.0
        if LOW <= guess <= HIGH:
            return guess
        say(f"{text!r} is not a number from {LOW} to {HIGH}.")


def _line(ask: Callable[[str], str], question: str) -> str:
    line = ask(question).strip()
    if line.lower() in QUIT:
        raise _Quit
    return line


def _bar(marks: dict[float, str]) -> str:
    """Draw the scale; marks at one place share it as `*`."""
    cells = ["-"] * _WIDTH
    for position, mark in marks.items():
        place = round((position - LOW) / (HIGH - LOW) * (_WIDTH - 1))
        cells[place] = mark if cells[place] == "-" else "*"
    return f"{LOW} {''.join(cells)} {HIGH}"
