"""Communicator of launched runs: devices in several processes, whose tensors travel by torch.distributed.

simulate.launch.worker makes one in each process; methods then call it as they call the simulated one. Process p of P
holds a consecutive share of the N devices, equal or nearly so. What travels is settled in
simulate.comm.process_exchanges; here it is queued, guarded and given its group of processes. Every wait ends after the
group's timeout with an error that names the exchange.

Legend: L local devices, N devices, P processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from simulate.comm.base import Communicator, Nodes, Part
from simulate.comm.channel import Channel
from simulate.comm.process_exchanges import ArrivedT, ProcessExchanges
from simulate.comm.throttle import Throttle
from simulate.comm.transfers import Operation, Transfer, devices_of
from simulate.common.errors import LostPeerError, RunFailedError, first_line
from simulate.layers import accelerator

Channels = tuple[Channel, Channel]
"""Channels of one group of processes: for exchanges that training waits for, and for those in the background."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host's or a GPU's memory ran out; torch raises RuntimeError for both."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text.lower()


class TorchCommunicator(ProcessExchanges, Communicator):
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
        throttle: Throttle | None = None,
    ) -> None:
        """Connect to the default group; with `shares`, all processes' devices, only later: see `connect`."""
        self.current_phase = "the start"
        self.device, self.timeout = device, timedelta(seconds=timeout_s)
        self.throttle = throttle
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
        everyone = range(self.processes)
        self._foreground = Channel(everyone, None)
        # Collectives of one group must come in the same order in all processes, so the background has its own group.
        self._background_channel = Channel(everyone, self.new_group(None))
        self._in_node: dict[Nodes, Channels] = {}
        """Channels between the processes of one node, by the division into nodes; none where each holds whole nodes."""
        self._between_nodes: dict[Nodes, Channels] = {}
        """Channels between the first processes of all nodes; none where this process is not one of them."""

    def _take_shares(self, process: int, shares: Sequence[range]) -> None:
        self.process, self.processes, self.shares = process, len(shares), list(shares)
        self._present = [device for share in self.shares for device in share]

    def disconnect(self) -> None:
        """Close all connections, which ends the exchanges of processes that wait for this one."""
        # Connections close with the last reference to their group.
        for name in ("control", "_foreground", "_background_channel", "_in_node", "_between_nodes"):
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
        row = Transfer("all_gather", own.shape[1] * own.element_size(), self.num_devices)
        self._guarded("an all-gather of scalars", self._slowed(
            lambda: dist.all_gather(everyones, padded, self.control), self.control, row
        ))  # fmt: skip
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

    def _run(
        self,
        name: str,
        exchange: Callable[[Channel], Sequence[ArrivedT] | None],
        channels: Channels | None = None,
    ) -> list[ArrivedT]:
        foreground, background = channels or (self._foreground, self._background_channel)
        channel = background if self._background else foreground
        arrived: list[ArrivedT] = []
        # The messages are those counted since the exchange before, so that they are known here and not when it is run.
        slowed = self._slowed(lambda: arrived.extend(exchange(channel) or ()), channel.group)
        self.on_complete(lambda: self._guarded(name, slowed))
        return arrived

    def _slowed(
        self, exchange: Callable[[], object], group: dist.ProcessGroup | None, message: Transfer | None = None
    ) -> Callable[[], object]:
        """Return the exchange; a throttle slows it to the seconds of what was counted for it, and of `message`."""
        throttle = self.throttle
        if throttle is None:
            return exchange
        if message is not None:
            throttle.count(message)
        seconds = throttle.take_s()
        return lambda: throttle.slowed(exchange, seconds, lambda: dist.barrier(group))

    def _count(
        self, operation: Operation, payload_bytes: int, sent_bytes: int, received_bytes: int,
        devices: int | None = None, teams: int = 1,
    ) -> None:  # fmt: skip
        super()._count(operation, payload_bytes, sent_bytes, received_bytes, devices, teams)
        if self.throttle is not None:  # diagnostics, too, which no clock is charged for
            everyone = self.num_devices if devices is None else devices
            self.throttle.count(Transfer(operation, payload_bytes, everyone, teams))

    def _count_parts(
        self, operation: Literal["all_gather", "push"], tensors: Sequence[Tensor], parts: Sequence[Part]
    ) -> Transfer | None:
        transfer = super()._count_parts(operation, tensors, parts)
        if transfer is not None and self.throttle is not None:
            self.throttle.count(transfer)
        return transfer

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

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        if channels := self._in_node.get(nodes):  # else the caller's sum over local devices is complete
            self._run("an all-reduce in nodes", lambda channel: channel.all_reduce(sums), channels)

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        if leaders := self.leaders(nodes):
            leaders._all_reduce(sums)

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        if channels := self._in_node.get(nodes):
            self._run("a broadcast in nodes", lambda channel: channel.broadcast(tensors, 0), channels)

    def arrange(self, nodes: Nodes) -> None:
        size = self._processes_of_node(nodes)
        firsts = range(0, self.processes, size)
        # Every process makes all groups, since torch.distributed counts them.
        for members in [range(first, first + size) for first in firsts] if size > 1 else ():
            self._join(members, nodes, self._in_node)
        self._join(firsts, nodes, self._between_nodes)

    def _join(self, members: Sequence[int], nodes: Nodes, joined: dict[Nodes, Channels]) -> None:
        """Make two groups of the same members; who is one of them keeps their channels in `joined`."""
        foreground, background = (self.new_group(None, members) for _ in range(2))
        if self.process in members:
            joined[nodes] = Channel(members, foreground), Channel(members, background)

    def leaders(self, nodes: Nodes) -> LeaderExchanges | None:
        channels = self._between_nodes.get(nodes)
        return None if channels is None else LeaderExchanges(self, nodes, channels)

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


class LeaderExchanges(ProcessExchanges):
    """Exchanges between the processes of the nodes' first devices, in which a node takes part as one device does."""

    def __init__(self, owner: TorchCommunicator, nodes: Nodes, channels: Channels) -> None:
        self.owner, self.channels, self.num_devices = owner, channels, nodes.count
        leading = channels[0]
        assert leading.process is not None
        self.process = leading.process
        self.shares = [devices_of(process, leading.processes, nodes.count) for process in range(leading.processes)]
        self.local_devices = self.shares[self.process]

    def on_complete(self, compute: Callable[[], None]) -> None:
        self.owner.on_complete(compute)

    def _run(self, name: str, exchange: Callable[[Channel], Sequence[ArrivedT] | None]) -> list[ArrivedT]:
        return self.owner._run(f"{name} over nodes", exchange, self.channels)

    def _count(
        self, operation: Operation, payload_bytes: int, sent_bytes: int, received_bytes: int,
        devices: int | None = None, teams: int = 1,
    ) -> None:  # fmt: skip
        others = self.num_devices if devices is None else devices
        self.owner._count(operation, payload_bytes, sent_bytes, received_bytes, others, teams)
