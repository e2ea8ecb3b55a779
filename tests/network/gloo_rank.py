"""One rank that all-reduces a readable pattern with gloo and checks the sum; addresses come from the environment."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

from tests.harness import ROOT, environment
from tests.network.lab import Lab

PATTERN = "lte-lte-lte-lte-"
NUM_BYTES = 2_000_000
WAIT_S = 120.0


def run_ranks(lab: Lab, interfaces: tuple[str, ...], addresses: tuple[str, ...], port: int = 29500) -> None:
    """Run one rank in every node, over the given interfaces; raise if one fails."""
    ranks = []
    for node, interface in zip(lab, interfaces, strict=True):
        set_up = {"MASTER_ADDR": addresses[0], "MASTER_PORT": str(port), "WORLD_SIZE": str(len(lab))}
        set_up |= {"RANK": str(node.index), "GLOO_SOCKET_IFNAME": interface, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        argv = [sys.executable, "-m", __name__]
        ranks.append(node.popen(argv, cwd=ROOT, env=environment(**set_up), stderr=subprocess.PIPE))
    outcomes = [rank.outcome(WAIT_S) for rank in ranks]
    if any(outcome.code for outcome in outcomes):
        raise RuntimeError("\n".join(outcome.stderr for outcome in outcomes))


def main() -> None:
    """All-reduce, and compare with the product that it must be."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    text = (PATTERN * (NUM_BYTES // len(PATTERN))).encode()
    own = torch.frombuffer(bytearray(text), dtype=torch.float32)
    total = own.clone()
    dist.all_reduce(total)
    assert torch.allclose(total, own * dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
