"""Training on quantised weights: everyone's W is rounded number by number, and a full-precision W is kept beside it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.lte.options import LteOptions
from simulate.methods.relora.options import ReloraOptions
from tests.reference.common import adapted_names
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.relora import ReloraTwin

LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""NF4's, as published (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""


def rounded(weight_OI: Tensor, quantize: str) -> Tensor:
    """Return what a weight is once it was packed and unpacked, in its own type."""
    if quantize == "bf16":
        return weight_OI.bfloat16().to(weight_OI)
    if quantize == "int8":
        return torch.stack([_row(row) for row in weight_OI])
    blocks = weight_OI.float().flatten().split(64)
    scales = torch.stack([block.abs().max() for block in blocks])
    if quantize == "nf4-double":
        scales = torch.cat([_bytes(group) for group in scales.split(256)])
    levels = torch.tensor(LEVELS)
    parts = []
    for block, scale in zip(blocks, scales, strict=True):
        nearest = (levels - (block / scale).unsqueeze(1)).abs().argmin(1)
        parts.append(levels[nearest] * scale)
    return torch.cat(parts).view_as(weight_OI).to(weight_OI)


def _row(row: Tensor) -> Tensor:
    scale = row.abs().max().float() / 127
    return (row / scale).round() * scale


def _bytes(group: Tensor) -> Tensor:
    return (group / group.max() * 255).round() * group.max() / 255


class QuantisedTwin(LteTwin):
    """The devices' models hold rounded weights; merges add to `kept`, or, without it, to what rounding left."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        assert isinstance(run.method, LteOptions)
        self.quantize, self.master = run.method.quantize, run.method.master
        names = adapted_names(start)
        self.kept = {name: start.get_parameter(name).detach().clone() for name in names}
        for name in names:
            self._show(name)

    def _show(self, name: str) -> None:
        shown = rounded(self.kept[name], self.quantize)
        if self.master == "none":
            self.kept[name] = shown
        for device in self.devices:
            with torch.no_grad():
                device.model.get_parameter(name).copy_(shown)

    def add_to_all(self, name: str, delta: Tensor) -> None:
        """Add to the one W that is kept, and round that for everyone."""
        self.kept[name] = self.kept[name] + delta
        self._show(name)

    def merged_state(self) -> dict[str, Tensor]:
        """Return what evaluation sees: the kept weights where every process has them."""
        state = super().merged_state()
        return {**state, **self.kept} if self.master == "host" else state


def rounded_start(start: nn.Module, quantize: str) -> nn.Module:
    """Return a network whose adapted weights are rounded: what methods train on that never touch them again."""
    model = copy.deepcopy(start)
    with torch.no_grad():
        for name in adapted_names(start):
            model.get_parameter(name).copy_(rounded(start.get_parameter(name), quantize))
    return model


class QuantisedReloraTwin(ReloraTwin):
    """ReLoRA whose network holds rounded weights; restarts add to `kept`, which evaluation sees."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        assert isinstance(run.method, ReloraOptions)
        self.quantize = run.method.quantize
        super().__init__(run, rounded_start(start, self.quantize), draw)
        self.kept = {name: start.get_parameter(name).detach().clone() for name in adapted_names(start)}

    def _with_pair(self) -> dict[str, Tensor]:
        (pair,) = self.pairs
        return {name: self.kept[name] + self.scale * pair.b[name] @ pair.a[name] for name in self.kept}

    @torch.no_grad()
    def restart(self, steps_done: int) -> None:
        self.kept = self._with_pair()
        super().restart(steps_done)
        for name, weight in self.kept.items():
            self.model.get_parameter(name).copy_(rounded(weight, self.quantize))

    def merged_state(self) -> dict[str, Tensor]:
        state = {**super().merged_state(), **self._with_pair()}
        return {name: tensor.detach().clone() for name, tensor in state.items()}
