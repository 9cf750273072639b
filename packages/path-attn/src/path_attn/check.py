"""Do the back-ends agree on this machine? The product behind `path-attn check`.

Every usable back-end runs the same random inputs; output and gradients are compared with the global
UT form in float64. The allowed error is the two-times rule: at most twice the error of the same
reference computed in the tested dtype, plus twice the rounding of the result itself.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from path_attn.ops import path_attention
from path_attn.reference import global_path_attention
from tenfold_common.device import resolve_device
from tenfold_common.errors import MissingDependencyError, UserError
from tenfold_common.optional import is_available

Backend = Literal["reference", "torch", "triton"]


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: Short, for the table.
        batch, length, heads, kv_heads, key_dim, value_dim: B, T, HQ, H, K, V.
        gates: Whether log gates are given (PaTH-FoX).
        reflections: Householder factors per token.
        window, softcap: As in `path_attention`.
        strong: beta close to 2 instead of spread over (0, 2).
    """

    name: str
    batch: int = 1
    length: int = 128
    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    gates: bool = False
    reflections: int = 1
    window: int | None = None
    softcap: float | None = None
    strong: bool = False


CASES = (
    Case("plain"),
    Case("gates", gates=True),
    Case("odd length", batch=2, length=101),
    Case("one token", length=1),
    Case("GQA, K != V", heads=4, kv_heads=2, key_dim=32, value_dim=48),
    Case("beta near 2", length=160, strong=True),
    Case("window, softcap", window=40, softcap=20.0, gates=True),
    Case("2 reflections", reflections=2),
)


class Row(NamedTuple):
    """One comparison: the output or gradient with the least room left."""

    backend: str
    case: str
    dtype: str
    worst: str
    error: float
    allowed: float
    passed: bool
    note: str = ""


def run_check(device: str = "auto", *, seed: int = 0) -> list[Row]:
    """Compare all back-ends usable on a device with the float64 reference.

    Args:
        device: "auto", "cpu" or "cuda".
        seed: Seeds the inputs.

    Returns:
        One row per back-end, case and dtype. A back-end that cannot run here gives one passed row
        with the reason as its note.
    """
    chosen = resolve_device(device).value
    rows: list[Row] = []
    dtypes = [torch.float32, torch.bfloat16]
    for backend in ("reference", "torch", "triton"):
        reason = _unusable(backend, chosen)
        if reason:
            rows.append(Row(backend, "-", "-", "-", 0.0, 0.0, True, f"not run: {reason}"))
            continue
        for number, case in enumerate(CASES):
            inputs = make_inputs(case, seed + number)
            rows.extend(_compare(backend, case, inputs, dtype, chosen) for dtype in dtypes)
    return rows


def make_inputs(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw the inputs of a case in float64 on the CPU, and the weights of the loss as "grad"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = (case.batch, case.length, case.kv_heads, case.reflections)
    beta = torch.rand(*steps, generator=generator, dtype=torch.float64)
    inputs = {
        "q": normal(case.batch, case.length, case.heads, case.key_dim),
        "k": normal(case.batch, case.length, case.kv_heads, case.key_dim),
        "v": normal(case.batch, case.length, case.kv_heads, case.value_dim),
        "w": F.normalize(normal(*steps, case.key_dim), dim=-1),
        "beta": 1.9 + 0.09 * beta if case.strong else 0.05 + 1.9 * beta,
        "grad": normal(case.batch, case.length, case.heads, case.value_dim),
    }
    if case.gates:
        inputs["g"] = F.logsigmoid(normal(case.batch, case.length, case.heads) + 3)
    return inputs


def _unusable(backend: str, device: torch.device) -> str:
    """Say why a back-end cannot run on a device; empty if it can."""
    if backend == "triton" and device.type != "cuda":
        return "triton needs a CUDA device"
    if backend == "triton" and not is_available("triton"):
        return "triton is not installed"
    return ""


def _compare(
    backend: Backend,
    case: Case,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Row:
    """Run one case and find the quantity with the least room."""
    given = {k: v.to(device, _dtype_of(k, dtype)) for k, v in inputs.items()}
    exact = {k: v.double() for k, v in given.items()}

    def reference(x: dict[str, Tensor]) -> Tensor:
        return global_path_attention(
            x["q"],
            x["k"],
            x["v"],
            x["w"].to(x["q"].dtype),
            x["beta"].to(x["q"].dtype),
            x.get("g"),
            window=case.window,
            softcap=case.softcap,
        )

    def tested(x: dict[str, Tensor]) -> Tensor:
        return path_attention(
            x["q"],
            x["k"],
            x["v"],
            x["w"],
            x["beta"],
            x.get("g"),
            window=case.window,
            softcap=case.softcap,
            backend=backend,
        )[0]

    def low(
        x: dict[str, Tensor],
    ) -> Tensor:  # triangular solves exist in float32 only: round around it
        wide = {k: v.float() for k, v in x.items()}
        return reference(wide).to(dtype)

    name = str(dtype).removeprefix("torch.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = _with_gradients(tested, given)
    except (UserError, MissingDependencyError) as error:
        return Row(backend, case.name, name, "-", 0.0, 0.0, True, f"not run: {error}")
    ref, plain = _with_gradients(reference, exact), _with_gradients(low, given)
    worst = Row(backend, case.name, name, "-", 0.0, math.inf, True)
    for key, value in out.items():
        rounding = ((ref[key].to(dtype) - ref[key]).abs().max()).item()
        allowed = 2 * (plain[key].double() - ref[key]).abs().max().item() + 2 * rounding
        allowed += 1e-5 * max(1.0, ref[key].abs().max().item())  # another order of summation
        difference = (value.double() - ref[key]).abs().max().item()
        passed = math.isfinite(difference) and difference <= allowed
        room = math.inf if difference == 0 else allowed / difference
        so_far = math.inf if worst.error == 0 else worst.allowed / worst.error
        if worst.passed and (not passed or room < so_far or worst.worst == "-"):
            worst = Row(backend, case.name, name, key, difference, allowed, passed)
    return worst


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Give w, beta and g at least float32, as the layers do."""
    return torch.float32 if name in ("w", "beta", "g") else dtype


def _with_gradients(
    function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the output and the gradient of `(output * grad).sum()` for every input."""
    leaves = {k: v.detach().clone().requires_grad_(k != "grad") for k, v in inputs.items()}
    out = function(leaves)
    (out * leaves["grad"].to(out.dtype)).sum().backward()
    grads = {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"o": out.detach(), **grads}


def table(rows: list[Row]) -> str:
    """Return the rows as text in columns."""
    heads = ("back-end", "case", "dtype", "tightest", "error", "allowed", "")
    cells = [heads] + [
        (
            r.backend,
            r.case,
            r.dtype,
            r.worst,
            f"{r.error:.1e}",
            f"{r.allowed:.1e}",
            "ok" if r.passed else "DISAGREES",
        )
        if not r.note
        else (r.backend, r.case, r.dtype, "", "", "", r.note)
        for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads) - 1)]
    lines = [
        "  ".join([c.ljust(n) for c, n in zip(row[:-1], widths, strict=True)] + [row[-1]])
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
