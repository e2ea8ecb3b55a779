"""Recovery: the processes of a launched run agree on a checkpoint, and send each other the parts that they lack.

A node's folder holds the checkpoints of its own devices, and nodes can be lost with their folders. Each process lists
its checkpoints: which devices each has, and whether it has the shared part. All take the newest one that covers all
devices, else the one that covers most. A process gets missing parts from one that has them. A device whose part nobody
has starts from the merged weights, with a new optimizer and new adapters; what it had added to W before stays. The
worker calls `recover` before it trains.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from simulate.comm.process_group import TorchCommunicator
from simulate.common.errors import InputError
from simulate.methods.state import State
from simulate.training.checkpoints import (
    Progress,
    checkpoint_path,
    has_shared,
    load_checkpoint,
    newest_with,
    saved_devices,
)
from simulate.training.loop import Session, continue_from

Held = dict[int, tuple[bool, list[int]]]
"""A process's readable checkpoints, by step: whether it has the shared part, and the devices whose parts it has."""


@dataclass(frozen=True)
class Found:
    """State from which all processes continue."""

    progress: Progress
    state: State
    lost: list[int]
    """Devices whose parts no process has."""


def recover(session: Session) -> Found | None:
    """Continue the session from a step that all processes agree on; returns None, at step 0, without any checkpoint.

    Raises InputError for a checkpoint that is damaged or belongs to another run.
    """
    found = _find(session)
    if found is not None:
        continue_from(session, found.progress, found.state)
        if found.lost:
            session.method.after_lost_devices_init()
    return found


def _find(session: Session) -> Found | None:
    communicator = session.communicator
    assert isinstance(communicator, TorchCommunicator)
    communicator.current_phase = "the search for checkpoints"
    texts = communicator.share_texts(json.dumps(_held(session.checkpoints)))
    everyones = [
        {int(step): (bool(shared), list(devices)) for step, (shared, devices) in json.loads(text).items()}
        for text in texts
    ]  # JSON has only strings as keys, and no tuples
    cluster = session.run.cluster
    step = choose(everyones, cluster.devices, None if session.group is None else cluster.needed)
    _remove_later(session, -1 if step is None else step)
    if step is None:
        return None
    holders = [held.get(step, (False, [])) for held in everyones]
    progress, state = _read(session, step, holders[communicator.process])
    known, state = _exchange(session, communicator, holders, progress, state)
    lost = sorted(set(range(session.run.cluster.devices)) - {d for _, devices in holders for d in devices})
    if lost:
        _init_lost_devices(session, communicator, holders, state, lost)
    return Found(known, state, lost)


def _init_lost_devices(
    session: Session,
    communicator: TorchCommunicator,
    holders: list[tuple[bool, list[int]]],
    state: State,
    lost: list[int],
) -> None:
    """Initialise the lost devices' parts after the pattern of the first device that is not lost."""
    run, held = session.run, sorted({device for _, devices in holders for device in devices})
    for index in sorted({run.class_of(device) for device in lost}):
        # Any device's part shows which tensors there are; the lost device's start anew.
        donor = next((device for device in held if run.class_of(device) == index), held[0])
        source = next(process for process, (_, devices) in enumerate(holders) if donor in devices)
        received = communicator.send_state(source, _of_device(session, donor) if communicator.process == source else {})
        for device in set(lost) & set(session.method.row_devices()):
            if run.class_of(device) == index:
                pattern = received if run.class_of(donor) == index else of_own_class(session, received)
                own = own_part(session, device)  # it was away when this checkpoint was saved, and may have an older one
                state.of_devices[device] = session.method.init_returning_device(state.shared, pattern, own, device)


