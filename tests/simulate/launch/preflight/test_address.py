"""Which address a node uses, and what is refused."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from simulate.common.errors import InputError
from simulate.launch.preflight import address as address_module
from simulate.launch.preflight.address import (
    BindAddress,
    Endpoint,
    Interface,
    address_to_join,
    choose_bind_address,
    interfaces,
    is_private,
    parse_endpoint,
)

JOIN = Endpoint("10.0.0.1", 29400)


def interface(name: str, *addresses: str, up: bool = True) -> Interface:
    return Interface(name, up, tuple(ipaddress.ip_interface(text) for text in addresses))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a wired network, a wireless one, a bridge without addresses and a cable pulled out."""
    known = [
        interface("lo", "127.0.0.1/8", "::1/128"),
        interface("eth0", "10.0.0.4/24", "fd00::4/64"),
        interface("wlan0", "192.168.1.7/24"),
        interface("br0"),
        interface("eth1", "10.9.0.4/24", up=False),
    ]
    monkeypatch.setattr(address_module, "interfaces", lambda: known)


def place(host: str = "10.0.0.1", *, hub: bool = False, name: str | None = None, trust: bool = False) -> BindAddress:
    return choose_bind_address(Endpoint(host, 29400), is_coordinator=hub, interface=name, trust_network=trust)


