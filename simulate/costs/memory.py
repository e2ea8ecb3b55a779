"""Peak memory of one device by part: the highest of a run's phases, never their sum.

A plan rejects runs that do not fit, so this must be what the allocator reaches; tests compare it with the allocator's
trace. Weights and state are counted here, activations in simulate.costs.activations, working memory of exchanges in
simulate.costs.buffers. The planner calls peak_profile for each candidate; run folders ask checkpoint_bytes whether a
disk has room; `lte validate` compares peak_memory with measurements.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter

from simulate.config.hardware import Device
from simulate.config.method_options import MethodOptions
from simulate.config.run import Run
from simulate.config.tables import Data
from simulate.costs.activations import step_phases
from simulate.costs.allocator import cast_bytes, held_beside_tensors, unfilled_share
from simulate.costs.buffers import exchange_phases
from simulate.costs.cache import by_method
from simulate.costs.diagnostics_memory import diagnosing_phases, kept_bytes
from simulate.costs.moments import moment_bytes, moment_bytes_beside_adapters
from simulate.costs.state import frozen_bytes, persistent_state
from simulate.layers.formats import ELEMENT_BYTES, PRODUCT_BYTES, packing_bytes, quantized_bytes, unpacking_bytes
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of
from simulate.rules.phases import PHASES, Phase, PhaseName, WeightMaterialisation

CPU_LIBRARY_BYTES = {"bf16": 18_000_000, "fp16": 2_000_000}
"""Bytes that torch's libraries hold for good on a CPU under autocast: code and reordered operands of products.

Measured, beside a step in fp32 (docs/accuracy.md): 15, 15 and 21 MB with bf16, 2 MB with fp16, whatever the network."""
SAVING = Phase("checkpoint_save", 0, 0, 0)
"""Tensors are written one by one, as they lie in memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at its peak."""

    weights: int
    """Frozen or dense weights, and all parameters without adapters."""
    adapters: int
    """A and B, and in reset-less mode their values at the last merge."""
    gradients: int
    optimizer: int
    """Optimizer moments, and the method's own state: error feedback, outer momentum, weights of other steps."""
    activations: int
    temporary: int
    """Buffers of the peak phase: logits, working tensors, messages."""
    allocator: int
    """Bytes that CUDA's allocator and libraries, or a CPU's half-precision libraries, hold beside tensors."""
    reserved: int

    @property
    def tensors(self) -> int:
        """Sum of the parts that are the program's own tensors."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.temporary

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.tensors + self.allocator + self.reserved

    def parts(self) -> dict[str, int]:
        """Return bytes by part."""
        return dict(vars(self))


@dataclass(frozen=True)
class PeakProfile:
    """Bytes that one device holds all the time, and the phases that can be its peak on top of them."""

    weights: int
    adapters: int
    optimizer: int
    allocator: int
    reserved: int
    phases: tuple[Phase, ...]

    def memory(self, phase: Phase) -> Memory:
        """Return all parts in a phase."""
        return Memory(
            weights=self.weights,
            adapters=self.adapters,
            gradients=phase.gradients,
            optimizer=self.optimizer - phase.dropped,
            activations=phase.activations,
            temporary=phase.temporary,
            allocator=self.allocator,
            reserved=self.reserved,
        )

    def peak(self) -> Memory:
        """Return all parts in the highest phase; among equal ones, in the first in the order of PHASES."""
        highest = max(map(attrgetter("total"), self.phases))  # no call a phase, for thousands of candidates
        equal = [phase for phase in self.phases if phase.total == highest]
        return self.memory(equal[0] if len(equal) == 1 else min(equal, key=lambda phase: PHASES.index(phase.name)))

    def highest(self) -> dict[PhaseName, Phase]:
        """Return the highest Phase of each name, in the order of PHASES."""
        found: dict[PhaseName, Phase] = {}
        for phase in self.phases:
            if phase.name not in found or phase.total > found[phase.name].total:
                found[phase.name] = phase
        return {name: found[name] for name in PHASES if name in found}

    def totals(self) -> dict[str, int]:
        """Return the sum of all parts in each phase."""
        kept = self.weights + self.adapters + self.optimizer + self.allocator + self.reserved
        return {str(name): kept + phase.total for name, phase in self.highest().items()}


def peak_memory(run: Run, shape: ModelShape, device: Device) -> Memory:
    """Return the peak of one device of the run."""
    return peak_profile(run, shape, device).peak()


def memory_by_phase(run: Run, shape: ModelShape, device: Device) -> dict[PhaseName, Memory]:
    """Return one device's memory in each phase of the run, in the order of PHASES."""
    profile = peak_profile(run, shape, device)
    return {name: profile.memory(phase) for name, phase in profile.highest().items()}


