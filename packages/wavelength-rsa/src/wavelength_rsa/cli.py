"""The command `wavelength-rsa`: options in, one call into the library, text out.

Nothing but the standard library is imported until a verb runs, so that help is there at once.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold_common.atomic import check_output_file
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
from tenfold_common.results import environment
from wavelength_rsa._version import __version__

if TYPE_CHECKING:
    from tenfold_common.lm import TextModel
    from wavelength_rsa.data import Item
    from wavelength_rsa.listeners import Listener
    from wavelength_rsa.speakers import Speaker

DESCRIPTION = "Play Wavelength with language models, and let them reason about their listener."
MODES = ("logprob", "sample", "cot")
BACKENDS = ("auto", "transformers", "vllm", "server")
NORMALIZE = ("none", "token", "char", "pmi")
UTILITIES = ("log_prob", "neg_expected_distance", "neg_w1")
STEPS = (1, 2, 4, 5, 10, 20, 25, 50)  # as in scales.py, which would import numpy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 success, 1 a failed claim or a bug, 2 a wrong input, 130 interrupted.
    """
    return run(lambda argv: run_verb(_parser(), argv, package="wavelength_rsa"), argv)


def _parser() -> Parser:
    parser = base_parser("wavelength-rsa", DESCRIPTION, __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(verb_function=function)
        return made

    listen = verb("listen", _listen, "let a model guess where clues point on a scale")
    _add_scale(listen)
    listen.add_argument("clues", nargs="+", metavar="CLUE")
    _add_model(listen)
    _add_listening(listen)
    listen.add_argument("--json", metavar="FILE", help="also write the distributions here")

    speak = verb("speak", _speak, "let a model give a clue for a position on a scale")
    _add_scale(speak)
    speak.add_argument("--target", type=float, required=True, help="0 to 100")
    _add_model(speak)
    _add_listening(speak)
    _add_speaking(speak)
    _add_judge(speak)
    speak.add_argument("--json", metavar="FILE", help="also write the candidates here")

    evaluate = verb("eval", _eval, "evaluate a model as listener, as speaker, or as both")
    evaluate.add_argument("--task", required=True, choices=("listener", "speaker", "both"))
    evaluate.add_argument("--data", required=True, metavar="FILE", help="items, .csv or .jsonl")
    evaluate.add_argument(
        "--out", required=True, metavar="FILE",
        help="report, JSON; with --task both NAME-listener.json and NAME-speaker.json",
    )  # fmt: skip
    evaluate.add_argument("--limit", type=whole(), metavar="N", help="only the first items")
    evaluate.add_argument("--overwrite", action="store_true", help="replace reports that are there")
    evaluate.add_argument("--resamples", type=whole(2), default=10_000, help="of the bootstrap")
    _add_model(evaluate)
    _add_listening(evaluate)
    _add_speaking(evaluate)
    _add_judge(evaluate)
    evaluate.add_argument(
        "--rsa_listener", action="store_true",
        help="with --task listener or both: reason about the speaker (alternatives: this model's "
        "clues for every position of every scale)",
    )  # fmt: skip

    report = verb("report", _report, "show a report, or the paired difference of two")
    report.add_argument("file", metavar="FILE", help="as written by eval")
    report.add_argument("--compare", metavar="FILE", help="a second report on the same data")
    report.add_argument(
        "--seed", type=seed_number, default=0, help="fixes the bootstrap (default 0)"
    )

    human = verb("human-baseline", _human, "what people and trivial players reach on the items")
    human.add_argument("--data", required=True, metavar="FILE")
    human.add_argument("--json", metavar="FILE", help="also write the figures here")
    human.add_argument(
        "--step", type=int, default=5, choices=STEPS, help="of the positions (default 5)"
    )
    human.add_argument("--splits", type=whole(), default=20, help="random halves for the RSA table")
    human.add_argument(
        "--seed", type=seed_number, default=0, help="fixes halves and bootstrap (default 0)"
    )

    fit = verb("fit-alpha", _fit, "fit the rationality of an RSA listener to human responses")
    fit.add_argument("--data", required=True, metavar="FILE", help="items with human responses")
    _add_model(fit, required=False)
    _add_listening(fit)
    fit.add_argument(
        "--folds", type=whole(2), default=10, help="of the cross-validation (default 10)"
    )
    fit.add_argument("--json", metavar="FILE", help="also write the figures here")

    play = verb("play", _play, "play against a model in the terminal")
    _add_model(play)
    _add_listening(play)
    _add_speaking(play)
    play.add_argument(
        "--role", default="speak", choices=("speak", "listen"),
        help="what you do: give clues, or guess (default speak)",
    )  # fmt: skip
    play.add_argument("--rounds", type=whole(), default=5, help="(default 5)")
    play.add_argument("--data", metavar="FILE", help="scales to play on (default: some of its own)")

    demo = verb("demo", _demo, "direct, step-by-step and pragmatic speakers in a world made here")
    demo.add_argument(
        "--out", default="out/demo/wavelength-rsa", metavar="DIR",
        help="folder for figures and pictures (default out/demo/wavelength-rsa)",
    )  # fmt: skip
    demo.add_argument(
        "--seed", type=seed_number, default=0, help="fixes world and models (default 0)"
    )
    demo.add_argument("--full", action="store_true", help="three seeds")
    return parser


def _add_scale(parser: Parser) -> None:
    parser.add_argument("--left", required=True, metavar="TEXT", help="what 0 means")
    parser.add_argument("--right", required=True, metavar="TEXT", help="what 100 means")


def _add_model(parser: Parser, *, required: bool = True) -> None:
    text = "model folder, hub name or server address (http://HOST:PORT, #NAME may follow)"
    if not required:
        text += "; default: the human responses themselves"
    parser.add_argument("--model", required=required, metavar="MODEL", help=text)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--model_name", help="model of the server (default: its only one)")
    parser.add_argument("--api_key_env", metavar="NAME", help="variable that holds the key")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16")
    parser.add_argument(
        "--thinking", action="store_true",
        help="let a thinking model think (default: its chat template is told not to; a server "
        "decides for itself)",
    )  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--cache", metavar="FILE", help="keep and reuse what the models say")
    parser.add_argument("--seed", type=seed_number, default=0, help="fixes all samples (default 0)")


def _add_listening(parser: Parser) -> None:
    parser.add_argument(
        "--mode", default="logprob", choices=MODES,
        help="how a model listens: by the probabilities of its answers, by samples, or by samples "
        "after reasoning (default logprob)",
    )  # fmt: skip
    parser.add_argument(
        "--step", type=int, default=5, choices=STEPS, help="of the positions (default 5)"
    )
    parser.add_argument("--num_samples", type=whole(), default=32, help="of a sampling listener")
    parser.add_argument(
        "--normalize", default="none", choices=NORMALIZE, help="of answers' log-probabilities"
    )
    parser.add_argument(
        "--end", metavar="TEXT",
        help="text scored after every answer; 'turn' takes the chat template's end of turn",
    )  # fmt: skip
    parser.add_argument(
        "--max_tokens", type=whole(), help="limit of a reply (default 24, with reasoning 1024)"
    )


def _add_speaking(parser: Parser) -> None:
    parser.add_argument(
        "--num_candidates", type=whole(), default=32, help="clues sampled (default 32)"
    )
    parser.add_argument("--cot", action="store_true", help="the speaker reasons before each clue")
    parser.add_argument(
        "--rsa", action="store_true",
        help="choose among the clues by how a listener, the same model, would take them",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=_weight, default=1.0, help="rationality of --rsa (default 1)"
    )
    parser.add_argument("--utility", default="log_prob", choices=UTILITIES)
    parser.add_argument("--select", default="sample", choices=("sample", "argmax"))
    parser.add_argument(
        "--on_violation", default="keep", choices=("keep", "drop", "raise"),
        help="what happens to clues that break a rule (default keep, and count)",
    )  # fmt: skip


def _add_judge(parser: Parser) -> None:
    parser.add_argument(
        "--judge", metavar="MODEL", help="another model that guesses the speaker's clues"
    )
    parser.add_argument("--judge_backend", default="auto", choices=BACKENDS)
    parser.add_argument("--judge_model_name")
    parser.add_argument(
        "--judge_api_key_env", metavar="NAME", help="variable that holds the judge's key"
    )
    parser.add_argument(
        "--self_play", action="store_true", help="let --model judge itself; the report says so"
    )


def _weight(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:  # NaN too
        raise argparse.ArgumentTypeError(f"must be a number of at least 0 or inf, not {text!r}")
    return number


def _listen(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.json)
    _check_unused(arguments)
    from wavelength_rsa.listeners import check_question
    from wavelength_rsa.scales import Scale

    scale = Scale(arguments.left, arguments.right)
    for clue in arguments.clues:
        check_question((scale, clue))
    with ExitStack() as stack:
        listener = _listener(arguments, _model(arguments, stack))
        found = listener.distribution(scale, arguments.clues, seed=arguments.seed)
    rows = [
        {"clue": clue, **one.to_dict(), "mean": one.mean, "sd": one.sd, "argmax": one.argmax}
        for clue, one in zip(arguments.clues, found, strict=True)
    ]
    for row in rows:
        print(f"{row['clue']}: mean {row['mean']:.1f}, sd {row['sd']:.1f}, mode {row['argmax']:g}")
    write_found(
        arguments, {"scale": [scale.left, scale.right], **listener.describe(), "clues": rows}
    )
    return 0


def _speak(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.json)
    _check_unused(arguments, listens=bool(arguments.judge or arguments.self_play))
    from wavelength_rsa.scales import Scale, grid_index

    scale = Scale(arguments.left, arguments.right)
    grid_index(arguments.target, arguments.step)
    if arguments.judge and arguments.self_play:
        raise UserError("--judge and --self_play exclude each other; give one")
    with ExitStack() as stack:
        model = _model(arguments, stack)
        speaker = _speaker(arguments, model)
        said = speaker.speak(scale, arguments.target, seed=arguments.seed)
        candidates = said.candidates
        judged = None
        if arguments.judge or arguments.self_play:
            judging = model if arguments.self_play else _judge_model(arguments, stack)
            judge = _listener(arguments, judging)
            judged = judge.distribution(scale, list(candidates.clues), seed=arguments.seed)
    order = sorted(range(len(candidates.clues)), key=lambda k: -candidates.probs[k])
    print(f"{said.clue}{'   (breaks a rule)' if said.flagged else ''}\n")
    print("probability  of samples  listener" + "  judge's mean" * bool(judged) + "  clue")
    rows = candidates.to_rows()
    share = candidates.counts / candidates.counts.sum()
    for k in order[:10]:
        heard = "" if candidates.listener is None else f"{candidates.listener[k]:.3f}"
        mean = f"  {judged[k].mean:12.1f}" if judged else ""
        broken = f"   ({', '.join(candidates.violations[k])})" if candidates.violations[k] else ""
        print(
            f"{candidates.probs[k]:11.3f}  {share[k]:10.3f}  {heard:>8}{mean}  "
            f"{candidates.clues[k]}{broken}"
        )
    if candidates.refused:
        print(f"{candidates.refused} samples held no clue")
    if judged:
        rows = [{**row, "judged_mean": j.mean} for row, j in zip(rows, judged, strict=True)]
    write_found(
        arguments,
        {
            "scale": [scale.left, scale.right],
            "target": arguments.target,
            "clue": said.clue,
            "refused": candidates.refused,
            **speaker.describe(),
            "candidates": rows,
        },
    )
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    tasks = ("listener", "speaker") if arguments.task == "both" else (arguments.task,)
    files = {
        task: out.with_name(f"{out.stem}-{task}{out.suffix}") if len(tasks) > 1 else out
        for task in tasks
    }
    _check_outputs(arguments, *files.values())
    for file in files.values():
        if file.exists() and not arguments.overwrite:
            raise UserError(f"{file} exists; name another file or give --overwrite")
    if "speaker" in tasks and bool(arguments.judge) == arguments.self_play:
        raise UserError(
            "a speaker needs one judge: --judge MODEL, another model than the speaker's, or "
            "--self_play"
        )
    if "speaker" not in tasks and (arguments.judge or arguments.self_play or arguments.rsa):
        raise UserError(
            "--judge, --self_play and --rsa are for --task speaker or both (--rsa_listener makes "
            "a listener reason)"
        )
    if "listener" not in tasks and arguments.rsa_listener:
        raise UserError("--rsa_listener is for --task listener or both")
    _check_unused(arguments, speaks="speaker" in tasks)
    items = _items(arguments)
    from wavelength_rsa.evaluate import check_targets, evaluate_listener, evaluate_speaker

    check_targets(items, arguments.step)
    with ExitStack() as stack:
        model = _model(arguments, stack)
        judging = _judge_model(arguments, stack) if arguments.judge else model
        for task in tasks:
            if task == "listener":
                found = evaluate_listener(
                    _reasoning(arguments, model), items, seed=arguments.seed,
                    resamples=arguments.resamples,
                )  # fmt: skip
            else:
                found = evaluate_speaker(
                    _speaker(arguments, model), items, judge=_listener(arguments, judging),
                    seed=arguments.seed, resamples=arguments.resamples,
                )  # fmt: skip
            found.settings["data"] = Path(arguments.data).name
            found.save(files[task])
            print(f"{task}\n{found.table()}")
            for note in found.notes:
                print(f"note: {note}")
            print(f"report: {files[task]}\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from wavelength_rsa.evaluate import (
        Report,
        compare,
        different_settings,
        interval_text,
        number_text,
        shared_rows,
    )

    first = Report.load(arguments.file)
    if arguments.compare is None:
        print(first.table())
        for note in first.notes:
            print(f"note: {note}")
        return 0
    second = Report.load(arguments.compare)
    differences = compare(first, second, seed=arguments.seed)
    rows = [row for row, _ in shared_rows(first, second)]
    pairs = {(row["left"], row["right"]) for row in rows}
    print(f"{arguments.file} less {arguments.compare}")
    print(
        f"{len(rows)} rows on {len(pairs)} concept pairs; left out: {len(first.rows) - len(rows)} "
        f"of the first, {len(second.rows) - len(rows)} of the second"
    )
    print(f"{'metric':24} {'mean':>9}   95 % interval")
    for name, one in differences.items():
        print(f"{name:24} {number_text(one.value):>9}   {interval_text(one)}")
    for setting in different_settings(first, second):
        print(f"differs in {setting}")
    for file, report in ((arguments.file, first), (arguments.compare, second)):
        for note in report.notes:
            print(f"note on {file}: {note}")
    return 0


def _human(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.json)
    from wavelength_rsa.data import human_baseline, load_items
    from wavelength_rsa.human import human_rsa

    items = load_items(arguments.data)
    found = human_baseline(items, step=arguments.step, seed=arguments.seed)
    pragmatic = human_rsa(items, step=arguments.step, splits=arguments.splits, seed=arguments.seed)
    print(_baseline_text(found))
    print(_pragmatic_text(pragmatic))
    write_found(
        arguments,
        {
            "data": Path(arguments.data).name,
            "version": __version__,
            "environment": environment(),
            "baseline": found,
            "rsa": pragmatic,
        },
    )
    return 0


def _baseline_text(found: dict[str, Any]) -> str:
    columns = ("mean_error", "rmse", "expected_distance", "crps", "pearson")
    lines = [
        f"{found['items']} items on {found['clusters']} concept pairs, {found['responses']} "
        "responses; intervals resample pairs",
        f"{'':24}" + "".join(f"{name:>22}" for name in columns),
    ]
    for name, row in found["rows"].items():
        cells = [_cell(row.get(column)) for column in columns]
        lines.append(f"{name.replace('_', ' '):24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cell(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return ""
    if value["low"] is None:
        return f"{value['value']:.2f}"
    return f"{value['value']:.2f} ({value['low']:.2f}, {value['high']:.2f})"


def _pragmatic_text(found: dict[str, Any]) -> str:
    """Say what reasoning about the speaker does to a listener made of people."""
    literal = found["literal"]["mean_error"]["value"]
    lines = [
        "",
        f"RSA listening on half of the responses: literal mean_error {literal:.2f}",
        "alpha    mean_error    L1 - L0 (95 % interval)",
    ]
    for row in found["pragmatic"]:
        change = row["difference"]["mean_error"]
        clear = "not clear" if change["low"] <= 0 <= change["high"] else (
            "helps" if change["high"] < 0 else "hurts"
        )  # fmt: skip
        lines.append(
            f"{row['alpha']:5g}  {row['mean_error']['value']:12.2f}    {change['value']:+.2f} "
            f"({change['low']:+.2f}, {change['high']:+.2f})  {clear}"
        )
    return "\n".join(lines)


def _fit(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.json)
    _check_unused(arguments, listens=bool(arguments.model))
    from wavelength_rsa.data import load_items
    from wavelength_rsa.fitting import fit_games

    items = load_items(arguments.data)
    with ExitStack() as stack:
        listener = _listener(arguments, _model(arguments, stack)) if arguments.model else None
        described = listener.describe() if listener else "people"
        found = fit_games(
            items, listener=listener, step=arguments.step, folds=arguments.folds,
            seed=arguments.seed,
        )  # fmt: skip
    counts = [len(item.responses or ()) for item in items]
    used = sum(counts if arguments.model else (n - n // 2 for n in counts))  # see fit_games
    print(
        f"alpha {found.alpha:.3f} ({found.low:.3f} to {found.high:.3f})"
        + (", at the end of the grid" if found.at_bound else "")
    )
    print(f"{'nats a response':20} {'fitted':>10} {'literal':>10}")
    for name, ours, base in (
        ("all responses", found.log_likelihood, found.baseline_log_likelihood),
        ("held out", found.cv_log_likelihood, found.cv_baseline),
    ):
        print(f"{name:20} {ours / used:10.4f} {base / used:10.4f}")
    settings = {
        "data": Path(arguments.data).name,
        "listener": described,
        "step": arguments.step,
        "seed": arguments.seed,
    }
    write_found(arguments, {**settings, **dataclasses.asdict(found)})
    return 0


def _play(arguments: argparse.Namespace) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401 - lets input() edit a line with the arrow keys
    speaks = arguments.role == "listen"
    _check_unused(arguments, speaks=speaks, listens=not speaks)
    from wavelength_rsa.play import SCALES, play

    scales: Sequence[Any] = SCALES
    if arguments.data:
        scales = list(dict.fromkeys(item.scale for item in _items(arguments)))
    with ExitStack() as stack:
        model = _model(arguments, stack)
        play(
            role=arguments.role,
            listener=None if speaks else _listener(arguments, model),
            speaker=_speaker(arguments, model) if speaks else None,
            scales=scales,
            rounds=arguments.rounds,
            step=arguments.step,
            seed=arguments.seed,
            ask=input,
            say=lambda line: print(line, flush=True),
        )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    from wavelength_rsa.demo import run_demo

    result = run_demo(out, seed=arguments.seed, full=arguments.full)
    result.save(out)
    print(result.markdown())
    return 0 if result.passed else 1


def _items(arguments: argparse.Namespace) -> "list[Item]":
    from wavelength_rsa.data import load_items

    return load_items(arguments.data)[: getattr(arguments, "limit", None)]


def _model(arguments: argparse.Namespace, stack: ExitStack) -> "TextModel":
    return _loaded(
        arguments, arguments.model, arguments.backend, arguments.model_name, stack,
        key=arguments.api_key_env,
    )  # fmt: skip


def _judge_model(arguments: argparse.Namespace, stack: ExitStack) -> "TextModel":
    return _loaded(
        arguments, arguments.judge, arguments.judge_backend, arguments.judge_model_name, stack,
        key=arguments.judge_api_key_env,
    )  # fmt: skip


def _loaded(
    arguments: argparse.Namespace,
    spec: str,
    backend: str,
    name: str | None,
    stack: ExitStack,
    *,
    key: str | None,
) -> "TextModel":
    """Load a model, behind the cache if one is asked for."""
    from tenfold_common.lm import load_text_model
    from wavelength_rsa.cache import CachedModel, open_cache

    template = None if arguments.thinking else {"enable_thinking": False}
    server = backend == "server" or _is_address(spec)
    options: dict[str, Any] = {}
    if server:
        options = {"model": name, "api_key_env": key}
    elif name:
        raise UserError(f"a model's name ({name!r}) is for a server; {spec!r} is the model itself")
    else:
        quiet_libraries()
        options = {
            "dtype": arguments.dtype,
            "template_options": template,
            "trust_remote_code": arguments.trust_remote_code,
        }
        if backend != "vllm":
            options["device"] = arguments.device
        elif arguments.device != "auto":
            raise UserError("--device is for transformers; vLLM decides for itself")
    if arguments.cache:
        open_cache(arguments.cache).close()  # a broken file is told before a model is loaded
    model = load_text_model(spec, backend, **options)
    return stack.enter_context(CachedModel(model, arguments.cache)) if arguments.cache else model


def _is_address(spec: str) -> bool:
    return spec.lower().startswith(("http://", "https://"))


def _listener(arguments: argparse.Namespace, model: "TextModel") -> "Listener":
    from wavelength_rsa.listeners import LogprobListener, SamplingListener

    if arguments.mode == "logprob":
        return LogprobListener(
            model, step=arguments.step, normalize=arguments.normalize, end=arguments.end
        )
    return SamplingListener(
        model, step=arguments.step, num_samples=arguments.num_samples,
        cot=arguments.mode == "cot", max_tokens=arguments.max_tokens,
    )  # fmt: skip


def _reasoning(arguments: argparse.Namespace, model: "TextModel") -> "Listener":
    """Return the listener that `eval` evaluates: literal, or pragmatic with the model's clues."""
    from wavelength_rsa.speakers import RSAListener

    literal = _listener(arguments, model)
    if not arguments.rsa_listener:
        return literal
    return RSAListener(literal, _proposer(arguments, model), alpha=arguments.alpha)


def _proposer(arguments: argparse.Namespace, model: "TextModel") -> "Speaker":
    from wavelength_rsa.speakers import SamplingSpeaker

    return SamplingSpeaker(
        model, num_candidates=arguments.num_candidates, cot=arguments.cot,
        max_tokens=arguments.max_tokens, on_violation=arguments.on_violation,
    )  # fmt: skip


def _speaker(arguments: argparse.Namespace, model: "TextModel") -> "Speaker":
    from wavelength_rsa.speakers import RSASpeaker

    speaker = _proposer(arguments, model)
    if not arguments.rsa:
        return speaker
    return RSASpeaker(
        speaker, _listener(arguments, model), alpha=arguments.alpha, utility=arguments.utility,
        select=arguments.select,
    )  # fmt: skip


def _check_unused(
    arguments: argparse.Namespace, *, speaks: bool = True, listens: bool = True
) -> None:
    """Refuse options that would change nothing, as who gave them believes that they do.

    `speaks` and `listens`: whether a model does, apart from a listener that a speaker imagines.
    """
    given = vars(arguments)
    rsa = bool(given.get("rsa") and speaks)
    reasoning = rsa or bool(given.get("rsa_listener"))
    speaking = "rsa" in given and (speaks or reasoning)
    listening = listens or rsa
    sampled = arguments.mode != "logprob"
    server = arguments.backend == "server" or _is_address(arguments.model or "")
    local = bool(arguments.model) and not server
    judge = given.get("judge")
    judged_by_server = bool(judge) and (
        arguments.judge_backend == "server" or _is_address(arguments.judge)
    )
    local |= bool(judge) and not judged_by_server
    uses = {  # option: whether it is used, its default, where it belongs
        "rsa": (speaks, False, "a model that speaks"),
        "mode": (listening, "logprob", "a model that listens (--rsa, --judge, --model)"),
        "device": (local, "auto", "a model in this process"),
        "dtype": (local, "auto", "a model in this process"),
        "thinking": (local, False, "a model in this process; a server decides for itself"),
        "trust_remote_code": (local, False, "a model in this process"),
        "api_key_env": (server, None, "a server"),
        "judge_api_key_env": (judged_by_server, None, "a judge behind a server"),
        "backend": (bool(arguments.model), "auto", "--model"),
        "model_name": (bool(arguments.model), None, "--model"),
        "cache": (bool(arguments.model), None, "a model (--model)"),
        "alpha": (reasoning, 1.0, "--rsa" + " or --rsa_listener" * ("rsa_listener" in given)),
        "utility": (rsa, "log_prob", "--rsa"),
        "select": (rsa, "sample", "--rsa"),
        "num_candidates": (speaking, 32, "a model that speaks"),
        "cot": (speaking, False, "a model that speaks"),
        "on_violation": (speaking, "keep", "a model that speaks"),
        "num_samples": (sampled and listening, 32, "--mode sample or cot, where a model listens"),
        "max_tokens": (sampled or speaking, None, "--mode sample or cot, or a model that speaks"),
        "normalize": (listening and not sampled, "none", "--mode logprob, where a model listens"),
        "end": (listening and not sampled, None, "--mode logprob, where a model listens"),
        "judge_backend": (bool(given.get("judge")), "auto", "--judge"),
        "judge_model_name": (bool(given.get("judge")), None, "--judge"),
    }
    for name, (used, default, where) in uses.items():
        if not used and given.get(name, default) != default:
            raise UserError(f"--{name} is for {where} and would change nothing here; leave it out")


def _check_outputs(arguments: argparse.Namespace, *outputs: str | Path | None) -> None:
    """Refuse files that cannot be written, or that are the data, the cache or of a model."""
    for output in filter(None, outputs):
        check_output_file(output)
        for name in ("data", "cache"):
            other = getattr(arguments, name, None)
            if other and Path(output).resolve() == Path(other).resolve():
                raise UserError(f"{output} would replace the file of --{name}; name another file")
        if (Path(output).resolve().parent / "config.json").is_file():
            raise UserError(f"{output} lies in the folder of a model; name another folder")
