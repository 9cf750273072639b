"""The command `midi-llm`: options in, one call into the library, text out.

Nothing but the standard library is imported until a verb runs, so that help is there at once.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midi_llm._version import __version__
from tenfold_common.atomic import (
    atomic_dir,
    check_output_dir,
    check_output_file,
)
from tenfold_common.cli import (
    Parser,
    base_parser,
    quiet_libraries,
    run,
    run_verb,
    seed_number,
    whole,
    write_found,
)
from tenfold_common.errors import UserError
from tenfold_common.optional import require

if TYPE_CHECKING:
    from midi_llm.data import Source
    from midi_llm.grammar import GenerationConstraints
    from midi_llm.midi_write import Style
    from midi_llm.notes import Notes

DESCRIPTION = "Write music as MIDI from words, and train, check and hear models that do."
CONSTRAINTS = (
    "instruments", "key", "pitch_range", "max_polyphony", "end_time", "notes_per_second",
    "min_notes",
)  # fmt: skip
ENGINES = ("transformers", "vllm", "server")
METRICS = (
    "control", "validity", "compression", "self_similarity", "distribution", "fad", "clap", "rtf",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 success, 1 a failed claim or a bug, 2 a wrong input, 130 interrupted.
    """
    return run(lambda argv: run_verb(_parser(), argv, package="midi_llm"), argv)


