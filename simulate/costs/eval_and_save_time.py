"""Seconds of evaluations and checkpoints, for which a launched run pauses its training.

The planner adds them to a run's time and spaces recovery points so that they stay affordable; the simulated clock
advances by them. A checkpoint holds up training while its tensors go to the operating system, which takes `copy_s`; the
rest of its `save_s` passes beside the steps that follow, and the next checkpoint, or the run's end, waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from simulate.config.hardware import Device, Dtype
from simulate.config.run import Run
from simulate.costs.flops import forward_flops
from simulate.costs.kernel_time import KernelRates, forward_s, layers_s
from simulate.costs.memory import checkpoint_bytes
from simulate.costs.state import frozen_bytes
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.cadence import Cadence, evaluation_samples

AFFORDABLE_SHARE = 0.05
"""Share of a run's time that recovery points may take."""
PARTS = 2
"""Parts of a checkpoint that one device's process writes: its own state, and the shared state."""
BUFFERED_BYTES_PER_S = 2.6e9
"""Rate at which the operating system takes bytes of a file into its memory.

Measured: 256 MiB by one write, processor time, AMD EPYC (Zen 3); 2.6 to 2.9 GB/s in six of eight writes."""
BUFFERED_SHARE = 0.1
"""Share of the host's memory up to which Linux lets a writer go on at that rate (vm.dirty_background_ratio)."""


@dataclass(frozen=True)
class EvalAndSaveTime:
    """How often a run evaluates and saves, and the seconds of each on the slowest device."""

    cadence: Cadence
    evaluation_s: float
    save_bytes: int
    """Bytes that one device's process writes each time: its own part and the shared one."""
    save_s: float | None
    """Seconds of a checkpoint; None where a device's disk is not known."""
    copy_s: float
    """Seconds of it for which training stands still; the rest passes beside training."""
    step_s: float
    """Seconds of compute of one step, beside which checkpoints are written."""

    @property
    def evaluations(self) -> int:
        """Number of evaluations in the whole run."""
        return self.cadence.num_evaluations

    @property
    def saves(self) -> int:
        """Number of checkpoints in the whole run."""
        return self.cadence.num_saves

    @property
    def total_s(self) -> float:
        """Seconds for which training stands still, for all evaluations and checkpoints."""
        return self.cadence.num_evaluations * self.evaluation_s + self.saving_s

    @cached_property
    def hidden_s(self) -> float:
        """Seconds of a checkpoint that pass beside training where it goes on for long enough."""
        return (self.save_s or 0.0) - self.copy_s

    @property
    def saving_s(self) -> float:
        """Seconds for which training stands still, for all checkpoints."""
        cadence, rest_s = self.cadence, self.hidden_s
        waits_s = 0.0
        for steps, times in cadence.save_gaps.items() if rest_s else ():  # thousands of candidates ask
            waits_s += times * max(0.0, rest_s - steps * self.step_s)
        return cadence.num_saves * self.copy_s + waits_s + rest_s  # the last one has no steps beside it

    def save_pause_s(self, step: int) -> float:
        """Return the seconds for which the checkpoint after a step holds up training, and the run's end with it."""
        before, end_s = self.cadence.save_before(step), self.hidden_s if step == self.cadence.steps else 0.0
        return self.copy_s + (self._rest_after(step - before) if before else 0.0) + end_s

    def _rest_after(self, steps: int) -> float:
        """Return the seconds that a checkpoint still takes so many steps after it was begun."""
        # Exchanges and evaluations in between help, too; what they hide is not counted.
        return max(0.0, self.hidden_s - steps * self.step_s)

    def affordable_recovery(self, step_s: float) -> int:
        """Return the fewest merges between recovery points at which these take no more than AFFORDABLE_SHARE."""
        # Where even one recovery point is too dear, one at the run's end remains.
        meetings = -(-self.cadence.steps // self.cadence.apart)
        share = (self.save_s or 0.0) / (AFFORDABLE_SHARE * self.cadence.apart * step_s)
        return max(1, math.ceil(min(share, meetings)))


def eval_and_save_time(run: Run, shape: ModelShape, kinds: Sequence[Device], step_s: float) -> EvalAndSaveTime:
    """Return the time of evaluations and checkpoints of a run on these kinds of devices.

    `step_s`: seconds of one step's compute, beside which checkpoints are written.
    """
    save_bytes, evaluating_s, saving_s, known = checkpoint_bytes(run, shape, 1), 0.0, 0.0, True
    copying_s, samples = 0.0, evaluation_samples(run)
    for device in kinds:
        for one in run.classes:
            evaluating_s = max(evaluating_s, evaluation_s(one, shape, device, samples))
        seconds = save_s(save_bytes, device)
        saving_s, known = max(saving_s, seconds or 0.0), known and seconds is not None
        # Processes that go on without lost ones wait for the disk (simulate.training.loop).
        waits_s = math.inf if run.cluster.has_quorum else copy_s(save_bytes, device)
        copying_s = max(copying_s, min(seconds or 0.0, waits_s))
    return EvalAndSaveTime(
        Cadence.of(run), evaluating_s, save_bytes, saving_s if known else None, copying_s if known else 0.0, step_s
    )


def copy_s(num_bytes: int, device: Device) -> float:
    """Return the seconds in which the operating system takes a checkpoint; infinite where its memory is too small."""
    room_bytes = BUFFERED_SHARE * (device.host_memory_bytes or device.memory_bytes)
    return num_bytes / BUFFERED_BYTES_PER_S if num_bytes <= room_bytes else math.inf


def save_s(num_bytes: int, device: Device) -> float | None:
    """Return the seconds of one checkpoint; None where the device's disk is not known."""
    rate = device.disk_write_bytes_per_s
    return None if rate is None else PARTS * device.disk_flush_s + num_bytes / rate


def evaluation_s(run: Run, shape: ModelShape, device: Device, samples: int | None = None) -> float:
    """Return the seconds of one evaluation: devices share its batches, and compute on plain layers.

    `samples` are those of a batch, where other classes of devices have a say in them.
    """
    samples = samples or evaluation_samples(run)
    # Devices take turns with whole batches, so that the last turn may leave some of them idle.
    turns = -(-run.train.evaluate_samples // (samples * run.cluster.devices))
    return turns * _batch_s(shape, samples, run.method.frozen_format, run.train.dtype, device)


@lru_cache(maxsize=256)
def _batch_s(shape: ModelShape, samples: int, frozen: str, dtype: Dtype, device: Device) -> float:
    rates, element_bytes, unpacked_s = KernelRates.of(dtype, device), ELEMENT_BYTES[dtype], 0.0
    if frozen != "none":  # each weight is unpacked once in a forward pass
        measured_s = layers_s(shape, frozen, rates.unpack) if rates else None
        moved = frozen_bytes(shape, frozen, element_bytes) + 2 * shape.adapted_parameters * element_bytes
        unpacked_s = moved / device.memory_bytes_per_s if measured_s is None else measured_s
    if rates is not None:
        return unpacked_s + forward_s(shape, samples, element_bytes, rates)
    return unpacked_s + forward_flops(shape, samples) / (device.flop_per_s.of(dtype) * device.efficiency)
