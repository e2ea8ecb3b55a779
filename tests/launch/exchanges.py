"""Two processes of which the second stays away from every exchange; the first says how each ended, and when.

python -m tests.launch.exchanges FOLDER PROCESS    (started by test_timeouts)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from simulate.comm.base import Nodes
from simulate.comm.process_group import LostPeerError, TorchCommunicator

TIMEOUT_S = 2.0
AWAY_S = 3 * TIMEOUT_S
LARGE = 4_000_000
"""Elements, so that a message does not fit into the system's buffers."""


def behind(exchange: Callable[[TorchCommunicator], object]) -> Callable[[TorchCommunicator], object]:
    """Return an exchange that travels behind the training, and is waited for."""

    def both(communicator: TorchCommunicator) -> None:
        with communicator.background():
            exchange(communicator)
        communicator.wait()

    return both


def per_device(*sizes: int) -> torch.Tensor:
    """Return a tensor of the local device."""
    return torch.zeros(1, *sizes)


EXCHANGES: dict[str, Callable[[TorchCommunicator], object]] = {
    "all-reduce": lambda c: c.all_reduce([torch.zeros(LARGE)]),
    "all-gather": lambda c: c.all_gather([per_device(100)]),
    "all-to-all": lambda c: c.all_to_all([per_device(2, 100)]),
    "broadcast": lambda c: c.broadcast([torch.zeros(LARGE)]),
    "push": lambda c: c.push([per_device(100)]),
    "pull": lambda c: c.pull([torch.zeros(LARGE)]),
    "share": lambda c: c.all_gather_scalars(per_device(2)),
    "reduce over nodes": lambda c: c.reduce_over_nodes([torch.zeros(LARGE)], Nodes(1, 2)),
    "all-reduce, behind": behind(lambda c: c.all_reduce([torch.zeros(LARGE)])),
    "broadcast, behind": behind(lambda c: c.broadcast([torch.zeros(LARGE)])),
    "pull, behind": behind(lambda c: c.pull([torch.zeros(LARGE)])),
}


def main() -> None:
    """Be one process."""
    folder, process = Path(sys.argv[1]), int(sys.argv[2])
    found = {}
    for index, (name, exchange) in enumerate(EXCHANGES.items()):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{index}", rank=process, world_size=2,
            timeout=timedelta(seconds=30),
        )  # fmt: skip
        communicator = TorchCommunicator(2, torch.device("cpu"), TIMEOUT_S)
        communicator.arrange(Nodes(1, 2))
        default = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
        communicator._foreground.group = default
        dist.barrier()
        if process == 0:
            found[name] = outcome(communicator, exchange)
        else:
            time.sleep(AWAY_S)
        communicator.close()
        dist.destroy_process_group()
    if process == 0:
        (folder / "found.json").write_text(json.dumps(found))


def outcome(communicator: TorchCommunicator, exchange: Callable[[TorchCommunicator], object]) -> list[object]:
    """Return the error's text, or None, and the seconds that it took."""
    begun = time.monotonic()
    try:
        exchange(communicator)
    except LostPeerError as error:
        return [str(error), time.monotonic() - begun]
    return [None, time.monotonic() - begun]


if __name__ == "__main__":
    main()
