"""The recipes of docs/networking.md, carried out: gloo through WireGuard and SSH, and nothing readable outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.network.capture import capture
from tests.network.gloo_rank import NUM_BYTES, PATTERN, run_ranks
from tests.network.lab import Lab
from tests.network.tunnels import (
    SSH_TOOLS,
    WIREGUARD_TOOLS,
    Tunnel,
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
