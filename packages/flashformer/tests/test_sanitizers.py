"""No data race, no access outside of memory, no undefined behaviour, in any format."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashformer import jit

DRIVER = """
import sys
import torch
torch.set_num_threads(1)
from flashformer.backends import cpu
import bare_model
load = cpu.load_library
cpu.load_library = lambda isa="auto": load(isa, tuple(sys.argv[1:]))
cpu.aligned = lambda size: torch.zeros(size, dtype=torch.uint8)  # watched, and not a byte too long
for format, symmetric in [*((f, True) for f in ("fp32", "bf16", "int8", "int4")), ("int4", False)]:
    backend = bare_model.make(format, symmetric=symmetric)
    for threads in (3, 1, 2, 3):
        found = bare_model.decode(backend, threads=threads, temperature=0.7, seed=1)
        assert len(found) == 36
    bare_model.decode(backend, threads=3, ends=[found[5]])
    bare_model.decode(backend, threads=3, cancel=torch.ones(1, dtype=torch.int32))
print("done")
"""
KINDS = {
    # The flags, the runtime and its options.
    "thread": (["-fsanitize=thread"], "libtsan.so", {"TSAN_OPTIONS": "exitcode=66"}),
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=66", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
}


def runtime(name):
    """The sanitizer's library, which must be loaded before Python's own memory functions."""
    gcc = jit.compiler()
    shown = subprocess.run(
        [gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=False
    )
    path = Path(shown.stdout.strip())
    if not path.is_absolute():  # clang, or no such library
        pytest.skip(f"{Path(gcc).name} has no {name}")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_sanitizers_have_nothing_to_report(kind):
    flags, library, options = KINDS[kind]
    environment = {
        **os.environ, **options, "LD_PRELOAD": str(runtime(library)), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }  # fmt: skip
    jit.build("auto", ("-O1", "-g", *flags))  # here, where no sanitizer slows the compiler
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "-O1", "-g", *flags],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert "ERROR: " not in done.stderr, done.stderr[-6000:]
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[-6000:]
    assert "runtime error" not in done.stderr, done.stderr[-6000:]
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-6000:]


RACE = """
#include <thread>
int main() {
  int n = 0;
  std::thread t([&] { n = 1; });
  n = 2;
  t.join();
  return 0;
}
"""


def test_a_race_would_be_reported(tmp_path):
    runtime("libtsan.so")
    source = tmp_path / "race.cpp"
    source.write_text(RACE)
    compiled = subprocess.run(
        [jit.compiler(), "-fsanitize=thread", "-g", "-pthread", source, "-o", tmp_path / "race"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    assert shutil.which(str(tmp_path / "race"))
    done = subprocess.run(
        [tmp_path / "race"], capture_output=True, text=True, check=False,
        env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
    )  # fmt: skip
    assert done.returncode == 66
    assert "data race" in done.stderr