def _parser() -> Parser:
    parser = base_parser("midi-llm", DESCRIPTION, __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(verb_function=function)
        made.add_argument("--json", metavar="FILE", help="also write what was found here")
        made.add_argument(
            "--seed", type=seed_number, default=0, help="fixes every choice (default 0)"
        )
        return made

    generate = verb("generate", _generate, "write MIDI files for a text")
    generate.add_argument("prompt", metavar="TEXT")
    generate.add_argument("--out", required=True, metavar="FOLDER", help="for take-1.mid, ...")
    generate.add_argument("--n", type=whole(), default=1, help="takes (default 1)")
    generate.add_argument(
        "--max_notes", type=whole(), help="rests included (default 682, or what the model can read)"
    )
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
    infill.add_argument("--max_notes", type=whole(), help="that are new (default: no limit)")
    _add_model(infill)
    _add_sampling(infill)
    _add_constraints(infill)
    _add_style(infill, kept=True)

    go_on = verb("continue", _continue, "go on with a MIDI file")
    go_on.add_argument("file", metavar="FILE")
    go_on.add_argument("--prompt", required=True, metavar="TEXT")
    go_on.add_argument("--seconds", type=float, required=True, help="how much to add")
    go_on.add_argument("--out", required=True, metavar="FILE")
    go_on.add_argument("--max_notes", type=whole(), help="that are new (default: no limit)")
    _add_model(go_on)
    _add_sampling(go_on)
    _add_constraints(go_on)
    _add_style(go_on, kept=True)

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
    expand.add_argument("--init", choices=("normal", "mean", "factored", "amt"), default="normal")
    expand.add_argument("--source", metavar="MODEL", help="of --init amt: an AMT checkpoint")
    expand.add_argument("--small", action="store_true", help="the grid for tiny models")
    expand.add_argument("--overwrite", action="store_true", help="replace what an earlier run made")

    convert = verb("convert", _convert, "make the public MIDI-LLM checkpoint loadable")
    convert.add_argument("folder", metavar="FOLDER")
    convert.add_argument("--out", required=True, metavar="FOLDER")

    prepare = verb("prepare", _prepare, "make training data of MIDI files")
    prepare.add_argument("stage", choices=("cpt", "sft"))
    prepare.add_argument(
        "--midi", required=True, metavar="FOLDER", help="searched for *.mid and *.midi"
    )
    prepare.add_argument("--model", required=True, metavar="FOLDER", help="whose ids to use")
    prepare.add_argument("--out", required=True, metavar="FOLDER")
    prepare.add_argument("--text", metavar="FILE", help="of cpt: texts, an empty line between two")
    prepare.add_argument(
        "--exclude", metavar="FILE",
        help="of cpt: names of files in the folder that are held out, one a line",
    )  # fmt: skip
    prepare.add_argument(
        "--captions", metavar="FILE",
        help="of sft: JSON lines with file and caption; without it they are written from the music",
    )  # fmt: skip
    prepare.add_argument("--length", type=whole(), default=2048, help="ids of a row (default 2048)")
    prepare.add_argument(
        "--copies", type=whole(), metavar="N",
        help="of sft: how often each piece comes (default 1); where the model's grid has controls, "
        "the 2nd copy of ten is for filling in spans, the 3rd to 6th random notes, the 7th to 10th "
        "whole instruments",
    )  # fmt: skip
    prepare.add_argument(
        "--dropout", type=float, metavar="SHARE",
        help="of sft: share of captions that lose some of their sentences (default 0)",
    )  # fmt: skip
    prepare.add_argument(
        "--workers", type=whole(), default=1, metavar="N",
        help="processes; the rows are the same for any number (default 1)",
    )  # fmt: skip
    prepare.add_argument("--all", action="store_true", help="short and long pieces too")
    prepare.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run made"
    )

    train = verb("train", _train, "train a model on prepared data")
    train.add_argument("--model", required=True, metavar="FOLDER")
    train.add_argument("--data", required=True, metavar="FOLDER")
    train.add_argument("--out", required=True, metavar="FOLDER")
    for name, kind, default in (
        ("steps", whole(), 1000), ("lr", float, 1e-4), ("music_lr", float, 3e-4),
        ("batch_size", whole(), 8), ("accumulation", whole(), 1), ("warmup", float, 0.02),
        ("save_every", whole(), 500), ("log_every", whole(), 10),
    ):  # fmt: skip
        train.add_argument(f"--{name}", type=kind, default=default, help=f"(default {default})")
    train.add_argument("--bf16", action="store_true")
    train.add_argument("--lora", type=whole(), metavar="RANK", help="adapters and music rows alone")
    train.add_argument("--resume", action="store_true", help="from the newest whole checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete what is in --out first")

    evaluate = verb("evaluate", _evaluate, "score MIDI files against what was asked for")
    evaluate.add_argument(
        "requests", metavar="FILE",
        help="JSON lines: file, and caption or attributes; perhaps real, the piece behind the "
        "request, and wall_seconds, how long the file took to make",
    )  # fmt: skip
    evaluate.add_argument("--metrics", nargs="+", choices=METRICS, default=["control"])
    evaluate.add_argument(
        "--real", metavar="FOLDER",
        help="searched for *.mid and *.midi: real music to compare all files with; without it "
        "that is the lines' real",
    )  # fmt: skip
    evaluate.add_argument(
        "--wall_seconds", type=float, metavar="X", help="of rtf: how long all files took together"
    )
    evaluate.add_argument("--soundfont", metavar="FILE", help="of fad and clap, which are heard")
    evaluate.add_argument(
        "--shrinkage", type=float, help="of fad's covariances, where pieces are few: 0 to 1"
    )
    evaluate.add_argument("--resamples", type=whole(), default=2000, help="of the bootstrap")

    render = verb("render", _render, "turn a MIDI file into sound and pictures")
    render.add_argument("file", metavar="FILE")
    render.add_argument("--wav", metavar="FILE")
    render.add_argument("--roll", metavar="FILE", help="piano roll, .png")
    render.add_argument("--spectrogram", metavar="FILE", help="mel bands of the sound, .png")
    render.add_argument("--soundfont", metavar="FILE")
    render.add_argument("--engine", choices=("auto", "fluidsynth", "preview"), default="auto")

    serve = verb("serve", _serve, "a web page to type prompts, see and hear takes")
    serve.add_argument("--host", default="127.0.0.1")
    for name, default, text in (
        ("port", 8000, "0 takes any that is free"),
        ("max_queue", 4, "requests that wait, beside the one at work"),
        ("max_notes", 682, "of a piece, rests included"),
        ("max_upload", 2**20, "bytes of a MIDI file"),
    ):
        serve.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    serve.add_argument("--soundfont", metavar="FILE")
    serve.set_defaults(seed=None)
    serve.epilog = (
        "--seed is what the page begins with, by default a new one for every request; --json is "
        "written as soon as the page is served."
    )
    _add_model(serve)

    demo = verb("demo", _demo, "train a tiny model on the spot and see whether it obeys")
    demo.add_argument("--out", required=True, metavar="FOLDER")
    demo.add_argument("--full", action="store_true", help="three seeds")
    demo.add_argument("--data", metavar="FOLDER", help="with nottingham/ and jsb/")
    return parser


