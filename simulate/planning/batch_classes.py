"""Choose a batch for each kind of device, so that unlike devices end a round together.

With one batch for all, everybody waits for the slowest device at every merge. Merges weigh by samples, so that a
device that is twice as fast may train on twice as many: consecutive devices of one kind become a class
([[cluster.class]]) with its own micro_batch and accumulate, and the format that its products are fastest in. For every
time that a step may take, each class takes as many samples as it can compute by then and hold; the planner compares the
best of these with equal batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from simulate.config.hardware import Device
from simulate.config.run import Run, check_classes
from simulate.config.tables import Autocast, DeviceClass
from simulate.costs.memory import peak_memory
from simulate.costs.samples import batch_factor
from simulate.costs.step_time import device_step_s
from simulate.planning.candidate import Candidate
from simulate.planning.number_formats import faster_format_of
from simulate.planning.search_space import MICRO_BATCHES, NEAR, Pins, train_for

MOST_IDLE = 0.1
"""Share of a round's compute that devices may wait: equal batches that leave less are kept, for they are simpler."""
MOST_PASSES = 16
"""Most passes of a step that a class is tried with."""
TRIED = (*MICRO_BATCHES, 3, 6, 12, 20, 24, 28)
"""Samples of a class's pass that are tried: finer than of equal batches, since they have to match each other."""


@dataclass(frozen=True)
class Batch:
    """One way for a device of a class to take a step."""

    samples: int
    micro_batch: int
    accumulate: int
    autocast: Autocast
    step_s: float


@dataclass(frozen=True)
class _Class:
    """Consecutive devices of one kind, with the batches that fit them: each the largest of those that are as fast."""

    devices: int
    batches: tuple[Batch, ...]
    """By seconds and samples, both of which grow."""

    def within(self, step_s: float) -> Batch | None:
        """Return the largest batch that takes no longer than `step_s`."""
        count = bisect_right(self.batches, step_s, key=lambda batch: batch.step_s)
        return self.batches[count - 1] if count else None


@dataclass(frozen=True)
class _Mix:
    """A batch for each class."""

    batches: tuple[Batch, ...]
    samples: int
    """Samples of a step over all devices."""
    step_s: float
    idle_share: float


def unequal_runs(fitting: Sequence[Candidate], equal: Candidate | None, pins: Pins, base: Run) -> Iterator[Run]:
    """Yield the best run with classes for each method whose best equal batches leave devices idle.

    A batch that the user gave for a device stays every device's.
    """
    if (
        equal is None
        or len({id(device) for device in equal.context.devices}) == 1
        or pins.micro_batch
        or pins.accumulate
    ):
        return
    firsts: dict[str, Candidate] = {equal.run.method.name: equal}
    for candidate in fitting:
        firsts.setdefault(candidate.run.method.name, candidate)
    for candidate in firsts.values():
        method = candidate.run.method
        in_nodes = getattr(method, "devices_per_node", 1) > 1  # whose devices hold the same heads
        if method.takes_classes and not (method.is_paced or in_nodes) and candidate.idle_share > MOST_IDLE:
            run = _unequal_run(candidate, pins, base)
            if run is not None:
                yield run


def _unequal_run(candidate: Candidate, pins: Pins, base: Run) -> Run | None:
    classes = [_class_of(candidate, list(members), base) for _, members in groupby(candidate.context.devices, key=id)]
    mixes = list(_mixes(classes))
    if pins.batch is not None:
        units = candidate.run.model.units_per_sample
        distances = {mix: abs(mix.samples * units - pins.batch) for mix in mixes}
        most = max(min(distances.values(), default=0), NEAR * pins.batch)
        mixes = [mix for mix in mixes if distances[mix] <= most]
    else:
        # Equal batches are tried up to this size; larger steps would be another comparison.
        most = candidate.run.cluster.devices * max(MICRO_BATCHES[-1], candidate.run.train.device_batch)
        mixes = [mix for mix in mixes if mix.samples <= most]
    # Among those with little idle time the fastest to equal loss; where none match so well, those that match best.
    best = min(mixes, key=lambda mix: (max(mix.idle_share, MOST_IDLE), _seconds(mix, candidate)), default=None)
    return None if best is None else _run_of(best, classes, candidate, base)


