"""A connection that sends JSON messages, each authenticated, numbered and limited in length.

Frame: length (4 bytes, big endian), HMAC-SHA256 (32 bytes) of the frame's number in its direction and the body, body
(UTF-8 JSON). Both ends count frames, as TLS does, so a frame that is repeated, left out or sent back does not verify.
Content is not encrypted. Every call has a deadline, since a peer may be slow on purpose. All messages of a preflight go
through a Channel, which handshake.py makes.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.secret import Secret

MAX_FRAME_BYTES = 1 << 20
_HEADER = struct.Struct("!I32s")
_NUMBER = struct.Struct("!Q")
Message = dict[str, Any]
"""A JSON object whose `kind` is a string."""


class PeerError(Exception):
    """A failure of a peer; the message follows the peer's name: "closed the connection"."""


class PeerGoneError(PeerError):
    """The connection is closed or broken."""


class PeerSilentError(PeerError):
    """The peer did not send, or take, everything before the deadline."""


class BadFrameError(PeerError):
    """The peer sent bytes that an authenticated peer of the protocol does not send."""


def receive_into(sock: socket.socket, view: memoryview, deadline: Deadline) -> int:
    """Receive at least one byte into view; returns the number of bytes. Raises PeerError."""
    with _peer_errors(sock, deadline, "did not answer"):
        count = sock.recv_into(view)
    if count == 0:
        raise PeerGoneError("closed the connection")
    return count


def receive_exactly(sock: socket.socket, size: int, deadline: Deadline) -> bytes:
    """Receive `size` bytes; the deadline holds for all of them together. Raises PeerError."""
    content = bytearray(size)
    view, got = memoryview(content), 0
    while got < size:
        got += receive_into(sock, view[got:], deadline)
    return bytes(content)


def send_all(sock: socket.socket, content: bytes | memoryview, deadline: Deadline) -> None:
    """Send all bytes before the deadline. Raises PeerError."""
    with _peer_errors(sock, deadline, "took nothing"):
        sock.sendall(content)


@contextlib.contextmanager
def _peer_errors(sock: socket.socket, deadline: Deadline, silent: str) -> Iterator[None]:
    """Give the socket the time that is left, and turn its errors into PeerError; `silent` says what the peer failed."""
    if deadline.over:
        raise PeerSilentError(f"{silent} within {deadline.seconds:.3g} s")
    sock.settimeout(deadline.left_s or 1e-6)  # 0 would mean non-blocking
    try:
        yield
    except TimeoutError:
        raise PeerSilentError(f"{silent} within {deadline.seconds:.3g} s") from None
    except OSError as error:
        raise PeerGoneError(f"broke the connection ({reason(error)})") from None


def reason(error: OSError) -> str:
    """Return the system's reason in lower case: "connection refused"."""
    if isinstance(error, TimeoutError):
        return "no answer"
    # Some errors have a number and no text, some neither.
    text = error.strerror or str(error) or type(error).__name__
    return text[0].lower() + text[1:]


def hang_up(sock: socket.socket) -> None:
    """Shut a connection down; a thread that reads it wakes up, and must still close it."""
    with contextlib.suppress(OSError):  # it was never connected, or is already closed
        sock.shutdown(socket.SHUT_RDWR)


def close_socket(sock: socket.socket) -> None:
    """Shut down and close a connection that no other thread uses."""
    hang_up(sock)
    sock.close()


class Channel:
    """An authenticated connection with node `peer`; one thread at a time sends, one receives."""

    def __init__(self, sock: socket.socket, peer: int, send_key: Secret, receive_key: Secret) -> None:
        self.sock = sock
        self.peer = peer
        """The other end's authenticated node number."""
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        # Messages are small: Nagle's algorithm would delay each by a round trip.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def peer_address(self) -> str:
        """The numeric address that the other end calls from."""
        return str(self.sock.getpeername()[0])

    def send(self, message: Message, deadline: Deadline) -> None:
        """Send one message. Raises PeerError; ValueError for one over MAX_FRAME_BYTES."""
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"a message has {len(body):,} bytes, the limit is {MAX_FRAME_BYTES:,}")
        # The frame's number goes into the MAC without being sent, so that no frame can be repeated or left out.
        mac = self._send_key.mac("frame", _NUMBER.pack(self._sent) + body)
        self._sent += 1
        send_all(self.sock, _HEADER.pack(len(body), mac) + body, deadline)

    def receive(self, deadline: Deadline) -> Message:
        """Receive one message. Raises PeerError."""
        # The length is not authenticated yet, so it must not make this end allocate more than the limit.
        size, mac = _HEADER.unpack(receive_exactly(self.sock, _HEADER.size, deadline))
        if size > MAX_FRAME_BYTES:
            raise BadFrameError(f"announced a message of {size:,} bytes, over the limit of {MAX_FRAME_BYTES:,}")
        body = receive_exactly(self.sock, size, deadline)
        expected = self._receive_key.mac("frame", _NUMBER.pack(self._received) + body)
        if not hmac.compare_digest(mac, expected):
            raise BadFrameError("sent a message that does not verify (forged, repeated or out of order)")
        # Counted only once verified: a forged frame ends the connection anyway.
        self._received += 1
        return _parse(body)

    @property
    def closed(self) -> bool:
        """Whether the other end has closed; bytes that it sent before stay unread."""
        try:
            readable, _, _ = select.select([self.sock], [], [], 0)
            return bool(readable) and self.sock.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):  # ValueError: closed at this end
            return True

    def hang_up(self) -> None:
        """Shut down a channel that another thread reads, and will close."""
        hang_up(self.sock)

    def close(self) -> None:
        """Close the connection."""
        close_socket(self.sock)


def _parse(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise BadFrameError("sent a message that is not JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise BadFrameError("sent a message that is no object with a kind")
    return message
