"""Speed of the Triton back-end on a CUDA GPU, beside SDPA, fla's PaTH attention and fla's FoX.

    python benchmarks/bench_gpu.py --json out.json [--minutes 7] [--quick]

All implementations run in one process and in turns, on the same inputs, after a check of each
against the float64 definition; one that fails the check or does not run gets a note instead of a
number, and a failed check of our own ends the run. The shapes that matter most come first; what
does not fit into the time left is named in the notes. The limit is the machine's own bf16 matrix
rate (attention) or copy bandwidth (decoding), measured first.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn._version import __version__
from path_attn.ops import path_attention
from path_attn.reference import global_path_attention
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import UserError
from tenfold_common.optional import is_available
from tenfold_common.results import write_bench
from tenfold_common.testing import rms_ratio

OURS, FOX_OURS = "path-attn triton", "path-attn triton (PaTH-FoX)"
SDPA, FLA, FLA_FOX = "SDPA flash", "fla parallel_path_attn", "fla FoX"
TOKENS = 65536
SHAPES = [  # T, head dim, key heads; T = 8192 first because the aims are stated there
    (length, dim, heads)
    for length in (8192, 32768, 2048, 16384, 4096)
    for dim, heads in ((64, 32), (128, 8), (128, 32), (64, 8))
]
QUERY_HEADS = 32
DECODE_SHAPES = [(batch, length) for batch in (16, 1, 64) for length in (4096, 16384, 65536)]
GATE = 1e-2  # RMS error over RMS of the float64 truth, bfloat16


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit 1 if a result is wrong."""
    parser = base_parser("bench_gpu.py", __doc__.splitlines()[0], __version__)
    parser.add_argument("--json", type=Path, help="result file (default: $OUT or out/gpu)")
    parser.add_argument("--minutes", type=float, default=7.0, help="stop after this (default: 7)")
    parser.add_argument("--quick", action="store_true", help="the first two shapes of each kind")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU; `path-attn bench` measures on a CPU")
    path = args.json or Path(os.environ.get("OUT", "out/gpu")) / "bench_gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    notes: list[str] = []
    limits = {"matmul": measure_matmul(), "copy": measure_copy()}
    notes.append(
        f"measured limits: {limits['matmul'] / 1e12:.0f} TFLOP/s, {limits['copy'] / 1e9:.0f} GB/s"
    )
    errors, refused = check(notes)
    worst = max(errors.get(OURS, math.inf), errors.get(FOX_OURS, math.inf))
    if worst > GATE:
        print(f"wrong results: RMS error {worst:.2e} of {OURS}; no numbers", file=sys.stderr)
        return 1
    rows: list[dict] = []

    def save() -> None:
        write_bench(
            path,
            package="path-attn",
            version=__version__,
            command="python benchmarks/bench_gpu.py",
            correctness={"gate": f"RMS error under {GATE} of the float64 form", "max_err": worst},
            rows=rows,
            notes=notes,
        )

    count = 2 if args.quick else None
    attention_deadline = deadline - 60  # a minute for decoding
    for shape in SHAPES[:count]:
        if time.monotonic() > attention_deadline:
            notes.append(f"no time left for T={shape[0]} d={shape[1]} Hkv={shape[2]}")
            continue
        rows += bench_attention(*shape, limits["matmul"], refused, notes, attention_deadline)
        save()
    for shape in DECODE_SHAPES[:count]:
        if time.monotonic() > deadline:
            notes.append(f"no time left for decoding B={shape[0]} T={shape[1]}")
            continue
        rows += bench_decode(*shape, limits["copy"], notes)
        save()
    print(f"{len(rows)} rows in {path}")
    return 0


def timed(function: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds, with the L2 cache flushed between runs."""
    from triton.testing import do_bench

    quantiles = do_bench(function, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
    assert isinstance(quantiles, list | tuple)  # one number per quantile asked for
    p20, median, p80 = quantiles
    return median, p20, p80


def measure_matmul() -> float:
    """Rate of an 8192-cubed bfloat16 matrix product, FLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b)[0] * 1e3


