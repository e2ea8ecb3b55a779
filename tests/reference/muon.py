"""Muon as it is published (Jordan et al. 2024; step size of arXiv 2502.16982), one plain matrix after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.config.tables import Train
from tests.reference.common import adamw
from tests.reference.ddp import DdpTwin
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin

ADAPTER_FACTOR = 3.0
"""At rank 32."""


def polynomial(value: float) -> float:
    """Return what five iterations make of a singular value."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return five iterations of X ← a·X + b·(XXᵀ)X + c·(XXᵀ)²X on a matrix of at most as many rows as columns."""
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix / (math.sqrt(float((matrix * matrix).sum())) + 1e-12)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


class MuonAndAdam:
    """Steps some matrices by Muon and all else by AdamW; a group a parameter, as take_step wants them."""

    def __init__(self, train: Train, rates: list[tuple[list[Tensor], float]], matrices: list[Tensor]) -> None:
        chosen = {id(matrix) for matrix in matrices}
        self.train, self.adam = train, adamw(train, [([p for p in ps if id(p) not in chosen], r) for ps, r in rates])
        self.muon_groups: list[dict[str, Any]] = [
            {"params": [p], "lr": rate, "peak": rate} for ps, rate in rates for p in ps if id(p) in chosen
        ]
        self.param_groups = [*self.adam.param_groups, *self.muon_groups]
        self.momentum = {id(p): torch.zeros_like(p) for p in matrices}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with the gradients and rates that are set."""
        self.adam.step()
        share, decay = self.train.muon_momentum, self.train.weight_decay
        for group in self.muon_groups:
            (parameter,) = group["params"]
            moment = share * self.momentum[id(parameter)] + (1 - share) * parameter.grad
            self.momentum[id(parameter)] = moment
            update = newton_schulz(share * moment + (1 - share) * parameter.grad)
            parameter -= group["lr"] * decay * parameter
            parameter -= group["lr"] * 0.2 * math.sqrt(max(parameter.shape)) * update


class DdpMuonTwin(DdpTwin):
    """Dense data parallelism whose linear layers' weights are stepped by Muon, but for the tied head."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.optimizers = [self._optimizer(model) for model in self.models]  # type: ignore[misc]

    def _optimizer(self, model: nn.Module) -> MuonAndAdam:
        linears = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
        train = self.run.train
        return MuonAndAdam(train, [(list(model.parameters()), train.learning_rate)], linears)


class LteMuonTwin(LteTwin):
    """LTE whose factors are stepped by Muon, each head's A and B by itself, and nothing else."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        rate = run.train.learning_rate
        for device in self.devices:
            factors = [p for head in device.heads for p in head.parameters]
            faster = ADAPTER_FACTOR * math.sqrt(min(self.options.rank / 32, 1.0))
            rates = [(factors, faster * rate / device.scale), (device.replicated, rate)]
            device.optimizer = MuonAndAdam(run.train, rates, factors)
