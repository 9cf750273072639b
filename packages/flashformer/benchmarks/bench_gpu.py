"""Milliseconds a token on a CUDA GPU, beside transformers and a CUDA graph of cuBLAS products.

    python benchmarks/bench_gpu.py --json out.json [--minutes 8] [--quick]

First a gate: both modes against the CPU back-end in every format, and a model in bfloat16 that must
be as near to its float32 logits as transformers in bfloat16 is. Then for each shape, with random
weights: the waits of the grid alone, the stream of weights alone (the practical ceiling), the one
kernel, the graph of kernels, and the peers, all in one process and in turns. The limit is the bytes
of a token over the bandwidth that a copy reaches on this GPU. What does not fit into the time left,
or does not run, is named in the notes.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashformer._version import __version__
from flashformer.backends.cpu import CPUBackend
from flashformer.backends.cuda import CUDABackend
from flashformer.backends.cuda_build import MODES
from flashformer.cache import KVCache
from flashformer.config import ModelSpec
from flashformer.pack import bytes_of
from flashformer.plan import Plan, chunk_for
from flashformer.quant import Matrix
from flashformer.weights import LayerWeights, ModelWeights, read_weights, rotary_tables
from tenfold_common.cli import base_parser, run
from tenfold_common.errors import TenfoldError, UserError
from tenfold_common.results import write_bench

TOKENS = 32  # of one call
ROUNDS = 9
CONTEXTS = (1, 512, 4096)
DEVICE = "cuda:0"
Todo = dict[str, tuple[Callable[[], object], int]]  # what to call, and tokens of a call
EXPECTED = (RuntimeError, ValueError, TenfoldError, ImportError)  # of peers that do not run here


@dataclass(frozen=True)
class Shape:
    """A model by its sizes; random weights stand in for real ones."""

    name: str
    kind: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    def config(self) -> Any:
        """Its config of transformers."""
        import transformers

        return getattr(transformers, f"{self.kind}Config")(
            hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, vocab_size=self.vocab, num_hidden_layers=self.layers,
            max_position_embeddings=131072, tie_word_embeddings=False, eos_token_id=None,
            bos_token_id=None, pad_token_id=None,
        )  # fmt: skip


LLAMA_1B = Shape("Llama-3.2-1B", "Llama", 2048, 8192, 32, 8, 64, 128256, 16)
LLAMA_8B = Shape("Llama-3.1-8B", "Llama", 4096, 14336, 32, 8, 128, 128256, 32)
QWEN_06B = Shape("Qwen3-0.6B", "Qwen3", 1024, 3072, 16, 8, 128, 151936, 28)
QWEN_8B = Shape("Qwen3-8B", "Qwen3", 4096, 12288, 32, 8, 128, 151936, 36)
RUNS = [  # the most telling first
    (LLAMA_1B, "bf16"), (LLAMA_8B, "bf16"), (LLAMA_8B, "int4"), (LLAMA_1B, "int8"),
    (QWEN_06B, "bf16"), (LLAMA_8B, "int8"), (LLAMA_1B, "int4"), (QWEN_8B, "bf16"),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit 1 if a result is wrong."""
    parser = base_parser("bench_gpu.py", (__doc__ or "").splitlines()[0], __version__)
    parser.add_argument("--json", type=Path, help="result file (default: $OUT or out/gpu)")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this (default: 8)")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU; `flashformer bench` measures on a CPU")
    path = args.json or Path(os.environ.get("OUT", "out/gpu")) / "bench_gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    bandwidth = measure_copy()
    notes = [
        f"limit: bytes over {bandwidth / 1e9:.0f} GB/s, what a copy of 1 GiB reaches here",
        f"ours: calls of {TOKENS} tokens with read-back, a token's share; peers: single steps",
    ]
    wrong, worst = gate(notes)
    if wrong:
        print(f"wrong results: {wrong}; no numbers", file=sys.stderr)
        return 1
    rows: list[dict] = []

    def save() -> None:
        write_bench(
            path,
            package="flashformer",
            version=__version__,
            command="python benchmarks/bench_gpu.py",
            correctness={"gate": "all formats and modes against the CPU back-end; "
                         "KL of bf16 from fp32 at most that of transformers", "max_err": worst},
            rows=rows,
            notes=notes,
        )  # fmt: skip

    for shape, format in RUNS[: 1 if args.quick else None]:
        if time.monotonic() > deadline - 20:
            notes.append(f"no time left for {shape.name} {format}")
            continue
        rows += bench(shape, format, bandwidth, deadline, notes)
        save()
    print(f"{len(rows)} rows in {path}")
    return 0


