"""Link tests of one node: call every other node, then measure the link to the next one in the ring.

torch's workers later connect every node with every other, on ports that the system picks. So each node calls all others
on such a port first, which finds firewalls before the run does. Coordinator and JoiningNode hold one LinkTester each.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from simulate.common import toml_io
from simulate.launch.preflight import link_probe as probe
from simulate.launch.preflight.address import address_text
from simulate.launch.preflight.channel import Channel, PeerError, hang_up, reason
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call, dial
from simulate.launch.preflight.link_figures import LinkFigures
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, listen
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.secret import Secret


class LinkPlan(toml_io.Schema):
    """How links are measured; node 0's plan holds on all nodes."""

    measure: bool = True
    """Whether to measure; False only checks that every node reaches every other."""
    limits: probe.Limits = probe.Limits()
    reach_s: float = 20.0
    """Seconds for every node to call every other."""
    timeout_s: float = 60.0
    """Seconds for measuring one edge alone, and again for all at once."""


@dataclass(frozen=True)
class Reach:
    """Failed calls between one node and all others, one line each."""

    unreached: list[str]
    """This node's calls that failed."""
    uncalled: list[str]
    """Nodes that did not call this one; mostly the other side of an `unreached` of theirs."""


class LinkTester:
    """One node's links; close() ends its threads and connections."""

    def __init__(self, node: int, address: str) -> None:
        self._node, self._address = node, address
        self._listener: socket.socket | None = listen(address, 0, "measuring links")
        self.port = int(self._listener.getsockname()[1])
        """Port that the other nodes call."""
        self._handshakes: HandshakeListener | None = None
        self._to_successor: Channel | None = None
        self._from_predecessor: Channel | None = None
        self._serving: threading.Thread | None = None
        self._plan = LinkPlan()
        self._alone: probe.Rate | None = None
        self._latency_s = 0.0

    def connect(self, nodes: Sequence[NodeFacts], secret: Secret, meeting: str, plan: LinkPlan) -> Reach:
        """Call every other node, and accept a call from each; `meeting` and `plan` are node 0's."""
        self._plan = plan
        deadline = Deadline(plan.reach_s)
        me = Identity(self._node, Purpose.LINK, secret, meeting)
        assert self._listener is not None
        self._handshakes = HandshakeListener(self._listener, me, plan.reach_s)
        others = [node for node in nodes if node.node != self._node]
        # Calls run at once, since one firewalled node would hold up all others for its whole time-out.
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
        """Keep the connections to the successor and from the predecessor, and serve the latter; close all others."""
        # Connections that called successfully are kept for measuring, since each handshake costs round trips.
        channels = {channel.peer: channel for channel in called}
        self._to_successor = channels.pop((self._node + 1) % count, None)
        self._from_predecessor = callers.get((self._node - 1) % count)
        for channel in channels.values():
            channel.close()
        for caller in callers.values():
            if caller is not self._from_predecessor:
                caller.close()
        self._close_listener()
        if self._from_predecessor is not None:
            # Served in a thread, because this node measures its own link meanwhile.
            arguments = (self._from_predecessor, Deadline(self._plan.timeout_s * (count + 2)))
            self._serving = threading.Thread(target=self._serve, args=arguments, name="preflight-links", daemon=True)
            self._serving.start()

    def measure_alone(self) -> None:
        """Measure latency and rate to the successor while no other node measures. Raises PeerError."""
        assert self._to_successor is not None
        deadline = Deadline(self._plan.timeout_s)
        self._latency_s = probe.measure_latency_s(self._to_successor, self._plan.limits, deadline)
        self._alone = probe.measure_rate(self._to_successor, self._plan.limits, deadline)

    def measure_loaded(self) -> LinkFigures:
        """Measure the rate again while all nodes do; returns all figures. Raises PeerError."""
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
        self._close_listener()
        if self._to_successor is not None:
            self._to_successor.close()
        if self._from_predecessor is not None:
            hang_up(self._from_predecessor.sock)
        if self._serving is not None:
            self._serving.join()

    def _close_listener(self) -> None:
        if self._handshakes is not None:
            self._handshakes.close()  # closes the listener, too
        elif self._listener is not None:
            self._listener.close()
        self._handshakes = self._listener = None

    def _reach(self, other: NodeFacts, me: Identity, deadline: Deadline) -> Channel | str:
        """Call a node; returns the channel, or a line that says why it failed."""
        try:
            return call(dial(self._address, other.address, other.link_port, deadline), me, other.node, deadline)
        except (PeerError, OSError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            where = address_text(other.address, other.link_port)
            return (
                f"node {self._node} ({self._address}) cannot reach node {other.node} at {where}: {why}; workers need "
                "free ports between all nodes, so open the firewall between these two"
            )

    def _receive_callers(self, awaited: set[int], deadline: Deadline) -> dict[int, Channel]:
        """Return the calls of the awaited nodes, as many as come before the deadline."""
        assert self._handshakes is not None
        callers: dict[int, Channel] = {}
        while awaited - callers.keys() and not deadline.over:
            event = self._handshakes.next(deadline)
            if isinstance(event, AcceptedPeer):
                if event.channel.peer in awaited - callers.keys():
                    callers[event.channel.peer] = event.channel
                else:
                    event.channel.close()
        return callers

    def _serve(self, channel: Channel, deadline: Deadline) -> None:
        try:
            probe.serve(channel, self._plan.limits, deadline)
        except PeerError:
            pass  # the sender sees the failure, too, and reports it to node 0
        finally:
            channel.close()
