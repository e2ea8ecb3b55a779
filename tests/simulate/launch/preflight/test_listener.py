"""Callers that were handed over keep their connections when the listener closes; those that leave hold nobody up."""

from __future__ import annotations

import queue
import socket
import struct
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


def test_callers_that_reset_their_connections_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_POLL_S", 1.0)
    listener = listen("127.0.0.1", 0, "a test")
    address = listener.getsockname()
    for _ in range(20):
        sock = socket.create_connection(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        sock.sendall(b"hello")
        sock.close()
    handshakes = HandshakeListener(listener, Identity(0, Purpose.LINK, SECRET), handshake_s=5.0)
    begin = time.monotonic()
    calling = call(socket.create_connection(address), Identity(1, Purpose.LINK, SECRET), 0, Deadline(15.0))
    assert time.monotonic() - begin < 5
    calling.close()
    handshakes.close()