# --------------------------------------------------------------------------------------------------
# Right results first


def gate(notes: list[str]) -> tuple[str, float]:
    """Return what is wrong, or nothing, and the largest error relative to the largest logit."""
    worst = 0.0
    for format in ("fp32", "bf16", "int8", "int4"):
        model, spec, weights = small_model(format)
        cache = "fp32" if format == "fp32" else "bf16"
        tokens = torch.arange(200) * 7919 % spec.vocab
        expected, same = feed(CPUBackend(Plan.make(spec, 2), weights, cache_format=cache), tokens)
        for mode in MODES[::-1]:
            workers = torch.cuda.get_device_properties(DEVICE).multi_processor_count
            plan = Plan.make(spec, workers, chunk=32)
            backend = CUDABackend(plan, weights, cache_format=cache, device=DEVICE, mode=mode)
            logits, chosen = feed(backend, tokens)
            error = ((logits - expected).abs().max() / expected.abs().max()).item()
            print(f"gate {format} {mode}: {error:.1e}", flush=True)
            if not error < (1e-4 if format in ("fp32", "bf16") else 3e-2) or chosen != same:
                return f"{format} {mode}: error {error:.2e}, tokens {chosen} for {same}", error
            worst = max(worst, error)
            if format == "bf16":
                exact, theirs = their_logits(model, tokens)
                ours, native = divergence(exact, logits), divergence(exact, theirs)
                notes.append(f"KL from fp32, {mode}: {ours:.2e}; transformers bf16: {native:.2e}")
                if not ours <= native:
                    return f"bf16 {mode}: KL {ours:.2e}, transformers {native:.2e}", worst
    return "", worst


def small_model(format: str) -> tuple[Any, ModelSpec, ModelWeights]:
    """Return a transformers model in float32 of weights that bfloat16 holds, and it packed."""
    import transformers

    torch.manual_seed(0)
    config = Shape("small", "Qwen3", 512, 1536, 8, 4, 64, 4001, 4).config()
    model = transformers.Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * 2 if weight.ndim == 2 else weight).bfloat16())
    spec = ModelSpec.from_config(config)
    weights = read_weights(
        spec, model.state_dict(), rotary_tables(model, 256), format=format, group=128, head=format
    )
    return model, spec, weights


def feed(backend: Any, tokens: Tensor) -> tuple[Tensor, list[int]]:
    """Return logits after every token and the next four tokens, on the CPU."""
    spec, device = backend.plan.spec, backend.device
    cache = cache_on(device, spec, 256, backend.cache_format)
    logits = torch.zeros(len(tokens) + 3, spec.vocab, device=device)
    chosen = backend.decode(
        cache.keys, cache.values, tokens.to(device), position=0, new=4, logits=logits, threads=2
    )
    return logits.cpu(), chosen.tolist()


