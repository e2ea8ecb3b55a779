"""Exchanges slowed by cluster.throttle beside the same exchanges over shaped links: is a trial on one machine true?

python -m bench.studies.throttle                            # 20 Mbit/s, 20 ms; needs root, `ip` and `tc`
python -m bench.studies.throttle --nodes 2 --mbit 100 --delay-s 0

Each exchange is done by the communicator of launched runs, one process a device: once in network namespaces with shaped
links (tests/network/lab.py), once on the loopback of one of them with the throttle. The throttle gets the rate that
the links leave for payload, as profiles have it. docs/networking.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from bench.studies.wire import LAB_LATENCY_S, PAYLOAD_SHARE
from simulate.comm.process_group import TorchCommunicator
from simulate.config.run import build_run
from simulate.launch.worker import throttle_of
from tests.network.lab import Lab, why_not

SIZES = {"all_reduce": (10_000, 1_000_000, 4_000_000), "all_gather": (10_000, 1_000_000), "push and pull": (500_000,)}
"""Bytes of one device's buffer, by exchange."""
REPEATS, PORT, TIMEOUT_S = 10, 29510, 900.0
HERE = torch.device("cpu")


def rank(devices: int, throttle: str) -> None:
    """Be one process: print the seconds of each exchange, by its name and size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = build_run({"cluster": {"devices": devices, **({"throttle": throttle} if throttle else {})}})
    communicator = TorchCommunicator(devices, HERE, TIMEOUT_S, throttle=throttle_of(run))
    measured = {f"{name} {size}": _mean_s(communicator, name, size) for name, sizes in SIZES.items() for size in sizes}
    print(json.dumps(measured), flush=True)
    communicator.close()
    dist.destroy_process_group()


def _mean_s(communicator: TorchCommunicator, name: str, size: int) -> float:
    """Return the seconds of an exchange in a row of them, as steps have it: the first one is not counted."""
    tensor = torch.ones(size // 4)

    def once() -> None:
        if name == "all_reduce":
            communicator.all_reduce([tensor])
        elif name == "all_gather":
            communicator.all_gather([tensor[None]])
        else:
            communicator.push([tensor[None]])
            communicator.pull([tensor])

    once()
    begun_s = time.perf_counter()
    for _ in range(REPEATS):
        once()
    return (time.perf_counter() - begun_s) / REPEATS


def measure(lab: Lab, nodes: int, throttle: str) -> dict[str, float]:
    """Return the seconds of each exchange: over the lab's links, or with a throttle on its first node."""
    address = "127.0.0.1" if throttle else lab[0].address
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(PORT),
        "WORLD_SIZE": str(nodes),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    ranks = [
        lab[0 if throttle else number].popen(
            [sys.executable, "-m", "bench.studies.throttle", "--rank", throttle or "none", "--nodes", str(nodes)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(number), "GLOO_SOCKET_IFNAME": "lo" if throttle else "eth0"},
        )
        for number in range(nodes)
    ]  # fmt: skip
    printed = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("a rank failed")
    each = [json.loads(text) for text in printed]
    # A row of exchanges has ended when its last process has.
    return {name: max(one[name] for one in each) for name in each[0]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=20.0, help="of a node's link each way, with headers")
    parser.add_argument("--delay-s", type=float, default=0.02, help="one way")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return rank(arguments.nodes, "" if arguments.rank == "none" else arguments.rank)
    if reason := why_not():
        raise SystemExit(reason)
    throttle = f"{arguments.mbit * PAYLOAD_SHARE} Mbit/s, {arguments.delay_s + LAB_LATENCY_S} s"
    with Lab(arguments.nodes, bytes_per_s=arguments.mbit * 1e6 / 8, delay_s=arguments.delay_s) as lab:
        shaped = measure(lab, arguments.nodes, "")
        slowed = measure(lab, arguments.nodes, throttle)
    print(f"{'exchange, bytes':<24}{'shaped s':>10}{'throttled s':>13}{'ratio':>8}")
    for name, seconds in shaped.items():
        print(f"{name:<24}{seconds:>10.3f}{slowed[name]:>13.3f}{slowed[name] / seconds:>8.2f}")
    return None


if __name__ == "__main__":
    main()
