"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): LoRA that is merged and begun anew every T steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.relora.options import ReloraOptions
from tests.reference.common import scheduled_rate
from tests.reference.ddp import DdpTwin
from tests.reference.lora import Draw, LoraTwin


class ReloraTwin(LoraTwin):
    """Dense steps first, if the run says so; then LoRA with restarts."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        assert isinstance(run.method, ReloraOptions)
        super().__init__(run, start, draw)
        self.options, self.warm_up = run.method, DdpTwin(run, start)
        after, steps = run.method.warm_start_steps, run.train.steps
        self.begins = list(range(after, steps, run.method.merge_every))
        """Steps done when adapters start from nothing."""

    def rate_factor(self, step: int) -> float:
        """Return c(t), or (k+1)/(w+1)·c(q+w) in the k-th of w steps after new adapters took over at step q > 0."""
        rewarm = self.options.rewarm_steps
        for q in self.begins:
            k = step - q
            if q > 0 and 0 <= k < min(rewarm, self.options.merge_every):
                return (k + 1) / (rewarm + 1) * scheduled_rate(self.run.train, 1.0, q + rewarm)
        return scheduled_rate(self.run.train, 1.0, step)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (N*B, T) tokens; returns the devices' mean losses, (N,)."""
        if step < self.options.warm_start_steps:
            return self.warm_up.step(inputs, targets, step)
        if step == self.options.warm_start_steps > 0:  # the weights stay, all else is new
            LoraTwin.__init__(self, self.run, self.warm_up.models[0], self.draw)
        elif step in self.begins and step > 0:
            self.restart(step)
        return super().step(inputs, targets, step)

    @torch.no_grad()
    def restart(self, steps_done: int) -> None:
        """W ← W + s·B·A, a new A, B ← 0; only the largest moments stay."""
        (pair,) = self.pairs
        for name, weight in self.effective().items():
            self.model.get_parameter(name).copy_(weight)
            pair.a[name].copy_(self.draw(name, 0, steps_done))
            pair.b[name].zero_()
        for parameter in pair.parameters:
            prune_smallest(self.optimizer, parameter, self.options.prune_share)


def prune_smallest(optimizer: torch.optim.Optimizer, parameter: Tensor, share: float) -> None:
    """Zero the given share of the entries of both moments, from the smallest on, and m wherever v is zero."""
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[parameter][key].view(-1)
        numbers = moment.tolist()
        by_size = sorted(range(len(numbers)), key=lambda i: abs(numbers[i]))
        for i in by_size[: int(share * len(numbers))]:
            moment[i] = 0.0
    state = optimizer.state[parameter]
    for index, second in enumerate(state["exp_avg_sq"].view(-1).tolist()):
        if second == 0:
            state["exp_avg"].view(-1)[index] = 0.0
