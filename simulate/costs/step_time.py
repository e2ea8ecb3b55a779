"""Seconds of a step, a merge and a round on a profile's hardware.

Compute comes from the device's rates and memory bandwidth, exchanges from bytes, links and delays. The planner, the
simulated clock and the timeline all take their seconds from here, so that their times differ only in what they
simulate on top. Measured kernel rates (simulate.costs.kernel_time) are used where the profile has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from simulate.comm.transfers import Exchange
from simulate.config.hardware import Device, Dtype, Link
from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.costs.flops import merge_flops, pass_flops, update_flops
from simulate.costs.kernel_time import KernelRates, layers_s, pass_s, products_s, sum_of_products
from simulate.costs.message_schedule import PeriodicExchange, num_rounds, schedule
from simulate.costs.message_time import link_of, transfer_s
from simulate.costs.state import frozen_bytes, persistent_state
from simulate.layers.formats import ELEMENT_BYTES, PRODUCT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of
from simulate.rules.pace import round_compute_s, round_counts

ADAM_ELEMENTS_MOVED = 3
"""Elements that a fused AdamW step moves for each weight: it reads weight and gradient and writes the weight."""
ADAM_MOMENTS_MOVED = 4
"""Moments that it moves for each weight: it reads and writes two."""
CLIP_ELEMENTS_MOVED = 3
"""Elements that clipping moves for each weight: it reads gradients for their norm, then reads and
writes them to scale them. Counted with measured rates only."""
ACCUMULATION_ELEMENTS_MOVED = 3
"""Elements that adding a pass's gradients to those of earlier passes moves for each weight: two reads, one write."""
COMPRESSION_ELEMENTS_MOVED = 8
"""Estimate of the elements that compression moves for each gradient: it reads gradient and residual, writes message and
residual, and reads the messages that arrive."""


@dataclass(frozen=True)
class RoundTime:
    """Seconds of one round of `steps` optimizer steps."""

    steps: int
    compute_s: float
    """Seconds of one step of the slowest device; with a deadline, a T-th of the round's."""
    merge_s: float
    """Seconds of the arithmetic of a round's merges."""
    exchange_s: float
    """Seconds of a round's messages that no compute overlaps; the mean over the run's rounds."""
    device_steps: float
    """Optimizer steps of all devices together in a round."""

    @property
    def round_s(self) -> float:
        """Seconds of the whole round."""
        return self.steps * self.compute_s + self.merge_s + self.exchange_s


def round_time(run: Run, shape: ModelShape, devices: Sequence[Device], link: Link) -> RoundTime:
    """Return the seconds of a round.

    In lockstep all devices wait for the slowest. With a deadline nobody waits, unless one step of a device takes longer
    than that.
    """
    # Devices of one kind and class take equal time, so each is computed once.
    step_s, merge_s, steps = 0.0, 0.0, run.method.round_steps
    device_steps, is_uneven = float(steps * len(devices)), run.method.is_paced or run.cluster.has_quorum
    for one, device in device_kinds(run, devices):
        rates = _rates(one, device)
        step_s = step_s if is_uneven else max(step_s, compute_s(one, shape, rates))
        merge_s = max(merge_s, merge_compute_s(one, shape, rates))
    if is_uneven:
        steps_s, device_steps = round_compute_s(run.method, device_step_s(run, shape, devices), run.cluster)
        step_s = steps_s / steps
    return RoundTime(
        steps=steps,
        compute_s=step_s,
        merge_s=merge_s,
        exchange_s=round_exchange_s(run, schedule(run, shape), link, step_s, merge_s),
        device_steps=device_steps,
    )


def round_exchange_s(run: Run, parts: Sequence[PeriodicExchange], link: Link, step_s: float, merge_s: float) -> float:
    """Return the seconds of a round's messages that no compute overlaps; the mean over the run's rounds."""
    link = link_of(link, run.cluster.backend)
    # A delayed message also overlaps the arithmetic of the merge at which it is sent.
    own_s = merge_s / run.method.merges_per_round
    total_s = 0.0
    for part in parts:
        alone_s = exchange_s(part.exchange, link)
        for times, steps in part.hidden(run.train.steps):
            total_s += times * max(0.0, alone_s - (steps * step_s + own_s if steps else 0.0))
    return total_s / num_rounds(run)


