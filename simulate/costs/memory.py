"""Peak memory of one device, by part, as the largest of a step's and a merge's phases (never their sum).

What activations take is in simulate.costs.activations; here are weights, what the optimizer and the method keep, and
messages. Tests hold the result against the allocator's trace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

from simulate.config.hardware import Device
from simulate.config.method_options import MethodOptions
from simulate.config.run import Run
from simulate.config.tables import BYTES
from simulate.costs.activations import step_phases
from simulate.costs.buffers import exchange_phases
from simulate.costs.cache import by_method
from simulate.costs.diagnostics_memory import diagnosing_phases, kept_bytes
from simulate.costs.moments import moment_bytes, moment_bytes_beside_adapters
from simulate.costs.state import frozen_bytes, persistent_state
from simulate.layers.formats import ELEMENT_BYTES, PRODUCT_BYTES, packing_bytes, unpacking_bytes
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of
from simulate.rules.phases import PHASES, Phase, PhaseName, WeightMaterialisation

SAVING = Phase("checkpoint_save", 0, 0, 0)
"""Tensors are written one by one, as they lie in memory."""


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


@dataclass(frozen=True)
class PeakProfile:
    """Bytes that one device keeps all the time, and the moments that can be its peak on top of them."""

    weights: int
    adapters: int
    optimizer: int
    reserved: int
    phases: tuple[Phase, ...]

    def memory(self, phase: Phase) -> Memory:
        """Return all parts at the height of a phase."""
        return Memory(
            weights=self.weights,
            adapters=self.adapters,
            gradients=phase.gradients,
            optimizer=self.optimizer - phase.dropped,
            activations=phase.activations,
            temporary=phase.temporary,
            reserved=self.reserved,
        )

    def peak(self) -> Memory:
        """Return all parts at the highest phase; of equal ones at the first in the order of PHASES."""
        highest = max(map(_total, self.phases))
        equal = [phase for phase in self.phases if phase.total == highest]
        return self.memory(equal[0] if len(equal) == 1 else min(equal, key=lambda phase: PHASES.index(phase.name)))

    def highest(self) -> dict[PhaseName, Phase]:
        """Return the highest moment of each phase, in the order of PHASES."""
        found: dict[PhaseName, Phase] = {}
        for phase in self.phases:
            if phase.name not in found or phase.total > found[phase.name].total:
                found[phase.name] = phase
        return {name: found[name] for name in PHASES if name in found}

    def totals(self) -> dict[str, int]:
        """Return the bytes of all parts at the height of each phase."""
        kept = self.weights + self.adapters + self.optimizer + self.reserved
        return {str(name): kept + phase.total for name, phase in self.highest().items()}


_total = attrgetter("total")


def peak_memory(run: Run, shape: ModelShape, device: Device) -> Memory:
    """Return the peak of one device of the run."""
    return peak_profile(run, shape, device).peak()


def memory_by_phase(run: Run, shape: ModelShape, device: Device) -> dict[PhaseName, Memory]:
    """Return the height of each phase that the run goes through, in the order of PHASES."""
    high = peak_profile(run, shape, device)
    return {name: high.memory(phase) for name, phase in high.highest().items()}


def peak_profile(run: Run, shape: ModelShape, device: Device) -> PeakProfile:
    """Return what a device of the run keeps, and its phases."""
    shared_memory = device.host_memory_bytes == 0
    lasting = _lasting(run, shape, shared_memory)
    phases = _phases(run, shape, lasting)
    if run.train.diagnostics_every is not None:
        phases += diagnosing_phases(run, shape, lasting.materialisation, shared_memory, _dropped_bytes(run, shape))
    return PeakProfile(lasting.weights, lasting.adapters, lasting.optimizer, device.reserved_bytes, phases)


@dataclass(frozen=True)
class _Lasting:
    """Figures of a run that neither its batch nor recomputation changes."""

    weights: int
    adapters: int
    optimizer: int
    start: tuple[Phase, ...]
    exchange: tuple[Phase, ...]
    """Of the optimizer's step and of merges, without the batch."""
    rank: int
    """That one row passes through; 0 where every weight is trained."""
    heads: int
    block_gradient_bytes: int
    unpacked_bytes: int
    subtracts: bool
    materialisation: WeightMaterialisation
    keeps_inputs: bool


