"""Compiling at first use: what is kept, what it is keyed by, and machines without a compiler."""

import os
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import flashformer as ff
from flashformer import jit

QUICK = ("portable", ("-O0",))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded in this process."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHFORMER_CACHE", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    jit.library.cache_clear()
    jit._version.cache_clear()
    yield folder
    jit.library.cache_clear()
    jit._version.cache_clear()


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def counted(fresh, monkeypatch, tmp_path):
    """The real compiler behind a script that notes each call; returns how often it compiled."""
    log = tmp_path / "log"
    log.write_text("")
    real = shlex.quote(jit.compiler())
    monkeypatch.setenv(
        "CXX", script(tmp_path / "cxx", f'echo "$@" >> {shlex.quote(str(log))}\nexec {real} "$@"')
    )
    return lambda: sum("-shared" in line for line in log.read_text().splitlines())


# --------------------------------------------------------------------------------------------------
# Without a compiler


def test_without_a_compiler_torch_decodes_with_one_warning(fresh, kit, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    model = kit.model()
    with pytest.warns(RuntimeWarning) as caught:
        compiled = ff.compile(model, threads=2, max_len=32)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(
        "decoding by plain torch, many times slower: CXX names '/nonexistent/c++'"
    )
    assert compiled.backend.name == "torch"
    prompt = torch.tensor([kit.tokens(5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compiled.generate(prompt, max_new_tokens=10)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=10))


def test_the_torch_back_end_can_be_asked_for_without_a_warning(fresh, kit, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert ff.compile(kit.model(), max_len=32, backend="torch").backend.name == "torch"


def test_the_native_back_end_asked_for_by_name_needs_the_compiler(fresh, kit, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(
        ff.CompilerError, match="CXX names '/nonexistent/c\\+\\+', which is not there"
    ):
        ff.compile(kit.model(), max_len=32, backend="cpu")


def test_an_empty_path_has_no_compiler(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ff.CompilerError, match=r"there is no C\+\+ compiler .* install one"):
        jit.compiler()


# --------------------------------------------------------------------------------------------------
# A compiler that fails, folders that cannot be written


def test_a_failing_compiler_is_quoted(fresh, monkeypatch, tmp_path):
    body = 'case "$*" in *--version*) echo 1.0;; *) echo "fatal: out of cheese" >&2; exit 3;; esac'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", body))
    with pytest.raises(ff.CompilerError) as caught:
        jit.library(*QUICK)
    assert f"{tmp_path}/cxx -std=c++20" in str(caught.value)
    assert str(caught.value).endswith("failed:\nfatal: out of cheese\n")
    assert list(fresh.iterdir()) == []  # nothing half made


def test_a_failing_compiler_falls_back_to_torch(fresh, kit, monkeypatch, tmp_path):
    body = 'case "$*" in *--version*) echo 1.0;; *) exit 3;; esac'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", body))
    with pytest.warns(RuntimeWarning, match=r"plain torch.* failed"):
        assert ff.compile(kit.model(), max_len=32).backend.name == "torch"


def test_a_cache_folder_that_cannot_be_made(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ff.CompilerError, match=r"cannot be written .* FLASHFORMER_CACHE"):
        jit.build(*QUICK)


def test_a_cache_folder_that_is_a_file(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ff.CompilerError, match=r"cannot be written .* FLASHFORMER_CACHE"):
        jit.build(*QUICK)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_cache_folder_that_may_not_be_written(fresh):
    fresh.mkdir()
    fresh.chmod(0o500)
    with pytest.raises(ff.CompilerError, match=r"cannot be written .* FLASHFORMER_CACHE"):
        jit.build(*QUICK)


# --------------------------------------------------------------------------------------------------
# What is kept


def test_it_is_compiled_once_and_kept(fresh, counted):
    first = jit.build(*QUICK)
    assert first.parent == fresh
    assert first.name.startswith("cpu-portable-")
    made = first.stat().st_mtime_ns
    assert jit.build(*QUICK) == first
    assert jit.library(*QUICK) is jit.library(*QUICK)
    assert counted() == 1
    assert first.stat().st_mtime_ns == made
    assert [p.name for p in fresh.iterdir()] == [first.name]


def test_it_is_keyed_by_all_it_depends_on(fresh, monkeypatch, tmp_path):
    """Only the names are looked at: the compiler makes an empty file."""

    def compiler(name, version):
        body = f'case "$*" in *--version*) echo {version};; *) for f; do :; done; : > "$f";; esac'
        monkeypatch.setenv("CXX", script(tmp_path / name, body))
        jit._version.cache_clear()

    compiler("one", "1.0")
    names = [jit.build(*QUICK).name, jit.build("portable").name, jit.build("avx2").name]
    compiler("one", "1.1")
    names.append(jit.build(*QUICK).name)
    compiler("two", "1.0")
    names.append(jit.build(*QUICK).name)
    compiler("one", "1.0")
    assert jit.build(*QUICK).name == names[0]
    monkeypatch.setattr(jit, "_processor", lambda: "another machine")
    names.append(jit.build(*QUICK).name)
    monkeypatch.undo()
    monkeypatch.setenv("FLASHFORMER_CACHE", str(fresh))
    compiler("one", "1.0")
    assert jit.build(*QUICK).name == names[0]
    sources = tmp_path / "sources"
    shutil.copytree(jit.SOURCES, sources)
    monkeypatch.setattr(jit, "SOURCES", sources)
    assert jit.build(*QUICK).name == names[0]
    with (sources / "simd.hpp").open("a") as file:
        file.write("// a comment\n")
    names.append(jit.build(*QUICK).name)
    assert len(set(names)) == len(names) == 7


def test_a_broken_library_is_named(fresh, monkeypatch, tmp_path):
    body = 'case "$*" in *--version*) echo 1;; *) for f; do :; done; echo no library > "$f";; esac'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", body))
    with pytest.raises(
        ff.CompilerError, match=r"cpu-portable-.*\.so cannot be loaded .*; delete it"
    ):
        jit.library(*QUICK)


def test_where_libraries_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "a"))
    assert jit.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("FLASHFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert jit.cache_folder() == tmp_path / "b" / "flashformer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert jit.cache_folder() == tmp_path / ".cache" / "flashformer"


def test_the_sources_are_part_of_the_package():
    names = {p.name for p in jit.SOURCES.iterdir()}
    assert {"decode.cpp", "simd.hpp", "gemv.hpp", "attention.hpp", "pool.hpp", "model.hpp"} <= names
    assert jit.SOURCES.is_relative_to(Path(ff.__file__).parent)
