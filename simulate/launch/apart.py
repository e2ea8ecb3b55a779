"""A launch whose store is apart (`lte store`): nodes find the store, and by it a run that goes on already.

One store serves one run after the other, and a run may be launched again, so every launch has keys of its own, below an
id that node 0 draws and the preflight passes on. The store says which launch of a run is the newest. A node that comes
back reads there who the nodes are, so that it needs no other one, not node 0 either. `lte train --launch --store` makes
a StoreApart.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from simulate.common.errors import InputError
from simulate.launch.agent import Launch
from simulate.launch.heartbeat import is_node_alive
from simulate.launch.keys import NODES, OUTCOME
from simulate.launch.lasting_store import Address, LastingStore, ask_store
from simulate.launch.preflight.channel import reason
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.secret import read_secret
from simulate.launch.preflight.settings import Preflight, Result


class StoreOptions(Protocol):
    """The options of a launch that are about its store."""

    @property
    def store(self) -> str | None: ...
    @property
    def secret_file(self) -> Path | None: ...
    @property
    def trust_network(self) -> bool: ...


class StoreApart:
    """The store of one launch, on a machine of its own. Raises InputError where none answers."""

    def __init__(self, options: StoreOptions, preflight: Preflight) -> None:
        assert options.store is not None
        self.where, self.trust_network = options.store, options.trust_network
        self.secret, self.preflight = read_secret(options.secret_file), preflight
        self.launch_id = ""
        try:
            self.ask()
        except OSError as error:
            raise InputError(f"--store {self.where} does not answer ({reason(error)}); start lte store there") from None

    def ask(self) -> Address:
        """Return where the store is now. Raises InputError, OSError."""
        return ask_store(self.where, self.secret, self.trust_network)

    def running_run(self) -> Result | None:
        """Return the nodes of this run where it goes on already, None where it does not.

        Raises InputError for a node that is unlike it was, or still takes part.
        """
        settings, own = self.preflight.settings, self.preflight.own_facts()
        if settings.nodes == 1:
            return None
        store, newest = self._store(""), f"run/{own.run_fingerprint}"
        if not store.check([newest]):
            return None
        launch_id = store.get(newest).decode()
        store = self._store(launch_id)
        if not store.check([NODES, "group/epoch"]) or store.check([OUTCOME]):
            return None
        nodes = [NodeFacts.model_validate(node) for node in json.loads(store.get(NODES))]
        self._check_same(own, nodes)
        if is_node_alive(store, settings.node):
            raise InputError(f"node {settings.node} is part of the run; give each machine its own --node")
        self.launch_id = launch_id
        self.preflight.log("the run has already begun; this node rejoins it")
        return Result(nodes, [], [])

    def connect(self, launch: Launch, nodes: Sequence[NodeFacts]) -> None:
        """Connect this node's agent. Of a run that only begins, all nodes must call this. Raises RunFailedError."""
        timeout_s, is_new = launch.run.cluster.join_timeout_s, not self.launch_id
        if is_new:
            own_id = uuid.uuid4().hex if launch.node.number == 0 else None
            self.launch_id = str(self.preflight.broadcast(own_id, timeout_s))
        # Without run.toml, which has paths and which all nodes have: the store encrypts nothing.
        launch.nodes = [{**node.model_dump(), "run": {}} for node in nodes]
        launch.find_store(self.ask, self.launch_id)
        launch.tell_nodes()
        if is_new:
            self.preflight.barrier("start", timeout_s)

    def _store(self, prefix: str) -> LastingStore:
        return LastingStore(self.ask, self.preflight.settings.join_timeout_s, prefix)

    def _check_same(self, own: NodeFacts, nodes: Sequence[NodeFacts]) -> None:
        """Raise InputError where this node is unlike it was when the run began."""
        was = nodes[own.node]
        if errors := compare([was, own]).errors:
            raise InputError(errors[0])
        if (own.processes, own.address) != (was.processes, was.address):
            raise InputError(
                f"node {own.node} began this run with {was.processes} processes at {was.address}, and is here with "
                f"{own.processes} at {own.address}; give it the same line as then"
            )
