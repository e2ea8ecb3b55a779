"""Bytes that a simulation of all devices holds in one process, in closed form; torch-free.

A simulation computes all devices in one tensor program: frozen weights, and what devices keep equal, exist once; what
differs between devices exists N times, and so do the activations of their batches. `lte train` asks whether that fits
this machine before it starts. Built on the phases of one device (simulate.costs.memory), whose closed forms are exact;
buffers of exchanges are bounded. A test holds the form to the program, followed with fake tensors.

Letter: N devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simulate.config.hardware import Device
from simulate.config.run import Run
from simulate.costs.memory import CPU_LIBRARY_BYTES, PeakProfile, peak_profile
from simulate.costs.moments import moment_bytes
from simulate.costs.state import persistent_state
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of
from simulate.rules.pace import given_counts
from simulate.rules.phases import PhaseName

PASSES: frozenset[PhaseName] = frozenset({"forward", "backward_start", "backward_end"})
MERGES: frozenset[PhaseName] = frozenset({"merge", "outer_step"})
PROCESS_BYTES = 390_000_000
"""Python, torch and their libraries in a process that trains a tiny run (measured: 386 MB, torch 2.13 for CPUs)."""
MAPPED_BYTES = 32 * 2**20
"""From this size on glibc gives a freed tensor back at once; smaller ones leave holes (M_MMAP_THRESHOLD's maximum)."""
SMALL_HOLES, LARGE_HOLES = 1.0, 0.12
"""Memory that a process holds beside tensors which come and go, as a share of them: where those between blocks are
smaller than MAPPED_BYTES, and where they are larger. Fitted to the resident memory of eight runs of `lte train`: gpt
with LTE, DDP and DiLoCo, 2 to 16 devices, 2 to 1,574 MB of tensors (docs/accuracy.md)."""


@dataclass(frozen=True)
class SimulatedMemory:
    """Bytes of a simulation's process."""

    state: int
    """Tensors that stay from step to step."""
    passing: int
    """Tensors that come and go, at the peak."""
    holes: int
    """Bytes that the heap, and libraries of products in half precision, hold beside them on a processor."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors at the peak."""
        return self.state + self.passing

    @property
    def process(self) -> int:
        """Bytes of a process that simulates on the processor."""
        return PROCESS_BYTES + self.tensors + self.holes


def simulated_memory(run: Run, shape: ModelShape, device: Device) -> SimulatedMemory:
    """Return a simulation's memory at its peak; `device` is one of those simulated, in its own memory or the host's.

    Classes of devices have a tensor program each, beside one another.
    """
    if run.cluster.classes:
        parts = [simulated_memory(one, shape, device) for one in _programs(run)]
        return SimulatedMemory(*(sum(getattr(part, key) for part in parts) for key in ("state", "passing", "holes")))
    state = _state_bytes(run, shape, peak_profile(run, shape, device))
    passing = max(size for _, size in passing_bytes(run, shape, device))
    train = run.train
    between_blocks = run.cluster.devices * train.micro_batch * shape.tokens * shape.width * ELEMENT_BYTES[train.dtype]
    share = SMALL_HOLES if between_blocks < MAPPED_BYTES else LARGE_HOLES
    libraries = CPU_LIBRARY_BYTES.get(train.autocast, 0)
    return SimulatedMemory(state, passing, int(share * max(0, passing)) + libraries)


def _programs(run: Run) -> Iterator[Run]:
    """Yield the run of each class's tensor program, which holds that class's devices alone."""
    for one, members in zip(run.classes, run.cluster.class_devices, strict=True):
        update: dict[str, Any] = {"devices": len(members)}
        if one.cluster.merges_given is not None:
            update["merges_given"] = tuple(row[members.start : members.stop] for row in one.cluster.merges_given)
        elif one.cluster.has_quorum:  # of all devices; the program's own, whatever their number, may be late
            update |= {"quorum": None, "deadline_s": one.cluster.deadline_s or 1.0}
        yield one.model_copy(update={"cluster": one.cluster.model_copy(update=update)})


def passing_bytes(run: Run, shape: ModelShape, device: Device) -> Iterator[tuple[PhaseName, int]]:
    """Yield the bytes on top of the state, in each phase that can be a simulation's peak."""
    plan, held, devices = plan_of(run.method), persistent_state(run, shape), run.cluster.devices
    copies, shared = plan.simulated_copies(devices), plan.shared_elements(shape, devices) + held.last_merge
    # Error feedback and predictions need each device's gradient apart, even where devices share their weights.
    own = devices if plan.shares_state and (held.extra > shared or plan.compresses_gradients) else copies
    # Those that are late are moved by the change of what is averaged, whose old values stand beside the new ones.
    moved = 0
    if run.cluster.has_quorum:
        moved = ELEMENT_BYTES[run.train.dtype] * sum(t.elements for t in plan.separate_tensors(shape, devices))
    for phase in peak_profile(run, shape, device).phases:
        batches = devices * (phase.activations + phase.temporary)
        if phase.name in PASSES:
            # Under autocast the output layer's gradient leaves the copies' product transposed and is copied once; where
            # the layer is tied to a table, as in models of text, the phase has two such gradients anyway.
            is_cast = run.train.autocast != "none"
            at_output = (
                is_cast and phase.name == "backward_start" and not phase.temporary and shape.inputs and copies > 1
            )
            yield phase.name, own * phase.gradients + batches + (copies * phase.gradients if at_output else 0)
        elif phase.name == "evaluation":  # of the merged weights, on one device's number of samples
            yield phase.name, phase.total
        elif phase.name not in ("optimizer_step", "checkpoint_save"):  # merges and diagnostics
            # Sums over devices come first, and what is gathered counts N times in one device's memory already.
            size = devices * phase.activations + phase.temporary - copies * phase.dropped
            yield phase.name, size + (moved if phase.name in MERGES else 0)
    # Each device holds what it compresses or iterates on; what it receives from N others exists once for all. So such
    # buffers are those of one of two devices, N times.
    pair = run.model_copy(update={"cluster": run.cluster.model_copy(update={"devices": min(devices, 2)})})
    compressed = run.method.compresses
    for phase in peak_profile(pair, shape, device).phases:
        if phase.name == "optimizer_step":
            yield phase.name, own * (phase.gradients + phase.temporary) + devices * phase.activations
        elif phase.name in MERGES and compressed:
            yield phase.name, devices * (phase.activations + phase.temporary)


def _state_bytes(run: Run, shape: ModelShape, profile: PeakProfile) -> int:
    """Return the bytes that stay from step to step."""
    plan, devices, element_bytes = plan_of(run.method), run.cluster.devices, ELEMENT_BYTES[run.train.dtype]
    is_dense = plan.starts_dense or plan.adapters(devices) is None
    trained = (shape.parameters if is_dense else shape.replicated_parameters) * element_bytes
    held = persistent_state(run, shape)
    copies, once = (
        plan.simulated_copies(devices),
        (plan.shared_elements(shape, devices) + held.last_merge) * element_bytes,
    )
    projections = held.projections * element_bytes
    frozen, moments = profile.weights - trained, moment_bytes(run, shape)
    extra = profile.optimizer - moments - projections
    of_copy = trained + profile.adapters + moments
    # Devices that stop before a round's end are kept as they were, while the tensor program goes on with all rows.
    stopped = 0
    if run.method.is_paced or run.cluster.has_quorum:
        rounds = given_counts(run.method, run.cluster)
        # Those that are late or lost are also held while the others merge: where a program is of one class of several,
        # that may be all of its devices.
        most = copies if run.cluster.has_quorum and run.method.fleet else copies - 1
        stopped = max(sum(n < max(*taken, 1) for n in taken) for taken in rounds) if rounds else most
    # What is kept beside weights is each device's own, or of those whose devices train as one.
    owners = devices if plan.shares_state else copies
    return frozen + projections + copies * of_copy + once + owners * (extra - once) + stopped * of_copy
