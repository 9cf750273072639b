"""Seeded data sets, made on the fly: item i depends on (seed, split, i) and on nothing else.

So any sharding over processes, any number of loader workers and any resume sees the same data.
Each item is `{"input_ids": [T] int64, "labels": [T] int64}`; labels are not shifted (the model does
that) and are -100 where no prediction is scored.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from path_attn.config import GROUPS, TrainConfig
from path_attn.files import check_text_file
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
SPLITS = {"train": 0, "validation": 1}


class GeneratedDataset(Dataset[dict[str, Tensor]]):
    """Base of the generated tasks: `size` items, each from its own random generator.

    Args:
        size: Number of items, at least 1.
        seed: Not negative.
        split: "train" or "validation"; the two never share an item's generator.
        token_ids: Id of each word of `words`. Defaults to their positions in `words`.
    """

    words: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        size: int,
        seed: int = 0,
        split: str = "train",
        token_ids: Mapping[str, int] | None = None,
    ) -> None:
        """Store the identity of the data set; nothing is generated yet."""
        if size < 1:
            raise UserError(f"size is {size}; a data set needs at least one item.")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative.")
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        self.size, self.seed, self.split = size, seed, split
        self.ids = np.array(
            [i if token_ids is None else token_ids[word] for i, word in enumerate(self.words)],
            dtype=np.int64,
        )

    def __len__(self) -> int:
        """Return the number of items."""
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of a data set of {self.size}")
        words, scored = self.sample(np.random.default_rng([self.seed, SPLITS[self.split], index]))
        ids = self.ids[words]
        labels = np.where(scored, ids, IGNORE)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return indices into `words`, `[T]` int64, and which are scored, `[T]` bool."""
        raise NotImplementedError


class FlipFlop(GeneratedDataset):
    """Flip-flop language FFL(p) (arXiv 2306.00946): the bit after a read is the bit last written.

    A sequence is T/2 pairs (instruction, bit). The first instruction is a write, the last a read,
    those between are ignore with probability p and write or read with (1 - p)/2 each. The bits of
    write and ignore are fair coins. Only the bits after a read are scored.

    Args:
        length: T in tokens, even, at least 4.
        ignore_probability: p in [0, 1].
        size: Number of items.
        seed: Not negative.
        split: "train" or "validation".
        token_ids: See `GeneratedDataset`.
    """

    words = ("w", "r", "i", "0", "1")

    def __init__(
        self,
        *,
        length: int = 128,
        ignore_probability: float = 0.8,
        size: int,
        seed: int = 0,
        split: str = "train",
        token_ids: Mapping[str, int] | None = None,
    ) -> None:
        """Check the language's parameters."""
        super().__init__(size=size, seed=seed, split=split, token_ids=token_ids)
        if length < 4 or length % 2:
            raise UserError(
                f"length is {length}; flip-flop sequences need an even length of at least 4."
            )
        if not 0 <= ignore_probability <= 1:
            raise UserError(
                f"ignore_probability is {ignore_probability}; it must lie between 0 and 1."
            )
        self.length, self.ignore_probability = length, ignore_probability

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw one sequence."""
        pairs, p = self.length // 2, self.ignore_probability
        instruction = rng.choice(3, size=pairs, p=[(1 - p) / 2, (1 - p) / 2, p])
        instruction[0], instruction[-1] = 0, 1
        bits = rng.integers(0, 2, size=pairs)
        latest_write = np.maximum.accumulate(np.where(instruction == 0, np.arange(pairs), 0))
        bits = np.where(instruction == 1, bits[latest_write], bits)
        words = np.stack([instruction, bits + 3], 1).reshape(-1)
        scored = np.stack([np.zeros(pairs, bool), instruction == 1], 1).reshape(-1)
        return words, scored


# Generators as images of 0, 1, 2, ...: x -> g[x]. For A5 and A4 the 3-cycles (1 2 3), (1 2 4), (1 2
# 5); for S3 the transposition (1 2) and the 3-cycle (1 2 3). Inverses are added.
_GENERATORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "s3": ((1, 0, 2), (1, 2, 0)),
    "a4": ((1, 2, 0, 3), (1, 3, 2, 0)),
    "a5": ((1, 2, 0, 3, 4), (1, 3, 2, 0, 4), (1, 4, 2, 3, 0)),
}
_NAMES: dict[str, tuple[str, ...]] = {
    "s3": ("(12)", "(123)", "(123)'"),
    "a4": ("(123)", "(124)", "(123)'", "(124)'"),
    "a5": ("(123)", "(124)", "(125)", "(123)'", "(124)'", "(125)'"),
}


def compose(first: Sequence[int], then: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that applies `first`, then `then`."""
    return tuple(then[x] for x in first)


def inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """Return the inverse permutation."""
    return tuple(int(x) for x in np.argsort(permutation))


def group_generators(group: str) -> dict[str, tuple[int, ...]]:
    """Return the named generators of `group`, inverses included, a self-inverse one once."""
    if group not in GROUPS:
        raise UserError(f"group is {group!r}; it must be one of {', '.join(GROUPS)}.")
    basic = _GENERATORS[group]
    inverses = [inverse(g) for g in basic if inverse(g) not in basic]
    return dict(zip(_NAMES[group], (*basic, *inverses), strict=True))


class WordProblem(GeneratedDataset):
    """Word problem of a permutation group: is the product of these generators the identity?

    A sequence is `<bos> g_1 ... g_n ? answer` with answer "yes" or "no"; g_1 is applied first. Only
    the answer is scored. Half the words (by a fair coin) are uniform among the words of length n
    whose product is the identity, the others uniform among the rest, so guessing is right half the
    time. A5 is perfect: no count of generators tells anything about the product (S3 and A4, for
    small runs, do have such a partial short cut).

    Args:
        group: "a5", "a4" or "s3".
        length: n, the number of generators, at least 2.
        size: Number of items.
        seed: Not negative.
        split: "train" or "validation".
        token_ids: See `GeneratedDataset`.
    """

    def __init__(
        self,
        *,
        group: str = "a5",
        length: int = 16,
        size: int,
        seed: int = 0,
        split: str = "train",
        token_ids: Mapping[str, int] | None = None,
    ) -> None:
        """Count, once, how many words of each length lead to each element."""
        generators = group_generators(group)
        self.words = (*generators, "?", "yes", "no", "<bos>")
        super().__init__(size=size, seed=seed, split=split, token_ids=token_ids)
        if length < 2:
            raise UserError(f"length is {length}; a word needs at least 2 generators.")
        self.group, self.length = group, length
        moves = list(generators.values())
        degree = len(moves[0])
        elements = _closure(moves)
        place = {element: i for i, element in enumerate(elements)}
        self._identity = place[tuple(range(degree))]
        # rest[e][a]: what is left to reach when element e was wanted and generator a has been taken
        # first
        self._rest = [[place[compose(inverse(a), e)] for a in moves] for e in elements]
        ways = np.zeros(
            (length + 1, len(elements))
        )  # share of the words of length m that have product e
        ways[0, self._identity] = 1.0
        for m in range(1, length + 1):
            ways[m] = ways[m - 1][np.array(self._rest)].mean(1)
        self._ways = ways
        self._cumulative = [
            [np.cumsum(ways[m - 1][self._rest[e]]).tolist() for e in range(len(elements))]
            for m in range(1, length + 1)
        ]
        others = ways[length].copy()
        others[self._identity] = 0.0
        self._others = np.cumsum(others).tolist()

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw a target element, then a uniform word among those that reach it."""
        draws = rng.random(self.length + 2).tolist()
        yes = draws[0] < 0.5
        wanted = self._identity if yes else _pick(self._others, draws[1])
        word = []
        for m in range(self.length, 0, -1):
            letter = _pick(self._cumulative[m - 1][wanted], draws[m + 1])
            word.append(letter)
            wanted = self._rest[wanted][letter]
        ask = len(self.words) - 4  # "?", "yes", "no" and "<bos>" follow the generators
        words = np.array([ask + 3, *word, ask, ask + (1 if yes else 2)], dtype=np.int64)
        scored = np.zeros(len(words), bool)
        scored[-1] = True
        return words, scored


def _closure(generators: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return all products of the generators, in lexicographic order."""
    found = {tuple(range(len(generators[0])))}
    new = found
    while new:
        new = {compose(e, g) for e in new for g in generators} - found
        found = found | new
    return [p for p in permutations(range(len(generators[0]))) if p in found]


