"""Tests of Muon: singular values, steps by hand, the parameters that it steps, and whole runs against twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.config.run import Run
from simulate.costs.buffers import _iterates
from simulate.costs.flops import _orthogonalising
from simulate.layers.lora import lora_layers
from simulate.methods.base import Method
from simulate.methods.lora.train import muon_factor
from simulate.methods.registry import build_method
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.optim import muon as optimizers
from simulate.optim.muon import Muon, orthogonalise
from tests import tiny
from tests.reference.muon import DdpMuonTwin, LteMuonTwin, MuonAndAdam, newton_schulz, polynomial
from tests.simulate.methods import adapter_parity, parity

pytestmark = pytest.mark.numeric

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (8, 8), "column": (6, 1), "row": (1, 6)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_range(values: Tensor) -> bool:
    """Whether singular values are between about 0.7 and 1.2: from 1 on down, the extremes are 0.6818 and 1.2024."""
    return bool((values > 0.681).all() and (values < 1.203).all())


def assert_orthogonalised(got: Tensor, matrix: Tensor) -> None:
    """Compare a result with U·p(S)·Vᵀ, singular values divided by their root sum of squares."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.tensor([polynomial(v) for v in (s / s.norm()).tolist()], dtype=torch.float64)
    torch.testing.assert_close(got, u @ values.diag() @ vt, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_singular_values_end_about_one_and_directions_stay(shape: tuple[int, int], seed: int) -> None:
    matrices = 10.0**seed * drawn(3, *shape, seed=seed)
    results = orthogonalise(matrices)
    for result, matrix in zip(results, matrices, strict=True):
        values = torch.linalg.svdvals(result)
        assert in_range(values)
        assert_orthogonalised(result, matrix)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_what_a_matrix_lacks_in_rank_stays_away(shape: tuple[int, int]) -> None:
    matrix = drawn(shape[0], 2) @ drawn(2, shape[1], seed=1)
    (result,) = orthogonalise(matrix.unsqueeze(0))
    values = torch.linalg.svdvals(result)
    assert in_range(values[:2]) and (values[2:] < 1e-10).all()
    u, _, vt = torch.linalg.svd(matrix)
    directions = u[:, :2] @ vt[:2]  # U·Vᵀ of what is there: singular values of about one keep it near
    assert torch.linalg.matrix_norm(result - directions, 2) < 0.33


def test_the_range_holds_for_all_singular_values_that_are_not_tiny_beside_the_rest() -> None:
    values = [polynomial(10 ** (-k / 400)) for k in range(1064)]  # from 1 to 0.0022
    assert in_range(torch.tensor(values))
    assert polynomial(0.0005) < 0.3  # five iterations multiply by 485 at most


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (16, 8), (20, 8), (24, 16), (24, 13), (16, 16)])
def test_operations_and_memory_of_the_iterations_are_the_planned_ones(shape: tuple[int, int]) -> None:
    matrices = drawn(3, *shape)
    with FlopCounterMode(display=False) as counter:
        orthogonalise(matrices)
    assert counter.get_total_flops() == 3 * _orthogonalising(*shape)
    # As a step holds it: the gradient that is looked ahead with is made for the iterations alone.
    peak = cpu_peak_bytes(lambda: orthogonalise(matrices.lerp(matrices, 0.5)))
    assert peak == pytest.approx(3 * _iterates(*shape) * 8, rel=0.03)


