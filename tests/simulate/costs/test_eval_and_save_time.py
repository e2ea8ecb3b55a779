"""Evaluations and checkpoints: worked out by hand, and beside what every method really saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.config.hardware import Device, Points
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.eval_and_save_time import PARTS, EvalAndSaveTime, eval_and_save_time, evaluation_s
from simulate.costs.flops import forward_flops, pass_flops
from simulate.costs.memory import checkpoint_bytes
from simulate.costs.message_schedule import num_rounds
from simulate.costs.step_time import round_time
from simulate.rules.cadence import Cadence
from tests import tiny
from tests.selection import variants

LEVEL: Points = [[1.0, 1e9]]


def device(**figures: object) -> Device:
    """Return a device of round figures: a billion operations, and as many bytes, a second."""
    own = load_profile("gtx1080ti_x8").device[0]
    rates = own.flop_per_s.model_copy(update={"fp32": 1e9, "fp64": 1e9})
    round_figures = {"flop_per_s": rates, "efficiency": 1.0, "memory_bytes_per_s": 1e9, "disk_flush_s": 0.5}
    return own.model_copy(update={**round_figures, "disk_write_bytes_per_s": 1e6, **figures})


def run_of(name: str = "lte", **train: object) -> Run:
    return tiny.variant_run(name, train={"evaluate_samples": 30, "micro_batch": 4, **train})


@pytest.mark.parametrize("name", variants("checkpoint bytes", sorted(tiny.VARIANTS)))
def test_planned_bytes_of_a_checkpoint_are_those_that_are_saved(name: str) -> None:
    run = tiny.variant_run(name)
    method, batches = tiny.build(run), tiny.batches(run)
    for step in range(4 if "warm start" in name else 8):
        method.step(*batches.batch(step, range(4)), step)
        if method.merge_due(step):
            method.close_round(step)
            method.merge(step)
    state = method.state.sharded()
    fullest = max(sum(t.nbytes for t in own.values()) for own in state.of_devices.values())
    saved = sum(t.nbytes for t in state.shared.values()) + fullest
    assert checkpoint_bytes(run, run.model.shape(), 1) == pytest.approx(saved, rel=0.03)


def test_devices_take_turns_with_the_batches_of_an_evaluation() -> None:
    run = run_of()  # 30 samples in batches of 4 are 8 batches, two for each of 4 devices
    shape = run.model.shape()
    assert evaluation_s(run, shape, device()) == pytest.approx(2 * forward_flops(shape, 4) / 1e9)
    alone = run.model_copy(update={"cluster": run.cluster.model_copy(update={"devices": 1})})
    assert evaluation_s(alone, shape, device()) == pytest.approx(8 * forward_flops(shape, 4) / 1e9)


def test_a_forward_pass_is_a_third_of_a_dense_step() -> None:
    run = run_of("ddp")
    assert forward_flops(run.model.shape(), 4) == pytest.approx(pass_flops(run, run.model.shape()) / 3)


def test_measured_rates_take_the_place_of_efficiency() -> None:
    kernels = {"products": LEVEL, "attention": LEVEL, "elementwise": [[1.0, 1e15]], "optimizer": LEVEL}
    own = device().model_dump(exclude={"sources"}) | {"kernels": {**kernels, "step_s": 0, "layer_s": 0, "adapter_s": 0}}
    run = run_of()
    measured = evaluation_s(run, run.model.shape(), Device.model_validate(own))
    assert measured == pytest.approx(evaluation_s(run, run.model.shape(), device()), rel=1e-6)


def test_packed_weights_are_unpacked_for_every_batch() -> None:
    plain, packed = run_of("lora"), run_of("lora, nf4")
    shape = plain.model.shape()
    more_s = evaluation_s(packed, shape, device()) - evaluation_s(plain, shape, device())
    elements = shape.adapted_parameters
    assert 2 * (2 * 8 * elements) / 1e9 < more_s < 2 * (3 * 8 * elements) / 1e9


def test_a_checkpoint_takes_its_bytes_and_its_flushes() -> None:
    run = run_of()
    eval_and_save = eval_and_save_time(run, run.model.shape(), [device()], 1.0)
    assert eval_and_save.save_s == pytest.approx(PARTS * 0.5 + eval_and_save.save_bytes / 1e6)


def saving_of(run: Run, step_s: float, **figures: object) -> EvalAndSaveTime:
    """Return the time with checkpoints of 1 s for the operating system and 9 s for the disk: 1 Mbit/s, no flush."""
    saving = eval_and_save_time(run, run.model.shape(), [device(disk_flush_s=0.0, **figures)], step_s)
    return replace(saving, save_s=10.0, copy_s=1.0)


def test_what_training_waits_for_checkpoints_worked_out_by_hand() -> None:
    """Recovery points after 4, 8, ..., 20 of 22 steps, and one at the end, two steps later."""
    run = run_of(steps=22, checkpoint_every=500)
    run = run.model_copy(update={"cluster": run.cluster.model_copy(update={"recover_every": 1})})
    assert Cadence.of(run).apart == 4 and Cadence.of(run).num_saves == 6
    # Steps of 3 s: 12 s hide the 9 s, but the last two steps only 6 of them. The end waits for all of the last one.
    slow = saving_of(run, step_s=3.0)
    assert slow.saving_s == pytest.approx(6 * 1.0 + (9.0 - 6.0) + 9.0)
    assert [slow.save_pause_s(step) for step in (4, 8, 20, 22)] == [1.0, 1.0, 1.0, 1.0 + 3.0 + 9.0]
    # Steps of 2 s: each of four checkpoints after the first waits for a second of the one before.
    fast = saving_of(run, step_s=2.0)
    assert fast.saving_s == pytest.approx(6 * 1.0 + 4 * (9.0 - 8.0) + (9.0 - 4.0) + 9.0)
    assert fast.total_s == fast.evaluations * fast.evaluation_s + fast.saving_s
    # Without a step beside it a checkpoint takes what it takes.
    assert saving_of(run, step_s=0.0).saving_s == pytest.approx(6 * 10.0)


@given(st.integers(1, 120), st.integers(1, 50), st.integers(1, 4), st.floats(0.0, 20.0))
def test_what_a_plan_counts_is_what_the_clock_charges(steps: int, every: int, recover: int, step_s: float) -> None:
    run = run_of(steps=steps, checkpoint_every=every)
    run = run.model_copy(update={"cluster": run.cluster.model_copy(update={"recover_every": recover})})
    saving = saving_of(run, step_s)
    charged = [saving.save_pause_s(step) for step in range(1, steps + 1) if saving.cadence.saves(step)]
    assert saving.saving_s == pytest.approx(sum(charged), rel=1e-12)
    assert saving.saving_s <= saving.saves * 10.0 * (1 + 1e-12), "never more than without training beside it"


def test_the_operating_system_takes_a_tenth_of_the_memory_at_once() -> None:
    run = run_of()
    num_bytes = checkpoint_bytes(run, run.model.shape(), 1)
    for own, host, hidden in ((11, 0, True), (9, 0, False), (9, 11, True), (11, 9, False)):
        kind = device(memory_bytes=own * num_bytes, reserved_bytes=0, host_memory_bytes=host * num_bytes)
        planned = eval_and_save_time(run, run.model.shape(), [kind], 1.0)
        assert planned.copy_s == pytest.approx(num_bytes / 2.6e9 if hidden else planned.save_s)


def test_an_unknown_disk_takes_no_time() -> None:
    run = run_of()
    eval_and_save = eval_and_save_time(run, run.model.shape(), [device(), device(disk_write_bytes_per_s=None)], 1.0)
    assert eval_and_save.save_s is None
    assert eval_and_save.total_s == eval_and_save.evaluations * eval_and_save.evaluation_s


def test_recovery_points_are_as_rare_as_they_have_to_be() -> None:
    run, link = run_of(), load_profile("gtx1080ti_x8").link
    shape = run.model.shape()
    for disk in (1e3, 1e5, 1e7, 1e12):
        kind = device(disk_write_bytes_per_s=disk, disk_flush_s=0.0)
        time = round_time(run, shape, [kind] * 4, link)
        eval_and_save = eval_and_save_time(run, shape, [kind], time.compute_s)
        every = eval_and_save.affordable_recovery(time.round_s / time.steps)
        assert eval_and_save.save_s is not None
        assert eval_and_save.save_s / (every * time.round_s) <= 0.05 or every == num_rounds(run)
        assert every == 1 or eval_and_save.save_s / ((every - 1) * time.round_s) > 0.05
