"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): data-parallel LoRA, merged and drawn anew every T steps.

    W ← W + s·B·A,   A ← a new draw,   B ← 0            (all devices alike: a merge sends nothing)

T is `merge_every`, s the adapters' `scale`.

A restart zeroes the smallest `prune_share` of each of Adam's moments of the adapters, and the first moment wherever the
second is gone (in the authors' code a rate near zero keeps such steps from blowing up). Then the learning rate climbs
back: with c(t) the run's schedule and k steps since the restart at step q,

    rate(q + k) = (k+1)/(w+1)·c(q + w) for k < w = rewarm_steps,   c(t) from there on.

`warm_start_steps` dense steps can go before: the adapters then start from the trained weights, with a new optimizer and
the same climb of the rate.

With `quantize` W is kept in fewer bytes, and a full-precision copy in host memory is what restarts add to.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.layers.convert import convert, merged_state
from simulate.layers.lora import LoraLinear, lora_layers
from simulate.methods.build_network import build_model
from simulate.methods.lora.train import Lora, adapter_parameters
from simulate.methods.relora.options import ReloraOptions
from simulate.methods.stepper import learning_rate_factor
from simulate.optim.moments import prune_moments


class Relora(Lora):
    """LoRA with restarts."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        assert isinstance(run.method, ReloraOptions)
        self.options = run.method
        self.dense = self.options.warm_start_steps > 0
        self.plain = copy.deepcopy(network) if self.dense and network is not None else None
        super().__init__(run, communicator, device, network)

    def prepare(self, model: nn.Module) -> nn.Module:
        return convert(model, 1) if self.dense else super().prepare(model)

    def rate_factor(self, step: int) -> float:
        since = step - self.options.warm_start_steps  # negative during the dense warm start
        last_restart = since // self.options.merge_every * self.options.merge_every
        steps_after, rewarm = since - last_restart, self.options.rewarm_steps
        started_over = last_restart > 0 or (last_restart == 0 and self.options.warm_start_steps > 0)
        if not started_over or steps_after >= rewarm:
            return learning_rate_factor(self.run.train, step)
        # rate(q + k) = (k+1)/(w+1)·c(q + w): the climb ends where the schedule then is.
        return (steps_after + 1) / (rewarm + 1) * learning_rate_factor(self.run.train, step - steps_after + rewarm)

    @torch.no_grad()
    def merge(self, step: int) -> None:
        done = step + 1 - self.options.warm_start_steps
        if self.is_last(step):
            return
        if self.dense and done == 0:
            self._begin_adapters()
        elif done > 0 and done % self.options.merge_every == 0:
            for layer in lora_layers(self.model):
                self._restart(layer, step + 1)
            prune_moments(self.stepper.state, adapter_parameters(self.model), self.options.prune_share)

    def _restart(self, layer: LoraLinear, steps_done: int) -> None:
        # W ← W + s·B·A, A ← a new draw, B ← 0: what the layer computes stays the same.
        layer.set_weight(layer.folded_weight())
        layer.redraw_a(steps_done)
        layer.b.zero_()

    def _begin_adapters(self) -> None:
        weights = merged_state(self.model)
        device = next(iter(weights.values())).device
        self.stepper.state.clear()  # frees Adam's moments before the network with adapters is built
        network = build_model(self.run) if self.plain is None else self.plain
        network.load_state_dict(weights)
        self.dense = False
        self.install(network, device)

    def before_loading(self, state: dict[str, Tensor]) -> None:
        # A checkpoint from after the warm start needs a network with adapters to be loaded into.
        adapted = any(name.startswith("model.") and name.endswith(".a") for name in state)
        if self.dense and adapted:
            self._begin_adapters()
