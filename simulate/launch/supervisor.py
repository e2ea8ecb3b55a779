"""Who watches a running agent: passes on what is told, asks to stop, and gives up where nothing answers any more.

The agent runs in a thread, since a call to a store behind a dead link does not return; this process's main thread stays
free for signals and deadlines.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulate.common.errors import RunFailedError
from simulate.launch.agent import POLL_S, Launch
from simulate.launch.keys import AGENT_THREAD, LISTENER_THREAD

GONE_S = 10.0
"""How long the agent may take to end by itself once node 0 is gone, or once a stop was asked for while it waits."""
END_S = 5.0
"""How long threads are waited for that may be in a call which does not return."""
ALIVE_S = 1.0
"""Between two signs of life of a node."""
Event = dict[str, Any]


def alive_key(node: int) -> str:
    """Return the key of the store that counts a node's signs of life."""
    return f"alive/{node}"


def run_watched(launch: Launch, on_event: Callable[[Event], None], events: Path, asked: list[bool]) -> dict[str, Any]:
    """Run the agent to its end; returns how the run ended. Raises RunFailedError, and KeyboardInterrupt for a stop.

    `on_event` gets what the first process emits, on node 0; `asked` is looked at for a wish to stop.
    """
    agent, listener = _AgentThread(launch), _Listener(launch, asked)
    tail = _EventTail(events, on_event) if launch.node.number == 0 else None
    agent.start()
    listener.start()
    try:
        while agent.is_alive():
            agent.join(POLL_S)
            if tail is not None:
                tail.look()
            _give_up_where_due(launch, listener)
        listener.end()
        if tail is not None:
            tail.look()
        return agent.result()
    finally:
        launch.abandon()
        listener.end()
        agent.join(END_S)


def _give_up_where_due(launch: Launch, listener: _Listener) -> None:
    cluster, number = launch.run.cluster, launch.node.number
    if listener.stopping_s is not None and launch.is_waiting and time.monotonic() - listener.stopping_s > GONE_S:
        raise KeyboardInterrupt("stopped while waiting for other nodes")
    if number == 0:
        return
    silent_s = time.monotonic() - listener.heard_s
    if listener.lost and silent_s > GONE_S:
        raise RunFailedError(f"node {number}: node 0 is gone, and the run with it")
    if silent_s > cluster.timeout_s + cluster.join_timeout_s:
        raise RunFailedError(
            f"node {number}: node 0 has not answered for {silent_s:.0f} s, longer than cluster.timeout_s and "
            "join_timeout_s together"
        )


class _AgentThread(threading.Thread):
    def __init__(self, launch: Launch) -> None:
        super().__init__(name=AGENT_THREAD, daemon=True)
        self._launch, self._outcome, self._error = launch, None, None

    _outcome: dict[str, Any] | None
    _error: BaseException | None

    def run(self) -> None:
        try:
            self._outcome = self._launch.run_agent()
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome


class _Listener:
    """Passes on what processes tell, and asks everyone to stop where that is wished."""

    def __init__(self, launch: Launch, asked: list[bool]) -> None:
        self.launch, self.asked = launch, asked
        self.heard_s = time.monotonic()
        """When the store last answered."""
        self.lost = False
        """Whether the store is gone."""
        self.stopping_s: float | None = None
        """When somebody asked to stop."""
        self._told, self._lived_s, self._done = 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._listen, name=LISTENER_THREAD, daemon=True)

    def start(self) -> None:
        """Begin; what was told before this node joined is not repeated."""
        self._thread.start()

    def end(self) -> None:
        """Look a last time; a store that does not answer keeps nobody."""
        self._done.set()
        self._thread.join(END_S)

    def _listen(self) -> None:
        try:
            while not self._done.wait(POLL_S):
                self._look()
            self._look()
        except RuntimeError:
            self.lost = True

    def _look(self) -> None:
        from simulate.launch.keys import REPORTED, STOP

        store = self.launch.store
        if self.asked:
            store.set(STOP, "1")
        for index in range(self._told + 1, store.add(REPORTED, 0) + 1):
            if not store.check([f"{REPORTED}/{index}"]):
                break
            self.launch.log(store.get(f"{REPORTED}/{index}").decode())
            self._told = index
        if self.stopping_s is None and store.check([STOP]):
            self.stopping_s = time.monotonic()
        if time.monotonic() - self._lived_s > ALIVE_S:
            store.add(alive_key(self.launch.node.number), 1)
            self._lived_s = time.monotonic()
        self.heard_s = time.monotonic()


class _EventTail:
    """Reads the event file as it grows. A restart cuts it back: what is left was passed on before."""

    def __init__(self, path: Path, on_event: Callable[[Event], None]) -> None:
        self._path, self._on_event = path, on_event
        self._file, self._offset = 0, 0
        if path.exists():  # of an earlier session
            self._file, self._offset = path.stat().st_ino, path.stat().st_size

    def look(self) -> None:
        """Pass on what is new."""
        try:
            file_number = self._path.stat().st_ino
        except FileNotFoundError:
            return
        if file_number != self._file:
            self._file, self._offset = file_number, self._beginning()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._on_event(json.loads(line))

    def _beginning(self) -> int:
        """Return where the last session of a file begins that was written anew."""
        beginning, offset = 0, 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and json.loads(line)["kind"] in ("start", "resume", "restart"):
                    beginning = offset
                offset += len(line)
        return beginning
