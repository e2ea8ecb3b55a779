"""Collectives made of point-to-point messages that all travel at once, used where gloo's own are slower.

Gloo's rings wait at each hop for more than two link delays. Its all-to-all, and its gather of two, use one direction of
a link after the other. Pairwise messages wait once, but many large parts that arrive over one link disturb each other:
rings carry these 5 to 25 % faster (bench/studies/wire.py). The payload is the same: N − 1 parts sent and received
at a gather, 2 (N − 1) / N of the buffer at a reduction. With NCCL the library's own collectives are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from simulate.comm.transfers import gathers_by_pairs, sums_by_pairs


def is_gloo(group: dist.ProcessGroup | None) -> bool:
    """Whether a group's messages go through gloo."""
    return dist.get_backend(group) == "gloo"


def sums_faster(flat: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether `sum_by_parts` reduces this buffer faster than the group's own all-reduce."""
    part_bytes = flat.numel() * flat.element_size() / dist.get_world_size(group)
    return is_gloo(group) and sums_by_pairs(part_bytes)


def gathers_faster(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> bool:
    """Whether `exchange_parts` gathers these byte buffers faster, or gloo cannot: it gathers equal sizes only."""
    largest, smallest = max(map(len, parts)), min(map(len, parts))
    return is_gloo(group) and (smallest < largest or gathers_by_pairs(largest, len(parts)))


def exchange_parts(received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Send sent[i] to the group's i-th member and fill received[i] from it; members skip empty parts."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    own = members.index(dist.get_rank())
    received[own].copy_(sent[own])
    # Each member begins with its next neighbour, so that no member gets everyone's first message.
    others = [(own + hop) % len(members) for hop in range(1, len(members))]
    # Receives are posted before sends: a receive's request would otherwise queue behind megabytes.
    waits = [dist.irecv(received[i], members[i], group=group) for i in others if received[i].numel()]
    waits += [dist.isend(sent[i].contiguous(), members[i], group=group) for i in others if sent[i].numel()]
    for wait in waits:
        assert wait is not None
        wait.wait()


def sum_by_parts(flat: Tensor, group: dist.ProcessGroup | None) -> None:
    """All-reduce a buffer in place: each member sums an Nth of it in the order of members, then all exchange sums."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    parts = flat.tensor_split(len(members))
    own = parts[members.index(dist.get_rank())]
    arrived = [torch.empty_like(own) for _ in members]
    exchange_parts(arrived, parts, group)
    # In the order of members, so that every run adds alike, to the last bit.
    for addend in arrived[1:]:
        arrived[0].add_(addend)
    exchange_parts(parts, [arrived[0]] * len(members), group)
