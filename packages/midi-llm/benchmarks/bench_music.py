"""Speed of reading, writing and decoding, ours and plain peers in one process, in turns.

Reading and writing: real tunes if --data names them, else etudes written as files; the peers are
the message-by-message tokenizer of `midi_llm.reference` through mido and, where --anticipation
names a checkout of jthickstun/anticipation, AMT's own. Decoding: one slot of an event at MIDI-LLM's
vocabulary (183,286 rows), the head whole or sliced; and models with and without the grammar. Ids,
files and heads are compared before they are timed.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from midi_llm._version import __version__
from midi_llm.anticipate import events_of, ids_of, pad_rests
from midi_llm.decode import Sampling, decode
from midi_llm.grammar import Grammar, Rules
from midi_llm.midi_read import notes_of_score, read_many, read_notes, read_score
from midi_llm.midi_write import write_midi
from midi_llm.notes import Notes
from midi_llm.reference import naive_tokenize
from midi_llm.vocab import AMTConfig
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.results import write_bench

DESCRIPTION = "Time of tokenising, writing and decoding."
AMT = AMTConfig()
TEXT = 128_256  # rows of Llama 3's text vocabulary
PEER_FILES = 60  # the peer is slow


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = base_parser("bench_music.py", DESCRIPTION, __version__)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each (default: 7)")
    parser.add_argument("--data", type=Path, help="folder with nottingham/MIDI")
    parser.add_argument("--anticipation", type=Path, help="checkout of jthickstun/anticipation")
    args = parser.parse_args(argv)
    if args.rounds < 3:
        raise UserError("--rounds must be at least 3")
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = find_files(args.data, Path(folder))
        rows += tokenising(files, args.rounds, amt_reader(args.anticipation))
        rows += writing(Path(folder), args.rounds)
    rows += heads(args.rounds)
    rows += grammars(args.rounds)
    for row in rows:
        extra = ", ".join(f"{k} {v:,.3g}" for k, v in row["extra"].items())
        print(f"{row['name']:<28} {row['impl']:<34} {row['median_ms']:10.3f} ms  {extra}")
    if args.json:
        write_bench(
            args.json,
            package="midi-llm",
            version=__version__,
            command=f"bench_music.py --rounds {args.rounds}"
            + (" --data DATA" if args.data else "")
            + (" --anticipation REPOSITORY" if args.anticipation else ""),
            correctness={
                "gate": f"the ids of {PEER_FILES} files equal the peers', both writers' files hold "
                "the same notes, the sliced head equals the whole one to 1e-3",
                "max_err": 0,
            },
            rows=rows,
            notes=[
                "One thread; the median of runs in turns.",
                f"Peers read {PEER_FILES} of the files; rates are notes a second.",
                "Heads: the three steps of an event for 8 sequences, width 2048, float32, random.",
                "Grammar: sampling with the same model and seeds; without it any id of the slot "
                "may come, so that texts differ but not their number of ids.",
            ],
        )
    return 0


def amt_reader(folder: Path | None) -> Callable[[Path], list[int]] | None:
    """Return AMT's own reader of files: ids of events, without rests and the grid's end."""
    if folder is None:
        return None
    sys.path.insert(0, str(folder))
    try:
        from anticipation.convert import (  # pyright: ignore[reportMissingImports]
            midi_to_events,
        )
    except ImportError as error:
        raise UserError(f"{folder} holds no anticipation: {error}") from error
    return lambda file: midi_to_events(str(file))


def find_files(data: Path | None, folder: Path) -> list[Path]:
    """Return MIDI files: real tunes, or etudes written now."""
    if data is not None:
        files = sorted((data / "nottingham" / "MIDI").glob("*.mid"))
        if not files:
            raise UserError(f"{data} has no nottingham/MIDI/*.mid")
        return files
    from midi_llm.etudes import plan_etude, play

    files = []
    for number in range(200):
        rng = np.random.default_rng(number)
        files.append(folder / f"{number}.mid")
        write_midi(play(plan_etude(rng, seconds=90.0), rng), files[-1])
    return files


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each call in every round, after a warm-up."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return found


def row(name: str, impl: str, shape: str, times: list[float], **extra: float) -> dict[str, Any]:
    """Return a row of the result file."""
    low, high = np.quantile(times, [0.2, 0.8]) * 1e3
    return {
        "name": name, "impl": impl, "shape": shape,
        "dtype": "float64" if "ids" in name else "float32",
        "median_ms": median(times) * 1e3, "p20_ms": float(low), "p80_ms": float(high),
        "n": len(times), "extra": extra,
    }  # fmt: skip


def ids(notes: Notes) -> np.ndarray:
    """Return the ids of a piece, of what fits the grid."""
    events = events_of(notes, AMT)
    return ids_of(pad_rests(events[events[:, 0] < AMT.times], AMT), AMT)


def tokenising(
    files: list[Path], rounds: int, amt: Callable[[Path], list[int]] | None
) -> list[dict[str, Any]]:
    """Time files to ids, ours and the peers, and scores to ids."""
    few = files[:: max(1, len(files) // PEER_FILES)][:PEER_FILES]
    counts = {str(f): len(read_notes(f)) for f in files}
    for file in few:
        notes = read_notes(file)
        if notes.end < AMT.max_time and naive_tokenize(file, AMT) != ids(notes).tolist():
            raise UserError(f"{file}: ids differ from the peer's")
        if amt is not None:
            events = events_of(notes, AMT) + np.array([0, AMT.duration_offset, AMT.note_offset])
            if amt(file) != events.ravel().tolist():
                raise UserError(f"{file}: events differ from those of AMT's own reader")
    scores = [read_score(f) for f in few]
    joined = Notes(
        *(np.concatenate(c) for c in zip(*(read_notes(f).columns for f in few), strict=True))
    )
    total, part = sum(counts.values()), sum(counts[str(f)] for f in few)
    own = {} if amt is None else {"amt": lambda: [amt(f) for f in few]}
    times = in_turns(
        {
            "ours": lambda: [ids(notes) for notes in read_many(files)],
            "alone": lambda: [ids(read_notes(f)) for f in files],
            "peer": lambda: [naive_tokenize(f, AMT) for f in few],
            **own,
            "scores": lambda: [ids(notes_of_score(s)) for s in scores],
            "events": lambda: events_of(joined, AMT),
        },
        rounds,
    )
    shape = f"{len(files)} files, {total:,} notes"
    peer, ours = part / median(times["peer"]), total / median(times["ours"])
    return [
        row("files to ids", "midi_llm", shape, times["ours"], notes_a_second=ours,
            over_the_peer=ours / peer),
        row("files to ids", "midi_llm, file by file", shape, times["alone"],
            notes_a_second=total / median(times["alone"]),
            over_the_peer=total / median(times["alone"]) / peer),
        row("files to ids", "plain Python through mido", f"{len(few)} files, {part:,} notes",
            times["peer"], notes_a_second=peer),
        *([] if amt is None else [
            row("files to events", "anticipation, AMT's own", f"{len(few)} files, {part:,} notes",
                times["amt"], notes_a_second=part / median(times["amt"]),
                ours_over_it=ours / (part / median(times["amt"])))]),
        row("scores to ids", "midi_llm", f"{len(few)} scores, {part:,} notes", times["scores"],
            notes_a_second=part / median(times["scores"])),
        row("notes to ids' numbers", "midi_llm", f"{part:,} notes", times["events"],
            notes_a_second=part / median(times["events"])),
    ]  # fmt: skip


def writing(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time notes to a file on disk."""
    rng = np.random.default_rng(0)
    count = 50_000
    notes = Notes.of(
        np.sort(rng.random(count)) * 3000,
        0.2,
        rng.integers(0, 12, count),
        rng.integers(30, 90, count),
    )
    for name in ("symusic", "mido"):
        write_midi(notes, folder / f"{name}.mid", writer=name)
    one, two = (read_notes(folder / f"{name}.mid") for name in ("symusic", "mido"))
    order = [np.lexsort((n.instrument, n.pitch, n.onset)) for n in (one, two)]
    for first, second in zip(one[order[0]].columns, two[order[1]].columns, strict=True):
        if not np.array_equal(first, second):
            raise UserError("the writers' files differ")
    times = in_turns(
        {
            "symusic": lambda: write_midi(notes, folder / "a.mid"),
            "mido": lambda: write_midi(notes, folder / "b.mid", writer="mido"),
        },
        rounds,
    )
    shape = f"{count:,} notes, 12 instruments"
    return [
        row("notes to a file", f"midi_llm, through {name}", shape, found,
            notes_a_second=count / median(found))
        for name, found in times.items()
    ]  # fmt: skip


