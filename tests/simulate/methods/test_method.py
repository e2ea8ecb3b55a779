"""The parts that all methods share: schedule, clipping and losses."""

from __future__ import annotations

import math

import pytest
import torch

from simulate.config.method_table import method_part
from simulate.config.tables import Train
from simulate.methods.overlapped import Delayed
from simulate.methods.paced import Paced
from simulate.methods.stepper import clip_per_device, learning_rate_factor
from tests import tiny


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        pytest.param(0, 0.25, id="warm-up starts above zero"),
        pytest.param(2, 0.75, id="warm-up is linear"),
        pytest.param(3, 1.0, id="warm-up ends at the peak"),
        pytest.param(4, 1.0, id="the cosine starts at the peak"),
        pytest.param(8, 0.55, id="half way: the mean of peak and tenth"),
        pytest.param(12, 0.1, id="ends at a tenth"),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_a_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(Train(steps=12, warmup_steps=4), step) == pytest.approx(factor, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert learning_rate_factor(Train(steps=10), 0) == 1.0


def test_clipping_scales_only_the_device_that_exceeds_the_norm() -> None:
    # Device 0: norm of (3, 4) is 5, clipped to 1. Device 1: norm of (0.3, 0.4) is 0.5, left alone.
    first, second = torch.tensor([[3.0], [0.3]]).double(), torch.tensor([[4.0], [0.4]]).double()
    clip_per_device([first, second], devices=2, clip_norm=1.0)
    torch.testing.assert_close(first, torch.tensor([[0.6], [0.3]]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(second, torch.tensor([[0.8], [0.4]]).double(), rtol=1e-6, atol=0)


def test_clipping_joins_the_heads_of_a_device() -> None:
    heads = torch.tensor([[3.0], [4.0], [0.3], [0.4]]).double()  # heads 0 and 1 are device 0's
    clip_per_device([heads], devices=2, clip_norm=1.0)
    torch.testing.assert_close(heads.flatten(), torch.tensor([0.6, 0.8, 0.3, 0.4]).double(), rtol=1e-6, atol=0)


def test_clipping_leaves_zero_gradients_at_zero() -> None:
    zeros = torch.zeros(2, 3)
    clip_per_device([zeros], devices=2, clip_norm=1.0)
    assert torch.equal(zeros, torch.zeros(2, 3))


def test_each_groups_loss_is_its_own_mean() -> None:
    run = tiny.lte_run(devices=4)
    method, data = tiny.build(run), tiny.batches(run)
    inputs, targets = data.batch(0, range(4))
    joint = method.loss.group_losses(inputs, targets, 4)
    halves = method.loss.group_losses(inputs, targets, 8)
    torch.testing.assert_close(halves.view(4, 2).mean(1), joint, rtol=1e-12, atol=0)
    assert len(set(joint.tolist())) == 4


@pytest.mark.parametrize(
    ("variant", "delayed", "paced"),
    [("diloco", False, False), ("diloco, late", True, False), ("lte", False, False), ("lte, paced", False, True)],
)
def test_pace_and_late_merges_stand_in_front_only_of_runs_that_ask_for_them(
    variant: str, delayed: bool, paced: bool
) -> None:
    method = tiny.build(tiny.variant_run(variant))
    assert (isinstance(method, Delayed), isinstance(method, Paced)) == (delayed, paced)
    assert isinstance(method, method_part(method.run.method.name, "train"))
    # What a checkpoint holds of them follows.
    assert ("sent_after" in method.extra_state(), "pace.counts" in method.extra_state()) == (delayed, paced)


def test_a_fresh_model_guesses_evenly() -> None:
    run = tiny.lte_run(devices=1)
    loss = tiny.build(run).step(*tiny.batches(run).batch(0, range(1)), 0)
    assert loss.item() == pytest.approx(math.log(run.model.vocab), rel=0.02)


def test_adapters_learn_at_the_dense_rate_over_the_scale() -> None:
    method = tiny.build(tiny.lte_run(train={"learning_rate": 0.01}, alpha=8.0))  # s = 8/2
    assert sorted({group["lr"] for group in method.stepper.adam.param_groups}) == [0.0025, 0.01]


def test_a_given_adapter_learning_rate_is_taken_as_it_is() -> None:
    method = tiny.build(tiny.lte_run(train={"learning_rate": 0.01}, adapter_learning_rate=0.5))
    assert sorted({group["lr"] for group in method.stepper.adam.param_groups}) == [0.01, 0.5]


@pytest.mark.parametrize("run", [tiny.lte_run(train={"weight_decay": 0.3}), tiny.ddp_run(train={"weight_decay": 0.3})])
def test_only_matrices_decay(run: tiny.Run) -> None:
    method = tiny.build(run)
    decay = {id(p): group["weight_decay"] for group in method.stepper.adam.param_groups for p in group["params"]}
    for name, parameter in method.model.named_parameters():
        is_vector = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.3), name
