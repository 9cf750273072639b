"""The noisy sensor: a task whose best answer and best confidence are known for every prompt.

A hidden digit d is uniform on 0..9. A sensor of level l reads it M times; each reading is d with
probability p_l, otherwise one of the other nine digits, uniformly. The prompt shows the level and
the readings, the gold answer is d. The posterior is exact, so Bayes' answer, confidence, accuracy
and Brier score are known, and a trained model is measured by its distance to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DIGITS = 10
CONFIDENCES = tuple(f"{i / 10:.1f}" for i in range(11))
_TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "answer", "analysis", "confidence")
    for slash in ("", "/")
)


class Draws(NamedTuple):
    """Rows of the task.

    Attributes:
        level: Sensor levels, int64 `[N]`.
        readings: What the sensor read, int64 `[N, M]`.
        digit: The hidden digits, int64 `[N]`.
    """

    level: np.ndarray
    readings: np.ndarray
    digit: np.ndarray


@dataclass(frozen=True)
class NoisySensor:
    """The task.

    Args:
        reliabilities: p_l for each level, each in (0, 1).
        readings: M, at least 1.

    Raises:
        UserError: a value is out of range.
    """

    reliabilities: Sequence[float] = field(default=(0.35, 0.5, 0.7, 0.9))
    readings: int = 3

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not self.reliabilities or not all(0 < p < 1 for p in self.reliabilities):
            raise UserError(f"reliabilities must lie in (0, 1), not {list(self.reliabilities)}.")
        if self.readings < 1:
            raise UserError(f"readings must be at least 1, not {self.readings}.")

    def draw(self, n: int, seed: int) -> Draws:
        """Draw n rows; equal seeds give equal rows."""
        if n < 1:
            raise UserError(f"n must be at least 1, not {n}.")
        random = np.random.default_rng(seed)
        level = random.integers(len(self.reliabilities), size=n)
        digit = random.integers(DIGITS, size=n)
        right = random.random((n, self.readings)) < np.array(self.reliabilities)[level][:, None]
        shift = random.integers(1, DIGITS, size=(n, self.readings))
        readings = np.where(right, digit[:, None], (digit[:, None] + shift) % DIGITS)
        return Draws(level, readings, digit)

    def posterior(self, draws: Draws) -> np.ndarray:
        """Return P(d | level, readings), float64 `[N, 10]`.

        The weight of d is the product over readings o of p_l if o = d, else (1 - p_l) / 9.
        """
        p = np.array(self.reliabilities)[draws.level][:, None]  # [N, 1]
        hits = (draws.readings[:, :, None] == np.arange(DIGITS)).sum(1)  # [N, 10]
        weight = p**hits * ((1 - p) / (DIGITS - 1)) ** (self.readings - hits)
        return weight / weight.sum(1, keepdims=True)

    def bayes(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable digit (int64 `[N]`) and its probability (float64 `[N]`)."""
        posterior = self.posterior(draws)
        return posterior.argmax(1), posterior.max(1)

    def cells(self, draws: Draws) -> np.ndarray:
        """Return level * M + (most equal readings - 1), int64 `[N]`: what Bayes' q depends on."""
        agree = (draws.readings[:, :, None] == np.arange(DIGITS)).sum(1).max(1)
        return draws.level * self.readings + agree - 1

    def prompts(self, draws: Draws) -> list[str]:
        """Write the prompts, such as `"s2 4 4 7 ?"`."""
        return [
            f"s{level} {' '.join(map(str, row))} ?"
            for level, row in zip(draws.level.tolist(), draws.readings.tolist(), strict=True)
        ]

    def dataset(self, draws: Draws) -> "Dataset":
        """Return the rows for GRPO: columns `prompt` and `answer` (strings)."""
        from datasets import Dataset

        return Dataset.from_dict(
            {"prompt": self.prompts(draws), "answer": list(map(str, draws.digit.tolist()))}
        )

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Make the tokenizer: one ordinary token per tag, digit, level and confidence."""
        from tenfold_common.tiny import word_tokenizer

        levels = [f"s{i}" for i in range(len(self.reliabilities))]
        digits = [str(i) for i in range(DIGITS)]
        tokenizer = word_tokenizer([*_TAGS, *CONFIDENCES, *digits, *levels, "?"])
        tokenizer.padding_side = "left"
        return tokenizer

    def model(self, seed: int = 0) -> "PreTrainedModel":
        """Make the untrained model: a Llama of about 160 thousand parameters."""
        from tenfold_common.tiny import tiny_llama

        return tiny_llama(
            len(self.tokenizer()),
            hidden=64,
            layers=3,
            heads=4,
            kv_heads=4,
            seed=seed,
            intermediate_size=192,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )

    def warmup(self, n: int, seed: int, *, confidence: str = "overconfident") -> "Dataset":
        """Return rows for the SFT warm-up, tokenised: `input_ids` and `labels`, one length.

        The answer is the hidden digit itself, so that the answer token learns the posterior. The
        stated confidence is a weak sense of it, as a base model's: uniform over the eleven values
        in a quarter of the rows, else round(0.6 + 0.4 q_Bayes + noise of 0.1, one digit).

        Args:
            n: Number of rows.
            seed: Fixes them.
            confidence: `"overconfident"` as above, or `"random"`: uniform in all rows, which gives
                calibration rewards nothing to start from.

        Raises:
            UserError: the kind of confidence is unknown.
        """
        from datasets import Dataset

        from rlcr.parsing import render_completion

        if confidence not in ("overconfident", "random"):
            raise UserError(f"confidence must be 'overconfident' or 'random', not {confidence!r}.")
        draws = self.draw(n, seed)
        random = np.random.default_rng([seed, 1])
        blind = random.random(n) < (0.25 if confidence == "overconfident" else 1.0)
        sense = 0.6 + 0.4 * self.bayes(draws)[1] + random.normal(0, 0.1, n)
        tenths = np.clip(np.rint(10 * sense), 0, 10).astype(int)
        tenths = np.where(blind, random.integers(11, size=n), tenths)
        tokenizer = self.tokenizer()
        ids = tokenizer.get_vocab()
        # One row of the template, its variable places filled by table look-up.
        completion = render_completion("0", "0.0")
        template = f"{self.prompts(draws)[0]} {completion} {tokenizer.eos_token}".split()
        rows = np.tile([ids[word] for word in template], (n, 1))
        rows[:, 0] = ids["s0"] + draws.level
        rows[:, 1 : 1 + self.readings] = ids["0"] + draws.readings
        rows[:, template.index("<answer>") + 1] = ids["0"] + draws.digit
        rows[:, template.index("<confidence>") + 1] = ids["0.0"] + tenths
        labels = rows.copy()
        labels[:, : self.readings + 2] = -100
        return Dataset.from_dict({"input_ids": rows, "labels": labels})


MAX_COMPLETION = 12  # ten tokens, the end of text, and one to spare


class Policy(NamedTuple):
    """What a model answers to each prompt, greedily.

    Attributes:
        answers: The answers, None where there is none.
        confidence: Stated confidence, float64 `[N]`; 0 where there is none.
        correct: 1 or 0, float64 `[N]`; 0 where the completion is malformed.
        answer_probability: Probability of the answer token, float64 `[N]`.
        well_formed: Share of well-formed completions.
    """

    answers: list[str | None]
    confidence: np.ndarray
    correct: np.ndarray
    answer_probability: np.ndarray
    well_formed: float


def evaluate_policy(
    model: "PreTrainedModel",
    task: NoisySensor,
    draws: Draws,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 4096,
) -> list[Policy]:
    """Let a model answer every row.

    Args:
        model: A causal language model over the toy's tokenizer.
        task: The task.
        draws: N rows.
        samples: How many answers to each row.
        temperature: 0 takes the most likely token.
        seed: Fixes the samples.
        batch_size: Rows of a batch.

    Returns:
        One `Policy` per sample.
    """
    import torch

    from rlcr.parsing import parse_completion

    tokenizer = task.tokenizer()
    prompts = tokenizer(task.prompts(draws), return_tensors="pt").input_ids
    result = []
    training = model.training
    model.eval()
    generate: Any = model.generate
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(samples):
            parsed, probability = [], []
            for batch in prompts.to(model.device).split(batch_size):
                out: Any = generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=MAX_COMPLETION,
                    do_sample=temperature > 0,
                    **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                texts = tokenizer.batch_decode(
                    out.sequences[:, batch.shape[1] :], skip_special_tokens=True
                )
                parsed += [parse_completion(text) for text in texts]
                place = batch.shape[1] + 3  # after <think> </think> <answer>
                chosen = out.sequences[:, place, None]
                probability.append(out.logits[3].softmax(-1).gather(1, chosen)[:, 0].cpu().numpy())
            answers = [p.answer if p.ok else None for p in parsed]
            gold = list(map(str, draws.digit.tolist()))
            result.append(
                Policy(
                    answers=answers,
                    confidence=np.array([p.confidence if p.ok else 0.0 for p in parsed], float),
                    correct=np.array([a == g for a, g in zip(answers, gold, strict=True)], float),
                    answer_probability=np.concatenate(probability).astype(float),
                    well_formed=sum(p.ok for p in parsed) / len(parsed),
                )
            )
    model.train(training)
    return result