def _class_of(candidate: Candidate, members: Sequence[Device], base: Run) -> _Class:
    """Return the class of some equal devices, with the batches that they can hold."""
    device, run = members[0], candidate.run
    faster = faster_format_of(base, [device])
    formats = (run.train.autocast,) if faster in (None, run.train.autocast) else (run.train.autocast, faster)
    batches = [batch for autocast in formats for batch in _batches(candidate, device, autocast)]
    # Sorted, so that fewer passes and fewer changes come first among equals.
    batches.sort(key=lambda batch: (batch.step_s, -batch.samples, batch.accumulate))
    best: list[Batch] = []
    for batch in batches:
        if not best or batch.samples > best[-1].samples:
            best.append(batch)
    return _Class(len(members), tuple(best))


def _batches(candidate: Candidate, device: Device, autocast: Autocast) -> Iterator[Batch]:
    run, shape = candidate.run, candidate.context.shape
    heads = getattr(run.method, "heads_per_device", 1)

    def with_batch(micro_batch: int, accumulate: int) -> Run:
        keys = {"micro_batch": micro_batch, "accumulate": accumulate, "autocast": autocast}
        return run.model_copy(update={"train": run.train.model_copy(update=keys)})

    def fits(one: Run) -> bool:
        return peak_memory(one, shape, device).total <= device.usable_bytes

    for micro_batch in sorted(size for size in TRIED if size % heads == 0):
        one, two = with_batch(micro_batch, 1), with_batch(micro_batch, 2)
        if not fits(one):
            return
        # Each pass after the first takes the same time.
        (first_s,), (both_s,) = (device_step_s(each, shape, [device]) for each in (one, two))
        for accumulate in range(1, (MOST_PASSES if fits(two) else 1) + 1):
            seconds = first_s + (accumulate - 1) * (both_s - first_s)
            yield Batch(micro_batch * accumulate, micro_batch, accumulate, autocast, seconds)


def _mixes(classes: Sequence[_Class]) -> Iterator[_Mix]:
    """Yield the batches of all classes for each time that a step may take."""
    devices = sum(one.devices for one in classes)
    for step_s in sorted({batch.step_s for one in classes for batch in one.batches}):
        found = [one.within(step_s) for one in classes]
        batches = tuple(batch for batch in found if batch is not None)
        if len(batches) == len(classes):
            longest_s = max(batch.step_s for batch in batches)
            busy_s = sum(one.devices * batch.step_s for one, batch in zip(classes, batches, strict=True))
            samples = sum(one.devices * batch.samples for one, batch in zip(classes, batches, strict=True))
            yield _Mix(batches, samples, longest_s, 1 - busy_s / devices / longest_s)


def _seconds(mix: _Mix, candidate: Candidate) -> float:
    """Return what ranks mixes of one method: seconds of a sample, times the samples that so large a step needs."""
    time = candidate.time
    step_s = mix.step_s + (time.merge_s + time.exchange_s) / time.steps
    tokens = mix.samples * candidate.run.model.units_per_sample
    return step_s / mix.samples * batch_factor(tokens, candidate.tokens, candidate.efficiency)


def _run_of(mix: _Mix, classes: Sequence[_Class], candidate: Candidate, base: Run) -> Run | None:
    """Return the run with a class for each kind of devices; None where its rules refuse them."""
    run, own = candidate.run, min(mix.batches, key=lambda batch: batch.micro_batch)
    chosen = tuple(
        DeviceClass(
            devices=one.devices,
            micro_batch=batch.micro_batch,
            accumulate=batch.accumulate,
            autocast=None if batch.autocast == run.train.autocast else batch.autocast,
        )
        for one, batch in zip(classes, mix.batches, strict=True)
    )
    # Steps as of equal batches with as many samples: train_for counts in those.
    share = run.cluster.devices * own.samples / mix.samples
    proposed = {key: getattr(run.train, key) for key in ("optimizer", "learning_rate", "final_share")}
    start = base.model_copy(update={"method": run.method, "train": base.train.model_copy(update=proposed)})
    recompute = run.train.activation_checkpointing
    train = train_for(start, own.micro_batch, own.accumulate, recompute, max(1, round(share * candidate.tokens)))
    if train.num_warmup_steps >= train.steps:
        return None
    cluster = run.cluster.model_copy(update={"classes": chosen})
    unequal = run.model_copy(update={"train": train, "cluster": cluster})
    try:
        check_classes(unequal)
    except ValueError:
        return None
    return unequal
