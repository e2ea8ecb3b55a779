"""Cost of a training step beside the plain dense one: paired steps, medians of ratios; peaks of memory; the merge.

python bench/step.py --model vit_s16 --json

The reference is torch alone: nn.Linear layers, F.cross_entropy, fused AdamW, the same images, in the same process. The
tool promises that N devices in one process cost little more than one, so `make bench` holds it to that; bench/README.md
has the figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pairs import Step, median_and_quartiles, paired_seconds, seconds
from torch import Tensor

from simulate.comm.echo import EchoCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import build_run
from simulate.methods.base import Method
from simulate.methods.registry import build_method
from simulate.models.families.vit import VitModel
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.models.vit import Vit

MERGES = 5
CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""

Table = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One method on N devices that share the batch, one head a device, and the largest ratio that is good enough."""

    method: Table
    devices: int
    limit: float
    over: Table | None = None
    """The method on one device that it is compared with; None is the plain dense step."""
    optimizer: str = "adamw"
    launched: bool = False
    """Whether one of the devices is here, with the whole batch, as each process of a launched run has it."""


CASES: dict[str, Case] = {
    "lte reset b, 8 x rank 64": Case({"name": "lte", "rank": 64, "frozen_a": False}, 8, 0.92),
    "lte reset b, 32 x rank 32": Case({"name": "lte", "rank": 32, "frozen_a": False}, 32, 0.84),
    "lte reset-less, 8 x rank 64": Case({"name": "lte", "rank": 64, "reset": "none"}, 8, 1.00),
    "lte reset-less, 32 x rank 32": Case({"name": "lte", "rank": 32, "reset": "none"}, 32, 0.90),
    "lte frozen A, 8 x rank 64": Case({"name": "lte", "rank": 64}, 8, 0.92),
    "lte frozen A, 32 x rank 32": Case({"name": "lte", "rank": 32}, 32, 0.84),
    "lte frozen A, muon, 8 x rank 64": Case({"name": "lte", "rank": 64}, 8, 0.92, optimizer="muon"),
    "lte frozen A, muon, 32 x rank 32": Case({"name": "lte", "rank": 32}, 32, 0.84, optimizer="muon"),
    "lte frozen A, one of 8 x rank 64": Case({"name": "lte", "rank": 64}, 8, 0.92, launched=True),
    "lte columns, 8 x rank 64": Case({"name": "lte", "rank": 64, "draws": "columns"}, 8, 0.86),
    "lte columns, 32 x rank 32": Case({"name": "lte", "rank": 32, "draws": "columns"}, 32, 0.84),
    "lte columns, one of 8 x rank 64": Case({"name": "lte", "rank": 64, "draws": "columns"}, 8, 0.83, launched=True),
    "lte slices, 8 x rank 64": Case({"name": "lte", "rank": 64, "draws": "slices"}, 8, 0.84),
    "lte slices, 32 x rank 32": Case({"name": "lte", "rank": 32, "draws": "slices"}, 32, 0.84),
    "lte slices, one of 8 x rank 64": Case({"name": "lte", "rank": 64, "draws": "slices"}, 8, 0.83, launched=True),
    # Equal rank in all, so equally many parameters; and equal rank a head, so equally many operations a row.
    "lte reset b, 32 x rank 2 over 1 x rank 64": Case(
        {"name": "lte", "rank": 2, "frozen_a": False}, 32, 1.15, {"name": "lte", "rank": 64, "frozen_a": False}
    ),
    "lte reset b, 32 x rank 32 over 1 x rank 32": Case(
        {"name": "lte", "rank": 32, "frozen_a": False}, 32, 1.15, {"name": "lte", "rank": 32, "frozen_a": False}
    ),
    "local-sgd, 8 replicas": Case({"name": "local-sgd"}, 8, 1.3),
    "diloco, 8 replicas": Case({"name": "diloco"}, 8, 1.3),
}
MEMORY_LIMIT, MERGE_STEPS_LIMIT = 1.05, 2.0


@dataclass(frozen=True)
class Batch:
    """Random images (S, C, Y, X) and classes (S,): the time of a step does not depend on what they show."""

    size: VitModel
    images: Tensor
    classes: Tensor


def random_batch(model: str, samples: int, layers: int | None = None) -> Batch:
    """Draw a batch of a model's own size; with `layers`, for a model of so many blocks."""
    size, draw = VitModel(name=model), torch.Generator().manual_seed(0)
    size = size.model_copy(update={"layers": layers or size.layers})
    images = torch.randn(samples, size.colours, size.image, size.image, generator=draw)
    return Batch(size, images, torch.randint(size.classes, (samples,), generator=draw))


