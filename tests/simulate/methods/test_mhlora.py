"""Multi-head LoRA against its slow twin, by hand, and in the case where it is plain LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simulate.config.run import Run
from simulate.layers.lora import LoraLinear, lora_layers
from simulate.methods.loss import Loss
from tests import tiny
from tests.reference.mhlora import MhloraTwin
from tests.simulate.methods.adapter_parity import assert_trains_like, on_layer, parity_run, summed_losses, twin_of


def four_heads() -> Run:
    return parity_run("mhlora", devices=2, heads_per_device=2)


def test_mhlora_trains_like_the_twin() -> None:
    assert_trains_like(MhloraTwin, four_heads())


def same_for_all(layer: LoraLinear, merges: int) -> Tensor:
    drawn_1XI, rank = ORIGINAL_DRAW(layer, merges), layer.spec.rank
    return drawn_1XI[:, :rank].repeat(1, drawn_1XI.shape[1] // rank, 1)


ORIGINAL_DRAW = LoraLinear.draw_a


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(Loss, "group_losses", summed_losses, id="sum of gradients"),
        pytest.param(LoraLinear, "draw_a", same_for_all, id="heads that share a draw"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: object
) -> None:
    twin_of(MhloraTwin, four_heads())  # the twin's draws stay as they are
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(MhloraTwin, four_heads())


def test_the_effective_weight_of_two_heads_has_the_mean_of_their_products() -> None:
    run = tiny.variant_run("mhlora", 1)
    run = run.model_copy(update={"method": run.method.model_copy(update={"rank": 1, "heads_per_device": 2})})
    method = on_layer(run)  # s = 4/1, s/H = 2
    (layer,) = lora_layers(method.model)
    with torch.no_grad():
        layer.a.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))  # A of head 0 and of head 1, one row each
        layer.b.copy_(torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]))  # B of head 0 and of head 1, one column each
    # Products [[1, 0], [2, 0]] and [[0, 3], [0, 0]]: I + 2·[[1, 3], [2, 0]]
    assert method.merged_state()["0.weight"].tolist() == [[3, 6], [4, 1]]
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert layer(x).tolist() == [[15, 6]]


def test_one_device_with_one_head_is_plain_lora() -> None:
    train = {"steps": 20, "clip_norm": 1.4, "weight_decay": 0.1}
    alone = tiny.variant_run("mhlora", 1, train=train)
    alone = alone.model_copy(update={"method": alone.method.model_copy(update={"heads_per_device": 1})})
    many_headed, plain = tiny.train(tiny.build(alone)), tiny.train(tiny.build(tiny.variant_run("lora", 1, train=train)))
    assert torch.equal(many_headed.losses, plain.losses)
    assert all(torch.equal(weight, plain.weights[name]) for name, weight in many_headed.weights.items())


def test_every_device_holds_every_head() -> None:
    method = tiny.build(tiny.variant_run("mhlora", 3))  # two heads a device, rank 2
    for layer in lora_layers(method.model):
        assert layer.a.shape[:2] == (1, 3 * 2 * 2)
        heads_HRI = layer.a[0].detach().view(6, 2, -1)
        assert not any(torch.equal(heads_HRI[0], heads_HRI[h]) for h in range(1, 6))
