"""Messages between the processes of one group, by torch.distributed: packed, sent, and unpacked again.

simulate.comm.process_group makes channels: between all processes, between those of a node, and between the first ones
of all nodes; each has a second one for the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from simulate.comm import pairwise

SERVER = 0
"""Member that serves pushes and pulls; it holds the first device."""


class Channel:
    """A group of processes and the messages between them, in one sequence: background messages have another."""

    def __init__(self, members: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.members, self.group = list(members), group
        self.processes = len(self.members)
        self.process = self.members.index(dist.get_rank()) if dist.get_rank() in self.members else None
        """Index of this process among the members; None where it is not one of them."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        flat = _flat(tensors)
        if pairwise.sums_faster(flat, self.group):
            pairwise.sum_by_parts(flat, self.group)
        else:
            dist.all_reduce(flat, group=self.group)
        _unflatten(flat, tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Overwrite tensors with those of the source-th member."""
        tensors = _of_one_dtype(tensors)
        flat = _flat(tensors)
        dist.broadcast(flat, self.members[source], group=self.group)
        _unflatten(flat, tensors)

    def all_gather(self, everyones: Tensor, parts: Sequence[Tensor], own: Tensor) -> None:
        if pairwise.gathers_faster(parts, self.group):
            pairwise.exchange_parts(parts, [own] * self.processes, self.group)
        elif len({len(part) for part in parts}) == 1:
            dist.all_gather_into_tensor(everyones, own, group=self.group)
        else:
            # NCCL gathers equal parts only, so each part is broadcast by itself.
            assert self.process is not None
            parts[self.process].copy_(own)
            for process, part in enumerate(parts):
                dist.broadcast(part, self.members[process], group=self.group)

    def all_to_all(self, received: Tensor, sizes: list[int], sent: Sequence[Tensor]) -> None:
        if pairwise.is_gloo(self.group):
            pairwise.exchange_parts(received.split(sizes), sent, self.group)
        else:
            parts = [len(part) for part in sent]
            dist.all_to_all_single(received, torch.cat(list(sent)), sizes, parts, group=self.group)

    def to_server(self, parts: Sequence[Tensor]) -> None:
        if self.process != SERVER:
            if len(parts[0]):  # a process without active devices sends nothing
                dist.send(parts[0], self.members[SERVER], group=self.group)
            return
        others = [(part, self.members[p]) for p, part in enumerate(parts) if p != SERVER and len(part)]
        arriving = [dist.irecv(part, member, group=self.group) for part, member in others]
        for work in arriving:
            assert work is not None
            work.wait()

    def from_server(self, tensors: Sequence[Tensor]) -> None:
        tensors = _of_one_dtype(tensors)
        flat = _flat(tensors)
        if self.process == SERVER:
            others = [member for p, member in enumerate(self.members) if p != SERVER]
            leaving = [dist.isend(flat, member, group=self.group) for member in others]
            for work in leaving:
                assert work is not None
                work.wait()
            return
        dist.recv(flat, self.members[SERVER], group=self.group)
        _unflatten(flat, tensors)


def _of_one_dtype(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return tensors as bytes where their dtypes differ, as those of quantised numbers and their scales do."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return tensors
    return [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the message buffer of tensors of one dtype; a single contiguous tensor is its own buffer."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return tensors[0].detach()
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a message buffer back into its tensors, unless it is the tensor itself."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return
    for tensor, content in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(content.view_as(tensor))
