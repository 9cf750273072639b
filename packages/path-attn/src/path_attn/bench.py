"""Speed and memory against plain attention, fla's reference and the paper's way of decoding.

Every implementation of a row group runs in the same process, in turns, after a check that the
results agree. The limit beside each number is measured in the same run: the machine's
matrix-product rate for attention, its read bandwidth for decoding.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn._version import __version__
from path_attn.cache import PaTHKVCache
from path_attn.ops import path_attention, path_attention_decode
from path_attn.reference import global_path_attention
from tenfold_common.cli import base_parser
from tenfold_common.errors import UserError
from tenfold_common.results import write_bench

DESCRIPTION = "Speed and memory against plain attention and fla's reference."
HEADS, DIM = 4, 64
LENGTHS = (512, 2048, 4096, 8192)
TIMED_GLOBAL_LIMIT = 4096  # the global form is cubic: half a minute a call at 8192
TIMED_GRADIENT_LIMIT = 2048  # backward of the global form and of fla's reference: minutes beyond
GLOBAL_GRADIENT_LIMIT = 4096  # their backward's memory exceeds 20 GB at 8192
OURS, GLOBAL, SDPA, FLA = "path-attn", "path-attn global form", "SDPA with RoPE", "fla naive"
TOLERANCE = 2e-4  # fp32, outputs of order 1


def main(argv: list[str]) -> int:
    """Run `path-attn bench`."""
    parser = base_parser("path-attn bench", DESCRIPTION, __version__)
    parser.add_argument("what", choices=["attention", "memory", "decode"], help="what to measure")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="sequence lengths (default: 512 2048 4096 8192)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: 7)")
    parser.add_argument(
        "--peak-of", help="internal: print the peak memory of one implementation and stop"
    )
    args = parser.parse_args(argv)
    lengths = tuple(args.lengths or (LENGTHS if args.what != "decode" else (4096,)))
    if min((*lengths, args.threads, args.repeats)) < 1:
        raise UserError("--lengths, --threads and --repeats must be at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak_of:
        print(_peak_bytes(args.peak_of, lengths[0]))  # noqa: T201
        return 0
    measure = {"attention": bench_attention, "memory": bench_memory, "decode": bench_decode}[
        args.what
    ]
    correctness, rows, notes = measure(lengths, args.repeats)
    for row in rows:
        print(_line(row))  # noqa: T201
    if args.json:
        sizes = " ".join(map(str, lengths))
        command = f"path-attn bench {args.what} --lengths {sizes} --threads {args.threads}"
        command += f" --repeats {args.repeats}"
        write_bench(
            args.json,
            package="path-attn",
            version=__version__,
            command=command,
            correctness=correctness,
            rows=rows,
            notes=notes,
        )
    return 0


def _line(row: dict) -> str:
    measured = (
        f"{row['median_ms']:10.2f} ms" if "median_ms" in row else f"{row['bytes'] / 2**20:8.1f} MiB"
    )
    share = f"  {row['fraction_of_limit']:5.0%} of the limit" if "fraction_of_limit" in row else ""
    return f"{row['name']:<18} {row['shape']:<24} {row['impl']:<28} {measured}{share}"


# --------------------------------------------------------------------------------------------------
# Attention


def inputs(length: int, *, batch: int = 1, grad: bool = False) -> list[Tensor]:
    """q, k, v, w `[B, T, H, K]`, beta and g `[B, T, H]`, float32."""
    q, k, v, w = (torch.randn(batch, length, HEADS, DIM) for _ in range(4))
    beta = 2 * torch.rand(batch, length, HEADS).sigmoid()
    g = F.logsigmoid(torch.randn(batch, length, HEADS) + 4)
    return [x.requires_grad_(grad) for x in (q, k, v, F.normalize(w, dim=-1), beta, g)]


def attention_implementations() -> dict[str, Callable[..., Tensor]]:
    """Functions of `(q, k, v, w, beta, g)` to `[B, T, H, V]`; fla's where it is installed."""
    found: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v, w, beta, g: path_attention(q, k, v, w, beta)[0],
        f"{OURS} (gates)": lambda q, k, v, w, beta, g: path_attention(
            q, k, v, w, beta, g, gate_scale="fla"
        )[0],
        GLOBAL: lambda q, k, v, w, beta, g: global_path_attention(q, k, v, w, beta),
        SDPA: _rope_sdpa,
    }
    try:
        from fla.ops.path_attn.naive import naive_path_attn  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found
    found[FLA] = lambda q, k, v, w, beta, g: naive_path_attn(q, k, v, w, beta, g, DIM**-0.5)
    return found


