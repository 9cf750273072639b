"""Other ways to get a confidence: answer probabilities, probes and trained classifiers.

They need no stated confidence, so they also serve models trained on correctness alone.
"""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlcr.metrics import check_inputs
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tenfold_common.lm import Prompt, Score, TextModel

Floats = NDArray[np.float64]
LOSSES = ("bce", "brier")


# --------------------------------------------------------------------------------------------------
# The probability of the answer's tokens


@dataclass(frozen=True, slots=True, eq=False)
class AnswerProbability:
    """Probabilities of the answer tokens under the model that wrote them, each array `[n]` float64.

    Attributes:
        mean: Mean token probability, the paper's baseline.
        product: Probability of the whole answer.
        minimum: Least token probability.
        missing: Number of completions without an answer; they are NaN in the arrays.
    """

    mean: Floats
    product: Floats
    minimum: Floats
    missing: int


def answer_probability(
    model: "TextModel",
    prompts: "Sequence[Prompt]",
    completions: Sequence[str],
    format: str = "ta",
) -> AnswerProbability:
    """Score completions and read the probabilities of the tokens inside their answer tags.

    A token counts when its characters overlap the answer, without the white space around it.
    Completions of equal prompts that stand next to each other are scored together.

    Args:
        model: Scores the completions, usually the model that wrote them.
        prompts: `[n]`, text or messages.
        completions: `[n]`.
        format: Format of the completions, see `rlcr.parsing.FORMATS`.

    Raises:
        UserError: different lengths or an unknown format.
    """
    from rlcr.parsing import parse_completion

    if len(prompts) != len(completions):
        raise UserError(f"there are {len(prompts)} prompts but {len(completions)} completions")
    spans = [parse_completion(c, format, mode="lenient").spans.get("answer") for c in completions]
    found = np.full((3, len(completions)), math.nan)
    present = [i for i, span in enumerate(spans) if span is not None and span[0] < span[1]]
    for prompt, run in groupby(present, key=lambda i: prompts[i]):
        indices = list(run)
        for i, score in zip(
            indices, model.score(prompt, [completions[i] for i in indices]), strict=True
        ):
            span = spans[i]
            assert span is not None
            logs = _logprobs_in(score, span)
            if len(logs):
                found[:, i] = np.exp(logs).mean(), np.exp(logs.sum()), np.exp(logs.min())
    missing = int(np.isnan(found[0]).sum())
    return AnswerProbability(mean=found[0], product=found[1], minimum=found[2], missing=missing)


def _logprobs_in(score: "Score", span: tuple[int, int]) -> Floats:
    inside = [
        logprob
        for logprob, (start, end) in zip(score.logprobs, score.offsets, strict=True)
        if start < span[1] and end > span[0]
    ]
    return np.array(inside, dtype=np.float64)


# --------------------------------------------------------------------------------------------------
# A linear probe of hidden states


def hidden_states(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    layer: int = -1,
    batch_size: int = 8,
    max_length: int | None = None,
) -> NDArray[np.float32]:
    """Return the hidden state of the last token of each text.

    Args:
        model: A transformers causal model.
        tokenizer: Its tokenizer; whichever side it pads, texts are padded on the right here, where
            a causal model's real tokens cannot see the padding.
        texts: `[n]`, none without tokens.
        layer: Index into the model's hidden states: 0 the embeddings, -1 after the last layer.
        batch_size: Texts at a time; it does not change the result but for rounding.
        max_length: Keep at most so many tokens, the last ones. Defaults to all.

    Returns:
        `[n, D]` float32.

    Raises:
        UserError: a text has no tokens, the tokenizer has no padding token, no such layer.
    """
    import torch

    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    rows = _token_ids(tokenizer, texts, max_length)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # alike lengths pad little
    states: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            ids, mask = _padded([rows[i] for i in some], tokenizer)
            ids, mask = ids.to(model.device), mask.to(model.device)
            with torch.inference_mode():
                out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            layers = out.hidden_states
            if not -len(layers) <= layer < len(layers):
                raise UserError(f"layer must lie in [-{len(layers)}, {len(layers) - 1}]: {layer}")
            last = layers[layer][torch.arange(len(some)), mask.sum(1) - 1]
            for i, state in zip(some, last.float().cpu().numpy(), strict=True):
                states[i] = state
    finally:
        model.train(was_training)
    return np.stack(states)


def _token_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int | None
) -> list[list[int]]:
    if not len(texts):
        raise UserError("texts is empty; give at least one")
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; set tokenizer.pad_token first")
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length must be at least 1, not {max_length}")
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    for i, row in enumerate(rows):
        if not row:
            raise UserError(f"text {i} has no tokens: {texts[i]!r}")
    return rows if max_length is None else [row[-max_length:] for row in rows]


