import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold_common import (
    CheckpointError,
    UserError,
    atomic_dir,
    atomic_write,
    check_output_dir,
    check_output_file,
    is_complete,
    mark_complete,
    newest_complete,
    prepare_output_dir,
    verify,
    write_json,
)
from tenfold_common import atomic as module

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30
).filter(lambda name: name not in (".", "..", "COMPLETE") and len(name.encode()) < 120)
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# atomic_write ---------------------------------------------------------------------------------


def test_file_reaches_the_disk_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    steps = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        steps.append(("sync", found.st_ino, found.st_size if stat.S_ISREG(found.st_mode) else None))
        real_fsync(descriptor)

    def replace(self, target):
        steps.append(("rename", self.stat().st_ino, Path(target).name))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with atomic_write(tmp_path / "x") as stream:
        stream.write(b"12345")
    file, folder = (tmp_path / "x").stat().st_ino, tmp_path.stat().st_ino
    assert steps == [("sync", file, 5), ("rename", file, "x"), ("sync", folder, None)]


@SHARED_FOLDER
@given(name=NAMES, old=st.binary(), new=st.binary())
def test_bytes_round_trip(tmp_path_factory, name, old, new):
    folder = tmp_path_factory.mktemp("bytes")
    for content in (old, new):
        with atomic_write(folder / name) as stream:
            stream.write(content)
        assert (folder / name).read_bytes() == content
        assert entries(folder) == [name]


@SHARED_FOLDER
@given(text=st.text(st.characters(codec="utf-8")))
def test_text_round_trip_is_utf8_and_keeps_line_ends(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a b ü.txt"
    with atomic_write(path, "w") as stream:
        stream.write(text)
    assert path.read_bytes() == text.encode("utf-8")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path, error):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as stream:  # noqa: PT012 - the block is the test
        stream.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["f"]


def test_readers_see_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with atomic_write(path) as stream:
        stream.write(b"new" * 10000)
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" * 10000


def test_an_existing_file_keeps_its_permissions_and_a_new_one_follows_the_umask(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"")
    path.chmod(0o640)
    with atomic_write(path) as stream:
        stream.write(b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    umask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "new"):
            pass
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "f", tmp_path / "link"
    link.symlink_to(real)
    with atomic_write(link) as stream:
        stream.write(b"x")
    assert link.is_symlink()
    assert real.read_bytes() == b"x"


def test_a_name_of_the_longest_length_works(tmp_path):
    path = tmp_path / ("ü" * 127)
    with atomic_write(path) as stream:
        stream.write(b"x")
    assert path.read_bytes() == b"x"


def test_atomic_write_refuses_bad_targets(tmp_path):
    with pytest.raises(UserError, match="it is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(UserError, match="does not exist"), atomic_write(tmp_path / "no" / "f"):
        pass
    with pytest.raises(UserError, match="mode must be"), atomic_write(tmp_path / "f", "a"):  # type: ignore[arg-type]
        pass
    assert entries(tmp_path) == []


# atomic_dir -----------------------------------------------------------------------------------

TREES = st.dictionaries(NAMES, st.binary(max_size=50), max_size=4)


@SHARED_FOLDER
@given(old=TREES, new=TREES)
def test_a_folder_round_trip_and_its_replacement(tmp_path_factory, old, new):
    parent = tmp_path_factory.mktemp("dir")
    for files in (old, new):
        with atomic_dir(parent / "step 1") as folder:
            fill(folder, files)
            assert not is_complete(folder)
        verify(parent / "step 1")
        assert is_complete(parent / "step 1")
        assert entries(parent) == ["step 1"]
        written = {p.name: p.read_bytes() for p in (parent / "step 1").iterdir()}
        written.pop("COMPLETE")
        assert written == files


def test_nested_files_are_listed_with_size_and_digest(tmp_path):
    with atomic_dir(tmp_path / "deep" / "er" / "x") as folder:
        fill(folder, {"a/b/c.bin": b"abc", "COMPLETE-not": b""})
    marker = json.loads((tmp_path / "deep/er/x/COMPLETE").read_text())
    assert marker["files"]["a/b/c.bin"] == {
        "size": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert sorted(marker["files"]) == ["COMPLETE-not", "a/b/c.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_folder_and_no_litter(tmp_path, error):
    with atomic_dir(tmp_path / "x") as folder:
        fill(folder, {"f": b"old"})
    with pytest.raises(error), atomic_dir(tmp_path / "x") as folder:  # noqa: PT012 - the block is the test
        fill(folder, {"f": b"new"})
        raise error
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "f").read_bytes() == b"old"
    assert entries(tmp_path) == ["x"]


def test_without_an_exchange_the_folder_is_still_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    for content in (b"old", b"new"):
        with atomic_dir(tmp_path / "x") as folder:
            fill(folder, {"f": content})
    assert (tmp_path / "x" / "f").read_bytes() == b"new"
    assert entries(tmp_path) == ["x"]


def test_without_an_exchange_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    with atomic_dir(tmp_path / "x") as folder:
        fill(folder, {"f": b"old"})
    real = Path.replace

    def second_fails(self, target):
        if Path(target).name == "x" and (self / "f").read_bytes() == b"new":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "x") as folder:
        fill(folder, {"f": b"new"})
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "f").read_bytes() == b"old"
    assert entries(tmp_path) == ["x"]


