"""Local SGD and FedAvg against their slow twin, and a FedAvg round by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.comm.compression import CompressedMean
from simulate.config.run import Run
from simulate.methods.averaging import Averaging
from simulate.methods.local_sgd import train as local_sgd
from simulate.methods.local_sgd.train import LocalSgd, participants
from tests import tiny
from tests.reference.local_sgd import LocalSgdTwin
from tests.selection import others_slow
from tests.simulate.methods.parity import assert_trains_like, hand_run, of_linear, parity_run, set_copies, twin_of

EVERY: dict[str, Any] = {"merge_every": 5}
SHARDS = (1.0, 2.0, 3.0, 4.0)
RUNS: dict[str, Run] = {
    "plain": parity_run("local-sgd", **EVERY),
    "shards": parity_run("local-sgd", shards=SHARDS[:3], **EVERY),
    "server": parity_run("local-sgd", merge_transport="server", **EVERY),
    "moments": parity_run("local-sgd, moments", shards=SHARDS[:3], **EVERY),
    "reset": parity_run("local-sgd, reset", **EVERY),
    "int4": parity_run("local-sgd, int4", **EVERY),
    "int2": parity_run("local-sgd, int2", **EVERY),
    "int4, shards": parity_run("local-sgd, int4", shards=SHARDS[:3], **EVERY),
    "fedavg": parity_run("fedavg", devices=4, **EVERY),
    "fedavg, shards": parity_run("fedavg", devices=4, shards=SHARDS, **EVERY),
}


@pytest.mark.parametrize("name", others_slow(RUNS, ["shards", "moments", "reset", "int4, shards", "fedavg, shards"]))
def test_every_merge_trains_like_the_twin(name: str) -> None:
    assert_trains_like(LocalSgdTwin, RUNS[name])


def test_parity_covers_clipped_and_unclipped_steps_of_a_model_that_learns() -> None:
    twin, history = twin_of(LocalSgdTwin, RUNS["plain"])
    clipped = [flag for device in twin.devices for flag in device.clipped]
    assert 0.1 < sum(clipped) / len(clipped) < 0.9
    assert history.losses[-5:].mean() < 0.6 * history.losses[0].mean()


def without_moments(method: LocalSgd, weights_N: Tensor | None) -> None:
    method.averaging.merge(0, weights_N)


def shares_of_all_shards(method: LocalSgd, step: int) -> Tensor:
    """Algorithm 1 before its erratum: the participants' shares do not add up to 1."""
    weights = torch.zeros(4, dtype=torch.float64)
    weights[method.active(step)] = torch.tensor(SHARDS, dtype=torch.float64)[method.active(step)] / sum(SHARDS)
    return weights


def equal_shares(method: LocalSgd, step: int) -> Tensor | None:
    return None


ORIGINAL_MEAN = CompressedMean.mean


def without_sent_errors(compressed: CompressedMean, x_LX: Tensor) -> Tensor:
    result = ORIGINAL_MEAN(compressed, x_LX)
    compressed.sent_error_LX.zero_()
    return result


def without_mean_errors(compressed: CompressedMean, x_LX: Tensor) -> Tensor:
    result = ORIGINAL_MEAN(compressed, x_LX)
    compressed.mean_error_LC.zero_()
    return result


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        pytest.param("plain", Averaging, "merge", lambda averaging, index, weights: None, id="never averaged"),
        pytest.param("shards", LocalSgd, "merge_weights", equal_shares, id="shards count alike"),
        pytest.param("moments", LocalSgd, "_average_with_moments", without_moments, id="moments not averaged"),
        pytest.param("reset", local_sgd, "forget_moments", lambda *_: None, id="moments kept"),
        pytest.param("int4", CompressedMean, "mean", without_sent_errors, id="what was not sent is forgotten"),
        pytest.param("int4", CompressedMean, "mean", without_mean_errors, id="the mean's error is forgotten"),
        pytest.param("fedavg", local_sgd, "participants", lambda run, k, _: list(range(k)), id="always the same"),
        pytest.param("fedavg, shards", LocalSgd, "merge_weights", shares_of_all_shards, id="before the erratum"),
    ],
)
def test_parity_detects_a_broken_merge(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: object, attribute: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(LocalSgdTwin, RUNS[name])


def test_a_fedavg_round_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_sgd, "participants", lambda run, count, round_index: [1, 3])
    method, weight = of_linear(hand_run("fedavg", devices=4, shards=SHARDS))
    set_copies(weight, 10.0, 20.0, 30.0, 40.0)
    method.merge(3)
    # Devices 1 and 3 hold shards of 2 and 4: (2·20 + 4·40)/(2 + 4) = 200/6, not 200/10 as before the erratum.
    torch.testing.assert_close(weight.flatten(), torch.full((4,), 200 / 6).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["local-sgd", "local-sgd, int4"])
@pytest.mark.parametrize("merged", [pytest.param(None, id="equal"), pytest.param((1.0, 1.0, 2.0), id="shards")])
def test_a_weighted_mean_by_hand(name: str, merged: tuple[float, ...] | None) -> None:
    method, weight = of_linear(hand_run(name, devices=3, shards=merged))
    set_copies(weight, 1.0, 3.0, 8.0)
    method.merge(3)
    # (1 + 3 + 8)/3 = 4; (1·1 + 1·3 + 2·8)/4 = 5. A lone entry is its block's maximum: int4 loses fp32's rounding only.
    expected = 4.0 if merged is None else 5.0
    torch.testing.assert_close(weight.flatten(), torch.full((3,), expected).double(), rtol=1e-6, atol=0)


def test_averaged_moments_by_hand() -> None:
    method, weight = of_linear(hand_run("local-sgd, moments", devices=2))
    first, second = torch.tensor([1.0, 5.0]).double().view(2, 1, 1), torch.tensor([4.0, 16.0]).double().view(2, 1, 1)
    method.stepper.state[weight] = {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second}
    method.merge(3)
    assert first.flatten().tolist() == [3.0, 3.0]
    assert second.flatten().tolist() == [10.0, 10.0]


def test_half_of_the_devices_take_part_and_all_get_their_turn() -> None:
    run = RUNS["fedavg"]
    rounds = [participants(run, 2, round_index) for round_index in range(20)]
    assert all(len(set(devices)) == 2 and devices == sorted(devices) for devices in rounds)
    assert {device for devices in rounds for device in devices} == {0, 1, 2, 3}
    assert tiny.build(run).active(step=57) == participants(run, 2, 5)


def test_who_does_not_take_part_changes_nothing() -> None:
    run = parity_run("fedavg", devices=4)
    first, second, data = tiny.build(run), tiny.build(run), tiny.batches(run)
    idle = [device for device in range(4) if device not in first.active(0)]
    for step in range(4):
        inputs, targets = data.batch(step, range(4))
        first.step(inputs, targets, step)
        for device in idle:
            inputs[2 * device : 2 * device + 2] = 65
        second.step(inputs, targets, step)
    for method in (first, second):
        method.merge(3)
    other = second.state.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.state.state_dict().items())
