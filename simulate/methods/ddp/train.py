"""Dense data parallelism: the yardstick. Every device holds all weights; gradients are averaged at every step.

    g = (1/N)·Σ_n ∇ mean-loss_n(w),   w ← AdamW(w, clip(g))      (Li et al. 2020, arXiv 2006.15704)

Devices of unequal batches count by their samples, so that g is the mean over all samples.

All devices hold equal weights at all times, so the local devices share one copy and train on their joined batch. On a
compressed `wire`, g is instead the mean of quantised gradients with error feedback on both ways
(simulate.comm.compression; Tang et al. 2021, arXiv 2102.02888, section 4.3, with finer grids than its one bit).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.comm.compression import CompressedMean
from simulate.config.run import Run
from simulate.methods.ddp.options import DdpOptions
from simulate.methods.gradient_averaging import GradientMethod, mean_over_devices, packed_parameters, take_gradients
from simulate.methods.loss import gradients_of


class Ddp(GradientMethod):
    """Dense training; communicates in every step and never needs a merge."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        wire = run.method.wire if isinstance(run.method, DdpOptions) else "full"
        self.per_device = wire != "full" and communicator.num_devices > 1
        super().__init__(run, communicator, device, network)
        if self.per_device:
            self.messages = packed_parameters(self.parameters)
            first = next(iter(self.parameters.values()))
            self.means = [
                CompressedMean(sum(self.parameters[n].numel() for n in names), wire, communicator, first.detach())
                for names in self.messages
            ]

    def average_gradients(self) -> None:
        if not self.per_device:
            mean_over_devices(gradients_of(self.parameters.values()), self.communicator, self.own_weight)
            return
        own = take_gradients(self.leaves)
        # pop: a message's gradients are freed before the next one is compressed.
        for names, compressed in zip(self.messages, self.means, strict=True):
            (mean_X,) = compressed.mean(own.pop(name).mul_(self.own_weight) for name in names)
            parts = mean_X.split([self.parameters[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                self.parameters[name].grad = part.view_as(self.parameters[name])

    def extra_state(self) -> dict[str, Tensor]:
        if not self.per_device:
            return {}
        return {f"{i}.{key}": value for i, mean in enumerate(self.means) for key, value in mean.state_dict().items()}
