"""Slow the exchanges of a launched run to the seconds that they would take on slower links (cluster.throttle).

The processes of one machine exchange by loopback, in no time beside a home link. Each exchange here begins once all of
its processes have come, and ends no sooner than its messages would on the links that are asked for, so that a run on
one machine has the pace of one over such links. Nothing is changed about what is sent, and no rights are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from simulate.comm.transfers import Transfer

T = TypeVar("T")


class Throttle:
    """The seconds that messages are to take, by `planned_s`, and the sleep that makes them so."""

    def __init__(
        self,
        planned_s: Callable[[Transfer], float],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._planned_s, self._now, self._sleep = planned_s, now, sleep
        self._counted_s = 0.0

    def count(self, transfer: Transfer) -> None:
        """Add a message to those of the next exchange."""
        self._counted_s += self._planned_s(transfer)

    def take_s(self) -> float:
        """Return the seconds of the messages counted since the last call."""
        seconds, self._counted_s = self._counted_s, 0.0
        return seconds

    def slowed(self, exchange: Callable[[], T], seconds: float, meet: Callable[[], object]) -> T:
        """Return what an exchange returns, no sooner than `seconds` after `meet`, which waits for all its processes.

        The wait for those that are late is no part of a message's seconds: links are idle meanwhile.
        """
        meet()
        begun_s = self._now()
        result = exchange()
        left_s = begun_s + seconds - self._now()
        if left_s > 0:
            self._sleep(left_s)
        return result
