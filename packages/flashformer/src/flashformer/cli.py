"""The command `flashformer`: a shell around the library; imports stand inside the verbs."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer._version import __version__
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

if TYPE_CHECKING:
    from flashformer.model import FlashModel

DESCRIPTION = "Decode with Llama-family models at batch size 1, the whole model in one call."
FORMATS = ("fp32", "bf16", "int8", "int4")
PEERS = ("eager", "compile", "llama.cpp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 success; 1 a failed claim, a bug, or in `verify` with fp32 weights a token that differs by
        more than a tie; 2 a wrong input; 130 interrupted.
    """
    return run(lambda argv: run_verb(_parser(), argv, package="flashformer"), argv)


def _parser() -> Parser:
    parser = base_parser("flashformer", DESCRIPTION, __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(verb_function=function)
        return made

    info = verb("info", _info, "say whether a model can be compiled, and its shape")
    _add_name(info)

    quantize = verb("quantize", _quantize, "compile a model into a folder that loads at once")
    _add_name(quantize)
    _add_formats(quantize)
    quantize.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    quantize.add_argument("--overwrite", action="store_true", help="replace what is there")

    generate = verb("generate", _generate, "continue a prompt")
    _add_name(generate)
    _add_formats(generate)
    generate.add_argument("--prompt", help="text (default: read from standard input)")
    generate.add_argument("--max_new_tokens", type=whole(), default=128, help="(default 128)")
    generate.add_argument("--sample", action="store_true", help="draw tokens (default: greedy)")
    generate.add_argument("--temperature", type=_positive, help="of --sample (default 1)")
    generate.add_argument("--top_k", type=whole(), help="of --sample")
    generate.add_argument("--top_p", type=_share, help="of --sample")
    generate.add_argument("--seed", type=seed_number, help="of --sample (default: a new one)")
    generate.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )

    verify = verb("verify", _verify, "compare a compiled model with transformers")
    _add_name(verify)
    _add_formats(verify)
    verify.add_argument("--prompt", help="text to start from (default: the first token)")
    verify.add_argument("--n", type=whole(), default=64, help="greedy tokens (default 64)")

    bench = verb("bench", _bench, "measure milliseconds a token, ours and peers in one run")
    _add_name(bench)
    _add_formats(bench)
    bench.add_argument(
        "--peers", nargs="*", default=["eager"], choices=PEERS, help="(default eager)"
    )
    bench.add_argument(
        "--contexts", nargs="+", type=whole(), default=[64, 512], help="(default 64 512)"
    )

    explain = verb("explain", _explain, "what a token costs, stage by stage; needs no weights")
    _add_name(explain)
    explain.add_argument("--weights", choices=FORMATS, help="(default bf16)")
    explain.add_argument("--head", choices=FORMATS, help="(default int8 for int4)")
    explain.add_argument("--group_size", type=int, choices=(32, 64, 128), help="(default 128)")
    explain.add_argument("--gpu", help="such as h200: its units and bandwidth")
    explain.add_argument("--workers", type=whole(), help="of the plan")
    explain.add_argument("--bandwidth", type=_positive, help="GB/s (default: that of the GPU)")
    explain.add_argument("--position", type=whole(0), default=0, help="(default 0)")

    demo = verb("demo", _demo, "a small model trained here: same tokens, cost of formats, speed")
    demo.add_argument(
        "--out", default="out/demo/flashformer", metavar="DIR",
        help="folder for figures and pictures (default out/demo/flashformer)",
    )  # fmt: skip
    demo.add_argument("--seed", type=seed_number, default=0, help="(default 0)")
    demo.add_argument("--full", action="store_true", help="three seeds")
    for each in (info, verify, bench, explain, generate):
        each.add_argument("--json", metavar="FILE", help="also write the figures here")
    return parser


def _add_name(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, or a hub name")


def _add_formats(parser: Parser) -> None:
    parser.add_argument("--weights", choices=FORMATS, help="(default fp32 or bf16, as the model)")
    parser.add_argument(
        "--head", choices=FORMATS, help="(default int8 for int4, else as --weights)"
    )
    parser.add_argument(
        "--group_size", type=int, choices=(32, 64, 128), help="of int4 (default 128)"
    )
    parser.add_argument("--asymmetric", action="store_true", help="int4 with zero points")
    parser.add_argument("--max_len", type=whole(), help="longest sequence (default at most 4096)")
    parser.add_argument("--threads", type=whole(), help="(default: those of torch)")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text}")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be over 0 and at most 1, not {text}")
    return value


# --------------------------------------------------------------------------------------------------
# Verbs


