"""Merges without some devices where devices are unequal: one device after another, whole models, plain loops.

w_n = samples_n·c_n·(1 + age_n)^−p / Σ over those who take part; a device that is late stays on its old weights, and
brings the difference from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulate.config.run import Run
from simulate.data.text import Text
from simulate.methods.lte.options import LteOptions
from tests.reference.common import adapted_names
from tests.reference.paced import count_skipped
from tests.reference.quorum import Roll
from tests.reference.unequal import UnequalTwin
from tests.reference.unequal_dense import UnequalDenseTwin


class Weighing:
    """The shares of those who take part, by samples, steps and age."""

    def __init__(self, run: Run) -> None:
        self.roll = Roll(run)
        ones = [run.of_class(run.class_of(device)) for device in range(run.cluster.devices)]
        self.roll.sizes = [float(one.train.micro_batch * one.train.accumulate) for one in ones]


class QuorumUnequalTwin(UnequalTwin):
    """LTE with a reset on unequal devices."""

    def __init__(self, run: Run, text: Text) -> None:
        super().__init__(run, text)
        self.roll = Weighing(run).roll
        self.merged = {name: tensor.detach().clone() for name, tensor in self.start.named_parameters()}
        self.bases = [dict(self.merged) for _ in self.devices]
        self.last_losses = torch.zeros(len(self.devices), dtype=torch.float64)

    def step(self, step: int) -> Tensor:
        for n, (device, data) in enumerate(zip(self.devices, self.data, strict=True)):
            if self.roll.trains(step, n):
                self.last_losses[n] = device.step(*data.batch(step, range(n, n + 1)), step)
        if self.roll.merges_after(step):
            self.merge_those_present(step // self.roll.every, step + 1)
        return self.last_losses.clone()

    @torch.no_grad()
    def merge_those_present(self, merge: int, steps_done: int) -> None:
        """Add the changes of those who take part, and let all but late ones go on from the sum."""
        shares, options, adapted = self.roll.shares(merge), self.run.method, adapted_names(self.start)
        assert isinstance(options, LteOptions)
        for name in self.merged:
            for n, share in shares.items():
                self.merged[name] = self.merged[name] + share * self.change(n, name, adapted)
        for n, device in enumerate(self.devices):
            count_skipped(device.optimizer, steps_done)
            if self.roll.given(merge, n) == 0:
                continue
            self.bases[n] = dict(self.merged)
            for name in self.merged:
                device.model.get_parameter(name).copy_(self.merged[name])
            for head in device.heads if n in shares else ():
                for name in adapted:
                    head.b[name].zero_()
                    if options.reset == "ab":
                        head.a[name].copy_(self.draw(name, head.index, steps_done))
                    head.remember(name, head.a[name], head.b[name])

    def change(self, n: int, name: str, adapted: list[str]) -> Tensor:
        """Return what a device brings: the mean of its heads' products, or what a parameter has moved by."""
        device = self.devices[n]
        if name in adapted:
            return device.scale * torch.stack([head.b[name] @ head.a[name] for head in device.heads]).mean(0)
        return device.model.get_parameter(name) - self.bases[n][name]

    def merged_state(self) -> dict[str, Tensor]:
        own = self.devices[0].model
        with torch.no_grad():
            for name, tensor in self.merged.items():
                own.get_parameter(name).copy_(tensor)
        return {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}


class QuorumUnequalDenseTwin(UnequalDenseTwin):
    """Whole weights of unequal devices."""

    def __init__(self, run: Run, text: Text) -> None:
        super().__init__(run, text)
        self.roll = Weighing(run).roll
        self.merged = [p.detach().clone() for p in self.devices[0].parameters]
        self.bases = [self.merged for _ in self.devices]
        self.last_losses = torch.zeros(len(self.devices), dtype=torch.float64)

    def step(self, step: int) -> Tensor:
        for n, (device, data) in enumerate(zip(self.devices, self.data, strict=True)):
            if self.roll.trains(step, n):
                self.last_losses[n], gradients = device.gradients(*data.batch(step, range(n, n + 1)))
                device.apply(gradients, step)
        if self.roll.merges_after(step):
            for device in self.devices:
                count_skipped(device.optimizer, step + 1)
            with torch.no_grad():
                self.merge_those_present(step // self.roll.every)
        return self.last_losses.clone()

    def merge_those_present(self, merge: int) -> None:
        """Add the changes of those who take part, and let all but late ones go on from the sum."""
        shares = self.roll.shares(merge)
        merged = []
        for i, weight in enumerate(self.merged):
            change = torch.zeros_like(weight)
            for n, share in shares.items():
                change += share * (self.devices[n].parameters[i] - self.bases[n][i])
            merged.append(weight + change)
        self.merged = merged
        for n, device in enumerate(self.devices):
            if self.roll.given(merge, n) != 0:
                device.set_weights(self.merged)
                self.bases[n] = self.merged

    def merged_state(self) -> dict[str, Tensor]:
        self.devices[0].set_weights(self.merged)
        return super().merged_state()
