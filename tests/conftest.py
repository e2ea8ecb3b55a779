"""Fixtures of all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from simulate.common.cache_folder import CACHE_VARIABLE
from simulate.common.processor import machine_facts, machine_text
from simulate.config.calibration import SWITCH
from simulate.data.text import Text
from tests import tiny
from tests.network.fixtures import open_lab

__all__ = ["open_lab"]

THREADS_VARIABLE = "LTE_TEST_THREADS"
# One thread a test process, unless others are asked for: tensors are tiny, and pytest-xdist already fills the cores.
torch.set_num_threads(int(os.environ.get(THREADS_VARIABLE, "1")))
# The same examples on every machine, and no deadline: slow cores must not make a rule look broken.
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=10)
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=50)


def pytest_configure(config: pytest.Config) -> None:
    """Try few examples of each rule in `make test`, and many where the slow tests run, too."""
    settings.load_profile("quick" if config.option.markexpr == "not slow" else "thorough")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say where the tests run, since a red one can depend on it; pytest's own header is left out under -q."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"on {machine_text(machine_facts())}, {torch.get_num_threads()} threads")


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[None]:
    """A cache folder that nobody else reads or fills; processes that tests start use it, too."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(Path(folder) / "cache"))
        patch.setenv(SWITCH, "0")  # else each first run would take seconds more, and later plans be of other figures
        yield


@pytest.fixture(scope="session")
def text() -> Text:
    """A few thousand bytes of made-up prose."""
    return tiny.text()
