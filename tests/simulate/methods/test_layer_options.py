"""Norms and biases under LTE: against slow twins, and two devices' vectors by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run
from simulate.layers.per_device import VectorLora
from simulate.methods.averaging import Averaging
from simulate.methods.build_network import build_model
from simulate.methods.lte.train import Lte
from simulate.methods.registry import build_method
from tests import tiny
from tests.reference.lte_layers import LteLayerTwin, VectorPair, parameter_names
from tests.selection import others_slow
from tests.simulate.methods.adapter_parity import TRAIN, assert_trains_like, twin_of

OPTIONS: dict[str, dict[str, Any]] = {
    "everything trained": {"reset": "b"},
    "norms of one": {"norms": "one", "heads_per_device": 2},
    "no norms": {"norms": "none", "reset": "b"},
    "vectors": {"norms": "vector-lora"},
    "vectors, reset": {"norms": "vector-lora", "heads_per_device": 2, "reset": "b"},
    "frozen biases": {"biases": "frozen", "reset": "b"},
}


def run_of(name: str) -> Run:
    """Return a run of one block: five merges in 19 steps, the last one early."""
    method = {"merge_every": 4, **OPTIONS[name]}
    train = {**TRAIN, "clip_norm": 1.7, "micro_batch": method.get("heads_per_device", 1)}
    return tiny.lte_run(2, {"layers": 1}, train, **method)


def engine_of(run: Run) -> Lte:
    engine = tiny.build(run)
    assert isinstance(engine, Lte)
    return engine


@pytest.mark.parametrize(
    "name",
    others_slow(
        [name for name in OPTIONS if name != "everything trained"], ["norms of one", "vectors, reset", "frozen biases"]
    ),
)
def test_every_option_trains_like_its_twin(name: str) -> None:
    assert_trains_like(LteLayerTwin, run_of(name))


def test_parity_covers_clipped_and_unclipped_steps() -> None:
    for name in ("norms of one", "vectors, reset"):
        twin, _ = twin_of(LteLayerTwin, run_of(name))
        clipped = [flag for device in twin.devices for flag in device.clipped]
        assert 0.1 < sum(clipped) / len(clipped) < 0.95


def keep_own_norms(averaging: Averaging, index: int, weights_N: Tensor | None = None) -> None:
    """Let everyone go on with norms that nobody sent."""
    if not averaging.first_only:
        ORIGINAL_MERGE(averaging, index, weights_N)


def average_of_all(averaging: Averaging, copies: list[Tensor]) -> list[Tensor]:
    return [copy.mean(0) for copy in copies]


ORIGINAL_MERGE = Averaging.merge


def forget_nothing(vector: VectorLora) -> None:
    """Take over what was merged, and count the pair's product again."""
    vector.value.copy_(vector.merged[:1])


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        pytest.param("norms of one", Averaging, "merge", keep_own_norms, id="norms that are not taken over"),
        pytest.param("norms of one", Averaging, "_firsts", average_of_all, id="norms averaged with those at rest"),
        pytest.param("vectors", VectorLora, "start_round", forget_nothing, id="vectors count old products twice"),
        pytest.param("vectors, reset", VectorLora, "start_round", forget_nothing, id="pairs are not reset"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: type, attribute: str, broken: object
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(LteLayerTwin, run_of(name))


def test_parity_detects_norms_that_everyone_trains() -> None:
    run, engine = run_of("norms of one"), engine_of(run_of("norms of one"))
    engine.first_device_norms = []
    with pytest.raises(AssertionError):
        tiny.assert_parity(tiny.train(engine), twin_of(LteLayerTwin, run)[1])


def test_parity_detects_gradients_of_vectors_that_are_summed_over_heads() -> None:
    run = run_of("vectors, reset")
    engine = engine_of(run)
    factors = {id(p) for vector in engine.vectors.values() for p in vector.factors()}
    engine.replicated_parameters = [p for p in engine.replicated_parameters if id(p) not in factors]
    with pytest.raises(AssertionError):
        tiny.assert_parity(tiny.train(engine), twin_of(LteLayerTwin, run)[1])


@pytest.mark.parametrize("name", ["no norms", "frozen biases"])
def test_parity_detects_what_is_trained_though_it_should_not(name: str) -> None:
    _, slow = twin_of(LteLayerTwin, run_of(name))
    fast = tiny.train(tiny.build(run_of("everything trained")))
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast, slow)


def test_norms_of_one_stand_still_on_the_others_in_a_round() -> None:
    run = run_of("norms of one")
    engine = engine_of(run)
    tiny.train(engine, 0, 4)
    before = [norm.detach().clone() for norm in engine.first_device_norms]
    tiny.train(engine, 4, 3)
    assert len(before) == 6  # weights and biases of three norms
    for norm, old in zip(engine.first_device_norms, before, strict=True):
        assert torch.equal(norm[1:], old[1:]) and not torch.equal(norm[0], old[0])
        assert torch.equal(old, old[:1].expand_as(old))


