"""Collectives between devices, and the payload bytes that they count.

Methods call a Communicator for every exchange. A subclass moves the tensors: simulate.comm.virtual moves nothing, since
all devices live in one process; simulate.comm.process_group uses torch.distributed; simulate.comm.echo stands in for
absent peers. Tensors of several devices carry a leading axis in global device order.

Bytes are counted here from the tensors that are sent, and planned in simulate.comm.transfers from the model's shape.
The two formulas are kept apart on purpose: a test compares counted with planned bytes, so an error in one of them
shows.

Legend: L local devices, N devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from simulate.comm.transfers import Operation, Transfer


@dataclass
class ByteCounter:
    """Payload bytes and messages so far, summed over all devices."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0

    def add(self, sent_bytes: int, received_bytes: int) -> None:
        """Add one message of a collective."""
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes
        self.messages += 1


@dataclass(frozen=True)
class Part:
    """Contribution of each of some consecutive devices to an exchange in which devices send unequal tensors."""

    devices: range
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each tensor of one device; the first axis is its rows."""

    def num_bytes(self, element_bytes: Sequence[int]) -> int:
        """Return the bytes of one device's tensors, whose elements have so many bytes."""
        return sum(math.prod(shape) * size for shape, size in zip(self.shapes, element_bytes, strict=True))


@dataclass(frozen=True)
class Nodes:
    """Division of the devices, in global order, into nodes of equal size."""

    size: int
    """Devices of one node."""
    count: int
    """Number of nodes."""


def first_devices(numbers: Iterable[int], nodes: Nodes) -> list[int]:
    """Return the first devices of nodes, which hold the node's copy of what it trains."""
    return [number * nodes.size for number in numbers]


