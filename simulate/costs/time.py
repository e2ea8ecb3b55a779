"""Seconds of the profile's hardware: compute from rates and bandwidth, exchanges from bytes, links and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from simulate.config import Run, Train
from simulate.costs.flops import merge_flops, pass_flops, update_flops
from simulate.costs.holding import holding
from simulate.costs.kernels import KernelRates, pass_s, products_s, sum_of_products
from simulate.costs.pace import round_compute_s
from simulate.costs.schedule import num_rounds, schedule
from simulate.costs.traffic import ELEMENT_BYTES, PRODUCT_BYTES, Exchange, Transfer, frozen_bytes
from simulate.hardware import Device, Link
from simulate.models.shapes import ModelShape
from simulate.options import AdapterOptions, DdpOptions, LteOptions, SapipeOptions, SignsgdOptions, TopkOptions

ADAM_ELEMENTS_MOVED = 3
"""A fused AdamW step reads weight and gradient and writes the weight."""
ADAM_MOMENTS_MOVED = 4
"""And it reads and writes two moments."""
CLIP_ELEMENTS_MOVED = 3
"""Clipping reads gradients for their norm, and reads and writes them to scale them; counted with measured rates."""
COMPRESSION_ELEMENTS_MOVED = 8
"""Estimate: compressing reads gradient and residual, writes the message and the residual, and reads what arrives."""


@dataclass(frozen=True)
class RoundTime:
    """Seconds of one round of `steps` optimizer steps."""

    steps: int
    compute_s: float
    """Of one step: of the slowest device, or with a deadline a T-th of what the round gives everybody."""
    merge_s: float
    """Of the arithmetic of a round's merges."""
    exchange_s: float
    """Of a round's messages, as far as no compute hides them; the mean over the run's rounds."""
    device_steps: float
    """Optimizer steps of all devices together in a round."""

    @property
    def round_s(self) -> float:
        """The whole round."""
        return self.steps * self.compute_s + self.merge_s + self.exchange_s


def round_time(run: Run, shape: ModelShape, devices: Sequence[Device], link: Link) -> RoundTime:
    """Return a round's time; in lockstep everybody waits for the slowest device, with a deadline for nobody.

    Unless a device's single step takes longer than that.
    """
    kinds = {_Rates.of(run.train, device) for device in distinct(devices)}
    if run.method.is_paced:
        steps_s, device_steps = round_compute_s(run.method, device_step_s(run, shape, devices))
        step_s = steps_s / run.method.round_steps
    else:
        step_s = max(compute_s(run, shape, kind) for kind in kinds)
        device_steps = float(run.method.round_steps * len(devices))
    merge_s = max(merge_compute_s(run, shape, kind) for kind in kinds)
    parts = schedule(run, shape)
    # What is sent at a merge travels behind the arithmetic there, too.
    own_s = merge_s / run.method.merges_per_round
    total_s = sum(
        times * max(0.0, exchange_s(part.exchange, link) - (steps * step_s + own_s if steps else 0.0))
        for part in parts
        for times, steps in part.hidden(run.train.steps)
    )
    return RoundTime(
        steps=run.method.round_steps,
        compute_s=step_s,
        merge_s=merge_s,
        exchange_s=total_s / num_rounds(run),
        device_steps=device_steps,
    )


def device_step_s(run: Run, shape: ModelShape, devices: Sequence[Device]) -> tuple[float, ...]:
    """Return the seconds that each device needs for a step."""
    return _of_each(devices, lambda device: compute_s(run, shape, _Rates.of(run.train, device)))


def device_merge_s(run: Run, shape: ModelShape, devices: Sequence[Device]) -> tuple[float, ...]:
    """Return the seconds that each device needs for the arithmetic of a round's merges."""
    return _of_each(devices, lambda device: merge_compute_s(run, shape, _Rates.of(run.train, device)))


def _of_each(devices: Sequence[Device], seconds_of: Callable[[Device], float]) -> tuple[float, ...]:
    kinds = distinct(devices)
    if len(kinds) == 1:
        return (seconds_of(kinds[0]),) * len(devices)
    by_kind = {id(device): seconds_of(device) for device in kinds}
    return tuple(by_kind[id(device)] for device in devices)


