"""Keys, exit codes and the message log that the processes of a launched run share.

Agent, supervisor and worker meet in the key-value store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

    from simulate.launch.lasting_store import LastingStore

STOP, STEP, START, LINKS = "stop", "step", "start", "links"
"""Store keys: a wish to stop, the newest checkpoint's step, facts for the start event, measured links."""
OUTCOME, FATAL = "outcome", "fatal"
"""Store keys: how the run ended (JSON), and whether a restart is useless."""
ATTEMPT = "attempt"
"""Store key: how far the newest start of the processes is, then their titles and their keys' prefix (JSON)."""
REPORTED = "told"
"""Store key that counts messages; `told/K` holds the K-th."""
BEGUN, ANSWERED = "begun", "answered"
"""Store keys: how often the run began, and how many messages its restart events have quoted."""

NODES = "nodes"
"""Store key: the facts of all nodes, for one that comes back while node 0 may be away (JSON)."""

FAILED_EXIT, FATAL_EXIT, REPORTED_EXIT = 1, 2, 3
"""A worker's exit codes: unexplained, useless to restart, and explained in the message log."""
AGENT_THREAD, LISTENER_THREAD = "lte-agent", "lte-listener"
"""Threads that may hang in a call to a store behind a dead link; ltecli.errors then ends the process by force."""


def log(store: Store | LastingStore, text: str) -> None:
    """Append a line to the message log, which every node's supervisor prints."""
    store.set(f"{REPORTED}/{store.add(REPORTED, 1)}", text)
