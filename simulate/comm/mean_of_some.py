"""Mean of compressed vectors where some devices may be missing: what a message leaves out is neither lost nor doubled.

With N devices, those in P of which take part, and x_n the vector of device n (for changes of weights N·w_n·Δ_n, so that
it has its share of the merge):

    mean = C(m),   m = (1/N)·Σ_{n in P} C(x_n + e_n)
    e_n ← x_n + e_n − C(x_n + e_n)   for n in P,    and e_n ← e_n + N·(m − C(m))   in the chunk that n averages

Rules, from which mean + (1/N)·Σ_n e_n, over all N, grows by exactly what those in P learned:

- An error is in units of what is merged. Its change had a share when it was sent, which it keeps: shares and discounts
  of later merges are for what later merges bring.
- A device that takes no part sends nothing and keeps its error, and sends it with its own next message.
- Chunks are for those in P, so they have other owners in other merges. What rounding a mean loses is therefore no error
  of the chunk, as in simulate.comm.compression, but its owner's own, N times since a device counts for an N-th.

Whoever is lost for good takes its error along: at most what its last message rounded away.

Legend: L local devices, N devices, P those that take part, X elements (and what fills the chunks up), C elements of a
chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from simulate.comm.base import Exchanges
from simulate.comm.compression import CompressedMean, decode, encode
from simulate.comm.transfers import chunk_elements, filled_elements


class MeanOfSome:
    """Mean over all devices of vectors that those that take part send compressed; the others' count as zero."""

    def __init__(self, elements: int, wire: str, communicator: Exchanges, like: Tensor, fewest: int) -> None:
        """`fewest` devices take part in any mean."""
        self.wire, self.communicator, self.elements = wire, communicator, elements
        devices = communicator.num_devices
        self.error_LX = like.new_zeros(len(communicator.local_devices), filled_elements(elements, devices, fewest))

    def mean(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the mean, [(X,)], of vectors that are given in parts, (L, ...) each; not in the background."""
        taking = self.communicator.participants or tuple(range(self.communicator.num_devices))
        first, own = self.communicator.local_devices.start, self.communicator.local_participants
        rows, places = [device - first for device in own], [taking.index(device) for device in own]
        chunk = chunk_elements(self.elements, len(taking))
        numbers = [min(max(self.elements - place * chunk, 0), chunk) for place in range(len(taking))]
        received = self.communicator.all_to_all(self._compress(parts, rows, chunk, numbers))
        message = self._average(received, rows, places, chunk, numbers)
        del received
        gathered = self.communicator.all_gather(message)
        return [decode(gathered, chunk, self.wire, self.error_LX.dtype).reshape(-1)[: self.elements]]

    def _compress(self, parts: Iterable[Tensor], rows: list[int], chunk: int, numbers: list[int]) -> list[Tensor]:
        """Return the messages of the local devices that take part to all that do, (own, P, ...); keep their errors."""
        first = 0
        for part in parts:
            flat_LX = part.reshape(len(part), -1)  # of a scalar, too
            for row in rows:
                self.error_LX[row, first : first + flat_LX.shape[1]] += flat_LX[row]
            first += flat_LX.shape[1]
            del part, flat_LX  # the last one is not held while the message is rounded
        messages = []
        for row in rows:
            x_PC = self.error_LX[row, : len(numbers) * chunk].view(len(numbers), chunk)
            messages.append(encode(x_PC, self.wire, numbers))
            x_PC.sub_(decode(messages[-1], chunk, self.wire, x_PC.dtype))
        self._clear_filling()
        if not messages:
            return [part.new_empty(0, len(numbers), *part.shape[1:]) for part in self._empty(chunk)]
        return [
            tensors[0].unsqueeze(0) if len(rows) == 1 else torch.stack(tensors)
            for tensors in zip(*messages, strict=True)
        ]

    def _average(
        self, received: Sequence[Tensor], rows: list[int], places: list[int], chunk: int, numbers: list[int]
    ) -> list[Tensor]:
        """Return the compressed means of the local devices' chunks, (L, ...), zero for those that take no part."""
        local = len(self.error_LX)
        message = [part.new_zeros(local, *part.shape[1:]) for part in self._empty(chunk)]
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            parts_PC = decode([part[index] for part in received], chunk, self.wire, self.error_LX.dtype)
            mean_1C = parts_PC.sum(0, keepdim=True).div_(self.communicator.num_devices)
            del parts_PC
            mean_1C[:, numbers[place] :] = 0  # int2 has no zero
            content = encode(mean_1C, self.wire, [numbers[place]])
            mean_1C.sub_(decode(content, chunk, self.wire, mean_1C.dtype))
            chunk_C = self.error_LX[row, place * chunk : (place + 1) * chunk]
            chunk_C.add_(mean_1C[0], alpha=self.communicator.num_devices)
            for whole, part in zip(message, content, strict=True):
                whole[row] = part[0]
        self._clear_filling()
        return message

    def _empty(self, chunk: int) -> list[Tensor]:
        """Return no rows of a message of one chunk."""
        return [part[:0] for part in encode(self.error_LX.new_zeros(1, chunk), self.wire)]

    def _clear_filling(self) -> None:
        self.error_LX[:, self.elements :] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rounding errors by name, for checkpoints."""
        return {"sent_error": self.error_LX}


def mean_for(
    elements: int, wire: str, communicator: Exchanges, like: Tensor, fewest: int | None
) -> CompressedMean | MeanOfSome:
    """Return the compressed mean of vectors of so many elements; `fewest` take part where some may be missing."""
    if fewest is None:
        return CompressedMean(elements, wire, communicator, like)
    return MeanOfSome(elements, wire, communicator, like, fewest)
