"""Make a Channel of a new connection: TLS 1.3 with the run's one certificate at both ends, then a greeting.

    caller → answerer   hello: protocol, caller's node, answerer's node, purpose, preflight
    answerer → caller   hello: protocol, and what it objects to

TLS proves that both ends hold the certificate's key. It does not say which node calls which and what for: a connection
for one node or purpose, carried to another by somebody between them, ends here. Nodes of a run call each other this
way, and so do the peers of `lte profile measure --link`.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from enum import Enum

from simulate.launch.preflight.address import family_of, sockaddr
from simulate.launch.preflight.channel import (
    BadFrameError,
    Channel,
    Message,
    PeerError,
    WrongSecretError,
    close_socket,
    peer_errors,
)
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.secret import Secret

PROTOCOL = 3
"""Version of the preflight's messages; nodes of different versions refuse each other."""


class Purpose(str, Enum):
    """Purpose of a connection; a connection made for one purpose is refused for another."""

    CONTROL = "control"
    LINK = "link"
    PAIR = "pair"
    STORE = "store"


class NotOursError(PeerError):
    """The other end does not speak this protocol, or means another node."""


class VersionError(PeerError):
    """The other end speaks another version of this protocol."""


@dataclass(frozen=True)
class Identity:
    """This end's node number, purpose and secret in a handshake."""

    node: int
    purpose: Purpose
    secret: Secret
    meeting: str = ""
    """Random text of one preflight, so that nodes of another one with the same secret are told apart."""


def dial(own_address: str, address: str, port: int, deadline: Deadline) -> socket.socket:
    """Connect from own_address; raises OSError."""
    sock = socket.socket(family_of(address), socket.SOCK_STREAM)
    try:
        # Binding chooses the interface: the route alone could leave by another one.
        sock.bind(sockaddr(own_address, 0))
        sock.settimeout(deadline.left_s or 1e-6)
        sock.connect(sockaddr(address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def call(sock: socket.socket, me: Identity, answerer: int, deadline: Deadline) -> Channel:
    """Greet node `answerer` over a new connection; where that fails, closes it and raises PeerError."""
    tls = me.secret.client.wrap_socket(sock, do_handshake_on_connect=False)
    try:
        channel = _encrypted(tls, me, deadline)
        channel.send(_hello(me) | {"node": me.node, "to": answerer}, deadline)
        # Only now does this end hear whether its own proof was accepted.
        reply = channel.receive(deadline)
        _check_version(reply)
        if reply.get("objection"):
            raise NotOursError(f"refused this call: it {reply['objection']}")
        channel.peer = answerer
        return channel
    except WrongSecretError:
        close_socket(tls)
        raise WrongSecretError("does not hold this node's certificate: its secret is another one") from None
    except BaseException:
        close_socket(tls)
        raise


def answer(sock: ssl.SSLSocket, me: Identity, deadline: Deadline) -> Channel:
    """Greet a caller over a connection of Secret.server; raises PeerError and does not close sock."""
    channel = _encrypted(sock, me, deadline)
    hello = channel.receive(deadline)
    objection, node = "", hello.get("node")
    if {**hello, "node": 0} != _hello(me) | {"node": 0, "to": me.node}:
        objection = f"calls node {hello.get('to')!r:.20} for {hello.get('purpose')!r:.20}, or in another preflight, "
        objection += f"not node {me.node} for {me.purpose.value!r}"
    elif not isinstance(node, int):
        objection = "did not say its number"
    # An honest caller of another version learns what to install, so it gets this before its own is checked.
    channel.send({"kind": "hello", "protocol": PROTOCOL, "objection": objection}, deadline)
    _check_version(hello)
    if objection:
        raise NotOursError(objection)
    assert isinstance(node, int)
    channel.peer = node
    return channel


def _hello(me: Identity) -> Message:
    return {"kind": "hello", "protocol": PROTOCOL, "purpose": me.purpose.value, "meeting": me.meeting}


def _encrypted(sock: ssl.SSLSocket, me: Identity, deadline: Deadline) -> Channel:
    try:
        with peer_errors(sock, deadline):
            sock.do_handshake()
    except BadFrameError:
        raise NotOursError("sent something else than an lte node does") from None
    # TLS has verified it already. Compared as well, since TLS also trusts certificates that this one's key has signed.
    if sock.getpeercert(binary_form=True) != me.secret.certificate:
        raise WrongSecretError("has the wrong secret")
    return Channel(sock)


def _check_version(hello: Message) -> None:
    if hello.get("protocol") != PROTOCOL:
        version = f"{hello.get('protocol')!r:.20}"
        raise VersionError(f"speaks preflight protocol {version}, this lte speaks {PROTOCOL}")
