"""Say whether a run's links or devices are so far apart that its merges should not wait for everybody.

In one room exact reruns are worth more: a lost device is back within seconds, and a rerun of run.toml is the same run.
Over home links somebody is always late or away. docs/planning.md has the rule. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def reasons(profile: Profile, devices: Sequence[Device], step_s: Sequence[float]) -> Iterator[str]:
    """Yield why devices are far apart, in words with numbers; nothing where they are not."""
    if profile.link.latency_s >= FAR_LATENCY_S:
        yield f"links have {profile.link.latency_s * 1e3:.3g} ms of latency"
    leave_per_hour = max(device.leave_per_hour for device in devices)
    if leave_per_hour > 0:
        yield f"{leave_per_hour:.0%} of the devices leave within an hour"
    ratio = max(step_s) / min(step_s)
    if ratio >= UNEQUAL_STEPS:
        yield f"a step takes the slowest {ratio:.1f}x as long as the fastest"


def can_have_quorum(run: Run) -> bool:
    """Whether the run's method merges without some devices, as its keys are, and the run says nothing of it yet."""
    cluster = run.cluster
    if cluster.has_quorum or cluster.min_devices is not None or cluster.devices < LEAST_DEVICES:
        return False
    try:
        run.method.check_quorum(cluster.model_copy(update={"quorum": majority(cluster.devices)}))
    except ValueError:
        return False
    return True
