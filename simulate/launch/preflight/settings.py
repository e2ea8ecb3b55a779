"""Settings and result of a preflight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulate.common.errors import InputError, RunFailedError
from simulate.launch.preflight.link_figures import LinkFigures
from simulate.launch.preflight.link_tests import LinkPlan
from simulate.launch.preflight.node_info import NodeFacts
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
            "links": [link.to_json() for link in self.links],
            "warnings": list(self.warnings),
        }


def failure(lines: Sequence[str], *, is_input: bool, log: Log) -> InputError | RunFailedError:
    """Return the error of the first line; where there are several, log them all first."""
    text = lines[0]
    if len(lines) > 1:
        for line in lines:
            log(line)
        text += f" (the first of {len(lines)} findings, all above)"
    return InputError(text) if is_input else RunFailedError(text)
