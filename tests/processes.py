"""The tiny runs of tests.tiny on devices in real processes, which gloo joins over loopback.

python -m tests.processes FOLDER PROCESSES DTYPE STEPS VARIANT...    (started by `train_in_processes`)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from simulate.comm.process_group import TorchCommunicator
from simulate.config.run import Run, build_run
from simulate.layers.quantized import import_bitsandbytes
from simulate.methods.paced import Paced
from simulate.methods.registry import build_method
from tests import tiny
from tests.harness import run

DEVICES, TIMEOUT_S = 4, 60


def variant_table(steps: int, dtype: str) -> dict[str, Any]:
    """Return the [train] table of these runs."""
    return {"steps": steps, "dtype": dtype, "warmup_steps": 5, "weight_decay": 0.1}


def run_processes(module: str, folder: Path, processes: int, arguments: list[str]) -> None:
    """Run a module that forks into processes, with FOLDER PROCESSES and the arguments, to their ends."""
    outcome = run([sys.executable, "-m", module, folder, processes, *arguments], 300)
    assert outcome.code == 0, outcome.stdout + outcome.stderr


def fork_and_meet(task: Callable[..., None], arguments: list[str]) -> None:
    """Fork into processes that meet by gloo, each of which calls `task(folder, process, arguments)`.

    `arguments` begin with FOLDER PROCESSES. Forks have all imports, which take longer than most tasks.
    """
    folder, processes, *others = arguments
    torch.multiprocessing.start_processes(
        _be_one, (task, Path(folder), int(processes), others), int(processes), start_method="fork"
    )


def _be_one(process: int, task: Callable[..., None], folder: Path, processes: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=processes,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    task(folder, process, arguments)
    dist.destroy_process_group()


def train_in_processes(
    folder: Path, variants: list[str], processes: int, steps: int = 60, dtype: str = "fp64"
) -> dict[str, tuple[tiny.History, dict[str, int]]]:
    """Train each variant on 4 devices in `processes` processes; returns what is left and the counted bytes, by name."""
    run_processes("tests.processes", folder, processes, [dtype, str(steps), *variants])
    results = {}
    for index, name in enumerate(variants):
        weights = load_file(folder / f"{index}.safetensors")
        counted = json.loads((folder / f"{index}.json").read_text())
        results[name] = tiny.History(weights.pop("losses"), weights), counted
    return results


SPEEDS = (1.0, 0.2, 0.5, 1.0)
"""Steps a second of each process, by the clock that `paced_by_turned_clocks` gives it."""


def paced_by_turned_clocks(folder: Path, method: dict[str, Any]) -> tuple[tiny.History, list[list[int]]]:
    """Train in 4 processes of unequal speed; returns what is left and the steps taken, round by round."""
    (folder / "method.json").write_text(json.dumps(method))
    result, _ = train_in_processes(folder, [TURNED], 4, 20)[TURNED]
    return result, json.loads((folder / "counts.json").read_text())


TURNED = "by turned clocks"


def _train_by_turned_clocks(folder: Path) -> tuple[tiny.History, dict[str, int]]:
    method_table = json.loads((folder / "method.json").read_text())
    run = tiny._run(DEVICES, None, {"steps": 20}, method_table)
    communicator = TorchCommunicator(DEVICES, tiny.CPU, TIMEOUT_S)
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    assert isinstance(method, Paced)
    seconds, counts, losses = 0.0, [], []
    method.goes_by_clock, method.now_s = True, lambda: seconds
    for step in range(20):
        losses.append(method.step(*data.batch(step, communicator.local_devices), step))
        seconds += 1 / SPEEDS[communicator.process]
        if method.merge_due(step):
            method.merge(step)
            counts.append(method.steps_done())
    everyones = communicator.all_gather_scalars(torch.stack(losses, dim=1)).T
    communicator.close()
    if communicator.process == 0:
        (folder / "counts.json").write_text(json.dumps(counts))
    return tiny.History(everyones, {k: w.contiguous() for k, w in method.merged_state().items()}), {}


WITHOUT_SOME = ", without some"
"""End of the names of variants whose merges lack devices."""
ROWS = ((4, 4, 2, 4), (4, 0, 1, 4), (4, 3, 0, -1), (4, 4, 0, 2), (4, -1, 4, 4))


OF_CLASSES = ", of classes"
"""Before that end: devices of two classes."""
OVER_INT8 = " over int8"
"""Before these: messages of int8."""
CLASSES = ({"devices": 2, "micro_batch": 4}, {"devices": 2, "accumulate": 3})


def run_without_some(name: str, train: dict[str, Any]) -> Run:
    """Return a variant with merges that lack devices."""
    variant = name.removesuffix(WITHOUT_SOME).removesuffix(OF_CLASSES).removesuffix(OVER_INT8)
    table = tiny.variant_run(variant, DEVICES, train=train).model_dump(exclude_none=True)
    table["method"] = {**table["method"], "pace": "lockstep"}
    table["method"].pop("steps_taken", None)
    table["cluster"]["merges_given"] = ROWS
    if OVER_INT8 in name:
        table["method"]["wire"] = "int8"
    if OF_CLASSES in name:
        ranks: tuple[dict[str, int], ...] = ({"rank": 3}, {}) if table["method"]["name"] == "lte" else ({}, {})
        table["cluster"]["class"] = [{**one, **rank} for one, rank in zip(CLASSES, ranks, strict=True)]
    return build_run(table)


def _train(name: str, steps: int, dtype: str) -> tuple[tiny.History, dict[str, int]]:
    make = run_without_some if name.endswith(WITHOUT_SOME) else _variant
    run = make(name, variant_table(steps, dtype))
    communicator = TorchCommunicator(DEVICES, tiny.CPU, TIMEOUT_S)
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    losses = []
    for step in range(steps):
        losses.append(method.step(*data.batch(step, communicator.local_devices), step))
        if method.merge_due(step):
            method.merge(step)
    everyones = communicator.all_gather_scalars(torch.stack(losses, dim=1)).T
    communicator.close()
    counter = communicator.counter
    counted = {"sent": counter.sent_bytes, "received": counter.received_bytes, "messages": counter.messages}
    return tiny.History(everyones, {k: w.contiguous() for k, w in method.merged_state().items()}), counted


def _variant(name: str, train: dict[str, Any]) -> Run:
    return tiny.variant_run(name, DEVICES, train=train)


def train_variants(folder: Path, process: int, arguments: list[str]) -> None:
    """Be one process."""
    dtype, steps, *variants = arguments
    for index, name in enumerate(variants):
        by_clock = name == TURNED
        history, counted = _train_by_turned_clocks(folder) if by_clock else _train(name, int(steps), dtype)
        if process == 0:
            tensors = {**{k: w.clone() for k, w in history.weights.items()}, "losses": history.losses.contiguous()}
            save_file(tensors, folder / f"{index}.safetensors")
            (folder / f"{index}.json").write_text(json.dumps(counted))


if __name__ == "__main__":
    if any("quantize" in tiny.VARIANTS.get(name, {}) for name in sys.argv[5:]):
        import_bitsandbytes()  # once rather than in every process
    fork_and_meet(train_variants, sys.argv[1:])
