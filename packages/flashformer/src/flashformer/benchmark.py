"""Milliseconds a token of a compiled model, and of others with the same weights, in turns."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from flashformer.model import BURST, FlashModel
from flashformer.peers import Eager, Flash, LlamaCpp, Runner, Static
from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from torch import Tensor

PEERS = ("eager", "compile", "llama.cpp")
TURN, MOST = 0.05, 16  # seconds of a turn that is filled with bursts, and at most so many
LEAST = 8  # tokens before a turn that are not timed
LONGEST_WARM_UP = 10.0  # seconds, where the machine never comes to rest
PROMPT = 24  # tokens after which logits are compared
# The largest rms error of a logit over their rms. Unrelated logits have about 1.4.
GATES = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.2, "int4": 0.8}


def bench(
    model: FlashModel,
    *,
    peers: Sequence[str] = ("eager",),
    contexts: Sequence[int] = (64, 512),
    tokens: int = BURST,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Time greedy decoding of random text, after a check that the logits are near to one another.

    At each context all decode the same places, `rounds` times, in alternating order.

    Args:
        model: A compiled model that still has its transformers model.
        peers: Of "eager" (the transformers model), "compile" (the same with a `StaticCache`
            and torch.compile, compiled before timing) and "llama.cpp" (needs the extra `bench`; the
            same weights as GGUF in the format that is nearest to the model's).
        contexts: Positions before the first token that is timed, each at least 1.
        tokens: Decoded and timed together, at least 1.
        rounds: Turns of each.

    Returns:
        For each context a row of ours and of each peer: `context`, and the fields of a row of
        `tenfold_common.results.write_bench`. `bytes` are those that a token reads; `achieved` is
        bytes a second, `limit` those that the same threads read from memory in the same run (CPU
        only). Models that fit into the processor's cache can exceed it.

    Raises:
        UserError: an unknown peer, a number out of range, no transformers model, one whose weights
            changed, or logits that are too far from its.
        MissingDependencyError: a peer is not installed.
    """
    _check_numbers(model, peers, contexts, tokens, rounds)
    model.check_fresh()
    source: Any = model.source
    wanted = reference_logits(source, gate_tokens(model.spec.vocab, min(contexts) + tokens))
    limit = read_limit(model)
    rows = []
    for context in contexts:
        with ExitStack() as stack:
            runners: dict[str, Runner] = {"": Flash(model)}
            for name in dict.fromkeys(peers):
                runners[name] = _peer(name, source, model, context + tokens)
                stack.callback(runners[name].close)
            check(runners.values(), wanted, GATES)
            for runner in runners.values():
                runner.start(prompt(model.spec.vocab, context))
            times = in_turns(runners, length=context, tokens=tokens, rounds=rounds)
            shape = f"{parameters(source)}, context {context}"
            for key, runner in runners.items():
                rows.append({"context": context, **row(runner, shape, times[key], context, limit)})
    return rows


def _peer(name: str, source: Any, model: FlashModel, room: int) -> Runner:
    if name == "eager":
        return Eager(source)
    if name == "compile":
        return Static(source, room)
    return LlamaCpp(source, format=model.weights, room=room, threads=model.plan.workers)


def _check_numbers(
    model: FlashModel, peers: Sequence[str], contexts: Sequence[int], tokens: int, rounds: int
) -> None:
    if isinstance(peers, str):
        raise UserError(f"peers must be a list of names, not {peers!r}")
    for name in peers:
        if name not in PEERS:
            raise UserError(
                f"peers must be of {', '.join(PEERS)}, not {name!r}.{suggest(str(name), PEERS)}"
            )
    if isinstance(contexts, int) or not contexts:
        raise UserError(f"contexts must be a list of at least one number, not {contexts!r}")
    numbers = [("contexts", n) for n in contexts] + [("tokens", tokens), ("rounds", rounds)]
    for what, number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"{what} must be whole numbers of at least 1, not {number!r}")
    if model.source is None:
        raise UserError(
            "this model was loaded and has no transformers model to compare with; benchmark one "
            "that compile() made"
        )
    if max(contexts) + tokens > model.max_len:
        raise UserError(
            f"context {max(contexts)} and {tokens} tokens are over the model's max_len "
            f"{model.max_len}; compile with a larger one, or ask for shorter contexts"
        )


# --------------------------------------------------------------------------------------------------
# The same for every benchmark


def gate_tokens(vocab: int, room: int) -> list[int]:
    """Return the fixed text after which logits are compared."""
    import torch

    stream = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (min(PROMPT, room),), generator=stream).tolist()


