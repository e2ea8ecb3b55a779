"""What the twins have in common: the schedule, clipping and decay, each written out in plain Python."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.config.tables import Train


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all samples and tokens."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def scheduled_rate(train: Train, peak: float, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine from the peak to a tenth of it."""
    warmup = train.warmup_steps or 0
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / (train.steps - warmup))
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def clip(gradients: list[Tensor], clip_norm: float) -> bool:
    """Scale gradients in place so that their joint norm is at most `clip_norm`; returns whether it had to."""
    norm = math.sqrt(sum(float((gradient * gradient).sum()) for gradient in gradients))
    factor = min(1.0, clip_norm / (norm + 1e-6))
    for gradient in gradients:
        gradient *= factor
    return factor < 1.0


def adamw(train: Train, rates: list[tuple[list[Tensor], float]]) -> torch.optim.AdamW:
    """Return one device's optimizer; a group a parameter, so that nothing is fused, stacked or shared."""
    groups = [
        {"params": [p], "lr": rate, "peak": rate, "weight_decay": train.weight_decay if p.ndim >= 2 else 0.0}
        for parameters, rate in rates
        for p in parameters
    ]
    return torch.optim.AdamW(groups, betas=(train.adam_beta1, train.adam_beta2), foreach=False, fused=False)


def take_step(optimizer: torch.optim.AdamW, gradients: dict[Tensor, Tensor], train: Train, step: int) -> None:
    """Take one step with the given gradients at the scheduled rates."""
    for group in optimizer.param_groups:
        group["lr"] = scheduled_rate(train, group["peak"], step)
        (parameter,) = group["params"]
        parameter.grad = gradients[parameter]
    optimizer.step()


def adapted_names(model: nn.Module) -> list[str]:
    """Return the weights that get adapters: of every linear layer but the head, which the embedding owns."""
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
