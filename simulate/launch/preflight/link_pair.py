"""Measurement of the link between two machines without a run: one serves, the other measures both directions.

`lte profile serve` answers callers (serve_pairs), `lte profile measure --link` calls (measure_pair), so that a profile
can have measured figures before there is a run. Both prove that they share the secret, as the nodes of a preflight do.
"""

from __future__ import annotations

import math
from contextlib import closing

from simulate.common.errors import InputError
from simulate.config.hardware import Link
from simulate.launch.preflight.address import (
    Endpoint,
    address_text,
    choose_bind_address,
    interfaces,
    parse_endpoint,
)
from simulate.launch.preflight.channel import BadFrameError, Channel, PeerError, reason
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call, dial
from simulate.launch.preflight.link_figures import rate_text
from simulate.launch.preflight.link_probe import Limits, measure_latency_s, measure_rate, serve
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, listen
from simulate.launch.preflight.secret import VARIABLE, Secret
from simulate.launch.preflight.settings import Log

SERVER, CALLER = 0, 1
HANDSHAKE_S, MEASUREMENT_S, POLL_S = 10.0, 180.0, 1.0


def measure_pair(where: str, secret: Secret | None) -> Link:
    """Measure the link to a serving peer at HOST:PORT; raises InputError where none answers or its secret differs."""
    try:
        endpoint = parse_endpoint(where)
        bind = choose_bind_address(endpoint, is_coordinator=False, interface=None, trust_network=False)
    except InputError as error:  # its message names the option of a launched run
        raise InputError(str(error).replace("--join", "--link").replace("node 0", "the peer")) from None
    title = f"--link {endpoint}"
    me = Identity(CALLER, Purpose.PAIR, _key(secret, title, bind.address))
    try:
        sock = dial(bind.address, bind.coordinator_address, endpoint.port, Deadline(HANDSHAKE_S))
    except OSError as error:
        hint = "start lte profile serve --interface NAME there"
        raise InputError(f"{title} cannot be reached ({reason(error)}); {hint}") from None
    try:
        with closing(call(sock, me, SERVER, Deadline(HANDSHAKE_S))) as channel:
            return _figures(channel, str(endpoint))
    except PeerError as error:
        raise InputError(f"{title}: the peer {error}; start both with the same secret, and try again") from None


def _figures(channel: Channel, peer: str) -> Link:
    limits, deadline = Limits(), Deadline(MEASUREMENT_S)
    latency_s = measure_latency_s(channel, limits, deadline)
    up_bytes_per_s = measure_rate(channel, limits, deadline).bytes_per_s
    channel.send({"kind": "done"}, deadline)
    serve(channel, limits, deadline)
    down_bytes_per_s = channel.receive(deadline).get("bytes_per_s")
    if not isinstance(down_bytes_per_s, float) or not 0 < down_bytes_per_s < math.inf:
        raise BadFrameError("did not say what it sent in a second")
    # The peer sends the way back and reports the rate, since only the sender of chunks knows it.
    how = f"measured: TCP to {peer}, one direction at a time"
    return Link(
        topology="star", up_bytes_per_s=up_bytes_per_s, down_bytes_per_s=down_bytes_per_s, latency_s=latency_s,
        source="measured",
        sources={
            "topology": "guess: each device on its own link to what joins them", "up_bytes_per_s": how,
            "down_bytes_per_s": how, "latency_s": f"measured: half an echo's median time, to {peer}",
        },
    )  # fmt: skip


def serve_pairs(interface: str, port: int, secret: Secret | None, log: Log, callers: int | None = None) -> None:
    """Answer callers on one interface's address, one after the other; returns after `callers`, or never."""
    address = _address_of(interface)
    try:
        choose_bind_address(Endpoint(address, port), is_coordinator=True, interface=interface, trust_network=False)
    except InputError as error:
        raise InputError(str(error).replace("--join", "--interface")) from None
    # Before the port is open, so that nobody can call without a secret being there.
    key = _key(secret, f"--interface {interface}", address)
    listener = listen(address, port, f"--interface {interface}")
    here = address_text(address, port)
    log(f"serving on {here}; elsewhere: lte profile measure --link {here}")
    handshakes = HandshakeListener(listener, Identity(SERVER, Purpose.PAIR, key), HANDSHAKE_S)
    answered = 0
    try:
        while callers is None or answered < callers:
            event = handshakes.next(Deadline(POLL_S))
            if isinstance(event, AcceptedPeer):
                log(_answer(event.channel))
            elif event is not None:
                log(f"refused {event.host}: it {event.why}")
            answered += event is not None
    finally:
        handshakes.close()


def _answer(channel: Channel) -> str:
    """Serve the caller's measurement, then measure the way back; returns a line for people."""
    limits, deadline, peer = Limits(), Deadline(MEASUREMENT_S), channel.peer_address
    try:
        serve(channel, limits, deadline)
        rate = measure_rate(channel, limits, deadline).bytes_per_s
        channel.send({"kind": "done"}, deadline)
        channel.send({"kind": "rate", "bytes_per_s": rate}, deadline)
    except PeerError as error:
        return f"{peer} {error}"
    finally:
        channel.close()
    return f"{peer} receives {rate_text(rate)}"


def _key(secret: Secret | None, title: str, address: str) -> Secret:
    """Return the key of pairs; raises InputError where a network is used without a secret."""
    if secret is None and not address.startswith("127.") and address != "::1":
        raise InputError(f"{title}: peers on a network need a shared secret; give both --secret-file or {VARIABLE}")
    return secret or Secret.for_loopback()


def _address_of(interface: str) -> str:
    """Return an interface's first address, IPv4 before IPv6; raises InputError."""
    known = {found.name: found for found in interfaces() if found.is_up and found.addresses}
    if interface not in known:
        names = ", ".join(known) or "none"
        raise InputError(f"--interface {interface}: no such interface is up with an address; there are {names}")
    first = min(known[interface].addresses, key=lambda address: address.version)
    return str(first)
