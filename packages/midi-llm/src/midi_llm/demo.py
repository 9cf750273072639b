"""Does a model play what the caption says? The recipe of MIDI-LLM on a tiny model, made here.

Four ways to the same held-out captions: both training stages, the second alone, both with the
captions shuffled (the control), and both with constraints at decoding.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midi_llm.captions import Request
from midi_llm.corpus import Pair, etude_pairs, jsb_pairs, nottingham_pairs, text_tokenizer
from midi_llm.notes import Notes
from midi_llm.vocab import AMTConfig, instrument_name
from tenfold_common.optional import is_available
from tenfold_common.results import Claim, Figure, Result, Sample, Table, environment

if TYPE_CHECKING:
    from datasets import Dataset

    from midi_llm.decode import MidiLM, MidiOutput
    from midi_llm.modeling import TextMidiProcessor

STD = 0.08  # of the new rows of so narrow a model
RUNS = ("CPT + SFT", "SFT", "shuffled captions", "constrained")
METRICS = ("family_f1", "in_key", "CK", "TB", "TBT", "density_bin")
SHOWN = {
    "family_f1": "instruments, F1",
    "in_key": "notes in the key asked for",
    "CK": "key (CK)",
    "TB": "tempo bin (TB)",
    "TBT": "or its neighbour (TBT)",
    "density_bin": "density bin",
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo.

    Attributes:
        pairs: For training; of each source a third where real tunes are there.
        held_out: For scoring.
        length: Ids of a row.
        rows: Rows of a step.
        cpt_steps: Of the first stage.
        sft_steps: Of the second; the model without the first gets those of both.
        hidden: Width of the model.
        layers: Of the model.
        lr: At its highest.
        music_lr: The same of the embeddings and the head.
        max_notes: Of a generated piece.
    """

    pairs: int = 2400
    held_out: int = 48
    length: int = 256
    rows: int = 16
    cpt_steps: int = 100
    sft_steps: int = 250
    hidden: int = 128
    layers: int = 3
    lr: float = 3e-3
    music_lr: float = 1e-3
    max_notes: int = 160

    @classmethod
    def smoke(cls) -> "DemoSettings":
        """Return sizes with which everything runs and nothing is learnt."""
        return cls(
            pairs=60, held_out=6, cpt_steps=3, sft_steps=4, hidden=32, layers=1, max_notes=30
        )


@dataclass(frozen=True)
class Run:
    """What one seed gave.

    Attributes:
        scores: Mean of every metric, by way.
        shuffled: The same of the first way, with its captions shuffled across the outputs.
        real: The same of the held-out pieces themselves.
        nll: Nats a note of the held-out pieces, by way of training.
        errors: Ids out of place in a thousand where nothing but music ids is asked for.
        legal: Whether every output of the grammar was legal.
        kept: Share of the notes of the constrained outputs that keep to what was asked.
        rtf: Seconds of music a second.
        outputs: Of every way.
        asked: The held-out pairs.
        parameters: Of the model.
    """

    scores: dict[str, dict[str, float]]
    shuffled: dict[str, float]
    real: dict[str, float]
    nll: dict[str, float]
    errors: float
    legal: bool
    kept: float
    rtf: float
    outputs: "dict[str, list[MidiOutput]]"
    asked: list[Pair]
    parameters: int


def run_demo(
    out_dir: "str | os.PathLike[str]",
    *,
    seed: int = 0,
    full: bool = False,
    data: "str | os.PathLike[str] | None" = None,
    settings: DemoSettings | None = None,
) -> Result:
    """Train, generate, score.

    Args:
        out_dir: Folder for pictures and sounds, made if missing.
        seed: First seed.
        full: Three seeds in place of one.
        data: Folder with `nottingham/` and `jsb/`. Defaults to the one that TENFOLD_DATA names, if
            it has them; without them all pieces are etudes.
        settings: Sizes; the claims are made for the default.

    Returns:
        Claims, tables, piano rolls, sounds. About five minutes a seed on one thread.

    Raises:
        UserError: `data` is given and has no tunes.
    """
    started = time.monotonic()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    settings = settings or DemoSettings()
    folder = _folder(data)
    seeds = [seed, seed + 1, seed + 2] if full else [seed]
    runs = [run_seed(one, settings, folder) for one in seeds]
    return Result(
        package="midi-llm",
        title="Words and music on a tiny model: two stages, one, shuffled captions, constraints",
        summary=_summary(runs, settings, folder),
        seeds=seeds,
        claims=_claims(runs),
        tables=_tables(runs),
        figures=_figures(out_dir, runs[0]),
        samples=[_sample(runs[0])],
        notes=_notes(runs, folder),
        seconds=time.monotonic() - started,
        environment=environment(),
    )


