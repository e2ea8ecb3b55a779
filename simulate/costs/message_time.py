"""Seconds of one message: bytes over the slowest link that they cross, plus the delays that follow one another.

These formulas state how each library moves a message: NCCL's collectives, whose hops take a delay each, or what
simulate.comm.process_group does with gloo. Gloo sends a buffer when the other end has requested it, so a hop takes two
delays, the request's and the buffer's (2.0 to 2.9 were measured: bench/README.md). Large buffers travel in gloo's
rings, all others between all pairs at once (simulate.comm.pairwise). Where devices have lines of their own, the slowest
of the message's paths paces it (simulate.costs.line_paths). simulate.costs.step_time adds up transfer_s for plans and
the simulated clock; the timeline reads the server's rates and delays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from simulate.comm.transfers import Transfer, gathers_by_pairs, sums_by_pairs
from simulate.config.hardware import Collectives, Link
from simulate.costs.line_paths import Path, ring_paths, slowest_server_paths, swap_paths, tree_paths


def link_of(link: Link, backend: str) -> Link:
    """Return the link as a run's cluster.backend uses it; "auto" leaves that to the profile."""
    return link if backend in ("auto", link.collectives) else _used_by(link, backend)


@lru_cache(maxsize=64)
def _used_by(link: Link, backend: Collectives) -> Link:
    return link.model_copy(update={"collectives": backend})


def transfer_s(transfer: Transfer, link: Link) -> float:
    """Return the seconds of one message.

    Several teams are nodes, whose devices use the node's own links. A server on a star has one link for all devices; on
    a ring two neighbours connect it, each of which carries the traffic of half the devices.
    """
    if transfer.devices == 1:
        return 0.0
    payload = transfer.payload_bytes
    if transfer.operation in ("push", "pull"):
        if link.lines:
            return _by_lines_s(transfer, link)
        device_bytes_per_s, server_bytes_per_s = server_rates(transfer.operation == "push", transfer.devices, link)
        # The slower of one device's own link and the server's, which carries all devices' bytes.
        device_s, server_s = payload / device_bytes_per_s, transfer.together_bytes / server_bytes_per_s
        return server_latency_s(transfer.devices, link) + max(device_s, server_s)
    seconds = _by_gloo_s if link.collectives == "gloo" else _by_nccl_s
    return max(seconds(transfer, wire) for wire in _wires(transfer, link))


def _by_lines_s(transfer: Transfer, link: Link) -> float:
    """Return the seconds of a push or a pull of devices with lines of their own: the slowest device's.

    All start at once, so each gets at least the smallest of its own rate and its parts of its place's and of the
    server's; this is exact where one of the slowest devices also has the longest delay, and never too short.
    """
    paths, server_bytes_per_s = slowest_server_paths(transfer.operation == "push", transfer.devices, link)
    server_s, delays = transfer.together_bytes / server_bytes_per_s, server_delays(link)
    return max(delays * delay_s + max(transfer.payload_bytes / rate, server_s) for rate, delay_s in paths)


def _wires(transfer: Transfer, link: Link) -> Sequence[_Wire]:
    """Return the wires of a transfer, the slowest of which paces it; links that are all alike are one."""
    wire = _Wire.of(transfer, link)
    if not link.lines or (transfer.teams > 1 and link.node_bytes_per_s is not None):
        return (wire,)
    return _wires_of_lines(link, transfer.devices * transfer.teams, _pattern(transfer, link.collectives))


@lru_cache(maxsize=256)
def _wires_of_lines(link: Link, devices: int, pattern: str) -> tuple[_Wire, ...]:
    if pattern == "tree":
        paths = tree_paths(link, devices)
        up, down = min(path.up_bytes_per_s for path in paths), min(path.down_bytes_per_s for path in paths)
        slowest = Path(up, down, max(path.latency_s for path in paths))
        return (_Wire.on(slowest, link, paths),)
    paths = ring_paths(link, devices) if pattern == "ring" else swap_paths(link, devices)
    return tuple(_Wire.on(path, link) for path in paths)


def _pattern(transfer: Transfer, collectives: Collectives) -> str:
    """Return how a transfer moves: round a ring, between all pairs, or down a tree."""
    payload, devices = transfer.payload_bytes, transfer.devices
    if transfer.operation in ("broadcast", "all_to_all"):
        return "tree" if transfer.operation == "broadcast" else "swap"
    if collectives == "nccl":
        return "ring"
    gathers = transfer.operation == "all_gather"
    by_pairs = transfer.uneven or gathers_by_pairs(payload, devices) if gathers else sums_by_pairs(payload / devices)
    return "swap" if by_pairs else "ring"