class Exchanges(ABC):
    """Collectives between N equal participants, devices or nodes; every call packs its tensors into one message."""

    num_devices: int
    """Number of participants."""
    local_devices: range
    """Participants of this process, in global order."""
    participants: tuple[int, ...] | None = None
    """Those that take part in exchanges now, in global order; None: all. `among` sets it."""

    @property
    def present(self) -> Sequence[int]:
        """Participants whose processes are there, in global order: all, unless a launched run goes on without some."""
        return range(self.num_devices)

    @property
    def taking_part(self) -> int:
        """Number of devices that take part in exchanges now."""
        return self.num_devices if self.participants is None else len(self.participants)

    @property
    def local_participants(self) -> list[int]:
        """Those of this process that take part in exchanges now, in global order."""
        return [n for n in self.local_devices if self.participants is None or n in self.participants]

    @contextmanager
    def among(self, devices: Sequence[int]) -> Iterator[None]:
        """Exchange and count inside among some devices only, in global order.

        Sums must be over these devices' rows; gathers and pushes return these devices' parts. Processes without any of
        them may take part all the same, with zeros: a replay does, in which every process knows what the others do.
        """
        self.participants = None if len(devices) == self.num_devices else tuple(devices)
        try:
            yield
        finally:
            self.participants = None

    def count_base(self, payload_bytes: int, from_server: bool) -> None:
        """Count the merged weights that one device gets, from another or the server, before it takes part again."""
        if from_server:
            self._count("pull", payload_bytes, 0, payload_bytes, 1)
        else:
            self._count("broadcast", payload_bytes, payload_bytes, payload_bytes, 2)

    def all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Turn sums over the local devices into sums over all devices, in place."""
        # The caller has summed its local devices, so the buffer is one device's, however many are local.
        self._count_reduction(_bytes(sums), self.taking_part)
        self._all_reduce(sums)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor, (local devices or heads, ...), extended to the parts of all devices in global order."""
        own = _bytes(tensors) // len(self.local_devices)
        devices = self.taking_part
        crossings = devices * (devices - 1) * own  # each device's part crosses N−1 links
        self._count("all_gather", own, crossings, crossings)
        return self._parts_of_participants(self._all_gather(tensors), len(tensors[0]) // len(self.local_devices))

    def _parts_of_participants(self, gathered: list[Tensor], rows: int) -> list[Tensor]:
        """Return the participants' parts, of `rows` each, where all devices' were gathered."""
        if self.participants is None or len(gathered[0]) == rows * len(self.participants):
            return gathered
        return [device_rows(tensor, self.participants, self.num_devices) for tensor in gathered]

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Turn (L, N, ...), a part for each receiver, into (L, N, ...), a part from each sender.

        Inside `among` both are of the participants alone, L of them here.
        """
        own = sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors)
        crossings = own * (self.taking_part - 1)  # N devices send own·(N−1)/N each: the part for oneself stays
        self._count("all_to_all", own, crossings, crossings)
        return self._all_to_all(tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite each tensor, (...) without a device axis, with that of device `source`."""
        payload = _bytes(tensors)
        crossings = (self.num_devices - 1) * payload  # every other device receives it once
        self._count("broadcast", payload, crossings, crossings)
        self._broadcast(tensors, source)

    def push(self, tensors: Sequence[Tensor], active: Sequence[int] | None = None) -> list[Tensor] | None:
        """Send the local devices' tensors to the server. Return all devices' parts in global order there, else None.

        If only some devices take part, `active` names them, in order, and tensors hold the local ones among them.
        """
        if active is None and self.participants is not None:
            own, devices = _bytes(tensors) // len(self.local_devices), len(self.participants)
            self._count("push", own, devices * own, 0, devices)
            pushed = self._push(tensors, None)  # a process that has none of them would know no shapes
            return pushed and self._parts_of_participants(pushed, len(tensors[0]) // len(self.local_devices))
        own = self._pushed_bytes(tensors, active)
        devices = self.num_devices if active is None else len(active)
        self._count("push", own, devices * own, 0, devices)
        return self._push(tensors, active)

    def _pushed_bytes(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> int:
        """Return the bytes that each active device pushes."""
        local = len(self.local_devices) if active is None else sum(d in self.local_devices for d in active)
        # A process without active devices has no row to measure, yet counts like all others: it measures an empty one.
        return _bytes(tensors) // local if local else sum(t.new_empty(1, *t.shape[1:]).nbytes for t in tensors)

    def pull(self, tensors: Sequence[Tensor], active: Sequence[int] | None = None) -> None:
        """Overwrite each tensor, (...) without a device axis, with the server's, in every process.

        Only the `active` devices count as receivers; processes without any receive it too, to stay equal.
        """
        devices, payload = self.taking_part if active is None else len(active), _bytes(tensors)
        self._count("pull", payload, 0, devices * payload, devices)
        self._pull(tensors)

    @abstractmethod
    def on_complete(self, compute: Callable[[], None]) -> None:
        """Call `compute` once all exchanges asked for so far have arrived."""

    @abstractmethod
    def _all_reduce(self, sums: Sequence[Tensor]) -> None: ...

    @abstractmethod
    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...

    @abstractmethod
    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...

    @abstractmethod
    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None: ...

    @abstractmethod
    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> list[Tensor] | None: ...

    @abstractmethod
    def _pull(self, tensors: Sequence[Tensor]) -> None: ...

    @abstractmethod
    def _count(
        self,
        operation: Operation,
        payload_bytes: int,
        sent_bytes: int,
        received_bytes: int,
        devices: int | None = None,
        teams: int = 1,
    ) -> None: ...

    def _count_reduction(self, payload_bytes: int, devices: int, teams: int = 1) -> None:
        # A ring reduces, then gathers: each byte of the buffer crosses N−1 links twice.
        crossings = teams * 2 * (devices - 1) * payload_bytes
        self._count("all_reduce", payload_bytes, crossings, crossings, devices, teams)


class Communicator(Exchanges):
    """Interface of all exchanges between devices.

    Bytes are counted as if each device were a process of its own, so that a run's bytes do not depend on how devices
    are spread over processes. `on_transfer(transfer, background)` is called for each message and `on_wait()` for each
    wait; the simulated clock uses both to charge time.
    """

    def __init__(
        self,
        num_devices: int,
        local_devices: range,
        on_transfer: Callable[[Transfer, bool], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.num_devices = num_devices
        self.local_devices = local_devices
        self.counter = ByteCounter()
        self.on_transfer, self.on_wait = on_transfer, on_wait
        self._background = False

    process, processes = 0, 1
    """Index of this process, and number of processes."""
    current_phase = ""
    """Part of the run that is under way ("step 12"), for the text of errors."""

    @property
    def is_whole(self) -> bool:
        """Whether all devices live in this process."""
        return len(self.local_devices) == self.num_devices

    def all_gather_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]:
        """Return each tensor as a list over `parts`: (rows of the part's devices, ...), in global order.

        `parts` are of all devices, of which a process holds those of one. Inside `among` the rows are those of the
        devices that take part.
        """
        self._count_parts("all_gather", tensors, parts)
        return self._participants_of(self._all_gather_parts(tensors, parts), parts)

    def push_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]] | None:
        """Send the local devices' tensors to the server; return at the server what `all_gather_parts` does."""
        self._count_parts("push", tensors, parts)
        pushed = self._push_parts(tensors, parts)
        return None if pushed is None else self._participants_of(pushed, parts)

    def _participants_of(self, everyones: list[list[Tensor]], parts: Sequence[Part]) -> list[list[Tensor]]:
        """Return tensors by part with the rows of the devices that take part, where those of all that are there came.

        In the background, where everybody takes part, the list is filled later.
        """
        if self.participants is None:
            return everyones
        held = [[device for device in part.devices if device in self.present] for part in parts]
        taking = [[row for row, device in enumerate(own) if device in self.participants] for own in held]
        # New lists, since programs of one process share those that came.
        return [
            [
                tensor if len(rows) == len(own) else device_rows(tensor, rows, len(own))
                for tensor, own, rows in zip(by_part, held, taking, strict=True)
            ]
            for by_part in everyones
        ]

    def reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        """Turn (local nodes, ...), sums over a node's local devices, into sums over all of its devices, in place."""
        local_nodes = max(1, len(self.local_devices) // nodes.size)  # a process may hold part of a node
        self._count_reduction(_bytes(sums) // local_nodes, nodes.size, nodes.count)
        self._reduce_in_nodes(sums, nodes)

    def reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        """Turn sums over the local nodes into sums over all nodes, in place; only each node's first device sends."""
        self._count_reduction(_bytes(sums), nodes.count)
        self._reduce_over_nodes(sums, nodes)

    def broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        """Copy the result of `reduce_over_nodes` from each node's first device to its others."""
        payload = _bytes(tensors)
        crossings = nodes.count * (nodes.size - 1) * payload
        self._count("broadcast", payload, crossings, crossings, nodes.size, nodes.count)
        self._broadcast_in_nodes(tensors, nodes)

    def arrange(self, nodes: Nodes) -> None:
        """Make the groups for exchanges in and over nodes; raises RunFailedError if a process holds uneven parts."""

    @abstractmethod
    def leaders(self, nodes: Nodes) -> Exchanges | None:
        """Return the exchanges between the first devices of all nodes; None where this process holds none of them.

        They move tensors only: simulate.comm.nodes counts them, in every process alike.
        """

    @contextmanager
    def background(self) -> Iterator[None]:
        """Send messages made inside while training goes on; until `wait`, their tensors must not be touched.

        An exchange inside may return an empty list, filled on arrival; use it in a callback of `on_complete`.
        """
        # A flag and not an argument, so that a method's exchange code is the same in both cases.
        self._background = True
        try:
            yield
        finally:
            self._background = False

    @contextmanager
    def uncounted(self, counter: ByteCounter) -> Iterator[None]:
        """Count messages made inside in `counter`, outside the method's bytes and time: diagnostics use this."""
        # Diagnostics must not change the figures that they are shown beside.
        kept = self.counter, self.on_transfer
        self.counter, self.on_transfer = counter, None
        try:
            yield
        finally:
            self.counter, self.on_transfer = kept

    def on_complete(self, compute: Callable[[], None]) -> None:
        """Call `compute` once all exchanges asked for so far have arrived: at once, or behind those in `background`."""
        compute()

    def wait(self) -> None:
        """Wait for background messages and their `on_complete` callbacks, and charge the wait to the clock."""
        if self.on_wait is not None:
            self.on_wait()
        self.finish()

    def finish(self) -> None:
        """Wait as `wait` does, without a charge to the clock: for saves, which are not part of the method."""

    def close(self) -> None:
        """End the background thread, where there is one."""

    @abstractmethod
    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        """Return a few numbers of every device, (N, X) on the CPU, in global order; they count as no payload.

        Inside `among` the rows of devices that do not take part mean nothing.
        """

    @abstractmethod
    def _all_gather_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]: ...

    @abstractmethod
    def _push_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]] | None: ...

    @abstractmethod
    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None: ...

    @abstractmethod
    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None: ...

    @abstractmethod
    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None: ...

    def _count_parts(
        self, operation: Literal["all_gather", "push"], tensors: Sequence[Tensor], parts: Sequence[Part]
    ) -> Transfer | None:
        """Count a message of unequal parts, and return it; None where nothing is sent."""
        element_bytes = [tensor.element_size() for tensor in tensors]
        taking = [sum(self.participants is None or n in self.participants for n in part.devices) for part in parts]
        sizes = [(count, part.num_bytes(element_bytes)) for count, part in zip(taking, parts, strict=True) if count]
        together, others, gathers = sum(n * size for n, size in sizes), self.taking_part - 1, operation == "all_gather"
        if self.num_devices == 1 or (gathers and not others):
            return None
        # Each device's part crosses N-1 links of a gather, and one to a server.
        self.counter.add(together * (others if gathers else 1), together * others * gathers)
        transfer = Transfer.of_parts(operation, sizes)
        if self.on_transfer is not None:
            self.on_transfer(transfer, self._background)
        return transfer

    def _count(
        self,
        operation: Operation,
        payload_bytes: int,
        sent_bytes: int,
        received_bytes: int,
        devices: int | None = None,
        teams: int = 1,
    ) -> None:
        if devices is None:
            devices = self.taking_part
        # A lone device sends nothing. One active device of several still exchanges with the server.
        if self.num_devices == 1 or (devices == 1 and operation not in ("push", "pull")):
            return
        self.counter.add(sent_bytes, received_bytes)
        if self.on_transfer is not None:
            self.on_transfer(Transfer(operation, payload_bytes, devices, teams), self._background)


def device_rows(tensor: Tensor, indices: Sequence[int], devices: int) -> Tensor:
    """Return some devices' rows of a tensor whose first axis has as many rows for each of `devices`, in their order."""
    per_device = tensor.view(devices, -1, *tensor.shape[1:])
    return per_device[list(indices)].flatten(0, 1)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
