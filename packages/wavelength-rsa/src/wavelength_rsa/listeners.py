"""Listeners: where on a scale does a clue point? By log-probabilities, by samples, from a table.

All answer with distributions over one grid, `[N, n]`, so that metrics, speakers and RSA take any
of them. A question is a scale and a clue.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError, suggest
from tenfold_common.lm.base import stream_seed
from wavelength_rsa.metrics import check_probs
from wavelength_rsa.prompts import Prompts, prompts_for
from wavelength_rsa.scales import Distribution, Scale, grid, project, tidy

if TYPE_CHECKING:
    from tenfold_common.lm import Generation, Prompt, Score, TextModel
    from wavelength_rsa.data import Item

logger = logging.getLogger(__name__)

# Prompts that a model gets in one call. What is sampled depends on it, and a kill loses so many.
TOGETHER = 16

Array: TypeAlias = NDArray[np.float64]
Question: TypeAlias = tuple[Scale, str]
Normalize: TypeAlias = Literal["none", "token", "char", "pmi"]
NORMALIZE: tuple[str, ...] = get_args(Normalize)


class Listener(ABC):
    """Base of all listeners: a subclass gives `_listen` and `describe`.

    Attributes:
        name: What to call it in results.
        step: Distance of neighbouring positions of its grid.
    """

    name: str
    step: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what decides the answers, as JSON: class, model, prompt hash, settings."""

    def models(self) -> "list[TextModel]":
        """Return the models that answer; none for a listener without one."""
        return []

    @abstractmethod
    def _listen(self, questions: list[Question], seed: int) -> Array:
        """Return distributions `[N, n]` for different questions, at least one."""

    def listen(self, questions: Sequence[Question], *, seed: int = 0) -> Array:
        """Return where the listener takes each clue to point.

        Equal questions are asked once; two clues are equal that differ only in Unicode form and
        white space. What is sampled depends on the place of a question among the others.

        Args:
            questions: N pairs of scale and clue.
            seed: Fixes what is random, from 0 to 2**32 - 1.

        Returns:
            `[N, n]`, float64, rows sum to 1 over the positions `grid(step)`.

        Raises:
            UserError: a question is none or its clue is blank, or there is no answer.
        """
        places: dict[Question, int] = {}
        order = [places.setdefault(check_question(q), len(places)) for q in questions]
        if not order:
            return np.zeros((0, len(grid(self.step))))
        probs, _ = check_probs(self._listen(list(places), seed), grid(self.step), self.name)
        return probs[order]

    @overload
    def distribution(self, scale: Scale, clues: str, *, seed: int = 0) -> Distribution: ...
    @overload
    def distribution(
        self, scale: Scale, clues: list[str] | tuple[str, ...], *, seed: int = 0
    ) -> list[Distribution]: ...
    def distribution(
        self, scale: Scale, clues: str | list[str] | tuple[str, ...], *, seed: int = 0
    ) -> Distribution | list[Distribution]:
        """Return the distribution for one clue, or a list of them for several.

        Args:
            scale: The scale.
            clues: A clue, or a list of clues.
            seed: Fixes what is random.

        Raises:
            UserError: see `listen`.
        """
        listed = [clues] if isinstance(clues, str) else list(clues)
        probs = self.listen([(scale, clue) for clue in listed], seed=seed)
        found = [Distribution(grid(self.step), row) for row in probs]
        return found[0] if isinstance(clues, str) else found


