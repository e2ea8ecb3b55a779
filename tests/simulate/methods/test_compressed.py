"""Compressed gradients against their slow twins, and each compression with its error feedback by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulate.comm.compression import CompressedMean
from simulate.config.run import Run
from simulate.methods.base import Method
from simulate.methods.gathered_gradients import pack_bits, unpack_bits
from simulate.methods.gradient_averaging import GradientMethod
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.methods.powersgd.train import PowerSgd
from simulate.methods.signsgd.train import Signsgd
from simulate.methods.topk.train import Topk
from tests import tiny
from tests.reference.compressed import PowerSgdTwin, RoundedDdpTwin, SignsgdTwin, TopkTwin
from tests.selection import others_slow
from tests.simulate.methods.parity import (
    TwinClass,
    assert_trains_like,
    bigram,
    hand_run,
    of_linear,
    on_network,
    parity_run,
    train_twin,
)

RUNS: dict[str, tuple[TwinClass, Run]] = {
    "ddp, int8": (RoundedDdpTwin, parity_run("ddp, int8")),
    "ddp, int4": (RoundedDdpTwin, parity_run("ddp, int8", wire="int4")),
    "ddp, int2": (RoundedDdpTwin, parity_run("ddp, int2")),
    "ddp, fp16": (RoundedDdpTwin, parity_run("ddp, fp16")),
    "ddp, bf16": (RoundedDdpTwin, parity_run("ddp, fp16", wire="bf16")),
    "powersgd": (PowerSgdTwin, parity_run("powersgd")),
    "topk": (TopkTwin, parity_run("topk")),
}


@pytest.mark.parametrize("name", others_slow(RUNS, ["ddp, int4", "ddp, bf16", "powersgd", "topk"]))
def test_every_compression_trains_like_the_twin(name: str) -> None:
    assert_trains_like(*RUNS[name])


@cache
def sign_twin() -> tiny.History:
    return train_twin(SignsgdTwin, parity_run("signsgd"), bigram())[1]


def assert_signs_train_like_the_twin() -> None:
    tiny.assert_parity(tiny.train(on_network(parity_run("signsgd"), bigram())), sign_twin())


def test_signs_train_like_the_twin() -> None:
    assert_signs_train_like_the_twin()


def without_error(method: Signsgd, corrected_LX: Tensor) -> list[Tensor]:
    sent = ORIGINAL_SIGNS(method, corrected_LX)
    corrected_LX.zero_()
    return sent


def magnitude_of_all_devices(method: Signsgd, corrected_LX: Tensor) -> list[Tensor]:
    bits, scale_L1 = ORIGINAL_SIGNS(method, corrected_LX)
    return [bits, scale_L1.mean(0, keepdim=True).expand_as(scale_L1)]


ORIGINAL_SIGNS = Signsgd.compress


@pytest.mark.parametrize("broken", [without_error, magnitude_of_all_devices])
def test_parity_detects_broken_signs(monkeypatch: pytest.MonkeyPatch, broken: Callable[..., object]) -> None:
    monkeypatch.setattr(Signsgd, "compress", broken)
    with pytest.raises(AssertionError):
        assert_signs_train_like_the_twin()


def only_positive(method: Topk, corrected_LX: Tensor) -> list[Tensor]:
    count = -(-corrected_LX.shape[1] // 10)
    index = corrected_LX.topk(count, dim=1).indices
    values = corrected_LX.gather(1, index)
    corrected_LX.scatter_(1, index, 0.0)
    return [values, index.to(torch.int32)]


def forgetful(method: PowerSgd) -> None:
    for error in method.errors.values():
        error.zero_()
    ORIGINAL_AVERAGE(method)


def wrong_start(method: PowerSgd, name: str, inputs: int, rank: int) -> Tensor:
    return torch.ones(inputs, rank, dtype=torch.float64).cumsum(0).pow(torch.arange(1.0, rank + 1))


def mean_of_own(compressed: CompressedMean, parts: object) -> Tensor:
    compressed.sent_error_LX.zero_()
    return ORIGINAL_MEAN(compressed, parts)  # type: ignore[arg-type]


ORIGINAL_AVERAGE, ORIGINAL_MEAN = PowerSgd.average_gradients, CompressedMean.mean


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        pytest.param("topk", Topk, "compress", only_positive, id="the largest, not the largest magnitudes"),
        pytest.param("powersgd", PowerSgd, "average_gradients", forgetful, id="without error feedback"),
        pytest.param("powersgd", PowerSgd, "_start", wrong_start, id="another start"),
        pytest.param(
            "powersgd", PowerSgdOptions, "is_compressible", lambda options, shape: False, id="nothing compressed"
        ),
        pytest.param("ddp, int8", CompressedMean, "mean", mean_of_own, id="what was not sent is forgotten"),
    ],
)
def test_parity_detects_a_broken_compression(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: object, attribute: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(*RUNS[name])


def averaged(method: Method, gradients: list[list[float]]) -> Tensor:
    """Return what a method makes of the devices' gradients of its one matrix, one list of entries each."""
    assert isinstance(method, GradientMethod)
    (leaf,), (parameter,) = method.leaves.values(), method.parameters.values()
    leaf.grad = torch.tensor(gradients, dtype=torch.float64).view(leaf.shape)
    with torch.no_grad():
        method.average_gradients()
    assert parameter.grad is not None
    return parameter.grad.flatten()


