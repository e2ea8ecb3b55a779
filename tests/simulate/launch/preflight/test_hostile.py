"""Callers without the secret, and nodes that break the protocol: they hold nobody up, and learn nothing."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from simulate.common.errors import InputError, RunFailedError
from simulate.launch.preflight import channel as channel_module
from simulate.launch.preflight import listener as listener_module
from simulate.launch.preflight import membership as membership_module
from simulate.launch.preflight.channel import Channel
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import PROTOCOL, Identity, Purpose, call
from tests.simulate.launch.preflight.nodes import (
    OTHER,
    OTHER_TEXT,
    QUICK,
    SECRET,
    SECRET_TEXT,
    Node,
    connect,
    crew,
    facts,
    join_by_hand,
    started,
    wait_until,
)

ALERT_BYTES = 7
"""Bytes by which TLS ends a handshake, if it says anything."""


def told(node: Node, part: str) -> bool:
    return any(part in line for line in node.lines)


def test_a_wrong_secret_is_refused_and_the_right_one_still_awaited() -> None:
    hub, joiner = crew(2)
    stranger = Node(dataclasses.replace(joiner.settings, secret=OTHER), facts())
    with started(hub):
        stranger.run()
        joiner.run()
    assert isinstance(stranger.error, InputError)
    assert "its secret is another one; give all nodes the same --secret-file or LTE_SECRET" in str(stranger.error)
    assert told(hub, "refused 127.0.0.1: has the wrong secret")
    assert (hub.error, joiner.error) == (None, None)


def test_a_missing_node_is_named_with_who_was_refused() -> None:
    hub, joiner = crew(2, join_timeout_s=0.8)
    stranger = Node(dataclasses.replace(joiner.settings, secret=OTHER), facts())
    with started(hub):
        stranger.run()
    assert "(refused: 127.0.0.1: has the wrong secret)" in str(hub.error)


def test_garbage_is_refused_and_told_from_a_wrong_secret() -> None:
    hub, joiner = crew(2)
    with started(hub):
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"\x16\x03\x01"):
            with connect(hub) as sock:
                sock.sendall(garbage)
        connect(hub).close()
        wait_until(lambda: told(hub, "something else") and told(hub, "before it proved itself"))
        joiner.run()
    assert not told(hub, "wrong secret")
    assert (hub.error, joiner.error) == (None, None)


def test_a_stranger_hears_tls_and_a_close_and_nothing_else() -> None:
    hub, joiner = crew(2)
    strangers = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    strangers.check_hostname, strangers.verify_mode = False, ssl.CERT_NONE
    with started(hub):
        with strangers.wrap_socket(connect(hub)) as tls, pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            tls.recv(1000)
        with connect(hub) as sock:
            sock.sendall(b"hello?")
            heard = b""
            while piece := sock.recv(1000):
                heard += piece
        joiner.run()
    assert len(heard) <= ALERT_BYTES
    assert joiner.error is None


def test_silent_callers_keep_nobody_waiting() -> None:
    hub, joiner = crew(2, handshake_timeout_s=30.0)
    with started(hub):
        silent = [connect(hub) for _ in range(10)]
        silent[0].sendall(b"\x16\x03\x01")  # a start that never goes on
        begin = time.monotonic()
        joiner.run()
        assert time.monotonic() - begin < 5
        for sock in silent:
            sock.close()
    assert (hub.error, joiner.error) == (None, None)


def test_a_silent_caller_is_sent_away_in_time() -> None:
    hub, joiner = crew(2, handshake_timeout_s=0.3)
    with started(hub):
        with connect(hub) as sock:
            begin = time.monotonic()
            assert sock.recv(1) == b""
            assert 0.2 < time.monotonic() - begin < 2
        wait_until(lambda: told(hub, "did not prove itself within 0.3 s"))
        joiner.run()
    assert joiner.error is None


def test_more_callers_than_there_is_room_for_push_out_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MAX_UNPROVEN", 4)
    hub, joiner = crew(2, handshake_timeout_s=30.0)
    with started(hub):
        silent = [connect(hub) for _ in range(12)]
        wait_until(lambda: sum(t.name == "preflight-caller" for t in threading.enumerate()) == 4)
        assert silent[0].recv(1) == b""
        joiner.run()
        for sock in silent:
            sock.close()
    assert (hub.error, joiner.error) == (None, None)


def test_refusals_fill_neither_memory_nor_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership_module, "_MAX_REFUSED", 2)
    hub, joiner = crew(2)
    with started(hub):
        for _ in range(20):
            with connect(hub) as sock:
                sock.sendall(b"garbage that is long enough")
                sock.recv(1)
        joiner.run()
    assert sum(line.startswith("refused") for line in hub.lines) == 1
    assert joiner.error is None


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (lambda sock: sock.sendall(b"GET / HTTP/1.1\r\n" * 4), "not JSON"),
        (lambda sock: sock.sendall(bytes(channel_module.MAX_MESSAGE_BYTES + 1)), "over the limit"),
        (lambda sock: socket.socket.sendall(sock, b"\x17\x03\x03\0\x20" + bytes(32)), "does not verify"),
    ],
    ids=["text", "long", "forged"],
)
def test_an_authenticated_caller_that_breaks_the_protocol_is_refused(
    raw: Callable[[ssl.SSLSocket], None], why: str
) -> None:
    hub, joiner = crew(2)
    with started(hub):
        channel = call(connect(hub), Identity(1, Purpose.CONTROL, SECRET), 0, Deadline(2))
        raw(channel.sock)
        wait_until(lambda: told(hub, "refused"))
        channel.close()
        joiner.run()
    assert told(hub, why)
    assert joiner.error is None


def test_a_caller_without_facts_is_refused() -> None:
    hub, joiner = crew(2)
    with started(hub):
        for message in ({"kind": "payload"}, {"kind": "facts"}, {"kind": "facts", "facts": {"node": 1}}):
            channel = call(connect(hub), Identity(1, Purpose.CONTROL, SECRET), 0, Deadline(2))
            channel.send(message, Deadline(1))
            with pytest.raises(channel_module.PeerGoneError):
                channel.receive(Deadline(2))
            channel.close()
        joiner.run()
    assert told(hub, "where its facts were due") and told(hub, "facts that cannot be read")
    assert joiner.error is None


def test_an_authenticated_caller_that_stalls_keeps_nobody_waiting() -> None:
    hub, joiner = crew(2)
    with started(hub):
        stalled = call(connect(hub), Identity(1, Purpose.CONTROL, SECRET), 0, Deadline(2))
        begin = time.monotonic()
        joiner.run()
        assert time.monotonic() - begin < 5
        stalled.close()
    assert (hub.error, joiner.error) == (None, None)


def test_a_node_that_stalls_after_joining_is_named_in_time() -> None:
    hub, _ = crew(2, answer_timeout_s=0.3)
    hub.settings = dataclasses.replace(hub.settings, links=QUICK.model_copy(update={"reach_s": 0.2}))
    begin = time.monotonic()
    with started(hub):
        channel = join_by_hand(hub, 1)
        wait_until(lambda: hub.error is not None)
        channel.close()
    assert time.monotonic() - begin < 3
    assert "node 1 (127.0.0.1) did not answer within 0.7 s while links were measured" in str(hub.error)
    assert isinstance(hub.error, RunFailedError)


class FakeHub(threading.Thread):
    """Something that listens where node 0 should be."""

    def __init__(self, say: bytes, wait_s: float = 0.0) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.say, self.wait_s, self.stop = say, wait_s, threading.Event()
        self.start()

    def run(self) -> None:
        self.listener.settimeout(0.05)
        socks = []
        while not self.stop.is_set():
            try:
                socks.append(self.listener.accept()[0])
            except TimeoutError:
                continue
            if self.say:
                socks[-1].sendall(self.say)
            if not self.wait_s:
                socks[-1].close()
        for sock in socks:
            sock.close()
        self.listener.close()

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *arguments: object) -> None:
        self.stop.set()
        self.join(5)


@pytest.mark.parametrize(
    ("say", "wait_s", "kind", "line"),
    [
        (
            b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(40),
            9,
            InputError,
            "something else than an lte node does; is that node 0's",
        ),
        (b"", 9, RunFailedError, "it did not answer within"),
        (b"", 0, RunFailedError, "is that node 0 of this run, or another program?"),
    ],
)
def test_something_else_in_node_0s_place_is_named(say: bytes, wait_s: float, kind: type, line: str) -> None:
    with FakeHub(say, wait_s) as fake:
        _, joiner = crew(2, join=f"127.0.0.1:{fake.listener.getsockname()[1]}", join_timeout_s=0.45)
        joiner.settings = dataclasses.replace(joiner.settings, handshake_timeout_s=0.3)
        begin = time.monotonic()
        joiner.run()
        assert time.monotonic() - begin < 2.5
    assert type(joiner.error) is kind, joiner.error
    assert line in str(joiner.error)


def test_another_version_in_node_0s_place_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _, joiner = crew(2, join=f"127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=joiner.run)
        thread.start()
        channel = Channel(SECRET.server.wrap_socket(listener.accept()[0], server_side=True))
        channel.receive(Deadline(2))
        channel.send({"kind": "hello", "protocol": PROTOCOL + 1}, Deadline(2))
        thread.join(5)
        channel.close()
    assert isinstance(joiner.error, InputError)
    assert f"speaks preflight protocol {PROTOCOL + 1}, this lte speaks {PROTOCOL}; install the same" in str(
        joiner.error
    )


def test_nothing_of_a_preflight_can_be_read_on_the_wire() -> None:
    """A proxy stands between the nodes and keeps all bytes of their connection."""
    hub, joiner = crew(2)
    said, copying = bytearray(), list[threading.Thread]()

    def copy(source: socket.socket, target: socket.socket) -> None:
        while piece := source.recv(1 << 16):
            said.extend(piece)
            target.sendall(piece)
        channel_module.hang_up(target)

    with socket.create_server(("127.0.0.1", 0)) as proxy, started(hub):
        endpoint = f"127.0.0.1:{proxy.getsockname()[1]}"
        joiner.settings = dataclasses.replace(joiner.settings, join=endpoint)
        thread = threading.Thread(target=joiner.run)
        thread.start()
        near, far = proxy.accept()[0], connect(hub)
        copying = [threading.Thread(target=copy, args=ends) for ends in ((near, far), (far, near))]
        for copier in copying:
            copier.start()
        for ended in (thread, *copying):
            ended.join(10)
        near.close()
        far.close()
    assert (hub.error, joiner.error) == (None, None)
    known = {**joiner.facts.model_dump(), "kind": "facts"}
    words = [key.encode() for key in known] + [b"method.rank", b"ab12ab12", b"2.13.0+cpu", b"welcome", b"meeting"]
    assert all(word in json.dumps(known).encode() for word in words[:-2])  # they are what is said
    assert len(said) > 3000
    assert [word for word in words if word in said and len(word) > 4] == []


def test_no_secret_is_in_anything_said_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = bytearray()
    real = Channel.send

    def recording(channel: Channel, message: dict[str, Any], deadline: Deadline) -> None:
        sent.extend(json.dumps(message).encode())
        real(channel, message, deadline)

    monkeypatch.setattr(Channel, "send", recording)
    hub, joiner = crew(2)
    stranger = Node(dataclasses.replace(joiner.settings, secret=OTHER), facts())
    odd = Node(dataclasses.replace(joiner.settings, nodes=3), facts())
    alone = Node(dataclasses.replace(joiner.settings, join="127.0.0.1:1", join_timeout_s=0.1), facts())
    with started(hub):
        for node in (stranger, odd, alone, joiner):
            node.run()
    assert joiner.error is None and all(node.error is not None for node in (stranger, odd, alone))
    output = "\n".join(node.output for node in (hub, joiner, stranger, odd, alone))
    assert "Secret(hidden)" in output and "Traceback" in output  # tracebacks with their local variables
    assert len(sent) > 1000
    for text in (SECRET_TEXT, OTHER_TEXT):
        line = text.splitlines()[1]
        key = base64.b64decode(line)[-32:]
        assert len(line) == 64
        for form in (line, key.hex(), repr(key)[2:-1]):
            assert form not in output
            assert form.encode() not in sent