def test_exchange_swaps_or_says_that_it_cannot(tmp_path, monkeypatch):
    fill(tmp_path, {"a/f": b"a", "b/f": b"b"})
    swapped = module._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "f").read_bytes() == (b"b" if swapped else b"a")
    assert not module._exchange(tmp_path / "a", tmp_path / "absent")
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **named: object())  # a C library without it
    assert not module._exchange(tmp_path / "a", tmp_path / "b")


def test_foreign_folders_and_files_are_never_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="it is a file"), atomic_dir(tmp_path / "file"):
        pass
    fill(tmp_path / "home", {"thesis.txt": b"mine"})
    with pytest.raises(UserError, match=r"holds 'thesis\.txt'"), atomic_dir(tmp_path / "home"):
        pass
    with atomic_dir(tmp_path / "x") as folder:
        fill(folder, {"f": b"1"})
    fill(tmp_path / "x", {"notes.txt": b"mine"})
    with pytest.raises(UserError, match=r"holds 'notes\.txt'"), atomic_dir(tmp_path / "x"):
        pass
    assert (tmp_path / "x" / "notes.txt").read_bytes() == b"mine"


def test_a_file_put_there_meanwhile_is_not_lost(tmp_path):
    with (  # noqa: PT012 - the refusal comes at the end of the block
        pytest.raises(UserError, match="will not replace"),
        atomic_dir(tmp_path / "x") as folder,
    ):
        fill(folder, {"f": b"1"})
        fill(tmp_path / "x", {"other": b"2"})
    assert (tmp_path / "x" / "other").read_bytes() == b"2"
    assert entries(tmp_path) == ["x"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "x").mkdir()
    with atomic_dir(tmp_path / "x") as folder:
        fill(folder, {"f": b"1"})
    verify(tmp_path / "x")


# markers --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    fill(tmp_path / "s", {"model.bin": b"0123456789", "sub/state.json": b"{}"})
    mark_complete(tmp_path / "s")
    return tmp_path / "s"


def test_mark_complete_refuses_what_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="it is not a folder"):
        mark_complete(tmp_path / "absent")


def test_extra_files_do_not_spoil_a_folder(saved):
    fill(saved, {"README.md": b"hello"})
    verify(saved)
    mark_complete(saved)
    assert "README.md" in json.loads((saved / "COMPLETE").read_text())["files"]


def test_a_truncated_file_is_named(saved):
    (saved / "model.bin").write_bytes(b"01234")
    assert not is_complete(saved)
    with pytest.raises(CheckpointError, match=r"model\.bin' has 5 bytes instead of 10"):
        verify(saved)


@given(position=st.integers(0, 9), bit=st.integers(0, 7))
@SHARED_FOLDER
def test_every_flipped_bit_is_found(saved, position, bit):
    data = bytearray(b"0123456789")
    data[position] ^= 1 << bit
    (saved / "model.bin").write_bytes(data)
    assert is_complete(saved)  # the sizes fit: only the digest can tell
    with pytest.raises(CheckpointError, match=r"model\.bin' was altered"):
        verify(saved)


def test_a_missing_file_is_named(saved):
    (saved / "sub" / "state.json").unlink()
    assert not is_complete(saved)
    with pytest.raises(CheckpointError, match=r"sub/state\.json' cannot be read: No such file"):
        verify(saved)


def test_a_file_that_became_a_folder_is_named(saved):
    (saved / "model.bin").unlink()
    (saved / "model.bin").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.bin' cannot be read"):
        verify(saved)


def test_no_marker_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="it has no COMPLETE file"):
        verify(tmp_path)
    assert not is_complete(tmp_path / "absent")