def peak_profile(run: Run, shape: ModelShape, device: Device) -> PeakProfile:
    """Return the bytes that a device of the run holds all the time, and its phases; of classes, the fullest one's."""
    if run.cluster.classes:
        profiles = [peak_profile(one, shape, device) for one in run.classes]
        return max(profiles, key=lambda profile: profile.peak().total)
    shared_memory = device.host_memory_bytes == 0
    lasting = _lasting(run, shape, shared_memory)
    phases = _phases(run, shape, lasting)
    if run.train.diagnostics_every is not None:
        # Diagnostics follow a merge, so that moments which it freed leave room for them.
        freed = moment_bytes(run, shape) - _merged_moment_bytes(run, shape) if plan_of(run.method).drops_at_once else 0
        phases += diagnosing_phases(run, shape, lasting.materialisation, shared_memory, freed)
    allocator = CPU_LIBRARY_BYTES.get(run.train.autocast, 0)
    if device.is_cuda:
        tensors = lasting.weights + lasting.adapters + lasting.optimizer + max(map(attrgetter("total"), phases))
        allocator = _allocator_bytes(run, shape, lasting, tensors)
    return PeakProfile(lasting.weights, lasting.adapters, lasting.optimizer, allocator, device.reserved_bytes, phases)


@dataclass(frozen=True)
class _Lasting:
    """Figures of a run that do not depend on its batch or recomputation, so that candidates share them."""

    weights: int
    adapters: int
    optimizer: int
    start: tuple[Phase, ...]
    exchange: tuple[Phase, ...]
    """Phases of the optimizer's step and of merges, without the batch."""
    rank: int
    """Rank that one row passes through; 0 where every weight is trained."""
    heads: int
    block_gradient_bytes: int
    unpacked_bytes: int
    subtracts: bool
    materialisation: WeightMaterialisation
    keeps_inputs: bool
    column_rank: int
    unfilled_bytes: float
    """Room beside tensors that stay, and beside gradients, in the segments of CUDA's allocator."""
    largest_tensor: int
    """Bytes of the network's largest parameter."""


@by_method
def _lasting(run: Run, shape: ModelShape, shared_memory: bool) -> _Lasting:
    element_bytes, devices = ELEMENT_BYTES[run.train.dtype], run.cluster.devices
    plan, held = plan_of(run.method), persistent_state(run, shape)
    # Dense steps hold more than those that follow, so a warm start is planned as a dense run.
    layout = None if plan.starts_dense else plan.adapters(devices)
    weights, adapters = _weight_bytes(run, shape, shared_memory), held.adapters * element_bytes
    optimizer = moment_bytes(run, shape) + (held.projections + held.extra) * element_bytes + kept_bytes(run, shape)
    kept = weights + adapters + optimizer
    # A host with memory of its own packs the weights before they move to the device.
    start = (Phase("forward", 0, 0, _packing_start_bytes(run, shape) - kept),) if shared_memory else ()
    # Pairs that a step skips have moments, but no gradients.
    idle, block_trained = 0, sum(linear.weights for linear in shape.adapted)
    if layout is not None:
        idle = shape.factors(layout.idle_rank) if layout.idle_rank else 0
        block_trained = (shape.factors(layout.held_rank, layout.frozen_a) - idle) // shape.layers
    gradients = (held.trained - idle) * element_bytes
    return _Lasting(
        weights=weights,
        adapters=adapters,
        optimizer=optimizer,
        start=start,
        exchange=exchange_phases(run, shape, gradients),
        rank=layout.row_rank if layout else 0,
        heads=layout.heads if layout else 1,
        block_gradient_bytes=block_trained * element_bytes,
        unpacked_bytes=_unpacked_bytes(run.method, shape, element_bytes),
        subtracts=layout is not None and layout.subtracts,
        materialisation=plan.evaluation_weights(),
        keeps_inputs=layout is None or not layout.frozen_a,
        column_rank=layout.column_rank if layout else 0,
        unfilled_bytes=_unfilled_bytes(run, shape, weights, adapters + optimizer + gradients),
        largest_tensor=_largest_elements(shape) * element_bytes,
    )


def _unfilled_bytes(run: Run, shape: ModelShape, weights: int, trained: int) -> float:
    """Return the room that segments have beside the weights, and beside what trains them, of `trained` bytes."""
    plan, element_bytes = plan_of(run.method), ELEMENT_BYTES[run.train.dtype]
    layout = None if plan.starts_dense else plan.adapters(run.cluster.devices)
    if layout is None:
        return _unfilled_by_weights(shape, "none", element_bytes) * (weights + trained)
    by_weights = _unfilled_by_weights(shape, run.method.frozen_format, element_bytes) * weights
    return by_weights + _unfilled_by_factors(shape, layout.held_rank, element_bytes) * trained


