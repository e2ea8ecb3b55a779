"""One rank of bench/studies/wire.py, which starts it: times gloo's collectives and reads what crossed its interface.

A process for each rank, since gloo has one rank a process; each prints a JSON line a task, which wire.py joins.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from simulate.comm.pairwise import exchange_parts, sum_by_parts

SETTLE_S = 0.1
"""Seconds until the last acknowledgements are counted."""
Call = Callable[[int], Callable[[], object]]


def all_reduce(num_bytes: int) -> Callable[[], object]:
    """Return an all-reduce; `num_bytes` is the buffer."""
    buffer = torch.ones(num_bytes // 4)
    return lambda: dist.all_reduce(buffer)


def all_gather(num_bytes: int) -> Callable[[], object]:
    """Return an all-gather; `num_bytes` is one contribution."""
    part = torch.ones(num_bytes, dtype=torch.uint8)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    return lambda: dist.all_gather(parts, part)


def all_to_all(num_bytes: int) -> Callable[[], object]:
    """Return an all-to-all; `num_bytes` is what one rank has for all ranks together, itself included."""
    nodes = dist.get_world_size()
    parts = torch.ones(num_bytes // nodes * nodes, dtype=torch.uint8)
    received = torch.empty_like(parts)
    return lambda: dist.all_to_all_single(received, parts)


def broadcast(num_bytes: int) -> Callable[[], object]:
    """Return a broadcast; `num_bytes` is the buffer, which rank 0 has."""
    buffer = torch.ones(num_bytes, dtype=torch.uint8)
    return lambda: dist.broadcast(buffer, src=0)


def all_reduce_by_pairs(num_bytes: int) -> Callable[[], object]:
    """Return an all-reduce by point-to-point messages, as the tool does it with small buffers."""
    buffer = torch.ones(num_bytes // 4)
    return lambda: sum_by_parts(buffer, None)


def all_to_all_by_pairs(num_bytes: int) -> Callable[[], object]:
    """Return an all-to-all by point-to-point messages."""
    nodes = dist.get_world_size()
    parts = [torch.ones(num_bytes // nodes, dtype=torch.uint8) for _ in range(nodes)]
    received = [torch.empty_like(part) for part in parts]
    return lambda: exchange_parts(received, parts, None)


def all_gather_by_pairs(num_bytes: int) -> Callable[[], object]:
    """Return an all-gather by point-to-point messages: each rank sends its contribution to every other."""
    part = torch.ones(num_bytes, dtype=torch.uint8)
    received = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    return lambda: exchange_parts(received, [part] * len(received), None)


def push(num_bytes: int) -> Callable[[], object]:
    """Return a push; `num_bytes` is what each rank but the server, rank 0, sends to it."""
    part = torch.ones(num_bytes, dtype=torch.uint8)
    arriving = [torch.empty_like(part) for _ in range(1, dist.get_world_size())]

    def serve() -> None:
        for wait in [dist.irecv(buffer, rank) for rank, buffer in enumerate(arriving, 1)]:
            assert wait is not None
            wait.wait()

    return serve if dist.get_rank() == 0 else lambda: dist.send(part, 0)


def pull(num_bytes: int) -> Callable[[], object]:
    """Return a pull; `num_bytes` is what each rank but the server, rank 0, gets from it."""
    part = torch.ones(num_bytes, dtype=torch.uint8)

    def serve() -> None:
        for wait in [dist.isend(part, rank) for rank in range(1, dist.get_world_size())]:
            assert wait is not None
            wait.wait()

    return serve if dist.get_rank() == 0 else lambda: dist.recv(part, 0)


CALLS: dict[str, Call] = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "all_to_all": all_to_all,
    "broadcast": broadcast,
    "all_reduce by pairs": all_reduce_by_pairs,
    "all_gather by pairs": all_gather_by_pairs,
    "all_to_all by pairs": all_to_all_by_pairs,
    "push": push,
    "pull": pull,
}


def counted_bytes() -> tuple[int, int]:
    """Return the bytes sent and received by this node's interface to the switch, frames with their headers."""
    folder = Path("/sys/class/net") / os.environ["WIRE_INTERFACE"] / "statistics"
    sent, received = (int((folder / name).read_text()) for name in ("tx_bytes", "rx_bytes"))
    return sent, received


def measure(call: Callable[[], object], repeats: int) -> dict[str, float | list[float]]:
    """Return the seconds of each repeat at this rank, and bytes over all of them; barriers in between are counted."""
    call()  # the first one also connects
    dist.barrier()
    time.sleep(SETTLE_S)
    before = counted_bytes()
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        # All start together, behind the barrier: else a late rank's delay would count as the others' exchange.
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    dist.barrier()
    time.sleep(SETTLE_S)
    sent, received = (now - then for now, then in zip(counted_bytes(), before, strict=True))
    return {"seconds": seconds, "sent_bytes": sent / repeats, "received_bytes": received / repeats}


def main() -> None:
    """Measure what the argument lists: a JSON array of [operation, bytes, repeats]; print one JSON line for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for operation, num_bytes, repeats in json.loads(sys.argv[1]):
        call = CALLS[operation](num_bytes) if operation != "nothing" else lambda: None
        print(json.dumps(measure(call, repeats)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
