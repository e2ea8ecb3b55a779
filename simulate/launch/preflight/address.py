"""Addresses: parse HOST:PORT, distinguish private networks from public ones, and choose the address to bind to.

A node binds every socket to one address of one interface, so that nothing of a run listens on another network. The
preflight and `lte profile measure --link` call choose_bind_address before they open anything.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulate.common.errors import InputError
from simulate.launch.preflight.channel import reason

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_PRIVATE = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("127.0.0.0/8", "::1/128"),  # loopback
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
        "fc00::/7",  # unique local, RFC 4193
        "169.254.0.0/16",  # link-local: two machines on one cable
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598: overlay networks between homes use it
    )
)
VIRTUAL_NAMES = (
    "br-", "cni", "docker", "lxc", "lxd", "podman", "tailscale", "tap", "tun", "utun", "vbox", "veth", "virbr", "vmnet",
    "wg", "zt",
)  # fmt: skip
"""How names begin that programs give to bridges and tunnels."""


@dataclass(frozen=True)
class Endpoint:
    """HOST:PORT as the user wrote it."""

    host: str
    port: int

    def __str__(self) -> str:
        return address_text(self.host, self.port)


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine."""

    name: str
    is_up: bool
    networks: tuple[ipaddress.IPv4Interface | ipaddress.IPv6Interface, ...]
    """The interface's addresses, with their masks."""

    @property
    def addresses(self) -> tuple[IpAddress, ...]:
        """The interface's addresses, without masks."""
        return tuple(network.ip for network in self.networks)


@dataclass(frozen=True)
class BindAddress:
    """The interface and address that this node binds to, and node 0's numeric address."""

    interface: str
    address: str
    coordinator_address: str


def address_text(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint(text: str) -> Endpoint:
    """Parse HOST:PORT or [IPv6]:PORT; raises InputError."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InputError(f"--join {text!r}: an IPv6 address needs brackets: [{text}]:PORT, for example [fd00::1]:29400")
    if not colon or not host or not port:
        raise InputError(f"--join {text!r} is not HOST:PORT; give node 0's address, for example 192.168.1.5:29400")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise InputError(f"--join {text!r}: port {port!r} is not a number from 1 to 65535; 29400 will do")
    return Endpoint(host, int(port))


def _is_link_local(address: IpAddress) -> bool:
    """Whether an address means something on one interface of one machine only."""
    return address.version == 6 and address.is_link_local


def resolve(endpoint: Endpoint) -> list[IpAddress]:
    """Return the addresses that HOST stands for, IPv4 first; raises InputError.

    IPv6 link-local ones are left out: after the % is an interface's name, which other machines have not.
    """
    with suppress(ValueError):  # a name; and the system does not look up the zone of an interface that is elsewhere
        _refuse_link_local(endpoint, ipaddress.ip_address(endpoint.host))
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = f" ({reason(error)})" if isinstance(error, OSError) else ""
        raise InputError(f"--join {endpoint}: {endpoint.host!r} is not known here{why}; give its address") from None
    addresses = sorted({ipaddress.ip_address(entry[4][0]) for entry in found}, key=lambda address: address.version)
    others = [address for address in addresses if not _is_link_local(address)]
    if not others:
        _refuse_link_local(endpoint, addresses[0])
    return others


def _refuse_link_local(endpoint: Endpoint, address: IpAddress) -> None:
    if _is_link_local(address):
        raise InputError(
            f"--join {endpoint}: {address} is an IPv6 link-local address, which differs from machine to machine; "
            "give an IPv4 address, or a unique local one (fd...): ip -6 address add fd00::1/64 dev NAME"
        )


def is_private(address: IpAddress) -> bool:
    """Whether packets to an address stay on this machine, this site or an overlay network."""
    # ::ffff:8.8.8.8 is the public IPv4 address 8.8.8.8 in IPv6 clothes.
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in network for network in _PRIVATE)


def interfaces() -> list[Interface]:
    """Return this machine's network interfaces."""
    import psutil

    stats = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        networks = [_network(e.address, e.netmask) for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)]
        found.append(Interface(name, name in stats and stats[name].isup, tuple(networks)))
    return found


def _network(address: str, mask: str | None) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    length = bin(int(ipaddress.ip_address(mask))).count("1") if mask else None
    return ipaddress.ip_interface(address if length is None else f"{address}/{length}")


