"""Same conditions for every test: one thread, fixed seeds, no network."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from tenfold_common.seed import seed_everything
from tenfold_common.testing import no_network, real_data_folder

torch.set_num_threads(1)
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _same_conditions() -> Iterator[None]:
    """Seed everything and refuse connections to other machines."""
    seed_everything(0)
    with no_network(allow_loopback=True):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data, or skip the test."""
    return real_data_folder(__file__)
