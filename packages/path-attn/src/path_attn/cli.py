"""The command `path-attn`: options in, one call into the library, text out.

Nothing but the standard library is imported until a verb runs, so that help is there at once.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from path_attn._version import __version__
from path_attn.config import (
    COMPARISON_FILE,
    POSITION_ENCODINGS,
    TASK_DEFAULTS,
    TrainConfig,
    check_temperature,
    field_types,
    read_config_file,
)
from path_attn.files import check_model_folder, check_text_file
from tenfold_common.atomic import write_json
from tenfold_common.cli import Parser, base_parser, quiet_libraries, run, run_verb
from tenfold_common.errors import UserError, suggest

DESCRIPTION = "PaTH attention: train, evaluate, convert and check models."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 success, 1 a failed check, claim or a bug, 2 a wrong input, 130 interrupted, 143 a
        training run stopped by SIGTERM.
    """
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:  # it has its own options
        from path_attn.bench import main as bench

        return bench(argv[1:]) or 0
    return run_verb(_parser(), argv, package="path_attn")


def _bench(arguments: argparse.Namespace) -> int:
    del arguments
    raise UserError("options of bench come after the verb: path-attn bench WHAT ...")


def _parser() -> Parser:
    parser = base_parser("path-attn", DESCRIPTION, __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Any, text: str) -> Parser:
        made = verbs.add_parser(name, help=text, description=text)
        made.set_defaults(verb_function=function)
        return made

    train = verb("train", _train, "train one model, or several position encodings and compare them")
    train.add_argument(
        "--config", metavar="FILE", help="JSON or YAML file of these options; flags win over it"
    )
    _add_train_options(train)

    evaluate = verb(
        "eval", _eval, "evaluate a trained model, also at lengths it was not trained at"
    )
    evaluate.add_argument(
        "model", metavar="FOLDER", help="output folder of train, or its final folder"
    )
    evaluate.add_argument(
        "--lengths", nargs="+", metavar="N",
        help="multiples of the training length (2 or 2x); above 64: tokens (default 1 2 4)",
    )  # fmt: skip
    evaluate.add_argument(
        "--data", metavar="FILE", help="another text file than the one trained on"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write the figures here")
    evaluate.add_argument("--device", default="auto", help="auto, cpu or cuda")

    generate = verb("generate", _generate, "continue a text with a trained model")
    generate.add_argument(
        "model", metavar="FOLDER", help="output folder of train, or its final folder"
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt_file", metavar="FILE", help="UTF-8 file with the prompt")
    generate.add_argument("--max_new_tokens", type=int, default=200, metavar="N")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the most likely token"
    )
    generate.add_argument("--top_p", type=float, default=1.0)
    generate.add_argument("--num_beams", type=int, default=1)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="auto", help="auto, cpu or cuda")

    convert = verb(
        "convert", _convert, "turn a RoPE model (Llama, Qwen2, Qwen3, SmolLM) into a PaTH model"
    )
    _add_convert_options(convert)

    verb(
        "bench",
        _bench,
        "measure speed and memory against other attention; see path-attn bench --help",
    )

    check = verb("check", _check, "compare the back-ends with the reference on this machine")
    check.add_argument("--device", default="auto", help="auto, cpu or cuda")
    check.add_argument("--seed", type=int, default=0)
    check.add_argument("--json", metavar="FILE", help="also write the rows here")

    demo = verb(
        "demo", _demo, "flip-flop memory: PaTH against RoPE, FoX and PaTH-FoX in minutes on a CPU"
    )
    demo.add_argument("--out", default="out/demo/path-attn", metavar="DIR")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--full", action="store_true", help="three seeds and longer training")
    return parser


