"""This node's end of the links between nodes: reach everyone, then measure the way to the ring's successor.

torch's workers connect every node with every other on ports that the system picks, so reaching everyone on such a port
is what they need, and what a firewall forbids.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from simulate.launch.preflight import link_probe as probe
from simulate.launch.preflight.address import address_text, family_of, sockaddr
from simulate.launch.preflight.channel import BadFrameError, Channel, PeerError, close_socket, reason
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call
from simulate.launch.preflight.link_figures import LinkFigures
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, listen
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.secret import Secret


@dataclass(frozen=True)
class LinkPlan:
    """How links are measured, the same on all nodes: node 0 decides."""

    measure: bool = True
    """False: only find out whether every node reaches every other."""
    limits: probe.Limits = field(default_factory=probe.Limits)
    reach_s: float = 20.0
    """For every node to reach every other."""
    timeout_s: float = 60.0
    """For measuring one edge alone, and again for all of them at once."""

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Any) -> LinkPlan:
        """Read it as to_json wrote it; raises BadFrameError."""
        try:
            limits = given["limits"]
            aim_s, budget_bytes = float(limits["aim_s"]), int(limits["budget_bytes"])
            times_s = float(given["reach_s"]), float(given["timeout_s"])
            return cls(bool(given["measure"]), probe.Limits(aim_s, budget_bytes), *times_s)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BadFrameError("sent a plan for links that cannot be read") from None


@dataclass(frozen=True)
class Reach:
    """What was wrong when a node reached for all others, one line each."""

    unreached: list[str]
    """Calls of this node that nobody answered."""
    uncalled: list[str]
    """Calls that this node waited for in vain; the other side of somebody's `unreached`, most of the time."""


class LinkTester:
    """Links of one node; close() ends its threads and connections."""

    def __init__(self, node: int, address: str) -> None:
        self._node, self._address = node, address
        self._listener: socket.socket | None = listen(address, 0, "measuring links")
        self.port = int(self._listener.getsockname()[1])
        """Where the other nodes call."""
        self._door: HandshakeListener | None = None
        self._to_successor: Channel | None = None
        self._from_predecessor: Channel | None = None
        self._serving: threading.Thread | None = None
        self._plan = LinkPlan()
        self._alone: probe.Rate | None = None
        self._latency_s = 0.0

    def connect(self, nodes: Sequence[NodeFacts], meeting: Secret, plan: LinkPlan) -> Reach:
        """Call every other node and be called by each.

        `meeting` is a secret of this preflight alone, `plan` is node 0's.
        """
        self._plan = plan
        deadline = Deadline(plan.reach_s)
        me = Identity(self._node, Purpose.LINK, meeting)
        assert self._listener is not None
        self._door = HandshakeListener(self._listener, me, plan.reach_s)
        others = [node for node in nodes if node.node != self._node]
        with ThreadPoolExecutor(max_workers=min(32, len(others))) as pool:
            outcomes = list(pool.map(lambda other: self._reach(other, me, deadline), others))
        callers = self._receive_callers({node.node for node in others}, deadline)
        self._keep_ring([outcome for outcome in outcomes if isinstance(outcome, Channel)], callers, len(nodes))
        return Reach(
            unreached=[outcome for outcome in outcomes if isinstance(outcome, str)],
            uncalled=[
                f"{nodes[self._node].title} was not called by {other.title}"
                for other in others
                if other.node not in callers
            ],
        )

    def _keep_ring(self, called: list[Channel], callers: dict[int, Channel], count: int) -> None:
        """Keep the ways to the successor and from the predecessor, which is served from now on; close the others."""
        channels = {channel.peer: channel for channel in called}
        self._to_successor = channels.pop((self._node + 1) % count, None)
        self._from_predecessor = callers.get((self._node - 1) % count)
        for channel in channels.values():
            channel.close()
        for caller in callers.values():
            if caller is not self._from_predecessor:
                caller.close()
        self._close_door()
        if self._from_predecessor is not None:
            arguments = (self._from_predecessor, Deadline(self._plan.timeout_s * (count + 2)))
            self._serving = threading.Thread(target=self._serve, args=arguments, name="preflight-links", daemon=True)
            self._serving.start()

    def measure_alone(self) -> None:
        """Measure latency and rate to the successor while nobody else measures. Raises PeerError."""
        assert self._to_successor is not None
        deadline = Deadline(self._plan.timeout_s)
        self._latency_s = probe.measure_latency_s(self._to_successor, self._plan.limits, deadline)
        self._alone = probe.measure_rate(self._to_successor, self._plan.limits, deadline)

    def measure_loaded(self) -> LinkFigures:
        """Measure the rate again, while everybody does; returns all figures. Raises PeerError."""
        assert self._to_successor is not None and self._alone is not None
        deadline = Deadline(self._plan.timeout_s)
        loaded = probe.measure_rate(self._to_successor, self._plan.limits, deadline, self._alone.chunk_bytes)
        self._to_successor.send({"kind": "done"}, deadline)
        return LinkFigures(
            sender=self._node,
            receiver=self._to_successor.peer,
            latency_s=self._latency_s,
            bytes_per_s=self._alone.bytes_per_s,
            loaded_bytes_per_s=loaded.bytes_per_s,
            sent_bytes=self._alone.sent_bytes + loaded.sent_bytes,
        )

    def close(self) -> None:
        """Hang up, and end all threads."""
        self._close_door()
        if self._to_successor is not None:
            self._to_successor.close()
        if self._from_predecessor is not None:
            self._from_predecessor.hang_up()
        if self._serving is not None:
            self._serving.join()

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()  # and its listener
        elif self._listener is not None:
            self._listener.close()
        self._door = self._listener = None

    def _reach(self, other: NodeFacts, me: Identity, deadline: Deadline) -> Channel | str:
        sock = None
        try:
            sock = dial(self._address, other.address, other.link_port, deadline)
            return call(sock, me, other.node, deadline)
        except (PeerError, OSError) as error:
            if sock is not None:
                close_socket(sock)
            why = reason(error) if isinstance(error, OSError) else str(error)
            where = address_text(other.address, other.link_port)
            return (
                f"node {self._node} ({self._address}) cannot reach node {other.node} at {where}: {why}; workers need "
                "free ports between all nodes, so open the firewall between these two"
            )

    def _receive_callers(self, awaited: set[int], deadline: Deadline) -> dict[int, Channel]:
        assert self._door is not None
        callers: dict[int, Channel] = {}
        while awaited - callers.keys() and not deadline.over:
            event = self._door.next(deadline)
            if isinstance(event, AcceptedPeer):
                known = event.channel.peer in awaited - callers.keys()
                if known:
                    callers[event.channel.peer] = event.channel
                else:
                    event.channel.close()
        return callers

    def _serve(self, channel: Channel, deadline: Deadline) -> None:
        try:
            probe.serve(channel, self._plan.limits, deadline)
        except PeerError:
            pass  # the sender notices too, and tells node 0
        finally:
            channel.close()


def dial(own_address: str, address: str, port: int, deadline: Deadline) -> socket.socket:
    """Connect from own_address. Raises OSError."""
    sock = socket.socket(family_of(address), socket.SOCK_STREAM)
    try:
        sock.bind(sockaddr(own_address, 0))
        sock.settimeout(deadline.left_s or 1e-6)
        sock.connect(sockaddr(address, port))
    except BaseException:
        sock.close()
        raise
    return sock
