"""Calls of one training step for each layer: products, copies and gathers; one more of them makes every step longer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from simulate.layers import folding
from simulate.layers.lora import LoraLinear, lora_layers
from tests import tiny
from tests.simulate.layers.test_lora import Calls

COUNTED = ("addmm_", "baddbmm_", "bmm", "copy_", "cat", "index_select", "scatter_add_", "clone")
HEADS, WIDTH = 4, 16


def calls_of_a_step(blocks: int, micro_batch: int, **method: Any) -> Counter[str]:
    """Return the counted calls of a second step, which has the optimizer's state: forward, back, clip and optimize."""
    size = {"layers": blocks, "width": WIDTH, "attention_heads": 2}
    train = {"micro_batch": micro_batch, "dtype": "fp64"}
    run = tiny.lte_run(HEADS, size, train, frozen_a=True, reset="b", **method)
    trained, data = tiny.build(run), tiny.batches(run)
    assert len(lora_layers(trained.model)) == 4 * blocks
    trained.step(*data.batch(0, range(HEADS)), 0)
    with Calls() as calls:
        trained.step(*data.batch(1, range(HEADS)), 1)
    return Counter({name: calls.of[name] for name in COUNTED})


def calls_of_a_block(micro_batch: int, **method: Any) -> dict[str, int]:
    """Return what one block more adds to a step."""
    one, two = (calls_of_a_step(blocks, micro_batch, **method) for blocks in (1, 2))
    return {name: two[name] - one[name] for name in COUNTED if two[name] > one[name]}


# A block's four layers take 16, 16, 16 and 64 inputs to 48, 16, 64 and 16 outputs. Each writes its bias first, and has
# the bias's gradient by a product with ones; two norms copy three gradients of each head; a clone lays out attention's
# heads. The gradient of B is a bmm where A is dense, else a baddbmm_.
OTHERS = {"copy_": 4 + 2 * 3 * HEADS, "clone": 1}
STEPS = [
    # Forward and back W, then two small products each way.
    pytest.param(1, {"rank": 4}, 0, {"addmm_": 8, "baddbmm_": 16, "bmm": 8}, id="dense A, row by row"),
    # 64 rows a head: three layers fold on the way forward, two back, in halves; three take W as it is.
    pytest.param(8, {"rank": 4}, 0, {"addmm_": 3, "baddbmm_": 4 + 5 * 4 + 1 + 2 * 2, "bmm": 8}, id="dense A, folded"),
    # The layer of 64 inputs is drawn jointly; it goes through W forward, and folds on the way back.
    pytest.param(
        4, {"rank": 8, "draws": "columns"}, float("inf"),
        {"addmm_": 3 * 2 + 1, "baddbmm_": 3 * 3 + 6, "bmm": 5, "index_select": 3 * HEADS, "scatter_add_": 3},
        id="columns, row by row",
    ),
    # Both ways each head has a copy of W, B written into it, and a product.
    pytest.param(
        4, {"rank": 8, "draws": "columns"}, 0,
        {
            "addmm_": 3 * 2 * HEADS + 1, "baddbmm_": 3 + 6, "bmm": 5, "copy_": OTHERS["copy_"] + 3 * 2 * HEADS,
            "index_select": 3 * HEADS, "scatter_add_": 3 * 2 * HEADS,
        },
        id="columns, written",
    ),
    # The same without a gather: a copy of W each way, in which each head after the first clears the last one's slice.
    pytest.param(
        4, {"rank": 8, "draws": "slices"}, 0,
        {"addmm_": 3 * 2 * HEADS + 1, "baddbmm_": 3 + 6, "bmm": 5, "copy_": OTHERS["copy_"] + 3 * (HEADS + 2 * HEADS)},
        id="slices, written",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("micro_batch", "method", "operations", "calls"), STEPS)
def test_a_block_takes_so_many_calls(
    monkeypatch: pytest.MonkeyPatch, micro_batch: int, method: dict[str, Any], operations: float, calls: dict[str, int]
) -> None:
    monkeypatch.setattr(folding, "WRITTEN_WEIGHT_OPERATIONS", operations)
    assert calls_of_a_block(micro_batch, **method) == OTHERS | calls


def test_one_copy_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda layer, x: forward(layer, x.clone()))
    assert calls_of_a_block(1, rank=4)["clone"] == OTHERS["clone"] + 4
