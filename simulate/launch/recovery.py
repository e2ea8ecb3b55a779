"""How the processes of a launched run agree on where to go on, whatever each of them has saved.

Every process says which checkpoints its folder holds: of which devices, and whether what all share. The newest one that
covers all devices is taken; if none does, because a folder is gone, the one that covers most. A part that a process
needs and does not have comes from one that has it. A device that nobody has starts from the merged weights with an
optimizer and adapters of its own, and what it had added to W stays.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from simulate.comm.process_group import TorchCommunicator
from simulate.methods.state import State
from simulate.training.checkpoints import Progress, checkpoint_path, has_shared, load_checkpoint, saved_devices
from simulate.training.loop import Session, continue_from

Held = dict[int, tuple[bool, list[int]]]
"""By step: whether a process can read what all devices share, and the devices whose parts it can read."""


@dataclass(frozen=True)
class Found:
    """Where to go on, and with what."""

    progress: Progress
    state: State
    lost: list[int]
    """Devices whose state nobody had."""


def recover(session: Session) -> Found | None:
    """Take a run up where it can go on, the same step in all processes; None, and the start, where nobody has anything.

    Raises InputError for a checkpoint that is damaged, or does not belong to the run.
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
    own = {step: (shared, sorted(devices)) for step, (shared, devices) in _held(session.checkpoints).items()}
    everyones = [_parsed(text) for text in communicator.share_texts(json.dumps(own))]
    step = choose(everyones, session.run.cluster.devices)
    _drop_later(session, -1 if step is None else step)
    if step is None:
        return None
    holders = [held.get(step, (False, [])) for held in everyones]
    progress, state = _read(session, step, holders[communicator.process])
    known, state = _exchange(session, communicator, holders, progress, state)
    lost = sorted(set(range(session.run.cluster.devices)) - {d for _, devices in holders for d in devices})
    if lost:
        _revive(session, communicator, holders, state, lost)
    return Found(known, state, lost)


def _revive(
    session: Session,
    communicator: TorchCommunicator,
    holders: list[tuple[bool, list[int]]],
    state: State,
    lost: list[int],
) -> None:
    """Give devices that are lost a start, like that of the first device that is not."""
    source = next(process for process, (_, devices) in enumerate(holders) if devices)
    donor = min(holders[source][1])
    received = communicator.send_state(source, _of_device(session, donor) if communicator.process == source else {})
    for device in set(lost) & set(session.method.row_devices()):
        state.of_devices[device] = session.method.init_lost_device(state.shared, received, device)


def choose(everyones: list[Held], devices: int) -> int | None:
    """Return the step to go on from: the newest that covers all devices, else the newest of those that cover most."""
    best: tuple[int, int] | None = None
    for step in {step for held in everyones for step in held}:
        holders = [held[step] for held in everyones if step in held]
        if any(shared for shared, _ in holders):
            covered = len({device for _, own in holders for device in own if device < devices})
            best = max(best or (0, 0), (covered, step))
    return None if best is None or best[0] == 0 else best[1]


def _held(folder: Path) -> Held:
    held: Held = {}
    for path in sorted(folder.glob("step-*")):
        name = path.name.removeprefix("step-")
        if path.is_dir() and name.isdigit():
            held[int(name)] = (has_shared(path), sorted(saved_devices(path)))
    return held


def _parsed(text: str) -> Held:
    return {int(step): (bool(shared), list(devices)) for step, (shared, devices) in json.loads(text).items()}


def _drop_later(session: Session, step: int) -> None:
    """Remove what is newer than the step to go on from: parts of one attempt must not be joined with another's."""
    if session.writes_shared:
        for path in session.checkpoints.glob("step-*"):
            if path > checkpoint_path(session.checkpoints, step):
                shutil.rmtree(path, ignore_errors=True)
    session.communicator.all_gather_scalars(torch.zeros(session.method.local_devices, 1))


def _read(session: Session, step: int, held: tuple[bool, list[int]]) -> tuple[Progress | None, State]:
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
    """Give every process what it lacks; nothing travels where all have what they need."""
    texts = communicator.share_texts(json.dumps(None if progress is None else asdict(progress)))
    known = next(Progress(**json.loads(text)) for text in texts if text != "null")
    if not all(shared for shared, _ in holders):
        source = next(process for process, (shared, _) in enumerate(holders) if shared)
        shared = communicator.send_state(source, state.shared)
        state.shared.update(shared)
    wanted = [set(json.loads(text)) for text in communicator.share_texts(json.dumps(session.method.row_devices()))]
    lacking = {d for process, needs in enumerate(wanted) for d in needs if d not in holders[process][1]}
    for device in sorted(lacking):
        sources = [process for process, (_, devices) in enumerate(holders) if device in devices]
        if sources:
            own = _of_device(session, device) if communicator.process == sources[0] else {}
            received = communicator.send_state(sources[0], own)
            if device in wanted[communicator.process]:
                state.of_devices[device] = received
    return known, state


def _of_device(session: Session, device: int) -> dict[str, Tensor]:
    newest = max(session.checkpoints.glob("step-*"))
    return load_checkpoint(newest, session.run, session.batches.fingerprint, [device], False)[1].of_devices[device]
