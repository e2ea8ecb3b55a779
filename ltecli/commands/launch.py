"""lte train --launch: one node's processes of a real run, started, kept going and listened to."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ltecli.console import Output
from ltecli.errors import INTERRUPTED
from ltecli.runs.event_loggers import ProgressBar, TensorBoard
from ltecli.runs.run_folder import CHECKPOINTS, TENSORBOARD, RunFolder, plain_start_bytes, stop_on_signal
from ltecli.runs.summary import report_derived, report_finished, report_result, start_facts
from simulate.common.cpu import usable_cores
from simulate.common.errors import InputError, RunFailedError
from simulate.common.events import EventFile
from simulate.launch.agent import LOGS, Launch, Node
from simulate.launch.preflight.link_figures import LinkFigures
from simulate.launch.preflight.node_info import Facts, NodeFacts
from simulate.launch.preflight.preflight import Preflight
from simulate.launch.preflight.secret import make_secret, read_secret
from simulate.launch.preflight.settings import Settings
from simulate.launch.supervisor import run_supervised
from simulate.methods.daso.options import DasoOptions

if TYPE_CHECKING:
    import torch

    from simulate.common.events import Event
    from simulate.config.run import Run


DEFAULT_PORT = 29400
SIGN_OF_LIFE_S = 3.0
"""Within which a node that is there gives one."""


@dataclass(frozen=True)
class LaunchArgs:
    """What the command line says about a launch."""

    processes: int | None = None
    nodes: int = 1
    node: int | None = None
    join: str | None = None
    interface: str | None = None
    secret_file: Path | None = None
    trust_network: bool = False

    def words(self) -> str:
        """Return the options as they were given, for the line that continues a run."""
        given = {
            "--processes": self.processes,
            "--nodes": self.nodes if self.nodes > 1 else None,
            "--node": self.node,
            "--join": self.join,
            "--interface": self.interface,
            "--secret-file": self.secret_file,
        }
        words = [f" {name} {value}" for name, value in given.items() if value is not None]
        return "".join([" --launch", *words, *([" --trust-network"] if self.trust_network else [])])


def launch_options(
    launch: bool,
    processes: int | None,
    nodes: int,
    node: int | None,
    join: str | None,
    interface: str | None,
    secret_file: Path | None,
    trust_network: bool,
) -> LaunchArgs | None:
    """Return the options of a launch, None without one; raises InputError where they do not go together."""
    options = LaunchArgs(processes, nodes, node, join, interface, secret_file, trust_network)
    if not launch:
        if options != LaunchArgs():
            raise InputError("--processes, --nodes, --node, --join, --interface and so on need --launch; add it")
        return None
    if node is not None and node >= nodes:
        raise InputError(f"--node {node} is not below --nodes {nodes}; nodes count from 0")
    if nodes > 1 and node is not None and join is None:
        raise InputError(f"--node {node} needs --join HOST:PORT, node 0's; leave --node away to see every node's line")
    return options


SHORTEST_WAIT_S = 1.0


def check_launch(run: Run, device: torch.device, options: LaunchArgs) -> None:
    """Raise InputError for what a launch cannot do; nothing is written before."""
    if run.cluster.backend == "nccl" and device.type != "cuda":
        raise InputError("cluster.backend = 'nccl' needs CUDA GPUs, and this run is on the CPU; use gloo, or auto")
    for key in ("timeout_s", "join_timeout_s", "rejoin_s"):
        if getattr(run.cluster, key) < SHORTEST_WAIT_S:
            raise InputError(
                f"cluster.{key} = {getattr(run.cluster, key):g} is below {SHORTEST_WAIT_S:g} s, less than processes "
                "need to answer; raise it"
            )
    processes = options.processes or default_processes(run, device, options.nodes)
    if processes * options.nodes > run.cluster.devices and options.nodes > 1:
        processes = 1  # nodes may differ: their sum is checked once they have met
    if rule := processes_rule(run, processes * options.nodes, f"--processes {processes}"):
        raise InputError(rule)


def processes_rule(run: Run, total: int, given: str) -> str | None:
    """Return what is wrong with that many processes, or None."""
    devices, method = run.cluster.devices, run.method
    if total > devices:
        return f"{given} are more than cluster.devices = {devices}; each process needs a device: lower --processes"
    if isinstance(method, DasoOptions):
        size = method.devices_per_node
        if devices % total or ((devices // total) % size and size % (devices // total)):
            return (
                f"{given} do not go with method.devices_per_node = {size} of {devices} devices: each must hold whole "
                "nodes, or an equal part of one; change --processes"
            )
    return None


def default_processes(run: Run, device: torch.device, nodes: int) -> int:
    """Return how many processes a node starts: one a device, at most one a GPU, or one a CPU core."""
    import torch

    here = -(-run.cluster.devices // nodes)
    slots = torch.cuda.device_count() if device.type == "cuda" else usable_cores()
    return max(1, min(here, slots))


def launch_run(folder: RunFolder, device: torch.device, options: LaunchArgs, output: Output) -> int:
    """Train the folder's run in processes of this node; returns the exit code."""
    run, number = folder.run, options.node or 0
    processes = options.processes or default_processes(run, device, options.nodes)
    report_derived(folder, output)
    if folder.is_finished and options.nodes == 1:
        report_finished(folder, output)
        return 0
    with ExitStack() as stack, stop_on_signal() as asked:
        preflight = stack.enter_context(_preflight(folder, processes, options, output))
        met = preflight.run()
        nodes = met.nodes
        if options.nodes == 1:
            node = Node(processes=processes, device=device.type, interface=loopback_interface())
        else:
            own = nodes[number]
            # Any free port: the one that nodes join at stays open for those that come back.
            node = Node(processes, device.type, number, options.nodes, own.address, own.interface, nodes[0].address)
        launch = Launch(folder.path, run, node, output.warning, threads_for(processes))
        launch.allow_clocks_apart(max(abs(other.clock_offset_s) for other in nodes))
        _meet(launch, preflight, run.cluster.join_timeout_s)
        preflight.close()
        stack.enter_context(preflight.accept_rejoins(lambda: launch.store.port, lambda number: _is_alive(launch, number)))
        output.hint(
            f"  launched: {processes} processes on {node.address} ({node.interface}), logs in {folder.path / LOGS}"
        )
        if number == 0 and not folder.resume_from:
            _leave_start_facts(launch, folder, device)
        if number == 0 and met.links:
            _leave_links(launch, met.links)
        sinks = _sinks(folder, output, stack) if number == 0 else []

        def pass_on(event: Event) -> None:
            for sink in sinks:
                sink(event)

        outcome = run_supervised(launch, pass_on, folder.events, asked)
    if launch.wire_sent_bytes is not None and options.nodes > 1 and "step" in outcome:
        _keep_wire_bytes(folder, outcome["step"], launch.wire_sent_bytes)
    return _conclude(folder, outcome, output, options)


