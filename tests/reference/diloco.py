"""DiLoCo with a whole plain model and a whole optimizer a device; the outer step in four lines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simulate.config.method_options import FragmentOptions
from simulate.config.run import Run
from simulate.methods.diloco.options import DilocoOptions
from tests.reference.compressed import RoundedMean
from tests.reference.dense import flat, mean, unflat
from tests.reference.local_sgd import LocalTwin


class OuterTwin(LocalTwin):
    """Devices that train by themselves, and move shared weights at merges, one fragment of them after the other."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, FragmentOptions)
        super().__init__(run, start)
        self.rounds = run.method
        self.outer = [p.detach().clone() for p in start.parameters()]
        count, parts = len(self.outer), self.rounds.fragments
        cuts = [math.ceil(count * part / parts) for part in range(parts + 1)]
        self.fragments = [list(range(cuts[part], cuts[part + 1])) for part in range(parts)]

    def merge_if_due(self, step: int) -> None:
        apart = self.rounds.merge_every // self.rounds.fragments
        for part in range(self.rounds.fragments):
            turn = (step + 1 - apart * (part + 1)) % self.rounds.merge_every == 0
            if turn or self.is_last(step):
                self._merge(part)

    def _merge(self, part: int) -> None:
        for i, delta in zip(self.fragments[part], self.deltas(part), strict=True):
            self.outer_step(i, delta)
            for device in self.devices:
                device.parameters[i].copy_(self.outer[i])

    def deltas(self, part: int) -> list[Tensor]:
        """Return Δ of a fragment's parameters, old weights minus new, as it is merged."""
        raise NotImplementedError

    def outer_step(self, i: int, delta: Tensor) -> None:
        """Move one parameter's outer weights."""
        raise NotImplementedError


class DilocoTwin(OuterTwin):
    """Δ = θ − mean(θ_n),   v ← μ·v + Δ,   θ ← θ − η·(Δ + μ·v), for one fragment of the parameters after the other."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, DilocoOptions)
        super().__init__(run, start)
        self.options = run.method
        self.velocity = [torch.zeros_like(p) for p in self.outer]
        self.rounded_means = [
            RoundedMean(len(self.devices), sum(self.outer[i].numel() for i in fragment), self.options.wire)
            for fragment in self.fragments
        ]

    def outer_step(self, i: int, delta: Tensor) -> None:
        momentum = self.options.outer_momentum
        self.velocity[i] = momentum * self.velocity[i] + delta
        self.outer[i] = self.outer[i] - self.options.outer_learning_rate * (delta + momentum * self.velocity[i])

    def deltas(self, part: int) -> list[Tensor]:
        fragment = self.fragments[part]
        if self.options.wire == "full":
            return [self.outer[i] - mean([device.parameters[i] for device in self.devices]) for i in fragment]
        outer = [self.outer[i] for i in fragment]
        changes = [flat(outer) - flat([device.parameters[i] for i in fragment]) for device in self.devices]
        return unflat(self.rounded_means[part].of(changes), outer)
