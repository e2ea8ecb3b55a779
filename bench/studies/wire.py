"""Cost of gloo's collectives on shaped links, beside the plan's: seconds and wire bytes.

python -m bench.studies.wire --nodes 4 --bytes-per-s 12.5e6      # 100 Mbit/s; needs root, `ip` and `tc`
python -m bench.studies.wire --delay-s 0.02 --sizes 10000        # how often an operation waits for the delay

Every node is a network namespace (tests/network/lab.py). Planned seconds know the link's payload rate and delay, and
are of the way that the tool takes with gloo: small parts by pairs, large ones by rings.
By its figures simulate.comm.pairwise chooses between the two; bench/README.md and docs/networking.md have them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from simulate.comm.transfers import Operation, Transfer
from simulate.config.hardware import Link
from simulate.costs.message_time import transfer_s
from tests.network.lab import Lab, why_not
from tests.network.tunnels import Tunnel, ssh_star, wireguard_mesh, wireguard_star

PAYLOAD_SHARE = 1448 / 1514
"""Share of payload in a full Ethernet frame with TCP and time stamps."""
OPERATIONS: dict[str, Operation] = {
    "all_reduce": "all_reduce",
    "all_reduce by pairs": "all_reduce",
    "all_gather": "all_gather",
    "all_gather by pairs": "all_gather",
    "all_to_all": "all_to_all",
    "all_to_all by pairs": "all_to_all",
    "broadcast": "broadcast",
    "push": "push",
    "pull": "pull",
}
"""Measured operations, and the operation that prices each in the plan."""
PORT = 29500
LAB_LATENCY_S = 30e-6
TIMEOUT_S = 600.0

THROUGH: dict[str, Callable[[Lab, Path], AbstractContextManager[Tunnel]]] = {
    "plain": lambda lab, _: nullcontext(
        Tunnel(tuple(node.interface for node in lab), tuple(node.address for node in lab))
    ),
    "wireguard-star": wireguard_star,
    "wireguard-mesh": wireguard_mesh,
    "ssh-star": ssh_star,
}

Task = tuple[str, int, int]
Row = dict[str, Any]


def run_ranks(lab: Lab, tunnel: Tunnel, tasks: list[Task]) -> list[list[Row]]:
    """Run one rank in every node; return each one's measurements."""
    root = Path(__file__).parents[2]
    shared = {"MASTER_ADDR": tunnel.addresses[0], "MASTER_PORT": str(PORT), "WORLD_SIZE": str(len(lab))}
    shared["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # or every rank warns that its address has no name
    argv = [sys.executable, "-m", "bench.studies.wire_rank", json.dumps(tasks)]
    ranks = [
        node.popen(
            argv,
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **shared,
                "RANK": str(node.index),
                "GLOO_SOCKET_IFNAME": interface,
                "WIRE_INTERFACE": node.interface,
            },
        )
        for node, interface in zip(lab, tunnel.interfaces, strict=True)
    ]
    printed = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    if failed := [node.index for node, rank in zip(lab, ranks, strict=True) if rank.returncode]:
        raise SystemExit(f"ranks {failed} failed")
    return [[json.loads(line) for line in lines.splitlines()] for lines in printed]


def summarise(task: Task, ranks: list[Row], idle: list[Row], link: Link) -> Row:
    """Join what the ranks measured of one task; the bytes of the barriers alone, `idle`, are taken off."""
    operation, num_bytes, _ = task
    planned = Transfer(OPERATIONS[operation], num_bytes, len(ranks))
    # A collective has ended when its last rank has.
    seconds = statistics.median(max(once) for once in zip(*(rank["seconds"] for rank in ranks), strict=True))
    # Barriers separate the repeats, and their bytes are not the operation's.
    sent = [rank["sent_bytes"] - barrier["sent_bytes"] for rank, barrier in zip(ranks, idle, strict=True)]
    payload = max(planned.sent_bytes, planned.received_bytes) / len(ranks)
    return {
        "operation": operation,
        "bytes": num_bytes,
        "seconds": seconds,
        "planned_s": transfer_s(planned, link),
        "payload_bytes": payload,
        "sent_bytes": statistics.mean(sent),
        "most_sent_bytes": max(sent),
        "least_sent_bytes": min(sent),
    }


def show(row: Row) -> str:
    """Return one line of the table."""
    return (
        f"{row['operation']:<20}{row['bytes']:>11,}{row['seconds'] * 1e3:>11.1f}{row['planned_s'] * 1e3:>11.1f}"
        f"{row['seconds'] / row['planned_s']:>7.2f}{row['payload_bytes']:>14,.0f}"
        f"{row['sent_bytes'] / row['payload_bytes']:>11.3f}{row['least_sent_bytes'] / row['payload_bytes']:>8.2f}"
        f"{row['most_sent_bytes'] / row['payload_bytes']:>7.2f}"
    )


HEADER = (
    f"{'operation':<20}{'bytes':>11}{'ms':>11}{'planned ms':>11}{'ratio':>7}{'payload sent':>14}"
    f"{'wire/that':>11}{'least':>8}{'most':>7}"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--bytes-per-s", type=float, default=12.5e6, help="of a node's link each way, with headers")
    parser.add_argument("--delay-s", type=float, default=0.0, help="one way, added")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000, 16_000_000])
    parser.add_argument("--repeats", type=int, default=5, help="the median counts; sizes above 4 MB: 3 at most")
    parser.add_argument("--through", choices=THROUGH, default="plain", help="what joins the nodes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    tasks = [
        (operation, size, min(arguments.repeats, 3) if size > 4e6 else arguments.repeats)
        for operation in arguments.operations
        for size in arguments.sizes
    ]
    rate = arguments.bytes_per_s * PAYLOAD_SHARE
    latency_s = arguments.delay_s + LAB_LATENCY_S
    link = Link(
        topology="star", up_bytes_per_s=rate, down_bytes_per_s=rate, latency_s=latency_s, collectives="gloo",
        source="measured",
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(arguments.nodes, arguments.bytes_per_s, arguments.delay_s) as lab,
        THROUGH[arguments.through](lab, Path(folder)) as tunnel,
    ):
        ranks = run_ranks(lab, tunnel, [("nothing", 0, 5), *tasks])
    idle = [rank[0] for rank in ranks]
    if not arguments.json:
        links = f"{arguments.bytes_per_s:g} B/s each way, {arguments.delay_s * 1e3:g} ms delay, {arguments.through}"
        print(f"{arguments.nodes} nodes, {links}")
        print(HEADER)
    for index, task in enumerate(tasks, 1):
        row = summarise(task, [rank[index] for rank in ranks], idle, link)
        print(json.dumps(row) if arguments.json else show(row), flush=True)


if __name__ == "__main__":
    main()
