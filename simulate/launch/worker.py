"""One worker process of a launched run: it recovers the newest state, trains to the end, and reports how it ended.

    python -m simulate.launch.worker FOLDER DEVICE STORE_HOST STORE_PORT NODE

The elastic agent starts it, and starts it again after a failure. Its rank comes from the agent's environment (RANK,
WORLD_SIZE, ...), all else from the run's folder. Messages and the outcome go through the store of `launch/keys.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from simulate.comm.process_group import TorchCommunicator, is_lack_of_memory
from simulate.comm.throttle import Throttle
from simulate.comm.transfers import devices_of
from simulate.common.errors import InputError, LostPeerError, RunFailedError, first_line
from simulate.common.events import Emit, Event, EventFile, read_events, truncate_events
from simulate.common.processor import distinct, machine_facts
from simulate.common.quantities import read_link
from simulate.common.run_files import CHECKPOINTS, EVENTS_FILE, PROFILE_FILE, RUN_FILE
from simulate.config.hardware import Link
from simulate.config.profiles import load_profile
from simulate.config.run import Run, load_run
from simulate.costs.message_time import transfer_s
from simulate.data.batches import build_batches
from simulate.data.load import Dataset, kept_tokenizer, load_data
from simulate.launch.children import INCARNATION, LAUNCH_ID, NODE_PROCESSES, STORE_LOGS
from simulate.launch.heartbeat import Beat, ProcessHeartbeat
from simulate.launch.keys import (
    ANSWERED,
    ATTEMPT,
    BEGUN,
    FAILED_EXIT,
    FATAL,
    FATAL_EXIT,
    LINKS,
    OUTCOME,
    REPORTED,
    REPORTED_EXIT,
    START,
    STEP,
    STOP,
    log,
)
from simulate.launch.lasting_store import LastingStore, raw_store, read_address
from simulate.launch.membership import Epoch, Membership, RunEndedError, Waits
from simulate.launch.recovery import recover
from simulate.launch.survivors import StartAgainError, SurvivingGroup
from simulate.layers import accelerator
from simulate.methods.build_network import start_figures
from simulate.methods.registry import build_method
from simulate.training.activity import Activity
from simulate.training.loop import Session, train
from simulate.training.simulated_clock import SimulatedClock
from simulate.training.together import StateReplacedError, together

ORPHAN_CHECK_S = 0.5
CONNECT_S = 20.0
"""Seconds that the processes of a new group have to connect."""
AnyStore = dist.Store | LastingStore
MEMBERS = "members"
"""Prefix of the heartbeats' keys where processes come and go."""
START_TOLERANCE = 1e-3
"""Share of a start weight's figure by which processors may differ (simulate.methods.build_network)."""
RESTARTED = "going on from step"
"""First words of the message that reports a restart."""
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}
"""Errors of a disk, which a restart cannot fix."""


@dataclass(frozen=True)
class RankInfo:
    """A process's rank in the run and on its node."""

    process: int
    processes: int
    local_process: int
    local_processes: int
    node: int = 0

    @classmethod
    def here(cls, node: int) -> RankInfo:
        """Return the rank that the agent gave to this process."""
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        process, processes, local_process, local_processes = (int(os.environ[key]) for key in keys)
        return cls(process, processes, local_process, local_processes, node)

    @property
    def title(self) -> str:
        """The process's name in messages."""
        return f"process {self.process} on node {self.node}"

    def node_devices(self, devices: int) -> range:
        """Return the devices of all processes of this node; their numbers are consecutive."""
        first = self.process - self.local_process
        # Ranks are sorted by node, so a node's processes and devices are consecutive.
        last = first + self.local_processes - 1
        return range(devices_of(first, self.processes, devices).start, devices_of(last, self.processes, devices).stop)


def main() -> int:
    """Train as one process of the run until its end; returns the exit code."""
    folder, device_name, host, port, node = sys.argv[1:]
    exit_with_the_agent()
    rank = RankInfo.here(int(node))
    run = load_run(Path(folder) / RUN_FILE)
    store = _open_store(run, host, int(port))
    try:
        training = _train_among if run.cluster.drops_lost else _train
        training(run, Path(folder), choose_gpu(device_name, rank), rank, store)
    except RunEndedError:
        return 0
    except LostPeerError as error:
        log(store, f"{rank.title}: {error}")
        return REPORTED_EXIT
    except StartAgainError:
        return REPORTED_EXIT  # the others say that the run begins again
    except (InputError, RunFailedError) as error:
        return _end_the_run(store, str(error), isinstance(error, InputError))
    except OSError as error:
        if error.errno in DISK_ERRORS:
            return _end_the_run(store, f"{rank.title}: {disk_text(error, Path(folder))}", False)
        return _report_failure(store, f"{rank.title}: {error}")
    # The cause may be gone after a restart: memory of another program, a broken connection.
    except (RuntimeError, MemoryError) as error:
        what = "ran out of memory" if is_lack_of_memory(error) else type(error).__name__
        return _report_failure(store, f"{rank.title}: {what}: {first_line(error)}")
    return 0


