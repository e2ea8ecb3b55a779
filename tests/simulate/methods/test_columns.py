"""LTE whose heads' A pick columns: which ones, in which layers, and runs against twins with A as a dense matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.run import Run
from simulate.layers import folding
from simulate.layers.lora import AdapterSpec, LoraLinear, lora_layers
from simulate.methods.build_network import build_model
from simulate.methods.lte.train import Lte
from tests import tiny
from tests.reference.column_draw import column_draw
from tests.reference.joint_draw import joint_draw
from tests.reference.late import LateLteFrozenATwin
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.reference.lte_wire import LteWireTwin
from tests.reference.muon import LteMuonTwin
from tests.reference.paced import PacedLteFrozenATwin
from tests.reference.quantised import QuantisedTwin
from tests.selection import others_slow
from tests.simulate.methods.adapter_parity import TRAIN

Twin = Callable[[Run, nn.Module, Draw], LteTwin]


class WireTwin(LteWireTwin, LteFrozenATwin):
    """Rounded messages of B alone."""

    def _sent(self, factors: Tensor, *address: object) -> Tensor:
        return factors if "a" in address else super()._sent(factors, *address)


class QuantisedFrozenTwin(QuantisedTwin, LteFrozenATwin):
    """Rounded W, and heads that train B alone."""


class MuonFrozenTwin(LteMuonTwin, LteFrozenATwin):
    """Heads whose B is stepped by Muon."""


def layer(inputs: int, rank: int, heads: int, first: int = 0, local: int | None = None, seed: int = 5) -> LoraLinear:
    """Return a layer of 3 outputs with all or some of `heads` heads that pick columns."""
    spec = AdapterSpec(
        rank, 1.0, 1, reset_less=False, first_device=first, seed=seed, draws="columns", num_heads=heads, frozen_a=True
    )
    return LoraLinear(torch.zeros(3, inputs, dtype=torch.float64), None, "layer", spec, local or heads)


@pytest.mark.parametrize(("inputs", "rank", "heads"), [(8, 2, 4), (12, 3, 4), (5, 5, 1)])
def test_heads_that_cover_the_inputs_pick_each_once(inputs: int, rank: int, heads: int) -> None:
    of_all = layer(inputs, rank, heads)
    assert sorted(of_all.columns.flatten().tolist()) == list(range(inputs))
    # So that heads together see every direction alike: Σ AᵀA = (I/r)·identity, with rows of the norm sqrt(I/r).
    a_HRI = of_all.draw_a(0)
    expected = inputs / rank * torch.eye(inputs, dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("hri,hrj->ij", a_HRI, a_HRI), expected, rtol=1e-14, atol=1e-14)


def test_heads_beyond_one_order_of_the_inputs_begin_the_next() -> None:
    columns_HR = layer(7, 3, 5).columns  # two heads of rank 3 in 7 inputs: {0, 1}, {2, 3}, {4}
    for start in (0, 2, 4):
        picked = columns_HR[start : start + 2].flatten().tolist()
        assert len(set(picked)) == len(picked)
    assert columns_HR[:2].tolist() != columns_HR[2:4].tolist() != columns_HR[:2].tolist()


def test_heads_that_cannot_cover_the_inputs_are_drawn_jointly() -> None:
    assert [layer(7, 3, heads).draws for heads in (2, 3)] == ["joint", "columns"]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: layer(9, 3, 3, seed=6).columns, id="another seed"),
        pytest.param(lambda: layer(9, 3, 3).draw_columns(1).columns_HR, id="another merge"),
        pytest.param(lambda: layer(9, 3, 3, first=3).columns, id="another group"),
    ],
)
def test_no_two_addresses_pick_alike(other: Callable[[], Tensor]) -> None:
    assert layer(9, 3, 3).columns.tolist() != other().tolist()


@pytest.mark.parametrize("first", range(5))
def test_a_process_picks_what_all_together_do(first: int) -> None:
    of_all, alone = layer(7, 3, 5), layer(7, 3, 5, first, local=1)
    assert torch.equal(alone.columns, of_all.columns[first : first + 1])
    everyones = alone.frozen_a(5)
    assert not isinstance(everyones, Tensor) and torch.equal(everyones.columns_HR, of_all.columns)


def parity_run(devices: int = 3, train: tiny.Table | None = None, **method: Any) -> Run:
    """Return a run of one block of width 16 and 64: three heads of rank 8 cover the one, six of 12 the other, too."""
    options = {"frozen_a": True, "reset": "b", "draws": "columns", "merge_every": 4, "rank": 8, **method}
    heads = options.get("heads_per_device", 1)
    return tiny.lte_run(devices, {"layers": 1}, {**TRAIN, "micro_batch": 2 * heads, **(train or {})}, **options)


@cache
def twin_history(twin_class: Twin, run: Run) -> tiny.History:
    return slow_history(twin_class, run, column_draw(run))


def slow_history(twin_class: Twin, run: Run, draw: Draw) -> tiny.History:
    twin, data = twin_class(run, build_model(run), draw), tiny.batches(run)
    devices = range(run.cluster.devices)
    losses = [twin.step(*data.batch(step, devices), step) for step in range(run.train.steps)]
    return tiny.History(torch.stack(losses), twin.merged_state())


def sliced(inputs: int, rank: int, heads: int) -> LoraLinear:
    """Return a layer of 3 outputs whose heads pick inputs that follow one another."""
    spec = AdapterSpec(rank, 1.0, 1, False, 0, 5, draws="slices", num_heads=heads, frozen_a=True)
    return LoraLinear(torch.zeros(3, inputs, dtype=torch.float64), None, "layer", spec, heads)


@pytest.mark.parametrize(("inputs", "rank", "heads"), [(12, 3, 4), (5, 5, 1), (11, 3, 4)])
def test_slices_follow_one_another_and_share_no_input(inputs: int, rank: int, heads: int) -> None:
    picked = sliced(inputs, rank, heads).columns.tolist()
    assert all(columns == list(range(columns[0], columns[0] + rank)) for columns in picked)
    of_one_order = [column for columns in picked[: inputs // rank] for column in columns]
    assert len(set(of_one_order)) == len(of_one_order) == inputs // rank * rank


def test_slices_of_layers_that_are_not_covered_are_drawn_jointly() -> None:
    assert [sliced(7, 3, heads).draws for heads in (2, 3)] == ["joint", "columns"]


STEPS = [[4, 1, 3], [2, 4, 1]]
PARITY: dict[str, tuple[Twin, dict[str, Any]]] = {
    "gathered": (LteFrozenATwin, {}),
    "picked anew, reduced": (LteFrozenATwin, {"reset": "ab", "merge_transport": "reduce"}),
    "slices, picked anew": (LteFrozenATwin, {"draws": "slices", "rank": 7, "reset": "ab"}),
    "slices, int8 weights": (QuantisedFrozenTwin, {"draws": "slices", "quantize": "int8"}),
    "two heads, served": (LteFrozenATwin, {"merge_transport": "server", "heads_per_device": 2, "rank": 12}),
    "auto, every input of every head": (LteFrozenATwin, {"merge_transport": "auto", "rank": 16}),
    "int8": (WireTwin, {"wire": "int8"}),
    "reduced int4": (WireTwin, {"wire": "int4", "merge_transport": "reduce", "heads_per_device": 2}),
    "int2": (WireTwin, {"wire": "int2"}),
    "late, reduced": (LateLteFrozenATwin, {"merge_delay": 3, "merge_transport": "reduce"}),
    "late": (LateLteFrozenATwin, {"merge_delay": 3, "fragments": 1}),
    "paced": (PacedLteFrozenATwin, {"pace": "deadline", "steps_taken": STEPS}),
    "int8 weights": (QuantisedFrozenTwin, {"quantize": "int8", "heads_per_device": 2}),
    "nf4 weights, served": (QuantisedFrozenTwin, {"quantize": "nf4", "merge_transport": "server"}),
}
WAYS = ("row by row", "written")
IN_TURN = [(case, WAYS[index % 2]) for index, case in enumerate(PARITY)]


def compute(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have every layer apply B row by row, or write it into copies of W."""
    monkeypatch.setattr(folding, "WRITTEN_WEIGHT_OPERATIONS", 0.0 if way == "written" else float("inf"))