@dataclass(frozen=True)
class _Wire:
    """The links that a transfer uses: its devices' own, or those within nodes."""

    topology: str
    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float
    hop_s: float
    """Delay of a hop of a ring, or of a requested message."""
    shared_bytes_per_s: float | None
    """Rate of the uplink that all devices share; None where each has its own."""
    paths: tuple[Path, ...] = ()
    """Every device's path, for messages that go down a tree; empty where all are alike."""

    @classmethod
    def on(cls, path: Path, link: Link, paths: tuple[Path, ...] = ()) -> _Wire:
        """Return one path as a wire."""
        return cls(
            link.topology, path.up_bytes_per_s, path.down_bytes_per_s, path.latency_s,
            path.latency_s * link.delays_of_a_hop, link.shared_bytes_per_s, paths,
        )  # fmt: skip

    @classmethod
    def of(cls, transfer: Transfer, link: Link) -> _Wire:
        if transfer.teams > 1 and link.node_bytes_per_s is not None:
            # A node's own link connects its devices like a switch, without a shared uplink.
            rate, latency_s = link.node_bytes_per_s, link.node_latency_s or 0.0
            return cls("star", rate, rate, latency_s, latency_s * link.delays_of_a_hop, None)
        return cls.on(Path(link.up_bytes_per_s, link.down_bytes_per_s, link.latency_s), link)

    def path(self, device: int) -> Path:
        """Return the path of a device in the tree."""
        return self.paths[device] if self.paths else Path(self.up_bytes_per_s, self.down_bytes_per_s, self.latency_s)

    @property
    def bytes_per_s(self) -> float:
        return min(self.up_bytes_per_s, self.down_bytes_per_s)


def _by_nccl_s(transfer: Transfer, wire: _Wire) -> float:
    """Return the seconds of a collective whose hops take a delay each.

    Ring algorithms (Patarasuk & Yuan 2009): all-reduce takes 2(N−1) hops of 1/N of the buffer, all-gather N−1 hops of
    one contribution. On a mesh every pair has a link, so both need one or two hops. An all-to-all sends its N−1 parts
    one after the other; on a ring neighbours forward the parts of others. A broadcast goes down a binary tree.
    """
    devices, mesh = transfer.devices, wire.topology == "mesh"
    to_all_share = 0.5 if wire.topology == "ring" else 1 / devices
    hops, share = {
        "all_reduce": (2 if mesh else 2 * (devices - 1), 1 / devices),
        "all_gather": (1 if mesh else devices - 1, 1.0),
        "all_to_all": (1 if mesh else devices - 1, to_all_share),
        "broadcast": (1 if mesh else (devices - 1).bit_length(), 1.0),
    }[transfer.operation]
    # Only rings of NCCL wait for a neighbour's buffer in each hop; all else takes one plain delay a hop.
    in_ring = transfer.operation in ("all_reduce", "all_gather") and not mesh
    latency_s = wire.hop_s if in_ring else wire.latency_s
    seconds = hops * (latency_s + share * transfer.payload_bytes / wire.bytes_per_s)
    if wire.shared_bytes_per_s is None:
        return seconds
    return max(seconds, hops * latency_s + _shared_s(transfer, wire.shared_bytes_per_s, share, hops))


def _shared_s(transfer: Transfer, shared_bytes_per_s: float, share: float, hops: int) -> float:
    """Return the seconds of the bytes of all hops through the one uplink that all devices share.

    In a hop of a ring each device sends to one other, on a mesh to all others; a broadcast sends N−1 copies.
    """
    devices = transfer.devices
    if transfer.operation == "broadcast":
        sent_bytes = float((devices - 1) * transfer.payload_bytes)
    else:
        # A reduction sends each part twice: to its sum, and the sum back.
        one_to_one = max(hops, devices - 1) if transfer.operation != "all_reduce" else 2 * (devices - 1)
        sent_bytes = devices * one_to_one * share * transfer.payload_bytes
    return transfer.teams * sent_bytes / shared_bytes_per_s


def _by_gloo_s(transfer: Transfer, wire: _Wire) -> float:
    """Return the seconds of a collective as simulate.comm.process_group runs it with gloo.

    A reduction by pairs swaps parts twice: to sum them, and to return the sums. Rings ignore the topology.
    """
    devices, payload = transfer.devices, transfer.payload_bytes
    if transfer.operation == "broadcast":
        return _tree_s(transfer, wire)
    if transfer.operation == "all_to_all":
        return _swap_s(payload / devices, transfer, wire)
    if transfer.operation == "all_gather":
        if transfer.uneven or gathers_by_pairs(payload, devices):  # rings of gloo gather equal parts only
            return _swap_s(payload, transfer, wire)
        return _ring_s(devices - 1, payload, transfer, wire)
    # What is left is an all-reduce: by pairs for small parts, in a ring of 2(N−1) hops for large ones.
    if sums_by_pairs(payload / devices):
        return 2 * _swap_s(payload / devices, transfer, wire)
    return _ring_s(2 * (devices - 1), payload / devices, transfer, wire)