def _open_store(run: Run, host: str, port: int) -> AnyStore:
    """Connect to the run's store, on node 0 or apart."""
    if STORE_LOGS in os.environ:
        return LastingStore(_find_store(host, port), run.cluster.join_timeout_s, os.environ[LAUNCH_ID])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))


def _find_store(host: str, port: int) -> Callable[[], tuple[str, int]]:
    """Return a function that says where the store is; where it is apart, the agent learns of its restarts."""
    logs = os.environ.get(STORE_LOGS)
    return (lambda: (host, port)) if logs is None else lambda: read_address(Path(logs))


def _report_failure(store: AnyStore, text: str) -> int:
    """Log a failure that a restart may fix; the traceback goes to this process's stderr file."""
    traceback.print_exc()
    log(store, text)
    return REPORTED_EXIT


def _end_the_run(store: AnyStore, text: str, is_input: bool) -> int:
    """Record a failure that a restart cannot fix; the first writer wins."""
    outcome = json.dumps({"kind": "failure", "text": text, "input": is_input})
    store.compare_set(OUTCOME, "", outcome)
    store.set(FATAL, "1")
    return FATAL_EXIT


def disk_text(error: OSError, folder: Path) -> str:
    """Return a line about a disk error that names the file system, the path and the next move."""
    path = Path(error.filename or folder).absolute()
    # Of nested mount points, the deepest one holds the path.
    mounts = [Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True)]
    mount = max((m for m in mounts if path.is_relative_to(m)), key=lambda m: len(m.parts), default=Path("/"))
    return f"{error.strerror} on the file system {mount}, at {path}; make room or mend it there"


def exit_with_the_agent() -> None:
    """Ignore Ctrl-C and SIGTERM, which the agent handles, and exit when the agent is gone."""
    # A terminal sends Ctrl-C to the whole group, and a worker that died of it could not save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    agent = os.getppid()

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(ORPHAN_CHECK_S)
        # Not sys.exit, which ends this thread alone; the main thread may hang in an exchange.
        os._exit(FAILED_EXIT)

    threading.Thread(target=watch, daemon=True).start()


def choose_gpu(name: str, rank: RankInfo) -> torch.device:
    """Return this process's device; processes of a node take turns over its GPUs. Raises InputError for a lack of one.

    The GPU is made current before NCCL starts, which takes the current one, and before the first context: or else each
    process would have one on the first GPU, too (docs.pytorch.org/docs/stable/distributed.html, NCCL).
    """
    if name == "cpu":
        return torch.device(name)
    gpus = accelerator.count(name)
    device = torch.device(name, rank.local_process % gpus if gpus else 0)
    if gpus:
        accelerator.set_current(device)
    if reason := accelerator.refusal(device):
        raise InputError(f"{rank.title}: {reason}")
    return device


def join_processes(
    run: Run, device: torch.device, process: int, processes: int, prefix: str, store: AnyStore, timeout_s: float
) -> None:
    """Join the default process group, under a prefix of its own. Raises LostPeerError."""
    backend = accelerator.BACKENDS[device.type] if run.cluster.backend == "auto" else run.cluster.backend
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore(prefix, raw_store(store)), rank=process, world_size=processes,
            timeout=timedelta(seconds=timeout_s),
            # NCCL then connects here, where a failure is reported as one of joining, and makes subgroups by splitting
            # (docs.pytorch.org/docs/stable/distributed.html, init_process_group: device_id).
            device_id=device if backend == "nccl" else None,
        )  # fmt: skip
    except RuntimeError as error:
        raise LostPeerError(f"processes could not be joined: {first_line(error)}") from error


def _group_prefix() -> str:
    # Each restart has a new master port. In the prefix, it keeps its keys apart from those of earlier starts.
    return f"group/{os.environ['MASTER_ADDR']}/{os.environ['MASTER_PORT']}"


