"""Callers without the secret, and nodes that break the protocol: they hold nobody up, and learn nothing."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time

import pytest

from simulate.common.errors import InputError, RunFailedError
from simulate.launch.preflight import channel as channel_module
from simulate.launch.preflight import handshake as handshake_module
from simulate.launch.preflight import listener as listener_module
from simulate.launch.preflight import membership as membership_module
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call
from simulate.launch.preflight.secret import Secret
from tests.simulate.launch.preflight.nodes import (
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

WRONG_TEXT = "incorrect-horse-battery-staple"
WRONG = Secret(WRONG_TEXT.encode())


def told(node: Node, part: str) -> bool:
    return any(part in line for line in node.lines)


def test_a_wrong_secret_is_refused_and_the_right_one_still_awaited() -> None:
    hub, joiner = crew(2)
    stranger = Node(dataclasses.replace(joiner.settings, secret=WRONG), facts())
    with started(hub):
        stranger.run()
        joiner.run()
    assert isinstance(stranger.error, InputError)
    assert "its secret is another one; give all nodes the same --secret-file or LTE_SECRET" in str(stranger.error)
    assert told(hub, "refused 127.0.0.1: has the wrong secret")
    assert (hub.error, joiner.error) == (None, None)


def test_a_missing_node_is_named_with_who_was_refused() -> None:
    hub, joiner = crew(2, join_timeout_s=0.8)
    stranger = Node(dataclasses.replace(joiner.settings, secret=WRONG), facts())
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


def test_a_stranger_hears_a_challenge_and_a_close_and_nothing_else() -> None:
    hub, joiner = crew(2)
    with started(hub):
        with connect(hub) as sock:
            sock.sendall(b"LTEp\0\2\1" + bytes(3) + b"\1" + bytes(4) + bytes(32) + bytes(32))
            heard = b""
            while piece := sock.recv(1000):
                heard += piece
        with connect(hub) as sock:
            sock.sendall(b"hello?")
            assert sock.recv(1000) == b""
        joiner.run()
    assert len(heard) == 6 + 32  # version and nonce
    assert joiner.error is None


def test_silent_callers_keep_nobody_waiting() -> None:
    hub, joiner = crew(2, handshake_timeout_s=30.0)
    with started(hub):
        silent = [connect(hub) for _ in range(10)]
        silent[0].sendall(b"LTEp")  # a start that never goes on
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
    "raw", [b"GET / HTTP/1.1\r\n" * 4, b"\xff" * 64, b"\0\0\0\x10" + bytes(48)], ids=["text", "long", "forged"]
)
def test_an_authenticated_caller_that_breaks_the_protocol_is_refused(raw: bytes) -> None:
    hub, joiner = crew(2)
    with started(hub):
        channel = call(connect(hub), Identity(1, Purpose.CONTROL, SECRET), 0, Deadline(2))
        channel.sock.sendall(raw)
        wait_until(lambda: told(hub, "refused"))
        channel.close()
        joiner.run()
    assert told(hub, "over the limit") or told(hub, "does not verify")
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
    hub.settings = dataclasses.replace(hub.settings, links=dataclasses.replace(hub.settings.links, reach_s=0.2))
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
        (b"LTEp\0\3" + bytes(40), 9, InputError, "speaks preflight protocol 3, this lte speaks 2; install the same"),
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


def test_no_secret_is_in_anything_said_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = bytearray()
    real = channel_module.send_all

    def recording(sock: socket.socket, content: bytes, deadline: Deadline) -> None:
        sent.extend(content)
        real(sock, content, deadline)

    monkeypatch.setattr(channel_module, "send_all", recording)
    monkeypatch.setattr(handshake_module, "send_all", recording)
    hub, joiner = crew(2)
    stranger = Node(dataclasses.replace(joiner.settings, secret=WRONG), facts())
    odd = Node(dataclasses.replace(joiner.settings, nodes=3), facts())
    alone = Node(dataclasses.replace(joiner.settings, join="127.0.0.1:1", join_timeout_s=0.1), facts())
    with started(hub):
        for node in (stranger, odd, alone, joiner):
            node.run()
    assert joiner.error is None and all(node.error is not None for node in (stranger, odd, alone))
    output = "\n".join(node.output for node in (hub, joiner, stranger, odd, alone))
    assert "Secret(hidden)" in output and "Traceback" in output  # tracebacks with their local variables
    assert len(sent) > 1000
    for text in (SECRET_TEXT, WRONG_TEXT):
        for form in (text, text.encode().hex(), repr(text.encode())[2:-1]):
            assert form not in output
        assert text.encode() not in sent
    for key in (SECRET._key, WRONG._key):
        assert repr(key)[2:-1] not in output and key.hex() not in output and key not in sent
