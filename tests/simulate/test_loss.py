"""The loss that overwrites its logits, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import simulate.loss
from simulate.loss import token_losses

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
    monkeypatch.setattr(simulate.loss, "LOSS_CHUNK_ELEMENTS", chunk_elements)
    slow, fast = logits(scale), logits(scale)
    expected = loss_and_gradient(F.cross_entropy(slow, TARGETS, reduction="none"), slow)
    got = loss_and_gradient(token_losses(fast.clone(), TARGETS), fast)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    losses = token_losses(logits().clone(), TARGETS).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()
