"""The loop that our own optimizers share: one update for each parameter that has a gradient."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from simulate.optim.grouped import GroupedOptimizer


class PerParameterOptimizer(GroupedOptimizer):
    """An optimizer that updates one parameter (C, ...) after the other; subclasses say how."""

    @torch.no_grad()
    def step(self) -> None:
        for group, parameters in self.with_gradients():
            for parameter in parameters:
                self.state_of(parameter)
                self.update(parameter, group)

    @abstractmethod
    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Change a parameter by its gradient, with the options of its group."""