def measure_copy() -> float:
    """Bandwidth of reading and writing 1 GiB, bytes/s."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * (1 << 30) / timed(lambda: target.copy_(source))[0] * 1e3


def make(batch: int, length: int, dim: int, heads: int, query_heads: int = QUERY_HEADS) -> dict:
    """Inputs `[B, T, heads, dim]` in bfloat16; w, beta and gates in float32 as fla wants them."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    inputs = {
        "q": normal(batch, length, query_heads, dim).bfloat16(),
        "k": normal(batch, length, heads, dim).bfloat16(),
        "v": normal(batch, length, heads, dim).bfloat16(),
        "w": F.normalize(normal(batch, length, heads, dim), dim=-1),
        "beta": 2 * torch.sigmoid(normal(batch, length, heads)),
        "g": F.logsigmoid(normal(batch, length, query_heads) + 4),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def implementations() -> dict[str, Callable[[dict], Tensor]]:
    """What can run here: name to a function from inputs to `[B, T, HQ, d]`."""

    def ours(x: dict) -> Tensor:
        return path_attention(x["q"], x["k"], x["v"], x["w"], x["beta"], backend="triton")[0]

    def fox_ours(x: dict) -> Tensor:
        names = ("q", "k", "v", "w", "beta", "g")
        return path_attention(*(x[name] for name in names), backend="triton")[0]

    def sdpa(x: dict) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        grouped = q.shape[1] != k.shape[1]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)

    found = {OURS: ours, SDPA: sdpa, FOX_OURS: fox_ours}
    if is_available("fla"):
        from fla.ops.forgetting_attn import parallel_forgetting_attn
        from fla.ops.path_attn.parallel import parallel_path_attn

        found[FLA] = lambda x: parallel_path_attn(x["q"], x["k"], x["v"], x["w"], x["beta"])[0]
        found[FLA_FOX] = lambda x: parallel_forgetting_attn(x["q"], x["k"], x["v"], x["g"])
    return found


def truths(x: dict) -> dict[str, Tensor]:
    """The float64 definition of what each implementation computes."""
    q, k, v, w, beta, g = (x[name].detach().double() for name in ("q", "k", "v", "w", "beta", "g"))
    path, none = global_path_attention(q, k, v, w, beta), torch.zeros_like(beta)
    fox = global_path_attention(q, k, v, w, none, g)
    plain = global_path_attention(q, k, v, w, none)
    both = global_path_attention(q, k, v, w, beta, g)
    return {OURS: path, FLA: path, SDPA: plain, FLA_FOX: fox, FOX_OURS: both}


def check(notes: list[str]) -> tuple[dict[str, float], set[str]]:
    """RMS error of every implementation, outputs and dq; and who does not run or is wrong."""
    x = make(2, 700, 64, 2, 4)
    expected, errors, refused = truths(x), {}, set()
    for name, function in implementations().items():
        try:
            with torch.no_grad():
                errors[name] = rms_ratio(function(x), expected[name])
        except Exception as error:  # noqa: BLE001  (a peer that does not run is a note, not an end)
            notes.append(f"{name} does not run: {str(error).splitlines()[0][:200]}")
            refused.add(name)
            continue
        if name in (OURS, FOX_OURS):
            errors[name] = max(errors[name], gradient_error(name, function, x))
        if errors[name] > GATE:
            notes.append(f"{name} is wrong: RMS error {errors[name]:.2e}")
            refused.add(name)
    if not is_available("fla"):
        notes.append("fla is not installed")
    return errors, refused


def gradient_error(name: str, function: Callable[[dict], Tensor], x: dict) -> float:
    """Largest RMS error of dq, dk and dv against the float64 definition, halved.

    The gate is for outputs; gradients of a bfloat16 kernel have about twice the error.
    """
    names = ["q", "k", "v"]
    exact = {key: value.detach().double().requires_grad_() for key, value in x.items()}
    words = ["q", "k", "v", "w", "beta"] + (["g"] if name == FOX_OURS else [])
    grad = torch.randn_like(x["q"])
    want = torch.autograd.grad(
        global_path_attention(*(exact[key] for key in words)),
        [exact[n] for n in names],
        grad.double(),
    )
    got = torch.autograd.grad(function(x), [x[n] for n in names], grad)
    return max(rms_ratio(a, b) for a, b in zip(got, want, strict=True)) / 2


