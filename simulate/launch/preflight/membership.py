"""Membership on node 0: the nodes that have joined, those still awaited, and the callers that were refused.

The coordinator admits nodes before a run, rejoin.py while it is going on. Both hand each caller to `admit`, which
decides by one set of rules.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from simulate.launch import heartbeat
from simulate.launch.preflight.address import is_private
from simulate.launch.preflight.channel import BadFrameError, Channel, Message, PeerError
from simulate.launch.preflight.clock_offset import measure_offset_s
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, Refusal, listen
from simulate.launch.preflight.node_info import NodeFacts, parse_facts
from simulate.launch.preflight.settings import Preflight

_MAX_REFUSED = 200
"""Distinct refusals that are kept and logged, so that a hostile caller fills neither memory nor screen."""


class Membership:
    """Nodes of a run that have joined, node 0 among them."""

    def __init__(self, node_0: Preflight, own: NodeFacts, *, is_running: bool = False) -> None:
        """Begin with node 0 alone, whose facts are `own`; `is_running` says that the run has already begun."""
        self._node_0, self._settings, self._log, self._now = node_0, node_0.settings, node_0.log, node_0.now
        self.channels: dict[int, Channel] = {}
        """Connections by node number, without node 0."""
        self.facts: dict[int, NodeFacts] = {0: own}
        """Facts by node number."""
        self.warnings: list[str] = []
        self._is_running = is_running
        self._refused: dict[tuple[str, str], None] = {}

    @property
    def nodes(self) -> list[NodeFacts]:
        """Facts of the joined nodes, sorted by number."""
        return [self.facts[node] for node in sorted(self.facts)]

    @property
    def missing(self) -> list[int]:
        """Numbers of the nodes that have not joined."""
        return [node for node in range(self._settings.nodes) if node not in self.facts]

    def listen(self) -> HandshakeListener:
        """Listen for callers at node 0's address and port; raises InputError."""
        node_0 = self._node_0
        listener = listen(node_0.bind.address, node_0.endpoint.port, f"--join {node_0.endpoint}")
        me = Identity(0, Purpose.CONTROL, node_0.secret)
        return HandshakeListener(listener, me, self._settings.handshake_timeout_s, self._greet)

    def _greet(self, channel: Channel) -> NodeFacts:
        """Receive a caller's facts and measure its clock offset; runs in the caller's own thread."""
        deadline = Deadline(self._settings.answer_timeout_s)
        message = channel.receive(deadline)
        if message["kind"] != "facts":
            raise BadFrameError(f"sent {message['kind']!r} where its facts were due")
        facts = parse_facts(message.get("facts"))
        offset_s = measure_offset_s(channel, self._now, deadline)
        return facts.model_copy(update={"clock_offset_s": offset_s})

    def admit(
        self, event: AcceptedPeer | Refusal | None, also: Callable[[NodeFacts], str] = lambda facts: ""
    ) -> NodeFacts | None:
        """Welcome an authenticated caller as the node that it claims to be, or tell it why not and hang up.

        `also` returns a further objection, or "". Returns the facts of a node that has joined.
        """
        if isinstance(event, Refusal):
            self.log_refusal(event.host, event.why)
        if not isinstance(event, AcceptedPeer):
            return None
        channel, facts = event.channel, event.greeting
        # Our own rules come first: `also` may take seconds to look for signs of life.
        objection = self._objection(channel, facts) or also(facts)
        reply: Message = {"kind": "refused", "why": objection} if objection else {"kind": "welcome"}
        try:
            host = channel.peer_address
            channel.send(reply, Deadline(heartbeat.ANSWER_S))
        except (PeerError, OSError):
            channel.close()
            return None
        if objection:
            channel.close()
            self.log_refusal(host, objection)
            return None
        self.channels[facts.node], self.facts[facts.node] = channel, facts
        rest = f"waiting for {nodes_text(self.missing)}" if self.missing else "all have joined"
        self._log(f"{facts.title} comes back" if self._is_running else f"{facts.title} joined; {rest}")
        # The preflight works through a NAT, but workers also connect in the other direction.
        if ipaddress.ip_address(host) != ipaddress.ip_address(facts.address):
            self.warnings.append(f"{facts.title} calls from {host}, through a NAT; workers need direct connections")
        return facts

    def _objection(self, channel: Channel, facts: NodeFacts) -> str:
        """Return why a caller may not take its number, "" where it may."""
        nodes, number = self._settings.nodes, facts.node
        if number != channel.peer:
            return f"it proved to be node {channel.peer} and claims to be node {number}"
        if facts.nodes != nodes:
            return f"node {number} expects {facts.nodes} nodes, node 0 expects {nodes}; give all the same --nodes"
        if number >= nodes:
            return f"node number {number} is out of range: --nodes is {nodes}, so numbers go from 0 to {nodes - 1}"
        if number == 0:
            return "two nodes claim number 0, it and this one; give each machine its own --node"
        if not facts.address or not (self._settings.trust_network or is_private(ipaddress.ip_address(facts.address))):
            return f"node {number} uses the public address {facts.address}; add --trust-network on node 0 to allow it"
        if number in self.facts and self._is_alive(number):
            holder = self.facts[number].address
            return f"two nodes claim number {number}, {holder} and {facts.address}; give each machine its own --node"
        return ""

    def _is_alive(self, node: int) -> bool:
        """Whether a joined node still answers; one that does not is forgotten, so that it can be started again."""
        try:
            measure_offset_s(self.channels[node], self._now, Deadline(heartbeat.ANSWER_S), rounds=1)
        except PeerError:
            self.forget(node)
            return False
        return True

    def remove_disconnected(self) -> None:
        """Forget nodes that have closed their connections, so that they are awaited again."""
        for node in [node for node, channel in self.channels.items() if channel.closed]:
            title = self.facts[node].title
            self.forget(node)
            self._log(f"{title} has left; waiting for {nodes_text(self.missing)}")

    def forget(self, node: int) -> None:
        """Hang up on a node and remove it."""
        self.channels.pop(node).close()
        del self.facts[node]

    def log_refusal(self, host: str, why: str) -> None:
        """Log a refused caller, once for each host and reason."""
        if (host, why) not in self._refused and len(self._refused) < _MAX_REFUSED:
            self._refused[host, why] = None
            self._log(f"refused {host}: {why}")

    def missing_text(self) -> str:
        """Return the error line for nodes that did not join in time, with the last refusals: a likely reason."""
        several = len(self.missing) > 1
        started = "are their lines started, and can they" if several else "is its line started, and can it"
        refused = "; ".join(f"{host}: {why}" for host, why in list(self._refused)[-2:])
        return (
            f"{nodes_text(self.missing)} did not join within {self._settings.join_timeout_s:.3g} s; "
            f"{started} reach {self._node_0.endpoint}?{f' (refused: {refused})' if refused else ''}"
        )


def nodes_text(nodes: Sequence[int]) -> str:
    """Return "node 2", or "nodes 1, 2"."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(str(node) for node in nodes)}"
