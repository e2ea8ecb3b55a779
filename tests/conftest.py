"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from simulate.data.text import Text
from tests import tiny
from tests.network.fixtures import open_lab

__all__ = ["open_lab"]

# One thread a test process: the tensors are tiny, and pytest-xdist already fills the cores.
torch.set_num_threads(1)
# The same examples on every machine, and no deadline: slow cores must not make a rule look broken.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def text() -> Text:
    """A few thousand bytes of made-up prose."""
    return tiny.text()
