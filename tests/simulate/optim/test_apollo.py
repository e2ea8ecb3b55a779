"""APOLLO against numbers by hand, its twin, and the rules of where it goes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.run import Run
from simulate.costs.flops import update_flops
from simulate.costs.moments import largest_step_bytes
from simulate.costs.state import persistent_state
from simulate.methods.base import Method
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.optim import apollo as optimizers
from simulate.optim.apollo import Apollo
from simulate.rules.optimizer import projected_rank
from tests import tiny
from tests.reference.apollo import DdpApolloTwin, LocalSgdApolloTwin
from tests.simulate.methods import parity

pytestmark = pytest.mark.numeric


def stepped(
    projection: list[list[float]], start: list[list[float]], *gradients: list[list[float]], **settings: Any
) -> Tensor:
    """Return a matrix after an APOLLO step with each of the gradients at a rate of 0.5 and a given projection."""
    parameter = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = Apollo([{"params": [parameter]}], lr=0.5, rank=len(projection), **settings)
    for gradient in gradients:
        optimizer.projections[parameter] = 0, torch.tensor(projection, dtype=torch.float64)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return parameter.detach()[0]


def test_a_first_step_by_hand() -> None:
    # R = (1, 0)·G = (3, -1, 0), whose Adam steps are (1, -1, 0): columns of G count 1/3, 1 and 0 times. The rate of 0.5
    # is times the root of 2/1.
    got = stepped([[1.0, 0.0]], [[0.0] * 3] * 2, [[3.0, -1.0, 0.0], [6.0, 4.0, 5.0]])
    half = 0.5 * math.sqrt(2)
    expected = -half * torch.tensor([[1.0, -1.0, 0.0], [2.0, 4.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_rows_are_scaled_where_there_are_more_of_them() -> None:
    wide = stepped([[1.0, 0.0]], [[0.0] * 3] * 2, [[3.0, -1.0, 2.0], [6.0, 4.0, 5.0]])
    tall = stepped([[1.0, 0.0]], [[0.0] * 2] * 3, [[3.0, 6.0], [-1.0, 4.0], [2.0, 5.0]])
    torch.testing.assert_close(tall, wide.T, rtol=0, atol=0)


def test_with_a_projection_of_one_a_number_steps_as_with_adam_and_grows_slowly() -> None:
    # Adam's first step is the rate. After 1 and 8 its moments are (0.09+0.8)/0.19 and (0.0099+0.64)/0.0199: the second
    # step would be 0.5·4.6842/√32.6583 = 0.4098. After 1 and 1 it would be 0.5; after 1 and -1 0.0263 uphill.
    assert stepped([[1.0]], [[2.0]], [[5.0]], betas=(0.9, 0.99)).item() == pytest.approx(1.5)
    assert stepped([[1.0]], [[2.0]], [[1.0]], [[8.0]], betas=(0.9, 0.99)).item() == pytest.approx(
        1.5 - 0.4098, abs=1e-4
    )
    assert stepped([[1.0]], [[2.0]], [[0.0]], [[1.0]], betas=(0.0, 0.5)).item() < 1.5  # nothing limits it after zero


def test_norms_grow_by_a_hundredth_at_most() -> None:
    # Without memory of the first moment, Adam's steps are 1 and, with V = (0.25+50)/0.75, 10/√67 = 1.2217: too long.
    # In numbers: V = 0.5·0.5·1 + 0.5·100 = 50.25, over 0.75 = 67.
    assert 10 / math.sqrt(67) == pytest.approx(1.2217, abs=1e-4)
    got = stepped([[1.0]], [[0.0]], [[1.0]], [[10.0]], betas=(0.0, 0.5))
    assert got.item() == pytest.approx(-0.5 - 0.5 * 1.01, abs=1e-6)


def test_weights_decay_by_the_rate_alone() -> None:
    assert stepped([[1.0]], [[2.0]], [[0.0]], weight_decay=0.4, scale=7.0).item() == pytest.approx(1.6)
    assert stepped([[1.0]], [[2.0]], [[3.0]], weight_decay=0.4, scale=0.2).item() == pytest.approx(1.6 - 0.1)


def test_a_copy_steps_alone_as_beside_others() -> None:
    draw = torch.Generator().manual_seed(1)
    together = nn.Parameter(torch.zeros(3, 8, 20, dtype=torch.float64))
    alone = [nn.Parameter(torch.zeros(1, 8, 20, dtype=torch.float64)) for _ in range(3)]
    optimizers_of = [Apollo([{"params": [p]}], lr=0.1, refresh_every=2) for p in (together, *alone)]
    for step in range(5):
        gradient = torch.randn(3, 8, 20, dtype=torch.float64, generator=draw) * torch.tensor(
            [1.0, 1e-3, 5.0**step]
        ).view(3, 1, 1)
        together.grad = gradient.clone()
        for copy, parameter in enumerate(alone):
            parameter.grad = gradient[copy : copy + 1].clone()
        for optimizer in optimizers_of:
            optimizer.step()
    torch.testing.assert_close(together.detach(), torch.cat([p.detach() for p in alone]), rtol=1e-12, atol=1e-12)


def test_projections_are_drawn_anew_and_of_the_right_size() -> None:
    parameter = nn.Parameter(torch.zeros(1, 400, 300))
    optimizer = Apollo([{"params": [parameter]}], rank=100, refresh_every=2, seed=3)
    drawn = []
    for _ in range(4):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        drawn.append(optimizer.projections[parameter][1])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert abs((drawn[0] * drawn[2]).mean().item()) < 1e-3
    assert drawn[0].shape == (100, 300) and drawn[0].square().mean().item() == pytest.approx(0.01, rel=0.05)


DDP, LOCAL = (tiny.variant_run(f"{name}, apollo", 3, {"layers": 1}, parity.TRAIN) for name in ("ddp", "local-sgd"))


@pytest.mark.parametrize(("twin", "run"), [(DdpApolloTwin, DDP), (LocalSgdApolloTwin, LOCAL)], ids=["ddp", "local-sgd"])
def test_training_is_that_of_the_twin(twin: Any, run: Run) -> None:
    parity.assert_trains_like(twin, run)


@pytest.mark.parametrize(("name", "broken"), [("GROWTH_LIMIT", 1.02), ("SMALLEST_NORM", 1e-5)])
def test_parity_detects_a_broken_apollo(monkeypatch: pytest.MonkeyPatch, name: str, broken: float) -> None:
    monkeypatch.setattr(optimizers, name, broken)
    with pytest.raises(AssertionError):
        parity.assert_trains_like(DdpApolloTwin, DDP)


@pytest.mark.parametrize("run", [DDP, LOCAL], ids=["ddp", "local-sgd"])
def test_a_restored_run_continues_bit_for_bit(run: Run) -> None:
    method, restored, forgetful = tiny.build(run), tiny.build(run), tiny.build(run)
    tiny.train(method, 0, 7)  # in the middle of a projection's steps
    saved = {name: tensor.clone() for name, tensor in method.state.state_dict().items()}
    restored.state.load_state_dict(saved)
    forgetful.state.load_state_dict({n: t * 0 if n.endswith(".norm") else t for n, t in saved.items()})
    unbroken, continued, without = (tiny.train(m, 7) for m in (method, restored, forgetful))
    assert torch.equal(unbroken.losses, continued.losses)
    assert all(torch.equal(weight, continued.weights[name]) for name, weight in unbroken.weights.items())
    assert not torch.equal(unbroken.losses, without.losses)


def state_elements(method: Method) -> int:
    """Return the elements of all moments and norms of one copy, without step counters."""
    return sum(t.numel() for state in method.stepper.state.values() for t in state.values() if t.ndim > 0)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_planned_state_is_the_kept_one_and_smaller_than_adams(rank: int | None) -> None:
    run = tiny.variant_run("ddp, apollo", 2, train={"apollo_rank": rank})
    method = tiny.build(run)
    method.step(*tiny.batches(run).batch(0, range(2)), 0)
    planned = persistent_state(run, run.shape())
    assert state_elements(method) == planned.moments
    (apollo,) = (optimizer for optimizer in method.stepper.optimizers if isinstance(optimizer, Apollo))
    assert sum(p.numel() for _, p in apollo.projections.values()) == planned.projections
    plain = tiny.ddp_run(2)
    assert planned.moments + planned.projections < persistent_state(plain, plain.shape()).moments


@pytest.mark.parametrize("shape", [(3, 64, 200), (3, 200, 64), (1, 96, 96)])
def test_working_memory_of_a_step_is_the_planned_one(shape: tuple[int, int, int]) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Apollo([{"params": [parameter]}])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # draws the projection, which stays
    one = shape[0] * projected_rank(None, *shape[1:]) * max(shape[1:]) * 8
    channels = shape[0] * max(shape[1:]) * 8  # two numbers a channel, which no plan counts
    assert one <= cpu_peak_bytes(optimizer.step) <= one + 3 * channels


def test_the_plan_counts_the_projected_gradient_of_the_largest_matrix() -> None:
    run = tiny.variant_run("ddp, apollo", 1, train={"apollo_rank": 3})
    assert largest_step_bytes(run, run.shape()) == 3 * 64 * 8
    assert largest_step_bytes(tiny.ddp_run(1), run.shape()) == 0


def test_projecting_is_counted() -> None:
    run, plain = tiny.variant_run("ddp, apollo", 2, train={"apollo_rank": 3}), tiny.ddp_run(2)
    shape = run.shape()
    assert update_flops(run, shape) - update_flops(plain, shape) == 2 * 3 * shape.adapted_parameters


@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        ("lte", {}, "train.optimizer = 'apollo' projects gradients of dense matrices, and method.name = 'lte'"),
        ("lora", {}, "trains adapters, with small moments already; try --set train.optimizer=adamw"),
        (
            "ddp",
            {"apollo_rank": 17},
            "train.apollo_rank = 17 exceeds the shorter side, 16, of .*; try --set train.apollo_r",
        ),
        (
            "ddp",
            {"dtype": "fp32", "optimizer_state": "8bit"},
            "train.optimizer = 'apollo' keeps few; try --set train.opt",
        ),
        ("ddp", {"apollo_rank": 0}, "apollo_rank"),
        ("ddp", {"apollo_scale": 0}, "apollo_scale"),
        ("ddp", {"apollo_refresh_every": 0}, "apollo_refresh_every"),
        ("sapipe", {}, "'apollo' cannot predict sapipe's weights"),
        ("local-sgd, moments", {}, "'apollo' has other moments than method.merge_optimizer = 'average' sends"),
    ],
)
def test_what_apollo_cannot_do_is_refused_with_a_move(name: str, train: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.variant_run(name, train={"optimizer": "apollo", **train})


@pytest.mark.parametrize("name", ["sapipe, delay", "diloco", "local-sgd, reset", "daso", "powersgd", "sparseloco"])
def test_dense_methods_train_with_it(name: str) -> None:
    run = tiny.variant_run(name, 2, {"layers": 1}, {"optimizer": "apollo", "steps": 8, "learning_rate": 0.01})
    assert tiny.train(tiny.build(run)).losses.isfinite().all()
