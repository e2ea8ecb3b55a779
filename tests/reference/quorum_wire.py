"""Rounded merges without some devices: each keeps the error of all that it sent or averaged, also while it is away.

What a device sends is its share of the change, times N since what is made of them is a plain mean over N; its error is
in the same units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.common import adapted_names
from tests.reference.dense import flat, unflat
from tests.reference.lora import Draw
from tests.reference.paced import count_skipped
from tests.reference.quantiser import BLOCK, as_received
from tests.reference.quorum import QuorumDilocoTwin, QuorumLocalSgdTwin, QuorumLocalTwin, QuorumLteFrozenATwin


class RoundedMeanOfSome:
    """The sum of some of N devices' vectors over N, rounded on their way there and once more on the way back."""

    def __init__(self, devices: int, elements: int, wire: str) -> None:
        self.wire = wire
        self.errors = [torch.zeros(elements, dtype=torch.float64) for _ in range(devices)]

    def of(self, vectors: dict[int, Tensor]) -> Tensor:
        """Return what all devices end up with, where those of `vectors` take part."""
        total = torch.zeros_like(self.errors[0])
        for n, vector in vectors.items():
            corrected = vector + self.errors[n]
            arrived = as_received(corrected, self.wire)
            self.errors[n] = corrected - arrived
            total += arrived
        average = total / len(self.errors)
        result = as_received(average, self.wire)
        # Those that take part each average as many whole blocks, the last of them the rest.
        size = BLOCK * math.ceil(len(total) / (BLOCK * len(vectors)))
        for place, n in enumerate(sorted(vectors)):
            own = slice(place * size, (place + 1) * size)
            self.errors[n][own] += len(self.errors) * (average - result)[own]
        return result


class RoundedLocalTwin(QuorumLocalTwin):
    """Whole changes of weights in one rounded message."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.of_some = RoundedMeanOfSome(len(self.devices), len(flat(self.weights)), run.method.wire)  # type: ignore[attr-defined]

    def _merge_those_present(self, merge: int) -> None:
        shares, count = self.roll.shares(merge, self.sized), len(self.devices)
        sent = {
            n: count * share * (flat(self.devices[n].parameters) - flat(self.bases[n])) for n, share in shares.items()
        }
        changes = unflat(self.of_some.of(sent), self.weights)
        for i, (weight, change) in enumerate(zip(self.weights, changes, strict=True)):
            weight.copy_(self.moved(i, weight, change))
        for n, device in enumerate(self.devices):
            if self.roll.given(merge, n) != 0:
                device.set_weights(self.weights)
                self.bases[n] = [weight.clone() for weight in self.weights]


class RoundedLocalSgdTwin(RoundedLocalTwin, QuorumLocalSgdTwin):
    """Weights move by the rounded mean change."""


class RoundedDilocoTwin(RoundedLocalTwin, QuorumDilocoTwin):
    """Weights move by the outer step on it."""


class RoundedLteTwin(QuorumLteFrozenATwin):
    """B of all of a device's heads is one message a layer, and all other parameters are one together."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        self.adapted = adapted_names(start)
        self.others = [name for name, _ in start.named_parameters() if name not in self.adapted]
        elements = sum(self.merged[name].numel() for name in self.others)
        self.of_some = RoundedMeanOfSome(len(self.devices), elements, self.options.wire)
        self.errors: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def _merge_those_present(self, merge: int, steps_done: int) -> None:
        shares, count = self.roll.shares(merge, sized=False), len(self.devices)
        for name in self.adapted:
            for n, share in shares.items():
                self.merged[name] = self.merged[name] + share * self._rounded_product(n, name, count * share)
        if self.options.merge_transport == "server":
            for name in self.others:
                for n, share in shares.items():
                    change = self._own(n, name) - self.bases[n][name]
                    self.merged[name] = self.merged[name] + share * change
        else:
            sent = {n: count * share * flat(self._changes(n)) for n, share in shares.items()}
            changes = unflat(self.of_some.of(sent), [self.merged[name] for name in self.others])
            for name, change in zip(self.others, changes, strict=True):
                self.merged[name] = self.merged[name] + change
        for n, device in enumerate(self.devices):
            count_skipped(device.optimizer, steps_done)
            if self.roll.given(merge, n) == 0:
                continue
            self.bases[n] = {name: tensor.clone() for name, tensor in self.merged.items()}
            for name in (*self.adapted, *self.others):
                device.model.get_parameter(name).copy_(self.merged[name])
            for head in device.heads if n in shares else ():
                for name in self.adapted:
                    self._start_round(device, head, name, steps_done)

    def _changes(self, n: int) -> list[Tensor]:
        return [self._own(n, name) - self.bases[n][name] for name in self.others]

    def _rounded_product(self, n: int, name: str, weight: float) -> Tensor:
        """Return s·mean_h(B̂_h·A_h); the error is kept times the weight that the product has in the merge."""
        heads = self.devices[n].heads
        wanted = torch.stack([head.b[name] for head in heads])
        if (name, n) in self.errors:
            wanted = wanted + self.errors[name, n] / weight
        received = as_received(wanted.flatten(), self.options.wire).view_as(wanted)
        self.errors[name, n] = weight * (wanted - received)
        return self.options.scale * torch.stack([b @ h.a[name] for b, h in zip(received, heads, strict=True)]).mean(0)
