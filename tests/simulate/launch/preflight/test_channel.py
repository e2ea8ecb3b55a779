"""Messages: only whole, fresh, authentic ones in order come through, unreadable on the way, in time."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.launch.preflight.channel import (
    MAX_MESSAGE_BYTES,
    BadFrameError,
    Channel,
    PeerError,
    PeerGoneError,
    PeerSilentError,
    hang_up,
)
from simulate.launch.preflight.deadline import Deadline
from tests.simulate.launch.preflight.nodes import channel_pair

SOON_S = 0.2
MESSAGE = {"kind": "facts", "number": 3, "text": "ä\n"}
APPLICATION_DATA = 23
"""Type of TLS's records once a handshake is over."""


def send_wire(sender: Channel, content: bytes | bytearray) -> None:
    """Put bytes on the wire as somebody between the two would."""
    socket.socket.sendall(sender.sock, content)


def wire_bytes(sender: Channel, receiver: Channel) -> bytes:
    """Return what sending MESSAGE puts on the wire, taken off it."""
    sender.send(MESSAGE, Deadline(1))
    head = socket.socket.recv(receiver.sock, 5, socket.MSG_WAITALL)
    return head + socket.socket.recv(receiver.sock, struct.unpack("!BHH", head)[2], socket.MSG_WAITALL)


def test_messages_come_through_in_both_directions() -> None:
    with channel_pair() as (one, other):
        for number in range(3):
            one.send({"kind": "count", "number": number}, Deadline(1))
            one.send(MESSAGE, Deadline(1))
            assert other.receive(Deadline(1)) == {"kind": "count", "number": number}
            assert other.receive(Deadline(1)) == MESSAGE
            other.send(MESSAGE, Deadline(1))
            assert one.receive(Deadline(1)) == MESSAGE


def test_a_message_is_one_record_of_tls_1_3_that_shows_nothing() -> None:
    with channel_pair() as (one, other):
        assert one.sock.version() == other.sock.version() == "TLSv1.3"
        raw = wire_bytes(one, other)
        assert raw[0] == APPLICATION_DATA
        assert b"kind" not in raw and b"facts" not in raw
        assert raw != wire_bytes(one, other)


def test_the_longest_message_comes_through() -> None:
    with channel_pair() as (one, other):
        message = {"kind": "x", "text": "x" * (MAX_MESSAGE_BYTES - len('{"kind":"x","text":""}\n'))}
        thread = threading.Thread(target=one.send, args=(message, Deadline(5)))
        thread.start()
        assert other.receive(Deadline(5)) == message
        thread.join(5)


def test_a_replayed_record_is_refused() -> None:
    with channel_pair() as (one, other):
        raw = wire_bytes(one, other)
        send_wire(one, raw)
        assert other.receive(Deadline(1)) == MESSAGE
        send_wire(one, raw)
        with pytest.raises(BadFrameError, match="does not verify"):
            other.receive(Deadline(1))


def test_a_record_that_is_left_out_is_noticed() -> None:
    with channel_pair() as (one, other):
        wire_bytes(one, other)
        one.send(MESSAGE, Deadline(1))
        with pytest.raises(BadFrameError, match="does not verify"):
            other.receive(Deadline(1))


def test_a_record_turned_back_to_its_sender_is_refused() -> None:
    with channel_pair() as (one, other):
        send_wire(other, wire_bytes(one, other))
        with pytest.raises(BadFrameError, match="does not verify"):
            one.receive(Deadline(1))


@given(position=st.integers(0, 60), flip=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(position: int, flip: int) -> None:
    with channel_pair() as (one, other):
        raw = bytearray(wire_bytes(one, other))
        raw[position] ^= flip
        send_wire(one, raw)
        with pytest.raises(PeerError):
            other.receive(Deadline(0.02))


def test_a_truncated_record_is_refused() -> None:
    for cut in (1, 20, 40):
        with channel_pair() as (one, other):
            send_wire(one, wire_bytes(one, other)[:-cut])
            one.close()
            with pytest.raises(PeerGoneError, match="closed the connection"):
                other.receive(Deadline(1))


def test_a_message_that_is_cut_off_is_refused() -> None:
    with channel_pair() as (one, other):
        one.sock.sendall(b'{"kind":"done"}')  # without the end of its line
        one.close()
        with pytest.raises(PeerGoneError, match="closed the connection"):
            other.receive(Deadline(1))


def test_an_oversized_message_is_refused_before_its_memory_is_taken() -> None:
    with channel_pair() as (one, other):
        sending = threading.Thread(target=_send_until_refused, args=(one, bytes(8 * MAX_MESSAGE_BYTES)))
        sending.start()
        tracemalloc.start()
        with pytest.raises(BadFrameError, match="over the limit of 1,048,576 bytes"):
            other.receive(Deadline(5))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        other.close()
        sending.join(5)
        assert peak_bytes < 3 * MAX_MESSAGE_BYTES


def _send_until_refused(channel: Channel, content: bytes) -> None:
    with contextlib.suppress(OSError):  # the receiver hangs up
        channel.sock.sendall(content)


def test_an_oversized_message_is_not_sent() -> None:
    with channel_pair() as (one, _), pytest.raises(ValueError, match="the limit is"):
        one.send({"kind": "x", "text": "x" * MAX_MESSAGE_BYTES}, Deadline(1))


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"{", b"[1]", b"{}", b'{"kind": 3}', b"null", b"[" * 100_000, b'"kind"', b"1" * 5000]
)
def test_an_authentic_line_that_is_no_message_is_refused(body: bytes) -> None:
    with channel_pair() as (one, other):
        one.sock.sendall(body + b"\n")
        with pytest.raises(BadFrameError, match=r"not JSON|no object with a kind"):
            other.receive(Deadline(1))


