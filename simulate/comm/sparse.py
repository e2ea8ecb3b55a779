"""Mean over all devices of the largest entries of their vectors, with error feedback that decays.

Every run of SPARSE_RUN entries sends the same number of its largest ones, so that a position takes INDEX_BITS bits.
Averages of SparseLoCo (simulate.methods.averaging) call this.

Legend: L local devices, N devices, X elements, K kept elements, W whole runs, R elements of a run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from simulate.comm.base import Exchanges
from simulate.comm.compression import decode, encode
from simulate.comm.transfers import SPARSE_RUN, Sparsity

ZERO_SHARE = 1e-6
"""Share of a run's largest entry up to which entries count as zero, or at most twice that."""


class SparseMean:
    """Mean of vectors of which only the largest entries travel.

    Device n sends C(x_n + β·e_n) to all others and keeps e_n ← x_n + β·e_n − C(x_n + β·e_n).
    """

    def __init__(self, elements: int, sparsity: Sparsity, wire: str, communicator: Exchanges, like: Tensor) -> None:
        self.elements, self.sparsity, self.wire, self.communicator = elements, sparsity, wire, communicator
        self.error_LX = like.new_zeros(len(communicator.local_devices), elements)

    def mean(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the mean, [(X,)], of vectors that are given in parts, (L, ...) each.

        In the background the list is empty until the entries have arrived (see Communicator.background).
        """
        received = self.communicator.all_gather(self._compress(parts))
        mean: list[Tensor] = []

        def add_up() -> None:
            kept = self.sparsity.kept(self.elements)
            total_X = self.error_LX.new_zeros(self.elements)
            # One device after the other, so that the order of sums is fixed.
            for row in range(len(received[0])):
                one = [tensor[row : row + 1] for tensor in received]
                values_K = decode(one[1:], kept, self.wire, total_X.dtype)[0]
                total_X.index_add_(0, self._places(one[0])[0], values_K)
            mean.append(total_X.div_(len(received[0])))

        self.communicator.on_complete(add_up)
        return mean

    def _compress(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return positions, packed, and values of each local device's largest entries; keep what they leave."""
        first = 0
        self.error_LX.mul_(self.sparsity.decay)
        for part in parts:
            flat_LX = part.reshape(len(part), -1)
            self.error_LX[:, first : first + flat_LX.shape[1]] += flat_LX
            first += flat_LX.shape[1]
            del part, flat_LX  # the last one is not held while the largest are looked for
        packed = pack_positions(self._largest())
        places_LK = self._places(packed)
        values_LK = self.error_LX.gather(1, places_LK)
        message = encode(values_LK, self.wire)
        sent_LK = decode(message, values_LK.shape[1], self.wire, values_LK.dtype)
        self.error_LX.scatter_(1, places_LK, values_LK.sub(sent_LK))
        return [packed, *message]

    def _largest(self) -> Tensor:
        """Return where in their runs the largest entries are, run by run, (L, K)."""
        whole = self.elements // SPARSE_RUN * SPARSE_RUN
        found = []
        for entries_LX in (self.error_LX[:, :whole], self.error_LX[:, whole:]):
            if run := min(SPARSE_RUN, entries_LX.shape[1]):
                sizes_LWR = entries_LX.reshape(len(entries_LX), -1, run).abs()
                # Of entries that are zero but for rounding the first ones travel, so that all processors send the same.
                sizes_LWR.div_(sizes_LWR.amax(2, keepdim=True).clamp_(min=torch.finfo(sizes_LWR.dtype).tiny))
                places_R = torch.arange(run, device=sizes_LWR.device).to(sizes_LWR)
                sizes_LWR.clamp_(min=(2 - places_R / run) * ZERO_SHARE)
                found.append(sizes_LWR.topk(self.sparsity.kept(run), dim=2).indices.flatten(1))
        return torch.cat(found, dim=1)

    def _places(self, packed: Tensor) -> Tensor:
        """Return the places in the vector of packed positions, (rows, K)."""
        kept = self.sparsity.kept(self.elements)
        index_LK = unpack_positions(packed, kept)
        runs_K = torch.arange(kept, device=packed.device).div_(self.sparsity.kept(SPARSE_RUN), rounding_mode="floor")
        return index_LK.add_(runs_K.mul_(SPARSE_RUN))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has not travelled, by name, for checkpoints."""
        return {"sparse_error": self.error_LX}


def pack_positions(index_LK: Tensor) -> Tensor:
    """Return positions below 4,096, two in three bytes, (L, ceil(1.5·K)) uint8: the first one's low byte first."""
    pairs_LK2 = F.pad(index_LK, (0, index_LK.shape[1] % 2)).view(len(index_LK), -1, 2)
    first, second = pairs_LK2.unbind(2)
    bytes_LK3 = torch.stack([first & 255, (first >> 8) | ((second & 15) << 4), second >> 4], dim=2).to(torch.uint8)
    return bytes_LK3.flatten(1)[:, : -(-3 * index_LK.shape[1] // 2)]


def unpack_positions(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` positions of each row of what `pack_positions` packed, (L, count) int64."""
    low, middle, high = F.pad(packed, (0, -packed.shape[1] % 3)).view(len(packed), -1, 3).long().unbind(2)
    pairs_LK2 = torch.stack([low | ((middle & 15) << 8), (middle >> 4) | (high << 4)], dim=2)
    return pairs_LK2.flatten(1)[:, :count]
