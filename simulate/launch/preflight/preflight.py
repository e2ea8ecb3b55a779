"""The preflight: before any worker starts, all nodes authenticate, compare their facts and measure their links.

It finds in seconds what would otherwise break a run after hours: another version, other data, a firewall, a slow link.
`lte train --launch` runs it on every node:

with open_preflight(settings, facts, log=print) as preflight:
    result = preflight.run()
    ports = preflight.broadcast({"rendezvous_port": 29401} if settings.node == 0 else None, timeout_s=30)
    preflight.barrier("start", timeout_s=30)
"""

from __future__ import annotations

from typing import Any

from simulate.launch.preflight.coordinator import Coordinator
from simulate.launch.preflight.joining_node import JoiningNode
from simulate.launch.preflight.node_info import Facts
from simulate.launch.preflight.settings import Preflight, Settings


def open_preflight(settings: Settings, facts: Facts, **more: Any) -> Preflight:
    """Return this node's part, made with Preflight's fields; raises InputError before anything is opened."""
    part = Preflight if settings.nodes == 1 else Coordinator if settings.node == 0 else JoiningNode
    return part(settings, facts, **more)
