"""The rules for clues: few words, no number, no hedging, nothing of the scale's own words.

A rule breaker is told by what it is (`Violation.code`), so that speakers can drop it and reports
can count it. The rules know English; another language needs its own lists in `Rules`.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tenfold_common.errors import UserError
from wavelength_rsa.scales import Scale

CODES = ("empty", "too_many_words", "equals_end", "end_word", "number", "hedge")

HEDGES = (
    "but", "very", "almost", "slightly", "somewhat", "fairly", "rather", "quite", "extremely",
    "nearly", "barely", "mostly", "moderately", "kind of", "sort of", "a bit", "a little",
)  # fmt: skip


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBER_WORDS = _set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred hundreds thousand thousands million millions billion billions dozen dozens half "
    "percent percentage"
)

# Words of an end ("Best day of the year") that a clue may use all the same.
_FUNCTION_WORDS = _set(
    "a an the of for to it its you your in on at by with and or as is are be do does did not no "
    "that this"
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Longest first; one is taken off after the other while three letters remain.
_SUFFIXES = ("ness", "less", "ment", "ful", "ous", "ive", "ing", "ish", "est", "ly", "er", "ed",
             "es", "al", "s", "i", "e")  # fmt: skip
_LONGEST = 40  # letters; what is longer is no word, and would take long
_NEGATIONS = ("non", "un", "in", "im", "dis")


def words(text: str) -> list[str]:
    """Return the words of a text without case and accents; a hyphen separates, an apostrophe not.

    Example:
        >>> words("Crème-brûlée at Macy's!")
        ['creme', 'brulee', 'at', "macy's"]
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    bare = "".join(sign for sign in plain if not unicodedata.combining(sign))
    return _WORD.findall(bare)


@dataclass(frozen=True)
class Violation:
    """A rule that a clue breaks.

    Attributes:
        code: One of `CODES`.
        message: The same for people.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Rules:
    """What a clue must not do.

    Attributes:
        max_words: The most words, at least 1; words are what white space separates.
        banned: Words and phrases that only shift the meaning of others. Case does not count.
        digits: Refuse digits, other number signs and number words.
        end_words: Refuse a clue that equals an end of the scale or holds one of its words, also in
            another form (`stem`).

    Raises:
        UserError: max_words is below 1, or banned is no list of words.
    """

    max_words: int = 5
    banned: tuple[str, ...] = HEDGES
    digits: bool = True
    end_words: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.max_words, bool) or not isinstance(self.max_words, int):
            raise UserError(f"max_words must be a whole number, not {self.max_words!r}")
        if self.max_words < 1:
            raise UserError(f"max_words must be at least 1, not {self.max_words}")
        listed = isinstance(self.banned, Sequence) and not isinstance(self.banned, str)
        if not listed or not all(isinstance(w, str) and words(w) for w in self.banned):
            raise UserError(f"banned must be a list of words and phrases, not {self.banned!r}")
        object.__setattr__(self, "banned", tuple(self.banned))


DEFAULT_RULES = Rules()


def check_clue(clue: str, scale: Scale, rules: Rules = DEFAULT_RULES) -> list[Violation]:
    """Return the rules that a clue breaks; none for a fair clue.

    Args:
        clue: The clue.
        scale: Its scale.
        rules: The rules. Defaults to those of the game.

    Example:
        >>> scale = Scale("Hard to remember", "Easy to remember")
        >>> [v.code for v in check_clue("very easily remembered 7 digits", scale)]
        ['end_word', 'number', 'hedge']
        >>> check_clue("your own name", scale)
        []
    """
    said = words(clue)
    if not said:
        return [Violation("empty", f"the clue {clue!r} has no word")]
    found = []
    count = sum(any(map(str.isalnum, part)) for part in clue.split())
    if count > rules.max_words:
        found.append(
            Violation("too_many_words", f"{count} words; at most {rules.max_words} are allowed")
        )
    if rules.end_words:
        found += _end_words(said, scale)
    if rules.digits:
        counted = f" {' '.join(said)} ".replace(" no one ", " nobody ").split()
        numbers = [w for w in counted if w in NUMBER_WORDS or any(map(str.isnumeric, w))]
        # Signs such as Ⅳ, which are letters without their accents, and %.
        numbers += [sign for sign in clue if sign.isnumeric() or sign == "%"]
        if numbers:
            found.append(Violation("number", f"{numbers[0]!r} is a number or quantity"))
    line = f" {' '.join(said)} "
    hedges = [h for h in rules.banned if f" {' '.join(words(h))} " in line]
    if hedges:
        found.append(Violation("hedge", f"{hedges[0]!r} only shifts the meaning of other words"))
    return found


@lru_cache(maxsize=4096)
def stem(word: str) -> str:
    """Return the part of a word that its forms share, crudely.

    Taken off, one after the other while three letters remain: 's, the suffixes ness, less, ment,
    ful, ous, ive, ing, ish, est, ly, er, ed, es, al, s, e and a final y (i); then one of a doubled
    last consonant. It is not a dictionary: `formal` and `form` share a stem, `long` and `length` do
    not.

    Args:
        word: A word as `words` returns it.

    Example:
        >>> [stem(w) for w in ("easy", "easily", "easiest", "ease", "hotter", "hot", "dry")]
        ['eas', 'eas', 'eas', 'eas', 'hot', 'hot', 'dri']
    """
    word = re.sub(r"['’]s?$", "", word)
    if len(word) > _LONGEST:
        return word
    while True:
        suffix = next((s for s in _SUFFIXES if _ends_with(word, s)), None)
        if suffix is not None:
            word = word[: -len(suffix)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] in "bdgmnprt":
                word = word[:-1]
        elif len(word) > 2 and word[-1] == "y" and word[-2] not in "aeiou":
            word = word[:-1] + "i"
        else:
            return word


def _ends_with(word: str, suffix: str) -> bool:
    if suffix == "s" and word.endswith(("ss", "us", "is")):
        return False
    return word.endswith(suffix) and len(word) - len(suffix) >= 3


def _forms(word: str) -> set[str]:
    """Stems of a word, and of what a negation such as un- stands before."""
    bare = (word[len(n) :] for n in _NEGATIONS if word.startswith(n) and len(word) > len(n) + 3)
    return {stem(word), *map(stem, bare)}


def _end_words(said: list[str], scale: Scale) -> list[Violation]:
    for end in (scale.left, scale.right):
        if said == words(end):
            return [Violation("equals_end", f"the clue is the end {end!r} itself")]
    for end in (scale.left, scale.right):
        for own in words(end):
            for word in said:
                if own not in _FUNCTION_WORDS and _forms(own) & _forms(word):
                    return [Violation("end_word", f"{word!r} is a form of {own!r}, of {end!r}")]
    return []
