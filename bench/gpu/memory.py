"""Part b: one device's memory as planned, as followed without numbers, and as the allocator of the device had it.

Planned is the closed form, with what CUDA's allocator and libraries hold beside tensors; followed is the replay of the
allocator over the program's own requests, with the libraries' workspace. On a CPU only the tensors can be compared.
The allocator's rules are also held to the allocator alone, by made-up requests: that needs no library of ours.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device import forget
from simulate.costs.allocator import WORKSPACE_BYTES
from simulate.layers.accelerator import synchronize
from simulate.measure.caching_allocator import reserved_bytes

Table = dict[str, Any]
DEVICES = 8
MOST_OVER, MOST_UNDER = 0.05, -0.01
TINY = {
    "gpt": {"layers": 2, "width": 32, "attention_heads": 2, "context": 32, "vocab": 256},
    "llama": {"layers": 2, "width": 64, "attention_heads": 2, "context": 32, "vocab": 256, "mlp_width": 128},
    "vit": {"layers": 2, "width": 32, "attention_heads": 2, "image": 32, "classes": 10},
    "mixer": {"layers": 2, "width": 32, "image": 32, "classes": 10, "tokens_width": 16, "channels_width": 64},
}
"""Sizes of the smoke over a model's own, by the family's name."""


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return the figures of a run, or of the allocator's rules where `requests` is given."""
    return _rules(given["requests"], device) if "requests" in given else _run_figures(given, device)


def _rules(requests: int, device: torch.device) -> Table:
    """Return the segments of made-up requests, by the replay and by the allocator."""
    drawn, held, entries = random.Random(0), dict[int, Tensor](), list[tuple[int, int]]()
    sizes: dict[int, int] = {}
    api = forget(device)
    before = api.memory_reserved(device)
    for key in range(requests):
        # Magnitudes, so that every size class is met; about 40 are held at a time.
        sizes[key] = int(10 ** drawn.uniform(1, 7.7))
        held[key] = torch.empty(sizes[key], dtype=torch.uint8, device=device)
        entries.append((key, sizes[key]))
        if len(held) > 40:
            gone = drawn.choice(sorted(held))
            del held[gone]
            entries.append((gone, -sizes[gone]))
    synchronize(device)
    planned, taken = reserved_bytes(entries), api.max_memory_reserved(device) - before
    return {"followed_bytes": planned, "reserved_bytes": taken, "followed_error": planned / taken - 1,
            "within": planned == taken}  # fmt: skip


def _run_figures(given: Table, device: torch.device) -> Table:
    # Imported here, since the rules alone need none of them.
    from simulate.costs.memory import peak_memory
    from simulate.measure.accuracy import ROOMY
    from simulate.measure.fake_tensors import tracked_memory
    from simulate.measure.one_device import measure_memory_bytes, train_alone, warm_up

    run = _run(given)
    on_cpu = device.type == "cpu"
    # A device of CUDA's kind with a host beside it, so that masters and snapshots are the host's.
    profiled = ROOMY if on_cpu else ROOMY.model_copy(update={"device_type": "cuda", "host_memory_bytes": 10**15})
    planned = peak_memory(run, run.model.shape(), profiled)
    figures: Table = {"planned_tensors_bytes": planned.tensors}
    if on_cpu:
        allocated = measure_memory_bytes(run, device)
        tracked = tracked_memory(run, with_host=True)
        figures |= {"tracked_bytes": tracked.tracked_bytes, "allocated_bytes": allocated}
        return figures | {
            "tensors_error": planned.tensors / allocated - 1, "tracked_error": tracked.tracked_bytes / allocated - 1,
        }  # fmt: skip
    warm_up(run, device)
    api = forget(device)
    method = train_alone(run, device)
    synchronize(device)
    allocated, reserved = api.max_memory_allocated(device), api.max_memory_reserved(device)
    free, total = api.mem_get_info(device)
    beside = total - free - api.memory_reserved(device)  # the context, and whatever other programs hold
    del method
    tracked = tracked_memory(run, with_host=False)
    planned_bytes = planned.tensors + planned.allocator
    followed_bytes = tracked.allocator_bytes + WORKSPACE_BYTES
    errors = {"planned_error": planned_bytes / reserved - 1, "followed_error": followed_bytes / reserved - 1}
    return {
        **figures, "tracked_bytes": tracked.tracked_bytes, "allocated_bytes": allocated,
        "tracked_error": tracked.tracked_bytes / allocated - 1, "planned_bytes": planned_bytes,
        "followed_bytes": followed_bytes, "reserved_bytes": reserved, **errors,
        "within": all(MOST_UNDER <= error <= MOST_OVER for error in errors.values()), "beside_torch_bytes": beside,
    }  # fmt: skip


def _run(given: Table) -> Any:
    from simulate.config.run import build_run

    model = {"name": given["model"]}
    if given.get("tiny"):
        model |= TINY[next(family for family in TINY if given["model"].startswith(family))]
        given = {**given, "method": {**given["method"], **({"rank": 4} if "rank" in given["method"] else {})}}
    text = given["model"].startswith(("gpt", "llama"))
    return build_run(
        {
            "model": model, "data": {"name": "stdlib" if text else "digits"}, "method": given["method"],
            "train": {
                "steps": 100, "micro_batch": given["batch"], "autocast": given.get("autocast", "none"),
                "activation_checkpointing": given.get("checkpointing", False),
            },
            "cluster": {"devices": DEVICES},
        }
    )  # fmt: skip