def _add_model(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="FOLDER", help="or a server's address")
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--processor", metavar="FOLDER", help="of a server's model")
    parser.add_argument("--device", default="auto", help="of transformers: auto, cpu or cuda")


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


def _add_style(parser: Parser, *, kept: bool = False) -> None:
    """Add what is written into files; `kept`: the default is what the source has."""
    tempo = metre = "the file's"
    if not kept:
        tempo, metre = "the text's, or 120", "the text's, or 4/4"
    parser.add_argument("--tempo", type=float, help=f"written into the file (default {tempo})")
    parser.add_argument("--time_signature", help=f"written into the file (default {metre})")
    parser.add_argument("--accents", action="store_true", help="louder beats (an invention)")


def _constraints(arguments: argparse.Namespace) -> "GenerationConstraints":
    from midi_llm.grammar import GenerationConstraints

    given = {n: getattr(arguments, n) for n in CONSTRAINTS if getattr(arguments, n) is not None}
    return GenerationConstraints.from_dict(given)


def _style(arguments: argparse.Namespace, old: "Style | None" = None) -> "Style":
    """Return what is written into files: what is asked for, else what the old file has."""
    from dataclasses import replace

    from midi_llm.midi_write import Style

    said: dict[str, Any] = {"accents": arguments.accents}
    if arguments.tempo is not None:
        said["tempo"] = arguments.tempo
    if arguments.time_signature is not None:
        parts = arguments.time_signature.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(
                f"--time_signature must be such as 3/4, not {arguments.time_signature!r}"
            )
        said["time_signature"] = (int(parts[0]), int(parts[1]))
    if getattr(arguments, "key", None) is not None:
        said["key"] = arguments.key
    return replace(old or Style(), **said)


def _model(arguments: argparse.Namespace) -> Any:
    engine = arguments.engine
    if engine == "server" or arguments.model.startswith(("http://", "https://")):
        from midi_llm.modeling import TextMidiProcessor
        from midi_llm.vllm_engine import ServerMidiLM

        if not arguments.processor:
            raise UserError("a server's model needs --processor, the folder it was loaded from")
        return ServerMidiLM(arguments.model, TextMidiProcessor.from_pretrained(arguments.processor))
    quiet_libraries()
    if engine == "vllm":
        from midi_llm.vllm_engine import VLLMMidiLM

        return VLLMMidiLM.from_pretrained(arguments.model)
    from midi_llm.decode import MidiLM

    return MidiLM.from_pretrained(arguments.model, device=arguments.device)


