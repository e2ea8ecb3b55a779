"""Who is handed over at the door keeps the connection when the door closes."""

from __future__ import annotations

import queue
import socket
import time
from typing import Any

import pytest

from simulate.launch.preflight import listener as door_module
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, listen
from tests.simulate.launch.preflight.nodes import SECRET


class SlowQueue(queue.Queue[Any]):
    """Lets whoever puts something in fall asleep right after it."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        time.sleep(0.2)


def test_a_door_that_closes_at_once_hangs_up_on_nobody_who_was_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module.queue, "Queue", SlowQueue)
    listener = listen("127.0.0.1", 0, "a test")
    address = listener.getsockname()
    door = HandshakeListener(listener, Identity(0, Purpose.LINK, SECRET), handshake_s=5.0)
    with socket.create_connection(address) as sock:
        calling = call(sock, Identity(1, Purpose.LINK, SECRET), 0, Deadline(5.0))
        arrival = door.next(Deadline(5.0))
        door.close()
        assert isinstance(arrival, AcceptedPeer)
        calling.send({"kind": "hello"}, Deadline(5.0))
        assert arrival.channel.receive(Deadline(5.0)) == {"kind": "hello"}
        arrival.channel.close()
