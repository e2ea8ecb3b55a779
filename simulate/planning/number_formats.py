"""Check a run's autocast format against its profile, and suggest a lower format that all devices have; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from simulate.common.errors import InputError
from simulate.config.hardware import Device, Profile
from simulate.config.run import Run

if TYPE_CHECKING:
    from simulate.planning.candidate import Candidate, Rejected

Format = Literal["bf16", "fp16"]
FORMATS: tuple[Format, ...] = ("bf16", "fp16")
"""Lower formats, the better one first: bf16 has the range of fp32 and needs no loss scale."""


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


def format_notes(
    chosen: Candidate | None, profile: Profile, evaluate: Callable[[Run], Candidate | Rejected]
) -> Iterator[str]:
    """Report the time and memory of the choice in the best lower format that all devices have."""
    formats = common_formats(profile)
    # Autocast lowers fp32 only, and a run that has it needs no advice.
    if chosen is None or not formats or chosen.run.train.autocast != "none" or chosen.run.train.dtype == "fp64":
        return
    train = chosen.run.train.model_copy(update={"autocast": formats[0]})
    other: Any = evaluate(chosen.run.model_copy(update={"train": train}))
    other = getattr(other, "candidate", other)  # whether it fits or not
    gains = {getattr(d.flop_per_s, formats[0]) / d.flop_per_s.fp32 for d in profile.device}
    rates = " to ".join(f"{gain:.2g}" for gain in sorted({min(gains), max(gains)}))
    yield (
        f"devices of profile {profile.name} multiply in {' and '.join(formats)}, {formats[0]} at {rates}x the fp32 "
        f"rate: train.autocast = {formats[0]} would take {other.wall_s / chosen.wall_s:.2f}x the time and "
        f"{other.memory.total / chosen.memory.total:.2f}x the memory, with less exact products"
    )
