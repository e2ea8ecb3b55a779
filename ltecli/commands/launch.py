"""lte train --launch: train a run for real, in processes of this machine or of several nodes.

Each node runs the same command. It meets the others in a preflight, opens the agents' store, starts its processes by
simulate.launch.agent, and prints the messages of all nodes; node 0 also prints events and the result. `lte train` calls
launch_run, and print_lines for the lines to paste on each node. `lte secret` is here, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.console import Output
from ltecli.errors import INTERRUPTED
from ltecli.output_paths import check_absent, unwritable
from ltecli.runs.event_loggers import Callback, event_loggers
from ltecli.runs.run_folder import RunFolder, stop_on_signal
from ltecli.runs.summary import (
    RunResult,
    measured_memory_bytes,
    report_derived,
    report_finished,
    report_result,
    start_facts,
)
from simulate.comm.transfers import devices_of
from simulate.common.errors import InputError, RunFailedError
from simulate.common.events import PROGRESS, Emit, Event, EventFile
from simulate.common.limits import usable_cores
from simulate.common.run_files import LOGS, RUN_FILE
from simulate.config.profiles import is_profile_path
from simulate.config.run import load_given_run
from simulate.launch.agent import Launch, Node
from simulate.launch.apart import StoreApart
from simulate.launch.heartbeat import LaunchProgress, is_node_alive
from simulate.launch.keys import LINKS, START
from simulate.launch.preflight.address import address_text, address_to_join, loopback_interface
from simulate.launch.preflight.link_figures import LinkFigures
from simulate.launch.preflight.node_info import Facts, NodeFacts
from simulate.launch.preflight.preflight import open_preflight
from simulate.launch.preflight.secret import make_secret, read_secret
from simulate.launch.preflight.settings import Preflight, Settings
from simulate.launch.supervisor import run_supervised

if TYPE_CHECKING:
    import torch

    from ltecli.runs.status import StatusFile
    from simulate.config.run import Run


DEFAULT_PORT = 29400
SHORTEST_WAIT_S = 1.0
"""Shortest allowed time-out: processes need about as long to answer."""


@dataclass(frozen=True)
class LaunchArgs:
    """Options of a launch."""

    processes: int | None = None
    """Processes of this node; None: one for each device, GPU or core."""
    nodes: int = 1
    node: int | None = None
    """Number of this machine, from 0; None prints each node's line."""
    join: str | None = None
    """HOST:PORT of node 0."""
    interface: str | None = None
    secret_file: Path | None = None
    trust_network: bool = False
    store: str | None = None
    """HOST:PORT of a store that is apart (`lte store`)."""

    def check(self, launch: bool) -> None:
        """Raise InputError where options contradict each other; `launch` says whether --launch was given."""
        if not launch and self != LaunchArgs(self.processes):  # a simulation has processes, too
            raise InputError("--nodes, --node, --join, --interface and so on need --launch; add it")
        if self.node is not None and self.node >= self.nodes:
            raise InputError(f"--node {self.node} is not below --nodes {self.nodes}; nodes count from 0")
        if self.nodes > 1 and self.node is not None and self.join is None:
            raise InputError(
                f"--node {self.node} needs --join HOST:PORT, node 0's; leave --node away to see every node's line"
            )

    def words(self) -> str:
        """Return the options as given, for the command that continues a run."""
        given = {
            "--processes": self.processes,
            "--nodes": self.nodes if self.nodes > 1 else None,
            "--node": self.node,
            "--join": self.join,
            "--interface": self.interface,
            "--secret-file": self.secret_file,
            "--store": self.store,
        }
        # Only what differs from the defaults, so that the printed line stays short.
        words = [f" {name} {value}" for name, value in given.items() if value is not None]
        return "".join([" --launch", *words, *([" --trust-network"] if self.trust_network else [])])


