import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tenfold_common import (
    Choice,
    UserError,
    generator,
    resolve_device,
    resolve_dtype,
    seed_everything,
)

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@no_cuda
def test_auto_is_the_cpu_and_says_why():
    device, reason = resolve_device()
    assert device == torch.device("cpu")
    assert reason.startswith("cpu, because ")


def test_what_was_asked_for_is_given():
    assert resolve_device("cpu") == Choice(torch.device("cpu"), "cpu was asked for")
    assert resolve_device(torch.device("cpu")).value == torch.device("cpu")


@no_cuda
@pytest.mark.parametrize("spec", ["cuda", "cuda:0", torch.device("cuda", 1)], ids=str)
def test_unusable_cuda_is_refused(spec):
    with pytest.raises(UserError, match=r"device 'cuda.*cannot be used: .* CUDA"):
        resolve_device(spec)


@pytest.mark.parametrize("spec", ["cdua", "gpu", "cuda:", "cuda:x", "cuda:-1", "", "meta", "cpu:x"])
def test_unknown_devices_are_refused(spec):
    with pytest.raises(UserError, match="unknown device"):
        resolve_device(spec)


def test_a_misspelt_device_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        resolve_device("cdua")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has mps")
def test_absent_mps_is_refused():
    with pytest.raises(UserError, match="no usable mps"):
        resolve_device("mps")


@no_cuda
def test_each_way_cuda_can_fail_has_its_reason(monkeypatch):
    # The machine has no GPU: torch is told that parts of one are there, the rest fails for real.
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "built without CUDA" in resolve_device().reason
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert "sees no CUDA device" in resolve_device().reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "there are 0 CUDA devices" in resolve_device().reason
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "a small test on it failed (" in resolve_device().reason
    with pytest.raises(UserError, match="there are 1 CUDA devices"):
        resolve_device("cuda:1")


def test_a_device_that_computes_has_no_problem(monkeypatch):
    from tenfold_common.device import _cuda_problem

    ones = torch.ones
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))  # a GPU that answers
    assert _cuda_problem(torch.device("cuda", 0)) == ""


def test_a_present_device_is_taken(monkeypatch):
    # Only the choice is tested here; tests/gpu does the same on a device.
    monkeypatch.setattr("tenfold_common.device._cuda_problem", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    assert resolve_device() == Choice(torch.device("cuda:0"), "cuda:0 works (Some GPU)")
    assert resolve_device("cuda:3") == Choice(torch.device("cuda:3"), "cuda:3 was asked for")
    assert resolve_device("cuda").value == torch.device("cuda:0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps").value == torch.device("mps")


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        ("fp64", torch.float64),
        ("float64", torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtype_names(spec, dtype):
    value, reason = resolve_dtype(spec)
    assert value is dtype
    assert "was asked for" in reason


def test_auto_dtype(monkeypatch):
    assert resolve_dtype() == Choice(torch.float32, "float32 on cpu")
    assert resolve_dtype("auto", "mps").value is torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_dtype("auto", torch.device("cuda:0")).value is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    value, reason = resolve_dtype("auto", "cuda")
    assert value is torch.float32
    assert "no native bfloat16" in reason


@pytest.mark.parametrize("spec", ["int8", "flaot32", "", torch.int32], ids=str)
def test_unknown_dtypes_are_refused(spec):
    with pytest.raises(UserError, match="unknown dtype"):
        resolve_dtype(spec)


def test_mps_has_no_float64():
    with pytest.raises(UserError, match="mps has no float64"):
        resolve_dtype("fp64", "mps")


def _draw():
    # numpy's global generator is the one that is seeded
    return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002


def test_equal_seeds_give_equal_numbers():
    seed_everything(7)
    first = _draw()
    seed_everything(7)
    assert _draw() == first
    seed_everything(8)
    other = _draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_generators_are_their_own():
    one, two = generator(3), generator(3)
    state = torch.random.get_rng_state()
    a = torch.rand(4, generator=one)
    assert torch.equal(a, torch.rand(4, generator=two))
    assert not torch.equal(a, torch.rand(4, generator=generator(4)))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", True, None], ids=repr)
def test_bad_seeds_are_refused(seed):
    with pytest.raises(UserError, match="seed must be an integer from 0 to"):
        seed_everything(seed)
    with pytest.raises(UserError, match="seed must be an integer from 0 to"):
        generator(seed)


def test_the_largest_seed_is_accepted():
    seed_everything(2**32 - 1)
    assert generator(2**32 - 1).initial_seed() == 2**32 - 1


def test_seeding_works_without_torch_and_numpy():
    code = """
import random, sys
sys.modules["torch"] = None
from tenfold_common import seed_everything
seed_everything(5)
assert random.random() == random.Random(5).random()
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
