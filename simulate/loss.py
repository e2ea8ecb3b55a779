"""Cross-entropy for large vocabularies, in the memory of the logits alone.

torch's keeps the log-probabilities and makes two gradients of the logits' size; for GPT-2's vocabulary these three
tensors would be most of a small device's memory. Here the logits are kept, and become their own gradient.

Legend: M rows (tokens), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simulate.costs.activations import LOSS_CHUNK_ELEMENTS


class _TokenLosses(torch.autograd.Function):
    """loss_m = log Σ_v exp(z_mv) − z_m,target;   ∂loss_m/∂z_mv = softmax(z_m)_v − [v = target]."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        rows = max(1, LOSS_CHUNK_ELEMENTS // logits_MV.shape[1])
        log_sum_M = torch.cat([torch.logsumexp(chunk, dim=1) for chunk in logits_MV.split(rows)])
        ctx.save_for_backward(logits_MV, targets_M, log_sum_M)
        return log_sum_M - logits_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_MV, targets_M, log_sum_M = ctx.saved_tensors
        grad_M1 = grads[0].unsqueeze(1)
        gradient_MV = logits_MV.sub_(log_sum_M.unsqueeze(1)).exp_().mul_(grad_M1)
        gradient_MV.scatter_add_(1, targets_M.unsqueeze(1), -grad_M1)
        return gradient_MV, None


def token_losses(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return each row's cross-entropy, (M,); the backward pass overwrites the logits, so nobody else may need them."""
    losses: Tensor = _TokenLosses.apply(logits_MV, targets_M)
    return losses
