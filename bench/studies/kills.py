"""Seconds from the kill of one of several processes to the next exchange of the others, with a quorum.

    python -m bench.studies.kills --processes 4 --kills 5

Processes on loopback hold a device each and meet every 20 ms: a ballot, an all-reduce, a ballot, as merges do. One is
killed with SIGKILL, its death is told as its agent tells it, and the others form their group anew. There is no
training, so that what is left is what the group itself costs; `processor_s` is what all survivors together spend on it,
which does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from simulate.comm.process_group import TorchCommunicator
from simulate.common.errors import LostPeerError
from simulate.launch.membership import Epoch, Membership, Waits, mark_dead

PAUSE_S, CONNECT_S = 0.02, 20.0
CONTEXT = multiprocessing.get_context("forkserver")


def main() -> None:
    """Print a line of JSON for each kill."""
    CONTEXT.set_forkserver_preload(["simulate.launch.membership", "simulate.comm.process_group"])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    for _ in range(arguments.kills):
        with TemporaryDirectory() as folder:
            print(json.dumps(kill_one(arguments.processes, Path(folder))), flush=True)


def kill_one(processes: int, folder: Path) -> dict[str, object]:
    """Return the seconds to the survivors' next exchange after one process was killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [CONTEXT.Process(target=meet, args=(m, processes, store.port, folder)) for m in range(processes)]
    for process in members:
        process.start()
    others = [member for member in range(processes) if member != 1]
    while any(len(met(folder, member)) < 20 for member in others):
        time.sleep(0.05)
    members[1].kill()
    killed_s = time.time()
    members[1].join()
    mark_dead(store, 1, 1)
    before = {member: len(met(folder, member)) for member in others}
    while any(len(met(folder, member)) < before[member] + 20 for member in others):
        time.sleep(0.05)
    for process in members:
        process.kill()
        process.join()
    first = {member: next(row for row in met(folder, member) if row[2] == processes - 1) for member in others}
    last = {member: [row for row in met(folder, member) if row[2] == processes][-1] for member in others}
    return {
        "next_exchange_s": round(max(row[0] for row in first.values()) - killed_s, 3),
        "processor_s": round(sum(first[member][1] - last[member][1] for member in others), 3),
        "load": os.getloadavg()[0],
    }


def met(folder: Path, member: int) -> list[list[float]]:
    """Return the time, processor seconds and number of processes of each exchange of a process so far."""
    path = folder / str(member)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def meet(member: int, processes: int, port: int, folder: Path) -> None:
    """Be one process: exchange until killed, with whoever is there."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    shares = [range(number, number + 1) for number in range(processes)]
    titles = [f"process {number}" for number in range(processes)]
    membership = Membership(store, member, 1, shares, titles, Waits(2, 5.0, 60.0, 60.0), print)
    communicator = TorchCommunicator(processes, torch.device("cpu"), 60.0, shares=shares, process=member)

    def form(epoch: Epoch) -> None:
        membership.ballot()
        members, prefix = list(epoch.members), dist.PrefixStore(f"of/{epoch.number}", store)
        rank, world = members.index(member), len(members)
        dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world, timeout=timedelta(seconds=CONNECT_S))
        communicator.connect([shares[number] for number in members])

    form(membership.enter())
    membership.is_ready = True
    with (folder / str(member)).open("w") as file:
        while True:
            try:
                membership.ballot()
                communicator.all_reduce([torch.ones(10_000)])
                membership.ballot()
                file.write(json.dumps([time.time(), time.process_time(), communicator.processes]) + "\n")
                file.flush()
                time.sleep(PAUSE_S)
            except LostPeerError as error:
                membership.veto(str(error))
                communicator.disconnect()
                form(membership.advance())


if __name__ == "__main__":
    main()