def test_garbage_is_refused() -> None:
    with channel_pair() as (one, other):
        send_wire(one, b"GET / HTTP/1.1\r\nHost: somewhere\r\nAccept: everything\r\n\r\n")
        with pytest.raises(BadFrameError, match="does not verify"):
            other.receive(Deadline(1))


def test_a_silent_peer_is_given_up_in_time() -> None:
    with channel_pair() as (_, other):
        begin = time.monotonic()
        with pytest.raises(PeerSilentError, match=r"did not answer within 0\.2 s"):
            other.receive(Deadline(SOON_S))
        assert SOON_S <= time.monotonic() - begin < SOON_S + 0.5


@pytest.mark.parametrize(
    "drip", [lambda one: one.sock.send(b" "), lambda one: send_wire(one, b"\x17")], ids=["tls", "raw"]
)
def test_dripping_bytes_do_not_move_the_deadline(drip: Callable[[Channel], object]) -> None:
    with channel_pair() as (one, other):
        stop = threading.Event()

        def drip_on() -> None:
            while not stop.wait(0.03):
                drip(one)

        thread = threading.Thread(target=drip_on)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(PeerError):  # silent, or a record that begins with too many of these bytes
            other.receive(Deadline(SOON_S))
        elapsed_s = time.monotonic() - begin
        stop.set()
        thread.join()
        assert elapsed_s < SOON_S + 0.5


def test_a_peer_that_takes_nothing_is_given_up_in_time() -> None:
    with channel_pair() as (one, _), pytest.raises(PeerSilentError, match="took nothing"):
        one.send_raw(memoryview(bytes(64 << 20)), Deadline(SOON_S))  # more than the system buffers


def test_a_peer_that_takes_little_by_little_does_not_move_the_deadline() -> None:
    with channel_pair() as (one, other):
        stop = threading.Event()

        def sip() -> None:
            while not stop.wait(0.02):
                socket.socket.recv(other.sock, 1 << 14)

        thread = threading.Thread(target=sip)
        thread.start()
        begin, deadline = time.monotonic(), Deadline(SOON_S)
        with pytest.raises(PeerSilentError, match="took nothing"):
            for _ in range(64):  # more than the system buffers
                one.send({"kind": "x", "text": "x" * (MAX_MESSAGE_BYTES // 2)}, deadline)
        elapsed_s = time.monotonic() - begin
        stop.set()
        thread.join()
        assert elapsed_s < SOON_S + 0.5


def test_a_deadline_that_is_over_is_over() -> None:
    with channel_pair() as (one, other):
        one.send(MESSAGE, Deadline(1))
        for act in (lambda: other.receive(Deadline(0)), lambda: other.send(MESSAGE, Deadline(0))):
            with pytest.raises(PeerSilentError):
                act()


def test_a_connection_that_was_hung_up_sends_nothing_in_plain() -> None:
    with channel_pair() as (one, other):
        hang_up(one.sock)
        for act in (lambda: one.send(MESSAGE, Deadline(1)), lambda: one.receive(Deadline(1))):
            with pytest.raises(PeerGoneError):
                act()
        assert one.sock._sslobj is not None  # type: ignore[attr-defined]  # without it SSLSocket sends plain text
        assert socket.socket.recv(other.sock, 1) == b""


def test_raw_bytes_go_between_messages() -> None:
    with channel_pair() as (one, other):
        buffer = memoryview(bytearray(1000))
        for _ in range(2):
            one.send(MESSAGE, Deadline(1))
            one.send_raw(bytes(range(200)), Deadline(1))
            one.send(MESSAGE, Deadline(1))
            assert other.receive(Deadline(1)) == MESSAGE
            assert bytes(buffer[: other.receive_raw(buffer[:200], Deadline(1))]) == bytes(range(200))
            assert other.receive(Deadline(1)) == MESSAGE


def test_a_raw_byte_too_many_is_noticed() -> None:
    with channel_pair() as (one, other):
        one.send_raw(b"+", Deadline(1))
        one.send(MESSAGE, Deadline(1))
        with pytest.raises(BadFrameError, match="does not verify"):
            other.receive(Deadline(1))


def test_a_closed_connection_is_seen_without_reading() -> None:
    with channel_pair() as (one, other):
        assert not other.closed
        one.send(MESSAGE, Deadline(1))
        assert not other.closed
        assert other.receive(Deadline(1)) == MESSAGE
        one.close()
        assert other.closed
        other.close()
        assert other.closed
