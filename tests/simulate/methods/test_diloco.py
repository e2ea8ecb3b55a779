"""DiLoCo against its slow twin, two outer steps by hand, and weights that are one model between fragments' merges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simulate.comm.compression import CompressedMean
from simulate.config.run import Run
from simulate.methods.diloco.train import Diloco
from tests import tiny
from tests.reference.diloco import DilocoTwin
from tests.simulate.methods.parity import assert_trains_like, hand_run, of_linear, parity_run, set_copies

RUNS: dict[str, Run] = {
    "plain": parity_run("diloco", merge_every=5),
    "int8": parity_run("diloco, int8", merge_every=5),
    "streaming": parity_run("diloco, streaming", merge_every=4),
    "streaming int8": parity_run("diloco, streaming", merge_every=4, wire="int8"),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_every_variant_trains_like_the_twin(name: str) -> None:
    assert_trains_like(DilocoTwin, RUNS[name])


def heavy_ball(method: Diloco, name: str, last: Tensor, mean: Tensor) -> Tensor:
    velocity = method.momentum[name].mul_(method.options.outer_momentum).add_(last - mean)
    return last - method.options.outer_learning_rate * velocity


def all_at_once(method: Diloco, step: int) -> list[int]:
    return [0, 1]


ORIGINAL_MEAN = CompressedMean.mean


def without_errors(compressed: CompressedMean, x_LX: Tensor) -> Tensor:
    compressed.sent_error_LX.zero_()
    return ORIGINAL_MEAN(compressed, x_LX)


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        pytest.param("plain", Diloco, "_outer", heavy_ball, id="momentum without Nesterov"),
        pytest.param("streaming", Diloco, "fragments_due", all_at_once, id="all fragments at every merge"),
        pytest.param("int8", CompressedMean, "mean", without_errors, id="what was not sent is forgotten"),
    ],
)
def test_parity_detects_a_broken_merge(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: object, attribute: str, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        assert_trains_like(DilocoTwin, RUNS[name])


@pytest.mark.parametrize("name", ["diloco", "diloco, int8"])
def test_two_outer_steps_by_hand(name: str) -> None:
    method, weight = of_linear(hand_run(name), value=1.0)
    set_copies(weight, 0.8, 0.6)
    method.merge(3)
    # Δ = 1 − 0.7 = 0.3; v = 0.3; θ = 1 − 0.7·(0.3 + 0.9·0.3) = 0.601
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.601, 0.601]).double(), rtol=1e-6, atol=0)
    set_copies(weight, 0.401, 0.601)
    method.merge(7)
    # Δ = 0.601 − 0.501 = 0.1; v = 0.9·0.3 + 0.1 = 0.37; θ = 0.601 − 0.7·(0.1 + 0.9·0.37) = 0.2979
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.2979, 0.2979]).double(), rtol=1e-6, atol=0)


def test_fragments_take_turns_and_the_last_step_has_all() -> None:
    method = tiny.build(tiny.variant_run("diloco, streaming", train={"steps": 9}))  # T = 4, two fragments
    due = {step: method.fragments_due(step) for step in range(9) if method.merge_due(step)}
    assert due == {1: [0], 3: [1], 5: [0], 7: [1], 8: [0, 1]}


def test_between_the_merges_of_fragments_the_outer_weights_are_the_model() -> None:
    method = tiny.build(tiny.variant_run("diloco, streaming"))
    start = {name: weight.clone() for name, weight in method.merged_state().items()}
    merged = tiny.train(method, 0, 2).weights
    assert not torch.equal(merged["token.weight"], start["token.weight"])
    assert torch.equal(merged["norm.weight"], start["norm.weight"])  # of the second fragment: merges at step 4
    after = tiny.train(method, 2, 1).weights
    assert all(torch.equal(after[name], weight) for name, weight in merged.items())
    assert torch.equal(after["head.weight"], after["token.weight"])  # tied
