"""The slow twin of image batches: one picture after the other, pixel by pixel, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def moved(picture_CYX: np.ndarray, row: int, column: int, flip: bool) -> np.ndarray:
    """Return a picture whose pixel (y, x) comes from (y + row, x + column), black outside, then mirrored."""
    colours, height, width = picture_CYX.shape
    out = np.zeros_like(picture_CYX)
    for c in range(colours):
        for y in range(height):
            for x in range(width):
                if 0 <= y + row < height and 0 <= x + column < width:
                    out[c, y, x] = picture_CYX[c, y + row, x + column]
    return out[:, :, ::-1] if flip else out


def normalised(picture_CYX: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return (value/255 − mean) / std of every colour, float64."""
    return np.stack([(c / 255 - m) / s for c, m, s in zip(picture_CYX.astype(np.float64), mean, std, strict=True)])


def mixed(values: Sequence[np.ndarray], share: float, partners: Sequence[int]) -> list[np.ndarray]:
    """Return λ·x_i + (1 − λ)·x_partner(i)."""
    return [share * x + (1 - share) * values[partner] for x, partner in zip(values, partners, strict=True)]


def one_hot(label: int, classes: int) -> np.ndarray:
    """Return 1 at the label, 0 elsewhere."""
    return np.array([float(k == label) for k in range(classes)])
