"""What a launched run stops training for: evaluations, and checkpoints on its disks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from simulate.config import Run
from simulate.costs.calendar import Calendar
from simulate.costs.flops import forward_flops
from simulate.costs.holding import holding
from simulate.costs.kernels import KernelRates, forward_s, layers_s
from simulate.costs.remember import by_method
from simulate.costs.time import RoundTime
from simulate.costs.traffic import ELEMENT_BYTES, frozen_bytes
from simulate.hardware import Device, Dtype
from simulate.models.shapes import ModelShape
from simulate.options import AdapterOptions, LocalSgdOptions, LteOptions

AFFORDABLE_SHARE = 0.05
"""Of a run's time, for recovery points."""
PARTS = 2
"""Of a checkpoint that one device's process writes: its own, and what all share."""
EVALUATION_BATCH = 16
"""Samples in one forward pass of an evaluation, at most."""


@dataclass(frozen=True)
class Pauses:
    """How often a run evaluates and saves, and the seconds of each time; the slowest device's."""

    evaluations: int
    evaluation_s: float
    saves: int
    save_bytes: int
    """What one device's process writes each time: its own part, and what all share."""
    save_s: float | None
    """None: a device's disk is not known."""

    @property
    def evaluating_s(self) -> float:
        """Of all evaluations."""
        return self.evaluations * self.evaluation_s

    @property
    def saving_s(self) -> float:
        """Of all checkpoints."""
        return self.saves * (self.save_s or 0.0)

    @property
    def total_s(self) -> float:
        """Of everything but training."""
        return self.evaluating_s + self.saving_s


def pauses(run: Run, shape: ModelShape, kinds: Sequence[Device]) -> Pauses:
    """Return the pauses of a run on these kinds of devices."""
    calendar, save_bytes = Calendar.of(run), saved_bytes(run, shape)
    saves_s = [save_s(save_bytes, device) for device in kinds]
    return Pauses(
        evaluations=calendar.num_evaluations,
        evaluation_s=max(evaluation_s(run, shape, device) for device in kinds),
        saves=calendar.num_saves,
        save_bytes=save_bytes,
        save_s=None if None in saves_s else max(seconds or 0.0 for seconds in saves_s),
    )


def affordable_recovery(run: Run, stops: Pauses, time: RoundTime) -> int:
    """Return the fewest merges between recovery points that leave these no more than their share of the time."""
    meeting_s = Calendar.of(run).apart * time.round_s / time.steps
    return max(1, math.ceil((stops.save_s or 0.0) / (AFFORDABLE_SHARE * meeting_s)))


def save_s(num_bytes: int, device: Device) -> float | None:
    """Return the seconds of one checkpoint; None where the device's disk is not known."""
    rate = device.disk_write_bytes_per_s
    return None if rate is None else PARTS * device.disk_flush_s + num_bytes / rate


def evaluation_batch(run: Run) -> int:
    """Return the samples of one forward pass, no more than a step's: what fits a step fits here."""
    return min(EVALUATION_BATCH, run.train.micro_batch)


def evaluation_s(run: Run, shape: ModelShape, device: Device) -> float:
    """Return the seconds of one evaluation: the devices take turns with its batches, on plain layers."""
    samples = evaluation_batch(run)
    turns = -(-run.train.evaluate_samples // (samples * run.cluster.devices))
    return turns * _batch_s(shape, samples, run.method.frozen_format, run.train.dtype, device)


@lru_cache(maxsize=256)
def _batch_s(shape: ModelShape, samples: int, frozen: str, dtype: Dtype, device: Device) -> float:
    rates, element_bytes, unpacked_s = KernelRates.of(dtype, device), ELEMENT_BYTES[dtype], 0.0
    if frozen != "none":
        measured_s = layers_s(shape, frozen, rates.unpack) if rates else None
        moved = frozen_bytes(shape, frozen, element_bytes) + 2 * shape.adapted_parameters * element_bytes
        unpacked_s = moved / device.memory_bytes_per_s if measured_s is None else measured_s
    if rates is not None:
        return unpacked_s + forward_s(shape, samples, element_bytes, rates)
    return unpacked_s + forward_flops(shape, samples) / (device.flop_per_s.of(dtype) * device.efficiency)


@by_method
def saved_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes of tensors that one device's process writes into a checkpoint, what all share among them.

    Of a run with a dense warm start those before its first adapter, which are the most.
    """
    held, method, devices = holding(run, shape), run.method, run.cluster.devices
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    moment_bytes = element_bytes if run.train.optimizer_state == "fp32" else 1
    elements = shape.parameters + held.adapters + held.extra
    packed_bytes = 0
    if isinstance(method, AdapterOptions):
        if method.remembers_product:  # the weights before any head's product was added
            elements += shape.adapted_parameters
        if method.frozen_format != "none":
            packed_bytes = frozen_bytes(shape, method.frozen_format, element_bytes)
            if not method.keeps_master:
                elements -= shape.adapted_parameters
    moments = held.moments
    if isinstance(method, LteOptions | LocalSgdOptions) and method.merge_optimizer == "reset":  # saved after merges
        factors = shape.factors(method.held_rank(devices), method.frozen_a) if isinstance(method, LteOptions) else 0
        moments = 2 * (held.trained - factors) if factors else 0
    return elements * element_bytes + moments * moment_bytes + packed_bytes
