"""Gradient accumulation: a step in parts is the step of the whole batch, for every method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.config.run import build_run
from simulate.data.batches import build_batches
from simulate.methods import loss as losses
from tests import tiny
from tests.selection import variants
from tests.simulate.data.pictures import images

STEPS = 8
WHOLE: tiny.Table = {"micro_batch": 6, "accumulate": 1, "steps": STEPS, "clip_norm": 0.5}
PARTS: tiny.Table = {**WHOLE, "micro_batch": 2, "accumulate": 3}


SIGNED = ("signsgd", "from outside")
"""Methods that step by signs. The gradient of the keys' bias is zero but for rounding, so its signs go by the order of
sums, and move losses in the seventh digit."""


def trained(name: str, **train: Any) -> tuple[tiny.History, dict[str, int], int]:
    """Return a run's losses and weights, its counted bytes, and the samples of its events."""
    model = {"layers": tiny.VARIANTS[name].get("fragments", 1)}
    method = tiny.build(tiny.variant_run(name, model=model, train=train))
    history, counter = tiny.train(method), method.communicator.counter
    counted = {"sent": counter.sent_bytes, "received": counter.received_bytes, "messages": counter.messages}
    return history, counted, method.samples_done(STEPS - 1)


@pytest.mark.parametrize("name", variants("accumulate"))
def test_a_step_in_parts_is_the_step_of_the_whole_batch(name: str) -> None:
    (parts, *of_parts), (whole, *of_whole) = trained(name, **PARTS), trained(name, **WHOLE)
    if name in SIGNED:
        assert ((parts.losses - whole.losses).abs() / whole.losses).max() <= 1e-5
    else:
        tiny.assert_parity(parts, whole, 1e-12)
    assert of_parts == of_whole


def in_order(inputs: Tensor, targets: Tensor, groups: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the batch as it lies, so that the rows of one head or device reach another."""
    yield from zip(inputs.chunk(parts), targets.chunk(parts), strict=True)


@pytest.mark.parametrize("name", ["lte, in parts", "local-sgd"])
def test_parity_detects_rows_that_reach_another_head_or_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = trained(name, **WHOLE)
    monkeypatch.setattr(losses, "_parts", in_order)
    with pytest.raises(AssertionError):
        tiny.assert_parity(trained(name, **PARTS)[0], whole, 1e-12)


def test_each_part_has_an_equal_part_of_every_groups_rows() -> None:
    rows = torch.arange(12)
    parts = [inputs.tolist() for inputs, _ in losses._parts(rows, rows, groups=2, parts=3)]
    assert parts == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_one_part_of_the_batch_is_in_the_network_at_a_time() -> None:
    method, rows = tiny.build(tiny.variant_run("ddp", train=PARTS)), []
    method.model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    method.step(*tiny.batches(method.run).batch(0, range(4)), 0)
    assert rows == [8, 8, 8]  # two samples of each of four devices


def test_the_loss_scale_is_taken_out_of_the_sum_of_all_parts_once() -> None:
    """Adam's steps would hide it: they do not depend on the gradients' size."""
    found = []
    for train in (WHOLE, {**PARTS, "autocast": "fp16"}):
        method = tiny.build(tiny.variant_run("local-sgd", train={**train, "dtype": "fp32"}))
        method.loss.backpropagate(*tiny.batches(method.run).batch(0, range(4)), 4)
        found.append([p.grad.norm().item() for p in method.model.parameters() if p.grad is not None])
    assert found[1] == pytest.approx(found[0], rel=0.02, abs=1e-3 * max(found[0]))


def test_moments_in_8_bits_see_the_whole_gradient() -> None:
    pytest.importorskip("bitsandbytes")
    keys = {"optimizer_state": "8bit", "dtype": "fp32"}
    parts, whole = (trained("local-sgd", **train, **keys)[0] for train in (PARTS, WHOLE))
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_parts_draw_the_augmentations_of_the_whole_batch(mixup: float) -> None:
    model = {"name": "vit", "layers": 1, "width": 16, "attention_heads": 2, "image": 16, "classes": 4}
    data, data_set = {"path": "made-up", "augment": ["crop", "flip"], "mixup": mixup}, images(40, 4, 4, 16)
    runs = [
        build_run({"model": model, "data": data, "method": {"name": "ddp"}, "train": train}) for train in (WHOLE, PARTS)
    ]
    ours, theirs = (build_batches(run, data_set).batch(3, range(1, 3)) for run in runs)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
