"""Say whether a run's links or devices are so far apart that its merges should not wait for everybody.

In one room exact reruns are worth more: a lost device is back within seconds, and a rerun of run.toml is the same run.
Over home links somebody is always late or away. The planner gives such runs a quorum, where the user left that open;
docs/planning.md has the rule. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from simulate.common.units import seconds_text
from simulate.config.hardware import Device, Profile
from simulate.config.run import Run

FAR_LATENCY_S = 5e-3
"""Latency of links from which on devices count as far apart: above a room's (0.2 ms) and a WLAN's (3 ms)."""
UNEQUAL_STEPS = 1.5
"""Ratio of the slowest device's step to the fastest's from which on they do."""
LEAST_DEVICES = 3
"""Fewest devices for a quorum: of two, one would train alone."""


def majority(devices: int) -> int:
    """Return the smallest quorum of which two cannot merge at once, whatever links break: more than half."""
    return devices // 2 + 1


def latency_s(profile: Profile) -> float:
    """Return the longest one-way delay among a profile's link and its devices' own lines."""
    link = profile.link
    return max((line.latency_s for line in link.lines), default=link.latency_s)


def leave_per_hour(devices: Sequence[Device]) -> float:
    """Return the share of the devices that leave within an hour, of the kind that leaves most."""
    return max(device.leave_per_hour for device in devices)


def place_reasons(profile: Profile, devices: Sequence[Device]) -> Iterator[str]:
    """Yield why devices are far apart that a profile knows before anything is planned, in words with numbers."""
    if latency_s(profile) >= FAR_LATENCY_S:
        yield f"links have {latency_s(profile) * 1e3:.3g} ms of latency"
    if leave_per_hour(devices) > 0:
        yield f"{leave_per_hour(devices):.0%} of the devices leave within an hour"


def speed_reasons(step_s: Sequence[float]) -> Iterator[str]:
    """Yield how much longer a step takes the slowest device, where it is much longer."""
    ratio = max(step_s) / min(step_s)
    if ratio >= UNEQUAL_STEPS:
        yield f"a step takes the slowest {ratio:.1f}x as long as the fastest"


def reasons(profile: Profile, devices: Sequence[Device], step_s: Sequence[float]) -> Iterator[str]:
    """Yield why devices are far apart, in words with numbers; nothing where they are not."""
    yield from place_reasons(profile, devices)
    yield from speed_reasons(step_s)


@dataclass(frozen=True)
class QuorumRule:
    """The quorum that a plan chose by itself, with the numbers that it follows from."""

    quorum: int
    devices: int
    reasons: tuple[str, ...]
    latency_s: float
    leave_per_hour: float
    step_ratio: float
    """The slowest device's step over the fastest's."""
    round_s: float

    @property
    def loss_without_s(self) -> float:
        """Device-seconds that a lost device costs without a quorum: all repeat the round, restart not counted."""
        return self.devices * self.round_s

    @property
    def loss_with_s(self) -> float:
        """Device-seconds that it costs with one: its own round, at most."""
        return self.round_s

    def __str__(self) -> str:
        return (
            f"{' and '.join(self.reasons)}, so merges go on with those who are there; a lost device costs its own "
            f"round, {seconds_text(self.loss_with_s)}, and not all {self.devices} devices' and a restart, "
            f"{seconds_text(self.loss_without_s)} of devices' time and more; a rerun is no longer the same to the bit; "
            f"--set cluster.quorum={self.devices} waits for all (docs/planning.md)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the rule's numbers, and its limits, as the plan's JSON has them."""
        limits = {"latency_s": FAR_LATENCY_S, "step_ratio": UNEQUAL_STEPS, "devices": LEAST_DEVICES}
        losses = {"loss_without_s": self.loss_without_s, "loss_with_s": self.loss_with_s}
        return {**asdict(self), "reasons": list(self.reasons), **losses, "limits": limits}


def can_have_quorum(run: Run) -> bool:
    """Whether the run's method merges without some devices, as its keys are, and the run says nothing of it yet."""
    cluster = run.cluster
    if (
        cluster.has_quorum
        or cluster.quorum is not None
        or cluster.min_devices is not None
        or cluster.devices < LEAST_DEVICES
    ):
        return False
    try:
        run.method.check_quorum(cluster.model_copy(update={"quorum": majority(cluster.devices)}))
    except ValueError:
        return False
    return True
