"""Track the memory of one device's program without allocating it: count the storages of fake tensors.

`lte plan --verify` checks a plan's memory by it, on any machine. The program is the real one: method, network, loss,
optimizer, merge. Fake tensors have shapes and storages but no numbers, so a network of billions of parameters takes
seconds and little memory. Every storage is followed from the operation that makes it until nothing refers to it any
more, which is when the allocator frees it; a test compares the peak with the allocator's own. torch's MemTracker counts
likewise, but has neither merges nor parameters without gradients.
"""

from __future__ import annotations

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
from simulate.common.gc_paused import earlier_garbage_kept
from simulate.config.run import Run
from simulate.layers.dtypes import CPU
from simulate.layers.lazy_weight import LazyWeight
from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import VectorLora
from simulate.measure.caching_allocator import reserved_bytes
from simulate.measure.one_device import Program, train_alone, warm_up
from simulate.methods.base import Method
from simulate.models.schema import FactoryModel
from simulate.rules.optimizer import CPU_CHUNK_BYTES

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "temporary")
"""Parts of a device's memory, the same as in simulate.costs.memory."""
FACTORS = ("a", "b", "a0", "b0")
GRADIENT_FIGURES = "gradient_figures"
"""The phase of diagnostics, which has a backward pass of its own."""
_DEVICE_OF = torch.ops.prim.device.default
BUILD = "build"
"""The phase before everything else."""


@dataclass(frozen=True)
class PhasePeak:
    """Bytes held at the peak of a phase."""

    total: int
    by_part: dict[str, int]
    """Bytes by PARTS."""


@dataclass
class Log:
    """Allocations and frees of a program, in order."""

    entries: list[tuple[int, int, str]] = field(default_factory=list)
    """(storage, bytes, phase); bytes are negative where the storage is freed."""
    parts: dict[int, str] = field(default_factory=dict)
    """Storage → its part, as found out later; those that are missing are temporary."""
    host: set[int] = field(default_factory=set)
    """Storages that stay in the host's memory where it is apart from the device's."""
    mapped: set[int] = field(default_factory=set)
    """Storages of `host` that lie in memory-mapped files, which no allocator sees."""

    def peaks(self, with_host: bool) -> dict[str, PhasePeak]:
        """Return the peak of each phase; `with_host` where device and host share one memory."""
        held, peaks = dict.fromkeys(PARTS, 0), dict[str, PhasePeak]()
        for storage, num_bytes, phase in self.device_entries(with_host):
            held[self.parts.get(storage, "temporary")] += num_bytes
            total = sum(held.values())
            if num_bytes > 0 and (phase not in peaks or total > peaks[phase].total):
                peaks[phase] = PhasePeak(total, dict(held))
        return peaks

    def device_entries(self, with_host: bool) -> Iterator[tuple[int, int, str]]:
        """Yield the entries of storages in the device's memory."""
        apart = self.mapped if with_host else self.host
        return (entry for entry in self.entries if entry[0] not in apart)

    def device_requests(self, with_host: bool) -> Iterator[tuple[int, int]]:
        """Yield (storage, bytes) of the device's allocations and frees, in order."""
        # A network is built on the host, and only tensors that outlive the build move to the device.
        gone = {storage for storage, num_bytes, phase in self.entries if num_bytes < 0 and phase == BUILD}
        return ((key, num_bytes) for key, num_bytes, _ in self.device_entries(with_host) if key not in gone)

    @property
    def host_bytes(self) -> int:
        """Bytes that stay in the host's memory where it is apart from the device's."""
        return sum(num_bytes for storage, num_bytes, _ in self.entries if storage in self.host and num_bytes > 0)


