"""What heads and devices changed since their last merge, one layer at a time: what simulate.diagnostics looks at.

Everything is in double precision, and no more than a few dense matrices of one layer exist at once. A convolution's
weight counts as the matrix (O, C*Y*X) that it applies to patches.

Legend: H heads (a device of a dense method counts as one), N devices, R rank, K directions, O outputs, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from simulate.adapters import LoraLinear
from simulate.replicated import ReplicatedConv2d, ReplicatedLinear

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero: rounding leaves such."""


class LayerUpdates(ABC):
    """One layer's change since its last merge, of every head and every device that the merge takes."""

    name: str
    heads: int
    devices: int
    is_matrix: bool
    """Whether it is the matrix of a linear layer, which has a spectrum; else it only drifts."""

    @abstractmethod
    def change(self, head: int) -> Tensor:
        """Return one head's change of the effective weight, (O, I)."""

    @abstractmethod
    def device_change(self, device: int) -> Tensor:
        """Return one device's change: the mean of its heads'."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Return the change that a merge makes of all of them: the (weighted) mean."""

    def dot(self, head: int, other: int) -> float:
        """Return the Frobenius inner product of two heads' changes."""
        return float((self.change(head) * self.change(other)).sum())

    def left_directions(self, head: int, most: int) -> Tensor:
        """Return the leading left singular vectors of a head's change, (O, K) with K <= `most`, none for zeros."""
        return decompose(self.change(head), most)[1]


class LowRankUpdates(LayerUpdates):
    """Heads of a LoRA layer: ΔW_h = s·(B_h·A_h − B0_h·A0_h) = left_h·right_h, with two ranks in reset-less mode."""

    is_matrix = True

    def __init__(self, name: str, left_HOR: Tensor, right_HRI: Tensor, heads_per_device: int = 1) -> None:
        self.name, self.left_HOR, self.right_HRI = name, left_HOR.double(), right_HRI.double()
        self.heads, self.heads_per_device = left_HOR.shape[0], heads_per_device
        self.devices = self.heads // heads_per_device

    @classmethod
    def of(cls, layer: LoraLinear) -> LowRankUpdates:
        """Return the updates of a layer's heads."""
        a, b = layer.a.detach().double(), layer.b.detach().double()
        if layer.a0 is not None and layer.b0 is not None:
            a, b = torch.cat([a, layer.a0.double()], dim=1), torch.cat([b, -layer.b0.double()], dim=2)
        return cls(layer.name, b * layer.spec.scale, a, layer.spec.heads_per_device)

    def change(self, head: int) -> Tensor:
        return self.left_HOR[head] @ self.right_HRI[head]

    def device_change(self, device: int) -> Tensor:
        return self._mean(slice(device * self.heads_per_device, (device + 1) * self.heads_per_device))

    def mean(self) -> Tensor:
        return self._mean(slice(0, self.heads))

    def _mean(self, heads: slice) -> Tensor:
        left, right = self.left_HOR[heads], self.right_HRI[heads]
        stacked_OX = left.transpose(0, 1).reshape(left.shape[1], -1)
        return stacked_OX @ right.reshape(-1, right.shape[2]) / len(left)

    def dot(self, head: int, other: int) -> float:
        left, right = self.left_HOR, self.right_HRI
        return float(((left[head].T @ left[other]) * (right[head] @ right[other].T)).sum())

    def left_directions(self, head: int, most: int) -> Tensor:
        q_OR, left_RR = torch.linalg.qr(self.left_HOR[head])
        _, right_RR = torch.linalg.qr(self.right_HRI[head].T)
        u_RR, values, _ = torch.linalg.svd(left_RR @ right_RR.T)
        return q_OR @ u_RR[:, : _rank(values, most)]


class DenseUpdates(LayerUpdates):
    """One parameter of which every device trains its own copy: Δ_n = θ_n − θ_last."""

    def __init__(
        self, name: str, now_N: Tensor, last: Tensor, is_matrix: bool = True, weights_N: Tensor | None = None
    ) -> None:
        self.name, self.is_matrix = name, is_matrix
        self.now_N, self.last = now_N.detach(), last
        if is_matrix:
            self.now_N, self.last = self.now_N.flatten(2), self.last.flatten(1)
        weights = torch.full((len(now_N),), 1 / len(now_N)) if weights_N is None else weights_N
        self.shares = [(index, share) for index, share in enumerate(weights.double().tolist()) if share > 0]
        self.heads = self.devices = len(self.shares)

    def change(self, head: int) -> Tensor:
        return self.now_N[self.shares[head][0]].double() - self.last.double()

    def device_change(self, device: int) -> Tensor:
        return self.change(device)

    def mean(self) -> Tensor:
        total = torch.zeros_like(self.last, dtype=torch.float64)
        for head, (_, share) in enumerate(self.shares):
            total.add_(self.change(head), alpha=share)
        return total


def dense_updates(
    model: nn.Module, parameters: Mapping[str, Tensor], last: Mapping[str, Tensor], weights_N: Tensor | None = None
) -> Iterator[DenseUpdates]:
    """Yield the updates of `parameters`, (N, ...), since `last`; `weights_N` are the devices' shares of the merge."""
    matrices = _linear_weights(model)
    for name, parameter in parameters.items():
        yield DenseUpdates(name, parameter, last[name], id(parameter) in matrices, weights_N)


def _linear_weights(model: nn.Module) -> set[int]:
    """Return the ids of linear layers' and convolutions' weights that no other module shares: what LoRA would adapt."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    linears = {id(m.weight) for m in model.modules() if isinstance(m, ReplicatedLinear | ReplicatedConv2d)}
    return {weight for weight in linears if owners[weight] == 1}


def decompose(x_OI: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all nonzero singular values, largest first, and at most `most` left (O, K) and right (I, K) vectors.

    From the eigenvectors of the smaller Gram matrix, much cheaper than a decomposition of x itself.
    """
    outputs, inputs = x_OI.shape
    x_SX = x_OI if outputs <= inputs else x_OI.T  # S: the smaller side
    squares, vectors = torch.linalg.eigh(x_SX @ x_SX.T)
    values = squares.flip(0).clamp(min=0).sqrt()
    values = values[: _rank(values, len(values))]
    short = vectors.flip(1)[:, : min(most, len(values))]
    long = x_SX.T @ short / values[: short.shape[1]]
    return (values, short, long) if outputs <= inputs else (values, long, short)


def _rank(values: Tensor, most: int) -> int:
    return min(most, int((values > RANK_TOLERANCE * values[0]).sum()))
