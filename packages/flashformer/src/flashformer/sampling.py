"""Choosing a token from logits as the native back-ends do, number by number."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

COLDEST = 1e-4  # temperature; below, logits would overflow
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)


def check_seed(seed: int | None) -> None:
    """Refuse a seed that torch would not take.

    Raises:
        UserError: it is no whole number of 64 bits.
    """
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise UserError(f"seed must be a whole number of at most 64 bits, not {seed!r}")


def philox(seed: int, step: int, count: int) -> NDArray[np.uint32]:
    """Return `count` random words of Philox 4x32-10 (Salmon et al. 2011).

    Args:
        seed: The key, modulo 2^64.
        step: Upper half of the counter.
        count: Word i is number i mod 4 of counter (i / 4, 0, step).
    """
    blocks = -(-count // 4)
    c = np.zeros((4, blocks), dtype=np.uint64)
    c[0] = np.arange(blocks)
    c[2], c[3] = step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = _M0 * c[0], _M1 * c[2]
        c = np.stack(
            [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & _LOW,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & _LOW]
        )  # fmt: skip
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c.T.reshape(-1)[:count].astype(np.uint32)


def gumbel(seed: int, step: int, count: int) -> NDArray[np.float64]:
    """Return Gumbel noise -log(-log u) with u = (word + 1/2) / 2^32.

    argmax(logits / T + noise) is distributed as softmax(logits / T).
    """
    return -np.log(-np.log((philox(seed, step, count) + 0.5) * 2.0**-32))


def choose(logits: "Tensor", temperature: float | None, seed: int, step: int) -> int:
    """Return the token of one step: the first of the largest, of logits or of noisy ones.

    Raises:
        UserError: a logit is NaN.
    """
    values = logits.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise UserError(
            "a logit is NaN: the model's numbers overflow, or its weights changed to NaN after "
            "they were packed"
        )
    if temperature is None:
        return int(values.argmax())
    noisy = values / temperature + gumbel(seed % 2**64, step, len(values))
    return int(noisy.astype(np.float32).argmax())


def surprise(p: "Tensor", q: "Tensor") -> float:
    """Return the mean KL divergence of softmax(q) from softmax(p), in nats; rows are positions."""
    import torch

    logs = [torch.log_softmax(t.double(), -1) for t in (p, q)]
    value = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    return 0.0 if math.isclose(value, 0.0, abs_tol=1e-12) else value
