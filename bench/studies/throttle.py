"""Exchanges slowed by cluster.throttle beside the same exchanges over shaped links: is a trial on one machine true?

python -m bench.studies.throttle                            # 20 Mbit/s, 20 ms; needs root, `ip` and `tc`
python -m bench.studies.throttle --nodes 2 --mbit 100 --delay-s 0

Whole runs are launched both ways, and their rounds timed. Then each exchange alone is done by the communicator of
launched runs, one process a device: once in network namespaces with shaped links (tests/network/lab.py), once on the
loopback of one of them with the throttle. The throttle gets the rate that the links leave for payload, as profiles
have it. docs/launch.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.studies import links
from bench.studies.wire import LAB_LATENCY_S, PAYLOAD_SHARE
from simulate.comm.process_group import TorchCommunicator
from simulate.common.events import read_events
from simulate.config.run import build_run, dump_run
from simulate.launch.worker import throttle_of
from tests.network.lab import Lab, why_not

Table = dict[str, Any]
SIZES = {"all_reduce": (10_000, 1_000_000, 4_000_000), "all_gather": (10_000, 1_000_000), "push and pull": (500_000,)}
"""Bytes of one device's buffer, by exchange."""
MODEL: Table = {"name": "gpt", "layers": 2, "width": 128, "attention_heads": 4, "context": 32}
"""0.46 million parameters."""
CASES: dict[str, Table] = {
    "ddp": {"name": "ddp"},
    "lte": {"name": "lte", "rank": 16, "merge_every": 5},
    "lte, server": {"name": "lte", "rank": 16, "merge_every": 5, "merge_transport": "server"},
    "diloco": {"name": "diloco", "merge_every": 5},
}
STEPS = 30
REPEATS, PORT, TIMEOUT_S = 10, 29510, 900.0
HERE = torch.device("cpu")


def run_table(case: str, nodes: int, throttle: str) -> Table:
    """Return the run of a case, small enough that its exchanges take most of its time."""
    table = links.run_table("ddp", "gtx1080ti_x8", STEPS, links.LinkSetting(nodes, 0.0, None))
    table["model"], table["method"] = MODEL, CASES[case]
    table["train"] |= {"optimizer": "adamw", "warmup_steps": 0}
    table["cluster"] |= {"throttle": throttle} if throttle else {}
    return table


def round_s(events: list[Table], round_steps: int) -> float:
    """Return the median seconds of a launched run's rounds; the first one is not counted."""
    ends = [event["wall_s"] for event in events if event["kind"] == "step" and event["step"] % round_steps == 0]
    return statistics.median(later - earlier for earlier, later in pairwise(ends))


def measure_run(lab: Lab, nodes: int, case: str, throttle: str) -> float:
    """Return the seconds of a round of a launched run: over the lab's links, or with a throttle on its first node."""
    table = run_table(case, nodes, throttle)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not throttle:
            events = links.launch(lab, folder, table, links.LinkSetting(nodes, 0.0, None))
        else:
            (folder / "run.toml").write_text(dump_run(build_run(table)), encoding="utf-8")
            command = [sys.executable, "-m", "ltecli", "train", "run.toml", "--launch", "--quiet", "--out", "run"]
            process = lab[0].popen(
                [*command, "--processes", str(nodes)], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            if process.communicate(timeout=TIMEOUT_S)[1] and process.returncode:
                raise SystemExit("the throttled run failed")
            events = list(read_events(folder / "run" / "events.jsonl"))
    return round_s(events, build_run(table).method.round_steps)


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
    print(f"{'':<25}{'shaped s':>10}{'throttled s':>13}{'ratio':>8}")
    throttle = f"{arguments.mbit * PAYLOAD_SHARE} Mbit/s, {arguments.delay_s + LAB_LATENCY_S} s"
    with Lab(arguments.nodes, bytes_per_s=arguments.mbit * 1e6 / 8, delay_s=arguments.delay_s) as lab:
        for case in CASES:
            over_links, here = (measure_run(lab, arguments.nodes, case, given) for given in ("", throttle))
            print(f"a round of {case:<14}{over_links:>10.3f}{here:>13.3f}{here / over_links:>8.2f}", flush=True)
        shaped = measure(lab, arguments.nodes, "")
        slowed = measure(lab, arguments.nodes, throttle)
    for name, seconds in shaped.items():
        print(f"{name:<25}{seconds:>10.3f}{slowed[name]:>13.3f}{slowed[name] / seconds:>8.2f}")
    return None


if __name__ == "__main__":
    main()