def _folder(data: "str | os.PathLike[str] | None") -> Path | None:
    named = data or os.environ.get("TENFOLD_DATA")
    if named is None:
        return None
    folder = Path(named)
    there = (folder / "nottingham" / "MIDI").is_dir() and (folder / "jsb").is_dir()
    return folder if data or there else None


def corpus(seed: int, settings: DemoSettings, folder: Path | None) -> tuple[list[Pair], list[Pair]]:
    """Return pairs for training and held-out ones; a tune is only in one of the two."""
    count = settings.pairs + settings.held_out
    if folder is None:
        pairs = list(etude_pairs(count, seed))
        return pairs[settings.held_out :], pairs[: settings.held_out]
    train: list[Pair] = []
    held: list[Pair] = []
    for make in (etude_pairs, nottingham_pairs, jsb_pairs):
        part, kept = count // 3, settings.held_out // 3
        made = list(make(part, seed) if make is etude_pairs else make(folder, part, seed))  # pyright: ignore[reportCallIssue, reportArgumentType]
        held += made[:kept]
        tunes = {pair.tune for pair in made[:kept]}  # held out whatever they are played on
        train += [pair for pair in made[kept:] if pair.tune not in tunes]
    return train, held


def run_seed(seed: int, settings: DemoSettings, folder: Path | None) -> Run:
    """Train three models and let four ways play."""
    import torch

    from midi_llm.data import prepare_cpt, prepare_sft
    from midi_llm.grammar import GenerationConstraints

    train, held = corpus(seed, settings, folder)
    captions = [pair.caption for pair in train]
    processor = make_processor(captions)
    music = [pair.notes for pair in train]
    pairs = list(zip(music, captions, strict=True))
    length = settings.length
    cpt = prepare_cpt(music, captions, processor, length=length, seed=seed)
    sft = prepare_sft(pairs, processor, length=length, seed=seed)
    order = np.random.default_rng([seed, 5]).permutation(len(captions))
    mixed = [(notes, captions[i]) for notes, i in zip(music, order, strict=True)]
    shuffled = prepare_sft(mixed, processor, length=length, seed=seed)

    first = make_model(processor, settings, seed)
    fit(first, cpt, settings, steps=settings.cpt_steps, seed=seed)
    state = {name: value.clone() for name, value in first.model.state_dict().items()}
    models = {}
    whole = settings.cpt_steps + settings.sft_steps  # the second stage alone has as many steps
    for name, rows, stages in (
        ("CPT + SFT", sft, 2), ("SFT", sft, 1), ("shuffled captions", shuffled, 2),
    ):  # fmt: skip
        models[name] = make_model(processor, settings, seed)
        if stages == 2:
            models[name].model.load_state_dict(state)
        steps = settings.sft_steps if stages == 2 else whole
        fit(models[name], rows, settings, steps=steps, seed=seed + 1)

    asked = [pair.caption for pair in held]
    tested = prepare_sft([(p.notes, p.caption) for p in held], processor, length=length, seed=seed)
    outputs: dict[str, list[Any]] = {}
    began = time.perf_counter()
    for name, model in models.items():
        outputs[name] = model.generate(
            asked, max_notes=settings.max_notes, seed=seed, batch_size=len(asked)
        )
    spent = time.perf_counter() - began
    both = models["CPT + SFT"]
    outputs["constrained"] = [
        both.generate(
            pair.caption, max_notes=settings.max_notes, seed=seed + i,
            constraints=GenerationConstraints(
                instruments=pair.attributes.instruments, key=pair.attributes.key
            ),
        )[0]
        for i, pair in enumerate(held)
    ]  # fmt: skip
    sounds = sum(output.seconds for name in models for output in outputs[name])
    turned = [*held[1:], held[0]]
    with torch.inference_mode():
        errors = free_errors(both, asked, settings, seed)
    return Run(
        scores={name: score(held, [o.notes for o in found]) for name, found in outputs.items()},
        shuffled=score(turned, [o.notes for o in outputs["CPT + SFT"]]),
        real=score(held, [pair.notes for pair in held]),
        nll={name: nll_a_note(model, tested) for name, model in models.items()},
        errors=errors,
        legal=legal([o for found in outputs.values() for o in found], processor),
        kept=kept(held, outputs["constrained"], processor.amt),
        rtf=sounds / spent,
        outputs=outputs,
        asked=held,
        parameters=sum(p.numel() for p in both.model.parameters()),
    )


