"""Time of scoring 21 answers and of sampling 32 clues, against running every row by itself.

A small random Llama on one CPU thread. The token counts are those of a real prompt: 700 tokens of
which all items share the first 650, answers of 7 to 9 tokens, clues of 8. Peers are forwards
without any cache, one row or one batch of 21 at a time, and `HFLM.loglikelihood` of lm-eval if it
is installed. Every number comes after a check that all log-probabilities and tokens are equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.lm import TransformersModel
from tenfold_common.lm.base import stream_seed
from tenfold_common.optional import is_available
from tenfold_common.results import write_bench
from tenfold_common.tiny import tiny_llama, word_tokenizer
from wavelength_rsa._version import __version__

WORDS = [f"w{k}" for k in range(1000)]
MARKS = ["<", "</", "answer", ">", *"0123456789"]
COMMON, OWN, ITEMS = 650, 50, 8
SAMPLES, CLUE = 32, 8  # and tokens of each
TOLERANCE = 1e-4
OURS, MANY = "score", "score_many"
ONE, BATCH, LM_EVAL = "forwards, one at a time", "forwards, 21 at a time", "lm-eval HFLM"
SAMPLE, CALLS = "sample", "32 calls of generate"

Calls = dict[str, Callable[[], list]]


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_scoring.py", DESCRIPTION, __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    bench = Bench()
    rows, worst, notes = [], 0.0, []
    for name, shape, peer, calls in bench.groups():
        found = {impl: bench.counted(call) for impl, call in calls.items()}
        worst = max(worst, disagreement({impl: values for impl, (values, _) in found.items()}))
        seconds = in_turns(calls, args.repeats)
        tokens = {impl: count for impl, (_, count) in found.items()}
        ours = next(iter(calls))
        for impl, times in seconds.items():
            gain = statistics.median(seconds[peer]) / statistics.median(times)
            limit = tokens[peer] / tokens[impl]
            row = {"name": name, "impl": impl, "shape": shape, "dtype": "float32"}
            row |= quantiles(times) | {"achieved": gain, "limit": limit}
            row |= {"fraction_of_limit": gain / limit, "extra": {"tokens": tokens[impl]}}
            rows.append(row)
            print(
                f"{name:<14} {impl:<26} {row['median_ms']:9.1f} ms {tokens[impl]:8d} tokens "
                f"{gain:6.2f} times as fast as {peer}"
            )
        notes.append(
            f"{name}: {ours} takes "
            + ", ".join(
                f"1/{statistics.median(times) / statistics.median(seconds[ours]):.1f} of the time "
                f"and 1/{tokens[impl] / tokens[ours]:.1f} of the tokens of {impl}"
                for impl, times in seconds.items()
                if impl != ours
            )
            + "."
        )
    if LM_EVAL not in {row["impl"] for row in rows}:
        notes.append("lm-eval is not installed and was not measured.")
    if args.json:
        write_bench(
            args.json,
            package="wavelength-rsa",
            version=__version__,
            command=f"python benchmarks/bench_scoring.py --repeats {args.repeats}",
            correctness={
                "gate": f"log-probabilities of answers equal to {TOLERANCE}, sampled tokens equal",
                "max_err": worst,
            },
            rows=rows,
            notes=[
                "achieved: how many times as fast as lm-eval (the forwards without it, 32 calls of "
                "generate for the sampling); limit: how many times fewer tokens were run, padding "
                "included.",
                "All times are processor time of one thread; tokenisation is part of ours and of "
                "lm-eval's, and was done before for the forwards.",
                *notes,
            ],
        )
    return 0


DESCRIPTION = "Time of scoring and sampling with shared prefixes, against rows run by themselves."


class Bench:
    """The model, the prompts and what is to be timed."""

    def __init__(self) -> None:
        self.tokenizer = word_tokenizer([*WORDS, *MARKS])
        self.network: Any = tiny_llama(
            len(self.tokenizer), hidden=256, layers=4, max_position_embeddings=1024
        )
        self.model = TransformersModel(self.network, self.tokenizer, batch_size=SAMPLES)
        stream = Random(0)
        common = stream.choices(WORDS, k=COMMON)
        self.prompts = [" ".join([*common, *stream.choices(WORDS, k=OWN)]) for _ in range(ITEMS)]
        self.answers = [f" < answer > {' '.join(str(t))} </ answer >" for t in range(0, 101, 5)]
        self.pairs = [(prompt, answer) for prompt in self.prompts for answer in self.answers]
        self.rows = [self.tokenizer(prompt + answer)["input_ids"] for prompt, answer in self.pairs]
        self.start = len(self.tokenizer(self.prompts[0])["input_ids"])
        self.harness: Any = (
            harness(self.network, self.tokenizer) if is_available("lm_eval") else None
        )

    def groups(self) -> list[tuple[str, str, str, Calls]]:
        """Name, size, the peer to compare with and the calls, ours first."""
        length = COMMON + OWN
        few = len(self.answers)
        one: Calls = {
            OURS: lambda: totals([self.model.score(self.prompts[0], self.answers)]),
            ONE: lambda: self.forwards(self.rows[:few], 1),
            BATCH: lambda: self.forwards(self.rows[:few], few),
        }
        many: Calls = {
            MANY: lambda: totals(self.model.score_many(self.prompts, [self.answers] * ITEMS)),
            f"{OURS}, {ITEMS} calls": lambda: totals(
                [self.model.score(prompt, self.answers) for prompt in self.prompts]
            ),
            BATCH: lambda: self.forwards(self.rows, few),
        }
        if self.harness is not None:
            one[LM_EVAL] = lambda: self.harnessed(self.pairs[:few])
            many[LM_EVAL] = lambda: self.harnessed(self.pairs)
        clues: Calls = {SAMPLE: self.sample, CALLS: self.generate}
        peer = BATCH if self.harness is None else LM_EVAL
        return [
            ("one clue", f"{length} tokens x {few} answers", peer, one),
            (f"{ITEMS} clues", f"{ITEMS} x {length} tokens x {few} answers", peer, many),
            ("sampling", f"{length} tokens, {SAMPLES} samples of {CLUE} tokens", CALLS, clues),
        ]

    def forwards(self, rows: list[list[int]], size: int) -> list[float]:
        """Log-probabilities by whole forwards without a cache, `size` rows at a time."""
        found = []
        for k in range(0, len(rows), size):
            batch = rows[k : k + size]
            width = max(map(len, batch))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
            keep = width - self.start + 1
            with torch.no_grad():
                logits = self.network(ids, use_cache=False, logits_to_keep=keep).logits
            for row, given in zip(batch, logits.log_softmax(-1), strict=True):
                wanted = torch.tensor(row[self.start :])
                found.append(given[range(len(wanted)), wanted].sum().item())
        return found

    def harnessed(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Log-probabilities by lm-eval."""
        from lm_eval.api.instance import Instance

        requests = [Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(pairs)]
        return [found for found, _ in self.harness.loglikelihood(requests, disable_tqdm=True)]

    def sample(self) -> list[str]:
        """All samples of one prompt in one call."""
        [row] = self.model.sample(self.prompts[:1], n=SAMPLES, max_tokens=CLUE)
        return [generation.text for generation in row]

    def generate(self) -> list[str]:
        """The same samples by a call of generate for each, with the same random numbers."""
        ids = torch.tensor([self.tokenizer(self.prompts[0])["input_ids"]])
        config = GenerationConfig(
            max_new_tokens=CLUE, do_sample=False, pad_token_id=0, eos_token_id=2
        )
        found = []
        for k in range(SAMPLES):
            sequence = self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([Drawn(stream_seed(0, 0, k))]),
            )
            new = self.tokenizer.decode(sequence[0, ids.shape[1] - 1 :], skip_special_tokens=True)
            found.append(str(new).removeprefix(self.prompts[0].split()[-1]))
        return found

    def counted(self, call: Callable[[], list]) -> tuple[list, int]:
        """What a call gives, and how many tokens the network ran for it."""
        seen = []
        hook = self.network.register_forward_pre_hook(
            lambda _, args, named: seen.append((args[0] if args else named["input_ids"]).numel()),
            with_kwargs=True,
        )
        try:
            return call(), sum(seen)
        finally:
            hook.remove()


