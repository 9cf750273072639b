"""Test rules that all packages share.

Nothing here imports pytest; a conftest.py makes fixtures of the context managers:

    @pytest.fixture(autouse=True)
    def _offline():
        with no_network():
            yield
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tenfold_common.errors import TenfoldError, UserError

if TYPE_CHECKING:
    import socket

    import torch


class NetworkBlockedError(TenfoldError, RuntimeError):
    """A test tried to reach the network; not an OSError, so that no fallback hides it."""


def rms_ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of `a - b` divided by that of `b`, in float64.

    Args:
        a: What was computed, any shape and floating dtype.
        b: The reference, same shape.

    Returns:
        The ratio; 0.0 if both are zero or empty, infinity if only `b` is zero.

    Raises:
        UserError: the shapes differ.
    """
    if a.shape != b.shape:
        raise UserError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    difference = (a.double() - b.double()).norm().item()
    base = b.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / base if base else float("inf")


def assert_matches_reference(
    out: torch.Tensor, ref: torch.Tensor, low: torch.Tensor, *, name: str
) -> float:
    """Require that a fast result is at most twice as far from the truth as a plain one.

    With `ref` in high precision and `low` the same reference computed in the dtype of `out`:
    `max|out - ref| <= 2 max|low - ref| + 2 max|(ref + 0.3 - 0.3) - ref|`, the last term in the
    dtype of `low`. Nothing can loosen it.

    Args:
        out: What is tested, any shape and floating dtype.
        ref: The reference, float32 or float64, same shape.
        low: The reference computed in the dtype of `out`, same shape.
        name: What is compared, for the message.

    Returns:
        The RMS ratio of `out` to `ref`, for reports.

    Raises:
        AssertionError: a shape or dtype differs, a value is not finite, or the error is too large.
    """
    import torch

    if not out.shape == ref.shape == low.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (out, ref, low))
        raise AssertionError(f"{name}: the shapes of out, ref, low differ: {shapes}")
    if out.dtype != low.dtype or ref.dtype not in (torch.float32, torch.float64):
        raise AssertionError(
            f"{name}: out is {out.dtype}, low is {low.dtype} (must be equal), ref is {ref.dtype} "
            "(must be float32 or float64)"
        )
    out, ref, low = out.detach(), ref.detach(), low.detach()
    for label, tensor in (("out", out), ("ref", ref), ("low", low)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise AssertionError(
                f"{name}: {bad} of {tensor.numel()} values of {label} are not finite"
            )
    if not out.numel():
        return 0.0
    near = ref.to(low.dtype)  # rounding is that of the type under test, not of the reference's
    rounding = ((near + 0.3 - 0.3) - near).abs().max().double().item()
    error = (out.double() - ref.double()).abs()
    allowed = 2 * (low.double() - ref.double()).abs().max().item() + 2 * rounding
    worst = error.max().item()
    if worst > allowed:
        position = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: the largest error {worst:.3e} at {position} exceeds {allowed:.3e} "
            f"(RMS ratio {rms_ratio(out, ref):.3e}, low {rms_ratio(low, ref):.3e})"
        )
    return rms_ratio(out, ref)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (floating and complex dtypes).

    Covers `torch.empty`, `empty_like`, `empty_strided` and the tensor method `new_empty`, as called
    from Python; code that reads memory it never wrote then shows NaN on every run.
    """
    from unittest import mock

    import torch

    def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args, **named) -> torch.Tensor:
            tensor = function(*args, **named)
            if tensor.is_floating_point() or tensor.is_complex():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    patches = [
        mock.patch.object(owner, name, poisoned(getattr(owner, name)))
        for owner, name in [*places, (torch.Tensor, "new_empty")]
    ]
    with patches[0], patches[1], patches[2], patches[3]:
        yield


@contextmanager
def no_network(*, allow_loopback: bool = False) -> Iterator[None]:
    """Make Python sockets refuse every address but Unix ones, and names other than the own host.

    Args:
        allow_loopback: Let connections to this machine pass. Defaults to False.

    Raises:
        NetworkBlockedError: inside the block, by whoever tries to connect, send to or look up a
            host. Sockets opened by C or C++ libraries (gloo, curl) are not seen.
    """
    import socket
    from unittest import mock

    def check(host: object) -> None:
        if not (allow_loopback and _is_loopback(host)):
            hint = (
                ""
                if allow_loopback
                else "; no_network(allow_loopback=True) lets this machine through"
            )
            raise NetworkBlockedError(f"network access to {host!r} in an offline test{hint}")

    def guarded(function: Callable) -> Callable:
        def wrapper(self: socket.socket, *args):
            if self.family != getattr(socket, "AF_UNIX", None):
                address = args[-1]  # the last argument of connect, connect_ex and sendto
                check(address[0] if isinstance(address, tuple) else address)
            return function(self, *args)

        return wrapper

    def lookup(host, *args, **named):
        check(host)
        return resolve(host, *args, **named)

    resolve = socket.getaddrinfo
    kind = socket.socket
    with (
        mock.patch.object(kind, "connect", guarded(kind.connect)),
        mock.patch.object(kind, "connect_ex", guarded(kind.connect_ex)),
        mock.patch.object(kind, "sendto", guarded(kind.sendto)),
        mock.patch.object(socket, "getaddrinfo", lookup),
    ):
        yield


def _is_loopback(host: object) -> bool:
    import ipaddress

    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name == "localhost" or name is None:
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:
        return False
