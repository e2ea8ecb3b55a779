"""Whole runs on the accelerator made of Python: steps, merges, evaluations, checkpoints, a resume and an export.

python -m tests.fakegpu.rounds CASE...    prints a line of JSON for each: its name, and the traceback where it failed

A case is WORLD/VARIANT/OPTIONS. Worlds are a simulation, the first or the last of two processes between which NCCL has
a stand-in, and those of ALONE; variants are those of tests.tiny; options, joined by +, are those of OPTIONS.
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

from ltecli.commands.export import merged_weights
from simulate.comm import channel as channels
from simulate.comm import process_exchanges
from simulate.comm.base import Communicator
from simulate.comm.process_group import TorchCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.common.events import Event
from simulate.config.method_table import method_part
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.data.batches import build_batches
from simulate.launch.recovery import recover
from simulate.layers.lora import LoraLinear
from simulate.measure.kernels import Sizes, measure_kernels, step_s
from simulate.measure.one_device import measure_memory_bytes
from simulate.measure.timer import Stopwatch
from simulate.methods.build_network import empty_model
from simulate.methods.registry import build_method
from simulate.models.families.vit import VitModel
from simulate.optim.loss_scale import LossScale
from simulate.probe.spectra import probe_run
from simulate.rules import cadence
from simulate.training import diagnostics
from simulate.training.checkpoints import checkpoint_path
from simulate.training.loop import Session, restore, train
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny
from tests.fakegpu.device import NAME, OnTheDevice, Stream, register
from tests.fakegpu.group import as_torch_distributed
from tests.simulate.data.pictures import images

MODULE = register()  # before its name can be used, and before the first backward pass
HERE = torch.device(NAME, 0)
DEVICES, PROCESSES = 4, 2
RANKS = {"first": 0, "last": PROCESSES - 1}
WORLDS = ("simulated", *RANKS)
STEPS = 8
STOP = {"simulated": 5, "first": 4, "last": 4}
"""Steps after which a run is stopped and resumed: within the second of two rounds, or where processes meet."""
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
    "clock": {},  # a process stops its devices by its own clock
    "adrift": {},  # broken: merged weights stay on the CPU
    "astray": {},  # broken: messages are made on the CPU
    "hasty": {},  # broken: a message is not waited for
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
    if "clock" in options:
        run = run.model_copy(update={"method": run.method.model_copy(update={"steps_taken": None, "deadline_s": 1e-9})})
    if "vit" in options:
        data = run.data.model_copy(update={"augment": ("crop", "flip"), "mixup": 0.2})
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
    if getattr(run.method, "master", None) == "server" and session.communicator.process:
        with pytest.raises(InputError, match="lacks the weights in full precision"):
            merged_weights(run, checkpoint_path(folder, STEPS))
        return events
    step, weights, _ = merged_weights(run, checkpoint_path(folder, STEPS))
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
    """Make the weights of a process's last device not finite, as far as methods know."""
    from simulate.methods.base import Method

    def healthy(method: Method) -> torch.Tensor:
        return torch.arange(method.local_devices) < method.local_devices - 1

    patch.setattr(Method, "healthy", healthy)


def with_overflow(patch: pytest.MonkeyPatch) -> None:
    """Make gradients of some rows not finite, as far as the loss scale knows."""
    patch.setattr(LossScale, "lets_all_step", lambda scale, finite_C: False)


def weights_adrift(patch: pytest.MonkeyPatch) -> None:
    """Leave merged weights on the CPU."""
    merged_weight = LoraLinear.merged_weight
    patch.setattr(LoraLinear, "merged_weight", lambda layer: merged_weight(layer).cpu())


def messages_astray(patch: pytest.MonkeyPatch) -> None:
    """Make messages on the CPU."""
    to_bytes = process_exchanges._to_bytes
    patch.setattr(process_exchanges, "_to_bytes", lambda tensors: to_bytes(tensors).cpu())


