"""Measured figures of the ring's links, edge by edge, and their conversion into the link of a hardware profile.

The preflight measures them and warns of links slower than planned; `lte plan --link-from` and `lte profile measure
--link-from` plan with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from simulate.common import toml_io
from simulate.config.hardware import MOST_BYTES, Link
from simulate.launch.preflight.channel import parse

MOST_LATENCY_S = 3600.0
"""Largest latency that is believed; every deadline of a preflight is shorter."""
SLOW_FACTOR = 5.0
"""Factor by which a link must miss the profile to be warned of: planned times are then far off."""
_NOTICEABLE_S = 1e-3
"""Seconds of extra latency below which the difference may be this program's own."""


class LinkFigures(toml_io.Schema):
    """Link from a node to its successor in the ring of all-reduce and all-gather, measured over TCP."""

    sender: int = Field(ge=0)
    receiver: int = Field(ge=0)
    latency_s: float = Field(gt=0, le=MOST_LATENCY_S)
    """One-way latency: half of an echo's median time, with this program's own share of about 20 µs."""
    bytes_per_s: float = Field(gt=0, le=MOST_BYTES)
    """Rate while no other link is measured."""
    loaded_bytes_per_s: float = Field(gt=0, le=MOST_BYTES)
    """Rate while every node sends to its successor and receives from its predecessor, as in collectives."""
    sent_bytes: int = Field(ge=0)
    """Bytes that the measurement sent."""

    def __str__(self) -> str:
        return (
            f"node {self.sender} to node {self.receiver}: {rate_text(self.bytes_per_s)} alone, "
            f"{rate_text(self.loaded_bytes_per_s)} with all links busy, latency {self.latency_s * 1e3:.3g} ms"
        )


def parse_link(given: Any) -> LinkFigures:
    """Validate a link's figures on arrival, or from a run's events; raises BadFrameError."""
    return parse(LinkFigures, given, "link figures")


def measured_link(links: Sequence[LinkFigures], planned: Link) -> Link:
    """Return the profile's link with measured figures in place of its own; raises ValueError without links.

    A ring is as fast as its slowest edge. So both up and down are that edge's rate under load (each edge is one node's
    up and another one's down), and the latency is the longest. All other figures stay as planned; `sources` says which.
    """
    if not links:
        raise ValueError("no link was measured")
    # In a collective all edges are busy at once, so loaded rates count.
    slowest = min(links, key=lambda link: link.loaded_bytes_per_s)
    farthest = max(links, key=lambda link: link.latency_s)
    rate = f"TCP, all ring edges busy; the slowest: node {slowest.sender} to node {slowest.receiver}"
    replaced = {"up_bytes_per_s", "down_bytes_per_s", "latency_s", "source", "sources"}
    planned_figures = planned.model_dump(exclude=replaced, exclude_none=True)
    return Link(
        **planned_figures,
        up_bytes_per_s=slowest.loaded_bytes_per_s,
        down_bytes_per_s=slowest.loaded_bytes_per_s,
        latency_s=farthest.latency_s,
        source="measured",
        sources={
            **dict.fromkeys(planned_figures, "as planned, not measured"),
            "up_bytes_per_s": rate,
            "down_bytes_per_s": rate,
            "latency_s": f"half an echo; the farthest: node {farthest.sender} to node {farthest.receiver}",
        },
    )


def slow_links(links: Sequence[LinkFigures], planned: Link) -> list[str]:
    """Return a warning for each figure that is SLOW_FACTOR times worse than planned."""
    planned_rate = min(planned.up_bytes_per_s, planned.down_bytes_per_s)
    warnings = []
    for link in links:
        way = f"node {link.sender} to node {link.receiver}"
        if link.loaded_bytes_per_s * SLOW_FACTOR <= planned_rate:
            warnings.append(
                f"{way} carries {rate_text(link.loaded_bytes_per_s)} with all links busy, "
                f"{planned_rate / link.loaded_bytes_per_s:,.0f} times less than the {rate_text(planned_rate)} planned "
                f"({planned.source}); plan again with what this run measured, by lte plan --link-from RUN"
            )
        # On a fast link the measuring program's own share alone would exceed the factor.
        if link.latency_s >= max(SLOW_FACTOR * planned.latency_s, planned.latency_s + _NOTICEABLE_S):
            warnings.append(
                f"{way} has a latency of {link.latency_s * 1e3:.3g} ms, planned were "
                f"{planned.latency_s * 1e3:.3g} ms ({planned.source}); "
                "plan again with what this run measured, by lte plan --link-from RUN"
            )
    return warnings


def link_failed(title: str) -> str:
    """Return how the error line begins for a link that broke while it was measured; what the next node did follows."""
    return f"the link from {title} to the next node failed while it was measured: the next node"


def rate_text(bytes_per_s: float) -> str:
    """Return a rate for people."""
    value, unit = (bytes_per_s / 1e6, "MB/s") if bytes_per_s >= 1e6 else (bytes_per_s / 1e3, "kB/s")
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
