"""Mixed precision: autocast of matrix products to bf16 or fp16, and the loss scale that fp16's small range needs.

With autocast, weights, gradients, the optimizer and messages stay in the run's dtype; matrix products, attention and
the activations saved for their backward passes are bf16 or fp16 (Micikevicius et al. 2018, arXiv 1710.03740). The
methods' base class (simulate.methods.base) calls both.

Gradients below 2^-24 vanish in fp16, so losses are scaled up before the backward pass and gradients down after it. The
rule is that of torch.amp.GradScaler, for each row of copies by itself:

    g finite in G steps in a row: scale ← 2·scale;      g not finite: no step, scale ← scale/2

A device without finite gradients skips its own step only, and its step counter still advances (as for devices that stop
early, simulate.methods.paced), so that a device takes the same path alone and beside others.

Legend: C rows of copies with separate gradients: the local devices, or 1 if all share one gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from simulate.common.errors import InputError
from simulate.config.tables import Train
from simulate.layers import accelerator

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
START_SCALE = 2.0**16
"""First scale, as in torch.amp.GradScaler."""
GROWTH_STEPS = 2000
"""Number of steps with finite gradients after which the scale is doubled, as in torch.amp.GradScaler."""


def lower_precision(train: Train, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a network's forward pass runs."""
    dtype = AUTOCAST_DTYPES.get(train.autocast)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_autocast(train: Train, device: torch.device) -> None:
    """Raise InputError if a GPU has no bf16 arithmetic, which PyTorch would emulate, slower than fp32."""
    if train.autocast == "bf16" and device.type != "cpu" and not accelerator.has_bf16(device):
        raise InputError(
            f"train.autocast = 'bf16': {accelerator.describe(device).name} has no bf16 arithmetic; "
            "try --set train.autocast=fp16, or none"
        )


class LossScale:
    """Scales of C rows, with the steps since each last changed."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.scale_C = torch.full((rows,), START_SCALE, device=device)
        self.good_steps_C = torch.zeros(rows, dtype=torch.int64, device=device)

    def scaled(self, losses_X: Tensor) -> Tensor:
        """Return losses, ordered by row, times the scale of their row; X is a multiple of C."""
        return losses_X * self.scale_C.repeat_interleave(len(losses_X) // len(self.scale_C))

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale of their row, in place; each has a leading axis of a multiple of C."""
        for gradient in gradients:
            scale = self.scale_C.repeat_interleave(len(gradient) // len(self.scale_C))
            gradient.div_(scale.view(-1, *(1,) * (gradient.ndim - 1)))

    def finite_rows(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return, (C,), which rows have finite gradients only."""
        finite_C = torch.ones_like(self.scale_C, dtype=torch.bool)
        for gradient in gradients:
            # Infinities and NaN show in the smallest or largest number; isfinite would allocate a mask of all elements.
            least_C, most_C = gradient.reshape(len(finite_C), -1).aminmax(dim=1)
            finite_C &= least_C.isfinite() & most_C.isfinite()
        return finite_C

    def lets_all_step(self, finite_C: Tensor) -> bool:
        """Whether every row's gradients are finite."""
        return isinstance(finite_C, FakeTensor) or bool(finite_C.all())  # a fake tensor has no numbers to ask

    def update(self, finite_C: Tensor) -> None:
        """Halve the scale of rows whose gradients were not finite; double it after GROWTH_STEPS finite ones."""
        self.good_steps_C.add_(1).mul_(finite_C)
        grows_C = self.good_steps_C >= GROWTH_STEPS
        self.scale_C.mul_(torch.where(finite_C, torch.where(grows_C, 2.0, 1.0), 0.5))
        self.good_steps_C.masked_fill_(grows_C, 0)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the tensors that a checkpoint must hold, by name."""
        return {"scale": self.scale_C, "good_steps": self.good_steps_C}