@by_method
def _lasting(run: Run, shape: ModelShape, shared_memory: bool) -> _Lasting:
    element_bytes, devices = ELEMENT_BYTES[run.train.dtype], run.cluster.devices
    plan, held = plan_of(run.method), persistent_state(run, shape)
    layout = None if plan.starts_dense else plan.adapters(devices)
    weights, adapters = _weight_bytes(run, shape, shared_memory), held.adapters * element_bytes
    optimizer = moment_bytes(run, shape) + held.extra * element_bytes + kept_bytes(run, shape)
    kept = weights + adapters + optimizer
    start = (Phase("forward", 0, 0, _packing_start_bytes(run, shape) - kept),) if shared_memory else ()
    idle, block_trained = 0, sum(linear.weights for linear in shape.adapted)
    if layout is not None:
        idle = shape.factors(layout.idle_rank) if layout.idle_rank else 0
        block_trained = (shape.factors(layout.held_rank, layout.frozen_a) - idle) // shape.layers
    return _Lasting(
        weights=weights,
        adapters=adapters,
        optimizer=optimizer,
        start=start,
        exchange=exchange_phases(run, shape, (held.trained - idle) * element_bytes),
        rank=layout.row_rank if layout else 0,
        heads=layout.heads if layout else 1,
        block_gradient_bytes=block_trained * element_bytes,
        unpacked_bytes=_unpacked_bytes(run.method, shape, element_bytes),
        subtracts=layout is not None and layout.subtracts,
        materialisation=plan.evaluation_weights(),
        keeps_inputs=layout is None or not layout.frozen_a,
    )


def _phases(run: Run, shape: ModelShape, lasting: _Lasting) -> tuple[Phase, ...]:
    train, element_bytes = run.train, ELEMENT_BYTES[run.train.dtype]
    step = step_phases(
        shape, train.micro_batch, lasting.rank, lasting.block_gradient_bytes, train.activation_checkpointing,
        element_bytes, PRODUCT_BYTES.get(train.autocast, element_bytes), lasting.unpacked_bytes, lasting.heads,
        lasting.subtracts, lasting.materialisation, keeps_inputs=lasting.keeps_inputs,
    )  # fmt: skip
    # The batch is held until the next one comes; tokens are too few to count.
    batch_bytes = train.micro_batch * shape.inputs * element_bytes
    others = (*lasting.exchange, SAVING)
    if batch_bytes:
        others = tuple(replace(phase, activations=phase.activations + batch_bytes) for phase in others)
    return (*lasting.start, *step, *others)


def _weight_bytes(run: Run, shape: ModelShape, shared_memory: bool) -> int:
    plan, element_bytes = plan_of(run.method), ELEMENT_BYTES[run.train.dtype]
    if plan.starts_dense or plan.adapters(run.cluster.devices) is None:
        return shape.parameters * element_bytes
    frozen = frozen_bytes(shape, run.method.frozen_format, element_bytes)
    in_files = run.method.frozen_format != "none" or not shared_memory
    start = 0 if in_files else plan.full_copies * shape.adapted_parameters * element_bytes
    return frozen + start + shape.replicated_parameters * element_bytes


def host_memory_bytes(run: Run, shape: ModelShape, device: Device) -> int:
    """Bytes of the host's own memory that one device needs: the weights that merges start from and add to.

    Where both share a memory, those of plain weights are part of the device's; those of quantised ones lie in
    mapped files, which no allocator sees, and stay apart.
    """
    if device.host_memory_bytes == 0 and run.method.frozen_format == "none":
        return 0
    return plan_of(run.method).full_copies * shape.adapted_parameters * ELEMENT_BYTES[run.train.dtype]


