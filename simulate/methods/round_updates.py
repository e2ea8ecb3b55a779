"""Changes of heads and devices since their last merge, one layer at a time, for simulate.training.diagnostics.

A method yields the changes of local heads and devices; `over` extends them to all devices, which may be in other
processes. Factors of low-rank heads are gathered, so that every process has all of them. Dense changes stay where they
are: only sums over devices travel, and one weight at a time of the heads that are compared.

Everything is in double precision, and no more than a few dense matrices of one layer exist at once. A convolution's
weight counts as the matrix (O, C*Y*X) that it applies to patches.

Legend: H heads (a device of a dense method counts as one), N devices, L local devices, R rank, K directions, O outputs,
I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.layers.columns import Columns
from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import ReplicatedConv2d, ReplicatedLinear

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero: rounding leaves such."""


@dataclass(frozen=True)
class Rows:
    """Owners of the rows of tensors with a copies axis, here and in other processes, and the link between these."""

    communicator: Communicator
    here: Sequence[int]
    """The device of each local row; the first, where several share a row."""
    everywhere: Sequence[int]
    """The devices of all rows, in global order."""
    weights_N: Tensor | None = None
    """Shares of the merge, for updates without their own, where devices took unequal numbers of steps."""

    @classmethod
    def all_here(cls, count: int) -> Rows:
        """Return the rows of as many devices in one process."""
        return cls(VirtualCommunicator(count), range(count), range(count))

    @property
    def own(self) -> dict[int, int]:
        """The local row of each device that this process answers for; a shared row belongs to its first device."""
        return {d: row for row, d in enumerate(self.here) if d in self.communicator.local_devices}


class LayerUpdates(ABC):
    """One layer's changes since its last merge: of every head and every device that the merge counts."""

    name: str
    rows: Rows
    is_matrix: bool
    """Whether it is a linear layer's matrix, whose spectrum is reported; of other parameters only the distances."""

    @property
    @abstractmethod
    def devices(self) -> Sequence[int]:
        """The devices that the merge takes, in global order."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Number of heads of these devices."""

    @abstractmethod
    def over(self, rows: Rows) -> LayerUpdates:
        """Return the updates of all devices, of which these are the local ones'; all processes take part.

        `mean` and `compare` are exchanges from then on.
        """

    @abstractmethod
    def change(self, head: int) -> Tensor:
        """Return the change of the effective weight, (O, I), of a head that is here."""

    @abstractmethod
    def device_change(self, index: int) -> Tensor:
        """Return the change of the `index`-th of `devices`, which is here: the mean of its heads'."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Return the (weighted) mean of all changes, which a merge applies; bitwise equal in every process."""

    def distances(self, mean: Tensor) -> dict[int, float]:
        """Return |Δ_n − mean|² of each device n that this process answers for."""
        own = self.rows.own
        indices = [(index, device) for index, device in enumerate(self.devices) if device in own]
        return {device: square_norm(self.device_change(index) - mean) for index, device in indices}

    def compare(self, heads: Sequence[int], most: int) -> tuple[Tensor, list[Tensor]]:
        """Return the inner products of some heads' changes, (H, H), and `left_directions` of each."""
        dots_HH = torch.zeros(len(heads), len(heads), dtype=torch.float64)
        for one, other in combinations_with_replacement(range(len(heads)), 2):
            dots_HH[one, other] = dots_HH[other, one] = self.dot(heads[one], heads[other])
        return dots_HH, [self.left_directions(head, most) for head in heads]

    def dot(self, head: int, other: int) -> float:
        """Return the Frobenius inner product of two heads' changes."""
        return float((self.change(head) * self.change(other)).sum())

    def left_directions(self, head: int, most: int) -> Tensor:
        """Return the leading left singular vectors of a head's change, (O, K) with K <= `most`, none for zeros."""
        return decompose(self.change(head), most)[1]


