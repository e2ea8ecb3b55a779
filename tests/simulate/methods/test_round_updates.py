"""Changes of heads and devices: their mean is what a merge adds, for every plain way to merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import ReplicatedConv2d, ReplicatedEmbedding, ReplicatedLinear, replicate
from simulate.methods.base import Method
from simulate.methods.round_updates import DenseUpdates, LowRankUpdates, decompose, dense_updates
from tests import tiny

PLAIN = (
    "lte", "lte, auto", "lte, pruned", "lte, streaming", "lte, vector norms", "lte, vector norms, reset", "lte, frozen",
    "lte, frozen a",
    "local-sgd", "local-sgd, moments", "fedavg", "daso, waiting",
)  # fmt: skip
"""Variants whose merge adds the mean and nothing else: no outer optimizer, compressed wire or delayed mix."""


def diagnosed(method: Method, rounds_steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train to the merge after `rounds_steps`; return each layer's mean update before it, and the merged weights."""
    data = tiny.batches(method.run)
    last = {name: weight.clone() for name, weight in method.merged_state().items()}
    for step in range(rounds_steps):
        method.step(*data.batch(step, range(method.run.cluster.devices)), step)
        if method.merge_due(step) and step + 1 < rounds_steps:
            method.merge(step)
            last = {name: weight.clone() for name, weight in method.merged_state().items()}
    means = {u.name: u.mean() for u in method.updates(rounds_steps - 1)}
    method.merge(rounds_steps - 1)
    added = {name: weight - last[name] for name, weight in method.merged_state().items()}
    return means, added