def hasty_messages(patch: pytest.MonkeyPatch) -> None:
    """Go on before messages to the server have arrived."""

    def to_server(channel: channels.Channel, parts: list[torch.Tensor]) -> None:
        for process, part in enumerate(parts):
            if process != channels.SERVER:
                channels.dist.irecv(part, process, group=channel.group)

    patch.setattr(channels.Channel, "to_server", to_server)


BREAKS = {"adrift": weights_adrift, "astray": messages_astray, "hasty": hasty_messages}


def measured_memory(run: Run) -> None:
    """Measure the memory of one device's program, as before each run."""
    assert measure_memory_bytes(run, HERE) == MODULE.peak - MODULE.held


def probed(run: Run) -> None:
    """Probe gradients and a warm-up."""
    probe = probe_run(run, tiny.batches(run), HERE, "prose", 2, 2, lambda text: None)
    assert probe.layers


def measured_machine(run: Run) -> None:
    """Time kernels, and steps of the run."""
    watch = Stopwatch(HERE, 0.0)
    sizes = Sizes(
        products=[(16, 8, 8)], attention=[(16, 8)], optimizer=[256], steps=[(1, 32, 1)], packing=[8],
        family_steps=[(1, 32, 1)],
    )  # fmt: skip
    assert measure_kernels(watch, sizes, lambda what: None).products
    assert step_s(watch, run, 1) > 0


def streamed(run: Run) -> None:
    """Hold the order of streams in background exchanges: what each waits for, and when."""
    with pytest.MonkeyPatch.context() as patch:
        as_torch_distributed(0, PROCESSES, patch)
        communicator = TorchCommunicator(DEVICES, HERE, 60.0)
        training = MODULE.streams[-1]
        training.waited.clear()
        seen: list[Stream] = []
        numbers = torch.zeros(8, device=HERE)
        with communicator.background():
            communicator.all_reduce([numbers])
            communicator.on_complete(lambda: seen.append(MODULE.streams[-1]))
        (side,) = seen
        assert side is not training
        assert side.waited == [training, training]  # before each
        assert not training.waited
        communicator.all_reduce([numbers])
        assert training.waited == [side]  # one group at a time
        communicator.finish()
        assert training.waited == [side, side]
        communicator.all_reduce([numbers])
        assert training.waited == [side, side]  # nothing is on its way any more


ALONE: dict[str, Callable[[Run], None]] = {
    "memory": measured_memory, "probe": probed, "machine": measured_machine, "streams": streamed,
}  # fmt: skip


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
        for option in set(BREAKS) & set(options):
            BREAKS[option](patch)
        if world in ALONE:
            with OnTheDevice() as mode:
                ALONE[world](run)
            assert mode.operations
            return
        patch.setattr(diagnostics, "NOISE_BATCHES", 1)
        events = launched(run, RANKS[world], folder, patch) if world in RANKS else simulated(run, folder)
    kinds = {event["kind"] for event in events}
    excludes = method_part(run.method.name, "train").can_exclude_devices
    expected = {"step", "evaluate", "checkpoint"}
    expected |= {"diagnostics"} if "diagnosed" in options else set()
    expected |= {"left-out"} if "sick" in options and excludes else set()
    expected |= {"round"} if "clock" in options else set()
    assert kinds >= expected, kinds


def simulated(run: Run, folder: Path) -> list[Event]:
    """Run all devices in this process."""
    return whole_run(run, lambda: VirtualCommunicator(DEVICES), folder, STOP["simulated"])


def launched(run: Run, rank: int, folder: Path, patch: pytest.MonkeyPatch) -> list[Event]:
    """Run the devices of one process of several."""
    distributed = as_torch_distributed(rank, PROCESSES, patch)
    patch.setattr(cadence, "MEETING_STEPS", STOP["first"])  # of methods without merges, which meet after more steps
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
