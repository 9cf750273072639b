"""The same pieces from three engines, at 1, 8 and 32 prompts, in one process and in turns.

The plain peer is `generate` of transformers with a mask that keeps each slot to its block; onsets
may fall with it. The pieces are greedy and of one length, and vLLM must give the same ids as our
own engine.

Usage: python benchmarks/bench_engines.py --json results/engines_cpu_DATE.json
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from midi_llm._version import __version__
from midi_llm.decode import MidiLM
from midi_llm.grammar import GenerationConstraints
from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
from midi_llm.vocab import AMTConfig
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.results import write_bench
from tenfold_common.tiny import byte_tokenizer, tiny_llama

DESCRIPTION = "Time of generating with transformers, ours and vLLM."
WIDTHS = ((256, 6), (768, 12))  # hidden size and layers
COUNTS = (1, 8, 32)
WORDS = ("slow", "fast", "sad", "bright", "quiet", "loud", "old", "new")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_engines.py", DESCRIPTION, __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine (default: 2)")
    parser.add_argument("--notes", type=int, default=40, help="of each piece (default: 40)")
    args = parser.parse_args(argv)
    if args.rounds < 3 or args.notes < 2 or args.threads < 1:
        raise UserError("--rounds must be at least 3, --notes 2, --threads 1")
    rows: list[dict[str, Any]] = []
    for hidden, layers in WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            rows += engines(Path(folder), hidden, layers, args)
    for row in rows:
        extra = ", ".join(f"{k} {v:,.2f}" for k, v in row["extra"].items())
        print(f"{row['shape']:<34} {row['impl']:<26} {row['median_ms']:10.1f} ms  {extra}")
    if args.json:
        write_bench(
            args.json,
            package="midi-llm",
            version=__version__,
            command=f"bench_engines.py --rounds {args.rounds} --threads {args.threads} "
            f"--notes {args.notes}",
            correctness={"gate": "vLLM's greedy ids equal ours, for every prompt", "max_err": 0},
            rows=rows,
            notes=[
                f"Random weights, AMT's whole vocabulary, float32, {args.threads} threads, pieces "
                f"of {args.notes} notes; the median of runs in turns, vLLM's processes stopped "
                "while others are timed; in brackets the quantiles .2 and .8.",
                "The peer is `generate` of transformers with a mask a slot. Ours multiplies only "
                "the rows of the head that the slot can be.",
                "Seconds of music: how many seconds the pieces of one call last, over its time.",
            ],
        )
    return 0


def engines(folder: Path, hidden: int, layers: int, args: Any) -> list[dict[str, Any]]:
    """Time the engines with one model."""
    import torch

    torch.set_num_threads(args.threads)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, range(args.threads))))
    tokenizer, amt = byte_tokenizer(), AMTConfig()
    model = tiny_llama(
        len(tokenizer), hidden=hidden, layers=layers, max_position_embeddings=1024,
        initializer_range=0.05, tie_word_embeddings=True,
    )  # fmt: skip
    expand_vocabulary(model, amt)
    model.save_pretrained(folder)
    TextMidiProcessor(tokenizer, amt, len(tokenizer)).save_pretrained(folder)
    from midi_llm.vllm_engine import VLLMMidiLM

    ours = MidiLM.from_pretrained(folder, device="cpu", dtype=torch.float32)
    vllm = VLLMMidiLM.from_pretrained(
        folder, enforce_eager=True, max_num_seqs=max(COUNTS), max_model_len=1024
    )
    size = sum(p.numel() for p in ours.model.parameters())
    found = []
    try:
        for count in COUNTS:
            prompts = [f"{WORDS[i % 8]} music, number {i}" for i in range(count)]
            found += in_turns(ours, vllm, prompts, f"{size / 1e6:.0f}M, {count} prompts", args)
    finally:
        vllm.close()
    return found


def in_turns(ours: Any, vllm: Any, prompts: list[str], shape: str, args: Any) -> list[dict]:
    """Check that the engines agree, then time each in every round."""
    named: dict[str, Any] = {
        "temperature": 0.0, "max_notes": args.notes, "batch_size": len(prompts),
        "constraints": GenerationConstraints(min_notes=args.notes),
    }  # fmt: skip
    mask = SlotMask(ours.processor)
    calls = {
        "transformers, masked": lambda: peer(ours, mask, prompts, args.notes),
        "midi_llm": lambda: [o.ids for o in ours.generate(prompts, **named)],
        "midi_llm through vLLM": lambda: [o.ids for o in vllm.generate(prompts, **named)],
    }
    first = {name: call() for name, call in calls.items()}
    if first["midi_llm"] != first["midi_llm through vLLM"]:
        raise UserError(f"{shape}: vLLM's ids differ from ours")
    notes = {name: sum(len(ids) // 3 for ids in made) for name, made in first.items()}
    lasts = {
        name: sum(max(ids[::3]) / ours.processor.amt.resolution for ids in made)
        for name, made in first.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            with nullcontext() if "vLLM" in name else stopped():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    slow = median(times["transformers, masked"])
    rows = []
    for name, found in times.items():
        low, high = np.quantile(found, [0.2, 0.8]) * 1e3
        middle = median(found)
        rows.append({
            "name": "generating", "impl": name, "shape": shape, "dtype": "float32",
            "median_ms": middle * 1e3, "p20_ms": float(low), "p80_ms": float(high),
            "n": len(found),
            "extra": {
                "notes_a_second": notes[name] / middle, "over_the_peer": slow / middle,
                "seconds_of_music": lasts[name] / middle,
            },
        })  # fmt: skip
    return rows


@contextmanager
def stopped() -> Iterator[None]:
    """Stop vLLM's processes: they spin while they wait, on cores that others are timed on."""
    import psutil  # vLLM brings it

    found = psutil.Process().children(recursive=True)
    for process in found:
        process.suspend()
    try:
        yield
    finally:
        for process in found:
            process.resume()


class SlotMask:
    """A logits processor of transformers: each id is of the block of its slot."""

    def __init__(self, processor: TextMidiProcessor) -> None:
        amt, offset = processor.amt, processor.offset
        edges = (0, amt.duration_offset, amt.note_offset, amt.rest)
        self.blocks = [(offset + a, offset + b) for a, b in itertools.pairwise(edges)]
        self.start = 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Return scores that are -inf outside the block."""
        low, high = self.blocks[(ids.shape[1] - self.start) % 3]
        masked = scores.new_full(scores.shape, -float("inf"))
        masked[:, low:high] = scores[:, low:high]
        return masked


def peer(lm: Any, mask: SlotMask, prompts: list[str], notes: int) -> list[list[int]]:
    """Generate with transformers alone; returns music ids."""
    import torch

    rows = [list(lm.processor.encode(text)) for text in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    attention = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    mask.start = longest
    with torch.inference_mode():
        made = lm.model.generate(
            input_ids=ids, attention_mask=attention, do_sample=False, max_new_tokens=3 * notes,
            min_new_tokens=3 * notes, logits_processor=[mask], pad_token_id=0,
        )  # fmt: skip
    return (made[:, longest:] - lm.processor.offset).tolist()


if __name__ == "__main__":
    sys.exit(run(main))
