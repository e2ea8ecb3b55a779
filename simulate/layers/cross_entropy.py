"""Cross-entropy for large vocabularies, in the memory of the logits alone.

torch's own keeps the log-probabilities and makes two gradients of the logits' size; for GPT-2's vocabulary these three
tensors would fill most of a small device's memory. Here the logits are kept, and the backward pass overwrites them with
their own gradient. Logits of half precision are converted to float32, for class-index targets some rows at a time and
for soft targets all at once; their losses are float32.

Legend: M rows (tokens, images), V vocabulary or classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simulate.layers.formats import LOSS_CHUNK_ELEMENTS


def _exact(logits_MV: Tensor) -> Tensor:
    """Return logits in a dtype that is exact enough to sum exponentials in: half precision as float32, others as is."""
    return logits_MV.float() if logits_MV.element_size() < 4 else logits_MV


class _TokenLosses(torch.autograd.Function):
    """loss_m = log Σ_v exp(z_mv) − z_m,target;   ∂loss_m/∂z_mv = softmax(z_m)_v − [v = target]."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        # Some rows at a time, so that converting half precision takes a few megabytes, whatever the batch.
        ctx.rows = max(1, LOSS_CHUNK_ELEMENTS // logits_MV.shape[1])
        log_sum_M = torch.cat([torch.logsumexp(_exact(chunk), dim=1) for chunk in logits_MV.split(ctx.rows)])
        ctx.save_for_backward(logits_MV, targets_M, log_sum_M)
        return log_sum_M - logits_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_MV, targets_M, log_sum_M = ctx.saved_tensors
        parts = (tensor.unsqueeze(1).split(ctx.rows) for tensor in (log_sum_M, targets_M, grads[0]))
        for chunk_MV, log_sum_M1, target_M1, grad_M1 in zip(logits_MV.split(ctx.rows), *parts, strict=True):
            gradient_MV = _exact(chunk_MV)
            # In the logits' memory: (exp(z − log Σ exp z) − [v = target])·g
            gradient_MV.sub_(log_sum_M1).exp_().mul_(grad_M1).scatter_add_(1, target_M1, -grad_M1)
            if gradient_MV is not chunk_MV:  # half precision was converted, so the gradient is a copy
                chunk_MV.copy_(gradient_MV)
        return logits_MV, None


def token_losses(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return each row's cross-entropy, (M,). The backward pass overwrites the logits: do not use them afterwards."""
    losses: Tensor = _TokenLosses.apply(logits_MV, targets_M)
    return losses


class _SoftLosses(torch.autograd.Function):
    """loss_m = (Σ_v y_mv)·log Σ_v exp(z_mv) − Σ_v y_mv·z_mv;   ∂loss_m/∂z_mv = (Σ_v y_mv)·softmax(z_m)_v − y_mv."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, shares_MV: Tensor) -> Tensor:
        exact_MV, total_M = _exact(logits_MV), shares_MV.sum(1)
        log_sum_M = torch.logsumexp(exact_MV, dim=1)
        ctx.save_for_backward(logits_MV, shares_MV, log_sum_M, total_M)
        return total_M * log_sum_M - torch.linalg.vecdot(shares_MV, exact_MV)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_MV, shares_MV, log_sum_M, total_M = ctx.saved_tensors
        gradient_MV = _exact(logits_MV).sub_(log_sum_M.unsqueeze(1)).exp_().mul_(total_M.unsqueeze(1)).sub_(shares_MV)
        return gradient_MV.mul_(grads[0].unsqueeze(1)).to(logits_MV.dtype), None


def soft_losses(logits_MV: Tensor, shares_MV: Tensor) -> Tensor:
    """Return each row's cross-entropy with soft targets, (M, V), as (M,); backward may overwrite the logits."""
    losses: Tensor = _SoftLosses.apply(logits_MV, shares_MV)
    return losses


def row_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of every token or sample of outputs (..., V), in order, (M,).

    Targets are class indices (...), or shares of classes (..., V). The backward pass may overwrite the outputs.
    """
    logits_MV = outputs.flatten(0, -2)
    if targets.is_floating_point():
        return soft_losses(logits_MV, targets.flatten(0, -2))
    return token_losses(logits_MV, targets.reshape(-1))
