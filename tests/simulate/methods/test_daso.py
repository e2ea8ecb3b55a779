"""DASO against its slow twin, and what a delayed average does by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simulate.config.run import Run
from simulate.methods.base import Method
from simulate.methods.daso.train import NOTHING, Daso
from simulate.methods.loss import Loss
from tests import tiny
from tests.reference.daso import DasoTwin
from tests.simulate.methods.parity import assert_trains_like, hand_run, of_linear, parity_run, set_copies

# 21 steps = 4·5 + 1: the last exchange but one is still on its way when the run ends.
RUNS: dict[str, Run] = {
    "delayed": parity_run("daso", devices=4, merge_every=5),
    "waiting": parity_run("daso, waiting", devices=4, merge_every=5),
    "three lone devices": parity_run("daso", devices=3, merge_every=5, devices_per_node=1),
    "one node": parity_run("daso", devices=2, merge_every=5),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_every_variant_trains_like_the_twin(name: str) -> None:
    assert_trains_like(DasoTwin, RUNS[name])


@torch.no_grad()
def mixed_by_half(method: Daso) -> None:
    for name, parameter in method.parameters.items():
        parameter.mul_(0.5).add_(method.arriving[name] / method.nodes.count, alpha=0.5)
    method.sent_after.fill_(NOTHING)


def never_mixed(method: Daso) -> None:
    method.sent_after.fill_(NOTHING)


GROUP_LOSSES = Loss.group_losses


def loss_over_all_devices(loss: Loss, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
    return GROUP_LOSSES(loss, inputs, targets, groups) / groups


@pytest.mark.parametrize(
    ("owner", "attribute", "broken"),
    [
        pytest.param(Daso, "_mix", mixed_by_half, id="mean of own and average, whatever the delay"),
        pytest.param(Daso, "_mix", never_mixed, id="nothing arrives"),
        pytest.param(Loss, "group_losses", loss_over_all_devices, id="loss over all devices"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: type, attribute: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(DasoTwin, RUNS["delayed"])


def idle(method: Method, step: int) -> None:
    """Take a step that moves nothing: one class has no loss."""
    method.step(torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), step)


def test_a_delayed_average_by_hand() -> None:
    method, weight = of_linear(hand_run("daso", devices=4))  # two nodes, S = 2
    set_copies(weight, 1.0, 3.0)
    method.merge(3)
    assert weight.flatten().tolist() == [1.0, 3.0]  # both train on
    set_copies(weight, 2.0, 6.0)
    idle(method, 4)
    assert weight.flatten().tolist() == [2.0, 6.0]  # still on its way
    idle(method, 5)
    # (2S·x + Σ_i x_i)/(2S + M): (4·2 + (1 + 3))/6 = 2 and (4·6 + (1 + 3))/6 = 28/6
    torch.testing.assert_close(weight.flatten(), torch.tensor([2.0, 28 / 6], dtype=torch.float64), rtol=1e-14, atol=0)


def test_an_average_that_is_waited_for_by_hand() -> None:
    method, weight = of_linear(hand_run("daso, waiting", devices=4))
    set_copies(weight, 1.0, 3.0)
    method.merge(3)
    assert weight.flatten().tolist() == [2.0, 2.0]


def test_what_is_on_its_way_at_the_runs_end_is_mixed_in_before_the_last_average() -> None:
    run = hand_run("daso", devices=4)
    method, weight = of_linear(run.model_copy(update={"train": run.train.model_copy(update={"steps": 5})}))
    set_copies(weight, 1.0, 3.0)
    method.merge(3)
    set_copies(weight, 2.0, 6.0)
    method.merge(4)
    # The mean of 2 and 28/6 from above.
    torch.testing.assert_close(weight.flatten(), torch.full((2,), 20 / 6, dtype=torch.float64), rtol=1e-14, atol=0)


def test_what_was_sent_is_the_model_while_it_travels() -> None:
    method, weight = of_linear(hand_run("daso", devices=4))
    set_copies(weight, 1.0, 3.0)
    method.merge(3)
    set_copies(weight, 2.0, 6.0)
    (merged,) = method.merged_state().values()
    assert merged.item() == 2.0  # the mean of 1 and 3, not of 2 and 6


def test_a_node_of_devices_holds_one_copy() -> None:
    method = tiny.build(tiny.variant_run("daso", devices=6))
    assert all(parameter.shape[0] == 3 for parameter in method.model.parameters())
