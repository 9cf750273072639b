"""Milliseconds a token of ours, transformers, torch.compile, llama.cpp and vLLM, in turns.

    python benchmarks/bench_decode.py --json FILE [--full] [--only 5M 64 bf16 llama.cpp]

Random Llamas on the CPU, one sequence, greedy, the choice of tokens included. Ours and the peers
have the same weights and decode the same places in alternating order, after a check of everyone's
logits. Besides: what calls cost (one a stage, a layer, a token, 32 tokens), and a machine that four
other processes keep busy.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peers import (
    LONGEST,
    SIZES,
    VLLM,
    VLLMRunner,
    gguf_dequantised,
    ours_dequantised,
    random_model,
)

import flashformer as ff
from flashformer._version import __version__
from flashformer.ablation import WAYS, decode_by_parts
from flashformer.benchmark import (
    PROMPT,
    check,
    gate_tokens,
    in_turns,
    parameters,
    prompt,
    reference_logits,
    row,
    warm_up,
)
from flashformer.peers import EAGER, LLAMA, OURS, STATIC, Eager, Flash, LlamaCpp, Runner, Static
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError, suggest
from tenfold_common.optional import is_available
from tenfold_common.results import write_bench

DESCRIPTION = "Milliseconds a token, of ours and of peers with the same weights."
TOKENS = 32
CONTEXTS = (64, 512, 2048)
COMPILED = 512  # torch.compile takes half a minute for each context: longer ones with --full
FORMATS = ("bf16", "int8", "int4")
# int4 as llama.cpp's q4_0 has it: a scale for 32 weights, the head as well.
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"weights": "bf16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group_size": 32, "head": "int4"},
}
# rms error of the logits over their rms. Of bf16 it is what rounding does to transformers' own; of
# int8 and int4 the reference has the same weights, so that the rounding of activations is left.
GATES = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.1, "int4": 0.1}
BUSY = 4
BUSY_SECONDS = 3.0  # of decoding beside the busy processes, at least
PARTS = ("speed", "calls", "oversubscribed")
IMPLS = {"flashformer": OURS, "eager": EAGER, "static": STATIC, "llama.cpp": LLAMA, "vllm": VLLM}


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_decode.py", DESCRIPTION, __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--full", action="store_true", help="360M too, and more of torch.compile")
    words = [*PARTS, *SIZES, *map(str, CONTEXTS), "fp32", *FORMATS, *IMPLS]
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="of each kind only these; parts, sizes, contexts, formats, implementations: "
        + " ".join(words),
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--vllm_python", help="Python of an environment that holds vLLM")
    args: argparse.Namespace = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1:
        raise UserError("--rounds and --threads must be at least 1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(args.threads)
    bench = Bench(Only(args.only, words), args)
    bench.run()
    if not bench.rows:
        raise UserError("nothing is left to measure: --only excludes all")
    if args.json:
        options = f"--threads {args.threads} --rounds {args.rounds}"
        options += " --full" if args.full else ""
        options += f" --only {' '.join(args.only)}" if args.only else ""
        write_bench(
            args.json,
            package="flashformer",
            version=__version__,
            command=f"python benchmarks/bench_decode.py {options}",
            correctness={
                "gate": "rms error of the logits over their rms after "
                f"{PROMPT} tokens: fp32 {GATES['fp32']}, bf16 {GATES['bf16']} to the fp32 model, "
                f"int8 and int4 {GATES['int8']} to the fp32 model with the same rounded weights",
                "max_err": bench.worst,
            },
            rows=bench.finished(),
            notes=bench.all_notes(),
        )
    return 0


class Only:
    """What to measure: of each kind of words, those given, or all if none is.

    Args:
        given: The words.
        known: All there are.

    Raises:
        UserError: an unknown word.
    """

    def __init__(self, given: list[str], known: list[str]) -> None:
        for word in given:
            if word not in known:
                raise UserError(f"--only knows no {word!r}.{suggest(word, known)}")
        self.given = set(given)

    def __call__(self, word: str | int, kind: Any) -> bool:
        """Whether a word of a kind, an iterable of all of its words, is wanted."""
        wanted = self.given & set(map(str, kind))
        return not wanted or str(word) in wanted


class Bench:
    """The rows so far, and what they have in common."""

    def __init__(self, only: Only, args: argparse.Namespace) -> None:
        self.only, self.args = only, args
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.worst = 0.0
        self.compiled: dict[str, float] = {}
        self.bandwidth: dict[int, float] = {}
        self.backend = ""
        self.vllm = args.vllm_python or (sys.executable if is_available("vllm") else None)
        self.threads: int = args.threads

    def wants(self, impl: str, format: str) -> bool:
        """Whether an implementation is to be measured in a format."""
        formats = ("fp32", *FORMATS)
        return self.only(impl, IMPLS) and self.only(format, formats)

    def run(self) -> None:
        """Measure everything that is wanted."""
        for size in SIZES:
            asked = size in self.only.given
            if not self.only(size, SIZES) or (size == "360M" and not (self.args.full or asked)):
                continue
            network = random_model(size)
            if self.only("speed", PARTS):
                self.speed(size, network)
            if size not in ("5M", "100M") or not self.wants("flashformer", "bf16"):
                continue
            if not self.only(CONTEXTS[0], CONTEXTS):
                continue
            if self.only("calls", PARTS):
                self.calls(size, network)
            if self.only("oversubscribed", PARTS):
                self.oversubscribed(size, network)

    # ----------------------------------------------------------------------------------------------
    # Speed

    def speed(self, size: str, network: Any) -> None:
        """Ours and the peers at every context."""
        contexts = [c for c in CONTEXTS if self.only(c, CONTEXTS)]
        room = max((*contexts, PROMPT)) + TOKENS
        low = random_model(size, torch.bfloat16)
        with ExitStack() as stack:
            runners: dict[tuple[str, str], Runner] = {}

            def add(key: tuple[str, str], make: Callable[[], Runner]) -> Runner:
                runner = make()
                stack.callback(runner.close)
                runners[key] = runner
                return runner

            for format in FORMATS:
                if self.wants("flashformer", format):
                    model = self.compiled_model(network, format, room)
                    self.measure_bandwidth(model)
                    add((OURS, format), lambda m=model: Flash(m))
                    for count in sorted({1, self.threads}):
                        name = f"{OURS}, {count} thread" + "s" * (count > 1)
                        add((name, format), lambda m=model, n=count: Flash(m, threads=n))
            for format, one in (("fp32", network), ("bf16", low)):
                if self.wants("eager", format):
                    add((EAGER, format), lambda n=one: Eager(n))
            for format in self.llama_formats():
                add(
                    (LLAMA, format),
                    lambda f=format: LlamaCpp(network, format=f, room=room, threads=self.threads),
                )
            if self.vllm and self.wants("vllm", "bf16"):
                python = self.vllm
                runner = add(
                    (VLLM, "bf16"),
                    lambda: VLLMRunner(low, python=python, room=room, threads=self.threads),
                )
                self.compiled[f"{VLLM} {size} (start)"] = runner.compile_seconds  # type: ignore[attr-defined]
            self.gate(network, runners)
            for context in contexts:
                self.at_context(size, network, low, context, runners)

    def llama_formats(self) -> list[str]:
        """The formats in which llama.cpp is measured; none where it is not installed."""
        there = is_available("llama_cpp") and is_available("gguf")
        return [f for f in FORMATS if there and self.wants("llama.cpp", f)]

    def compiled_model(self, network: Any, format: str, room: int) -> ff.FlashModel:
        """Ours."""
        return ff.compile(
            network, **SETTINGS[format], max_len=room, threads=self.threads, backend="cpu",
            cache="bf16",
        )  # fmt: skip

    def gate(self, network: Any, runners: dict[tuple[str, str], Runner]) -> None:
        """Compare all logits, each with the fp32 model that has its weights; raises UserError."""
        tokens = gate_tokens(network.config.vocab_size, PROMPT)
        plain = reference_logits(network, tokens)
        for format in ("fp32", *FORMATS):
            ours = [r for (_, f), r in runners.items() if f == format and isinstance(r, Flash)]
            others = [
                r for (_, f), r in runners.items() if f == format and not isinstance(r, Flash)
            ]
            wanted = plain
            if format in ("int8", "int4") and ours:
                wanted = reference_logits(ours_dequantised(network, ours[0].model), tokens)
            self.worst = max(self.worst, check(ours, wanted, GATES))
            if format in ("int8", "int4") and others:
                wanted = reference_logits(gguf_dequantised(network, format), tokens)
            self.worst = max(self.worst, check(others, wanted, GATES))

    def at_context(
        self,
        size: str,
        network: Any,
        low: Any,
        context: int,
        runners: dict[tuple[str, str], Runner],
    ) -> None:
        """Ours and the peers at one context."""
        from transformers import DynamicCache

        text = prompt(network.config.vocab_size, context)
        cache = DynamicCache()
        network(input_ids=text[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = {
            key: runner
            for key, runner in runners.items()
            if context == CONTEXTS[0] or "thread" not in key[0]
        }
        if self.args.full or context <= COMPILED:
            for format, one in (("bf16", low), ("fp32", network)):
                if self.wants("static", format) and (format == "bf16" or self.args.full):
                    static = Static(one, context + TOKENS)
                    chosen[STATIC, format] = static
                    self.compiled[f"{STATIC} {size} {format} {context}"] = static.compile_seconds
                    tokens = gate_tokens(network.config.vocab_size, PROMPT)
                    wanted = reference_logits(network, tokens)
                    self.worst = max(self.worst, check([static], wanted, GATES))
        for runner in chosen.values():
            runner.start(text, cache)
        keyed = {" ".join(key): runner for key, runner in chosen.items()}
        times = in_turns(keyed, length=context, tokens=TOKENS, rounds=self.args.rounds)
        for key, runner in chosen.items():
            found = row(runner, f"{size}, context {context}", times[" ".join(key)], context, None)
            threads = 1 if key[0] == f"{OURS}, 1 thread" else self.threads
            self.add({**found, "impl": key[0]}, threads, network)
            if isinstance(runner, Static):
                runner.close()

    # ----------------------------------------------------------------------------------------------
    # What calls cost

    def calls(self, size: str, network: Any) -> None:
        """The same work in calls of a stage, a layer, a token and 32 tokens."""
        context = CONTEXTS[0]
        model = self.compiled_model(network, "bf16", context + TOKENS)
        self.measure_bandwidth(model)
        names = {"many tokens": f"one call for {TOKENS} tokens"}
        runners: dict[str, Runner] = {
            names.get(way, f"one call a {way}"): Parts(model, way) for way in reversed(WAYS)
        }
        same = {tuple(self.started(r, context).decode(0, TOKENS)) for r in runners.values()}
        if len(same) > 1:
            raise UserError("calls of a stage, a layer and a token choose different tokens")
        times = in_turns(runners, length=context, tokens=TOKENS, rounds=self.args.rounds)
        for name, runner in runners.items():
            found = row(runner, f"{size}, context {context}", times[name], context, None)
            self.add({**found, "name": "calls", "impl": name}, self.threads, network)

    def started(self, runner: Runner, context: int) -> Runner:
        """A runner that has read a prompt."""
        runner.start(prompt(runner.spec.vocab, context))
        return runner

    # ----------------------------------------------------------------------------------------------
    # A busy machine

    def oversubscribed(self, size: str, network: Any) -> None:
        """Ours alone, and beside processes that use all of the machine."""
        context = CONTEXTS[0]
        model = self.compiled_model(network, "bf16", context + TOKENS)
        self.measure_bandwidth(model)
        runner = self.started(Flash(model), context)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        shares = max((BUSY + self.threads) / (cores or 1), 1.0)
        alone = self.long_run(runner, context)
        with busy(BUSY):
            beside = self.long_run(runner, context)
        fair = statistics.median(alone) * shares
        mean = statistics.fmean(beside)
        for name, seconds in (("alone", alone), (f"beside {BUSY} busy processes", beside)):
            found = row(runner, f"{size}, context {context}", seconds, context, None)
            extra = dict(found["extra"])
            if seconds is beside:
                extra |= {"mean_ms": mean * 1e3, "fair_ms": fair * 1e3, "over_fair": mean / fair}
            found |= {"name": "oversubscribed", "impl": name, "extra": extra}
            self.add(found, self.threads, network)

    def long_run(self, runner: Runner, context: int) -> list[float]:
        """Seconds a token of every burst, for some seconds, after the choice of threads settled."""
        warm_up(runner, context, TOKENS)
        found: list[float] = []
        end = time.perf_counter() + BUSY_SECONDS
        while time.perf_counter() < end or len(found) < 5:
            found.append(runner.seconds(0, context, TOKENS) / TOKENS)
        return found

    # ----------------------------------------------------------------------------------------------
    # Rows

    def measure_bandwidth(self, model: ff.FlashModel) -> None:
        """Read memory; the best of the run is the limit."""
        self.backend = model.backend.name
        for count in sorted({1, self.threads}):
            read = model.backend.read_bandwidth(count)  # type: ignore[attr-defined]
            self.bandwidth[count] = max(self.bandwidth.get(count, 0.0), read)

    def add(self, found: dict[str, Any], threads: int, network: Any) -> None:
        """Keep and print a row; its limit is put in at the end."""
        found["extra"] |= {"threads": threads, "size": parameters(network)}
        self.rows.append(found)
        more = found["extra"].get("over_fair")
        print(
            f"{found['name']:<15} {found['shape']:<20} {found['impl']:<28} {found['dtype']:<5} "
            f"{found['median_ms']:9.3f} ms ({found['p20_ms']:.3f} to {found['p80_ms']:.3f}) "
            f"{found['achieved'] / 1e9:6.1f} GB/s"
            + (f", {more:.2f} of the fair share's time" if more else ""),
            flush=True,
        )

    def finished(self) -> list[dict[str, Any]]:
        """The rows with their limits."""
        for found in self.rows:
            limit = self.bandwidth.get(found["extra"]["threads"])
            if limit:
                found |= {"limit": limit, "fraction_of_limit": found["achieved"] / limit}
        return self.rows

    def all_notes(self) -> list[str]:
        """What to know about the rows."""
        read = ", ".join(f"{n} threads {b / 1e9:.1f} GB/s" for n, b in self.bandwidth.items())
        notes = [
            "Times are of a token, the mean of a burst of "
            f"{TOKENS}, greedy, the choice included; n is the number of bursts.",
            "bytes: weights, keys and values that a token reads; limit: the best streaming read of "
            f"512 MB in this run ({read}). Models that fit into the cache may exceed it.",
            "int8: ours a scale a row, llama.cpp q8_0; int4: both a scale for 32 weights (q4_0), "
            "the head as well; vLLM and torch have bf16.",
            f"flashformer ran on its back-end {self.backend}; it chooses the number of threads "
            "itself; 1 thread and 2 threads are fixed.",
        ]
        if self.compiled:
            took = ", ".join(f"{what} {spent:.0f} s" for what, spent in self.compiled.items())
            notes.append(f"Compiled before timing, not part of it: {took}.")
        if not self.args.full:
            notes.append(
                f"torch.compile is measured in bf16 at contexts up to {COMPILED}, and 360M not at "
                "all: --full does both."
            )
        if self.only("llama.cpp", IMPLS) and not self.llama_formats():
            notes.append("llama-cpp-python or gguf is not installed: llama.cpp was not measured.")
        if self.only("vllm", IMPLS) and not self.vllm:
            notes.append("There is no vLLM in this environment (--vllm_python): not measured.")
        return [*notes, *self.notes]


class Parts(Flash):
    """Ours with a native call for each part of the work.

    Args:
        model: The model.
        way: One of `flashformer.ablation.WAYS`.
    """

    def __init__(self, model: ff.FlashModel, way: str) -> None:
        super().__init__(model)
        self.way = way

    def decode(self, token: int, steps: int) -> list[int]:
        """As that of `Flash`, with all threads."""
        threads = self.model.plan.workers
        return decode_by_parts(self.model, self.cache, token, self.way, steps, threads=threads)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but run."""
    code = "print(flush=True)\nwhile True: pass"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    assert max(CONTEXTS) + TOKENS <= LONGEST
    sys.exit(run(main, sys.argv[1:]))
