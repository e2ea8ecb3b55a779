"""Merges of one 2x2 layer and two heads, in numbers that a person can check, and the traps others fell into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.layers.lora import LoraLinear, lora_layers
from simulate.methods.lte.products import sum_of_products
from simulate.methods.lte.train import Lte
from tests import tiny

TRANSPORTS = ("gather", "reduce", "server")
A_ROUND1 = [[[1.0, 0.0]], [[0.0, 1.0]]]  # (H, R, I): head 0, head 1
B_ROUND1 = [[[1.0], [2.0]], [[3.0], [0.0]]]  # (H, O, R)
# Products B·A: [[1, 0], [2, 0]] and [[0, 3], [0, 0]]; their sum is [[1, 3], [2, 0]].
A_ROUND2 = [[[1.0, 0.0]], [[1.0, 1.0]]]
B_ROUND2 = [[[2.0], [2.0]], [[3.0], [0.0]]]
# Products B·A: [[2, 0], [2, 0]] and [[3, 3], [0, 0]]; their sum is [[5, 3], [2, 0]].

Build = Callable[..., tuple[Lte, LoraLinear]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build Lte around one linear layer whose W is the identity; two devices, rank 1, alpha = 4: s = 4, s/H = 2."""

    def layer_of(dtype: str = "fp64", devices: int = 2, **method: Any) -> tuple[Lte, LoraLinear]:
        run = tiny.lte_run(devices=devices, train={"dtype": dtype}, **{"rank": 1, "alpha": 4.0, **method})
        linear = nn.Linear(2, 2, bias=False, dtype=torch.float64 if dtype == "fp64" else torch.float32)
        with torch.no_grad():
            linear.weight.copy_(torch.eye(2))
        monkeypatch.setattr("simulate.methods.base.build_model", lambda run: nn.Sequential(linear))
        engine = tiny.build(run)
        assert isinstance(engine, Lte)
        (layer,) = lora_layers(engine.model)
        return engine, layer

    return layer_of


@torch.no_grad()
def put(layer: LoraLinear, a: list[list[list[float]]], b: list[list[list[float]]]) -> None:
    layer.a.copy_(torch.tensor(a))
    layer.b.copy_(torch.tensor(b))


