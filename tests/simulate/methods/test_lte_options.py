"""LTE's options against its slow twins: rounded messages, staggered merges, transport by layer, moments at merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.comm.compression import CompressedMean
from simulate.config.run import Run, build_run
from simulate.layers.lora import lora_layers
from simulate.methods.lte import merge as merging
from simulate.methods.lte import train as lte
from simulate.methods.lte.options import LteOptions
from simulate.methods.lte.train import Lte
from tests import tiny
from tests.reference.lte import LteTwin
from tests.reference.lte_wire import LteWireTwin
from tests.reference.quantiser import as_received
from tests.simulate.comm.test_compression import round_trip
from tests.simulate.methods.adapter_parity import TwinClass, assert_trains_like, parity_run

EVERY_FOUR: dict[str, Any] = {"merge_every": 4}  # five merges of each part in 19 steps
INT8: dict[str, Any] = {**EVERY_FOUR, "wire": "int8"}


@pytest.mark.parametrize(
    ("twin_class", "method"),
    [
        pytest.param(LteTwin, {"merge_optimizer": "reset", "reset": "ab"}, id="forgotten moments"),
        pytest.param(LteTwin, {"fragments": 2}, id="two fragments", marks=pytest.mark.slow),
        pytest.param(LteTwin, {"fragments": 2, "heads_per_device": 2}, id="two fragments of two heads a device"),
        pytest.param(LteTwin, {"merge_transport": "auto", "rank": 6}, id="transport by layer", marks=pytest.mark.slow),
        pytest.param(LteWireTwin, {"wire": "int8"}, id="factors in int8", marks=pytest.mark.slow),
        pytest.param(LteWireTwin, {"wire": "int4", "merge_transport": "reduce"}, id="deltas in int4"),
        pytest.param(LteWireTwin, {"wire": "int2"}, id="factors in int2"),
        pytest.param(LteWireTwin, {"wire": "int2", "merge_transport": "reduce"}, id="deltas in int2"),
        pytest.param(
            LteWireTwin,
            {"wire": "bf16", "merge_transport": "server", "reset": "b"},
            id="pushed in bf16",
            marks=pytest.mark.slow,
        ),
        pytest.param(LteWireTwin, {"wire": "int8", "fragments": 2, "reset": "ab"}, id="fragments in int8"),
    ],
)
def test_every_option_trains_like_its_twin(twin_class: TwinClass, method: dict[str, Any]) -> None:
    assert_trains_like(twin_class, parity_run("lte", **EVERY_FOUR, **method))


def pruned_run() -> Run:
    return parity_run("lte", **EVERY_FOUR, merge_optimizer="prune")


def test_pruned_moments_train_like_the_twin() -> None:
    assert_trains_like(LteTwin, pruned_run())


def test_parity_detects_moments_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lte, "prune_moments", lambda optimizer, parameters, share: None)
    with pytest.raises(AssertionError):
        assert_trains_like(LteTwin, pruned_run())


def no_feedback(compressed: CompressedMean, x_LX: Tensor) -> Tensor:
    """Lose what rounding loses."""
    compressed.sent_error_LX.zero_()
    compressed.mean_error_LC.zero_()
    return ORIGINAL_MEAN(compressed, x_LX)


ORIGINAL_MEAN = CompressedMean.mean


def remember_unrounded(merger: merging.LayerMerger, layer: Any, rounded: Any = None) -> None:
    """Take the local factors for what the message said."""
    layer.remember_product(layer.a.detach(), layer.b.detach())


@pytest.mark.parametrize(
    ("owner", "name", "broken", "twin_class", "method"),
    [
        pytest.param(CompressedMean, "mean", no_feedback, LteWireTwin, INT8, id="rounding errors are lost"),
        pytest.param(
            merging.LayerMerger, "_remember", remember_unrounded, LteWireTwin, INT8, id="unrounded products remembered"
        ),
        pytest.param(
            Lte, "fragments_due", lambda method, step: [0, 1], LteTwin, {**EVERY_FOUR, "fragments": 2},
            id="all fragments at once",
        ),
    ],
)  # fmt: skip
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: object, twin_class: TwinClass,
    method: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(twin_class, parity_run("lte", **method))


def changed_layers(method: lte.Method, step: int) -> list[int]:
    """Merge after a step; return the adapted layers, counted in the network's order, whose W changed."""
    layers = lora_layers(method.model)
    before = [layer.weight.clone() for layer in layers]
    method.merge(step)
    return [i for i, layer in enumerate(layers) if not torch.equal(layer.weight, before[i])]


