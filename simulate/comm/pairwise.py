"""Collectives made of messages between pairs, all on their way at once, where gloo's own are slower.

Gloo's rings wait at each hop for more than two of a link's delays, and its all-to-all, like any gather of two, for one
direction of a link before it uses the other. Pairs wait once, but many large parts that arrive over one link disturb
each other: rings carry these 5 to 25 % faster. Measured by bench/studies/wire.py. The payload is the same: N − 1 parts
sent and received at a gather, 2 (N − 1) / N of the buffer at a reduction. NCCL has what its links need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from simulate.comm.transfers import gathers_by_pairs, sums_by_pairs


def is_gloo(group: dist.ProcessGroup | None) -> bool:
    """Return whether a group's messages go through gloo."""
    return dist.get_backend(group) == "gloo"


def sums_faster(flat: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Return whether `sum_by_parts` is the faster reduction of a buffer."""
    part_bytes = flat.numel() * flat.element_size() / dist.get_world_size(group)
    return is_gloo(group) and sums_by_pairs(part_bytes)


def gathers_faster(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> bool:
    """Return whether `swap` is the faster gather of everyone's parts of bytes, or gloo has none for their sizes."""
    largest, smallest = max(map(len, parts)), min(map(len, parts))
    return is_gloo(group) and (smallest < largest or gathers_by_pairs(largest, len(parts)))


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