@pytest.mark.parametrize(
    ("text", "host"), [("10.0.0.1:29400", "10.0.0.1"), ("big-box:29400", "big-box"), ("[fd00::1]:29400", "fd00::1")]
)
def test_an_endpoint_is_host_and_port(text: str, host: str) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint == Endpoint(host, 29400)
    assert str(endpoint) == text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("10.0.0.1", "is not HOST:PORT"),
        (":29400", "is not HOST:PORT"),
        ("10.0.0.1:", "is not HOST:PORT"),
        ("10.0.0.1:http", "not a number from 1 to 65535"),
        ("10.0.0.1:0", "not a number from 1 to 65535"),
        ("10.0.0.1:65536", "not a number from 1 to 65535"),
        ("10.0.0.1:-1", "not a number from 1 to 65535"),
        ("10.0.0.1:" + "9" * 5000, "not a number from 1 to 65535"),
        ("fd00::1:29400", "needs brackets"),
    ],
)
def test_a_wrong_endpoint_is_explained(text: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        parse_endpoint(text)


PRIVATE = (
    *("127.0.0.1", "127.9.9.9", "::1"),
    *("10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.1", "::ffff:10.0.0.1"),
    *("169.254.1.1", "fd12::1", "100.64.0.1", "100.127.255.255"),
)
PUBLIC = (
    *("8.8.8.8", "172.15.255.255", "172.32.0.1", "192.169.0.1", "::ffff:8.8.8.8"),
    *("100.63.255.255", "100.128.0.1", "2001:db8::1", "192.0.2.1", "198.18.0.1", "0.0.0.0", "fe80::1"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks(address: str) -> None:
    assert is_private(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_everything_else_is_public(address: str) -> None:
    assert not is_private(ipaddress.ip_address(address))


def test_a_public_address_needs_trust(machine: None) -> None:
    with pytest.raises(InputError, match=r"8\.8\.8\.8 is a public address.*neither encrypted nor authenticated"):
        place("8.8.8.8", name="eth0")


def test_ipv6_link_local_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_module, "interfaces", lambda: [interface("eth0", "fe80::5%eth0/64")])
    for host in ("fe80::5%eth0", "fe80::5", "fe80::6%wlan9", "fe80::6%eth0"):  # of this machine, and of another
        for hub in (True, False):
            with pytest.raises(InputError, match=r"fe80::[56].* is an IPv6 link-local address.*give an IPv4 address"):
                place(host, hub=hub, trust=True)


def test_a_name_with_a_link_local_address_means_its_others(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*addresses: str) -> None:
        monkeypatch.setattr(
            "socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (text, 0, 0, 0)) for text in addresses]
        )

    found("fe80::9%eth0", "fd00::4")
    assert place("big-box.local", hub=True).address == "fd00::4"
    found("fe80::9%eth0")
    with pytest.raises(InputError, match="fe80::9%eth0 is an IPv6 link-local address"):
        place("big-box.local")


def test_link_local_addresses_are_not_offered_and_not_called_from(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [interface("eth0", "fe80::5%eth0/64", "10.0.0.4/24"), interface("eth1", "fe80::7%eth1/64")]
    monkeypatch.setattr(address_module, "interfaces", lambda: known)
    with pytest.raises(InputError, match=r"which is node 0 and has eth0 \(10\.0\.0\.4\);"):
        place("10.0.0.9", hub=True)
    with pytest.raises(InputError, match="--interface eth1 has no IPv6 address to call fd00::1 from"):
        place("fd00::1", name="eth1")


def test_a_public_address_that_is_trusted_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_module, "interfaces", lambda: [interface("eth0", "8.8.8.8/24")])
    assert place("8.8.8.8", hub=True, trust=True) == BindAddress("eth0", "8.8.8.8", "8.8.8.8")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "224.0.0.1"])
@pytest.mark.parametrize("hub", [True, False])
def test_an_address_of_no_machine_is_refused(host: str, hub: bool, machine: None) -> None:
    with pytest.raises(InputError, match=r"names no machine|not an address of this machine"):
        place(host, hub=hub, trust=True)


def test_node_0_uses_the_interface_that_has_the_address(machine: None) -> None:
    assert place("192.168.1.7", hub=True) == BindAddress("wlan0", "192.168.1.7", "192.168.1.7")
    assert place("fd00::4", hub=True) == BindAddress("eth0", "fd00::4", "fd00::4")
    assert place("192.168.1.7", hub=True, name="wlan0").interface == "wlan0"


def test_node_0_must_have_the_address(machine: None) -> None:
    with pytest.raises(InputError, match=r"10\.0\.0\.1 is not an address of this machine.*eth0 \(10\.0\.0\.4"):
        place("10.0.0.1", hub=True)


def test_node_0_listens_where_the_others_call(machine: None) -> None:
    with pytest.raises(InputError, match=r"--interface wlan0 has 192\.168\.1\.7, not 10\.0\.0\.4"):
        place("10.0.0.4", hub=True, name="wlan0")


def test_another_node_uses_the_interface_that_leads_to_node_0(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_module, "_routed_from", lambda endpoint, hub: ipaddress.ip_address("192.168.1.7"))
    assert place("192.168.1.5") == BindAddress("wlan0", "192.168.1.7", "192.168.1.5")


def test_loopback_leads_to_loopback(machine: None) -> None:
    assert place("127.0.0.1", hub=True) == place("localhost") == BindAddress("lo", "127.0.0.1", "127.0.0.1")
    assert place("127.0.0.2") == BindAddress("lo", "127.0.0.2", "127.0.0.2")
    with pytest.raises(InputError, match=r"--interface eth0 does not lead to 127\.0\.0\.1:29400"):
        place("127.0.0.1", name="eth0")
    with pytest.raises(InputError, match=r"lo is loopback and does not lead to 10\.0\.0\.1"):
        place(name="lo")


def test_a_name_that_means_loopback_only_here_is_refused(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_module, "resolve", lambda endpoint: [ipaddress.ip_address("127.0.1.1")])
    with pytest.raises(InputError, match=r"'big-box' means 127\.0\.1\.1 on this machine.*10\.0\.0\.4"):
        place("big-box", hub=True)


@pytest.mark.parametrize(
    ("name", "host", "rule"),
    [
        (
            "eth7",
            "10.0.0.1",
            r"no such interface; there are lo \(127\.0\.0\.1, ::1\), eth0 \(10\.0\.0\.4, fd00::4\), wlan0",
        ),
        ("eth1", "10.0.0.1", "--interface eth1 is down"),
        ("br0", "10.0.0.1", r"br0 has no IPv4 address to call 10.0.0.1 from \(none at all\)"),
        ("wlan0", "fd00::1", r"wlan0 has no IPv6 address to call fd00::1 from \(192\.168\.1\.7\)"),
    ],
)
def test_a_wrong_interface_is_explained(name: str, host: str, rule: str, machine: None) -> None:
    with pytest.raises(InputError, match=rule):
        place(host, name=name)


def test_an_interface_that_leads_elsewhere_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    # An address that this machine does not have cannot be called from: the system refuses for real.
    monkeypatch.setattr(address_module, "interfaces", lambda: [interface("eth0", "192.0.2.1/24")])
    with pytest.raises(InputError, match=r"--interface eth0 \(192\.0\.2\.1\) does not lead to 10\.0\.0\.1"):
        place(name="eth0")


def test_a_machine_without_a_way_is_explained(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoute(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(address_module.socket, "socket", NoRoute)
    with pytest.raises(InputError, match=r"no route to 10\.0\.0\.1 \(network is unreachable\)"):
        place()


def test_an_unknown_name_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(address_module.socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match=r"'no-such-box' is not known here \(name or service not known\)"):
        place("no-such-box")
    with pytest.raises(InputError, match="is not known here"):
        place("a" * 300)


def lines_join(
    monkeypatch: pytest.MonkeyPatch, *known: Interface, routed: str = "0.0.0.0", name: str | None = None
) -> str:
    monkeypatch.setattr(address_module, "interfaces", lambda: list(known))
    monkeypatch.setattr(address_module, "_routed_address", lambda: ipaddress.ip_address(routed))
    return address_to_join(name)


def test_others_are_told_the_address_that_is_routed_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, docker = interface("lo", "127.0.0.1/8", "::1/128"), interface("docker0", "172.17.0.1/16")
    wired, wireless = interface("enp3s0", "10.0.0.4/24", "fd00::4/64"), interface("wlan0", "192.168.1.7/24")
    tunnel = interface("wg0", "10.99.0.1/24")
    for known in ((docker, loop, wireless, tunnel, wired), (wired, tunnel, wireless, loop, docker)):
        assert lines_join(monkeypatch, *known, routed="192.168.1.7") == "192.168.1.7"
        assert lines_join(monkeypatch, *known, routed="10.99.0.1") == "10.0.0.4"  # all traffic goes through a tunnel
        assert lines_join(monkeypatch, *known, name="wg0") == "10.99.0.1"
    pulled = interface("eth0", "10.0.0.3/24", up=False)
    assert lines_join(monkeypatch, pulled, docker, routed="10.0.0.3") == "172.17.0.1"
    public = interface("eth0", "8.8.8.8/24")
    assert lines_join(monkeypatch, public, wired, routed="8.8.8.8") == "10.0.0.4"
    with pytest.raises(InputError, match="no address but loopback"):
        lines_join(monkeypatch, loop, interface("eth1", "fe80::1%eth1/64"))


def test_machines_of_ipv6_alone_are_told_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    only = interface("eth0", "fe80::1%eth0/64", "fd00::4/64")
    assert lines_join(monkeypatch, only) == lines_join(monkeypatch, only, name="eth0") == "fd00::4"


def test_ipv4_is_preferred(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(None, None, None, "", (text, 1)) for text in ("fd00::4", "10.0.0.4")]
    monkeypatch.setattr(address_module.socket, "getaddrinfo", lambda *arguments, **options: found)
    assert place("big-box", hub=True).address == "10.0.0.4"


def test_this_machines_interfaces_are_found() -> None:
    loopback = [known for known in interfaces() if ipaddress.ip_address("127.0.0.1") in known.addresses]
    assert len(loopback) == 1
    assert loopback[0].is_up
    assert loopback[0].networks[0].network == ipaddress.ip_network("127.0.0.0/8")