def host_memory_by_part(run: Run, shape: ModelShape, device: Device) -> dict[str, int]:
    """Bytes of the host's own memory that one device needs; of one shared memory only what lies in mapped files.

    `start_weights`: what merges start from, also the high-precision copy of quantised weights; `diagnostics`: sums of
    gradients, in a mapped file, which no allocator sees, so that they count apart on one memory, too;
    `checkpoint_save`: the largest tensor on its way to the disk; `data`: text that is held as it was read (all else is
    memory-mapped).
    """
    own, element_bytes = device.host_memory_bytes > 0, ELEMENT_BYTES[run.train.dtype]
    largest = _largest_elements(shape) * element_bytes
    return {
        "start_weights": host_memory_bytes(run, shape, device),
        "diagnostics": shape.parameters * element_bytes if run.train.diagnostics_every is not None else 0,
        "checkpoint_save": largest if own else 0,
        "data": _text_bytes(run.data.path, run.data.tokenizer) if own and run.model.unit == "tokens" else 0,
    }


@lru_cache(maxsize=64)
def _largest_elements(shape: ModelShape) -> int:
    return max(tensor.elements for tensor in shape.tensors)


@lru_cache(maxsize=64)
def _text_bytes(path: str | None, tokenizer: str) -> int:
    """Bytes of the files of a text that is read as bytes; 0 where tokens are memory-mapped, or nothing is there yet."""
    if path is None or tokenizer != BYTES:
        return 0
    root = Path(path)
    files = root.rglob("*") if root.is_dir() else [root]
    return sum(file.stat().st_size for file in files if file.is_file())


@by_method
def checkpoint_bytes(run: Run, shape: ModelShape, devices: int, in_a_round: bool = False) -> int:
    """Bytes of a checkpoint of so many devices: what they share once, what is theirs each time, and moments.

    After a merge, which may have dropped moments, or `in_a_round`.
    Of a run with a dense warm start, before its first adapter, where it holds most.
    """
    plan, held, element_bytes = plan_of(run.method), persistent_state(run, shape), ELEMENT_BYTES[run.train.dtype]
    frozen_bytes_kept, weights = 0, shape.parameters
    if plan.adapters(run.cluster.devices) is not None:
        frozen_bytes_kept = frozen_bytes(shape, run.method.frozen_format, element_bytes)
        frozen_bytes_kept += plan.full_copies * shape.adapted_parameters * element_bytes
        weights = (0 if plan.starts_dense else held.adapters) + shape.replicated_parameters
    copies = 1 if held.shared else devices
    moments = moment_bytes(run, shape) if in_a_round else _merged_moment_bytes(run, shape)
    elements = copies * weights + devices * held.extra
    return frozen_bytes_kept + elements * element_bytes + copies * moments + kept_bytes(run, shape)


def _merged_moment_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes of moments after a merge, which may have dropped them all, or those of adapters."""
    drops = plan_of(run.method).drops_moments
    if drops == "all":
        return 0
    return moment_bytes_beside_adapters(run, shape) if drops == "adapters" else moment_bytes(run, shape)


def _dropped_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes of moments that every merge drops right away."""
    if not plan_of(run.method).drops_at_once:
        return 0
    return moment_bytes(run, shape) - _merged_moment_bytes(run, shape)


def _packing_start_bytes(run: Run, shape: ModelShape) -> int:
    """Bytes of the start, where it happens on the device: the network as it is drawn, and a first layer's packing.

    Each layer's own weights are let go when it is packed.
    """
    method, element_bytes = run.method, ELEMENT_BYTES[run.train.dtype]
    if method.frozen_format == "none" or plan_of(method).starts_dense:
        return 0
    first = shape.in_order()[0]
    packing = packing_bytes(first.weights, first.in_features, method.frozen_format, element_bytes)
    return (shape.parameters - first.weights) * element_bytes + packing


def _unpacked_bytes(method: MethodOptions, shape: ModelShape, element_bytes: int) -> int:
    """Bytes of the largest quantised layer while a product uses it."""
    if method.frozen_format == "none" or plan_of(method).starts_dense:
        return 0
    return max(unpacking_bytes(x.weights, method.frozen_format, element_bytes) for x in shape.adapted)
