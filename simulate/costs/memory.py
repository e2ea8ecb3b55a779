"""Peak memory of one device, by part, as the largest of a step's and a merge's phases (never their sum).

What activations take is in simulate.costs.activations; here are weights, what the optimizer and the method keep, and
messages. Tests hold the result against the allocator's trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from simulate.config import Run
from simulate.costs.activations import Phase, step_phases
from simulate.costs.holding import holding
from simulate.costs.optimizer import largest_step_bytes, moment_bytes
from simulate.costs.schedule import INDEX_BYTES as INDEX_INT32_BYTES
from simulate.costs.schedule import factor_buffer_bytes, gather_groups, layer_transport, topk_entries
from simulate.costs.traffic import (
    ELEMENT_BYTES,
    PRODUCT_BYTES,
    chunk_elements,
    fragment,
    frozen_bytes,
    pack,
    packed_bytes,
    packing_bytes,
    quantized_bytes,
    unpacking_bytes,
    wire_bytes,
)
from simulate.hardware import Device
from simulate.models.shapes import ModelShape
from simulate.options import (
    AdamixOptions,
    AdapterOptions,
    DasoOptions,
    DdpOptions,
    DilocoOptions,
    LocalSgdOptions,
    LteOptions,
    MethodOptions,
    PowerSgdOptions,
    ReloraOptions,
    SapipeOptions,
    SignsgdOptions,
    TopkOptions,
)

DRAW_BYTES = 3 * 8
"""An element of A while it is drawn: its normal number, and its factors of QR, in double precision."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at its peak."""

    weights: int
    """Frozen or dense weights, and what is replicated."""
    adapters: int
    """A and B, and in reset-less mode their values at the last merge."""
    gradients: int
    optimizer: int
    """Adam's moments, and what the method keeps beside them: error feedback, outer momentum, weights of other steps."""
    activations: int
    temporary: int
    """Buffers of the phase that peaks: logits, working tensors, messages."""
    reserved: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return (
            self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.temporary
            + self.reserved
        )  # fmt: skip

    def parts(self) -> dict[str, int]:
        """Return bytes by part."""
        return dict(vars(self))


def peak_memory(run: Run, shape: ModelShape, device: Device) -> Memory:
    """Return the peak of one device of the run."""
    method, element_bytes, devices = run.method, ELEMENT_BYTES[run.train.dtype], run.cluster.devices
    held = holding(run, shape)
    if isinstance(method, AdapterOptions) and not _starts_dense(method):
        shared_memory = device.host_memory_bytes == 0
        weights = _frozen_bytes(shape, method, element_bytes, shared_memory)
        rank = method.row_rank(devices)
        # Experts that a step did not choose have no gradient.
        idle = shape.factors(method.held_rank(devices) - method.rank) if isinstance(method, AdamixOptions) else 0
        frozen_a = isinstance(method, LteOptions) and method.frozen_a
        block_trained = (shape.factors(method.held_rank(devices), frozen_a) - idle) // shape.layers
    else:
        weights, rank, idle = shape.parameters * element_bytes, 0, 0
        block_trained = sum(linear.weights for linear in shape.adapted)
    phases = step_phases(
        shape, run.train.micro_batch, rank, block_trained * element_bytes, run.train.activation_checkpointing,
        element_bytes, PRODUCT_BYTES.get(run.train.autocast, element_bytes),
        _unpacked_bytes(method, shape, element_bytes),
    )  # fmt: skip
    gradient_bytes = (held.trained - idle) * element_bytes
    # The batch is held until the next one comes; tokens are too few to count.
    batch_bytes = run.train.micro_batch * shape.inputs * element_bytes
    exchanges = (
        Phase(p.gradients, p.activations + batch_bytes, p.temporary)
        for p in _exchange_phases(run, shape, gradient_bytes)
    )
    averages = gradient_bytes if isinstance(method, SapipeOptions) else 0  # beside the step's own gradients
    update = Phase(gradient_bytes, batch_bytes, averages + largest_step_bytes(run, shape))
    kept = weights + (held.adapters + held.extra) * element_bytes + moment_bytes(run, shape)
    start = () if device.host_memory_bytes else (Phase(0, 0, _packing_start_bytes(run, shape) - kept),)
    phase = max((*phases, *exchanges, update, *start), key=lambda p: p.total)
    return Memory(
        weights=weights,
        adapters=held.adapters * element_bytes,
        gradients=phase.gradients,
        optimizer=moment_bytes(run, shape) + held.extra * element_bytes,
        activations=phase.activations,
        temporary=phase.temporary,
        reserved=device.reserved_bytes,
    )


