"""Time of the reward: parsing with exact match, and mathematics against TRL's accuracy_reward.

Everything runs in one process, in turns, after a check that the verdicts agree. Reward objects are
made anew for every timed run, so that nothing is remembered from the run before.
"""

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rlcr._version import __version__
from rlcr.parsing import parse_completion
from rlcr.rewards import RLCRReward
from rlcr.verify import normalise_answer
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.results import write_bench

PROMPTS, SAMPLES, CHARACTERS = 64, 32, 4096
OURS, REGEX = "rlcr", "regular expressions, one pass per term"
TRL, TRL_ANSWERS = "trl accuracy_reward", "trl accuracy_reward, answers only"
HOSTILE = (3_000, 100_000)
WORDS = ("so", "the", "sum", "over", "all", "terms", "equals", "what", "we", "had", "before")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_rewards.py", __doc__ or "", __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    rows, notes = [], []
    gates = []
    for measure in (bench_parsing, bench_hostile, bench_mathematics):
        gate, more, remarks = measure(args.repeats)
        gates.append(gate)
        rows += more
        notes += remarks
    for row in rows:
        print(f"{row['name']:<22} {row['impl']:<40} {row['median_ms']:10.2f} ms")
    for note in notes:
        print(note)
    if args.json:
        write_bench(
            args.json,
            package="rlcr",
            version=__version__,
            command=f"python benchmarks/bench_rewards.py --repeats {args.repeats}",
            correctness={"gate": "; ".join(gates), "max_err": None},
            rows=rows,
            notes=notes,
        )
    return 0


def completion(rng: random.Random, answer: str) -> str:
    """Write a completion of 4 kB: reasoning, answer, analysis, confidence."""
    tail = f"</think>\n<answer>{answer}</answer>\n<analysis>{' '.join(rng.choices(WORDS, k=40))}"
    tail += f"</analysis>\n<confidence>{rng.random():.2f}</confidence>"
    words: list[str] = []
    length = len("<think>") + len(tail)
    while length < CHARACTERS:
        words.append(rng.choice(WORDS))
        length += len(words[-1]) + 1
    return f"<think>{' '.join(words)} "[: CHARACTERS - len(tail)] + tail


# --------------------------------------------------------------------------------------------------
# Parsing and exact match


def bench_parsing(repeats: int) -> tuple[str, list[dict], list[str]]:
    """2,048 completions of 4 kB with answers in words."""
    rng = random.Random(0)
    golds = [f"the {rng.choice(WORDS)} of {i}" for i in range(PROMPTS) for _ in range(SAMPLES)]
    answers = [gold if rng.random() < 0.5 else rng.choice(WORDS) for gold in golds]
    texts = [completion(rng, answer) for answer in answers]
    characters = sum(map(len, texts))

    def ours() -> list[float]:
        return RLCRReward(verifier="exact_match").score(texts, golds).reward.tolist()

    def scan() -> int:
        return sum(text.count("</think>") for text in texts)

    worst = max(abs(a - b) for a, b in zip(ours(), regex_rewards(texts, golds), strict=True))
    if worst > 1e-6:
        raise UserError(f"rewards differ by {worst}; no speed is shown")
    calls = {OURS: ours, REGEX: lambda: regex_rewards(texts, golds), "one scan of the text": scan}
    seconds = in_turns(calls, max(9, repeats))
    shape = f"{len(texts)} x {CHARACTERS} characters"
    rate = characters / statistics.median(seconds["one scan of the text"])
    rows = [row("parse and exact match", impl, shape, times) for impl, times in seconds.items()]
    for item in rows:
        item["bytes"] = characters
        item["achieved"] = characters / item["median_ms"] * 1e3
        item["limit"] = rate
        item["fraction_of_limit"] = item["achieved"] / rate
    notes = [
        "All times are processor time of one thread: nothing here waits or runs in parallel, and "
        "other work on the machine does not count.",
        "parse and exact match: all reward terms of a batch; achieved and limit in characters a "
        "second (all ASCII), the limit being one str.count over all texts in the same run. The "
        "regular expressions check the format once per term (4 times) and verify twice, as a "
        "list of independent reward functions does.",
    ]
    return "rewards equal those by regular expressions to 1e-6", rows, notes