class Drawn(LogitsProcessor):
    """Leaves the token at which the cumulated probability passes the next random number."""

    def __init__(self, seed: int) -> None:
        self.stream = Random(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Give -inf to all other tokens."""
        heap = scores.double().softmax(-1).cumsum(-1)
        chosen = int((heap[0] <= self.stream.random() * heap[0, -1]).sum())
        only = torch.full_like(scores, -torch.inf)
        only[0, chosen] = 0
        return only


def harness(network: Any, tokenizer: Any) -> Any:
    """lm-eval's model around a network."""
    import logging

    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(network, tokenizer=tokenizer, batch_size=21, device="cpu", add_bos_token=False)


def totals(rows: list) -> list[float]:
    """The log-probability of every continuation."""
    return [score.total for scores in rows for score in scores]


def disagreement(found: dict[str, list]) -> float:
    """The largest difference between results; stop if it is too large."""
    (name, first), *others = found.items()
    worst = 0.0
    for other, values in others:
        if isinstance(first[0], str):
            if values != first:
                raise UserError(f"{name} and {other} sample different texts; no time is shown")
            continue
        worst = max(worst, float(np.abs(np.subtract(values, first)).max()))
        if not worst <= TOLERANCE:
            raise UserError(f"{name} and {other} differ by {worst:.1e}; no time is shown")
    return worst


def in_turns(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each call: `repeats` rounds in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 20/80 percentiles in ms, and their number."""
    low, high = np.quantile(seconds, [0.2, 0.8]) * 1e3
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p20_ms": float(low),
        "p80_ms": float(high),
        "n": len(seconds),
    }


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
