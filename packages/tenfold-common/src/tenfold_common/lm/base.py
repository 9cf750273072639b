"""What a language model is to its users: prompts, generations, scores and one protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from tenfold_common.errors import UserError

FinishReason: TypeAlias = Literal["stop", "length"]
Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = "str | Sequence[Message]"


class PromptTooLong(UserError):
    """A prompt does not fit the model's context; the message gives both numbers."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled text.

    Attributes:
        text: What follows the prompt, without the end token and from before the stop string.
        finish_reason: `"stop"` (end token or stop string) or `"length"` (max_tokens or context).
        tokens: Number of generated tokens, the end token and those of the stop string included.
    """

    text: str
    finish_reason: FinishReason
    tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of a continuation's tokens.

    Attributes:
        logprobs: Natural logarithms, one per scored token.
        offsets: For each token its span of characters `(start, end)` in the continuation.
    """

    logprobs: tuple[float, ...]
    offsets: tuple[tuple[int, int], ...]

    @property
    def total(self) -> float:
        """Natural logarithm of the probability of the continuation."""
        return math.fsum(self.logprobs)


@runtime_checkable
class TextModel(Protocol):
    """What all back-ends do alike.

    A prompt is a text, or a list of messages `{"role": ..., "content": ...}` laid out by the
    model's chat template. Messages that end with one of the assistant are continued, not closed.
    """

    @property
    def name(self) -> str:
        """What to call the model in results."""
        ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[Generation]]:
        """Sample `n` texts per prompt.

        Equal calls give equal texts on one machine. Every sample has a random stream of its own,
        made from `seed`, the place of the prompt in the list and the number of the sample.

        Args:
            prompts: Texts or lists of messages.
            n: Samples per prompt.
            temperature: Divides the logits; 0 takes the likeliest token, for all `n` alike.
            top_p: Samples from the likeliest tokens that hold this share of the probability.
            max_tokens: The most tokens to generate.
            stop: Texts at which to stop; they are not part of the result.
            seed: From 0 to 2**32 - 1.

        Returns:
            One list of `n` generations per prompt, in the order of the prompts.

        Raises:
            UserError: an argument or a prompt does not fit; the message says which.
        """
        ...

    def score(self, prefix: Prompt, continuations: Sequence[str]) -> list[Score]:
        """Log-probabilities of texts that could follow a prefix.

        Prefix and continuation are tokenised together, as the model would read them. If that
        merges characters of both into one token, scoring starts after the tokens that this and the
        tokenisation of the prefix alone have in common, so that no token is left out; tokens
        within the prefix then have the span `(0, 0)`.

        Args:
            prefix: A text or a list of messages.
            continuations: Texts, none of them empty.

        Returns:
            One score per continuation.

        Raises:
            UserError: a continuation is empty, or the prefix has no token to condition on.
        """
        ...

    def score_many(
        self, prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Log-probabilities of texts that could follow each of several prefixes.

        The scores are those of `score`, one prefix after the other; asking for all at once lets a
        back-end share work between them.

        Args:
            prefixes: Texts or lists of messages.
            continuations: For each prefix its texts, none of them empty.

        Returns:
            One list of scores per prefix, in the order of the prefixes.

        Raises:
            UserError: as `score`, or there are not as many lists of texts as prefixes.
        """
        ...


def check_sampling(
    prompts: Sequence[Prompt],
    n: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    stop: Sequence[str],
    seed: int,
) -> None:
    """Raise a UserError for the first argument of `sample` that does not fit."""
    if isinstance(prompts, (str, Mapping)):
        raise UserError("prompts must be a list of prompts; put the one prompt in a list")
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompts[{i}]")
    for name, number in (("n", n), ("max_tokens", max_tokens)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"{name} must be an integer of at least 1, not {number!r}")
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise UserError(f"temperature must be a number of at least 0, not {temperature!r}")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p!r}")
    if isinstance(stop, str) or any(not isinstance(s, str) or not s for s in stop):
        raise UserError(f"stop must be a list of texts, none of them empty, not {stop!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer from 0 to {2**32 - 1}, not {seed!r}")


def check_prompt(prompt: Prompt, name: str) -> None:
    """Raise a UserError unless this is a text or a list of messages with role and content."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise UserError(f"{name} must be a text or a list of messages, not {prompt!r}")
    for message in prompt:
        fits = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not fits:
            raise UserError(
                f"{name} holds {message!r}; a message is a dict with the texts role and content"
            )


def check_continuations(
    prefix: Prompt,
    continuations: Sequence[str],
    *,
    names: tuple[str, str] = ("prefix", "continuations"),
) -> None:
    """Raise a UserError for the first argument of `score` that does not fit."""
    check_prompt(prefix, names[0])
    if isinstance(continuations, str):
        raise UserError(f"{names[1]} must be a list of texts; put the one text in a list")
    for i, text in enumerate(continuations):
        if not isinstance(text, str) or not text:
            raise UserError(f"{names[1]}[{i}] must be a text that is not empty, not {text!r}")


def check_scoring(prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]) -> None:
    """Raise a UserError for the first argument of `score_many` that does not fit."""
    if isinstance(prefixes, (str, Mapping)):
        raise UserError("prefixes must be a list of prompts; put the one prompt in a list")
    if isinstance(continuations, str):
        raise UserError("continuations must be a list of lists of texts, one for each prefix")
    if len(prefixes) != len(continuations):
        raise UserError(
            f"there are {len(prefixes)} prefixes, but {len(continuations)} lists of continuations; "
            "give one list for each prefix"
        )
    for i, (prefix, texts) in enumerate(zip(prefixes, continuations, strict=True)):
        check_continuations(prefix, texts, names=(f"prefixes[{i}]", f"continuations[{i}]"))


def stream_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one sample's own random stream, below 2**48, alike on every machine."""
    from hashlib import blake2b

    digest = blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def first_stop(text: str, stop: Iterable[str]) -> int | None:
    """Where the first of the stop strings begins in a text."""
    return min((place for s in stop if (place := text.find(s)) >= 0), default=None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
