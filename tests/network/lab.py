"""Several machines on one: Linux network namespaces on a shaped switch, for tests and benchmarks of real exchanges.

    with Lab(4, bytes_per_s=12.5e6) as lab:              # 100 Mbit/s each way, per node
        server = lab[0].popen([sys.executable, "server.py", lab[0].address])

Every node is a namespace with one interface, `eth0`. Its cable ends in a further namespace, the switch, so that nothing
of a lab shows in the machine's own network. Needs root, `ip` and `tc`; `why_not()` says what is missing.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.harness import Child
from tests.network import namespaces
from tests.network.namespaces import KILL_WAIT_S, run_tool
from tests.network.relay import Relay

_numbers = itertools.count()


@dataclass(frozen=True)
class Process:
    """A process inside a node."""

    node: int
    pid: int
    command: str


@dataclass(frozen=True)
class Counters:
    """What crossed a node's interface: whole Ethernet frames, without checksum, preamble and gap."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
            self.sent_packets - earlier.sent_packets,
            self.received_packets - earlier.received_packets,
        )


@cache
def why_not() -> str | None:
    """Return what keeps this machine from running a lab, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"no {' and no '.join(missing)} (Debian package iproute2)"
    try:
        with Lab(2, bytes_per_s=1e6):
            return None
    except (RuntimeError, OSError) as error:
        return f"network namespaces do not work here: {error}"


@dataclass
class Node:
    """One machine of a lab."""

    index: int
    namespace: str
    address: str
    switch: str
    port: str
    """The switch's end of the cable."""
    interface: str = "eth0"
    started: list[Child] = field(default_factory=list)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` in this node."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def popen(self, argv: Sequence[str], **options: Any) -> Child:
        """Start `argv` in this node; options are Popen's. The lab ends what is still running when it is left."""
        process = Child(self.command(argv), **options)
        self.started.append(process)
        return process

    def run(self, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run `argv` to its end; return its stdout. Raises CalledProcessError and TimeoutExpired."""
        return subprocess.run(
            self.command(argv), stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s
        ).stdout

    def counters(self) -> Counters:
        """Return what crossed the interface since the lab was made; differences are what counts."""
        shown = run_tool("ip", "-n", self.namespace, "-s", "-j", "link", "show", "dev", self.interface)
        stats = json.loads(shown)[0]["stats64"]
        sent, received = stats["tx"], stats["rx"]
        return Counters(sent["bytes"], received["bytes"], sent["packets"], received["packets"])

    def shape(self, bytes_per_s: float | None, down_bytes_per_s: float | None = None) -> None:
        """Set what the link carries from and to this node (both `bytes_per_s` unless told apart), frames with headers.

        None lifts the limit. Works while packets travel.
        """
        down = bytes_per_s if down_bytes_per_s is None else down_bytes_per_s
        namespaces.shape(self.namespace, self.interface, bytes_per_s)
        namespaces.shape(self.switch, self.port, down)

    def link_down(self) -> None:
        """Pull the cable at the switch: the node's interface stays up and loses its carrier."""
        run_tool("ip", "-n", self.switch, "link", "set", self.port, "down")

    def link_up(self) -> None:
        """Plug the cable in again."""
        run_tool("ip", "-n", self.switch, "link", "set", self.port, "up")

    def processes(self) -> list[Process]:
        """Return what runs in this node, whoever started it."""
        return [Process(self.index, pid, namespaces.command_line(pid)) for pid in namespaces.pids_in(self.namespace)]

    def kill(self) -> list[Process]:
        """Kill all that runs in this node; return it."""
        found = self.processes()
        running = [process for process in self.started if process.poll() is None]
        # One that was started just now may not have entered the namespace yet.
        late = {process.pid for process in running} - {process.pid for process in found}
        found += [Process(self.index, pid, namespaces.command_line(pid)) for pid in sorted(late)]
        for process in running:
            process.kill()
            process.wait(KILL_WAIT_S)
        namespaces.empty(self.namespace)
        return found


class Lab:
    """N nodes on one switch, addresses 10.77.0.1 and up; a context manager.

    `bytes_per_s` shapes every node's link both ways, `delay_s` delays every packet by that much one way, and `loss`
    drops that share of them (seeded). Delay and loss need a relay in Python: see its module for what it can carry.
    After the `with`, `left_behind` holds the processes that were still there and had to be killed.
    """

    def __init__(
        self, nodes: int, bytes_per_s: float | None = None, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0
    ) -> None:
        if not 1 <= nodes <= 250:
            raise ValueError(f"a lab has 1 to 250 nodes, not {nodes}")
        owner = f"{namespaces.owner_name()}-{next(_numbers)}"
        self.switch = f"{owner}-switch"
        self.nodes = [Node(i, f"{owner}-{i}", f"10.77.0.{i + 1}", self.switch, f"port{i}") for i in range(nodes)]
        self.left_behind: list[Process] = []
        self._bytes_per_s = bytes_per_s
        relayed = delay_s > 0 or loss > 0
        self.relay = Relay(self.switch, nodes, delay_s, loss, seed) if relayed else None

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __enter__(self) -> Lab:
        namespaces.sweep()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def processes(self) -> list[Process]:
        """Return what runs in all nodes."""
        return [process for node in self.nodes for process in node.processes()]

    def close(self) -> None:
        """Kill what is left, note it in `left_behind`, and take the lab down; twice is once."""
        there = set(namespaces.names())
        for node in self.nodes:
            if node.namespace in there:
                self.left_behind += node.kill()
        if self.relay:
            self.relay.stop()
        for name in {self.switch, *(node.namespace for node in self.nodes)} & there:
            namespaces.empty(name)
            namespaces.remove(name)

    def _build(self) -> None:
        namespaces.add(self.switch)
        for node in self.nodes:
            namespaces.add(node.namespace)
            run_tool(*f"ip -n {self.switch} link add {node.port} type veth peer eth0 netns {node.namespace}".split())
            # One frame a segment: otherwise the kernel counts, and drops, up to 64 kB under one header.
            run_tool("ip", "-n", self.switch, "link", "set", node.port, "gso_max_segs", 1, "up")
            run_tool("ip", "-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.interface)
            run_tool("ip", "-n", node.namespace, "link", "set", node.interface, "gso_max_segs", 1, "up")
            node.shape(self._bytes_per_s)
        if self.relay:
            self.relay.start([node.port for node in self.nodes])
        else:
            namespaces.join(self.switch, "bridge0", [node.port for node in self.nodes])
