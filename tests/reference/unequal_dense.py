"""Dense methods on unequal devices, one device after another: each with its own batch, counted by its samples.

ddp: g = Σ_n w_n·g_n;   local-sgd: θ ← Σ_n w_n·θ_n;   diloco: Δ = θ − Σ_n w_n·θ_n;   w_n = samples_n / Σ_m samples_m
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulate.config.run import Run
from simulate.data.batches import TextBatches
from simulate.data.text import Text
from simulate.methods.build_network import build_model
from simulate.methods.diloco.options import DilocoOptions
from tests.reference.dense import Device


class UnequalDenseTwin:
    """N devices with plain models that start equal."""

    def __init__(self, run: Run, text: Text) -> None:
        self.run, start = run, build_model(run)
        ones = [run.of_class(run.class_of(device)) for device in range(run.cluster.devices)]
        self.devices = [Device(one, start) for one in ones]
        self.data = [TextBatches.of(one, text) for one in ones]
        samples = [one.train.micro_batch * one.train.accumulate for one in ones]
        self.weights = [count / sum(samples) for count in samples]
        self.outer = [p.detach().clone() for p in start.parameters()]
        self.velocity = [torch.zeros_like(p) for p in self.outer]

    def step(self, step: int) -> Tensor:
        """Take a step on every device; returns their mean losses, (N,)."""
        losses, everyones = [], []
        for index, (device, data) in enumerate(zip(self.devices, self.data, strict=True)):
            loss, gradients = device.gradients(*data.batch(step, range(index, index + 1)))
            losses.append(loss)
            everyones.append(gradients)
        if self.run.method.name == "ddp":
            everyones = [self.mean(everyones)] * len(self.devices)
        for device, gradients in zip(self.devices, everyones, strict=True):
            device.apply(gradients, step)
        is_due = (step + 1) % self.run.method.round_steps == 0 or step + 1 == self.run.train.steps
        if is_due and self.run.method.name != "ddp":
            self.merge()
        return torch.stack(losses)

    @torch.no_grad()
    def merge(self) -> None:
        """Give all devices the mean of their weights, or what DiLoCo's outer step makes of it."""
        merged, options = self.mean([device.parameters for device in self.devices]), self.run.method
        if isinstance(options, DilocoOptions):
            for i, mean in enumerate(merged):
                delta = self.outer[i] - mean
                self.velocity[i] = options.outer_momentum * self.velocity[i] + delta
                change = delta + options.outer_momentum * self.velocity[i]
                merged[i] = self.outer[i] - options.outer_learning_rate * change
            self.outer = merged
        for device in self.devices:
            device.set_weights(merged)

    def mean(self, everyones: list[list[Tensor]]) -> list[Tensor]:
        """Return the mean over devices by their samples, tensor by tensor."""
        means = []
        for copies in zip(*everyones, strict=True):
            total = torch.zeros_like(copies[0])
            for weight, copy in zip(self.weights, copies, strict=True):
                total = total + weight * copy.detach()
            means.append(total)
        return means

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first device's weights: after a merge all are equal."""
        return {name: tensor.detach().clone() for name, tensor in self.devices[0].model.state_dict().items()}