ENTRY = '{"size": 1, "sha256": "00"}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "\x00\x01",
        '{"schema": "tenfold-complete/1"}',
        '{"schema": "tenfold-complete/9", "files": {}}',
        '{"schema": "tenfold-complete/1", "files": []}',
        '{"schema": "tenfold-complete/1", "files": {"a": 3}}',
        '{"schema": "tenfold-complete/1", "files": {"a": {"size": 1}}}',
        '{"schema": "tenfold-complete/1", "files": {"a": {"size": "1", "sha256": "00"}}}',
        '{"schema": "tenfold-complete/1", "files": {"../model.bin": ENTRY}}',
        '{"schema": "tenfold-complete/1", "files": {"/etc/passwd": ENTRY}}',
        '{"schema": "tenfold-complete/1", "files": {"": ENTRY}}',
        '{"schema": "tenfold-complete/1", "files": {"a\\u0000": ENTRY}}',
        "[" * 100_000,
    ],
    ids=lambda content: repr(content[-44:]),
)
def test_a_bad_marker_is_a_checkpoint_error(saved, content):
    (saved / "COMPLETE").write_text(content.replace("ENTRY", ENTRY))
    assert not is_complete(saved)
    with pytest.raises(CheckpointError, match="COMPLETE'"):
        verify(saved)


@given(content=st.binary(max_size=200))
@SHARED_FOLDER
def test_random_markers_never_raise_anything_else(saved, content):
    (saved / "COMPLETE").write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(saved)


# newest_complete ------------------------------------------------------------------------------


def test_newest_goes_by_number_and_names_what_it_skips(tmp_path):
    for step in (9, 10, 200, 1000, 2000):
        with atomic_dir(tmp_path / f"checkpoint-{step}") as folder:
            fill(folder, {"model.bin": b"x" * 10})
    (tmp_path / "checkpoint-2000" / "model.bin").write_bytes(b"x")
    (tmp_path / "checkpoint-1000" / "COMPLETE").unlink()
    (tmp_path / "checkpoint-9999").write_bytes(b"a file, not a folder")
    found, skipped = newest_complete(tmp_path, "checkpoint-*")
    assert found == tmp_path / "checkpoint-200"
    assert [path.name for path, _ in skipped] == ["checkpoint-2000", "checkpoint-1000"]
    assert "has 1 bytes instead of 10" in skipped[0][1]
    assert "has no COMPLETE file" in skipped[1][1]


def test_temporary_folders_are_passed_over(tmp_path):
    (tmp_path / ".step-3.0123456789ab.tmp").mkdir()
    mark_complete(tmp_path / ".step-3.0123456789ab.tmp")
    found, skipped = newest_complete(tmp_path)
    assert found is None
    assert skipped[0][1].startswith("a temporary folder")


def test_a_missing_parent_has_no_checkpoint(tmp_path):
    assert newest_complete(tmp_path / "absent") == (None, [])


# prepare_output_dir ---------------------------------------------------------------------------


def test_a_new_and_an_empty_folder_are_taken(tmp_path):
    assert prepare_output_dir(tmp_path / "a" / "b ü") == tmp_path / "a" / "b ü"
    assert prepare_output_dir(str(tmp_path / "a" / "b ü"), overwrite=True).is_dir()
    assert prepare_output_dir(tmp_path / "c", resume=True).is_dir()


def test_a_used_folder_needs_a_flag(tmp_path):
    fill(tmp_path / "out", {"model.bin": b"x", "sub/y": b"y"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"k")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"not empty \(3 entries, one is 'link'\)"):
        prepare_output_dir(tmp_path / "out")
    prepare_output_dir(tmp_path / "out", resume=True)
    assert entries(tmp_path / "out") == ["link", "model.bin", "sub"]
    prepare_output_dir(tmp_path / "out", overwrite=True)
    assert entries(tmp_path / "out") == []
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_flags_and_kinds_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="exclude each other"):
        prepare_output_dir(tmp_path, resume=True, overwrite=True)
    fill(tmp_path, {"f": b""})
    with pytest.raises(UserError, match="is a file"):
        prepare_output_dir(tmp_path / "f")
    with pytest.raises(UserError, match="cannot make the output folder"):
        prepare_output_dir(tmp_path / "f" / "below")


