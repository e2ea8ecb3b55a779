"""Listener that authenticates callers, each in its own thread, so that a silent or hostile one delays no other.

Membership, LinkTester and `lte profile serve` take authenticated callers and refusals from its queue.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simulate.common.errors import InputError
from simulate.launch.preflight.address import address_text, family_of, sockaddr
from simulate.launch.preflight.channel import (
    Channel,
    PeerError,
    PeerGoneError,
    PeerSilentError,
    close_socket,
    hang_up,
    reason,
)
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, answer

MAX_UNPROVEN = 64
"""Handshakes at a time; one more drops the oldest, which may call again."""
_BACKLOG = 128
_POLL_S = 0.1


@dataclass(frozen=True)
class AcceptedPeer:
    """An authenticated caller."""

    channel: Channel
    greeting: Any
    """Return value of `greet`."""


@dataclass(frozen=True)
class Refusal:
    """A caller that was refused."""

    host: str
    why: str


def listen(address: str, port: int, label: str) -> socket.socket:
    """Listen on one address (port 0: any free port); InputError's message begins with `label`."""
    try:
        listener = socket.socket(family_of(address), socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"{label}: cannot listen ({reason(error)}); choose another address") from None
    try:
        # A port that a run has just left stays reserved for minutes otherwise, and the same line could not be given
        # again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(sockaddr(address, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(
            f"{label}: cannot listen on {address_text(address, port)} ({reason(error)}); "
            "is another run using it? choose another port for all nodes"
        ) from None
    return listener


class HandshakeListener:
    """Accepts callers until it is closed; `next` returns authenticated and refused ones from one queue.

    `greet` runs in the caller's thread, right after its proof; its result comes along.
    """

    def __init__(
        self,
        listener: socket.socket,
        me: Identity,
        handshake_s: float,
        greet: Callable[[Channel], Any] = lambda channel: None,
    ) -> None:
        # Callers that it accepts are wrapped, too; each does its handshake in its own thread.
        self._listener = me.secret.server.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
        self._me, self._handshake_s, self._greet = me, handshake_s, greet
        self._events: queue.Queue[AcceptedPeer | Refusal] = queue.Queue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._callers: dict[threading.Thread, ssl.SSLSocket] = {}
        self._unproven: dict[threading.Thread, ssl.SSLSocket] = {}
        # Daemon threads, so that a process which fails elsewhere can still end.
        self._accepting = threading.Thread(target=self._accept, name="preflight-listener", daemon=True)
        self._accepting.start()

    def next(self, deadline: Deadline) -> AcceptedPeer | Refusal | None:
        """Return the next caller or refusal, None where there is none before the deadline."""
        try:
            return self._events.get(timeout=max(deadline.left_s, 1e-3))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Stop listening, hang up on callers that `next` did not return, and end all threads."""
        self._closing.set()
        hang_up(self._listener)  # wakes the accepting thread at once on Linux, elsewhere within _POLL_S
        self._accepting.join()
        self._listener.close()
        with self._lock:
            # Callers remove themselves, so join them on a copy and without the lock.
            callers = dict(self._callers)
        for sock in callers.values():
            hang_up(sock)
        for thread in callers:
            thread.join()
        while (event := self.next(Deadline(0))) is not None:
            if isinstance(event, AcceptedPeer):
                event.channel.close()

    def _accept(self) -> None:
        self._listener.settimeout(_POLL_S)
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except (ConnectionError, ssl.SSLError):  # the caller has left again, which must not hold up the others
                continue
            except OSError:  # this process has no file handles left
                self._closing.wait(_POLL_S)
                continue
            thread = threading.Thread(target=self._handle_caller, args=(sock,), name="preflight-caller", daemon=True)
            with self._lock:
                if len(self._unproven) >= MAX_UNPROVEN:
                    # A valid handshake is fast, so drop the connection pending longest.
                    hang_up(self._unproven.pop(next(iter(self._unproven))))
                self._callers[thread] = self._unproven[thread] = sock
                thread.start()

    def _handle_caller(self, sock: ssl.SSLSocket) -> None:
        event = None
        try:
            event = self._authenticate(sock)
        finally:
            if not isinstance(event, AcceptedPeer):
                close_socket(sock)
            with self._lock:
                del self._callers[threading.current_thread()]
                self._unproven.pop(threading.current_thread(), None)
                if event is not None:
                    # Under the same lock as the removal: close() hangs up on all that are still callers.
                    self._events.put(event)

    def _authenticate(self, sock: ssl.SSLSocket) -> AcceptedPeer | Refusal:
        channel = None
        host = "somebody"
        try:
            host = str(sock.getpeername()[0])
            channel = answer(sock, self._me, Deadline(self._handshake_s))
            with self._lock:
                self._unproven.pop(threading.current_thread(), None)
            return AcceptedPeer(channel, self._greet(channel))
        except PeerSilentError as error:
            why = str(error) if channel else f"did not prove itself within {self._handshake_s:.3g} s"
        except PeerGoneError as error:
            why = str(error) if channel else f"{error} before it proved itself"
        except (PeerError, OSError) as error:
            why = str(error)
        return Refusal(host, why)
