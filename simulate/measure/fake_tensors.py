"""Follow what one device's program allocates without allocating it: fake tensors, whose storages are counted.

The program is the real one: method, network, loss, optimizer, merge. Fake tensors have shapes and storages but no
numbers, so a network of billions of parameters takes seconds and little memory. Every storage is followed from the
operation that makes it to the moment when nothing refers to it any more, which is when the allocator gives it back; a
test holds the peak against the allocator's own. torch's MemTracker counts likewise, but knows no merges, and no
parameters that require no gradient.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simulate.common.errors import InputError
from simulate.config.run import Run
from simulate.layers.dtypes import CPU
from simulate.layers.lazy_weight import LazyWeight
from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import VectorLora
from simulate.layers.quantized import nf4_levels
from simulate.measure.caching_allocator import reserved_bytes
from simulate.measure.one_device import Program, train_alone
from simulate.methods.base import Method
from simulate.models.schema import FactoryModel
from simulate.optim.adamw8bit import moment_values
from simulate.rules.optimizer import CPU_CHUNK_BYTES

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "temporary")
"""Of a device's memory, as simulate.costs.memory has them."""
FACTORS = ("a", "b", "a0", "b0")
GRADIENT_FIGURES = "gradient_figures"
"""A phase with a backward pass of its own."""
BUILD = "build"
"""The phase before everything else."""


@dataclass(frozen=True)
class Moment:
    """What was held at a phase's height, in bytes."""

    total: int
    by_part: dict[str, int]


@dataclass
class Log:
    """Everything that was allocated and given back, in order."""

    entries: list[tuple[int, int, str]] = field(default_factory=list)
    """(storage, bytes: negative where it is given back, phase)."""
    parts: dict[int, str] = field(default_factory=dict)
    """What a storage turned out to be; those that are missing were temporary."""
    host: set[int] = field(default_factory=set)
    """Storages that stay in the host's memory where it has its own."""
    mapped: set[int] = field(default_factory=set)
    """Those of them that lie in files, which no allocator sees."""

    def moments(self, with_host: bool) -> dict[str, Moment]:
        """Return each phase's height, by part; `with_host` where device and host share one memory."""
        held, heights = dict.fromkeys(PARTS, 0), dict[str, Moment]()
        for storage, num_bytes, phase in self.device_entries(with_host):
            held[self.parts.get(storage, "temporary")] += num_bytes
            total = sum(held.values())
            if num_bytes > 0 and (phase not in heights or total > heights[phase].total):
                heights[phase] = Moment(total, dict(held))
        return heights

    def device_entries(self, with_host: bool) -> Iterator[tuple[int, int, str]]:
        """Yield the entries of what lies in the device's memory."""
        apart = self.mapped if with_host else self.host
        return (entry for entry in self.entries if entry[0] not in apart)

    def device_requests(self, with_host: bool) -> Iterator[tuple[int, int]]:
        """Yield (storage, bytes) of what the device is asked for, in order: of the build, on the host, what is left."""
        gone = {storage for storage, num_bytes, phase in self.entries if num_bytes < 0 and phase == BUILD}
        return ((key, num_bytes) for key, num_bytes, _ in self.device_entries(with_host) if key not in gone)

    @property
    def host_bytes(self) -> int:
        """Bytes that stay in the host's memory where it has its own."""
        return sum(num_bytes for storage, num_bytes, _ in self.entries if storage in self.host and num_bytes > 0)