@pytest.mark.parametrize(("case", "way"), others_slow(itertools.product(PARITY, WAYS), IN_TURN))
def test_it_trains_like_the_twin_with_a_dense_a(monkeypatch: pytest.MonkeyPatch, case: str, way: str) -> None:
    compute(monkeypatch, way)
    twin_class, method = PARITY[case]
    run = parity_run(**method)
    tiny.assert_parity(tiny.train(tiny.build(run)), twin_history(twin_class, run))


def test_muon_steps_it_like_the_twin() -> None:
    run = parity_run(train={"optimizer": "muon"})
    tiny.assert_parity(tiny.train(tiny.build(run)), slow_history(MuonFrozenTwin, run, column_draw(run)))


def test_parity_detects_other_columns() -> None:
    run = parity_run()
    with pytest.raises(AssertionError):
        tiny.assert_parity(tiny.train(tiny.build(run)), slow_history(LteFrozenATwin, run, joint_draw(run)))


def engine_of(run: Run, local_devices: range | None = None) -> Lte:
    engine = tiny.build(run, local_devices)
    assert isinstance(engine, Lte)
    return engine


@pytest.mark.parametrize("reset", ["b", "ab"])
def test_columns_stay_until_a_merge_that_picks_anew(reset: str) -> None:
    engine = engine_of(parity_run(reset=reset, merge_every=4, train={"weight_decay": 0.5}))
    layers = [x for x in lora_layers(engine.model) if x.draws == "columns"]
    before = [x.columns.clone() for x in layers]
    tiny.train(engine, 0, 3)
    assert all(torch.equal(x.columns, old) for x, old in zip(layers, before, strict=True))
    tiny.train(engine, 3, 1)
    changed = {not torch.equal(x.columns, old) for x, old in zip(layers, before, strict=True)}
    assert changed == {reset == "ab"}