def test_fragments_merge_one_after_the_other_and_together_at_the_end() -> None:
    # Eight adapted layers in two fragments; T = 4: the first merges 2, 6, ... steps in, the second 4, 8, ...
    method = tiny.build(tiny.lte_run(merge_every=4, fragments=2, train={"steps": 9}))
    first, second, data = [0, 1, 2, 3], [4, 5, 6, 7], tiny.batches(method.run)
    expected = {2: first, 4: second, 6: first, 8: second, 9: first + second}
    for step in range(9):
        method.step(*data.batch(step, range(2)), step)
        assert method.merge_due(step) == (step + 1 in expected)
        if step + 1 in expected:
            assert changed_layers(method, step) == expected[step + 1]


def auto_run(devices: int, rank: int) -> Run:
    return tiny.lte_run(devices=devices, rank=rank, merge_transport="auto")


# W of width 16 in elements: qkv 48·16 = 768, project 16·16 = 256, up and down 64·16 = 1024. Factors of rank r: 64r, 32r
# and 80r. Gathered, N devices send N(N−1) of the latter; reduced, 2(N−1) of the former.
@pytest.mark.parametrize(
    ("devices", "rank", "reduced"),
    [
        pytest.param(3, 5, [], id="project: 6·160 = 960 gathered against 4·256 = 1024"),
        pytest.param(4, 4, [], id="project: 12·128 = 1536 on both sides: gathered"),
        pytest.param(3, 6, ["attention.project"], id="project: 6·192 = 1152 gathered against 1024"),
        pytest.param(5, 5, ["attention.project", "attention.qkv"], id="qkv: 20·320 = 6400 against 8·768 = 6144"),
        pytest.param(
            13, 2, ["attention.project", "attention.qkv", "mlp.down", "mlp.up"],
            id="up: 156·160 = 24960 against 24·1024 = 24576",
        ),
    ],
)  # fmt: skip
def test_auto_sends_what_has_fewer_bytes(devices: int, rank: int, reduced: list[str]) -> None:
    method = tiny.build(auto_run(devices, rank))
    assert isinstance(method, Lte)
    dense = [layer.name for merger in method.mergers for message in merger.dense_messages for layer in message]
    assert sorted(dense) == [f"blocks.{block}.{name}" for block in range(2) for name in reduced]


def test_auto_counts_the_bytes_of_both_ways() -> None:
    method = tiny.build(auto_run(3, 6))
    assert isinstance(method, Lte)
    with torch.no_grad():
        method.mergers[0].merge()
    gathered = 6 * 6 * (64 + 80 + 80)  # N(N−1) times the factors of qkv, up and down at rank 6
    reduced = 4 * 256  # 2(N−1) times project's weights
    assert method.communicator.counter.sent_bytes == 2 * 8 * (gathered + reduced)  # two blocks, eight bytes each
    assert method.communicator.counter.messages == 2


@pytest.mark.parametrize(
    ("wire", "sent", "received"),
    [
        # Scale 1 (largest magnitude 127 or 7): halves go to the even neighbour.
        ("int8", [127.0, 0.5, 1.5, -2.4], [127.0, 0.0, 2.0, -2.0]),
        ("int4", [-7.0, 0.5, 1.5, 6.6], [-7.0, 0.0, 2.0, 7.0]),
        # Eight bits of mantissa: 256 is a step of 2 apart from its neighbours above.
        ("bf16", [257.0, 259.0, 258.9, -257.0], [256.0, 260.0, 258.0, -256.0]),
        ("int8", [0.0, 0.0], [0.0, 0.0]),
        # Root mean square 2.29: 2.28 and more is three steps of (12 + 1 + 2 + 0) / 12.
        ("int2", [4.0, 1.0, -2.0, 0.0], [3.75, 1.25, -1.25, 1.25]),
        ("int2", [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_both_quantisers_round_as_by_hand(wire: str, sent: list[float], received: list[float]) -> None:
    values = torch.tensor(sent, dtype=torch.float64)
    assert as_received(values, wire).tolist() == received
    assert round_trip(values.unsqueeze(0), wire)[0].tolist() == received


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("elements", [1, 127, 128, 129, 1000])
def test_the_engine_rounds_like_the_loop_over_blocks(wire: str, elements: int) -> None:
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    assert torch.equal(round_trip(values.unsqueeze(0), wire)[0], as_received(values, wire))


@pytest.mark.parametrize(
    ("given", "frozen", "reset"),
    [
        ({}, True, "b"),
        ({"reset": "none"}, False, "none"),
        ({"reset": "ab"}, True, "ab"),
        ({"frozen_a": False}, False, "b"),
    ],
)
def test_b_is_trained_alone_unless_something_else_is_asked_for(given: dict[str, Any], frozen: bool, reset: str) -> None:
    options = build_run({"method": {"name": "lte", **given}}).method
    assert isinstance(options, LteOptions)
    assert (options.frozen_a, options.reset) == (frozen, reset)