def prompt(vocab: int, length: int) -> "Tensor":
    """Return the fixed text `[length]` int64 before the tokens that are timed."""
    import torch

    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length))


def reference_logits(network: Any, tokens: list[int]) -> "tuple[list[int], Tensor]":
    """Return tokens and a transformers model's logits `[V]` float32 after them."""
    import torch

    with torch.no_grad():
        out = network(torch.tensor([tokens], device=network.device), logits_to_keep=1)
    return tokens, out.logits[0, -1].float().cpu()


def check(
    runners: Iterable[Runner],
    wanted: "tuple[list[int], Tensor]",
    gates: Mapping[str, float],
) -> float:
    """Compare the logits of runners with those of a reference.

    Args:
        runners: They are rewound.
        wanted: Of `reference_logits`.
        gates: The largest rms error over rms, by format.

    Returns:
        The largest.

    Raises:
        UserError: one is too large: there are no times for wrong results.
    """
    tokens, right = wanted
    worst = 0.0
    for runner in runners:
        error = rms(runner.logits(tokens) - right) / rms(right)
        gate = gates.get(runner.format, gates["bf16"])
        if not error <= gate:
            raise UserError(
                f"the logits of {runner.name} ({runner.format}) are off by {error:.2g} of their "
                f"size, over {gate:.2g}; no time is shown"
            )
        worst = max(worst, error)
    return worst


def rms(x: "Tensor") -> float:
    """Return the root of the mean square."""
    return float(x.double().square().mean().sqrt())


def in_turns(
    runners: Mapping[str, Runner],
    *,
    length: int,
    tokens: int,
    rounds: int,
    note: Callable[[str], object] = lambda text: None,
) -> dict[str, list[float]]:
    """Time started runners in alternating order.

    A turn is some bursts from the same place, as many as fill 50 ms; before it, and once at length
    before all turns, tokens are decoded untimed.

    Args:
        runners: With at least `length` positions read.
        length: Where each burst starts.
        tokens: Of a burst.
        rounds: Turns of each.
        note: Called with a line on progress.

    Returns:
        Seconds a token of every burst.
    """
    bursts = {}
    for key, runner in runners.items():
        spent = warm_up(runner, length, tokens)
        bursts[key] = max(1, min(MOST, int(TURN / max(spent, 1e-9))))
    times: dict[str, list[float]] = {key: [] for key in runners}
    for turn in range(rounds):
        for key in list(runners)[:: -1 if turn % 2 else 1]:
            runners[key].seconds(0, length, min(tokens, LEAST))
            times[key] += [
                runners[key].seconds(0, length, tokens) / tokens for _ in range(bursts[key])
            ]
        note(f"round {turn + 1} of {rounds}")
    return times


def warm_up(runner: Runner, length: int, tokens: int) -> float:
    """Decode, untimed, until ours has found out how many threads to use.

    Returns:
        Seconds of the last burst.
    """
    end = time.perf_counter() + LONGEST_WARM_UP
    while True:
        spent = runner.seconds(0, length, tokens)
        if not isinstance(runner, Flash) or runner.settled or time.perf_counter() > end:
            return spent


def read_limit(model: FlashModel) -> float | None:
    """Return the bytes a second that the model's threads read from memory; None if not on a CPU."""
    read = getattr(model.backend, "read_bandwidth", None)
    return None if read is None else read(model.plan.workers)


def row(
    runner: Runner, shape: str, seconds: list[float], length: int, limit: float | None
) -> dict[str, Any]:
    """Return a row of `write_bench`.

    Args:
        runner: What was timed.
        shape: Of what.
        seconds: A token, of every burst.
        length: Positions before.
        limit: Bytes a second, or None.
    """
    read = runner.bytes(length)
    middle = statistics.median(seconds)
    found: dict[str, Any] = {
        "name": "decode",
        "impl": runner.name,
        "shape": shape,
        "dtype": runner.format,
        **quantiles(seconds),
        "bytes": read,
        "achieved": read / middle,
    }
    if limit is not None:
        found |= {"limit": limit, "fraction_of_limit": read / middle / limit}
    found["extra"] = {"tokens_per_second": 1 / middle}
    return found


def quantiles(seconds: list[float]) -> dict[str, Any]:
    """Return the median and the 20 and 80 percentiles in ms, and the number."""
    import numpy as np

    low, middle, high = (float(x) * 1e3 for x in np.quantile(seconds, [0.2, 0.5, 0.8]))
    return {"median_ms": middle, "p20_ms": low, "p80_ms": high, "n": len(seconds)}


def parameters(network: Any) -> str:
    """Return the number of parameters for people, such as `5.5M parameters`."""
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters"
