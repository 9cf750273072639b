"""What the tenfold packages share: errors, atomic files, results, command lines, test rules.

Importing this package costs next to nothing: every name is looked up in its module on first use
(PEP 562), and no module imports anything but the standard library until a function needs more.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tenfold_common._version import __version__

if TYPE_CHECKING:
    from tenfold_common.atomic import (
        atomic_dir,
        atomic_write,
        check_output_dir,
        check_output_file,
        is_complete,
        locked_folder,
        mark_complete,
        newest_complete,
        prepare_output_dir,
        verify,
        write_json,
    )
    from tenfold_common.cli import base_parser, run, setup_logging
    from tenfold_common.device import Choice, resolve_device, resolve_dtype
    from tenfold_common.errors import (
        CheckpointError,
        MissingDependencyError,
        TenfoldError,
        UserError,
        suggest,
    )
    from tenfold_common.lm import (
        Generation,
        Score,
        ScriptedModel,
        ServerModel,
        TextModel,
        TransformersModel,
        VLLMModel,
        load_text_model,
    )
    from tenfold_common.optional import is_available, require
    from tenfold_common.report import html_report
    from tenfold_common.results import (
        Claim,
        Figure,
        Result,
        Sample,
        Table,
        environment,
        load_bench,
        update_between_markers,
        write_bench,
    )
    from tenfold_common.seed import generator, seed_everything
    from tenfold_common.testing import (
        assert_matches_reference,
        no_network,
        poisoned_empty,
        rms_ratio,
    )
    from tenfold_common.tiny import byte_tokenizer, tiny_llama, tiny_qwen, word_tokenizer

_MODULES = {
    "atomic": "atomic_dir atomic_write check_output_dir check_output_file is_complete "
    "locked_folder mark_complete newest_complete prepare_output_dir verify write_json",
    "cli": "base_parser run setup_logging",
    "device": "Choice resolve_device resolve_dtype",
    "errors": "CheckpointError MissingDependencyError TenfoldError UserError suggest",
    "lm": "Generation Score ScriptedModel ServerModel TextModel TransformersModel VLLMModel "
    "load_text_model",
    "optional": "is_available require",
    "report": "html_report",
    "results": "Claim Figure Result Sample Table environment load_bench update_between_markers "
    "write_bench",
    "seed": "generator seed_everything",
    "testing": "assert_matches_reference no_network poisoned_empty rms_ratio",
    "tiny": "byte_tokenizer tiny_llama tiny_qwen word_tokenizer",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "CheckpointError",
    "Choice",
    "Claim",
    "Figure",
    "Generation",
    "MissingDependencyError",
    "Result",
    "Sample",
    "Score",
    "ScriptedModel",
    "ServerModel",
    "Table",
    "TenfoldError",
    "TextModel",
    "TransformersModel",
    "UserError",
    "VLLMModel",
    "__version__",
    "assert_matches_reference",
    "atomic_dir",
    "atomic_write",
    "base_parser",
    "byte_tokenizer",
    "check_output_dir",
    "check_output_file",
    "environment",
    "generator",
    "html_report",
    "is_available",
    "is_complete",
    "load_bench",
    "load_text_model",
    "locked_folder",
    "mark_complete",
    "newest_complete",
    "no_network",
    "poisoned_empty",
    "prepare_output_dir",
    "require",
    "resolve_device",
    "resolve_dtype",
    "rms_ratio",
    "run",
    "seed_everything",
    "setup_logging",
    "suggest",
    "tiny_llama",
    "tiny_qwen",
    "update_between_markers",
    "verify",
    "word_tokenizer",
    "write_bench",
    "write_json",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
