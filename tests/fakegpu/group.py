"""A stand-in for torch.distributed between GPUs: one process of several, whose peers say nothing.

It takes what NCCL takes: contiguous tensors of the device for groups between GPUs, tensors of the CPU for gloo's; equal
parts where NCCL gathers; and it fails where an asynchronous message is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from torch import Tensor

from simulate.comm import channel, pairwise, process_group
from tests.fakegpu.device import NAME


@dataclass
class Group:
    """A group of processes and what moves its tensors."""

    backend: str
    ranks: Sequence[int]


@dataclass
class Work:
    """A message on its way."""

    waited: bool = False

    def wait(self) -> None:
        self.waited = True


@dataclass
class Distributed:
    """The functions of torch.distributed that the communicator calls, for process `rank` of `world_size`."""

    rank: int
    world_size: int
    messages: int = 0
    works: list[Work] = field(default_factory=list)
    ProcessGroup = Group

    def __post_init__(self) -> None:
        self.world = Group("nccl", range(self.world_size))

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self, group: Group | None = None) -> int:
        return len((group or self.world).ranks)

    def get_backend(self, group: Group | None = None) -> str:
        return (group or self.world).backend

    def new_group(
        self, ranks: Sequence[int] | None = None, timeout: timedelta | None = None, backend: str | None = None
    ) -> Group:
        return Group(backend or "nccl", range(self.world_size) if ranks is None else ranks)

    def all_reduce(self, tensor: Tensor, group: Group | None = None) -> None:
        self._send([tensor], group)

    def broadcast(self, tensor: Tensor, source: int, group: Group | None = None) -> None:
        assert source in (group or self.world).ranks
        self._send([tensor], group)

    def all_gather(self, everyones: list[Tensor], own: Tensor, group: Group | None = None) -> None:
        self._send([own, *everyones], group)
        for tensor in everyones:
            tensor.copy_(own)

    def all_gather_into_tensor(self, everyones: Tensor, own: Tensor, group: Group | None = None) -> None:
        assert everyones.numel() == own.numel() * self.get_world_size(group)
        self._send([own, everyones], group)

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, out_sizes: list[int], in_sizes: list[int], group: Group | None = None
    ) -> None:
        assert len(received) == sum(out_sizes)
        assert len(sent) == sum(in_sizes)
        self._send([received, sent], group)

    def send(self, tensor: Tensor, peer: int, group: Group | None = None) -> None:
        self._to_peer(tensor, peer, group)

    def recv(self, tensor: Tensor, peer: int, group: Group | None = None) -> None:
        self._to_peer(tensor, peer, group)

    def isend(self, tensor: Tensor, peer: int, group: Group | None = None) -> Work:
        return self._later(tensor, peer, group)

    irecv = isend

    def _later(self, tensor: Tensor, peer: int, group: Group | None) -> Work:
        self._to_peer(tensor, peer, group)
        self.works.append(Work())
        return self.works[-1]

    def _to_peer(self, tensor: Tensor, peer: int, group: Group | None) -> None:
        assert peer != self.rank
        assert peer in (group or self.world).ranks
        self._send([tensor], group)

    def _send(self, tensors: Iterable[Tensor], group: Group | None) -> None:
        self.messages += 1
        assert self.rank in (group or self.world).ranks
        for tensor in tensors:
            wanted = "cpu" if self.get_backend(group) == "gloo" else NAME
            if tensor.device.type != wanted:
                raise RuntimeError(f"a group of {self.get_backend(group)} was given a tensor of {tensor.device}")
            assert tensor.is_contiguous()

    def assert_all_arrived(self) -> None:
        """Fail where a message was sent and never waited for."""
        assert all(work.waited for work in self.works), "a message was not waited for"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"torch.distributed.{name} has no stand-in here")


def as_torch_distributed(rank: int, world_size: int, patch: pytest.MonkeyPatch) -> Distributed:
    """Put a stand-in where the communicator looks for torch.distributed; returns it."""
    distributed = Distributed(rank, world_size)
    for module in (channel, pairwise, process_group):
        patch.setattr(module, "dist", distributed)
    return distributed
