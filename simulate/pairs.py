"""Collectives made of messages between pairs, all on their way at once.

Gloo's own wait at each hop of a ring, and for one direction of a link before they use the other (measured by
bench/wire.py). The payload is the same: N − 1 parts sent and received at a gather, 2 (N − 1) / N of the buffer at a
reduction. NCCL has what its links need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_gloo(group: dist.ProcessGroup | None) -> bool:
    """Return whether a group's messages go through gloo, whose collectives these are faster than."""
    return dist.get_backend(group) == "gloo"


def swap(received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Give each member its part and take theirs.

    Receives are posted before sends: a request must not queue behind megabytes.
    """
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    own = members.index(dist.get_rank())
    received[own].copy_(sent[own])
    others = [(own + hop) % len(members) for hop in range(1, len(members))]
    waits = [dist.irecv(received[i], members[i], group=group) for i in others if received[i].numel()]
    waits += [dist.isend(sent[i].contiguous(), members[i], group=group) for i in others if sent[i].numel()]
    for wait in waits:
        assert wait is not None
        wait.wait()


def sum_by_parts(flat: Tensor, group: dist.ProcessGroup | None) -> None:
    """All-reduce in place; each member sums its part in the order of members, the same for everybody."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    parts = flat.tensor_split(len(members))
    own = parts[members.index(dist.get_rank())]
    arrived = [torch.empty_like(own) for _ in members]
    swap(arrived, parts, group)
    for addend in arrived[1:]:
        arrived[0].add_(addend)
    swap(parts, [arrived[0]] * len(members), group)
