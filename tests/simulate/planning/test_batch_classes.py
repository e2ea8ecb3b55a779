"""Batches for each kind of device: unlike devices end a round together, within memory, and equal ones stay equal."""

from __future__ import annotations

from typing import Any

import pytest

from simulate.config.hardware import Profile
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run, dump_run
from simulate.costs.memory import peak_memory
from simulate.costs.step_time import device_step_s, idle_share, round_time
from simulate.planning.batch_classes import MOST_IDLE, Batch, _Class, _mixes
from simulate.planning.candidate import Candidate
from simulate.planning.planner import Plan, make_plan
from simulate.planning.search_space import MICRO_BATCHES, Pins
from simulate.timeline.engine import simulate

MIXED = load_profile("mixed_gtx1080ti_rtx2060_rtx3090")
TOKENS = 10**9


def plan_of(profile: Profile = MIXED, pins: Pins | None = None, **tables: Any) -> Plan:
    cluster = {"devices": profile.count, "profile": profile.name}
    base = build_run({"model": {"name": "gpt2"}, "cluster": cluster, **tables})
    return make_plan(base, profile, TOKENS, pins or Pins(method="lte", keys=frozenset({"merge_every"})))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


def chosen(plan: Plan) -> Candidate:
    assert plan.chosen is not None
    return plan.chosen


def test_unlike_devices_end_a_round_together(plan: Plan) -> None:
    assert plan.equal is not None and plan.equal.idle_share > 0.4
    assert chosen(plan).idle_share <= MOST_IDLE
    assert chosen(plan).equivalent_wall_s < plan.equal.equivalent_wall_s
    data = plan.to_dict()
    assert data["chosen"]["idle_share"] == chosen(plan).idle_share < data["equal"]["idle_share"]
    assert len(data["chosen"]["classes"]) == 3 and "classes" not in data["equal"]


def test_idle_share_is_what_the_mean_device_lacks_of_the_slowest(plan: Plan) -> None:
    run, context = chosen(plan).run, chosen(plan).context
    steps_s = device_step_s(run, context.shape, context.devices)
    # A merge adds the same to all but for their memories' rates, which is little beside 30 steps.
    assert idle_share(run, context.shape, context.devices) == pytest.approx(
        1 - sum(steps_s) / 3 / max(steps_s), abs=0.01
    )
    assert [one.step_s for one in chosen(plan).classes] == list(steps_s)


def test_every_class_fits_its_device(plan: Plan) -> None:
    run, context = chosen(plan).run, chosen(plan).context
    for one, device, figures in zip(run.classes, context.devices, chosen(plan).classes, strict=True):
        assert peak_memory(one, context.shape, device).total == figures.memory_bytes <= device.usable_bytes


def test_a_class_has_the_format_that_its_devices_are_fast_in(plan: Plan) -> None:
    # The GTX 1080 Ti multiplies fp16 no faster, the RTX 2060 has no bf16, the RTX 3090 both.
    assert [one.autocast for one in chosen(plan).classes] == ["none", "fp16", "bf16"]
    given = plan_of(train={"autocast": "none"})
    assert {one.autocast for one in chosen(given).classes} == {"none"} and chosen(given).idle_share <= MOST_IDLE


def test_the_step_is_no_larger_than_the_largest_equal_one(plan: Plan) -> None:
    assert chosen(plan).run.samples_per_step <= 3 * MICRO_BATCHES[-1]
    run = chosen(plan).run
    assert run.train.steps == -(-TOKENS // run.tokens_per_step)


def test_the_closed_form_is_the_timelines(plan: Plan) -> None:
    run, devices = chosen(plan).run, chosen(plan).context.devices
    timeline = simulate(run, devices, MIXED.link, rounds=4)
    time = round_time(run, run.shape(), devices, MIXED.link)
    # The last round's exchange and merge are the run's own; one device only is late, so that nobody waits otherwise.
    assert timeline.wall_s == pytest.approx(4 * time.round_s, rel=0.01)


def test_the_written_run_is_read_again_with_its_classes(plan: Plan) -> None:
    from simulate.common import toml_io

    run = chosen(plan).run
    text = dump_run(run, MIXED)
    assert text.count("[[cluster.class]]") == 3
    again: Run = build_run(toml_io.parse(text, "run.toml"))
    assert again.cluster.classes == run.cluster.classes and again.samples_per_step == run.samples_per_step


def test_a_given_batch_is_every_devices() -> None:
    pinned = plan_of(pins=Pins(method="lte", micro_batch=4), train={"micro_batch": 4})
    assert not chosen(pinned).run.cluster.classes and pinned.chosen is pinned.equal
    note = next(note for note in pinned.notes if "idle" in note)
    assert "without a given batch each kind may have its own" in note


def test_a_given_step_is_kept() -> None:
    tokens = 64 * 1024
    asked = plan_of(pins=Pins(method="lte", batch=tokens))
    assert chosen(asked).run.tokens_per_step == pytest.approx(tokens, rel=0.05)


def test_equal_devices_have_one_batch() -> None:
    profile = load_profile("gtx1080ti_x8")
    equal = plan_of(profile)
    assert not chosen(equal).run.cluster.classes and chosen(equal).idle_share == 0.0
    assert not any("idle" in note for note in equal.notes)


def test_a_class_takes_as_much_as_it_can_within_the_time(plan: Plan) -> None:
    # A device that takes 1 s a sample, and one that takes 0.4 s: 2 s are 2 and 5 samples, 1 s 1 and 2.
    slow = _Class(1, tuple(Batch(n, n, 1, "none", float(n)) for n in (1, 2)))
    fast = _Class(3, tuple(Batch(n, n, 1, "none", 0.4 * n) for n in range(1, 6)))
    mixes = {mix.step_s: mix for mix in _mixes([slow, fast])}
    assert [batch.samples for batch in mixes[2.0].batches] == [2, 5] and mixes[2.0].samples == 2 + 3 * 5
    assert mixes[1.0].samples == 1 + 3 * 2 and mixes[1.0].idle_share == pytest.approx(1 - (1.0 + 3 * 0.8) / 4)
