"""Dense data parallelism against its slow twin, and against one device that gets everyone's batch."""

from __future__ import annotations

import pytest
import torch

from simulate.methods.build_network import build_model
from simulate.methods.loss import Loss
from tests import tiny
from tests.reference.ddp import DdpTwin

TRAIN = {"steps": 19, "warmup_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.4}


@pytest.fixture(scope="module")
def slow() -> tiny.History:
    run = tiny.ddp_run(devices=3, train=TRAIN)
    twin, data = DdpTwin(run, build_model(run)), tiny.batches(run)
    losses = [twin.step(*data.batch(step, range(3)), step) for step in range(run.train.steps)]
    return tiny.History(torch.stack(losses), twin.merged_state())


def test_ddp_trains_like_the_twin(slow: tiny.History) -> None:
    fast = tiny.train(tiny.build(tiny.ddp_run(devices=3, train=TRAIN)))
    tiny.assert_parity(fast, slow)


GROUP_LOSSES = Loss.group_losses


def test_parity_detects_a_sum_of_gradients(slow: tiny.History, monkeypatch: pytest.MonkeyPatch) -> None:
    def summed(loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, groups: int) -> torch.Tensor:
        return GROUP_LOSSES(loss, inputs, targets, groups) * groups

    monkeypatch.setattr(Loss, "group_losses", summed)
    fast = tiny.train(tiny.build(tiny.ddp_run(devices=3, train=TRAIN)))
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast, slow)


def test_n_devices_train_like_one_on_their_joined_batch() -> None:
    many = tiny.ddp_run(devices=4, train={"steps": 20})
    one = tiny.ddp_run(devices=1, train={"steps": 20, "micro_batch": 8})
    together, alone, data = tiny.build(many), tiny.build(one), tiny.batches(many)
    for step in range(20):
        inputs, targets = data.batch(step, range(4))
        losses_N = together.step(inputs, targets, step)
        torch.testing.assert_close(losses_N.mean(), alone.step(inputs, targets, step)[0], rtol=1e-11, atol=0)
    for name, weight in together.merged_state().items():
        torch.testing.assert_close(weight, alone.merged_state()[name], rtol=1e-9, atol=1e-12)


def test_every_step_is_a_round_of_its_own() -> None:
    method = tiny.build(tiny.ddp_run())
    assert all(method.merge_due(step) for step in range(5))


def test_local_devices_share_one_copy_of_the_weights() -> None:
    method = tiny.build(tiny.ddp_run(devices=5))
    assert all(parameter.shape[0] == 1 for parameter in method.model.parameters())


def test_a_restored_method_continues_bit_for_bit() -> None:
    run = tiny.ddp_run(devices=2)
    method, restored = tiny.build(run), tiny.build(run)
    tiny.train(method, 0, 5)
    restored.state.load_state_dict({name: tensor.clone() for name, tensor in method.state.state_dict().items()})
    unbroken, continued = tiny.train(method, 5), tiny.train(restored, 5)
    assert torch.equal(unbroken.losses, continued.losses)
    assert all(
        torch.equal(tensor, restored.state.state_dict()[name]) for name, tensor in method.state.state_dict().items()
    )
