"""What a trained model can do: loss by position on text, errors on the generated tasks."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from path_attn.config import TrainConfig, check_temperature
from path_attn.tasks import IGNORE, TextChunks, read_text, split_text, task_dataset, text_tokens
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from path_attn.modeling_path_attn import PaTHForCausalLM

logger = logging.getLogger(__name__)

DEFAULT_LENGTHS = ("1", "2", "4")
LARGEST_MULTIPLE = 64  # a plain number up to this is a multiple of the training length
LARGEST_LENGTH = 2**30  # tokens
TOKENS_PER_BATCH = 8192
TOKENS_PER_SET = 65536

Row = dict[str, Any]


def parse_lengths(lengths: Sequence[str], train_length: int) -> list[int]:
    """Turn what the user wrote into lengths in tokens.

    Args:
        lengths: "4" or "4x": four training lengths; "1024" (above 64): tokens.
        train_length: The training length in tokens.

    Returns:
        The lengths in tokens, ascending, each once.

    Raises:
        UserError: not a positive number.
    """
    found = set()
    for text in lengths:
        times = text.endswith("x")
        try:
            number = float(text[:-1]) if times else int(text)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise UserError(
                f"length {text!r} must be a multiple of the training length (2 or 2x) or a number "
                "of tokens."
            )
        tokens = number * train_length if times or number <= LARGEST_MULTIPLE else number
        if not 1 <= round(tokens) <= LARGEST_LENGTH:
            raise UserError(
                f"length {text!r} is {tokens:g} tokens; it must be from 1 to {LARGEST_LENGTH}."
            )
        found.add(round(tokens))
    if not found:
        raise UserError("lengths names no length.")
    return sorted(found)


@torch.no_grad()
def position_losses(model: nn.Module, data: Dataset[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum the loss of every position over a data set.

    Args:
        model: A causal language model; it is put into evaluation mode and back.
        data: Items of one length T.

    Returns:
        Summed negative log-likelihood in nats and number of scored tokens, each `[T]` float64.
        Position t is the token predicted from t tokens before it.
    """
    total, count = torch.zeros(0), torch.zeros(0)
    for labels, losses, _ in _predictions(model, data):
        if total.numel() == 0:
            total, count = (torch.zeros(labels.shape[1], dtype=torch.float64) for _ in range(2))
        scored = labels != IGNORE
        total += torch.where(scored, losses, 0).double().sum(0)
        count += scored.double().sum(0)
    return total, count


@torch.no_grad()
def task_error(model: nn.Module, data: Dataset[dict[str, Tensor]]) -> Row:
    """Measure how often the most likely token is wrong where the task scores it.

    Returns:
        error: Share of wrong tokens in [0, 1]. loss: Mean nats. scored: Tokens counted. sequences:
            Items.
    """
    wrong, scored, loss, sequences = 0, 0, 0.0, 0
    for labels, losses, right in _predictions(model, data):
        mask = labels != IGNORE
        wrong += int((mask & ~right).sum())
        scored += int(mask.sum())
        loss += float(losses[mask].double().sum())
        sequences += len(labels)
    return {
        "error": wrong / scored,
        "loss": loss / scored,
        "scored": scored,
        "sequences": sequences,
    }


