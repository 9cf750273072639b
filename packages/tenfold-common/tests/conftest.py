"""No network, no hub, repeatable examples."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

from tenfold_common.testing import no_network

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _offline():
    with no_network():
        yield