class TableListener(Listener):
    """A listener whose answers are written down: people's responses, or the meanings of a toy.

    Args:
        table: From (left, right, clue) to probabilities `[n]`. Clues match in Unicode form NFC and
            without white space around; case counts.
        step: Distance of neighbouring positions.
        default: Answer to other clues: "uniform", or None to raise.
        name: What to call it.

    Raises:
        UserError: a row is no distribution on the grid, or default is unknown.
    """

    def __init__(
        self,
        table: Mapping[tuple[str, str, str], ArrayLike],
        *,
        step: int = 5,
        default: Literal["uniform"] | None = None,
        name: str = "table",
    ) -> None:
        if default not in ("uniform", None):
            raise UserError(f"default must be 'uniform' or None, not {default!r}")
        self.name, self.step, self.default = name, step, default
        self.table = {
            check_question((Scale(left, right), clue)): check_probs(
                row, grid(step), f"the row of {clue!r} on {left} .. {right}"
            )[0]
            for (left, right, clue), row in table.items()
        }

    @classmethod
    def from_items(
        cls,
        items: "Iterable[Item]",
        step: int = 5,
        smoothing: float = 0.0,
        responses: slice | None = None,
        *,
        default: Literal["uniform"] | None = None,
        name: str = "people",
    ) -> "TableListener":
        """Return people as a listener: the histograms of their responses.

        Args:
            items: Items with responses; those of equal scale and clue are pooled.
            step: Distance of neighbouring positions.
            smoothing: Added to the count of every position, so that none is impossible.
            responses: Which responses of each item, such as `slice(20)`. Defaults to all.
            default: Answer to other clues, see the class.
            name: What to call it.

        Raises:
            UserError: an item has no responses, or none in the slice.
        """
        pooled: dict[tuple[str, str, str], list[float]] = {}
        for item in items:
            chosen = (item.responses or ())[responses or slice(None)]
            if not chosen:
                raise UserError(f"item {item.id!r} ({item.clue!r}) has no responses to listen with")
            key = item.scale.left, item.scale.right, tidy(item.clue)
            pooled.setdefault(key, []).extend(chosen)
        table = {
            key: Distribution.from_samples(values, step, smoothing).probs
            for key, values in pooled.items()
        }
        return cls(table, step=step, default=default, name=name)

    def describe(self) -> dict[str, Any]:
        """Return its name, settings and a hash of the table."""
        digest = sha256()
        for (scale, clue), row in self.table.items():
            digest.update(repr((scale.left, scale.right, clue, row.tolist())).encode())
        return {
            "class": type(self).__name__,
            "name": self.name,
            "step": self.step,
            "default": self.default,
            "clues": len(self.table),
            "hash": digest.hexdigest(),
        }

    def _listen(self, questions: list[Question], seed: int) -> Array:
        return np.stack([self._row(question) for question in questions])

    def _row(self, question: Question) -> Array:
        if question in self.table:
            return self.table[question]
        if self.default == "uniform":
            return np.full(len(grid(self.step)), 1 / len(grid(self.step)))
        scale, clue = question
        known = [c for s, c in self.table if s == scale]
        raise UserError(
            f"the listener {self.name!r} does not know the clue {clue!r} on {scale}; it knows "
            f"{len(known)} clues there.{suggest(clue, known)} With default='uniform' unknown clues "
            "tell it nothing"
        )