def their_logits(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what transformers gives in float32 and in bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(DEVICE, dtype)
        with torch.inference_mode():
            found.append(model(tokens[None].to(DEVICE)).logits[0].float().cpu())
    return found[0], found[1]


def divergence(exact: Tensor, other: Tensor) -> float:
    """Mean KL of softmax(other) from softmax(exact), over the positions of `exact`."""
    logs = [torch.log_softmax(t[: len(exact)].double(), -1) for t in (exact, other)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()


def cache_on(device: Any, spec: ModelSpec, room: int, format: str) -> KVCache:
    """Return an empty cache on a device."""
    cache = KVCache(spec, room, format=format)
    cache.keys, cache.values = ([t.to(device) for t in ts] for ts in (cache.keys, cache.values))
    return cache


# --------------------------------------------------------------------------------------------------
# Timing


def measure_copy() -> float:
    """Bandwidth of reading and writing 1 GiB, bytes/s."""
    source = torch.zeros(1 << 30, device=DEVICE, dtype=torch.uint8)
    target = torch.zeros_like(source)
    for _ in range(20):  # clocks rise
        target.copy_(source)
    return 2 * (1 << 30) / statistics.median(timed(lambda: target.copy_(source)) for _ in range(9))


def timed(function: Callable[[], object]) -> float:
    """Seconds until the GPU is done with a call, seen from the host."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def bench(
    shape: Shape, format: str, bandwidth: float, deadline: float, notes: list[str]
) -> list[dict]:
    """Time one shape in one format at all contexts."""
    spec = ModelSpec.from_config(shape.config())
    weights = random_weights(spec, format)
    streamed = sum(
        -(-m.shape[0] // 16) * bytes_of(m.format, m.shape[1], m.group, m.zeros)
        for m in [*(getattr(x, n) for x in weights.layers for n in MATRICES), weights.head]
    )
    room = max(CONTEXTS) + 4 * TOKENS
    workers = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    plan = Plan.make(spec, workers, chunk=chunk_for(spec, workers, room))
    begin = time.monotonic()
    first = CUDABackend(plan, weights, cache_format="bf16", device=DEVICE)
    ours = {"megakernel": first, "graph": first.in_mode("graph")}
    notes.append(f"{shape.name} {format}: packed and compiled in {time.monotonic() - begin:.1f} s")
    del weights
    cache = cache_on(DEVICE, spec, room, "bf16")
    logits = torch.zeros(spec.vocab, device=DEVICE)
    given = torch.ones(1, dtype=torch.int64, device=DEVICE)

    def call(mode: str, position: int) -> None:
        ours[mode].decode(
            cache.keys, cache.values, given, position=position, new=TOKENS, logits=logits
        )

    rows = probes(ours["megakernel"], lambda: call("megakernel", 1), shape, format, bandwidth)
    peers = make_peers(shape, format, spec, room, deadline, notes)
    per_position = 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim
    for context in CONTEXTS:
        if time.monotonic() > deadline:
            notes.append(f"no time left for {shape.name} {format} at {context}")
            break
        todo: Todo = {
            f"flashformer {mode}": (partial(call, mode, context), TOKENS) for mode in MODES
        }
        todo |= {name: (partial(peer, context), 1) for name, peer in peers.items()}
        seconds = in_turns(todo, shape, notes)
        moved = streamed + per_position * context
        rows += [
            row(name, f"{shape.name} context {context}", format, times, moved, bandwidth)
            for name, times in seconds.items()
        ]
    return rows


def in_turns(todo: Todo, shape: Shape, notes: list[str]) -> dict[str, list[float]]:
    """Time all in turns, forwards and backwards; what fails is named in the notes."""
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(-2, ROUNDS):  # the first two warm up
        for name in list(todo)[:: 1 if turn % 2 else -1]:
            function, count = todo[name]
            try:
                spent = timed(function) / count
            except EXPECTED as error:
                notes.append(f"{name} does not run {shape.name}: {str(error).splitlines()[0]}")
                del todo[name], seconds[name]
                continue
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def probes(
    backend: CUDABackend, call: Callable[[], None], shape: Shape, format: str, bandwidth: float
) -> list[dict]:
    """Time the waits alone and the stream of weights alone, for the request of a call."""
    runner: Any = backend._runner
    call()

    def waits() -> None:
        backend.model.state.zero_()
        runner.probe_waits(1000)

    both = [[], []]
    for turn in range(-2, ROUNDS):
        for times, probe, count in zip(
            both, (waits, runner.probe_stream), (1000, TOKENS), strict=True
        ):
            spent = timed(probe) / count
            if turn >= 0:
                times.append(spent)
    waited, streamed = both
    return [
        row("waits of the grid alone, each", shape.name, format, waited, None, bandwidth),
        row("stream of weights alone", shape.name, format, streamed, backend.streamed, bandwidth),
    ]


def row(
    impl: str, shape: str, format: str, seconds: list[float], moved: int | None, bandwidth: float
) -> dict:
    """Return a row of the result file, and print it."""
    p20, median, p80 = (statistics.quantiles(seconds, n=10)[i] * 1e3 for i in (1, 4, 7))
    found = {
        "name": "decode", "impl": impl, "shape": shape, "dtype": format,
        "median_ms": median, "p20_ms": p20, "p80_ms": p80, "n": len(seconds),
    }  # fmt: skip
    if moved:
        found |= {
            "bytes": moved, "achieved": moved / median * 1e3, "limit": bandwidth,
            "fraction_of_limit": moved / median * 1e3 / bandwidth,
        }  # fmt: skip
    share = f", {found['fraction_of_limit']:.0%} of the limit" if moved else ""
    print(f"{shape} {format} {impl}: {median:.4f} ms{share}", flush=True)
    return found


# --------------------------------------------------------------------------------------------------
# Models of random weights

MATRICES = ("qkv", "output", "up", "down")


def random_weights(spec: ModelSpec, format: str) -> ModelWeights:
    """Return random weights on the GPU, in a format; the head of int4 in bfloat16."""
    torch.manual_seed(0)
    hidden, ones = spec.hidden, torch.ones(spec.hidden)
    head_norm = torch.ones(spec.head_dim) if spec.qk_norm else None
    layers = tuple(
        LayerWeights(
            qkv=random_matrix(spec.qkv_rows, hidden, format),
            output=random_matrix(hidden, spec.attended, format),
            up=random_matrix(2 * spec.intermediate, hidden, format),
            down=random_matrix(hidden, spec.intermediate, format),
            norm1=ones,
            norm2=ones,
            query_norm=head_norm,
            key_norm=head_norm,
        )
        for _ in range(spec.layers)
    )
    angles = torch.arange(max(CONTEXTS) + 4 * TOKENS)[:, None] * 1e4 ** -torch.linspace(
        0, 1, spec.rotary // 2
    )
    return ModelWeights(
        layers=layers,
        norm=ones,
        head=random_matrix(spec.vocab, spec.hidden, "bf16" if format == "int4" else format),
        embedding=torch.randn(spec.vocab, spec.hidden, device=DEVICE, dtype=torch.bfloat16),
        cos=angles.cos(),
        sin=angles.sin(),
    )


def random_matrix(rows: int, k: int, format: str) -> Matrix:
    """Return a random matrix whose products keep the size of the input."""
    size = k**-0.5
    if format == "bf16":
        values = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
        return Matrix("bf16", values.mul_(size))
    if format == "int8":
        values = torch.randint(-127, 128, (rows, k), device=DEVICE, dtype=torch.int8)
        return Matrix("int8", values, torch.full((rows,), size / 73, device=DEVICE))
    values = torch.randint(0, 16, (rows, k), device=DEVICE, dtype=torch.uint8)
    scale = torch.full((rows, k // 128), size / 4.6, device=DEVICE, dtype=torch.float16)
    return Matrix("int4", values, scale, None, 128)


# --------------------------------------------------------------------------------------------------
# Peers: each takes a context and decodes one token


def make_peers(
    shape: Shape, format: str, spec: ModelSpec, room: int, deadline: float, notes: list[str]
) -> dict[str, Callable[[int], object]]:
    """Return the peers that have this format."""
    peers: dict[str, Callable[[int], object]] = {}
    makers = {"CUDA graph of cuBLAS products alone (bf16)": lambda: cublas_graph(spec)}
    if format == "bf16":
        makers["transformers eager"] = lambda: transformers_eager(shape, room)
        if shape is LLAMA_1B:
            makers["transformers StaticCache + torch.compile"] = lambda: compiled(shape, room)
    if format == "int4":
        makers["CUDA graph of torch int4 products alone"] = lambda: int4_graph(spec)
    for name, maker in makers.items():
        if time.monotonic() > deadline - 30:
            notes.append(f"no time left for {name}, {shape.name} {format}")
            continue
        try:
            begin = time.monotonic()
            peer = maker()
            peer(1)
            torch.cuda.synchronize()
            notes.append(f"{name}, {shape.name}: ready after {time.monotonic() - begin:.1f} s")
            peers[name] = peer
        except EXPECTED as error:
            notes.append(f"{name} does not run {shape.name}: {str(error).splitlines()[0]}")
    return peers


def products(spec: ModelSpec) -> list[tuple[int, int]]:
    """Rows and K of all products of a token."""
    layer = [
        (spec.qkv_rows, spec.hidden), (spec.hidden, spec.attended),
        (2 * spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate),
    ]  # fmt: skip
    return [*(layer * spec.layers), (spec.vocab, spec.hidden)]


def recorded(step: Callable[[], object]) -> Callable[[int], object]:
    """Record a step as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda context: graph.replay()


def cublas_graph(spec: ModelSpec) -> Callable[[int], object]:
    """Nothing but the products of a token, in bfloat16: the least a graph of cuBLAS calls costs."""
    pairs = [
        (torch.randn(1, k, device=DEVICE, dtype=torch.bfloat16),
         torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16))
        for rows, k in products(spec)
    ]  # fmt: skip

    def step() -> None:
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)

    return recorded(step)


