"""Both ends prove the secret, and nothing else will do."""

from __future__ import annotations

import hmac
import socket
import threading
from collections.abc import Callable

import pytest

from simulate.launch.preflight import handshake
from simulate.launch.preflight.channel import Channel, PeerError, PeerGoneError, PeerSilentError, receive_exactly
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import (
    PROTOCOL,
    Identity,
    NoChallengeError,
    NotOursError,
    Purpose,
    VersionError,
    WrongSecretError,
    answer,
    call,
)
from simulate.launch.preflight.secret import Secret
from tests.simulate.launch.preflight.nodes import SECRET, tcp_pair

OTHER = Secret(b"another secret of some length")
HELLO_BYTES, CHALLENGE_BYTES, PROOF_BYTES = 47, 38, 32
Outcome = Channel | PeerError


def both(caller: Callable[[socket.socket], Channel], answerer: Callable[[socket.socket], Channel]) -> list[Outcome]:
    """Run both ends of a connection; returns what came of each."""
    ends: list[Outcome | None] = [None, None]
    socks = tcp_pair()

    def run(index: int, role: Callable[[socket.socket], Channel]) -> None:
        try:
            ends[index] = role(socks[index])
        except PeerError as error:
            ends[index] = error
            socks[index].close()  # as the callers of call() and answer() do

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((caller, answerer))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert ends[0] is not None and ends[1] is not None
    return [ends[0], ends[1]]


def caller(node: int = 2, secret: Secret = SECRET, purpose: Purpose = Purpose.CONTROL, to: int = 0):  # type: ignore[no-untyped-def]
    return lambda sock: call(sock, Identity(node, purpose, secret), to, Deadline(2))


def answerer(secret: Secret = SECRET, node: int = 0):  # type: ignore[no-untyped-def]
    return lambda sock: answer(sock, Identity(node, Purpose.CONTROL, secret), Deadline(2))


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


def test_every_session_has_other_keys_in_each_direction() -> None:
    channels = [end for _ in range(2) for end in both(caller(), answerer())]
    assert all(isinstance(end, Channel) for end in channels)
    assert len({end._send_key._key for end in channels if isinstance(end, Channel)}) == 4
    close_all(channels)


def test_another_secret_is_refused_by_the_answerer() -> None:
    at_caller, at_answerer = both(caller(secret=OTHER), answerer())
    assert isinstance(at_answerer, WrongSecretError) and "wrong secret" in str(at_answerer)
    assert isinstance(at_caller, WrongSecretError) and "its secret is another one" in str(at_caller)


def test_an_answerer_without_the_secret_is_refused_by_the_caller() -> None:
    def impostor(sock: socket.socket) -> Channel:
        receive_exactly(sock, HELLO_BYTES, Deadline(1))
        sock.sendall(b"LTEp\0\2" + bytes(32))
        proof = receive_exactly(sock, PROOF_BYTES, Deadline(1))
        sock.sendall(proof)  # turned back: the best that it has
        raise NotOursError("done")

    at_caller, _ = both(caller(), impostor)
    assert isinstance(at_caller, WrongSecretError) and "did not prove" in str(at_caller)


def test_the_answerer_proves_nothing_to_a_caller_that_has_not() -> None:
    one, other = tcp_pair()
    thread = threading.Thread(target=both_closed, args=(other,))
    thread.start()
    one.sendall(b"LTEp\0\2\1" + bytes(4) + bytes(4) + bytes(32))
    receive_exactly(one, CHALLENGE_BYTES, Deadline(1))
    one.sendall(bytes(PROOF_BYTES))
    with pytest.raises(PeerGoneError):
        receive_exactly(one, 1, Deadline(1))  # a close, and not one byte
    thread.join(5)
    one.close()


def both_closed(sock: socket.socket) -> None:
    with pytest.raises(WrongSecretError):
        answerer()(sock)
    sock.close()


