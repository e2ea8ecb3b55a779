"""Signs of life of nodes: a beating one is alive, one that stopped or never began is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from simulate.launch import heartbeat
from simulate.launch.heartbeat import MISSED_BEATS, NODE_BEAT_S, NodeHeartbeat, is_node_alive


class Store:
    """A key-value store of this process alone."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> str:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class Clock:
    """A clock that moves only in `sleep`; `meanwhile` is called after each tenth of a second."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.meanwhile: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.now_s += 0.1
            self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock of the test's own into the module."""
    turned = Clock()
    monkeypatch.setattr(heartbeat, "time", turned)
    return turned


def test_a_node_beats_when_a_beat_is_due_and_not_before(clock: Clock) -> None:
    store: Any = Store()
    node = NodeHeartbeat(3)
    for _ in range(5):
        node.beat_if_due(store)
    assert store.values == {"beat/node3": '[1, 0, ""]'}
    clock.now_s += 1.5 * NODE_BEAT_S
    node.beat_if_due(store)
    assert store.values == {"beat/node3": '[2, 0, ""]'}


def test_a_beating_node_is_alive(clock: Clock) -> None:
    store: Any = Store()
    node = NodeHeartbeat(1)
    node.beat_if_due(store)
    clock.meanwhile = lambda: node.beat_if_due(store)
    assert is_node_alive(store, 1)
    assert clock.now_s == pytest.approx(100.0 + MISSED_BEATS * NODE_BEAT_S)


def test_a_node_that_stopped_or_never_began_is_not_alive(clock: Clock) -> None:
    store: Any = Store()
    NodeHeartbeat(1).beat_if_due(store)
    assert not is_node_alive(store, 1)
    assert not is_node_alive(store, 2)