class _Follower(TorchDispatchMode):
    """Sees every operation; what it is given that is real (numbers from Python: counters, shares) stays real."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.phase = BUILD
        self.method: Method | None = None
        self._known: dict[int, int] = {}
        self._in_backward = False
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if LazyWeight in types:
            return NotImplemented  # it calls again with what it makes, within sight
        kwargs = kwargs or {}
        self._follow_backward()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        scratch = _SCRATCH.get(func.name())
        if scratch is not None:
            self._add(scratch_bytes := scratch(*args), storage := self._new())
            self._add(-scratch_bytes, storage)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def enter(self, phase: str, method: Method, host: Sequence[Tensor]) -> None:
        """Name what comes next, and what is there; a state that a merge drops is gone later."""
        self.name_state(method)
        in_files = [self._known[tensor.untyped_storage()._cdata] for tensor in host]
        self.log.host.update(in_files)
        self.log.mapped.update(in_files)
        self.phase, self.method = phase, method

    def _follow_backward(self) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            # What is held now and turns out to be nothing that stays is what the forward pass left behind.
            for storage in self._known.values():
                self.log.parts.setdefault(storage, "activations")
            if self.phase != GRADIENT_FIGURES:
                self.phase = "backward"
        elif self._in_backward and not in_backward:
            self._leave_backward()
        self._in_backward = in_backward

    def _leave_backward(self) -> None:
        if not self._in_backward or self.method is None:
            return
        self._in_backward = False
        if self.phase == GRADIENT_FIGURES:
            return
        self.phase = "optimizer_step"
        for parameter in (*self.method.model.parameters(), *self.method.parameters.values()):
            if parameter.grad is not None:
                self._name(parameter.grad, "gradients")

    def _new(self) -> int:
        return len(self.log.entries)

    def _add(self, num_bytes: int, storage: int) -> None:
        self.log.entries.append((storage, num_bytes, self.phase))

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known or num_bytes == 0 or tensor.device.type == "meta":
            return
        self._known[key] = number = self._new()
        self._add(num_bytes, number)

        def gone(_: object) -> None:
            del self._known[key], self._references[key]
            self._add(-num_bytes, number)

        self._references[key] = weakref.ref(storage, gone)

    def _name(self, tensor: Tensor, part: str) -> None:
        number = self._known.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.log.parts[number] = part

    def name_state(self, method: Method) -> None:
        """Say what is what of that which stays from step to step."""
        self._leave_backward()
        for name, tensor in method.state.state_dict().items():
            kind = name.partition(".")[0]
            self._name(tensor, "weights" if kind == "model" else "optimizer")
            if name.endswith((".start_weight", ".master")):
                self._name(tensor, "weights")
                storage = self._known[tensor.untyped_storage()._cdata]
                self.log.host.add(storage)
                if method.run.method.frozen_format != "none":
                    self.log.mapped.add(storage)
        for module in method.model.modules():
            if isinstance(module, LoraLinear | VectorLora):
                held = (*module.factors(), *(getattr(module, key, None) for key in FACTORS))
                for factor in (factor for factor in held if isinstance(factor, Tensor)):
                    self._name(factor, "adapters")


class _ForgetfulConverter(FakeTensorConverter):
    """Keeps no weak references to fake tensors, which would not let modules convert their parameters."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


def _log_sum_exp_scratch(x: Tensor, dims: list[int], *_: object) -> int:
    """The exponentials, the largest of each row, and the sums that become the result."""
    return (x.numel() + 2 * x.numel() // x.shape[dims[0]]) * x.element_size()


def _eight_bit_scratch(kind: str, gradient: Tensor, *_: object) -> int:
    return gradient.numel() * CPU_CHUNK_BYTES


_SCRATCH: Mapping[str, Callable[..., int]] = {
    "aten::logsumexp": _log_sum_exp_scratch,
    "bitsandbytes::optimizer_update_8bit_blockwise": _eight_bit_scratch,
}
"""Bytes that operations hold inside, where nobody else sees them."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make no numbers within."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _ForgetfulConverter()
    with mode:
        yield


@dataclass(frozen=True)
class Tracked:
    """What one device's program was seen to hold, in bytes, without what the system keeps for itself."""

    tracked_bytes: int
    """The peak."""
    by_part: dict[str, int]
    by_phase: dict[str, int]
    allocator_bytes: int
    """What CUDA's caching allocator would have reserved for it."""
    host_bytes: int
    """Beside it, in the host's memory."""


def tracked_memory(run: Run, with_host: bool) -> Tracked:
    """Follow a run's program; `with_host` where device and host share one memory.

    Raises InputError for a network of the user's that cannot be followed.
    """
    log = track(run)
    moments = log.moments(with_host)
    moments.pop(BUILD)  # takes place before anything moves to the device
    highest = max(moments.values(), key=lambda moment: moment.total)
    return Tracked(
        tracked_bytes=highest.total,
        by_part=highest.by_part,
        by_phase={phase: moment.total for phase, moment in moments.items()},
        allocator_bytes=reserved_bytes(log.device_requests(with_host)),
        host_bytes=0 if with_host else log.host_bytes,
    )


def track(run: Run, program: Program = train_alone) -> Log:
    """Return what one device's program allocates over steps, merges and an evaluation."""
    run.model.shape()  # of a network without a name: found out with numbers
    if run.method.frozen_format.startswith("nf4"):
        nf4_levels()  # kept for later, so with numbers
    if run.train.optimizer_state == "8bit":
        moment_values(CPU)
    gc.collect()  # what is freed late would be taken for the program's
    follower = _Follower()
    try:
        with fake_tensors(), follower:
            method = program(run, CPU, follower.enter)
            follower.name_state(method)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if not isinstance(run.model, FactoryModel):
            raise
        raise InputError(
            f"model.name = {run.model.name!r}: what it does depends on numbers ({error}), so that its memory cannot be "
            "followed without them; leave --verify away, lte train measures it"
        ) from error
    return follower.log