_FORMAT = re.compile(
    r"^.*?</think>\s*<answer>.*?</answer>\s*<analysis>.*?</analysis>"
    r"\s*<confidence>.*?</confidence>\s*\Z",
    re.DOTALL,
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CONFIDENCE = re.compile(r"<confidence>(.*?)</confidence>", re.DOTALL)


def regex_format(texts: list[str]) -> list[float]:
    """Return 1 for completions that the pattern of the format matches."""
    return [float(_FORMAT.match(text) is not None) for text in texts]


def regex_accuracy(texts: list[str], golds: list[str]) -> list[float]:
    """Return 1 for right answers, with a format check of its own."""
    right = []
    for text, gold, form in zip(texts, golds, regex_format(texts), strict=True):
        found = _ANSWER.findall(text) if form else []
        same = bool(found) and normalise_answer(found[-1]) == normalise_answer(gold)
        right.append(float(same))
    return right


def regex_rewards(texts: list[str], golds: list[str]) -> list[float]:
    """Return the total of four independent reward functions; the confidence one is only logged."""
    form = regex_format(texts)
    accuracy = regex_accuracy(texts, golds)
    brier = []
    checked = zip(texts, regex_format(texts), regex_accuracy(texts, golds), strict=True)
    for text, good, right in checked:
        q = float(_CONFIDENCE.findall(text)[-1]) if good else 0.0
        brier.append(good * (1.0 - (q - right) ** 2))
    return [f + a + b for f, a, b in zip(form, accuracy, brier, strict=True)]


def bench_hostile(repeats: int) -> tuple[str, list[dict], list[str]]:
    """Repeated tags: 3 kB for both, 100 kB for ours alone."""
    piece = "</think><answer>1</answer><analysis>b</analysis>"
    rows = []
    for size in HOSTILE:
        text = piece * (size // len(piece))
        calls: dict[str, Callable[[], object]] = {OURS: lambda text=text: parse_completion(text)}
        if size == HOSTILE[0]:
            calls[REGEX] = lambda text=text: _FORMAT.match(text)
            if _FORMAT.match(text):
                raise UserError("the hostile text must be malformed")
        if parse_completion(text).ok:
            raise UserError("the hostile text must be malformed")
        shape = f"{len(text)} characters"
        for impl, times in in_turns(calls, min(3, repeats)).items():
            rows.append(row("hostile text", impl, shape, times))
    notes = [
        "hostile text: the regular expression's time grows with the cube of the length, so it is "
        "timed on the short text only, and once per completion instead of four times."
    ]
    return "both call the hostile text malformed", rows, notes


# --------------------------------------------------------------------------------------------------
# Mathematics

TASKS = [  # gold, equivalent ways to write it, wrong answers
    ("{n}", ["{n}", "{n}.0", "{n}"], ["{m}", "-{n}", "{n}1", "{n}/2"]),
    ("{n}", ["{n}", r"\frac{{{d}}}{{2}}"], ["{m}", "2{n}", "0"]),
    (r"\frac{{{p}}}{{{r}}}", [r"\frac{{{p}}}{{{r}}}", "{p}/{r}"], ["{p}", "{r}/{p}", "{n}"]),
    ("0.{p}5", ["0.{p}5", "0.{p}50"], ["0.{p}", "{p}.5", "1"]),
    (r"{n}\sqrt{{2}}", [r"{n}\sqrt{{2}}", r"\sqrt{{2}} \cdot {n}"], ["{n}", r"\sqrt{{{n}}}"]),
    ("x^2+{n}x+{p}", ["x^2+{n}x+{p}", "{p}+{n}x+x^2"], ["x^2-{n}x+{p}", "x+{n}"]),
    (r"{n}\pi", [r"{n}\pi", r"\pi \cdot {n}"], [r"\pi", r"\frac{{\pi}}{{{n}}}", "{n}"]),
    ("({n}, {p})", ["({n}, {p})", "({n},{p})"], ["({p}, {n})", "({n}, {r})"]),
]


def mathematics() -> tuple[list[str], list[str], list[str]]:
    """Make 64 problems with 32 samples each: completions, answers, gold answers."""
    rng = random.Random(1)
    texts, answers, golds = [], [], []
    for i in range(PROMPTS):
        n, p = rng.randint(20, 99), rng.choice([3, 7])
        numbers = {"n": n, "m": n + 1, "d": 2 * n, "p": p, "r": rng.choice([11, 13])}
        gold, right, wrong = TASKS[i % len(TASKS)]
        accuracy = rng.uniform(0.2, 0.9)
        for _ in range(SAMPLES):
            form = rng.choice(right if rng.random() < accuracy else wrong)
            answers.append(rf"$\boxed{{{form.format(**numbers)}}}$")
            texts.append(completion(rng, answers[-1]))
            golds.append(f"${gold.format(**numbers)}$")
    return texts, answers, golds


def bench_mathematics(repeats: int) -> tuple[str, list[dict], list[str]]:
    """2,048 completions of 4 kB, 32 to a problem, none of them remembered from before."""
    from sympy.core.cache import clear_cache
    from trl.rewards import accuracy_reward

    texts, answers, golds = mathematics()
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    short = [[{"role": "assistant", "content": answer}] for answer in answers]

    def cold(call: Callable[[], list]) -> Callable[[], list]:
        def emptied() -> list:
            clear_cache()
            return call()

        return emptied

    calls = {
        OURS: cold(lambda: RLCRReward(verifier="math").accuracy_reward(texts, answer=golds)),
        TRL: cold(lambda: accuracy_reward(chats, golds)),
        TRL_ANSWERS: cold(lambda: accuracy_reward(short, golds)),
    }
    verdicts = {impl: call() for impl, call in calls.items()}
    notes, shares = [], []
    for impl in (TRL, TRL_ANSWERS):
        pairs = list(zip(verdicts[OURS], verdicts[impl], answers, golds, strict=True))
        both = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
        differ = sorted({f"{a} for {g}: {x} / {y}" for x, y, a, g in both if x != y})
        count = sum(x != y for x, y, _, _ in both)
        shares.append(count / len(both))
        notes.append(
            f"mathematics: {len(both)} of {len(pairs)} items have a verdict of both rlcr and {impl}"
            f"; {count} differ" + (f", such as {'; '.join(differ[:4])}." if differ else ".")
        )
    if max(shares) > 0.01:
        raise UserError(f"verdicts differ in more than 1% of the items, no speed is shown: {notes}")
    seconds = in_turns(calls, repeats)
    distinct = len(set(zip(answers, golds, strict=True)))
    shape = f"{PROMPTS} problems x {SAMPLES} samples x {CHARACTERS} characters"
    rows = [row("mathematics", impl, shape, times) for impl, times in seconds.items()]
    for item in rows:
        item["extra"] = {
            "distinct_pairs": distinct,
            "times_ours": item["median_ms"] / rows[0]["median_ms"],
        }
    notes.append(
        f"mathematics: {distinct} distinct pairs of answer and gold answer among {len(texts)}; "
        "sympy's cache is emptied before every run. Ours includes parsing the completion."
    )
    return "verdicts on mathematics equal TRL's in at least 99% of the items", rows, notes


# --------------------------------------------------------------------------------------------------
# Timing


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time the calls one after the other, again and again; seconds of processor time."""
    seconds: dict[str, list[float]] = {impl: [] for impl in calls}
    for _ in range(repeats):
        for impl, call in calls.items():
            start = time.process_time()
            call()
            seconds[impl].append(time.process_time() - start)
    return seconds


def row(name: str, impl: str, shape: str, seconds: list[float]) -> dict:
    """Make a row of the results from the times of one implementation."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "name": name,
        "impl": impl,
        "shape": shape,
        "dtype": "str",
        "median_ms": 1e3 * statistics.median(ordered),
        "p20_ms": 1e3 * ordered[round(0.2 * last)],
        "p80_ms": 1e3 * ordered[round(0.8 * last)],
        "n": len(ordered),
    }


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