@lru_cache(maxsize=64)
def _unfilled_by_weights(shape: ModelShape, quantize: str, element_bytes: int) -> float:
    """Return the share of unfilled room beside all parameters, those of adapted layers in their frozen format."""
    counts = Counter(tensor.elements * element_bytes for tensor in shape.replicated)
    for linear in shape.adapted:
        counts[quantized_bytes(linear.weights, linear.in_features, quantize, element_bytes)] += linear.count
    return unfilled_share(counts)


@lru_cache(maxsize=256)
def _unfilled_by_factors(shape: ModelShape, rank: int, element_bytes: int) -> float:
    """Return the share of unfilled room beside A and B of this rank and all parameters without adapters."""
    counts = Counter(tensor.elements * element_bytes for tensor in shape.replicated)
    for linear in shape.adapted:
        counts[rank * linear.in_features * element_bytes] += linear.count
        counts[rank * linear.out_features * element_bytes] += linear.count
    return unfilled_share(counts)


def _allocator_bytes(run: Run, shape: ModelShape, lasting: _Lasting, tensors: int) -> int:
    """Return the bytes that CUDA's allocator and libraries hold beside a peak of `tensors` bytes."""
    train = run.train
    product_bytes = PRODUCT_BYTES.get(train.autocast, ELEMENT_BYTES[train.dtype])
    largest = max(lasting.largest_tensor, train.micro_batch * _widest_rows(shape) * product_bytes)
    if train.autocast == "none":
        return held_beside_tensors(tensors, lasting.unfilled_bytes, largest, 0)
    logits = train.micro_batch * shape.predictions * shape.outputs * product_bytes
    return held_beside_tensors(tensors, lasting.unfilled_bytes, largest, cast_bytes(logits, lasting.largest_tensor))


@lru_cache(maxsize=64)
def _widest_rows(shape: ModelShape) -> int:
    """Return the elements of the largest input or output of an adapted layer, of one sample."""
    return max(linear.rows * max(linear.in_features, linear.out_features) for linear in shape.adapted)


def _phases(run: Run, shape: ModelShape, lasting: _Lasting) -> tuple[Phase, ...]:
    train, element_bytes = run.train, ELEMENT_BYTES[run.train.dtype]
    step = step_phases(
        shape, train.micro_batch, lasting.rank, lasting.block_gradient_bytes, train.activation_checkpointing,
        element_bytes, PRODUCT_BYTES.get(train.autocast, element_bytes), lasting.unpacked_bytes, lasting.heads,
        lasting.subtracts, lasting.materialisation, keeps_inputs=lasting.keeps_inputs, accumulates=train.accumulate > 1,
        column_rank=lasting.column_rank,
    )  # fmt: skip
    # The batch is held until the next one comes; token indices are too small to count.
    batch_bytes = train.micro_batch * train.accumulate * shape.inputs * element_bytes
    if batch_bytes and train.accumulate > 1:
        # A pass counts its own images, which are a part of the step's, or a copy where each head gives a part.
        own_bytes = 0 if lasting.heads > 1 else train.micro_batch * shape.inputs * element_bytes
        step = tuple(replace(phase, activations=phase.activations + batch_bytes - own_bytes) for phase in step)
    others = (*lasting.exchange, SAVING)
    if batch_bytes:
        others = tuple(replace(phase, activations=phase.activations + batch_bytes) for phase in others)
    return (*lasting.start, *step, *others)


def _weight_bytes(run: Run, shape: ModelShape, shared_memory: bool) -> int:
    plan, element_bytes = plan_of(run.method), ELEMENT_BYTES[run.train.dtype]
    if plan.starts_dense or plan.adapters(run.cluster.devices) is None:
        return shape.all_parameters * element_bytes
    frozen = frozen_bytes(shape, run.method.frozen_format, element_bytes)
    # The weights that merges start from lie in the host's memory or in mapped files, except plain ones on one memory.
    in_files = run.method.frozen_format != "none" or not shared_memory
    start = 0 if in_files else plan.full_copies * shape.adapted_parameters * element_bytes
    return frozen + start + (shape.replicated_parameters + shape.fixed_parameters) * element_bytes


def host_memory_by_part(run: Run, shape: ModelShape, device: Device) -> dict[str, int]:
    """Return the bytes of the host's own memory that one device needs, by part.

    Where device and host share one memory, only mapped files count here: no allocator sees them, so they are not part
    of the device's memory. `start_weights`: the full-precision weights that merges start from and add to (plain ones on
    one shared memory are part of the device's); `diagnostics`: sums of gradients, in a mapped file;
    `checkpoint_save`: the largest tensor on its way to the disk; `data`: text that is held in memory as it was read
    (other data is memory-mapped).
    """
    if run.cluster.classes:
        return max(
            (host_memory_by_part(one, shape, device) for one in run.classes), key=lambda parts: sum(parts.values())
        )
    own, element_bytes = device.host_memory_bytes > 0, ELEMENT_BYTES[run.train.dtype]
    largest = _largest_elements(shape) * element_bytes
    copies = plan_of(run.method).full_copies if own or run.method.frozen_format != "none" else 0
    return {
        "start_weights": copies * shape.adapted_parameters * element_bytes,
        "diagnostics": shape.parameters * element_bytes if run.train.diagnostics_every is not None else 0,
        "checkpoint_save": largest if own else 0,
        "data": text_bytes(run.data) if own and run.model.unit == "tokens" else 0,
    }