def _train(run: Run, folder: Path, device: torch.device, rank: RankInfo, store: AnyStore) -> None:
    profile = load_profile(str(folder / PROFILE_FILE))
    leads = rank.process == 0
    if leads:
        store.set(ATTEMPT, json.dumps({"activity": "loading data"}))
    data = load_data(run, kept_tokenizer(folder))
    if leads:
        store.set(ATTEMPT, json.dumps({"activity": "joining"}))
    join_processes(run, device, rank.process, rank.processes, _group_prefix(), store, run.cluster.timeout_s)
    clock = SimulatedClock(run, profile.devices(run.cluster.devices), profile.link)
    communicator = TorchCommunicator(
        run.cluster.devices, device, run.cluster.timeout_s, clock.charge_transfer, clock.wait, throttle=throttle_of(run)
    )
    activity = Activity()
    with ExitStack() as stack:
        stack.callback(communicator.close)
        titles = communicator.share_texts(f"{rank.title} ({_devices_text(communicator.local_devices)})")
        machines = distinct(json.loads(text) for text in communicator.share_texts(json.dumps(machine_facts())))
        session: Session | None = None
        heartbeat = _heartbeat(rank, _group_prefix(), titles, communicator, activity, lambda: session)
        if leads:
            store.set(ATTEMPT, json.dumps({"prefix": _group_prefix(), "titles": titles}))
        activity.begin("building the network")
        stack.callback(heartbeat.close)
        communicator.missing = heartbeat.missing
        check_start(run, communicator, rank.title)
        session = _session(run, folder, device, rank, store, data, communicator, clock, activity)
        # Before the event file is opened: it is cut back to the step that recovery finds.
        activity.begin("looking for checkpoints")
        found = recover(session)
        if leads:
            if found is not None and found.lost:
                lost = ", ".join(map(str, found.lost))
                log(store, f"device {lost}: no state is left; starts from the merged weights")
            # The store lives as long as the launch, so a count above one means that processes began again.
            is_restart = store.add(BEGUN, 1) > 1
            _report_beginning(session, folder, stack, store, machines, _reasons(store) if is_restart else None)
        finished = train(session)
        session.emit({"kind": "end" if finished else "interrupt", "step": session.step, "wall_s": session.elapsed_s()})
        dist.barrier(communicator.control)  # all have saved: only now has the run ended
        if leads:
            store.compare_set(OUTCOME, "", json.dumps(_outcome(session, finished)))
    dist.destroy_process_group()


def throttle_of(run: Run) -> Throttle | None:
    """Return the throttle that cluster.throttle asks for: each device on a link of its own, to a hub, by gloo."""
    if run.cluster.throttle is None:
        return None
    bytes_per_s, latency_s = read_link(run.cluster.throttle)
    link = Link(
        topology="star", up_bytes_per_s=bytes_per_s, down_bytes_per_s=bytes_per_s, latency_s=latency_s,
        collectives="gloo", source="guess",
    )  # fmt: skip
    return Throttle(lambda transfer: transfer_s(transfer, link))


def _devices_text(own: range) -> str:
    return f"devices {own[0]} to {own[-1]}" if len(own) > 1 else f"device {own[0]}"


def _heartbeat(
    rank: RankInfo, prefix: str, titles: Sequence[str], communicator: TorchCommunicator, activity: Activity,
    session: Callable[[], Session | None],
) -> ProcessHeartbeat:  # fmt: skip
    """Start this process's signs of life; `session` returns the session once there is one."""
    _, _, host, port, _ = sys.argv[1:]

    def beat(count: int) -> Beat:
        current = session()
        stopping = "" if current is None else current.stopping_text()
        return Beat(count, communicator.exchanges, communicator.current_phase, activity.phase, activity.step, stopping)

    find = _find_store(host, int(port))
    if LAUNCH_ID in os.environ:
        prefix = f"{os.environ[LAUNCH_ID]}/{prefix}"
    return ProcessHeartbeat(find, prefix, rank.process, titles, beat, lasts=STORE_LOGS in os.environ)


def _session(
    run: Run, folder: Path, device: torch.device, rank: RankInfo, store: AnyStore, data: Dataset,
    communicator: TorchCommunicator, clock: SimulatedClock, activity: Activity,
) -> Session:  # fmt: skip
    """Return the session of this process, at the start of the run."""
    return Session(
        run=run,
        method=build_method(run, communicator, device),
        batches=build_batches(run, data, device),
        communicator=communicator,
        clock=clock,
        emit=lambda event: None,  # only who writes this node's events does: _report_beginning opens the file
        checkpoints=folder / CHECKPOINTS,
        device=device,
        # The loop shares the first process's answer.
        stop=lambda: communicator.process == 0 and store.check([STOP]),
        # The shared part is the same in all processes; one a node writes it into the node's own folder.
        writes_shared=rank.local_process == 0,
        folder_devices=rank.node_devices(run.cluster.devices),
        recovers=True,
        activity=activity,
    )


