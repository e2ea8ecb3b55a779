"""Whole sessions of tiny diagnosed runs, in one process or in several that gloo joins over loopback.

python -m tests.diagnosed FOLDER PROCESSES NAME...    (started by `launched_events`)

A name is a variant of tests.tiny; after "plain: " without diagnostics, after "sick: " with a device that gets weights
that are not finite, after the first diagnostics.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from simulate.comm.base import Communicator
from simulate.comm.process_group import TorchCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.common.events import Event
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.methods.registry import build_method
from simulate.training.checkpoints import list_checkpoints
from simulate.training.loop import Session, restore, train
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny
from tests.processes import DEVICES, TIMEOUT_S, fork_and_meet, run_processes

STEPS, EVERY, SICK = 12, 3, 3
PLAIN, WITH_SICK = "plain: ", "sick: "


def diagnosed_run(name: str, devices: int = DEVICES) -> Run:
    """Return the run of a name."""
    train = {"steps": STEPS, "diagnostics_every": None if name.startswith(PLAIN) else EVERY, "checkpoint_every": 8}
    return tiny.variant_run(name.rpartition(": ")[2], devices, train=train)


def session_of(run: Run, communicator: Communicator, folder: Path, with_sick: bool = False) -> list[Event]:
    """Train from the newest checkpoint in the folder, or from the start; return this process's events."""
    profile, events = load_profile("gtx1080ti_x8"), list[Event]()
    clock = SimulatedClock(run, profile.devices(run.cluster.devices), profile.link)
    communicator.on_transfer, communicator.on_wait = clock.charge_transfer, clock.wait
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)

    def emit(event: Event) -> None:
        events.append(event)
        if with_sick and event["kind"] == "diagnostics" and len(list(diagnosed(events))) == 1:
            spoil(method.row_devices(), list(method.parameters.values()))

    leads = communicator.process == 0
    session = Session(run, method, data, communicator, clock, emit, folder, tiny.CPU, writes_shared=leads)
    session.folder_devices = range(run.cluster.devices)
    saved = list_checkpoints(folder, run.cluster.devices)
    if saved:
        restore(session, saved[-1])
    assert train(session)
    return events


@torch.no_grad()
def spoil(rows: list[int], parameters: list[torch.nn.Parameter]) -> None:
    """Make the weights of a device not finite where it lives."""
    for parameter in parameters if SICK in rows else ():
        parameter.view(len(rows), -1)[rows.index(SICK)] = torch.nan


def diagnosed(events: list[Event]) -> Iterator[Event]:
    """Yield the diagnostics among events."""
    return (event for event in events if event["kind"] == "diagnostics")


def simulated_events(folder: Path, name: str) -> list[Event]:
    """Return the events of the session in this process."""
    return session_of(diagnosed_run(name), VirtualCommunicator(DEVICES), folder, name.startswith(WITH_SICK))


def launched_events(folder: Path, names: list[str], processes: int) -> dict[str, list[Event]]:
    """Return what the first process told of each session."""
    folder.mkdir(exist_ok=True)
    run_processes("tests.diagnosed", folder, processes, names)
    return {name: json.loads(events_file(folder, name).read_text()) for name in names}


def events_file(folder: Path, name: str) -> Path:
    """Return where a launched session's events are."""
    return folder / f"{name}.json"


def checkpoints_of(folder: Path, name: str) -> Path:
    """Return where a launched session's checkpoints are."""
    return folder / f"{name} checkpoints"


def run_sessions(folder: Path, process: int, names: list[str]) -> None:
    """Be one process."""
    for name in names:
        communicator = TorchCommunicator(DEVICES, tiny.CPU, TIMEOUT_S)
        events = session_of(diagnosed_run(name), communicator, checkpoints_of(folder, name), name.startswith(WITH_SICK))
        communicator.close()
        if process == 0:
            events_file(folder, name).write_text(json.dumps(events))


if __name__ == "__main__":
    fork_and_meet(run_sessions, sys.argv[1:])
