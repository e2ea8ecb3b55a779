"""A node's facts, which it sends to node 0; validated on arrival, since a peer's facts are input, too."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from simulate.common import toml_io
from simulate.config.run import Run, run_fingerprint, without_places
from simulate.launch.preflight.channel import parse
from simulate.launch.preflight.handshake import PROTOCOL

MAX_WARNINGS, MAX_WARNING = 32, 600
"""Most warnings of a node, and most characters of one."""


class Facts(toml_io.Schema):
    """Facts that must be the same on all nodes, and the number of processes that each one starts."""

    lte: str = Field(max_length=100)
    """Version of lte."""
    torch: str = Field(max_length=100)
    """Version of torch."""
    run_fingerprint: str = Field(max_length=128)
    run: dict[str, Any]
    """run.toml with dotted keys, "method.rank" to 16; names the keys that differ."""
    data_fingerprint: str = Field(max_length=128)
    data_bytes: int = Field(ge=0)
    processes: int = Field(gt=0, le=1024)
    """Worker processes that the node starts."""
    warnings: list[Annotated[str, Field(max_length=MAX_WARNING)]] = Field(default=[], max_length=MAX_WARNINGS)
    """Findings of the node's doctor, a line each; all nodes show it."""

    @classmethod
    def of(
        cls, run: Run, *, lte: str, torch: str, data_fingerprint: str, data_bytes: int, processes: int,
        warnings: Sequence[str] = (),
    ) -> Facts:  # fmt: skip
        """Return the facts of a run on this machine; `lte` and `torch` are versions."""
        run = without_places(run)
        return cls(
            lte=lte,
            torch=torch,
            run_fingerprint=run_fingerprint(run),
            run=flat_table(run.model_dump()),
            data_fingerprint=data_fingerprint,
            data_bytes=data_bytes,
            processes=processes,
            warnings=[line[:MAX_WARNING] for line in warnings[:MAX_WARNINGS]],
        )


class NodeFacts(Facts):
    """A node's facts, with its number and addresses."""

    node: int = Field(ge=0)
    nodes: int = Field(gt=0)
    protocol: int = PROTOCOL
    interface: str = Field(max_length=100)
    address: str = Field(max_length=100)
    """Numeric address that all sockets of the node bind to; empty in a run of one node."""
    link_port: int = Field(ge=0, lt=65536)
    """Port that the other nodes call to measure links; 0 in a run of one node."""
    clock_offset_s: float = 0.0
    """Seconds that its clock is ahead of node 0's, as node 0 measured."""

    @field_validator("address")
    @classmethod
    def _numeric(cls, address: str) -> str:
        if address:
            ipaddress.ip_address(address)
        return address

    @property
    def title(self) -> str:
        """The node and its address, for messages: "node 2 (192.168.1.7)"."""
        return f"node {self.node} ({self.address})" if self.address else f"node {self.node}"


def parse_facts(given: Any) -> NodeFacts:
    """Validate a node's facts on arrival; raises BadFrameError."""
    return parse(NodeFacts, given, "facts")


def flat_table(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted keys and JSON values, without None."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flat_table(value, f"{prefix}{key}.")
        elif value is not None:
            # As a peer's facts arrive: JSON has no tuples, and a comparison with one would fail.
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