def distinct(devices: Sequence[Device]) -> list[Device]:
    """Return each kind of device once, in order; thousands of one kind are told in one pass."""
    first = devices[0]
    if devices.count(first) == len(devices):
        return [first]
    return list({id(device): device for device in devices}.values())


@dataclass(frozen=True)
class _Rates:
    """What a device sustains."""

    flop_per_s: float
    """Of operations on weights."""
    pass_flop_per_s: float
    """Of forward and backward passes."""
    memory_bytes_per_s: float
    kernels: KernelRates | None = None
    """By size, where they were measured."""

    @classmethod
    def of(cls, train: Train, device: Device) -> _Rates:
        own = device.flop_per_s.of(train.dtype) * device.efficiency
        passes = own if train.autocast == "none" else device.flop_per_s.of(train.autocast) * device.efficiency
        return cls(own, passes, device.memory_bytes_per_s, KernelRates.of(train, device))


def compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Seconds of one optimizer step: arithmetic, the optimizer's memory traffic, unpacking of quantised weights."""
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    method = run.method
    trained = holding(run, shape).trained
    moment_bytes = element_bytes if run.train.optimizer_state == "fp32" else 1
    optimizer_bytes = trained * (ADAM_ELEMENTS_MOVED * element_bytes + ADAM_MOMENTS_MOVED * moment_bytes)
    moved_bytes = 0
    if isinstance(method, SapipeOptions | TopkOptions | SignsgdOptions) or (
        isinstance(method, DdpOptions) and method.wire != "full"
    ):
        moved_bytes += COMPRESSION_ELEMENTS_MOVED * shape.parameters * element_bytes
    unpacked_bytes = 0
    if method.frozen_format != "none":
        # Forward and backward each read the packed form, write and read the plain one.
        packed = frozen_bytes(shape, method.frozen_format, element_bytes)
        unpacked_bytes = 2 * (packed + 2 * shape.adapted_parameters * element_bytes)
    moved_bytes += unpacked_bytes + _cast_bytes(run, shape)
    if rates.kernels is None:
        moved_bytes += optimizer_bytes
        passes_s = pass_flops(run, shape) / rates.pass_flop_per_s
    else:
        clipped_bytes = CLIP_ELEMENTS_MOVED * trained * element_bytes
        moved_s = rates.kernels.optimizer.seconds(optimizer_bytes, optimizer_bytes + clipped_bytes)
        passes_s = pass_s(run, shape, rates.kernels) + moved_s
    return passes_s + update_flops(run, shape) / rates.flop_per_s + moved_bytes / rates.memory_bytes_per_s


def _cast_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes that autocast reads and writes of weights: frozen ones are cast again in the backward pass."""
    if run.train.autocast == "none":
        return 0
    element_bytes = ELEMENT_BYTES[run.train.dtype] + PRODUCT_BYTES[run.train.autocast]
    return shape.adapted_parameters * element_bytes * (2 if isinstance(run.method, AdapterOptions) else 1)


def merge_compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Seconds of a round's merges: products, and the weights read and written once (with momentum: twice)."""
    method = run.method
    if isinstance(method, AdapterOptions):
        merges = 1.0 if isinstance(method, LteOptions) else 0.0
        moved = 2 * merges * shape.adapted_parameters
    else:
        moved = 0.0 if method.round_steps == 1 else 2.0 * shape.parameters + 2.0 * holding_extra(run, shape)
    moved_bytes = moved * ELEMENT_BYTES[run.train.dtype]
    flops, moved_s = merge_flops(run, shape), moved_bytes / rates.memory_bytes_per_s
    if rates.kernels is None or not flops:
        return flops / rates.flop_per_s + moved_s
    products = sum_of_products(run, shape)
    # What the layers' products together reach, over the operations that the merge makes of them.
    return flops * products_s(products, rates.kernels) / sum(product.flops for product in products) + moved_s


def holding_extra(run: Run, shape: ModelShape) -> int:
    """Elements of a method's own state, which a merge reads and writes."""
    return holding(run, shape).extra


@lru_cache(maxsize=4096)
def exchange_s(exchange: Exchange, link: Link) -> float:
    """Seconds of messages that are made one after the other."""
    return sum(transfer_s(transfer, link) for transfer in exchange.transfers)


