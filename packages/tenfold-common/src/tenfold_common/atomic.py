"""Files and folders that are either whole or not there, and the marker that proves it.

A folder written here ends with a file `COMPLETE`: JSON with the size and SHA-256 of every file.
It is written last, so a folder without it, or one whose files differ from it, was cut short or
altered.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from tenfold_common.errors import CheckpointError, UserError

MARKER = "COMPLETE"
_SCHEMA = "tenfold-complete/1"
_FRESH = 60  # seconds in which a folder is not taken for one that a killed run left


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO]:
    """Write a file so that readers see the old content or the new, never a part.

    The data goes to a temporary sibling that is synced to disk and then renamed. If the block
    raises anything, Ctrl-C included, the sibling is removed and the old file stays as it was. A
    symbolic link is written through, and an existing file keeps its permissions. What is no file
    (a device, a pipe) is written to as it is.

    Args:
        path: The file to write; its folder must exist.
        mode: `"wb"` for bytes, `"w"` for text in UTF-8 with line feeds.

    Yields:
        The open file.

    Raises:
        UserError: the mode is unknown, the path is a folder, or its parent is not.
    """
    if mode not in ("wb", "w"):
        raise UserError(f"mode must be 'wb' or 'w', not {mode!r}")
    target = Path(os.path.realpath(path))
    encoding, newline = ("utf-8", "\n") if mode == "w" else (None, None)
    if target.is_dir():
        raise UserError(f"cannot write the file {str(path)!r}: it is a folder")
    if Path(path).exists() and not Path(path).is_file():  # /dev/stdout, a pipe: nothing to replace
        with Path(path).open(mode, encoding=encoding, newline=newline) as stream:
            yield stream
        return
    if not target.parent.is_dir():
        raise UserError(
            f"cannot write {str(path)!r}: the folder {str(target.parent)!r} does not exist"
        )
    temporary = _sibling(target)
    try:
        with temporary.open(mode.replace("w", "x"), encoding=encoding, newline=newline) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


@contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder so that it appears whole, with its marker, or not at all.

    The block writes into a temporary sibling. On success every file is synced, the marker is
    written and the sibling takes the name. An earlier complete folder of that name is swapped out
    in one step on Linux; elsewhere it is first moved to a sibling `.NAME.*.tmp`, so that a crash
    between the two renames leaves the name free and both folders whole. If the block raises,
    nothing changes. Half-filled siblings that killed runs left are deleted.

    Args:
        path: The folder to make; its parent is made if missing.

    Yields:
        The temporary folder to write into.

    Raises:
        UserError: the path is a file, or a folder with anything that its marker does not list (it
            would be deleted).
    """
    from shutil import rmtree

    target = Path(os.path.realpath(path))
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_behind(target):
        rmtree(left, ignore_errors=True)
    temporary = _sibling(target)
    temporary.mkdir()
    held = _flock(temporary)  # the sign that somebody is at work in it
    try:
        yield temporary
        mark_complete(temporary)
        _check_replaceable(target)
        if target.exists() and not _exchange(temporary, target):
            aside = _sibling(target)
            target.replace(aside)
            try:
                temporary.replace(target)
            except BaseException:
                aside.replace(target)
                raise
            temporary = aside
        elif not target.exists():
            temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def mark_complete(path: str | os.PathLike[str]) -> None:
    """Sync a folder that someone else has written and put the marker into it.

    Args:
        path: An existing folder, for example a checkpoint of the transformers Trainer.

    Raises:
        UserError: the path is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"cannot mark {str(path)!r} as complete: it is not a folder")
    files = {}
    for name in _files(folder):
        with (folder / name).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            files[name] = {"size": size, "sha256": _digest(stream)}
            os.fsync(stream.fileno())
    for inner, _, _ in os.walk(folder):
        _sync_folder(Path(inner))
    with atomic_write(folder / MARKER, "w") as stream:
        json.dump({"schema": _SCHEMA, "files": files}, stream, indent=1)


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Say whether a folder has a readable marker and every file in it has its size (no hashing)."""
    try:
        _compare(Path(path), hashing=False)
    except CheckpointError:
        return False
    return True