class _Follower(TorchDispatchMode):
    """Logs the storages of every operation; operations on real tensors alone (counters, shares) stay real."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.phase = BUILD
        self.method: Method | None = None
        self._known: dict[int, int] = {}
        self._in_backward = False
        self._references: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; torch's guard against it imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if LazyWeight in types:
            return NotImplemented  # it materialises the weight, and calls again with a plain tensor
        kwargs = kwargs or {}
        self._follow_backward()
        if func is _DEVICE_OF and FakeTensor in types:  # half of all calls, which makes no tensor
            return args[0].fake_device
        # Counters and shares are real, since the program branches on their numbers.
        if FakeTensor in types or not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):
            result = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        scratch = _SCRATCH.get(func.name())
        if scratch is not None:
            storage, scratch_bytes = len(self.log.entries), scratch(*args)
            self._add(scratch_bytes, storage)
            self._add(-scratch_bytes, storage)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return result

    def enter(self, phase: str, method: Method, host: Sequence[Tensor]) -> None:
        """Begin a phase of the program."""
        self.name_state(method)  # now, since a merge may drop state
        in_files = [self._known[tensor.untyped_storage()._cdata] for tensor in host]
        self.log.host.update(in_files)
        self.log.mapped.update(in_files)
        self.phase, self.method = phase, method

    def _follow_backward(self) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # -1 outside of autograd's backward pass
        if in_backward and not self._in_backward:
            # Of what is held now, all that is not named as state later was kept by the forward pass.
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

    def _add(self, num_bytes: int, storage: int) -> None:
        self.log.entries.append((storage, num_bytes, self.phase))

    def _track(self, tensor: Tensor) -> None:
        """Log a tensor's storage if it is new, and its free when nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known or num_bytes == 0 or tensor.device.type == "meta":
            return
        self._known[key] = number = len(self.log.entries)  # the number of its entry tells it from reused addresses
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
        """Name the part of each storage that stays from step to step."""
        self._leave_backward()
        for name, tensor in method.state.state_dict().items():
            kind = name.partition(".")[0]
            self._name(tensor, "weights" if kind == "model" else "optimizer")
            # These copies of weights stay on the host, in files where the device's weights are quantised.
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
    """Converter that keeps no weak references to fake tensors: a module could not convert parameters that have one."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


def _log_sum_exp_scratch(x: Tensor, dims: list[int], *_: object) -> int:
    """Return the bytes of the exponentials, and of each row's maximum and sum."""
    return (x.numel() + 2 * x.numel() // x.shape[dims[0]]) * x.element_size()


_SCRATCH: Mapping[str, Callable[..., int]] = {
    "aten::logsumexp": _log_sum_exp_scratch,
    "bitsandbytes::optimizer_update_8bit_blockwise": lambda kind, gradient, *_: gradient.numel() * CPU_CHUNK_BYTES,
}
"""Operation → bytes that its kernel allocates and frees inside, which no dispatcher sees."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make tensors without numbers inside the context."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _ForgetfulConverter()
    with mode:
        yield


@dataclass(frozen=True)
class Tracked:
    """Memory of one device's program in bytes, without what the system reserves."""

    tracked_bytes: int
    """Bytes at the peak."""
    by_part: dict[str, int]
    """Bytes at the peak by PARTS."""
    by_phase: dict[str, int]
    """Bytes at the peak of each phase."""
    allocator_bytes: int
    """Bytes that CUDA's caching allocator would reserve."""
    host_bytes: int
    """Bytes in the host's memory beside it."""


def tracked_memory(run: Run, with_host: bool) -> Tracked:
    """Track a run's program; `with_host` where device and host share one memory.

    Raises InputError for a user's network that cannot be tracked.
    """
    log = track(run)
    peaks = log.peaks(with_host)
    peaks.pop(BUILD)  # takes place on the host, before anything moves to the device
    highest = max(peaks.values(), key=lambda peak: peak.total)
    return Tracked(
        tracked_bytes=highest.total,
        by_part=highest.by_part,
        by_phase={phase: peak.total for phase, peak in peaks.items()},
        allocator_bytes=reserved_bytes(log.device_requests(with_host)),
        host_bytes=0 if with_host else log.host_bytes,
    )


def track(run: Run, program: Program = train_alone) -> Log:
    """Return the allocations of one device's program over steps, merges and an evaluation."""
    # These results are cached for the whole process: computed under fake tensors, they would have no numbers later.
    run.shape()
    warm_up(run, CPU)
    follower = _Follower()
    try:
        # Tensors of earlier work that are freed later would be counted as the program's.
        with earlier_garbage_kept(), fake_tensors(), follower:
            method = program(run, CPU, follower.enter)
            follower.name_state(method)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if not isinstance(run.model, FactoryModel):
            raise
        raise InputError(
            f"model.name = {run.model.name!r}: its operations depend on numbers ({error}), so its memory cannot be "
            "tracked without them; leave --verify away, lte train measures it"
        ) from error
    return follower.log
