import pickle
import sys
import types

import pytest

from tenfold_common import (
    CheckpointError,
    MissingDependencyError,
    TenfoldError,
    UserError,
    is_available,
    require,
    suggest,
)
from tenfold_common.testing import NetworkBlockedError


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (TenfoldError, Exception),
        (UserError, ValueError),
        (MissingDependencyError, ImportError),
        (CheckpointError, RuntimeError),
        (NetworkBlockedError, RuntimeError),
    ],
)
def test_errors_have_their_bases_and_survive_pickling(kind, builtin):
    error = kind("x is 3; give 4")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "x is 3; give 4"
    assert isinstance(copy, builtin)
    assert isinstance(copy, TenfoldError)


def test_network_error_is_no_os_error():
    assert not issubclass(NetworkBlockedError, OSError)


def test_suggest_names_the_nearest_or_nothing():
    assert suggest("trian", ["eval", "train"]) == " Did you mean 'train'?"
    assert suggest("xyz", ["eval", "train"]) == ""
    assert suggest("x", []) == ""


def test_require_returns_the_module():
    import json.decoder

    assert require("json.decoder", extra="x", package="p") is json.decoder


@pytest.mark.parametrize("module", ["no_such_module_here", "no_such_module_here.part"])
def test_require_says_how_to_install(module):
    with pytest.raises(MissingDependencyError) as caught:
        require(module, extra="fast", package="path-attn", purpose="--backend fast")
    assert str(caught.value) == (
        f"path-attn needs {module} for --backend fast. Install it with: "
        "pip install 'path-attn[fast]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import no_such_module_here",
            "ModuleNotFoundError: No module named 'no_such_module_here'",
        ),
        ("from json import nothing", "ImportError: cannot import name 'nothing'"),
        ("raise RuntimeError('operator x does not exist')", "RuntimeError: operator x"),
        ("raise OSError('libx.so: no such file')", "OSError: libx.so"),
        ("import json; json.nothing", "AttributeError: module 'json'"),
        ("raise ModuleNotFoundError('bare')", "ModuleNotFoundError: bare"),
    ],
    ids=lambda value: value.split(":")[0][:24],
)
def test_require_tells_broken_from_absent(tmp_path, monkeypatch, source, reason):
    (tmp_path / "broken_thing.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="installed but does not import") as caught:
        require("broken_thing", extra="x", package="p")
    assert reason in str(caught.value)
    assert "p needs broken_thing, which" in str(caught.value)


def test_require_lets_foreign_bugs_through(tmp_path, monkeypatch):
    (tmp_path / "buggy_thing.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        require("buggy_thing", extra="x", package="p")


def test_is_available_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "present_thing.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_available("present_thing")
    assert "present_thing" not in sys.modules
    assert not is_available("no_such_module_here")
    assert not is_available("no_such_module_here.part")


def test_is_available_copes_with_blocked_and_odd_modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocked_thing", None)
    assert not is_available("blocked_thing")
    odd = types.ModuleType("odd_thing")
    odd.__spec__ = None
    monkeypatch.setitem(sys.modules, "odd_thing", odd)
    assert not is_available("odd_thing")
