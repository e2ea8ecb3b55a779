"""The base of our optimizers: parameters in groups with rates of their own, and a state for each.

It has the attributes of torch.optim.Optimizer that this project uses. That class itself calls torch.compile's tracer,
which no optimizer here needs and whose import takes more processor time than the rest of a small run's start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

OptimizerState = MutableMapping[Tensor, dict[str, Any]]
"""An optimizer's tensors by parameter and name."""
Groups = Sequence[Mapping[str, Any]]
"""Parameters under `params`, beside those options of their own that differ from the optimizer's defaults."""


class GroupedOptimizer(ABC):
    """An optimizer over parameters (C, ...), given as a list, or as groups with options of their own."""

    def __init__(self, params: Sequence[Tensor] | Groups, defaults: dict[str, Any]) -> None:
        groups = [entry if isinstance(entry, Mapping) else {"params": [entry]} for entry in params]
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = [{**defaults, **group} for group in groups]
        self.state: OptimizerState = {}
        """Moments and step counters by parameter."""

    @abstractmethod
    def step(self) -> None:
        """Change every parameter that has a gradient."""

    @abstractmethod
    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state before its first step."""

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Give every parameter that has none its state, at zero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state_of(parameter)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, which begins at zero."""
        if parameter not in self.state:
            self.state[parameter] = self.new_state(parameter)
        return self.state[parameter]

    def with_gradients(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Yield each group with those of its parameters that have a gradient."""
        for group in self.param_groups:
            yield group, [parameter for parameter in group["params"] if parameter.grad is not None]
