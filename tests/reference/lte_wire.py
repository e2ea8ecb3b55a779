"""LTE whose messages are rounded, with error feedback: factors, dense deltas and everything outside adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.quantiser import Sender


class LteWireTwin(LteTwin):
    """What is merged is what the messages said."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        self.sender = Sender(self.options.wire)
        self.last = {id(p): p.detach().clone() for device in self.devices for p in device.replicated}

    def merge_adapted(self, names: list[str]) -> None:
        if self.options.merge_transport == "reduce":
            self._merge_deltas(names)
        else:
            for name in names:
                self._merge_factors(name)

    def _merge_factors(self, name: str) -> None:
        """W ← W + (s/H)·Σ_h (B̂_h·Â_h − B0_h·A0_h), then A0_h, B0_h ← Â_h, B̂_h: a message a device, A and B apart."""
        total = torch.zeros_like(self.devices[0].model.get_parameter(name))
        for n, device in enumerate(self.devices):
            sent_a = self._sent(torch.stack([head.a[name] for head in device.heads]), name, "a", n)
            sent_b = self._sent(torch.stack([head.b[name] for head in device.heads]), name, "b", n)
            for head, a, b in zip(device.heads, sent_a, sent_b, strict=True):
                total += b @ a - head.b0[name] @ head.a0[name]
                head.remember(name, a, b)
        self.add_to_all(name, total * self.options.scale / len(self.heads))

    def _sent(self, factors: Tensor, *address: object) -> Tensor:
        received = self.sender.send(factors, *address)
        if self.options.reset == "ab":  # the next draw has nothing to do with what this one lost
            del self.sender.lost[address]
        return received

    def _merge_deltas(self, names: list[str]) -> None:
        """W ← W + mean_n(s·mean_k(B_k·A_k − B0_k·A0_k)), all layers in one message."""
        deltas = []
        for device in self.devices:
            means = [torch.stack([head.change(name) for head in device.heads]).mean(0) for name in names]
            deltas.append(self.options.scale * flat(means))
        weights: list[Tensor] = [self.devices[0].model.get_parameter(name) for name in names]
        for name, delta in zip(names, cut(self.sender.mean(deltas, "deltas", names[0]), weights), strict=True):
            self.add_to_all(name, delta)
            for head in self.heads:
                head.remember(name, head.a[name], head.b[name])

    def average(self, columns: list[tuple[Tensor, ...]]) -> None:
        """θ ← θ_last + the rounded mean of everyone's θ_n − θ_last, all parameters in one message."""
        if self.options.merge_transport == "server":
            super().average(columns)
            return
        rows = list(zip(*columns, strict=True))
        changes = [flat([p - self.last[id(p)] for p in row]) for row in rows]
        mean = self.sender.mean(changes, "others", id(columns[0][0]))
        for row in rows:
            for parameter, change in zip(row, cut(mean, list(row)), strict=True):
                parameter.copy_(self.last[id(parameter)] + change)
                self.last[id(parameter)] = parameter.detach().clone()


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all elements in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def cut(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return the vector's parts in the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
