"""Signs of life of a launched run: who has fallen silent, who is alive but behind, which nodes still take part.

Each process and each node's supervisor counts beats in the run's key-value store. Two looks at a counter, MISSED_BEATS
beats apart, distinguish a dead sender from a slow one. A process looks when an exchange fails, to name the culprit
(TorchCommunicator.missing). Node 0 looks before it gives a node's number to a machine that comes back (ltecli launch).
The preflight runs before there is a store: it asks a node over their own connection, and waits ANSWER_S. Each node's
supervisor reads all beats once a second (Watcher), for progress between events, for the answer to Ctrl-C and for
`lte watch`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from simulate.launch.keys import ATTEMPT

if TYPE_CHECKING:  # the preflight imports this module and stays free of torch
    from torch.distributed import Store

    from simulate.launch.lasting_store import LastingStore

PROCESS_BEAT_S, NODE_BEAT_S = 0.5, 1.0
"""Seconds between two beats of a process, and of a node's supervisor."""
MISSED_BEATS = 3
"""Beats between two looks; fewer would take a slow link for a dead one."""
ANSWER_S = 2.0
"""Seconds that a node has to answer, or to take a message, over a preflight's connection."""
STORE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Beat:
    """The newest sign of life of a process or a node."""

    count: int
    """Beats so far."""
    exchanges: int = 0
    """Exchanges that the process has begun."""
    current_phase: str = ""
    """Current phase of training, in words; "" before its first exchange."""
    activity: str = "starting"
    """Phase of the training loop, for whoever watches."""
    step: int = 0
    """Steps done."""
    stopping: str = ""
    """Answer to a wish to stop: what is done first, and for how long."""


@dataclass(frozen=True)
class ProcessState:
    """Present activity of one process of the run."""

    title: str
    """The process, its node and its devices."""
    activity: str
    step: int
    """Steps done."""
    silent_s: float
    """Seconds without a beat, 0 where it beats in time."""
    waits_for: tuple[int, ...]
    """Processes that have not begun the exchange which this one is in."""


@dataclass(frozen=True)
class LaunchProgress:
    """Progress of a launched run between its events, read from the heartbeats."""

    activity: str
    """Phase of the first process."""
    step: int = 0
    stopping: str = ""
    is_stopping: bool = False
    """Whether somebody, on any node, asked to stop."""
    processes: tuple[ProcessState, ...] = ()


def write_beat(store: Store | LastingStore, sender: str, beat: Beat) -> None:
    """Publish the newest sign of life of `sender`."""
    store.set(f"beat/{sender}", json.dumps(astuple(beat)))


def read_beat(store: Store | LastingStore, sender: str) -> Beat | None:
    """Return the newest sign of life of `sender`, None before its first."""
    key = f"beat/{sender}"
    return Beat(*json.loads(store.get(key))) if store.check([key]) else None


def is_silent(before: Beat | None, after: Beat | None) -> bool:
    """Whether a sender gave no sign of life between two looks."""
    return before is None or after is None or before.count == after.count


class NodeHeartbeat:
    """Signs of life of one node; its supervisor calls `beat_if_due` whenever the store has answered."""

    def __init__(self, node: int) -> None:
        self._sender, self._count, self._last_s = f"node{node}", 0, -NODE_BEAT_S

    def beat_if_due(self, store: Store | LastingStore) -> None:
        """Beat, unless the last beat is less than NODE_BEAT_S old."""
        if time.monotonic() - self._last_s > NODE_BEAT_S:
            self._count, self._last_s = self._count + 1, time.monotonic()
            write_beat(store, self._sender, Beat(self._count))


def is_node_alive(store: Store | LastingStore, node: int) -> bool:
    """Whether a node still takes part in the run; takes MISSED_BEATS beats to find out."""
    # One look cannot distinguish an old beat from a new one: clocks of nodes differ, so counts are compared.
    before = read_beat(store, f"node{node}")
    time.sleep(MISSED_BEATS * NODE_BEAT_S)
    return not is_silent(before, read_beat(store, f"node{node}"))


