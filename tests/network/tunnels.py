"""The tunnels of docs/networking.md between the nodes of a lab; node K is 10.99.0.(K+1) inside."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness import Child
from tests.network.lab import Lab, Node
from tests.network.namespaces import run_tool

WIREGUARD_TOOLS = ("wg", "wg-quick", "wireguard-go")
SSH_TOOLS = ("ssh", "sshd", "ssh-keygen")
WAIT_S = 20.0


@dataclass(frozen=True)
class Tunnel:
    """By node: its interface into the tunnel, and its address there."""

    interfaces: tuple[str, ...]
    addresses: tuple[str, ...]


def missing(tools: tuple[str, ...]) -> str | None:
    """Return what is not installed, or None."""
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def document_block(text: str) -> str:
    """Return the one fenced block of docs/networking.md that holds `text`."""
    document = (Path(__file__).parents[2] / "docs" / "networking.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if text in block)
    return found


def inner_address(index: int) -> str:
    """Return a node's address in the tunnel."""
    return f"10.99.0.{index + 1}"


@contextlib.contextmanager
def wireguard_star(lab: Lab, folder: Path) -> Iterator[Tunnel]:
    """Join all nodes through node 0, which forwards."""
    with _wireguard(lab, folder, star_config) as tunnel:
        yield tunnel


@contextlib.contextmanager
def wireguard_mesh(lab: Lab, folder: Path) -> Iterator[Tunnel]:
    """Join every node with every other."""
    with _wireguard(lab, folder, mesh_config) as tunnel:
        yield tunnel


Keys = list[tuple[str, str]]
"""Private and public key of each node."""


def star_config(addresses: Sequence[str], keys: Keys, index: int) -> str:
    """Return a node's wg0.conf; `addresses` are the outer ones."""
    if index == 0:
        peers = [_peer(keys[i][1], f"{inner_address(i)}/32") for i in range(1, len(keys))]
        return _interface(keys, 0) + "PostUp = sysctl -q -w net.ipv4.ip_forward=1\n" + "".join(peers)
    return _interface(keys, index) + _peer(keys[0][1], "10.99.0.0/24", addresses[0])


def mesh_config(addresses: Sequence[str], keys: Keys, index: int) -> str:
    """Return a node's wg0.conf; `addresses` are the outer ones."""
    others = [i for i in range(len(keys)) if i != index]
    peers = [_peer(keys[i][1], f"{inner_address(i)}/32", addresses[i]) for i in others]
    return _interface(keys, index) + "".join(peers)


def _interface(keys: Keys, index: int) -> str:
    return f"[Interface]\nAddress = {inner_address(index)}/24\nListenPort = 51820\nPrivateKey = {keys[index][0]}\n"


def _peer(public_key: str, allowed: str, address: str | None = None) -> str:
    endpoint = f"Endpoint = {address}:51820\nPersistentKeepalive = 25\n" if address else ""
    return f"\n[Peer]\nPublicKey = {public_key}\nAllowedIPs = {allowed}\n{endpoint}"


@contextlib.contextmanager
def _wireguard(lab: Lab, folder: Path, config: Callable[[Sequence[str], Keys, int], str]) -> Iterator[Tunnel]:
    keys = []
    for _ in lab:
        private = run_tool("wg", "genkey").strip()
        public = subprocess.run(["wg", "pubkey"], input=private, capture_output=True, text=True, check=True).stdout
        keys.append((private, public.strip()))
    # The control sockets of all namespaces lie in one folder, named by interface.
    interfaces = tuple(f"wg{os.getpid()}n{node.index}" for node in lab)
    addresses = [node.address for node in lab]
    files = [folder / f"{interface}.conf" for interface in interfaces]
    for node, file in zip(lab, files, strict=True):
        file.touch(mode=0o600)
        file.write_text(config(addresses, keys, node.index))
    with contextlib.ExitStack() as stack:
        for node, file in zip(lab, files, strict=True):
            run_tool(*node.command(["wg-quick", "up", str(file)]))
            stack.callback(run_tool, *node.command(["wg-quick", "down", str(file)]))
        tunnel = Tunnel(interfaces, tuple(inner_address(node.index) for node in lab))
        _wait_until_joined(lab, tunnel)
        yield tunnel


@contextlib.contextmanager
def ssh_star(lab: Lab, folder: Path) -> Iterator[Tunnel]:
    """Join all nodes through node 0's sshd, which they log in to as root; node 0 forwards."""
    hub, *spokes = lab
    for name in ("host", "user"):
        run_tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    # An sshd of the lab's own; on a real machine it is one line, "PermitTunnel point-to-point", in its configuration.
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPermitTunnel point-to-point\nPidFile none\n"
        f"PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n"
    )
    (folder / "known_hosts").write_text(f"{hub.address} {(folder / 'host.pub').read_text()}")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it
    sshd = shutil.which("sshd")
    assert sshd is not None
    with contextlib.ExitStack() as stack:
        daemon = hub.popen([sshd, "-D", "-e", "-f", f"{folder}/sshd_config"], stderr=subprocess.DEVNULL)
        stack.callback(_end, daemon)
        run_tool(*hub.command(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"]))
        for index, spoke in enumerate(spokes, 1):
            options = f"-N -i {folder}/user -o UserKnownHostsFile={folder}/known_hosts -o ExitOnForwardFailure=yes"
            words = f"ssh {options} -o ConnectionAttempts=10 -o Tunnel=point-to-point -w 0:{index} root@{hub.address}"
            stack.callback(_end, spoke.popen(words.split()))
            _address(spoke, "tun0", inner_address(index), inner_address(0))
            _address(hub, f"tun{index}", inner_address(0), inner_address(index))
            run_tool("ip", "-n", spoke.namespace, "route", "add", "10.99.0.0/24", "dev", "tun0")
        interfaces = ("tun1", *("tun0" for _ in spokes))
        tunnel = Tunnel(interfaces, tuple(inner_address(node.index) for node in lab))
        _wait_until_joined(lab, tunnel)
        yield tunnel
        stack.close()
        for node in lab:  # what sshd forked is gone a moment after its connection
            _wait(lambda node=node: not node.processes(), f"node {node.index} to be empty")  # type: ignore[misc]


def _address(node: Node, interface: str, own: str, peer: str) -> None:
    _wait(lambda: interface in run_tool("ip", "-n", node.namespace, "-br", "link"), f"{interface} of {node.namespace}")
    run_tool("ip", "-n", node.namespace, "address", "add", own, "peer", peer, "dev", interface)
    run_tool("ip", "-n", node.namespace, "link", "set", interface, "up")


def _wait_until_joined(lab: Lab, tunnel: Tunnel) -> None:
    for node in lab:
        for address in tunnel.addresses:
            ping = node.command(["ping", "-c", "1", "-W", "1", address])
            _wait(
                lambda ping=ping: subprocess.run(ping, capture_output=True, check=False).returncode == 0,  # type: ignore[misc]
                f"{address} from node {node.index}",
            )


def _wait(ready: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not ready():
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"waited {WAIT_S:g} s in vain for {what}")
        time.sleep(0.05)


def _end(process: Child) -> None:
    process.terminate()
    process.wait(WAIT_S)