def check_launch(run: Run, device: torch.device, options: LaunchArgs) -> None:
    """Raise InputError for a run that cannot be launched with these options."""
    from simulate.layers import accelerator

    if run.cluster.backend == "nccl" and device.type != "cuda":
        raise InputError("cluster.backend = 'nccl' needs CUDA GPUs, and this run is on the CPU; use gloo, or auto")
    for key in ("timeout_s", "join_timeout_s", "rejoin_s"):
        if getattr(run.cluster, key) < SHORTEST_WAIT_S:
            raise InputError(
                f"cluster.{key} = {getattr(run.cluster, key):g} is below {SHORTEST_WAIT_S:g} s, less than processes "
                "need to answer; raise it"
            )
    if run.cluster.backend == "gloo" and device.type != "cpu":
        raise InputError(
            f"cluster.backend = 'gloo' sends tensors of CPUs only, and this run is on {device.type}; use auto, or "
            "--device cpu"
        )
    if options.store is not None and not run.cluster.drops_lost:
        raise InputError(
            "--store is for runs that go on without lost nodes, node 0 too, and this run restarts all; try --set "
            f"cluster.quorum={max(1, run.cluster.devices - 1)}"
        )
    if run.cluster.drops_lost and run.train.diagnostics_every is not None:
        raise InputError(
            f"train.diagnostics_every = {run.train.diagnostics_every} compares all devices, and a launched run with "
            "cluster.quorum goes on without lost ones; leave it away, or simulate the run"
        )
    if live := run.live_keys:
        key, name = next(iter(live.items()))
        raise InputError(
            f"{key} = {name!r} is an object of this Python process, and a launch starts others; name module:factory "
            "(module:function for a loss, a path for data), or simulate the run"
        )
    processes = options.processes or default_processes(run, device, options.nodes)
    gpus = None if device.type == "cpu" else accelerator.count(device.type)
    if gpus is not None and processes > gpus:
        # docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/communicators.html: it "may lead to hangs".
        raise InputError(
            f"--processes {processes} are more than the GPUs of this node, {gpus}, and NCCL takes one process a GPU; "
            "lower it: a process trains all devices that are its share"
        )
    if processes * options.nodes > run.cluster.devices and options.nodes > 1:
        processes = 1  # other nodes may start fewer; the preflight checks the sum
    if rule := processes_rule(run, processes * options.nodes, f"--processes {processes}"):
        raise InputError(rule)


def processes_rule(run: Run, total: int, given: str) -> str | None:
    """Return why `total` processes cannot train the run, None where they can; `given` begins the line."""
    devices = run.cluster.devices
    if total > devices:
        return f"{given} are more than cluster.devices = {devices}; each process needs a device: lower --processes"
    rule = run.method.processes_rule(devices, total) or _classes_rule(run, total)
    return f"{given} {rule}" if rule else None


def _classes_rule(run: Run, total: int) -> str | None:
    """Return why so many processes cannot train classes of devices: each holds consecutive devices of one class."""
    shares = [devices_of(process, total, run.cluster.devices) for process in range(total)]
    mixed = next((share for share in shares if run.class_of(share[0]) != run.class_of(share[-1])), None)
    if total == 1 or mixed is None:
        return None
    return (
        f"would give one process devices {mixed[0]} to {mixed[-1]}, which are of several classes (cluster.class); try "
        f"--processes {run.cluster.devices}, one a device"
    )


