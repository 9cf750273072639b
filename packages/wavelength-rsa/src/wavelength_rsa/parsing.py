"""Reading replies: which position a listener names, which clue a speaker gives.

Where to look (`cot` stands for replies that reason first; tags are lower case):

| reply | without cot | with cot |
|---|---|---|
| `... </think> rest` | only the rest counts | only the rest counts |
| `<think>` that is never closed | nothing | nothing |
| several answer tags | the first | the last complete one, or the first with `last=False` |
| `<answer>45`, not closed | 45: the stop string was cut off | nothing: it may be half of one |
| no tag | position: the whole reply; clue: nothing | nothing |

What is a position, in a tag or in a whole reply:

| text | position | why |
|---|---|---|
| `45`, `45.5`, `**70**`, `70.` | 45, 45.5, 70, 70 | |
| `70%`, `70 percent`, `50/100`, `50 out of 100` | 70, 70, 50, 50 | that is the scale |
| `around 70`, `Position: 70` | 70 | one number among words |
| `60-70`, `60 to 70`, `45, 50` | none | two numbers are no guess |
| `8/10`, `1e1`, `1,000`, `45,5`, `7th` | none | another scale or way of writing: not guessed at |
| `0.7`, `1.0` | none | may be a fraction of 1 |
| `-5`, `101` | none | out of range; never moved to the nearest end |
| `seventy`, `4 5`, `` | none | |

A clue is one line of at most 200 printable characters with a letter or digit and without `<` and
`>`. Quotation marks and asterisks around it and one full stop behind it are taken off.

Time is linear in the length of the text, whatever it holds, and nothing raises.
"""

import re

from wavelength_rsa.scales import tidy

MAX_CLUE = 200
_PAIRS = {('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("*", "*"), ("_", "_"), ("`", "`")}
# [0-9] and not \d, which takes the digits of every script.
_NUMBER = re.compile(
    r"([-+−]?(?:[0-9]+(?:[.,][0-9]+)*|[.,][0-9]+))"
    r"(\s{0,3}(?:%|percent\b|(?:/|out of|of)\s{0,3}100(?![0-9.,]*[0-9])))?",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"0{0,2}[0-9]{1,3}(?:\.[0-9]{1,9})?")


def read_position(text: str, *, cot: bool = False, last: bool | None = None) -> float | None:
    """Return the position that a reply names, from 0 to 100, or None; see the module's tables.

    Args:
        text: The reply; a stop string at its end may be missing.
        cot: The reply reasons before it answers, so only a complete tag is an answer.
        last: Read the last complete tag instead of the first. Defaults to `cot`.

    Example:
        >>> read_position("Sure! <answer>**70**"), read_position("<answer>60-70</answer>")
        (70.0, None)
        >>> read_position("First 20 .. so <answer>45</answer>", cot=True)
        45.0
    """
    said = _said(text, "answer", cot, cot if last is None else last, tagged=cot)
    return None if said is None else _position(said)


def read_clue(text: str, *, cot: bool = False, last: bool | None = None) -> str | None:
    """Return the clue that a reply gives, or None; see the module's tables.

    Args:
        text: The reply; a stop string at its end may be missing.
        cot: The reply reasons before the clue, so only a complete tag holds one.
        last: Read the last complete tag instead of the first. Defaults to `cot`.

    Example:
        >>> read_clue('<clue>"race car"</clue>'), read_clue("I would rather not.")
        ('race car', None)
    """
    said = _said(text, "clue", cot, cot if last is None else last, tagged=True)
    return None if said is None else _clue(said)


def _said(text: str, tag: str, complete: bool, last: bool, *, tagged: bool) -> str | None:
    """Return what stands in the tag that counts, or the reply itself where no tag is needed."""
    reply = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    if "<think>" in reply:
        return None
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = reply.rfind(closing) if last else -1
    start = reply.rfind(opening, 0, end) if end >= 0 else -1
    if start < 0:
        start = reply.find(opening)
    if start < 0:
        return None if tagged else reply
    start += len(opening)
    end = reply.find(closing, start)
    if end < 0:
        return None if complete else reply[start:]
    return reply[start:end]


def _position(said: str) -> float | None:
    numbers = list(_NUMBER.finditer(said))
    if len(numbers) != 1:
        return None
    [number] = numbers
    before, after = said[: number.start()][-1:], said[number.end() :].lstrip("*_` ")[:1]
    glued = said[number.end() :][:1]
    if before.isalnum() or glued.isalnum() or after == "/" or not _PLAIN.fullmatch(number[1]):
        return None
    value = float(number[1])
    if "." in number[1] and 0 < value <= 1 and not number[2]:
        return None
    return value if value <= 100 else None


def _clue(said: str) -> str | None:
    clue = said.strip()
    if len(clue) > 2 * MAX_CLUE:
        return None
    while len(clue) > 1 and (clue[0], clue[-1]) in _PAIRS:
        clue = clue[1:-1].strip()
    if clue.endswith(".") and clue.count(".") == 1:
        clue = clue[:-1]
    if "\n" in clue or "\r" in clue or "<" in clue or ">" in clue:
        return None
    clue = tidy(clue)
    fits = len(clue) <= MAX_CLUE and clue.isprintable() and any(map(str.isalnum, clue))
    return clue if fits else None
