"""Communicator of several tensor programs in one process: each holds some of the devices, and they meet at exchanges.

Devices of unequal classes cannot share a tensor program. So a simulation in one process runs a program a class, each in
a thread of its own, as if they were processes of a launched run; simulate.methods.unequal starts them. Only one thread
computes at a time. At an exchange each leaves its tensors and waits for the others; the last one makes the result, in
the order of programs, so that it does not depend on which came first.

Legend: L devices of a program, N devices of all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from simulate.comm.base import Communicator, Exchanges, Nodes, Part

ResultT = TypeVar("ResultT")


class _BrokenOffError(Exception):
    """Raised in a program whose peers have failed."""


class Meeting:
    """The place where programs exchange tensors; each is in a thread, and one of them computes at a time."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self._turn = threading.Condition(threading.Lock())
        self._left: dict[int, Any] = {}
        """Tensors that each program has left for the exchange under way."""
        self._results: list[Any] = []
        self._exchanges = 0
        """Exchanges that are complete."""
        self._has_failed = False

    def run(self, compute: Sequence[Callable[[], ResultT]]) -> list[ResultT]:
        """Run one function for each program, which may meet at exchanges; return their results in order.

        Raises what the first of them raised.
        """
        self._left, self._has_failed = {}, False
        with ThreadPoolExecutor(self.programs, "program") as threads:
            results = [threads.submit(self._alone, function) for function in compute]
        errors = [error for result in results if (error := result.exception()) is not None]
        for error in errors:
            if not isinstance(error, _BrokenOffError):
                raise error
        return [result.result() for result in results]

    def _alone(self, function: Callable[[], ResultT]) -> ResultT:
        with self._turn:
            try:
                return function()
            except BaseException:
                self._has_failed = True
                self._turn.notify_all()
                raise

    def exchange(self, program: int, value: Any, combine: Callable[[list[Any]], list[Any]]) -> Any:
        """Leave a value, and return the program's own part of what `combine` makes of all, in order of programs."""
        self._left[program] = value
        if len(self._left) == self.programs:
            values, self._left = [self._left[index] for index in range(self.programs)], {}
            self._results = combine(values)
            self._exchanges += 1
            self._turn.notify_all()
        else:
            begun = self._exchanges
            # A wait gives the turn away; nobody can be an exchange ahead, as all take part in each.
            while self._exchanges == begun and not self._has_failed:
                self._turn.wait()
            if self._exchanges == begun:
                raise _BrokenOffError
        result, self._results[program] = self._results[program], None
        return result


class ProgramCommunicator(Communicator):
    """One program's view of all devices. The first program's counts and charges; the others send along."""

    def __init__(self, meeting: Meeting, program: int, local_devices: range, whole: Communicator) -> None:
        super().__init__(whole.num_devices, local_devices)
        self.meeting, self.process, self.processes = meeting, program, meeting.programs
        self.whole = whole
        if program == 0:
            self.counter, self.on_transfer, self.on_wait = whole.counter, whole.on_transfer, whole.on_wait

    def _exchange(self, value: Any, combine: Callable[[list[Any]], list[Any]]) -> Any:
        return self.meeting.exchange(self.process, value, combine)

    def _to_all(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Return what `combine` makes of all programs' values, the same for each."""
        return self._exchange(value, lambda values: [combine(values)] * self.processes)

    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        gathered: Tensor = self._to_all(values_LX.detach().cpu(), torch.cat)
        return gathered

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._to_all(sums, _sum_in_place)

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(self._to_all(tensors, _joined))

    def _all_gather_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]:
        # Copied, since a program may start its next round before another has read what it sent.
        def copies(values: list[Sequence[Tensor]]) -> list[list[Tensor]]:
            return [[tensor.detach().clone() for tensor in tensors] for tensors in zip(*values, strict=True)]

        return list(self._to_all(tensors, copies))

    def _push_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]] | None:
        everyones = self._all_gather_parts(tensors, parts)
        return everyones if self.process == 0 else None

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        before = sum(self.participants is None or n in self.participants for n in range(self.local_devices.start))
        own = slice(before, before + len(self.local_participants))
        return [joined.transpose(0, 1)[own] for joined in self._all_gather(tensors)]

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        def copy(values: list[tuple[range, Sequence[Tensor]]]) -> None:
            sent = next(own for devices, own in values if source in devices)
            for _, own in values:
                _copy(sent, own)

        self._to_all((self.local_devices, tensors), copy)

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> list[Tensor] | None:
        everyones = self._all_gather(tensors)
        return everyones if self.process == 0 else None

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        def copy(values: list[Sequence[Tensor]]) -> None:
            for own in values[1:]:
                _copy(values[0], own)

        self._to_all(tensors, copy)

    def leaders(self, nodes: Nodes) -> Exchanges | None:
        raise AssertionError("methods with nodes refuse classes of devices")

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        raise AssertionError("methods with nodes refuse classes of devices")

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        raise AssertionError("methods with nodes refuse classes of devices")

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        raise AssertionError("methods with nodes refuse classes of devices")


def _joined(values: list[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(list(tensors)) for tensors in zip(*values, strict=True)]


@torch.no_grad()
def _sum_in_place(values: list[Sequence[Tensor]]) -> None:
    for tensors in zip(*values, strict=True):
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total += tensor
        for tensor in tensors:
            tensor.copy_(total)


@torch.no_grad()
def _copy(sent: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    for source, target in zip(sent, own, strict=True):
        if source is not target:
            target.copy_(source)