def test_no_layer_that_picks_columns_holds_an_a() -> None:
    engine = engine_of(parity_run())
    kinds = {x.name.rpartition(".")[2]: x.draws for x in lora_layers(engine.model)}
    assert kinds["down"] == "joint" and {kinds[name] for name in kinds if name != "down"} == {"columns"}
    with_a = {name for name in engine.state.state_dict() if name.endswith(".a")}
    assert with_a == {f"model.{x.name}.a" for x in lora_layers(engine.model) if x.draws == "joint"}


def test_training_leaves_w_as_it_was_to_the_bit() -> None:
    engine = engine_of(parity_run())
    before = {x.name: x.weight.clone() for x in lora_layers(engine.model)}
    tiny.train(engine, 0, 3)
    assert all(torch.equal(x.weight, before[x.name]) for x in lora_layers(engine.model))
    assert any(x.b.any() for x in lora_layers(engine.model))


def test_a_merge_moves_the_columns_of_the_head_that_learned() -> None:
    """By hand: one head of B = 1 adds (s/H)·sqrt(I/r) to its columns, and nothing to others."""
    engine = engine_of(parity_run(alpha=8.0))  # s = 1, H = 3
    (first, *_) = (x for x in lora_layers(engine.model) if x.draws == "columns")
    before = first.weight.clone()
    with torch.no_grad():
        first.b[1].fill_(1.0)
        engine.mergers[0].merge()
    expected = torch.zeros_like(before)
    expected[:, first.columns[1]] = (16 / 8) ** 0.5 / 3
    torch.testing.assert_close(first.weight - before, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "move"),
    [
        ({"reset": "none"}, "--set method.reset=b --set method.frozen_a=true"),
        ({"reset": "none", "frozen_a": False}, "--set method.reset=b --set method.frozen_a=true"),
        ({"reset": "b", "frozen_a": False}, "--set method.frozen_a=true"),
    ],
)
def test_what_trains_a_is_refused_in_a_line(method: dict[str, Any], move: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny._run(2, None, None, {"name": "lte", "draws": "columns", "rank": 2, "alpha": 4.0, **method})
    assert "\n" not in str(caught.value) and f"try {move}, or --set method.draws=joint" in str(caught.value)
