"""Signs of life of nodes: a beating one is alive, one that stopped or never began is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from simulate.launch import heartbeat
from simulate.launch.heartbeat import (
    MISSED_BEATS,
    NODE_BEAT_S,
    Beat,
    LaunchProgress,
    NodeHeartbeat,
    Watcher,
    is_node_alive,
    write_beat,
)


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
    assert store.values == {"beat/node3": '[1, 0, "", "starting", 0, ""]'}
    clock.now_s += 1.5 * NODE_BEAT_S
    node.beat_if_due(store)
    assert store.values == {"beat/node3": '[2, 0, "", "starting", 0, ""]'}


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


def test_a_supervisor_reads_what_all_processes_do(clock: Clock) -> None:
    from torch.distributed import HashStore, PrefixStore

    store, watcher = HashStore(), Watcher()
    assert watcher.look(store, False) == LaunchProgress("starting")
    store.set("attempt", '{"activity": "loading data"}')
    assert watcher.look(store, True) == LaunchProgress("loading data", is_stopping=True)
    store.set("attempt", '{"prefix": "group/1", "titles": ["process 0", "process 1"]}')
    group = PrefixStore("group/1", store)
    write_beat(group, "0", Beat(7, 21, "the merge after step 30", "exchanging", 30, "finishing the round"))
    assert watcher.look(store, False).processes == ()  # the other one has no beat yet
    write_beat(group, "1", Beat(7, 20, "step 25", "training", 28, ""))
    progress = watcher.look(store, False)
    assert (progress.activity, progress.step, progress.stopping) == ("exchanging", 30, "finishing the round")
    assert [(state.step, state.waits_for, state.silent_s) for state in progress.processes] == [
        (30, (1,), 0.0), (28, (), 0.0),
    ]  # fmt: skip
    clock.now_s += 4.0
    write_beat(group, "0", Beat(15, 21, "the merge after step 30", "exchanging", 30, "finishing the round"))
    assert [state.silent_s for state in watcher.look(store, False).processes] == [0.0, 4.0]
    store.set("attempt", '{"activity": "restarting"}')  # the agent saw the process fail
    assert watcher.look(store, False) == LaunchProgress("restarting")