def _predictions(model: nn.Module, data: Dataset[dict[str, Tensor]]) -> Any:
    """Yield labels, losses and whether the best guess is right, `[B, T]`; never position 0."""
    device = next(model.parameters()).device
    count = len(cast("Any", data))
    batch = max(1, TOKENS_PER_BATCH // len(data[0]["input_ids"]))
    training = model.training
    model.eval()
    try:
        for start in range(0, count, batch):
            items = [data[i] for i in range(start, min(start + batch, count))]
            inputs = torch.stack([item["input_ids"] for item in items]).to(device)
            labels = torch.stack([item["labels"] for item in items])
            labels[:, 0] = IGNORE
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
            wanted = labels[:, 1:].to(device)
            losses = F.cross_entropy(logits.mT, wanted, ignore_index=IGNORE, reduction="none")
            right = logits.argmax(-1) == wanted
            yield labels, F.pad(losses, (1, 0)).cpu(), F.pad(right, (1, 0)).cpu()
    finally:
        model.train(training)


def evaluate_model(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    config: TrainConfig,
    lengths: Sequence[str] | None = None,
) -> Row:
    """Evaluate a model on the validation data of its task.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        config: The run's configuration (task, data, training length, seed).
        lengths: As `parse_lengths` reads them. None: 1, 2 and 4 training lengths, as far as the
            text reaches.

    Returns:
        A dictionary with task, position_encoding, train_length, seed, kind and rows. For text kind
        is "loss" and a row has length, loss, tokens and positions, a list of dictionaries with
        start, end, loss and tokens. For the generated tasks kind is "error" and a row has set,
        length, error, loss, scored and sequences.

    Raises:
        UserError: a length asked for does not fit the task or the text.
    """
    config = config.resolved()
    train_length = config.length or 1
    chosen = parse_lengths(lengths or DEFAULT_LENGTHS, train_length)
    report: Row = {
        "task": config.task,
        "position_encoding": config.position_encoding,
        "train_length": train_length,
        "seed": config.seed,
    }
    if config.task == "text":
        rows = _text_rows(model, tokenizer, config, chosen, strict=lengths is not None)
        return {**report, "kind": "loss", "rows": rows}
    rows = []
    for length in chosen:
        size = max(64, TOKENS_PER_SET // length) if config.task != "a5" else 2048
        sets: dict[str, float | None] = {"in distribution": None}
        if config.task == "fflm" and length == train_length:
            sets |= {"sparse": 0.98, "dense": 0.1}
        for name, probability in sets.items():
            logger.info("evaluating: %s, length %d, %d sequences", name, length, size)
            data = task_dataset(
                config,
                tokenizer,
                split="validation",
                size=size,
                length=length,
                ignore_probability=probability,
            )
            rows.append({"set": name, "length": length, **task_error(model, data)})
    return {**report, "kind": "error", "rows": rows}


def _text_rows(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    config: TrainConfig,
    lengths: list[int],
    *,
    strict: bool,
) -> list[Row]:
    """Cut the same validation text into chunks of each length and bucket the losses by position."""
    tokens = split_text(
        text_tokens(read_text(config.data or ""), tokenizer), config.validation_fraction
    )[1]
    tokens = tokens[: 4 * TOKENS_PER_SET]
    where = f"the validation part of {config.data}"
    fitting = [n for n in lengths if n <= len(tokens)]
    if len(fitting) < len(lengths) and (strict or not fitting):
        TextChunks(tokens, lengths[-1], where=where)  # raises, with the numbers
    for length in lengths[len(fitting) :]:
        logger.warning("%s has %d tokens; length %d is left out", where, len(tokens), length)
    used = tokens[: len(tokens) // fitting[-1] * fitting[-1]]  # the same text for every length
    width = max(1, (config.length or 1) // 4)
    rows = []
    for length in fitting:
        logger.info("evaluating: length %d, %d chunks", length, len(used) // length)
        total, count = position_losses(model, TextChunks(used, length, where=where))
        positions = []
        for start in range(0, length, width):
            n = float(count[start : start + width].sum())
            if n:
                mean = float(total[start : start + width].sum()) / n
                positions.append(
                    {
                        "start": start,
                        "end": min(start + width, length),
                        "loss": mean,
                        "tokens": int(n),
                    }
                )
        rows.append(
            {
                "length": length,
                "loss": float(total.sum() / count.sum()),
                "tokens": int(count.sum()),
                "positions": positions,
            }
        )
    return rows


def report_markdown(report: Row) -> str:
    """Return one model's evaluation as a table."""
    train = report["train_length"]
    if report["kind"] == "loss":
        lines = [
            "| length | x training length | loss (nats/token) | tokens |",
            "|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['length']} | {r['length'] / train:g} | {r['loss']:.4f} | {r['tokens']} |"
            for r in report["rows"]
        ]
    else:
        lines = [
            "| set | length | x training length | error | scored |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['set']} | {r['length']} | {r['length'] / train:g} | {r['error']:.2%} | "
            f"{r['scored']} |"
            for r in report["rows"]
        ]
    return "\n".join(lines) + "\n"


def comparison_markdown(comparison: Row) -> str:
    """Return the table of `train_each`: a row per encoding, a column per length or set."""
    reports: dict[str, Row] = comparison["results"]
    first = next(iter(reports.values()))
    train = first["train_length"]
    if first["kind"] == "loss":
        heads = [f"loss at {r['length'] / train:g}x" for r in first["rows"]]
        spans = _spans(first)
        heads += [f"positions {a}-{b}" for a, b in spans]
    else:
        spans = []
        heads = [f"error {r['set']} {r['length'] / train:g}x" for r in first["rows"]]
    lines = [
        f"| position encoding | parameters | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(heads)}",
    ]
    for name, report in reports.items():
        if first["kind"] == "loss":
            cells = [f"{r['loss']:.4f}" for r in report["rows"]]
            cells += [f"{_span_loss(report, a, b):.4f}" for a, b in spans]
        else:
            cells = [f"{r['error']:.2%}" for r in report["rows"]]
        lines.append(f"| {name} | {report['training']['parameters']} | {' | '.join(cells)} |")
    if first["kind"] == "loss":
        lines += [
            "",
            "Loss in nats per token on the validation text; positions within chunks of "
            f"{first['rows'][-1]['length']}.",
        ]
    return "\n".join(lines) + "\n"


def _spans(report: Row) -> list[tuple[int, int]]:
    """Return the position ranges between one length and the next, within the longest chunks."""
    ends = [0, *(r["length"] for r in report["rows"])]
    return list(pairwise(ends))


def _span_loss(report: Row, start: int, end: int) -> float:
    """Return the mean loss of the positions that begin in [start, end) of the longest chunks."""
    inside = [p for p in report["rows"][-1]["positions"] if start <= p["start"] < end]
    return sum(p["loss"] * p["tokens"] for p in inside) / max(1, sum(p["tokens"] for p in inside))


def write_comparison_plot(comparison: Row, folder: Path) -> Path:
    """Draw `comparison.png`: loss by position for text, error by set for the other tasks."""
    from path_attn.plots import error_bars, loss_by_position, save

    reports: dict[str, Row] = comparison["results"]
    first = next(iter(reports.values()))
    if first["kind"] == "loss":
        curves = {
            name: [
                ((p["start"] + p["end"]) / 2, p["loss"]) for p in report["rows"][-1]["positions"]
            ]
            for name, report in reports.items()
        }
        figure = loss_by_position(curves, train_length=first["train_length"])
    else:
        train = first["train_length"]
        errors = {
            name: {f"{r['set']} {r['length'] / train:g}x": r["error"] for r in report["rows"]}
            for name, report in reports.items()
        }
        figure = error_bars(errors)
    return save(figure, folder / "comparison.png")


@torch.no_grad()
def continue_text(
    model: "PaTHForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Not empty, and of words the tokenizer knows.
        max_new_tokens: At least 1.
        temperature: Sampling temperature, at least 0.0001; 0 takes the most likely token.
        top_p: Sample among the most likely tokens that hold this probability.
        num_beams: Beams; above 1 the most likely continuation is searched and nothing is sampled.
        seed: Seeds the sampling; torch's global random state is left as it was.

    Returns:
        The prompt and its continuation, without special tokens.

    Raises:
        UserError: the prompt is empty or has words the tokenizer does not know, or the temperature
            is negative, too small or not a number.
    """
    check_temperature(temperature)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = cast("Tensor", ids)
    if ids.numel() == 0:
        raise UserError("the prompt is empty; give at least one token.")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        known = [t for t in tokenizer.get_vocab() if not t.startswith("<")]
        raise UserError(
            f"the prompt has words the tokenizer does not know; it knows {' '.join(known[:40])}"
        )
    options: dict[str, Any] = {"do_sample": False, "num_beams": num_beams}
    if temperature > 0 and num_beams == 1:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ids = ids.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = cast("Any", model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
