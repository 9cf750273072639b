"""Formats of weights: float32, bfloat16, int8 with a scale a row, int4 with a scale a group.

A `Matrix` holds the numbers as they will be streamed; `dense()` gives back what they stand for,
which is what every test compares with.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "int4")
GROUPS = (32, 64, 128)
_TRIED = 21  # scales tried for each group of int4: the largest number falls on -11, ..., -6
# The largest number of a matrix; below, scales would keep less than 8 bits (float16 ends at 2^-24).
_LARGEST, _SMALLEST = 6 * 65504.0, 2.0**-13
_BLOCK = 2**19  # numbers quantised at a time, so that trials find them in the cache


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix `[N, K]` in one of the formats.

    Attributes:
        format: One of `FORMATS`.
        values: `[N, K]`: float32, bfloat16, int8, or uint8 in 0..15.
        scale: int8: `[N]` float32. int4: `[N, K / group]` float16. Else None.
        zero: int4 with zero points: `[N, K / group]` uint8 in 0..15; None means 8 throughout.
        group: int4: neighbours along K that share a scale; else 0.
    """

    format: str
    values: "Tensor"
    scale: "Tensor | None" = None
    zero: "Tensor | None" = None
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, k = self.values.shape
        return rows, k

    @property
    def zeros(self) -> bool:
        """Whether there are zero points."""
        return self.zero is not None

    def dense(self) -> "Tensor":
        """Return the matrix that is meant, `[N, K]` float32."""
        import torch

        if self.format in ("fp32", "bf16"):
            return self.values.float()
        assert self.scale is not None
        if self.format == "int8":
            return self.values.float() * self.scale[:, None]
        zero = torch.full_like(self.scale, 8.0) if self.zero is None else self.zero
        spread = [t.float().repeat_interleave(self.group, 1) for t in (self.scale, zero)]
        return (self.values.float() - spread[1]) * spread[0]

    def rows(self, index: "Tensor") -> "Matrix":
        """Return some rows, in the order of `index`."""
        parts = {"values": self.values[index]}
        for name in ("scale", "zero"):
            if (value := getattr(self, name)) is not None:
                parts[name] = value[index]
        return replace(self, **parts)

    @staticmethod
    def stack(parts: "list[Matrix]") -> "Matrix":
        """Put matrices of one format and one K below one another."""
        import torch

        first = parts[0]
        kinds = {(p.format, p.group, p.zeros) for p in parts}
        if len(kinds) > 1:
            raise UserError(f"the parts of one projection have different formats: {sorted(kinds)}")
        if len(parts) == 1:
            return first
        joined = {"values": torch.cat([p.values for p in parts])}
        for name in ("scale", "zero"):
            if getattr(first, name) is not None:
                joined[name] = torch.cat([getattr(p, name) for p in parts])
        return replace(first, **joined)


def default_head(weights: str) -> str:
    """Return the head's format where none is named: int8 for int4, else that of the weights."""
    return "int8" if weights == "int4" else weights


def check_format(name: str, group: int, what: str = "weights") -> None:
    """Refuse an unknown format or group size; `what` is the argument's name.

    Raises:
        UserError: it is unknown.
    """
    if name not in FORMATS:
        raise UserError(
            f"{what} must be one of {', '.join(FORMATS)}, not {name!r}."
            f"{suggest(str(name), FORMATS)}"
        )
    if group not in GROUPS:
        raise UserError(f"group_size must be one of {', '.join(map(str, GROUPS))}, not {group!r}")


def quantize(
    weight: "Tensor", format: str, *, group: int = 128, symmetric: bool = True, name: str = "weight"
) -> Matrix:
    """Bring a matrix into a format, each number to the nearest (round to nearest, RTN).

    Args:
        weight: `[N, K]`, any float dtype.
        format: One of `FORMATS`. int8: scale = max |w| / 127 of each row. int4: of the scales
            tried for each group the one with the least squared error.
        group: Of int4, one of `GROUPS`, a divisor of K.
        symmetric: Of int4: zero at 8, values -8 to 7; else a zero point for each group.
        name: What to call the matrix in messages.

    Raises:
        UserError: NaN or infinity among the weights, an unknown format, or a group that does not
            divide K.
    """
    import torch

    check_format(format, group)
    if weight.ndim != 2:
        raise UserError(f"{name} must be a matrix [N, K], not of shape {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise UserError(f"{name} holds NaN or infinity; mend the checkpoint")
    weight = weight.detach()
    if format == "fp32":
        return Matrix(format, weight.float())
    if format == "bf16":
        low = weight.to(torch.bfloat16)
        if not torch.isfinite(low).all():
            raise UserError(f"{name} holds numbers that bf16 cannot: over 3.39e38; use fp32")
        return Matrix(format, low)
    if format == "int8":
        scale = weight.float().abs().amax(1) / 127
        values = weight.float() / torch.where(scale > 0, scale, 1.0)[:, None]
        return Matrix(format, values.round().clamp(-127, 127).to(torch.int8), scale)
    rows, k = weight.shape
    if k % group:
        fits = [str(g) for g in GROUPS if k % g == 0]
        raise UserError(
            f"{name} has K = {k}, which group_size {group} does not divide; use "
            + (f"group_size {' or '.join(fits)}" if fits else "int8: no group_size divides it")
        )
    _check_range(weight, name)
    grouped = weight.float().reshape(rows, k // group, group)
    if not symmetric:
        values, scale, zero = _asymmetric(grouped)
        return Matrix("int4", values.reshape(rows, k), scale, zero, group)
    parts = [_symmetric(part) for part in grouped.split(max(1, _BLOCK // k))]
    values, scale = (torch.cat(x) for x in zip(*parts, strict=True))
    return Matrix("int4", values.reshape(rows, k), scale, None, group)


def _check_range(weight: "Tensor", name: str) -> None:
    """Refuse a matrix whose int4 scales float16 cannot hold."""
    if not weight.numel():
        return
    top = float(weight.float().abs().max())
    if top > _LARGEST or 0 < top < _SMALLEST:
        raise UserError(
            f"the largest number of {name} is {top:.3g}; int4 keeps its scales in float16, for "
            f"which it must be {_SMALLEST:.2g} to {_LARGEST:.3g}; use another format"
        )


def _symmetric(grouped: "Tensor") -> "tuple[Tensor, Tensor]":
    """Choose scales for -8..7; as their sign is free, the largest number may fall on -8 or over."""
    import torch

    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))  # [N, groups, 1], signed
    best = torch.full(grouped.shape[:2], torch.inf, device=grouped.device)
    scale = torch.zeros_like(best, dtype=torch.float16)
    for step in range(_TRIED):
        tried = (largest / (-11.0 + 0.25 * step)).half()
        q = _rounded(grouped, tried)
        error = ((q - 8) * tried.float() - grouped).square().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried[..., 0], scale)
    return _rounded(grouped, scale[..., None]).to(torch.uint8), scale


def _rounded(grouped: "Tensor", scale: "Tensor") -> "Tensor":
    import torch

    safe = torch.where(scale != 0, scale.float(), 1.0)
    return (grouped / safe + 8).round().clamp(0, 15)


def _asymmetric(grouped: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """Choose scales and zero points for 0..15, so that zero itself stays exact."""
    import torch

    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half()
    safe = torch.where(scale != 0, scale.float(), 1.0)
    zero = (-low / safe).round().clamp(0, 15)
    q = (grouped / safe[..., None] + zero[..., None]).round().clamp(0, 15)
    return q.to(torch.uint8), scale, zero.to(torch.uint8)
