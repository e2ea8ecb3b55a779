"""A checkpoint that is being completed beside training.

The loop (simulate.training.loop) hands the tensors to the operating system between two steps, which takes as long as
copying them. What takes long, their digests and the way to the disk, follows here in a thread, which reads files alone:
there is no second copy of the tensors, and training may change them. The checkpoint counts, and is reported, once all
of it is on the disk.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from simulate.common.events import Event
from simulate.training.checkpoints import BegunCheckpoint


class Saving:
    """A checkpoint that was begun, and the event that reports it later."""

    def __init__(self, begun: BegunCheckpoint, event: Event, began_s: float) -> None:
        self.event = event
        self.paused_s = time.monotonic() - began_s
        """Seconds for which training has stood still for this checkpoint, since `began_s` of the monotonic clock."""
        self._began_s = began_s
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._done: Future[float] = executor.submit(_complete, begun)
        executor.shutdown(wait=False)  # the thread ends with its only task; the interpreter's exit waits for it

    def is_done(self) -> bool:
        """Whether the checkpoint is on the disk, or could not be written."""
        return self._done.done()

    def wait(self) -> float:
        """Return the seconds that the checkpoint took once it is on the disk. Raises OSError where that failed."""
        asked_s = time.monotonic()
        ended_s = self._done.result()
        self.paused_s += max(0.0, ended_s - asked_s)
        return ended_s - self._began_s


def _complete(begun: BegunCheckpoint) -> float:
    begun.complete()
    return time.monotonic()
