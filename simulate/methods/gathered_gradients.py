"""Gradients that are compressed with error feedback and gathered from all devices: base of top-k and signSGD.

Legend: L local devices, N devices, X elements of a parameter.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.methods.gradient_averaging import GradientMethod, take_gradients
from simulate.rules.transport import gather_groups


class GatheredGradients(GradientMethod):
    """p_n = g_n + e_n,   sent: C(p_n),   e_n ← p_n − C(p_n),   g ← mean_n(C(p_n)), parameter by parameter."""

    per_device = True

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        super().__init__(run, communicator, device, network)
        self.errors = {n: p.new_zeros(self.local_devices, p.numel()) for n, p in self.parameters.items()}

    @abstractmethod
    def compress(self, corrected_LX: Tensor) -> list[Tensor]:
        """Return the messages C(p_n), (L, ...) each, and leave the error p_n − C(p_n) in `corrected_LX`."""

    @abstractmethod
    def mean(self, messages: list[Tensor], elements: int) -> Tensor:
        """Return the mean, (X,), of all devices' messages, (N, ...) each."""

    def average_gradients(self) -> None:
        # p_n = g_n + e_n is formed in the errors' own memory; `compress` leaves p_n − C(p_n) there.
        gradients = take_gradients(self.leaves)
        sent = {name: self.compress(e.add_(gradients.pop(name).view_as(e))) for name, e in self.errors.items()}
        names = list(sent)
        # Messages hold all devices' parts, so they are cut by the bytes that arrive, not by those that are sent.
        sizes = [sum(t[0].numel() * t.element_size() for t in sent[name]) for name in names]
        for group in gather_groups(sizes, self.communicator.num_devices):
            members = [names[i] for i in group]
            received = iter(self.communicator.all_gather([tensor for name in members for tensor in sent[name]]))
            for name in members:
                parameter = self.parameters[name]
                mean_X = self.mean([next(received) for _ in sent[name]], parameter.numel())
                parameter.grad = mean_X.to(parameter).view_as(parameter)

    def extra_state(self) -> dict[str, Tensor]:
        return {f"error.{name}": error for name, error in self.errors.items()}


def pack_bits(bits_LX: Tensor) -> Tensor:
    """Return booleans eight to a byte, (L, ceil(X/8)) uint8, the first one lowest."""
    padded = torch.nn.functional.pad(bits_LX.to(torch.uint8), (0, -bits_LX.shape[1] % 8)).view(len(bits_LX), -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits_LX.device)).sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, elements: int) -> Tensor:
    """Return the first `elements` booleans of each row of the packed bits of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 1).view(len(packed), -1)[:, :elements].bool()