class LowRankUpdates(LayerUpdates):
    """Heads of a LoRA layer: ΔW_h = s·(B_h·A_h − B0_h·A0_h) = left_h·right_h, with two ranks in reset-less mode."""

    is_matrix = True

    def __init__(
        self,
        name: str,
        left_HOR: Tensor,
        right_HRI: Tensor,
        heads_per_device: int = 1,
        rows: Rows | None = None,
        layer: LoraLinear | None = None,
    ) -> None:
        self.name, self.left_HOR, self.right_HRI = name, left_HOR.double(), right_HRI.double()
        self.heads_per_device, self.layer = heads_per_device, layer
        self.rows = rows or Rows.all_here(len(self.devices))

    @property
    def devices(self) -> range:
        return range(self.heads // self.heads_per_device)

    @property
    def heads(self) -> int:
        return len(self.left_HOR)

    @classmethod
    def of(cls, layer: LoraLinear, rows: Rows | None = None) -> LowRankUpdates:
        """Return the updates of a layer's heads: the local ones', or with `rows` everyone's."""
        factors = _own_factors(layer)
        if rows is not None:
            gathered = rows.communicator.all_gather(list(factors.values()))
            factors = dict(zip(factors, gathered, strict=True))
        if "a" not in factors:
            a_HRI = layer.frozen_a(len(factors["b"]))
            factors["a"] = a_HRI.dense(factors["b"]) if isinstance(a_HRI, Columns) else a_HRI
        a, b = factors["a"].double(), factors["b"].double()
        # B·A − B0·A0 is one product of twice the rank.
        if "a0" in factors:
            a, b = torch.cat([a, factors["a0"].double()], dim=1), torch.cat([b, -factors["b0"].double()], dim=2)
        return cls(layer.name, b * layer.spec.scale, a, layer.spec.heads_per_device, rows, layer)

    def over(self, rows: Rows) -> LowRankUpdates:
        if self.layer is not None:
            return self.of(self.layer, rows)
        left_HOR, right_HRI = rows.communicator.all_gather([self.left_HOR, self.right_HRI])
        return LowRankUpdates(self.name, left_HOR, right_HRI, self.heads_per_device, rows)

    def change(self, head: int) -> Tensor:
        return self.left_HOR[head] @ self.right_HRI[head]

    def device_change(self, index: int) -> Tensor:
        heads = slice(index * self.heads_per_device, (index + 1) * self.heads_per_device)
        return _mean(self.left_HOR[heads], self.right_HRI[heads])

    def mean(self) -> Tensor:
        left_HOR, weights_N = self.left_HOR, self.rows.weights_N
        if weights_N is not None:  # in units of an equal share
            weights_H = (weights_N.double() * len(self.devices)).repeat_interleave(self.heads_per_device)
            left_HOR = left_HOR * weights_H.view(-1, 1, 1)
        return _mean(left_HOR, self.right_HRI)

    def dot(self, head: int, other: int) -> float:
        left, right = self.left_HOR, self.right_HRI
        return float(((left[head].T @ left[other]) * (right[head] @ right[other].T)).sum())

    def left_directions(self, head: int, most: int) -> Tensor:
        # Two thin QRs and a small SVD: the singular vectors of left·right without the dense matrix.
        q_OR, left_RR = torch.linalg.qr(self.left_HOR[head])
        _, right_RR = torch.linalg.qr(self.right_HRI[head].T)
        u_RR, values, _ = torch.linalg.svd(left_RR @ right_RR.T)
        return q_OR @ u_RR[:, : _rank(values, most)]


def _mean(left_HOR: Tensor, right_HRI: Tensor) -> Tensor:
    """Return the mean over heads of left·right, (O, I)."""
    stacked_OX = left_HOR.transpose(0, 1).reshape(left_HOR.shape[1], -1)
    return stacked_OX @ right_HRI.reshape(-1, right_HRI.shape[2]) / len(left_HOR)


def _own_factors(layer: LoraLinear) -> dict[str, Tensor]:
    """Return the factors that only their own process has; a frozen A can be drawn by everyone."""
    keys = ["b"] if layer.spec.frozen_a else ["a", "b"]
    if layer.a0 is not None and layer.b0 is not None:
        keys += ["a0", "b0"]
    return {key: getattr(layer, key).detach() for key in keys}


class DenseUpdates(LayerUpdates):
    """One parameter of which every device trains its own copy: Δ_n = θ_n − θ_last."""

    def __init__(
        self,
        name: str,
        now_L: Tensor,
        last: Tensor,
        is_matrix: bool = True,
        weights_N: Tensor | None = None,
        rows: Rows | None = None,
    ) -> None:
        self.name, self.is_matrix, self.weights_N = name, is_matrix, weights_N
        self.rows = rows or Rows.all_here(len(now_L))
        self.now_L, self.last = now_L.detach(), last
        if is_matrix:
            self.now_L, self.last = self.now_L.flatten(2), self.last.flatten(1)

    @cached_property
    def _shares(self) -> dict[int, float]:
        """The share of each device that the merge takes."""
        everywhere = self.rows.everywhere
        weights_N = self.rows.weights_N if self.weights_N is None else self.weights_N
        equal = [1 / len(everywhere)] * len(everywhere)
        shares = equal if weights_N is None else weights_N.double().tolist()
        return {device: share for device, share in zip(everywhere, shares, strict=True) if share > 0}

    @cached_property
    def devices(self) -> list[int]:
        return list(self._shares)

    @property
    def heads(self) -> int:
        return len(self.devices)

    def over(self, rows: Rows) -> DenseUpdates:
        return DenseUpdates(self.name, self.now_L, self.last, self.is_matrix, self.weights_N, rows)

    def change(self, head: int) -> Tensor:
        return self.now_L[self.rows.own[self.devices[head]]].double() - self.last.double()

    def device_change(self, index: int) -> Tensor:
        return self.change(index)

    def mean(self) -> Tensor:
        # In the order of devices here, and summed over processes: bitwise equal in each of them.
        total = torch.zeros_like(self.last, dtype=torch.float64)
        for head, share in enumerate(self._shares.values()):
            if self._is_here(head):
                total.add_(self.change(head), alpha=share)
        self.rows.communicator.all_reduce([total])
        return total

    def compare(self, heads: Sequence[int], most: int) -> tuple[Tensor, list[Tensor]]:
        """Return products and directions, each worked out where a head is, and summed with others' zeros."""
        # All have this many columns, so that they can be summed; columns of zeros are dropped again below.
        directions = min(most, *self.last.shape)
        bases_HOK = self.last.new_zeros(len(heads), len(self.last), directions, dtype=torch.float64)
        for index, head in enumerate(heads):
            if self._is_here(head):
                basis_OK = self.left_directions(head, most)
                bases_HOK[index, :, : basis_OK.shape[1]] = basis_OK
                del basis_OK
        dots_HH = self._products(heads)
        self.rows.communicator.all_reduce([bases_HOK, dots_HH])
        return dots_HH, [basis_OK[:, basis_OK.any(0)] for basis_OK in bases_HOK]

    def _products(self, heads: Sequence[int]) -> Tensor:
        """Return the inner products, (H, H), of heads' changes with those of later heads that are here; else zeros."""
        dots_HH = self.last.new_zeros(len(heads), len(heads), dtype=torch.float64)
        for index, head in enumerate(heads):
            is_last = index + 1 == len(heads)
            if is_last and not self._is_here(head):
                break  # only its own process compares it, with itself
            change = self.change(head) if is_last else self._received(head)
            for other in range(index, len(heads)):
                if self._is_here(heads[other]):
                    dot = (change * self.change(heads[other])).sum()
                    dots_HH[index, other] = dots_HH[other, index] = dot
            del change  # before the next one takes its room
        return dots_HH

    def _received(self, head: int) -> Tensor:
        """Return a head's change, wherever it is: its weights travel, as they are."""
        device = self.devices[head]
        # Every process must take part, also the sender and those that hold none of the heads.
        now = self.now_L[self.rows.own[device]] if self._is_here(head) else torch.empty_like(self.last)
        self.rows.communicator.broadcast([now], device)
        return now.double() - self.last.double()

    def _is_here(self, head: int) -> bool:
        return self.devices[head] in self.rows.own


def dense_updates(
    model: nn.Module, parameters: Mapping[str, Tensor], last: Mapping[str, Tensor], weights_N: Tensor | None = None
) -> Iterator[DenseUpdates]:
    """Yield the updates of `parameters`, (L, ...), since `last`; `weights_N` are the devices' shares of the merge."""
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
    # Frozen weights are buffers without an owner, and nobody adapts them.
    return {weight for weight in linears if owners.get(weight) == 1}


def decompose(x_OI: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all nonzero singular values, largest first, and at most `most` left (O, K) and right (I, K) vectors.

    From the eigenvectors of the smaller Gram matrix, much cheaper than a decomposition of x itself.
    """
    outputs, inputs = x_OI.shape
    x_SX = x_OI if outputs <= inputs else x_OI.T  # S: the smaller side
    # eigh sorts in rising order, hence the flips.
    squares, vectors = torch.linalg.eigh(x_SX @ x_SX.T)
    values = squares.flip(0).clamp(min=0).sqrt()
    values = values[: _rank(values, len(values))]
    short = vectors.flip(1)[:, : min(most, len(values))]
    # v_i = xᵀ·u_i/σ_i
    long = x_SX.T @ short / values[: short.shape[1]]
    return (values, short, long) if outputs <= inputs else (values, long, short)


def _rank(values: Tensor, most: int) -> int:
    return min(most, int((values > RANK_TOLERANCE * values[0]).sum()))


def square_norm(x: Tensor) -> float:
    """Return the sum of the squares of x."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)
