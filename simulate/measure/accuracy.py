"""Compare plans with measurements on this machine: memory, bytes and time of random runs.

Closed forms were fitted to none of these runs (simulate.measure.random_runs), so a user can expect errors like theirs.
`lte validate` prints the rows and their errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from simulate.comm.echo import EchoCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.hardware import LOCAL, Device, FlopPerSecond
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.memory import peak_memory
from simulate.costs.message_schedule import sent_bytes
from simulate.costs.step_time import round_time
from simulate.layers.dtypes import CPU
from simulate.measure.fake_tensors import tracked_memory
from simulate.measure.one_device import made_up_batch, measure_memory_bytes
from simulate.measure.random_runs import Sample
from simulate.measure.timer import Stopwatch
from simulate.methods.registry import build_method

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
"""A device without host memory, so that a plan counts everything that a program holds."""
TIMED_STEPS = 5


@dataclass(frozen=True)
class Row:
    """One figure, predicted and measured."""

    name: str
    how: str
    """Method of the measurement: tracked, allocator, counted or timed."""
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; negative where it is too low."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Errors:
    """Relative errors of several rows."""

    rows: int
    mean: float
    """Mean of the absolute errors."""
    worst: float
    """Largest absolute error."""
    furthest_under: float
    """Lowest error, at most 0."""
    share_under: float
    """Share of rows whose prediction is too low."""


def errors_of(rows: Sequence[Row]) -> Errors:
    """Summarise the errors of rows."""
    errors = [row.error for row in rows]
    return Errors(
        rows=len(rows),
        mean=mean(abs(error) for error in errors),
        worst=max(abs(error) for error in errors),
        furthest_under=min(0.0, *errors),
        share_under=sum(error < 0 for error in errors) / len(errors),
    )


def planned_bytes(run: Run) -> int:
    """Return the planned peak of one device that has one memory, without what libraries hold, which nothing tracks."""
    return peak_memory(run, run.shape(), ROOMY).tensors


def tracked_rows(sample: Sample) -> Iterator[Row]:
    """Yield planned peaks of random runs beside those of their programs, tracked with fake tensors."""
    for run in sample.runs():
        tracked = tracked_memory(run, with_host=True)
        yield Row(describe(run), "tracked", planned_bytes(run), tracked.tracked_bytes)


def allocated_rows(sample: Sample) -> Iterator[Row]:
    """Yield planned peaks of small random runs beside the allocator's while they train."""
    for run in sample.shrunk().runs():
        yield Row(describe(run), "allocator", planned_bytes(run), measure_memory_bytes(run, CPU))


def byte_rows(sample: Sample, steps: int = 9) -> Iterator[Row]:
    """Yield planned bytes of small random runs, of all devices over some steps, beside the bytes counted."""
    for run in sample.shrunk().runs():
        train = run.train.model_copy(update={"steps": steps})
        run = run.model_copy(update={"train": train})
        counted = _counted_bytes(run)
        if counted:  # a relative error needs bytes to relate to
            yield Row(describe(run), "counted", sent_bytes(run, run.shape(), steps), counted)


def _counted_bytes(run: Run) -> int:
    communicator = VirtualCommunicator(run.cluster.devices)
    method = build_method(run, communicator, CPU)
    inputs, targets = made_up_batch(run, run.train.device_batch * run.cluster.devices, CPU)
    for step in range(run.train.steps):  # the same batch each time: bytes do not depend on numbers
        method.step(inputs, targets, step)
        if method.merge_due(step):
            method.merge(step)
    return communicator.counter.sent_bytes


def time_rows(sample: Sample) -> Iterator[Row]:
    """Yield planned seconds of small runs' steps on `local`, guessed or calibrated, beside measured ones."""
    profile = load_profile(LOCAL)
    device = profile.device[0]
    runs = (sample.shrunk().run(index) for index in itertools.count())
    # With a deadline, planned compute is a part of a round, and not comparable with a step.
    in_lockstep = (run for run in runs if not (run.method.is_paced or run.cluster.has_quorum))
    for run in itertools.islice(in_lockstep, sample.count):
        planned = round_time(run, run.shape(), (device,) * run.cluster.devices, profile.link).compute_s
        yield Row(describe(run), "timed", planned, _step_s(run))


def _step_s(run: Run) -> float:
    """Return the median seconds of one device's step, after a warm-up that allocates optimizer state."""
    method = build_method(run, EchoCommunicator(run.cluster.devices), CPU)
    inputs, targets = made_up_batch(run, run.train.device_batch, CPU)
    return Stopwatch(CPU, 0.0).seconds("step", lambda: method.step(inputs, targets, 0), TIMED_STEPS)


def describe(run: Run) -> str:
    """Return method, network and switches of a run as one line, with run.toml's words."""
    shape, train = run.shape(), run.train
    options = run.method.model_dump(exclude_defaults=True)
    keys = [f"{key} {value}" for key, value in options.items() if key not in ("name", "alpha", "steps_taken")]
    sizes = f"{shape.family} {shape.layers} x {shape.width}, {shape.tokens} tokens, {shape.outputs} outputs"
    given: dict[str, bool] = {train.dtype: train.dtype != "fp32", train.optimizer: train.optimizer != "adamw"}
    given["checkpointing"] = train.activation_checkpointing
    given[f"autocast {train.autocast}"] = train.autocast != "none"
    switches = [name for name, is_on in given.items() if is_on]
    return ", ".join(
        [f"{run.method.name} on {run.cluster.devices}", *keys, sizes, f"batch {train.micro_batch}", *switches]
    )