def bench_attention(
    length: int,
    dim: int,
    heads: int,
    limit: float,
    refused: set[str],
    notes: list[str],
    deadline: float,
) -> list[dict]:
    """Forward and forward plus backward of everyone at one shape."""
    batch, rows = TOKENS // length, []
    x = make(batch, length, dim, heads)
    grad = torch.randn_like(x["q"])
    shape = f"B={batch} T={length} HQ={QUERY_HEADS} H={heads} d={dim}"
    forward_flops = 4 * batch * QUERY_HEADS * length**2 * dim / 2

    def forward(function: Callable) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(x)

        return call

    def both(function: Callable) -> Callable[[], object]:
        def call() -> None:
            for value in x.values():
                value.grad = None
            function(x).backward(grad)

        return call

    for kind, wrap, flops in (("forward", forward, 1.0), ("forward+backward", both, 3.5)):
        for impl, function in implementations().items():
            if impl in refused or time.monotonic() > deadline:
                continue
            try:
                call = wrap(function)
                started = time.monotonic()
                call()  # compiles and tunes
                torch.cuda.synchronize()
                first = time.monotonic() - started
                torch.cuda.reset_peak_memory_stats()
                median, p20, p80 = timed(call)
            except Exception as error:  # noqa: BLE001  (a shape that a peer refuses is a note)
                notes.append(f"{impl}, {kind}, {shape}: {str(error).splitlines()[0][:160]}")
                torch.cuda.empty_cache()
                continue
            total = forward_flops * flops
            rows.append(
                {
                    "name": kind,
                    "impl": impl,
                    "shape": shape,
                    "dtype": "bfloat16",
                    "median_ms": median,
                    "p20_ms": p20,
                    "p80_ms": p80,
                    "flops": total,
                    "achieved": total / median * 1e3,
                    "limit": limit,
                    "fraction_of_limit": total / median * 1e3 / limit,
                    "extra": {
                        "first_call_s": round(first, 2),
                        "peak_bytes": torch.cuda.max_memory_allocated(),
                    },
                }
            )
            print(f"{kind:18s}{impl:30s}{shape:40s}{median:9.2f} ms", flush=True)
    return rows


def bench_decode(batch: int, length: int, limit: float, notes: list[str]) -> list[dict]:
    """One token against a folded cache: our kernel, and SDPA on the same keys and values."""
    from path_attn.kernels.decode import decode_triton

    heads, group, dim = 8, 4, 128
    size = 2 * batch * heads * length * dim * 2
    shape = f"B={batch} T={length} HQ={heads * group} H={heads} d={dim}"
    if size > torch.cuda.mem_get_info()[0] * 0.6:
        notes.append(f"decoding {shape} does not fit into the memory")
        return []
    k, v = (
        torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    q = torch.randn(batch, heads, group, dim, device="cuda", dtype=torch.bfloat16) * dim**-0.5
    flat = q.flatten(1, 2).unsqueeze(2)

    def ours() -> Tensor:
        return decode_triton(q, k, v)[0]

    def plain() -> Tensor:
        out = F.scaled_dot_product_attention(flat, k, v, scale=1.0, enable_gqa=True)
        return out.reshape(q.shape)

    error = rms_ratio(ours(), plain().float())
    if error > 2 * GATE:
        notes.append(f"decoding {shape}: RMS difference to SDPA {error:.2e}; no numbers")
        return []
    rows = []
    for impl, call in (("path-attn decode kernel", ours), ("SDPA", plain)):
        median, p20, p80 = timed(call)
        rows.append(
            {
                "name": "decode",
                "impl": impl,
                "shape": shape,
                "dtype": "bfloat16",
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "bytes": size,
                "achieved": size / median * 1e3,
                "limit": limit,
                "fraction_of_limit": size / median * 1e3 / limit,
            }
        )
        print(f"{'decode':18s}{impl:30s}{shape:40s}{median:9.3f} ms", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(run(main))
