"""The supervisor of a running agent: it prints the message log, forwards events and stop wishes, and gives up.

A call to a store behind a dead link never returns. So the agent runs in one thread and all other calls to the store in
a second, and the main thread stays free for signals and deadlines. `lte train --launch` calls run_supervised.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulate.common.errors import RunFailedError
from simulate.common.events import Emit
from simulate.launch.agent import POLL_S, Launch
from simulate.launch.heartbeat import LaunchProgress, NodeHeartbeat, Watcher
from simulate.launch.keys import AGENT_THREAD, LISTENER_THREAD, REPORTED, STOP

GONE_S = 10.0
"""Seconds that the agent has to end by itself once node 0 is gone, or once a stop was asked for while it waits."""
LOOK_S = 1.0
"""Seconds between two looks at the processes' heartbeats."""
END_S = 5.0
"""Seconds to wait for threads whose call to the store may never return."""


def run_supervised(
    launch: Launch,
    on_event: Emit | None,
    on_progress: Callable[[LaunchProgress], None],
    events: Path,
    stops: list[bool],
) -> dict[str, Any]:
    """Run the agent to its end; returns the run's outcome. Raises RunFailedError, and KeyboardInterrupt for a stop.

    `on_event` gets each event that rank 0 appends to the file `events`; node 0 alone has one. `on_progress` gets what
    the heartbeats tell, about once a second. `stops` is not empty once the user has asked to stop.
    """
    agent, listener = _AgentThread(launch), _Listener(launch, stops)
    before, passed_on = _version_of(events), None
    tail = None if on_event is None else _EventTail(events, on_event)
    agent.start()
    listener.start()
    try:
        while agent.is_alive():
            agent.join(POLL_S)
            if tail is not None:
                tail.look()
            if (progress := listener.progress) is not passed_on and progress is not None:
                on_progress(progress)
                passed_on = progress
            # torchrun's agent alone would wait on, for nodes that are lost or a store that is gone.
            _give_up_if_hopeless(launch, listener)
            # Processes that still start have nothing to save, and would take a minute to hear of the stop. Of several
            # nodes, the others must hear of it, too.
            if stops and launch.node.count == 1 and _version_of(events) == before:
                raise KeyboardInterrupt("stopped before the first step")
        listener.end()
        if tail is not None:
            tail.look()
        return agent.result()
    finally:
        # Whatever ended the loop, no worker may outlive it.
        launch.abandon()
        listener.end()
        agent.join(END_S)


def _version_of(file: Path) -> tuple[int, int] | None:
    """Return what changes when a session begins to write a file; None for a file that does not exist."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size


def _give_up_if_hopeless(launch: Launch, listener: _Listener) -> None:
    """Raise where waiting longer is useless: the user's stop meets a waiting agent, or node 0 is gone or silent."""
    cluster, number = launch.run.cluster, launch.node.number
    if listener.stopping_s is not None and launch.is_waiting and time.monotonic() - listener.stopping_s > GONE_S:
        raise KeyboardInterrupt("stopped while waiting for other nodes")
    if number == 0 or launch.store_apart:  # a store that is apart is waited for by its client
        return
    # Two limits: short where the store's connection broke, long where it only is silent.
    silent_s = time.monotonic() - listener.heard_s
    if listener.lost and silent_s > GONE_S:
        raise RunFailedError(f"node {number}: node 0 is gone, and the run with it")
    if silent_s > cluster.timeout_s + cluster.join_timeout_s:
        raise RunFailedError(
            f"node {number}: node 0 has not answered for {silent_s:.0f} s, longer than cluster.timeout_s and "
            "join_timeout_s together"
        )


class _AgentThread(threading.Thread):
    """The agent's thread; `result` returns the run's outcome, or raises what the agent raised."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(name=AGENT_THREAD, daemon=True)
        self._launch, self._outcome, self._error = launch, None, None

    _outcome: dict[str, Any] | None
    _error: BaseException | None

    def run(self) -> None:
        try:
            self._outcome = self._launch.run_agent()
        # Kept for the main thread, in which the command's exit code is decided.
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome


class _Listener:
    """The store's client: prints the message log, passes on the user's wish to stop, and beats for this node."""

    def __init__(self, launch: Launch, stops: list[bool]) -> None:
        self.launch, self._stops = launch, stops
        self.heard_s = time.monotonic()
        """Time of the store's last answer."""
        self.lost = False
        """Whether the store is gone."""
        self.stopping_s: float | None = None
        """Time at which somebody, on any node, asked to stop."""
        self.progress: LaunchProgress | None = None
        """The processes' progress at the last look."""
        self._watcher, self._looked_s = Watcher(), -LOOK_S
        self._heartbeat = NodeHeartbeat(launch.node.number)
        self._printed, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._listen, name=LISTENER_THREAD, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Poll a last time and end the thread; a store that does not answer is left behind after END_S."""
        self._done.set()
        self._thread.join(END_S)

    def _listen(self) -> None:
        generation = getattr(self.launch.store, "generation", 0)
        while not (self._done.is_set() or self.lost):
            try:
                while not self._done.wait(POLL_S):
                    self._poll()
                    if generation != getattr(self.launch.store, "generation", 0):  # a new store counts from the start
                        generation, self._printed = getattr(self.launch.store, "generation", 0), 0
                self._poll()
            except RuntimeError:
                # A store that is apart is found again by the next call.
                self.lost = not self.launch.store_apart

    def _poll(self) -> None:
        store = self.launch.store
        if self._stops:
            store.set(STOP, "1")
        for index in range(self._printed + 1, store.add(REPORTED, 0) + 1):
            if not store.check([f"{REPORTED}/{index}"]):
                break  # a writer has counted its message and not yet stored it
            self.launch.log(store.get(f"{REPORTED}/{index}").decode())
            self._printed = index
        if self.stopping_s is None and store.check([STOP]):
            self.stopping_s = time.monotonic()
        if time.monotonic() - self._looked_s >= LOOK_S:
            self._looked_s = time.monotonic()
            self.progress = self._watcher.look(store, self.stopping_s is not None)
        self._heartbeat.beat_if_due(store)
        self.heard_s = time.monotonic()


class _EventTail:
    """Reader of the growing event file. A restart replaces the file by a shorter one, whose events were passed on."""

    def __init__(self, path: Path, on_event: Emit) -> None:
        self._path, self._on_event = path, on_event
        self._file, self._offset = 0, 0
        if path.exists():  # skip the events of earlier sessions
            self._file, self._offset = path.stat().st_ino, path.stat().st_size

    def look(self) -> None:
        """Pass on events that were appended since the last call."""
        try:
            file_number = self._path.stat().st_ino
        except FileNotFoundError:
            return
        # Another file under the same name: rank 0 cut it back to the recovered step.
        if file_number != self._file:
            self._file, self._offset = file_number, self._session_offset()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written; the next call reads it whole
                self._offset += len(line)
                self._on_event(json.loads(line))

    def _session_offset(self) -> int:
        """Return the byte offset of the last session's first event."""
        beginning, offset = 0, 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and json.loads(line)["kind"] in ("start", "resume", "restart"):
                    beginning = offset
                offset += len(line)
        return beginning