def _info(arguments: argparse.Namespace) -> int:
    from flashformer.config import ModelSpec, supported

    config = _config(arguments.model)
    found = supported(config)
    if not found.ok:
        for reason in found.reasons:
            print(f"not supported: {reason}")
        write_found(arguments, {"supported": False, "reasons": list(found.reasons)})
        return 1
    spec = ModelSpec.from_config(config).to_dict()
    print("supported")
    for name, value in spec.items():
        text = value
        if isinstance(value, list | tuple):
            text = value[0] if len(set(value)) == 1 else " ".join(map(str, value))
        print(f"{name:15} {text}")
    write_found(arguments, {"supported": True, "spec": spec})
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; name another folder, or give --overwrite")
    model = _compiled(arguments)
    model.save(
        out, overwrite=arguments.overwrite, tokenizer=_tokenizer(arguments.model, needed=False)
    )
    print(f"{out}: {model.backend.streamed / 1e6:.1f} MB a token, {model!r}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    for name in ("temperature", "top_k", "top_p", "seed"):
        if getattr(arguments, name) is not None and not arguments.sample:
            raise UserError(f"--{name} is for --sample and would change nothing here; leave it out")
    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
    if not prompt.strip():
        raise UserError("the prompt is empty; give --prompt TEXT or text on standard input")
    tokenizer = _tokenizer(arguments.model)
    if arguments.chat:
        if not tokenizer.chat_template:
            raise UserError(f"{arguments.model} has no chat template; leave --chat out")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )["input_ids"]  # fmt: skip
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    model = _compiled(arguments)
    from transformers import TextStreamer

    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.sample:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature or 1.0,
            "top_k": arguments.top_k or 0,
            "top_p": arguments.top_p or 1.0,
            "seed": arguments.seed,
        }
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = model.generate(
        ids, max_new_tokens=arguments.max_new_tokens, streamer=streamer, **sampling
    )
    new = found[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    write_found(arguments, {"prompt": prompt, "text": text, "tokens": new.tolist()})
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from flashformer.verification import verify

    model = _compiled(arguments)
    if model.source is None:
        raise UserError(
            f"{arguments.model} has no transformers model to compare with (it is compiled or "
            "quantised already); verify the model it was made from"
        )
    prompt = None
    if arguments.prompt is not None:
        if not arguments.prompt:
            raise UserError("--prompt is empty; leave it out to begin with the first token")
        prompt = _tokenizer(arguments.model)(arguments.prompt, return_tensors="pt").input_ids
    found = verify(model, model.source, prompt=prompt, n=arguments.n)
    print(f"{model!r}\n{found}")
    write_found(arguments, dataclasses.asdict(found))
    tie = found.gap is not None and found.gap <= 2 * found.max_error
    return 0 if found.equal or tie or model.weights != "fp32" else 1


def _bench(arguments: argparse.Namespace) -> int:
    from flashformer.benchmark import bench

    model = _compiled(arguments)
    rows = bench(model, peers=arguments.peers, contexts=arguments.contexts)
    print(f"{'what':28} {'context':>8} {'ms a token':>11} {'tokens/s':>9}")
    for row in rows:
        print(
            f"{row['impl']:28} {row['context']:8d} {row['median_ms']:11.3f} "
            f"{1000 / row['median_ms']:9.0f}"
        )
    write_found(arguments, {"model": arguments.model, "rows": rows})
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from flashformer import files
    from flashformer.config import ModelSpec
    from flashformer.roofline import explain

    _check_formats(arguments, ("weights", "head", "group_size"))
    if _is_compiled(arguments.model):
        settings = files.read_settings(Path(arguments.model))
        spec = ModelSpec.from_dict(settings["spec"])
        formats = {name: settings[name] for name in ("weights", "head", "cache")}
        for matrix in settings["matrices"].values():
            if matrix["format"] == "int4":
                formats |= {"group": matrix["group"], "zeros": matrix["zeros"]}
    else:
        spec = ModelSpec.from_config(_config(arguments.model))
        formats = {
            "weights": arguments.weights or "bf16",
            "head": arguments.head,
            "group": arguments.group_size or 128,
        }
    found = explain(
        spec,
        **formats,
        gpu=arguments.gpu,
        workers=arguments.workers,
        bandwidth=arguments.bandwidth * 1e9 if arguments.bandwidth else None,
        position=arguments.position,
    )
    print(found)
    write_found(arguments, dataclasses.asdict(found))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    from flashformer.demo import run_demo

    result = run_demo(out, seed=arguments.seed, full=arguments.full)
    result.save(out)
    print(result.markdown())
    return 0 if result.passed else 1


# --------------------------------------------------------------------------------------------------


def _compiled(arguments: argparse.Namespace) -> "FlashModel":
    """Load a compiled folder, or compile a model."""
    quiet_libraries()
    from flashformer.api import from_pretrained, load

    _check_formats(arguments, ("weights", "head", "group_size", "asymmetric", "max_len"))
    if _is_compiled(arguments.model):
        return load(arguments.model, threads=arguments.threads)
    return from_pretrained(
        arguments.model, weights=arguments.weights, head=arguments.head,
        group_size=arguments.group_size, symmetric=False if arguments.asymmetric else None,
        max_len=arguments.max_len, threads=arguments.threads,
    )  # fmt: skip


def _is_compiled(model: str) -> bool:
    from flashformer.files import SETTINGS

    return (Path(model) / SETTINGS).is_file()


def _check_formats(arguments: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Refuse options, of those named, that would change nothing."""
    given = [name for name in names if getattr(arguments, name)]
    for name in given:
        if _is_compiled(arguments.model):
            raise UserError(
                f"--{name} is for compiling, and {arguments.model} is compiled already; leave it "
                "out"
            )
        four_bits = "int4" in (arguments.weights, arguments.head)
        if name in ("group_size", "asymmetric") and not four_bits:
            raise UserError(f"--{name} is for int4 and would change nothing here; leave it out")


def _config(name: str) -> Any:
    quiet_libraries()
    from flashformer.checkpoints import load_config

    return load_config(name)


def _tokenizer(name: str, *, needed: bool = True) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        if not needed:
            return None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} has no tokenizer that loads: {reason}") from error