def default_processes(run: Run, device: torch.device, nodes: int) -> int:
    """Return the number of processes of a node: one for each device, at most one for each GPU, or each CPU core."""
    from simulate.layers import accelerator

    # More processes than cores would only take turns; devices in one process share its tensor program.
    here = -(-run.cluster.devices // nodes)  # rounded up
    slots = usable_cores() if device.type == "cpu" else accelerator.count(device.type)
    most = max(1, min(here, slots))
    # Rather fewer than cores than more, but each with devices of one class.
    fitting = (n for n in [*range(most, 0, -1), *range(most + 1, here + 1)] if not _classes_rule(run, n * nodes))
    return next(fitting, most)


def launch_run(
    folder: RunFolder, device: torch.device, options: LaunchArgs, output: Output, warnings: Sequence[str],
    status: StatusFile, callback: Callback,
) -> int:  # fmt: skip
    """Train the folder's run in processes of this node; returns the exit code. `warnings` are about this machine."""
    run, number = folder.run, options.node or 0
    processes = options.processes or default_processes(run, device, options.nodes)
    report_derived(folder, output)
    if folder.is_finished and options.nodes == 1:
        # Of several nodes, others may still lack their last checkpoint, so those meet all the same.
        report_finished(folder, output)
        return 0
    stopping = stop_on_signal(lambda: status.answer_stop(output.hint), status.leave, callback.stops)
    with ExitStack() as stack, stopping as stops:
        if options.nodes > 1:
            status.begin("meeting the other nodes")
        preflight = stack.enter_context(_preflight(folder, processes, options, output, warnings))
        apart = None if options.store is None else StoreApart(options, preflight)
        result = None if apart is None else apart.running_run()
        result = preflight.run() if result is None else result
        nodes = result.nodes
        if options.nodes == 1:
            node = Node(processes=processes, device=device.type, interface=loopback_interface())
        else:
            own = nodes[number]
            # The store takes any free port: that of --join stays open for nodes that come back.
            each = tuple(other.processes for other in nodes)
            node = Node(
                processes, device.type, number, options.nodes, own.address, own.interface, nodes[0].address, each
            )
        threads = max(1, usable_cores() // processes)  # together, the processes use each core once
        launch = Launch(folder.path, run, node, output.warning, threads)
        launch.allow_clocks_apart(max(abs(other.clock_offset_s) for other in nodes))
        if apart is None:
            _open_store(launch, preflight, run.cluster.join_timeout_s)
        else:
            apart.connect(launch, nodes)
        # Frees the port of --join, which accept_rejoins listens at. With a store that is apart, nodes come back by it.
        preflight.close()
        if apart is None:
            stack.enter_context(
                preflight.accept_rejoins(lambda: launch.store.port, lambda number: is_node_alive(launch.store, number))
            )
        output.hint(
            f"  launched: {processes} processes on {node.address} ({node.interface}), logs in {folder.path / LOGS}"
        )
        loggers: Emit | None = None
        if number == 0:  # the others have no events
            status.begin("measuring")
            _store_facts(launch, folder, device, result.links)
            loggers = stack.enter_context(event_loggers(folder.path, run, output, folder.newest_step, callback))

        def on_event(event: Event) -> None:
            status(event)
            if loggers is not None:
                loggers(event)

        def on_progress(progress: LaunchProgress) -> None:
            status.progress(progress)
            if loggers is not None:
                loggers({"kind": PROGRESS, "step": progress.step})

        status.begin("starting")
        outcome = run_supervised(launch, on_event if number == 0 else None, on_progress, folder.events, stops)
        if number and "step" in outcome:
            status({"kind": outcome["kind"], "step": outcome["step"]})
    # Rank 0's process has ended, so this process may append to its event file. A failure has no step.
    if launch.wire_sent_bytes is not None and options.nodes > 1 and "step" in outcome:
        with closing(EventFile(folder.events)) as events:
            events({"kind": "wire", "step": outcome["step"], "sent_bytes_by_node": launch.wire_sent_bytes})
    return _report_outcome(folder, outcome, output, options)


def _preflight(
    folder: RunFolder, processes: int, options: LaunchArgs, output: Output, warnings: Sequence[str]
) -> Preflight:
    """Return this node's preflight, with the rule that all nodes' processes together must fit the run."""
    import torch

    from simulate.common.version import version

    settings = Settings(
        node=options.node or 0,
        nodes=options.nodes,
        join=options.join,
        interface=options.interface,
        secret=read_secret(options.secret_file),
        trust_network=options.trust_network,
        join_timeout_s=folder.run.cluster.join_timeout_s,
    )
    facts = Facts.of(
        folder.run,
        lte=version(),
        torch=torch.__version__,
        data_fingerprint=folder.data.fingerprint,
        data_bytes=folder.data.num_bytes,
        processes=processes,
        warnings=warnings,
    )

    def too_many(nodes: Sequence[NodeFacts]) -> list[str]:
        total = sum(node.processes for node in nodes)
        each = ", ".join(f"node {node.node} {node.processes}" for node in nodes)
        rule = processes_rule(folder.run, total, f"the nodes' processes ({each})")
        return [rule] if rule else []

    return open_preflight(settings, facts, log=output.hint, check=too_many, planned=folder.profile.link)


def _open_store(launch: Launch, preflight: Preflight, timeout_s: float) -> None:
    """Open the agents' store on node 0, connect the other nodes to it, and wait for all of them."""
    if launch.node.number == 0:
        launch.open_store()
    # The system picked the port when node 0 opened the store, so the others learn it here.
    port = preflight.broadcast(launch.store.port if launch.node.number == 0 else None, timeout_s)
    if launch.node.number > 0:
        launch.connect_store(int(port))
    preflight.barrier("start", timeout_s)


def secret_command(path: Path) -> int:
    """Write a new secret into a file that only its owner can read; returns the exit code."""
    check_absent(path, option="PATH")
    try:
        # Private from the first byte; O_EXCL follows no link that somebody else has put there.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise unwritable(path, error, option="PATH") from None
    with os.fdopen(handle, "w") as file:
        file.write(make_secret())
    Output().hint(f"wrote {path}; copy it to every machine of the run, and name it there with --secret-file")
    return 0


def print_lines(run_file: Path | None, options: LaunchArgs, output: Output) -> int:
    """Print the command to paste on each node; returns the exit code."""
    address = address_to_join(options.interface)
    endpoint = address_text(address, DEFAULT_PORT)
    name = run_file or RUN_FILE
    output.text(f"Copy {_to_copy(name)} to every machine, and give all the same secret, made once:")
    output.text("  lte secret lte.secret           # then copy the file; only you can read it")
    # Complete lines to paste: a --node that is typed by hand is easily given twice.
    for number in range(options.nodes):
        output.text(
            f"  lte train {name} --launch --nodes {options.nodes} --node {number} --join {endpoint} "
            "--secret-file lte.secret"
        )
    output.hint(f"in these lines node 0 is this machine, {address}; training is not encrypted: docs/networking.md")
    return 0


def _to_copy(run_file: Path | str) -> str:
    """Return what another machine needs of a run, in words: also a profile's file that run.toml does not embed."""
    if not Path(run_file).is_file():
        return f"{run_file} and its data"
    profile = load_given_run(Path(run_file)).cluster.profile
    is_beside = is_profile_path(profile) and Path(profile).resolve() != Path(run_file).resolve()
    return f"{run_file}, its profile {profile} and its data" if is_beside else f"{run_file} and its data"


def _store_facts(launch: Launch, folder: RunFolder, device: torch.device, links: Sequence[LinkFigures]) -> None:
    """Put facts into the store that only this command knows, for rank 0 to emit as events."""
    if not folder.resume_from:
        facts = {"measured_bytes": measured_memory_bytes(folder, device), "start": start_facts(folder, device)}
        launch.store.set(START, json.dumps(facts))
    if links:
        launch.store.set(LINKS, json.dumps([link.model_dump() for link in links]))


def _report_outcome(folder: RunFolder, outcome: dict[str, Any], output: Output, options: LaunchArgs) -> int:
    """Print how the run ended; returns the exit code, or raises the failure that a process recorded."""
    if outcome["kind"] == "failure":
        # Rank 0 or another process failed in its own process; here the failure gets its exit code.
        raise (InputError if outcome["input"] else RunFailedError)(outcome["text"])
    if outcome["kind"] == "interrupt":
        output.hint(
            f"interrupted at step {outcome['step']}, saved; "
            f"continue with lte train {folder.path} --resume{options.words()}"
        )
        return INTERRUPTED
    if options.node:
        output.hint(f"done at step {outcome['step']}; node 0 has the events, {folder.path} this node's checkpoints")
        return 0
    result = RunResult(
        steps=outcome["step"],
        val_loss=outcome["val_loss"],
        val_accuracy=outcome["val_accuracy"],
        sent_bytes_per_device=outcome["sent_bytes"] / folder.run.cluster.devices,
        simulated_s=outcome["simulated_s"],
        measured_s=outcome["wall_s"],
    )
    report_result(folder, output, result)
    return 0