def _add_train_options(parser: Parser) -> None:
    """Add one option per field of `TrainConfig`; one not given stays out of the namespace."""
    kinds = field_types()
    for item in dataclasses.fields(TrainConfig):
        text = item.metadata["help"]
        if item.default not in (None, False, dataclasses.MISSING) and "(default" not in text:
            text += f" (default {item.default})"
        for_tasks = [f"{t} {d[item.name]}" for t, d in TASK_DEFAULTS.items() if item.name in d]
        if for_tasks and "(default" not in text:
            text += f" (default {', '.join(for_tasks)})"
        more: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        kind = kinds[item.name][0]
        if item.name == "position_encoding":
            more |= {"nargs": "+", "metavar": "ENCODING"}
            more["help"] = (
                f"{', '.join(POSITION_ENCODINGS)}; several are trained and compared (default path)"
            )
        elif item.name == "training_args":
            more |= {"nargs": "+", "metavar": "KEY=VALUE"}
        elif kind is bool:
            more["action"] = "store_true"
        else:
            more |= {"type": kind, "choices": item.metadata.get("choices")}
            if more["choices"] is None:
                more["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(f"--{item.name}", **more)


def _train(arguments: argparse.Namespace) -> int:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(arguments).items() if k in names}
    from_file = read_config_file(arguments.config) if arguments.config else {}
    source = arguments.config or "the configuration"
    encodings = _encodings(given.pop("position_encoding", from_file.pop("position_encoding", None)))
    if "training_args" in given:
        given["training_args"] = {
            **from_file.get("training_args", {}),
            **_key_values(given["training_args"]),
        }
    stored = _stored_options(given, encodings) if given.get("resume") else {}
    encodings = encodings or _encodings(stored.pop("position_encoding", None))
    config = TrainConfig.from_dict({**stored, **from_file, **given}, source=source)
    encodings = encodings or [config.position_encoding]
    for name in encodings:
        if name not in POSITION_ENCODINGS:
            near = suggest(name, POSITION_ENCODINGS)
            raise UserError(
                f"position_encoding is {name!r}; it must be one of "
                f"{', '.join(POSITION_ENCODINGS)}.{near}"
            )
    if config.output_dir is None:
        raise UserError("train needs --output_dir: the folder for checkpoints and the final model.")
    config = dataclasses.replace(config, position_encoding=encodings[0])
    config.resolved()
    if config.data is not None:  # before torch is loaded, so that a wrong path is answered at once
        check_text_file(config.data)
    quiet_libraries(warnings=True)
    from tenfold_common.trainer import Stopped

    try:
        _run_training(config, encodings)
    except Stopped as stop:
        if stop.number != signal.SIGTERM:
            raise
        sys.stderr.write("terminated\n")
        return 128 + signal.SIGTERM
    return 0


def _run_training(config: TrainConfig, encodings: list[str]) -> None:
    """Train one model or several, and print the table."""
    from path_attn.training import EVALUATION_FILE, train, train_each

    if len(encodings) == 1:
        from path_attn.evaluate import report_markdown

        final = train(config)
        if _is_first_process():
            print(
                report_markdown(json.loads((final / EVALUATION_FILE).read_text(encoding="utf-8"))),
                end="",
            )
            print(f"\nmodel: {final}")
        return
    comparison = train_each(config, encodings)
    if _is_first_process():
        print(comparison.with_suffix(".md").read_text(encoding="utf-8"), end="")
        print(f"\ncomparison: {comparison}")


def _stored_options(given: dict[str, Any], encodings: list[str]) -> dict[str, Any]:
    """Return the options a run was started with: `--resume --output_dir X` is enough."""
    folder = Path(given.get("output_dir", "."))
    file = folder / "train_config.json"
    if (folder / COMPARISON_FILE).is_file():
        file = folder / COMPARISON_FILE
    if not file.is_file():
        if not folder.is_dir():
            raise UserError(f"there is nothing to resume in {folder}: it is not a folder.")
        if len(encodings) < 2:
            raise UserError(f"there is nothing to resume in {folder}: it has no train_config.json.")
        return {}
    return read_config_file(file)


def _encodings(value: object) -> list[str]:
    """Split what was given for position_encoding: a list, or names with commas."""
    if value is None:
        return []
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        raise UserError(f"position_encoding is {value!r}; it must be a name or a list of names.")
    return [name for part in parts for name in part.split(",") if name]


