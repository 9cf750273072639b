"""A small world of scales and clues whose meanings are known, and a language model trained in it.

Every clue belongs to one scale and has a true meaning on it: a normal distribution cut to the grid.
Speakers of this world are vague: they choose clues by how frequent they are and only roughly by
where they lie, which is what Rational Speech Acts repair. A speaker who first says the region aloud
("think high") chooses better clues. A Llama of 0.1 million parameters learns listening and speaking
from lines of text, and is then used through the same classes as any other model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tenfold_common.errors import UserError
from wavelength_rsa.scales import Scale, grid

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tenfold_common.lm import TransformersModel
    from wavelength_rsa.data import Item
    from wavelength_rsa.listeners import TableListener

STEP = 5
REGIONS = ("low", "middle", "high")
SCALES = (
    Scale("cold", "hot"), Scale("slow", "fast"), Scale("quiet", "loud"), Scale("cheap", "dear"),
    Scale("soft", "hard"), Scale("young", "old"), Scale("dark", "bright"), Scale("dry", "wet"),
    Scale("near", "far"), Scale("light", "heavy"), Scale("sad", "glad"), Scale("plain", "fancy"),
)  # fmt: skip
_POSITIONS = tuple(f"{t:g}" for t in grid(STEP))
_WORDS = ("scale", "target", "think", "clue", "answer", *REGIONS)
_VAGUE, _REGION = 25.0, 15.0  # sd of where a speaker's clues lie: about the target, about a region


@dataclass(frozen=True, eq=False)
class World:
    """Scales, clues, and what they mean. Make one with `World.make(seed)`.

    Attributes:
        scales: The S scales.
        clues: The W clues of each scale; no clue has two scales.
        mean: Centre of each clue's meaning, float64 `[S, W]`, 0 to 100.
        sd: Width of each clue's meaning, float64 `[S, W]`, above 0.
        frequency: How common each clue is on its scale, float64 `[S, W]`; rows sum to 1.
        held_out: bool `[S, n]`: speakers of the corpus are never asked for these targets.
    """

    scales: tuple[Scale, ...]
    clues: tuple[tuple[str, ...], ...]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    frequency: NDArray[np.float64]
    held_out: NDArray[np.bool_]

    @classmethod
    def make(cls, seed: int = 0, *, clues: int = 20, held_out: float = 0.2) -> "World":
        """Draw a world: centres uniform on 0..100, widths on 4..25, frequencies 1/rank.

        Args:
            seed: Fixes the world.
            clues: W, clues of each scale, at least 2.
            held_out: Share of the (scale, target) cells that no speaker's line has, in [0, 1).

        Raises:
            UserError: a number is out of range.
        """
        if clues < 2:
            raise UserError(f"clues must be at least 2, not {clues}")
        if not 0 <= held_out < 1:
            raise UserError(f"held_out must be at least 0 and below 1, not {held_out}")
        random = np.random.default_rng(seed)
        shape = len(SCALES), clues
        rank = random.permuted(np.tile(np.arange(1, clues + 1), (shape[0], 1)), axis=1)
        cells = len(SCALES) * len(grid(STEP))
        hidden = random.permutation(cells) < round(held_out * cells)
        names = _names(clues * len(SCALES), random)
        return cls(
            scales=SCALES,
            clues=tuple(tuple(names[i :: shape[0]]) for i in range(shape[0])),
            mean=random.uniform(0, 100, shape),
            sd=random.uniform(4, 25, shape),
            frequency=1 / rank / (1 / rank).sum(1, keepdims=True),
            held_out=hidden.reshape(len(SCALES), -1),
        )

    def meanings(self) -> NDArray[np.float64]:
        """Return p(target | clue), `[S, W, n]`: the exact listener."""
        density = np.exp(-(((grid(STEP) - self.mean[..., None]) / self.sd[..., None]) ** 2) / 2)
        return density / density.sum(-1, keepdims=True)

    def speaker(self, *, region: int | None = None) -> NDArray[np.float64]:
        """Return p(clue | target), `[S, n, W]`: how the speakers of the corpus choose.

        Frequency times a normal density of sd 25 in the distance to the target; if the speaker
        said a region first, times one of sd 15 in the distance to its centre.

        Args:
            region: Number of the region, or None for those who speak at once.
        """
        gap = self.mean[:, None, :] - grid(STEP)[:, None]  # [S, n, W]
        weight = self.frequency[:, None, :] * np.exp(-((gap / _VAGUE) ** 2) / 2)
        if region is not None:
            centre = 100 * (region + 0.5) / len(REGIONS)
            weight = weight * np.exp(-(((self.mean - centre) / _REGION) ** 2) / 2)[:, None, :]
        return weight / weight.sum(-1, keepdims=True)

    def questions(self) -> list[tuple[Scale, str]]:
        """Return every clue with its scale, in the order of `meanings`."""
        return [
            (scale, clue)
            for scale, clues in zip(self.scales, self.clues, strict=True)
            for clue in clues
        ]

    def tasks(self, *, held_out: bool) -> list[tuple[Scale, float]]:
        """Return the (scale, target) cells that speakers' lines have, or those they have not."""
        return [
            (self.scales[s], float(grid(STEP)[t]))
            for s, t in np.argwhere(self.held_out == held_out)
        ]

    def items(self, *, held_out: bool, seed: int = 0) -> list["Item"]:
        """Return the tasks as items, each with a clue drawn from the corpus's direct speaker."""
        from wavelength_rsa.data import Item

        cells = np.argwhere(self.held_out == held_out)
        drawn = _draw(self.speaker()[*cells.T], np.random.default_rng([seed, 2]))
        return [
            Item(scale, self.clues[s][w], target, id=str(i))
            for i, ((s, _), w, (scale, target)) in enumerate(
                zip(cells, drawn, self.tasks(held_out=held_out), strict=True)
            )
        ]

    def judge(self) -> "TableListener":
        """Return the exact listener. A clue of another scale tells it nothing: uniform."""
        from wavelength_rsa.listeners import TableListener

        rows = self.meanings().reshape(-1, len(grid(STEP)))
        table = {
            (scale.left, scale.right, clue): row
            for (scale, clue), row in zip(self.questions(), rows, strict=True)
        }
        return TableListener(table, step=STEP, default="uniform", name="true meanings")

    def lines(self, n: int, seed: int) -> list[str]:
        """Write n lines of text: half are a listener's, a quarter each a speaker's of either kind.

        `scale cold hot clue bazulo answer 45`, `scale cold hot target 45 clue bazulo`,
        `scale cold hot target 45 think middle clue bazulo`.

        Args:
            n: Number of lines, at least 1.
            seed: Fixes them.

        Raises:
            UserError: n is below 1.
        """
        if n < 1:
            raise UserError(f"n must be at least 1, not {n}")
        random = np.random.default_rng([seed, 1])
        kind = random.integers(4, size=n)
        listener, cells = kind < 2, np.argwhere(~self.held_out)
        scale, target = cells[random.integers(len(cells), size=n)].T
        region = np.minimum(target * len(REGIONS) // len(grid(STEP)), len(REGIONS) - 1)
        speakers = np.stack([self.speaker(), *map(self._regional, range(len(REGIONS)))])
        clue = np.where(
            listener,
            _draw(self.frequency[scale], random),
            _draw(speakers[np.where(kind == 3, region + 1, 0), scale, target], random),
        )
        heard = _draw(self.meanings()[scale, clue], random)
        lines = []
        for i in range(n):
            ends, word = _scale_text(self.scales[scale[i]]), self.clues[scale[i]][clue[i]]
            if listener[i]:
                lines.append(f"{ends} clue {word} answer {_POSITIONS[heard[i]]}")
            else:
                think = f" think {REGIONS[region[i]]}" if kind[i] == 3 else ""
                lines.append(f"{ends} target {_POSITIONS[target[i]]}{think} clue {word}")
        return lines

    def _regional(self, region: int) -> NDArray[np.float64]:
        return self.speaker(region=region)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Make the tokenizer: one token per word and position."""
        from tenfold_common.tiny import word_tokenizer

        ends = [end for scale in self.scales for end in (scale.left, scale.right)]
        clues = [clue for _, clue in self.questions()]
        return word_tokenizer([*_WORDS, *_POSITIONS, *ends, *clues])

    def train(
        self,
        seed: int = 0,
        *,
        steps: int = 1200,
        lines: int = 60_000,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
    ) -> "TransformersModel":
        """Train a language model on lines of this world, from nothing.

        Two layers of width 64, AdamW, the learning rate rising for 50 steps and then falling
        linearly to 0. Equal arguments give equal weights on one machine and number of threads.

        Args:
            seed: Fixes the weights at the start, the lines and their order.
            steps: Number of steps; 0 leaves the model as it starts, knowing nothing.
            lines: Size of the corpus.
            batch_size: Lines of a step.
            learning_rate: At its highest.

        Returns:
            The model, in float32 on the CPU.

        Raises:
            UserError: a number is out of range.
        """
        if steps < 0 or batch_size < 1:
            raise UserError(
                f"steps must be at least 0 and batch_size at least 1, not {steps} and {batch_size}"
            )
        import torch

        from tenfold_common.lm import TransformersModel
        from tenfold_common.tiny import tiny_llama

        tokenizer = self.tokenizer()
        model = tiny_llama(len(tokenizer), kv_heads=4, seed=seed, tie_word_embeddings=True)
        texts = [f"{line} {tokenizer.eos_token}" for line in self.lines(lines, seed)]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
        order = torch.Generator().manual_seed(seed)
        _fit(model, encoded.input_ids, labels, steps, batch_size, learning_rate, order)
        found = TransformersModel(model, tokenizer, batch_size=512)
        found.name = f"toy model {seed} ({steps} steps)"
        return found


def _fit(
    model: "PreTrainedModel",
    rows: "torch.Tensor",
    labels: "torch.Tensor",
    steps: int,
    batch_size: int,
    learning_rate: float,
    order: "torch.Generator",
) -> None:
    """Run the steps; each takes lines at random."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - step / max(steps, 1))
    )
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(rows), (batch_size,), generator=order)
        loss = model(rows[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


class ToyPrompts:
    """The texts of the world's corpus as `Prompts`: the model is asked as it was trained."""

    answer_stop: tuple[str, ...] = ()  # every line ends with the end token
    clue_stop: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the texts."""
        example = Scale("left", "right")
        texts = [
            self.listener(example, "clue"),
            self.answer(STEP),
            self.speaker(example, STEP),
            self.speaker(example, STEP, cot=True),
        ]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()

    def listener(
        self, scale: Scale, clue: str, *, step: int | None = STEP, cot: bool = False
    ) -> str:
        """Ask for the position; raises UserError for another step or for reasoning."""
        if cot:
            raise UserError("listeners of the toy world do not reason; leave out cot")
        if step not in (STEP, None):
            raise UserError(f"positions of the toy world are multiples of {STEP}, not of {step}")
        return f"{_scale_text(scale)} clue {clue} answer"

    def answer(self, position: int) -> str:
        """Return the text of a position."""
        return f" {position}"

    def read_answer(self, text: str, *, cot: bool = False) -> float | None:
        """Return the position, or None if the text is anything else."""
        word = text.strip()
        return float(word) if word in _POSITIONS else None

    def speaker(self, scale: Scale, target: float, *, cot: bool = False) -> str:
        """Ask for a clue, after the region of the target if `cot`."""
        return f"{_scale_text(scale)} target {target:g} {'think' if cot else 'clue'}"

    def read_clue(self, text: str, *, cot: bool = False) -> str | None:
        """Return the clue, or None if the text is not one word (after a region, if `cot`)."""
        words = text.split()
        if cot:
            if words[:1] and words[0] in REGIONS and words[1:2] == ["clue"]:
                words = words[2:]
            else:
                return None
        return words[0] if len(words) == 1 else None


def _scale_text(scale: Scale) -> str:
    return f"scale {scale.left} {scale.right}"


def _draw(probs: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """Draw one index from every row of `[N, m]`."""
    reached = probs.cumsum(1) < random.random((len(probs), 1)) * probs.sum(1, keepdims=True)
    return np.minimum(reached.sum(1), probs.shape[1] - 1)


def _names(n: int, random: np.random.Generator) -> Sequence[str]:
    """Make n different words that no language has a meaning for: three open syllables."""
    syllables = np.array([c + v for c in "bdklmrtvz" for v in "aiou"])
    chosen = random.choice(len(syllables) ** 3, size=n, replace=False)
    digits = np.stack(np.unravel_index(chosen, (len(syllables),) * 3), 1)
    return ["".join(row) for row in syllables[digits]]
