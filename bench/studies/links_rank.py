"""One rank of the run that bench/studies/links.py compares ours with: torch's DistributedDataParallel over gloo.

links.py starts one in each namespace, with run.toml's tables as JSON in the first argument.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from simulate.config.run import build_run
from simulate.data.batches import TextBatches
from simulate.data.text import load_text
from simulate.methods.build_network import build_model


def main() -> None:
    """Train, and print this rank's seconds of each step."""
    run = build_run(json.loads(sys.argv[1]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=run.cluster.timeout_s))
    rank, batches = dist.get_rank(), TextBatches.of(run, load_text(run.data))
    model = DistributedDataParallel(build_model(run))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seconds = []
    for step in range(run.train.steps):
        started = time.perf_counter()
        inputs, targets = batches.batch(step, range(rank, rank + 1))
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
