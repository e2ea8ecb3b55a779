"""ReLoRA against its slow twin, with and without dense steps before, and its restarts in numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from simulate.config.run import Run
from simulate.layers.lora import lora_layers
from simulate.methods.relora import train as relora
from simulate.methods.relora.train import Relora
from simulate.methods.stepper import learning_rate_factor
from simulate.optim.moments import prune_moments
from tests import tiny
from tests.reference.relora import ReloraTwin
from tests.simulate.methods.adapter_parity import assert_trains_like, parity_run

# Of 19 steps, restarts after 5, 10, 15; with dense steps adapters begin after 4 and restart after 9 and 14.
COLD: dict[str, Any] = {"merge_every": 5, "rewarm_steps": 3, "prune_share": 0.9}
WARM: dict[str, Any] = {"merge_every": 5, "rewarm_steps": 2, "prune_share": 0.9, "warm_start_steps": 4}


@pytest.mark.parametrize("method", [COLD, WARM], ids=["from the start", "after dense steps"])
def test_relora_trains_like_the_twin(method: dict[str, Any]) -> None:
    assert_trains_like(ReloraTwin, parity_run("relora", **method))


def unpruned(state: object, parameters: object, share: float) -> None:
    """Keep all moments."""


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(relora, "prune_moments", unpruned, id="moments are kept"),
        pytest.param(
            Relora, "rate_factor", lambda method, step: learning_rate_factor(method.run.train, step), id="no rewarming"
        ),
        pytest.param(Relora, "_restart", lambda method, layer, steps_done: None, id="no restarts"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, broken: object
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(ReloraTwin, parity_run("relora", **COLD))


def relora_run(**method: Any) -> Run:
    """Return a run of 12 steps without warm-up: c(t) = 0.55 + 0.45·cos(πt/12)."""
    run = tiny.variant_run("relora", 1, train={"steps": 12, "warmup_steps": 0})
    return run.model_copy(update={"method": run.method.model_copy(update=method)})


@pytest.mark.parametrize(
    ("warm_start_steps", "step", "factor"),
    [
        pytest.param(0, 0, 1.0, id="the first adapters have the schedule's rate"),
        pytest.param(0, 4, 0.775, id="cos 60° = 1/2"),
        pytest.param(0, 6, 0.325 / 3, id="a restart: a third of c(8) = 0.55 - 0.45/2"),
        pytest.param(0, 7, 2 * 0.325 / 3, id="then two thirds"),
        pytest.param(0, 8, 0.325, id="then the schedule's again"),
        pytest.param(4, 0, 1.0, id="dense steps have the schedule's rate"),
        pytest.param(4, 4, 0.55 / 3, id="adapters begin: a third of c(6)"),
        pytest.param(4, 5, 2 * 0.55 / 3, id="two thirds of c(6)"),
        pytest.param(4, 6, 0.55, id="c(6), the cosine's middle"),
        pytest.param(4, 10, 0.1 / 3, id="the restart after six steps: a third of c(12)"),
    ],
)
def test_the_rate_climbs_back_after_new_adapters(warm_start_steps: int, step: int, factor: float) -> None:
    method = tiny.build(relora_run(merge_every=6, rewarm_steps=2, warm_start_steps=warm_start_steps))
    assert method.rate_factor(step) == pytest.approx(factor, rel=1e-12)


def test_pruning_zeroes_the_smallest_of_each_moment() -> None:
    parameter = nn.Parameter(torch.zeros(2, 5))  # two copies, pruned each by itself
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {
        "exp_avg": torch.tensor([[0.5, -0.1, 0.3, -0.4, 0.2], [-10.0, 40.0, 20.0, 30.0, 50.0]]),
        "exp_avg_sq": torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]]),
    }
    prune_moments(optimizer.state, [parameter], share=0.4)  # two of five
    state = optimizer.state[parameter]
    # Of the first copy 0.5, and of the second 30 and 50, lost their second moments.
    expected = torch.tensor([[0, 0, 0.3, -0.4, 0], [0, 40, 0, 0, 0]])
    assert torch.equal(state["exp_avg"], expected)
    assert torch.equal(state["exp_avg_sq"], torch.tensor([[0.0, 0, 3, 4, 5], [5, 4, 3, 0, 0]]))


@pytest.mark.parametrize(("share", "left"), [(0.0, 5), (0.19, 5), (0.2, 4), (0.9, 1), (1.0, 0)])
def test_shares_of_five_numbers_are_rounded_down(share: float, left: int) -> None:
    parameter = nn.Parameter(torch.zeros(1, 5))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {key: torch.arange(1.0, 6.0).view(1, 5) for key in ("exp_avg", "exp_avg_sq")}
    prune_moments(optimizer.state, [parameter], share)
    assert int(optimizer.state[parameter]["exp_avg"].count_nonzero()) == left


def test_a_restart_moves_the_product_into_the_weights_and_draws_anew() -> None:
    method = tiny.build(relora_run(merge_every=3))
    tiny.train(method, 0, 2)
    inputs, targets = tiny.batches(method.run).batch(2, range(1))
    method.step(inputs, targets, 2)
    before, drawn = method.merged_state(), [layer.a.detach().clone() for layer in lora_layers(method.model)]
    method.merge(2)
    for layer, old_a in zip(lora_layers(method.model), drawn, strict=True):
        assert torch.equal(layer.weight, before[f"{layer.name}.weight"])
        assert not layer.b.any() and not torch.equal(layer.a, old_a)
    assert all(torch.equal(weight, before[name]) for name, weight in method.merged_state().items())


def test_nothing_restarts_after_the_last_step() -> None:
    method = tiny.build(relora_run(merge_every=6))
    tiny.train(method)
    assert all(layer.b.any() for layer in lora_layers(method.model))


def test_the_first_adapters_begin_with_a_new_optimizer() -> None:
    method = tiny.build(relora_run(warm_start_steps=4))
    tiny.train(method, 0, 3)
    assert not lora_layers(method.model)
    before = tiny.train(method, 3, 1)
    assert lora_layers(method.model) and not method.stepper.state
    assert all(torch.equal(weight, before.weights[name]) for name, weight in method.merged_state().items())
