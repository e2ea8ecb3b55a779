"""lte plan --verify: follow the choice's own training without numbers, and say whether its devices can hold it.

A plan's memory is a closed form. Here the program itself runs on fake tensors, and CUDA's caching allocator is replayed
over its allocations; lte plan calls this after it has chosen, and writes no run.toml where the choice does not pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from simulate.common.units import bytes_text
from simulate.config.hardware import Device
from simulate.config.run import Run
from simulate.costs.allocator import WORKSPACE_BYTES
from simulate.costs.memory import CPU_LIBRARY_BYTES
from simulate.planning.planner import Plan

if TYPE_CHECKING:
    from simulate.measure.fake_tensors import Tracked


@dataclass(frozen=True)
class Verified:
    """Memory that a run's own program takes on a device."""

    device: Device
    tracked: Tracked
    libraries_bytes: int
    """Bytes that a CPU's libraries of products hold for good."""

    @property
    def held_bytes(self) -> int:
        """Bytes of the program on the device: what allocator and libraries hold, or tensors and libraries on a CPU."""
        if self.device.is_cuda:
            return self.tracked.allocator_bytes + WORKSPACE_BYTES
        return self.tracked.tracked_bytes + self.libraries_bytes

    @property
    def limit_bytes(self) -> int:
        """Bytes that the program may take: all memory but what the system reserves, and the headroom that is stated.

        The default headroom stands for the closed form's error, which a replay does not have.
        """
        stated = self.device.headroom_share or 0.0
        return int(self.device.memory_bytes * (1 - stated)) - self.device.reserved_bytes

    @property
    def fits(self) -> bool:
        """Whether the device can hold the program."""
        return self.held_bytes <= self.limit_bytes

    def text(self) -> str:
        """Return a line with what tensors take, what the device holds for them, and how tight it is."""
        with_allocator = "with CUDA's allocator and libraries " if self.device.is_cuda else ""
        with_allocator = "with libraries " if self.libraries_bytes else with_allocator
        total = self.held_bytes + self.device.reserved_bytes
        return (
            f"tensors {bytes_text(self.tracked.tracked_bytes)}, {with_allocator}{bytes_text(self.held_bytes)}, with "
            f"the system's part {bytes_text(total)} of {bytes_text(self.device.memory_bytes)} "
            f"({total / self.device.memory_bytes:.0%}): it {'fits' if self.fits else 'does not fit'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as `lte plan --json` prints them."""
        return {**asdict(self.tracked), "held_bytes": self.held_bytes, "fits": self.fits}


def verify_choice(plan: Plan) -> Verified:
    """Return the memory of the chosen run on its tightest device; raises InputError where it cannot be traced."""
    assert plan.chosen is not None
    return _verify(plan.tightest_run(), plan.tightest_device())


def _verify(run: Run, device: Device) -> Verified:
    from simulate.measure.fake_tensors import tracked_memory  # imports torch

    libraries_bytes = 0 if device.is_cuda else CPU_LIBRARY_BYTES.get(run.train.autocast, 0)
    return Verified(device, tracked_memory(run, with_host=device.host_memory_bytes == 0), libraries_bytes)


def too_large_text(plan: Plan, verified: Verified) -> str:
    """Return a line about a choice that does not fit, with the largest batch that does; traces smaller ones."""
    assert plan.chosen is not None
    run = plan.tightest_run()
    short = f"{run.method.name} with train.micro_batch = {run.train.micro_batch} takes " + (
        f"{bytes_text(verified.held_bytes - verified.limit_bytes)} more than {verified.device.kind} can give"
    )
    heads = getattr(run.method, "heads_per_device", 1)
    batch = run.train.micro_batch // 2 // heads * heads
    while batch >= 1:
        smaller = run.model_copy(update={"train": run.train.model_copy(update={"micro_batch": batch})})
        if _verify(smaller, verified.device).fits:
            return f"{short}; the largest batch that passes is {batch}: --set train.micro_batch={batch}"
        batch = batch // 2 // heads * heads
    return f"{short}, and no smaller batch passes; try train.activation_checkpointing, quantize, or a smaller model"