def _preflight(folder: RunFolder, processes: int, options: LaunchArgs, output: Output) -> Preflight:
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
    )

    def too_many(nodes: Sequence[NodeFacts]) -> list[str]:
        total = sum(node.processes for node in nodes)
        each = ", ".join(f"node {node.node} {node.processes}" for node in nodes)
        rule = processes_rule(folder.run, total, f"the nodes' processes ({each})")
        return [rule] if rule else []

    return Preflight(settings, facts, log=output.hint, check=too_many, planned=folder.profile.link)


def _meet(launch: Launch, preflight: Preflight, timeout_s: float) -> None:
    """Open the agents' store, node 0's first, and wait until everyone has."""
    if launch.node.number == 0:
        launch.open_store()
    port = preflight.broadcast(launch.store.port if launch.node.number == 0 else None, timeout_s)
    if launch.node.number > 0:
        launch.connect_store(int(port))
    preflight.barrier("start", timeout_s)


def _is_alive(launch: Launch, number: int) -> bool:
    """Whether a node of the run still gives signs of life."""
    before = launch.store.add(alive_key(number), 0)
    time.sleep(SIGN_OF_LIFE_S)
    return launch.store.add(alive_key(number), 0) > before


def secret_command(path: Path) -> int:
    """Write a new secret into a file that only its owner can read; returns the exit code."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path} exists; remove it, or choose another file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another file") from None
    with os.fdopen(handle, "w") as file:
        file.write(make_secret() + "\n")
    Output().hint(f"wrote {path}; copy it to every machine of the run, and name it there with --secret-file")
    return 0


def print_lines(run_file: Path | None, options: LaunchArgs, output: Output) -> int:
    """Print, for each node, the one line to paste; returns the exit code."""
    address = address_to_join(options.interface)
    name = run_file or "run.toml"
    output.text(f"Copy {name} and its data to every machine, and give all the same secret, made once:")
    output.text("  lte secret lte.secret           # then copy the file; it stays readable by you alone")
    for number in range(options.nodes):
        output.text(
            f"  lte train {name} --launch --nodes {options.nodes} --node {number} --join {address}:{DEFAULT_PORT} "
            "--secret-file lte.secret"
        )
    output.hint(f"in these lines node 0 is this machine, {address}; what travels is not encrypted: docs/networking.md")
    return 0


def address_to_join(interface: str | None) -> str:
    """Return this machine's address on an interface, or on that which leads to other machines. Raises InputError."""
    known = {
        name: [a.address for a in found if a.family == socket.AF_INET] for name, found in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not known.get(interface):
            names = ", ".join(sorted(name for name, found in known.items() if found))
            raise InputError(f"--interface {interface} has no IPv4 address here; those that have: {names}")
        return known[interface][0]
    private = [a for _, found in sorted(known.items()) for a in found if not ipaddress.ip_address(a).is_loopback]
    if not private:
        raise InputError("this machine has no address but loopback; connect it, or name one with --join HOST:PORT")
    return private[0]


def threads_for(processes: int) -> int:
    """Return the threads of each process, so that together they take the cores once."""
    return max(1, usable_cores() // processes)


def loopback_interface() -> str:
    """Return the name of the network interface that only this machine reaches."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == "127.0.0.1" for a in addresses):
            return name
    raise InputError("this machine has no loopback interface; bring it up, as in ip link set lo up")


def _sinks(folder: RunFolder, output: Output, stack: ExitStack) -> list[Any]:
    # Of several nodes' parts no folder has a whole checkpoint: the newest one here is where they go on at the latest.
    saved = sorted(folder.path.glob(f"{CHECKPOINTS}/step-*"))
    step = int(saved[-1].name.rpartition("-")[2]) if saved else 0
    board = stack.enter_context(TensorBoard(folder.path / TENSORBOARD, step, output.warning))
    return [board, stack.enter_context(ProgressBar(folder.run, output, step))]


def _leave_start_facts(launch: Launch, folder: RunFolder, device: torch.device) -> None:
    """Give the first process what only the command knows of a run's start."""
    from simulate.launch.keys import START
    from simulate.measure.one_device import measure_memory_bytes

    measured_bytes = measure_memory_bytes(folder.run, device)
    if device.type == "cpu":
        measured_bytes -= plain_start_bytes(folder)
    facts = {"start": start_facts(folder, device), "measured_bytes": measured_bytes}
    launch.store.set(START, json.dumps(facts))


def _leave_links(launch: Launch, links: Sequence[LinkFigures]) -> None:
    """Give the first process what the preflight measured, for the events."""
    from simulate.launch.keys import LINKS

    launch.store.set(LINKS, json.dumps([link.to_json() for link in links]))


def _keep_wire_bytes(folder: RunFolder, step: int, sent_bytes: list[int]) -> None:
    events = EventFile(folder.events)
    events({"kind": "wire", "step": step, "sent_bytes_by_node": sent_bytes})
    events.close()


def _conclude(folder: RunFolder, outcome: dict[str, Any], output: Output, options: LaunchArgs) -> int:
    if outcome["kind"] == "failure":
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
    report_result(
        folder, output, outcome["step"], outcome["val_loss"], outcome["sent_bytes"], outcome["simulated_s"],
        outcome["wall_s"], outcome["val_accuracy"],
    )  # fmt: skip
    return 0