def make_processor(captions: Sequence[str]) -> "TextMidiProcessor":
    """Return a processor for captions on the small grid."""
    from midi_llm.modeling import TextMidiProcessor

    tokenizer = text_tokenizer(list(captions))
    return TextMidiProcessor(tokenizer, AMTConfig.small(), len(tokenizer), system="")


def make_model(processor: "TextMidiProcessor", settings: DemoSettings, seed: int) -> "MidiLM":
    """Return a new tiny Llama with music ids."""
    from midi_llm.decode import MidiLM
    from midi_llm.modeling import expand_vocabulary
    from tenfold_common.tiny import tiny_llama

    model = tiny_llama(
        processor.offset, hidden=settings.hidden, layers=settings.layers, heads=4, kv_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=False, seed=seed,
    )  # fmt: skip
    model.config.initializer_range = STD  # of the music rows
    expand_vocabulary(model, processor.amt, init="factored", seed=seed)
    return MidiLM(model, processor)


def fit(lm: "MidiLM", dataset: "Dataset", settings: DemoSettings, *, steps: int, seed: int) -> None:
    """Train on packed rows; `train.train` does the same with checkpoints."""
    import torch

    from midi_llm.data import MidiDataCollator
    from midi_llm.train import TrainConfig, parameter_groups

    model = lm.model.train()
    columns = MidiDataCollator()([dict(row) for row in dataset])
    rng = np.random.default_rng([seed, 6])
    rates = TrainConfig(lr=settings.lr, music_lr=settings.music_lr)
    optimizer = torch.optim.AdamW(parameter_groups(model, rates), betas=(0.9, 0.95))
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * n / steps))),
    )
    order = np.concatenate(
        [rng.permutation(len(dataset)) for _ in range(steps * settings.rows // len(dataset) + 1)]
    )
    for step in range(steps):
        rows = torch.from_numpy(order[step * settings.rows : (step + 1) * settings.rows])
        batch = {name: column[rows] for name, column in columns.items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shape.step()
    model.eval()


def nll_a_note(lm: "MidiLM", dataset: "Dataset") -> float:
    """Return the mean negative log-likelihood of an event, in nats: three ids."""
    import torch

    from midi_llm.data import MidiDataCollator

    columns = MidiDataCollator()([dict(row) for row in dataset])
    total = count = 0.0
    with torch.inference_mode():
        for start in range(0, len(dataset), 16):
            batch = {name: column[start : start + 16] for name, column in columns.items()}
            learnt = int((batch["labels"][:, 1:] >= 0).sum())
            total += float(lm.model(**batch, use_cache=False).loss) * learnt
            count += learnt
    return 3 * total / count


def free_errors(lm: "MidiLM", asked: Sequence[str], settings: DemoSettings, seed: int) -> float:
    """Return ids out of place in a thousand where any music id may come (as the public script)."""
    import torch

    from midi_llm.tokenizer import AMTTokenizer

    model: Any = lm.model
    processor, amt = lm.processor, lm.processor.amt
    tokenizer = AMTTokenizer(amt)
    torch.manual_seed(seed)
    wrong = count = 0

    def music_alone(ids: Any, scores: Any) -> Any:
        scores[:, : processor.offset] = scores[
            :, processor.offset + amt.separator + 1 :
        ] = -math.inf
        return scores

    for caption in asked[:8]:
        ids = torch.tensor([processor.encode(caption)])
        made: Any = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3 * settings.max_notes // 2,
            do_sample=True, top_p=0.98, top_k=0, pad_token_id=processor.offset + amt.size,
            eos_token_id=processor.offset + amt.separator,
            logits_processor=[music_alone],
        )  # fmt: skip
        music = (made[0, ids.shape[1] :] - processor.offset).tolist()
        music = [i for i in music if i != amt.separator]
        wrong += tokenizer._tokens_errors([tokenizer[i] for i in music])
        count += len(music)
    return 1000 * wrong / max(count, 1)


def legal(outputs: "Sequence[MidiOutput]", processor: "TextMidiProcessor") -> bool:
    """Whether ids pass the tokenizer's own check, which knows nothing of the grammar."""
    from midi_llm.tokenizer import AMTTokenizer

    tokenizer = AMTTokenizer(processor.amt)
    end = processor.amt.separator
    bodies = ([tokenizer[i] for i in output.ids if i != end] for output in outputs)
    return not any(tokenizer._tokens_errors(body) for body in bodies)


def kept(asked: Sequence[Pair], outputs: "Sequence[MidiOutput]", amt: AMTConfig) -> float:
    """Return the share of notes that are of the instruments and the key asked for."""
    from midi_llm.grammar import scale_of
    from midi_llm.vocab import DRUMS

    good: list[np.ndarray] = []
    for pair, output in zip(asked, outputs, strict=True):
        notes, wanted = output.notes, pair.attributes
        families = [amt.of_instrument(i) for i in wanted.instruments]
        fits = np.isin(amt.of_instrument(notes.instrument), families)
        if wanted.key is not None:
            in_key = np.isin(notes.pitch % 12, list(scale_of(wanted.key)))
            fits &= in_key | (notes.instrument == DRUMS)
        good.append(fits)
    return float(np.concatenate(good).mean())


def score(asked: Sequence[Pair], played: Sequence[Notes]) -> dict[str, float]:
    """Return the mean of every metric over pieces."""
    from midi_llm.metrics import control_scores

    rows = [
        control_scores(Request.of(pair.attributes), notes)
        for pair, notes in zip(asked, played, strict=True)
    ]
    return {name: float(np.nanmean([row[name] for row in rows])) for name in METRICS}


def _claims(runs: Sequence[Run]) -> list[Claim]:
    """State the claims on the worst seed."""

    def claim(name: str, said: str, values: Sequence[float], bound: float, sign: str) -> Claim:
        worst = min(values) if sign[0] == ">" else max(values)
        passed = (
            worst >= bound if sign == ">=" else worst > bound if sign == ">" else worst <= bound
        )
        margin = worst - bound if sign[0] == ">" else bound - worst
        return Claim(
            name=name, claimed=f"{said}, worst seed", measured=worst, expected=f"{sign} {bound:g}",
            passed=bool(passed), margin=margin,
        )  # fmt: skip

    def gain(metric: str, first: str, second: str) -> list[float]:
        return [run.scores[first][metric] - run.scores[second][metric] for run in runs]

    both, control = "CPT + SFT", "shuffled captions"
    return [
        claim("legal", "share of seeds whose outputs are all legal under the grammar",
              [float(run.legal) for run in runs], 1, ">="),
        claim("instruments", "F1 of both stages less that with shuffled captions",
              gain("family_f1", both, control), 0.15, ">="),
        claim("key", "notes in the key asked for, both stages less shuffled captions",
              gain("in_key", both, control), 0.05, ">="),
        claim("tempo", "tempo bin or its neighbour, both stages less shuffled captions",
              gain("TBT", both, control), 0.05, ">="),
        claim("first stage", "nats a note on held-out pairs: the second stage alone less both",
              [run.nll["SFT"] - run.nll[both] for run in runs], 0, ">"),
        claim("captions", "nats a note: shuffled captions less true ones",
              [run.nll[control] - run.nll[both] for run in runs], 0, ">"),
        claim("constraints", "F1 of instruments, constrained less both stages alone",
              gain("family_f1", "constrained", both), 0, ">="),
        claim("constraints kept", "share of the constrained notes that keep to them",
              [run.kept for run in runs], 1, ">="),
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _tables(runs: Sequence[Run]) -> list[Table]:
    rows: list[tuple[str, list[dict[str, float]]]] = [
        (name, [run.scores[name] for run in runs]) for name in RUNS
    ]
    rows += [
        ("CPT + SFT, captions shuffled after", [run.shuffled for run in runs]),
        ("the held-out music itself", [run.real for run in runs]),
    ]
    control = Table(
        "Held-out captions: what was played against what was asked for",
        ["", *SHOWN.values()],
        [
            [name, *(round(_mean([one[m] for one in found]), 3) for m in METRICS)]
            for name, found in rows
        ],
    )
    likelihood = Table(
        "Held-out pairs, nats a note (onset, duration, instrument with pitch)",
        ["", "nats a note"],
        [[name, round(_mean([run.nll[name] for run in runs]), 3)] for name in RUNS[:3]],
    )
    return [control, likelihood]


def _summary(runs: Sequence[Run], settings: DemoSettings, folder: Path | None) -> str:
    f1 = {name: _mean([run.scores[name]["family_f1"] for run in runs]) for name in RUNS}
    what = "etudes alone" if folder is None else "etudes, folk tunes and chorales"
    return (
        f"{runs[0].parameters / 1e6:.1f} million parameters, trained on {what}. Instruments, F1: "
        f"{f1['CPT + SFT']:.2f} with both stages, {f1['SFT']:.2f} with the second alone, "
        f"{f1['shuffled captions']:.2f} with shuffled captions, {f1['constrained']:.2f} with "
        f"constraints. Without the grammar {_mean([run.errors for run in runs]):.1f} of 1000 ids "
        f"are out of place, with it none. {_mean([run.rtf for run in runs]):.0f} seconds of music "
        "a second."
    )


def _best(run: Run) -> list[int]:
    """Return two of the held-out captions: the first with drums, and the first of four voices."""
    many = [i for i, pair in enumerate(run.asked) if len(pair.attributes.instruments) >= 4]
    drums = [i for i, pair in enumerate(run.asked) if pair.attributes.drums]
    found = [*drums[:1], *(i for i in many if i not in drums[:1]), *range(len(run.asked))]
    return list(dict.fromkeys(found))[:2]


def _figures(out_dir: Path, run: Run) -> list[Figure]:
    from midi_llm.render import find_soundfont, piano_roll, to_wav
    from tenfold_common.errors import UserError

    figures = []
    try:
        find_soundfont()
        engine = "auto"
    except UserError:
        engine = "preview"
    for number, index in enumerate(_best(run), 1):
        pair, output = run.asked[index], run.outputs["CPT + SFT"][index]
        output.save(out_dir / f"take-{number}.mid")
        if is_available("matplotlib"):
            piano_roll(output.notes, out_dir / f"take-{number}.png")
            figures.append(Figure(f"take-{number}.png", f"Asked for: {pair.caption}"))
        if len(output.notes):
            to_wav(output.notes, out_dir / f"take-{number}.wav", engine=engine, rate=22050)
            figures.append(Figure(f"take-{number}.wav", f"Asked for: {pair.caption}"))
    return figures


def _sample(run: Run) -> Sample:
    lines = []
    for index in _best(run):
        output = run.outputs["CPT + SFT"][index]
        names = sorted({instrument_name(int(i)) for i in output.notes.instrument})
        lines.append(f"asked: {run.asked[index].caption}")
        lines.append(
            f"got:   {len(output.notes)} notes, {output.seconds:.1f} s, {', '.join(names)}"
        )
    return Sample("Two held-out captions", "\n".join(lines))


def _notes(runs: Sequence[Run], folder: Path | None) -> list[str]:
    found = [
        "Instruments count by family, as the small grid has 16 of them and drums. Tempo is "
        "measured from onsets, never from the file.",
        "The held-out music itself scores 1 in instruments, key and density, as its captions were "
        "computed by the same measures; its tempo shows what measuring from onsets can reach.",
        "All models take the same number of steps.",
    ]
    alone, both = (
        {m: _mean([run.scores[name][m] for run in runs]) for m in METRICS}
        for name in ("SFT", "CPT + SFT")
    )
    if better := [SHOWN[m] for m in METRICS if alone[m] > both[m]]:
        found.append(
            f"Against expectation the second stage alone is better in {', '.join(better)}."
        )
    if folder is None:
        found.append(
            "No real tunes: name a folder with nottingham/ and jsb/ in TENFOLD_DATA to train on "
            "them as well."
        )
    return found
