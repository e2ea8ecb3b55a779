"""A caller that was handed over keeps its connection when the listener closes."""

from __future__ import annotations

import queue
import socket
import time
from typing import Any

import pytest

from simulate.launch.preflight import listener as listener_module
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, listen
from tests.simulate.launch.preflight.nodes import SECRET


class SlowQueue(queue.Queue[Any]):
    """Lets whoever puts something in fall asleep right after it."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        time.sleep(0.2)


def test_a_listener_that_closes_at_once_keeps_callers_that_were_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module.queue, "Queue", SlowQueue)
    listener = listen("127.0.0.1", 0, "a test")
    address = listener.getsockname()
    handshakes = HandshakeListener(listener, Identity(0, Purpose.LINK, SECRET), handshake_s=5.0)
    with socket.create_connection(address) as sock:
        calling = call(sock, Identity(1, Purpose.LINK, SECRET), 0, Deadline(5.0))
        accepted = handshakes.next(Deadline(5.0))
        handshakes.close()
        assert isinstance(accepted, AcceptedPeer)
        calling.send({"kind": "hello"}, Deadline(5.0))
        assert accepted.channel.receive(Deadline(5.0)) == {"kind": "hello"}
        accepted.channel.close()
        calling.close()
