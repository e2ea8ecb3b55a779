"""Gradient accumulation: a step in parts is the step of the whole batch, for every method."""

from __future__ import annotations

import pytest
import torch

from simulate.methods.loss import Loss
from tests import tiny
from tests.selection import variants

STEPS = 10
WHOLE, PARTS = {"micro_batch": 6, "steps": STEPS}, {"micro_batch": 2, "accumulate": 3, "steps": STEPS}
TOLERANCE = 1e-12


def trained(name: str, **train: object) -> tuple[tiny.History, dict[str, int], int]:
    """Return a run's losses and weights, its counted bytes, and the samples of its events."""
    method = tiny.build(tiny.variant_run(name, train={"clip_norm": 0.5, **train}))
    history, counter = tiny.train(method), method.communicator.counter
    counted = {"sent": counter.sent_bytes, "received": counter.received_bytes, "messages": counter.messages}
    return history, counted, method.samples_done(STEPS - 1)


@pytest.mark.parametrize("name", variants("accumulate"))
def test_a_step_in_parts_is_the_step_of_the_whole_batch(name: str) -> None:
    (parts, *of_parts), (whole, *of_whole) = trained(name, **PARTS), trained(name, **WHOLE)
    tiny.assert_parity(parts, whole, TOLERANCE)
    assert of_parts == of_whole
