"""Whole runs on the accelerator made of Python: steps, merges, evaluations, checkpoints, a resume and an export.

python -m tests.fakegpu.rounds CASE...    prints a line of JSON for each: its name, and the traceback where it failed

A case is WORLD/VARIANT/OPTIONS. Worlds are a simulation and the first or the last of two processes between which NCCL
has a stand-in; variants are those of tests.tiny; options, joined by +, are those of OPTIONS.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ltecli.commands.export import _merged
from simulate.comm.base import Communicator
from simulate.comm.process_group import TorchCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.common.events import Event
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.data.batches import build_batches
from simulate.launch.recovery import recover
from simulate.measure.one_device import measure_memory_bytes
from simulate.methods.build_network import empty_model
from simulate.methods.registry import build_method
from simulate.models.schema import VitModel
from simulate.optim.loss_scale import LossScale
from simulate.training.checkpoints import checkpoint_path
from simulate.training.loop import Session, restore, train
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny
from tests.fakegpu.device import NAME, OnTheDevice, register
from tests.fakegpu.group import as_torch_distributed
from tests.simulate.data.pictures import images

MODULE = register()  # before its name can be used, and before the first backward pass
HERE = torch.device(NAME, 0)
DEVICES, PROCESSES = 4, 2
RANKS = {"first": 0, "last": PROCESSES - 1}
WORLDS = ("simulated", *RANKS)
STEPS = 8
STOP = {"simulated": 5, "first": 4, "last": 4}
"""Steps after which the run is stopped and resumed: within the second of two rounds, or, in processes, where they meet."""
VIT = VitModel(layers=1, width=16, attention_heads=2, patch=4, image=8, classes=3, colours=3)
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "diagnosed": {"train": {"diagnostics_every": 4}},
    "llama": {"model": tiny.LLAMA},
    "vit": {},
    "bf16": {"train": {"autocast": "bf16"}},
    "fp16": {"train": {"autocast": "fp16"}},
    "8bit": {"train": {"optimizer_state": "8bit"}},
    "recompute": {"train": {"activation_checkpointing": True}},
    "sick": {},  # a device's weights are not finite at the first merge
    "overflow": {"train": {"autocast": "fp16"}},  # so are gradients at each step
    "memory": {},  # one device's program, as measured before a run
}


def run_of(variant: str, options: list[str]) -> Run:
    """Return the run of a case."""
    model: dict[str, Any] = {"layers": tiny.VARIANTS[variant].get("fragments", 1)}
    train_table: dict[str, Any] = {
        "steps": STEPS, "dtype": "fp32", "evaluate_every": 4, "evaluate_samples": 4, "checkpoint_every": 4,
        "warmup_steps": 2,
    }  # fmt: skip
    for option in options:
        model |= OPTIONS[option].get("model", {})
        train_table |= OPTIONS[option].get("train", {})
    run = tiny.variant_run(variant, DEVICES, model, train_table)
    if "vit" in options:
        data = run.data.model_copy(update={"augment": ["crop", "flip", "colour"], "mixup": 0.2})
        run = run.model_copy(update={"model": VIT, "data": data})
    return run


def session_of(run: Run, communicator: Communicator, folder: Path, events: list[Event]) -> Session:
    """Return a session on the device, at step 0."""
    profile = load_profile("gtx1080ti_x8")
    clock = SimulatedClock(run, profile.devices(run.cluster.devices), profile.link)
    communicator.on_transfer, communicator.on_wait = clock.charge_transfer, clock.wait
    data = images() if run.model.family == "vit" else tiny.text()
    method = build_method(run, communicator, HERE)
    return Session(
        run, method, build_batches(run, data, HERE), communicator, clock, events.append, folder, HERE,
        recovers=isinstance(communicator, TorchCommunicator),
    )  # fmt: skip


def whole_run(run: Run, communicate: Callable[[], Communicator], folder: Path, stop: int) -> list[Event]:
    """Train a part, save, resume, train the rest, and export; returns all events."""
    events: list[Event] = []
    with OnTheDevice() as mode:
        session = session_of(run, communicate(), folder, events)
        session.stop = lambda: session.step >= stop
        assert not train(session)
        stopped = session.step
        session = session_of(run, communicate(), folder, events)
        if session.recovers:  # of the other process's devices no state is left
            found = recover(session)
            assert found is not None and found.lost
        else:
            restore(session, checkpoint_path(folder, stopped))
        assert session.step == stopped
        assert train(session)
        assert_on_the_device(session)
    assert mode.operations > 500
    step, weights, _ = _merged(run, checkpoint_path(folder, STEPS))
    assert step == STEPS
    assert {name: w.shape for name, w in weights.items()} == {
        name: w.shape for name, w in empty_model(run).state_dict().items()
    }
    return events


def assert_on_the_device(session: Session) -> None:
    """Hold parameters and moments to the device; counters and copies of the start are where they are meant to be."""
    method = session.method
    assert all(parameter.device == HERE for parameter in method.parameters.values())
    moments = [m for state in method.stepper.state.values() for m in state.values() if m.ndim]
    assert all(moment.device == HERE for moment in moments)


def with_a_sick_device(patch: pytest.MonkeyPatch) -> None:
    """Make the weights of one device not finite, as far as methods know."""
    from simulate.methods.base import Method

    def healthy(method: Method) -> torch.Tensor:
        return torch.arange(method.local_devices) > 0

    patch.setattr(Method, "healthy", healthy)


def with_overflow(patch: pytest.MonkeyPatch) -> None:
    """Make gradients of some rows not finite, as far as the loss scale knows."""
    patch.setattr(LossScale, "lets_all_step", lambda scale, finite_C: False)


def run_case(case: str, folder: Path) -> None:
    """Run one."""
    world, variant, chosen = case.split("/")
    options = [option for option in chosen.split("+") if option]
    run = run_of(variant, options)
    with pytest.MonkeyPatch.context() as patch:
        if "sick" in options:
            with_a_sick_device(patch)
        if "overflow" in options:
            with_overflow(patch)
        if "memory" in options:
            with OnTheDevice():
                assert measure_memory_bytes(run, HERE) == MODULE.peak - MODULE.held
        events = launched(run, RANKS[world], folder, patch) if world in RANKS else simulated(run, folder)
    kinds = {event["kind"] for event in events}
    expected = {"step", "evaluate", "checkpoint"}
    expected |= {"diagnostics"} if "diagnosed" in options else set()
    expected |= {"left-out"} if "sick" in options else set()
    assert kinds >= expected, kinds


def simulated(run: Run, folder: Path) -> list[Event]:
    """Run all devices in this process."""
    return whole_run(run, lambda: VirtualCommunicator(DEVICES), folder, STOP["simulated"])


def launched(run: Run, rank: int, folder: Path, patch: pytest.MonkeyPatch) -> list[Event]:
    """Run the devices of one process of several."""
    distributed = as_torch_distributed(rank, PROCESSES, patch)
    events = whole_run(run, lambda: TorchCommunicator(DEVICES, HERE, 60.0), folder, STOP["first"])
    assert distributed.messages > STEPS
    distributed.assert_all_arrived()
    return events


def main() -> None:
    """Run the cases."""
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        started, error = time.monotonic(), None
        try:
            with tempfile.TemporaryDirectory() as folder:
                run_case(case, Path(folder))
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"case": case, "error": error, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