def dense_step(batch: Batch) -> Step:
    """Return one step of plain PyTorch."""
    model = Vit(batch.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        F.cross_entropy(model(batch.images), batch.classes).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prepare(method: Table, devices: int, batch: Batch, optimizer: str = "adamw", launched: bool = False) -> Method:
    """Return a method for the batch's model: N devices share the batch; a launched one, of N, has it all."""
    size, samples = batch.size, len(batch.images)
    communicator = EchoCommunicator(devices) if launched else VirtualCommunicator(devices)
    run = build_run(
        {
            # Only the limits of the rank are taken from here: the network is the one that is passed in.
            "model": {"layers": size.layers, "width": size.width, "attention_heads": size.attention_heads},
            "method": dict(method),
            "train": {
                "steps": 10**6,
                "micro_batch": samples // len(communicator.local_devices),
                "learning_rate": 1e-4,
                "optimizer": optimizer,
            },
            "cluster": {"devices": devices},
        }
    )
    return build_method(run, communicator, CPU, Vit(size))


def step_of(method: Method, batch: Batch) -> Step:
    """Return one step of a method; step 1 stands for all, which differ in the learning rate alone."""
    return lambda: method.step(batch.images, batch.classes, 1)


def measure(name: str, case: Case, batch: Batch, pairs: int) -> Table:
    """Return a case's ratio of time, its ratio of memory at the peak above the step's start, and its merge."""
    method = prepare(case.method, case.devices, batch, case.optimizer, case.launched)
    step = step_of(method, batch)
    reference = dense_step(batch) if case.over is None else step_of(prepare(case.over, 1, batch), batch)
    method.merge(0)  # a run's rounds but the first also subtract, where there is no reset
    timed = paired_seconds(step, reference, pairs)
    reference_s = statistics.median(other.wall for _, other in timed)
    ratio, quartiles = median_and_quartiles([ours.wall / other.wall for ours, other in timed])
    processor, processor_quartiles = median_and_quartiles([o.processor / other.processor for o, other in timed])
    return {
        "case": name,
        "step_ratio": ratio,
        "limit": case.limit,
        "quartiles": quartiles,
        "processor_ratio": processor,
        "processor_quartiles": processor_quartiles,
        "step_s": statistics.median(ours.wall for ours, _ in timed),
        "reference_step_s": reference_s,
        "memory_ratio": cpu_peak_bytes(step) / cpu_peak_bytes(reference),
        "merge_over_reference_steps": statistics.median(seconds(lambda: method.merge(0)).wall for _ in range(MERGES))
        / reference_s,
        "merge_peak_bytes": cpu_peak_bytes(lambda: method.merge(0)),
    }


def keep_freed_memory() -> None:
    """Have glibc reuse what is freed, as torch's CUDA allocator does; elsewhere do nothing.

    Left to itself it gives large blocks back to the system at every free, and each step spends its time in page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def line(result: Table) -> str:
    """Return a result for people."""
    (low, high), (least, most) = result["quartiles"], result["processor_quartiles"]
    return (
        f"{result['case']}: step {result['step_ratio']:.3f}x ({low:.3f} to {high:.3f}; good up to {result['limit']}), "
        f"{result['step_s']:.2f} s; processor time {result['processor_ratio']:.3f}x ({least:.3f} to {most:.3f}); "
        f"memory {result['memory_ratio']:.3f}x (good up to {MEMORY_LIMIT}); "
        f"merge {result['merge_over_reference_steps']:.2f} steps (good up to {MERGE_STEPS_LIMIT:g}), "
        f"{result['merge_peak_bytes'] / 1e6:.1f} MB beside the model"
    )


def main() -> None:
    """Measure each case; one line a case, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_s16", choices=list(VitModel.sizes))
    parser.add_argument("--batch", type=int, default=32, help="samples of all devices together")
    parser.add_argument("--layers", type=int, help="blocks of the network; not given: all of the model's")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument(
        "--system-allocator", action="store_true", help="time the page faults of malloc's defaults, too"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.system_allocator:
        keep_freed_memory()
    batch, results = random_batch(arguments.model, arguments.batch, arguments.layers), []
    for name in arguments.cases:
        results.append(measure(name, CASES[name], batch, arguments.pairs))
        print(line(results[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({**vars(arguments), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