def host_memory_bytes(run: Run, shape: ModelShape, device: Device) -> int:
    """Bytes of the host's own memory that one device needs: the weights that merges start from and add to.

    Where both share a memory, those of plain weights are part of the device's; those of quantised ones lie in
    mapped files, which no allocator sees, and stay apart.
    """
    quantize = run.method.quantize if isinstance(run.method, LteOptions) else "none"
    if device.host_memory_bytes == 0 and quantize == "none":
        return 0
    return _full_copies(run.method) * shape.adapted_parameters * ELEMENT_BYTES[run.train.dtype]


def checkpoint_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes of a checkpoint's tensors: what devices share once, what is theirs N times, and Adam's moments."""
    method, devices = run.method, run.cluster.devices
    held = holding(run, shape)
    frozen_bytes_kept = 0
    if isinstance(method, AdapterOptions):
        quantize = method.quantize if isinstance(method, LteOptions) else "none"
        frozen_bytes_kept = frozen_bytes(shape, quantize, ELEMENT_BYTES[run.train.dtype])
        frozen_bytes_kept += _full_copies(method) * shape.adapted_parameters * ELEMENT_BYTES[run.train.dtype]
    dense = 0 if _starts_dense(method) else held.adapters
    weights = dense + shape.replicated_parameters if isinstance(method, AdapterOptions) else shape.parameters
    copies, element_bytes = 1 if held.shared else devices, ELEMENT_BYTES[run.train.dtype]
    elements = copies * weights + devices * held.extra
    return frozen_bytes_kept + elements * element_bytes + copies * moment_bytes(run, shape)


def _starts_dense(method: MethodOptions) -> bool:
    """Whether the run begins with dense steps, which need more than those that follow."""
    return isinstance(method, ReloraOptions) and method.warm_start_steps > 0


def _full_copies(method: MethodOptions) -> int:
    """How many full-precision copies merges need beside the frozen weights: the start weights, to which reset-less
    merges return, and the merged ones where frozen ones are quantised, which would swallow small updates.
    """
    if not isinstance(method, LteOptions):
        return 0
    return (method.reset == "none") + method.keeps_master


def _packing_start_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes of the start, where it happens on the device: the network as it is drawn, and a first layer's packing.

    Each layer's own weights are let go when it is packed.
    """
    method, element_bytes = run.method, ELEMENT_BYTES[run.train.dtype]
    if not isinstance(method, LteOptions) or method.quantize == "none":
        return 0
    first = shape.in_order()[0]
    packing = packing_bytes(first.weights, first.in_features, method.quantize, element_bytes)
    return (shape.parameters - first.weights) * element_bytes + packing


def _unpacked_bytes(method: MethodOptions, shape: ModelShape, element_bytes: int) -> int:
    """Bytes of the largest quantised layer while a product uses it."""
    quantize = method.quantize if isinstance(method, LteOptions) else "none"
    return max(unpacking_bytes(x.weights, quantize, element_bytes) for x in shape.adapted)


def _frozen_bytes(shape: ModelShape, method: AdapterOptions, element_bytes: int, shared_memory: bool) -> int:
    quantize = method.quantize if isinstance(method, LteOptions) else "none"
    frozen = frozen_bytes(shape, quantize, element_bytes)
    in_files = quantize != "none" or not shared_memory
    start = 0 if in_files else _full_copies(method) * shape.adapted_parameters * element_bytes
    return frozen + start + shape.replicated_parameters * element_bytes


