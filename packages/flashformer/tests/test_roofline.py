"""What a token costs, against numbers worked out by hand for models everyone knows."""

import pytest

import flashformer as ff
from flashformer.config import ModelSpec
from flashformer.pack import tile_bytes
from flashformer.plan import KINDS, Plan, chunk_for
from flashformer.roofline import GPUS
from tenfold_common import UserError


def spec(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, *, window=None, **more):
    return ModelSpec(
        "llama", hidden, intermediate, heads, kv_heads, head_dim, vocab, 1e-5, head_dim, 131072,
        (window,) * layers, (True,) * layers, **more,
    )  # fmt: skip


LLAMA_1B = spec(2048, 8192, 16, 32, 8, 64, 128256, tied=True)
LLAMA_8B = spec(4096, 14336, 32, 32, 8, 128, 128256)
QWEN_06B = spec(1024, 3072, 28, 16, 8, 128, 151936, tied=True, qk_norm=True)


def weights_of(found):
    return sum(row.bytes for row in found.rows if row.kind != "attention")


@pytest.mark.parametrize(
    ("model", "format", "head", "gigabytes", "milliseconds"),
    [
        (LLAMA_1B, "bf16", None, 2.47, 0.575),
        (LLAMA_1B, "int8", None, 1.24, 0.29),
        (LLAMA_1B, "int4", "bf16", 1.03, 0.24),
        (LLAMA_8B, "bf16", None, 15.0, 3.49),
        (LLAMA_8B, "int8", None, 7.5, 1.75),
        (LLAMA_8B, "int4", "bf16", 4.65, 1.08),
        (QWEN_06B, "bf16", None, 1.19, 0.28),
        (QWEN_06B, "int4", "bf16", 0.54, 0.125),
    ],
)
def test_the_floors_of_known_models_on_an_h200(model, format, head, gigabytes, milliseconds):
    found = ff.explain(model, weights=format, head=head, gpu="h200")
    assert weights_of(found) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert (found.workers, found.bandwidth) == (132, 4.3e12)


def test_every_weight_is_counted_once():
    matrices = 16 * (3072 * 2048 + 2048 * 2048 + 3 * 8192 * 2048) + 128256 * 2048
    assert weights_of(ff.explain(LLAMA_1B)) == 2 * matrices
    assert weights_of(ff.explain(LLAMA_1B, weights="fp32")) == 4 * matrices


def test_positions_cost_keys_and_values():
    """131 KB a position for the 8B in bf16."""
    at = {p: ff.explain(LLAMA_8B, position=p).bytes for p in (0, 1, 4095)}
    assert at[1] - at[0] == 131072
    assert at[4095] - at[0] == 4095 * 131072
    wide = [ff.explain(LLAMA_8B, position=p, cache="fp32").bytes for p in (0, 1)]
    assert wide[1] - wide[0] == 2 * 131072


def test_a_window_ends_the_growth():
    slid = spec(4096, 14336, 32, 32, 8, 128, 32000, window=4096)
    at = [ff.explain(slid, position=p).bytes for p in (4094, 4095, 9000)]
    assert at[1] - at[0] == 131072
    assert at[2] == at[1]


def test_barriers_and_rows():
    found = ff.explain(LLAMA_1B, workers=132)
    assert [row.kind for row in found.rows] == list(KINDS)
    assert [row.count for row in found.rows] == [16] * 5 + [1]
    assert (
        sum(row.barriers for row in found.rows) == 5 * 16 + 1 == Plan.make(LLAMA_1B, 132).barriers
    )
    assert sum(row.barriers for row in ff.explain(LLAMA_1B).rows) == 0  # one worker
    assert found.rows[2].imbalance == pytest.approx(132 / 128)
    assert found.rows[1].imbalance == pytest.approx(132 / 8)  # eight parts for 132 workers
    assert found.bytes == sum(row.bytes for row in found.rows)
    few = ff.explain(LLAMA_1B, workers=3).rows[1]
    assert few.imbalance == pytest.approx(3 * 3 / 8)  # eight parts: three workers take 3, 3 and 2


def test_without_a_bandwidth_there_are_no_times():
    found = ff.explain(LLAMA_1B)
    assert found.seconds is None
    assert all(row.seconds is None for row in found.rows)
    assert "tokens/s" not in str(found)
    timed = ff.explain(LLAMA_1B, bandwidth=1e9)
    assert timed.seconds == timed.bytes / 1e9
    assert sum(row.seconds for row in timed.rows) == pytest.approx(timed.seconds)


def test_the_table():
    text = str(ff.explain(LLAMA_1B, gpu="H200", position=512))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:-2]] == list(KINDS)
    assert lines[-2].split()[0] == "token"
    assert lines[-1].startswith("132 workers, position 512, 4300 GB/s: at most ")
    seconds = ff.explain(LLAMA_1B, gpu="h200", position=512).seconds
    assert seconds is not None
    assert int(lines[-1].split()[-2]) == pytest.approx(1 / seconds, abs=1)
    assert len({len(line) for line in lines[:-2]}) == 1


def test_unknown_gpus_are_refused_with_those_known():
    with pytest.raises(
        UserError, match=r"gpu must be one of h200, .* not 'h20'\. Did you mean 'h200'\?"
    ):
        ff.explain(LLAMA_1B, gpu="h20")


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_part_of_the_attention_for_each_unit_where_there_are_enough(name):
    gpu = GPUS[name]
    chunk = chunk_for(LLAMA_8B, gpu.units, 8192)
    parts = len(Plan.make(LLAMA_8B, gpu.units, chunk=chunk).parts(0, 8191))
    assert parts >= 0.8 * gpu.units
    assert chunk_for(LLAMA_8B, gpu.units, 1) == 32
    assert chunk_for(LLAMA_8B, gpu.units, 10**6) == 256


@pytest.mark.parametrize(
    "options", [{}, {"weights": "int8"}, {"weights": "int4", "group_size": 32}]
)
def test_a_compiled_model_explains_what_it_streams(kit, options):
    model = kit.model(hidden_size=64, intermediate_size=96, head_dim=16)
    compiled = ff.compile(model, threads=2, max_len=32, backend="cpu", **options)
    found = compiled.explain(position=9)
    assert weights_of(found) == sum(p.tiles.numel() for p in compiled.backend.packed.values())
    assert found.workers == 2
    assert found.position == 9
    for row, kind in zip(found.rows, KINDS, strict=True):
        mine = [p for n, p in compiled.backend.packed.items() if n.endswith(kind)]
        if kind != "attention":
            assert row.bytes == sum(len(p.tiles) * tile_bytes(p) for p in mine)
    assert compiled.explain(gpu="a100").workers == 108
