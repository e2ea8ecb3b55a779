"""Local training: every device steps its own copy of the network; local SGD and DiLoCo average the copies at merges.

With `merge_delay` the registry puts simulate.methods.overlapped in front, which calls `send_fragment` and
`apply_merged_fragment` in place of `merge`; with `pace`, simulate.methods.paced, which changes the shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from simulate.layers.convert import convert, merged_state
from simulate.methods.averaging import Averaging
from simulate.methods.base import Method
from simulate.methods.loss import gradients_of
from simulate.methods.round_updates import LayerUpdates, dense_updates
from simulate.methods.stepper import clip_per_device


class LocalTraining(Method):
    """A full copy of the network and of its optimizer for every local device; subclasses merge with `averaging`."""

    can_exclude_devices = True
    averaging: Averaging

    def prepare(self, model: nn.Module) -> nn.Module:
        return convert(model, self.local_devices)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        # Each device has parameters of its own, so the gradients of the sum of losses are each device's own.
        losses_L = self.loss.backpropagate(inputs, targets, self.local_devices)
        clip_per_device(gradients_of(self.parameters.values()), self.local_devices, self.run.train.clip_norm)
        self.stepper.step(self.rate_factor(step))
        return losses_L

    def merge_weights(self, step: int) -> Tensor | None:
        """Return all devices' shares w_n of the mean, (N,), or None where they are equal."""
        return self.shares()

    @torch.no_grad()
    def merge(self, step: int) -> None:
        for index in self.fragments_due(step):
            self.averaging.merge(index, self.merge_weights(step))
        self.healthy_N = None

    def send_fragment(self, index: int, step: int) -> None:
        self.averaging.send(index, self.merge_weights(step))

    def apply_merged_fragment(self, index: int) -> None:
        self.averaging.apply_merged(index)

    def exclude_devices(self, healthy_N: Tensor) -> None:
        super().exclude_devices(healthy_N)
        self.averaging.exclude_devices(self.healthy_L)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the weights of the last merge: between merges that are late or of fragments no device has them all."""
        return merged_state(self.model, {id(self.parameters[name]): t for name, t in self.averaging.last.items()})

    def base_state(self) -> dict[str, Tensor]:
        return self.averaging.base_state()

    def load_base(self, base: Mapping[str, Tensor]) -> None:
        self.averaging.load_base(base)

    def keep_merged(self) -> None:
        self.averaging.keep_last()

    def updates(self, step: int) -> Iterator[LayerUpdates]:
        return dense_updates(self.model, self.parameters, self.averaging.last, self.merge_weights(step))

    def extra_state(self) -> dict[str, Tensor]:
        return {**super().extra_state(), **self.averaging.state_dict()}