def _ring_s(hops: int, part_bytes: float, transfer: Transfer, wire: _Wire) -> float:
    return hops * (wire.hop_s + _carried_s(part_bytes, transfer.devices * part_bytes, transfer, wire))


def _swap_s(part_bytes: float, transfer: Transfer, wire: _Wire) -> float:
    """Return the seconds in which each device sends a part to each other one, all at once.

    On a mesh each part has a link of its own. On a ring neighbours forward the parts of others, up to N−1 times.
    """
    # `crossed`: parts that cross one device's link; `reach`: hops until the last part arrives.
    others = transfer.devices - 1
    crossed, reach = {"mesh": (1.0, 1), "ring": (others * transfer.devices / 2, others)}.get(
        wire.topology, (float(others), 1)
    )
    together = transfer.devices * others * part_bytes
    return reach * wire.hop_s + _carried_s(crossed * part_bytes, together, transfer, wire)


def _carried_s(own_bytes: float, all_bytes: float, transfer: Transfer, wire: _Wire) -> float:
    """Return the longer of a device's bytes over its own link, and all devices' bytes over a shared uplink."""
    seconds = own_bytes / wire.bytes_per_s
    if wire.shared_bytes_per_s is None:
        return seconds
    return max(seconds, transfer.teams * all_bytes / wire.shared_bytes_per_s)


def _tree_s(transfer: Transfer, wire: _Wire) -> float:
    """Return the seconds of a binomial tree: a device with a copy sends it to all its children at once.

    Device v's children are v + 2^i, for every i from the number of v's binary digits on. All devices request their copy
    at the start, so that only the first hop waits for a request.
    """
    devices, payload = transfer.devices, transfer.payload_bytes
    arrived_s = [0.0] * devices
    arrived_s[0] = wire.hop_s - wire.latency_s
    for parent in range(devices):
        digits = range(parent.bit_length(), (devices - 1).bit_length())
        children = [parent + 2**i for i in digits if parent + 2**i < devices]
        # On a mesh each child has a link of its own; else all copies leave over one uplink.
        copies = 1 if wire.topology == "mesh" else len(children)
        above = wire.path(parent)
        for child in children:
            below = wire.path(child)
            sent_s = max(copies * payload / above.up_bytes_per_s, payload / below.down_bytes_per_s)
            arrived_s[child] = arrived_s[parent] + (above.latency_s + below.latency_s) / 2 + sent_s
    seconds = max(arrived_s)
    if wire.shared_bytes_per_s is None:
        return seconds
    delays_s = wire.hop_s - wire.latency_s + (devices - 1).bit_length() * wire.latency_s
    return max(seconds, delays_s + transfer.teams * (devices - 1) * payload / wire.shared_bytes_per_s)


def server_rates(push: bool, devices: int, link: Link) -> tuple[float, float]:
    """Return the bytes/s that one device reaches to or from the server, and that all devices reach together."""
    device_bytes_per_s = link.up_bytes_per_s if push else link.down_bytes_per_s
    server_bytes_per_s = link.server_down_bytes_per_s if push else link.server_up_bytes_per_s
    if server_bytes_per_s is None:  # as fast as a device's; a ring and a mesh reach it over 2 or N such links
        links = {"star": 1, "ring": min(2, devices), "mesh": devices}[link.topology]
        server_bytes_per_s = links * (link.down_bytes_per_s if push else link.up_bytes_per_s)
    # A shared uplink limits what all devices together push; what they pull does not cross it.
    if push and link.shared_bytes_per_s is not None:
        server_bytes_per_s = min(server_bytes_per_s, link.shared_bytes_per_s)
    return device_bytes_per_s, server_bytes_per_s


def server_latency_s(devices: int, link: Link) -> float:
    """Return the delay of a message to or from the server: on a ring, up to half of the devices forward it.

    Gloo requests it first, as every message between a pair.
    """
    return server_delays(link) * (-(-devices // 2) if link.topology == "ring" else 1) * link.latency_s


def server_delays(link: Link) -> float:
    """Return the one-way delays of a message to or from the server."""
    return link.delays_of_a_hop if link.collectives == "gloo" else 1.0
