"""The command `rlcr`: options in, one call into the library, text out.

Nothing but the standard library is imported until a verb runs, so that help is there at once.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcr._version import __version__
from rlcr.options import TrainOptions, key_values, kind_of, read_options_file
from tenfold_common.atomic import atomic_write, check_output_file, write_json
from tenfold_common.cli import Parser, base_parser, quiet_libraries, run, run_verb
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from rlcr.predictions import Predictions
    from tenfold_common.lm import TextModel

DESCRIPTION = (
    "RL with calibration rewards: train, evaluate and measure models that say how sure they are."
)
SETS = (
    "hotpot_modified", "hotpot", "bigmath", "gsm8k", "math500", "triviaqa", "simpleqa",
    "commonsenseqa", "gpqa",
)  # fmt: skip
FORMATS = ("tabc", "tbac", "tac", "ta")
BINNINGS = ("left", "right", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 success, 1 a failed claim or a bug, 2 a wrong input, 130 interrupted, 143 a training run
        stopped by SIGTERM.
    """
    return run(lambda argv: run_verb(_parser(), argv, package="rlcr"), argv)


def _parser() -> Parser:
    parser = base_parser("rlcr", DESCRIPTION, __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(verb_function=function)
        return made

    train = verb("train", _train, "train with calibration rewards (or without), through TRL")
    train.add_argument(
        "--config", metavar="FILE", help="JSON or YAML file of these options; flags win over it"
    )
    _add_train_options(train)

    evaluate = verb("eval", _eval, "let a model answer a data set and write its predictions")
    evaluate.add_argument("--model", required=True, help="model folder, hub name or server URL")
    evaluate.add_argument("--data", required=True, metavar="FILE", help="as made by rlcr data")
    evaluate.add_argument("--out", required=True, metavar="FILE", help="predictions, JSON lines")
    evaluate.add_argument(
        "--backend", default="auto", choices=("auto", "transformers", "vllm", "server")
    )
    evaluate.add_argument("--model_name", help="model of the server (default: its only one)")
    evaluate.add_argument("--format", default="tabc", choices=FORMATS)
    evaluate.add_argument("--samples", type=int, default=1, help="completions of a prompt")
    evaluate.add_argument("--temperature", type=float, default=0.0, help="0: most likely token")
    evaluate.add_argument("--top_p", type=float, default=1.0)
    evaluate.add_argument("--max_tokens", type=int, default=1536)
    evaluate.add_argument("--batch_size", type=int, default=64)
    evaluate.add_argument("--limit", type=int, help="only the first rows")
    evaluate.add_argument("--verifier", help="for all rows (default: each row's own, or auto)")
    evaluate.add_argument("--gold_column", default="answer")
    evaluate.add_argument(
        "--no_force", action="store_true", help="do not ask again for a missing confidence"
    )
    evaluate.add_argument("--plain", action="store_true", help="prompts without a chat template")
    evaluate.add_argument("--resume", action="store_true", help="go on with --out")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--device", default="auto", help="auto, cpu or cuda")
    evaluate.add_argument("--trust_remote_code", action="store_true")

    score = verb("score", _score, "calibration metrics of a file of confidences and correctness")
    _add_predictions(score)
    score.add_argument("--json", metavar="FILE", help="also write the figures here")
    score.add_argument(
        "--grade", metavar="VERIFIER", nargs="?", const="auto",
        help="grade completions first: auto, exact_match, math or choice",
    )  # fmt: skip
    score.add_argument(
        "--gold_column", help="with --grade: the right answer (default: gold if there, else answer)"
    )
    score.add_argument("--completion_column", default="completion", help="with --grade")
    score.add_argument("--format", default="tabc", choices=FORMATS, help="with --grade")
    score.add_argument("--strict", action="store_true", help="with --grade: read as training does")

    plot = verb("plot", _plot, "reliability diagram and risk-coverage curve of prediction files")
    plot.add_argument("files", nargs="+", metavar="FILE")
    _add_columns(plot)
    plot.add_argument("--out", required=True, metavar="DIR", help="folder for the two pictures")

    vote = verb("vote", _vote, "aggregate several samples of each prompt")
    vote.add_argument("file", metavar="FILE", help="predictions with ids NAME#0, NAME#1, ...")
    vote.add_argument("--verifier", default="auto", help="whose normal form makes answers equal")
    vote.add_argument("--json", metavar="FILE", help="also write the figures here")
    vote.add_argument("--plot", metavar="FILE", help="also draw accuracy by samples here (.png)")
    vote.add_argument("--seed", type=int, default=0, help="fixes the subsets of the samples")

    data = verb("data", _data, "build a training or test set")
    data.add_argument("name", choices=SETS, metavar="NAME", help=", ".join(SETS))
    data.add_argument("--path", metavar="FILE", help="a local file of it (default: the hub)")
    data.add_argument("--split", help="split on the hub; bigmath: train or test of what is built")
    data.add_argument("--out", required=True, metavar="FILE", help="JSON lines")
    data.add_argument("--limit", type=int)
    data.add_argument("--seed", type=int, default=42)
    data.add_argument("--format", default="tabc", choices=FORMATS)
    data.add_argument("--long_prompt", action="store_true")
    data.add_argument("--plain", action="store_true", help="prompts without a chat template")

    toy = verb("toy", _toy, "the noisy-sensor experiment with settings of your own")
    _add_folder_and_seed(toy, "out/rlcr-toy")
    toy.add_argument(
        "--arms", nargs="+", default=["rlvr", "rlcr"], metavar="ARM",
        help="rlvr, rlcr, log_unscaled, hedging",
    )  # fmt: skip
    toy.add_argument("--steps", type=int)
    toy.add_argument("--warmup_steps", type=int)
    toy.add_argument("--learning_rate", type=float)
    toy.add_argument("--entropy_coef", type=float)
    toy.add_argument("--num_generations", type=int)
    toy.add_argument("--test_rows", type=int)
    toy.add_argument("--warmup_confidence", choices=("overconfident", "random"))

    demo = verb("demo", _demo, "RLVR against RLCR on a task with a known optimum, in minutes")
    _add_folder_and_seed(demo, "out/demo/rlcr")
    demo.add_argument("--full", action="store_true", help="three seeds")
    return parser


def _add_train_options(parser: Parser) -> None:
    """Add one option per field of `TrainOptions`; one not given stays out of the namespace."""
    for item in dataclasses.fields(TrainOptions):
        text = item.metadata["help"]
        if item.default not in (None, False, dataclasses.MISSING) and "(default" not in text:
            text += f" (default {item.default})"
        more: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        kind = kind_of(item.name)
        if item.name == "training_args":
            more |= {"nargs": "+", "metavar": "KEY=VALUE"}
        elif kind is bool:
            more["action"] = "store_true"
        else:
            more |= {"type": kind, "choices": item.metadata.get("choices")}
            if more["choices"] is None:
                more["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(f"--{item.name}", **more)


def _add_folder_and_seed(parser: Parser, out: str) -> None:
    parser.add_argument(
        "--out", default=out, metavar="DIR", help=f"folder for figures and pictures (default {out})"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes weights, data and sampling (default 0)"
    )


def _add_columns(parser: Parser) -> None:
    parser.add_argument("--confidence_column", default="confidence")
    parser.add_argument("--correct_column", default="correct")
    parser.add_argument("--scale", type=float, default=1.0, help="100 for confidences in percent")
    parser.add_argument("--n_bins", type=int, default=10)
    parser.add_argument("--binning", default="left", choices=BINNINGS, help="closed end of a bin")


def _add_predictions(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help=".jsonl, .json, .csv or .parquet")
    _add_columns(parser)
    parser.add_argument("--no_ci", action="store_true", help="no bootstrap intervals")
    parser.add_argument("--seed", type=int, default=0, help="fixes the resamples")


def _train(arguments: argparse.Namespace) -> int:
    names = {f.name for f in dataclasses.fields(TrainOptions)}
    given = {k: v for k, v in vars(arguments).items() if k in names}
    from_file = read_options_file(arguments.config) if arguments.config else {}
    if "training_args" in given:
        given["training_args"] = {
            **(from_file.get("training_args") or {}),
            **key_values(given["training_args"]),
        }
    stored: dict[str, Any] = {}
    if given.get("resume") and given.get("output_dir"):  # --resume --output_dir X is enough
        file = Path(given["output_dir"]) / "train_options.json"
        if not file.is_file():
            raise UserError(
                f"there is nothing to resume in {given['output_dir']}: it has no {file.name}."
            )
        stored = read_options_file(file)
    options = TrainOptions.from_dict(
        {**stored, **from_file, **given}, arguments.config or "the command line"
    ).checked()
    from rlcr.files import check_rows

    for path in (options.data, options.warmup_data):
        if path and path != "toy":
            check_rows(path)  # answered at once, not after torch and trl are loaded
    quiet_libraries(warnings=True)
    from rlcr.training import train
    from tenfold_common.trainer import Stopped

    try:
        final = train(options)
    except Stopped as stop:
        if stop.number != signal.SIGTERM:
            raise
        sys.stderr.write("terminated\n")
        return 128 + signal.SIGTERM
    if _is_first_process():
        print(f"model: {final}")
    return 0


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _eval(arguments: argparse.Namespace) -> int:
    check_output_file(arguments.out)
    out = Path(arguments.out)
    if not arguments.resume and out.exists() and out.stat().st_size:
        raise UserError(f"{out}: the file has content; resume the run, or name another file")
    for name in ("samples", "max_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(arguments, name)}.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"limit must be at least 1, not {arguments.limit}.")
    from rlcr.files import read_rows

    rows = read_rows(arguments.data)[: arguments.limit]  # a wrong path is answered at once
    quiet_libraries(warnings=True)
    from rlcr.data import from_rows
    from rlcr.evaluation import evaluate, summary
    from rlcr.prompts import prompt_hash

    dataset = from_rows(
        rows, gold_column=arguments.gold_column, format=arguments.format, plain=arguments.plain
    )
    model = _text_model(arguments)
    predictions = evaluate(
        model,
        dataset.to_list(),
        arguments.out,
        format=arguments.format,
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        force=not arguments.no_force,
        verifier=arguments.verifier,
        gold_column=arguments.gold_column,
        batch_size=arguments.batch_size,
        resume=arguments.resume,
        metadata={
            "data": Path(arguments.data).name,
            "rows": len(rows),
            "prompts": prompt_hash(format=arguments.format, plain=arguments.plain),
            "version": __version__,
            "trust_remote_code": arguments.trust_remote_code,
        },
    )
    _print_summary(summary(predictions))
    print(f"\npredictions: {arguments.out}")
    return 0


def _text_model(arguments: argparse.Namespace) -> "TextModel":
    from tenfold_common.lm import TransformersModel, VLLMModel, load_text_model

    spec, backend = arguments.model, arguments.backend
    if backend == "server" or spec.startswith(("http://", "https://")):
        return load_text_model(spec, backend, model=arguments.model_name)
    if arguments.model_name:
        raise UserError(f"--model_name is for servers, and {spec!r} is no http(s) address.")
    trust = arguments.trust_remote_code
    if backend == "vllm":
        return VLLMModel(spec, trust_remote_code=trust)
    return TransformersModel(spec, device=arguments.device, trust_remote_code=trust)


def _print_summary(found: dict[str, Any]) -> None:
    sources = ", ".join(f"{count} {name}" for name, count in found["sources"].items())
    print(f"{found['rows']} rows, {found['graded']} graded; confidences: {sources or 'no source'}")
    if found["accuracy"] is not None:
        print(f"accuracy over all graded rows {found['accuracy']:.4f}")
    for name, report in found["reports"].items():
        print(f"\n{name}\n{report}")


def _check_figures(arguments: argparse.Namespace) -> None:
    """Check --json and --seed before the work."""
    _check_seed(arguments)
    if arguments.json:
        check_output_file(arguments.json, inputs=[arguments.file])


def _check_seed(arguments: argparse.Namespace) -> None:
    if arguments.seed < 0:
        raise UserError(f"seed is {arguments.seed}; it must not be negative.")


def _score(arguments: argparse.Namespace) -> int:
    _check_figures(arguments)
    import numpy as np

    from rlcr.metrics import calibration_report

    predictions = _graded(arguments) if arguments.grade else _read(arguments.file, arguments)
    q, c = predictions.confidence, predictions.correct
    usable = ~(np.isnan(q) | np.isnan(c))
    lacking = int(np.isnan(q).sum()), int(np.isnan(c).sum())
    if not usable.any():
        raise UserError(
            f"{arguments.file} has no row with both a confidence and a grade: of {len(q)} rows "
            f"{lacking[0]} lack a confidence and {lacking[1]} a grade."
        )
    report = calibration_report(
        q[usable],
        c[usable],
        n_bins=arguments.n_bins,
        binning=arguments.binning,
        ci=None if arguments.no_ci else 0.95,
        seed=arguments.seed,
    )
    graded = ~np.isnan(c)
    print(
        f"{len(q)} rows; {lacking[0]} without a confidence, {lacking[1]} without a grade: left out"
    )
    print(f"accuracy over all graded rows {c[graded].mean():.4f}\n")
    print(report)
    if arguments.json:
        write_json(
            arguments.json,
            {
                "file": Path(arguments.file).name,
                "rows": len(q),
                "without_confidence": lacking[0],
                "without_grade": lacking[1],
                "accuracy_all": float(c[graded].mean()),
                "report": report.to_dict(),
            },
        )
    return 0


def _read(path: str, arguments: argparse.Namespace) -> "Predictions":
    from rlcr.predictions import read_predictions

    return read_predictions(
        path,
        confidence=arguments.confidence_column,
        correct=arguments.correct_column,
        scale=arguments.scale,
    )


def _graded(arguments: argparse.Namespace) -> "Predictions":
    """Parse and grade the completions of a file."""
    import numpy as np

    from rlcr.files import read_rows
    from rlcr.predictions import Predictions, grade_predictions

    if arguments.scale != 1 or arguments.confidence_column != "confidence":
        raise UserError(
            "--grade reads the confidences from the completions; leave out --scale and "
            "--confidence_column."
        )
    read = read_rows(arguments.file)
    # In a file of rlcr eval `answer` is the model's own; taking it for gold would grade all right.
    gold = arguments.gold_column or ("gold" if "gold" in read[0] else "answer")
    rows = grade_predictions(
        read,
        verifier=arguments.grade,
        gold=gold,
        completion=arguments.completion_column,
        format=arguments.format,
        mode="strict" if arguments.strict else "lenient",
    )
    number = lambda v: float("nan") if v is None else float(v)  # noqa: E731 - used twice below
    q = np.array([number(row["confidence"]) for row in rows])
    c = np.array([number(row["correct"]) for row in rows])
    return Predictions(rows, q, c, np.full(len(rows), ""), np.ones(len(rows)))


def _plot(arguments: argparse.Namespace) -> int:
    out = _checked_folder(arguments.out)
    import numpy as np

    sets = {}
    for path in arguments.files:
        predictions = _read(path, arguments)
        usable = ~(np.isnan(predictions.confidence) | np.isnan(predictions.correct))
        if not usable.any():
            raise UserError(f"{path} has no row with both a confidence and a grade.")
        name = Path(path).stem
        if name in sets:
            name = str(path)
        sets[name] = predictions.confidence[usable], predictions.correct[usable]
    from rlcr import plots

    figure = plots.reliability_diagrams(sets, n_bins=arguments.n_bins, binning=arguments.binning)
    axes = None
    for name, (q, c) in sets.items():
        axes = plots.risk_coverage_plot(q, c, ax=axes, label=name)
    assert axes is not None
    out.mkdir(parents=True, exist_ok=True)  # only now: what is wrong leaves no empty folder behind
    for drawn, name in ((figure, "reliability.png"), (axes.figure, "risk_coverage.png")):
        print(plots.save(drawn, out / name))
    return 0


def _vote(arguments: argparse.Namespace) -> int:
    _check_figures(arguments)
    if arguments.plot:
        check_output_file(arguments.plot)
    from rlcr.evaluation import vote_on_file

    found = vote_on_file(arguments.file, verifier=arguments.verifier, seed=arguments.seed)
    if arguments.plot:
        from rlcr import plots
        from rlcr.scaling import VoteCurve

        axes = plots.votes_plot(VoteCurve(found["sizes"], found["accuracy"], found["pass_at_n"]))
        plots.save(axes.figure, arguments.plot)
    print(f"{found['prompts']} prompts, {found['samples']} samples each\n")
    head = ["samples", *found["accuracy"], "pass@n"]
    print("  ".join(f"{name:>8}" for name in head))
    for i, n in enumerate(found["sizes"]):
        cells = [f"{n}", *(f"{v[i]:.4f}" for v in found["accuracy"].values())]
        print("  ".join(f"{cell:>8}" for cell in [*cells, f"{found['pass_at_n'][i]:.4f}"]))
    print(
        f"\nsum of q over distinct answers {found['consistency']['mean_sum']:.3f}, above 1 for "
        f"{found['consistency']['share_above_one']:.1%} of the prompts"
    )
    if arguments.json:
        sums = found["consistency"].items()  # NaN, which is not JSON, where no q is stated
        known = {name: None if value != value else value for name, value in sums}
        write_json(arguments.json, {**found, "consistency": known})
    return 0


def _data(arguments: argparse.Namespace) -> int:
    check_output_file(arguments.out)
    if Path(arguments.out).exists():
        raise UserError(f"{arguments.out} is there already; choose another file.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"limit must be at least 1, not {arguments.limit}.")
    quiet_libraries(warnings=True)
    from rlcr.data import read_benchmark, read_bigmath

    layout = {
        "format": arguments.format,
        "long": arguments.long_prompt,
        "plain": arguments.plain,
    }
    if arguments.name == "bigmath":
        split = arguments.split or "train"
        if split not in ("train", "test"):
            raise UserError(f"split must be train or test, not {split!r}.")
        dataset = read_bigmath(arguments.path, seed=arguments.seed, **layout)[split]
        dataset = dataset.select(range(min(len(dataset), arguments.limit or len(dataset))))
    else:
        dataset = read_benchmark(
            arguments.name,
            arguments.path,
            arguments.split,
            limit=arguments.limit,
            seed=arguments.seed,
            **layout,
        )
    with atomic_write(arguments.out, "w") as file:
        for row in dataset:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(dataset)} rows: {arguments.out}")
    return 0


def _toy(arguments: argparse.Namespace) -> int:
    from rlcr.experiment import ToySettings

    names = {f.name for f in dataclasses.fields(ToySettings)}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    for name, value in given.items():
        if not isinstance(value, str) and not value >= (0 if name == "entropy_coef" else 1e-12):
            raise UserError(f"{name} must be positive, not {value}.")
    if given.get("num_generations", 2) < 2:
        raise UserError("num_generations must be at least 2: advantages compare completions.")
    if "steps" in given:
        given["side_steps"] = given["steps"]
    if len(set(arguments.arms)) < len(arguments.arms):
        raise UserError(f"arms names one twice: {' '.join(arguments.arms)}.")
    out = _folder(arguments)
    quiet_libraries(warnings=True)
    from rlcr.demo import run_toy

    result = run_toy(out, ToySettings(**given), tuple(arguments.arms), seed=arguments.seed)
    result.save(out)
    print(result.markdown())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    out = _folder(arguments)
    quiet_libraries(warnings=True)
    from rlcr.demo import run_demo

    result = run_demo(out, seed=arguments.seed, full=arguments.full)
    result.save(out)
    print(result.markdown())
    return 0 if result.passed else 1


def _folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the experiment's results, made if missing."""
    _check_seed(arguments)
    out = _checked_folder(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _checked_folder(path: str) -> Path:
    """Return a folder that is there or can be made; nothing is made yet."""
    out = Path(path)
    there = next(place for place in (out, *out.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(
            f"{there} is a file; --out takes a folder."
            if there == out
            else f"cannot make the folder {out}: {there} is a file. Give --out another folder."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {out}: the folder {there} is not writable.")
    return out
