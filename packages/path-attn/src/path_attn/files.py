"""Files and folders the user names: checked before the work, locked while a run writes.

Standard library only, so that a wrong path is answered before torch is loaded.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold_common.atomic import atomic_write
from tenfold_common.errors import UserError


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file at once: a kill leaves the old file or the new one."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def check_text_file(path: str | Path) -> None:
    """Raise `UserError` if a file is not there, is a directory, cannot be read or is empty."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory; a text file is needed.")
    try:
        with Path(path).open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty.")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def check_model_folder(path: str | Path) -> None:
    """Raise `UserError` if a path is not a folder."""
    if not Path(path).is_dir():
        raise UserError(
            f"{path} is {'a file' if Path(path).exists() else 'not there'}; give the folder of a "
            "trained model."
        )


def check_output_file(path: str | Path) -> None:
    """Raise `UserError` if a file could not be written: its folder must be there and writable."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory.")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {path.parent} is not writable.")


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
        import fcntl
    except ImportError:
        yield folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"another run is writing to {folder}.") from error
        yield folder
    finally:
        os.close(handle)