def _padded(
    rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[Tensor, Tensor]":
    """Return token ids and attention mask `[B, T]`, padded on the right."""
    import torch

    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


class LinearProbe:
    """Logistic regression on hidden states, standardised first: p = sigmoid(w . x + b).

    Attributes:
        weight: `[D]` float64 on the raw features, or None before `fit`.
        bias: float.
    """

    def __init__(self, strength: float = 1.0) -> None:
        """Set the inverse strength of the L2 penalty, scikit-learn's C, > 0."""
        if not strength > 0:
            raise UserError(f"strength must be > 0, not {strength}")
        self.strength = strength
        self.weight: Floats | None = None
        self.bias = 0.0

    def fit(self, features: ArrayLike, correct: ArrayLike) -> Self:
        """Fit to features `[n, D]` and correctness `[n]` (0 or 1, both occurring); return self.

        Raises:
            UserError: shapes do not fit, values are not finite, or only one class occurs.
            MissingDependencyError: scikit-learn is not installed.
        """
        x = _features(features)
        _, c = check_inputs(np.zeros(len(x)), correct, soft=False)
        if c.min() == c.max():
            raise UserError("all answers are of one class; a probe needs right and wrong ones")
        linear = require(
            "sklearn.linear_model", extra="baselines", package="rlcr", purpose="the linear probe"
        )
        mean, std = x.mean(0), x.std(0)
        std[std == 0] = 1.0
        fitted = linear.LogisticRegression(C=self.strength, max_iter=1000).fit((x - mean) / std, c)
        self.weight = fitted.coef_[0] / std
        self.bias = float(fitted.intercept_[0] - self.weight @ mean)
        return self

    def predict(self, features: ArrayLike) -> Floats:
        """Return the probability of being right, `[n]` float64, for features `[n, D]`."""
        if self.weight is None:
            raise UserError("this probe is not fitted; call fit or load first")
        x = _features(features)
        if x.shape[1] != len(self.weight):
            raise UserError(
                f"features have {x.shape[1]} columns, the probe was fitted on {len(self.weight)}"
            )
        return np.exp(-np.logaddexp(0.0, -(x @ self.weight + self.bias)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically."""
        from safetensors.numpy import save

        if self.weight is None:
            raise UserError("this probe is not fitted; there is nothing to save")
        bias = np.array([self.bias, self.strength], dtype=np.float64)
        data = save({"weight": self.weight.astype(np.float64), "bias_strength": bias})
        with atomic_write(path) as stream:
            stream.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; raises UserError when the file is something else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            stored = load(Path(path).read_bytes())
            bias, strength = stored["bias_strength"].tolist()
            weight = stored["weight"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{str(path)!r} is not a saved probe: {error}") from error
        if weight.ndim != 1 or not np.isfinite(weight).all() or not math.isfinite(bias):
            raise UserError(f"{str(path)!r} is broken: weights must be a vector of finite numbers")
        probe = cls(strength)
        probe.weight, probe.bias = weight, bias
        return probe


def _features(features: ArrayLike) -> Floats:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not len(x):
        raise UserError(f"features must have the shape [n, D], n >= 1, not {x.shape}")
    if not np.isfinite(x).all():
        raise UserError("features hold NaN or infinity")
    return x


# --------------------------------------------------------------------------------------------------
# A trained classifier


def classifier_texts(
    problems: Sequence[str],
    completions: Sequence[str],
    *,
    analysis: bool = False,
    format: str = "tabc",
) -> list[str]:
    """Join each problem and response into the text a classifier reads.

    The stated confidence is always left out, so that a classifier cannot copy it.

    Args:
        problems: `[n]`.
        completions: `[n]`.
        analysis: Whether to keep what stands between the answer and the confidence.
        format: `"ta"`, `"tac"` or `"tabc"`; a completion without an answer is kept whole.

    Raises:
        UserError: different lengths, or a format in which the analysis precedes the answer.
    """
    if len(problems) != len(completions):
        raise UserError(f"there are {len(problems)} problems but {len(completions)} completions")
    if format not in ("ta", "tac", "tabc"):
        raise UserError(f"format must be 'ta', 'tac' or 'tabc', not {format!r}")
    from rlcr.parsing import parse_completion

    texts = []
    for problem, completion in zip(problems, completions, strict=True):
        answer = parse_completion(completion, format, mode="lenient").spans.get("answer")
        kept = completion
        if answer is not None:
            end = completion.index("</answer>", answer[1]) + len("</answer>")
            stop = completion.find("<confidence>", end) if analysis else end
            kept = completion[:stop] if stop >= 0 else completion
        texts.append(f"PROBLEM: {problem}\n\nRESPONSE: {kept.rstrip()}\n\nEND")
    return texts


def classifier_loss(logits: "Tensor", correct: "Tensor", loss: str = "bce") -> "Tensor":
    """Return the mean loss of logits `[n]` against correctness `[n]`.

    `"bce"`: -(c ln p + (1 - c) ln(1 - p)); `"brier"`: (p - c)^2; with p = sigmoid(logit).
    """
    from torch.nn import functional as F

    correct = correct.to(logits.dtype)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, correct)
    return (logits.sigmoid() - correct).square().mean()


class SequenceClassifier:
    """A transformers sequence classifier with one output: is this answer right?

    Attributes:
        model: `AutoModelForSequenceClassification` with one label.
        tokenizer: Its tokenizer.
        loss: `"bce"` or `"brier"`.
        max_length: Most tokens of a text; longer ones lose their beginning.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        loss: str = "bce",
        max_length: int = 2048,
    ) -> None:
        """Check that model, tokenizer and loss fit; see the class for the arguments.

        Raises:
            UserError: an unknown loss, several labels, or no padding token.
        """
        if loss not in LOSSES:
            raise UserError(f"loss must be 'bce' or 'brier', not {loss!r}.{suggest(loss, LOSSES)}")
        if model.config.num_labels != 1:
            raise UserError(
                f"the model has {model.config.num_labels} labels; make it with num_labels=1"
            )
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token; set tokenizer.pad_token first")
        if max_length < 1:
            raise UserError(f"max_length must be at least 1, not {max_length}")
        model.config.pad_token_id = tokenizer.pad_token_id  # tells the model where a text ends
        self.model, self.tokenizer = model, tokenizer
        self.loss, self.max_length = loss, max_length

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        loss: str = "bce",
        max_length: int = 2048,
        seed: int = 0,
    ) -> Self:
        """Put a new classification head on a pretrained model.

        Args:
            name: Folder or hub name of a transformers model with its tokenizer.
            loss: `"bce"` or `"brier"`.
            max_length: Most tokens of a text.
            seed: Fixes the weights of the head.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
        return cls(model, AutoTokenizer.from_pretrained(name), loss=loss, max_length=max_length)

    def fit(
        self,
        texts: Sequence[str],
        correct: ArrayLike,
        *,
        epochs: float = 1.0,
        batch_size: int = 16,
        learning_rate: float = 1e-5,
        seed: int = 0,
    ) -> list[float]:
        """Train with the transformers Trainer: AdamW, linear decay, no checkpoints.

        Args:
            texts: `[n]`, see `classifier_texts`.
            correct: `[n]`, from 0 to 1; soft labels fit.
            epochs: Passes over the data.
            batch_size: Texts per step.
            learning_rate: Of AdamW.
            seed: Fixes the order and dropout.

        Returns:
            The training loss of each step.

        Raises:
            UserError: inputs do not pair or do not fit.
        """
        import torch
        from transformers import Trainer, TrainingArguments

        _, c = check_inputs(np.zeros(len(texts)), correct)
        rows = _token_ids(self.tokenizer, texts, self.max_length)
        data = [{"row": row, "correct": float(y)} for row, y in zip(rows, c, strict=True)]
        tokenizer, loss = self.tokenizer, self.loss

        def collate(items: list[dict]) -> "dict[str, Tensor]":
            ids, mask = _padded([item["row"] for item in items], tokenizer)
            labels = torch.tensor([item["correct"] for item in items])
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        class LossTrainer(Trainer):
            def compute_loss(
                self,
                model: "torch.nn.Module",
                inputs: dict,
                return_outputs: bool = False,
                num_items_in_batch: "Tensor | int | None" = None,
            ) -> "Tensor | tuple[Tensor, object]":
                out = model(**{k: v for k, v in inputs.items() if k != "labels"})
                value = classifier_loss(out.logits[:, 0].float(), inputs["labels"], loss)
                return (value, out) if return_outputs else value

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                use_cpu=self.model.device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            trainer = LossTrainer(
                model=self.model,
                args=arguments,
                train_dataset=data,  # pyright: ignore[reportArgumentType]
                data_collator=collate,
            )
            trainer.train()
            history = trainer.state.log_history
        self.model.eval()
        return [entry["loss"] for entry in history if "loss" in entry]

    def predict(self, texts: Sequence[str], *, batch_size: int = 16) -> Floats:
        """Return the probability of being right of each text, `[n]` float64."""
        import torch

        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        rows = _token_ids(self.tokenizer, texts, self.max_length)
        self.model.eval()
        found = []
        for start in range(0, len(rows), batch_size):
            ids, mask = _padded(rows[start : start + batch_size], self.tokenizer)
            device = self.model.device
            with torch.inference_mode():
                out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            found.append(out.logits[:, 0].double().sigmoid().cpu().numpy())
        return np.concatenate(found)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model (safetensors), tokenizer and settings into a folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = {"loss": self.loss, "max_length": self.max_length}
        with atomic_write(Path(folder) / "rlcr_classifier.json", "w") as stream:
            json.dump(settings, stream)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: the folder is something else.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = Path(folder) / "rlcr_classifier.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            loss, max_length = str(settings["loss"]), int(settings["max_length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(folder)!r} is not a saved classifier: {error}") from error
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        return cls(
            model.eval(), AutoTokenizer.from_pretrained(folder), loss=loss, max_length=max_length
        )
