"""Nodes that look again after hundredths of a second, where those on real networks take tenths: tests wait for less."""

from __future__ import annotations

import pytest

from simulate.launch.preflight import coordinator, joining_node, listener, rejoin


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all pauses between two looks; how long a node waits in all stays with the settings of each test."""
    monkeypatch.setattr(listener, "_POLL_S", 0.01)
    monkeypatch.setattr(joining_node, "_RETRY_S", 0.03)
    monkeypatch.setattr(coordinator, "_LOOK_EVERY_S", 0.03)
    monkeypatch.setattr(rejoin, "_LOOK_EVERY_S", 0.03)