def test_a_zero_matrix_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_matrices_in_one_tensor_are_treated_one_by_one(shape: tuple[int, int]) -> None:
    matrices = drawn(4, *shape) * torch.tensor([1.0, 1e-6, 1e6, 0.0]).view(4, 1, 1)
    together = orthogonalise(matrices)
    for index in range(4):
        torch.testing.assert_close(together[index], newton_schulz(matrices[index]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together[index], orthogonalise(matrices[index : index + 1])[0])


def stepped(start: list[list[float]], *gradients: list[list[float]], **settings: float) -> Tensor:
    """Return a matrix after a Muon step with each of the gradients at a rate of 0.5."""
    parameter = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = Muon([parameter], lr=0.5, **settings)
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return parameter.detach()[0]


# p⁵(1) = 0.696436, p⁵(0.6) = 0.722876, p⁵(0.8) = 1.119204 of the quintic p, worked out with a calculator.
ONE, SIX_TENTHS, EIGHT_TENTHS = 0.696436, 0.722876, 1.119204


def test_the_iterated_polynomial_by_hand() -> None:
    assert [polynomial(v) for v in (1, 0.6, 0.8)] == pytest.approx([ONE, SIX_TENTHS, EIGHT_TENTHS], abs=1e-6)


@pytest.mark.parametrize("gradient", [3.0, 1e-5, -7.0])
def test_a_step_of_a_number_by_hand(gradient: float) -> None:
    # Any number is 1 or −1 times its norm; the rate times 0.2·sqrt(1) is 0.1.
    expected = 2 - math.copysign(0.1 * ONE, gradient)
    assert stepped([[2.0]], [[gradient]]).item() == pytest.approx(expected, abs=1e-6)


def test_a_step_of_a_diagonal_matrix_by_hand() -> None:
    # (3, 4) has the norm 5; the rate times 0.2·sqrt(2) is 0.1·sqrt(2).
    size = 0.1 * math.sqrt(2)
    expected = torch.tensor([[-size * SIX_TENTHS, 0.0], [0.0, -size * EIGHT_TENTHS]], dtype=torch.float64)
    torch.testing.assert_close(stepped([[0.0, 0.0]] * 2, [[3.0, 0.0], [0.0, 4.0]]), expected, rtol=0, atol=1e-6)


def test_steps_grow_with_the_root_of_the_longer_side() -> None:
    for rows, columns in ((1, 4), (4, 1)):
        parameter = nn.Parameter(torch.zeros(1, rows, columns, dtype=torch.float64))
        parameter.grad = torch.ones_like(parameter)
        Muon([parameter], lr=0.5).step()
        # One singular value, of ones/2: each number is half of it; 0.5·0.2·sqrt(4).
        torch.testing.assert_close(parameter.detach(), -0.2 * ONE / 2 * parameter.grad, rtol=0, atol=1e-6)


def test_weight_decay_does_not_pass_through_the_orthogonalisation() -> None:
    # 2·(1 − 0.5·0.4) = 1.6, whatever the gradient; then the step.
    assert stepped([[2.0]], [[0.0]], weight_decay=0.4).item() == pytest.approx(1.6)
    assert stepped([[2.0]], [[3.0]], weight_decay=0.4).item() == pytest.approx(1.6 - 0.1 * ONE, abs=1e-6)


@pytest.mark.parametrize(
    ("momentum", "second", "sign"),
    [
        # M = 0.05·3 = 0.15, then 0.95·0.15 − 0.05·1 = 0.0925, and with Nesterov's look ahead 0.0379: still downhill.
        (0.95, -1.0, 1),
        # M = 0.0425 after −2 would still be positive; looking ahead it is 0.95·0.0425 − 0.05·2 = −0.0596.
        (0.95, -2.0, -1),
        (0.0, -1.0, -1),
    ],
)
def test_momentum_looks_ahead(momentum: float, second: float, sign: int) -> None:
    one, two = stepped([[0.0]], [[3.0]], momentum=momentum), stepped([[0.0]], [[3.0]], [[second]], momentum=momentum)
    assert (two - one).item() == pytest.approx(-sign * 0.1 * ONE, abs=1e-6)


def test_a_parameter_without_gradient_rests() -> None:
    parameter = nn.Parameter(torch.ones(1, 2, 2))
    optimizer = Muon([parameter], weight_decay=0.5)
    optimizer.step()
    assert parameter.eq(1).all() and not optimizer.state


DDP = tiny.variant_run("ddp, muon", 2, {"layers": 1}, parity.TRAIN)
LTE = tiny.variant_run("lte, muon", 2, {"layers": 1}, adapter_parity.TRAIN)  # two heads a device, a merge every 4 steps


def test_dense_training_with_muon_is_that_of_the_twin() -> None:
    parity.assert_trains_like(DdpMuonTwin, DDP)


def test_lte_with_muon_is_that_of_the_twin() -> None:
    adapter_parity.assert_trains_like(LteMuonTwin, LTE)


def all_heads_in_one(g_CMN: Tensor) -> Tensor:
    """Orthogonalise copies side by side as one matrix: the error that a test must detect."""
    flat = g_CMN.flatten(0, 1).unsqueeze(0)
    return ORTHOGONALISE(flat).view(g_CMN.shape)


ORTHOGONALISE = orthogonalise


@pytest.mark.parametrize(
    ("name", "broken"),
    [("orthogonalise", all_heads_in_one), ("ADAM_ROOT_MEAN_SQUARE", 0.21), ("COEFFICIENTS", (3.4445, -4.775, 2.03))],
)
def test_parity_detects_a_broken_muon(monkeypatch: pytest.MonkeyPatch, name: str, broken: object) -> None:
    monkeypatch.setattr(optimizers, name, broken)
    with pytest.raises(AssertionError):
        adapter_parity.assert_trains_like(LteMuonTwin, LTE)


def test_the_twin_decays_and_remembers() -> None:
    parameter = nn.Parameter(torch.tensor([[2.0]]))
    train = DDP.train.model_copy(update={"weight_decay": 0.4})
    vector = nn.Parameter(torch.tensor([2.0]))
    optimizer = MuonAndAdam(train, [([parameter, vector], 0.5)], [parameter])
    parameter.grad, vector.grad = torch.tensor([[3.0]]), torch.tensor([3.0])
    optimizer.step()
    assert parameter.item() == pytest.approx(1.6 - 0.1 * ONE, abs=1e-6)
    assert optimizer.momentum[id(parameter)].item() == pytest.approx(0.15)
    assert vector.item() == pytest.approx(1.5)  # Adam's first step is as long as the rate


@pytest.mark.parametrize("run", [DDP, LTE], ids=["ddp", "lte"])
def test_a_restored_run_continues_bit_for_bit(run: Run) -> None:
    run = run.model_copy(update={"train": run.train.model_copy(update={"steps": 12})})
    method, restored, forgetful = tiny.build(run), tiny.build(run), tiny.build(run)
    tiny.train(method, 0, 6)
    saved = {name: tensor.clone() for name, tensor in method.state.state_dict().items()}
    restored.state.load_state_dict(saved)
    forgetful.state.load_state_dict({name: tensor for name, tensor in saved.items() if not name.endswith(".momentum")})
    unbroken, continued, without = (tiny.train(m, 6) for m in (method, restored, forgetful))
    assert torch.equal(unbroken.losses, continued.losses) and not torch.equal(unbroken.losses, without.losses)
    assert all(torch.equal(weight, continued.weights[name]) for name, weight in unbroken.weights.items())


def moments(method: Method) -> dict[str, set[str]]:
    """Return the optimizers' state of each parameter, by name."""
    return {name: set(method.stepper.state[parameter]) for name, parameter in method.parameters.items()}


@pytest.mark.parametrize("run", [DDP, LTE], ids=["ddp", "lte"])
def test_muon_steps_matrices_of_linear_layers_and_factors_alone(run: Run) -> None:
    method = tiny.build(run)
    method.step(*tiny.batches(run).batch(0, range(2)), 0)
    layers = [f"blocks.0.{name}" for name in ("attention.qkv", "attention.project", "mlp.up", "mlp.down")]
    keys = ("a", "b") if lora_layers(method.model) else ("weight",)
    expected = {f"{layer}.{key}" for layer in layers for key in keys}
    kept = moments(method)
    assert {name for name, keys in kept.items() if keys == {"momentum"}} == expected
    others = {name for name, keys in kept.items() if keys == {"step", "exp_avg", "exp_avg_sq"}}
    assert others == kept.keys() - expected
    assert {"token.weight", "position.weight", "norm.weight", "blocks.0.mlp.up.bias"} <= others


class Tied(nn.Module):
    """Network whose head precedes the embedding that shares its weight, with one more linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.token = nn.Embedding(6, 4)
        self.token.weight = self.head.weight
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.token(tokens)))


@pytest.mark.parametrize("name", ["ddp, muon", "diloco, muon", "lte, muon"])
def test_a_tied_head_is_not_stepped_by_muon_though_it_comes_first(name: str) -> None:
    method = build_method(tiny.variant_run(name, 2), VirtualCommunicator(2), tiny.CPU, Tied().double())
    assert method.stepper.muon is not None
    stepped_by_muon = {id(p) for group in method.stepper.muon.param_groups for p in group["params"]}
    names = {name for name, parameter in method.parameters.items() if id(parameter) in stepped_by_muon}
    assert names == ({"inner.a", "inner.b"} if name.startswith("lte") else {"inner.weight"})


def test_muon_may_step_everything() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    method = build_method(tiny.variant_run("ddp, muon", 2), VirtualCommunicator(2), tiny.CPU, network)
    start = method.parameters["0.weight"].detach().clone()
    method.step(drawn(4, 2), torch.tensor([0, 1, 1, 0]), 0)
    assert moments(method) == {"0.weight": {"momentum"}}
    assert not torch.equal(method.parameters["0.weight"], start)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}])
def test_without_muon_adam_steps_everything(settings: dict[str, Any]) -> None:
    method = tiny.build(tiny.ddp_run(train=settings))
    assert method.stepper.muon is None
    assert sum(len(group["params"]) for group in method.stepper.groups) == len(method.parameters)


def test_the_schedule_and_the_adapters_rate_reach_muon() -> None:
    run = tiny.variant_run("lte, muon", 2, train={"steps": 20, "warmup_steps": 4, "learning_rate": 0.01})
    method = tiny.build(run)
    assert method.stepper.muon is not None
    assert method.stepper.muon.defaults["momentum"] == run.train.muon_momentum == 0.95
    method.step(*tiny.batches(run).batch(0, range(2)), 0)
    # A quarter of the warm-up; adapters of rank 2 at 3·sqrt(2/32)·0.01/s with s = 2.
    assert [group["lr"] for group in method.stepper.muon.param_groups] == pytest.approx([0.015 / 4 / 4])
    assert [group["lr"] for group in method.stepper.adam.param_groups] == pytest.approx([0.01 / 4] * 2)


def test_low_ranks_learn_slower_with_muon() -> None:
    assert [muon_factor(rank) for rank in (2, 8, 32, 64)] == pytest.approx([0.75, 1.5, 3, 3])


MUON = {"optimizer": "muon"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sapipe", "cannot predict sapipe's weights, which is done with Adam's moments; try --set"),
        ("local-sgd, moments", "has other moments than method.merge_optimizer = 'average' sends; try --set"),
    ],
)
def test_what_needs_adams_moments_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"train.optimizer = 'muon' {message} train.optimizer=adamw"):
        tiny.variant_run(name, train=MUON)


@pytest.mark.parametrize("name", ["sapipe, none", "sapipe, delay", "local-sgd", "local-sgd, reset"])
def test_what_does_not_need_adams_moments_trains_with_muon(name: str) -> None:
    run = tiny.variant_run(name, 2, {"layers": 1}, {**MUON, "steps": 4, "learning_rate": 0.01})
    history = tiny.train(tiny.build(run))
    assert history.losses.isfinite().all()
