"""WireGuard's files for the nodes of a run: a star, whose hub is node 0; node K is 10.99.0.(K+1) inside.

Keys are made by the package `cryptography`, and encoded as `wg genkey` does. Only these files are ours: the tunnel
itself is WireGuard's, brought up by wg-quick. docs/networking.md has the same star by hand.
"""

from __future__ import annotations

import base64
import re

PORT = 51820
MOST_NODES = 254
"""Nodes that a /24 network has addresses for."""
_PRIVATE = re.compile(r"^PrivateKey = (\S+)$", re.MULTILINE)


def address(node: int) -> str:
    """Return a node's address inside of the tunnel."""
    return f"10.99.0.{node + 1}"


def make_private_key() -> str:
    """Return a fresh private key, in base64."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return base64.b64encode(X25519PrivateKey.generate().private_bytes_raw()).decode()


def public_key(private: str) -> str:
    """Return the public key of a private one, both in base64; raises ValueError."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    key = X25519PrivateKey.from_private_bytes(base64.b64decode(private, validate=True))
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def private_key_of(config: str) -> str:
    """Return the private key in a configuration; raises ValueError where there is none."""
    found = _PRIVATE.search(config)
    if found is None:
        raise ValueError("no PrivateKey")
    return found[1]


def hub_config(private: str) -> str:
    """Return node 0's configuration, still without peers; it passes on what is not its own."""
    return _interface(0, private) + "PostUp = sysctl -q -w net.ipv4.ip_forward=1\n"


def peer_of_hub(node: int, public: str) -> str:
    """Return the block by which node 0 knows another node."""
    return f"\n[Peer]\nPublicKey = {public}\nAllowedIPs = {address(node)}/32\n"


def has_peer(config: str, node: int) -> bool:
    """Whether node 0's configuration knows a node already."""
    return f"AllowedIPs = {address(node)}/32\n" in config


def node_config(node: int, private: str, hub_public: str, endpoint: str) -> str:
    """Return the configuration of a node other than 0; `endpoint` is HOST:PORT of node 0, outside of the tunnel."""
    # Routers forget who talks to whom after half a minute of silence.
    peer = f"AllowedIPs = 10.99.0.0/24\nEndpoint = {endpoint}\nPersistentKeepalive = 25\n"
    return f"{_interface(node, private)}\n[Peer]\nPublicKey = {hub_public}\n{peer}"


def _interface(node: int, private: str) -> str:
    return f"[Interface]\nAddress = {address(node)}/24\nListenPort = {PORT}\nPrivateKey = {private}\n"
