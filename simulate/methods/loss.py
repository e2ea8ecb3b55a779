"""Losses of the rows of a batch, and the gradients that they leave in a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.tables import Train
from simulate.layers.cross_entropy import row_losses
from simulate.optim.loss_scale import LossScale, lower_precision


class Loss:
    """Mean losses of equal parts of a batch, and their backward pass, scaled where fp16 needs it."""

    def __init__(
        self, model: nn.Module, train: Train, loss_scale: LossScale | None, zeroes_overflow: bool,
        before_forward: Callable[[], None], stepped: Callable[[], Iterable[nn.Parameter]], unused: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Compute losses of a converted network; each pass leaves a gradient in all that `stepped` returns.

        `unused` are tensors of the network, by name, that no pass may have a gradient for.
        """
        self.model, self.train, self.loss_scale, self.zeroes_overflow = model, train, loss_scale, zeroes_overflow
        self.before_forward, self.stepped, self.unused = before_forward, stepped, unused
        for tensor in unused.values():
            tensor.requires_grad_()  # to see whether there is one

    def group_losses(self, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
        """Return the mean loss of each of `groups` equal parts of the batch, (groups,); no mean mixes parts."""
        self.before_forward()
        self.model.train()
        with lower_precision(self.train, inputs.device):
            outputs = self.model(inputs)
        return self.row_losses(outputs, targets).view(groups, -1).mean(1)

    def row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample or token, (M,), in order: cross-entropy with logits."""
        return row_losses(outputs, targets)

    def backward(self, losses: Tensor) -> None:
        """Leave the gradients of the sum of losses, each row's own, in the network's parameters."""
        if self.loss_scale is None:
            losses.sum().backward()
            self._complete_gradients()
            return
        # fp16 gradients would vanish unscaled; each row has a scale of its own.
        self.loss_scale.scaled(losses).sum().backward()
        self._complete_gradients()
        gradients = gradients_of(self.model.parameters())
        self.loss_scale.unscale(gradients)
        if self.zeroes_overflow:
            finite_L = self.loss_scale.finite_rows(gradients)
            for gradient in gradients:
                gradient[~finite_L] = 0
            self.loss_scale.update(finite_L)

    def _complete_gradients(self) -> None:
        """Give parameters that this pass did not use a gradient of zero, as others' passes may have used them.

        Messages then hold the same parameters in all processes, and a device steps alike whoever else shares its
        process. Raises InputError where a pass used what the plan was made without.
        """
        for name, tensor in self.unused.items():
            if tensor.grad is not None:
                raise InputError(
                    f"model: {name} got a gradient, but none from the random samples that the network was traced with, "
                    "so that it was planned as unused; let every pass use it (add 0 times its result), or freeze it"
                )
        for parameter in self.stepped():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