def _train_among(run: Run, folder: Path, device: torch.device, rank: RankInfo, store: AnyStore) -> None:
    """Train among the processes that are there; who is lost is dropped (simulate.launch.survivors)."""
    profile, devices, cluster = load_profile(str(folder / PROFILE_FILE)), run.cluster.devices, run.cluster
    store.compare_set(ATTEMPT, "", json.dumps({"activity": "loading data"}))
    data = load_data(run, kept_tokenizer(folder))
    shares = [devices_of(process, rank.processes, devices) for process in range(rank.processes)]
    titles = member_titles(os.environ[NODE_PROCESSES], shares)
    clock = SimulatedClock(run, profile.devices(devices), profile.link)
    communicator = TorchCommunicator(
        devices,
        device,
        cluster.timeout_s,
        clock.charge_transfer,
        clock.wait,
        shares,
        rank.process,
        throttle_of(run),
    )
    activity = Activity()
    waits = Waits(cluster.needed, cluster.deadline_s, cluster.timeout_s, cluster.join_timeout_s)
    membership = Membership(
        store, rank.process, int(os.environ[INCARNATION]), shares, titles, waits, lambda text: log(store, text)
    )
    with ExitStack() as stack:
        stack.callback(communicator.close)
        session: Session | None = None
        heartbeat = _heartbeat(rank, MEMBERS, titles, communicator, activity, lambda: session)
        stack.callback(heartbeat.close)
        activity.begin("building the network")
        session = _session(run, folder, device, rank, store, data, communicator, clock, activity)
        events = NodeEvents(folder, store, rank, stack)

        def connect(epoch: Epoch) -> None:
            members = list(epoch.members)
            process, prefix = members.index(rank.process), f"group/of/{epoch.number}"
            join_processes(run, device, process, len(members), prefix, store, CONNECT_S)
            communicator.connect([shares[member] for member in members])

        def on_change(session: Session, epoch: Epoch) -> None:
            store.set(ATTEMPT, json.dumps({"prefix": MEMBERS, "titles": titles}))  # again where the store was restarted
            if epoch.number == 0:
                check_start(run, communicator, rank.title)
            events.follow(session, epoch)

        group = SurvivingGroup(membership, communicator, connect, on_change)
        session.group = group
        activity.begin("joining")
        group.start(session)
        finished = _train_to_the_end(session)
        session.emit({"kind": "end" if finished else "interrupt", "step": session.step, "wall_s": session.elapsed_s()})
        store.compare_set(OUTCOME, "", json.dumps(_outcome(session, finished)))
        communicator.disconnect()


def member_titles(processes_by_node: str, shares: Sequence[range]) -> list[str]:
    """Return all processes' names in messages, from "2,2", the processes of each node."""
    nodes = [node for node, count in enumerate(map(int, processes_by_node.split(","))) for _ in range(count)]
    return [
        f"process {process} on node {node} ({_devices_text(share)})"
        for process, (node, share) in enumerate(zip(nodes, shares, strict=True))
    ]


def _train_to_the_end(session: Session) -> bool:
    """Train until all have saved their last checkpoint; returns whether it was the run's last step."""
    zeros_L1 = torch.zeros(session.method.local_devices, 1)
    while True:
        try:
            finished = train(session)
            together(session, lambda: session.communicator.all_gather_scalars(zeros_L1))
            return finished
        except StateReplacedError:  # others were lost at the end, and all train on from a checkpoint
            continue


class NodeEvents:
    """The event file of this node: its first living process writes it, as all processes know all figures."""

    def __init__(self, folder: Path, store: AnyStore, rank: RankInfo, stack: ExitStack) -> None:
        self.folder, self.store, self.rank, self._stack = folder, store, rank, stack
        self._open: EventFile | None = None

    def follow(self, session: Session, epoch: Epoch) -> None:
        """Write events from here on, or leave that to another, by the members of an epoch."""
        rank, session.emit = self.rank, lambda event: None
        first = rank.process - rank.local_process
        here = [member for member in epoch.members if first <= member < first + rank.local_processes]
        session.writes_shared = rank.process == min(here)
        if self._open is not None:
            self._open.close()
            self._open = None
        if not session.writes_shared:
            return
        if epoch.is_fresh:
            why = None if epoch.number == 0 else ["fewer devices than cluster.quorum were left"]
            machines = [machine_facts()]
            self._open = _report_beginning(session, self.folder, self._stack, self.store, machines, why)
        else:
            self._open = _open_events(session, self.folder, self._stack, self.store)


