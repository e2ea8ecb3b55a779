"""Augmentations of whole batches of images: random crops, flips and mixup, for all images of a batch at once.

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
"""A crop moves an image by at most its side over this, in pixels: 4 of 32."""


@dataclass(frozen=True)
class Draws:
    """Random shifts and flips of one device's batch; all zeros leave it unchanged."""

    rows: np.ndarray
    """(B,): pixels by which the crop begins below the image's first row, -pad … pad; negative above it."""
    columns: np.ndarray
    """(B,): likewise to the right of the first column."""
    flips: np.ndarray
    """(B,), bool: whether left and right are exchanged."""

    @classmethod
    def of(cls, random: np.random.Generator, samples: int, pixels: int, augment: Sequence[str]) -> Draws:
        """Draw for a batch of `samples`; `augment` names those of "crop" and "flip" to apply."""
        pad = pixels // PADDING_PART
        # Always draw both, so that switching one off leaves the other's draws, and mixup's, as they were.
        shifts = random.integers(-pad, pad + 1, (2, samples))
        flips = random.random(samples) < 0.5
        if "crop" not in augment:
            shifts[:] = 0
        return cls(shifts[0], shifts[1], flips if "flip" in augment else np.zeros(samples, bool))


def crop_and_flip(pixels_SCPP: Tensor, draws: Sequence[Draws]) -> Tensor:
    """Return images shifted and flipped, black beyond their edges; `draws` has one entry a device, in device order."""
    pixels, device = pixels_SCPP.shape[-1], pixels_SCPP.device
    pad = pixels // PADDING_PART
    rows, columns, flips = (
        torch.from_numpy(np.concatenate([getattr(draw, key) for draw in draws])).to(device)
        for key in ("rows", "columns", "flips")
    )
    here = torch.arange(pixels, device=device)
    rows_SP = rows[:, None] + here + pad
    # A flipped image is read from right to left.
    columns_SP = columns[:, None] + torch.where(flips[:, None], here.flip(0), here) + pad
    padded = F.pad(pixels_SCPP, (pad,) * 4)
    # One gather for the whole batch, in the place of a loop over images.
    samples, colours = (torch.arange(n, device=device) for n in pixels_SCPP.shape[:2])
    return padded[
        samples[:, None, None, None], colours[:, None, None], rows_SP[:, None, :, None], columns_SP[:, None, None]
    ]


def normalise(pixels_SCPP: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return (x/255 − mean) / std of each colour, where x are pixels of 0 … 255 and the figures are of 0 … 1."""
    # A colour that never varies has std 0; dividing by 1 leaves it at 0.
    scale_C11 = 1 / torch.tensor([value or 1.0 for value in std], dtype=torch.float64).view(-1, 1, 1)
    # Folded into one multiplication and one addition, in double precision, before they touch the batch.
    shift = -torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) * scale_C11
    scale = scale_C11 / 255
    where = pixels_SCPP.device
    return pixels_SCPP.to(dtype).mul_(scale.to(where, dtype)).add_(shift.to(where, dtype))


def mix(images_LBX: Tensor, targets_LBK: Tensor, shares_L: Tensor, partners_LB: Tensor) -> tuple[Tensor, Tensor]:
    """Return mixup's λ·x + (1 − λ)·x' of images and targets, with x' the partner in the same device's batch.

    Each device's batch has one λ, as in Zhang et al. 2018 (arXiv 1710.09412, section 2).
    """
    return _mix(images_LBX, shares_L, partners_LB), _mix(targets_LBK, shares_L, partners_LB)


def _mix(x_LBX: Tensor, shares_L: Tensor, partners_LB: Tensor) -> Tensor:
    devices = torch.arange(len(x_LBX), device=x_LBX.device)
    share_L11 = shares_L[:, None, None]
    partner_LBX = x_LBX[devices[:, None], partners_LB]
    return partner_LBX.lerp_(x_LBX, share_L11.to(x_LBX))