def _exchange_phases(run: Run, shape: ModelShape, gradient_bytes: int) -> tuple[Phase, ...]:
    """Return the phases in which messages are held: with all gradients where these travel, else without."""
    method, element_bytes, devices = run.method, ELEMENT_BYTES[run.train.dtype], run.cluster.devices
    if isinstance(method, LteOptions):
        merge = _lte_exchange(
            shape, devices, method.held_rank(devices), method.quantize, method.merge_transport, method.wire,
            method.frozen_a, method.is_paced, element_bytes,
        )  # fmt: skip
        return (Phase(0, 0, merge),)
    sizes = [t.elements * element_bytes for t in shape.tensors]
    if isinstance(method, LocalSgdOptions | DilocoOptions | DasoOptions):
        return (Phase(0, 0, _averaging_bytes(method, sizes, devices, element_bytes)),)
    if devices == 1:
        return (Phase(gradient_bytes, 0, 0),)
    message = min(max(packed_bytes(sizes)), gradient_bytes)
    if isinstance(method, PowerSgdOptions):
        message = 2 * max(p for t in shape.tensors if (p := method.rank * sum(t.shape) * element_bytes))
    elif isinstance(method, SapipeOptions) and method.compensation == "delay":  # a parameter's square and its change
        message += 2 * max(sizes)
    elif isinstance(method, TopkOptions):  # everyone's entries, and one's own
        entry_bytes = element_bytes + INDEX_INT32_BYTES
        payload = [topk_entries(t.elements, method.density) * entry_bytes for t in shape.tensors]
        message = max(sum(payload[i] for i in g) for g in gather_groups(payload, devices)) * (devices + 1)
    elif isinstance(method, SignsgdOptions):  # everyone's bits, and the signs of one tensor as numbers
        bits = [-(-t.elements // 8) + element_bytes for t in shape.tensors]
        packed = max(sum(bits[i] for i in group) for group in gather_groups(bits, devices))
        message = packed * (devices + 1) + devices * max(sizes)
    elif isinstance(method, DdpOptions) and method.wire != "full":  # what it takes the place of is freed first
        message = _compression_bytes(method.wire, message, devices, element_bytes) - message
    return (Phase(gradient_bytes, 0, message),)


def _averaging_bytes(
    method: LocalSgdOptions | DilocoOptions | DasoOptions, sizes: list[int], devices: int, element_bytes: int
) -> int:
    """Buffers of a merge of full copies: means and the message they travel in, or its compressed form."""
    if isinstance(method, LocalSgdOptions) and method.merge_optimizer == "average":
        sizes = sizes * 3
    parts = method.merges_per_round
    groups = [[sizes[i] for i in fragment(len(sizes), parts, index)] for index in range(parts)]
    message = max(max(packed_bytes(group)) for group in groups)
    wire = "full" if isinstance(method, DasoOptions) else method.wire
    sums = 2 if devices > 1 else 1
    return max(sums * message, _compression_bytes(wire, message, devices, element_bytes))


def _compression_bytes(wire: str, message: int, devices: int, element_bytes: int) -> int:
    """Buffers of a compressed mean: everyone's chunks and the mean, and the messages of both ways."""
    if wire == "full" or devices == 1:
        return 0
    chunk = chunk_elements(message // element_bytes, devices)
    return (devices + 1) * chunk * element_bytes + 2 * wire_bytes(devices * chunk, wire, element_bytes)


@lru_cache(maxsize=4096)
def _lte_exchange(
    shape: ModelShape, devices: int, held_rank: int, quantize: str, transport: str, wire: str, frozen_a: bool,
    weighted: bool, element_bytes: int,
) -> int:  # fmt: skip
    """Largest buffer of a merge: what travels in one message (a device alone sends none), and the work beside it."""
    layers = shape.in_order()
    messages = 1 if devices > 1 else 0
    is_dense = {x: layer_transport(x, held_rank, devices, transport, frozen_a) == "reduce" for x in shape.adapted}
    by_factors = [x for x in layers if not is_dense[x]]
    dense = [x.weights * element_bytes for x in layers if is_dense[x]]
    largest = 0
    for group in pack(factor_buffer_bytes(by_factors, devices, held_rank, transport, element_bytes, frozen_a)):
        members = [by_factors[i] for i in group]
        sent = sum(x.factors(held_rank, frozen_a) for x in members) * element_bytes
        if transport == "server":  # the factors packed to push, or the weights that come back
            pulled = sum(quantized_bytes(x.weights, x.in_features, quantize, element_bytes) for x in members)
            largest = max(largest, messages * max(sent, pulled))
        else:  # everyone's factors, and one layer's B laid out for the product
            stacked = max(devices * x.out_features * held_rank for x in members) * element_bytes
            stacked *= 2 if weighted else 1
            drawn = max(devices * x.in_features * held_rank for x in members) * frozen_a * messages
            packing = max(packing_bytes(x.weights, x.in_features, quantize, element_bytes) for x in members)
            largest = max(largest, messages * devices * sent + max(stacked + drawn * DRAW_BYTES, packing))
    if dense:  # the dense sums, and the message they are packed into
        largest = max(largest, (1 + messages) * max(packed_bytes(dense)))
    replicated = max(packed_bytes([t.elements * element_bytes for t in shape.replicated]))
    return max(largest, (1 + messages) * replicated)
