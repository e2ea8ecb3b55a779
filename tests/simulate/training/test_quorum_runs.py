"""Whole simulated runs with a quorum: what they record replays them, resumes them, and the timeline sees the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.events import Event
from simulate.config.hardware import Device, Link
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.message_schedule import sent_bytes
from simulate.methods.registry import build_method
from simulate.timeline.engine import simulate
from simulate.training.loop import Session, restore, train
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny

PI = load_profile("raspberry_x8").device[0]
LINK = Link(topology="mesh", up_bytes_per_s=2e3, down_bytes_per_s=2e3, latency_s=1e-3, source="guess")
"""Rounds take long, so that devices leave in some of them."""


def device(slower: float = 1.0, **figures: float | None) -> Device:
    rates = {key: value and value / slower for key, value in PI.flop_per_s.model_dump().items()}
    slowed = {"flop_per_s": type(PI.flop_per_s)(**rates), "memory_bytes_per_s": PI.memory_bytes_per_s / slower}
    return PI.model_copy(update={**slowed, **figures})


CHURN = {"disk_write_bytes_per_s": None, "leave_per_hour": 1 - 1e-10, "join_s": 40.0, "step_jitter": 0.4}
DEVICES = tuple(device(slower, **CHURN) for slower in (1e4, 1e4, 2e4, 4e5))


def run_of(name: str, **cluster: Any) -> Run:
    table = tiny.variant_run(name, 4, train={"steps": 58, "evaluate_every": 16, "micro_batch": 2}).model_dump(
        exclude_none=True
    )
    table["method"] |= {"pace": "lockstep"}
    table["method"].pop("steps_taken", None)
    table["cluster"] |= cluster
    return build_run(table)


def session(run: Run, folder: Path, stop_at: int | None = None) -> tuple[Session, list[Event]]:
    events: list[Event] = []
    clock = SimulatedClock(run, DEVICES, LINK)
    communicator = VirtualCommunicator(4, clock.charge_transfer, clock.wait)
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    made = Session(run, method, data, communicator, clock, events.append, folder, tiny.CPU, is_simulation=True)
    made.stop = lambda: made.step == stop_at
    return made, events


def of(events: list[Event], kind: str, *keys: str) -> list[Any]:
    return [[event[key] for key in keys] for event in events if event["kind"] == kind]


QUORUM = {"quorum": 2, "deadline_s": 2.0}


@cache
def whole(name: str) -> tuple[list[Event], int]:
    """Return the events of a whole run with a quorum, and the bytes that it sent."""
    with TemporaryDirectory() as folder:
        first, events = session(run_of(name, **QUORUM), Path(folder))
        train(first)
    return events, first.communicator.counter.sent_bytes


@pytest.mark.parametrize("name", ["lte, paced", "diloco", "local-sgd"])
def test_a_run_is_replayed_from_what_its_merges_say(name: str, tmp_path: Path) -> None:
    events, bytes_sent = whole(name)
    merges = [event for event in events if event["kind"] == "merge"]
    ages = [age for event in merges for age in event["ages"]]
    brought = [event["brought"] for event in merges]
    assert max(ages) > 0 and any(-1 in row for row in brought), brought
    assert all(sum(event["weights"]) == pytest.approx(1) for event in merges)
    assert not of(events, "round", "step")

    replay = run_of(name, merges_given=brought)
    second, replayed = session(replay, tmp_path / "c")
    train(second)
    assert of(replayed, "evaluate", "val_loss") == of(events, "evaluate", "val_loss")
    assert of(replayed, "merge", "ages", "weights", "brought") == of(events, "merge", "ages", "weights", "brought")
    assert second.communicator.counter.sent_bytes == bytes_sent
    assert sent_bytes(replay, replay.shape(), 58) == bytes_sent


@pytest.mark.parametrize("stop_at", [8, 22])
def test_a_resumed_run_is_an_unbroken_one(stop_at: int, tmp_path: Path) -> None:
    run, (expected, _) = run_of("lte, paced", **QUORUM), whole("lte, paced")
    first, before = session(run, tmp_path / "b", stop_at)
    assert not train(first)
    second, after = session(run, tmp_path / "b")
    restore(second, tmp_path / "b" / f"step-{stop_at:08d}")
    assert train(second)
    for kind, keys in (("step", ("train_loss", "simulated_s", "samples")), ("merge", ("brought", "weights"))):
        assert of(before + after, kind, *keys) == of(expected, kind, *keys)


@pytest.mark.parametrize("name", ["diloco", "local-sgd", "lte, paced"])
def test_the_timeline_sees_the_run_that_was_trained(name: str, tmp_path: Path) -> None:
    run = run_of(name, **QUORUM)
    # The timeline has neither evaluations nor checkpoints, which devices that are away spend coming back.
    run = run.model_copy(update={"train": run.train.model_copy(update={"evaluate_every": 1000})})
    trained, events = session(run, tmp_path)
    train(trained)
    merges = of(events, "merge", "brought", "ages")
    timeline = simulate(run, DEVICES, LINK)
    assert timeline.rounds == len(merges)
    assert timeline.device_steps == sum(max(0, c) for brought, _ in merges for c in brought)
    rows = [pair for brought, ages in merges for pair in zip(brought, ages, strict=True)]
    assert timeline.late == sum(steps > 0 and age > 0 for steps, age in rows)
    # The clock charges the slowest device's arithmetic of merges, be it there or not.
    assert timeline.wall_s == pytest.approx(trained.clock.compute_s + trained.clock.exchange_s, rel=0.05)


def test_unequal_devices_with_int8_are_replayed_counted_and_seen_by_the_timeline(tmp_path: Path) -> None:
    classes = [{"devices": 2, "micro_batch": 4}, {"devices": 1, "accumulate": 2}, {"devices": 1}]
    run = run_of("local-sgd, paced int8", **QUORUM, **{"class": classes})
    run = run.model_copy(update={"train": run.train.model_copy(update={"evaluate_every": 1000})})
    trained, events = session(run, tmp_path / "a")
    train(trained)
    merges = of(events, "merge", "brought", "ages", "weights")
    brought = [row for row, _, _ in merges]
    assert max(age for _, ages, _ in merges for age in ages) > 0 and any(-1 in row for row in brought)
    timeline = simulate(run, DEVICES, LINK)
    # The clock's merges take the slowest device's arithmetic, which may move a late step by a round.
    assert timeline.device_steps == pytest.approx(sum(max(0, c) for row in brought for c in row), rel=0.05)
    assert timeline.wall_s == pytest.approx(trained.clock.compute_s + trained.clock.exchange_s, rel=0.05)
    replay = run_of("local-sgd, paced int8", merges_given=brought, **{"class": classes})
    second, replayed = session(replay, tmp_path / "b")
    train(second)
    assert of(replayed, "merge", "brought", "ages", "weights") == merges
    assert of(replayed, "evaluate", "val_loss")[-1] == of(events, "evaluate", "val_loss")[-1]
    assert second.communicator.counter.sent_bytes == trained.communicator.counter.sent_bytes
    assert sent_bytes(replay, replay.shape(), 58) == trained.communicator.counter.sent_bytes