def test_a_recorded_handshake_is_worth_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bytes] = []
    real = handshake.send_all

    def recording(sock: socket.socket, content: bytes, deadline: Deadline) -> None:
        if threading.current_thread().name == "recorded":
            said.append(bytes(content))
        real(sock, content, deadline)

    monkeypatch.setattr(handshake, "send_all", recording)

    def recorded(sock: socket.socket) -> Channel:
        threading.current_thread().name = "recorded"
        return caller()(sock)

    outcomes = both(recorded, answerer())
    assert isinstance(outcomes[1], Channel)
    close_all(outcomes)

    def replaying(sock: socket.socket) -> Channel:
        sock.sendall(b"".join(said))
        receive_exactly(sock, CHALLENGE_BYTES + PROOF_BYTES, Deadline(1))
        raise AssertionError("the answerer proved itself to a replay")

    _, at_answerer = both(replaying, answerer())
    assert len(b"".join(said)) == HELLO_BYTES + PROOF_BYTES
    assert isinstance(at_answerer, WrongSecretError)


@pytest.mark.parametrize("what", ["node", "answerer", "purpose", "version"])
def test_what_was_proved_is_bound_to_everything_said(what: str) -> None:
    """Somebody in the middle changes one field of the hello, keeping the answerer content with it."""
    position = {"version": 5, "purpose": 6, "node": 10, "answerer": 14}[what]

    def changing(sock: socket.socket) -> Channel:
        inner, outer = tcp_pair()
        thread = threading.Thread(target=between, args=(outer, sock, position))
        thread.start()
        try:
            return caller()(inner)
        finally:
            thread.join(5)
            inner.close()

    at_caller, at_answerer = both(changing, answerer())
    assert isinstance(at_caller, PeerError)
    expected = {"node": WrongSecretError, "version": VersionError}.get(what, NotOursError)
    assert isinstance(at_answerer, expected)


def between(near: socket.socket, far: socket.socket, position: int) -> None:
    hello = bytearray(receive_exactly(near, HELLO_BYTES, Deadline(1)))
    hello[position] ^= 3
    try:
        far.sendall(hello)
        near.sendall(receive_exactly(far, CHALLENGE_BYTES, Deadline(1)))
        far.sendall(receive_exactly(near, PROOF_BYTES, Deadline(1)))
        receive_exactly(far, PROOF_BYTES, Deadline(1))
        raise AssertionError("the answerer accepted a changed hello")
    except (PeerError, OSError):
        pass
    finally:
        near.close()
        far.close()


def test_a_connection_for_another_purpose_or_node_is_refused() -> None:
    for role in (caller(purpose=Purpose.LINK), caller(to=1)):
        at_caller, at_answerer = both(role, answerer())
        assert isinstance(at_answerer, NotOursError)
        assert isinstance(at_caller, NoChallengeError)


def test_another_version_is_named_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(sock: socket.socket) -> Channel:
        sock.sendall(b"LTEp" + (PROTOCOL + 1).to_bytes(2, "big") + bytes(41))
        handshake._check_opening(receive_exactly(sock, 6, Deadline(1)))
        raise VersionError("heard")

    at_caller, at_answerer = both(newer, answerer())
    assert str(at_caller) == "heard"
    assert isinstance(at_answerer, VersionError)
    assert f"speaks preflight protocol {PROTOCOL + 1}, this lte speaks {PROTOCOL}" in str(at_answerer)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", bytes(100)])
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
    with one, other, pytest.raises(PeerSilentError, match=r"within 0\.1 s"):
        answer(other, Identity(0, Purpose.CONTROL, SECRET), Deadline(0.1))
    one, other = tcp_pair()
    with one, other, pytest.raises(PeerSilentError, match=r"within 0\.1 s"):
        call(one, Identity(1, Purpose.CONTROL, SECRET), 0, Deadline(0.1))


def test_compare_digest_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmac, "compare_digest", lambda given, expected: True)
    outcomes = both(caller(secret=OTHER), answerer())
    assert all(isinstance(end, Channel) for end in outcomes)
    close_all(outcomes)
    monkeypatch.setattr(hmac, "compare_digest", lambda given, expected: False)
    _, at_answerer = both(caller(), answerer())
    assert isinstance(at_answerer, WrongSecretError)
