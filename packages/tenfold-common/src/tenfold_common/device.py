"""Where to compute and in which precision, each with the reason for the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from tenfold_common.errors import UserError, suggest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float64": "float64",
    "fp64": "float64",
}


class Choice(NamedTuple, Generic[T]):
    """A resolved value and, in words for the log, why it was chosen."""

    value: T
    reason: str


def resolve_device(spec: str | torch.device = "auto") -> Choice[torch.device]:
    """Choose the device: CUDA if a small computation works there, else the CPU.

    Args:
        spec: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:N"`, `"mps"` or a torch.device of these.
            `"auto"` never picks mps.

    Returns:
        The device and the reason.

    Raises:
        UserError: the name is unknown, or the device asked for cannot be used here.
    """
    import torch

    name = str(spec)
    kind, _, index = name.partition(":")
    if name == "auto":
        problem = _cuda_problem(torch.device("cuda", 0))
        if problem:
            return Choice(torch.device("cpu"), f"cpu, because {problem}")
        return Choice(torch.device("cuda", 0), f"cuda:0 works ({torch.cuda.get_device_name(0)})")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not index.isdecimal()):
        known = ["auto", "cpu", "cuda", "cuda:0", "mps"]
        raise UserError(
            f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps.{suggest(name, known)}"
        )
    device = torch.device(name)
    if kind == "cuda":
        device = torch.device("cuda", int(index or 0))
        problem = _cuda_problem(device)
    elif kind == "mps":
        problem = (
            "" if torch.backends.mps.is_available() else "this torch has no usable mps back-end"
        )
    else:
        problem = ""
    if problem:
        raise UserError(f"device {name!r} cannot be used: {problem}. Use --device auto or cpu.")
    return Choice(device, f"{name} was asked for")


def resolve_dtype(
    spec: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> Choice[torch.dtype]:
    """Choose the floating-point type for a device.

    Args:
        spec: `"auto"`, `"float32"`/`"fp32"`, `"bfloat16"`/`"bf16"`, `"float16"`/`"fp16"`,
            `"float64"`/`"fp64"` or a torch.dtype of these. `"auto"` is bfloat16 on a CUDA device
            that computes it natively and float32 everywhere else.
        device: A device that exists (see `resolve_device`).

    Returns:
        The dtype and the reason.

    Raises:
        UserError: the name is unknown, or the device has no such type.
    """
    import torch

    device = torch.device(device)
    name = str(spec).removeprefix("torch.")
    if name == "auto":
        if device.type != "cuda":
            return Choice(torch.float32, f"float32 on {device.type}")
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Choice(torch.bfloat16, "bfloat16 is native on this GPU")
        return Choice(torch.float32, "float32, because this GPU has no native bfloat16")
    if name not in _DTYPES:
        raise UserError(
            f"unknown dtype {name!r}; use auto, {', '.join(_DTYPES)}.{suggest(name, _DTYPES)}"
        )
    if device.type == "mps" and _DTYPES[name] == "float64":
        raise UserError("mps has no float64; use float32.")
    return Choice(getattr(torch, _DTYPES[name]), f"{name} was asked for")


def _cuda_problem(device: torch.device) -> str:
    """Say what keeps a CUDA device from being used; empty if a small computation works."""
    import torch

    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    count = torch.cuda.device_count()
    if device.index >= count:
        return f"there are {count} CUDA devices, numbered from 0"
    try:
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        return f"a small test on it failed ({str(error).splitlines()[0]})"
    return ""