def mapped_file_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes of a process's files in TMPDIR: full-precision weights beside packed ones, gradients' sums."""
    if run.cluster.classes:  # a simulation holds those of all
        return sum(mapped_file_bytes(one, shape) for one in run.classes)
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    copies = plan_of(run.method).full_copies if run.method.frozen_format != "none" else 0
    sums = shape.parameters if run.train.diagnostics_every is not None else 0
    return (copies * shape.adapted_parameters + sums) * element_bytes


@lru_cache(maxsize=64)
def _largest_elements(shape: ModelShape) -> int:
    return max(tensor.elements for tensor in shape.tensors)


@lru_cache(maxsize=64)
def text_bytes(data: Data) -> int:
    """Return the memory that text at a path takes; 0 where it is memory-mapped, or no file exists yet."""
    if data.path is None:
        return 0
    from simulate.data.text_size import held_bytes  # imported late: the readers of data bring numpy, a tenth of a plan

    return held_bytes(data)


@by_method
def checkpoint_bytes(run: Run, shape: ModelShape, devices: int, in_a_round: bool = False) -> int:
    """Return the bytes of a checkpoint of so many devices: shared state once, each device's own state, and moments.

    The checkpoint follows a merge, which may have dropped moments, unless `in_a_round`. A run with a dense warm start
    is counted before its first adapter, where it holds most.
    """
    if run.cluster.classes:
        return _checkpoint_of_classes(run, shape, devices, in_a_round)
    plan, held, element_bytes = plan_of(run.method), persistent_state(run, shape), ELEMENT_BYTES[run.train.dtype]
    frozen_bytes_kept, weights = 0, shape.parameters
    if plan.adapters(run.cluster.devices) is not None:
        frozen_bytes_kept = frozen_bytes(shape, run.method.frozen_format, element_bytes)
        frozen_bytes_kept += plan.full_copies * shape.adapted_parameters * element_bytes
        weights = (0 if plan.starts_dense else held.adapters) + shape.replicated_parameters
    owners = devices if held.shared else plan.simulated_copies(devices)
    copies = 1 if held.shared else owners  # equal state is written once
    moments = moment_bytes(run, shape) if in_a_round else _merged_moment_bytes(run, shape)
    elements = copies * weights + owners * held.extra
    elements += shape.fixed_parameters
    return frozen_bytes_kept + elements * element_bytes + copies * moments + kept_bytes(run, shape)


def _checkpoint_of_classes(run: Run, shape: ModelShape, devices: int, in_a_round: bool) -> int:
    """Return the bytes of a checkpoint of one device, the largest, or of all: what they share is written once."""
    alone = [checkpoint_bytes(one, shape, 1, in_a_round) for one in run.classes]
    if devices == 1:
        return max(alone)
    more = [checkpoint_bytes(one, shape, 2, in_a_round) - size for one, size in zip(run.classes, alone, strict=True)]
    own = sum(len(members) * size for members, size in zip(run.cluster.class_devices, more, strict=True))
    return max(size - each for size, each in zip(alone, more, strict=True)) + own


def _merged_moment_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes of moments that a merge leaves: all, those of other parameters than adapters, or none."""
    drops = plan_of(run.method).drops_moments
    if drops == "all":
        return 0
    return moment_bytes_beside_adapters(run, shape) if drops == "adapters" else moment_bytes(run, shape)


def _packing_start_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes while a run starts on the device: the network as it was drawn, and the first layer being packed.

    Each layer's plain weights are freed when it is packed, so that the first layer is the peak.
    """
    method, element_bytes = run.method, ELEMENT_BYTES[run.train.dtype]
    if method.frozen_format == "none" or plan_of(method).starts_dense:
        return 0
    first = shape.in_order()[0]
    packing = packing_bytes(first.weights, first.in_features, method.frozen_format, element_bytes)
    return (shape.all_parameters - first.weights) * element_bytes + packing


def _unpacked_bytes(method: MethodOptions, shape: ModelShape, element_bytes: int) -> int:
    """Return the extra bytes of the largest quantised layer while a product unpacks it."""
    if method.frozen_format == "none" or plan_of(method).starts_dense:
        return 0
    return max(unpacking_bytes(x.weights, method.frozen_format, element_bytes) for x in shape.adapted)
