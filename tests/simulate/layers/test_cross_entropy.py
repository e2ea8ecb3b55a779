"""Tests of the loss that overwrites its logits, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import simulate.layers.cross_entropy
from simulate.layers.cross_entropy import row_losses, soft_losses, token_losses

pytestmark = pytest.mark.numeric

TARGETS = torch.tensor([0, 6, 3, 3, 1])


def logits(scale: float = 1.0) -> Tensor:
    numbers = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (numbers * scale).requires_grad_()


def loss_and_gradient(losses: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=losses.dtype)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("chunk_elements", [1, 14, 1000], ids=["a row at a time", "two rows", "all at once"])
@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["small logits", "logits that overflow exp"])
def test_losses_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, chunk_elements: int, scale: float) -> None:
    monkeypatch.setattr(simulate.layers.cross_entropy, "LOSS_CHUNK_ELEMENTS", chunk_elements)
    slow, fast = logits(scale), logits(scale)
    expected = loss_and_gradient(F.cross_entropy(slow, TARGETS, reduction="none"), slow)
    got = loss_and_gradient(token_losses(fast.clone(), TARGETS), fast)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    losses = token_losses(logits().clone(), TARGETS).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()


def shares() -> Tensor:
    numbers = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return numbers / numbers.sum(1, keepdim=True)


@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["small logits", "logits that overflow exp"])
@pytest.mark.parametrize("total", [1.0, 0.5], ids=["shares of one", "shares of half"])
def test_soft_losses_and_gradients_are_torchs(scale: float, total: float) -> None:
    slow, fast, targets = logits(scale), logits(scale), shares() * total
    expected = loss_and_gradient(F.cross_entropy(slow, targets, reduction="none"), slow)
    got = loss_and_gradient(soft_losses(fast.clone(), targets), fast)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_soft_losses_by_hand() -> None:
    # Logits log 1 and log 3 are probabilities 1/4 and 3/4: −½·log ¼ − ½·log ¾.
    losses = soft_losses(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[0.5, 0.5]]))
    assert losses.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3), rel=1e-6)


def test_rows_are_tokens_or_images_and_whole_targets_are_shares_of_one_class() -> None:
    outputs = logits().detach().view(1, 5, 7)
    of_tokens = row_losses(outputs.clone(), TARGETS.view(1, 5))
    assert torch.equal(of_tokens, row_losses(outputs[0].clone(), TARGETS))
    hot = F.one_hot(TARGETS, 7).double()
    torch.testing.assert_close(row_losses(outputs.clone(), hot.view(1, 5, 7)), of_tokens, rtol=1e-12, atol=1e-12)