def _key_values(pairs: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE words; a value is JSON where that is possible, otherwise text."""
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"training_args takes KEY=VALUE, not {pair!r}.")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return values


def _eval(arguments: argparse.Namespace) -> int:
    check_model_folder(arguments.model)
    if arguments.data:
        check_text_file(arguments.data)
    quiet_libraries(warnings=True)
    from path_attn.evaluate import evaluate_model, report_markdown
    from path_attn.training import load_run, read_run_config

    model, tokenizer, folder = load_run(arguments.model, arguments.device)
    config = read_run_config(folder)
    if arguments.data:
        if config.task != "text":
            raise UserError(
                f"the model was trained on {config.task}, which makes its own data; leave --data "
                "out."
            )
        config = dataclasses.replace(config, data=arguments.data)
    report = evaluate_model(model, tokenizer, config, arguments.lengths)
    print(report_markdown(report), end="")
    if arguments.json:
        write_json(arguments.json, report)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {arguments.max_new_tokens}; it must be at least 1.")
    check_temperature(arguments.temperature)
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"top_p is {arguments.top_p}; it must lie above 0 and up to 1.")
    if arguments.num_beams < 1:
        raise UserError(f"num_beams is {arguments.num_beams}; it must be at least 1.")
    if arguments.seed < 0:
        raise UserError(f"seed is {arguments.seed}; it must not be negative.")
    check_model_folder(arguments.model)
    if arguments.prompt_file:
        check_text_file(arguments.prompt_file)
    quiet_libraries(warnings=True)
    from path_attn.evaluate import continue_text
    from path_attn.training import load_run

    prompt = arguments.prompt
    if arguments.prompt_file:
        from path_attn.tasks import read_text

        prompt = read_text(arguments.prompt_file)
    model, tokenizer, _ = load_run(arguments.model, arguments.device)
    text = continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        num_beams=arguments.num_beams,
        seed=arguments.seed,
    )
    print(text)
    return 0


def _add_convert_options(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="FOLDER",
        help="a RoPE model, or a path_attn model of flash-linear-attention",
    )
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR", help="DIR/final gets the converted model"
    )
    parser.add_argument("--data", metavar="FILE", help="UTF-8 text to distil on")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens per chunk")
    parser.add_argument(
        "--position_encoding", default="path", choices=("path", "path_fox", "fox", "nope")
    )
    parser.add_argument(
        "--stage1_steps", type=int, default=500, metavar="N", help="attention outputs (default 500)"
    )
    parser.add_argument(
        "--stage2_steps", type=int, default=1000, metavar="N", help="logits (default 1000)"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N")
    parser.add_argument("--stage1_learning_rate", type=float, default=1e-3, metavar="X")
    parser.add_argument("--stage2_learning_rate", type=float, default=2e-4, metavar="X")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete what is in output_dir first"
    )


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.length < 2:
        raise UserError(f"length is {arguments.length}; it must be at least 2.")
    if arguments.seed < 0:
        raise UserError(f"seed is {arguments.seed}; it must not be negative.")
    if arguments.data:
        check_text_file(arguments.data)
    quiet_libraries(warnings=True)
    from path_attn.convert import ConvertConfig
    from path_attn.convert_run import convert_folder

    report = convert_folder(
        arguments.model,
        arguments.output_dir,
        data=arguments.data,
        length=arguments.length,
        position_encoding=arguments.position_encoding,
        device=arguments.device,
        settings=ConvertConfig(
            stage1_steps=arguments.stage1_steps,
            stage2_steps=arguments.stage2_steps,
            batch_size=arguments.batch_size,
            stage1_learning_rate=arguments.stage1_learning_rate,
            stage2_learning_rate=arguments.stage2_learning_rate,
            seed=arguments.seed,
        ),
        overwrite=arguments.overwrite,
    )
    for name, loss in report.get("validation_loss", {}).items():
        print(f"validation loss, {name}: {loss:.4f} nats per token")
    print(f"model: {Path(arguments.output_dir) / 'final'}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    if arguments.seed < 0:
        raise UserError(f"seed is {arguments.seed}; it must not be negative.")
    from path_attn.check import run_check, table

    rows = run_check(arguments.device, seed=arguments.seed)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(
        f"{failed} of {len(rows)} comparisons disagree"
        if failed
        else "all back-ends that run here agree"
    )
    if arguments.json:
        write_json(arguments.json, [row._asdict() for row in rows])
    return 1 if failed else 0


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.seed < 0:
        raise UserError(f"seed is {arguments.seed}; it must not be negative.")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out needs a folder.")
    quiet_libraries(warnings=True)
    from path_attn.demo import run_demo

    out.mkdir(parents=True, exist_ok=True)
    result = run_demo(out, seed=arguments.seed, full=arguments.full)
    result.save(out)
    print(result.markdown())
    return 0 if result.passed else 1


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