def test_a_process_without_the_first_device_trains_no_norms() -> None:
    run = run_of("norms of one")
    engine = tiny.build(run, local_devices=range(1, 2))
    assert isinstance(engine, Lte)
    start = [norm.detach().clone() for norm in engine.first_device_norms]
    engine.step(*tiny.batches(run).batch(0, range(1, 2)), 0)
    assert all(torch.equal(norm, old) for norm, old in zip(engine.first_device_norms, start, strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "only"),
    [("no norms", nn.LayerNorm, ""), ("frozen biases", nn.Linear, "bias")],
)
def test_what_is_frozen_ends_as_it_starts_and_all_else_moves(name: str, kind: type, only: str) -> None:
    run = run_of(name)
    start = build_model(run)
    frozen = parameter_names(start, kind, only)
    end = tiny.train(engine_of(run), 0, 4).weights
    stays = {key for key, tensor in start.state_dict().items() if torch.equal(tensor, end[key])}
    assert stays == frozen and frozen


def vector_engine(devices: int = 2, **method: Any) -> tuple[Lte, VectorLora]:
    """Return LTE over a norm of two numbers, (1, 2), at s = 2, its rate constant at 0.5 and nothing clipped."""
    network = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2, bias=False)).double()
    network[0].weight.data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    run = tiny.lte_run(devices=devices, norms="vector-lora", rank=1, **{"alpha": 2.0, **method})
    engine = build_method(run, VirtualCommunicator(devices), tiny.CPU, network)
    assert isinstance(engine, Lte)
    return engine, engine.vectors["0.weight"]


@torch.no_grad()
def put(vector: VectorLora, a: list[float], b: list[list[float]]) -> None:
    vector.a.copy_(torch.tensor(a).view(-1, 1))
    vector.b.copy_(torch.tensor(b))


@pytest.mark.parametrize("transport", ["gather", "reduce", "server"])
@pytest.mark.parametrize("reset", ["none", "b", "ab"])
def test_two_devices_vectors_merge_as_by_hand(reset: str, transport: str) -> None:
    engine, vector = vector_engine(reset=reset, merge_transport=transport)
    put(vector, [3.0, 1.0], [[1.0, 0.0], [0.5, 1.0]])
    engine.merge(0)
    # (1, 2) + 2·mean of (3, 0) and (0.5, 1); of means, 2·0.75 and 2·0.5, it would be (4, 4).
    assert vector.value.tolist() == [[4.5, 3.0]]
    assert vector().tolist() == [[4.5, 3.0]] * 2
    if reset == "none":
        assert (vector.a.tolist(), vector.b.tolist()) == ([[3], [1]], [[1, 0], [0.5, 1]])
    else:
        assert (vector.a.tolist(), vector.b.tolist()) == ([[1], [1]], [[0, 0], [0, 0]])
    put(vector, [2.0, 1.0], [[1.0, 1.0], [1.5, 1.0]])
    engine.merge(1)
    # New products (2, 2) and (1.5, 1); without reset (3, 0) and (0.5, 1) are in the vector already.
    expected = [[4.5 + 2 * 0.0, 3.0 + 2 * 1.0]] if reset == "none" else [[4.5 + 2 * 1.75, 3.0 + 2 * 1.5]]
    assert vector.value.tolist() == expected
    torch.testing.assert_close(engine.merged_state()["0.weight"], vector.value[0])


def test_the_twins_vector_by_hand() -> None:
    pair = VectorPair(torch.tensor([1.0, 2.0]), scale=2.0)
    with torch.no_grad():
        pair.a.fill_(3.0)
        pair.b.copy_(torch.tensor([1.0, 0.0]))
        assert pair.effective().tolist() == [7, 2]
        pair.start_round(torch.tensor([4.5, 3.0]), "none")
        assert pair.effective().tolist() == [4.5, 3.0]
        pair.start_round(torch.tensor([4.5, 3.0]), "b")
        assert (pair.a.tolist(), pair.b.tolist()) == ([1], [0, 0])


def test_a_first_rounded_message_carries_the_vectors_change_alone() -> None:
    engine, vector = vector_engine(wire="int4")
    put(vector, [1.0, 1.0], [[0.0, 0.007], [0.0, 0.007]])
    engine.merge(0)
    # A change of 0.014 beside the vector's 2 would vanish on a grid of seven steps.
    torch.testing.assert_close(vector.value, torch.tensor([[1.0, 2.014]], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("merge_optimizer", "kept"), [("keep", 16), ("prune", 2), ("reset", 0)])
def test_moments_of_vectors_are_treated_as_those_of_matrices(merge_optimizer: str, kept: int) -> None:
    run = tiny.lte_run(merge_every=2, norms="vector-lora", reset="b", merge_optimizer=merge_optimizer)
    engine = engine_of(run)
    tiny.train(engine, 0, 2)
    vector = engine.vectors["norm.bias"]
    moment = engine.stepper.state.get(vector.b, {}).get("exp_avg_sq", torch.zeros(2, 16))
    # Of a device's 16 numbers nine tenths, rounded down, are 14.
    assert [int((row != 0).sum()) for row in moment] == [kept, kept]
