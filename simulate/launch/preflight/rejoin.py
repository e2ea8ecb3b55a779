"""Rejoining: while a run is going on, node 0 accepts lost nodes again, by the same proof and rules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from simulate.launch import heartbeat
from simulate.launch.preflight.channel import PeerError
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.membership import Membership
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.settings import Preflight

_LOOK_EVERY_S = 0.5


@contextmanager
def accepting_rejoins(
    node_0: Preflight, nodes: Sequence[NodeFacts], payload: Callable[[], Any], is_alive: Callable[[int], bool]
) -> Iterator[None]:
    """Serve nodes that come back, in a thread that ends with the context.

    Each gets the nodes' facts and `payload()`. Where `is_alive` says that a node of its number still takes part, it is
    refused.
    """
    present = list(nodes)
    members = Membership(node_0, nodes[0], is_running=True)
    handshakes, closing = members.listen(), threading.Event()

    def objection(facts: NodeFacts) -> str:
        """Return why a node may not come back, "" where it may."""
        if errors := compare([present[0], facts]).errors:
            return errors[0]
        if facts.processes > present[facts.node].processes:
            return f"node {facts.node} started with {present[facts.node].processes} processes; give it no more"
        if is_alive(facts.node):
            return f"node {facts.node} is part of the run; give each machine its own --node"
        return ""

    def serve() -> None:
        while not closing.is_set():
            facts = members.admit(handshakes.next(Deadline(_LOOK_EVERY_S)), objection)
            if facts is None:
                continue
            # A node may come back with another address.
            present[facts.node] = facts
            known = [node.model_dump() for node in present]
            try:
                answer = {"kind": "late", "nodes": known, "payload": payload()}
                members.channels[facts.node].send(answer, Deadline(heartbeat.ANSWER_S))
            except (PeerError, RuntimeError) as error:  # RuntimeError: the payload's store is gone
                members.log_refusal(facts.address, str(error))
            members.forget(facts.node)  # it has all that it came for

    thread = threading.Thread(target=serve, name="preflight-rejoin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()
        handshakes.close()