def transfer_s(transfer: Transfer, link: Link) -> float:
    """Seconds of one message: latencies in sequence plus bytes over the slowest link they cross.

    Ring algorithms (Patarasuk & Yuan 2009): all-reduce takes 2(N−1) hops of 1/N of the buffer, all-gather N−1 hops of
    one contribution. On a mesh every pair has a link, so both need one or two hops. An all-to-all sends its N−1 parts
    one after the other; on a ring neighbours pass on what is not theirs. A broadcast goes down a tree of halves. A
    server on a star has one link of its own for all devices; on a ring it is reached through two neighbours, which
    carry half the devices each. Several teams are nodes, whose devices are joined by the node's own links.
    """
    if transfer.devices == 1:
        return 0.0
    if transfer.operation in ("push", "pull"):
        return _server_s(transfer, transfer.devices, link)
    within_node = transfer.teams > 1 and link.node_bytes_per_s is not None
    hop_bytes_per_s = link.node_bytes_per_s if within_node else min(link.up_bytes_per_s, link.down_bytes_per_s)
    latency_s = (link.node_latency_s or 0.0) if within_node else link.latency_s
    assert hop_bytes_per_s is not None
    devices, mesh = transfer.devices, link.topology == "mesh" and not within_node
    hops, share = {
        "all_reduce": (2 if mesh else 2 * (devices - 1), 1 / devices),
        "all_gather": (1 if mesh else devices - 1, 1.0),
        "all_to_all": (1 if mesh else devices - 1, _all_to_all_share(devices, link)),
        "broadcast": (1 if mesh else (devices - 1).bit_length(), 1.0),
    }[transfer.operation]
    if transfer.operation in ("all_reduce", "all_gather") and not mesh:
        latency_s *= link.hop_delays
    seconds = hops * (latency_s + share * transfer.payload_bytes / hop_bytes_per_s)
    if link.shared_bytes_per_s is None or within_node:
        return seconds
    return max(seconds, hops * latency_s + _shared_s(transfer, link.shared_bytes_per_s, share, hops))


def _shared_s(transfer: Transfer, shared_bytes_per_s: float, share: float, hops: int) -> float:
    """Seconds of the bytes of all hops through the one uplink that all devices share.

    A hop of a ring has all devices send, one of a mesh has them send to everyone; a broadcast sends N−1 copies.
    """
    devices = transfer.devices
    if transfer.operation == "broadcast":
        sent_bytes = float((devices - 1) * transfer.payload_bytes)
    else:
        one_to_one = max(hops, devices - 1) if transfer.operation != "all_reduce" else 2 * (devices - 1)
        sent_bytes = devices * one_to_one * share * transfer.payload_bytes
    return transfer.teams * sent_bytes / shared_bytes_per_s


def _all_to_all_share(devices: int, link: Link) -> float:
    """Share of a device's payload in each of N−1 hops: one part; on a ring, half of the parts on average."""
    return 0.5 if link.topology == "ring" else 1 / devices


def server_rates(push: bool, devices: int, link: Link) -> tuple[float, float]:
    """Return the bytes/s that one device reaches to or from the server, and that all devices reach together."""
    device_bytes_per_s = link.up_bytes_per_s if push else link.down_bytes_per_s
    server_bytes_per_s = link.server_down_bytes_per_s if push else link.server_up_bytes_per_s
    if server_bytes_per_s is None:  # as fast as a device's; a ring and a mesh reach it over 2 or N such links
        links = {"star": 1, "ring": min(2, devices), "mesh": devices}[link.topology]
        server_bytes_per_s = links * (link.down_bytes_per_s if push else link.up_bytes_per_s)
    if push and link.shared_bytes_per_s is not None:
        server_bytes_per_s = min(server_bytes_per_s, link.shared_bytes_per_s)
    return device_bytes_per_s, server_bytes_per_s


def server_latency_s(devices: int, link: Link) -> float:
    """Return the delay of a message to or from the server: on a ring, half of the devices pass it on."""
    return (-(-devices // 2) if link.topology == "ring" else 1) * link.latency_s


def _server_s(transfer: Transfer, devices: int, link: Link) -> float:
    device_bytes_per_s, server_bytes_per_s = server_rates(transfer.operation == "push", devices, link)
    payload = transfer.payload_bytes
    return server_latency_s(devices, link) + max(payload / device_bytes_per_s, devices * payload / server_bytes_per_s)