class LogprobListener(Listener):
    """Reads the distribution off the log-probabilities of all n answers; nothing is sampled.

    With the defaults this is the paper's: L0(t | u) is proportional to the probability of the
    whole text of answer t after the prompt, whatever its number of tokens.

    Args:
        model: Any `tenfold_common.lm` model that scores.
        prompts: The texts. Defaults to `prompts_for(model)`.
        step: Distance of neighbouring positions.
        normalize: What is compared: the log-probability ("none"), the same per token ("token") or
            per character ("char"), or less that of the answer after the prompt with a blank clue
            ("pmi").
        temperature: Divides the scores, above 0.
        end: Text that follows every answer and is scored with it. "turn" takes what the model's
            chat template puts after a reply, as the paper's implementation does. Defaults to none.

    Raises:
        UserError: a setting is not accepted, or end="turn" and there is no chat template.
    """

    def __init__(
        self,
        model: "TextModel",
        prompts: Prompts | None = None,
        *,
        step: int = 5,
        normalize: Normalize = "none",
        temperature: float = 1.0,
        end: str | None = None,
    ) -> None:
        if normalize not in NORMALIZE:
            raise UserError(
                f"normalize must be one of {', '.join(NORMALIZE)}, not {normalize!r}."
                + suggest(str(normalize), NORMALIZE)
            )
        check_number("temperature", temperature, above=True)
        grid(step)
        self.model = model
        self.prompts = prompts if prompts is not None else prompts_for(model)
        self.step, self.normalize, self.temperature = step, normalize, float(temperature)
        self.end = _end_of_turn(model) if end == "turn" else end or ""
        self.name = f"{model.name} (log-probabilities)"

    def describe(self) -> dict[str, Any]:
        """Return the model, the prompts' hash and the settings."""
        return {
            "class": type(self).__name__,
            "model": self.model.name,
            "prompts": self.prompts.hash,
            "step": self.step,
            "normalize": self.normalize,
            "temperature": self.temperature,
            "end": self.end,
        }

    def models(self) -> "list[TextModel]":
        """Return the model."""
        return [self.model]

    def _listen(self, questions: list[Question], seed: int) -> Array:
        answers = [self.prompts.answer(int(t)) + self.end for t in grid(self.step)]
        asked = [self.prompts.listener(scale, clue, step=self.step) for scale, clue in questions]
        scales = list(dict.fromkeys(scale for scale, _ in questions))
        if self.normalize == "pmi":
            asked += [self.prompts.listener(scale, "", step=self.step) for scale in scales]
        scores = self._scores(asked, answers)
        values = np.array([[self._value(s, a) for s, a in zip(row, answers, strict=True)]
                           for row in scores])  # [N (+ scales), n]  # fmt: skip
        blank = values[len(questions) :]
        values = values[: len(questions)]
        if self.normalize == "pmi":
            own = blank[[scales.index(scale) for scale, _ in questions]]
            with np.errstate(invalid="ignore"):  # impossible with and without the clue
                values = np.where(np.isneginf(values), values, values - own)
        best = values.max(1, keepdims=True)
        if not np.isfinite(best).all():
            scale, clue = questions[int(np.argmin(np.isfinite(best[:, 0])))]
            raise UserError(
                f"{self.model.name} gives no answer about {clue!r} on {scale} a finite "
                "log-probability, so there is nothing to compare; try dtype float32"
            )
        weights = np.exp((values - best) / self.temperature)
        return weights / weights.sum(1, keepdims=True)

    def _scores(self, asked: "list[Prompt]", answers: list[str]) -> "list[list[Score]]":
        try:
            return [
                row
                for block in in_blocks(asked)
                for row in self.model.score_many(block, [answers] * len(block))
            ]
        except UserError as error:
            # Some servers leave the log-probabilities out, others refuse the field by its name.
            if not re.search("log-probabilities|logprobs", str(error)):
                raise
            raise UserError(
                f"{error}. Without them a model can still be sampled: use SamplingListener, on the "
                "command line --mode sample"
            ) from error

    def _value(self, score: "Score", answer: str) -> float:
        lengths = {"token": len(score.logprobs), "char": len(answer)}
        return score.total / lengths.get(self.normalize, 1)


