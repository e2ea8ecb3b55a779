"""The collectives of devices in several processes: which bytes each process sends, and which tensors come of them.

Participants are all devices (simulate.comm.process_group), or nodes, whose first devices exchange for them
(simulate.comm.nodes). A tensor with an axis of participants travels as bytes in their order, one message a call.

Legend: L local participants, N participants.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from simulate.comm.base import Exchanges, Part
from simulate.comm.channel import SERVER, Channel

ArrivedT = TypeVar("ArrivedT")


class ProcessExchanges(Exchanges):
    """Exchanges of which each process holds some participants; subclasses say over which channel they go, and when."""

    process: int
    """Index of this process among those that exchange."""
    shares: list[range]
    """The participants that each of these processes holds."""

    @abstractmethod
    def _run(self, name: str, exchange: Callable[[Channel], Sequence[ArrivedT] | None]) -> list[ArrivedT]:
        """Do an exchange now or in the background, and return its list of tensors, filled on arrival."""

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._run("an all-reduce", lambda channel: channel.all_reduce(sums))

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        process = next(process for process, share in enumerate(self.shares) if source in share)
        self._run("a broadcast", lambda channel: channel.broadcast(tensors, process))

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pieces, counts = _pieces(tensors, len(self.local_devices)), [len(share) for share in self.shares]

        def exchange(channel: Channel) -> list[Tensor]:
            own = _to_bytes(tensors)
            everyones = own.new_empty(_device_bytes(pieces) * len(self.present))
            parts = list(everyones.split([_device_bytes(pieces) * count for count in counts]))
            channel.all_gather(everyones, parts, own)
            return _in_order(parts, pieces, counts)

        return self._run("an all-gather", exchange)

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # Each device of a sender has one part for each local device.
        pieces = [_DevicePart((1, len(self.local_participants), *t.shape[2:]), t.dtype) for t in tensors]
        taking = self.participants
        counts = [sum(taking is None or device in taking for device in share) for share in self.shares]
        sizes = [_device_bytes(pieces) * count for count in counts]

        def exchange(channel: Channel) -> list[Tensor]:
            parts = zip(*(tensor.split(counts, dim=1) for tensor in tensors), strict=True)
            sent = [_to_bytes(part) for part in parts]
            received = sent[0].new_empty(sum(sizes))
            channel.all_to_all(received, sizes, sent)
            return [tensor.transpose(0, 1) for tensor in _in_order(received.split(sizes), pieces, counts)]

        return self._run("an all-to-all", exchange)

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> list[Tensor] | None:
        counts = [len(share) if active is None else sum(d in share for d in active) for share in self.shares]
        pieces, serves = _pieces(tensors, counts[self.process]), self.process == SERVER

        def exchange(channel: Channel) -> list[Tensor]:
            parts = [_to_bytes(tensors)]
            if serves:  # SERVER is rank 0, so its own part leads
                parts += [parts[0].new_empty(_device_bytes(pieces) * count) for count in counts[1:]]
            channel.to_server(parts)
            return _in_order(parts, pieces, counts) if serves else []

        everyones = self._run("a push to the server", exchange)
        return everyones if serves else None

    def _all_gather_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]:
        pieces, sizes = self._pieces_of_processes(tensors, parts)

        def exchange(channel: Channel) -> list[list[Tensor]]:
            own = _to_bytes(tensors)
            everyones = own.new_empty(sum(sizes))
            contents = list(everyones.split(sizes))
            channel.all_gather(everyones, contents, own)
            return self._by_part(contents, pieces, parts)

        return self._run("an all-gather of unequal parts", exchange)

    def _push_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]] | None:
        pieces, sizes = self._pieces_of_processes(tensors, parts)
        serves = self.process == SERVER

        def exchange(channel: Channel) -> list[list[Tensor]]:
            contents = [_to_bytes(tensors)]
            if serves:
                contents += [contents[0].new_empty(size) for size in sizes[1:]]
            channel.to_server(contents)
            return self._by_part(contents, pieces, parts) if serves else []

        everyones = self._run("a push of unequal parts to the server", exchange)
        return everyones if serves else None

    def _pieces_of_processes(
        self, tensors: Sequence[Tensor], parts: Sequence[Part]
    ) -> tuple[list[list[_DevicePart]], list[int]]:
        """Return the pieces of one device of each process, and the bytes that each process sends."""
        owners = [next(part for part in parts if share[0] in part.devices) for share in self.shares]
        pieces = [[_DevicePart(shape, t.dtype) for shape, t in zip(p.shapes, tensors, strict=True)] for p in owners]
        return pieces, [_device_bytes(own) * len(share) for own, share in zip(pieces, self.shares, strict=True)]

    def _by_part(
        self, contents: Sequence[Tensor], pieces: Sequence[Sequence[_DevicePart]], parts: Sequence[Part]
    ) -> list[list[Tensor]]:
        """Return each tensor as a list over the parts, from the bytes of each process."""
        by_part: list[list[Tensor]] = []
        for part in parts:
            held = [process for process, share in enumerate(self.shares) if share[0] in part.devices]
            if not held:  # all of the part's processes are lost
                by_part.append([contents[0].new_empty(0, *s, dtype=p.dtype) for s, p in _rows_of(part, pieces[0])])
                continue
            counts = [len(self.shares[process]) for process in held]
            by_part.append(_in_order([contents[process] for process in held], pieces[held[0]], counts))
        return [list(tensors) for tensors in zip(*by_part, strict=True)]

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        self._run("a pull from the server", lambda channel: channel.from_server(tensors))


@dataclass(frozen=True)
class _DevicePart:
    """Shape and dtype of one device's part of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _rows_of(part: Part, pieces: Sequence[_DevicePart]) -> list[tuple[tuple[int, ...], _DevicePart]]:
    """Return the shape of a row of each of a part's tensors, with any part's piece of it, whose dtype is the same."""
    return [(shape[1:], piece) for shape, piece in zip(part.shapes, pieces, strict=True)]


def _pieces(tensors: Sequence[Tensor], devices: int) -> list[_DevicePart]:
    """Return one device's parts of tensors (devices * rows, ...); a process without devices assumes one row each."""
    return [_DevicePart((t.shape[0] // devices if devices else 1, *t.shape[1:]), t.dtype) for t in tensors]


def _device_bytes(pieces: Sequence[_DevicePart]) -> int:
    return sum(piece.num_bytes for piece in pieces)


def _to_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the contents of tensors one after the other, (bytes,)."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _in_order(parts: Sequence[Tensor], pieces: Sequence[_DevicePart], counts: Sequence[int]) -> list[Tensor]:
    """Return tensors (rows of all devices, ...) from the bytes of each process, which holds `counts` devices."""
    found: list[list[Tensor]] = [[] for _ in pieces]
    for part, count in zip(parts, counts, strict=True):
        contents = part.split([piece.num_bytes * count for piece in pieces])
        for rows, content, piece in zip(found, contents, pieces, strict=True):
            if content.storage_offset() % piece.dtype.itemsize:
                content = content.clone()  # `view` needs an address that is aligned for the dtype
            rows.append(content.view(piece.dtype).view(count * piece.shape[0], *piece.shape[1:]))
    return [torch.cat(rows) for rows in found]
