"""SparseLoCo with a whole plain model and a whole optimizer a device; entries are sorted, not searched."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.sparseloco.options import SparselocoOptions
from tests.reference.dense import flat, mean, unflat
from tests.reference.diloco import OuterTwin
from tests.reference.quantiser import as_received


class SparselocoTwin(OuterTwin):
    """e_n ← β·e_n + θ_n − θ,   θ ← θ + α·mean(C(e_n)),   e_n ← e_n − C(e_n), for one fragment after the other."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, SparselocoOptions)
        super().__init__(run, start)
        self.method = run.method
        self.weights = [1 / len(self.devices)] * len(self.devices)
        self.errors = [
            [torch.zeros(sum(self.outer[i].numel() for i in part), dtype=torch.float64) for _ in self.devices]
            for part in self.fragments
        ]

    def outer_step(self, i: int, delta: Tensor) -> None:
        self.outer[i] = self.outer[i] - self.method.outer_learning_rate * delta

    def deltas(self, part: int) -> list[Tensor]:
        outer = [self.outer[i] for i in self.fragments[part]]
        sent = []
        for number, device in enumerate(self.devices):
            change = flat([device.parameters[i] for i in self.fragments[part]]) - flat(outer)
            weight = self.weights[number] * len(self.devices)
            corrected = self.method.error_decay * self.errors[part][number] + weight * change
            sent.append(self._sent(corrected))
            self.errors[part][number] = corrected - sent[-1]
        return unflat(-mean(sent), outer)

    def _sent(self, corrected: Tensor) -> Tensor:
        places = []
        for start in range(0, len(corrected), 4096):
            run = corrected[start : start + 4096]
            sizes = [float(x) for x in run.abs()]
            largest = max(sizes)
            # What is zero but for rounding is taken by its place.
            sizes = [max(x, 1e-6 * (2 - i / len(run)) * largest) for i, x in enumerate(sizes)]
            order = sorted(range(len(run)), key=lambda i, sizes=sizes: -sizes[i])
            places += [start + i for i in order[: math.ceil(self.method.density * len(run))]]
        result = torch.zeros_like(corrected)
        result[places] = as_received(corrected[places], self.method.wire)
        return result
