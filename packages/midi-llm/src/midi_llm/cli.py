"""The command `midi-llm`: options in, one call into the library, text out.

Nothing but the standard library is imported until a verb runs, so that help is there at once.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midi_llm._version import __version__
from tenfold_common.atomic import check_output_file, prepare_output_dir, write_json
from tenfold_common.cli import Parser, base_parser, run, setup_logging
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from midi_llm.grammar import GenerationConstraints
    from midi_llm.midi_write import Style
    from midi_llm.notes import Notes

DESCRIPTION = "Write music as MIDI from words, and train, check and hear models that do."
CONSTRAINTS = (
    "instruments", "key", "pitch_range", "max_polyphony", "end_time", "notes_per_second",
    "min_notes",
)  # fmt: skip
ENGINES = ("transformers", "vllm", "server")
METRICS = ("control", "compression", "distribution", "fad", "clap")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 success, 1 a failed claim or a bug, 2 a wrong input, 130 interrupted.
    """
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    parser = _parser()
    if not argv:
        parser.print_help()
        return 2
    arguments = parser.parse_args(argv)
    setup_logging(-1 if arguments.quiet else arguments.verbose, package="midi_llm")
    return arguments.verb_function(arguments)


def _parser() -> Parser:
    parser = base_parser("midi-llm", DESCRIPTION, __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(verb_function=function)
        made.add_argument("--json", metavar="FILE", help="also write what was found here")
        made.add_argument("--seed", type=_seed, default=0, help="fixes every choice (default 0)")
        return made

    generate = verb("generate", _generate, "write MIDI files for a text")
    generate.add_argument("prompt", metavar="TEXT")
    generate.add_argument("--out", required=True, metavar="FOLDER", help="for take-1.mid, ...")
    generate.add_argument("--n", type=_count, default=1, help="takes (default 1)")
    generate.add_argument("--max_notes", type=_count, default=682, help="(default 682)")
    _add_model(generate)
    _add_sampling(generate)
    _add_constraints(generate)
    _add_style(generate)
    generate.add_argument("--overwrite", action="store_true", help="replace takes that are there")

    infill = verb("infill", _infill, "write a span of a MIDI file anew")
    infill.add_argument("file", metavar="FILE")
    infill.add_argument("--prompt", required=True, metavar="TEXT")
    infill.add_argument("--start", type=float, required=True, help="second at which it begins")
    infill.add_argument("--end", type=float, required=True, help="second at which it ends")
    infill.add_argument("--keep", nargs="+", default=[], metavar="INSTRUMENT")
    infill.add_argument("--out", required=True, metavar="FILE")
    _add_model(infill, engines=("transformers",))
    _add_sampling(infill)
    _add_constraints(infill)
    _add_style(infill)

    go_on = verb("continue", _continue, "go on with a MIDI file")
    go_on.add_argument("file", metavar="FILE")
    go_on.add_argument("--prompt", required=True, metavar="TEXT")
    go_on.add_argument("--seconds", type=float, required=True, help="how much to add")
    go_on.add_argument("--out", required=True, metavar="FILE")
    _add_model(go_on, engines=("transformers",))
    _add_sampling(go_on)
    _add_constraints(go_on)
    _add_style(go_on)

    tokenize = verb("tokenize", _tokenize, "show the ids of a MIDI file")
    tokenize.add_argument("file", metavar="FILE")
    tokenize.add_argument("--small", action="store_true", help="the grid for tiny models")
    tokenize.add_argument("--windows", action="store_true", help="all of a long piece")

    detokenize = verb("detokenize", _detokenize, "write a MIDI file from ids")
    detokenize.add_argument("ids", metavar="FILE", help="JSON list, or as tokenize writes it")
    detokenize.add_argument("--out", required=True, metavar="FILE")
    detokenize.add_argument("--small", action="store_true", help="the grid for tiny models")
    detokenize.add_argument("--controls", choices=("error", "merge"), default="error")
    _add_style(detokenize)

    inspect = verb("inspect", _inspect, "measure key, tempo, instruments and more of MIDI files")
    inspect.add_argument("files", nargs="*", metavar="FILE")
    inspect.add_argument("--instruments", action="store_true", help="list all instruments")

    caption = verb("caption", _caption, "describe MIDI files in words")
    caption.add_argument("files", nargs="+", metavar="FILE")
    caption.add_argument("--style", choices=("midicaps", "plain", "short"), default="midicaps")

    expand = verb("expand", _expand, "give a text model a music vocabulary")
    expand.add_argument("--base", required=True, metavar="MODEL", help="a folder or a hub name")
    expand.add_argument("--out", required=True, metavar="FOLDER")
    expand.add_argument("--init", choices=("normal", "mean", "factored"), default="normal")
    expand.add_argument("--small", action="store_true", help="the grid for tiny models")
    expand.add_argument("--overwrite", action="store_true")

    convert = verb("convert", _convert, "make the public MIDI-LLM checkpoint loadable")
    convert.add_argument("folder", metavar="FOLDER")
    convert.add_argument("--out", required=True, metavar="FOLDER")

    prepare = verb("prepare", _prepare, "make training data of MIDI files")
    prepare.add_argument("stage", choices=("cpt", "sft"))
    prepare.add_argument("--midi", required=True, metavar="FOLDER", help="searched for *.mid")
    prepare.add_argument("--model", required=True, metavar="FOLDER", help="whose ids to use")
    prepare.add_argument("--out", required=True, metavar="FOLDER")
    prepare.add_argument("--text", metavar="FILE", help="of cpt: texts, an empty line between two")
    prepare.add_argument(
        "--captions", metavar="FILE",
        help="of sft: JSON lines with file and caption; without it they are written from the music",
    )  # fmt: skip
    prepare.add_argument("--length", type=_count, default=2048, help="ids of a row (default 2048)")
    prepare.add_argument("--copies", type=_count, default=1, help="of each piece; see the README")
    prepare.add_argument("--dropout", type=float, default=0.0, help="share of thinned captions")
    prepare.add_argument("--all", action="store_true", help="short and long pieces too")
    prepare.add_argument("--overwrite", action="store_true")

    train = verb("train", _train, "train a model on prepared data")
    train.add_argument("--model", required=True, metavar="FOLDER")
    train.add_argument("--data", required=True, metavar="FOLDER")
    train.add_argument("--out", required=True, metavar="FOLDER")
    for name, kind, default in (
        ("steps", _count, 1000), ("lr", float, 1e-4), ("music_lr", float, 3e-4),
        ("batch_size", _count, 8), ("accumulation", _count, 1), ("warmup", float, 0.02),
        ("save_every", _count, 500), ("log_every", _count, 10),
    ):  # fmt: skip
        train.add_argument(f"--{name}", type=kind, default=default, help=f"(default {default})")
    train.add_argument("--bf16", action="store_true")
    train.add_argument("--lora", type=_count, metavar="RANK", help="adapters and music rows alone")
    train.add_argument("--resume", action="store_true", help="from the newest whole checkpoint")
    train.add_argument("--overwrite", action="store_true")

    evaluate = verb("evaluate", _evaluate, "score MIDI files against what was asked for")
    evaluate.add_argument(
        "requests", metavar="FILE", help="JSON lines: file, and caption or attributes"
    )
    evaluate.add_argument("--metrics", nargs="+", choices=METRICS, default=["control"])
    evaluate.add_argument("--real", metavar="FOLDER", help="real MIDI to compare with")
    evaluate.add_argument("--soundfont", metavar="FILE", help="of fad and clap, which are heard")
    evaluate.add_argument(
        "--shrinkage", type=float, help="of fad's covariances, where pieces are few: 0 to 1"
    )
    evaluate.add_argument("--resamples", type=_count, default=2000, help="of the bootstrap")

    render = verb("render", _render, "turn a MIDI file into sound and pictures")
    render.add_argument("file", metavar="FILE")
    render.add_argument("--wav", metavar="FILE")
    render.add_argument("--roll", metavar="FILE", help="piano roll, .png")
    render.add_argument("--soundfont", metavar="FILE")
    render.add_argument("--engine", choices=("auto", "fluidsynth", "preview"), default="auto")

    serve = verb("serve", _serve, "a web page to type prompts, see and hear takes")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    _add_model(serve, engines=("transformers",))

    demo = verb("demo", _demo, "train a tiny model on the spot and see whether it obeys")
    demo.add_argument("--out", required=True, metavar="FOLDER")
    demo.add_argument("--full", action="store_true", help="three seeds")
    demo.add_argument("--data", metavar="FOLDER", help="with nottingham/ and jsb/")
    return parser


def _add_model(parser: Parser, engines: Sequence[str] = ENGINES) -> None:
    parser.add_argument("--model", required=True, metavar="FOLDER", help="or a server's address")
    if len(engines) > 1:
        parser.add_argument("--engine", choices=engines, default="transformers")
        parser.add_argument("--processor", metavar="FOLDER", help="of a server's model")
    parser.add_argument("--device", default="auto")


def _add_sampling(parser: Parser) -> None:
    parser.add_argument("--temperature", type=float, default=1.0, help="(default 1)")
    parser.add_argument("--top_p", type=float, default=0.98, help="(default 0.98)")


def _add_constraints(parser: Parser) -> None:
    parser.add_argument("--instruments", nargs="+", metavar="NAME", help="no others sound")
    parser.add_argument("--key", help="such as 'C minor'")
    parser.add_argument("--pitch_range", nargs=2, type=int, metavar=("LOW", "HIGH"))
    parser.add_argument("--max_polyphony", type=int, metavar="N")
    parser.add_argument("--end_time", type=float, metavar="SECONDS")
    parser.add_argument("--notes_per_second", type=float, metavar="X", help="at most")
    parser.add_argument("--min_notes", type=int, metavar="N")


def _add_style(parser: Parser) -> None:
    parser.add_argument("--tempo", type=float, default=120.0, help="written into the file")
    parser.add_argument("--time_signature", default="4/4", help="written into the file")
    parser.add_argument("--accents", action="store_true", help="louder beats (an invention)")


def _constraints(arguments: argparse.Namespace) -> "GenerationConstraints":
    from midi_llm.grammar import GenerationConstraints

    given = {n: getattr(arguments, n) for n in CONSTRAINTS if getattr(arguments, n) is not None}
    return GenerationConstraints.from_dict(given)


def _style(arguments: argparse.Namespace) -> "Style":
    from midi_llm.midi_write import Style

    parts = arguments.time_signature.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--time_signature must be such as 3/4, not {arguments.time_signature!r}")
    return Style(
        tempo=arguments.tempo,
        time_signature=(int(parts[0]), int(parts[1])),
        key=getattr(arguments, "key", None),
        accents=arguments.accents,
    )


def _model(arguments: argparse.Namespace) -> Any:
    engine = getattr(arguments, "engine", "transformers")
    if engine == "server" or arguments.model.startswith(("http://", "https://")):
        from midi_llm.modeling import TextMidiProcessor
        from midi_llm.vllm_engine import ServerMidiLM

        if not arguments.processor:
            raise UserError("a server's model needs --processor, the folder it was loaded from")
        return ServerMidiLM(arguments.model, TextMidiProcessor.from_pretrained(arguments.processor))
    _quiet_libraries()
    if engine == "vllm":
        from midi_llm.vllm_engine import VLLMMidiLM

        return VLLMMidiLM.from_pretrained(arguments.model)
    from midi_llm.decode import MidiLM

    return MidiLM.from_pretrained(arguments.model, device=arguments.device)


def _generate(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    out = Path(arguments.out)
    files = [out / f"take-{i + 1}.mid" for i in range(arguments.n)]
    if not arguments.overwrite and (there := [f for f in files if f.exists()]):
        raise UserError(f"{there[0]} is there already; name another folder, or give --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    constraints, style = _constraints(arguments), _style(arguments)
    outputs = _model(arguments).generate(
        arguments.prompt, n=arguments.n, temperature=arguments.temperature, top_p=arguments.top_p,
        max_notes=arguments.max_notes, constraints=constraints, style=style, seed=arguments.seed,
    )  # fmt: skip
    rows = []
    for file, output in zip(files, outputs, strict=True):
        output.save(file)
        print(f"{file}: {len(output.notes)} notes, {output.seconds:.1f} s, {output.finish_reason}")
        rows.append(_about(file, output))
    _write(arguments, {"prompt": arguments.prompt, "takes": rows})
    return 0


def _about(file: Path, output: Any) -> dict[str, Any]:
    return {
        "file": str(file),
        "prompt": output.prompt,
        "notes": len(output.notes),
        "seconds": output.seconds,
        "finish_reason": output.finish_reason,
    }


def _one(arguments: argparse.Namespace, output: Any) -> int:
    file = Path(arguments.out)
    output.save(file)
    print(f"{file}: {len(output.notes)} notes, {output.seconds:.1f} s, {output.finish_reason}")
    _write(arguments, _about(file, output))
    return 0


def _infill(arguments: argparse.Namespace) -> int:
    _check_json(arguments, arguments.out)
    from midi_llm.midi_read import read_notes

    notes = read_notes(arguments.file)
    constraints, style = _constraints(arguments), _style(arguments)
    output = _model(arguments).infill(
        notes, start=arguments.start, end=arguments.end, prompt=arguments.prompt,
        keep_instruments=arguments.keep, temperature=arguments.temperature, top_p=arguments.top_p,
        constraints=constraints, style=style, seed=arguments.seed,
    )  # fmt: skip
    return _one(arguments, output)


def _continue(arguments: argparse.Namespace) -> int:
    _check_json(arguments, arguments.out)
    from midi_llm.midi_read import read_notes

    notes = read_notes(arguments.file)
    constraints, style = _constraints(arguments), _style(arguments)
    output = _model(arguments).continue_(
        notes, seconds=arguments.seconds, prompt=arguments.prompt,
        temperature=arguments.temperature, top_p=arguments.top_p, constraints=constraints,
        style=style, seed=arguments.seed,
    )  # fmt: skip
    return _one(arguments, output)


def _tokenizer(arguments: argparse.Namespace) -> Any:
    from midi_llm.tokenizer import AMTTokenizer
    from midi_llm.vocab import AMTConfig

    return AMTTokenizer(AMTConfig.small() if arguments.small else AMTConfig())


def _tokenize(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    tokenizer = _tokenizer(arguments)
    if arguments.windows:
        found = [w.tolist() for w in tokenizer.encode_windows(arguments.file)]
    else:
        found = [tokenizer.encode(arguments.file).ids]
    for ids in found:
        print(json.dumps(ids))
    _write(arguments, {"file": arguments.file, "grid": tokenizer.amt.to_dict(), "ids": found})
    return 0


def _detokenize(arguments: argparse.Namespace) -> int:
    _check_json(arguments, arguments.out)
    tokenizer = _tokenizer(arguments)
    try:
        found = json.loads(Path(arguments.ids).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{arguments.ids} is no JSON: {error}") from error
    ids = found["ids"] if isinstance(found, dict) and "ids" in found else found
    if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise UserError(f"{arguments.ids} must hold one list of whole numbers")
    from midi_llm.anticipate import notes_of_events
    from midi_llm.midi_write import write_midi

    events = tokenizer.to_events(ids, controls=arguments.controls)
    notes = notes_of_events(events, tokenizer.amt)
    write_midi(notes, arguments.out, _style(arguments))
    print(f"{arguments.out}: {len(notes)} notes, {notes.end:.1f} s")
    _write(arguments, {"file": arguments.out, "notes": len(notes), "seconds": notes.end})
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    if arguments.instruments:
        from midi_llm.vocab import DRUMS, instrument_name

        for number in range(DRUMS + 1):
            print(f"{number:3d} {instrument_name(number)}")
        return 0
    if not arguments.files:
        raise UserError("name MIDI files, or give --instruments")
    from midi_llm.attributes import analyze
    from midi_llm.vocab import instrument_name

    rows = []
    for file in arguments.files:
        found = analyze(file)
        tempo = "?" if found.tempo is None else f"{found.tempo:.0f}"
        metre = "?" if found.time_signature is None else "/".join(map(str, found.time_signature))
        names = ", ".join(map(instrument_name, found.instruments))
        print(
            f"{file}: {found.key or 'no key'} (margin {found.key_margin:.2f}), {tempo} bpm, "
            f"{metre}, {found.seconds:.1f} s, {found.notes_per_second:.1f} notes/s, {names}"
        )
        rows.append({"file": file, **found.to_dict()})
    _write(arguments, {"files": rows})
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    from midi_llm.attributes import analyze
    from midi_llm.captions import describe

    rows = []
    for number, file in enumerate(arguments.files):
        text = describe(analyze(file), style=arguments.style, seed=arguments.seed + number)
        print(f"{file}: {text}" if len(arguments.files) > 1 else text)
        rows.append({"file": file, "caption": text})
    _write(arguments, {"captions": rows})
    return 0


def _expand(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    out = prepare_output_dir(arguments.out, overwrite=arguments.overwrite)
    _quiet_libraries()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from midi_llm.decode import MidiLM
    from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
    from midi_llm.vocab import AMTConfig

    amt = AMTConfig.small() if arguments.small else AMTConfig()
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.base)
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.base, dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"{arguments.base} cannot be loaded: {error}") from error
    offset = int(model.get_input_embeddings().weight.shape[0])
    expand_vocabulary(model, amt, init=arguments.init, seed=arguments.seed)
    MidiLM(model, TextMidiProcessor(tokenizer, amt, offset)).save_pretrained(out)
    size = int(model.get_input_embeddings().weight.shape[0])
    print(f"{out}: {size} rows, music from {offset} on")
    _write(arguments, {"folder": str(out), "rows": size, "offset": offset})
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    _quiet_libraries()
    from midi_llm.modeling import convert

    out = convert(arguments.folder, arguments.out)
    print(f"{out}: ready for --model")
    _write(arguments, {"folder": str(out)})
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    if not 0 <= arguments.dropout <= 1:
        raise UserError(f"--dropout must be 0 to 1, not {arguments.dropout}")
    for name, stage in (("text", "cpt"), ("captions", "sft")):
        if getattr(arguments, name) and arguments.stage != stage:
            raise UserError(f"--{name} is for {stage} and would change nothing here; leave it out")
    _quiet_libraries()
    from midi_llm.data import prepare_cpt, prepare_sft
    from midi_llm.modeling import TextMidiProcessor

    processor = TextMidiProcessor.from_pretrained(arguments.model)
    out = prepare_output_dir(arguments.out, overwrite=arguments.overwrite)
    left: dict[str, int] = {}
    pieces = list(_pieces(arguments, left))
    if arguments.stage == "cpt":
        texts = []
        if arguments.text:
            texts = [t for t in Path(arguments.text).read_text("utf-8").split("\n\n") if t.strip()]
        dataset = prepare_cpt(
            [notes for _, notes in pieces], texts, processor, length=arguments.length,
            seed=arguments.seed,
        )  # fmt: skip
    else:
        captions = _captions(arguments, [file for file, _ in pieces])
        dataset = prepare_sft(
            [(notes, captions[file]) for file, notes in pieces if file in captions], processor,
            length=arguments.length, copies=arguments.copies, dropout=arguments.dropout,
            seed=arguments.seed,
        )  # fmt: skip
    dataset.save_to_disk(str(out))
    print(f"{out}: {len(dataset)} rows of {arguments.length} ids from {len(pieces)} pieces")
    for reason, count in sorted(left.items()):
        print(f"left out: {count} {reason}")
    _write(arguments, {"folder": str(out), "rows": len(dataset), "left_out": left})
    return 0


def _pieces(arguments: argparse.Namespace, left: dict[str, int]) -> "Iterator[tuple[str, Notes]]":
    """Yield the pieces of a folder that are fit to learn from, and count the others by reason."""
    from midi_llm.data import Filters
    from midi_llm.midi_read import read_many

    folder = Path(arguments.midi)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    if not files:
        raise UserError(f"{folder} has no *.mid")
    filters = Filters(1, 0.0, 14400.0, 129) if arguments.all else Filters()
    for file, notes in zip(files, read_many(files), strict=True):
        if isinstance(notes, UserError):
            left["not readable"] = left.get("not readable", 0) + 1
            print(f"left out: {notes}", file=sys.stderr)
            continue
        reason = filters.reason(notes)
        if reason:
            left[reason] = left.get(reason, 0) + 1
        else:
            yield str(file.relative_to(folder)), notes


def _captions(arguments: argparse.Namespace, files: list[str]) -> dict[str, str]:
    from midi_llm.attributes import analyze
    from midi_llm.captions import describe

    if arguments.captions:
        return {
            str(row["file"]): str(row["caption"]) for row in _rows(arguments.captions, "caption")
        }
    folder = Path(arguments.midi)
    return {f: describe(analyze(folder / f), seed=arguments.seed + i) for i, f in enumerate(files)}


def _rows(path: str, *names: str) -> list[dict[str, Any]]:
    """Read JSON lines that all have `file` and one of some fields."""
    rows = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict) or "file" not in row or not any(n in row for n in names):
            raise UserError(f"{path}, line {number}: needs file and {' or '.join(names)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no lines")
    return rows


def _train(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    _quiet_libraries()
    from datasets import load_from_disk

    from midi_llm.decode import MidiLM
    from midi_llm.train import TrainConfig, lora_config, train

    names = ("steps", "lr", "music_lr", "batch_size", "accumulation", "warmup", "save_every",
             "log_every", "bf16", "seed")  # fmt: skip
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    try:
        dataset: Any = load_from_disk(arguments.data)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{arguments.data} holds no data of `midi-llm prepare`: {error}") from error
    loaded = MidiLM.from_pretrained(arguments.model, device="cpu")
    model: Any = loaded.model.train()
    if arguments.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(loaded.processor, model, rank=arguments.lora))
    folder = train(
        model, loaded.processor, dataset, arguments.out, config, resume=arguments.resume,
        overwrite=arguments.overwrite,
    )  # fmt: skip
    print(f"{folder}: trained for {config.steps} steps")
    _write(arguments, {"folder": str(folder)})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _check_json(arguments)
    from midi_llm.attributes import MusicAttributes
    from midi_llm.evaluation import evaluate
    from midi_llm.midi_read import read_notes

    rows = _rows(arguments.requests, "caption", "attributes")
    home = Path(arguments.requests).parent
    outputs = [read_notes(home / row["file"]) for row in rows]
    requested = [
        MusicAttributes.from_dict(row["attributes"]) if "attributes" in row else str(row["caption"])
        for row in rows
    ]
    real = None
    if arguments.real:
        files = sorted(Path(arguments.real).rglob("*.mid"))
        if not files:
            raise UserError(f"{arguments.real} has no *.mid")
        real = [read_notes(file) for file in files]
    heard = {"fad", "clap"} & set(arguments.metrics)
    audio = [_heard(notes, arguments.soundfont) for notes in outputs] if heard else None
    real_audio = None
    if "fad" in heard:
        if real is None:
            raise UserError("fad compares with real music; name a folder of it with --real")
        real_audio = [_heard(notes, arguments.soundfont) for notes in real]
    found = evaluate(
        outputs, requested, metrics=tuple(arguments.metrics), real=real, audio=audio,
        real_audio=real_audio, shrinkage=arguments.shrinkage, resamples=arguments.resamples,
        seed=arguments.seed,
    )  # fmt: skip
    print(found.table())
    _write(arguments, found.to_dict())
    return 0


def _heard(notes: "Notes", soundfont: str | None) -> Any:
    """Return a piece as it sounds: samples and rate."""
    import tempfile

    from midi_llm.render import read_wav, to_wav

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.wav"
        to_wav(notes, file, soundfont=soundfont, rate=22050)
        return read_wav(file)


def _render(arguments: argparse.Namespace) -> int:
    _check_json(arguments, arguments.wav, arguments.roll)
    if not (arguments.wav or arguments.roll):
        raise UserError("name --wav, --roll or both")
    from midi_llm.render import piano_roll, to_wav

    written = []
    if arguments.wav:
        to_wav(
            arguments.file, arguments.wav, soundfont=arguments.soundfont, engine=arguments.engine
        )
        written.append(arguments.wav)
    if arguments.roll:
        piano_roll(arguments.file, arguments.roll)
        written.append(arguments.roll)
    print("\n".join(written))
    _write(arguments, {"written": written})
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from midi_llm.app import serve

    serve(_model(arguments), host=arguments.host, port=arguments.port)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    _quiet_libraries()
    from midi_llm.demo import run_demo

    result = run_demo(out, seed=arguments.seed, full=arguments.full, data=arguments.data)
    result.save(out)
    print(result.markdown())
    return 0 if result.passed else 1


def _check_json(arguments: argparse.Namespace, *others: str | None) -> None:
    for output in filter(None, (arguments.json, *others)):
        check_output_file(output)


def _write(arguments: argparse.Namespace, value: dict[str, Any]) -> None:
    if arguments.json:
        write_json(Path(arguments.json), value)
        print(f"written: {arguments.json}")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"a seed is 0 to {2**31 - 1}, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _quiet_libraries() -> None:
    """Keep transformers' progress bars and advice out of a command's output."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
