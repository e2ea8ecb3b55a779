"""The recipes of docs/networking.md, carried out: gloo through WireGuard and SSH, and nothing readable outside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.harness import environment, run
from tests.launch.runs import SECRET, simulated_loss, tiny_run
from tests.ltecli.command import events_of
from tests.network.capture import capture
from tests.network.gloo_rank import NUM_BYTES, PATTERN, run_ranks
from tests.network.lab import Lab, Node
from tests.network.tunnels import (
    SSH_TOOLS,
    WIREGUARD_TOOLS,
    Tunnel,
    document_block,
    missing,
    ssh_star,
    wireguard_mesh,
    wireguard_star,
)

pytestmark = pytest.mark.slow

OpenLab = Callable[..., Lab]
TUNNELS = [
    pytest.param(wireguard_mesh, WIREGUARD_TOOLS, 2, id="wireguard mesh of 2"),
    pytest.param(wireguard_mesh, WIREGUARD_TOOLS, 3, id="wireguard mesh of 3"),
    pytest.param(wireguard_star, WIREGUARD_TOOLS, 3, id="wireguard star of 3"),
    pytest.param(ssh_star, SSH_TOOLS, 2, id="ssh of 2"),
    pytest.param(ssh_star, SSH_TOOLS, 3, id="ssh star of 3"),
]
PAYLOAD_FRAMES = NUM_BYTES / 1448
"""Fewer frames cannot have carried one rank's share of the all-reduce."""


def test_without_a_tunnel_anyone_on_the_link_reads_along(open_lab: OpenLab) -> None:
    lab = open_lab(2)
    with capture(lab[1], PATTERN) as seen:
        run_ranks(lab, ("eth0", "eth0"), (lab[0].address, lab[1].address))
    assert seen.frames > PAYLOAD_FRAMES
    assert seen.with_pattern > PAYLOAD_FRAMES / 2  # its own half; what comes back is summed


@pytest.mark.parametrize(("join", "tools", "nodes"), TUNNELS)
def test_in_a_tunnel_gloo_works_and_nothing_is_readable_outside(
    join: Callable[[Lab, Path], AbstractContextManager[Tunnel]],
    tools: tuple[str, ...],
    nodes: int,
    open_lab: OpenLab,
    tmp_path: Path,
) -> None:
    if reason := missing((*tools, "ping", "sysctl")):
        pytest.skip(reason)
    lab = open_lab(nodes)
    with join(lab, tmp_path) as tunnel, capture(lab[1], PATTERN) as seen:
        run_ranks(lab, tunnel.interfaces, tunnel.addresses)
    assert seen.frames > PAYLOAD_FRAMES
    assert seen.with_pattern == 0


def test_a_run_is_launched_through_a_tunnel(open_lab: OpenLab, tmp_path: Path) -> None:
    if reason := missing((*WIREGUARD_TOOLS, "ping")):
        pytest.skip(reason)
    run_file, lab = tiny_run(tmp_path, steps=40), open_lab(2, bytes_per_s=12.5e6)
    launch = [sys.executable, "-m", "ltecli", "train", str(run_file), "--launch", "--nodes", "2", "--processes", "1"]
    with wireguard_mesh(lab, tmp_path) as tunnel:
        launch += ["--join", f"{tunnel.addresses[0]}:29500", "--device", "cpu", "--quiet"]
        agents = [
            node.popen(
                [*launch, "--interface", tunnel.interfaces[k], "--node", str(k), "--out", str(tmp_path / f"node{k}")],
                env=environment(LTE_SECRET=SECRET), stderr=subprocess.PIPE,
            )
            for k, node in enumerate(lab)
        ]  # fmt: skip
        outcomes = [agent.outcome(120) for agent in agents]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    evaluation = events_of(tmp_path / "node0", "evaluate")[-1]
    assert evaluation["val_loss"] == pytest.approx(simulated_loss(run_file, tmp_path / "alone"), rel=1e-9)


def test_the_firewall_of_the_document_shuts_the_join_port_outside(open_lab: OpenLab, tmp_path: Path) -> None:
    if reason := missing((*WIREGUARD_TOOLS, "nft", "ping")):
        pytest.skip(reason)
    lab = open_lab(2)
    # As torch's store does: a server on all addresses.
    serve = "import socket\nserver = socket.create_server(('', 29500))\nwhile True: server.accept()[0].close()"
    server = lab[0].popen([sys.executable, "-c", serve])
    with wireguard_mesh(lab, tmp_path) as tunnel:
        assert reaches(lab[1], lab[0].address)
        rules = document_block("table inet lte").replace("wg0", tunnel.interfaces[0])
        (tmp_path / "lte.nft").write_text(rules)
        lab[0].run(["nft", "-f", str(tmp_path / "lte.nft")])
        assert not reaches(lab[1], lab[0].address)
        assert reaches(lab[1], tunnel.addresses[0])
        run_ranks(lab, tunnel.interfaces, tunnel.addresses, port=29501)
    server.kill()
    server.wait()


def reaches(node: Node, address: str, tries: int = 3) -> bool:
    """Whether the join port of an address answers."""
    connect = f"import socket; socket.create_connection(('{address}', 29500), timeout=1)"
    argv = node.command([sys.executable, "-c", connect])
    return any(run(argv).code == 0 for _ in range(tries))


def test_a_run_is_joined_by_invitation_through_its_own_tunnel(open_lab: OpenLab, tmp_path: Path) -> None:
    if reason := missing((*WIREGUARD_TOOLS, "sysctl")):
        pytest.skip(reason)
    run_file, lab = tiny_run(tmp_path, steps=40), open_lab(2, bytes_per_s=12.5e6)
    lte, elsewhere = [sys.executable, "-m", "ltecli"], tmp_path / "elsewhere"
    elsewhere.mkdir()
    invite = [*lte, "invite", run_file.name, "--for", "node1", "--nodes", "2", "--wireguard", lab[0].address]
    assert lab[0].popen([*invite, "--quiet"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL).wait(200) == 0
    (tmp_path / "node1.invite.json").rename(elsewhere / "node1.invite.json")
    join = [*lte, "join", "node1.invite.json", "--processes", "1", "--device", "cpu", "--out", "run", "--quiet"]
    early = lab[1].popen(join, cwd=elsewhere, env=environment(), stderr=subprocess.PIPE, text=True)
    said = early.communicate(timeout=200)[1]
    assert early.returncode == 2
    assert "wg-quick up" in said
    with ExitStack() as stack:
        for node, file in zip(lab, (tmp_path / "lte0.conf", elsewhere / "lte1.conf"), strict=True):
            node.run(["wg-quick", "up", str(file)])
            stack.callback(node.run, ["wg-quick", "down", str(file)])
        train = [*lte, "train", run_file.name, "--launch", "--nodes", "2", "--node", "0", "--join", "10.99.0.1:29400"]
        train += ["--secret-file", "lte.secret", "--processes", "1", "--device", "cpu", "--out", "node0", "--quiet"]
        started = [
            node.popen(
                line, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for node, line, folder in zip(lab, (train, join), (tmp_path, elsewhere), strict=True)
        ]
        errors = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    launched = events_of(tmp_path / "node0", "evaluate")[-1]["val_loss"]
    assert launched == pytest.approx(simulated_loss(run_file, tmp_path / "alone"), rel=1e-9)