def int4_graph(spec: ModelSpec) -> Callable[[int], object]:
    """The same by torch's int4 kernel, groups of 128, the head in bfloat16."""
    pairs = []
    for rows, k in products(spec)[:-1]:
        values = torch.randint(0, 256, (rows, k // 2), device=DEVICE, dtype=torch.uint8)
        weight = torch.ops.aten._convert_weight_to_int4pack(values, 8)
        scales = torch.ones(k // 128, rows, 2, device=DEVICE, dtype=torch.bfloat16)
        pairs.append((torch.randn(1, k, device=DEVICE, dtype=torch.bfloat16), weight, scales))
    x = torch.randn(1, spec.hidden, device=DEVICE, dtype=torch.bfloat16)
    head = torch.randn(spec.vocab, spec.hidden, device=DEVICE, dtype=torch.bfloat16)

    def step() -> None:
        for vector, weight, scales in pairs:
            torch.ops.aten._weight_int4pack_mm(vector, weight, 128, scales)
        torch.nn.functional.linear(x, head)

    return recorded(step)


def random_model(shape: Shape) -> Any:
    """Return a transformers model of random weights in bfloat16 on the GPU."""
    import transformers

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return getattr(transformers, f"{shape.kind}ForCausalLM")(shape.config()).eval()
    finally:
        torch.set_default_dtype(before)


def stepper(model: Any, forward: Any, room: int) -> Callable[[int], object]:
    """One token of a model with a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=room)
    token = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    @torch.inference_mode()
    def step(context: int) -> Tensor:
        place.fill_(context)
        out = forward(
            input_ids=token, past_key_values=cache, cache_position=place,
            position_ids=place[None], use_cache=True,
        )  # fmt: skip
        return out.logits[0, -1].argmax()

    return step


def transformers_eager(shape: Shape, room: int) -> Callable[[int], object]:
    """Transformers as it is, with a dynamic cache that grows from the context."""
    from transformers import DynamicCache

    model = random_model(shape)
    caches: dict[int, Any] = {}
    token = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)

    @torch.inference_mode()
    def step(context: int) -> Tensor:
        if context not in caches:
            caches.clear()
            cache = caches[context] = DynamicCache()
            for layer in range(shape.layers):
                size = (1, shape.kv_heads, min(context, room), shape.head_dim)
                zeros = torch.zeros(size, device=DEVICE, dtype=torch.bfloat16)
                cache.update(zeros, zeros.clone(), layer)
        out = model(input_ids=token, past_key_values=caches[context], use_cache=True)
        return out.logits[0, -1].argmax()

    return step


def compiled(shape: Shape, room: int) -> Callable[[int], object]:
    """Transformers with a static cache, compiled once."""
    model = random_model(shape)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    step = stepper(model, forward, room)
    for context in (1, 2, 3):
        step(context)
    return step


if __name__ == "__main__":
    raise SystemExit(run(main))
