"""AdaMix against its slow twin, by hand, and how it draws."""

from __future__ import annotations

import pytest
import torch

from simulate.methods.adamix.train import MixtureLinear
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.loss import Loss
from tests import tiny
from tests.reference.adamix import AdamixTwin
from tests.simulate.methods.adapter_parity import assert_trains_like, on_layer, parity_run, summed_losses


def mixtures(method: Method) -> list[MixtureLinear]:
    return [module for module in method.model.modules() if isinstance(module, MixtureLinear)]


def test_adamix_trains_like_the_twin() -> None:
    assert_trains_like(AdamixTwin, parity_run("adamix"))


def fixed_route(layer: MixtureLinear, step: int) -> None:
    """Use the first pair always."""


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(Loss, "group_losses", summed_losses, id="sum of gradients"),
        pytest.param(MixtureLinear, "route", fixed_route, id="one route"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: object
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(AdamixTwin, parity_run("adamix"))


def test_two_experts_merge_into_the_product_of_their_means() -> None:
    run = tiny.variant_run("adamix")
    run = run.model_copy(update={"method": run.method.model_copy(update={"rank": 1, "experts": 2})})  # s = 4/1
    method = on_layer(run)
    (layer,) = mixtures(method)
    with torch.no_grad():
        for factors, values in ((layer.all_a, [[[1.0, 0.0]], [[0.0, 1.0]]]), (layer.all_b, [[[1], [2]], [[3], [0]]])):
            for factor, value in zip(factors, values, strict=True):
                factor.copy_(torch.tensor([value]))
    # Means (2, 1) and (0.5, 0.5): I + 4·[[1, 1], [0.5, 0.5]]
    assert method.merged_state()["0.weight"].tolist() == [[5, 4], [2, 3]]
    # A of the first expert, B of the second: I + 4·[[3, 0], [0, 0]]
    layer.chosen = (0, 1)
    assert layer(torch.tensor([[1.0, 2.0]], dtype=torch.float64)).tolist() == [[13, 2]]


def test_only_the_chosen_pair_moves_even_where_weights_decay() -> None:
    method = tiny.build(tiny.variant_run("adamix", train={"weight_decay": 0.1}))
    before = [[p.detach().clone() for p in layer.factors()] for layer in mixtures(method)]
    tiny.train(method, 0, 1)
    for layer, old in zip(mixtures(method), before, strict=True):
        moved = [not torch.equal(p, q) for p, q in zip(layer.factors(), old, strict=True)]
        i, j = layer.chosen
        assert [index for index, flag in enumerate(moved) if flag] == [i, 3 + j]


def test_routes_are_addressed_by_layer_and_step() -> None:
    one, other = (tiny.build(tiny.variant_run("adamix", devices)) for devices in (1, 4))
    drawn = []
    for step in range(60):
        for method in (one, other):
            for layer in mixtures(method):
                layer.route(step)
        assert [x.chosen for x in mixtures(one)] == [x.chosen for x in mixtures(other)]
        drawn.append([x.chosen for x in mixtures(one)])
    assert {pair for routes in drawn for pair in routes} == {(i, j) for i in range(3) for j in range(3)}
    assert any(len(set(routes)) > 1 for routes in drawn)


def test_all_a_start_from_one_draw() -> None:
    for layer in mixtures(tiny.build(tiny.variant_run("adamix"))):
        assert all(torch.equal(a, layer.all_a[0]) for a in layer.all_a)
        assert not any(b.any() for b in layer.all_b)


def test_the_merged_model_is_a_plain_one() -> None:
    run = tiny.variant_run("adamix")
    build_model(run).load_state_dict(tiny.build(run).merged_state())
