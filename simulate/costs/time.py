"""Seconds of the profile's hardware: compute from rates and bandwidth, exchanges from bytes, links and latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from simulate.config import LteOptions, Run
from simulate.costs.flops import merge_flops, step_flops
from simulate.costs.traffic import ELEMENT_BYTES, Exchange, Transfer, frozen_bytes, round_exchange
from simulate.hardware import Device, Link
from simulate.models.shapes import ModelShape

ADAM_ELEMENTS_MOVED = 7
"""A fused AdamW step reads weight, gradient and two moments, and writes weight and moments."""


@dataclass(frozen=True)
class RoundTime:
    """Seconds of one round of `steps` optimizer steps, on the slowest device."""

    steps: int
    compute_s: float
    """Of one step."""
    merge_s: float
    """Of a merge's arithmetic."""
    exchange_s: float
    """Of a round's messages."""

    @property
    def round_s(self) -> float:
        """The whole round."""
        return self.steps * self.compute_s + self.merge_s + self.exchange_s


def round_time(run: Run, shape: ModelShape, devices: Sequence[Device], link: Link) -> RoundTime:
    """Return a round's time; in lockstep, everybody waits for the slowest device."""
    kinds = {_Rates.of(run.train.dtype, device) for device in {id(device): device for device in devices}.values()}
    return RoundTime(
        steps=run.method.merge_every if isinstance(run.method, LteOptions) else 1,
        compute_s=max(compute_s(run, shape, kind) for kind in kinds),
        merge_s=max(merge_compute_s(run, shape, kind) for kind in kinds),
        exchange_s=exchange_s(round_exchange(run, shape), link),
    )


@dataclass(frozen=True)
class _Rates:
    """What a device sustains."""

    flop_per_s: float
    memory_bytes_per_s: float

    @classmethod
    def of(cls, dtype: str, device: Device) -> _Rates:
        return cls(device.flop_per_s.of(dtype) * device.efficiency, device.memory_bytes_per_s)  # type: ignore[arg-type]


def compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Seconds of one optimizer step: arithmetic, the optimizer's memory traffic, unpacking of quantised weights."""
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    method = run.method
    trained, unpacked_bytes = shape.parameters, 0
    if isinstance(method, LteOptions):
        trained = method.heads_per_device * shape.factors(method.rank) + shape.replicated_parameters
        if method.quantize != "none":  # forward and backward each read the packed form, write and read the plain one
            packed = frozen_bytes(shape, method.quantize, element_bytes)
            unpacked_bytes = 2 * (packed + 2 * shape.adapted_parameters * element_bytes)
    moved_bytes = ADAM_ELEMENTS_MOVED * trained * element_bytes + unpacked_bytes
    return step_flops(run, shape) / rates.flop_per_s + moved_bytes / rates.memory_bytes_per_s


def merge_compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Seconds of a merge's arithmetic: the products, and the weights read and written once."""
    if not isinstance(run.method, LteOptions):
        return 0.0
    moved_bytes = 2 * shape.adapted_parameters * ELEMENT_BYTES[run.train.dtype]
    return merge_flops(run, shape) / rates.flop_per_s + moved_bytes / rates.memory_bytes_per_s


@lru_cache(maxsize=4096)
def exchange_s(exchange: Exchange, link: Link) -> float:
    """Seconds of a round's messages, one after the other."""
    return sum(transfer_s(transfer, exchange.devices, link) for transfer in exchange.transfers)


def transfer_s(transfer: Transfer, devices: int, link: Link) -> float:
    """Seconds of one message: latencies in sequence plus bytes over the slowest link they cross.

    Ring algorithms (Patarasuk & Yuan 2009): all-reduce takes 2(N−1) hops of 1/N of the buffer, all-gather N−1 hops of
    one contribution. On a mesh every pair has a link, so both need one or two hops. A server on a star has one link of
    its own for all devices; on a ring it is reached through two neighbours, which carry half the devices each.
    """
    hop_bytes_per_s = min(link.up_bytes_per_s, link.down_bytes_per_s)
    if transfer.operation in ("push", "pull"):
        return _server_s(transfer, devices, link)
    payload, hops = transfer.payload_bytes, 1 if link.topology == "mesh" else devices - 1
    if transfer.operation == "all_reduce":
        return 2 * hops * (link.latency_s + payload / devices / hop_bytes_per_s)
    return hops * (link.latency_s + payload / hop_bytes_per_s)


def _server_s(transfer: Transfer, devices: int, link: Link) -> float:
    push = transfer.operation == "push"
    device_bytes_per_s = link.up_bytes_per_s if push else link.down_bytes_per_s
    server_bytes_per_s = link.server_down_bytes_per_s if push else link.server_up_bytes_per_s
    if server_bytes_per_s is None:  # as fast as a device's; a ring and a mesh reach it over 2 or N such links
        links = {"star": 1, "ring": min(2, devices), "mesh": devices}[link.topology]
        server_bytes_per_s = links * (link.down_bytes_per_s if push else link.up_bytes_per_s)
    hops = -(-devices // 2) if link.topology == "ring" else 1
    payload = transfer.payload_bytes
    return hops * link.latency_s + max(payload / device_bytes_per_s, devices * payload / server_bytes_per_s)
