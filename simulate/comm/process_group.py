"""The communicator of real runs: devices in several processes, whose tensors travel by torch.distributed.

Process p of P holds a consecutive share of the N devices, equal or nearly so. Whatever has a device axis travels as
bytes in device order, one message a call, and only what the method asks for. Every wait ends after the group's timeout
with an error that names the exchange.

Legend: L local devices, N devices, P processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from simulate.comm import pairwise as pairs
from simulate.comm.base import Communicator, Nodes
from simulate.comm.transfers import Transfer
from simulate.common.errors import RunFailedError, first_line

SERVER = 0
"""The process that is the server of pushes and pulls; the first device's."""


class LostPeerError(RunFailedError):
    """An exchange that failed or did not end in time: a process or a link is gone. The run can be restarted."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's means that memory ran out, the host's or a GPU's."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text.lower()


def devices_of(process: int, processes: int, devices: int) -> range:
    """Return the consecutive devices that a process holds; shares differ by at most one."""
    return range(devices * process // processes, devices * (process + 1) // processes)


class TorchCommunicator(Communicator):
    """Devices over all processes of the default group; `device` says where tensors live that a method exchanges."""

    def __init__(
        self,
        num_devices: int,
        device: torch.device,
        timeout_s: float,
        on_transfer: Callable[[Transfer, bool], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.process, self.processes = dist.get_rank(), dist.get_world_size()
        self.current_phase = "the start"
        self.shares = [devices_of(process, self.processes, num_devices) for process in range(self.processes)]
        super().__init__(num_devices, self.shares[self.process], on_transfer, on_wait)
        self.device, self.timeout = device, timedelta(seconds=timeout_s)
        self.control = self.new_group("gloo")
        self._foreground = _Channel(self, None)
        self._behind = _Channel(self, self.new_group(None))
        self._executor = ThreadPoolExecutor(1, "exchange") if device.type == "cpu" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._travelling: list[Future[None]] = []
        self.exchanges = 0
        """Begun so far."""
        self.missing: Callable[[int], str] = lambda exchanges: ""
        """Says, of a failed exchange, who is not there."""
        self._in_use: list[Callable[[], None]] = []
        """What a GPU's stream behind the training still works on, with the tensors that it needs."""

    def new_group(self, backend: str | None, processes: Sequence[int] | None = None) -> dist.ProcessGroup:
        """Make a group; all processes take part in that, also those that are not in it."""
        return dist.new_group(processes, timeout=self.timeout, backend=backend)

    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        own = values_LX.detach().cpu().double().contiguous()
        most = max(len(share) for share in self.shares)
        padded = torch.cat([own, own.new_zeros(most - len(own), own.shape[1])])
        everyones = [torch.empty_like(padded) for _ in self.shares]
        self._guarded("what devices tell each other", lambda: dist.all_gather(everyones, padded, self.control))
        return torch.cat([rows[: len(share)] for rows, share in zip(everyones, self.shares, strict=True)])

    def share_texts(self, text: str) -> list[str]:
        """Return every process's text, in order."""
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.shares]
        own = torch.tensor([len(content)])
        self._guarded("what processes have", lambda: dist.all_gather(sizes, own, self.control))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        texts = [torch.empty_like(padded) for _ in self.shares]
        self._guarded("what processes have", lambda: dist.all_gather(texts, padded, self.control))
        return [bytes(t[: int(size)].tolist()).decode() for t, size in zip(texts, sizes, strict=True)]

    def send_state(self, source: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of process `source`, on the CPU; what others give is not looked at."""
        about = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        shapes = json.loads(self.share_texts(json.dumps(about))[source])
        received = {}
        for name, shape, dtype in shapes:
            tensor = tensors[name].cpu().contiguous() if self.process == source else None
            target = torch.empty(shape, dtype=getattr(torch, dtype)) if tensor is None else tensor
            self._guarded("what a process lacks", lambda t=target: dist.broadcast(t, source, self.control))  # type: ignore[misc]
            received[name] = target
        return received

    def finish(self) -> None:
        travelling, self._travelling = self._travelling, []
        for future in travelling:
            future.result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._in_use.clear()

    def close(self) -> None:
        """End the threads; what still travels is waited for."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _run(self, name: str, exchange: Callable[[_Channel], Sequence[Tensor] | None]) -> list[Tensor]:
        """Do an exchange now, or behind the training; the list that it fills is what it returns."""
        channel = self._behind if self._background else self._foreground
        arrived: list[Tensor] = []
        self._then(lambda: self._guarded(name, lambda: arrived.extend(exchange(channel) or ())))
        return arrived

    def _then(self, compute: Callable[[], None]) -> None:
        """Behind the training: in a thread of its own, on a GPU in a stream of its own, one after the other."""
        if not self._background:
            compute()
        elif self._executor is not None:
            # Whether gradients are recorded is a matter of each thread.
            self._travelling.append(self._executor.submit(torch.no_grad()(compute)))
        else:
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            self._in_use.append(compute)
            with torch.cuda.stream(self._stream):
                compute()

    def _guarded(self, name: str, exchange: Callable[[], object]) -> None:
        self.exchanges += 1
        begun, current_phase = self.exchanges, self.current_phase
        try:
            exchange()
        except RuntimeError as error:  # what torch.distributed raises for everything
            if is_lack_of_memory(error):
                raise
            missing = self.missing(begun)
            who = f" ({missing})" if missing else ""
            raise LostPeerError(f"{name} at {current_phase} failed: {first_line(error)}{who}") from error

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._run("an all-reduce", lambda channel: channel.all_reduce(sums, channel.group))

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        process = next(process for process, share in enumerate(self.shares) if source in share)
        self._run("a broadcast", lambda channel: channel.broadcast(tensors, process, channel.group))

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pieces, counts = _pieces(tensors, len(self.local_devices)), [len(share) for share in self.shares]

        def exchange(channel: _Channel) -> list[Tensor]:
            own = _to_bytes(tensors)
            everyones = own.new_empty(_device_bytes(pieces) * self.num_devices)
            parts = list(everyones.split([_device_bytes(pieces) * count for count in counts]))
            channel.all_gather(everyones, parts, own)
            return _in_order(parts, pieces, counts)

        return self._run("an all-gather", exchange)

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # A sender's device has a part for each of the local ones.
        pieces = [_Piece((1, len(self.local_devices), *t.shape[2:]), t.dtype) for t in tensors]
        counts = [len(share) for share in self.shares]
        sizes = [_device_bytes(pieces) * count for count in counts]

        def exchange(channel: _Channel) -> list[Tensor]:
            sent = [_to_bytes([t[:, share.start : share.stop] for t in tensors]) for share in self.shares]
            received = sent[0].new_empty(sum(sizes))
            channel.all_to_all(received, sizes, sent)
            return [tensor.transpose(0, 1) for tensor in _in_order(received.split(sizes), pieces, counts)]

        return self._run("an all-to-all", exchange)

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> list[Tensor] | None:
        counts = [len(share) if active is None else sum(d in share for d in active) for share in self.shares]
        pieces, serves = _pieces(tensors, counts[self.process]), self.process == SERVER

        def exchange(channel: _Channel) -> list[Tensor]:
            parts = [_to_bytes(tensors)]
            if serves:
                parts += [parts[0].new_empty(_device_bytes(pieces) * count) for count in counts[1:]]
            channel.to_server(parts)
            return _in_order(parts, pieces, counts) if serves else []

        everyones = self._run("a push to the server", exchange)
        return everyones if serves else None

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        self._run("a pull from the server", lambda channel: channel.from_server(tensors))

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        if self._processes_of_node(nodes) > 1:
            self._run("an all-reduce in nodes", lambda channel: channel.all_reduce(sums, channel.in_node(nodes)))

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        group = self._processes_of_node(nodes)
        if self.process % group == 0:
            self._run("an all-reduce over nodes", lambda channel: channel.all_reduce(sums, channel.over_nodes(nodes)))

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        group = self._processes_of_node(nodes)
        if group > 1:
            first = self.process // group * group
            self._run("a broadcast in nodes", lambda channel: channel.broadcast(tensors, first, channel.in_node(nodes)))

    def arrange(self, nodes: Nodes) -> None:
        for channel in (self._foreground, self._behind):
            channel.arrange(nodes, self._processes_of_node(nodes))

    def _processes_of_node(self, nodes: Nodes) -> int:
        """Return how many processes share a node: 1 where each holds whole ones."""
        local = len(self.local_devices)
        equal = len({len(share) for share in self.shares}) == 1
        if not equal or (local % nodes.size and nodes.size % local):
            raise RunFailedError(
                f"method.devices_per_node = {nodes.size} does not go with {self.num_devices} devices in "
                f"{self.processes} processes: each must hold whole nodes, or an equal part of one"
            )
        return max(1, nodes.size // local)


class _Channel:
    """The process groups of exchanges that follow each other; those behind the training have their own."""

    def __init__(self, owner: TorchCommunicator, group: dist.ProcessGroup | None) -> None:
        self.owner, self.group = owner, group
        self.process, self.processes = owner.process, owner.processes
        self._node: dict[Nodes, dist.ProcessGroup] = {}
        self._leaders: dict[Nodes, dist.ProcessGroup] = {}

    def arrange(self, nodes: Nodes, processes_of_node: int) -> None:
        """Make the groups of a division into nodes, with everybody else."""
        for first in range(0, self.processes, processes_of_node):
            members = range(first, first + processes_of_node)
            group = self.owner.new_group(None, members)
            if self.process in members:
                self._node[nodes] = group
        self._leaders[nodes] = self.owner.new_group(None, range(0, self.processes, processes_of_node))

    def in_node(self, nodes: Nodes) -> dist.ProcessGroup:
        """Return the group of this process's node."""
        return self._node[nodes]

    def over_nodes(self, nodes: Nodes) -> dist.ProcessGroup:
        """Return the group of the nodes' first processes."""
        return self._leaders[nodes]

    def all_reduce(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        flat = _flat(tensors)
        if pairs.sums_faster(flat, group):
            pairs.sum_by_parts(flat, group)
        else:
            dist.all_reduce(flat, group=group)
        _unflatten(flat, tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int, group: dist.ProcessGroup | None) -> None:
        flat = _flat(tensors)
        dist.broadcast(flat, source, group=group)
        _unflatten(flat, tensors)

    def all_gather(self, everyones: Tensor, parts: Sequence[Tensor], own: Tensor) -> None:
        if pairs.gathers_faster(parts, self.group):
            pairs.swap(parts, [own] * self.processes, self.group)
        elif len({len(part) for part in parts}) == 1:
            dist.all_gather_into_tensor(everyones, own, group=self.group)
        else:
            parts[self.process].copy_(own)
            for process, part in enumerate(parts):  # collectives over equal parts only: each part by itself
                dist.broadcast(part, process, group=self.group)

    def all_to_all(self, received: Tensor, sizes: list[int], sent: Sequence[Tensor]) -> None:
        if pairs.is_gloo(self.group):
            pairs.swap(received.split(sizes), sent, self.group)
        else:
            parts = [len(part) for part in sent]
            dist.all_to_all_single(received, torch.cat(list(sent)), sizes, parts, group=self.group)

    def to_server(self, parts: Sequence[Tensor]) -> None:
        if self.process != SERVER:
            if len(parts[0]):
                dist.send(parts[0], SERVER, group=self.group)
            return
        arriving = [dist.irecv(part, p, group=self.group) for p, part in enumerate(parts) if p != SERVER and len(part)]
        for work in arriving:
            assert work is not None
            work.wait()

    def from_server(self, tensors: Sequence[Tensor]) -> None:
        if len({tensor.dtype for tensor in tensors}) > 1:  # packed weights and their scales
            tensors = [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]
        flat = _flat(tensors)
        if self.process == SERVER:
            leaving = [dist.isend(flat, p, group=self.group) for p in range(self.processes) if p != SERVER]
            for work in leaving:
                assert work is not None
                work.wait()
            return
        dist.recv(flat, SERVER, group=self.group)
        _unflatten(flat, tensors)


@dataclass(frozen=True)
class _Piece:
    """What one device has of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _pieces(tensors: Sequence[Tensor], devices: int) -> list[_Piece]:
    """Return one device's pieces of tensors (devices * rows, ...); where there is no device, it would have one row."""
    return [_Piece((t.shape[0] // devices if devices else 1, *t.shape[1:]), t.dtype) for t in tensors]


def _device_bytes(pieces: Sequence[_Piece]) -> int:
    return sum(piece.num_bytes for piece in pieces)


def _to_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the content of tensors, one after the other, (bytes,)."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _in_order(parts: Sequence[Tensor], pieces: Sequence[_Piece], counts: Sequence[int]) -> list[Tensor]:
    """Return tensors (rows of all devices, ...) from the bytes of each process, which has `counts` of the devices."""
    found: list[list[Tensor]] = [[] for _ in pieces]
    for part, count in zip(parts, counts, strict=True):
        contents = part.split([piece.num_bytes * count for piece in pieces])
        for rows, content, piece in zip(found, contents, pieces, strict=True):
            if content.storage_offset() % piece.dtype.itemsize:
                content = content.clone()  # at an address that the type allows
            rows.append(content.view(piece.dtype).view(-1, *piece.shape[1:]))
    return [torch.cat(rows) for rows in found]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the message of tensors of one type; a contiguous one alone is its own."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return tensors[0].detach()
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].data_ptr() == flat.data_ptr():
        return
    for tensor, content in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(content.view_as(tensor))
