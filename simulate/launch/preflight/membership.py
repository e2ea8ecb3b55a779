"""Who has joined node 0 so far, who was refused, and who is awaited."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from simulate.launch.preflight.address import Endpoint, is_private
from simulate.launch.preflight.channel import BadFrameError, Channel, Message, PeerError
from simulate.launch.preflight.clock_offset import Now, measure_offset_s
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.node_info import NodeFacts, parse_facts
from simulate.launch.preflight.settings import Log, Settings

ALIVE_S = 2.0
"""For a node that has joined to answer, or to take a message."""
_MAX_REFUSED = 200
"""Distinct refusals that are remembered and told: a hostile caller must fill neither memory nor screen."""


class Membership:
    """The nodes of a run that are there, node 0 first."""

    def __init__(self, settings: Settings, endpoint: Endpoint, log: Log, now: Now) -> None:
        self._settings, self._endpoint, self._tell, self._now = settings, endpoint, log, now
        self.channels: dict[int, Channel] = {}
        """By number, without node 0."""
        self.facts: dict[int, NodeFacts] = {}
        """By number; node 0 enters its own."""
        self.warnings: list[str] = []
        self.is_late = False
        """Whether the run goes on already."""
        self._refused: dict[tuple[str, str], None] = {}

    @property
    def nodes(self) -> list[NodeFacts]:
        """Facts of those that are there, in the order of their numbers."""
        return [self.facts[node] for node in sorted(self.facts)]

    @property
    def missing(self) -> list[int]:
        """Numbers that are awaited."""
        return [node for node in range(self._settings.nodes) if node not in self.facts]

    def greet(self, channel: Channel) -> NodeFacts:
        """Hear a caller's facts and its clock; runs in the caller's own thread."""
        deadline = Deadline(self._settings.answer_timeout_s)
        message = channel.receive(deadline)
        if message["kind"] != "facts":
            raise BadFrameError(f"sent {message['kind']!r} where its facts were due")
        facts = parse_facts(message.get("facts"))
        offset_s = measure_offset_s(channel, self._now, deadline)
        return facts.model_copy(update={"clock_offset_s": offset_s})

    def admit(self, channel: Channel, facts: NodeFacts, also: Callable[[NodeFacts], str] = lambda facts: "") -> None:
        """Welcome an authenticated caller as the node that it says it is, or tell it why not and hang up.

        `also` may have an objection of its own.
        """
        objection = self._objection(channel, facts) or also(facts)
        reply: Message = {"kind": "refused", "why": objection} if objection else {"kind": "welcome"}
        try:
            host = channel.peer_address
            channel.send(reply, Deadline(ALIVE_S))
        except (PeerError, OSError):
            channel.close()
            return
        if objection:
            channel.close()
            self.note_refusal(host, objection)
            return
        self.channels[facts.node], self.facts[facts.node] = channel, facts
        rest = f"waiting for {nodes_text(self.missing)}" if self.missing else "that was the last"
        self._tell(f"{facts.title} comes back" if self.is_late else f"{facts.title} joined; {rest}")
        if ipaddress.ip_address(host) != ipaddress.ip_address(facts.address):
            self.warnings.append(f"{facts.title} calls from {host}: NAT is between, and workers need direct ways")

    def _objection(self, channel: Channel, facts: NodeFacts) -> str:
        nodes, number = self._settings.nodes, facts.node
        if number != channel.peer:
            return f"it proved to be node {channel.peer} and says that it is node {number}"
        if facts.nodes != nodes:
            return f"node {number} expects {facts.nodes} nodes, node 0 expects {nodes}; give all the same --nodes"
        if number >= nodes:
            return f"node number {number} is out of range: --nodes is {nodes}, so numbers go from 0 to {nodes - 1}"
        if number == 0:
            return "two nodes claim number 0, it and this one; give each machine its own --node"
        if not facts.address or not (self._settings.trust_network or is_private(ipaddress.ip_address(facts.address))):
            return f"node {number} uses the public address {facts.address}; add --trust-network on node 0 to allow it"
        if number in self.facts and self._alive(number):
            holder = self.facts[number].address
            return f"two nodes claim number {number}, {holder} and {facts.address}; give each machine its own --node"
        return ""

    def _alive(self, node: int) -> bool:
        """Ask a node that has joined; forget it where it does not answer, so that it can be started again."""
        try:
            measure_offset_s(self.channels[node], self._now, Deadline(ALIVE_S), rounds=1)
        except PeerError:
            self._forget(node)
            return False
        return True

    def forget_the_gone(self) -> None:
        """Await those again that have closed their connections."""
        for node in [node for node, channel in self.channels.items() if channel.closed]:
            title = self.facts[node].title
            self._forget(node)
            self._tell(f"{title} has left; waiting for {nodes_text(self.missing)}")

    def dismiss(self, node: int) -> None:
        """Hang up on a node that has what it came for."""
        self._forget(node)

    def _forget(self, node: int) -> None:
        self.channels.pop(node).close()
        del self.facts[node]

    def note_refusal(self, host: str, why: str) -> None:
        """Tell, once for each host and reason, that a caller was sent away."""
        if (host, why) not in self._refused and len(self._refused) < _MAX_REFUSED:
            self._refused[host, why] = None
            self._tell(f"refused {host}: {why}")

    def missing_text(self) -> str:
        """Return the line for a time to join that is over, with the last refusals, which may be the reason."""
        several = len(self.missing) > 1
        started = "are their lines started, and can they" if several else "is its line started, and can it"
        refused = "; ".join(f"{host}: {why}" for host, why in list(self._refused)[-2:])
        return (
            f"{nodes_text(self.missing)} did not join within {self._settings.join_timeout_s:.3g} s; "
            f"{started} reach {self._endpoint}?{f' (refused: {refused})' if refused else ''}"
        )


def nodes_text(nodes: Sequence[int]) -> str:
    """Return "node 2", or "nodes 1, 2"."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(str(node) for node in nodes)}"
