"""DASO (Coquelin et al. 2022, arXiv 2104.05588): gradients inside a node, delayed averages of weights between nodes.

Every step a node's devices average their gradients. Every T steps one device of each of M nodes sends its weights x_i
to the others and trains on; S steps later what has arrived is mixed into the weights of that moment:

    x ← (2S·x + Σ_i x_i) / (2S + M);        with S = 0, and after the run's last step: x ← (1/M)·Σ_i x_i, waited for

Without the phases of blocking averages that the authors put at both ends of an epoch. simulate.methods.registry builds
the class; the training loop calls `step` and `merge`.

Legend: M nodes, C local nodes; the devices of a node share one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator, Nodes, first_devices
from simulate.config.run import Run
from simulate.layers.convert import convert, merged_state
from simulate.methods.base import Method
from simulate.methods.daso.options import DasoOptions
from simulate.methods.gradient_averaging import packed_parameters
from simulate.methods.overlapped import NOTHING
from simulate.methods.round_updates import LayerUpdates, dense_updates
from simulate.methods.stepper import clip_per_device


class Daso(Method):
    """Two levels: synchronous nodes, which average asynchronously."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        assert isinstance(run.method, DasoOptions)
        self.options = run.method
        size = self.options.devices_per_node
        self.nodes = Nodes(size, communicator.num_devices // size)
        super().__init__(run, communicator, device, network)
        communicator.arrange(self.nodes)
        self.messages = packed_parameters(self.parameters)
        self.delayed = self.options.delay_steps > 0 and self.nodes.count > 1
        self.arriving = {n: torch.zeros_like(p[0]) for n, p in self.parameters.items()} if self.delayed else {}
        self.sent_after = torch.tensor(NOTHING)
        self.last: dict[str, Tensor] = {}
        """The nodes' mean at the last exchange, where it is kept."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return convert(model, self.local_nodes)

    @property
    def local_nodes(self) -> int:
        """Nodes of this process: whole ones, or the one that its devices are part of."""
        size, local = self.nodes.size, self.local_devices
        assert local % size == 0 or size % local == 0, "a process holds whole nodes, or an equal part of one"
        return max(1, local // size)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses_L = self.loss.backpropagate(inputs, targets, self.local_devices)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        # Every step: the mean gradient of the node's devices.
        for names in self.messages if self.nodes.size > 1 else ():
            self.communicator.reduce_in_nodes([gradients[name] for name in names], self.nodes)
        # The loss sums over a node's devices, so that their mean needs one division.
        torch._foreach_div_(list(gradients.values()), float(self.nodes.size))
        clip_per_device(list(gradients.values()), self.local_nodes, self.run.train.clip_norm)
        self.stepper.step(self.rate_factor(step))
        if int(self.sent_after) != NOTHING and step == int(self.sent_after) + self.options.delay_steps:
            self._mix()
        return losses_L

    @torch.no_grad()
    def merge(self, step: int) -> None:
        if self.nodes.count == 1:
            return
        last = self.is_last(step)
        if last and int(self.sent_after) != NOTHING:
            self._mix()
        if self.delayed and not last:
            with self.communicator.background():
                for names in self.messages:
                    self._sum_up(names, self.arriving)
            self.sent_after.fill_(step)
            return
        for names in self.messages:
            self._average(names)

    def _average(self, names: list[str]) -> None:
        """Average the parameters of one message; its sums are freed before the next ones are made."""
        sums = {name: torch.empty_like(self.parameters[name][0]) for name in names}
        self._sum_up(names, sums)
        for name in names:
            self.parameters[name].copy_((sums[name] / self.nodes.count).expand_as(self.parameters[name]))
        self._keep(sums)

    def _keep(self, sums: dict[str, Tensor]) -> None:
        for name in self.last.keys() & sums.keys():  # diagnostics alone keep the last means
            torch.div(sums[name], self.nodes.count, out=self.last[name])

    def keep_merged(self) -> None:
        self.last = {name: p[0].detach().clone() for name, p in self.parameters.items()}

    def updates(self, step: int) -> Iterator[LayerUpdates]:
        if self.nodes.count > 1:
            yield from dense_updates(self.model, self.parameters, self.last)

    def _sum_up(self, names: list[str], sums: dict[str, Tensor]) -> None:
        """Write the sum over all nodes of a message's parameters into `sums`, in place, so that it may arrive later."""
        message = [torch.sum(self.parameters[name].detach(), 0, out=sums[name]) for name in names]
        # One device of each node exchanges, and broadcasts to the others: links between nodes carry each weight once.
        self.communicator.reduce_over_nodes(message, self.nodes)
        if self.nodes.size > 1:
            self.communicator.broadcast_in_nodes(message, self.nodes)

    @torch.no_grad()
    def _mix(self) -> None:
        self.communicator.wait()
        weight = 2.0 * self.options.delay_steps  # x ← (2S·x + Σ_i x_i) / (2S + M)
        for name, parameter in self.parameters.items():
            parameter.mul_(weight).add_(self.arriving[name]).div_(weight + self.nodes.count)
        self._keep(self.arriving)
        self.sent_after.fill_(NOTHING)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the average that the nodes sent last, or the weights where nothing travels."""
        if int(self.sent_after) == NOTHING:
            return merged_state(self.model)
        self.communicator.finish()  # an evaluation may come while they travel
        means = {name: sums / self.nodes.count for name, sums in self.arriving.items()}
        return merged_state(self.model, {id(self.parameters[name]): mean for name, mean in means.items()})

    def row_devices(self) -> list[int]:
        """Return the first device of each node that has devices here."""
        local, size = self.communicator.local_devices, self.nodes.size
        return first_devices(range(local.start // size, -(-local.stop // size)), self.nodes)

    def all_row_devices(self) -> list[int]:
        return first_devices(range(self.nodes.count), self.nodes)

    def extra_state(self) -> dict[str, Tensor]:
        arriving = {f"arriving.{name}": sums for name, sums in self.arriving.items()}
        last = {f"last.{name}": mean for name, mean in self.last.items()}
        return {**arriving, **last, "sent_after": self.sent_after}