class SamplingListener(Listener):
    """Asks for a position many times and counts; with `cot` the model reasons before each.

    Any whole number from 0 to 100 is asked for, as in the paper, and the answers are split between
    neighbouring positions of the grid, which keeps their mean. Answers that cannot be read, or are
    out of range, are asked for again with other seeds, and counted.

    Args:
        model: Any `tenfold_common.lm` model.
        prompts: The texts. Defaults to `prompts_for(model)`.
        step: Distance of neighbouring positions.
        num_samples: Answers per question, at least 1.
        cot: Let the model think step by step.
        temperature: Of the samples; at 0 all are alike.
        smoothing: Added to the count of every position. Defaults to 0.5 / n, so that no position
            is impossible.
        max_tokens: Of one answer. Defaults to 24, with cot to 1024.
        max_retries: How often to ask again, at least 0. A question with fewer readable answers in
            the end goes with those; one with none raises.

    Attributes:
        last_stats: Counts of the last call: `questions`, `drawn` and `used` answers, `unusable`
            ones, of these `cut_off` at max_tokens, `rounds`, and `incomplete` questions with fewer
            answers than num_samples.

    Raises:
        UserError: a setting is not accepted.
    """

    def __init__(
        self,
        model: "TextModel",
        prompts: Prompts | None = None,
        *,
        step: int = 5,
        num_samples: int = 32,
        cot: bool = False,
        temperature: float = 1.0,
        smoothing: float | None = None,
        max_tokens: int | None = None,
        max_retries: int = 10,
    ) -> None:
        check_count("num_samples", num_samples)
        check_count("max_retries", max_retries, least=0)
        check_number("temperature", temperature)
        smoothing = 0.5 / len(grid(step)) if smoothing is None else smoothing
        check_number("smoothing", smoothing)
        self.model = model
        self.prompts = prompts if prompts is not None else prompts_for(model)
        self.step, self.num_samples, self.cot = step, num_samples, cot
        self.temperature, self.smoothing = temperature, smoothing
        self.max_tokens = tokens_for(cot) if max_tokens is None else max_tokens
        check_count("max_tokens", self.max_tokens)
        self.max_retries = max_retries
        self.last_stats: dict[str, int] = {}
        self.name = f"{model.name} ({'reasoning samples' if cot else 'samples'})"

    def describe(self) -> dict[str, Any]:
        """Return the model, the prompts' hash and the settings."""
        return {
            "class": type(self).__name__,
            "model": self.model.name,
            "prompts": self.prompts.hash,
            "step": self.step,
            "num_samples": self.num_samples,
            "cot": self.cot,
            "temperature": self.temperature,
            "smoothing": self.smoothing,
            "max_tokens": self.max_tokens,
            "max_retries": self.max_retries,
        }

    def models(self) -> "list[TextModel]":
        """Return the model."""
        return [self.model]

    def _listen(self, questions: list[Question], seed: int) -> Array:
        draws, rounds = draw_readable(
            self.model,
            [self.prompts.listener(s, clue, step=None, cot=self.cot) for s, clue in questions],
            lambda text: self.prompts.read_answer(text, cot=self.cot),
            n=self.num_samples,
            least=self.num_samples,
            retries=self.max_retries,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            stop=() if self.cot else self.prompts.answer_stop,
            seed=seed,
        )
        used = sum(len(draw.values) for draw in draws)
        unusable = sum(draw.unusable for draw in draws)
        self.last_stats = {
            "questions": len(questions),
            "drawn": sum(draw.drawn for draw in draws),
            "used": used,
            "unusable": unusable,
            "cut_off": sum(draw.cut_off for draw in draws),
            "rounds": rounds,
            "incomplete": sum(len(draw.values) < self.num_samples for draw in draws),
        }
        for (scale, clue), draw in zip(questions, draws, strict=True):
            if not draw.values:
                raise draw.error(
                    f"about the clue {clue!r} on {scale} named a position from 0 to 100"
                )
        counts = np.stack([project(draw.values, self.step) for draw in draws]) + self.smoothing
        return counts / counts.sum(1, keepdims=True)


T = TypeVar("T")


@dataclass
class Draw(Generic[T]):
    """What a model replied to one prompt.

    Attributes:
        values: What was read from usable replies.
        drawn: Number of replies.
        unusable: Number of those that could not be read.
        cut_off: Of these the number that ended at max_tokens.
        shown: The first three unusable replies.
    """

    values: list[T] = field(default_factory=list)
    drawn: int = 0
    unusable: int = 0
    cut_off: int = 0
    shown: list[str] = field(default_factory=list)

    def error(self, what: str) -> UserError:
        """Return the error that says that no reply was usable."""
        shown = "; ".join(repr(text[:200]) for text in self.shown)  # no control characters
        return UserError(
            f"none of {self.drawn} replies {what} ({self.cut_off} were cut off at max_tokens). "
            f"The first: {shown}. Use a model that follows instructions, more max_tokens, or for a "
            "reasoning model its switch in template_options"
        )


