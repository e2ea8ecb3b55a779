"""Losses of the rows of a batch, and the gradients that they leave in a network.

A method's step hands its whole batch to `Loss.backpropagate`. With `train.accumulate` above 1 the batch goes through
the network in parts, and their gradients add up, so that activations of one part are held at a time. The step is that
of the whole batch: networks that mix samples (batch norm) or draw (dropout) are refused.

Legend: G groups of equal size (devices or heads) in the order of the batch's rows, P parts, M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.tables import Train
from simulate.models.losses import GroupMeans
from simulate.optim.loss_scale import LossScale, lower_precision


class Loss:
    """Mean losses of equal groups of a batch, and their backward pass, scaled where fp16 needs it."""

    def __init__(
        self, model: nn.Module, train: Train, loss_scale: LossScale | None, zeroes_overflow: bool,
        before_forward: Callable[[], None], stepped: Callable[[], Iterable[nn.Parameter]], unused: Mapping[str, Tensor],
        group_means: GroupMeans,
    ) -> None:  # fmt: skip
        """Compute losses of a converted network; each step leaves a gradient in all that `stepped` returns.

        `unused` are tensors of the network, by name, that no pass may have a gradient for.
        """
        self.model, self.train, self.loss_scale, self.zeroes_overflow = model, train, loss_scale, zeroes_overflow
        self.before_forward, self.stepped, self.unused = before_forward, stepped, unused
        self.group_means = group_means
        for tensor in unused.values():
            tensor.requires_grad_()  # to see whether there is one

    def backpropagate(self, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
        """Leave the gradients of the sum of the groups' mean losses in the network's parameters; return them, (G,)."""
        parts = self.train.accumulate
        losses_PG = []
        for part_inputs, part_targets in _parts(inputs, targets, groups, parts):
            # Parts are of equal size, so a group's mean is the mean of its parts' means.
            losses_G = self.group_losses(part_inputs, part_targets, groups) / parts
            losses_PG.append(losses_G.detach())
            if self.loss_scale is not None:  # fp16 gradients would vanish unscaled; each row has a scale of its own
                losses_G = self.loss_scale.scaled(losses_G)
            losses_G.sum().backward()
        self._complete_gradients()
        if self.loss_scale is not None:
            self._unscale(self.loss_scale)
        return torch.stack(losses_PG).sum(0)

    def group_losses(self, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
        """Return the mean loss of each of `groups` equal parts of a batch, (G,); no mean mixes groups."""
        self.before_forward()
        self.model.train()
        with lower_precision(self.train, inputs.device):
            outputs = self.model(inputs)
        return self.group_means(outputs, targets, groups)

    def _complete_gradients(self) -> None:
        """Give parameters that this step did not use a gradient of zero, as others may have used them.

        Messages then hold the same parameters in all processes, and a device steps alike whoever else shares its
        process. Raises InputError where it used what the plan was made without.
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

    def _unscale(self, loss_scale: LossScale) -> None:
        """Take the scale out of gradients that are complete: in parts, a later one would be scaled twice."""
        gradients = gradients_of(self.model.parameters())
        loss_scale.unscale(gradients)
        if self.zeroes_overflow:
            finite_L = loss_scale.finite_rows(gradients)
            for gradient in gradients:
                gradient[~finite_L] = 0
            loss_scale.update(finite_L)


def _parts(inputs: Tensor, targets: Tensor, groups: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield equal parts of a batch, each with an equal part of every group's rows: those of the whole batch's group."""
    if parts == 1:
        yield inputs, targets
        return
    inputs_GPM, targets_GPM = (tensor.unflatten(0, (groups, parts, -1)) for tensor in (inputs, targets))
    for part in range(parts):
        yield inputs_GPM[:, part].flatten(0, 1), targets_GPM[:, part].flatten(0, 1)


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
