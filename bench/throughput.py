"""Tokens per second of `lte train` beside plain PyTorch, DistributedDataParallel and torchft's DiLoCo, one device each.

    python bench/throughput.py [--steps 60] [--rounds 3] [--width 384 --layers 6 --context 256 --batch 8]

All train the same GPT on the same text with AdamW, every one in a process of its own, in turns. Seconds run from the
end of the tenth step to the end of the last one, so that imports and first allocations do not count, but batches,
merges and all that the loops do besides count. `lte train` is the whole command, whose events have the seconds.
torchft (https://github.com/meta-pytorch/torchft) takes part where it can be imported; it may lie beside the project:

    pip install --target PEERS opentelemetry-exporter-otlp-proto-http
    pip install --target MORE --no-deps torchft
    PYTHONPATH=PEERS:MORE python bench/throughput.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from simulate.common import toml_io
from simulate.config.run import Run, build_run, dump_run
from simulate.data.batches import build_batches
from simulate.data.load import load_data
from simulate.methods.build_network import build_model

WARM_UP_STEPS, MERGE_EVERY = 10, 10
LTE_METHODS: dict[str, toml_io.Table] = {
    "lte train, ddp": {"name": "ddp"},
    "lte train, diloco": {"name": "diloco", "merge_every": MERGE_EVERY},
    "lte train, lte, rank 64": {"name": "lte", "rank": 64, "merge_every": MERGE_EVERY},
    "lte train, lte, rank 64, columns": {
        "name": "lte", "rank": 64, "merge_every": MERGE_EVERY, "draws": "columns",
    },
}  # fmt: skip
Step = Callable[[], object]


def run_of(arguments: argparse.Namespace, method: toml_io.Table) -> Run:
    """Return one device's run of a method."""
    sizes = {key: getattr(arguments, key) for key in ("width", "layers", "context")}
    train = {"steps": arguments.steps, "micro_batch": arguments.batch}
    seldom = dict.fromkeys(("evaluate_every", "checkpoint_every"), arguments.steps)
    return build_run(
        {
            "model": {"name": "gpt", "attention_heads": max(1, arguments.width // 64), **sizes},
            "method": method,
            "train": {**train, **seldom},
            "cluster": {"devices": 1},
        }
    )


def loss_of(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    return functional.cross_entropy(network(inputs).flatten(0, -2), targets.flatten())


@contextmanager
def plain(network: nn.Module) -> Iterator[tuple[nn.Module, Step]]:
    """Yield the network, and what follows a backward pass in a plain loop."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    yield network, lambda: _finish(network, optimizer)


@contextmanager
def ddp(network: nn.Module) -> Iterator[tuple[nn.Module, Step]]:
    """Yield the network in DistributedDataParallel, a group of one process, and what follows a backward pass."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with plain(nn.parallel.DistributedDataParallel(network)) as pair:
            yield pair
    finally:
        dist.destroy_process_group()


@contextmanager
def torchft_diloco(network: nn.Module) -> Iterator[tuple[nn.Module, Step]]:
    """Yield the network under torchft's DiLoCo, one replica with a lighthouse, and what follows a backward pass."""
    from torchft import Manager, ProcessGroupGloo  # type: ignore[import-not-found]
    from torchft.coordination import LighthouseServer  # type: ignore[import-not-found]
    from torchft.local_sgd import DiLoCo  # type: ignore[import-not-found]

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    inner = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    outer = torch.optim.SGD(network.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)), load_state_dict=network.load_state_dict,
        state_dict=network.state_dict, min_replica_size=1, use_async_quorum=False, rank=0, world_size=1,
        store_addr="127.0.0.1", store_port=store.port, hostname="127.0.0.1",
        lighthouse_addr=lighthouse.address().replace("0.0.0.0", "127.0.0.1"),
    )  # fmt: skip
    try:
        with DiLoCo(manager, [network], inner, outer, sync_every=MERGE_EVERY):
            yield network, lambda: _finish(network, inner)
    finally:
        manager.shutdown()
        lighthouse.shutdown()


def _finish(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip gradients as `lte train` does, and step."""
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


PEERS = {"plain PyTorch": plain, "DistributedDataParallel": ddp, "torchft DiLoCo": torchft_diloco}


def peer_seconds(arguments: argparse.Namespace, title: str) -> float:
    """Train by a peer; returns the seconds of the steps that count."""
    run = run_of(arguments, {"name": "ddp"})
    batches = build_batches(run, load_data(run), torch.device("cpu"))
    with PEERS[title](build_model(run)) as (network, finish):
        started_s = 0.0
        for step in range(arguments.steps):
            if step == WARM_UP_STEPS:
                started_s = time.monotonic()
            loss = loss_of(network, *batches.batch(step, range(1)))
            loss.backward()
            float(loss)  # every loop reports it
            finish()
        return time.monotonic() - started_s


def lte_seconds(arguments: argparse.Namespace, title: str, folder: Path) -> float:
    """Run `lte train`; returns the seconds of the steps that count."""
    file, out = folder / "run.toml", folder / f"run{len(list(folder.iterdir()))}"
    file.write_text(dump_run(run_of(arguments, LTE_METHODS[title])))
    command = [sys.executable, "-m", "ltecli", "train", str(file), "--device", "cpu", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    wall_s = {event["step"]: event["wall_s"] for event in events if event["kind"] == "step"}
    return float(wall_s[arguments.steps] - wall_s[WARM_UP_STEPS])


def in_turns(arguments: argparse.Namespace) -> None:
    """Run all in turns, and print each one's tokens per second and its ratio to the plain loop's."""
    peers = [title for title in PEERS if title != "torchft DiLoCo" or find_spec("torchft")]
    tokens = (arguments.steps - WARM_UP_STEPS) * arguments.batch * arguments.context
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.rounds):
            for title in (*peers, *LTE_METHODS):
                if title in LTE_METHODS:
                    taken_s = lte_seconds(arguments, title, Path(name))
                else:
                    command = [sys.executable, *sys.argv, "--peer", title]
                    said = subprocess.run(
                        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                    )
                    taken_s = float(said.stdout.split()[-1])
                rates.setdefault(title, []).append(tokens / taken_s)
                print(f"{title}: {tokens / taken_s:,.0f} tokens/s", file=sys.stderr, flush=True)
    print("| one device | tokens/s | over plain PyTorch |\n|---|---|---|")
    for title, values in rates.items():
        ratios = [value / floor for value, floor in zip(values, rates["plain PyTorch"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {title} | {statistics.median(values):,.0f} | {spread} |")
    if len(peers) < len(PEERS):
        print("torchft is not installed, so its DiLoCo did not run", file=sys.stderr)


def main() -> None:
    """Parse the arguments; a peer runs in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"steps": 60, "rounds": 3, "width": 384, "layers": 6, "context": 256, "batch": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(peer_seconds(arguments, arguments.peer))
    else:
        in_turns(arguments)


if __name__ == "__main__":
    main()
