"""What docs/networking.md says to write is what the tests of the tunnels write."""

from __future__ import annotations

from simulate.launch.preflight import wireguard
from tests.harness import ROOT
from tests.network.tunnels import document_block, mesh_config, star_config

KEYS = [(f"PRIVATE_KEY_{i}", f"PUBLIC_KEY_{i}") for i in range(3)]
ADDRESSES = [f"ADDRESS_{i}" for i in range(3)]


def test_the_configurations_are_the_tested_ones() -> None:
    for config in (star_config(ADDRESSES, KEYS, 0), star_config(ADDRESSES, KEYS, 1), mesh_config(ADDRESSES, KEYS, 0)):
        assert document_block(config) == config


def test_invitations_have_the_same_files() -> None:
    private = [wireguard.make_private_key() for _ in range(3)]
    keys = [(one, wireguard.public_key(one)) for one in private]
    hub = wireguard.hub_config(private[0]) + "".join(wireguard.peer_of_hub(node, keys[node][1]) for node in (1, 2))
    assert hub == star_config(ADDRESSES, keys, 0)
    node = wireguard.node_config(2, private[2], keys[0][1], f"{ADDRESSES[0]}:{wireguard.PORT}")
    assert node == star_config(ADDRESSES, keys, 2)


def test_the_firewall_lets_in_what_the_tunnel_needs() -> None:
    rules = document_block("table inet lte")
    assert "policy drop" in rules
    assert "udp dport 51820 accept" in rules


def test_the_lines_that_start_nodes_are_whole() -> None:
    lines = [
        line
        for name in ("networking", "launch", "docker", "reliability", "preflight")
        for line in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()
        if "--launch" in line and "--node " in line and line.lstrip().startswith("lte train")
    ]
    assert lines
    for line in lines:
        assert {"--nodes", "--node", "--join", "--secret-file"} <= set(line.split()), line