def _pick(cumulative: list[float], draw: float) -> int:
    """Return the index that `draw` in [0, 1) selects; entries of weight zero are never selected."""
    index = bisect_right(cumulative, draw * cumulative[-1])
    while index >= len(cumulative) or cumulative[index] == (
        cumulative[index - 1] if index else 0.0
    ):
        index -= 1  # only rounding at the very end of the range leads here
    return index


class RepeatedRecall(GeneratedDataset):
    """Multi-query repeated associative recall (MQRAR): the key's value N assignments ago.

    Our exact definition: `<bos> k v k v ... | k v k v ...`. Before the bar every one of `num_pairs`
    keys, chosen from twice as many, is assigned a random value at least N times, in random order;
    the assignments fill the length. After the bar each key comes once, in random order, followed by
    the value of its N-th latest assignment (N = 1: the latest). Only these values are scored.

    Args:
        length: Tokens T, even, at least `2 + 2 * num_pairs * (n_back + 1)`.
        num_pairs: Different keys in a sequence.
        n_back: N, at least 1.
        num_values: Different values.
        size: Number of items.
        seed: Not negative.
        split: "train" or "validation".
        token_ids: See `GeneratedDataset`.
    """

    def __init__(
        self,
        *,
        length: int = 128,
        num_pairs: int = 8,
        n_back: int = 2,
        num_values: int = 16,
        size: int,
        seed: int = 0,
        split: str = "train",
        token_ids: Mapping[str, int] | None = None,
    ) -> None:
        """Check that the assignments fit into the length."""
        if num_pairs < 1 or n_back < 1 or num_values < 2:
            raise UserError(
                f"num_pairs ({num_pairs}) and n_back ({n_back}) must be at least 1, num_values "
                f"({num_values}) at least 2."
            )
        shortest = 2 + 2 * num_pairs * (n_back + 1)
        if length % 2 or length < shortest:
            raise UserError(
                f"length is {length}; {num_pairs} pairs and {n_back} back need an even length of "
                f"at least {shortest}."
            )
        keys, values = [f"k{i}" for i in range(2 * num_pairs)], [f"v{i}" for i in range(num_values)]
        self.words = (*keys, *values, "|", "<bos>")
        super().__init__(size=size, seed=seed, split=split, token_ids=token_ids)
        self.length, self.num_pairs, self.n_back, self.num_values = (
            length,
            num_pairs,
            n_back,
            num_values,
        )

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw keys, assignments and the order of the questions."""
        n, first_value = self.num_pairs, 2 * self.num_pairs
        writes = (self.length - 2 - 2 * n) // 2
        keys = rng.permutation(2 * n)[:n]
        order = np.concatenate(
            [np.repeat(keys, self.n_back), rng.choice(keys, size=writes - n * self.n_back)]
        )
        order = rng.permutation(order)
        values = rng.integers(0, self.num_values, size=writes)
        questions = rng.permutation(keys)
        answers = [values[np.flatnonzero(order == key)[-self.n_back]] for key in questions]
        bar = first_value + self.num_values
        assigned = np.stack([order, values + first_value], 1).reshape(-1)
        asked = np.stack([questions, np.array(answers) + first_value], 1).reshape(-1)
        words = np.concatenate([[bar + 1], assigned, [bar], asked])
        scored = np.zeros(len(words), bool)
        scored[len(words) - 2 * n + 1 :: 2] = True
        return words, scored


class TextChunks(Dataset[dict[str, Tensor]]):
    """Consecutive chunks of one long token sequence; every token but a chunk's first is scored.

    Args:
        tokens: `[N]` int64.
        length: Tokens per chunk, at least 2; a shorter rest at the end is left out.
        where: Name used in the error message.
    """

    def __init__(self, tokens: Tensor, length: int, *, where: str = "the text") -> None:
        """Cut the sequence (a view, no copy)."""
        if length < 2:
            raise UserError(f"length is {length}; text needs chunks of at least 2 tokens.")
        count = len(tokens) // length
        if count == 0:
            raise UserError(
                f"{where} has {len(tokens)} tokens, fewer than one chunk of {length}; give more "
                "text or a smaller length."
            )
        self.length = length
        self.chunks = tokens[: count * length].view(count, length)

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return chunk `index`."""
        chunk = self.chunks[index]
        return {"input_ids": chunk, "labels": chunk}


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        UserError: not there, a directory, not readable, empty, or not UTF-8 text.
    """
    check_text_file(path)
    raw = Path(path).read_bytes()
    if not raw.strip():
        raise UserError(f"{path} is empty.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at position {error.start}."
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is not text: it has a NUL byte at position {raw.index(0)}.")
    return text


def text_tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Return the text's token ids, `[N]` int64, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def split_text(tokens: Tensor, validation_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split by position: the last `validation_fraction` of the tokens is for validation."""
    cut = len(tokens) - round(len(tokens) * validation_fraction)
    return tokens[:cut], tokens[cut:]