def device_step_s(run: Run, shape: ModelShape, devices: Sequence[Device]) -> tuple[float, ...]:
    """Return the seconds of a step on each device."""
    return tuple(
        seconds
        for one, held in by_class(run, devices)
        for seconds in _of_each(held, partial(_device_s, compute_s, one, shape))
    )


def device_merge_s(run: Run, shape: ModelShape, devices: Sequence[Device]) -> tuple[float, ...]:
    """Return the seconds of the arithmetic of a round's merges on each device."""
    return tuple(
        seconds
        for one, held in by_class(run, devices)
        for seconds in _of_each(held, partial(_device_s, merge_compute_s, one, shape))
    )


def _device_s(
    seconds: Callable[[Run, ModelShape, _Rates], float], run: Run, shape: ModelShape, device: Device
) -> float:
    return seconds(run, shape, _rates(run, device))


def by_class(run: Run, devices: Sequence[Device]) -> list[tuple[Run, Sequence[Device]]]:
    """Return the run as each class of devices has it, and the class's devices."""
    if not run.cluster.classes:
        return [(run, devices)]
    held = [devices[members.start : members.stop] for members in run.cluster.class_devices]
    return list(zip(run.classes, held, strict=True))


def idle_share(run: Run, shape: ModelShape, devices: Sequence[Device]) -> float:
    """Return the share of a round's compute that devices wait for the slowest: 1 less their mean over the longest."""
    if not run.method.is_paced and len(device_kinds(run, devices)) == 1:
        return 0.0
    steps_s, merges_s = device_step_s(run, shape, devices), device_merge_s(run, shape, devices)
    counts = round_counts(run.method, steps_s)
    busy_s = [count * step_s + merge_s for count, step_s, merge_s in zip(counts, steps_s, merges_s, strict=True)]
    return sum(max(busy_s) - one_s for one_s in busy_s) / len(busy_s) / max(busy_s)


def device_kinds(run: Run, devices: Sequence[Device]) -> list[tuple[Run, Device]]:
    """Return each kind of device once, in order, with the run as its class has it."""
    if not run.cluster.classes:  # thousands of candidates have none
        first = devices[0]
        return [(run, first)] if devices.count(first) == len(devices) else [(run, one) for one in distinct(devices)]
    return [(one, device) for one, held in by_class(run, devices) for device in distinct(held)]


def _of_each(devices: Sequence[Device], seconds_of: Callable[[Device], float]) -> tuple[float, ...]:
    kinds = distinct(devices)
    if len(kinds) == 1:
        return (seconds_of(kinds[0]),) * len(devices)
    # By id(): hashing thousands of devices costs more than their few kinds.
    by_kind = {id(device): seconds_of(device) for device in kinds}
    return tuple(by_kind[id(device)] for device in devices)


def distinct(devices: Sequence[Device]) -> list[Device]:
    """Return each kind of device once, in order."""
    first = devices[0]  # thousands of devices of one kind take one pass
    if devices.count(first) == len(devices):
        return [first]
    return list({id(device): device for device in devices}.values())


@dataclass(frozen=True, eq=False)
class _Rates:
    """Sustained rates of a device in a run's formats; one object a device, since it is a key of cached merge times."""

    flop_per_s: float
    """Rate of merges and optimizer steps, which run in the weights' format."""
    pass_flop_per_s: float
    """Rate of forward and backward passes, which autocast runs in another format."""
    memory_bytes_per_s: float
    kernels: KernelRates | None = None
    """Rates by size; None where kernels were not measured."""


def _rates(run: Run, device: Device) -> _Rates:
    train = run.train
    return _rates_of(train.dtype, train.dtype if train.autocast == "none" else train.autocast, device)


@lru_cache(maxsize=256)
def _rates_of(dtype: Dtype, passes: Dtype, device: Device) -> _Rates:
    own, of_passes = (device.flop_per_s.of(name) * device.efficiency for name in (dtype, passes))
    return _Rates(own, of_passes, device.memory_bytes_per_s, KernelRates.of(passes, device))


def compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Return the seconds of an optimizer step: its passes, which unpack frozen weights, and the optimizer's traffic."""
    moved, passes = _moved(run, shape), run.train.accumulate
    moved_bytes, passes_s = moved.compressed + passes * moved.cast + (passes - 1) * moved.accumulated, 0.0
    unpacked_s = _unpacked_s(run, shape, rates.kernels)
    if unpacked_s is None:  # not measured: timed by memory traffic
        moved_bytes += passes * moved.unpacked
    if rates.kernels is None:
        moved_bytes += moved.optimizer
        passes_s = pass_flops(run, shape) / rates.pass_flop_per_s
    else:  # measured rates already contain the efficiency of passes and optimizer
        moved_s = rates.kernels.optimizer.seconds(moved.optimizer, moved.optimizer + moved.clipped)
        passes_s = passes * (pass_s(run, shape, rates.kernels) + (unpacked_s or 0.0)) + moved_s
    return passes_s + update_flops(run, shape) / rates.flop_per_s + moved_bytes / rates.memory_bytes_per_s


