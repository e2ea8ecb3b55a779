"""Seconds of the profile's hardware: compute from rates and bandwidth, exchanges from bytes, links and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from simulate.comm.transfers import Exchange
from simulate.config.hardware import Device, Dtype, Link
from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.costs.flops import merge_flops, pass_flops, update_flops
from simulate.costs.kernel_time import KernelRates, layers_s, pass_s, products_s, sum_of_products
from simulate.costs.message_schedule import num_rounds, schedule
from simulate.costs.message_time import link_of, transfer_s
from simulate.costs.state import frozen_bytes, persistent_state
from simulate.layers.formats import ELEMENT_BYTES, PRODUCT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of
from simulate.rules.pace import round_compute_s

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
    kinds = [_rates(run, device) for device in distinct(devices)]
    if run.method.is_paced:
        steps_s, device_steps = round_compute_s(run.method, device_step_s(run, shape, devices))
        step_s = steps_s / run.method.round_steps
    else:
        step_s = max(compute_s(run, shape, kind) for kind in kinds)
        device_steps = float(run.method.round_steps * len(devices))
    merge_s = max(merge_compute_s(run, shape, kind) for kind in kinds)
    parts = schedule(run, shape)
    link = link_of(link, run.cluster.backend)
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
    return _of_each(devices, lambda device: compute_s(run, shape, _rates(run, device)))


def device_merge_s(run: Run, shape: ModelShape, devices: Sequence[Device]) -> tuple[float, ...]:
    """Return the seconds that each device needs for the arithmetic of a round's merges."""
    return _of_each(devices, lambda device: merge_compute_s(run, shape, _rates(run, device)))


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


@dataclass(frozen=True, eq=False)
class _Rates:
    """Sustained rates of a device in a run's formats; one object a device, the key of remembered merge times."""

    flop_per_s: float
    """Of operations on weights."""
    pass_flop_per_s: float
    """Of forward and backward passes."""
    memory_bytes_per_s: float
    kernels: KernelRates | None = None
    """By size, where they were measured."""


def _rates(run: Run, device: Device) -> _Rates:
    train = run.train
    return _rates_of(train.dtype, train.dtype if train.autocast == "none" else train.autocast, device)


@lru_cache(maxsize=256)
def _rates_of(dtype: Dtype, passes: Dtype, device: Device) -> _Rates:
    own, of_passes = (device.flop_per_s.of(name) * device.efficiency for name in (dtype, passes))
    return _Rates(own, of_passes, device.memory_bytes_per_s, KernelRates.of(passes, device))


def compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Seconds of one optimizer step: arithmetic, the optimizer's memory traffic, unpacking of quantised weights."""
    moved = _moved(run, shape)
    moved_bytes, passes_s = moved.others, 0.0
    unpacked_s = _unpacked_s(run, shape, rates.kernels)
    if unpacked_s is None:
        moved_bytes += moved.unpacked
    if rates.kernels is None:
        moved_bytes += moved.optimizer
        passes_s = pass_flops(run, shape) / rates.pass_flop_per_s
    else:
        moved_s = rates.kernels.optimizer.seconds(moved.optimizer, moved.optimizer + moved.clipped)
        passes_s = pass_s(run, shape, rates.kernels) + moved_s + (unpacked_s or 0.0)
    return passes_s + update_flops(run, shape) / rates.flop_per_s + moved_bytes / rates.memory_bytes_per_s


def _unpacked_s(run: Run, shape: ModelShape, kernels: KernelRates | None) -> float | None:
    """Seconds of unpacking frozen weights at measured rates: forward, backward, and once more to recompute."""
    method = run.method
    if kernels is None or method.frozen_format == "none":
        return None
    once_s = layers_s(shape, method.frozen_format, kernels.unpack)
    return None if once_s is None else (3 if run.train.activation_checkpointing else 2) * once_s


@dataclass(frozen=True)
class _Moved:
    """Bytes that a step moves beside its passes."""

    optimizer: int
    clipped: int
    unpacked: int
    """Of frozen weights, by memory traffic."""
    others: int
    """Of compression and casts."""


@by_method
def _moved(run: Run, shape: ModelShape) -> _Moved:
    element_bytes, method = ELEMENT_BYTES[run.train.dtype], run.method
    trained = persistent_state(run, shape).trained
    moment_bytes = element_bytes if run.train.optimizer_state == "fp32" else 1
    unpacked, others = 0, _cast_bytes(run, shape)
    if plan_of(method).compresses_gradients:
        others += COMPRESSION_ELEMENTS_MOVED * shape.parameters * element_bytes
    if method.frozen_format != "none":
        # Forward and backward each read the packed form, write and read the plain one.
        packed = frozen_bytes(shape, method.frozen_format, element_bytes)
        unpacked = 2 * (packed + 2 * shape.adapted_parameters * element_bytes)
    return _Moved(
        optimizer=trained * (ADAM_ELEMENTS_MOVED * element_bytes + ADAM_MOMENTS_MOVED * moment_bytes),
        clipped=CLIP_ELEMENTS_MOVED * trained * element_bytes,
        unpacked=unpacked,
        others=others,
    )


def _cast_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes that autocast reads and writes of weights: frozen ones are cast again in the backward pass."""
    if run.train.autocast == "none":
        return 0
    element_bytes = ELEMENT_BYTES[run.train.dtype] + PRODUCT_BYTES[run.train.autocast]
    has_adapters = plan_of(run.method).adapters(run.cluster.devices) is not None
    return shape.adapted_parameters * element_bytes * (2 if has_adapters else 1)


@by_method
def merge_compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Seconds of a round's merges: products, and the weights read and written once (with momentum: twice)."""
    moved = plan_of(run.method).merge_elements_moved(shape, persistent_state(run, shape).extra)
    moved_bytes = moved * ELEMENT_BYTES[run.train.dtype]
    moved_s = moved_bytes / rates.memory_bytes_per_s + _packed_s(run, shape, rates.kernels)
    flops = merge_flops(run, shape)
    if rates.kernels is None or not flops:
        return flops / rates.flop_per_s + moved_s
    products = sum_of_products(run, shape)
    # What the layers' products together reach, over the operations that the merge makes of them.
    return flops * products_s(products, rates.kernels) / sum(product.flops for product in products) + moved_s


def _packed_s(run: Run, shape: ModelShape, kernels: KernelRates | None) -> float:
    """Seconds of packing what a round merged, where that was measured; a server sends weights that are packed."""
    if kernels is None or not plan_of(run.method).quantizes_merges:
        return 0.0
    return layers_s(shape, run.method.frozen_format, kernels.pack) or 0.0


@lru_cache(maxsize=4096)
def exchange_s(exchange: Exchange, link: Link) -> float:
    """Seconds of messages that are made one after the other."""
    return sum(transfer_s(transfer, link) for transfer in exchange.transfers)
