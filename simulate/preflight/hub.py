"""Node 0: wait for the others, compare, have the links measured, tell everyone the same."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from simulate.errors import InputError, RunFailedError
from simulate.hardware import Link
from simulate.preflight.address import Endpoint, Place, is_private
from simulate.preflight.channel import BadFrameError, Channel, Message, PeerError
from simulate.preflight.clocks import Now, measure_offset_s
from simulate.preflight.compare import compare
from simulate.preflight.deadline import Deadline
from simulate.preflight.door import Arrival, Door, Refusal, listen
from simulate.preflight.facts import NodeFacts, parse_facts
from simulate.preflight.handshake import Identity, Purpose
from simulate.preflight.links import LinkFigures, parse_link, slow_links
from simulate.preflight.secret import Secret
from simulate.preflight.settings import Check, Result, Settings, Tell, failure
from simulate.preflight.station import Station

_LOOK_EVERY_S = 0.5
"""How often a waiting hub looks whether somebody has left again."""
_ALIVE_S = 2.0
_MAX_REFUSED = 200
"""Distinct refusals that are remembered and told: a hostile caller must fill neither memory nor screen."""


class Hub:
    """Node 0 of a preflight of several nodes."""

    def __init__(
        self,
        settings: Settings,
        own: Callable[[int], NodeFacts],
        endpoint: Endpoint,
        place: Place,
        secret: Secret,
        tell: Tell,
        check: Check,
        planned: Link | None,
        now: Now,
    ) -> None:
        self._settings, self._endpoint, self._place, self._secret = settings, endpoint, place, secret
        self._tell, self._check, self._planned, self._now = tell, check, planned, now
        self._own = own
        self._channels: dict[int, Channel] = {}
        self._facts: dict[int, NodeFacts] = {}
        self._refused: dict[tuple[str, str], None] = {}
        self._warnings: list[str] = []
        self._lines: Sequence[str] = ()
        self._door: Door | None = None
        self._station: Station | None = None

    def run(self) -> Result:
        """Return the result; raises InputError and RunFailedError, having told every node."""
        with self._telling_all():
            self._open()
            self._gather()
            self._compare()
            links = self._links()
            if self._planned is not None:
                self._warnings += slow_links(links, self._planned)
            result = Result(self._nodes, links, self._warnings)
            self._send_all({"kind": "result", "links": [x.to_json() for x in links], "warnings": self._warnings})
            for warning in self._warnings:
                self._tell(f"warning: {warning}")
            return result

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Send all nodes a JSON value; returns it."""
        with self._telling_all():
            self._send_all({"kind": "payload", "payload": payload}, timeout_s)
        return payload

    def barrier(self, name: str, timeout_s: float) -> None:
        """Wait until all nodes are there."""
        with self._telling_all():
            deadline = Deadline(timeout_s)
            for node in sorted(self._channels):
                message = self._receive(node, deadline, f"node 0 waited for it at {name!r}")
                if (message["kind"], message.get("name")) != ("barrier", name):
                    raise RunFailedError(f"{self._facts[node].title} is not at {name!r} but at {message.get('name')!r}")
            self._send_all({"kind": "released", "name": name})

    def close(self) -> None:
        """Hang up, and end all threads."""
        if self._door is not None:
            self._door.close()
        if self._station is not None:
            self._station.close()
        for channel in self._channels.values():
            channel.close()

    @property
    def _nodes(self) -> list[NodeFacts]:
        return [self._facts[node] for node in sorted(self._facts)]

    @property
    def _missing(self) -> list[int]:
        return [node for node in range(self._settings.nodes) if node not in self._facts]

    @contextmanager
    def _telling_all(self) -> Iterator[None]:
        """Whatever goes wrong here ends the preflight on all nodes, with the same words."""
        try:
            yield
        except BaseException as error:
            known = isinstance(error, InputError | RunFailedError)
            lines = self._lines or [str(error) if known else f"node 0 stopped ({type(error).__name__})"]
            message = {"kind": "abort", "lines": list(lines), "mendable": isinstance(error, InputError)}
            for channel in self._channels.values():
                with suppress(PeerError):  # it cannot be told
                    channel.send(message, Deadline(_ALIVE_S))
            self.close()
            raise

    def _open(self) -> None:
        self._station = Station(0, self._place.address)
        self._facts[0] = self._own(self._station.port)
        listener = listen(self._place.address, self._endpoint.port, f"--join {self._endpoint}")
        me = Identity(0, Purpose.CONTROL, self._secret)
        self._door = Door(listener, me, self._settings.handshake_timeout_s, self._greet)
        self._tell(f"listening on {self._endpoint} ({self._place.interface}); waiting for {_nodes_text(self._missing)}")

    def _greet(self, channel: Channel) -> NodeFacts:
        """Hear a caller's facts and its clock; runs in the caller's own thread."""
        deadline = Deadline(self._settings.answer_timeout_s)
        message = channel.receive(deadline)
        if message["kind"] != "facts":
            raise BadFrameError(f"sent {message['kind']!r} where its facts were due")
        facts = parse_facts(message.get("facts"))
        offset_s = measure_offset_s(channel, self._now, deadline)
        return facts.model_copy(update={"clock_offset_s": offset_s})

    def _gather(self) -> None:
        assert self._door is not None
        deadline = Deadline(self._settings.join_timeout_s)
        while self._missing:
            if deadline.over:
                raise RunFailedError(self._missing_text())
            event = self._door.next(deadline.within(_LOOK_EVERY_S))
            if isinstance(event, Refusal):
                self._note_refusal(event.host, event.why)
            elif isinstance(event, Arrival):
                self._admit(event.channel, event.greeting)
            self._forget_the_gone()
        self._door.close()  # nobody else is expected
        self._tell(f"all {self._settings.nodes} nodes are there")

    def _admit(self, channel: Channel, facts: NodeFacts) -> None:
        objection = self._objection(channel, facts)
        reply: Message = {"kind": "refused", "why": objection} if objection else {"kind": "welcome"}
        try:
            host = channel.peer_address
            channel.send(reply, Deadline(_ALIVE_S))
        except (PeerError, OSError):
            channel.close()
            return
        if objection:
            channel.close()
            self._note_refusal(host, objection)
            return
        self._channels[facts.node], self._facts[facts.node] = channel, facts
        rest = f"waiting for {_nodes_text(self._missing)}" if self._missing else "that was the last"
        self._tell(f"{facts.title} joined; {rest}")
        if ipaddress.ip_address(host) != ipaddress.ip_address(facts.address):
            self._warnings.append(f"{facts.title} calls from {host}: NAT is between, and workers need direct ways")

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
        if number in self._facts and self._alive(number):
            holder = self._facts[number].address
            return f"two nodes claim number {number}, {holder} and {facts.address}; give each machine its own --node"
        return ""

    def _alive(self, node: int) -> bool:
        """Ask a node that has joined; forget it where it does not answer, so that it can be started again."""
        try:
            measure_offset_s(self._channels[node], self._now, Deadline(_ALIVE_S), rounds=1)
        except PeerError:
            self._forget(node)
            return False
        return True

    def _forget_the_gone(self) -> None:
        for node in [node for node, channel in self._channels.items() if channel.closed]:
            title = self._facts[node].title
            self._forget(node)
            self._tell(f"{title} has left; waiting for {_nodes_text(self._missing)}")

    def _forget(self, node: int) -> None:
        self._channels.pop(node).close()
        del self._facts[node]

    def _note_refusal(self, host: str, why: str) -> None:
        if (host, why) not in self._refused and len(self._refused) < _MAX_REFUSED:
            self._refused[host, why] = None
            self._tell(f"refused {host}: {why}")

    def _missing_text(self) -> str:
        several = len(self._missing) > 1
        started = "are their lines started, and can they" if several else "is its line started, and can it"
        refused = "; ".join(f"{host}: {why}" for host, why in list(self._refused)[-2:])
        return (
            f"{_nodes_text(self._missing)} did not join within {self._settings.join_timeout_s:.3g} s; "
            f"{started} reach {self._endpoint}?{f' (refused: {refused})' if refused else ''}"
        )

    def _compare(self) -> None:
        verdict = compare(self._nodes)
        self._warnings += verdict.warnings
        self._fail_on([*verdict.errors, *self._check(self._nodes)])

    def _fail_on(self, lines: Sequence[str]) -> None:
        if lines:
            self._lines = lines
            raise failure(lines, mendable=True, tell=self._tell)

    def _links(self) -> list[LinkFigures]:
        """Have every node reach every other, then measure the ring's edges one by one, then all at once."""
        assert self._station is not None
        plan, nonce = self._settings.links, secrets.token_hex(32)
        nodes = [node.model_dump() for node in self._nodes]
        self._send_all({"kind": "connect", "nodes": nodes, "meeting": nonce, "plan": plan.to_json()})
        meeting = self._secret.derived("meeting", nonce.encode())
        reach = self._station.connect(self._nodes, meeting, plan)
        answers = self._answers("connected", 2 * plan.reach_s + self._settings.answer_timeout_s)
        for answer in answers.values():
            reach.unreached.extend(str(line) for line in answer.get("unreached", []))
            reach.uncalled.extend(str(line) for line in answer.get("uncalled", []))
        self._fail_on(reach.unreached or reach.uncalled)
        return self._measure() if plan.measure else []

    def _measure(self) -> list[LinkFigures]:
        assert self._station is not None
        patience_s = self._settings.links.timeout_s + self._settings.answer_timeout_s
        self._tell(f"measuring {self._settings.nodes} links, one by one and all at once")
        with _naming_link(self._facts[0].title):
            self._station.measure_alone()
        for node in sorted(self._channels):
            self._send(node, {"kind": "alone"})
            self._answer(node, "measured", Deadline(patience_s))
        self._send_all({"kind": "loaded"})
        with _naming_link(self._facts[0].title):
            links = [self._station.measure_loaded()]
        for node, answer in self._answers("figures", patience_s).items():
            try:
                links.append(parse_link(answer.get("link")))
            except BadFrameError as error:
                raise RunFailedError(f"{self._facts[node].title} {error}") from None
        for link in links:
            self._tell(str(link))
        return links

    def _answers(self, kind: str, seconds: float) -> dict[int, Message]:
        deadline = Deadline(seconds)
        return {node: self._answer(node, kind, deadline) for node in sorted(self._channels)}

    def _answer(self, node: int, kind: str, deadline: Deadline) -> Message:
        message = self._receive(node, deadline, "links were measured")
        if message["kind"] == "failed":
            raise RunFailedError(str(message.get("why")))
        if message["kind"] != kind:
            raise RunFailedError(f"{self._facts[node].title} sent {message['kind']!r} where {kind!r} was due")
        return message

    def _receive(self, node: int, deadline: Deadline, meanwhile: str) -> Message:
        try:
            return self._channels[node].receive(deadline)
        except PeerError as error:
            raise RunFailedError(f"{self._facts[node].title} {error} while {meanwhile}; see its output") from None

    def _send_all(self, message: Message, timeout_s: float | None = None) -> None:
        for node in sorted(self._channels):
            self._send(node, message, timeout_s)

    def _send(self, node: int, message: Message, timeout_s: float | None = None) -> None:
        deadline = Deadline(self._settings.answer_timeout_s if timeout_s is None else timeout_s)
        try:
            self._channels[node].send(message, deadline)
        except PeerError as error:
            raise RunFailedError(f"{self._facts[node].title} {error}; see its output") from None


@contextmanager
def _naming_link(title: str) -> Iterator[None]:
    try:
        yield
    except PeerError as error:
        raise RunFailedError(link_failed(title, error)) from None


def link_failed(title: str, error: PeerError) -> str:
    """Return the line for a link that broke while it was measured."""
    return f"the link from {title} to the next node failed while it was measured: the next node {error}"


def _nodes_text(nodes: Sequence[int]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(str(node) for node in nodes)}"