def _unpacked_s(run: Run, shape: ModelShape, kernels: KernelRates | None) -> float | None:
    """Return the seconds of unpacking frozen weights in one pass and back; None where that was not measured."""
    method = run.method
    if kernels is None or method.frozen_format == "none":
        return None
    # Forward, backward, and once more to recompute.
    once_s = layers_s(shape, method.frozen_format, kernels.unpack)
    return None if once_s is None else (3 if run.train.activation_checkpointing else 2) * once_s


@dataclass(frozen=True)
class _Moved:
    """Bytes that a step moves beside its passes' products, some of them once a pass."""

    optimizer: int
    clipped: int
    compressed: int
    unpacked: int
    """Bytes of unpacking frozen weights, for a pass."""
    cast: int
    """Bytes of casting weights, for a pass."""
    accumulated: int
    """Bytes of adding gradients, for each pass after the first."""


@by_method
def _moved(run: Run, shape: ModelShape) -> _Moved:
    element_bytes, method = ELEMENT_BYTES[run.train.dtype], run.method
    # APOLLO scales and measures its gradient in as many passes over it as AdamW makes over its moments.
    trained = persistent_state(run, shape).trained
    # 8-bit moments move a byte each; their scales, one for 256 elements, are too small to count.
    moment_bytes = element_bytes if run.train.optimizer_state == "fp32" else 1
    unpacked, compressed = 0, 0
    if plan_of(method).compresses_gradients:
        compressed = COMPRESSION_ELEMENTS_MOVED * shape.parameters * element_bytes
    if method.frozen_format != "none":
        # Forward and backward pass each read the packed form, then write and read the plain one.
        packed = frozen_bytes(shape, method.frozen_format, element_bytes)
        unpacked = 2 * (packed + 2 * shape.adapted_parameters * element_bytes)
    return _Moved(
        optimizer=trained * (ADAM_ELEMENTS_MOVED * element_bytes + ADAM_MOMENTS_MOVED * moment_bytes),
        clipped=CLIP_ELEMENTS_MOVED * trained * element_bytes,
        compressed=compressed,
        unpacked=unpacked,
        cast=_cast_bytes(run, shape),
        accumulated=ACCUMULATION_ELEMENTS_MOVED * trained * element_bytes,
    )


def _cast_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes that autocast moves in a pass to cast weights; the backward pass casts frozen ones again."""
    if run.train.autocast == "none":
        return 0
    element_bytes = ELEMENT_BYTES[run.train.dtype] + PRODUCT_BYTES[run.train.autocast]
    has_adapters = plan_of(run.method).adapters(run.cluster.devices) is not None
    return shape.adapted_parameters * element_bytes * (2 if has_adapters else 1)


@by_method
def merge_compute_s(run: Run, shape: ModelShape, rates: _Rates) -> float:
    """Return the seconds of a round's merges: products, and weights and the method's state read and written."""
    moved = plan_of(run.method).merge_elements_moved(shape, persistent_state(run, shape).extra)
    moved_bytes = moved * ELEMENT_BYTES[run.train.dtype]
    moved_s = moved_bytes / rates.memory_bytes_per_s
    # Each device packs what was merged, unless a server sends weights that are packed.
    if rates.kernels is not None and plan_of(run.method).quantizes_merges:
        moved_s += layers_s(shape, run.method.frozen_format, rates.kernels.pack) or 0.0
    flops = merge_flops(run, shape)
    if rates.kernels is None or not flops:
        return flops / rates.flop_per_s + moved_s
    products = sum_of_products(run, shape)
    # The merge's operations at the mean rate of the layers' products B·A.
    return flops * products_s(products, rates.kernels) / sum(product.flops for product in products) + moved_s


@lru_cache(maxsize=4096)
def exchange_s(exchange: Exchange, link: Link) -> float:
    """Return the seconds of messages that are sent one after the other."""
    return sum([transfer_s(transfer, link) for transfer in exchange.transfers])
