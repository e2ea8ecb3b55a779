"""Communicator of launched runs: devices in several processes, whose tensors travel by torch.distributed.

simulate.launch.worker makes one in each process; methods then call it as they call the simulated one. Process p of P
holds a consecutive share of the N devices, equal or nearly so. A tensor with a device axis travels as bytes in device
order, one message a call. Every wait ends after the group's timeout with an error that names the exchange.

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

from simulate.comm import pairwise
from simulate.comm.base import Communicator, Nodes
from simulate.comm.transfers import Transfer
from simulate.common.errors import LostPeerError, RunFailedError, first_line
from simulate.layers import accelerator

SERVER = 0
"""Rank of the process that serves pushes and pulls; it holds the first device."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host's or a GPU's memory ran out; torch raises RuntimeError for both."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text.lower()


def devices_of(process: int, processes: int, devices: int) -> range:
    """Return the consecutive devices that a process holds; sizes differ by at most one between processes."""
    return range(devices * process // processes, devices * (process + 1) // processes)


class TorchCommunicator(Communicator):
    """Communicator over all processes of the default group; a method's tensors live on `device`."""

    def __init__(
        self,
        num_devices: int,
        device: torch.device,
        timeout_s: float,
        on_transfer: Callable[[Transfer, bool], None] | None = None,
        on_wait: Callable[[], None] | None = None,
        shares: Sequence[range] | None = None,
        process: int = 0,
    ) -> None:
        """Connect to the default group; with `shares`, all processes' devices, only later: see `connect`."""
        self.current_phase = "the start"
        self.device, self.timeout = device, timedelta(seconds=timeout_s)
        if shares is None:
            processes = dist.get_world_size()
            shares = [devices_of(process, processes, num_devices) for process in range(processes)]
            super().__init__(num_devices, shares[dist.get_rank()], on_transfer, on_wait)
            self.connect(shares)
        else:
            super().__init__(num_devices, shares[process], on_transfer, on_wait)
            self._take_shares(process, shares)
        self._executor = ThreadPoolExecutor(1, "exchange") if device.type == "cpu" else None
        self._stream = None if device.type == "cpu" else accelerator.new_stream(device)
        self._in_flight: list[Future[None]] = []
        self.exchanges = 0
        """Number of exchanges begun so far."""
        self.missing: Callable[[int], str] = lambda exchanges: ""
        """Describes which processes are missing from a failed exchange, given its number; the heartbeat sets it."""
        self._in_use: list[Callable[[], None]] = []
        """Callbacks queued on the background stream; they keep their tensors alive until `finish`."""

    def connect(self, shares: Sequence[range]) -> None:
        """Make this communicator's groups out of the default group, whose processes hold these shares of the devices.

        Devices in no share are lost, and exchanges leave them out.
        """
        self._take_shares(dist.get_rank(), shares)
        self.control = self.new_group("gloo")  # scalars and texts are on the CPU, also in runs on GPUs
        self._foreground = _Channel(self, None)
        # Collectives of one group must come in the same order in all processes, so the background has its own group.
        self._background_channel = _Channel(self, self.new_group(None))

    def _take_shares(self, process: int, shares: Sequence[range]) -> None:
        self.process, self.processes, self.shares = process, len(shares), list(shares)
        self._present = [device for share in self.shares for device in share]

    def disconnect(self) -> None:
        """Close all connections, which ends the exchanges of processes that wait for this one."""
        # Connections close with the last reference to their group.
        for name in ("control", "_foreground", "_background_channel"):
            self.__dict__.pop(name, None)
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def present(self) -> Sequence[int]:
        return self._present

    def new_group(self, backend: str | None, processes: Sequence[int] | None = None) -> dist.ProcessGroup:
        """Make a process group; every process must call this, members or not."""
        return dist.new_group(processes, timeout=self.timeout, backend=backend)

    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        own = values_LX.detach().cpu().double().contiguous()
        most = max(len(share) for share in self.shares)  # gloo gathers equal sizes only
        padded = torch.cat([own, own.new_zeros(most - len(own), own.shape[1])])
        everyones = [torch.empty_like(padded) for _ in self.shares]
        self._guarded("an all-gather of scalars", lambda: dist.all_gather(everyones, padded, self.control))
        everyones_NX = own.new_zeros(self.num_devices, own.shape[1])  # zeros for devices that are lost
        for rows, share in zip(everyones, self.shares, strict=True):
            everyones_NX[share.start : share.stop] = rows[: len(share)]
        return everyones_NX

    def share_texts(self, text: str) -> list[str]:
        """Return every process's text, in the order of ranks."""
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.shares]
        own = torch.tensor([len(content)])
        self._guarded("an all-gather of sizes", lambda: dist.all_gather(sizes, own, self.control))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        texts = [torch.empty_like(padded) for _ in self.shares]
        self._guarded("an all-gather of texts", lambda: dist.all_gather(texts, padded, self.control))
        return [bytes(t[: int(size)].tolist()).decode() for t, size in zip(texts, sizes, strict=True)]

    def send_state(self, source: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of process `source`, on the CPU; the argument of other processes is ignored."""
        about = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        shapes = json.loads(self.share_texts(json.dumps(about))[source])
        received = {}
        for name, shape, dtype in shapes:
            tensor = tensors[name].cpu().contiguous() if self.process == source else None
            target = torch.empty(shape, dtype=getattr(torch, dtype)) if tensor is None else tensor
            self._guarded("a broadcast of state", lambda t=target: dist.broadcast(t, source, self.control))  # type: ignore[misc]
            received[name] = target
        return received

    def hand_state(self, source: int, targets: Sequence[int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of process `source` in the `targets`, on the CPU; the others send and receive none."""
        about = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        shapes = json.loads(self.share_texts(json.dumps(about))[source])
        received = {}
        for name, shape, dtype in shapes:
            if self.process == source:
                own = tensors[name].detach().cpu().contiguous()
                for target in targets:
                    self._guarded("a hand-over", lambda t=own, p=target: dist.send(t, p, self.control))  # type: ignore[misc]
            elif self.process in targets:
                received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                self._guarded("a hand-over", lambda t=received[name]: dist.recv(t, source, self.control))  # type: ignore[misc]
        return received

    def finish(self) -> None:
        in_flight, self._in_flight = self._in_flight, []
        for future in in_flight:
            future.result()  # raises what the exchange raised
        if self._stream is not None:
            accelerator.current_stream(self.device).wait_stream(self._stream)
            self._in_use.clear()  # no sooner: see `on_complete`

    def close(self) -> None:
        """End the background thread: drop queued exchanges and wait for the one under way."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _run(self, name: str, exchange: Callable[[_Channel], Sequence[Tensor] | None]) -> list[Tensor]:
        """Do an exchange now or in the background, and return its list of tensors, filled on arrival."""
        channel = self._background_channel if self._background else self._foreground
        arrived: list[Tensor] = []
        self.on_complete(lambda: self._guarded(name, lambda: arrived.extend(exchange(channel) or ())))
        return arrived

    def on_complete(self, compute: Callable[[], None]) -> None:
        """Call `compute` behind the exchanges so far: in the background, one thread (or GPU stream) keeps the order."""
        if not self._background:
            if self._in_use:
                # Two NCCL groups must not be at work at once, or processes could run their kernels in unlike orders and
                # wait for each other (docs.pytorch.org/docs/stable/distributed.html, new_group: safe concurrent usage).
                accelerator.current_stream(self.device).wait_stream(self._stream)
            compute()
        elif self._executor is not None:
            # Gradient recording is a setting of each thread, and on in new ones.
            self._in_flight.append(self._executor.submit(torch.no_grad()(compute)))
        else:
            assert self._stream is not None
            # What `compute` reads is complete, and what it allocates takes the place of nothing that is still read.
            self._stream.wait_stream(accelerator.current_stream(self.device))
            # The allocator knows only the stream that a tensor was allocated on, and would reuse those of `compute` for
            # the training once they are unreferenced. `record_stream` would tell it, and cost memory
            # (docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html); so they live till `finish`.
            self._in_use.append(compute)
            with accelerator.on_stream(self._stream, self.device):
                compute()

    def _guarded(self, name: str, exchange: Callable[[], object]) -> None:
        """Run one exchange; a failure raises LostPeerError with its name, the run's phase and the missing processes."""
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
            everyones = own.new_empty(_device_bytes(pieces) * len(self.present))
            parts = list(everyones.split([_device_bytes(pieces) * count for count in counts]))
            channel.all_gather(everyones, parts, own)
            return _in_order(parts, pieces, counts)

        return self._run("an all-gather", exchange)

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # Each device of a sender has one part for each local device.
        pieces = [_DevicePart((1, len(self.local_devices), *t.shape[2:]), t.dtype) for t in tensors]
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
            if serves:  # SERVER is rank 0, so its own part leads
                parts += [parts[0].new_empty(_device_bytes(pieces) * count) for count in counts[1:]]
            channel.to_server(parts)
            return _in_order(parts, pieces, counts) if serves else []

        everyones = self._run("a push to the server", exchange)
        return everyones if serves else None

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        self._run("a pull from the server", lambda channel: channel.from_server(tensors))

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        if self._processes_of_node(nodes) > 1:  # else the caller's sum over local devices is complete
            self._run("an all-reduce in nodes", lambda channel: channel.all_reduce(sums, channel.node_groups[nodes]))

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        group = self._processes_of_node(nodes)
        if self.process % group == 0:
            name = "an all-reduce over nodes"
            self._run(name, lambda channel: channel.all_reduce(sums, channel.leader_groups[nodes]))

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        group = self._processes_of_node(nodes)
        if group > 1:
            first, name = self.process // group * group, "a broadcast in nodes"
            self._run(name, lambda channel: channel.broadcast(tensors, first, channel.node_groups[nodes]))

    def arrange(self, nodes: Nodes) -> None:
        for channel in (self._foreground, self._background_channel):
            channel.arrange(nodes, self._processes_of_node(nodes))

    def _processes_of_node(self, nodes: Nodes) -> int:
        """Return the number of processes that share a node: 1 if each holds whole nodes."""
        local = len(self.local_devices)
        equal = len({len(share) for share in self.shares}) == 1
        if not equal or (local % nodes.size and nodes.size % local):
            raise RunFailedError(
                f"method.devices_per_node = {nodes.size} does not go with {self.num_devices} devices in "
                f"{self.processes} processes: each must hold whole nodes, or an equal part of one"
            )
        return max(1, nodes.size // local)


class _Channel:
    """Process groups of one sequence of exchanges: TorchCommunicator has a foreground and a background one."""

    def __init__(self, owner: TorchCommunicator, group: dist.ProcessGroup | None) -> None:
        self.owner, self.group = owner, group
        self.process, self.processes = owner.process, owner.processes
        self.node_groups: dict[Nodes, dist.ProcessGroup] = {}
        """Processes of this process's node, by the division into nodes."""
        self.leader_groups: dict[Nodes, dist.ProcessGroup] = {}
        """First processes of all nodes."""

    def arrange(self, nodes: Nodes, processes_of_node: int) -> None:
        """Make the groups of a division into nodes; all processes must call this together."""
        for first in range(0, self.processes, processes_of_node):
            members = range(first, first + processes_of_node)
            group = self.owner.new_group(None, members)
            if self.process in members:
                self.node_groups[nodes] = group
        self.leader_groups[nodes] = self.owner.new_group(None, range(0, self.processes, processes_of_node))

    def all_reduce(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        flat = _flat(tensors)
        if pairwise.sums_faster(flat, group):
            pairwise.sum_by_parts(flat, group)
        else:
            dist.all_reduce(flat, group=group)
        _unflatten(flat, tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int, group: dist.ProcessGroup | None) -> None:
        flat = _flat(tensors)
        dist.broadcast(flat, source, group=group)
        _unflatten(flat, tensors)

    def all_gather(self, everyones: Tensor, parts: Sequence[Tensor], own: Tensor) -> None:
        if pairwise.gathers_faster(parts, self.group):
            pairwise.exchange_parts(parts, [own] * self.processes, self.group)
        elif len({len(part) for part in parts}) == 1:
            dist.all_gather_into_tensor(everyones, own, group=self.group)
        else:
            # NCCL gathers equal parts only, so each part is broadcast by itself.
            parts[self.process].copy_(own)
            for process, part in enumerate(parts):
                dist.broadcast(part, process, group=self.group)

    def all_to_all(self, received: Tensor, sizes: list[int], sent: Sequence[Tensor]) -> None:
        if pairwise.is_gloo(self.group):
            pairwise.exchange_parts(received.split(sizes), sent, self.group)
        else:
            parts = [len(part) for part in sent]
            dist.all_to_all_single(received, torch.cat(list(sent)), sizes, parts, group=self.group)

    def to_server(self, parts: Sequence[Tensor]) -> None:
        if self.process != SERVER:
            if len(parts[0]):  # a process without active devices sends nothing
                dist.send(parts[0], SERVER, group=self.group)
            return
        arriving = [dist.irecv(part, p, group=self.group) for p, part in enumerate(parts) if p != SERVER and len(part)]
        for work in arriving:
            assert work is not None
            work.wait()

    def from_server(self, tensors: Sequence[Tensor]) -> None:
        if len({tensor.dtype for tensor in tensors}) > 1:  # quantized weights and their scales: one message of bytes
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
class _DevicePart:
    """Shape and dtype of one device's part of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _pieces(tensors: Sequence[Tensor], devices: int) -> list[_DevicePart]:
    """Return one device's parts of tensors (devices * rows, ...); a process without devices assumes one row each."""
    return [_DevicePart((t.shape[0] // devices if devices else 1, *t.shape[1:]), t.dtype) for t in tensors]


def _device_bytes(pieces: Sequence[_DevicePart]) -> int:
    return sum(piece.num_bytes for piece in pieces)


def _to_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the contents of tensors one after the other, (bytes,)."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _in_order(parts: Sequence[Tensor], pieces: Sequence[_DevicePart], counts: Sequence[int]) -> list[Tensor]:
    """Return tensors (rows of all devices, ...) from the bytes of each process, which holds `counts` devices."""
    found: list[list[Tensor]] = [[] for _ in pieces]
    for part, count in zip(parts, counts, strict=True):
        contents = part.split([piece.num_bytes * count for piece in pieces])
        for rows, content, piece in zip(found, contents, pieces, strict=True):
            if content.storage_offset() % piece.dtype.itemsize:
                content = content.clone()  # `view` needs an address that is aligned for the dtype
            rows.append(content.view(piece.dtype).view(-1, *piece.shape[1:]))
    return [torch.cat(rows) for rows in found]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the message buffer of tensors of one dtype; a single contiguous tensor is its own buffer."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return tensors[0].detach()
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a message buffer back into its tensors, unless it is the tensor itself."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return
    for tensor, content in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(content.view_as(tensor))
