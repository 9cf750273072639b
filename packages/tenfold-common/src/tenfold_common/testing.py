"""Test rules and helpers that all packages share.

Nothing here imports pytest at import; a conftest.py makes fixtures of the context managers:

    @pytest.fixture(autouse=True)
    def _offline():
        with no_network():
            yield
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold_common.errors import TenfoldError, UserError

if TYPE_CHECKING:
    import socket
    import subprocess

    import torch
    from transformers import PreTrainedTokenizerFast

_TO_STOP = 30.0  # seconds that a server has to end before it is killed
_TO_CLEAR_UP = 5.0  # seconds that its children have after that


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


def real_data_folder(start: str | Path) -> Path:
    """Return the folder of real data, which are no part of the repository, or skip the test.

    Args:
        start: A file in the repository, such as the caller's `__file__`.

    Returns:
        The folder that the variable TENFOLD_DATA names, or else `shared/data` beside the
        repository, which is the folder that holds `packages`. Where that is not there the test
        is skipped.

    Raises:
        UserError: TENFOLD_DATA names a folder that is not there.
    """
    import os

    import pytest

    root = next((p for p in Path(start).resolve().parents if (p / "packages").is_dir()), None)
    named = os.environ.get("TENFOLD_DATA")
    if named and not Path(named).is_dir():
        raise UserError(f"TENFOLD_DATA names {named!r}, which is no folder")
    folder = Path(named) if named else root and root.parent / "shared" / "data"
    if folder is None or not folder.is_dir():
        pytest.skip("no real data: set TENFOLD_DATA to their folder")
    return folder


@contextmanager
def vllm_server(
    folder: str | Path,
    *,
    log: Path,
    name: str = "tiny",
    arguments: Sequence[str] = (),
    seconds: float = 300,
) -> Iterator[str]:
    """Run vLLM's OpenAI-compatible server in a process of its own, in float32 and uncompiled.

    Args:
        folder: The model.
        log: Where what the server prints is written.
        name: The name under which it offers the model. Defaults to "tiny".
        arguments: More options of the server, such as `("--max-model-len", "256")`.
        seconds: How long it may take to answer. Defaults to 300.

    Yields:
        Its address on a free port of loopback. The server and its children are stopped at the end.

    Raises:
        AssertionError: it died or did not answer in time; with the end of the log.
    """
    import os
    import socket
    import subprocess
    import sys

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--dtype", "float32", "--enforce-eager", "--served-model-name", name),
        *("--host", "127.0.0.1", "--port", str(port), *arguments),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - only the command written out above
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + seconds
        while not _is_healthy(port):
            late = time.monotonic() > end
            if late or process.poll() is not None:
                what = f"did not answer in {seconds:g} s" if late else "ended"
                said = log.read_text("utf-8", "replace")[-3000:]
                raise AssertionError(f"the server {what}: {said}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop_group(process)


def _is_healthy(port: int) -> bool:
    """Whether a server on loopback answers that it is ready."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        with connection.getresponse() as answer:
            return answer.status == 200
    except (ConnectionError, TimeoutError):
        return False
    finally:
        connection.close()


def _stop_group(leader: subprocess.Popen) -> None:
    """Ask a process and its children to end; kill what is still there after a while."""
    import os
    import signal
    import subprocess

    with suppress(ProcessLookupError):  # once none of them is left
        os.killpg(leader.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            leader.wait(_TO_STOP)
        end = time.monotonic() + _TO_CLEAR_UP
        while time.monotonic() < end:
            os.killpg(leader.pid, 0)
            time.sleep(0.05)
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait(_TO_STOP)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with one token per ASCII letter and a chat template.

    The text of every token is a text: no token is part of a letter, and half a letter at the end
    of a text is what back-ends cut off differently.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<bos>", "<eos>", *map(chr, range(33, 127)), "\u0120", "\u010a"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()  # which writes a space as U+0120, a new line as U+010A
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106 - a token of a text
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
        ),
    )


def in_fresh_python(code: str) -> str:
    """Run code in a new Python and return what it prints, without white space around it."""
    import subprocess
    import sys

    done = subprocess.run(  # noqa: S603 - a test's own code
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def imported_by(code: str, modules: Iterable[str]) -> list[str]:
    """Return which of the modules a new Python has imported after running code."""
    shown = f"print(*[m for m in {list(modules)} if m in sys.modules])"
    return in_fresh_python(f"{code}\nimport sys\n{shown}").split()


def import_time(module: str) -> float:
    """Return the seconds that importing a module takes in a new Python, the least of three runs.

    Processor time: a busy machine must not fail a test.
    """
    clock = "time.process_time()"
    code = f"import time; start = {clock}; import {module}; print({clock} - start)"
    return min(float(in_fresh_python(code)) for _ in range(3))


def defaults(function: Callable) -> dict[str, object]:
    """Return the defaults of a function's parameters, of those that have one, by name."""
    import inspect

    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if p.default is not p.empty}


def positional(function: Callable) -> list[str]:
    """Return the names of the parameters that can be given by position."""
    import inspect

    parameters = inspect.signature(function).parameters.items()
    return [name for name, p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def assert_documented(value: object) -> None:
    """Require a docstring of a function or class, and of a class's own public methods.

    Raises:
        AssertionError: there is none, or only the signature that `dataclass` writes.
    """
    import inspect

    if not inspect.getdoc(value):
        raise AssertionError(f"{value!r} has no docstring")
    if not inspect.isclass(value):
        return
    if not value.__doc__ or value.__doc__.startswith(f"{value.__name__}("):
        raise AssertionError(f"{value!r} has no docstring of its own")
    for name, member in vars(value).items():
        counts = inspect.isfunction(member) or isinstance(member, classmethod | property)
        if counts and not name.startswith("_") and not inspect.getdoc(getattr(value, name)):
            raise AssertionError(f"{value.__name__}.{name} has no docstring")


def script_output(script: Path, folder: Path) -> list[str]:
    """Run a script in a folder with a new Python, offline and on one thread; return its lines.

    Raises:
        AssertionError: it failed; the message has the end of what it said.
    """
    import os
    import subprocess
    import sys

    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(  # noqa: S603 - a test's own script
        [sys.executable, str(script)], cwd=folder, env={**os.environ, **offline},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"{script} failed: {done.stderr[-3000:]}")
    return done.stdout.splitlines()


def promised(source: str) -> list[str]:
    """Return what the comments behind the prints of a script say they print.

    `print(x)  # 3` promises "3", and so does `print(x)  # 3: how many there are`.
    """
    import re

    comments = re.findall(r"^print\(.*\)  # (.+)$", source, re.MULTILINE)
    return [re.split(r": [a-zA-Z]", comment)[0].strip() for comment in comments]


def python_blocks(text: str) -> list[str]:
    """Return the Python blocks of a markdown text."""
    import re

    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def stale_tables(package: Path) -> list[str]:
    """Return the tables of a package's READMEs that are not what its committed results give.

    Args:
        package: Its folder, with `benchmarks/report.py` as `tenfold_common.readme` describes it.
    """
    import importlib.util

    file = package / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location(f"report_of_{package.name}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} cannot be loaded")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    stale = []
    for readme, (folder, kinds) in report.READMES.items():
        text = readme.read_text(encoding="utf-8")
        for kind in kinds:
            shown = text.split(f"<!-- {kind}:begin -->\n")[-1].split(f"\n<!-- {kind}:end -->")[0]
            if shown != report.text_of(kind, folder):
                stale.append(f"{readme.relative_to(package)}: {kind}")
    return stale