def address_to_join(interface: str | None) -> str:
    """Return the address of this machine that others should call: on `interface`, else the likeliest one.

    Raises InputError where there is none.
    """
    known = interfaces()
    shown = [_named(interface, known)] if interface is not None else [found for found in known if found.is_up]
    # Link-local ones differ from machine to machine.
    usable = [
        (found, address)
        for found in shown
        for address in found.addresses
        if not _is_link_local(address) and (interface is not None or not address.is_loopback)
    ]
    if not usable and interface is not None:
        raise InputError(f"--interface {interface} has no address that others can call; there are {_choices(known)}")
    if not usable:
        raise InputError("this machine has no address but loopback; connect it, or name one with --join HOST:PORT")
    routed = _routed_address()

    def rank(candidate: tuple[Interface, IpAddress]) -> tuple[Any, ...]:
        found, address = candidate
        # A public address is refused without --trust-network. Bridges and tunnels lead to containers and elsewhere.
        return not is_private(address), address.version, _is_virtual(found.name), address != routed, found.name

    return str(min(usable, key=rank)[1])


def _routed_address() -> IpAddress | None:
    """Return the address that this machine calls the rest of the world from; None without a way there."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # UDP: only looks up the route
        return ipaddress.ip_address(probe.getsockname()[0])
    return None


def _is_virtual(name: str, root: Path = Path("/sys/class/net")) -> bool:
    """Whether an interface is a bridge or a tunnel, by its name or by what Linux says of it."""
    return name.startswith(VIRTUAL_NAMES) or any((root / name / kind).exists() for kind in ("bridge", "tun_flags"))


def choose_bind_address(
    endpoint: Endpoint, *, is_coordinator: bool, interface: str | None, trust_network: bool
) -> BindAddress:
    """Decide which interface and address this node uses; raises InputError."""
    known = interfaces()
    candidates = resolve(endpoint)
    chosen = _named(interface, known) if interface is not None else None
    # Node 0 must own the address that the others call; the others take the first that HOST resolves to.
    node_0 = _own_address(endpoint, candidates, known) if is_coordinator else candidates[0]
    _check_private(endpoint, node_0, trust_network)
    if node_0.is_loopback:
        return _loopback(endpoint, node_0, chosen, known)
    if chosen is None:
        own = node_0 if is_coordinator else _routed_from(endpoint, node_0)
        return BindAddress(_holder(own, known), str(own), str(node_0))
    if is_coordinator and node_0 not in chosen.addresses:
        raise InputError(
            f"--interface {chosen.name} has {_listed(chosen.addresses)}, not {node_0}, which the other nodes call; "
            f"drop --interface, or give all nodes --join with an address of {chosen.name}"
        )
    return BindAddress(chosen.name, str(node_0 if is_coordinator else _address_on(chosen, node_0)), str(node_0))


def _check_private(endpoint: Endpoint, address: IpAddress, trust_network: bool) -> None:
    if address.is_unspecified or address.is_multicast:
        raise InputError(f"--join {endpoint}: {address} names no machine; give an address of node 0")
    if not trust_network and not is_private(address):
        raise InputError(
            f"--join {endpoint}: {address} is a public address, and what workers exchange is neither encrypted nor "
            "authenticated; join over a VPN's address, or add --trust-network if you trust the network between"
        )


def _own_address(endpoint: Endpoint, candidates: Sequence[IpAddress], known: Sequence[Interface]) -> IpAddress:
    ours = {address for interface in known for address in interface.addresses}
    mine = [address for address in candidates if address in ours or address.is_loopback]
    if any(address.is_unspecified for address in candidates):
        mine = list(candidates)  # _check_private refuses it, with a better reason
    if not mine:
        raise InputError(
            f"--join {endpoint}: {_listed(candidates)} is not an address of this machine, which is node 0 and has "
            f"{_choices(known)}; give all nodes one of those, or start node 0 where {endpoint.host} is"
        )
    if mine[0].is_loopback and not _says_loopback(endpoint.host):
        # Debian maps a machine's own name to 127.0.1.1, which other machines cannot call.
        raise InputError(
            f"--join {endpoint}: {endpoint.host!r} means {mine[0]} on this machine, which other machines cannot reach; "
            f"give all nodes one of its addresses instead: {_choices(known)}"
        )
    return mine[0]


def _says_loopback(host: str) -> bool:
    """Whether the user wrote loopback on purpose."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _loopback(
    endpoint: Endpoint, node_0: IpAddress, chosen: Interface | None, known: Sequence[Interface]
) -> BindAddress:
    name = _holder(node_0, known)
    if chosen is not None and chosen.name != name:
        raise InputError(
            f"--interface {chosen.name} does not lead to {endpoint}, which is this machine's loopback; "
            "drop --interface, or give --join an address on the network"
        )
    return BindAddress(name, str(node_0), str(node_0))