@pytest.mark.parametrize("variant", PLAIN)
def test_the_mean_update_is_what_the_merge_adds(variant: str) -> None:
    run = tiny.variant_run(variant, train={"steps": 20, "learning_rate": 0.01})
    method = tiny.build(run)
    method.keep_merged()
    means, added = diagnosed(method, 8)
    compared = 0
    for name, mean in means.items():
        change = added[name if name in added else f"{name}.weight"]
        if change.any():  # streaming: layers of the other fragment wait for their turn
            torch.testing.assert_close(mean.view_as(change), change.double(), rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared >= (len(means) // 2 - 1 if run.method.merges_per_round > 1 else len(means))


def test_a_product_that_was_merged_before_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above notices it where it is."""

    def of(layer: LoraLinear) -> LowRankUpdates:
        return LowRankUpdates(layer.name, layer.b.detach() * layer.spec.scale, layer.a.detach())

    monkeypatch.setattr(LowRankUpdates, "of", of)
    with pytest.raises(AssertionError):
        test_the_mean_update_is_what_the_merge_adds("lte")


def test_shards_weigh_the_mean() -> None:
    run = tiny.variant_run("local-sgd", devices=2)
    weighted = run.model_copy(update={"data": run.data.model_copy(update={"shards": (3.0, 1.0)})})
    method = tiny.build(weighted)
    method.keep_merged()
    means, added = diagnosed(method, 4)
    for name, mean in means.items():
        torch.testing.assert_close(mean, added[name].view_as(mean), rtol=1e-9, atol=1e-12)


def test_a_device_that_sits_a_round_out_has_no_update() -> None:
    method = tiny.build(tiny.variant_run("fedavg", devices=4))
    method.keep_merged()
    assert {len(updates.devices) for updates in method.updates(0)} == {2}


def test_diloco_is_seen_before_its_outer_optimizer() -> None:
    method = tiny.build(tiny.variant_run("diloco"))
    method.keep_merged()
    start = {name: p[0].detach().clone() for name, p in method.parameters.items()}
    data = tiny.batches(method.run)
    for step in range(4):
        method.step(*data.batch(step, range(4)), step)
    for updates in method.updates(3):
        expected = (method.parameters[updates.name].mean(0) - start[updates.name]).detach()
        torch.testing.assert_close(updates.mean().view_as(expected), expected, rtol=1e-9, atol=1e-12)


def test_a_head_changed_by_its_product_less_the_merged_one() -> None:
    method = tiny.build(tiny.lte_run(devices=2, heads_per_device=2, merge_every=3))
    tiny.train(method, num_steps=5)  # two steps into the second round
    layer = next(module for module in method.model.modules() if hasattr(module, "a0"))
    updates = next(iter(method.updates(4)))
    assert (updates.heads, len(updates.devices)) == (4, 2)
    for head in range(4):
        expected = layer.spec.scale * (layer.b[head] @ layer.a[head] - layer.b0[head] @ layer.a0[head]).detach()
        torch.testing.assert_close(updates.change(head), expected, rtol=1e-9, atol=1e-12)
    halves = (updates.change(2) + updates.change(3)) / 2
    torch.testing.assert_close(updates.device_change(1), halves, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 5), st.integers(1, 3))
def test_factors_say_the_same_as_the_matrices_they_make(seed: int, outputs: int, inputs: int, rank: int) -> None:
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(3, outputs, rank, generator=random).double()
    right = torch.randn(3, rank, inputs, generator=random).double()
    low = LowRankUpdates("w", left, right)
    dense = DenseUpdates("w", left @ right, torch.zeros(outputs, inputs).double())
    torch.testing.assert_close(low.mean(), dense.mean())
    assert low.dot(0, 2) == pytest.approx(dense.dot(0, 2), rel=1e-9, abs=1e-12)
    ours, theirs = low.left_directions(1, 8), dense.left_directions(1, 8)
    assert ours.shape == theirs.shape == (outputs, min(outputs, inputs, rank))
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_the_decomposition_is_the_singular_one(seed: int, outputs: int, inputs: int) -> None:
    x = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).double()
    values, left, right = decompose(x, most=6)
    torch.testing.assert_close(values, torch.linalg.svdvals(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(left @ values.diag() @ right.T, x, rtol=0, atol=1e-6)
    for side in (left, right):
        torch.testing.assert_close(side.T @ side, torch.eye(len(values)).double(), rtol=0, atol=1e-6)


def test_zeros_have_no_directions() -> None:
    values, left, right = decompose(torch.zeros(3, 2).double(), most=2)
    assert (len(values), left.shape, right.shape) == (0, (3, 0), (2, 0))
    assert LowRankUpdates("w", torch.zeros(1, 3, 1), torch.ones(1, 1, 2)).left_directions(0, 2).shape == (3, 0)


def trained(*shape: int) -> Tensor:
    return replicate(nn.Parameter(torch.zeros(shape)), 2)


class Mixed(nn.Module):
    """A linear layer and a convolution of their own, a frozen one, and one that shares an embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        shared = trained(5, 3)
        self.own = ReplicatedLinear(trained(4, 3), trained(4))
        self.conv = ReplicatedConv2d(nn.Conv2d(3, 4, 2), trained(4, 3, 2, 2), None)
        self.frozen = ReplicatedLinear(replicate(torch.zeros(4, 3), 2), None)
        self.table, self.head = ReplicatedEmbedding(shared), ReplicatedLinear(shared, None)


def test_matrices_are_what_lora_would_adapt() -> None:
    model = Mixed()
    parameters = dict(model.named_parameters())
    last = {name: parameter[0].detach() for name, parameter in parameters.items()}
    updates = {u.name: u for u in dense_updates(model, parameters, last)}
    assert {name for name, u in updates.items() if u.is_matrix} == {"own.weight", "conv.weight"}
    assert updates["conv.weight"].mean().shape == (4, 12)
    assert updates["table.weight"].mean().shape == (5, 3)


@pytest.mark.parametrize("variant", ["lte, paced", "lte, paced, redrawn", "local-sgd, paced", "diloco, paced"])
def test_steps_taken_weigh_the_mean(variant: str) -> None:
    method = tiny.build(tiny.variant_run(variant, train={"steps": 20, "learning_rate": 0.01}))
    method.keep_merged()
    data, last = tiny.batches(method.run), {name: w.clone() for name, w in method.merged_state().items()}
    for step in range(4):
        method.step(*data.batch(step, range(4)), step)
    method.close_round(3)
    means = {u.name: u.over(method.rows()).mean() for u in method.updates(3)}
    method.merge(3)
    merged = method.merged_state()
    outer = 0.7 * 1.9 if variant.startswith("diloco") else 1.0  # η·(1 + μ), the first of Nesterov's steps
    for name, mean in means.items():
        key = name if name in merged else f"{name}.weight"
        added = merged[key] - last[key]
        torch.testing.assert_close(outer * mean.view_as(added), added, rtol=1e-9, atol=1e-12)
