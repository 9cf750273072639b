"""A small Llama learns text on the spot, is compiled, and is compared with transformers.

The text is Shakespeare's plays where TENFOLD_DATA has them, else the documentation of Python that
comes with Python.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tenfold_common.errors import UserError
from tenfold_common.optional import is_available
from tenfold_common.results import Claim, Figure, Result, Sample, Table, environment

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from flashformer.model import FlashModel

logger = logging.getLogger(__name__)

PLAYS = Path("shakespeare", "input.txt")
STEPS, BATCH, LENGTH, RATE = 300, 16, 128, 3e-3
CONTEXTS = (16, 256, 960)
MAX_LEN = 1024
BOUNDS = {"bf16": 1.001, "int8": 1.005, "int4": 1.05}  # of the perplexity, over that of fp32


def run_demo(
    out_dir: Path,
    *,
    seed: int = 0,
    full: bool = False,
    data: "str | os.PathLike[str] | None" = None,
    steps: int = STEPS,
) -> Result:
    """Train, compile in every format, compare.

    Args:
        out_dir: Folder for the figure, made if missing.
        seed: First seed.
        full: Three seeds in place of one.
        data: Folder that holds `shakespeare/input.txt`. Defaults to the one that TENFOLD_DATA
            names, if it has the file.
        steps: Of training; the claims are made for the default.

    Returns:
        Claims, tables, a figure and text the model wrote. About three minutes a seed on one thread.

    Raises:
        UserError: `data` is given and has no such file.
    """
    started = time.monotonic()
    text, source = _text(data)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    seeds = [seed, seed + 1, seed + 2] if full else [seed]
    runs = [_run(text, one, steps) for one in seeds]
    return Result(
        package="flashformer",
        title="A small Llama trained here: same tokens, cost of formats, one call a token",
        summary=_summary(runs),
        seeds=seeds,
        claims=_claims(runs),
        tables=_tables(runs),
        figures=_figures(out_dir, runs[0]),
        samples=[Sample("Greedy text of the int4 model", runs[0]["sample"])],
        notes=[
            f"Text: {source}.",
            "The longer the context, the smaller the gain: keys and values are read by both.",
            "What this does not show: large models, whose time is that of reading the weights, and "
            "GPUs. Times are of this machine and what else ran on it; ratios say more.",
        ],
        seconds=time.monotonic() - started,
        environment=environment(),
    )


def _text(data: "str | os.PathLike[str] | None") -> tuple[str, str]:
    folder = data if data is not None else os.environ.get("TENFOLD_DATA")
    file = Path(folder) / PLAYS if folder else None
    if file is not None and file.is_file():
        return file.read_text(encoding="utf-8"), "Shakespeare's plays"
    if data is not None:
        raise UserError(f"{data} has no {PLAYS.as_posix()}")
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)), "Python's documentation of itself"


def _run(text: str, seed: int, steps: int) -> dict[str, Any]:
    import torch

    from flashformer.ablation import ablation
    from flashformer.api import compile
    from flashformer.verification import verify
    from tenfold_common.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer(text).input_ids)
    held_out = ids[-(len(ids) // 20) :]
    model, loss = train(ids[: -len(held_out)], len(tokenizer), seed=seed, steps=steps)
    prompt = held_out[:32]
    compiled = {
        name: compile(model, weights=name, group_size=32, max_len=MAX_LEN)
        for name in ("fp32", *BOUNDS)
    }
    windows = held_out[: 8 * 513].unfold(0, 513, 512)[:8]
    perplexity = {name: _perplexity(m, windows) for name, m in compiled.items()}
    same = verify(compiled["fp32"], model, prompt=prompt, n=256)
    half = _half(model)
    gate = {
        "ours": verify(compiled["bf16"], model, prompt=prompt, n=256).kl,
        "transformers": _divergence(model, half, prompt, 256),
    }
    for each in compiled.values():
        each.threads = 1
    speed = _speeds(model, half, compiled)
    written = compiled["int4"].generate(prompt[None], max_new_tokens=200, do_sample=False)
    return {
        "seed": seed,
        "loss": loss,
        "parameters": sum(p.numel() for p in model.parameters()),
        "same": same,
        "perplexity": perplexity,
        "gate": gate,
        "speed": speed,
        "calls": ablation(compiled["fp32"], steps=32),
        "sample": tokenizer.decode(written[0], skip_special_tokens=True),
    }


def train(
    ids: "Tensor", vocab: int, *, seed: int, steps: int = STEPS
) -> "tuple[PreTrainedModel, float]":
    """Train a Llama of 1.7 million parameters on random windows of a text.

    Args:
        ids: `[n]` int64.
        vocab: Number of tokens.
        seed: Fixes weights and windows.
        steps: Of AdamW, cosine schedule with warm-up.

    Returns:
        The model in eval mode, and the mean loss of the last twentieth of the steps, nats a token.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from tenfold_common.tiny import tiny_llama

    model = tiny_llama(
        vocab, hidden=192, layers=4, heads=6, kv_heads=2, intermediate_size=512, seed=seed,
        max_position_embeddings=MAX_LEN, tie_word_embeddings=True,
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    chance = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=chance)
        batch = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            logger.info("step %d of %d, loss %.3f", step + 1, steps, losses[-1])
    last = losses[-max(1, steps // 20) :]
    return model.eval(), sum(last) / len(last)


def _perplexity(model: "FlashModel", windows: "Tensor") -> float:
    import torch

    total = 0.0
    for window in windows:
        logits = model.feed(window[:-1], model.new_cache(len(window)), every=True)
        total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    return math.exp(total / len(windows))


def _half(model: "PreTrainedModel") -> "PreTrainedModel":
    import copy

    import torch

    copied: Any = copy.deepcopy(model)
    return copied.to(torch.bfloat16)


def _divergence(
    exact: "PreTrainedModel", other: "PreTrainedModel", prompt: "Tensor", n: int
) -> float:
    """Return KL(exact || other), over the text that `verify` compares on."""
    import torch

    from flashformer.sampling import surprise
    from flashformer.verification import greedy

    text = greedy(exact, prompt, n)[None]
    with torch.inference_mode():
        p, q = (m(text).logits[0, len(prompt) - 1 : -1].float() for m in (exact, other))
    return surprise(p, q)


def _speeds(
    model: "PreTrainedModel", half: "PreTrainedModel", compiled: "Mapping[str, FlashModel]"
) -> dict[str, list[float]]:
    """Return tokens a second on one thread at `CONTEXTS`; all in turn, the median of 5 rounds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[int], float]] = {
        "transformers fp32": lambda n: _eager(model, n),
        "transformers bf16": lambda n: _eager(half, n),
    }
    for name, each in compiled.items():
        runs[f"flashformer {name}"] = lambda n, each=each: _ours(each, n)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for context in CONTEXTS:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(5):
            for name, run in runs.items():
                times[name].append(run(context))
        for name in runs:
            found[name].append(1 / median(times[name]))
    torch.set_num_threads(threads)
    return found


def _eager(model: "PreTrainedModel", context: int, steps: int = 16) -> float:
    import torch

    ids = torch.ones(1, context, dtype=torch.int64)
    with torch.inference_mode():
        out: Any = model(ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - start) / steps


def _ours(model: "FlashModel", context: int, steps: int = 32) -> float:
    cache = model.new_cache()
    cache.length = context  # what the positions hold does not change the time
    start = time.perf_counter()
    model.decode(cache, 1, steps=steps)
    return (time.perf_counter() - start) / steps


# --------------------------------------------------------------------------------------------------
# What is reported


def _claims(runs: Sequence[dict[str, Any]]) -> list[Claim]:
    worst = min((r["same"] for r in runs), key=lambda v: v.same)
    tie = worst.equal or (worst.gap is not None and worst.gap <= 2 * worst.max_error)
    claims = [
        Claim(
            "same tokens",
            "of 256 greedy tokens, how many are those of transformers in float32, worst seed",
            worst.same,
            "256, or a tie",
            tie,
        )
    ]

    def bound(
        name: str, claimed: str, value: float, limit: float, *, at_least: bool = False
    ) -> None:
        passed = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        claims.append(Claim(name, claimed, value, f"{sign} {limit:g}", passed))

    for name, limit in BOUNDS.items():
        ratio = max(r["perplexity"][name] / r["perplexity"]["fp32"] for r in runs)
        bound(f"perplexity {name}", "over that of fp32, held-out text, worst seed", ratio, limit)
    gate = max(r["gate"]["ours"] / r["gate"]["transformers"] for r in runs)
    bound(
        "nearer to float32",
        "KL of our bf16 from float32 over that of transformers' bf16, worst seed", gate, 1.0,
    )  # fmt: skip
    calls = min(r["calls"]["stage"] / r["calls"]["token"] for r in runs)
    bound(
        "one call a token", "time with one call a stage over one call a token, worst seed", calls,
        1.2, at_least=True,
    )  # fmt: skip
    speed = min(
        r["speed"]["flashformer fp32"][0] / r["speed"]["transformers fp32"][0] for r in runs
    )
    bound(
        "faster than transformers",
        "tokens a second over transformers' eager, fp32, context 16, worst seed", speed, 5.0,
        at_least=True,
    )  # fmt: skip
    return claims


def _tables(runs: Sequence[dict[str, Any]]) -> list[Table]:
    def mean(values: "Sequence[float]") -> float:
        return sum(values) / len(values)

    formats = Table(
        "Held-out perplexity of a byte",
        ["weights", "perplexity", "over fp32"],
        [
            [
                name,
                mean([r["perplexity"][name] for r in runs]),
                mean([r["perplexity"][name] / r["perplexity"]["fp32"] for r in runs]),
            ]
            for name in ("fp32", *BOUNDS)
        ],
    )
    names = list(runs[0]["speed"])
    speed = Table(
        "Tokens a second, one thread",
        ["", *(f"context {c}" for c in CONTEXTS), "over eager of the same bits, context 16"],
        [
            [
                name,
                *(mean([r["speed"][name][i] for r in runs]) for i in range(len(CONTEXTS))),
                mean([r["speed"][name][0] / r["speed"][_peer(name)][0] for r in runs]),
            ]
            for name in names
        ],
    )
    calls = Table(
        "One native call for ...",
        ["", "microseconds a token", "over one call a token"],
        [
            [
                way,
                mean([r["calls"][way] * 1e6 for r in runs]),
                mean([r["calls"][way] / r["calls"]["token"] for r in runs]),
            ]
            for way in runs[0]["calls"]
        ],
    )
    return [formats, speed, calls]


def _peer(name: str) -> str:
    return f"transformers {'fp32' if name.endswith('fp32') else 'bf16'}"


def _summary(runs: Sequence[dict[str, Any]]) -> str:
    first = runs[0]
    fast = first["speed"]["flashformer fp32"][0] / first["speed"]["transformers fp32"][0]
    return (
        f"{first['parameters'] / 1e6:.1f} million parameters, loss {first['loss']:.2f} nats a "
        f"byte. {first['same'].same} of 256 greedy tokens as in transformers, {fast:.0f} times its "
        "tokens a second."
    )


def _figures(out_dir: Path, run: dict[str, Any]) -> list[Figure]:
    if not is_available("matplotlib"):
        return []
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = picture.subplots()
    for name, values in run["speed"].items():
        style = "--" if name.startswith("transformers") else "-"
        axes.plot(CONTEXTS, values, style, marker="o", label=name)
    axes.set(xlabel="context, tokens", ylabel="tokens a second, one thread", yscale="log")
    axes.legend(fontsize=7)
    picture.savefig(out_dir / "speed.png")
    return [Figure("speed.png", "Tokens a second by context; dashed: transformers, eager")]
