"""Optimizer state before the first step: there before a forward pass, and the same as the optimizers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simulate.methods.registry import build_method
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
