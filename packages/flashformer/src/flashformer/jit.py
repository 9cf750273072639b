"""Compiles the C++ sources at first use and keeps the result, keyed by all that it depends on."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tenfold_common.atomic import atomic_write
from tenfold_common.errors import TenfoldError

SOURCES = Path(__file__).resolve().parent / "csrc" / "cpu"
ISAS = ("auto", "avx512", "avx2", "portable")
_FLAGS = {
    "auto": ["-march=native"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx2": ["-march=x86-64-v3", "-DFF_AVX2"],
    "portable": ["-DFF_PORTABLE"],
}


class CompilerError(TenfoldError, RuntimeError):
    """There is no C++ compiler, or it failed."""


def cache_folder() -> Path:
    """Return where compiled libraries are kept: `FLASHFORMER_CACHE`, or the user's cache folder."""
    named = os.environ.get("FLASHFORMER_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashformer"


def compiler() -> str:
    """Return the C++ compiler: `CXX`, or the first of c++, g++ and clang++ on the path.

    Raises:
        CompilerError: there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if name and (found := shutil.which(name)):
            return found
    raise CompilerError(
        f"CXX names {named!r}, which is not there"
        if named
        else "there is no C++ compiler (c++, g++ or clang++); install one, such as Debian's g++"
    )


@cache
def library(isa: str = "auto", extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the CPU library, compiled if it is not in the cache.

    Args:
        isa: One of `ISAS`; auto takes the best this processor has.
        extra: More flags of the compiler, such as those of a sanitizer.

    Raises:
        CompilerError: there is no compiler or it failed; the message has its last lines.
    """
    path = build(isa, extra)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f"{path} cannot be loaded ({error}); delete it") from error


def build(isa: str = "auto", extra: tuple[str, ...] = ()) -> Path:
    """Return the compiled library's file; see `library`."""
    command = [
        compiler(), "-std=c++20", "-O3", *_FLAGS[isa], "-shared", "-fPIC", "-pthread", *extra,
    ]  # fmt: skip
    digest = hashlib.sha256("\0".join([*command, _version(command[0]), _processor()]).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    target = cache_folder() / f"cpu-{isa}-{digest.hexdigest()[:20]}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, "wb") as stream:
            _compile(command, Path(stream.name))
    except OSError as error:
        raise CompilerError(
            f"{target.parent} cannot be written ({error}); name another folder by FLASHFORMER_CACHE"
        ) from error
    return target


def _compile(command: list[str], target: Path) -> None:
    done = subprocess.run(  # noqa: S603 - the compiler found above
        [*command, str(SOURCES / "decode.cpp"), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


@cache
def _version(compiler: str) -> str:
    done = subprocess.run(  # noqa: S603 - the compiler found above
        [compiler, "--version"], capture_output=True, text=True, check=False
    )
    return done.stdout


@cache
def _processor() -> str:
    """Return what instructions this processor has: a library from another one may not run."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    except OSError:
        pass
    return platform.machine() + platform.processor()
