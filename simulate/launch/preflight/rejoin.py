"""Rejoining: while a run is going on, node 0 accepts lost nodes again, by the same proof and rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from simulate.launch import heartbeat
from simulate.launch.preflight.address import Endpoint
from simulate.launch.preflight.channel import Channel, PeerError
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, Refusal, listen
from simulate.launch.preflight.membership import Membership
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.secret import Secret
from simulate.launch.preflight.settings import Log, Settings

_LOOK_EVERY_S = 0.5


class RejoinServer:
    """Server on node 0 for nodes that come back; it runs within a `with` and ends all its threads there.

    A node that comes back gets the nodes' facts and `payload()`. Where `is_alive` says that a node of its number still
    takes part, it is refused.
    """

    def __init__(
        self,
        settings: Settings,
        endpoint: Endpoint,
        address: str,
        secret: Secret,
        nodes: Sequence[NodeFacts],
        payload: Callable[[], Any],
        is_alive: Callable[[int], bool],
        log: Log,
    ) -> None:
        self._settings, self._nodes, self._payload, self._is_alive = settings, list(nodes), payload, is_alive
        self._members = Membership(settings, endpoint, log, time.time)
        # Nodes that join now come back, and are logged as such.
        self._members.is_running = True
        self._members.facts[0] = self._nodes[0]
        listener = listen(address, endpoint.port, f"--join {endpoint}")
        me = Identity(0, Purpose.CONTROL, secret)
        self._handshakes = HandshakeListener(listener, me, settings.handshake_timeout_s, self._members.greet)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="preflight-rejoin", daemon=True)

    def __enter__(self) -> RejoinServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._handshakes.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            event = self._handshakes.next(Deadline(_LOOK_EVERY_S))
            if isinstance(event, Refusal):
                self._members.log_refusal(event.host, event.why)
            elif isinstance(event, AcceptedPeer):
                self._answer(event.channel, event.greeting)

    def _answer(self, channel: Channel, facts: NodeFacts) -> None:
        """Refuse a node, or send it what the others got before the run."""
        self._members.admit(channel, facts, self._objection)
        if self._members.channels.get(facts.node) is not channel:
            return
        # A node may come back with another address.
        self._nodes[facts.node] = facts
        nodes = [node.model_dump() for node in self._nodes]
        try:
            channel.send({"kind": "late", "nodes": nodes, "payload": self._payload()}, Deadline(heartbeat.ANSWER_S))
        except (PeerError, RuntimeError) as error:  # RuntimeError: the payload's store is gone
            self._members.log_refusal(facts.address, str(error))
        self._members.forget(facts.node)  # it has all that it came for

    def _objection(self, facts: NodeFacts) -> str:
        """Return why a node may not come back, "" where it may."""
        errors = compare([self._nodes[0], facts]).errors
        if errors:
            return errors[0]
        if facts.processes > self._nodes[facts.node].processes:
            return f"node {facts.node} started with {self._nodes[facts.node].processes} processes; give it no more"
        if self._is_alive(facts.node):
            return f"node {facts.node} is part of the run; give each machine its own --node"
        return ""
