"""Augmentations of whole batches of images: every draw has an address, every image is handled at once.

Legend: L local devices, B samples of a device, S = L·B samples, C colours, P pixels a side, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_PART = 8
"""Images are padded by their side over this on every edge before they are cropped: 4 of 32 pixels."""


@dataclass(frozen=True)
class Draws:
    """What one device's batch is augmented by; all zeros leave it as it is."""

    rows: np.ndarray
    """(B,): where the crop begins in the padded image, less the padding; -pad … pad."""
    columns: np.ndarray
    flips: np.ndarray
    """(B,), bool."""

    @classmethod
    def of(cls, random: np.random.Generator, samples: int, pixels: int, augment: Sequence[str]) -> Draws:
        """Draw for a batch; the same numbers are taken from `random` whatever is wanted."""
        pad = pixels // PADDING_PART
        shifts = random.integers(-pad, pad + 1, (2, samples))
        flips = random.random(samples) < 0.5
        if "crop" not in augment:
            shifts[:] = 0
        return cls(shifts[0], shifts[1], flips if "flip" in augment else np.zeros(samples, bool))


def crop_and_flip(pixels_SCPP: Tensor, draws: Sequence[Draws]) -> Tensor:
    """Return images moved by their shifts, black where nothing was, and mirrored; draws of devices in order."""
    pixels, device = pixels_SCPP.shape[-1], pixels_SCPP.device
    pad = pixels // PADDING_PART
    rows, columns, flips = (
        torch.from_numpy(np.concatenate([getattr(draw, key) for draw in draws])).to(device)
        for key in ("rows", "columns", "flips")
    )
    here = torch.arange(pixels, device=device)
    rows_SP = rows[:, None] + here + pad
    columns_SP = columns[:, None] + torch.where(flips[:, None], here.flip(0), here) + pad
    padded = F.pad(pixels_SCPP, (pad,) * 4)
    samples, colours = (torch.arange(n, device=device) for n in pixels_SCPP.shape[:2])
    return padded[
        samples[:, None, None, None], colours[:, None, None], rows_SP[:, None, :, None], columns_SP[:, None, None]
    ]


def normalise(pixels_SCPP: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers, scaled to 0 … 1, less the mean and over the deviation of each colour."""
    # A colour that never varies stays at 0.
    scale_C11 = 1 / torch.tensor([value or 1.0 for value in std], dtype=torch.float64).view(-1, 1, 1)
    shift = -torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) * scale_C11
    scale = scale_C11 / 255
    where = pixels_SCPP.device
    return pixels_SCPP.to(dtype).mul_(scale.to(where, dtype)).add_(shift.to(where, dtype))


def mix(images_LBX: Tensor, targets_LBK: Tensor, shares_L: Tensor, partners_LB: Tensor) -> tuple[Tensor, Tensor]:
    """Return λ·x + (1 − λ)·x' of images and targets, with x' the partner in the same device's batch.

    Mixup, with one λ a batch, as Zhang et al. 2018 do it (arXiv 1710.09412, section 2). Overwrites the images.
    """
    return _mix(images_LBX, shares_L, partners_LB), _mix(targets_LBK, shares_L, partners_LB)


def _mix(x_LBX: Tensor, shares_L: Tensor, partners_LB: Tensor) -> Tensor:
    devices = torch.arange(len(x_LBX), device=x_LBX.device)
    share_L11 = shares_L[:, None, None]
    partner_LBX = x_LBX[devices[:, None], partners_LB]
    return partner_LBX.lerp_(x_LBX, share_L11.to(x_LBX))
