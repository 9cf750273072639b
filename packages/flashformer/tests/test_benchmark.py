"""Peers decode what ours decodes, GGUF holds the same weights, and no time is shown otherwise."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import flashformer as ff
from flashformer import benchmark
from flashformer.backends.cpu import CPUBackend
from flashformer.benchmark import bench, check, gate_tokens, in_turns, reference_logits, row
from flashformer.peers import EAGER, OURS, Eager, Flash, LlamaCpp, Runner, Static, gguf_rows
from tenfold_common.errors import MissingDependencyError, UserError
from tenfold_common.results import write_bench

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def network(kit: Any) -> Any:
    return kit.model("llama", vocab_size=64, hidden_size=64, intermediate_size=96)


@pytest.fixture
def model(network: Any) -> ff.FlashModel:
    return ff.compile(network, max_len=96, threads=1)


@pytest.fixture
def folder_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CPUBackend.read_bandwidth
    monkeypatch.setattr(CPUBackend, "read_bandwidth", lambda self, n: whole(self, n, 2**20, 2))


class Fake(Runner):
    """Takes a known time, and notes when it is asked."""

    def __init__(self, name: str, seen: list[str], logits: torch.Tensor | None = None) -> None:
        self.name, self.seen, self.found, self.format = name, seen, logits, "fp32"

    def start(self, prompt: torch.Tensor, cache: object = None) -> None:
        pytest.fail("the time is known")

    def rewind(self, length: int) -> None:
        pytest.fail("the time is known")

    def step(self, token: int) -> None:
        pytest.fail("the time is known")

    def seconds(self, token: int, length: int, steps: int) -> float:
        self.seen.append(self.name)
        return 0.01 * steps

    def logits(self, tokens: list[int]) -> torch.Tensor:
        assert self.found is not None
        return self.found


# --------------------------------------------------------------------------------------------------
# bench


def test_rows_of_ours_and_eager_fit_the_schema(model: ff.FlashModel, tmp_path: Path) -> None:
    rows = bench(model, peers=["eager"], contexts=[8, 40], tokens=4, rounds=2)
    assert [(r["impl"], r["context"]) for r in rows] == [
        (OURS, 8), (EAGER, 8), (OURS, 40), (EAGER, 40),
    ]  # fmt: skip
    for found in rows:
        assert found["dtype"] == "fp32"
        assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"]
        assert found["n"] >= 2
        per_second = found["extra"]["tokens_per_second"]
        assert per_second == pytest.approx(1000 / found["median_ms"])
        assert found["achieved"] == pytest.approx(found["bytes"] * per_second)
        assert found["fraction_of_limit"] == pytest.approx(found["achieved"] / found["limit"])
    fields = [{k: v for k, v in r.items() if k != "context"} for r in rows]
    write_bench(
        tmp_path / "b.json", package="flashformer", version="0", command="c",
        correctness={"gate": True, "max_err": None}, rows=fields, notes=[],
    )  # fmt: skip


def test_bytes_of_a_token(model: ff.FlashModel, network: Any) -> None:
    spec = model.spec
    per_layer = (spec.heads + 2 * spec.kv_heads) * spec.head_dim * spec.hidden
    per_layer += spec.heads * spec.head_dim * spec.hidden + 3 * spec.intermediate * spec.hidden
    matrices = 4 * (spec.layers * per_layer + spec.vocab * spec.hidden)
    cache = 2 * spec.layers * 11 * spec.kv_heads * spec.head_dim * 4
    norms = 4 * (2 * spec.layers + 1) * spec.hidden  # the embedding is not read, but for one row
    assert Eager(network).bytes(10) == matrices + norms + cache
    assert Flash(model).bytes(10) == model.backend.streamed + cache
    assert matrices <= model.backend.streamed <= 1.2 * matrices


def test_attention_windows_limit_the_bytes(kit: Any) -> None:
    windowed = Eager(kit.model("mistral"))  # sees 5 positions
    assert windowed.bytes(4) == windowed.bytes(90)
    assert windowed.bytes(3) < windowed.bytes(4)


def test_wrong_logits_give_no_times(model: ff.FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Flash.logits
    monkeypatch.setattr(Flash, "logits", lambda *args: right(*args).roll(1))
    with pytest.raises(UserError, match=r"logits of flashformer \(fp32\) are off .* no time is"):
        bench(model, peers=[], contexts=[8], tokens=2, rounds=1)


def test_weights_that_changed_are_refused(kit: Any) -> None:
    network = kit.model("llama")
    model = ff.compile(network, max_len=96, threads=1)
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    with pytest.raises(UserError, match="changed since it was compiled"):
        bench(model, contexts=[8])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"peers": ["eagre"]}, "not 'eagre'. Did you mean 'eager'"),
        ({"peers": "eager"}, "must be a list of names"),
        ({"contexts": []}, "at least one number"),
        ({"contexts": 64}, "at least one number"),
        ({"contexts": [0]}, "contexts must be whole numbers of at least 1, not 0"),
        ({"tokens": 0}, "tokens must be"),
        ({"rounds": True}, "rounds must be"),
        ({"contexts": [8, 90]}, "context 90 and 32 tokens are over the model's max_len 96"),
    ],
)
def test_wrong_arguments(model: ff.FlashModel, named: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench(model, **named)


def test_a_loaded_model_has_nothing_to_compare_with(model: ff.FlashModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m")
    with pytest.raises(UserError, match="no transformers model to compare with"):
        bench(ff.load(tmp_path / "m"), contexts=[8])


# --------------------------------------------------------------------------------------------------
# Runners


def greedy(network: Any, tokens: list[int], steps: int) -> list[int]:
    """Greedy tokens without any cache."""
    for _ in range(steps):
        with torch.no_grad():
            tokens = [*tokens, int(network(torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens[-steps:]


@pytest.mark.parametrize("kind", ["ours", "ours, 2 at a time", "eager", "static"])
@pytest.mark.parametrize("given", [False, True], ids=["reads", "given"])
def test_runners_return_to_their_place(
    network: Any, kind: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DynamicCache

    monkeypatch.setattr(torch, "compile", lambda function, **named: function)  # takes too long
    runner: Runner = {
        "ours": lambda: Flash(ff.compile(network, max_len=64, threads=1)),
        "ours, 2 at a time": lambda: Flash(ff.compile(network, max_len=64, threads=1), burst=2),
        "eager": lambda: Eager(network),
        "static": lambda: Static(network, 64),
    }[kind]()
    prompt = torch.tensor([5, 9, 33, 2, 60, 17, 8])
    cache = None
    if given:
        cache = DynamicCache()
        with torch.no_grad():
            network(prompt[None], past_key_values=cache)
    runner.start(prompt, cache)
    wanted = greedy(network, [*prompt.tolist(), 3], 5)
    assert runner.decode(3, 5) == wanted
    runner.rewind(len(prompt))
    assert runner.decode(3, 5) == wanted
    assert runner.seconds(3, len(prompt), 5) > 0
    tokens = gate_tokens(64, 24)
    right = reference_logits(network, tokens)
    assert check([runner], right, {"fp32": 1e-4, "bf16": 0}) < 1e-4
    runner.close()


def test_ours_keeps_to_the_threads_asked_for(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ff.compile(network, max_len=64, threads=2)
    seen: list[int] = []
    whole = model.backend.decode

    def decode(*args: Any, **named: Any) -> Any:
        seen.append(named["threads"])
        return whole(*args, **named)

    monkeypatch.setattr(model.backend, "decode", decode)
    for threads in (1, 2):
        seen.clear()
        runner = Flash(model, threads=threads, burst=4)
        for _ in range(20):
            runner.rewind(0)
            runner.decode(1, 8)
        assert seen == [threads] * 40
    assert model._threads.fixed is None


def test_turns_alternate_and_bursts_fill_them() -> None:
    seen: list[str] = []
    runners = {name: Fake(name, seen) for name in "ab"}
    times = in_turns(runners, length=0, tokens=1, rounds=3)
    turn = 1 + 5  # one that is not timed, then as many of 10 ms as fill 50
    assert "".join(seen[2:]) == "a" * turn + "b" * turn * 2 + "a" * turn * 2 + "b" * turn
    assert all(found == [pytest.approx(0.01)] * 15 for found in times.values())


def test_check_finds_the_worst_and_refuses_nan() -> None:
    right = ([1], torch.tensor([3.0, 4.0, 0.0]))
    near, far = (torch.tensor([3.0, 4.0, x]) for x in (0.05, 0.5))
    gates = {"fp32": 0.1, "bf16": 0.0}
    assert check([Fake("a", [], near)], right, gates) == pytest.approx(0.01)
    assert check([Fake("a", [], far)], right, {"fp32": 0.11, "bf16": 0}) == pytest.approx(0.1)
    for wrong in (torch.tensor([3.0, 4.0, 0.6]), torch.tensor([torch.nan, 4.0, 0.0])):
        with pytest.raises(UserError, match="no time is shown"):
            check([Fake("a", [], near), Fake("b", [], wrong)], right, gates)


def test_row_without_a_limit(network: Any) -> None:
    found = row(Eager(network), "s", [0.002, 0.001, 0.004], 7, None)
    assert found["median_ms"] == pytest.approx(2)
    assert "limit" not in found
    assert "fraction_of_limit" not in found


# --------------------------------------------------------------------------------------------------
# GGUF and llama.cpp


def test_rows_are_reordered_for_pairs_side_by_side() -> None:
    heads, size = 3, 8
    weight = torch.randn(heads * size, 5)
    moved = gguf_rows(weight, heads)
    x, angle = torch.randn(5), torch.rand(size // 2) * 6
    halves = (weight @ x).reshape(heads, size)
    a, b = halves[:, : size // 2], halves[:, size // 2 :]
    turned = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 2)
    pairs = (moved @ x).reshape(heads, size // 2, 2)
    c, d = pairs.unbind(2)
    theirs = torch.stack([c * angle.cos() - d * angle.sin(), d * angle.cos() + c * angle.sin()], 2)
    torch.testing.assert_close(theirs, turned)
    assert not torch.equal(moved, weight)


def test_gguf_holds_the_weights(network: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from flashformer.peers import write_gguf

    kinds = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.02, "int4": 0.3}
    state = network.state_dict()
    for format, bound in kinds.items():
        read = write_gguf(network, tmp_path / format, format)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / format).tensors}
        assert len(tensors) == 3 + 9 * len(network.model.layers)
        assert read == sum(t.n_bytes for n, t in tensors.items() if n != "token_embd.weight")
        for theirs, ours in (
            ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
            ("output.weight", "lm_head.weight"),
        ):
            found = tensors[theirs]
            values = torch.from_numpy(
                np.array(gguf.quants.dequantize(found.data, found.tensor_type))
            )
            right = state[ours]
            assert (values - right).abs().max() <= bound * right.abs().max()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2", {}, "model_type is 'qwen2', it has biases"),
        ("llama-biases", {}, "it has biases"),
        ("mistral", {}, "it has sliding windows"),
        ("rope-linear", {}, "rope_type is 'linear'"),
    ],
)
def test_models_that_are_not_written(
    kit: Any, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("gguf")
    from flashformer.peers import write_gguf

    with pytest.raises(UserError, match=message):
        write_gguf(kit.model(kind, **changes), tmp_path / "x", "bf16")
    assert not (tmp_path / "x").exists()


def test_llama_cpp_that_is_missing_is_named(
    model: ff.FlashModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependencyError, match=r"flashformer\[bench\]"):
        bench(model, peers=["llama.cpp"], contexts=[8])


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_llama_cpp_has_the_logits_of_the_same_weights(
    network: Any, format: str, folder_of_benchmarks: None
) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    gguf_dequantised = script("peers").gguf_dequantised
    runner = LlamaCpp(network, format=format, room=64, threads=1)
    tokens = gate_tokens(64, 24)
    wanted = reference_logits(gguf_dequantised(network, format), tokens)
    gates = {"fp32": 0.01, "bf16": 0.05, "int8": 0.1, "int4": 0.1}  # its cache is in float16
    check([runner], wanted, gates)
    prompt = torch.tensor(tokens)
    runner.start(prompt)
    first = runner.decode(3, 8)
    runner.rewind(len(prompt))
    assert runner.decode(3, 8) == first
    assert runner.seconds(3, len(prompt), 4) > 0
    runner.close()


# --------------------------------------------------------------------------------------------------
# The scripts


def test_random_models_are_the_same_and_of_bfloat16(folder_of_benchmarks: None) -> None:
    peers = script("peers")
    first, low = peers.random_model("5M"), peers.random_model("5M", torch.bfloat16)
    assert 5.0e6 < sum(p.numel() for p in first.parameters()) < 6.0e6
    assert first.lm_head.weight is first.model.embed_tokens.weight
    for mine, theirs in zip(first.parameters(), low.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())
        assert float(mine.std()) > 0
    assert low.model.rotary_emb.inv_freq.dtype == torch.float32


def test_dequantised_models_are_what_ours_computes(
    network: Any, folder_of_benchmarks: None
) -> None:
    peers = script("peers")
    tokens = gate_tokens(64, 24)
    before = reference_logits(network, tokens)[1]
    for format in ("int8", "int4"):
        named: dict[str, Any] = {"weights": format, "group_size": 32, "head": format}
        ours = Flash(ff.compile(network, **named, max_len=64, threads=1, backend="cpu"))
        same = reference_logits(peers.ours_dequantised(network, ours.model), tokens)
        near = check([ours], same, {format: 0.1, "bf16": 0})
        assert near < check([ours], (tokens, before), {format: 1, "bf16": 0})
    assert torch.equal(reference_logits(network, tokens)[1], before)


def test_only_filters_by_kind(folder_of_benchmarks: None) -> None:
    module = script("bench_decode")
    only = module.Only(["5M", "64", "bf16", "eager"], ["5M", "30M", "64", "bf16", "int8", "eager"])
    assert only("5M", module.SIZES)
    assert not only("30M", module.SIZES)
    assert only(64, module.CONTEXTS)
    assert not only(512, module.CONTEXTS)
    assert only("speed", module.PARTS)  # nothing of this kind was named
    with pytest.raises(UserError, match=r"no 'bf61'\. Did you mean 'bf16'"):
        module.Only(["bf61"], ["bf16"])


def test_the_script_from_end_to_end(
    folder_of_benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("bench_decode")
    report = script("report")
    monkeypatch.setattr(module, "SIZES", {"5M": ()})
    monkeypatch.setattr(module, "TOKENS", 4)
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(benchmark, "TURN", 0.001)
    sizes = {"5M": (64, 96, 2, 4, 2, 128)}
    monkeypatch.setattr(sys.modules["peers"], "SIZES", sizes)
    threads = torch.get_num_threads()
    path = tmp_path / "decode_test_20260101.json"
    try:
        words = ["64", "flashformer", "eager", "bf16", "int4"]
        code = module.main(["--json", str(path), "--rounds", "2", "--only", *words])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    rows = report.load_bench(path)["rows"]
    found = {(r["name"], r["impl"], r["dtype"]) for r in rows}
    ours = {f"{OURS}{more}" for more in ("", ", 1 thread", ", 2 threads")}
    assert {n for name, n, d in found if (name, d) == ("decode", "int4")} == ours
    assert {n for name, n, d in found if (name, d) == ("decode", "bf16")} == {*ours, EAGER}
    assert {n for name, n, _ in found if name == "calls"} == {
        "one call a stage", "one call a layer", "one call a token", "one call for 4 tokens",
    }  # fmt: skip
    beside = next(r for r in rows if r["impl"] == "beside 4 busy processes")
    assert beside["extra"]["over_fair"] > 0
    assert all(r["fraction_of_limit"] > 0 for r in rows)
    speed, decode = report.speed_table(path), report.decode_table(path)
    assert speed.splitlines()[0].endswith("| transformers eager, ms |")
    assert len(speed.splitlines()) == 2 + 2
    assert decode.startswith(speed)
    assert "one call a stage" in report.calls_table(path)
    assert "5M bf16: times as fast as transformers eager" in report.aims_table(path)


def test_aims_take_the_worse_context(folder_of_benchmarks: None) -> None:
    report = script("report")

    def made(impl: str, context: int, ms: float) -> dict[str, Any]:
        shape = f"5M, context {context}"
        return {"name": "decode", "impl": impl, "shape": shape, "dtype": "bf16", "median_ms": ms}

    rows = [made(OURS, 64, 0.1), made(OURS, 512, 0.2), made(EAGER, 64, 2), made(EAGER, 512, 2.6)]
    times = report.by_place(rows)
    aim = report.Aim("5M", "bf16", EAGER, "bf16", 15)
    what = "5M bf16: times as fast as transformers eager"
    assert report._compared(times, aim) == [what, "15", "13", "no"]
    assert report._compared(times, aim._replace(times=12)) == [what, "12", "13", "yes"]
    assert report._compared(times, aim._replace(size="30M")) is None
