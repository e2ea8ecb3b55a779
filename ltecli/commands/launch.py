"""lte train --launch: one node's processes of a real run, started, kept going and listened to."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ltecli.agent import LOGS, Launch, Node, listening
from ltecli.errors import INTERRUPTED
from ltecli.launcher import TENSORBOARD, RunFolder, stop_on_signal
from ltecli.output import Output
from ltecli.sinks import ProgressBar, TensorBoard
from ltecli.telling import start_facts, tell_derived, tell_finished, tell_result
from simulate.errors import InputError, RunFailedError

if TYPE_CHECKING:
    import torch

    from simulate.config import Run
    from simulate.events import Event


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says about a launch."""

    processes: int | None = None
    nodes: int = 1
    node: int | None = None
    join: str | None = None
    interface: str | None = None
    secret_file: Path | None = None
    trust_network: bool = False


def launch_options(
    launch: bool,
    processes: int | None,
    nodes: int,
    node: int | None,
    join: str | None,
    interface: str | None,
    secret_file: Path | None,
    trust_network: bool,
) -> LaunchOptions | None:
    """Return the options of a launch, None without one; raises InputError where they do not go together."""
    options = LaunchOptions(processes, nodes, node, join, interface, secret_file, trust_network)
    if not launch:
        if options != LaunchOptions():
            raise InputError("--processes, --nodes, --node, --join, --interface and so on need --launch; add it")
        return None
    if node is not None and node >= nodes:
        raise InputError(f"--node {node} is not below --nodes {nodes}; nodes count from 0")
    return options


def check_launchable(run: Run, processes: int, nodes: int) -> None:
    """Raise InputError for what a launch cannot do."""
    if run.train.diagnostics_every is not None:
        raise InputError(
            "train.diagnostics_every needs all devices in one process; launch without it, or train without --launch"
        )
    if processes * nodes > run.cluster.devices:
        raise InputError(
            f"--processes {processes} on {nodes} node{'s' if nodes > 1 else ''} are more than cluster.devices = "
            f"{run.cluster.devices}; each process needs a device"
        )


def default_processes(run: Run, device: torch.device, nodes: int) -> int:
    """Return how many processes a node starts: one a device, at most one a GPU, or one a CPU core."""
    import torch

    here = -(-run.cluster.devices // nodes)
    slots = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    return max(1, min(here, slots))


def launch_run(folder: RunFolder, device: torch.device, options: LaunchOptions, output: Output) -> int:
    """Train the folder's run in processes; returns the exit code."""
    run = folder.run
    processes = options.processes or default_processes(run, device, options.nodes)
    check_launchable(run, processes, options.nodes)
    tell_derived(folder, output)
    if folder.is_finished:
        tell_finished(folder, output)
        return 0
    node = Node(processes=processes, device=device.type, interface=interface_of("127.0.0.1"))
    launch = Launch(folder.path, run, node, output.warning, threads_for(processes))
    launch.open_store()
    output.hint(f"  launched: {processes} processes on {node.address} ({node.interface}), logs in {folder.path / LOGS}")
    if not folder.resume_from:
        _leave_start_facts(launch, folder, device)
    with ExitStack() as stack, stop_on_signal() as asked:
        sinks = _sinks(folder, output, stack)

        def pass_on(event: Event) -> None:
            for sink in sinks:
                sink(event)

        with listening(launch, pass_on, folder.events, asked):
            outcome = launch.run_agent()
    return _conclude(folder, outcome, output)


def threads_for(processes: int) -> int:
    """Return the threads of each process, so that together they take the cores once."""
    return max(1, (os.cpu_count() or 1) // processes)


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an IPv4 address; raises InputError."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    raise InputError(f"no network interface of this machine has the address {address}; name one with --interface")


def _sinks(folder: RunFolder, output: Output, stack: ExitStack) -> list[Any]:
    step = int(folder.resume_from.name.rpartition("-")[2]) if folder.resume_from else 0
    board = stack.enter_context(TensorBoard(folder.path / TENSORBOARD, step))
    return [board, stack.enter_context(ProgressBar(folder.run, output, step))]


def _leave_start_facts(launch: Launch, folder: RunFolder, device: torch.device) -> None:
    """Give the first process what only the command knows of a run's start."""
    from simulate.measure import measure_memory_bytes
    from simulate.worker import START

    measured_bytes = measure_memory_bytes(folder.run, device)
    if device.type == "cpu":
        measured_bytes -= folder.plan["chosen"]["host_memory_bytes"]
    facts = {"start": start_facts(folder, device), "measured_bytes": measured_bytes}
    launch.store.set(START, json.dumps(facts))


def _conclude(folder: RunFolder, outcome: dict[str, Any], output: Output) -> int:
    if outcome["kind"] == "failure":
        raise (InputError if outcome["input"] else RunFailedError)(outcome["text"])
    if outcome["kind"] == "interrupt":
        output.hint(
            f"interrupted at step {outcome['step']}, saved; continue with lte train {folder.path} --resume --launch"
        )
        return INTERRUPTED
    tell_result(
        folder, output, outcome["step"], outcome["val_loss"], outcome["sent_bytes"], outcome["simulated_s"],
        outcome["wall_s"], outcome["val_accuracy"],
    )  # fmt: skip
    return 0
