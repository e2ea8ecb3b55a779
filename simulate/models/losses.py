"""The loss that a run's network is trained and evaluated with: cross-entropy, or a function that the user brings.

One batch holds the rows of several devices or heads, and each has a mean of its own. So a user's function is called
once for each group's samples, as each device of plain data-parallel training would call it. Training
(simulate.methods.loss), evaluation, diagnostics, measurements and tracing all take the loss from here.

Legend: M rows (tokens or samples), S samples, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from simulate.common.errors import InputError, first_line
from simulate.common.user_code import import_named
from simulate.layers.cross_entropy import row_losses
from simulate.models.interfaces import NetworkOptions

GroupMeans = Callable[[Tensor, Tensor, int], Tensor]
"""Function of outputs, targets and the number of equal groups; it returns each group's mean loss, (G,)."""
RowLosses = Callable[[Tensor, Tensor], Tensor]
"""Function of outputs and targets; it returns losses, one a row, whose mean is the batch's loss."""
OwnLoss = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 1e-4
"""Largest difference of a batch's loss from the mean of its halves', relative to the larger, in float32."""


def group_means_of(options: NetworkOptions) -> GroupMeans:
    """Return the loss to train a network with; raises InputError where a user's cannot be imported."""
    own = _own_loss(options)
    return _cross_entropy_means if own is None else partial(_own_means, own)


def row_losses_of(options: NetworkOptions) -> RowLosses:
    """Return the loss to evaluate a network with; of a user's own, each sample's is its batch's mean."""
    own = _own_loss(options)
    if own is None:
        return row_losses
    return lambda outputs, targets: _own_means(own, outputs, targets, 1).expand(len(outputs))


def has_own_loss(options: NetworkOptions) -> bool:
    """Whether a network is trained with a loss of the user's."""
    return getattr(options, "loss", None) is not None


def _own_loss(options: NetworkOptions) -> OwnLoss | None:
    name = getattr(options, "loss", None)
    if name is None:
        return None
    found: OwnLoss = import_named("model.loss", name)
    if not callable(found):
        raise InputError(f"model.loss = {name!r}: it is no function; name one of (outputs, targets)")
    return found


def _cross_entropy_means(outputs: Tensor, targets: Tensor, groups: int) -> Tensor:
    return row_losses(outputs, targets).view(groups, -1).mean(1)


def _own_means(loss: OwnLoss, outputs: Tensor, targets: Tensor, groups: int) -> Tensor:
    # Half precision, which autocast gives, is too coarse to sum losses in.
    exact = outputs.float() if outputs.element_size() < 4 else outputs
    return torch.stack([loss(o, t).mean() for o, t in zip(exact.chunk(groups), targets.chunk(groups), strict=True)])


def check_loss(options: NetworkOptions, outputs: Tensor, targets: Tensor) -> None:
    """Raise InputError unless a user's loss is a mean over samples, or one loss a sample; outputs need gradients.

    A sum, or a loss that compares samples, would depend on how a batch is divided among heads and passes.
    """
    loss = _own_loss(options)
    if loss is None:
        return
    name, samples = getattr(options, "loss", ""), len(outputs)
    try:
        whole, *halves = (
            loss(outputs[rows], targets[rows])
            for rows in (slice(None), slice(0, samples // 2), slice(samples // 2, samples))
        )
    except Exception as error:
        raise InputError(
            f"model.loss = {name!r} raised {type(error).__name__} on outputs {tuple(outputs.shape)} and targets "
            f"{tuple(targets.shape)}: {first_line(error)}"
        ) from error
    if not isinstance(whole, Tensor) or (whole.ndim and len(whole) != samples):
        given = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        raise InputError(
            f"model.loss = {name!r} gave {given} for {samples} samples; return their mean loss, or a loss for each"
        )
    if not whole.requires_grad:
        raise InputError(
            f"model.loss = {name!r} has no gradient with respect to the outputs; compute it with torch, undetached"
        )
    batch, *parts = (float(loss.detach().mean()) for loss in (whole, *halves))
    mean = sum(parts) / 2
    if not abs(batch - mean) <= TOLERANCE * max(abs(batch), abs(mean), TOLERANCE):
        raise InputError(
            f"model.loss = {name!r} is {batch:.6g} for {samples} samples and {mean:.6g} as the mean of their halves', "
            "so it would depend on how a batch is divided among heads and passes; return the mean over samples, or a "
            "loss for each (reduction='none')"
        )
