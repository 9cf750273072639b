"""Weights laid out as they are read: tile after tile of 16 rows, one linear stream for each worker.

A tile of K columns, for every format the 16 rows side by side, so that a register holds one row
in each lane (csrc/cpu/gemv.hpp reads it so):

    fp32  [K][16]                    bf16  [K / 2][16][2]
    int8  [K / 4][16][4], then 16 scales in float32
    int4  for each group [group / 8][16][4] bytes: a lane's byte b of step i holds k = 8 i + b in
          its low nibble and k = 8 i + 4 + b in its high one; then 16 scales in float16, then, where
          the matrix has zero points, 16 of them as bytes

K is padded with zeros to a multiple of 32 and rows to a multiple of 16.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashformer.plan import TILE
from flashformer.quant import Matrix

if TYPE_CHECKING:
    from torch import Tensor

STEP = 32


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix that is laid out already, as `pack` does it.

    Attributes:
        format: As of `Matrix`.
        group: As of `Matrix`.
        zeros: Whether there are zero points.
        shape: N and K of the matrix.
        tiles: `[tiles, bytes of a tile]` uint8.
    """

    format: str
    group: int
    zeros: bool
    shape: tuple[int, int]
    tiles: "Tensor"


def padded_k(matrix: "Matrix | Packed") -> int:
    """Return K padded to a multiple of 32."""
    return -(-matrix.shape[1] // STEP) * STEP


def tile_bytes(matrix: "Matrix | Packed") -> int:
    """Return the bytes of one tile."""
    return bytes_of(matrix.format, padded_k(matrix), matrix.group, matrix.zeros)


def bytes_of(format: str, k: int, group: int = 0, zeros: bool = False) -> int:
    """Return the bytes of one tile of a padded K."""
    if format == "fp32":
        return k * TILE * 4
    if format == "bf16":
        return k * TILE * 2
    if format == "int8":
        return k * TILE + 4 * TILE
    return k * TILE // 2 + k // group * TILE * (3 if zeros else 2)


def gate_order(intermediate: int) -> "Tensor":
    """Return the order of rows of the up stage: 8 rows of the gate, the same 8 of up, and so on.

    Returns:
        `[tiles * 16]` row numbers of the gate and up matrices one below the other, -1 for padding.
    """
    import torch

    half = TILE // 2
    tiles = -(-intermediate // half)
    rows = torch.arange(tiles * half).reshape(tiles, 1, half)
    rows = torch.where(rows < intermediate, rows, -1)
    up = torch.where(rows < 0, -1, rows + intermediate)
    return torch.cat([rows, up], 1).flatten()


def pack(matrix: "Matrix | Packed", order: "Tensor | None" = None) -> "Tensor":
    """Return the tiles of a matrix, `[tiles, bytes of a tile]` uint8; those of a packed one.

    Args:
        matrix: `[N, K]`.
        order: `[tiles * 16]`, which row goes where, -1 for a row of zeros. Defaults to the order
            they have.
    """
    import torch

    if isinstance(matrix, Packed):
        return matrix.tiles
    rows, k = matrix.shape
    if order is None:
        order = torch.arange(-(-rows // TILE) * TILE)
        order = torch.where(order < rows, order, -1)
    chosen = matrix.rows(order.clamp(min=0))
    blank = order < 0
    values = torch.nn.functional.pad(chosen.values, (0, padded_k(matrix) - k))
    values[blank] = 8 if matrix.format == "int4" else 0
    tiles = values.reshape(-1, TILE, values.shape[1])  # [tiles, 16, K]
    count = len(tiles)
    if matrix.format in ("fp32", "bf16"):
        pair = 1 if matrix.format == "fp32" else 2
        laid = tiles.reshape(count, TILE, -1, pair).transpose(1, 2)
        return laid.contiguous().view(torch.uint8).reshape(count, -1)
    assert chosen.scale is not None
    scale = chosen.scale.clone()
    scale[blank] = 0
    if matrix.format == "int8":
        laid = tiles.reshape(count, TILE, -1, 4).transpose(1, 2).contiguous()
        scales = scale.reshape(count, TILE).float().contiguous()
        return torch.cat([laid.view(torch.uint8).reshape(count, -1), _bytes(scales)], 1)
    groups = tiles.shape[2] // matrix.group
    nibbles = tiles.reshape(count, TILE, groups, matrix.group // 8, 2, 4)
    byte = nibbles[..., 0, :] | nibbles[..., 1, :] << 4  # [tiles, 16, groups, steps, 4]
    parts = [byte.permute(0, 2, 3, 1, 4).reshape(count, groups, -1)]
    parts.append(_bytes(scale.reshape(count, TILE, groups).transpose(1, 2).half().contiguous()))
    if chosen.zero is not None:
        parts.append(chosen.zero.reshape(count, TILE, groups).transpose(1, 2))
    return torch.cat(parts, 2).reshape(count, -1)


def unpack(tiles: "Tensor", like: "Matrix | Packed") -> Matrix:
    """Undo `pack`: `[tiles, bytes]` back to a matrix of the kind of `like`, padded rows included.

    K is that of `like`.
    """
    import torch

    count, k, padded = len(tiles), like.shape[1], padded_k(like)
    if like.format in ("fp32", "bf16"):
        dtype, pair = (torch.float32, 1) if like.format == "fp32" else (torch.bfloat16, 2)
        laid = tiles.contiguous().view(dtype).reshape(count, -1, TILE, pair)
        return Matrix(like.format, laid.transpose(1, 2).reshape(count * TILE, padded)[:, :k])
    if like.format == "int8":
        body, scales = tiles[:, : padded * TILE], tiles[:, padded * TILE :]
        laid = body.contiguous().view(torch.int8).reshape(count, -1, TILE, 4)
        values = laid.transpose(1, 2).reshape(count * TILE, padded)[:, :k]
        return Matrix("int8", values, scales.contiguous().view(torch.float32).flatten())
    groups, size = padded // like.group, like.group * TILE // 2
    grouped = tiles.reshape(count, groups, -1)
    byte = grouped[..., :size].reshape(count, groups, like.group // 8, TILE, 4)
    both = torch.stack([byte & 15, byte >> 4], 4)  # [tiles, groups, steps, 16, 2, 4]
    values = both.permute(0, 3, 1, 2, 4, 5).reshape(count * TILE, padded)[:, :k]
    scales = grouped[..., size : size + 2 * TILE].contiguous().view(torch.float16)
    scale = scales.reshape(count, groups, TILE).transpose(1, 2).reshape(count * TILE, groups)
    zero = None
    if like.zeros:
        zero = grouped[..., size + 2 * TILE :].transpose(1, 2).reshape(count * TILE, groups)
    return Matrix("int4", values, scale, zero, like.group)


def _bytes(tensor: "Tensor") -> "Tensor":
    """View the last axis as bytes."""
    import torch

    return tensor.contiguous().view(torch.uint8)
