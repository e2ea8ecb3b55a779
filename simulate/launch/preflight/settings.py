"""Settings and result of a preflight, and the part that a node has in it where it is alone.

Coordinator and JoiningNode derive from `Preflight`; preflight.py chooses among the three.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from simulate.common.errors import InputError, RunFailedError
from simulate.config.hardware import Link
from simulate.launch.preflight.address import BindAddress, Endpoint, choose_bind_address, parse_endpoint
from simulate.launch.preflight.clock_offset import Now
from simulate.launch.preflight.link_figures import LinkFigures
from simulate.launch.preflight.link_tests import LinkPlan
from simulate.launch.preflight.node_info import Facts, NodeFacts
from simulate.launch.preflight.secret import VARIABLE, Secret

Log = Callable[[str], None]
"""Takes one line for people; called only by the thread that runs the preflight."""
Check = Callable[[Sequence[NodeFacts]], Sequence[str]]
"""Checks all nodes' facts on node 0; returns a line for each error."""
MAX_NODES = 1024


@dataclass(frozen=True)
class Settings:
    """This node's number and network, the address of node 0, and time-outs."""

    node: int
    """This node's number, from 0; the others join node 0."""
    nodes: int
    """Nodes of the run."""
    join: str | None = None
    """HOST:PORT of node 0; not needed in a run of one node."""
    interface: str | None = None
    """Network interface to use; None takes the one that leads to HOST."""
    secret: Secret | None = None
    """Secret that all nodes share; only loopback does without."""
    trust_network: bool = False
    """Whether a public address is allowed."""
    join_timeout_s: float = 300.0
    """Seconds for all nodes to join, from this one's start; a joined node then waits as long for node 0's result."""
    handshake_timeout_s: float = 10.0
    """Seconds for the proof of one connection."""
    answer_timeout_s: float = 30.0
    """Seconds for one answer of a joined node."""
    links: LinkPlan = field(default_factory=LinkPlan)
    """How links are measured; only node 0's is used."""

    def __post_init__(self) -> None:
        # Checked where they are built, so that a mistake shows before anything is opened.
        if not 1 <= self.nodes <= MAX_NODES:
            raise InputError(f"--nodes {self.nodes} is not from 1 to {MAX_NODES}; count the machines of the run")
        if not 0 <= self.node < self.nodes:
            raise InputError(
                f"--node {self.node} is out of range: --nodes is {self.nodes}, so numbers go from 0 to {self.nodes - 1}"
            )
        if self.nodes > 1 and self.join is None:
            raise InputError(f"--nodes {self.nodes} needs --join HOST:PORT, an address of node 0")

    def key(self, *, loopback: bool) -> Secret:
        """Return the secret, without one the public key of loopback; raises InputError on a network."""
        if self.secret is not None:
            return self.secret
        if loopback:
            return Secret.for_loopback()
        raise InputError(
            f"--join {self.join}: nodes on a network need a shared secret; make one, then give all nodes "
            f"--secret-file PATH or {VARIABLE}"
        )


@dataclass(frozen=True)
class Result:
    """Result of a preflight, the same on all nodes."""

    nodes: list[NodeFacts]
    """Facts of all nodes, sorted by number."""
    links: list[LinkFigures]
    """Links of the ring, node 0's first; empty where none was measured."""
    warnings: list[str]
    """Lines for people."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object, without the run.toml, which is the same for all nodes."""
        return {
            "nodes": [node.model_dump(exclude={"run"}) for node in self.nodes],
            "links": [link.model_dump() for link in self.links],
            "warnings": list(self.warnings),
        }


@dataclass(eq=False)
class Preflight(AbstractContextManager["Preflight"]):
    """One node's part in a preflight; close(), or the end of `with`, leaves neither threads nor sockets.

    This one is for a run of one node, where there is nothing to compare or to measure. Making one chooses this node's
    address, and raises InputError before anything is opened.
    """

    settings: Settings
    facts: Facts
    log: Log = lambda line: None
    check: Check = lambda nodes: ()
    """On node 0, further rules about all nodes' facts."""
    planned: Link | None = None
    """On node 0, the link that measured ones are compared with."""
    now: Now = time.time
    """Clock whose offset is measured."""
    bind: BindAddress = field(init=False, default=BindAddress("", "", ""))
    endpoint: Endpoint = field(init=False)
    secret: Secret = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.nodes == 1:
            return
        assert settings.join is not None
        self.endpoint = parse_endpoint(settings.join)
        self.bind = choose_bind_address(
            self.endpoint, is_coordinator=settings.node == 0, interface=settings.interface,
            trust_network=settings.trust_network,
        )  # fmt: skip
        # Only loopback does without a secret: other machines cannot call it.
        self.secret = settings.key(loopback=ipaddress.ip_address(self.bind.coordinator_address).is_loopback)

    def own_facts(self, link_port: int = 0) -> NodeFacts:
        """Return this node's facts with its number and addresses."""
        return NodeFacts(
            **self.facts.model_dump(), node=self.settings.node, nodes=self.settings.nodes, link_port=link_port,
            interface=self.bind.interface, address=self.bind.address,
        )  # fmt: skip

    def run(self) -> Result:
        """Return the preflight's result, the same on all nodes; raises InputError and RunFailedError on all alike."""
        return Result([self.own_facts()], [], [])

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Return node 0's payload, a JSON value of less than 1 MiB, on all nodes. Raises RunFailedError."""
        return payload

    def barrier(self, name: str, timeout_s: float) -> None:
        """Return once all nodes have called it with that name. Raises RunFailedError naming a node that has not."""

    def accept_rejoins(
        self, payload: Callable[[], Any], is_alive: Callable[[int], bool]
    ) -> AbstractContextManager[object]:
        """Return a context within which node 0 accepts lost nodes again; enter it once this preflight is closed.

        They get `payload()` in place of the broadcast. A node for which `is_alive` is true is refused.
        """
        return nullcontext()

    def close(self) -> None:
        """Hang up, and end all threads; may be called twice."""

    def __exit__(self, *error: object) -> None:
        self.close()


def failure(lines: Sequence[str], *, is_input: bool, log: Log) -> InputError | RunFailedError:
    """Return the error of the first line; where there are several, log them all first."""
    text = lines[0]
    if len(lines) > 1:
        for line in lines:
            log(line)
        text += f" (the first of {len(lines)} findings, all above)"
    return InputError(text) if is_input else RunFailedError(text)