def _rope_sdpa(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    half = torch.arange(0, DIM, 2) / DIM
    angle = torch.arange(q.shape[1])[:, None] * 10000.0**-half
    cos, sin = (torch.cat([x, x], -1)[:, None] for x in (angle.cos(), angle.sin()))

    def turn(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return (x * cos + torch.cat([-right, left], -1) * sin).transpose(1, 2)

    return F.scaled_dot_product_attention(
        turn(q), turn(k), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)


def bench_attention(lengths: tuple[int, ...], repeats: int) -> tuple[dict, list[dict], list[str]]:
    """Forward, and forward with backward."""
    impls = attention_implementations()
    correctness = _check_attention(impls)
    rate = matmul_rate()
    rows = []
    for length in lengths:
        shape = f"B1 T{length} H{HEADS} d{DIM}"
        flops = 2 * length**2 * DIM * HEADS  # causal QK^T and PV: half of 4 T^2 d
        for name, grad in (("forward", False), ("forward+backward", True)):
            chosen = dict(impls)
            if length > TIMED_GLOBAL_LIMIT:
                chosen.pop(GLOBAL)
            if grad and length > TIMED_GRADIENT_LIMIT:
                chosen.pop(GLOBAL, None)
                chosen.pop(FLA, None)
            args = inputs(length, grad=grad)
            calls = {impl: _call(run, args, grad) for impl, run in chosen.items()}
            for impl, seconds in in_turns(calls, repeats).items():
                work = flops * (3.5 if grad else 1)
                rows.append(
                    {
                        "name": name,
                        "impl": impl,
                        "shape": shape,
                        "dtype": "float32",
                        **_quantiles(seconds),
                        "flops": work,
                        "achieved": work / _median(seconds),
                        "limit": rate,
                        "fraction_of_limit": work / _median(seconds) / rate,
                    }
                )
    notes = [
        "flops: what causal softmax attention alone needs, 2 T^2 d per head forward and 3.5 times "
        "that with backward; limit: float32 matrix-product rate measured in this run, FLOP/s.",
        f"The global form is timed up to T = {TIMED_GLOBAL_LIMIT}, the backward pass of it and of "
        f"fla's reference up to {TIMED_GRADIENT_LIMIT}: they take minutes beyond.",
        "fla naive computes the gated form; compare it with 'path-attn (gates)'.",
    ]
    if FLA not in impls:
        notes.append("fla-core is not installed, so its reference is not in this table.")
    return correctness, rows, notes


def _check_attention(impls: dict[str, Callable[..., Tensor]]) -> dict:
    args = inputs(512)
    double = [x.double() for x in args]
    plain = global_path_attention(*double[:5])
    gated = global_path_attention(*double, gate_scale="fla")
    errors = {}
    for impl, run in impls.items():
        if impl != SDPA:
            target = gated if impl == FLA or "gates" in impl else plain
            errors[impl] = float((run(*args).double() - target).abs().max())
    worst = max(errors.values())
    if not worst <= TOLERANCE:
        raise UserError(f"results disagree, no speed is shown: {errors}")
    return {
        "gate": f"max |error| against the float64 global form at T = 512 <= {TOLERANCE}",
        "max_err": worst,
    }


def _call(run: Callable[..., Tensor], args: list[Tensor], grad: bool) -> Callable[[], object]:
    if not grad:

        def forward() -> object:
            with torch.no_grad():
                return run(*args)

        return forward

    def both() -> object:
        out = run(*args)
        used = [x for x in args if x.requires_grad]
        return torch.autograd.grad(out.sum(), used, allow_unused=True)

    return both


# --------------------------------------------------------------------------------------------------
# Peak memory, each implementation in a process of its own


def bench_memory(lengths: tuple[int, ...], repeats: int) -> tuple[dict, list[dict], list[str]]:
    """Growth of the resident set over one forward, and one forward with backward."""
    correctness = _check_attention(attention_implementations())
    rows = []
    for length in lengths:
        for impl in attention_implementations():
            for name in ("forward", "forward+backward"):
                if name != "forward" and impl in (GLOBAL, FLA) and length > GLOBAL_GRADIENT_LIMIT:
                    continue
                words = [
                    sys.executable,
                    "-m",
                    "path_attn",
                    "bench",
                    "memory",
                    "--lengths",
                    str(length),
                ]
                words += ["--threads", str(torch.get_num_threads()), "--peak-of", f"{impl}|{name}"]
                done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 (itself)
                if done.returncode:
                    raise UserError(f"{impl} at T = {length} failed: {done.stderr.strip()[-300:]}")
                shape = f"B1 T{length} H{HEADS} d{DIM}"
                peak = int(done.stdout.split()[-1])
                rows.append(
                    {"name": name, "impl": impl, "shape": shape, "dtype": "float32", "bytes": peak}
                )
    return (
        correctness,
        rows,
        ["bytes: peak resident set minus that before the call, inputs not counted."],
    )


def _peak_bytes(task: str, length: int) -> int:
    impl, name = task.split("|")
    run = attention_implementations()[impl]
    run(*inputs(64))  # loads libraries and starts threads
    args = inputs(length, grad=name != "forward")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    _call(run, args, name != "forward")()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise UserError(
        f"this system's /proc/self/status has no {field}; memory is measured on Linux only"
    )


# --------------------------------------------------------------------------------------------------
# Decoding


def bench_decode(lengths: tuple[int, ...], repeats: int) -> tuple[dict, list[dict], list[str]]:
    """One token at a time.

    Lazily folded, rewritten each token (the paper), and plain softmax without positions.
    """
    rows: list[dict] = []
    errors = []
    bandwidth = read_bandwidth()
    for length in lengths:
        for batch in (1, 8):
            for dtype in (torch.float32, torch.bfloat16):
                walkers = {
                    "path-attn (lazy fold)": Lazy(length, batch, dtype),
                    "keys rewritten each token": Rewriting(length, batch, dtype),
                    "softmax (SDPA)": Plain(length, batch, dtype, sdpa=True),
                    "softmax (matmul)": Plain(length, batch, dtype, sdpa=False),
                }
                if dtype == torch.float32:
                    errors.append(_decode_error(batch))
                # 128 tokens a run: two folds' worth, so their cost is in the average.
                calls = {impl: _tokens(walker, 128) for impl, walker in walkers.items()}
                size = 2 * batch * HEADS * length * DIM * dtype.itemsize
                for impl, seconds in in_turns(
                    calls, repeats, reset=[w.reset for w in walkers.values()]
                ).items():
                    seconds = [s / 128 for s in seconds]
                    rows.append(
                        {
                            "name": "decode step",
                            "impl": impl,
                            "shape": f"B{batch} T{length} H{HEADS} d{DIM}",
                            "dtype": str(dtype).removeprefix("torch."),
                            **_quantiles(seconds),
                            "bytes": size,
                            "achieved": size / _median(seconds),
                            "limit": bandwidth,
                            "fraction_of_limit": size / _median(seconds) / bandwidth,
                        }
                    )
    notes = [
        "Mean over 128 consecutive tokens, folds included; bytes: keys and values read once; "
        "limit: read bandwidth of a large array measured in this run, bytes/s. Caches that fit the "
        "processor's own cache can exceed it.",
    ]
    return (
        {"gate": "lazy fold equals rewriting each token to 1e-4", "max_err": max(errors)},
        rows,
        notes,
    )


def _tokens(walker: "Lazy | Plain", count: int) -> Callable[[], object]:
    def decode() -> object:
        with torch.inference_mode():
            return [walker.step() for _ in range(count)]

    return decode


class Lazy:
    """Our cache."""

    def __init__(self, length: int, batch: int, dtype: torch.dtype) -> None:
        self.length = length
        q, k, v, w, beta, _ = inputs(length, batch=batch)
        self.cache = PaTHKVCache()
        self.prompt = [*(x.to(dtype) for x in (q, k, v)), w, beta]
        path_attention(*self.prompt, cache=self.cache)
        self.token = [x[:, :1].clone() for x in self.prompt]

    def step(self) -> Tensor:
        """Decode one token."""
        return path_attention_decode(*self.token, cache=self.cache)

    @torch.inference_mode()
    def reset(self) -> None:
        """Go back to the prompt."""
        self.cache = PaTHKVCache()
        path_attention(*self.prompt, cache=self.cache)


class Plain:
    """An ordinary preallocated key/value cache and softmax attention."""

    def __init__(self, length: int, batch: int, dtype: torch.dtype, sdpa: bool) -> None:
        q, k, v, self.w, self.beta, _ = inputs(length, batch=batch)
        self.start = self.length = length
        self.k, self.v = (
            F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, 256)).contiguous() for x in (k, v)
        )
        self.token = [x[:, :1].transpose(1, 2).to(dtype) for x in (q, k, v)]
        self.attend = F.scaled_dot_product_attention if sdpa else self._matmul

    def step(self) -> Tensor:
        """Decode one token."""
        q, k, v = self.token
        self.k[:, :, self.length : self.length + 1] = k
        self.v[:, :, self.length : self.length + 1] = v
        self.length += 1
        return self.attend(q, self.k[:, :, : self.length], self.v[:, :, : self.length])

    def _matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * DIM**-0.5) @ k.mT).softmax(-1) @ v

    def reset(self) -> None:
        """Go back to the prompt."""
        self.length = self.start


