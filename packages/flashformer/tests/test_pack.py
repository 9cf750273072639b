"""Tiles: packing and unpacking give the same matrix back, and the layout is the one documented."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashformer.pack import Packed, bytes_of, gate_order, pack, padded_k, tile_bytes, unpack
from flashformer.plan import TILE
from flashformer.quant import FORMATS, quantize


def matrix(format, rows, k, *, group=32, symmetric=True, seed=0):
    noise = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, k, generator=noise)
    return quantize(w, format, group=group, symmetric=symmetric)


FORMATS_OF = st.sampled_from(
    [("fp32", 32, True), ("bf16", 32, True), ("int8", 32, True)]
    + [("int4", g, s) for g in (32, 64, 128) for s in (True, False)]
)


@given(FORMATS_OF, st.integers(1, 50), st.integers(1, 5), st.integers(0, 31), st.integers(0, 9))
def test_unpacking_gives_the_matrix_back(kind, rows, steps, odd, seed):
    format, group, symmetric = kind
    k = steps * group if format == "int4" else max(1, steps * 32 - odd)
    made = matrix(format, rows, k, group=group, symmetric=symmetric, seed=seed)
    tiles = pack(made)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == (-(-rows // TILE), tile_bytes(made))
    back = unpack(tiles, made)
    assert torch.equal(back.values[:rows], made.values)
    assert torch.equal(back.dense()[:rows], made.dense())
    assert (back.dense()[rows:] == 0).all()  # padding adds nothing
    assert (back.format, back.group, back.zeros) == (made.format, made.group, made.zeros)


@given(FORMATS_OF, st.integers(1, 40), st.integers(0, 9), st.randoms(use_true_random=False))
def test_rows_go_where_the_order_says(kind, rows, seed, random):
    format, group, symmetric = kind
    made = matrix(format, rows, 128, group=group, symmetric=symmetric, seed=seed)
    count = TILE * random.randint(1, 4)
    order = torch.tensor([random.randint(-1, rows - 1) for _ in range(count)])
    back = unpack(pack(made, order), made).dense()
    expected = made.dense()[order.clamp(min=0)] * (order >= 0)[:, None]
    assert torch.equal(back, expected)


@given(st.integers(1, 70))
def test_the_gate_order_puts_each_gate_beside_its_up(intermediate):
    order = gate_order(intermediate)
    assert len(order) == -(-intermediate // 8) * TILE
    for tile in order.reshape(-1, 2, 8).tolist():
        for gate, up in zip(*tile, strict=True):
            assert (up, gate) == ((-1, -1) if gate < 0 else (gate + intermediate, gate))
    used = sorted(order[order >= 0].tolist())
    assert used == list(range(2 * intermediate))


def test_bf16_and_fp32_tiles_lie_as_documented():
    made = matrix("bf16", 20, 40)
    laid = pack(made).view(torch.bfloat16).reshape(2, 64 // 2, 16, 2)
    assert laid[1, 3, 2, 1] == made.values[18, 7]
    assert (laid[1, :, 4:] == 0).all()
    assert (laid[:, 20:] == 0).all()
    made = matrix("fp32", 20, 40)
    assert pack(made).view(torch.float32).reshape(2, 64, 16)[1, 7, 2] == made.values[18, 7]


def test_int8_tiles_lie_as_documented():
    made = matrix("int8", 20, 40)
    tiles = pack(made)
    body = tiles[:, : 64 * 16].contiguous().view(torch.int8).reshape(2, 16, 16, 4)
    assert body[1, 5, 3, 2] == made.values[19, 22]
    scales = tiles[:, 64 * 16 :].contiguous().view(torch.float32)
    assert torch.equal(scales.flatten()[:20], made.scale)
    assert (scales.flatten()[20:] == 0).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_tiles_lie_as_documented(group, symmetric):
    made = matrix("int4", 20, 256, group=group, symmetric=symmetric)
    size = group * 8 + 32 + (0 if symmetric else 16)
    blocks = pack(made).reshape(2, 256 // group, size)
    tile, block, step, lane, byte = 1, 1, 3, 2, 1
    k = block * group + 8 * step + byte
    found = int(blocks[tile, block, (step * 16 + lane) * 4 + byte])
    assert (found & 15, found >> 4) == (made.values[18, k], made.values[18, k + 4])
    scales = blocks[tile, block, group * 8 : group * 8 + 32].contiguous().view(torch.float16)
    assert scales[lane] == made.scale[18, block]
    if not symmetric:
        assert blocks[tile, block, group * 8 + 32 + lane] == made.zero[18, block]


def test_bytes_of_a_tile():
    assert bytes_of("fp32", 64) == 64 * 16 * 4
    assert bytes_of("bf16", 64) == 64 * 16 * 2
    assert bytes_of("int8", 64) == 64 * 16 + 64
    assert bytes_of("int4", 128, 32) == 128 * 8 + 4 * 32
    assert bytes_of("int4", 128, 128, True) == 128 * 8 + 32 + 16


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_stays_as_it_is(format):
    made = matrix(format, 40, 128)
    tiles = pack(made)
    packed = Packed(made.format, made.group, made.zeros, made.shape, tiles)
    assert pack(packed) is tiles
    assert padded_k(packed) == padded_k(made)
    assert tile_bytes(packed) == tile_bytes(made)
    assert torch.equal(unpack(tiles, packed).dense()[:40], made.dense())


def test_packing_leaves_the_matrix_as_it_was():
    for format in FORMATS:
        made = matrix(format, 20, 64, symmetric=False)
        before = made.dense().clone()
        pack(made, torch.full((16,), -1))
        assert torch.equal(made.dense(), before)