def _named(name: str, known: Sequence[Interface]) -> Interface:
    found = next((interface for interface in known if interface.name == name), None)
    if found is None:
        raise InputError(f"--interface {name}: no such interface; there are {_choices(known)}")
    if not found.is_up:
        raise InputError(f"--interface {name} is down; set it up, or choose one of {_choices(known)}")
    return found


def _address_on(chosen: Interface, node_0: IpAddress) -> IpAddress:
    """Return the interface's address to call node 0 from, preferably in its network; raises InputError."""
    fitting = [n for n in chosen.networks if n.version == node_0.version and not _is_link_local(n.ip)]
    if not fitting:
        raise InputError(
            f"--interface {chosen.name} has no IPv{node_0.version} address to call {node_0} from "
            f"({_listed(chosen.addresses) or 'none at all'}); choose another one"
        )
    # An address in node 0's own network needs no router on the way.
    own = next((network.ip for network in fitting if node_0 in network.network), fitting[0].ip)
    if own.is_loopback:
        raise InputError(f"--interface {chosen.name} is loopback and does not lead to {node_0}; choose another one")
    with socket.socket(family_of(node_0), socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(sockaddr(str(own), 0))
            probe.connect(sockaddr(str(node_0), 9))  # UDP: only looks up the route
        except OSError as error:
            raise InputError(
                f"--interface {chosen.name} ({own}) does not lead to {node_0} ({reason(error)}); choose another one"
            ) from None
    return own


def _routed_from(endpoint: Endpoint, node_0: IpAddress) -> IpAddress:
    """Return the address that the system would call node 0 from; raises InputError without a route."""
    with socket.socket(family_of(node_0), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(sockaddr(str(node_0), endpoint.port))  # UDP: only looks up the route
        except OSError as error:
            raise InputError(
                f"--join {endpoint}: this machine has no route to {node_0} ({reason(error)}); is it on that network?"
            ) from None
        return ipaddress.ip_address(probe.getsockname()[0])


def _holder(address: IpAddress, known: Sequence[Interface]) -> str:
    """Return the name of the interface that holds an address; raises InputError."""
    # An interface that has the very address wins over one whose network contains it.
    exact = [interface.name for interface in known if address in interface.addresses]
    # All of 127/8 is loopback, though the interface lists one address.
    network = [interface.name for interface in known if any(address in n.network for n in interface.networks)]
    if not exact and not network:
        raise InputError(f"no network interface holds {address}; name one with --interface, of {_choices(known)}")
    return (exact or network)[0]


def _listed(addresses: Sequence[IpAddress]) -> str:
    return ", ".join(str(address) for address in addresses)


def _choices(known: Sequence[Interface]) -> str:
    """Return the usable interfaces with their addresses: "eth0 (10.0.0.4), lo (127.0.0.1)"."""
    usable = {
        interface.name: [address for address in interface.addresses if not _is_link_local(address)]
        for interface in known
        if interface.is_up
    }
    return ", ".join(f"{name} ({_listed(found)})" for name, found in usable.items() if found) or "none that is up"


def family_of(address: IpAddress | str) -> socket.AddressFamily:
    """Return the socket family of a numeric address."""
    return socket.AF_INET if ipaddress.ip_address(str(address)).version == 4 else socket.AF_INET6


def sockaddr(address: str, port: int) -> tuple[Any, ...]:
    """Return the socket address, for bind and connect, of a numeric address."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return found[0][4]


def loopback_interface() -> str:
    """Return the name of the loopback interface; raises InputError."""
    for found in interfaces():
        if any(str(address) == "127.0.0.1" for address in found.addresses):
            return found.name
    raise InputError("this machine has no loopback interface; bring it up, as in ip link set lo up")
