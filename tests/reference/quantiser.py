"""What a receiver reads of a rounded message: one block after another, straight from the definitions."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

BLOCK = 128
LEVELS = {"int8": 127, "int4": 7}


def as_received(values: Tensor, wire: str) -> Tensor:
    """Return a message (X,) as the format kept it."""
    if wire == "fp16":
        return values.half().double()
    if wire == "bf16":
        return as_bf16(values)
    kept = as_four_levels if wire == "int2" else partial(as_grid, levels=LEVELS[wire])
    return torch.cat([kept(block) for block in values.split(BLOCK)])


def as_grid(block: Tensor, levels: int) -> Tensor:
    """Return scale·q with whole q in −levels ... levels and an fp32 scale = max|x| / levels."""
    scale = float((block.abs().max() / levels).float())
    if scale == 0:
        return torch.zeros_like(block)
    return scale * torch.clamp(torch.round(block / scale), -levels, levels)


def as_four_levels(block: Tensor) -> Tensor:
    """Return scale·q with q of −3, −1, 1 and 3, by halves of 0.9957 standard deviations, and the best scale in bf16."""
    values: list[float] = block.tolist()
    half_step = 0.4979 * math.sqrt(sum(x**2 for x in values) / len(values))
    levels = [_level(x, 2 * half_step) for x in values]
    scale = sum(x * level for x, level in zip(values, levels, strict=True)) / sum(level**2 for level in levels)
    return as_bf16(torch.tensor([scale], dtype=block.dtype)) * torch.tensor(levels, dtype=block.dtype)


def _level(x: float, step: float) -> float:
    # There is no level at zero, so that rounding noise around it counts as positive.
    return 1.0 if step == 0 else 2 * min(max(math.floor(x / step + 1e-6), -2), 1) + 1


def as_bf16(values: Tensor) -> Tensor:
    """Return fp32's numbers with the last 16 bits rounded away, halves to even."""
    bits = values.float().view(torch.int32).to(torch.int64)
    kept = bits // 2**16
    lost = bits - kept * 2**16
    up = (lost > 2**15) | ((lost == 2**15) & (kept % 2 == 1))
    return ((kept + up) * 2**16).to(torch.int32).view(torch.float32).to(values.dtype)


class Sender:
    """Rounds messages and adds what a message lost to the next one of the same address (error feedback)."""

    def __init__(self, wire: str) -> None:
        self.wire = wire
        self.lost: dict[tuple[object, ...], Tensor] = {}

    def send(self, values: Tensor, *address: object) -> Tensor:
        """Return what is received of `values`, in their shape."""
        wanted = values + self.lost.get(address, 0)
        received = as_received(wanted.flatten(), self.wire).view_as(wanted)
        self.lost[address] = wanted - received
        return received

    def mean(self, vectors: list[Tensor], *address: object) -> Tensor:
        """Return everyone's mean: all parts travel to whoever averages them, and their mean travels back."""
        received = [self.send(vector, *address, device) for device, vector in enumerate(vectors)]
        return self.send(sum(received[1:], received[0]) / len(received), *address, "mean")
