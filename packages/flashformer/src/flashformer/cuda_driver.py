"""The few functions of NVIDIA's driver and compiler that the CUDA back-end calls, by ctypes.

Nothing here is needed to import the package. The compiler is NVRTC, from torch's CUDA wheels or the
wheel `nvidia-cuda-nvrtc`, else nvcc. Compiled kernels are kept beside the CPU libraries, keyed by
sources, architecture and compiler.
"""

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flashformer.jit import CompilerError, cache_folder
from tenfold_common.atomic import atomic_write
from tenfold_common.errors import TenfoldError

TOO_LARGE = 720  # CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: the grid does not fit the GPU at once
_pointer, _int = ctypes.c_void_p, ctypes.c_int


class CudaError(TenfoldError, RuntimeError):
    """A call of the driver failed.

    Attributes:
        code: The driver's number for it.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


# --------------------------------------------------------------------------------------------------
# The compiler


@dataclass(frozen=True)
class Kernel:
    """What the assembler says about a kernel.

    Attributes:
        registers: Of a thread.
        spilled: Bytes a thread moves between registers and memory for want of registers.
        stack: Bytes of memory of its own.
    """

    registers: int
    spilled: int
    stack: int


@dataclass(frozen=True)
class Build:
    """Compiled kernels.

    Attributes:
        image: The cubin.
        log: What compiler and assembler said.
        ptx: The intermediate code, where it was asked for; else empty.
        compiler: Its name and version.
    """

    image: bytes
    log: str
    ptx: str
    compiler: str

    @property
    def kernels(self) -> dict[str, Kernel]:
        """The kernels by name, as the assembler's log tells."""
        found = {}
        for part in self.log.split("Compiling entry function '")[1:]:
            numbers = [
                int(re.search(pattern, part)[1])  # type: ignore[index]
                for pattern in (
                    r"Used (\d+) registers",
                    r"(\d+) bytes spill stores",
                    r"(\d+) bytes spill loads",
                    r"(\d+) bytes stack frame",
                )
            ]
            found[part.split("'")[0]] = Kernel(numbers[0], numbers[1] + numbers[2], numbers[3])
        return found


@cache
def nvrtc() -> ctypes.CDLL | None:
    """Return the NVRTC library, or None where there is none."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(Path(folder).glob("*/lib"))
    names = [str(path) for f in folders for path in sorted(f.glob("libnvrtc.so*"))]
    names += [n for n in (ctypes.util.find_library("nvrtc"), "libnvrtc.so") if n]
    if (
        torch := sys.modules.get("torch")
    ) and torch.version.cuda:  # what the driver is known to run
        major = torch.version.cuda.split(".")[0]
        names.sort(key=lambda name: not name.endswith(f".so.{major}"))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def nvcc() -> str | None:
    """Return the path of nvcc, or None where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


@cache
def _version(name: str) -> str:
    if name == "nvrtc":
        library = nvrtc()
        assert library is not None
        major, minor = _int(), _int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    done = subprocess.run(  # noqa: S603 - the compiler found on the path
        [name, "--version"], capture_output=True, text=True, check=False
    )
    release = re.search(r"V[\d.]+", done.stdout)
    return f"nvcc {release[0] if release else 'of unknown version'}"


def compile_kernels(
    sources: Mapping[str, str],
    main: str,
    arch: str,
    *,
    defines: Sequence[str] = (),
    ptx: bool = False,
    compiler: str = "auto",
) -> Build:
    """Compile one of the sources, which may include the others, or take it from the cache.

    Args:
        sources: Texts by file name.
        main: Name of the one to compile.
        arch: Such as `sm_90a`.
        defines: Such as `FF_MODE=0`.
        ptx: Whether the PTX is wanted too. It is not cached.
        compiler: "nvrtc", "nvcc" or "auto": the first that is there.

    Raises:
        CompilerError: there is no compiler or it failed; the message has its last lines.
    """
    chosen = compiler
    if compiler == "auto":
        chosen = "nvrtc" if nvrtc() is not None else "nvcc"
    tool = "nvrtc" if chosen == "nvrtc" else nvcc()
    if tool is None or (tool == "nvrtc" and nvrtc() is None):
        raise CompilerError(
            "there is no compiler for CUDA; install NVRTC: pip install 'flashformer[cuda]'"
        )
    version = _version(tool)
    options = ["-std=c++17", *(f"-D{d}" for d in defines)]
    text = [version, arch, main, *options, *(f"{n}\0{t}" for n, t in sorted(sources.items()))]
    digest = hashlib.sha256("\0".join(text).encode()).hexdigest()[:20]
    target = cache_folder() / f"cuda-{arch}-{digest}.cubin"
    log = target.with_suffix(".log")
    if not ptx and target.is_file() and log.is_file():
        return Build(target.read_bytes(), log.read_text(encoding="utf-8"), "", version)
    if tool == "nvrtc":
        build = _by_nvrtc(sources, main, arch, options, version, ptx=ptx)
    else:
        build = _by_nvcc(tool, sources, main, arch, options, version, ptx=ptx)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(log, "w") as stream:
            stream.write(build.log)
        with atomic_write(target, "wb") as stream:
            stream.write(build.image)
    except OSError as error:
        raise CompilerError(
            f"{target.parent} cannot be written ({error}); name another folder by FLASHFORMER_CACHE"
        ) from error
    return build


