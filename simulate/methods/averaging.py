"""Averages of parameters that every device trains by itself, for the merges of local SGD, DiLoCo and LTE.

    θ ← θ_last + outer(Σ_n w_n·θ_n − θ_last),   θ_n ← θ         with Σ_n w_n = 1; outer is the identity but for DiLoCo

With a delay, copies σ_n of the parameters travel while training goes on:

    σ_n ← θ_n;   ... d steps ...;   θ ← θ_last + outer(Σ_n w_n·σ_n − θ_last),   θ_n ← θ + (θ_n − σ_n)

A method calls `merge`, or `send` and later `apply_merged`; transport, wire format and fragments are settled here.

Legend: L local devices, N devices, X elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from simulate.comm.base import Exchanges
from simulate.comm.compression import CompressedMean
from simulate.comm.mean_of_some import MeanOfSome, mean_for
from simulate.comm.sparse import SparseMean
from simulate.comm.transfers import Sparsity, fragment
from simulate.methods.gradient_averaging import packed_parameters
from simulate.methods.stepper import clear_rows

Outer = Callable[[str, Tensor, Tensor], Tensor]
"""Outer optimizer: (name, last merged weights, mean) of one parameter → weights that the next round starts from."""


class Averaging:
    """Parameters (L, ...) in fragments and packed messages, and the tensors that their averages keep between merges.

    With `first_only` the first device's weights take the place of the mean; with `sparsity` only the largest entries of
    changes travel.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        communicator: Exchanges,
        server: bool = False,
        wire: str = "full",
        fragments: int = 1,
        outer: Outer | None = None,
        first_only: bool = False,
        delayed: bool = False,
        fewest: int | None = None,
        sparsity: Sparsity | None = None,
    ) -> None:
        """`fewest` are the devices that take part at least, where a quorum lets merges lack some."""
        self.first_only = first_only
        self.parameters, self.communicator, self.server, self.outer = parameters, communicator, server, outer
        self._local = slice(communicator.local_devices.start, communicator.local_devices.stop)
        # Messages are cut within a fragment: each travels at a step of its own.
        names = list(parameters)
        parts = ([names[i] for i in fragment(len(names), fragments, index)] for index in range(fragments))
        self.messages = [packed_parameters({name: parameters[name] for name in part}) for part in parts]
        compressed = not first_only and (wire != "full" or sparsity is not None) and not server
        compressed = compressed and communicator.num_devices > 1
        self.last: dict[str, Tensor] = {}
        # θ_last: changes are taken against it, and between staggered or late merges evaluation reads it.
        if compressed or fragments > 1 or outer is not None or delayed:
            self.last = {name: p[0].detach().clone() for name, p in parameters.items()}
        self.snapshots = {name: p.detach().clone() for name, p in parameters.items() if delayed}
        """σ: copies that were sent and whose mean has not arrived."""
        self.arriving = {name: p[0].detach().clone() for name, p in parameters.items() if delayed}
        """Means in flight, which training must not see before they are complete."""
        self.means: dict[tuple[str, ...], CompressedMean | MeanOfSome | SparseMean] = {}
        if compressed:
            for message in (tuple(m) for messages in self.messages for m in messages):
                elements, like = sum(parameters[name][0].numel() for name in message), self.last[message[0]]
                if sparsity is None:
                    self.means[message] = mean_for(elements, wire, communicator, like, fewest)
                else:
                    self.means[message] = SparseMean(elements, sparsity, wire, communicator, like)

    @torch.no_grad()
    def keep_last(self) -> None:
        """Keep the current weights, and those of every later merge, in `last`, which most options do anyway."""
        for name, parameter in self.parameters.items():
            if name not in self.last:
                self.last[name] = parameter[0].detach().clone()

    def base_state(self) -> dict[str, Tensor]:
        """Return the weights that devices of this round started from, by name; needs `keep_last`."""
        return {f"last.{name}": tensor for name, tensor in self.last.items()}

    @torch.no_grad()
    def load_base(self, base: Mapping[str, Tensor]) -> None:
        """Move the local devices from their own start to `base`, with what they learned: θ_n ← base + (θ_n − last)."""
        for name, last in self.last.items():
            new = base[f"last.{name}"].to(last.device)
            self.parameters[name].add_(new - last)
            last.copy_(new)

    @torch.no_grad()
    def merge(self, index: int, weights_N: Tensor | None = None) -> None:
        """Average the index-th fragment; `weights_N` are all devices' shares of 1, equal where not given.

        Through a server only those devices take part whose weight is not zero.
        """
        for message in self.messages[index]:
            self._merge_message(message, weights_N)

    def _merge_message(self, message: list[str], weights_N: Tensor | None) -> None:
        """Average the parameters of one message; its means are freed before the next message is made."""
        means = self._means(message, self.parameters, weights_N)
        for name, mean in zip(message, means, strict=True):
            merged = self._merged(name, mean)
            self.parameters[name].copy_(merged.expand_as(self.parameters[name]))

    @torch.no_grad()
    def send(self, index: int, weights_N: Tensor | None = None) -> None:
        """Start the average of the index-th fragment's weights behind the training; called inside `background`."""
        for message in self.messages[index]:
            for name in message:
                self.snapshots[name].copy_(self.parameters[name])
            means = self._means(message, self.snapshots, weights_N, into=self.arriving)
            # Means that travelled in buffers of their own exist only once the exchange is done.
            self.communicator.on_complete(partial(self._keep_arriving, message, means))

    def _keep_arriving(self, message: list[str], means: list[Tensor]) -> None:
        for name, mean in zip(message, means, strict=True):
            if mean is not self.arriving[name]:
                self.arriving[name].copy_(mean)
        means.clear()

    @torch.no_grad()
    def apply_merged(self, index: int) -> None:
        """Replace what was sent of the index-th fragment by its mean; devices keep what they learned since."""
        for name in (name for message in self.messages[index] for name in message):
            merged = self._merged(name, self.arriving[name])
            self.parameters[name].sub_(self.snapshots[name]).add_(merged)  # θ_n ← θ + (θ_n − σ_n)

    def _merged(self, name: str, mean: Tensor) -> Tensor:
        """Return the outer optimizer's weights for a mean, and keep them in `last`, where that is kept."""
        # θ_last + outer(mean − θ_last); without an outer optimizer that is the mean.
        merged = mean if self.outer is None else self.outer(name, self.last[name], mean)
        if self.last:
            self.last[name].copy_(merged)
        return merged

    @torch.no_grad()
    def exclude_devices(self, healthy_L: Tensor) -> None:
        """Clear the rows of devices that are not healthy: zero times NaN would still be NaN in a mean.

        Where the merge arrives late they train on from the last one.
        """
        errors = (tensor for mean in self.means.values() for tensor in mean.state_dict().values())
        for tensor in (*self.parameters.values(), *errors):
            clear_rows(tensor, healthy_L)
        for name in self.snapshots:
            self.parameters[name][~healthy_L.to(self.last[name].device)] = self.last[name]

    def _means(
        self,
        message: list[str],
        parameters: Mapping[str, Tensor],
        weights_N: Tensor | None,
        into: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the means of a message's parameters, complete once they have arrived; `into` holds the sums."""
        copies = [parameters[name].detach() for name in message]
        if self.first_only:
            return self._firsts(copies)
        if self.server:
            return self._through_server(copies, weights_N)
        weights_L = None if weights_N is None else weights_N[self._local]
        if self.means:
            return self._compressed(tuple(message), copies, weights_L)
        sums = []
        for name, copy in zip(message, copies, strict=True):
            # Local devices are summed before anything is sent: one copy travels for all of them.
            own = copy.sum(0) if weights_L is None else torch.tensordot(weights_L, copy, dims=1)
            sums.append(own if into is None else into[name].copy_(own))
        self.communicator.all_reduce(sums)
        if weights_L is None:
            self.communicator.on_complete(lambda: torch._foreach_div_(sums, float(self.communicator.num_devices)))
        return sums

    def _firsts(self, copies: list[Tensor]) -> list[Tensor]:
        """Return the first device's parameters, which replace all others'."""
        firsts = [copy[0].clone() for copy in copies]
        if self.server:
            # Only the process that holds device 0 has something to push; the others push no rows.
            held = 1 if self.communicator.local_devices.start == 0 else 0
            self.communicator.push([copy[:held] for copy in copies], active=[0])
            self.communicator.pull(firsts)
        else:
            self.communicator.broadcast(firsts)
        return firsts

    def _through_server(self, copies: list[Tensor], weights_N: Tensor | None) -> list[Tensor]:
        active = None
        if weights_N is not None and not bool((weights_N > 0).all()):
            # Devices of weight 0 neither push nor pull; so FedAvg's idle clients cost no bytes.
            active = torch.nonzero(weights_N > 0).flatten().tolist()
            here = torch.nonzero(weights_N[self._local] > 0).flatten()
            copies = [copy[here] for copy in copies]
        pushed = self.communicator.push(copies, active)
        means = [copy.new_empty(copy.shape[1:]) for copy in copies]

        def average() -> None:
            for mean, copies_N in zip(means, pushed or (), strict=False):
                if weights_N is None:
                    torch.mean(copies_N, 0, out=mean)
                else:
                    weights = weights_N if active is None else weights_N[active]
                    mean.copy_(torch.tensordot(weights, copies_N, dims=1))

        if pushed is not None:  # this process is the server
            self.communicator.on_complete(average)
        self.communicator.pull(means, active)
        return means

    def _compressed(self, message: tuple[str, ...], copies: list[Tensor], weights_L: Tensor | None) -> list[Tensor]:
        changes = (copy - self.last[name] for name, copy in zip(message, copies, strict=True))
        if weights_L is not None:  # the mean is over all devices: Σ w_n·x_n = mean_n(N·w_n·x_n)
            weight_L1 = (weights_L * self.communicator.num_devices).unsqueeze(1)
            changes = (change.reshape(len(change), -1) * weight_L1 for change in changes)
        # The mean of changes is small, so that a coarse grid loses less of it than of weights.
        mean, sizes, means = self.means[message].mean(changes), [copy[0].numel() for copy in copies], []

        def add_up() -> None:
            for name, part in zip(message, mean.pop().split(sizes), strict=True):
                means.append(self.last[name] + part.view_as(self.last[name]))

        self.communicator.on_complete(add_up)
        return means

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the tensors that the next merges depend on, by name."""
        groups = {"last": self.last, "snapshot": self.snapshots, "arriving": self.arriving}
        named = {f"{key}.{name}": tensor for key, tensors in groups.items() for name, tensor in tensors.items()}
        for message, mean in self.means.items():
            named.update({f"{key}.{message[0]}": tensor for key, tensor in mean.state_dict().items()})
        return named
