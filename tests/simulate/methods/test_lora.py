"""LoRA under data parallelism against its slow twin, and against one device that gets everyone's batch."""

from __future__ import annotations

import pytest
import torch

from simulate.layers.lora import lora_layers
from simulate.methods.loss import Loss
from tests import tiny
from tests.reference.lora import LoraTwin
from tests.simulate.methods.adapter_parity import assert_trains_like, on_layer, parity_run, summed_losses, twin_of

pytestmark = pytest.mark.numeric


def test_lora_trains_like_the_twin() -> None:
    assert_trains_like(LoraTwin, parity_run("lora"))


def test_parity_covers_clipped_and_unclipped_steps_and_a_model_that_learns() -> None:
    twin, history = twin_of(LoraTwin, parity_run("lora"))
    assert isinstance(twin, LoraTwin)
    assert 0.1 < sum(twin.clipped) / len(twin.clipped) < 0.9
    assert history.losses[-5:].mean() < 0.8 * history.losses[0].mean()


def test_parity_detects_a_sum_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loss, "group_losses", summed_losses)
    with pytest.raises(AssertionError):
        assert_trains_like(LoraTwin, parity_run("lora"))


def test_n_devices_train_like_one_on_their_joined_batch() -> None:
    many, one = tiny.variant_run("lora", 4), tiny.variant_run("lora", 1, train={"micro_batch": 8})
    together, alone, data = tiny.build(many), tiny.build(one), tiny.batches(many)
    for step in range(10):
        inputs, targets = data.batch(step, range(4))
        losses_N = together.step(inputs, targets, step)
        torch.testing.assert_close(losses_N.mean(), alone.step(inputs, targets, step)[0], rtol=1e-11, atol=0)
    for name, weight in together.merged_state().items():
        torch.testing.assert_close(weight, alone.merged_state()[name], rtol=1e-9, atol=1e-12)


def test_the_merged_weight_is_w_plus_the_scaled_product() -> None:
    method = on_layer(tiny.variant_run("lora"))  # rank 2, s = 2
    (layer,) = lora_layers(method.model)
    with torch.no_grad():
        layer.a.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        layer.b.copy_(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    assert method.merged_state()["0.weight"].tolist() == [[3, 4], [6, 9]]  # I + 2·[[1, 2], [3, 4]]


def test_frozen_weights_never_change() -> None:
    method = tiny.build(tiny.variant_run("lora"))
    before = [layer.weight.clone() for layer in lora_layers(method.model)]
    tiny.train(method)
    assert all(torch.equal(w, layer.weight) for w, layer in zip(before, lora_layers(method.model), strict=True))
