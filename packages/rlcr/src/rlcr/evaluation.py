"""Asking a model: completions, answers, confidences and grades, into a resumable file.

The first completion is read leniently and its answer is final: a forced continuation, which asks a
model that stated no confidence for one, cannot change it. Each confidence carries its source:
`stated` in the completion, `forced` by a continuation, or `missing`.
"""

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from rlcr.metrics import CalibrationReport, calibration_report
from rlcr.parsing import parse_completion
from rlcr.predictions import Predictions, PredictionWriter, graded_value, read_predictions
from rlcr.prompts import (
    begun,
    forced_answer,
    forced_confidence,
    read_forced_answer,
    read_forced_confidence,
)
from rlcr.rewards import prompt_text
from rlcr.scaling import class_ids, consistency, vote_curve
from rlcr.verify import Grader, Verifier, get_verifier
from tenfold_common.errors import UserError
from tenfold_common.lm.base import check_sampling

if TYPE_CHECKING:
    from tenfold_common.lm import TextModel

logger = logging.getLogger(__name__)

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
FORCED_ANSWER_TOKENS, FORCED_CONFIDENCE_TOKENS = 50, 20  # as the paper's evaluation


def evaluate(
    model: "TextModel",
    rows: Sequence[Mapping[str, object]],
    out: str | PathLike[str],
    *,
    format: str = "tabc",
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 1536,
    seed: int = 0,
    force: bool = True,
    verifier: str | Verifier | None = None,
    gold_column: str = "answer",
    batch_size: int = 64,
    resume: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> Predictions:
    """Let a model answer every row, and write one record per completion.

    Args:
        model: What answers, see `tenfold_common.lm`.
        rows: Rows with `prompt` (text or messages), a gold column, and where there is one `id` and
            `verifier`.
        out: Prediction file, JSON lines; see `rlcr.predictions`.
        format: Blocks of a completion.
        samples: Completions of a prompt; they are records `<id>#0`, `<id>#1`, ...
        temperature: 0 takes the most likely token.
        top_p: Nucleus of the sampling.
        max_tokens: Limit of a completion.
        seed: Fixes the samples, together with a row's place and `batch_size`.
        force: Ask for what is missing: an answer (50 tokens) and a confidence from 0 to 100 (20
            tokens), both greedy.
        verifier: How answers are graded. Defaults to each row's own, or `auto`.
        gold_column: Column of the gold answer.
        batch_size: Prompts asked for together and written together.
        resume: Go on with a file that was cut short.
        metadata: What else describes the run, for the file's sidecar.

    Returns:
        The predictions, read back from the file.

    Raises:
        UserError: a column is missing, an id repeats, an option is out of range, or the file does
            not fit.
    """
    _check_rows(rows, gold_column, samples, batch_size)
    check_sampling([], samples, temperature, top_p, max_tokens, (), seed)
    parse_completion("", format, "lenient")  # a wrong format is refused before anything is asked
    grader = Grader("auto" if verifier is None else verifier)
    about = {
        "model": model.name,
        "format": format,
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
        "force": force,
        "verifier": None if verifier is None else grader.common.name,
        "gold_column": gold_column,
        "batch_size": batch_size,  # the seeds of the samples depend on it
        **(metadata or {}),
    }
    with PredictionWriter(out, about, resume=resume) as writer:
        ids = [str(row.get("id", i)) for i, row in enumerate(rows)]
        wanted = [[f"{name}#{k}" if samples > 1 else name for k in range(samples)] for name in ids]
        open_rows = [i for i in range(len(rows)) if not set(wanted[i]) <= writer.done]
        if len(open_rows) < len(rows):
            logger.info("%d of %d rows are in the file", len(rows) - len(open_rows), len(rows))
        # Batches start at multiples of the size, so that a resumed run asks as the first one did.
        blocks = sorted({i // batch_size for i in open_rows})
        for block in blocks:
            chosen = range(block * batch_size, min(len(rows), (block + 1) * batch_size))
            records = _ask(
                model,
                [rows[i] for i in chosen],
                format=format,
                samples=samples,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                seed=seed + block,
                force=force,
                gold_column=gold_column,
                grader=grader,
                own=verifier is None,
            )
            names = [name for i in chosen for name in wanted[i]]
            for name, record in zip(names, records, strict=True):
                if name not in writer.done:
                    writer.write({"id": name, **record})
            logger.info("%d of %d rows done", chosen[-1] + 1, len(rows))
    return read_predictions(out)


def _check_rows(
    rows: Sequence[Mapping[str, object]], gold_column: str, samples: int, batch_size: int
) -> None:
    if samples < 1 or batch_size < 1:
        raise UserError(
            f"samples and batch_size must be at least 1, not {samples} and {batch_size}."
        )
    if not len(rows):
        raise UserError("there is no row to evaluate.")
    for i, row in enumerate(rows):
        for name in ("prompt", gold_column):
            if name not in row:
                raise UserError(
                    f"row {i} has no column {name!r}; it has {', '.join(map(str, row)) or 'none'}."
                )
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        name = str(row.get("id", i))
        if first.setdefault(name, i) != i:
            raise UserError(
                f"rows {first[name]} and {i} have the same id {name!r}; give each its own."
            )


def _ask(
    model: "TextModel",
    rows: Sequence[Mapping[str, object]],
    *,
    format: str,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    force: bool,
    gold_column: str,
    grader: Grader,
    own: bool,
) -> list[dict[str, object]]:
    """Return `samples` records for each row; `own`: graded as the row itself asks."""
    prompts: list[Prompt] = [row["prompt"] for row in rows]  # pyright: ignore[reportAssignmentType]
    generations = model.sample(
        prompts, n=samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed
    )
    texts = [g.text for several in generations for g in several]
    cut = [g.finish_reason == "length" for several in generations for g in several]
    each = [row for row in rows for _ in range(samples)]
    parsed = [parse_completion(text, format, "lenient") for text in texts]
    answers = [p.answer for p in parsed]
    confidences = [p.confidence for p in parsed]
    sources = ["missing" if q is None else "stated" for q in confidences]
    answer_sources = ["missing" if a is None else "stated" for a in answers]
    if force:
        lacking = [i for i, answer in enumerate(answers) if answer is None]
        for i, reply in zip(
            lacking,
            _continue(
                model, [(each[i]["prompt"], forced_answer(texts[i])) for i in lacking],
                FORCED_ANSWER_TOKENS, ["</answer>"],
            ),
            strict=True,
        ):  # fmt: skip
            answers[i] = read_forced_answer(reply)
            if answers[i] is not None:
                answer_sources[i] = "forced"
        lacking = [i for i, q in enumerate(confidences) if q is None and answers[i] is not None]
        asked = [
            (
                each[i]["prompt"],
                forced_confidence(_with_answer(texts[i], parsed[i].answer, answers[i])),
            )
            for i in lacking
        ]
        replies = _continue(model, asked, FORCED_CONFIDENCE_TOKENS, ["\n"])
        for i, reply in zip(lacking, replies, strict=True):
            confidences[i] = read_forced_confidence(reply)
            if confidences[i] is not None:
                sources[i] = "forced"
    grades, failed = grader.grade(
        answers,
        [row[gold_column] for row in each],
        [prompt_text(row["prompt"]) for row in each],
        [row.get("verifier") or None for row in each] if own else None,  # pyright: ignore[reportArgumentType]
    )
    if failed:
        logger.warning("%d of %d answers could not be graded", len(failed), len(each))
    return [
        {
            "prompt": each[i]["prompt"],
            "completion": texts[i],
            "answer": answers[i],
            "confidence": confidences[i],
            "correct": graded_value(grades[i]),
            "source": sources[i],
            "answer_source": answer_sources[i],
            "gold": each[i][gold_column],
            "error": parsed[i].error,
            "truncated": cut[i],
        }
        for i in range(len(texts))
    ]


def _with_answer(text: str, stated: str | None, answer: str | None) -> str:
    """Return the completion, with the forced answer where it stated none."""
    if stated is not None or answer is None:
        return text
    return f"{forced_answer(text)} {answer} </answer>"


def _continue(
    model: "TextModel", asked: Sequence[tuple[object, str]], max_tokens: int, stop: Sequence[str]
) -> list[str]:
    """Continue assistant texts greedily; "" where the text leaves no room in the context."""
    from tenfold_common.lm import PromptTooLong

    if not asked:
        return []
    prompts = [begun(prompt, text) for prompt, text in asked]  # pyright: ignore[reportArgumentType]
    try:
        replies = model.sample(prompts, n=1, temperature=0.0, max_tokens=max_tokens, stop=stop)  # pyright: ignore[reportArgumentType]
    except PromptTooLong as error:
        if len(asked) == 1:
            logger.warning("a forced question does not fit (%s); nothing is recorded for it", error)
            return [""]
        return [_continue(model, [one], max_tokens, stop)[0] for one in asked]
    return [several[0].text for several in replies]


def summary(predictions: Predictions, *, n_bins: int = 10, binning: str = "left") -> dict:
    """Return how many confidences came from where, and a report for each source.

    Args:
        predictions: What `evaluate` or `read_predictions` returned.
        n_bins: Bins of the ECE.
        binning: Which end of a bin is closed.

    Returns:
        `rows`, `graded`, `accuracy` (over graded rows), `sources` (counts), and `reports`: for
        `all` (graded rows with a confidence) and each source a `CalibrationReport`.
    """
    q, c = predictions.confidence, predictions.correct
    graded = ~np.isnan(c)
    usable = graded & ~np.isnan(q)
    source = predictions.source
    names, counts = np.unique(source[source != ""], return_counts=True)
    reports: dict[str, CalibrationReport] = {}
    for name in ["all", *names.tolist()]:
        mask = usable if name == "all" else usable & (source == name)
        if mask.any() and (name == "all" or len(names) > 1):
            reports[name] = calibration_report(q[mask], c[mask], n_bins=n_bins, binning=binning)
    return {
        "rows": len(q),
        "graded": int(graded.sum()),
        "accuracy": float(c[graded].mean()) if graded.any() else None,
        "sources": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "reports": reports,
    }


def vote_on_file(
    path: str | PathLike[str], *, verifier: str | Verifier = "auto", seed: int = 0
) -> dict:
    """Vote among the samples of each prompt in a prediction file.

    Args:
        path: Predictions with ids `NAME#0`, `NAME#1`, ..., as `evaluate` writes them.
        verifier: Whose normal form says which answers are equal.
        seed: Fixes the random subsets of fewer samples.

    Returns:
        `prompts`, `samples`, `sizes` (1, 2, 4, ... up to all), for each method of
        `rlcr.scaling.aggregate` the `accuracy` by size, `pass_at_n`, and `consistency` with
        `mean_sum` and `share_above_one`.

    Raises:
        UserError: ids have another form or repeat, the number of samples differs, or a row has no
            grade.
    """
    predictions = read_predictions(path)
    groups: dict[str, list[int]] = {}
    seen: set[object] = set()
    for i, row in enumerate(predictions.rows):
        name, mark, number = str(row.get("id", "")).rpartition("#")
        if not mark or not number.isdecimal():
            raise UserError(
                f"{path}: id {row.get('id')!r} is not NAME#0, NAME#1, ...; make the file with "
                "rlcr eval --samples N."
            )
        if row["id"] in seen:
            raise UserError(f"{path}: the id {row['id']!r} is there twice.")
        seen.add(row["id"])
        groups.setdefault(name, []).append(i)
    counts = sorted({len(g) for g in groups.values()})
    if len(counts) > 1:
        raise UserError(
            f"{path}: prompts have {counts[0]} to {counts[-1]} samples; all need the same number. "
            "Finish the run with rlcr eval --resume."
        )
    where = np.array(list(groups.values()))  # [prompts, samples]
    correct = predictions.correct[where]
    if np.isnan(correct).any():
        raise UserError(f"{path}: {int(np.isnan(correct).sum())} rows have no grade.")
    form = get_verifier(verifier).normal_form
    answers = [[_text(predictions.rows[i].get("answer")) for i in row] for row in where.tolist()]
    classes = np.array([class_ids(row, form) for row in answers])
    confidence = predictions.confidence[where]
    total = counts[0]
    sizes = sorted({*(2**k for k in range(total.bit_length()) if 2**k <= total), total})
    curve = vote_curve(classes, confidence, correct, sizes, seed=seed)
    sums = consistency(answers, [list(row) for row in confidence], form)
    return {
        "prompts": len(groups),
        "samples": total,
        "sizes": sizes,
        "accuracy": {name: list(values) for name, values in curve.accuracy.items()},
        "pass_at_n": list(curve.pass_at_n),
        "consistency": {"mean_sum": sums.mean, "share_above_one": sums.share_above_one},
    }


def _text(answer: object) -> str | None:
    return None if answer is None else str(answer)