class Rewriting(Plain):
    """The paper's decoding.

    Every cached key is multiplied by the new H, then plain softmax attention.
    """

    def __init__(self, length: int, batch: int, dtype: torch.dtype) -> None:
        super().__init__(length, batch, dtype, sdpa=False)
        full = inputs(length, batch=batch)
        if dtype == torch.float32:
            cache = PaTHKVCache()
            path_attention(*full[:5], cache=cache)
            cache.flush()
            self.k[:, :, :length] = cache.folded_keys
        self.w_row = self.w[:, 0, :, None].to(dtype)  # [B, H, 1, K]
        self.w_beta = (self.w[:, 0] * self.beta[:, 0, :, None])[:, :, None].to(dtype)

    def step(self) -> Tensor:
        """Rewrite the keys, then decode one token."""
        keys = self.k[:, :, : self.length]
        keys.addcmul_(keys @ self.w_row.mT, self.w_beta, value=-1)
        return super().step()


def _decode_error(batch: int) -> float:
    """Largest difference between decoding with the lazy cache and by rewriting all keys.

    Over 200 tokens.
    """
    tokens = inputs(200, batch=batch)[:5]
    q, k, v, w, beta = (x.transpose(1, 2) for x in tokens)
    cache = PaTHKVCache()
    path_attention(*(x[:, :1] for x in tokens), cache=cache)
    keys, worst = k[:, :, :1].clone(), 0.0
    for t in range(1, 200):
        row = w[:, :, t, None]
        keys = keys - beta[:, :, t, None, None] * (keys @ row.mT) * row
        keys = torch.cat([keys, k[:, :, t : t + 1]], 2)
        weights = (q[:, :, t : t + 1] @ keys.mT * DIM**-0.5).softmax(-1)
        expected = (weights @ v[:, :, : t + 1]).transpose(1, 2)
        out = path_attention_decode(*(x[:, t : t + 1] for x in tokens), cache=cache)
        worst = max(worst, float((out - expected).abs().max()))
    if not worst <= 1e-4:
        raise UserError(
            f"decoding disagrees with rewriting every key by {worst:.2e}; no speed is shown"
        )
    return worst


# --------------------------------------------------------------------------------------------------
# Clocks


def in_turns(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    reset: list[Callable[[], None]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call: one warm-up each, then `repeats` rounds in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1, repeats):
        for clear in reset or []:
            clear()
        names = list(calls) if round_ % 2 else list(calls)[::-1]
        for name in names:
            start = time.perf_counter()
            calls[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))] * 1e3

    return {
        "median_ms": _median(seconds) * 1e3,
        "p20_ms": at(0.2),
        "p80_ms": at(0.8),
        "n": len(seconds),
    }


def matmul_rate(size: int = 2048) -> float:
    """Float32 matrix-product rate of this machine with the current threads, FLOP/s."""
    x = torch.randn(size, size)
    best = min(in_turns({"matmul": lambda: x @ x}, 5)["matmul"])
    return 2 * size**3 / best


def read_bandwidth(size: int = 2**28) -> float:
    """Bytes per second at which a large float32 array is summed."""
    x = torch.ones(size // 4)
    best = min(in_turns({"read": x.sum}, 5)["read"])
    return size / best
