"""Training and test sets: seeded builders, benchmark readers, and the checks before a run.

Every builder and reader returns a `datasets.Dataset` with the columns

- `prompt`: chat messages, or one str with `plain=True`;
- `problem`: the problem text;
- `answer`: the gold answer, or a list of golds of which any one is right;
- `source`: the name of the set;
- `verifier`: how the answer is graded, "exact_match", "math", "choice" or "judge";
- `id`: unique in the set.

The recipes are those of arXiv 2507.16806 and its published code; draws are seeded and, where a row
is changed at random, depend on the seed and the row's id only, not on the order of the rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from rlcr.files import decimal_number, numbered_rows, short
from rlcr.prompts import build_messages, plain_prompt
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from os import PathLike

    from datasets import Dataset, DatasetDict, IterableDataset
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, object]

HOTPOT_TRAIN_ROWS = 20_000
HOTPOT_TEST_ROWS = 500
HOTPOT_MAX_CHARS = 6000
_BIGMATH = "SynthLabsAI/Big-Math-RL-Verified"

_VERIFIERS = ("exact_match", "math", "choice", "judge")

logger = logging.getLogger(__name__)


# --- builders -----------------------------------------------------------------------------------


def build_hotpot_modified(
    rows: Iterable[Row],
    *,
    seed: int,
    vanilla: bool = False,
    max_chars: int = HOTPOT_MAX_CHARS,
    limit: int | None = None,
    format: str = "tabc",
    long: bool = False,
    plain: bool = False,
    skipped: Counter[str] | None = None,
) -> Dataset:
    """Build HotpotQA-Modified: questions whose evidence is there, half there, or missing.

    Each HotpotQA "distractor" row has ten paragraphs, two of them gold. A number u is drawn
    uniformly from {0, 1, 2}; u gold paragraphs and 2 - u distractors are removed at random. So
    eight paragraphs are always left, in their order, and their number does not tell u.
    The paper trains on the first 20,000 rows kept of the training split (`HOTPOT_TRAIN_ROWS`) and
    tests on the first 500 of the validation split (`HOTPOT_TEST_ROWS`), with the long prompt.

    Args:
        rows: Rows with `id` (or `_id`), `question`, `answer`, `context` and `supporting_facts`,
            the last two as columns (`{"title": [...], "sentences": [...]}`, the hub's layout) or
            as pairs (`[[title, sentences], ...]`, the layout of the published JSON).
        seed: Seed of the draws, >= 0. A row's draw depends on the seed and its id only.
        vanilla: Always take u = 0.
        max_chars: Rows whose problem text has this many characters or more are skipped.
        limit: Stop after so many rows are kept. Defaults to all.
        format: Blocks of the reply, see `rlcr.prompts.system_prompt`.
        long: Use the long system prompt.
        plain: Make `prompt` one str, for base models without a chat template.
        skipped: If given, the number of skipped rows is added to it by reason. Rows are skipped,
            and logged, when they have no answer, not ten paragraphs, a repeated title, not two
            supporting titles, a supporting title that is not in the context, or a long text.

    Returns:
        The dataset, with the further columns `gold_removed` (u, int) and `removed_titles`.

    Raises:
        UserError: a column is missing or of another layout, an id repeats, a setting is out of
            range, or no row is left.
    """
    _check_seed(seed)
    _check_count("max_chars", max_chars)
    if limit is not None:
        _check_count("limit", limit)
    reasons: Counter[str] = Counter()
    placed = ((f"HotpotQA row {index}", row) for index, row in enumerate(rows, 1))
    records = _hotpot_records(placed, seed, vanilla, max_chars, limit, reasons)
    if skipped is not None:
        skipped.update(reasons)
    return _dataset(
        records, "hotpot", "exact_match", "exact_match", reasons, format, long=long, plain=plain
    )


def build_bigmath_digits(
    rows: Iterable[Row],
    *,
    seed: int = 42,
    train: int = 30_000,
    test: int = 1_000,
    format: str = "tabc",
    long: bool = False,
    plain: bool = False,
    skipped: Counter[str] | None = None,
) -> DatasetDict:
    """Build Big-Math-digits: problems with a number for an answer that are not too easy.

    Kept are rows of Big-Math-RL-Verified whose answer is shorter than 20 characters and reads as a
    finite decimal number (which rules out LaTeX such as a text command), and which Llama-3.1-8B
    solves sometimes but not too often: 0 < solve rate < 0.75. The rest is shuffled; the first
    `train` rows are for training, the next `test` rows for the test.

    Args:
        rows: Rows with `problem`, `answer` and `llama8b_solve_rate`.
        seed: Seed of the shuffle, >= 0.
        train: Number of training rows.
        test: Number of test rows.
        format: Blocks of the reply, see `rlcr.prompts.system_prompt`.
        long: Use the long system prompt.
        plain: Make `prompt` one str, for base models without a chat template.
        skipped: If given, the number of skipped rows is added to it by reason.

    Returns:
        `{"train": Dataset, "test": Dataset}`, with the further column `solve_rate` (float). Ids
        are the rows' places in the input.

    Raises:
        UserError: a column is missing or of another type, a setting is out of range, or fewer rows
            pass the filters than `train + test`.
    """
    from datasets import DatasetDict

    _check_seed(seed)
    _check_count("train", train)
    _check_count("test", test)
    records: list[dict[str, object]] = []
    reasons: Counter[str] = Counter()
    for index, row in enumerate(rows):
        where = f"Big-Math row {index + 1}"
        problem = _column(row, "problem", where)
        answer = _column(row, "answer", where)
        rate = _column(row, "llama8b_solve_rate", where)
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float)):
            raise UserError(f"{where}: llama8b_solve_rate must be a number or null, got {rate!r}")
        if not isinstance(problem, str) or not problem.strip():
            reasons["no problem text"] += 1
        elif not isinstance(answer, str) or not answer.strip():
            reasons["no answer"] += 1
        elif len(answer) >= 20:
            reasons["answer of 20 characters or more"] += 1
        elif decimal_number(answer) is None:
            reasons["answer is not a number"] += 1
        elif rate is None or not 0.0 < rate < 0.75:
            reasons["solve rate outside (0, 0.75)"] += 1
        else:
            records.append(
                {
                    "problem": problem,
                    "answer": answer.strip(),
                    "id": f"bigmath-{index}",
                    "solve_rate": float(rate),
                }
            )
    if skipped is not None:
        skipped.update(reasons)
    if len(records) < train + test:
        raise UserError(
            f"{train} training and {test} test rows were asked for, and {len(records)} rows pass "
            f"the filters ({_show(reasons)}); give more rows, or ask for fewer with train and test"
        )
    dataset = _dataset(
        records, "bigmath", "math", "general", reasons, format, long=long, plain=plain
    )
    dataset = dataset.shuffle(seed=seed)
    return DatasetDict(
        {"train": dataset.select(range(train)), "test": dataset.select(range(train, train + test))}
    )


def read_bigmath(
    path: str | PathLike[str] | None = None,
    *,
    seed: int = 42,
    format: str = "tabc",
    long: bool = False,
    plain: bool = False,
) -> DatasetDict:
    """Read Big-Math-RL-Verified from a file or the hub and build Big-Math-digits from it.

    Args:
        path: A file in the hub's column layout. Defaults to loading from the hub.
        seed: Seed of the shuffle, >= 0.
        format: Blocks of the reply, see `rlcr.prompts.system_prompt`.
        long: Use the long system prompt.
        plain: Make `prompt` one str, for base models without a chat template.

    Returns:
        The splits `train` and `test`.

    Raises:
        UserError: as `build_bigmath_digits`, or the file or the hub cannot be read.
    """
    rows = _hub_rows("bigmath", _BIGMATH, None, "train") if path is None else numbered_rows(path)
    return build_bigmath_digits(
        (row for _, row in rows), seed=seed, format=format, long=long, plain=plain
    )


def from_rows(
    rows: Sequence[Row],
    *,
    gold_column: str = "answer",
    format: str = "tabc",
    long: bool = False,
    plain: bool = False,
) -> Dataset:
    """Make a training or test set from rows of one's own.

    Args:
        rows: Rows with a gold answer and either `prompt` (text or messages, used as it is) or
            `problem` or `question`, from which a prompt is written. Other columns are kept.
        gold_column: Column of the gold answers.
        format: Blocks of the reply, see `rlcr.prompts.system_prompt`.
        long: Use the long system prompt.
        plain: Make `prompt` one str, for base models without a chat template.

    Returns:
        The rows with `prompt` and `id`. A GSM8K solution as gold stands for the number after its
        last `####`.

    Raises:
        UserError: there is no row, or a column is missing; the message names the row.
    """
    from datasets import Dataset

    if not rows:
        raise UserError("there is no row in the data")
    made = []
    for number, row in enumerate(rows, 1):
        gold = _column(row, gold_column, f"row {number}")
        if isinstance(gold, str) and "####" in gold:
            gold = final_answer(gold)
        prompt = row.get("prompt")
        if prompt is None:
            name = next((n for n in ("problem", "question") if n in row), "prompt")
            prompt = _prompt(
                _text(row, name, f"row {number}"), "general", format, long=long, plain=plain
            )
        made.append({**row, "prompt": prompt, gold_column: gold, "id": str(row.get("id", number))})
    return Dataset.from_list(made)


def build_sft_warmup(
    rows: Iterable[Row],
    *,
    format: str = "tabc",
    long: bool = False,
    plain: bool = False,
    skipped: Counter[str] | None = None,
) -> Dataset:
    """Build the warm-up set: the model's own solutions, with a teacher's analysis and confidence.

    The completion is `output_0`, a line feed, and `demo`. It must be well-formed in the strict
    sense of `rlcr.parsing`, since a model warmed up on malformed text earns no reward; other rows
    are dropped, counted by the parser's error code and logged.

    Args:
        rows: Rows with `problem`, `output_0` (thinking and answer) and `demo` (analysis and
            confidence).
        format: Blocks of the reply, see `rlcr.prompts.system_prompt`.
        long: Use the long system prompt.
        plain: Make `prompt` and `completion` one str each instead of messages.
        skipped: If given, the number of dropped rows is added to it by reason.

    Returns:
        The dataset in the prompt-completion layout of TRL's SFTTrainer: columns `prompt` and
        `completion`.

    Raises:
        UserError: a column is missing or not text, or no row is left.
    """
    from datasets import Dataset

    from rlcr.parsing import parse_completion

    records: list[dict[str, object]] = []
    reasons: Counter[str] = Counter()
    for index, row in enumerate(rows):
        where = f"warm-up row {index + 1}"
        problem, output, demo = (
            _text(row, name, where) for name in ("problem", "output_0", "demo")
        )
        text = f"{output.strip()}\n{demo.strip()}"
        parsed = parse_completion(text, format=format, mode="strict")
        if not parsed.ok:
            reasons[str(parsed.error)] += 1
            continue
        records.append(
            {
                "prompt": _prompt(problem, "general", format, long=long, plain=plain),
                # A base model continues its plain prompt, so the text starts with a space there.
                "completion": f" {text}" if plain else [{"role": "assistant", "content": text}],
            }
        )
    if skipped is not None:
        skipped.update(reasons)
    _report("warm-up", len(records), reasons)
    if not records:
        raise UserError(f"the warm-up set has no well-formed row ({_show(reasons)})")
    return Dataset.from_list(records)


# --- benchmarks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Benchmark:
    """Where a benchmark lives on the hub, and how its rows become records."""

    hub: str
    config: str | None
    split: str
    verifier: str
    kind: str
    read: Callable[[str, Row, str, int], dict[str, object] | None] | None  # None: HotpotQA
    size: int | None = None
    shuffled: bool = False


def read_benchmark(
    name: str,
    path: str | PathLike[str] | None = None,
    split: str | None = None,
    *,
    limit: int | None = None,
    seed: int = 42,
    verifier: str | None = None,
    format: str = "tabc",
    long: bool = False,
    plain: bool = False,
) -> Dataset:
    """Read a benchmark from a file or from the hub.

    | name | rows | golds |
    |---|---|---|
    | gsm8k | test, 1319 | the number after `####`, commas removed |
    | math500 | test, 500 | LaTeX |
    | triviaqa | validation rows with at most 5 aliases, shuffled, 2000 | any of the aliases |
    | simpleqa | 4326 | text, for a judge |
    | commonsenseqa | validation, 1221 | letter; adds `choices` |
    | gpqa | main, 448; options shuffled | letter; adds `choices` |
    | hotpot | validation, u = 0, 1000 | text; see `build_hotpot_modified` |
    | hotpot_modified | validation, 500 | text; see `build_hotpot_modified` |

    Args:
        name: One of the names above.
        path: A file in the hub's column layout: .jsonl, .json (an array or JSON lines), .csv or
            .parquet. Defaults to loading from the hub.
        split: Split on the hub. Defaults to the one above. Not accepted with a path: a file is one
            split.
        limit: Number of rows. Defaults to the number above, or all that a smaller file has.
        seed: Seed of the shuffles, >= 0. A GPQA row's options depend on the seed and its id only.
        verifier: Overrides how the answers are graded, "exact_match", "math", "choice" or "judge".
        format: Blocks of the reply, see `rlcr.prompts.system_prompt`.
        long: Use the long system prompt.
        plain: Make `prompt` one str, for base models without a chat template.

    Returns:
        The dataset, with the columns named at the top of this module.

    Raises:
        UserError: the name is unknown, the file is missing, empty or broken (the message names the
            line), a column is missing, or the hub cannot be reached.
    """
    if name not in _BENCHMARKS:
        raise UserError(
            f"benchmark {name!r} is not known; accepted: {', '.join(sorted(_BENCHMARKS))}."
            + suggest(str(name), _BENCHMARKS)
        )
    if path is not None and split is not None:
        raise UserError(
            f"split {split!r} has no meaning with a file, which is one split; leave it out"
        )
    if verifier is not None and verifier not in _VERIFIERS:
        raise UserError(
            f"verifier {verifier!r} is not known; accepted: {', '.join(_VERIFIERS)}."
            + suggest(str(verifier), _VERIFIERS)
        )
    _check_seed(seed)
    if limit is not None:
        _check_count("limit", limit)
    benchmark = _BENCHMARKS[name]
    size = limit if limit is not None else benchmark.size
    if path is not None:
        rows: Iterable[tuple[str, Row]] = (
            (f"{path}, {where}", row) for where, row in numbered_rows(path)
        )
    else:
        rows = _hub_rows(name, benchmark.hub, benchmark.config, split or benchmark.split)
    reasons: Counter[str] = Counter()
    if benchmark.read is None:
        records = _hotpot_records(rows, seed, name == "hotpot", HOTPOT_MAX_CHARS, size, reasons)
    else:
        records = []
        for index, (where, row) in enumerate(rows):
            record = benchmark.read(where, row, f"{name}-{index}", seed)
            if record is None:
                reasons["more than 5 aliases"] += 1
            else:
                records.append(record)
    if benchmark.shuffled:
        order = np.random.default_rng(seed).permutation(len(records))
        records = [records[i] for i in order]
    records = records if size is None else records[:size]
    return _dataset(
        records,
        name,
        verifier or benchmark.verifier,
        benchmark.kind,
        reasons,
        format,
        long=long,
        plain=plain,
    )


def final_answer(solution: str) -> str | None:
    """Return what follows the last `####` of a GSM8K solution, commas removed, or None.

    Example:
        >>> final_answer("6 * 7 * 100 = 4200. #### 4,200")
        '4200'
    """
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") or None if mark else None


def _hub_rows(name: str, hub: str, config: str | None, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(hub, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = short(str(error).strip().partition("\n")[0])
        raise UserError(
            f"{name}: cannot load {hub} (split {split}) from the hub: {reason}; give a file of it, "
            "in the hub's column layout"
        ) from error
    for number, row in enumerate(cast("Iterable[Row]", rows), 1):
        yield f"{hub}, row {number}", row


def _gsm8k(where: str, row: Row, row_id: str, seed: int) -> dict[str, object]:
    answer = final_answer(_text(row, "answer", where))
    if answer is None:
        raise UserError(f"{where}: the GSM8K answer has no '#### <number>' at its end")
    return {"problem": _text(row, "question", where), "answer": answer, "id": row_id}


def _math500(where: str, row: Row, row_id: str, seed: int) -> dict[str, object]:
    return {
        "problem": _text(row, "problem", where),
        "answer": _text(row, "answer", where),
        "id": _own_id(row, "unique_id", row_id),
    }


def _triviaqa(where: str, row: Row, row_id: str, seed: int) -> dict[str, object] | None:
    answer = _column(row, "answer", where)
    if not isinstance(answer, Mapping):
        raise UserError(f"{where}: column 'answer' must hold 'aliases', got {answer!r}")
    aliases = _texts(answer, "aliases", f"{where}, answer")
    if len(aliases) > 5:
        return None
    golds = list(dict.fromkeys([_text(answer, "value", f"{where}, answer"), *aliases]))
    return {
        "problem": _text(row, "question", where),
        "answer": golds,
        "id": _own_id(row, "question_id", row_id),
    }


def _simpleqa(where: str, row: Row, row_id: str, seed: int) -> dict[str, object]:
    return {
        "problem": _text(row, "problem", where),
        "answer": _text(row, "answer", where),
        "id": row_id,
    }


def _commonsenseqa(where: str, row: Row, row_id: str, seed: int) -> dict[str, object]:
    choices = _column(row, "choices", where)
    if not isinstance(choices, Mapping):
        raise UserError(f"{where}: column 'choices' must hold 'label' and 'text', got {choices!r}")
    labels = _texts(choices, "label", f"{where}, choices")
    texts = _texts(choices, "text", f"{where}, choices")
    gold = _column(row, "answerKey", where)
    if len(labels) != len(texts) or gold not in labels:
        raise UserError(
            f"{where}: answerKey {gold!r} is not one of the labels {labels} of {len(texts)} "
            "choices; the test split has no answers, use the validation split"
        )
    problem = _with_choices(_text(row, "question", where), labels, texts)
    return {
        "problem": problem,
        "answer": gold,
        "id": _own_id(row, "id", row_id),
        "choices": texts,
    }


def _gpqa(where: str, row: Row, row_id: str, seed: int) -> dict[str, object]:
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    options = [_text(row, name, where).strip() for name in names]
    row_id = _own_id(row, "Record ID", row_id)
    order = _row_generator(seed, row_id).permutation(4).tolist()
    texts = [options[i] for i in order]
    return {
        "problem": _with_choices(_text(row, "Question", where).strip(), list("ABCD"), texts),
        "answer": "ABCD"[order.index(0)],
        "id": row_id,
        "choices": texts,
    }


_HOTPOT = ("hotpotqa/hotpot_qa", "distractor", "validation", "exact_match", "exact_match", None)

_BENCHMARKS = {
    "gsm8k": _Benchmark("openai/gsm8k", "main", "test", "math", "general", _gsm8k),
    "math500": _Benchmark("HuggingFaceH4/MATH-500", None, "test", "math", "general", _math500),
    "triviaqa": _Benchmark(
        "mandarjoshi/trivia_qa",
        "rc.nocontext",
        "validation",
        "exact_match",
        "exact_match",
        _triviaqa,
        size=2000,
        shuffled=True,
    ),
    "simpleqa": _Benchmark("basicv8vc/SimpleQA", None, "test", "judge", "general", _simpleqa),
    "commonsenseqa": _Benchmark(
        "tau/commonsense_qa", None, "validation", "choice", "choice", _commonsenseqa
    ),
    "gpqa": _Benchmark("Idavidrein/gpqa", "gpqa_main", "train", "choice", "choice", _gpqa),
    "hotpot": _Benchmark(*_HOTPOT, size=1000),
    "hotpot_modified": _Benchmark(*_HOTPOT, size=HOTPOT_TEST_ROWS),
}


# --- checks before a run ------------------------------------------------------------------------


def check_columns(dataset: Dataset | IterableDataset, wanted: Sequence[str]) -> None:
    """Refuse a dataset that lacks a column, before any generation starts.

    Args:
        dataset: A dataset of any kind with `column_names`.
        wanted: Names that must be there.

    Raises:
        UserError: a column is missing (the message names the wanted and the available ones), or
            the dataset is a dictionary of splits.
    """
    names = dataset.column_names
    if isinstance(names, Mapping):
        raise UserError(
            f"a dataset of one split is wanted, got the splits {list(names)}; choose one"
        )
    if names is None:  # streamed sets know their columns only from their rows
        names = list(next(iter(dataset), {}))
    missing = [name for name in wanted if name not in names]
    if missing:
        hint = suggest(missing[0], names)
        raise UserError(
            f"the dataset lacks the column{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))}; wanted: {', '.join(wanted)}; "
            f"available: {', '.join(names) or 'none'}.{hint}"
        )


def drop_long(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Dataset:
    """Drop the rows whose prompt has more than `max_tokens` tokens; log how many.

    TRL's GRPOTrainer does not cut prompts, so one over-long row can exhaust the memory of a run.

    Args:
        dataset: A dataset with the column `prompt`, messages or str.
        tokenizer: The model's tokenizer; its chat template is applied to messages.
        max_tokens: Longest prompt kept, in tokens.

    Returns:
        The rows kept, in their order.

    Raises:
        UserError: there is no `prompt` column, the tokenizer has no chat template for messages, or
            no row is short enough (the message names the shortest).
    """
    _check_count("max_tokens", max_tokens)
    check_columns(dataset, ["prompt"])
    lengths = [_prompt_tokens(prompt, tokenizer) for prompt in dataset["prompt"]]
    kept = [i for i, length in enumerate(lengths) if length <= max_tokens]
    if lengths and not kept:
        raise UserError(
            f"every prompt has more than {max_tokens} tokens; the shortest has {min(lengths)}: "
            "raise max_tokens"
        )
    dropped = len(lengths) - len(kept)
    if dropped:
        logger.warning(
            "dropped %d of %d rows: prompt of more than %d tokens (longest: %d)",
            dropped,
            len(lengths),
            max_tokens,
            max(lengths),
        )
    return dataset.select(kept)


def _prompt_tokens(prompt: object, tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompts are chats and the tokenizer has no chat template; build the data with "
            "plain=True, or use an instruct model's tokenizer"
        )
    assert isinstance(prompt, list)
    continued = prompt[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        prompt,
        tokenize=True,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        return_dict=False,
    )
    return len(ids)


# --- shared -------------------------------------------------------------------------------------


def _dataset(
    records: list[dict[str, object]],
    source: str,
    verifier: str,
    kind: str,
    reasons: Counter[str],
    format: str,
    *,
    long: bool,
    plain: bool,
) -> Dataset:
    """Add the shared columns; refuse an empty set and repeated ids; log what was skipped."""
    from datasets import Dataset

    _report(source, len(records), reasons)
    if not records:
        raise UserError(f"{source}: no row is left ({_show(reasons)})")
    repeated = [i for i, n in Counter(r["id"] for r in records).items() if n > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]!r} repeats; ids must be unique")
    rows = [
        {
            "prompt": _prompt(str(record["problem"]), kind, format, long=long, plain=plain),
            "problem": record["problem"],
            "answer": record["answer"],
            "source": source,
            "verifier": verifier,
            **record,
        }
        for record in records
    ]
    return Dataset.from_list(rows)


def _prompt(
    problem: str, kind: str, format: str, *, long: bool, plain: bool
) -> str | list[dict[str, str]]:
    build = plain_prompt if plain else build_messages
    return build(problem, format=format, long=long, kind=kind)


def _report(source: str, kept: int, reasons: Counter[str]) -> None:
    if reasons:
        logger.warning("%s: %d rows kept, %s", source, kept, _show(reasons))
    else:
        logger.info("%s: %d rows kept", source, kept)


def _show(reasons: Counter[str]) -> str:
    if not reasons:
        return "none skipped"
    return "skipped " + ", ".join(f"{count} for: {reason}" for reason, count in reasons.items())


def _row_generator(seed: int, row_id: str) -> np.random.Generator:
    """Return the generator of one row: the same whatever rows come before it."""
    digest = hashlib.sha256(row_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:16], "big")])


def _hotpot_records(
    rows: Iterable[tuple[str, Row]],
    seed: int,
    vanilla: bool,
    max_chars: int,
    limit: int | None,
    reasons: Counter[str],
) -> list[dict[str, object]]:
    """Draw u and remove paragraphs row by row; count the rows that do not fit in `reasons`."""
    records: list[dict[str, object]] = []
    for where, row in rows:
        if limit is not None and len(records) == limit:
            break
        row_id = _text(row, "_id" if "_id" in row else "id", where)
        where = f"{where} ({row_id})"
        question = _text(row, "question", where)
        answer = _column(row, "answer", where)
        paragraphs = _hotpot_context(row, where)
        gold_titles = _hotpot_gold(row, where)
        if not isinstance(answer, str) or not answer.strip():
            reasons["no answer"] += 1
            continue
        reason = _hotpot_misfit([title for title, _ in paragraphs], gold_titles)
        if reason:
            reasons[reason] += 1
            continue
        rng = _row_generator(seed, row_id)
        gold = [i for i, (title, _) in enumerate(paragraphs) if title in gold_titles]
        others = [i for i, (title, _) in enumerate(paragraphs) if title not in gold_titles]
        u = 0 if vanilla else int(rng.integers(3))
        removed = {
            *rng.choice(gold, size=u, replace=False).tolist(),
            *rng.choice(others, size=2 - u, replace=False).tolist(),
        }
        kept = [
            f"{title}\n{text}" for i, (title, text) in enumerate(paragraphs) if i not in removed
        ]
        problem = "\n\n".join(["Paragraphs:", *kept, f"Question: {question.strip()}"])
        if len(problem) >= max_chars:
            reasons[f"problem of {max_chars} characters or more"] += 1
            continue
        records.append(
            {
                "problem": problem,
                "answer": answer.strip(),
                "id": row_id,
                "gold_removed": u,
                "removed_titles": [paragraphs[i][0] for i in sorted(removed)],
            }
        )
    return records


def _hotpot_context(row: Row, where: str) -> list[tuple[str, str]]:
    """Return the paragraphs as (title, text), from either layout."""
    context = _column(row, "context", where)
    try:
        if isinstance(context, Mapping):
            pairs = list(zip(context["title"], context["sentences"], strict=True))
        else:
            pairs = [(title, sentences) for title, sentences in context]  # type: ignore[union-attr]
        if any(isinstance(sentences, str) for _, sentences in pairs):
            raise TypeError
        return [
            (title.strip(), " ".join(sentence.strip() for sentence in sentences))
            for title, sentences in pairs
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: context must be {{'title': [...], 'sentences': [[...]]}} or "
            f"[[title, [sentence, ...]], ...], got {short(context)}"
        ) from error


def _hotpot_gold(row: Row, where: str) -> set[str]:
    """Return the titles of the supporting facts, from either layout."""
    facts = _column(row, "supporting_facts", where)
    try:
        titles = facts["title"] if isinstance(facts, Mapping) else [t for t, _ in facts]  # type: ignore[union-attr]
        return {title.strip() for title in titles}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: supporting_facts must be {{'title': [...], 'sent_id': [...]}} or "
            f"[[title, sentence number], ...], got {short(facts)}"
        ) from error


def _hotpot_misfit(titles: list[str], gold: set[str]) -> str:
    """Say why eight paragraphs with 2 - u gold ones cannot be made of a row; "" if they can."""
    if len(titles) != 10:
        return "not ten paragraphs"
    if len(set(titles)) != len(titles):
        return "a title repeats"
    if len(gold) != 2:
        return "not two supporting titles"
    if not gold <= set(titles):
        return "a supporting title is not in the context"
    return ""


def _with_choices(question: str, labels: list[str], texts: list[str]) -> str:
    lines = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return f"{question}\n\n{lines}"


def _column(row: Row, name: str, where: str) -> object:
    if name not in row:
        available = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where}: column {name!r} is missing; available: {available}")
    return row[name]


def _text(row: Row, name: str, where: str) -> str:
    value = _column(row, name, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: column {name!r} must be non-empty text, got {short(value)}")
    return value


def _texts(row: Row, name: str, where: str) -> list[str]:
    values = _column(row, name, where)
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise UserError(f"{where}: {name!r} must be a list of texts, got {short(values)}")
    return list(values)


def _own_id(row: Row, name: str, fallback: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) and value else fallback


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be an int >= 0, got {seed!r}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be an int >= 1, got {value!r}")
