"""Seeds: one number that fixes every global generator, and generators of one's own."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError
from tenfold_common.optional import is_available

if TYPE_CHECKING:
    import torch


def seed_everything(seed: int) -> None:
    """Seed Python's `random`, torch (all devices) and, if it is loaded, numpy.

    Equal seeds give equal numbers on one machine with one thread count. It does not switch on
    deterministic algorithms: that costs speed and is the caller's choice.

    Args:
        seed: From 0 to 2**32 - 1, the range that all three accept.

    Raises:
        UserError: the seed is not an integer in that range.
    """
    seed = _checked(seed)
    random.seed(seed)
    if is_available("torch"):
        import torch

        torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Make a torch generator that nothing else draws from.

    Args:
        seed: From 0 to 2**32 - 1.
        device: Where the numbers will be drawn.

    Returns:
        A seeded generator.

    Raises:
        UserError: the seed is not an integer in that range.
    """
    import torch

    return torch.Generator(device=device).manual_seed(_checked(seed))


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer from 0 to {2**32 - 1}, not {seed!r}")
    return seed
