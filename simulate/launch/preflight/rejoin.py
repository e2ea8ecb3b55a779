"""Node 0 while the run goes on: nodes that were lost come back by the same line, proof and facts as before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from simulate.launch.preflight.address import Endpoint
from simulate.launch.preflight.channel import PeerError
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, Refusal, listen
from simulate.launch.preflight.membership import ALIVE_S, Membership
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.secret import Secret
from simulate.launch.preflight.settings import Log, Settings

_LOOK_EVERY_S = 0.5


class RejoinServer:
    """A door that stays open as long as the `with`; ends all its threads then."""

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
        self._roster = Membership(settings, endpoint, log, time.time)
        self._roster.is_late = True
        self._roster.facts[0] = self._nodes[0]
        listener = listen(address, endpoint.port, f"--join {endpoint}")
        me = Identity(0, Purpose.CONTROL, secret)
        self._door = HandshakeListener(listener, me, settings.handshake_timeout_s, self._roster.greet)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="preflight-latecomers", daemon=True)

    def __enter__(self) -> RejoinServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._door.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            event = self._door.next(Deadline(_LOOK_EVERY_S))
            if isinstance(event, Refusal):
                self._roster.note_refusal(event.host, event.why)
            elif isinstance(event, AcceptedPeer):
                self._let_in(event)

    def _let_in(self, arrival: AcceptedPeer) -> None:
        facts: NodeFacts = arrival.greeting
        self._roster.admit(arrival.channel, facts, self._objection)
        if self._roster.channels.get(facts.node) is not arrival.channel:
            return
        self._nodes[facts.node] = facts
        nodes = [node.model_dump() for node in self._nodes]
        try:
            arrival.channel.send({"kind": "late", "nodes": nodes, "payload": self._payload()}, Deadline(ALIVE_S))
        except (PeerError, RuntimeError) as error:  # RuntimeError: of a store that is gone
            self._roster.note_refusal(facts.address, str(error))
        self._roster.dismiss(facts.node)

    def _objection(self, facts: NodeFacts) -> str:
        errors = compare([self._nodes[0], facts]).errors
        if errors:
            return errors[0]
        if facts.processes > self._nodes[facts.node].processes:
            return f"node {facts.node} started with {self._nodes[facts.node].processes} processes; give it no more"
        if self._is_alive(facts.node):
            return f"node {facts.node} is part of the run; give each machine its own --node"
        return ""
