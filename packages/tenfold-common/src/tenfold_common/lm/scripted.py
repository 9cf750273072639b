"""A model whose replies are written down beforehand, for tests of what uses a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from tenfold_common.errors import UserError
from tenfold_common.lm.base import (
    Generation,
    Prompt,
    Score,
    check_continuations,
    check_sampling,
    check_scoring,
    first_stop,
)

_TOKEN = re.compile(r"\s*\S+|\s+")  # a word with the white space before it


class ScriptedModel:
    """Replies from a list, a table or a function; a token is a word with the space before it.

    Args:
        replies: A list, used up in order (prompt by prompt, sample by sample); a dict from a text,
            or from the last message's content, to a reply or a list of replies, of which sample
            number j gets the j-th; or a function of the prompt, the seed of the call and the
            number of the sample. Defaults to no replies.
        score: A function of prefix and continuation that returns the log-probability of the whole
            (one token then) or a list with one per word. Defaults to none: `score` raises.
        name: What the model is called. Defaults to `"scripted"`.

    Attributes:
        calls: One dict per call, with `"method"` and the arguments.
    """

    def __init__(
        self,
        replies: Sequence[str]
        | Mapping[str, str | Sequence[str]]
        | Callable[[Prompt, int, int], str] = (),
        *,
        score: Callable[[Prompt, str], float | Sequence[float]] | None = None,
        name: str = "scripted",
    ) -> None:
        if isinstance(replies, str):
            raise UserError("replies must be a list, a dict or a function, not one text")
        self.name = name
        self.calls: list[dict[str, object]] = []
        self._replies = replies
        self._score = score
        self._used = 0

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
        """Give the next replies; see `TextModel.sample`."""
        check_sampling(prompts, n, temperature, top_p, max_tokens, stop, seed)
        self.calls.append(
            {
                **{"method": "sample", "prompts": list(prompts), "n": n},
                **{"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens},
                **{"stop": tuple(stop), "seed": seed},
            }
        )
        return [
            [_generation(self._reply(p, seed, j), max_tokens, stop) for j in range(n)]
            for p in prompts
        ]

    def score(self, prefix: Prompt, continuations: Sequence[str]) -> list[Score]:
        """Ask the function given for scores; see `TextModel.score`."""
        check_continuations(prefix, continuations)
        self.calls.append(
            {"method": "score", "prefix": prefix, "continuations": list(continuations)}
        )
        if self._score is None:
            raise UserError("this ScriptedModel has no scores; give it score=function")
        return [_score(self._score(prefix, text), text) for text in continuations]

    def score_many(
        self, prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Score one prefix after the other, each a call of its own; see `TextModel.score_many`."""
        check_scoring(prefixes, continuations)
        return [self.score(*pair) for pair in zip(prefixes, continuations, strict=True)]

    def _reply(self, prompt: Prompt, seed: int, sample: int) -> str:
        if isinstance(self._replies, Mapping):
            key = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            if key not in self._replies:
                raise UserError(f"this ScriptedModel has no reply to {key!r}")
            found = self._replies[key]
            if isinstance(found, str):
                return found
            if sample >= len(found):
                raise UserError(f"sample {sample} of {key!r} has no reply; there are {len(found)}")
            return found[sample]
        if callable(self._replies):
            return self._replies(prompt, seed, sample)
        if self._used >= len(self._replies):
            raise UserError(f"all {len(self._replies)} replies of this ScriptedModel are used up")
        self._used += 1
        return self._replies[self._used - 1]


def _generation(reply: str, max_tokens: int, stop: Sequence[str]) -> Generation:
    end = first_stop(reply, stop)
    words = _TOKEN.findall(reply if end is None else reply[:end])
    if len(words) > max_tokens:
        return Generation("".join(words[:max_tokens]), "length", max_tokens)
    return Generation("".join(words), "stop", len(words))


def _score(value: float | Sequence[float], text: str) -> Score:
    if isinstance(value, (int, float)):
        return Score((float(value),), ((0, len(text)),))
    spans = tuple(match.span() for match in _TOKEN.finditer(text))
    if len(value) != len(spans):
        raise UserError(f"{text!r} has {len(spans)} words, but the scores are {len(value)}")
    return Score(tuple(float(v) for v in value), spans)
