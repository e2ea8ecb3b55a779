"""The preflight: before any worker starts, all nodes meet, prove themselves, agree and measure their links.

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
from simulate.launch.preflight.address import find_place, parse_endpoint
from simulate.launch.preflight.clock_offset import Now
from simulate.launch.preflight.coordinator import Coordinator
from simulate.launch.preflight.joining_node import JoiningNode
from simulate.launch.preflight.node_info import Facts, NodeFacts
from simulate.launch.preflight.settings import Check, Log, Result, Settings


class Alone:
    """The only node of a run: no network, nobody to agree with."""

    def __init__(self, settings: Settings, facts: Facts) -> None:
        self._own = NodeFacts(
            **facts.model_dump(), node=settings.node, nodes=settings.nodes, interface="", address="", link_port=0
        )

    def run(self) -> Result:
        """Return this node alone."""
        return Result([self._own], [], [])

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Return the payload."""
        return payload

    def barrier(self, name: str, timeout_s: float) -> None:
        """Return at once."""

    def latecomers(self, payload: Callable[[], Any], is_alive: Callable[[int], bool]) -> AbstractContextManager[object]:
        """Let nobody in: there is nobody."""
        return nullcontext()

    def close(self) -> None:
        """There is nothing to close."""


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
        """Find this node's place on the network; raises InputError before anything is opened.

        Of node 0, `check` adds rules about all nodes' facts, and `planned` is the link that measured ones are held
        against. `now` is the clock that is compared.
        """
        self.settings = settings
        self._role = _role(settings, facts, log, check, planned, now)

    def run(self) -> Result:
        """Meet all nodes; returns the same on each. Raises InputError and RunFailedError, the same on each too."""
        return self._role.run()

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Return node 0's payload (a JSON value of less than 1 MiB) on all nodes. Raises RunFailedError."""
        return self._role.broadcast(payload, timeout_s)

    def barrier(self, name: str, timeout_s: float) -> None:
        """Return once all nodes have called it with that name. Raises RunFailedError naming a node that has not."""
        self._role.barrier(name, timeout_s)

    def latecomers(self, payload: Callable[[], Any], is_alive: Callable[[int], bool]) -> AbstractContextManager[object]:
        """Let nodes that were lost come back while the run goes on, once this preflight is closed; node 0 does so.

        They get what `payload` returns in the place of the broadcast, unless `is_alive` says that the node is there.
        """
        return self._role.latecomers(payload, is_alive)

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
) -> Alone | Coordinator | JoiningNode:
    if settings.nodes == 1:
        return Alone(settings, facts)
    assert settings.join is not None
    endpoint = parse_endpoint(settings.join)
    place = find_place(
        endpoint, is_hub=settings.node == 0, interface=settings.interface, trust_network=settings.trust_network
    )
    secret = settings.key(loopback=ipaddress.ip_address(place.hub_address).is_loopback)

    def own(link_port: int) -> NodeFacts:
        return NodeFacts(
            **facts.model_dump(),
            node=settings.node,
            nodes=settings.nodes,
            interface=place.interface,
            address=place.address,
            link_port=link_port,
        )

    if settings.node == 0:
        return Coordinator(settings, own, endpoint, place, secret, log, check, planned, now)
    return JoiningNode(settings, own, endpoint, place, secret, log, now)
