"""LTE that trains B alone: A is a constant of its head, drawn at the start and, with reset = "ab", at merges."""

from __future__ import annotations

from torch import nn

from simulate.config.run import Run
from tests.reference.lora import Draw
from tests.reference.lte import Device, LteTwin


class LteFrozenATwin(LteTwin):
    """The heads' trained parameters are their B."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        for head in self.heads:
            head.parameters = list(head.b.values())
            for a in head.a.values():
                a.requires_grad_(False)
        self.devices = [Device(run, start, device.heads) for device in self.devices]
