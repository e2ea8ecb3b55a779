"""Mutual challenge and response over a new connection: both ends prove that they hold the secret, neither sends it.

    caller → answerer   magic, version, purpose, caller's node, answerer's node, caller's nonce
    answerer → caller   magic, version, answerer's nonce
    caller → answerer   HMAC-SHA256(secret, "caller", all of the above)
    answerer → caller   HMAC-SHA256(secret, "answerer", all of the above)

The answerer proves itself only to a caller that has done so. Labels keep the two roles apart, so a proof sent back to
its sender does not verify; nonces of 32 random bytes from both ends make every session key new. Nodes of a run call
each other this way, and so do the peers of `lte profile measure --link`.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

from simulate.launch.preflight.channel import Channel, PeerError, PeerGoneError, receive_exactly, send_all
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.secret import Secret

PROTOCOL = 2
"""Version of the preflight's messages; nodes of different versions refuse each other."""
_MAGIC = b"LTEp"
_OPENING = struct.Struct("!4sH")
_HELLO = struct.Struct("!BII32s")
_NONCE_BYTES = _PROOF_BYTES = 32


class Purpose(IntEnum):
    """Purpose of a connection; a connection made for one purpose is refused for the other."""

    CONTROL = 1
    LINK = 2


class NotOursError(PeerError):
    """The other end does not speak this protocol."""


class VersionError(PeerError):
    """The other end speaks another version of this protocol."""


class WrongSecretError(PeerError):
    """The other end does not hold the same secret."""


class NoChallengeError(PeerGoneError):
    """The other end closed before it sent anything; it may be starting, or busy."""


@dataclass(frozen=True)
class Identity:
    """This end's node number, purpose and secret in a handshake."""

    node: int
    purpose: Purpose
    secret: Secret


def call(sock: socket.socket, me: Identity, answerer: int, deadline: Deadline) -> Channel:
    """Prove ourselves to node `answerer` and check its proof; raises PeerError and does not close sock."""
    # A nonce from each end, so that neither can be made to repeat an old session.
    nonce = secrets.token_bytes(_NONCE_BYTES)
    hello = _OPENING.pack(_MAGIC, PROTOCOL) + _HELLO.pack(me.purpose, me.node, answerer, nonce)
    send_all(sock, hello, deadline)
    try:
        opening = receive_exactly(sock, _OPENING.size, deadline)
    except PeerGoneError as error:
        # Unlike a refused proof this may pass: node 0 may only be starting.
        raise NoChallengeError(str(error)) from None
    _check_opening(opening)
    transcript = hello + opening + receive_exactly(sock, _NONCE_BYTES, deadline)
    try:
        send_all(sock, me.secret.mac("caller", transcript), deadline)
        proof = receive_exactly(sock, _PROOF_BYTES, deadline)
    except PeerGoneError:
        raise WrongSecretError("refused this node's proof: its secret is another one") from None
    if not hmac.compare_digest(proof, me.secret.mac("answerer", transcript)):
        raise WrongSecretError("did not prove that it holds the secret")
    return _channel(sock, answerer, me.secret, transcript, calls=True)


def answer(sock: socket.socket, me: Identity, deadline: Deadline) -> Channel:
    """Check a caller's proof, then prove ourselves; raises PeerError and does not close sock."""
    opening = receive_exactly(sock, _OPENING.size, deadline)
    try:
        _check_opening(opening)
    except VersionError:
        # Send the version, which is no secret, so that an honest caller learns what to install.
        send_all(sock, _OPENING.pack(_MAGIC, PROTOCOL), deadline)
        raise
    hello = receive_exactly(sock, _HELLO.size, deadline)
    purpose, caller, answerer, _ = _HELLO.unpack(hello)
    if (purpose, answerer) != (me.purpose, me.node):
        raise NotOursError(f"calls node {answerer} for purpose {purpose}, not node {me.node} for {me.purpose:d}")
    challenge = _OPENING.pack(_MAGIC, PROTOCOL) + secrets.token_bytes(_NONCE_BYTES)
    send_all(sock, challenge, deadline)
    transcript = opening + hello + challenge
    proof = receive_exactly(sock, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, me.secret.mac("caller", transcript)):
        raise WrongSecretError("has the wrong secret")
    send_all(sock, me.secret.mac("answerer", transcript), deadline)
    return _channel(sock, caller, me.secret, transcript, calls=False)


def _check_opening(opening: bytes) -> None:
    magic, version = _OPENING.unpack(opening)
    if magic != _MAGIC:
        raise NotOursError("sent something else than an lte node does")
    if version != PROTOCOL:
        raise VersionError(f"speaks preflight protocol {version}, this lte speaks {PROTOCOL}")


def _channel(sock: socket.socket, peer: int, secret: Secret, transcript: bytes, *, calls: bool) -> Channel:
    """Return the connection's channel, with one key for each direction."""
    # A key of this very transcript: its nonces make it new for each connection.
    session = secret.derived("session", transcript)
    keys = session.derived("from caller", b""), session.derived("from answerer", b"")
    send_key, receive_key = keys if calls else keys[::-1]
    return Channel(sock, peer, send_key, receive_key)
