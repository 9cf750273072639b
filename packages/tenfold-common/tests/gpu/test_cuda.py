import pytest
import torch

from tenfold_common import (
    UserError,
    environment,
    generator,
    poisoned_empty,
    resolve_device,
    resolve_dtype,
    seed_everything,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_auto_takes_the_gpu_and_names_it():
    device, reason = resolve_device()
    assert device == torch.device("cuda:0")
    assert torch.cuda.get_device_name(0) in reason
    assert resolve_device("cuda").value == device


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="CUDA devices, numbered from 0"):
        resolve_device("cuda:99")


def test_auto_dtype_follows_the_capability():
    native = torch.cuda.get_device_capability(0) >= (8, 0)
    assert resolve_dtype("auto", "cuda:0").value is (torch.bfloat16 if native else torch.float32)


def test_seeds_reach_the_gpu():
    seed_everything(1)
    first = torch.rand(4, device="cuda")
    seed_everything(1)
    assert torch.equal(first, torch.rand(4, device="cuda"))
    own = torch.rand(4, device="cuda", generator=generator(1, "cuda"))
    assert torch.equal(own, torch.rand(4, device="cuda", generator=generator(1, "cuda")))


def test_poison_works_on_the_gpu():
    with poisoned_empty():
        assert torch.isnan(torch.empty(5, device="cuda")).all()


def test_environment_names_gpu_and_driver():
    facts = environment()
    assert facts["gpu"] == torch.cuda.get_device_name(0)
    assert facts["driver"]
