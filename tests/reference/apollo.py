"""APOLLO as it is published (Zhu et al. 2024, arXiv 2412.05270, algorithm 1), one channel after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from simulate.common.seeding import address
from simulate.config.run import Run
from simulate.config.tables import Train
from tests.reference.common import adamw
from tests.reference.ddp import DdpTwin
from tests.reference.local_sgd import LocalSgdTwin


def projection(train: Train, place: int, number: int, rank: int, size: int) -> Tensor:
    """Return a matrix of normal numbers of variance 1/rank, (rank, size), that all devices draw alike."""
    draw = torch.Generator().manual_seed(address(train.seed, "apollo", place, number))
    return torch.randn(rank, size, generator=draw, dtype=torch.float64) / math.sqrt(rank)


class Projected:
    """One matrix's state, and the step that it takes for a gradient with at most as many rows as columns."""

    def __init__(self, train: Train, place: int, shape: tuple[int, int]) -> None:
        self.train, self.place, self.size, self.steps = train, place, min(shape), 0
        self.rank = train.apollo_rank or max(1, self.size // 4)
        self.first, self.second = (torch.zeros(self.rank, max(shape), dtype=torch.float64) for _ in range(2))
        self.norm: float | None = None

    def change(self, gradient: Tensor) -> Tensor:
        """Return what is subtracted from the matrix, for each unit of the learning rate."""
        if gradient.shape[0] > gradient.shape[1]:
            return self.change(gradient.T).T
        train, number = self.train, self.steps // self.train.apollo_refresh_every
        self.steps += 1
        r = projection(train, self.place, number, self.rank, self.size) @ gradient
        self.first = train.adam_beta1 * self.first + (1 - train.adam_beta1) * r
        self.second = train.adam_beta2 * self.second + (1 - train.adam_beta2) * r * r
        first = self.first / (1 - train.adam_beta1**self.steps)
        second = self.second / (1 - train.adam_beta2**self.steps)
        adapted = first / (second.sqrt() + 1e-8)
        columns = [
            gradient[:, j] * float(adapted[:, j].norm()) / (float(r[:, j].norm()) + 1e-8) for j in range(r.shape[1])
        ]
        scaled = torch.stack(columns, dim=1)
        norm = float(scaled.norm())
        if self.norm and norm > 1.01 * self.norm:
            scaled, norm = scaled * (1.01 * self.norm / norm), 1.01 * self.norm
        self.norm = norm
        return train.apollo_scale * math.sqrt(self.size / self.rank) * scaled


class ApolloAndAdam:
    """Steps some matrices by APOLLO and all else by AdamW; a group a parameter, as take_step wants them."""

    def __init__(self, train: Train, parameters: list[Tensor], matrices: list[Tensor]) -> None:
        self.train, rate, chosen = train, train.learning_rate, {id(matrix) for matrix in matrices}
        self.adam = adamw(train, [([p for p in parameters if id(p) not in chosen], rate)])
        self.groups: list[dict[str, Any]] = [{"params": [p], "lr": rate, "peak": rate} for p in matrices]
        self.param_groups = [*self.adam.param_groups, *self.groups]
        self.projected = [Projected(train, place, tuple(p.shape)) for place, p in enumerate(matrices)]

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with the gradients and rates that are set."""
        self.adam.step()
        for group, projected in zip(self.groups, self.projected, strict=True):
            (parameter,) = group["params"]
            parameter -= group["lr"] * self.train.weight_decay * parameter
            parameter -= group["lr"] * projected.change(parameter.grad)


def apollo(run: Run, model: nn.Module) -> ApolloAndAdam:
    """Return the optimizer of a plain model: APOLLO for linear layers' weights but the head's, AdamW for the rest."""
    linears = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    return ApolloAndAdam(run.train, list(model.parameters()), linears)


class DdpApolloTwin(DdpTwin):
    """Dense data parallelism with a whole APOLLO a device."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.optimizers = [apollo(run, model) for model in self.models]  # type: ignore[misc]


class LocalSgdApolloTwin(LocalSgdTwin):
    """Local SGD with a whole APOLLO a device."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        for device in self.devices:
            device.optimizer = apollo(run, device.model)  # type: ignore[assignment]
