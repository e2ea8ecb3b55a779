"""The learning rate by hand, and optimizer state: there before a forward pass, and the same as the optimizers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simulate.config.tables import Train
from simulate.methods.registry import build_method
from simulate.methods.stepper import learning_rate_factor
from tests import tiny

TRAINS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "8-bit": {"dtype": "fp32", "optimizer_state": "8bit"},
}


@pytest.mark.parametrize("train", TRAINS.values(), ids=TRAINS)
def test_state_is_allocated_before_the_forward_pass(train: dict[str, Any]) -> None:
    """Else it would lie in the room that a step's logits leave, and the next step's would need room elsewhere."""
    if train.get("optimizer_state"):
        pytest.importorskip("bitsandbytes")
    run = tiny.lte_run(2, None, train)
    method = build_method(run, tiny.VirtualCommunicator(2), tiny.CPU)
    seen: list[set[int]] = []
    method.model.register_forward_pre_hook(lambda *_: seen.append({id(p) for p in method.stepper.state}))
    inputs, targets = tiny.batches(run).batch(0, range(2))
    method.step(inputs, targets, 0)
    assert seen == [{id(p) for p in method.parameters.values()}]


@pytest.mark.parametrize("train", TRAINS.values(), ids=TRAINS)
def test_allocated_state_steps_as_the_optimizers_own(train: dict[str, Any]) -> None:
    if train.get("optimizer_state"):
        pytest.importorskip("bitsandbytes")
    states = []
    for allocates in (True, False):
        run = tiny.lte_run(2, None, train)
        method = build_method(run, tiny.VirtualCommunicator(2), tiny.CPU)
        if not allocates:  # torch's AdamW, ours of 8 bits and Muon then make theirs in the step
            method.loss.before_forward = lambda: None
        for step in range(3):
            method.step(*tiny.batches(run).batch(step, range(2)), step)
        states.append(method.state.state_dict())
    ours, theirs = states
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


COSINE = [0.5, 1, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343]
"""Two steps of warm-up, then 0.1 + 0.45·(1 + cos(k·π/8)) for k from 0 to 7."""


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"warmup_steps": 2}, COSINE),
        ({"warmup_share": 0.2}, COSINE),
        ({"warmup_share": 0.29}, COSINE),  # rounded down to whole steps
        ({"warmup_share": 0.09, "schedule": "constant"}, [1] * 10),
        ({"warmup_steps": 2, "schedule": "constant"}, [0.5] + [1] * 9),
        ({"warmup_steps": 2, "schedule": "linear"}, [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
        ({"schedule": "linear", "final_share": 0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"warmup_steps": 2, "schedule": "wsd"}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.55]),
        ({"schedule": "wsd", "decay_share": 0.4, "final_share": 0.2}, [1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        # The decay begins after the warm-up, however long it is to be.
        ({"warmup_steps": 8, "schedule": "wsd", "decay_share": 1.0}, [x / 8 for x in range(1, 9)] + [1, 0.55]),
    ],
)
def test_the_learning_rate_by_hand(keys: dict[str, Any], expected: list[float]) -> None:
    train = Train(steps=10, **keys)
    assert [learning_rate_factor(train, step) for step in range(10)] == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_rate_ends_at_the_final_share(schedule: str) -> None:
    train = Train.model_validate({"steps": 4000, "warmup_share": 0.05, "schedule": schedule, "final_share": 0.02})
    assert learning_rate_factor(train, 199) == learning_rate_factor(train, 200) == 1
    assert learning_rate_factor(train, 4000) == 0.02 < learning_rate_factor(train, 3999) < 0.022


def test_a_restart_climbs_back_to_where_the_schedule_then_is() -> None:
    """Restarts are after steps 6 and 12 of 20, and wsd's decay begins at step 10: (k + 1)/3 of the rate at q + 2."""
    keys = {"merge_every": 6, "rewarm_steps": 2}
    run = tiny._run(2, None, {"schedule": "wsd", "decay_share": 0.5}, {"name": "relora", "rank": 2, **keys})
    method = build_method(run, tiny.VirtualCommunicator(2), tiny.CPU)
    rates = [method.rate_factor(step) for step in (5, 6, 7, 8, 11, 12, 13, 14)]
    assert rates == pytest.approx([1, 1 / 3, 2 / 3, 1, 0.91, 0.64 / 3, 1.28 / 3, 0.64])
