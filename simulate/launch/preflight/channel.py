"""A connection that carries JSON messages, a line each, over TLS 1.3; and the raw bytes that measure a link.

TLS encrypts, authenticates and orders what is sent, so that a message that is forged, repeated or left out ends the
connection; handshake.py makes a Channel once both ends have proved themselves. Ours are the limits: lines have a
longest length, and every call a deadline, since a peer may be slow on purpose.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from simulate.common.errors import RunFailedError
from simulate.common.toml_io import SchemaT
from simulate.launch.preflight.deadline import Deadline

MAX_MESSAGE_BYTES = 1 << 20
_RECORD_BYTES = 1 << 14
"""Most that TLS carries in one record."""
_CERTIFICATE_ALERTS = (
    "ALERT_UNKNOWN_CA", "ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE_UNKNOWN", "ALERT_DECRYPT_ERROR",
)  # fmt: skip
"""How OpenSSL's reasons end where the peer has refused this end's certificate."""
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


class WrongSecretError(PeerError):
    """The other end does not hold the same secret."""


@contextlib.contextmanager
def peer_errors(sock: socket.socket, deadline: Deadline, silent: str = "did not answer") -> Iterator[None]:
    """Give the socket the time that is left, and turn its errors into PeerError; `silent` says what the peer failed."""
    if deadline.over:
        raise PeerSilentError(f"{silent} within {deadline.seconds:.3g} s")
    try:
        sock.settimeout(deadline.left_s or 1e-6)  # 0 would mean non-blocking
        yield
    except TimeoutError:
        raise PeerSilentError(f"{silent} within {deadline.seconds:.3g} s") from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise PeerGoneError("closed the connection") from None
    except ssl.SSLError as error:
        if isinstance(error, ssl.SSLCertVerificationError) or str(error.reason).endswith(_CERTIFICATE_ALERTS):
            raise WrongSecretError("has the wrong secret") from None
        raise BadFrameError("sent what does not verify (forged, repeated or out of order)") from None
    except OSError as error:
        raise PeerGoneError(f"broke the connection ({reason(error)})") from None


@contextlib.contextmanager
def naming(peer: str, rest: str = "") -> Iterator[None]:
    """Turn a peer's failure into RunFailedError, which names it: "node 2 (10.0.0.7) closed the connection"."""
    try:
        yield
    except PeerError as error:
        raise RunFailedError(f"{peer} {error}{rest}") from None


def parse(schema: type[SchemaT], given: Any, what: str) -> SchemaT:
    """Validate a part of a message, since what a peer says is input, too; raises BadFrameError."""
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or what
        raise BadFrameError(f"sent {what} that cannot be read ({field}: {first['msg']})") from None


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
        # Not SSLSocket's: that also takes TLS off, so that the other thread would go on in plain text.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def close_socket(sock: socket.socket) -> None:
    """Shut down and close a connection that no other thread uses."""
    hang_up(sock)
    sock.close()


class Channel:
    """An encrypted connection with node `peer`, used by one thread at a time."""

    def __init__(self, sock: ssl.SSLSocket, peer: int = -1) -> None:
        self.sock = sock
        self.peer = peer
        """The other end's node number, once its handshake is over."""
        self._received = bytearray()
        # Messages are small: Nagle's algorithm would delay each by a round trip.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def peer_address(self) -> str:
        """The numeric address that the other end calls from."""
        return str(self.sock.getpeername()[0])

    def send(self, message: Message, deadline: Deadline) -> None:
        """Send one message. Raises PeerError; ValueError for one over MAX_MESSAGE_BYTES."""
        # JSON escapes line breaks in strings, so that one ends a message.
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message has {len(line):,} bytes, the limit is {MAX_MESSAGE_BYTES:,}")
        left = memoryview(line)
        # Not sendall, which gives each record all the time anew.
        while left:
            with peer_errors(self.sock, deadline, "took nothing"):
                left = left[self.sock.send(left) :]

    def receive(self, deadline: Deadline) -> Message:
        """Receive one message. Raises PeerError."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_MESSAGE_BYTES:
                raise BadFrameError(f"sent a message over the limit of {MAX_MESSAGE_BYTES:,} bytes")
            with peer_errors(self.sock, deadline):
                piece = self.sock.recv(_RECORD_BYTES)
            if not piece:
                raise PeerGoneError("closed the connection")
            self._received += piece
        body = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise BadFrameError("sent a message that is not JSON") from None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise BadFrameError("sent a message that is no object with a kind")
        return message

    # Link measurements send random bytes, which are thrown away, beside TLS: encrypting takes Python four times as long
    # as sending, and would hide the rate of a fast link. OpenSSL reads exactly one record at a time, so that raw bytes
    # between two messages stay in the socket; one too many or too few, and the next record does not verify.

    def send_raw(self, content: bytes | memoryview, deadline: Deadline) -> None:
        """Send bytes of a measurement, as they are. Raises PeerError."""
        with peer_errors(self.sock, deadline, "took nothing"):
            socket.socket.sendall(self.sock, content)

    def receive_raw(self, view: memoryview, deadline: Deadline) -> int:
        """Receive at least one byte of a measurement into view; returns the number of bytes. Raises PeerError."""
        with peer_errors(self.sock, deadline):
            count = socket.socket.recv_into(self.sock, view)
        if count == 0:
            raise PeerGoneError("closed the connection")
        return count

    @property
    def closed(self) -> bool:
        """Whether the other end has closed; bytes that it sent before stay unread."""
        try:
            self.sock.settimeout(0)
            # Not SSLSocket's, which cannot look without taking.
            return socket.socket.recv(self.sock, 1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:  # broken, or closed at this end
            return True

    def close(self) -> None:
        """Close the connection."""
        close_socket(self.sock)