def test_dear_folders_are_never_overwritten(tmp_path, monkeypatch):
    fill(tmp_path, {"work/.git/HEAD": b"", "home/thesis": b"", "here/in/x": b""})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here" / "in")
    for name in ("work", "home", "here", "here/in", "."):
        with pytest.raises(UserError, match="will not overwrite"):
            prepare_output_dir(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis").exists()


@pytest.mark.parametrize("given", ["out", "out/deep/model.bin", "out/link", ".", "alias"])
def test_what_a_job_reads_is_never_overwritten(tmp_path, given):
    fill(tmp_path, {"out/deep/model.bin": b"x", "elsewhere/y": b"y"})
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "alias").symlink_to(tmp_path / "out" / "deep")
    inputs = [None, tmp_path / "absent", tmp_path / "elsewhere", tmp_path / given]
    with pytest.raises(UserError, match=r"will not overwrite .* the input"):
        prepare_output_dir(tmp_path / "out", overwrite=True, inputs=inputs)
    assert (tmp_path / "out" / "deep" / "model.bin").exists()
    prepare_output_dir(tmp_path / "out", overwrite=True, inputs=inputs[:3])
    assert entries(tmp_path / "out") == []


def test_a_check_deletes_and_makes_nothing(tmp_path):
    fill(tmp_path, {"out/x": b"x"})
    assert check_output_dir(tmp_path / "out", overwrite=True) == tmp_path / "out"
    assert check_output_dir(tmp_path / "new") == tmp_path / "new"
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == ["x"]
    with pytest.raises(UserError, match="not empty"):
        check_output_dir(tmp_path / "out")


def test_an_output_file_is_no_input(tmp_path):
    fill(tmp_path, {"a.json": b"{}"})
    (tmp_path / "link").symlink_to("a.json")
    check_output_file(tmp_path / "b.json", inputs=[tmp_path / "a.json", None])
    for name in ("a.json", "link"):
        with pytest.raises(UserError, match="would be overwritten"):
            check_output_file(tmp_path / name, inputs=[None, tmp_path / "a.json"])


def test_a_job_that_goes_on_does_not_write_into_its_input(tmp_path):
    fill(tmp_path, {"model/x": b"x"})
    (tmp_path / "alias").symlink_to("model")
    with pytest.raises(UserError, match="is also an input"):
        prepare_output_dir(tmp_path / "model", resume=True, inputs=[None, tmp_path / "alias"])
    prepare_output_dir(tmp_path / "model", resume=True, inputs=[tmp_path / "model" / "x"])
    with pytest.raises(UserError) as error:
        check_output_dir(tmp_path / "model")
    assert "--resume" not in str(error.value)


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    """A device or a pipe is not replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(tmp_path / "pipe", {"a": 1})
        assert json.loads(os.read(reader, 100)) == {"a": 1}
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert entries(tmp_path) == ["pipe"]
    with atomic_write("/dev/null", "w") as file:
        file.write("x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_json_holds_names_that_are_no_text(tmp_path):
    write_json(tmp_path / "a.json", {"file": "\udcff\u00fc"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"file": "\udcff\u00fc"}
    write_json(tmp_path / "a.json", {"file": "\u00fc"})
    assert "\u00fc" in (tmp_path / "a.json").read_text("utf-8")


def test_a_file_of_a_folder_that_is_read_is_no_output(tmp_path):
    fill(tmp_path, {"model/config.json": b"{}"})
    with pytest.raises(UserError, match="would be overwritten"):
        check_output_file(tmp_path / "model" / "config.json", inputs=[tmp_path / "model"])
    check_output_file(tmp_path / "model" / "figures.json", inputs=[tmp_path / "model"])


LEAVES = """
import os, signal, sys
from tenfold_common.atomic import atomic_dir
with atomic_dir(sys.argv[1]) as folder:
    (folder / "half").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_runs_left_is_deleted_by_the_next(tmp_path, monkeypatch):
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", LEAVES, str(out)], check=False, timeout=60)
    [left] = tmp_path.iterdir()
    fill(tmp_path, {
        ".other.0123456789ab.tmp/x": b"", ".out.0123456789ab.tmp/x": b"", ".out.mine.tmp/x": b"",
    })  # fmt: skip
    whole = tmp_path / ".out.0123456789ab.tmp"
    mark_complete(whole)
    with atomic_dir(out):
        assert left.exists(), "it was made a moment ago"
    monkeypatch.setattr(module, "_FRESH", -1)
    with atomic_dir(out) as one, atomic_dir(out):
        assert one.exists(), "somebody is at work in it"
        assert not left.exists()
        assert whole.exists()
    assert entries(tmp_path) == sorted([
        ".other.0123456789ab.tmp", ".out.0123456789ab.tmp", ".out.mine.tmp", "out",
    ])  # fmt: skip
