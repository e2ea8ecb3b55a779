"""Measure what one device of a run really allocates: its program alone, for a few steps and a merge.

The simulation holds all devices in one process and shares what they have in common, so its own footprint says little
about one device's. Here one device runs by itself: its batch, its adapters, everyone's factors at the merge.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from simulate.communicator import Communicator, Nodes
from simulate.config import Run
from simulate.methods import build_method
from simulate.models.build import DTYPES
from simulate.models.inputs import example_batch

MEASURED_ROUNDS, MEASURED_STEPS = 2, 2
"""The first step allocates optimizer state, the first merge what it remembers; after that every round is alike."""


class EchoCommunicator(Communicator):
    """One device of N, whose peers are echoes of itself: buffers have their real sizes, the numbers mean nothing."""

    def __init__(self, num_devices: int) -> None:
        super().__init__(num_devices, range(1))

    def share(self, values_LX: Tensor) -> Tensor:
        return values_LX.detach().cpu().expand(self.num_devices, -1)

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._pack(sums)

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.num_devices == 1:
            return list(tensors)
        return [tensor.repeat(self.num_devices, *(1,) * (tensor.ndim - 1)) for tensor in tensors]

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        self._pack(tensors)

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> None:
        self._pack(tensors)  # the server, and its memory, are elsewhere

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        self._pack(tensors)

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._pack(sums)

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._pack(sums)

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        self._pack(tensors)

    def _pack(self, tensors: Sequence[Tensor]) -> None:
        """Allocate and free the message that the tensors would travel in."""
        if self.num_devices > 1:
            mixed = len({tensor.dtype for tensor in tensors}) > 1
            torch.cat([tensor.flatten().view(torch.uint8) if mixed else tensor.flatten() for tensor in tensors])


def measure_memory_bytes(run: Run, device: torch.device) -> int:
    """Return the allocator's peak, in bytes, of one device's program over steps and a merge."""

    def program() -> None:
        method = build_method(run, EchoCommunicator(run.cluster.devices), device)
        inputs, targets = (tensor.to(device) for tensor in example_batch(run.model, run.train.micro_batch))
        inputs = inputs.to(DTYPES[run.train.dtype]) if inputs.is_floating_point() else inputs
        last = run.train.steps - 1
        for _ in range(MEASURED_ROUNDS):
            for step in range(MEASURED_STEPS):
                method.step(inputs, targets, step)
            late = run.method.late_steps
            if late:
                method.merge(sent := run.method.steps_apart - 1)
                for step in range(sent + 1, sent + 1 + late):
                    method.step(inputs, targets, step)
            method.merge(last)  # of all groups of layers

    if device.type == "cuda":
        return _cuda_peak_bytes(program, device)
    return cpu_peak_bytes(program)


def _cuda_peak_bytes(program: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    program()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def cpu_peak_bytes(program: Callable[[], object]) -> int:
    """Return the CPU allocator's peak, in bytes, of what a program allocates over what was there before."""
    gc.collect()  # what is freed late would be counted as if the program had freed it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        program()
    current = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak
