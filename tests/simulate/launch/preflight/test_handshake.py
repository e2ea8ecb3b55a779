"""Both ends prove the secret over TLS 1.3, and nothing else will do."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from simulate.launch.preflight.channel import (
    Channel,
    PeerError,
    PeerGoneError,
    PeerSilentError,
    WrongSecretError,
    close_socket,
)
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import (
    PROTOCOL,
    Identity,
    NotOursError,
    Purpose,
    VersionError,
    answer,
    call,
)
from simulate.launch.preflight.secret import Secret
from tests.simulate.launch.preflight.nodes import OTHER, SECRET, SECRET_TEXT, answerer_end, tcp_pair

Outcome = Channel | PeerError
Role = Callable[[socket.socket], Channel]


def both(caller: Role, answerer: Role, socks: tuple[socket.socket, socket.socket] | None = None) -> list[Outcome]:
    """Run both ends of a connection; returns what came of each."""
    ends: list[Outcome | None] = [None, None]
    socks = socks or tcp_pair()

    def run(index: int, role: Role) -> None:
        try:
            ends[index] = role(socks[index])
        except PeerError as error:
            ends[index] = error
            socks[index].close()  # unless TLS has taken it over

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((caller, answerer))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert ends[0] is not None and ends[1] is not None
    return [ends[0], ends[1]]


def caller(
    node: int = 2, secret: Secret = SECRET, purpose: Purpose = Purpose.CONTROL, to: int = 0, meeting: str = ""
) -> Role:
    return lambda sock: call(sock, Identity(node, purpose, secret, meeting), to, Deadline(2))


def answerer(secret: Secret = SECRET, node: int = 0) -> Role:
    def role(sock: socket.socket) -> Channel:
        end = answerer_end(sock, secret)
        try:
            return answer(end, Identity(node, Purpose.CONTROL, secret), Deadline(2))
        except PeerError:
            close_socket(end)  # as a listener does
            raise

    return role


def tls_caller(context: ssl.SSLContext, say: bytes = b"") -> Role:
    """Return a caller that speaks TLS as `context` has it; its end is what became of its first read."""

    def role(sock: socket.socket) -> Channel:
        try:
            with context.wrap_socket(sock) as tls:
                tls.sendall(say)
                heard = tls.recv(1000)
        except OSError as error:
            raise PeerGoneError(str(error)) from None
        assert heard == b"", heard
        raise PeerGoneError("closed")

    return role


def own_context(protocol: int, folder: Path, pem: str = SECRET_TEXT) -> ssl.SSLContext:
    """Return a context that shows a certificate and checks nothing."""
    (folder / "pem").write_text(pem)
    context = ssl.SSLContext(protocol)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(folder / "pem")
    return context


def close_all(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Channel):
            outcome.close()


def test_two_that_share_the_secret_get_a_channel() -> None:
    outcomes = both(caller(), answerer())
    one, other = outcomes
    assert isinstance(one, Channel) and isinstance(other, Channel)
    assert (one.peer, other.peer) == (0, 2)
    for sender, receiver in ((one, other), (other, one)):
        sender.send({"kind": "hello"}, Deadline(1))
        assert receiver.receive(Deadline(1)) == {"kind": "hello"}
    close_all(outcomes)


def test_another_secret_is_refused_by_both_ends() -> None:
    # It has the same name and number, so that only its key tells it apart.
    at_caller, at_answerer = both(caller(secret=OTHER), answerer())
    assert isinstance(at_answerer, WrongSecretError) and "wrong secret" in str(at_answerer)
    assert isinstance(at_caller, WrongSecretError) and "its secret is another one" in str(at_caller)


def test_another_certificate_is_refused_by_an_answerer_whom_the_caller_trusts(tmp_path: Path) -> None:
    context = own_context(ssl.PROTOCOL_TLS_CLIENT, tmp_path, OTHER_PEM)
    _, at_answerer = both(tls_caller(context, b'{"kind":"hello"}\n'), answerer())
    assert isinstance(at_answerer, WrongSecretError)


def test_another_certificate_is_refused_by_a_caller_whom_the_answerer_trusts(tmp_path: Path) -> None:
    context = own_context(ssl.PROTOCOL_TLS_SERVER, tmp_path, OTHER_PEM)

    def impostor(sock: socket.socket) -> Channel:
        with pytest.raises(ssl.SSLError, match="ALERT"), context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(1)
        raise NotOursError("done")

    at_caller, _ = both(caller(), impostor)
    assert isinstance(at_caller, WrongSecretError)


def test_a_caller_without_a_certificate_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, at_answerer = both(tls_caller(context), answerer())
    # Within the handshake: TLS asks for a certificate and ends without one.
    assert isinstance(at_answerer, NotOursError) and "something else" in str(at_answerer)


def certificate(key: Ed25519PrivateKey, name: str, signer: Ed25519PrivateKey, issuer: str, authority: bool) -> str:
    """Return a key and a certificate for it, signed by `signer`."""
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
    start, end = datetime(1970, 1, 1, tzinfo=timezone.utc), datetime(9999, 1, 1, tzinfo=timezone.utc)
    made = (
        x509.CertificateBuilder(names[1], names[0], key.public_key(), 1, start, end)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .sign(signer, None)
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(encoding, form, serialization.NoEncryption())
    return (secret + made.public_bytes(encoding)).decode()


AUTHORITY = Ed25519PrivateKey.generate()
AUTHORITY_PEM = certificate(AUTHORITY, "lte", AUTHORITY, "lte", authority=True)
CHILD_PEM = certificate(Ed25519PrivateKey.generate(), "child", AUTHORITY, "lte", authority=False)
OTHER_PEM = certificate(STRANGER := Ed25519PrivateKey.generate(), "lte", STRANGER, "lte", authority=False)


def test_a_certificate_that_the_key_has_signed_is_not_the_certificate(tmp_path: Path) -> None:
    pinned = Secret(AUTHORITY_PEM.encode())
    context = own_context(ssl.PROTOCOL_TLS_CLIENT, tmp_path, CHILD_PEM)
    _, at_answerer = both(tls_caller(context, b'{"kind":"hello"}\n'), answerer(pinned))
    assert isinstance(at_answerer, WrongSecretError)


def test_tls_1_2_is_refused_by_both_ends_with_the_right_certificate(tmp_path: Path) -> None:
    older = own_context(ssl.PROTOCOL_TLS_CLIENT, tmp_path)
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    _, at_answerer = both(tls_caller(older), answerer())
    assert isinstance(at_answerer, NotOursError)

    older = own_context(ssl.PROTOCOL_TLS_SERVER, tmp_path)
    older.maximum_version = ssl.TLSVersion.TLSv1_2

    def answering(sock: socket.socket) -> Channel:
        with pytest.raises(ssl.SSLError, match=r"VERSION|PROTOCOL"):
            older.wrap_socket(sock, server_side=True)
        raise NotOursError("done")

    at_caller, _ = both(caller(), answering)
    assert isinstance(at_caller, NotOursError)


class Tap:
    """Somebody between two ends, who copies what each says to the other, and keeps it."""

    def __init__(self) -> None:
        (self.caller, near), (far, self.answerer) = tcp_pair(), tcp_pair()
        self.said = {"caller": bytearray(), "answerer": bytearray()}
        for name, source, target in (("caller", near, far), ("answerer", far, near)):
            threading.Thread(target=self._copy, args=(source, target, self.said[name]), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, said: bytearray) -> None:
        try:
            while piece := source.recv(1 << 16):
                said += piece
                target.sendall(piece)
        except OSError:
            pass  # the other direction has ended
        finally:
            close_socket(target)


def tapped() -> tuple[Tap, list[Outcome]]:
    tap = Tap()
    return tap, both(caller(), answerer(), (tap.caller, tap.answerer))


def test_nothing_that_is_said_can_be_read_on_the_way() -> None:
    tap, outcomes = tapped()
    one, other = outcomes
    assert isinstance(one, Channel) and isinstance(other, Channel)
    words = "learning_rate = 0.001 at 192.168.1.5"
    for sender, receiver in ((one, other), (other, one)):
        sender.send({"kind": "facts", "facts": words}, Deadline(1))
        assert receiver.receive(Deadline(1))["facts"] == words
    close_all(outcomes)
    for said in tap.said.values():
        assert said[:2] == b"\x16\x03" and len(said) > 500  # TLS, and all of it
        for plain in (words.encode(), b"kind", b"hello", b"facts", b"purpose", SECRET.certificate):
            assert plain not in said


def test_a_recorded_handshake_is_worth_nothing_later() -> None:
    tap, outcomes = tapped()
    assert isinstance(outcomes[1], Channel)
    close_all(outcomes)
    recorded = bytes(tap.said["caller"])

    def replaying(sock: socket.socket) -> Channel:
        sock.sendall(recorded)
        while sock.recv(1000):
            pass
        raise PeerGoneError("closed")

    _, at_answerer = both(replaying, answerer())
    assert isinstance(at_answerer, NotOursError | PeerGoneError)


@pytest.mark.parametrize(
    "role", [caller(purpose=Purpose.LINK), caller(to=1), caller(meeting="another")], ids=["purpose", "node", "meeting"]
)
def test_a_connection_for_something_else_is_refused_and_told(role: Role) -> None:
    at_caller, at_answerer = both(role, answerer())
    assert isinstance(at_answerer, NotOursError) and "calls node" in str(at_answerer)
    assert isinstance(at_caller, NotOursError) and "not node 0 for 'control'" in str(at_caller)


@pytest.mark.parametrize("node", [None, "2", [2]])
def test_a_caller_without_a_number_is_refused(node: object) -> None:
    at_caller, at_answerer = both(caller(node), answerer())  # type: ignore[arg-type]
    assert isinstance(at_answerer, NotOursError) and "did not say its number" in str(at_answerer)
    assert isinstance(at_caller, NotOursError)


def test_another_version_is_named_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(sock: socket.socket) -> Channel:
        tls = SECRET.client.wrap_socket(sock)
        channel = Channel(tls)
        channel.send({"kind": "hello", "protocol": PROTOCOL + 1, "to": "somewhere"}, Deadline(1))
        reply = channel.receive(Deadline(1))
        assert reply["protocol"] == PROTOCOL
        channel.close()
        raise VersionError("heard")

    def newer_answerer(sock: socket.socket) -> Channel:
        channel = Channel(SECRET.server.wrap_socket(sock, server_side=True))
        channel.receive(Deadline(1))
        channel.send({"kind": "hello", "protocol": PROTOCOL + 1}, Deadline(1))
        return channel

    at_caller, at_answerer = both(newer, answerer())
    assert str(at_caller) == "heard"
    assert isinstance(at_answerer, VersionError)
    assert f"speaks preflight protocol {PROTOCOL + 1}, this lte speaks {PROTOCOL}" in str(at_answerer)
    at_caller, other = both(caller(), newer_answerer)
    assert isinstance(at_caller, VersionError) and f"protocol {PROTOCOL + 1}" in str(at_caller)
    close_all([other])


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"LTEp\0\2" + bytes(41), bytes(100)], ids=["http", "lte before", "zeros"]
)
def test_garbage_is_told_from_a_wrong_secret(garbage: bytes) -> None:
    def other_program(sock: socket.socket) -> Channel:
        sock.sendall(garbage)
        raise NotOursError("done")

    _, at_answerer = both(other_program, answerer())
    assert isinstance(at_answerer, NotOursError) and "something else" in str(at_answerer)
    at_caller, _ = both(caller(), other_program)
    assert isinstance(at_caller, NotOursError)


def test_silence_ends_at_the_deadline() -> None:
    one, other = tcp_pair()
    with one, answerer_end(other) as end, pytest.raises(PeerSilentError, match=r"within 0\.1 s"):
        answer(end, Identity(0, Purpose.CONTROL, SECRET), Deadline(0.1))
    one, other = tcp_pair()
    with other, pytest.raises(PeerSilentError, match=r"within 0\.1 s"):
        call(one, Identity(1, Purpose.CONTROL, SECRET), 0, Deadline(0.1))


def test_a_handshake_that_drips_ends_at_the_deadline() -> None:
    one, other = tcp_pair()
    stop = threading.Event()

    def drip() -> None:
        one.sendall(b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03")  # the start of a long ClientHello
        while not stop.wait(0.03):
            one.send(os.urandom(1))

    thread = threading.Thread(target=drip)
    thread.start()
    with answerer_end(other) as end, pytest.raises(PeerSilentError, match=r"within 0\.3 s"):
        answer(end, Identity(0, Purpose.CONTROL, SECRET), Deadline(0.3))
    stop.set()
    thread.join()
    one.close()


def test_a_call_that_fails_leaves_no_connection() -> None:
    one, other = tcp_pair()
    other.close()
    with pytest.raises(PeerError):
        caller()(one)
    assert one.fileno() == -1
