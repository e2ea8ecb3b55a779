"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): local AdamW, and an outer optimizer on each round's change.

    Δ = θ − mean_n(θ_n),   v ← μ·v + Δ,   θ ← θ − η·(Δ + μ·v),   θ_n ← θ     (algorithm 1; Nesterov as in PyTorch)

With `fragments`, groups of parameters take turns, each every T steps (Douillard et al. 2025, arXiv 2501.18512). On a
compressed `wire`, Δ travels with error feedback.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.methods.averaging import Averaging
from simulate.methods.diloco.options import DilocoOptions
from simulate.methods.local_training import LocalTraining


class Diloco(LocalTraining):
    """Local training with Nesterov momentum on the merged change."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        options = run.of_devices(communicator.local_devices).method
        assert isinstance(options, DilocoOptions)
        self.options = options
        super().__init__(run, communicator, device, network)
        self.averaging = Averaging(
            self.parameters, communicator, wire=self.options.wire, fragments=self.options.fragments, outer=self._outer,
            delayed=self.options.merge_delay > 0, fewest=run.cluster.fewest,
        )  # fmt: skip
        self.momentum = {name: torch.zeros_like(last) for name, last in self.averaging.last.items()}

    def _outer(self, name: str, last: Tensor, mean: Tensor) -> Tensor:
        change = last - mean  # Δ: algorithm 1's outer gradient
        velocity = self.momentum[name].mul_(self.options.outer_momentum).add_(change)  # v ← μ·v + Δ
        change.add_(velocity, alpha=self.options.outer_momentum)  # Δ + μ·v: Nesterov, as torch.optim.SGD has it
        return torch.sub(last, change, alpha=self.options.outer_learning_rate)  # θ − η·(Δ + μ·v)

    def base_state(self) -> dict[str, Tensor]:
        momentum = {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}
        return {**super().base_state(), **momentum}

    @torch.no_grad()
    def load_base(self, base: Mapping[str, Tensor]) -> None:
        super().load_base(base)
        for name, tensor in self.momentum.items():  # all devices that merge step the same outer optimizer
            tensor.copy_(base[f"momentum.{name}"])

    def extra_state(self) -> dict[str, Tensor]:
        momentum = {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}
        return {**super().extra_state(), **momentum}