def verify(path: str | os.PathLike[str]) -> None:
    """Compare every file of a folder with its marker, by size and SHA-256.

    Files that the marker does not list are left alone: adding a README does not spoil a checkpoint.

    Args:
        path: The folder.

    Raises:
        CheckpointError: the marker is missing or unreadable, or a file is missing or differs; the
            message names the file.
    """
    _compare(Path(path), hashing=True)


def newest_complete(
    parent: str | os.PathLike[str], pattern: str = "*"
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest whole folder to resume from.

    "Newest" goes by the numbers in the names (`checkpoint-1000` comes after `checkpoint-200`),
    since copying changes times. Each candidate is checked with `verify`.

    Args:
        parent: The folder to look in; it may be missing.
        pattern: Which names to consider, as for `Path.glob`. Defaults to all.

    Returns:
        The folder or None, and what was passed over: (folder, reason) pairs, newest first.
    """
    skipped: list[tuple[Path, str]] = []
    candidates = (p for p in Path(parent).glob(pattern) if p.is_dir())
    for folder in sorted(candidates, key=_natural, reverse=True):
        if folder.name.startswith(".") and folder.name.endswith(".tmp"):
            skipped.append((folder, "a temporary folder of a run that was cut short"))
            continue
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def prepare_output_dir(
    path: str | os.PathLike[str],
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """Make an output folder, and refuse one that holds something unless told what to do with it.

    Args:
        path: The folder.
        resume: Accept a folder with content and leave the content as it is. None where the job
            has no such option.
        overwrite: Delete the content first. Refused for the current folder, the home folder, a
            folder around either and a git checkout.
        inputs: Files and folders that the job reads; None and names that are not there are passed
            over. What is one of them is never written to; what holds one or lies in one is never
            overwritten.

    Returns:
        The folder, which now exists.

    Raises:
        UserError: it is not empty and neither flag is given, both are given, it is not a folder, it
            cannot be made, or it is too dear to delete.
    """
    from shutil import rmtree

    folder = check_output_dir(path, resume=resume, overwrite=overwrite, inputs=inputs)
    if overwrite and folder.is_dir():
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                rmtree(entry)
            else:
                entry.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {str(path)!r}: {error.strerror}") from error
    return folder


def check_output_dir(
    path: str | os.PathLike[str],
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """Say before a long job whether `prepare_output_dir` will refuse; nothing is made or deleted.

    The arguments and errors are those of `prepare_output_dir`, but for a folder that cannot be
    made.

    Returns:
        The folder, which may not exist yet.
    """
    folder = Path(path)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output folder {str(path)!r} is a file")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if entries and not resume and not overwrite:
        raise UserError(
            f"the output folder {str(path)!r} is not empty ({len(entries)} entries, one is "
            f"{entries[0].name!r}). Choose another, or give "
            f"{'' if resume is None else '--resume to go on, '}--overwrite to start anew."
        )
    real = folder.resolve()
    for one in inputs if entries and resume else ():
        if one is not None and Path(one).exists() and Path(one).resolve() == real:
            raise UserError(
                f"the output folder {str(path)!r} is also an input. Choose another output folder."
            )
    if entries and overwrite:
        around = any(place.resolve().is_relative_to(real) for place in (Path.cwd(), Path.home()))
        if around or (real / ".git").exists():
            raise UserError(
                f"will not overwrite {str(path)!r}: it is a git checkout, or the current or home "
                "folder lies in it. Choose another output folder."
            )
        for one in inputs:
            if one is None or not Path(one).exists():
                continue
            link = Path(one).parent.resolve() / Path(one).name  # itself, not only what it names
            places = (Path(one).resolve(), link)
            if any(p.is_relative_to(real) or real.is_relative_to(p) for p in places):
                raise UserError(
                    f"will not overwrite {str(path)!r}: the input {str(one)!r} is that folder, or "
                    "one of them lies in the other. Choose another output folder."
                )
    return folder


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file at once: a kill leaves the old file or the new one.

    Args:
        path: The file; its folder must exist.
        value: What `json.dump` takes.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # of a name of a file that is not UTF-8
        text = json.dumps(value, indent=1)
    with atomic_write(path, "w") as file:
        file.write(f"{text}\n")


def check_output_file(
    path: str | Path, *, inputs: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Say before a long job whether its output file can be written.

    Args:
        path: The file to be written later.
        inputs: Files and folders that the job reads, and other files that it writes; None is
            passed over.

    Raises:
        UserError: it is a folder, one of the inputs or a file of one of them, or the folder it lies
            in is absent or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory.")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {path.parent} is not writable.")
    real = path.resolve()
    for one in (Path(one).resolve() for one in inputs if one is not None):
        if real == one or (path.exists() and one.is_dir() and real.is_relative_to(one)):
            raise UserError(f"{path} would be overwritten; name another file.")


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[Path]:
    """Make a folder and keep other runs from writing to it inside the block.

    The lock lies on the folder itself, so it leaves no file behind, and the operating system lets
    go of it when the process ends, killed or not. Where folders cannot be locked (Windows, some
    network file systems) there is no lock.

    Raises:
        UserError: another run holds the folder, or it cannot be made.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output folder {str(folder)!r} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the output folder {str(folder)!r}: {error.strerror or error}"
        ) from error
    try:
        handle = _flock(folder)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {folder}.") from error
    try:
        yield folder
    finally:
        if handle is not None:
            os.close(handle)


