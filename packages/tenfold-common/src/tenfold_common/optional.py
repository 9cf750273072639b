"""Optional dependencies, looked up when they are used and explained when they are missing."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from tenfold_common.errors import MissingDependencyError


def require(module: str, *, extra: str, package: str, purpose: str = "") -> ModuleType:
    """Import an optional module, or say in one line how to get it.

    Args:
        module: Dotted name to import, such as `"vllm"`.
        extra: The extra of `package` that brings it.
        package: Distribution name of the caller, such as `"path-attn"`.
        purpose: What it is needed for, such as `"--backend vllm"`. Defaults to nothing.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: the module is absent, or it is there and fails to import.
    """
    reason = f" for {purpose}" if purpose else ""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise MissingDependencyError(
                f"{package} needs {module}{reason}. Install it with: "
                f"pip install '{package}[{extra}]'"
            ) from error
        failure = error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        failure = error
    raise MissingDependencyError(
        f"{package} needs {module}{reason}, which is installed but does not import: "
        f"{type(failure).__name__}: {failure}. Mend it, or make a new environment with: "
        f"pip install '{package}[{extra}]'"
    ) from failure


def is_available(module: str) -> bool:
    """Say whether a module is there to import, without importing it (parents excepted)."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
