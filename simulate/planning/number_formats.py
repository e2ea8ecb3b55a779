"""Check a run's autocast format against its profile, pick the one that is faster on all devices, and say what it is
worth; torch-free. simulate.planning.planner asks before it evaluates candidates, and for the notes on its choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from simulate.common.errors import InputError
from simulate.common.units import change_text
from simulate.config.hardware import Device, Profile
from simulate.config.run import Run

if TYPE_CHECKING:
    from simulate.planning.candidate import Candidate, Rejected

Format = Literal["bf16", "fp16"]
FORMATS: tuple[Format, ...] = ("bf16", "fp16")
"""Lower formats, the better one first: bf16 has the range of fp32 and needs no loss scale."""
LEAST_GAIN = 1.5
"""Rate of a lower format over fp32 from which a plan picks it: tensor cores reach it, and Pascal has none."""


def check_formats(run: Run, profile: Profile) -> None:
    """Raise InputError where a device of the profile has no rate for the run's autocast format."""
    autocast = run.train.autocast
    if autocast == "none":
        return
    lacking = next((device for device in profile.device if not _has(device, autocast)), None)
    if lacking is not None:
        common = common_formats(profile)
        other = f"train.autocast={common[0]}" if common else "train.autocast=none, it multiplies in fp32 only"
        raise InputError(
            f"train.autocast = {autocast!r}: profile {profile.name} gives {lacking.kind} no {autocast} rate; "
            f"try --set {other}"
        )


def common_formats(profile: Profile) -> list[Format]:
    """Return the lower formats that all devices of a profile have a rate for."""
    return [name for name in FORMATS if all(_has(device, name) for device in profile.device)]


def _has(device: Device, name: Format) -> bool:
    return getattr(device.flop_per_s, name) is not None


def faster_format(run: Run, profile: Profile) -> Format | None:
    """Return the format in which all GPUs multiply clearly faster than in fp32, where the run leaves it open.

    CPUs multiply in fp32 unless asked: whether their lower formats are faster depends on the shapes.
    """
    return faster_format_of(run, profile.device)


def faster_format_of(run: Run, devices: Sequence[Device]) -> Format | None:
    """Return the same for some of a profile's devices."""
    if "autocast" in run.train.model_fields_set or run.train.dtype == "fp64":
        return None
    if not all(device.is_cuda for device in devices):
        return None
    formats = [name for name in FORMATS if all(_has(device, name) for device in devices)]
    return formats[0] if formats and _gains(devices, formats[0])[0] >= LEAST_GAIN else None


def _gains(devices: Sequence[Device], name: Format) -> tuple[float, float]:
    """Return the smallest and the largest rate of a format over fp32 among the devices."""
    gains = [getattr(device.flop_per_s, name) / device.flop_per_s.fp32 for device in devices]
    return min(gains), max(gains)


def format_notes(
    chosen: Candidate | None, profile: Profile, evaluate: Callable[[Run], Candidate | Rejected], picked: Format | None
) -> Iterator[str]:
    """Report what the picked format is worth, or where fp32 was kept the best lower format that all devices have."""
    formats = common_formats(profile)
    # Autocast lowers fp32 only, and a run that was given a format needs no advice.
    if chosen is None or not formats or chosen.run.train.dtype == "fp64":
        return
    if picked is None and chosen.run.train.autocast != "none":
        return
    train = chosen.run.train.model_copy(update={"autocast": "none" if picked else formats[0]})
    other: Any = evaluate(chosen.run.model_copy(update={"train": train}))
    other = getattr(other, "candidate", other)  # whether it fits or not
    rates = " to ".join(f"{gain:.2g}" for gain in sorted(set(_gains(profile.device, picked or formats[0]))))
    time, memory = other.wall_s / chosen.wall_s, other.memory.total / chosen.memory.total
    if picked is None:
        yield (
            f"devices of profile {profile.name} multiply in {' and '.join(formats)}, {formats[0]} at {rates}x the fp32 "
            f"rate: train.autocast = {formats[0]} would take {change_text(time)} time and "
            f"{change_text(memory)} memory, with less exact products"
        )
        return
    scaled = " with loss scaling (arXiv 1710.03740)" if picked == "fp16" else ""
    yield (
        f"train.autocast = {picked}, in which all devices multiply at {rates}x the fp32 rate; assumed to train as well "
        f"as fp32{scaled}. fp32 would take {change_text(time)} time and {change_text(memory)} memory: "
        "--set train.autocast=none"
    )
