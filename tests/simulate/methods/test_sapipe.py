"""SAPipe against its slow twin, and two stale steps by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.base import Method
from simulate.methods.sapipe.train import Sapipe
from tests.reference.sapipe import SapipeTwin
from tests.simulate.methods.parity import assert_trains_like, hand_run, of_linear, parity_run, set_copies

RUNS: dict[str, Run] = {
    "prediction": parity_run("sapipe"),
    "delay": parity_run("sapipe, delay"),
    "none": parity_run("sapipe, none"),
    "prediction, alone": parity_run("sapipe", devices=1),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_every_compensation_trains_like_the_twin(name: str) -> None:
    assert_trains_like(SapipeTwin, RUNS[name])


ORIGINAL_PREDICT, ORIGINAL_CHANGE = Sapipe._predict, Sapipe._adam_change


def predicted_with_the_mean(method: Sapipe, own: dict[str, Tensor], step: int) -> None:
    shared = {name: gradient.mean(0, keepdim=True).expand_as(gradient).clone() for name, gradient in own.items()}
    ORIGINAL_PREDICT(method, shared, step)


def not_predicted(method: Sapipe, own: dict[str, Tensor], step: int) -> None:
    with torch.no_grad():
        for name, leaf in method.leaves.items():
            leaf.copy_(method.parameters[name].expand_as(leaf))


def without_decay(
    method: Sapipe, parameter: nn.Parameter, gradient: Tensor, taken: int, rate: float, decay: float
) -> Tensor:
    return ORIGINAL_CHANGE(method, parameter, gradient, taken, rate, 0.0)


def uncorrected(method: Sapipe) -> None:
    for name, parameter in method.parameters.items():
        parameter.grad = method.stale[name] / method.communicator.num_devices


@pytest.mark.parametrize(
    ("name", "attribute", "broken"),
    [
        pytest.param("prediction", "_predict", predicted_with_the_mean, id="predicted with everyone's gradient"),
        pytest.param("prediction", "_predict", not_predicted, id="not predicted"),
        pytest.param("prediction", "_adam_change", without_decay, id="predicted without decay"),
        pytest.param("delay", "average_gradients", uncorrected, id="stale gradients not corrected"),
    ],
)
def test_parity_detects_a_broken_compensation(
    monkeypatch: pytest.MonkeyPatch, name: str, attribute: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(Sapipe, attribute, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(SapipeTwin, RUNS[name])


def two_classes(method: Method, step: int, *classes: int) -> Tensor:
    """Take a step with the input 1 on every device: its logits are the two weights, its target is given."""
    return method.step(torch.ones(len(classes), 1, dtype=torch.float64), torch.tensor(classes), step)


def test_gradients_arrive_one_step_late_by_hand() -> None:
    method, weight = of_linear(hand_run("sapipe, none"), outputs=2)
    assert two_classes(method, 0, 0, 0).tolist() == pytest.approx([math.log(2)] * 2)
    assert weight.flatten().tolist() == [0.0, 0.0]
    # Step 1 still sees zeros; then Adam's first step, by the rate of 0.5, with step 0's gradient (−0.5, 0.5).
    assert two_classes(method, 1, 0, 0).tolist() == pytest.approx([math.log(2)] * 2)
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.5, -0.5]).double(), rtol=1e-6, atol=0)


def test_devices_predict_with_their_own_gradient_by_hand() -> None:
    method, weight = of_linear(hand_run("sapipe"), outputs=2)
    two_classes(method, 0, 0, 1)
    # Device 0 sees (0.5, −0.5) and device 1 (−0.5, 0.5): each one's loss is log(1 + e⁻¹), the other's way log(1 + e).
    assert two_classes(method, 1, 0, 0).tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.e)])
    # Their gradients of step 0 were opposite: the shared weights have not moved.
    torch.testing.assert_close(weight.flatten(), torch.zeros(2).double(), rtol=0, atol=1e-12)


def test_delay_compensation_by_hand() -> None:
    method, weight = of_linear(hand_run("sapipe, delay"))
    assert isinstance(method, Sapipe)
    set_copies(weight, 1.5)
    method.previous["0.weight"].fill_(1.0)
    method.stale["0.weight"].fill_(4.0)  # of two devices: G = 2
    with torch.no_grad():
        method.average_gradients()
    # G + λ·G·G·(w_t − w_{t−1}) = 2 + 0.2·4·0.5
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(2.4, rel=1e-14)
    assert method.previous["0.weight"].item() == 1.5


def test_the_shared_weights_are_the_model_not_anyones_prediction() -> None:
    method, _ = of_linear(hand_run("sapipe"), outputs=2)
    two_classes(method, 0, 0, 1)
    (merged,) = method.merged_state().values()
    assert merged.flatten().tolist() == [0.0, 0.0]
