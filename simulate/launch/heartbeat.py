"""Signs of life of a launched run's processes, so that who does not answer can be named.

Each process writes, twice a second, how often it did so and how many exchanges it has begun. When one fails, two
looks tell who has fallen silent, and who is alive but behind.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

PULSE_S = 0.5
LOOK_S = 1.5
"""Between the two looks; a slow link must not look like a dead one."""
STORE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sign:
    """What a process last wrote."""

    beats: int
    exchanges: int
    current_phase: str


class Pulse:
    """This process's signs of life, written by a thread, and a look at the others'; `titles` names all processes."""

    def __init__(
        self, host: str, port: int, prefix: str, process: int, titles: Sequence[str], now: Callable[[], tuple[int, str]]
    ) -> None:
        self._address, self._prefix, self._process, self._titles, self._now = (host, port), prefix, process, titles, now
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write no more."""
        self._done.set()

    def missing(self, exchanges: int) -> str:
        """Return who is not where this process is, having begun that many exchanges; "" where nobody knows better."""
        try:
            store = self._store()
            first = self._signs(store)
            time.sleep(LOOK_S)
            second = self._signs(store)
        except RuntimeError:  # of a store that is gone, or behind the same dead link
            return "the first node does not answer either"
        return describe_missing(self._titles, self._process, exchanges, first, second)

    def _store(self) -> dist.Store:
        timeout = timedelta(seconds=STORE_TIMEOUT_S)
        return dist.PrefixStore(self._prefix, dist.TCPStore(*self._address, is_master=False, timeout=timeout))

    def _beat(self) -> None:
        beats = 0
        try:
            store = self._store()
            while not self._done.wait(PULSE_S if beats else 0.0):
                beats += 1
                store.set(f"pulse/{self._process}", json.dumps([beats, *self._now()]))
        except RuntimeError:  # the store went with the first node; the agent ends this process
            return

    def _signs(self, store: dist.Store) -> list[Sign | None]:
        keys = [f"pulse/{process}" for process in range(len(self._titles))]
        return [Sign(*json.loads(store.get(key))) if store.check([key]) else None for key in keys]


def describe_missing(
    titles: Sequence[str], own: int, exchanges: int, first: Sequence[Sign | None], second: Sequence[Sign | None]
) -> str:
    """Return, in words, which processes fell silent between two looks, and which are alive but behind `exchanges`."""
    silent, behind = [], []
    for process, (title, before, after) in enumerate(zip(titles, first, second, strict=True)):
        if process == own:
            continue
        if after is None or before is None or after.beats == before.beats:
            silent.append(title)
        elif after.exchanges < exchanges:
            behind.append(f"{title} at {after.current_phase or 'the start'}")
    parts = [f"silent: {', '.join(silent)}"] if silent else []
    parts += [f"not there yet: {', '.join(behind)}"] if behind else []
    return "; ".join(parts)