def check_start(run: Run, communicator: TorchCommunicator, title: str) -> None:
    """Raise InputError where a user's factory builds other start weights on another process."""
    own = json.dumps([title, start_figures(run)])
    (first, expected), *others = (json.loads(text) for text in communicator.share_texts(own))
    for other, figures in others:
        for name in expected.keys() | figures.keys():
            (here, size), (there, _) = expected.get(name, (0.0, 0.0)), figures.get(name, (math.inf, 0.0))
            if abs(here - there) > START_TOLERANCE * size:
                raise InputError(
                    f"model.name = {run.model.name!r}: {other} starts with other weights of {name} than {first}; give "
                    "all nodes the same module, and the same files that it reads"
                )


def _report_beginning(
    session: Session, folder: Path, stack: ExitStack, store: AnyStore, machines: list[dict[str, Any]],
    reasons: list[str] | None,
) -> EventFile:  # fmt: skip
    """Open the event file, cut it back to the recovered step, and emit how this session begins.

    `reasons` are those of a restart; None: the run has just been launched.
    """
    path, communicator = folder / EVENTS_FILE, session.communicator
    fresh, restart = session.step == 0, None
    if reasons is not None:
        restart = {"reasons": reasons, **_repeated(path, session.step)}
    if path.exists():
        truncate_events(path, -1 if fresh else session.step)
    events = _open_events(session, folder, stack, store)
    processes = {
        "processes": communicator.processes,
        "device": str(session.device),
        "backend": dist.get_backend(),
        "machines": machines,
    }
    if fresh:
        facts = json.loads(store.get(START)) if store.check([START]) else {"start": {}, "measured_bytes": None}
        session.emit({"kind": "start", "step": 0, **facts["start"], **processes})
        session.emit({"kind": "memory", "step": 0, "measured_bytes": facts["measured_bytes"]})
    if (fresh or restart is None) and store.check([LINKS]):
        session.emit({"kind": "links", "step": session.step, "links": json.loads(store.get(LINKS))})
    if restart is not None:
        session.emit({"kind": "restart", "step": session.step, **restart, **processes})
        log(store, f"{RESTARTED} {session.step} in {communicator.processes} processes")
    elif not fresh:
        session.emit({"kind": "resume", "step": session.step, **processes})
    return events


def _open_events(session: Session, folder: Path, stack: ExitStack, store: AnyStore) -> EventFile:
    """Let this process append its events to the file."""
    events = EventFile(folder / EVENTS_FILE)
    stack.callback(events.close)
    session.emit = _event_emitter(events, session, store)
    return events


def _reasons(store: AnyStore) -> list[str]:
    """Return the log's messages since the last restart, which are the reasons for this one."""
    first, last = store.add(ANSWERED, 0) + 1, store.add(REPORTED, 0)
    store.add(ANSWERED, last + 1 - first)
    keys = [f"{REPORTED}/{index}" for index in range(first, last + 1)]
    lines = [store.get(key).decode() for key in keys if store.check([key])]
    return [line for line in lines if not line.startswith(RESTARTED)] or ["a node joined or left"]


def _repeated(events: Path, step: int) -> Event:
    """Return how many emitted steps are done again, and for how many seconds no event was written."""
    if not events.exists():
        return {"repeated_steps": 0, "silent_s": None}
    last = max((event["step"] for event in read_events(events)), default=step)
    return {"repeated_steps": max(0, last - step), "silent_s": max(0.0, time.time() - events.stat().st_mtime)}


def _event_emitter(events: EventFile, session: Session, store: AnyStore) -> Emit:
    """Return a function that writes an event to the file, and what all nodes must know of it to the store."""

    def emit(event: Event) -> None:
        events(event)
        if event["kind"] == "checkpoint":
            store.set(STEP, str(event["step"]))  # training has gone on since it was begun
        elif event["kind"] == "left-out":
            names = ", ".join(str(device) for device in event["devices"])
            log(store, f"device {names}: weights not finite, left out of the merge after step {event['step']}")

    return emit


def _outcome(session: Session, finished: bool) -> Event:
    """Return how the run ended, for the commands of all nodes."""
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
