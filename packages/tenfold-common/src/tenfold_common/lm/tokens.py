"""From prompts to tokens and back: chat templates, boundaries, stop strings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tenfold_common.errors import UserError
from tenfold_common.lm.base import Generation, Prompt, PromptTooLong, Score, first_stop
from tenfold_common.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE = 8  # tokens of the prompt decoded with a generation, so that a space between them stays


class Joint(NamedTuple):
    """Prefix and continuation as one row of tokens, of which those from `first` on are scored."""

    ids: list[int]
    first: int
    offsets: tuple[tuple[int, int], ...]

    def score(self, logprobs: Sequence[float]) -> Score:
        """Join the spans to their log-probabilities."""
        return Score(tuple(logprobs), self.offsets)


class Tokens:
    """A tokenizer with what sampling and scoring need of it.

    Args:
        tokenizer: A transformers tokenizer.
        template_options: Variables for its chat template, such as `{"enable_thinking": False}`.
        skip_special_tokens: Leave special tokens out of texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_options: Mapping[str, object] | None,
        skip_special_tokens: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._options: dict[str, Any] = dict(template_options or {})

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt; special tokens are added to texts that do not have them yet."""
        ids, _ = self._encode(*self._text(prompt), offsets=False)
        if not ids:
            raise UserError(f"the prompt {prompt!r} has no tokens; a model needs one to start from")
        return ids

    def joint(self, prefix: Prompt, continuations: Sequence[str]) -> list[Joint]:
        """Tokenise a prefix with each continuation; see `TextModel.score` for the boundary."""
        if not self.tokenizer.is_fast:
            raise UserError(
                f"scores need the character spans of tokens, which {type(self.tokenizer).__name__} "
                "does not give; use a fast tokenizer"
            )
        start, special = self._text(prefix)
        alone, _ = self._encode(start, special, offsets=False)
        return [self._joint(start, special, alone, text) for text in continuations]

    def _joint(self, start: str, special: bool, alone: list[int], text: str) -> Joint:
        ids, spans = self._encode(start + text, special, offsets=True)
        first = common_length(alone, ids)
        if first == len(ids):
            raise UserError(f"the continuation {text!r} adds no token to the prefix")
        if first == 0:
            raise UserError(
                f"no token comes before the continuation {text!r}, so it has no probability; "
                "give a longer prefix, or one that starts with a special token"
            )
        border = len(start)
        offsets = tuple((max(0, a - border), max(0, b - border)) for a, b in spans[first:])
        return Joint(ids, first, offsets)

    def _text(self, prompt: Prompt) -> tuple[str, bool]:
        """The text of a prompt, and whether special tokens are still to be added."""
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token
            return prompt, not (bos and prompt.startswith(str(bos)))
        if not self.tokenizer.chat_template:
            raise UserError(
                "the prompt is a list of messages, but the tokenizer has no chat template; "
                "give a text, or set tokenizer.chat_template"
            )
        require("jinja2", extra="lm", package="tenfold-common", purpose="chat templates")
        messages = [dict(message) for message in prompt]
        prefilled = messages[-1]["role"] == "assistant"
        if prefilled and not messages[-1]["content"]:
            messages, prefilled = messages[:-1], False  # nothing said yet: the reply just begins
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                **self._options,
            )
        except (TemplateError, ValueError) as error:
            raise UserError(f"the chat template does not take these messages: {error}") from error
        return str(text), False

    def _encode(
        self, text: str, special: bool, *, offsets: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=offsets)
        ids, spans = list(found["input_ids"]), list(found["offset_mapping"]) if offsets else []
        eos = self.tokenizer.eos_token_id
        if special and ids and ids[-1] == eos:
            # Some tokenizers close every text, but this one is to go on: drop what they added.
            plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            added = _trailing(ids, eos) - _trailing(plain, eos)
            ids = ids[: len(ids) - added]
            spans = spans[: len(ids)]
        return ids, spans

    def decode_after(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text of tokens that follow others, with the space that may be between them."""
        before = self._decode(prompt_ids[-_BEFORE:])
        both = self._decode([*prompt_ids[-_BEFORE:], *ids])
        return both[len(before) :] if both.startswith(before) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(ids),
            skip_special_tokens=self.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def generation(
        self, prompt_ids: Sequence[int], ids: list[int], ends: Collection[int], stop: Sequence[str]
    ) -> Generation:
        """What a row of generated tokens says up to its end token or stop string."""
        end = next((k for k, token in enumerate(ids) if token in ends), None)
        body = ids if end is None else ids[:end]
        text = self.decode_after(prompt_ids, body)
        place = first_stop(text, stop)
        if place is not None:

            def stopped(length: int) -> bool:
                return first_stop(self.decode_after(prompt_ids, body[:length]), stop) is not None

            used = bisect_left(range(len(body)), True, key=stopped)
            return Generation(text[:place], "stop", used)
        if end is None:
            return Generation(text, "length", len(ids))
        return Generation(text, "stop", end + 1)


def _trailing(ids: Sequence[object], token: object) -> int:
    """How many times a token stands at the end."""
    return next((k for k, other in enumerate(reversed(ids)) if other != token), len(ids))


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many first items two sequences have in common."""
    return next(
        (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def check_length(tokens: int, context: int | None, spare: int) -> None:
    """Raise `PromptTooLong` if tokens and `spare` more do not fit the model's context."""
    if context is not None and tokens + spare > context:
        room = f" and needs room for {spare} more" if spare else ""
        raise PromptTooLong(
            f"a prompt has {tokens} tokens{room}, but the model's context is {context} tokens; "
            "shorten the prompt"
        )
