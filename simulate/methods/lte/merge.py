"""Merges of LTE's low-rank products into W, over gathered factors or over dense sums (arXiv 2402.16828, algorithm 1).

Lte makes a LayerMerger for each fragment of layers, and calls it at merges. Exchanges may run in the background, so
all that follows from their results is registered with `on_complete`.

Where classes of devices hold unequal heads, they are added up class by class (a Team each); a head's scale follows from
its own rank, and its weight from its device's samples.

Legend: L local devices, H heads of all devices, R rank, I inputs, O outputs, X elements of a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from simulate.comm.base import Communicator, Exchanges, Part
from simulate.comm.compression import CompressedMean, decode, encode, encoded_shapes
from simulate.comm.mean_of_some import MeanOfSome, mean_for
from simulate.comm.transfers import bucket
from simulate.layers.columns import Columns
from simulate.layers.lora import LoraLinear
from simulate.methods.lte.options import LteOptions
from simulate.methods.lte.products import Team, add_products, sum_of_products, weighted
from simulate.methods.stepper import clear_rows
from simulate.models.shapes import LinearShape
from simulate.rules.transport import factor_buffer_bytes, layer_transport


class LayerMerger:
    """Merges some adapted layers: those whose factors travel, in packed messages, and those that are reduced."""

    def __init__(
        self, layers: Sequence[LoraLinear], options: LteOptions, communicator: Exchanges, fewest: int | None = None
    ) -> None:
        """`fewest` are the devices that take part at least, where a quorum lets merges lack some."""
        self.may_lack_devices = fewest is not None
        self.layers, self.options, self.communicator = layers, options, communicator
        self.local = len(communicator.local_devices)
        devices = communicator.num_devices
        total_rank, transport = options.total_rank(devices), options.merge_transport
        self.teams = Team.all_of(options, devices)
        self.keys = ("b",) if options.frozen_a else ("a", "b")
        """Factors that travel: every device can draw a frozen A by itself."""
        # The plan's own rule (simulate.rules.transport) decides, so that planned and sent bytes agree.
        shapes = {x.name: LinearShape(x.name, *x.size, 1) for x in layers}
        reduced = {
            n for n, x in shapes.items() if layer_transport(x, total_rank, transport, options.frozen_a) == "reduce"
        }
        by_factors = [layer for layer in layers if layer.name not in reduced]
        dense = [layer for layer in layers if layer.name in reduced]
        element_bytes = layers[0].b.element_size() if layers else 0
        sizes = factor_buffer_bytes(
            [shapes[x.name] for x in by_factors], total_rank, options.most_held_rank(devices), transport, element_bytes,
            options.frozen_a,
        )  # fmt: skip
        self.factor_messages = [[by_factors[i] for i in group] for group in bucket(sizes)]
        self.dense_messages = [
            [dense[i] for i in group] for group in bucket([math.prod(x.size) * element_bytes for x in dense])
        ]
        # Only late merges need them: a merge at once reads the factors, and writes W, in place.
        delayed_layers = layers if options.merge_delay else ()
        self.snapshots = {
            f"{layer.name}.{key}": getattr(layer, key).detach().clone() for layer in delayed_layers for key in self.keys
        }
        """Factors that were sent while their merge travels."""
        self.arriving = {layer.name: layer.weight.clone() for layer in delayed_layers}
        """Merged W, which training must not see before it has arrived."""
        self._travels = False
        self._weights_H: Tensor | None = None
        """Shares of all heads in the current merge, in units of an equal one; None: all count alike."""
        self.compressed = options.wire != "full" and devices > 1
        self.errors: dict[str, Tensor] = {}
        self.means: list[CompressedMean | MeanOfSome] = []
        if self.compressed:
            for layer in by_factors:
                for key in self.keys:
                    factor = getattr(layer, key).detach()
                    self.errors[f"{layer.name}.{key}"] = torch.zeros_like(factor).view(self.local, -1)
            for message in self.dense_messages:
                elements = sum(math.prod(layer.size) for layer in message)
                self.means.append(mean_for(elements, options.wire, communicator, message[0].b, fewest))

    def merge(self, weights_N: Tensor | None = None) -> None:
        """Make W of all layers the same on all devices; without a reset, heads remember their product that is in it.

        `weights_N` are all devices' shares of 1; equal where not given.
        """
        self._travels = False
        self.weigh(weights_N)
        self._exchange()
        self._weights_H = None

    def weigh(self, weights_N: Tensor | None) -> None:
        """Take the devices' shares of 1, (N,), for the merge that follows; None: all weigh alike."""
        self._weights_H = None
        if weights_N is not None:
            devices, heads_of = range(self.communicator.num_devices), self.options.heads_of
            owners = [device for device in devices for _ in heads_of(range(device, device + 1))]
            # In units of an equal share, since the merge is a mean.
            self._weights_H = _picked(weights_N * len(devices), owners)

    def _weights_of(self, heads: Sequence[int]) -> Tensor | None:
        """Return the weights of some heads, in order; None: all count alike."""
        return None if self._weights_H is None else _picked(self._weights_H, heads)

    @property
    def _own_weights_H(self) -> Tensor | None:
        return self._weights_of(self.options.heads_of(self.communicator.local_devices))

    def _exchanged(self, team: Team) -> Sequence[int]:
        """Return the heads of a team whose factors an exchange returns, in order: of the devices that take part."""
        present = self.communicator.participants
        if present is None:
            return team.heads
        owners = (device for device in present if device in team.devices)
        return [head for device in owners for head in self.options.heads_of(range(device, device + 1))]

    @torch.no_grad()
    def send(self, weights_N: Tensor | None = None) -> None:
        """Start the merge of the current factors behind the training; called inside `background`."""
        self.weigh(weights_N)
        for layer in self.layers:
            for key in self.keys:
                self.snapshots[f"{layer.name}.{key}"].copy_(getattr(layer, key))
        self._travels = True
        self._exchange()

    @torch.no_grad()
    def apply_merged(self) -> None:
        """Replace W by the merged one that has arrived; heads keep what they learned since they sent."""
        for layer in self.layers:
            layer.weight.copy_(self.arriving[layer.name])
            b_HOR = self.snapshots[f"{layer.name}.b"]
            # What was merged counts in W now: B0·A0 or the subtraction takes it out of the head's own product.
            if self.options.reset == "none":
                layer.remember_product(self.snapshots[f"{layer.name}.a"], b_HOR)
            else:
                layer.b.sub_(b_HOR)

    def merged(self, layer: LoraLinear, travels: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the newest merged W of a layer, on its way or not, and the local heads' A and B that are in it."""
        if travels:
            snapshots = (self.snapshots[f"{layer.name}.{key}"] for key in ("a", "b"))
            return self.arriving[layer.name], *snapshots
        if layer.a0 is None or layer.b0 is None:  # nothing is merged yet
            return layer.merged_weight(), layer.a.detach(), torch.zeros_like(layer.b)
        return layer.merged_weight(), layer.a0, layer.b0

    def _exchange(self) -> None:
        for message in self.factor_messages:
            self._merge_factors(message)
        for index, message in enumerate(self.dense_messages):
            if self.compressed:
                self._merge_compressed_deltas(message, self.means[index])
            else:
                self._merge_sums(message)

    @torch.no_grad()
    def exclude_devices(self, healthy_L: Tensor) -> None:
        """Take heads of devices that are not healthy back to the last merge, so that they add nothing to this one."""
        healthy_H = healthy_L.repeat_interleave(self.options.heads_per_device)
        for layer in self.layers:
            sick_H = ~healthy_H.to(layer.b.device)
            if layer.a0 is not None and layer.b0 is not None:
                layer.a[sick_H], layer.b[sick_H] = layer.a0[sick_H], layer.b0[sick_H]
                continue
            # With a reset the last merge left B = 0 and A as drawn.
            if not self.options.frozen_a:
                drawn = layer.draw_a(int(layer.drawn_after))
                layer.a[sick_H] = drawn[sick_H]
            layer.b[sick_H] = 0
        for errors in (*self.errors.values(), *(t for mean in self.means for t in mean.state_dict().values())):
            clear_rows(errors, healthy_L)

    @property
    def sum_share(self) -> float:
        """Factor of the sum of all devices' `own_sum`: s/H, or 1/N where each has scaled its own."""
        return 1 / self.communicator.num_devices if self.options.uneven_heads else self.share_of(self.teams[0])

    def share_of(self, team: Team) -> float:
        """Return what each of a team's heads counts where devices weigh alike."""
        return team.share

    def own_sum(self, a_HRI: Tensor | Columns, b_HOR: Tensor) -> Tensor:
        """Return Σ_h B_h·A_h over the local heads, (O, I), as the sum over all devices takes it."""
        sum_OI = sum_of_products(a_HRI, weighted(b_HOR, self._own_weights_H))
        if self.options.uneven_heads:
            sum_OI *= self.options.scale / self.options.heads_per_device
        return sum_OI

    def _merge_factors(self, layers: list[LoraLinear]) -> None:
        server = self.options.merge_transport == "server"
        if self.compressed:
            everyones = self._exchange_rounded(layers)
        else:
            sent = [self._sent(layer, key) for layer in layers for key in self.keys]
            everyones = self._by_team(sent, partial(self._shapes, layers))
            for layer in layers:
                self._remember(layer)
        if everyones is not None:  # None: only the server process has them
            self.communicator.on_complete(partial(self._add_up, layers, everyones, self._targets(layers)))
        if server:  # after the server has added up, as messages are served in order
            self.communicator.pull(self._pulled(layers))

    def _by_team(
        self, tensors: list[Tensor], shapes_of: Callable[[Team], tuple[tuple[int, ...], ...]]
    ) -> list[list[Tensor]] | None:
        """Exchange the local devices' tensors; return each one as a list over teams, at a server's process alone.

        `shapes_of` returns the shapes of one device's tensors. In the background the list is filled on arrival.
        """
        communicator, server = self.communicator, self.options.merge_transport == "server"
        if self.options.uneven_heads:
            assert isinstance(communicator, Communicator)  # nodes that train as one have equal heads
            parts = [Part(team.devices, shapes_of(team)) for team in self.teams]
            return communicator.push_parts(tensors, parts) if server else communicator.all_gather_parts(tensors, parts)
        gathered = communicator.push(tensors) if server else communicator.all_gather(tensors)
        if gathered is None:
            return None
        everyones: list[list[Tensor]] = []
        communicator.on_complete(lambda: everyones.extend([tensor] for tensor in gathered))
        return everyones

    def _shapes(self, layers: Sequence[LoraLinear], team: Team) -> tuple[tuple[int, int, int], ...]:
        return tuple(self._shape(layer, key, team) for layer in layers for key in self.keys)

    def _shape(self, layer: LoraLinear, key: str, team: Team) -> tuple[int, int, int]:
        """Return the shape of a factor of one of a team's devices."""
        heads = len(team.heads) // len(team.devices)
        (outputs, inputs), rank = layer.size, layer.spec.rank_of(team.heads)
        return (heads, rank, inputs) if key == "a" else (heads, outputs, rank)

    def _add_up(self, layers: list[LoraLinear], everyones: list[list[Tensor]], targets: list[Tensor | None]) -> None:
        factors = iter(everyones)
        for layer, target_OI in zip(layers, targets, strict=True):
            a_by_team = None if self.options.frozen_a else next(factors)
            self._add_up_layer(layer, a_by_team, next(factors), target_OI)

    def _add_up_layer(
        self, layer: LoraLinear, a_by_team: list[Tensor] | None, b_by_team: list[Tensor], target_OI: Tensor | None
    ) -> None:
        # A call for each layer, so that nothing of one layer is held while A of the next is drawn.
        merged_OI = torch.empty(0) if target_OI is None else target_OI
        exchanged = [(index, team, self._exchanged(team)) for index, team in enumerate(self.teams)]
        # With a quorum all of a team may be missing, but not all of everybody.
        taking_part = [(index, team, heads) for index, team, heads in exchanged if heads]
        for place, (index, team, heads) in enumerate(taking_part):
            factor = self._frozen_a(layer, team, heads) if a_by_team is None else a_by_team[index]
            b_HOR = weighted(b_by_team[index], self._weights_of(heads))
            # Algorithm 1's merge: Ŵ = W + (s/H)·Σ_h B_h·A_h, from W0 where the last products are taken back.
            if place == 0:
                # Unpacked for as long as it takes to pack it again, one layer at a time.
                base_OI = self._base(layer, own=target_OI is None).to(b_HOR.device)
                merged_OI = base_OI if target_OI is None else target_OI
                add_products(base_OI, factor, b_HOR, self.share_of(team), out=merged_OI)
                del base_OI
            else:
                add_products(merged_OI, factor, b_HOR, self.share_of(team))
            del factor, b_HOR
        if target_OI is None:
            layer.set_weight(merged_OI)

    def _frozen_a(self, layer: LoraLinear, team: Team, heads: Sequence[int]) -> Tensor | Columns:
        """Return the frozen A of some heads of a team, in order."""
        a_HRI = layer.frozen_a(team.heads)
        if len(heads) == len(team.heads):
            return a_HRI
        return a_HRI[torch.tensor([head - team.heads.start for head in heads]).to(a_HRI.device)]

    def _sent(self, layer: LoraLinear, key: str) -> Tensor:
        """Return a local factor as it is merged: its snapshot while a merge travels, else its current value."""
        return self.snapshots[f"{layer.name}.{key}"] if self._travels else getattr(layer, key).detach()

    def _targets(self, layers: list[LoraLinear]) -> list[Tensor | None]:
        """Return the tensors that merged W are written to; None for quantised W, which are packed afterwards."""
        if self._travels:
            return [self.arriving[layer.name] for layer in layers]
        return [None if layer.frozen else layer.weight for layer in layers]

    def _pulled(self, layers: list[LoraLinear]) -> list[Tensor]:
        """Return the tensors that the server's weights are written to; quantised W arrive packed."""
        if self._travels:
            return [self.arriving[layer.name] for layer in layers]
        return [tensor for layer in layers for tensor in layer.frozen_tensors()]

    def _exchange_rounded(self, layers: list[LoraLinear]) -> list[list[Tensor]] | None:
        """Return all devices' factors as rounded for the wire; keep what rounding lost, and the products as sent."""
        wire, parts = self.options.wire, []
        for layer in layers:
            rounded = {}
            for key in self.keys:
                factor = self._sent(layer, key)
                # Error feedback: what the last message lost goes into this one (arXiv 1901.09847).
                error_LX = self.errors[f"{layer.name}.{key}"]
                with self._errors_of_some(error_LX, key):
                    corrected_LX = error_LX.add_(factor.view(self.local, -1))
                    message = encode(corrected_LX, wire)
                    sent_LX = decode(message, corrected_LX.shape[1], wire, factor.dtype)
                    corrected_LX.sub_(sent_LX)  # what rounding lost
                rounded[key] = sent_LX.reshape(factor.shape)
                parts.append(message)
            self._remember(layer, rounded)
            if self.options.reset == "ab":  # the lost part of a factor means nothing beside the next draw
                for key in self.keys:
                    self.errors[f"{layer.name}.{key}"].zero_()
        factors = [(layer, key) for layer in layers for key in self.keys]
        sent = [tensor for message in parts for tensor in message]
        exchanged = self._by_team(sent, partial(self._encoded_shapes, factors))
        if exchanged is None:
            return None
        everyones: list[list[Tensor]] = []

        def unpack() -> None:
            received = iter(exchanged)
            for message, factor in zip(parts, factors, strict=True):
                encoded = [next(received) for _ in message]
                everyones.append([self._decoded(*factor, team, i, encoded) for i, team in enumerate(self.teams)])

        self.communicator.on_complete(unpack)
        return everyones

    @contextmanager
    def _errors_of_some(self, error_LX: Tensor, key: str) -> Iterator[None]:
        """Give local devices the errors of their factor `key` in its own units; keep those of who takes no part.

        With a quorum, B's errors are kept times the share that they were sent with, as in simulate.comm.mean_of_some:
        what a merge rounded away of w·B·A is missing by w, whatever the next share is. A has no share.
        """
        if not self.may_lack_devices:
            yield
            return
        taking, first = self.communicator.local_participants, self.communicator.local_devices.start
        absent = [row for row in range(self.local) if first + row not in taking]
        kept = error_LX[absent]
        weights_L1 = None
        if key == "b" and self._own_weights_H is not None:
            weights_L1 = self._own_weights_H.view(self.local, -1)[:, :1]
            weights_L1 = torch.where(weights_L1 > 0, weights_L1, 1.0)  # of those without a share nothing was sent
            error_LX.div_(weights_L1)
        yield
        if weights_L1 is not None:
            error_LX.mul_(weights_L1)
        error_LX[absent] = kept

    def _encoded_shapes(self, factors: Sequence[tuple[LoraLinear, str]], team: Team) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the message tensors of one of a team's devices."""
        elements = [math.prod(self._shape(layer, key, team)) for layer, key in factors]
        return tuple((1, *shape) for count in elements for shape in encoded_shapes(count, self.options.wire))

    def _decoded(self, layer: LoraLinear, key: str, team: Team, index: int, encoded: list[list[Tensor]]) -> Tensor:
        """Return a factor of a team's heads from what arrived, whose tensors are lists over teams."""
        heads, rows, columns = self._shape(layer, key, team)
        message = [by_team[index] for by_team in encoded]
        decoded = decode(message, heads * rows * columns, self.options.wire, self.layers[0].b.dtype)
        return decoded.reshape(-1, rows, columns)

    def _merge_sums(self, layers: list[LoraLinear]) -> None:
        # Local heads are summed here, and the sums over the wire: dense, but of one size for any number of heads.
        sums = [self.own_sum(self._sent_a(layer), self._sent(layer, "b")) for layer in layers]
        self.communicator.all_reduce(sums)
        targets = self._targets(layers)

        def add_up() -> None:
            for layer, sum_OI, target_OI in zip(layers, sums, targets, strict=True):
                _store_sum(layer, self._base(layer), sum_OI, self.sum_share, target_OI)

        self.communicator.on_complete(add_up)
        for layer in layers:
            self._remember(layer)

    def _sent_a(self, layer: LoraLinear) -> Tensor | Columns:
        return layer.frozen_a() if self.options.frozen_a else self._sent(layer, "a")

    def _merge_compressed_deltas(self, layers: list[LoraLinear], compressed: CompressedMean | MeanOfSome) -> None:
        mean = compressed.mean(self._deltas(layer) for layer in layers)
        targets = self._targets(layers)

        def add_up() -> None:
            parts = mean.pop().split([math.prod(layer.size) for layer in layers])
            for layer, part, target_OI in zip(layers, parts, targets, strict=True):
                _store_sum(layer, layer.merged_weight(), part.view(layer.size), 1.0, target_OI)

        self.communicator.on_complete(add_up)
        for layer in layers:
            self._remember(layer)

    def _deltas(self, layer: LoraLinear) -> Tensor:
        """Return each local device's change of W since the last merge, (L, O*I)."""
        # Device by device, since each has an error of its own to feed back.
        per_device = len(layer.b) // self.local
        deltas_LOI, weights_H = [], self._own_weights_H
        for first in range(0, len(layer.b), per_device):
            heads = slice(first, first + per_device)
            b_HOR = weighted(self._sent(layer, "b"), weights_H)[heads]
            delta_OI = sum_of_products(self._sent_a(layer)[heads], b_HOR)
            if layer.a0 is not None and layer.b0 is not None:
                delta_OI -= sum_of_products(layer.a0[heads], weighted(layer.b0, weights_H)[heads])
            deltas_LOI.append(delta_OI)
        return torch.stack(deltas_LOI).flatten(1).mul_(self.options.scale / self.options.heads_per_device)

    def _remember(self, layer: LoraLinear, rounded: Mapping[str, Tensor] | None = None) -> None:
        """Without a reset, keep the factors whose product is in merged W; while a merge travels, in the snapshot."""
        if self.options.reset != "none":
            return
        if not self._travels:
            factors = rounded or {"a": layer.a.detach(), "b": layer.b.detach()}
            layer.remember_product(factors["a"], factors["b"])
            return
        for key, factor in (rounded or {}).items():
            self.snapshots[f"{layer.name}.{key}"].copy_(factor)

    def _base(self, layer: LoraLinear, own: bool = False) -> Tensor:
        """Return the weights a merge adds to: W0 without a reset, else W; `own`: one that may be overwritten."""
        if layer.start_weight is None:
            return layer.merged_weight()
        return layer.start_weight.to(layer.b.device, copy=own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return errors of rounding and the tensors of a merge in flight, by name."""
        named = {f"error.{name}": tensor for name, tensor in self.errors.items()}
        named.update({f"snapshot.{name}": tensor for name, tensor in self.snapshots.items()})
        named.update({f"arriving.{name}": tensor for name, tensor in self.arriving.items()})
        for message, mean in zip(self.dense_messages, self.means, strict=False):
            named.update({f"{key}.{message[0].name}": tensor for key, tensor in mean.state_dict().items()})
        return named


def _store_sum(layer: LoraLinear, base_OI: Tensor, change_OI: Tensor, share: float, target_OI: Tensor | None) -> None:
    """Write base + share·change to `target_OI`, or, where that is None, pack it as the layer's W."""
    into_OI = change_OI if target_OI is None else target_OI
    torch.add(base_OI, change_OI, alpha=share, out=into_OI)
    if target_OI is None:
        layer.set_weight(into_OI)


def _picked(weights_H: Tensor, heads: Sequence[int]) -> Tensor:
    """Return entries by index; a list as an index would be made a tensor on the CPU first."""
    return weights_H.index_select(0, torch.tensor(heads, dtype=torch.int64, device=weights_H.device))
