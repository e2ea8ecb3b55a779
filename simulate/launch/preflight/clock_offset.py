"""Clock offset between two machines, by NTP's exchange of four times (RFC 5905, section 8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from simulate.launch.preflight.channel import BadFrameError, Channel
from simulate.launch.preflight.deadline import Deadline

ROUNDS = 5
Now = Callable[[], float]
"""Returns seconds since the epoch, like time.time."""


@dataclass(frozen=True)
class Sample:
    """Clock offset and delay of one exchange."""

    offset_s: float
    """Seconds that the peer's clock is ahead; the error is at most half of delay_s."""
    delay_s: float
    """Seconds on the way there and back, without the peer's own processing."""


def sample(sent_s: float, peer_received_s: float, peer_sent_s: float, received_s: float) -> Sample:
    """Return offset and delay from the four times of one exchange."""
    return Sample(
        offset_s=((peer_received_s - sent_s) + (peer_sent_s - received_s)) / 2,
        delay_s=(received_s - sent_s) - (peer_sent_s - peer_received_s),
    )


def measure_offset_s(channel: Channel, now: Now, deadline: Deadline, rounds: int = ROUNDS) -> float:
    """Return the seconds that the peer's clock is ahead of ours, by the exchange with the least delay."""
    # The error is at most half the delay, so the fastest exchange is the most exact.
    return min((_exchange(channel, now, deadline) for _ in range(rounds)), key=lambda taken: taken.delay_s).offset_s


def _exchange(channel: Channel, now: Now, deadline: Deadline) -> Sample:
    sent_s = now()
    channel.send({"kind": "clock"}, deadline)
    answer = channel.receive(deadline)
    received_s = now()
    there_s, back_s = answer.get("received_s"), answer.get("sent_s")
    if answer["kind"] != "clock" or not isinstance(there_s, float) or not isinstance(back_s, float):
        raise BadFrameError("did not send its clock")
    if not math.isfinite(there_s + back_s):
        raise BadFrameError("sent a time that is no number")
    return sample(sent_s, there_s, back_s, received_s)


def answer_clock(channel: Channel, now: Now, deadline: Deadline) -> None:
    """Answer a clock message that has just been received."""
    received_s = now()
    channel.send({"kind": "clock", "received_s": received_s, "sent_s": now()}, deadline)