def task_tokenizer(config: TrainConfig) -> "PreTrainedTokenizerBase":
    """Return a task's tokenizer: its words; for text the given folder's or bytes."""
    from tenfold_common.tiny import byte_tokenizer, word_tokenizer

    if config.task != "text":
        words = _generated(config, config.length or 128, 1, "train", None).words
        # <pad>, <bos>, <eos> and <unk> are added by the tokenizer itself
        return word_tokenizer([w for w in words if w != "<bos>"])
    if config.tokenizer is None:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    if not Path(config.tokenizer).is_dir():
        raise UserError(f"tokenizer {config.tokenizer} is not a folder.")
    try:
        return AutoTokenizer.from_pretrained(config.tokenizer, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{config.tokenizer} holds no tokenizer that loads: {str(error).splitlines()[0]}"
        ) from error


def task_dataset(
    config: TrainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: str = "train",
    size: int = 1,
    length: int | None = None,
    ignore_probability: float | None = None,
) -> Dataset[dict[str, Tensor]]:
    """Return the data set of a resolved config.

    Args:
        config: A resolved `TrainConfig`.
        tokenizer: That of `task_tokenizer`.
        split: "train" or "validation".
        size: Number of generated items (text has as many as the file gives).
        length: Sequence length, the config's by default.
        ignore_probability: For fflm, the config's by default.
    """
    length = length or config.length or 128
    if config.task == "text":
        parts = split_text(
            text_tokens(read_text(config.data or ""), tokenizer), config.validation_fraction
        )
        return TextChunks(parts[SPLITS[split]], length, where=f"the {split} part of {config.data}")
    return _generated(config, length, size, split, tokenizer.get_vocab(), ignore_probability)


def _generated(
    config: TrainConfig,
    length: int,
    size: int,
    split: str,
    token_ids: Mapping[str, int] | None,
    ignore_probability: float | None = None,
) -> GeneratedDataset:
    """Build the generated task of a config."""
    if config.task == "fflm":
        p = config.ignore_probability if ignore_probability is None else ignore_probability
        return FlipFlop(
            length=length,
            ignore_probability=p,
            size=size,
            seed=config.seed,
            split=split,
            token_ids=token_ids,
        )
    if config.task == "a5":
        return WordProblem(
            group=config.group,
            length=length,
            size=size,
            seed=config.seed,
            split=split,
            token_ids=token_ids,
        )
    return RepeatedRecall(
        length=length,
        num_pairs=config.num_pairs,
        n_back=config.n_back,
        size=size,
        seed=config.seed,
        split=split,
        token_ids=token_ids,
    )
