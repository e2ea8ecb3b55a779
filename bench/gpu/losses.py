"""Part a: a method's losses on the device, beside those of the CPU in fp32.

The reference is the same run by the same program on this machine's CPU, trained once for all precisions of a method and
kept in the scratch folder. The bounds are relative, on the devices' mean loss at each of the steps, about ten times
what a CPU shows at full size: fp32 is 3e-7 from fp64 with LTE and 1.2e-4 with signsgd, which sends signs of rounding;
bf16 is 1e-3 from fp32 with both. TF32 and fp16 keep 10 bits of a product's inputs, bf16 7.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.device import use_precision
from bench.gpu.results import digest
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run, build_run
from simulate.data.batches import TextBatches
from simulate.data.text import load_text
from simulate.layers.accelerator import synchronize
from simulate.methods.registry import build_method

Table = dict[str, Any]
DEVICES, SAMPLES = 2, 2
CPU = torch.device("cpu")
BOUNDS = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 1e-2, "fp16": 1e-2}
SCALE = 2.0**10
"""Loss scale that fp16 begins with here: from the usual 2^16 it leaves out the first steps, so that all later losses
would be those of other steps."""


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return the largest relative difference of a step's loss, and the bound that it has to keep."""
    reference = _reference(given, folder)
    autocast = use_precision(given["precision"])
    losses, step_s = _train(_run(given, autocast), device)
    error = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, reference, strict=True))
    bound = BOUNDS[given["precision"]]
    return {
        "worst_error": error, "bound": bound, "within": error <= bound, "last_loss": losses[-1],
        "last_loss_of_CPU": reference[-1], "step_s": step_s, "losses": losses,
    }  # fmt: skip


def _run(given: Table, autocast: str) -> Run:
    train = {"steps": given["steps"], "micro_batch": SAMPLES, "learning_rate": 1e-3, "warmup_steps": 5}
    return build_run(
        {
            "model": given["model"], "method": given["method"],
            "train": {**train, "autocast": autocast, **given["train"]},
            "cluster": {"devices": DEVICES},
        }
    )  # fmt: skip


def _reference(given: Table, folder: Path) -> list[float]:
    path = folder / f"losses-{digest(given['reference'].encode())}.json"
    if not path.exists():
        use_precision("fp32")
        losses, _ = _train(_run(given, "none"), CPU)
        path.write_text(json.dumps(losses), encoding="utf-8")
    return [float(loss) for loss in json.loads(path.read_text(encoding="utf-8"))]


def _train(run: Run, device: torch.device) -> tuple[list[float], float]:
    """Return each step's loss, the mean over devices, and the mean seconds of a step without the first."""
    batches = TextBatches.of(run, load_text(run.data))
    method = build_method(run, VirtualCommunicator(DEVICES), device)
    if method.loss_scale is not None:
        method.loss_scale.scale_C.fill_(SCALE)
    losses, started = [], time.perf_counter()
    for step in range(run.train.steps):
        inputs, targets = batches.batch(step, range(DEVICES))
        losses.append(method.step(inputs.to(device), targets.to(device), step).mean())
        if method.merge_due(step):
            method.merge(step)
        if step == 0:  # it allocates, and loads kernels
            synchronize(device)
            started = time.perf_counter()
    synchronize(device)
    step_s = (time.perf_counter() - started) / (run.train.steps - 1)
    return [float(loss) for loss in losses], step_s