def draw_readable(
    model: "TextModel",
    prompts: "Sequence[Prompt]",
    read: Callable[[str], T | None],
    *,
    n: int,
    least: int,
    retries: int,
    temperature: float,
    max_tokens: int,
    stop: Sequence[str],
    seed: int,
) -> tuple[list[Draw[T]], int]:
    """Sample replies until every prompt has enough that can be read, `TOGETHER` prompts a call.

    Args:
        model: The model.
        prompts: N prompts.
        read: Returns what a reply says, or None if it is of no use.
        n: Usable replies wanted per prompt, and drawn at first.
        least: Ask again for what lacks to n while there are fewer than this.
        retries: The most further rounds, each with another seed; none at temperature 0, where all
            replies are alike.
        temperature: Of the samples.
        max_tokens: Of one reply.
        stop: Texts that end a reply. A reply cut off before one of them is of no use: the number
            or word that it ends with may be half of one.
        seed: Fixes the replies.

    Returns:
        One draw per prompt, and the number of rounds.
    """
    draws = [Draw() for _ in prompts]
    for number in range(1 + (retries if temperature else 0)):
        missing = [i for i, draw in enumerate(draws) if len(draw.values) < least]
        if not missing:
            return draws, number
        for place, block in enumerate(in_blocks(missing)):
            replies = model.sample(
                [prompts[i] for i in block],
                n=max(n - len(draws[i].values) for i in block),
                temperature=temperature,
                max_tokens=max_tokens,
                stop=stop,
                seed=stream_seed(seed, number, place) % 2**32 if number or place else seed,
            )
            for i, generations in zip(block, replies, strict=True):
                for generation in generations[: n - len(draws[i].values)]:
                    _take(draws[i], generation, read, bool(stop))
    return draws, 1 + (retries if temperature else 0)


def in_blocks(items: Sequence[T]) -> Iterator[list[T]]:
    """Yield the items, `TOGETHER` at a time, and log how far it is."""
    for start in range(0, len(items), TOGETHER):
        yield list(items[start : start + TOGETHER])
        if len(items) > TOGETHER:
            logger.info("%d of %d prompts", min(start + TOGETHER, len(items)), len(items))


def _take(
    draw: Draw[T], reply: "Generation", read: Callable[[str], T | None], stoppable: bool
) -> None:
    cut_off = reply.finish_reason == "length"
    value = None if cut_off and stoppable else read(reply.text)
    draw.drawn += 1
    if value is not None:
        draw.values.append(value)
        return
    draw.unusable += 1
    draw.cut_off += cut_off
    if len(draw.shown) < 3:
        draw.shown.append(reply.text)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise a UserError unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_number(name: str, value: object, *, above: bool = False, infinite: bool = False) -> None:
    """Raise a UserError unless a value is a number >= 0 (`above`: > 0), finite or not."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else np.nan
    fits = number > 0 if above else number >= 0  # False for NaN
    if not fits or (number == np.inf and not infinite):
        bound = "above 0" if above else "of at least 0"
        raise UserError(f"{name} must be a number {bound}, not {value!r}")


def tokens_for(cot: bool) -> int:
    """Return how many tokens a reply may have unless said otherwise."""
    return 1024 if cot else 24


def check_question(question: Question) -> Question:
    """Return a question with its clue in normal form, after checking it."""
    fits = isinstance(question, tuple) and len(question) == 2
    if not fits or not isinstance(question[0], Scale) or not isinstance(question[1], str):
        raise UserError(f"a question is a pair (Scale, clue), not {question!r}")
    scale, clue = question
    clue = tidy(clue)
    if not clue:
        raise UserError(f"the clue on {scale} is blank; a clue is a word or a phrase")
    return scale, clue


def _end_of_turn(model: "TextModel") -> str:
    """Return what the model's chat template puts after a reply."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"end='turn' needs the chat template of {model.name}, but there is none in this "
            "process; give the text itself, such as end='<|im_end|>'"
        )
    reply = "<answer>50</answer>"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    end = text.rpartition(reply)[2]
    if not end:
        raise UserError(
            f"the chat template of {model.name} puts nothing after a reply; leave out end"
        )
    return end