def heads(rounds: int) -> list[dict[str, Any]]:
    """Time the head of the real vocabulary, whole and sliced to the slot."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TEXT + AMT.size + 2, 2048, generator=generator)
    hidden = torch.randn(8, 2048, generator=generator)
    slots = [
        (0, AMT.times),
        (AMT.duration_offset, AMT.note_offset),
        (AMT.note_offset, AMT.rest + 1),
    ]

    def sliced() -> list[Any]:
        return [hidden @ weight[TEXT + a : TEXT + b].T for a, b in slots]

    def whole() -> list[Any]:
        return [hidden @ weight.T for _ in slots]

    for one, other, (a, b) in zip(sliced(), whole(), slots, strict=True):
        if not torch.allclose(one, other[:, TEXT + a : TEXT + b], atol=1e-3):
            raise UserError("the sliced head differs from the whole one")
    times = in_turns({"sliced": sliced, "whole": whole}, rounds)
    ratio = median(times["whole"]) / median(times["sliced"])
    shape = f"{len(weight):,} rows, 8 sequences, 3 steps"
    return [
        row("head", "midi_llm, sliced", shape, times["sliced"], times_as_fast=ratio),
        row("head", "whole", shape, times["whole"]),
    ]


class Free(Grammar):
    """A grammar that allows every id of the slot: what decoding costs without one."""

    def allowed(self) -> Any:
        """Return the whole block of the slot."""
        from midi_llm.grammar import Allowed

        config = self.rules.config
        edges = (0, config.duration_offset, config.note_offset, config.rest)
        return Allowed(edges[self._slot], edges[self._slot + 1])

    def push(self, id: int) -> None:
        """Only count."""
        self._slot = (self._slot + 1) % 3
        self._notes += self._slot == 0
        if self._notes >= self.max_events:
            self.finish_reason = "length"


class Whole(Grammar):
    """The grammar, without an end, so that both make the same number of ids."""

    def allowed(self) -> Any:
        """Return what may come, but not the separator."""
        found = super().allowed()
        return found if found.start == self.rules.config.separator else found._replace(extra=None)


def grammars(rounds: int) -> list[dict[str, Any]]:
    """Time decoding with and without the grammar, at two widths."""
    import torch

    from midi_llm.demo import DemoSettings, make_model, make_processor

    found = []
    for hidden, layers, events in ((128, 3, 60), (512, 8, 20)):
        processor = make_processor(["a slow tune for piano and bass"] * 8)
        settings = DemoSettings(hidden=hidden, layers=layers)
        lm = make_model(processor, settings, 0)
        prompts = [processor.encode("a slow tune") for _ in range(8)]

        def play(kind: Any, *, lm: Any = lm, processor: Any = processor, prompts: Any = prompts,
                 events: int = events) -> int:  # fmt: skip
            rules = Rules(processor.amt)
            states = [kind(rules, max_events=events) for _ in prompts]
            made = decode(
                lm.model, prompts, states, processor.offset, Sampling(), seeds=range(8),
                pad=processor.offset,
            )  # fmt: skip
            return sum(map(len, made))

        with torch.inference_mode():
            times = in_turns({"with": lambda: play(Whole), "without": lambda: play(Free)}, rounds)
        size = sum(p.numel() for p in lm.model.parameters())
        shape = f"{size / 1e6:.0f}M parameters, 8 sequences, {3 * events} ids"
        ratio = median(times["with"]) / median(times["without"])
        found += [
            row("decoding", "midi_llm, grammar", shape, times["with"], over_without=ratio),
            row("decoding", "any id of the slot", shape, times["without"]),
        ]
    return found


if __name__ == "__main__":
    sys.exit(run(main))
