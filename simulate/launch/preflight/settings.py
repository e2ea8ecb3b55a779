"""What a preflight is told, and what it returns."""

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
"""Takes one line for people; called by the thread that runs the preflight only."""
Check = Callable[[Sequence[NodeFacts]], Sequence[str]]
"""Looks at all nodes' facts on node 0; returns what is wrong with them, one line each."""
MAX_NODES = 1024


@dataclass(frozen=True)
class Settings:
    """Who this node is, where the others are, and how long to wait for them."""

    node: int
    """This node's number, from 0; node 0 is where the others join."""
    nodes: int
    join: str | None = None
    """HOST:PORT of node 0; not needed in a run of one node."""
    interface: str | None = None
    """Network interface to use; not set: the one that leads to HOST."""
    secret: Secret | None = None
    """Needed for anything but loopback."""
    trust_network: bool = False
    """Allow a public address."""
    join_timeout_s: float = 300.0
    """For all nodes to be there, from when this one starts; a joined node waits as long again for node 0's verdict."""
    handshake_timeout_s: float = 10.0
    """For one connection to prove itself."""
    answer_timeout_s: float = 30.0
    """For one answer of a node that is there."""
    links: LinkPlan = field(default_factory=LinkPlan)
    """Node 0's counts."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise InputError(f"--nodes {self.nodes} is not from 1 to {MAX_NODES}; count the machines of the run")
        if not 0 <= self.node < self.nodes:
            raise InputError(
                f"--node {self.node} is out of range: --nodes is {self.nodes}, so numbers go from 0 to {self.nodes - 1}"
            )
        if self.nodes > 1 and self.join is None:
            raise InputError(f"--nodes {self.nodes} needs --join HOST:PORT, an address of node 0")

    def key(self, *, loopback: bool) -> Secret:
        """Return the secret, or on loopback the one that everybody knows; raises InputError."""
        if self.secret is not None:
            return self.secret
        if loopback:
            return Secret.of_nobody()
        raise InputError(
            f"--join {self.join}: nodes on a network need a shared secret; make one, then give all nodes "
            f"--secret-file PATH or {VARIABLE}"
        )


@dataclass(frozen=True)
class Result:
    """What all nodes know after a preflight; the same on each of them."""

    nodes: list[NodeFacts]
    """In the order of their numbers."""
    links: list[LinkFigures]
    """The ring's edges, node 0's first; empty where nothing was measured."""
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object; nodes without their run.toml, which is the same for all."""
        return {
            "nodes": [node.model_dump(exclude={"run"}) for node in self.nodes],
            "links": [link.to_json() for link in self.links],
            "warnings": list(self.warnings),
        }


def failure(lines: Sequence[str], *, mendable: bool, log: Log) -> InputError | RunFailedError:
    """Return the error for these lines: the first one; where there are more, all are told before."""
    text = lines[0]
    if len(lines) > 1:
        for line in lines:
            log(line)
        text += f" (the first of {len(lines)} findings, all above)"
    return InputError(text) if mendable else RunFailedError(text)
