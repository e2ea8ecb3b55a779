"""Frames: only whole, fresh, authentic ones in order come through, and nothing waits longer than it should."""

from __future__ import annotations

import hmac
import struct
import threading
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.launch.preflight.channel import (
    MAX_FRAME_BYTES,
    BadFrameError,
    Channel,
    PeerError,
    PeerGoneError,
    PeerSilentError,
    receive_exactly,
    send_all,
)
from simulate.launch.preflight.deadline import Deadline
from tests.simulate.launch.preflight.nodes import channel_pair

SOON_S = 0.2
MESSAGE = {"kind": "facts", "number": 3, "text": "ä"}


def wire_bytes(sender: Channel, receiver: Channel) -> bytes:
    """Return what sending MESSAGE puts on the wire, taken off it."""
    sender.send(MESSAGE, Deadline(1))
    head = receive_exactly(receiver.sock, 36, Deadline(1))
    return head + receive_exactly(receiver.sock, struct.unpack("!I", head[:4])[0], Deadline(1))


def forged(sender: Channel, body: bytes) -> bytes:
    """Return a frame that verifies as the sender's first, whatever its body."""
    return struct.pack("!I32s", len(body), sender._send_key.mac("frame", bytes(8) + body)) + body


def test_messages_come_through_in_both_directions() -> None:
    with channel_pair() as (one, other):
        for number in range(3):
            one.send({"kind": "count", "number": number}, Deadline(1))
            assert other.receive(Deadline(1)) == {"kind": "count", "number": number}
            other.send(MESSAGE, Deadline(1))
            assert one.receive(Deadline(1)) == MESSAGE


def test_a_frame_is_length_mac_of_number_and_body_and_body() -> None:
    with channel_pair() as (one, other):
        one.send(MESSAGE, Deadline(1))
        other.receive(Deadline(1))
        raw = wire_bytes(one, other)  # the second frame: number 1
        body = b'{"kind":"facts","number":3,"text":"\\u00e4"}'
        key = one._send_key._key
        mac = hmac.digest(key, b"frame\0" + struct.pack("!Q", 1) + body, "sha256")
        assert raw == struct.pack("!I", len(body)) + mac + body


def test_a_replayed_frame_is_refused() -> None:
    with channel_pair() as (one, other):
        raw = wire_bytes(one, other)
        one.sock.sendall(raw)
        assert other.receive(Deadline(1)) == MESSAGE
        one.sock.sendall(raw)
        with pytest.raises(BadFrameError, match="does not verify"):
            other.receive(Deadline(1))


def test_a_frame_that_is_left_out_is_noticed() -> None:
    with channel_pair() as (one, other):
        wire_bytes(one, other)
        one.send(MESSAGE, Deadline(1))
        with pytest.raises(BadFrameError, match="does not verify"):
            other.receive(Deadline(1))


def test_a_frame_turned_back_to_its_sender_is_refused() -> None:
    with channel_pair() as (one, other):
        other.sock.sendall(wire_bytes(one, other))
        with pytest.raises(BadFrameError, match="does not verify"):
            one.receive(Deadline(1))


@given(position=st.integers(0, 70), flip=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(position: int, flip: int) -> None:
    with channel_pair() as (one, other):
        raw = bytearray(wire_bytes(one, other))
        raw[position] ^= flip
        one.sock.sendall(raw)
        with pytest.raises(PeerError):
            other.receive(Deadline(0.02))


def test_a_truncated_frame_is_refused() -> None:
    for cut in (1, 20, 40):
        with channel_pair() as (one, other):
            one.sock.sendall(wire_bytes(one, other)[:-cut])
            one.close()
            with pytest.raises(PeerGoneError, match="closed the connection"):
                other.receive(Deadline(1))


def test_an_oversized_frame_is_refused_before_its_memory_is_taken() -> None:
    with channel_pair() as (one, other):
        one.sock.sendall(struct.pack("!I32s", 2**32 - 1, b""))
        tracemalloc.start()
        with pytest.raises(BadFrameError, match="4,294,967,295 bytes, over the limit"):
            other.receive(Deadline(1))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < MAX_FRAME_BYTES


def test_an_oversized_message_is_not_sent() -> None:
    with channel_pair() as (one, _), pytest.raises(ValueError, match="the limit is"):
        one.send({"kind": "x", "text": "x" * MAX_FRAME_BYTES}, Deadline(1))


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"{", b"[1]", b"{}", b'{"kind": 3}', b"null", b"[" * 100_000, b'"kind"', b"1" * 5000]
)
def test_an_authentic_frame_that_is_no_message_is_refused(body: bytes) -> None:
    with channel_pair() as (one, other):
        one.sock.sendall(forged(one, body))
        with pytest.raises(BadFrameError, match=r"not JSON|no object with a kind"):
            other.receive(Deadline(1))


def test_garbage_is_refused() -> None:
    with channel_pair() as (one, other):
        one.sock.sendall(b"GET / HTTP/1.1\r\nHost: somewhere\r\nAccept: everything\r\n\r\n")
        with pytest.raises(BadFrameError, match="over the limit"):
            other.receive(Deadline(1))


def test_a_silent_peer_is_given_up_in_time() -> None:
    with channel_pair() as (_, other):
        begin = time.monotonic()
        with pytest.raises(PeerSilentError, match=r"did not answer within 0\.2 s"):
            other.receive(Deadline(SOON_S))
        assert SOON_S <= time.monotonic() - begin < SOON_S + 0.5


def test_dripping_bytes_do_not_move_the_deadline() -> None:
    with channel_pair() as (one, other):
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.03):
                one.sock.send(b"\0")

        thread = threading.Thread(target=drip)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(PeerSilentError):
            other.receive(Deadline(SOON_S))
        elapsed_s = time.monotonic() - begin
        stop.set()
        thread.join()
        assert elapsed_s < SOON_S + 0.5


def test_a_peer_that_takes_nothing_is_given_up_in_time() -> None:
    with channel_pair() as (one, _):
        content = memoryview(bytes(64 << 20))  # more than the system buffers
        with pytest.raises(PeerSilentError, match="took nothing"):
            send_all(one.sock, content, Deadline(SOON_S))


def test_a_deadline_that_is_over_is_over() -> None:
    with channel_pair() as (one, other):
        one.send(MESSAGE, Deadline(1))
        for act in (lambda: other.receive(Deadline(0)), lambda: other.send(MESSAGE, Deadline(0))):
            with pytest.raises(PeerSilentError):
                act()


def test_compare_digest_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with channel_pair() as (one, other):
        raw = bytearray(wire_bytes(one, other))
        raw[5] ^= 1  # in the MAC
        monkeypatch.setattr(hmac, "compare_digest", lambda given, expected: True)
        one.sock.sendall(raw)
        assert other.receive(Deadline(1)) == MESSAGE
        monkeypatch.setattr(hmac, "compare_digest", lambda given, expected: False)
        one.send(MESSAGE, Deadline(1))
        with pytest.raises(BadFrameError):
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