def of_own_class(session: Session, donor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pattern of a device of this process from one of another class: what has another shape is as at the
    start, and the optimizer begins anew.
    """
    own = session.method.state.sharded().of_devices[session.communicator.local_devices[0]]
    return {
        name: donor[name] if name in donor and donor[name].shape == tensor.shape else tensor
        for name, tensor in own.items()
    }


def own_part(session: Session, device: int) -> dict[str, Tensor]:
    """Return a device's tensors in the newest checkpoint of this folder that has them; none where it is damaged."""
    path = newest_with(session.checkpoints, [device])
    if path is None:
        return {}
    try:
        _, state = load_checkpoint(path, session.run, session.batches.fingerprint, [device], with_shared=False)
    except InputError:
        return {}
    return state.of_devices[device]


def choose(everyones: list[Held], devices: int, quorum: int | None = None) -> int | None:
    """Return the step to continue from: the newest that covers all devices, else the newest of those that cover most.

    With a `quorum` of devices, more than that need not be covered: what was merged without lost ones stays. Only steps
    count whose shared part some process has. None without any.
    """
    best: tuple[int, int] | None = None
    # A step that covers more devices beats a newer one: lost adapters cost more than repeated steps.
    for step in {step for held in everyones for step in held}:
        holders = [held[step] for held in everyones if step in held]
        if any(shared for shared, _ in holders):
            covered = len({device for _, own in holders for device in own if device < devices})
            covered = covered if quorum is None else min(covered, quorum)
            best = max(best or (0, 0), (covered, step))  # more devices first, then the newer step
    return None if best is None or best[0] == 0 else best[1]


def _held(folder: Path) -> Held:
    """Return the checkpoints that a folder holds."""
    held: Held = {}
    for path in sorted(folder.glob("step-*")):
        name = path.name.removeprefix("step-")
        if path.is_dir() and name.isdigit():
            held[int(name)] = (has_shared(path), sorted(saved_devices(path)))
    return held


def _remove_later(session: Session, step: int) -> None:
    """Remove checkpoints newer than `step`: a later save at the same step must not mix with parts of this attempt."""
    if session.writes_shared:
        for path in session.checkpoints.glob("step-*"):
            if path > checkpoint_path(session.checkpoints, step):
                shutil.rmtree(path, ignore_errors=True)
    # A barrier: nobody reads or writes checkpoints until all folders are clean.
    session.communicator.all_gather_scalars(torch.zeros(session.method.local_devices, 1))


def _read(session: Session, step: int, held: tuple[bool, list[int]]) -> tuple[Progress | None, State]:
    """Return the parts that this process needs and its folder holds."""
    shared, devices = held
    needed = [device for device in session.method.row_devices() if device in devices]
    if not shared and not needed:
        return None, State()
    path = checkpoint_path(session.checkpoints, step)
    return load_checkpoint(path, session.run, session.batches.fingerprint, needed, shared)


def _exchange(
    session: Session,
    communicator: TorchCommunicator,
    holders: list[tuple[bool, list[int]]],
    progress: Progress | None,
    state: State,
) -> tuple[Progress, State]:
    """Send every process the parts that it lacks; nothing is sent where none lacks any."""
    texts = communicator.share_texts(json.dumps(None if progress is None else asdict(progress)))
    # Everyone's parts are of one step, so any shared part has the run's progress.
    known = next(Progress(**json.loads(text)) for text in texts if text != "null")
    if not all(shared for shared, _ in holders):
        source = next(process for process, (shared, _) in enumerate(holders) if shared)
        shared = communicator.send_state(source, state.shared)
        state.shared.update(shared)
    rows = json.dumps(session.method.row_devices())
    needed_by_process = [set(json.loads(text)) for text in communicator.share_texts(rows)]
    lacking = {d for process, needed in enumerate(needed_by_process) for d in needed if d not in holders[process][1]}
    for device in sorted(lacking):
        sources = [process for process, (_, devices) in enumerate(holders) if device in devices]
        if sources:
            # Every process takes part in a broadcast; those that do not need the device drop what they receive.
            # All processes know all holders, so they agree on the sender without asking.
            own = _of_device(session, device) if communicator.process == sources[0] else {}
            received = communicator.send_state(sources[0], own)
            if device in needed_by_process[communicator.process]:
                state.of_devices[device] = received
    return known, state


def _of_device(session: Session, device: int) -> dict[str, Tensor]:
    """Return a device's part of the newest checkpoint, which is the agreed one since later ones were removed."""
    newest = max(session.checkpoints.glob("step-*"))
    return load_checkpoint(newest, session.run, session.batches.fingerprint, [device], False)[1].of_devices[device]
