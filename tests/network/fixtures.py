"""What tests get of the network laboratory; without torch, so that light tests stay light."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.network.lab import Lab, why_not


@pytest.fixture
def open_lab() -> Iterator[Callable[..., Lab]]:
    """Open network laboratories (the arguments are Lab's), closed after the test; no process may be left in them."""
    if reason := why_not():
        pytest.skip(reason)
    labs: list[Lab] = []
    with ExitStack() as stack:

        def open_one(nodes: int, **options: float) -> Lab:
            labs.append(stack.enter_context(Lab(nodes, **options)))
            return labs[-1]

        yield open_one
    left_behind = [process for lab in labs for process in lab.left_behind]
    assert not left_behind, f"left running in the lab: {left_behind}"
