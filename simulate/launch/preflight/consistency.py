"""Comparison of all nodes' facts with node 0's: errors that forbid a run, and warnings, one line each.

Nodes with other versions, another run.toml or other data would train something else, or fail hours later. The
coordinator calls `compare` once all nodes have joined; a node that rejoins a run is compared in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simulate.launch.preflight.node_info import NodeFacts

CLOCK_ERROR_S = 60.0
"""Largest clock offset of a run; beyond it, time-outs and the order of log lines across nodes mean nothing."""
CLOCK_WARNING_S = 1.0
_KEYS_SHOWN = 3
_VALUE_CHARACTERS = 60
_MISSING = object()


@dataclass
class Verdict:
    """Errors and warnings of a comparison."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def compare(nodes: Sequence[NodeFacts]) -> Verdict:
    """Compare each node's facts with the first one's, node 0's."""
    verdict = Verdict()
    node_0 = nodes[0]
    for node in nodes[1:]:
        same_program = _versions(node_0, node, verdict)
        # Another version may have other keys in run.toml; then only the version is reported, which is the cause.
        if same_program and node.run_fingerprint != node_0.run_fingerprint:
            verdict.errors.append(_run_differs(node_0, node))
        if (node.data_fingerprint, node.data_bytes) != (node_0.data_fingerprint, node_0.data_bytes):
            verdict.errors.append(_data_differs(node_0, node))
        _clock(node, verdict)
    verdict.warnings += [f"{node.title}: {_shown(line)}" for node in nodes for line in node.warnings]
    return verdict


def _versions(node_0: NodeFacts, node: NodeFacts, verdict: Verdict) -> bool:
    """Compare the versions of lte and torch; returns whether both nodes run the same lte."""
    for program, here, there in (("lte", node_0.lte, node.lte), ("torch", node_0.torch, node.torch)):
        if here.partition("+")[0] != there.partition("+")[0]:
            verdict.errors.append(
                f"{node.title}: its {program} is {_shown(there)}, node 0's is {_shown(here)}; "
                "install the same version on both"
            )
        elif here != there:
            # Builds of one release for other hardware (+cpu, +cu126) work together.
            verdict.warnings.append(
                f"{node.title}: its {program} is another build ({_shown(there)}) than node 0's ({_shown(here)})"
            )
    return node.lte == node_0.lte


def _run_differs(node_0: NodeFacts, node: NodeFacts) -> str:
    # Both nodes' keys, in the order of run.toml, since either may have more.
    keys = [key for key in {**node_0.run, **node.run} if node_0.run.get(key, _MISSING) != node.run.get(key, _MISSING)]
    pairs = [
        f"{key} = {_value(node_0.run, key)} on node 0, {_value(node.run, key)} on node {node.node}"
        for key in keys[:_KEYS_SHOWN]
    ]
    if len(keys) > _KEYS_SHOWN:
        pairs.append(f"{len(keys) - _KEYS_SHOWN} more")
    if not pairs:  # equal as JSON, unequal in the text that the fingerprint covers
        pairs = [f"digest {_digest(node_0.run_fingerprint)} on node 0, {_digest(node.run_fingerprint)} there"]
    return f"{node.title}: its run.toml differs from node 0's ({'; '.join(pairs)}); copy node 0's run.toml to it"


def _data_differs(node_0: NodeFacts, node: NodeFacts) -> str:
    # The embedded text comes with Python and cannot be copied.
    fix = "copy node 0's data to it"
    if node_0.run.get("data.name") == "stdlib":
        fix = "their Python versions differ, so give all nodes one text (--data PATH)"
    contents = f"{_content(node_0)} on node 0, {_content(node)} on node {node.node}"
    return f"{node.title}: its data has other content ({contents}); {fix}"


def _clock(node: NodeFacts, verdict: Verdict) -> None:
    offset_s = node.clock_offset_s
    if abs(offset_s) <= CLOCK_WARNING_S:
        return
    direction = "ahead of" if offset_s > 0 else "behind"
    text = f"{node.title}: its clock is {abs(offset_s):,.1f} s {direction} node 0's"
    if abs(offset_s) > CLOCK_ERROR_S:
        verdict.errors.append(f"{text}, more than {CLOCK_ERROR_S:.0f} s; set both by NTP (timedatectl set-ntp true)")
    else:
        verdict.warnings.append(f"{text}; compare times in their logs with care")


def _content(node: NodeFacts) -> str:
    return f"{node.data_bytes:,} bytes with digest {_digest(node.data_fingerprint)}"


def _digest(digest: str) -> str:
    return _shown(digest[:8])


def _value(run: dict[str, Any], key: str) -> str:
    if key not in run:
        return "not set"
    text = json.dumps(run[key])
    return text if len(text) <= _VALUE_CHARACTERS else text[: _VALUE_CHARACTERS - 3] + "..."


def _shown(text: str) -> str:
    """Return a peer's text without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
