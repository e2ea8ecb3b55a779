"""The preflight: before any worker starts, all nodes authenticate, compare their facts and measure their links.

It finds in seconds what would otherwise break a run after hours: another version, other data, a firewall, a slow link.
`lte train --launch` runs it on every node:

with Preflight(settings, facts, log=print) as preflight:
    result = preflight.run()
    ports = preflight.broadcast({"rendezvous_port": 29401} if settings.node == 0 else None, timeout_s=30)
    preflight.barrier("start", timeout_s=30)
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from simulate.config.hardware import Link
from simulate.launch.preflight.address import choose_bind_address, parse_endpoint
from simulate.launch.preflight.clock_offset import Now
from simulate.launch.preflight.coordinator import Coordinator
from simulate.launch.preflight.joining_node import JoiningNode
from simulate.launch.preflight.node_info import Facts, NodeFacts
from simulate.launch.preflight.settings import Check, Log, Result, Settings


class SingleNode:
    """Preflight of a run of one node: there is nothing to compare or to measure."""

    def __init__(self, settings: Settings, facts: Facts) -> None:
        self._own = NodeFacts(
            **facts.model_dump(), node=settings.node, nodes=settings.nodes, interface="", address="", link_port=0
        )

    def run(self) -> Result:
        """Return this node's facts."""
        return Result([self._own], [], [])

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Return the payload."""
        return payload

    def barrier(self, name: str, timeout_s: float) -> None:
        """Return at once."""

    def accept_rejoins(
        self, payload: Callable[[], Any], is_alive: Callable[[int], bool]
    ) -> AbstractContextManager[object]:
        """Return an empty context: no other node can come back."""
        return nullcontext()

    def close(self) -> None:
        """Do nothing: there are neither threads nor sockets."""


class Preflight:
    """One node's part in a preflight; close() (or the end of `with`) leaves neither threads nor sockets."""

    def __init__(
        self,
        settings: Settings,
        facts: Facts,
        log: Log = lambda line: None,
        check: Check = lambda nodes: (),
        planned: Link | None = None,
        now: Now = time.time,
    ) -> None:
        """Choose this node's address; raises InputError before anything is opened.

        On node 0, `check` adds rules about all nodes' facts, and measured links are compared with `planned`. `now` is
        the clock whose offset is measured.
        """
        self.settings = settings
        self._role = _role(settings, facts, log, check, planned, now)

    def run(self) -> Result:
        """Return the preflight's result, the same on all nodes; raises InputError and RunFailedError on all alike."""
        return self._role.run()

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Return node 0's payload, a JSON value of less than 1 MiB, on all nodes. Raises RunFailedError."""
        return self._role.broadcast(payload, timeout_s)

    def barrier(self, name: str, timeout_s: float) -> None:
        """Return once all nodes have called it with that name. Raises RunFailedError naming a node that has not."""
        self._role.barrier(name, timeout_s)

    def accept_rejoins(
        self, payload: Callable[[], Any], is_alive: Callable[[int], bool]
    ) -> AbstractContextManager[object]:
        """Return a context within which node 0 accepts lost nodes again; enter it once this preflight is closed.

        They get `payload()` in place of the broadcast. A node for which `is_alive` is true is refused.
        """
        return self._role.accept_rejoins(payload, is_alive)

    def close(self) -> None:
        """Hang up, and end all threads; may be called twice."""
        self._role.close()

    def __enter__(self) -> Preflight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _role(
    settings: Settings, facts: Facts, log: Log, check: Check, planned: Link | None, now: Now
) -> SingleNode | Coordinator | JoiningNode:
    if settings.nodes == 1:
        return SingleNode(settings, facts)
    assert settings.join is not None
    endpoint = parse_endpoint(settings.join)
    bind = choose_bind_address(
        endpoint, is_coordinator=settings.node == 0, interface=settings.interface, trust_network=settings.trust_network
    )
    # Only loopback does without a secret: other machines cannot call it.
    secret = settings.key(loopback=ipaddress.ip_address(bind.coordinator_address).is_loopback)

    def own(link_port: int) -> NodeFacts:
        return NodeFacts(
            **facts.model_dump(),
            node=settings.node,
            nodes=settings.nodes,
            interface=bind.interface,
            address=bind.address,
            link_port=link_port,
        )

    if settings.node == 0:
        return Coordinator(settings, own, endpoint, bind, secret, log, check, planned, now)
    return JoiningNode(settings, own, endpoint, bind, secret, log, now)