def errors_of(method: Method) -> list[list[float]]:
    return next(error for name, error in method.extra_state().items() if "error" in name).flatten(1).tolist()


def test_the_two_largest_of_five_with_error_feedback_by_hand() -> None:
    method, _ = of_linear(hand_run("topk", density=0.4), inputs=5)
    mean = averaged(method, [[3, -5, 1, 2, -1], [1, 0, 0, 0, -7]])
    assert mean.tolist() == [2, -2.5, 0, 0, -3.5]
    assert errors_of(method) == [[0, 0, 1, 2, -1], [0, 0, 0, 0, 0]]
    # Device 0 is at 1, 1, 2, 3, 0 with what it kept back.
    mean = averaged(method, [[1, 1, 1, 1, 1], [0, 4, 2, 0, 1]])
    assert mean.tolist() == [0, 2, 2, 1.5, 0]
    assert errors_of(method) == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_signs_with_error_feedback_by_hand() -> None:
    method, _ = of_linear(hand_run("signsgd"), inputs=5)
    mean = averaged(method, [[3, -1, 0, 2, -4], [1, 1, -1, -1, 1]])
    # ‖p‖₁/d = 10/5 and 5/5; the sign of 0 is +1.
    assert mean.tolist() == [(2 + 1) / 2, (-2 + 1) / 2, (2 - 1) / 2, (2 - 1) / 2, (-2 + 1) / 2]
    assert errors_of(method) == [[1, 1, -2, 0, -2], [0, 0, 0, 0, 0]]
    # Device 0: 1, 1, −2, 0, −2 and a gradient of 4 in the last place; ‖p‖₁/d = 6/5.
    mean = averaged(method, [[0, 0, 0, 0, 4], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(mean, torch.tensor([0.6, 0.6, -0.6, 0.6, 0.6], dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_step_of_power_iteration_by_hand() -> None:
    method, _ = of_linear(hand_run("powersgd", rank=1), inputs=3, outputs=3)
    assert isinstance(method, PowerSgd)
    method.factors["0.weight"].copy_(torch.tensor([[1.0], [1.0], [0.0]]))
    mean = averaged(method, [[2, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 4, 0, 0, 0, 0]])
    # P = (2, 4, 0)/√20; Q = ½·(2·2, 4·4, 0)/√20 = (2, 8, 0)/√20; Ĝ = P·Qᵀ
    expected = torch.tensor([4, 16, 0, 8, 32, 0, 0, 0, 0], dtype=torch.float64) / 20
    torch.testing.assert_close(mean, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(errors_of(method)[0], [1.8, -0.8, 0.0, -0.4, -1.6, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(errors_of(method)[1], [-0.2, -0.8, 0.0, -0.4, 2.4, 0.0, 0.0, 0.0, 0.0])


def test_gradients_of_low_rank_lose_nothing() -> None:
    method, _ = of_linear(hand_run("powersgd", devices=1, rank=2), inputs=6, outputs=5)
    left, right = (torch.arange(n).double().sin() for n in (10, 12))
    gradient = (left.view(5, 2) @ right.view(2, 6)).flatten()
    torch.testing.assert_close(averaged(method, [gradient.tolist()]), gradient, rtol=1e-10, atol=1e-12)


def test_int8_gradients_with_error_feedback_by_hand() -> None:
    method, _ = of_linear(hand_run("ddp, int8"), inputs=4)
    # Scales are 254/127 = 2 and 1; of the mean, 127: 1.
    assert averaged(method, [[254, 2, 3.5, -1], [0, -127, 0.25, 0]]).tolist() == [127, -62, 2, 0]
    assert errors_of(method)[0][:4] == [0, 0, -0.5, -1]
    assert errors_of(method)[1][:4] == [0, 0, 0.25, 0]


@given(st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=4))
def test_eight_bits_in_a_byte_keep_every_bit(rows: list[list[bool]]) -> None:
    bits = torch.tensor(rows)
    packed = pack_bits(bits)
    assert packed.shape == (len(rows), 2)
    assert torch.equal(unpack_bits(packed, 13), bits)


def test_the_first_bit_is_the_lowest() -> None:
    bits = torch.tensor([[True, False, False, True, False, False, False, False, True]])
    assert pack_bits(bits).tolist() == [[0b1001, 1]]


@pytest.mark.parametrize("rank", [1, 1000])
def test_power_iteration_of_all_or_of_nothing(rank: int) -> None:
    # One matrix and no vectors; and a rank that would shrink nothing, so that all travels as it is.
    method, _ = of_linear(hand_run("powersgd", rank=rank), inputs=3, outputs=3)
    gradient = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(averaged(method, [gradient.tolist()] * 2), gradient, rtol=1e-12, atol=0)