def _generate(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    out = Path(arguments.out)
    files = [out / f"take-{i + 1}.mid" for i in range(arguments.n)]
    if not arguments.overwrite and (there := [f for f in files if f.exists()]):
        raise UserError(f"{there[0]} is there already; name another folder, or give --overwrite")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    from midi_llm.captions import style_of_prompt

    constraints = _constraints(arguments)
    style = _style(arguments, style_of_prompt(arguments.prompt))
    outputs = _model(arguments).generate(
        arguments.prompt, n=arguments.n, temperature=arguments.temperature, top_p=arguments.top_p,
        max_notes=arguments.max_notes, constraints=constraints, style=style, seed=arguments.seed,
    )  # fmt: skip
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    for file, output in zip(files, outputs, strict=True):
        output.save(file)
        print(f"{file}: {len(output.notes)} notes, {output.seconds:.1f} s, {output.finish_reason}")
        rows.append(_about(file, output))
    write_found(arguments, {"prompt": arguments.prompt, "takes": rows})
    return 0


def _about(file: Path, output: Any) -> dict[str, Any]:
    return {
        "file": str(file),
        "prompt": output.prompt,
        "notes": len(output.notes),
        "seconds": output.seconds,
        "finish_reason": output.finish_reason,
    }


def _infill(arguments: argparse.Namespace) -> int:
    span = {"start": arguments.start, "end": arguments.end, "keep_instruments": arguments.keep}
    return _change(arguments, "infill", span)


def _continue(arguments: argparse.Namespace) -> int:
    return _change(arguments, "continue_", {"seconds": arguments.seconds})


def _change(arguments: argparse.Namespace, method: str, own: dict[str, Any]) -> int:
    """Write a file that a method of a model makes of another one."""
    _check_outputs(arguments, arguments.out)
    from midi_llm.midi_read import read_piece
    from midi_llm.midi_write import style_of_score

    notes, score = read_piece(arguments.file)
    named = {
        **own, "prompt": arguments.prompt, "temperature": arguments.temperature,
        "top_p": arguments.top_p, "max_notes": arguments.max_notes,
        "constraints": _constraints(arguments), "style": _style(arguments, style_of_score(score)),
        "seed": arguments.seed,
    }  # fmt: skip
    output, file = getattr(_model(arguments), method)(notes, **named), Path(arguments.out)
    output.save(file)
    added = len(output.notes) - len(notes)
    print(
        f"{file}: {len(output.notes)} notes ({added:+d}), {output.seconds:.1f} s, "
        f"{output.finish_reason}"
    )
    write_found(arguments, _about(file, output))
    return 0


def _tokenizer(arguments: argparse.Namespace, grid: "dict[str, Any] | None" = None) -> Any:
    from midi_llm.tokenizer import AMTTokenizer
    from midi_llm.vocab import AMTConfig

    if grid is not None:
        made = AMTConfig.from_dict(grid)
        if arguments.small and made != AMTConfig.small():
            raise UserError("the ids are of another grid than --small; leave it out")
        return AMTTokenizer(made)
    return AMTTokenizer(AMTConfig.small() if arguments.small else AMTConfig())


def _tokenize(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    tokenizer = _tokenizer(arguments)
    if arguments.windows:
        found = [w.tolist() for w in tokenizer.encode_windows(arguments.file)]
    else:
        found = [tokenizer.encode(arguments.file).ids]
    for ids in found:
        print(json.dumps(ids))
    write_found(arguments, {"file": arguments.file, "grid": tokenizer.amt.to_dict(), "ids": found})
    return 0


def _detokenize(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.out)
    try:
        found = json.loads(Path(arguments.ids).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{arguments.ids} is no JSON: {error}") from error
    grid = found.get("grid") if isinstance(found, dict) else None
    tokenizer = _tokenizer(arguments, grid)
    ids = found["ids"] if isinstance(found, dict) and "ids" in found else found
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        if len(ids) > 1:
            raise UserError(
                f"{arguments.ids} holds {len(ids)} windows, each of which begins at 0: when one "
                "follows another is not known. Give one of them"
            )
        ids = ids[0]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{arguments.ids} must hold one list of whole numbers")
    from midi_llm.anticipate import notes_of_events
    from midi_llm.midi_write import write_midi

    events = tokenizer.to_events(ids, controls=arguments.controls)
    notes = notes_of_events(events, tokenizer.amt)
    write_midi(notes, arguments.out, _style(arguments))
    print(f"{arguments.out}: {len(notes)} notes, {notes.end:.1f} s")
    write_found(arguments, {"file": arguments.out, "notes": len(notes), "seconds": notes.end})
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    if arguments.instruments:
        from midi_llm.vocab import DRUMS, instrument_name

        names = {number: instrument_name(number) for number in range(DRUMS + 1)}
        for number, name in names.items():
            print(f"{number:3d} {name}")
        write_found(arguments, {"instruments": names})
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
    write_found(arguments, {"files": rows})
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    from midi_llm.attributes import analyze
    from midi_llm.captions import describe

    rows = []
    for number, file in enumerate(arguments.files):
        text = describe(analyze(file), style=arguments.style, seed=arguments.seed + number)
        print(f"{file}: {text}" if len(arguments.files) > 1 else text)
        rows.append({"file": file, "caption": text})
    write_found(arguments, {"captions": rows})
    return 0


def _expand(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    if (arguments.source is None) == (arguments.init == "amt"):
        raise UserError("--init amt needs --source, an AMT checkpoint; the others take none")
    inputs = [arguments.base, arguments.source]
    check_output_dir(arguments.out, overwrite=arguments.overwrite, inputs=inputs)
    quiet_libraries()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from midi_llm.decode import MidiLM
    from midi_llm.modeling import TextMidiProcessor, expand_vocabulary
    from midi_llm.vocab import AMTConfig

    amt = AMTConfig.small() if arguments.small else AMTConfig()
    name, source = arguments.base, None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        if name := arguments.source:
            found: Any = AutoModelForCausalLM.from_pretrained(name).get_input_embeddings()
            source = found.weight
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {error}") from error
    offset = int(model.get_input_embeddings().weight.shape[0])
    expand_vocabulary(model, amt, init=arguments.init, source=source, seed=arguments.seed)
    with atomic_dir(arguments.out) as made:
        MidiLM(model, TextMidiProcessor(tokenizer, amt, offset)).save_pretrained(made)
    size = int(model.get_input_embeddings().weight.shape[0])
    print(f"{arguments.out}: {size} rows, music from {offset} on")
    write_found(arguments, {"folder": arguments.out, "rows": size, "offset": offset})
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    quiet_libraries()
    from midi_llm.modeling import convert

    out = convert(arguments.folder, arguments.out)
    print(f"{out}: ready for --model")
    write_found(arguments, {"folder": str(out)})
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    for name, stage in (
        ("text", "cpt"), ("exclude", "cpt"), ("captions", "sft"), ("copies", "sft"),
        ("dropout", "sft"),
    ):  # fmt: skip
        if getattr(arguments, name) is not None and arguments.stage != stage:
            raise UserError(f"--{name} is for {stage} and would change nothing here; leave it out")
    dropout = arguments.dropout or 0.0
    if not 0 <= dropout <= 1:
        raise UserError(f"--dropout must be 0 to 1, not {dropout}")
    if arguments.length < 4:
        raise UserError(f"--length must be at least 4, a flag and an event, not {arguments.length}")
    names = ("midi", "model", "text", "captions", "exclude")
    inputs = [getattr(arguments, name) for name in names]
    place: dict[str, Any] = {"overwrite": arguments.overwrite, "inputs": inputs}
    check_output_dir(arguments.out, **place)
    left: Counter[str] = Counter()
    sources = _pieces(arguments, left)
    quiet_libraries()
    from midi_llm.data import Filters, Recipe, write_dataset
    from midi_llm.modeling import TextMidiProcessor

    recipe = Recipe(
        arguments.stage, TextMidiProcessor.from_pretrained(arguments.model),
        length=arguments.length, copies=arguments.copies or 1, dropout=dropout,
        seed=arguments.seed, filters=Filters(1, 0.0, 14400.0, 129) if arguments.all else Filters(),
    )  # fmt: skip
    with atomic_dir(arguments.out) as made:
        found = write_dataset(sources, made, recipe, workers=arguments.workers)
        check_output_dir(arguments.out, **place)  # another run may have been there
    left += found.left_out
    print(
        f"{arguments.out}: {found.rows} rows of {arguments.length} ids from {found.used} of "
        f"{sum(source.span is None for source in sources)} pieces"
    )
    for reason, count in sorted(left.items()):
        print(f"left out: {count} {reason}")
    write_found(arguments, {"folder": arguments.out, "rows": found.rows, "pieces": found.used,
                       "left_out": dict(left)})  # fmt: skip
    return 0


def _pieces(arguments: argparse.Namespace, left: Counter[str]) -> "list[Source]":
    """List what to learn from: files of the folder and parts of the text; count what is not."""
    from midi_llm.data import Source, text_sources

    files = _midi_files(arguments.midi)
    names = [file.relative_to(arguments.midi).as_posix() for file in files]
    captions = _captions(arguments.captions) if arguments.captions else None
    excluded = set()
    if arguments.exclude:
        lines = Path(arguments.exclude).read_text("utf-8", "surrogateescape").split("\n")
        excluded = {Path(line.strip()).as_posix() for line in lines if line.strip()}
        left["held out by --exclude"] = len(excluded.intersection(names))
        left["named by --exclude, but not in the folder"] = len(excluded.difference(names))
    if captions is not None:
        left["without a caption"] = len(set(names).difference(captions))
        left["captions without a file"] = len(set(captions).difference(names))
        if not set(captions).intersection(names):
            raise UserError(
                f"no caption is of a file in the folder: {arguments.captions} has "
                f"{next(iter(captions))!r}, {arguments.midi} has {names[0]!r}"
            )
    sources = [
        Source(number, str(file), captions[name] if captions else None)
        for number, (file, name) in enumerate(zip(files, names, strict=True))
        if name not in excluded and (captions is None or name in captions)
    ]
    if arguments.text:
        sources += text_sources(arguments.text, first=len(files))
    return sources


def _captions(path: str) -> dict[str, str]:
    """Read the captions of files, by their names relative to the folder."""
    captions: dict[str, str] = {}
    for number, row in _numbered_rows(path, "caption"):
        where, name, caption = f"{path}, line {number}", row["file"], row["caption"]
        try:
            _text_of(caption)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if not isinstance(name, str) or not name or Path(name).is_absolute():
            raise UserError(f"{where}: file must be a name relative to --midi, not {name!r}")
        name = Path(name).as_posix()
        if name in captions:
            raise UserError(f"{where}: {name} has a caption already; one is allowed")
        captions[name] = caption
    return captions


def _text_of(caption: object) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"the caption must be a text, not {caption!r}")
    return caption


def _numbered_rows(path: str, *names: str) -> list[tuple[int, dict[str, Any]]]:
    """Read JSON lines that all have `file` and one of some fields, with their numbers."""
    rows = []
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(row, dict) or "file" not in row or not any(n in row for n in names):
                raise UserError(f"{path}, line {number}: needs file and {' or '.join(names)}")
            rows.append((number, row))
    if not rows:
        raise UserError(f"{path} has no lines")
    return rows


def _train(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    quiet_libraries()
    from datasets import load_from_disk

    from midi_llm.decode import MidiLM
    from midi_llm.train import TrainConfig, lora_config, train

    names = ("steps", "lr", "music_lr", "batch_size", "accumulation", "warmup", "save_every",
             "log_every", "bf16", "seed")  # fmt: skip
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    check_output_dir(
        arguments.out, resume=arguments.resume, overwrite=arguments.overwrite,
        inputs=[arguments.model, arguments.data],
    )  # fmt: skip
    try:
        dataset: Any = load_from_disk(arguments.data)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{arguments.data} holds no data of `midi-llm prepare`: {error}") from error
    if arguments.lora:
        require("peft", extra="peft", package="midi-llm", purpose="--lora")
    # The optimiser's own copy is float32, whatever the folder holds; bf16 is for computing.
    loaded = MidiLM.from_pretrained(arguments.model, device="cpu", dtype="float32")
    model: Any = loaded.model.train()
    if arguments.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(loaded.processor, model, rank=arguments.lora))
    folder = train(
        model, loaded.processor, dataset, arguments.out, config, resume=arguments.resume,
        overwrite=arguments.overwrite,
    )  # fmt: skip
    print(f"{folder}: trained for {config.steps} steps")
    write_found(arguments, {"folder": str(folder)})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    from midi_llm.attributes import MusicAttributes
    from midi_llm.evaluation import evaluate
    from midi_llm.midi_read import read_notes

    numbered = _numbered_rows(arguments.requests, "caption", "attributes")
    rows = [row for _, row in numbered]
    home = Path(arguments.requests).parent
    files = [home / str(row["file"]) for row in rows]
    behind = [home / str(name) for name in _of_all(rows, "real", arguments.requests)]
    pool = _midi_files(arguments.real) if arguments.real else []
    if not (pool or behind) and (lacking := {"fad", "distribution"} & set(arguments.metrics)):
        raise UserError(
            f"{min(lacking)} compares with real music; name a folder of it with --real, or in "
            "every line the piece behind it as real"
        )
    for name, metrics in (("shrinkage", {"fad"}), ("wall_seconds", {"rtf"})):
        if getattr(arguments, name) is not None and not metrics & set(arguments.metrics):
            raise UserError(
                f"--{name} is for {min(metrics)} and would change nothing here; leave it out"
            )
    if arguments.wall_seconds is not None and not 0 < arguments.wall_seconds < float("inf"):
        raise UserError(f"--wall_seconds must be over 0, not {arguments.wall_seconds}")
    if arguments.shrinkage is not None and not 0 <= arguments.shrinkage <= 1:
        raise UserError(f"--shrinkage must be 0 to 1, not {arguments.shrinkage}")
    wall = arguments.wall_seconds or _of_all(rows, "wall_seconds", arguments.requests)
    if "rtf" in arguments.metrics and not wall:
        raise UserError("rtf needs --wall_seconds, or wall_seconds in every line")
    requested = []
    for number, row in numbered:
        try:
            requested.append(
                MusicAttributes.from_dict(row["attributes"])
                if "attributes" in row
                else _text_of(row["caption"])
            )
        except UserError as error:
            raise UserError(f"{arguments.requests}, line {number}: {error}") from error
    outputs, references, real = ([read_notes(f) for f in some] for some in (files, behind, pool))
    heard = {"fad", "clap"} & set(arguments.metrics)

    def sound(some: list[Path], notes: "list[Notes]", wanted: bool = True) -> Any:
        return _Sounds(some, notes, arguments.soundfont) if heard and some and wanted else None

    found = evaluate(
        outputs, requested, metrics=tuple(arguments.metrics), references=references or None,
        real=real or None, audio=sound(files, outputs),
        reference_audio=sound(behind, references, "clap" in heard or not pool),
        real_audio=sound(pool, real, "fad" in heard), wall_seconds=wall or None,
        shrinkage=arguments.shrinkage, resamples=arguments.resamples, seed=arguments.seed,
    )  # fmt: skip
    print(found.table())
    write_found(arguments, found.to_dict())
    return 0


def _of_all(rows: list[dict[str, Any]], name: str, path: str) -> list[Any]:
    """Return a field of rows that all of them have, or none."""
    found = [row[name] for row in rows if name in row]
    if found and len(found) < len(rows):
        raise UserError(
            f"{path}: {len(found)} of {len(rows)} lines have {name}; give it in all of them, or "
            "in none"
        )
    return found


def _midi_files(folder: str) -> list[Path]:
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder")
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    if not found:
        raise UserError(f"{folder} has no *.mid")
    return found


class _Sounds(Sequence):
    """Pieces as they sound, samples and rate, each rendered when it is asked for."""

    def __init__(self, files: list[Path], notes: "list[Notes]", soundfont: str | None) -> None:
        self.files, self.notes, self.soundfont = files, notes, soundfont

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: Any) -> Any:
        import tempfile

        from midi_llm.render import read_wav, to_wav

        file, notes = self.files[place], self.notes[place]
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "a.wav"
            try:
                to_wav(notes, wav, soundfont=self.soundfont, rate=22050)
            except UserError as error:
                raise UserError(f"{file} cannot be heard: {error}") from error
            return read_wav(wav)


def _render(arguments: argparse.Namespace) -> int:
    targets = [arguments.wav, arguments.roll, arguments.spectrogram]
    _check_outputs(arguments, *targets)
    if not any(targets):
        raise UserError("name --wav, --roll or --spectrogram")
    import tempfile

    from midi_llm.render import piano_roll, spectrogram, to_wav

    if arguments.wav or arguments.spectrogram:
        with tempfile.TemporaryDirectory() as folder:
            wav = arguments.wav or Path(folder) / "a.wav"
            to_wav(arguments.file, wav, soundfont=arguments.soundfont, engine=arguments.engine)
            if arguments.spectrogram:
                spectrogram(wav, path=arguments.spectrogram)
    if arguments.roll:
        piano_roll(arguments.file, arguments.roll)
    written = [target for target in targets if target]
    print("\n".join(written))
    write_found(arguments, {"written": written})
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    from midi_llm.app import serve

    def ready(address: str) -> None:
        print(f"serving {address} until Ctrl-C", flush=True)
        write_found(arguments, {"address": address})

    serve(
        _model(arguments), host=arguments.host, port=arguments.port, max_queue=arguments.max_queue,
        max_notes=arguments.max_notes, max_upload=arguments.max_upload,
        soundfont=arguments.soundfont, seed=arguments.seed, ready=ready,
    )  # fmt: skip
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    from midi_llm.demo import run_demo

    result = run_demo(out, seed=arguments.seed, full=arguments.full, data=arguments.data)
    result.save(out)
    print(result.markdown())
    write_found(arguments, result.to_dict())
    return 0 if result.passed else 1


def _check_outputs(arguments: argparse.Namespace, *others: str | None) -> None:
    """Refuse outputs, --json among them, that are an input, of an input, or another output."""
    names = ("file", "ids", "requests", "text", "captions", "exclude", "model", "processor", "data",
             "base", "source", "folder")  # fmt: skip
    taken = [getattr(arguments, name, None) for name in names]
    taken += getattr(arguments, "files", [])
    for output in filter(None, (arguments.json, *others)):
        check_output_file(output, inputs=taken)
        taken.append(output)
