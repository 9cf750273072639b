"""Power cuts, full disks and Ctrl-C, each in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

from tenfold_common import atomic_dir, is_complete, newest_complete, verify

WRITER = """
import sys
from pathlib import Path
from tenfold_common import atomic_dir
target = Path(sys.argv[1])
number = 0
while True:
    number += 1
    with atomic_dir(target) as folder:
        for part in range(4):
            (folder / f"part{part}").write_bytes(str(number).encode().rjust(12, b"0") * 4000)
    print(number, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_folder(tmp_path):
    target = tmp_path / "ckpt"
    leftovers = 0
    for trial in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline()  # the first version is there
            time.sleep(0.003 * trial)
            writer.send_signal(signal.SIGKILL)
        verify(target)
        assert len({(target / f"part{part}").read_bytes() for part in range(4)}) == 1
        leftovers += sum(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    found, _ = newest_complete(tmp_path)
    assert found == target
    assert leftovers, "no kill fell into a write: the test shows nothing"


@pytest.mark.parametrize(
    "place", ["tenfold_common.atomic.mark_complete", "tenfold_common.atomic._exchange"]
)
def test_sigkill_at_a_chosen_point_leaves_the_old_folder(tmp_path, place):
    code = f"""
import os, signal, sys
from pathlib import Path
from unittest import mock
from tenfold_common import atomic_dir
with atomic_dir(sys.argv[1]) as folder:
    (folder / "f").write_text("old")
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
with mock.patch("{place}", die), atomic_dir(sys.argv[1]) as folder:
    (folder / "f").write_text("new")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "f").read_text() == "old"


def test_sigkill_before_the_first_rename_leaves_nothing_of_that_name(tmp_path):
    code = """
import os, signal, sys
from tenfold_common import atomic_dir
with atomic_dir(sys.argv[1]) as folder:
    (folder / "f").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], timeout=60)
    assert not (tmp_path / "x").exists()
    found, skipped = newest_complete(tmp_path)
    assert found is None
    assert len(skipped) == 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tenfold_common import atomic_dir, atomic_write
from tenfold_common.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
with atomic_write(folder / "f") as stream:
    stream.write(b"old")
with atomic_dir(folder / "d") as inner:
    (inner / "f").write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def file(argv):
    with atomic_write(folder / "f") as stream:
        stream.write(b"x" * 5000)
def directory(argv):
    with atomic_dir(folder / "d") as inner:
        (inner / "f").write_bytes(b"x" * 5000)
def marker(argv):
    with atomic_dir(folder / "d") as inner:
        for i in range(40):
            (inner / f"f{i}").write_bytes(b"")
sys.exit(run({"file": file, "directory": directory, "marker": marker}[sys.argv[2]], []))
"""


@pytest.mark.parametrize("kind", ["file", "directory", "marker"])
def test_a_full_disk_leaves_the_old_content_and_one_line(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "error: File too large\n"
    assert (tmp_path / "f").read_bytes() == b"old"
    verify(tmp_path / "d")
    assert (tmp_path / "d" / "f").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "f"]


def test_ctrl_c_cleans_up(tmp_path):
    code = """
import signal, sys, time
from tenfold_common import atomic_dir, atomic_write
from tenfold_common.cli import run
# a parent that ignores Ctrl-C (nohup, some CI runners) hands that down
signal.signal(signal.SIGINT, signal.default_int_handler)
def main(argv):
    with atomic_dir(argv[0]) as folder, atomic_write(folder / "f") as stream:
        stream.write(b"x")
        print("ready", flush=True)
        time.sleep(60)
sys.exit(run(main))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        writer.send_signal(signal.SIGINT)
        _, errors = writer.communicate(timeout=30)
    assert writer.returncode == 130
    assert errors == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_leave_one_whole_folder(tmp_path):
    code = """
import sys
from tenfold_common import atomic_dir
for _ in range(30):
    with atomic_dir(sys.argv[1]) as folder:
        for part in range(3):
            (folder / f"part{part}").write_text(sys.argv[2] * 1000)
"""
    with atomic_dir(tmp_path / "x") as folder:  # so that both runs replace it
        (folder / "part0").write_text("start")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x"), name])
        for name in ("a", "b")
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert is_complete(tmp_path / "x")
    verify(tmp_path / "x")
    assert len({(tmp_path / "x" / f"part{part}").read_text() for part in range(3)}) == 1
