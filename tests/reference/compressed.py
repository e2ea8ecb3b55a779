"""Compressed gradients with error feedback: rounded, of low rank, sparse, signs; one device and tensor at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simulate.common.seeding import address
from simulate.config.run import Run
from simulate.methods.ddp.options import DdpOptions
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.methods.topk.options import TopkOptions
from tests.reference.dense import DenseTwin, flat, mean, unflat
from tests.reference.quantiser import as_received


class RoundedMean:
    """The mean of N vectors that are rounded on their way there, and once more on its way back; both carry errors."""

    def __init__(self, devices: int, elements: int, wire: str) -> None:
        self.wire = wire
        self.errors = [torch.zeros(elements, dtype=torch.float64) for _ in range(devices)]
        self.mean_error = torch.zeros(elements, dtype=torch.float64)

    def of(self, vectors: list[Tensor]) -> Tensor:
        """Return what all devices end up with."""
        arrived = []
        for device, vector in enumerate(vectors):
            corrected = vector + self.errors[device]
            arrived.append(as_received(corrected, self.wire))
            self.errors[device] = corrected - arrived[-1]
        corrected = mean(arrived) + self.mean_error
        result = as_received(corrected, self.wire)
        self.mean_error = corrected - result
        return result


class GradientTwin(DenseTwin):
    """Devices that agree on one gradient at every step; subclasses say on which."""

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses, gradients = self.all_gradients(inputs, targets)
        agreed = self.agreed(gradients)
        for device in self.devices:
            device.apply(agreed, step)
        return losses

    def agreed(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        """Return the gradient that everyone steps with, from each device's own."""
        raise NotImplementedError


class RoundedDdpTwin(GradientTwin):
    """Dense data parallelism whose gradients travel rounded."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, DdpOptions)
        super().__init__(run, start)
        elements = sum(p.numel() for p in start.parameters())
        self.rounded_mean = RoundedMean(len(self.devices), elements, run.method.wire)

    def agreed(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        return unflat(self.rounded_mean.of([flat(own) for own in gradients]), gradients[0])


class ByParameterTwin(GradientTwin):
    """What each device sends of g + e is a tensor of the parameter's shape; e keeps the rest."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.errors = [[torch.zeros_like(p) for p in device.parameters] for device in self.devices]

    def sent(self, corrected: Tensor) -> Tensor:
        """Return C(g + e)."""
        raise NotImplementedError

    def agreed(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        means = []
        for index in range(len(gradients[0])):
            messages = []
            for device, own in enumerate(gradients):
                corrected = own[index] + self.errors[device][index]
                messages.append(self.sent(corrected))
                self.errors[device][index] = corrected - messages[-1]
            means.append(mean(messages))
        return means


class TopkTwin(ByParameterTwin):
    """All but the largest entries are zero."""

    def sent(self, corrected: Tensor) -> Tensor:
        assert isinstance(self.run.method, TopkOptions)
        entries = corrected.reshape(-1)
        count = max(1, math.ceil(self.run.method.density * len(entries)))
        result = torch.zeros_like(entries)
        largest = torch.argsort(entries.abs(), descending=True)[:count]
        result[largest] = entries[largest]
        return result.reshape(corrected.shape)


class SignsgdTwin(ByParameterTwin):
    """Plus or minus one, times the mean magnitude."""

    def sent(self, corrected: Tensor) -> Tensor:
        ones = torch.ones_like(corrected)
        return corrected.abs().sum() / corrected.numel() * torch.where(corrected >= 0, ones, -ones)


class PowerSgdTwin(GradientTwin):
    """Products of two thin matrices; each device keeps its gradient's difference from what all agreed on."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, PowerSgdOptions)
        super().__init__(run, start)
        rank = run.method.rank
        named = list(start.named_parameters())
        self.small = [p.ndim < 2 or rank * (p.shape[0] + p.shape[1]) >= p.numel() for _, p in named]
        self.errors = [[torch.zeros_like(p) for _, p in named] for _ in self.devices]
        self.q = [
            torch.empty(0) if small else self._start(n, p) for small, (n, p) in zip(self.small, named, strict=True)
        ]

    def _start(self, name: str, parameter: Tensor) -> Tensor:
        assert isinstance(self.run.method, PowerSgdOptions)
        draw = torch.Generator().manual_seed(address(self.run.train.seed, "powersgd", name))
        return torch.randn(parameter.shape[1], self.run.method.rank, generator=draw, dtype=torch.float64)

    def agreed(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        result = []
        for index, small in enumerate(self.small):
            own = [of_device[index] for of_device in gradients]
            result.append(mean(own) if small else self._product(index, own))
        return result

    def _product(self, index: int, own: list[Tensor]) -> Tensor:
        corrected = [g + errors[index] for g, errors in zip(own, self.errors, strict=True)]
        p = orthonormal(mean([m @ self.q[index] for m in corrected]))
        self.q[index] = mean([m.T @ p for m in corrected])
        product = p @ self.q[index].T
        for errors, m in zip(self.errors, corrected, strict=True):
            errors[index] = m - product
        return product


def orthonormal(matrix: Tensor) -> Tensor:
    """Return Gram and Schmidt's columns; each twice, since one pass leaves rounding along the earlier ones."""
    columns: list[Tensor] = []
    for column in matrix.T:
        for _ in range(2):
            for earlier in columns:
                column = column - (earlier @ column) * earlier
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)
