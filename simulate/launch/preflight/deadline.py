"""Deadline of a whole exchange, however many reads and writes it takes."""

from __future__ import annotations

import time


class Deadline:
    """A moment on the monotonic clock, some seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        """Seconds from when it was set, for messages."""
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left; 0 when it is over."""
        return max(0.0, self._end_s - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return self.left_s == 0.0

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and one `seconds` from now."""
        return Deadline(min(seconds, self.left_s))
