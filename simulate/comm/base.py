"""How devices exchange tensors, and what that costs in payload bytes.

Tensors of several devices carry a leading axis in global device order. The counter here works from the tensors that
really travel; simulate.costs works from the model's shape. A test holds one against the other. What moves them is a
subclass's business: nothing in simulate.comm.virtual, where all devices live in one process, torch.distributed in
simulate.comm.process_group.

Legend: L local devices, N devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from simulate.comm.transfers import Operation, Transfer


@dataclass
class ByteCounter:
    """Payload bytes so far, summed over all devices."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0

    def add(self, sent_bytes: int, received_bytes: int) -> None:
        """Count one message of a collective."""
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes
        self.messages += 1


@dataclass(frozen=True)
class Nodes:
    """Devices grouped into nodes of equal size, in global device order."""

    size: int
    count: int


class Communicator(ABC):
    """What a method may do between devices; every call packs its tensors into one message.

    Each device counts by itself, also beside others in one process, so that a run's bytes do not depend on how its
    devices are spread. `on_transfer(transfer, background)` is told of each message and `on_wait()` of each wait: the
    clock listens there.
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
    """Which of how many processes this is."""
    current_phase = ""
    """What the run is current_phase, for the message of an error."""

    @property
    def is_whole(self) -> bool:
        """Whether all devices live in this process."""
        return len(self.local_devices) == self.num_devices

    def all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Turn sums over the local devices into sums over all devices, in place."""
        self._count_reduction(_bytes(sums), self.num_devices)
        self._all_reduce(sums)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor, (local devices or heads, ...), with every device's part in global order."""
        own = self._own_bytes(tensors)  # each device's share crosses N−1 links
        crossings = self.num_devices * (self.num_devices - 1) * own
        self._count("all_gather", own, crossings, crossings)
        return self._all_gather(tensors)

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Turn (L, N, ...), a part for each receiver, into (L, N, ...), a part from each sender."""
        own = self._own_bytes(tensors)  # an Nth of it stays where it is
        crossings = own * (self.num_devices - 1)
        self._count("all_to_all", own, crossings, crossings)
        return self._all_to_all(tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite each tensor, (...) without a device axis, with that of device `source`."""
        payload = _bytes(tensors)
        crossings = (self.num_devices - 1) * payload
        self._count("broadcast", payload, crossings, crossings)
        self._broadcast(tensors, source)

    def push(self, tensors: Sequence[Tensor], active: Sequence[int] | None = None) -> list[Tensor] | None:
        """Send the local devices' tensors to the server, where every device's part returns in global order; else None.

        Where only some devices take part, `active` names them, in order, and tensors hold the local ones among them.
        """
        devices = self.num_devices if active is None else len(active)
        parts = _rows(tensors, self._taking_part(active))
        self._count("push", parts, devices * parts, 0, devices)
        return self._push(tensors, active)

    def pull(self, tensors: Sequence[Tensor], active: Sequence[int] | None = None) -> None:
        """Overwrite each tensor, (...) without a device axis, with the server's, also where nothing was pushed from."""
        devices, payload = self.num_devices if active is None else len(active), _bytes(tensors)
        self._count("pull", payload, 0, devices * payload, devices)
        self._pull(tensors)

    def reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        """Turn (local nodes, ...), sums over a node's local devices, into sums over all of its devices, in place."""
        local_nodes = max(1, len(self.local_devices) // nodes.size)
        self._count_reduction(_bytes(sums) // local_nodes, nodes.size, nodes.count)
        self._reduce_in_nodes(sums, nodes)

    def reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        """Turn sums over the local nodes into sums over all nodes, in place: one device of each node takes part."""
        self._count_reduction(_bytes(sums), nodes.count)
        self._reduce_over_nodes(sums, nodes)

    def broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        """Give all devices of a node what its first one got from `reduce_over_nodes`."""
        payload = _bytes(tensors)
        crossings = nodes.count * (nodes.size - 1) * payload
        self._count("broadcast", payload, crossings, crossings, nodes.size, nodes.count)
        self._broadcast_in_nodes(tensors, nodes)

    def arrange(self, nodes: Nodes) -> None:  # noqa: B027 - one process needs no groups
        """Get ready for exchanges in and over nodes; raises RunFailedError where processes do not go with them."""

    @contextmanager
    def background(self) -> Iterator[None]:
        """Let messages made inside travel while training goes on, until `wait`; nobody touches their tensors so long.

        A list that an exchange returns inside is filled when it has arrived: it is for `then`.
        """
        self._background = True
        try:
            yield
        finally:
            self._background = False

    @contextmanager
    def uncounted(self, counter: ByteCounter) -> Iterator[None]:
        """Let `counter` count messages made inside, and nobody's clock hear of them: they are not the method's."""
        kept = self.counter, self.on_transfer
        self.counter, self.on_transfer = counter, None
        try:
            yield
        finally:
            self.counter, self.on_transfer = kept

    def on_complete(self, compute: Callable[[], None]) -> None:
        """Compute with what was asked for so far: at once, or inside `background` as soon as that has arrived."""
        self._then(compute)

    def wait(self) -> None:
        """Wait for what travels in the background, and for what is computed with it there."""
        if self.on_wait is not None:
            self.on_wait()
        self.finish()

    def finish(self) -> None:  # noqa: B027 - nothing travels inside of one process
        """Let what travels in the background arrive, without a charge to anybody's clock: before state is saved."""

    def _then(self, compute: Callable[[], None]) -> None:
        compute()

    @abstractmethod
    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        """Return every device's few numbers, (N, X) on the CPU, in global order; counted as nobody's payload."""

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
    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None: ...

    @abstractmethod
    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None: ...

    @abstractmethod
    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None: ...

    def _taking_part(self, active: Sequence[int] | None) -> int:
        """Return how many local devices take part."""
        return len(self.local_devices) if active is None else sum(device in self.local_devices for device in active)

    def _own_bytes(self, tensors: Sequence[Tensor]) -> int:
        return _bytes(tensors) // len(self.local_devices)

    def _count_reduction(self, payload_bytes: int, devices: int, teams: int = 1) -> None:
        # A ring reduces and then gathers: every byte of the buffer crosses N−1 links twice.
        crossings = teams * 2 * (devices - 1) * payload_bytes
        self._count("all_reduce", payload_bytes, crossings, crossings, devices, teams)

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
            devices = self.num_devices
        if self.num_devices == 1 or (devices == 1 and operation not in ("push", "pull")):
            return
        self.counter.add(sent_bytes, received_bytes)
        if self.on_transfer is not None:
            self.on_transfer(Transfer(operation, payload_bytes, devices, teams), self._background)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rows(tensors: Sequence[Tensor], rows: int) -> int:
    """Return the bytes of one device's part, also where there is no row here to measure it by."""
    if rows:
        return _bytes(tensors) // rows
    return sum(tensor[:1].new_empty(1, *tensor.shape[1:]).nbytes for tensor in tensors)
