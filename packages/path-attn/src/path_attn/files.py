"""Files and folders the user names: checked before the work.

Standard library only, so that a wrong path is answered before torch is loaded.
"""

from pathlib import Path

from tenfold_common.errors import UserError


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