def _flock(folder: Path) -> int | None:
    """Lock a folder until the handle returned is closed; None where folders cannot be locked.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(*error.args) from error
        return None
    return handle


def _left_behind(target: Path) -> Iterator[Path]:
    """Yield the siblings of a folder in which killed runs were at work: neither whole nor held."""
    name = re.compile(rf"\.{re.escape(target.name[:40])}\.[0-9a-f]{{12}}\.tmp")
    for one in sorted(target.parent.iterdir()):
        if not name.fullmatch(one.name) or not one.is_dir() or (one / MARKER).exists():
            continue
        with suppress(OSError):  # it is held, or gone
            handle = _flock(one)
            # One that was made just now is perhaps not locked yet.
            if handle is not None:
                os.close(handle)
                if time.time() - one.stat().st_mtime > _FRESH:
                    yield one


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name[:40]}.{os.urandom(6).hex()}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[str]:
    """List the files of a folder, the marker left out: relative, with forward slashes, sorted."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return sorted(name for name in names if name != MARKER)


def _check_replaceable(target: Path) -> None:
    """Refuse to replace anything that `atomic_dir` or `mark_complete` has not written."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"cannot write the folder {str(target)!r}: it is a file")
    present = _files(target)
    listed = _read_marker(target) if (target / MARKER).is_file() else {}
    foreign = [name for name in present if name not in listed]
    if foreign:
        raise UserError(
            f"will not replace the folder {str(target)!r}: it holds {foreign[0]!r}, which is not "
            f"in its {MARKER} marker. Move it away or choose another folder."
        )


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (renameat2, RENAME_EXCHANGE); False where impossible."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = -100  # AT_FDCWD
    return rename(here, os.fsencode(one), here, os.fsencode(other), 2) == 0


def _read_marker(folder: Path) -> dict[str, dict]:
    marker = folder / MARKER
    if not marker.is_file():
        raise CheckpointError(f"{str(folder)!r} is not complete: it has no {MARKER} file")
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        files = content["files"]
        fits = content["schema"] == _SCHEMA and all(
            isinstance(entry["size"], int) and isinstance(entry["sha256"], str)
            for entry in files.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(marker)!r} cannot be read: {error!r}") from error
    inside = all(
        ".." not in (parts := name.split("/")) and parts[0] and "\0" not in name for name in files
    )
    if not fits or not inside:
        raise CheckpointError(f"{str(marker)!r} is not a marker of schema {_SCHEMA}")
    return files


def _compare(folder: Path, *, hashing: bool) -> None:
    for name, entry in _read_marker(folder).items():
        file = folder / name
        try:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != entry["size"]:
                    raise CheckpointError(
                        f"{str(file)!r} has {size} bytes instead of {entry['size']}"
                    )
                if hashing and _digest(stream) != entry["sha256"]:
                    raise CheckpointError(f"{str(file)!r} was altered: its SHA-256 differs")
        except OSError as error:
            raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror}") from error


def _digest(stream: IO[bytes]) -> str:
    from hashlib import file_digest

    return file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _natural(path: Path) -> list[str | int]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
