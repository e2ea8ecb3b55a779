"""Matrix products in fewer bits than the weights have, and the loss scale that the small range of fp16 asks for.

With autocast, weights, gradients, the optimizer and what devices exchange stay in the run's dtype; matrix products,
attention and what is kept for their backward passes are bf16 or fp16 (Micikevicius et al. 2018, arXiv 1710.03740).

Gradients below 2^-24 vanish in fp16, so losses are scaled up before the backward pass and gradients down after it, with
the rule of torch.amp.GradScaler, for every row of copies by itself:

    g finite in G steps in a row: scale ← 2·scale;      g not finite: no step, scale ← scale/2

A device without finite gradients leaves its step out and nobody else's. The step counts all the same (as for devices
that stop early, simulate.methods.paced), so that a device goes the same way alone and beside others.

Legend: C rows of copies that have gradients of their own: local devices, or 1 where all share one gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from simulate.common.errors import InputError
from simulate.config.tables import Train

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
START_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Steps with finite gradients after which the scale is doubled; both as torch.amp.GradScaler has them."""


def lower_precision(train: Train, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a network's forward pass runs."""
    dtype = AUTOCAST_DTYPES.get(train.autocast)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_autocast(train: Train, device: torch.device) -> None:
    """Raise InputError where a GPU has no bf16 arithmetic: PyTorch would emulate it, slower than fp32."""
    if train.autocast == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise InputError(
            f"train.autocast = 'bf16': {torch.cuda.get_device_name(device)} has no bf16 arithmetic; "
            "try --set train.autocast=fp16, or none"
        )


class LossScale:
    """A scale for each of C rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.scale_C = torch.full((rows,), START_SCALE, device=device)
        self.good_steps_C = torch.zeros(rows, dtype=torch.int64, device=device)

    def scaled(self, losses_X: Tensor) -> Tensor:
        """Return losses times the scale of their row; X is a multiple of C, row by row."""
        return losses_X * self.scale_C.repeat_interleave(len(losses_X) // len(self.scale_C))

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale of their row, in place; each has a leading axis of a multiple of C."""
        for gradient in gradients:
            scale = self.scale_C.repeat_interleave(len(gradient) // len(self.scale_C))
            gradient.div_(scale.view(-1, *(1,) * (gradient.ndim - 1)))

    def finite_rows(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return which rows have nothing but numbers in all gradients, (C,), bool."""
        finite_C = torch.ones_like(self.scale_C, dtype=torch.bool)
        for gradient in gradients:
            # Infinities and NaN show in the smallest or largest number, which takes no room, unlike isfinite.
            least_C, most_C = gradient.reshape(len(finite_C), -1).aminmax(dim=1)
            finite_C &= least_C.isfinite() & most_C.isfinite()
        return finite_C

    def lets_all_step(self, finite_C: Tensor) -> bool:
        """Whether every row's gradients are finite, as those of a tensor without numbers are taken to be."""
        return isinstance(finite_C, FakeTensor) or bool(finite_C.all())

    def update(self, finite_C: Tensor) -> None:
        """Lower the scale of rows whose gradients were not finite, and raise those that were for long enough."""
        self.good_steps_C.add_(1).mul_(finite_C)
        grows_C = self.good_steps_C >= GROWTH_STEPS
        self.scale_C.mul_(torch.where(finite_C, torch.where(grows_C, 2.0, 1.0), 0.5))
        self.good_steps_C.masked_fill_(grows_C, 0)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return what the next step depends on, by name."""
        return {"scale": self.scale_C, "good_steps": self.good_steps_C}
