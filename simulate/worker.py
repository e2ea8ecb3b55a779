"""One process of a launched run: what the elastic agent starts, and starts again after a loss.

    python -m simulate.worker FOLDER DEVICE STORE_HOST STORE_PORT

Everything else comes from the agent's environment (RANK, WORLD_SIZE, ...) and from the run's folder. Processes agree on
the newest state that they have among them, take it up, and train until the end or until somebody asks to stop. What is
told goes through the agents' key-value store: `told` counts messages, `told/K` has the K-th, `outcome` the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from simulate.clock import SimulatedClock
from simulate.config import Run, load_run
from simulate.data.batches import build_batches
from simulate.data.sources import kept_tokenizer, load_data
from simulate.distributed import LostPeerError, TorchCommunicator, devices_of
from simulate.errors import InputError, RunFailedError
from simulate.events import Event, EventFile, truncate_events
from simulate.hardware import load_profile
from simulate.loop import Session, train
from simulate.methods import build_method
from simulate.recovery import recover

RUN_FILE, PROFILE_FILE, EVENTS_FILE, CHECKPOINTS = "run.toml", "profile.toml", "events.jsonl", "checkpoints"
"""What the worker reads and writes in the run's folder."""
STOP, OUTCOME, FATAL, TOLD, STEP, START = "stop", "outcome", "fatal", "told", "step", "start"
"""Keys of the store."""
FAILED_EXIT, FATAL_EXIT = 1, 2
ORPHAN_CHECK_S = 0.5


@dataclass(frozen=True)
class Place:
    """Where in the run a process is."""

    process: int
    processes: int
    local_process: int
    local_processes: int

    @classmethod
    def here(cls) -> Place:
        """Return the place that the agent gave to this process."""
        return cls(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    def node_devices(self, devices: int) -> range:
        """Return the devices of all processes of this node, which have consecutive numbers."""
        first = self.process - self.local_process
        last = first + self.local_processes - 1
        return range(devices_of(first, self.processes, devices).start, devices_of(last, self.processes, devices).stop)


def tell(store: dist.Store, text: str) -> None:
    """Give a line to everyone who listens at the agents."""
    store.set(f"{TOLD}/{store.add(TOLD, 1)}", text)


def main() -> int:
    """Be one process until the run's end; returns the exit code."""
    folder, device_name, host, port = sys.argv[1:]
    end_with_the_agent()
    place = Place.here()
    store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=60))
    try:
        _train(Path(folder), _device(device_name, place), place, store)
    except LostPeerError as error:
        tell(store, f"process {place.process}: {error}")
        return FAILED_EXIT
    except (InputError, RunFailedError) as error:
        # Trying again would end alike.
        store.set(OUTCOME, json.dumps({"kind": "failure", "text": str(error), "input": isinstance(error, InputError)}))
        store.set(FATAL, "1")
        return FATAL_EXIT
    except (OSError, RuntimeError, MemoryError) as error:
        tell(store, f"process {place.process}: {type(error).__name__}: {' '.join(str(error).split())}")
        raise
    return 0


def end_with_the_agent() -> None:
    """Leave signals to the agent, and leave when it is gone: nobody else would end this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    agent = os.getppid()

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(FAILED_EXIT)

    threading.Thread(target=watch, daemon=True).start()


def _device(name: str, place: Place) -> torch.device:
    if name == "cuda":
        torch.cuda.set_device(place.local_process % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def join_processes(run: Run, device: torch.device, place: Place, store: dist.Store) -> None:
    """Make the default group of all processes."""
    backend = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(run.cluster.backend, run.cluster.backend)
    # Every rendezvous picks a port anew, which makes its keys its own.
    prefix = f"group/{os.environ['MASTER_ADDR']}/{os.environ['MASTER_PORT']}"
    timeout = timedelta(seconds=run.cluster.timeout_s)
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore(prefix, store), rank=place.process, world_size=place.processes,
            timeout=timeout,
        )  # fmt: skip
    except RuntimeError as error:
        raise LostPeerError(f"processes could not be joined: {' '.join(str(error).split())}") from error


def _train(folder: Path, device: torch.device, place: Place, store: dist.Store) -> None:
    run, profile = load_run(folder / RUN_FILE), load_profile(str(folder / PROFILE_FILE))
    data = load_data(run, kept_tokenizer(folder))
    join_processes(run, device, place, store)
    clock = SimulatedClock(run, profile.devices(run.cluster.devices), profile.link)
    communicator = TorchCommunicator(
        run.cluster.devices, device, run.cluster.timeout_s, clock.charge_transfer, clock.wait
    )
    leads = place.process == 0
    with ExitStack() as stack:
        stack.callback(communicator.close)
        session = Session(
            run=run,
            method=build_method(run, communicator, device),
            batches=build_batches(run, data, device),
            communicator=communicator,
            clock=clock,
            emit=_ignore,
            checkpoints=folder / CHECKPOINTS,
            device=device,
            stop=(lambda: store.check([STOP])) if leads else lambda: False,
            writes_shared=place.local_process == 0,
            folder_devices=place.node_devices(run.cluster.devices),
            recovers=True,
        )
        found = recover(session)
        if leads:
            if found is not None and found.lost:
                tell(store, f"device {', '.join(map(str, found.lost))}: no state is left; starts from merged weights")
            _tell_beginning(session, folder, stack, store)
        finished = train(session)
        session.emit({"kind": "end" if finished else "interrupt", "step": session.step, "wall_s": session.elapsed_s()})
        dist.barrier(communicator.control)
        if leads:
            store.set(OUTCOME, json.dumps(_outcome(session, finished)))
    dist.destroy_process_group()


def _ignore(event: Event) -> None:
    """Only the first process tells; what it tells is everyone's."""


def _tell_beginning(session: Session, folder: Path, stack: ExitStack, store: dist.Store) -> None:
    path, communicator = folder / EVENTS_FILE, session.communicator
    fresh = session.step == 0
    if path.exists():
        truncate_events(path, -1 if fresh else session.step)
    events = EventFile(path)
    stack.callback(events.close)
    session.emit = _telling(events, session, store)
    processes = {"processes": communicator.processes, "device": str(session.device), "backend": dist.get_backend()}
    if fresh:
        facts = json.loads(store.get(START)) if store.check([START]) else {"start": {}, "measured_bytes": None}
        session.emit({"kind": "start", "step": 0, **facts["start"], **processes})
        session.emit({"kind": "memory", "step": 0, "measured_bytes": facts["measured_bytes"]})
    else:
        session.emit({"kind": "resume", "step": session.step, **processes})


def _telling(events: EventFile, session: Session, store: dist.Store) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        events(event)
        if event["kind"] == "checkpoint":
            store.set(STEP, str(session.step))
        elif event["kind"] == "left-out":
            names = ", ".join(str(device) for device in event["devices"])
            tell(store, f"device {names}: weights not finite, left out of the merge after step {event['step']}")

    return emit


def _outcome(session: Session, finished: bool) -> Event:
    return {
        "kind": "end" if finished else "interrupt",
        "step": session.step,
        "val_loss": session.val_loss,
        "val_accuracy": session.scores.get("val_accuracy"),
        "sent_bytes": session.communicator.counter.sent_bytes,
        "simulated_s": session.clock.now_s,
        "wall_s": session.elapsed_s(),
    }


if __name__ == "__main__":
    sys.exit(main())