def _by_nvrtc(
    sources: Mapping[str, str],
    main: str,
    arch: str,
    options: list[str],
    version: str,
    *,
    ptx: bool,
) -> Build:
    library = nvrtc()
    assert library is not None
    program = _pointer()
    names = [n for n in sources if n != main]
    headers, includes = (
        (ctypes.c_char_p * len(names))(*(text.encode() for text in texts))
        for texts in ([sources[n] for n in names], names)
    )
    library.nvrtcCreateProgram(
        ctypes.byref(program), sources[main].encode(), main.encode(), len(names), headers, includes
    )
    try:
        flags = [*options, f"-arch={arch}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = library.nvrtcCompileProgram(program, len(flags), array)
        log = _read(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompilerError(f"{version} failed for {arch}:\n{log[-3000:]}")
        text = _read(library, program, "PTX").rstrip(b"\0").decode() if ptx else ""
        return Build(_read(library, program, "CUBIN"), log, text, version)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _by_nvcc(
    tool: str,
    sources: Mapping[str, str],
    main: str,
    arch: str,
    options: list[str],
    version: str,
    *,
    ptx: bool,
) -> Build:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        virtual = arch.replace("sm_", "compute_")

        def run(kind: str, code: str, target: str) -> str:
            flags = [*options, f"-gencode=arch={virtual},code={code}", kind, "-Xptxas", "-v"]
            done = subprocess.run(  # noqa: S603 - the compiler found on the path
                [tool, *flags, main, "-o", target],
                capture_output=True,
                text=True,
                check=False,
                cwd=folder,
            )
            if done.returncode:
                raise CompilerError(f"{version} failed for {arch}:\n{done.stderr[-3000:]}")
            return done.stderr

        log = run("-cubin", arch, "out.cubin")
        text = ""
        if ptx:
            run("-ptx", virtual, "out.ptx")
            text = (Path(folder) / "out.ptx").read_text(encoding="utf-8")
        return Build((Path(folder) / "out.cubin").read_bytes(), log, text, version)


# --------------------------------------------------------------------------------------------------
# The driver

_COOPERATIVE, _SERIALIZATION = 2, 6  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE, ..._PROGRAMMATIC_STREAM_...
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, and a union of 64 bytes of which an int is used."""

    _fields_ = (
        ("id", _int), ("padding", _int), ("value", _int), ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", _pointer),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"there is no NVIDIA driver ({error})") from error


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        why = (text.value or b"unknown").decode()
        raise CudaError(f"{name} failed: {why} (error {code})", code)


class Module:
    """Kernels on the GPU of the current context.

    Args:
        image: A cubin.
    """

    def __init__(self, image: bytes) -> None:
        self._module = _pointer()
        self._kernels: dict[tuple[str, int], ctypes.c_void_p] = {}
        _call("cuModuleLoadData", ctypes.byref(self._module), image)

    def kernel(self, name: str, shared: int) -> ctypes.c_void_p:
        """Return a kernel that may use so many bytes of dynamic shared memory."""
        if (name, shared) in self._kernels:
            return self._kernels[name, shared]
        function = _pointer()
        _call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        _call("cuFuncSetAttribute", function, _int(_MAX_DYNAMIC_SHARED), _int(shared))
        self._kernels[name, shared] = function
        return function


def blocks_per_unit(kernel: ctypes.c_void_p, threads: int, shared: int) -> int:
    """Return how many blocks of a kernel fit a multiprocessor at once."""
    count = _int()
    _call(
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        ctypes.byref(count), kernel, _int(threads), ctypes.c_size_t(shared),
    )  # fmt: skip
    return count.value


def launch(
    kernel: ctypes.c_void_p,
    blocks: int,
    threads: int,
    shared: int,
    stream: int | None,
    arguments: Sequence[Any],
    *,
    cooperative: bool = False,
    overlap: bool = False,
) -> None:
    """Launch a kernel.

    Args:
        kernel: Of `Module.kernel`.
        blocks: Of the grid.
        threads: Of a block.
        shared: Bytes of dynamic shared memory.
        stream: Of the driver; None or 0 is the default stream.
        arguments: ctypes values; they may go once this returns.
        cooperative: All blocks must be there at once, or the launch fails with code `TOO_LARGE`.
        overlap: The kernel may begin before the one in front of it ends; it waits for it itself.

    Raises:
        CudaError: it failed.
    """
    attributes = (_Attribute * 2)()
    count = 0
    for wanted, number in ((cooperative, _COOPERATIVE), (overlap, _SERIALIZATION)):
        if wanted:
            attributes[count].id, attributes[count].value = number, 1
            count += 1
    config = _Config(blocks, 1, 1, threads, 1, 1, shared, stream, attributes, count)
    places = (_pointer * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    _call("cuLaunchKernelEx", ctypes.byref(config), kernel, places, None)


class Graph:
    """Launches recorded from a stream, to be launched again by one call.

    Use as a context manager while recording.

    Args:
        stream: Of the driver, not the default stream.
    """

    def __init__(self, stream: int) -> None:
        self._stream = _pointer(stream)
        self._exec = _pointer()

    def __enter__(self) -> "Graph":
        thread_local = _int(1)  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call("cuStreamBeginCapture_v2", self._stream, thread_local)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        graph = _pointer()
        if kind is not None:
            _driver().cuStreamEndCapture(self._stream, ctypes.byref(graph))
            return
        _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        _call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_ulonglong(0))
        _call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Launch it in the stream it was recorded from."""
        _call("cuGraphLaunch", self._exec, self._stream)
