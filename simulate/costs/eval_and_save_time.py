"""Seconds of evaluations and checkpoints, for which a launched run pauses its training.

The planner adds them to a run's time and spaces recovery points so that they stay affordable; the simulated clock
advances by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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


@dataclass(frozen=True)
class EvalAndSaveTime:
    """How often a run evaluates and saves, and the seconds of each on the slowest device."""

    cadence: Cadence
    evaluation_s: float
    save_bytes: int
    """Bytes that one device's process writes each time: its own part and the shared one."""
    save_s: float | None
    """Seconds of a checkpoint; None where a device's disk is not known."""

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
        """Seconds of all evaluations and checkpoints."""
        return self.cadence.num_evaluations * self.evaluation_s + self.cadence.num_saves * (self.save_s or 0.0)

    def affordable_recovery(self, step_s: float) -> int:
        """Return the fewest merges between recovery points at which these take no more than AFFORDABLE_SHARE."""
        # Where even one recovery point is too dear, one at the run's end remains.
        meetings = -(-self.cadence.steps // self.cadence.apart)
        share = (self.save_s or 0.0) / (AFFORDABLE_SHARE * self.cadence.apart * step_s)
        return max(1, math.ceil(min(share, meetings)))


def eval_and_save_time(run: Run, shape: ModelShape, kinds: Sequence[Device]) -> EvalAndSaveTime:
    """Return the time of evaluations and checkpoints of a run on these kinds of devices."""
    save_bytes, evaluating_s, saving_s, known = checkpoint_bytes(run, shape, 1), 0.0, 0.0, True
    samples = evaluation_samples(run)
    for device in kinds:
        for one in run.classes:
            evaluating_s = max(evaluating_s, evaluation_s(one, shape, device, samples))
        seconds = save_s(save_bytes, device)
        saving_s, known = max(saving_s, seconds or 0.0), known and seconds is not None
    return EvalAndSaveTime(Cadence.of(run), evaluating_s, save_bytes, saving_s if known else None)


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
