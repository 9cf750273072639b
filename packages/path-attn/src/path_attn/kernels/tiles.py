"""What the kernels share: tile sizes, device functions for one tile, how a kernel is launched.

Tile sizes are autotuned on the machine, once per kind of shape. Under the interpreter
(`TRITON_INTERPRET=1`, which Triton reads when a kernel is defined) there is nothing to time, and
one fixed choice is taken instead.
"""

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRET = knobs.runtime.interpret
KEY = ["levels", "K_DIM", "V_DIM", "GATED", "CAPPED", "WINDOWED"]

# (MERGE, BLOCK_N, warps, stages): MERGE blocks of 64 rows stay in registers while tiles of BLOCK_N
# rows pass by.
FORWARD = [
    (2, 128, 8, 2),
    (2, 64, 8, 3),
    (2, 64, 4, 3),
    (1, 64, 4, 3),
    (1, 32, 4, 2),
    (1, 32, 8, 1),
    (1, 16, 8, 1),
]
BACKWARD = [
    (2, 64, 8, 2),
    (2, 32, 8, 2),
    (1, 64, 4, 2),
    (1, 32, 4, 2),
    (1, 32, 8, 1),
    (1, 16, 8, 1),
]


def usable(tile, *, blocks: int, block: int, width: int, element_size: int) -> bool:
    """Whether a tile suits a sequence of `blocks` blocks of `block` tokens.

    `width` is the padded K and V together. Two blocks merge only if they fill a tile without gaps.
    Float32 products do not run on tensor cores, so their operands must be small enough to stay in
    registers; with K and V both over 128 they need the shared memory of an H100.
    """
    merge, other, warps, stages = tile
    if merge == 2 and (blocks % 2 or block not in (16, 32, 64) or width > 256):
        return False
    if element_size == 4:
        return merge == 1 and other <= 32 and warps == 8 and stages == 1
    return 32 <= other <= (128 if width <= 256 else 64)


def _prune(configs, named_args, **kwargs):
    known = {**named_args, **kwargs}
    shape = {
        "blocks": known["blocks"],
        "block": known["BLOCK"],
        "width": known["K_PAD"] + known["V_PAD"],
        "element_size": known["q_ptr"].element_size(),
    }
    return [
        c
        for c in configs
        if usable((c.kwargs["MERGE"], c.kwargs["BLOCK_N"], c.num_warps, c.num_stages), **shape)
    ]


def tuned(tiles):
    """Decorate a kernel so that it picks among `tiles`; the interpreter leaves it as it is."""
    configs = [
        triton.Config({"MERGE": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in tiles
    ]
    if INTERPRET:
        return lambda kernel: kernel
    return triton.autotune(
        configs=configs, key=KEY, prune_configs_by={"early_config_prune": _prune}
    )


def launch(kernel, programs, *args, **constants) -> None:
    """Start `kernel` with `programs(MERGE)` programs; the interpreter gets its tile sizes here."""
    if INTERPRET:
        fills = constants["blocks"] % 2 == 0 and constants["BLOCK"] in (16, 32, 64)
        constants |= {"MERGE": 2 if fills else 1, "BLOCK_N": 64}
    kernel[lambda meta: (programs(meta["MERGE"]),)](*args, **constants)


@triton.jit
def cap(x, softcap):
    """`softcap * tanh(x / softcap)`; saturates without overflow."""
    return softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / softcap)) + 1.0))


@triton.jit
def rows_at(base, row, inside, width: tl.constexpr, columns):
    """Pointers to rows `row + inside` of a matrix of `width` columns; 64-bit where they grow."""
    return base + row.to(tl.int64) * width + inside[:, None] * width + columns[None, :]


@triton.jit
def absorb(s, v, m, l, acc, PRECISION: tl.constexpr):
    """One step of the online softmax: logits `s [M, N]`, values `v [N, V]`, state m, l, acc."""
    new_m = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    decay = tl.exp2((m - safe) * LOG2E)
    weights = tl.exp2(
        (s - safe[:, None]) * LOG2E
    )  # the difference first: exact for a row's only key
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_m, l * decay + tl.sum(weights, 1), acc
