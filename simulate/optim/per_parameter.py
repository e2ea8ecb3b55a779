"""The loop that our own optimizers share: one update for each parameter that has a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PerParameterOptimizer(torch.optim.Optimizer):
    """An optimizer that updates one parameter (C, ...) after the other; subclasses say how."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter not in self.state:
                        self.state[parameter] = self.new_state(parameter)
                    self.update(parameter, group)

    def allocate_state(self) -> None:
        """Give every parameter that has none its state, at zero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter] = self.new_state(parameter)

    @abstractmethod
    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state before its first step."""

    @abstractmethod
    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Change a parameter by its gradient, with the options of its group."""
