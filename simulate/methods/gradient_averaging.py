"""Base of methods whose devices hold equal weights and step with one gradient, agreed on at every step.

Data parallelism and its compressed and stale forms subclass it, and so do the adapters that all devices share. They say
how gradients are averaged; the step around that is the same for all and stands here. The functions below are theirs.

Legend: L local devices, C copies (1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.comm.transfers import bucket
from simulate.layers.convert import convert, merged_state
from simulate.methods.base import Method
from simulate.methods.loss import gradients_of
from simulate.methods.stepper import clip_per_device


class GradientMethod(Method):
    """Training with one agreed gradient; the local devices share one copy of the weights and of Adam's moments.

    Where a method compresses each device's gradient by itself (`per_device`), the network's parameters are views of the
    shared copy, expanded over devices, so that autograd keeps the devices' gradients apart.
    """

    per_device = False
    is_trained_per_device = False

    @property
    def keeps_gradients_apart(self) -> bool:
        """Whether the network's parameters have a row for each local device."""
        return self.per_device

    def prepare(self, model: nn.Module) -> nn.Module:
        return convert(model, copies=1)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        shared = dict(self.model.named_parameters())
        # The optimizer steps `shared`; the network computes with views of it, which collect each device's gradient.
        if self.per_device:
            self.leaves = dict(expand_parameters(self.model, self.local_devices).named_parameters())
        return shared

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses_L = self.loss.backpropagate(inputs, targets, self.local_devices)
        with torch.no_grad():
            self.average_gradients()
        # After the mean: all devices clip the one gradient that they agree on.
        clip_per_device(gradients_of(self.parameters.values()), 1, self.run.train.clip_norm)
        self.stepper.step(self.rate_factor(step))
        return losses_L

    @abstractmethod
    def average_gradients(self) -> None:
        """Give each of `parameters` the mean gradient over all devices, or its compressed form."""

    def merge(self, step: int) -> None:
        """Nothing to do: the weights are one model after every step."""

    def merged_state(self) -> dict[str, Tensor]:
        return merged_state(self.model)


def expand_parameters(model: nn.Module, devices: int) -> nn.Module:
    """Replace each parameter (1, ...) by a view (L, ...) of its storage that is a leaf of its own."""
    return _replace_parameters(model, lambda p: p.detach().expand(devices, *p.shape[1:]))


def give_copies(model: nn.Module, devices: int) -> nn.Module:
    """Replace each parameter (1, ...) by one copy for each device, (L, ...)."""
    return _replace_parameters(model, lambda p: p.detach().repeat(devices, *(1,) * (p.ndim - 1)))


def _replace_parameters(model: nn.Module, change: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in replaced:  # tied parameters stay tied
                replaced[id(parameter)] = nn.Parameter(change(parameter))
            setattr(module, name, replaced[id(parameter)])
    return model


def take_gradients(leaves: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return each device's gradients, (L, ...), by name, and leave none in the parameters."""
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return gradients


def mean_over_devices(sums: list[Tensor], communicator: Communicator, weight: float = 1.0) -> None:
    """Turn sums over the local devices into means over all devices, in place, in packed messages.

    `weight` is what each local device counts, in units of an equal share.
    """
    if not sums:
        return
    if weight != 1.0:
        torch._foreach_mul_(sums, weight)
    all_reduce_packed(sums, communicator)
    torch._foreach_div_(sums, float(communicator.num_devices))


def all_reduce_packed(tensors: list[Tensor], communicator: Communicator) -> None:
    """Sum tensors over all processes, in place, in packed messages."""
    for group in bucket([tensor.numel() * tensor.element_size() for tensor in tensors]):
        communicator.all_reduce([tensors[i] for i in group])


def packed_parameters(parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Group names of parameters (C, ...) into messages by the bytes of one copy."""
    names = list(parameters)
    sizes = [p[0].numel() * p.element_size() for p in parameters.values()]
    return [[names[i] for i in group] for group in bucket(sizes)]
