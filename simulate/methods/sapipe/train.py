"""SAPipe (Chen et al. 2022, NeurIPS): the all-reduce of one step's gradients travels during the next step's compute.

In step t every device takes its gradient g_t at ŵ_t, starts its all-reduce, and steps with the average of the last:

    w_{t+1} = AdamW(w_t, G_{t−1}),   G_t = mean_n(g_t)                     (step 0 has nothing to step with)

What staleness costs is won back by one of
    prediction:  ŵ_{t+1} = AdamW'(w_{t+1}, g_t): a step with the device's own gradient, whose moments are not kept
    delay:       ŵ = w and G_{t−1} ← G_{t−1} + λ·G_{t−1}⊙G_{t−1}⊙(w_t − w_{t−1})   (Zheng et al. 2017, arXiv 1609.08326)
    none:        ŵ = w
The gradient of the last step is never applied. Clipping is of G, and in the prediction of g. simulate.methods.registry
builds the class; the training loop calls `step`.

Legend: L local devices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.layers.convert import merged_state
from simulate.methods.gradient_averaging import GradientMethod, all_reduce_packed, give_copies, take_gradients
from simulate.methods.loss import gradients_of
from simulate.methods.sapipe.options import SapipeOptions
from simulate.methods.stepper import clip_per_device


class Sapipe(GradientMethod):
    """Dense training with one-step-stale gradients."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        assert isinstance(run.method, SapipeOptions)
        self.options = run.method
        self.predicts = self.options.compensation == "prediction"
        super().__init__(run, communicator, device, network)
        self.stale = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        delay = self.options.compensation == "delay"
        self.previous = {name: p.detach().clone() for name, p in self.parameters.items()} if delay else {}

    @property
    def keeps_gradients_apart(self) -> bool:
        return self.predicts

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        shared = dict(self.model.named_parameters())
        self.leaves = shared
        if self.predicts:
            self.leaves = dict(give_copies(self.model, self.local_devices).named_parameters())
        return shared

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses_L = self.loss.backpropagate(inputs, targets, self.local_devices)
        own = take_gradients(self.leaves)
        self.communicator.wait()  # for the all-reduce that the last step started
        if step > 0:
            self._step_with_stale(step)
        for name, gradient in own.items():
            self.stale[name].copy_(gradient.sum(0, keepdim=True) if self.predicts else gradient)
        # Behind the next step's compute; it is applied there, one step late.
        with self.communicator.background():
            all_reduce_packed(list(self.stale.values()), self.communicator)
        if self.predicts:
            self._predict(own, step)
        return losses_L

    def average_gradients(self) -> None:
        """Give the optimizer the averages that have arrived, corrected for the weights' change since then."""
        for name, parameter in self.parameters.items():
            gradient = self.stale[name] / self.communicator.num_devices
            if self.previous:
                change = parameter.detach() - self.previous[name]
                # λ·G⊙G⊙(w_t − w_{t−1}): delay compensation, arXiv 1609.08326.
                gradient.addcmul_(gradient * gradient, change, value=self.options.delay_factor)
                self.previous[name].copy_(parameter)
            parameter.grad = gradient

    @torch.no_grad()
    def _step_with_stale(self, step: int) -> None:
        self.average_gradients()
        clip_per_device(gradients_of(self.parameters.values()), 1, self.run.train.clip_norm)
        self.stepper.step(self.rate_factor(step))

    @torch.no_grad()
    def _predict(self, own: dict[str, Tensor], step: int) -> None:
        """Set every device's weights to where its own gradient would take the shared ones in the next step."""
        clip_per_device(list(own.values()), self.local_devices, self.run.train.clip_norm)
        # The last step of a run predicts with its own rate: there is no next one.
        factor = self.rate_factor(min(step + 1, self.run.train.steps - 1))
        names = {id(p): name for name, p in self.parameters.items()}
        for group, peak in zip(self.stepper.groups, self.stepper.peak_rates, strict=True):
            for parameter in group["params"]:
                name = names[id(parameter)]
                change = self._adam_change(parameter, own[name], step, factor * peak, group["weight_decay"])
                torch.add(parameter, change, out=self.leaves[name].detach())

    def _adam_change(self, parameter: nn.Parameter, gradient: Tensor, taken: int, rate: float, decay: float) -> Tensor:
        """Return what an AdamW step with `gradient`, (L, ...), would add after `taken` steps; moments stay as they are.

        A run's first step has nothing to step with, so step t comes after t steps of the optimizer.
        """
        beta1, beta2 = self.run.train.adam_beta1, self.run.train.adam_beta2
        state = self.stepper.state.get(parameter)
        # Adam's two moments and their bias corrections (Kingma and Ba 2015, algorithm 1), out of place.
        first, second = (state["exp_avg"], state["exp_avg_sq"]) if state else (0, 0)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        first = first / (1 - beta1 ** (taken + 1))
        second = second / (1 - beta2 ** (taken + 1))
        return -rate * (first / (second.sqrt() + self.stepper.adam.defaults["eps"]) + decay * parameter)

    def merged_state(self) -> dict[str, Tensor]:
        return merged_state(self.model, {id(self.leaves[name]): p[0].detach() for name, p in self.parameters.items()})

    def is_kept_per_device(self, name: str) -> bool:
        return name.startswith("predicted.")

    def extra_state(self) -> dict[str, Tensor]:
        kept = {f"stale.{name}": tensor for name, tensor in self.stale.items()}
        kept.update({f"previous.{name}": tensor for name, tensor in self.previous.items()})
        if self.predicts:
            kept.update({f"predicted.{name}": leaf.detach() for name, leaf in self.leaves.items()})
        return kept