@pytest.mark.parametrize("devices", [2, 1], ids=["a head a device", "both on one device"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("reset", ["none", "b", "ab"])
def test_the_first_merge_adds_the_mean_of_the_products(build: Build, reset: str, transport: str, devices: int) -> None:
    engine, layer = build(devices=devices, heads_per_device=2 // devices, reset=reset, merge_transport=transport)
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    # I + 2·[[1, 3], [2, 0]]
    assert layer.weight.tolist() == [[3, 6], [4, 1]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_reset_the_second_merge_adds_only_what_changed(build: Build, transport: str) -> None:
    engine, layer = build(reset="none", merge_transport=transport)
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    put(layer, A_ROUND2, B_ROUND2)
    engine.merge(1)
    # [[3, 6], [4, 1]] + 2·([[5, 3], [2, 0]] − [[1, 3], [2, 0]]); counting the old product twice: [[13, 12], [8, 1]]
    assert layer.weight.tolist() == [[11, 6], [4, 1]]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("reset", ["b", "ab"])
def test_with_reset_the_second_merge_adds_the_whole_product(build: Build, reset: str, transport: str) -> None:
    engine, layer = build(reset=reset, merge_transport=transport)
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    put(layer, A_ROUND2, B_ROUND2)
    engine.merge(1)
    # [[3, 6], [4, 1]] + 2·[[5, 3], [2, 0]]
    assert layer.weight.tolist() == [[13, 12], [8, 1]]


def test_without_reset_adapters_stay_and_their_product_is_remembered(build: Build) -> None:
    engine, layer = build(reset="none")
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    assert (layer.a.tolist(), layer.b.tolist()) == (A_ROUND1, B_ROUND1)
    assert layer.a0 is not None and layer.b0 is not None
    assert (layer.a0.tolist(), layer.b0.tolist()) == (A_ROUND1, B_ROUND1)


def test_what_is_remembered_does_not_follow_training(build: Build) -> None:
    engine, layer = build(reset="none")
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    put(layer, A_ROUND2, B_ROUND2)
    assert layer.a0 is not None and layer.b0 is not None
    assert (layer.a0.tolist(), layer.b0.tolist()) == (A_ROUND1, B_ROUND1)


def test_reset_b_zeroes_b_and_keeps_a(build: Build) -> None:
    engine, layer = build(reset="b")
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    assert layer.a.tolist() == A_ROUND1
    assert not layer.b.any()


def test_reset_ab_also_draws_a_anew_at_each_merge(build: Build) -> None:
    engine, layer = build(reset="ab")
    draws = []
    for step in range(3):
        draws.append(layer.a.detach().clone())
        engine.merge(step)
        assert not layer.b.any()
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("reset", ["none", "b", "ab"])
def test_right_after_a_merge_every_head_computes_with_the_merged_weights(build: Build, reset: str) -> None:
    engine, layer = build(reset=reset)
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)  # one row a head
    # [[3, 6], [4, 1]]·(1, 2)
    assert layer(x).tolist() == [[15, 6], [15, 6]]


def test_between_merges_each_head_computes_with_its_own_product(build: Build) -> None:
    engine, layer = build(reset="none")
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    put(layer, A_ROUND2, B_ROUND2)
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    # (15, 6) + 4·[[1, 0], [0, 0]]·(1, 2) and (15, 6) + 4·[[3, 0], [0, 0]]·(1, 2)
    assert layer(x).tolist() == [[19, 6], [27, 6]]


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(1, 4.0, 4.0), (2, 4.0, 2.0), (2, 1.0, 0.5)])
def test_the_product_is_scaled_by_alpha_over_rank(build: Build, rank: int, alpha: float, scale: float) -> None:
    engine, layer = build(devices=1, rank=rank, alpha=alpha)
    with torch.no_grad():
        layer.a.fill_(1)
        layer.b.fill_(1)  # B·A is filled with the rank
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert layer(x).tolist() == [[1 + scale * rank, scale * rank]]
    engine.merge(0)
    assert layer.weight.tolist() == [[1 + scale * rank, scale * rank], [scale * rank, 1 + scale * rank]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_merge_averages_products_and_not_factors(build: Build, transport: str) -> None:
    engine, layer = build(merge_transport=transport)
    put(layer, A_ROUND1, B_ROUND1)
    product_of_means = layer.b.mean(0) @ layer.a.mean(0)
    engine.merge(0)
    # Means (2, 1) and (0.5, 0.5): I + 4·[[1, 1], [0.5, 0.5]] is another matrix.
    assert (torch.eye(2) + 4 * product_of_means).tolist() == [[5, 4], [2, 3]]
    assert layer.weight.tolist() != [[5, 4], [2, 3]]


def test_the_sum_of_products_sums_over_heads_and_ranks() -> None:
    a_HRI, b_HOR = torch.tensor(A_ROUND1), torch.tensor(B_ROUND1)
    assert sum_of_products(a_HRI, b_HOR).tolist() == [[1, 3], [2, 0]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_merges_without_reset_lose_no_small_update(build: Build, transport: str) -> None:
    engine, layer = build(dtype="fp32", reset="none", merge_transport=transport)
    rounds, tiny_change = 2000, 2.0**-30  # of one merge: far below fp32's resolution beside 1, which is 2^-23
    for merged in range(1, rounds + 1):
        put(layer, [[[1.0, 0.0]]] * 2, [[[merged * tiny_change / 4], [0.0]]] * 2)  # s/H·Σ B·A = merged · tiny_change
        engine.merge(merged)
    assert layer.weight[0, 0].item() == torch.tensor(1 + rounds * tiny_change, dtype=torch.float32).item() > 1
    one_by_one = torch.ones(())
    for _ in range(rounds):
        one_by_one += tiny_change
    assert one_by_one.item() == 1  # what accumulating in place would have kept


def test_start_weights_are_kept_in_the_runs_own_precision(build: Build) -> None:
    engine, layer = build(dtype="fp64", reset="none")
    assert layer.start_weight is not None
    assert layer.start_weight.dtype == torch.float64
    put(layer, A_ROUND1, B_ROUND1)
    engine.merge(0)
    assert layer.start_weight.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_parameters_outside_adapters_become_their_mean(transport: str) -> None:
    engine = tiny.build(tiny.lte_run(devices=3, merge_transport=transport))
    norm = engine.model.get_parameter("norm.weight")
    with torch.no_grad():
        norm.copy_(torch.tensor([[1.0], [2.0], [6.0]]).expand_as(norm))
    engine.merge(0)
    assert torch.equal(norm, torch.full_like(norm, 3))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_after_a_merge_all_devices_hold_one_model(transport: str) -> None:
    run = tiny.lte_run(devices=3, merge_every=4, merge_transport=transport)
    engine, data = tiny.build(run), tiny.batches(run)
    tiny.train(engine, 0, 4)
    inputs, _ = data.batch(0, range(1))
    logits_NST = engine.model(inputs.repeat(3, 1)).chunk(3)
    for logits in logits_NST[1:]:
        torch.testing.assert_close(logits, logits_NST[0], rtol=1e-12, atol=1e-12)


def dense_gradient_elements(engine: Lte) -> list[Tensor]:
    return [p.grad for p in engine.model.parameters() if p.grad is not None]


def test_adapted_weights_are_buffers_that_no_gradient_is_kept_for() -> None:
    run = tiny.lte_run(devices=2)
    engine = tiny.build(run)
    assert isinstance(engine, Lte)
    inputs, targets = tiny.batches(run).batch(0, range(2))
    engine.loss.group_losses(inputs, targets, 2).sum().backward()
    buffers = dict(engine.model.named_buffers())
    for layer in lora_layers(engine.model):
        assert buffers[f"{layer.name}.weight"] is layer.weight
        assert layer.weight.grad is None and not layer.weight.requires_grad
    shape = run.model.shape()
    elements = sum(gradient.numel() for gradient in dense_gradient_elements(engine))
    assert elements == 2 * (shape.factors(rank=2) + shape.replicated_parameters)


def test_the_optimizer_keeps_no_moments_of_adapted_weights() -> None:
    run = tiny.lte_run(devices=2)
    engine = tiny.build(run)
    tiny.train(engine, 0, 1)
    shape = run.model.shape()
    moments = [m for state in engine.stepper.state.values() for key, m in state.items() if key != "step"]
    assert sum(m.numel() for m in moments) == 2 * 2 * (shape.factors(rank=2) + shape.replicated_parameters)