class ProcessHeartbeat:
    """Signs of life of this process, written by a thread, and a look at the others'.

    `titles` names all processes of the run in messages; `now` returns this process's beat, given its count. `find`
    returns the store's host and port; where the store `lasts` longer than a connection, it is found again.
    """

    def __init__(
        self, find: Callable[[], tuple[str, int]], prefix: str, process: int, titles: Sequence[str],
        now: Callable[[int], Beat], lasts: bool = False,
    ) -> None:  # fmt: skip
        self._find, self._prefix, self._process, self._titles, self._now = find, prefix, process, titles, now
        self._lasts = lasts
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the beats."""
        self._done.set()

    def missing(self, exchanges: int) -> str:
        """Return in words who has not begun exchange number `exchanges`; "" where all have."""
        try:
            store = self._store()
            first = self._beats(store)
            time.sleep(MISSED_BEATS * PROCESS_BEAT_S)
            second = self._beats(store)
        except RuntimeError:  # the store is gone, or behind the same dead link
            return "the first node does not answer either"
        return describe_missing(self._titles, self._process, exchanges, first, second)

    def _store(self) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        # A connection of its own: a thread that waits in the shared one would block the beats.
        timeout = timedelta(seconds=STORE_TIMEOUT_S)
        return PrefixStore(self._prefix, TCPStore(*self._find(), is_master=False, timeout=timeout))

    def _beat(self) -> None:
        count, is_over = 0, False
        while not is_over:
            try:
                store = self._store()
                # The first beat goes out at once, so that a process is never taken for silent at its start.
                while not self._done.wait(PROCESS_BEAT_S if count else 0.0):
                    count += 1
                    write_beat(store, str(self._process), self._now(count))
                is_over = True
            except (OSError, RuntimeError):  # the store went with the first node, and the agent ends this process
                is_over = not self._lasts or self._done.wait(PROCESS_BEAT_S)

    def _beats(self, store: Store) -> list[Beat | None]:
        return [read_beat(store, str(process)) for process in range(len(self._titles))]


def describe_missing(
    titles: Sequence[str], own: int, exchanges: int, first: Sequence[Beat | None], second: Sequence[Beat | None]
) -> str:
    """Return in words which processes fell silent between two looks, and which are alive but behind `exchanges`."""
    silent, behind = [], []
    for process, (title, before, after) in enumerate(zip(titles, first, second, strict=True)):
        if process == own:
            continue
        if after is None or is_silent(before, after):
            silent.append(title)
        elif after.exchanges < exchanges:
            behind.append(f"{title} at {after.current_phase or 'the start'}")
    parts = [f"silent: {', '.join(silent)}"] if silent else []
    parts += [f"not there yet: {', '.join(behind)}"] if behind else []
    return "; ".join(parts)


class Watcher:
    """Reader of all processes' beats, for a node's supervisor, which looks once a second; it costs no exchange."""

    def __init__(self) -> None:
        self._attempt = ""
        self._changed: list[tuple[int, float]] = []
        """Newest count of each process, and when it was new."""

    def look(self, store: Store | LastingStore, is_stopping: bool) -> LaunchProgress:
        """Return the run's progress; the first process names the attempt, and how far its start is."""
        from torch.distributed import PrefixStore

        from simulate.launch.lasting_store import raw_store

        store = raw_store(store)
        text = store.get(ATTEMPT).decode() if store.check([ATTEMPT]) else '{"activity": "starting"}'
        attempt = json.loads(text)
        titles = attempt.get("titles", ())
        keys = [f"beat/{process}" for process in range(len(titles))]
        inner = PrefixStore(attempt.get("prefix", ""), store)
        # Asked for only where all are there: `multi_get` waits for keys that are missing.
        if not titles or not inner.check(keys):
            return LaunchProgress(attempt.get("activity", "starting"), is_stopping=is_stopping)
        beats = [Beat(*json.loads(beat)) for beat in inner.multi_get(keys)]
        now_s = time.monotonic()
        if text != self._attempt:
            self._attempt, self._changed = text, [(-1, now_s)] * len(titles)
        self._changed = [
            before if before[0] == beat.count else (beat.count, now_s)
            for before, beat in zip(self._changed, beats, strict=True)
        ]
        return progress_of(titles, beats, [now_s - since_s for _, since_s in self._changed], is_stopping)


def progress_of(
    titles: Sequence[str], beats: Sequence[Beat], silent_s: Sequence[float], is_stopping: bool
) -> LaunchProgress:
    """Return the progress that beats tell; `silent_s` are the seconds since each was new."""
    states = []
    for title, beat, seconds in zip(titles, beats, silent_s, strict=True):
        behind = tuple(process for process, other in enumerate(beats) if other.exchanges < beat.exchanges)
        states.append(
            ProcessState(
                title, beat.activity, beat.step,
                seconds if seconds > MISSED_BEATS * PROCESS_BEAT_S else 0.0,
                behind if beat.activity == "exchanging" else (),
            )
        )  # fmt: skip
    first = beats[0]
    return LaunchProgress(first.activity, first.step, first.stopping, is_stopping, tuple(states))
