"""Predictions beside what happens on this machine: memory, bytes and time of runs that no closed form was fitted to."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch

from simulate.comm.echo import EchoCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.hardware import Device, FlopPerSecond
from simulate.config.profiles import detect_local
from simulate.config.run import Run
from simulate.costs.memory import peak_memory
from simulate.costs.message_schedule import sent_bytes
from simulate.costs.step_time import round_time
from simulate.layers.dtypes import DTYPES
from simulate.measure.fake_tensors import tracked_memory
from simulate.measure.one_device import measure_memory_bytes
from simulate.measure.random_runs import Sample
from simulate.methods.registry import build_method
from simulate.models.fake_batch import example_batch

CPU = torch.device("cpu")
ROOMY = Device(
    kind="memory to spare",
    memory_bytes=10**15,
    reserved_bytes=0,
    host_memory_bytes=0,
    memory_bytes_per_s=1e9,
    flop_per_s=FlopPerSecond(fp32=1e9),
    efficiency=1.0,
    source="guess",
)
"""One memory, so that everything a program holds is counted."""
TIMED_STEPS, UNTIMED_STEPS = 5, 2


@dataclass(frozen=True)
class Row:
    """One figure, predicted and measured."""

    name: str
    how: str
    """Of the measurement."""
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured; negative where too little was predicted."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Errors:
    """Of several rows."""

    rows: int
    mean: float
    worst: float
    """The largest, either way."""
    furthest_under: float
    """The lowest, at most 0."""
    share_under: float
    """Of rows for which too little was predicted."""


def errors_of(rows: Sequence[Row]) -> Errors:
    """Sum rows up."""
    errors = [row.error for row in rows]
    return Errors(
        rows=len(rows),
        mean=mean(abs(error) for error in errors),
        worst=max(abs(error) for error in errors),
        furthest_under=min(0.0, *errors),
        share_under=sum(error < 0 for error in errors) / len(errors),
    )


def planned_bytes(run: Run) -> int:
    """Return the planned peak of one device that has one memory."""
    return peak_memory(run, run.model.shape(), ROOMY).total


def tracked_rows(sample: Sample) -> Iterator[Row]:
    """Yield planned peaks of random runs beside those of their programs, followed without numbers."""
    for run in sample.runs():
        tracked = tracked_memory(run, with_host=True)
        yield Row(describe(run), "tracked", planned_bytes(run), tracked.tracked_bytes)


def allocated_rows(sample: Sample) -> Iterator[Row]:
    """Yield planned peaks of small random runs beside the allocator's, which trains them."""
    for run in sample.shrunk().runs():
        yield Row(describe(run), "allocator", planned_bytes(run), measure_memory_bytes(run, CPU))


def byte_rows(sample: Sample, steps: int = 9) -> Iterator[Row]:
    """Yield planned bytes of small random runs, over all devices and some steps, beside those that were counted."""
    for run in sample.shrunk().runs():
        train = run.train.model_copy(update={"steps": steps})
        run = run.model_copy(update={"train": train})
        counted = _counted_bytes(run)
        if counted:
            yield Row(describe(run), "counted", sent_bytes(run, run.model.shape(), steps), counted)


def _counted_bytes(run: Run) -> int:
    communicator = VirtualCommunicator(run.cluster.devices)
    method = build_method(run, communicator, CPU)
    inputs, targets = example_batch(run.model, run.train.micro_batch * run.cluster.devices)
    inputs = inputs.to(DTYPES[run.train.dtype]) if inputs.is_floating_point() else inputs
    for step in range(run.train.steps):
        method.step(inputs, targets, step)
        if method.merge_due(step):
            method.merge(step)
    return communicator.counter.sent_bytes


def time_rows(sample: Sample) -> Iterator[Row]:
    """Yield the planned seconds of a small run's step on `local`, which is a guess, beside those that it takes here."""
    profile = detect_local()
    device = profile.device[0]
    runs = (sample.shrunk().run(index) for index in itertools.count())
    # Devices that stop within a round: a step of theirs is no step of this machine.
    in_lockstep = (run for run in runs if not run.method.is_paced)
    for run in itertools.islice(in_lockstep, sample.count):
        planned = round_time(run, run.model.shape(), (device,) * run.cluster.devices, profile.link).compute_s
        yield Row(describe(run), "timed", planned, _step_s(run))


def _step_s(run: Run) -> float:
    """Return the median seconds of one device's step, by the wall clock."""
    method = build_method(run, EchoCommunicator(run.cluster.devices), CPU)
    inputs, targets = example_batch(run.model, run.train.micro_batch)
    inputs = inputs.to(DTYPES[run.train.dtype]) if inputs.is_floating_point() else inputs
    seconds = []
    for step in range(UNTIMED_STEPS + TIMED_STEPS):
        started_s = time.perf_counter()
        method.step(inputs, targets, step)
        seconds.append(time.perf_counter() - started_s)
    return median(seconds[UNTIMED_STEPS:])


def describe(run: Run) -> str:
    """Return what a run is, in the words of run.toml."""
    shape, train = run.model.shape(), run.train
    options = run.method.model_dump(exclude_defaults=True)
    said = [f"{key} {value}" for key, value in options.items() if key not in ("name", "alpha", "steps_taken")]
    sizes = f"{shape.family} {shape.layers} x {shape.width}, {shape.tokens} tokens, {shape.outputs} outputs"
    given: dict[str, bool] = {train.dtype: train.dtype != "fp32", train.optimizer: train.optimizer != "adamw"}
    given["checkpointing"] = train.activation_checkpointing
    given[f"autocast {train.autocast}"] = train.autocast != "none"
    switches = [name for name, is_on in given.items() if is_on]
    return ", ".join(
        [f"{run.method.name} on {run.cluster.devices}", *said, sizes, f"batch {train.micro_batch}", *switches]
    )
