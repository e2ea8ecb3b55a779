"""How LTE's low-rank products become part of W: over factors that travel, or over dense sums.

Legend: L local devices, H heads of all devices, R rank, I inputs, O outputs, X elements of a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from simulate.adapters import LoraLinear
from simulate.communicator import Communicator
from simulate.costs.schedule import factor_buffer_bytes, layer_transport
from simulate.costs.traffic import pack
from simulate.methods.base import clear_rows
from simulate.models.shapes import LinearShape
from simulate.options import LteOptions
from simulate.wire import CompressedMean, decode, encode

Exchange = Callable[[Sequence[Tensor]], list[Tensor] | None]


class LayerMerger:
    """Merges some adapted layers: those whose factors travel, in packed messages, and those that are reduced."""

    def __init__(self, layers: Sequence[LoraLinear], options: LteOptions, communicator: Communicator) -> None:
        self.layers, self.options, self.communicator = layers, options, communicator
        self.local = len(communicator.local_devices)
        devices = communicator.num_devices
        held, transport = options.held_rank(devices), options.merge_transport
        self.keys = ("b",) if options.frozen_a else ("a", "b")
        """The factors that travel: a frozen A can be drawn by everyone."""
        shapes = {x.name: LinearShape(x.name, x.weight.shape[0], x.weight.shape[1], 1) for x in layers}
        reduced = {
            n for n, x in shapes.items() if layer_transport(x, held, devices, transport, options.frozen_a) == "reduce"
        }
        by_factors = [layer for layer in layers if layer.name not in reduced]
        dense = [layer for layer in layers if layer.name in reduced]
        element_bytes = layers[0].weight.element_size() if layers else 0
        sizes = factor_buffer_bytes(
            [shapes[x.name] for x in by_factors], devices, held, transport, element_bytes, options.frozen_a
        )
        self.factor_messages = [[by_factors[i] for i in group] for group in pack(sizes)]
        self.dense_messages = [
            [dense[i] for i in group] for group in pack([x.weight.numel() * element_bytes for x in dense])
        ]
        self.compressed = options.wire != "full" and devices > 1
        self.errors: dict[str, Tensor] = {}
        self.means: list[CompressedMean] = []
        if self.compressed:
            for layer in by_factors:
                for key in self.keys:
                    factor = getattr(layer, key).detach()
                    self.errors[f"{layer.name}.{key}"] = torch.zeros_like(factor).view(self.local, -1)
            for message in self.dense_messages:
                elements = sum(layer.weight.numel() for layer in message)
                self.means.append(CompressedMean(elements, options.wire, communicator, message[0].weight))

    def merge(self) -> None:
        """Make W of all layers the same on all devices, and let heads remember what of them is in it."""
        for message in self.factor_messages:
            self._merge_factors(message)
        for index, message in enumerate(self.dense_messages):
            if self.compressed:
                self._merge_compressed_deltas(message, self.means[index])
            else:
                self._merge_sums(message)

    @torch.no_grad()
    def leave_out(self, healthy_L: Tensor) -> None:
        """Take heads of devices that are not healthy back to the last merge, so that they add nothing to this one."""
        healthy_H = healthy_L.repeat_interleave(self.options.heads_per_device)
        for layer in self.layers:
            sick_H = ~healthy_H.to(layer.b.device)
            if layer.a0 is not None and layer.b0 is not None:
                layer.a[sick_H], layer.b[sick_H] = layer.a0[sick_H], layer.b0[sick_H]
                continue
            if isinstance(layer.a, nn.Parameter):
                drawn = layer.draw_a(int(layer.drawn_after))
                layer.a[sick_H] = drawn[sick_H]
            layer.b[sick_H] = 0
        for errors in (*self.errors.values(), *(t for mean in self.means for t in mean.state().values())):
            clear_rows(errors, healthy_L)

    @property
    def _share(self) -> float:
        """s/H: the merge is a mean over all heads."""
        return self.options.scale / (self.communicator.num_devices * self.options.heads_per_device)

    def _merge_factors(self, layers: list[LoraLinear]) -> None:
        server = self.options.merge_transport == "server"
        exchange = self.communicator.push if server else self.communicator.all_gather
        if self.compressed:
            everyones = self._exchange_rounded(layers, exchange)
        else:
            everyones = exchange([getattr(layer, key).detach() for layer in layers for key in self.keys])
            for layer in layers:
                self._remember(layer, layer.a.detach(), layer.b.detach())
        if everyones is not None:  # here, not only at the server
            factors = iter(everyones)
            for layer in layers:
                a_HRI = self._everyones_draw(layer) if self.options.frozen_a else next(factors)
                add_products(self._base(layer), a_HRI, next(factors), self._share, out=layer.weight)
        if server:
            self.communicator.pull([layer.weight for layer in layers])

    def _everyones_draw(self, layer: LoraLinear) -> Tensor:
        heads = self.communicator.num_devices * self.options.heads_per_device
        if heads == layer.a.shape[0]:
            return layer.a
        return layer.draw_a(int(layer.drawn_after), heads)

    def _exchange_rounded(self, layers: list[LoraLinear], exchange: Exchange) -> list[Tensor] | None:
        """Return everyone's factors as their messages have them; errors and remembered products follow."""
        wire, parts, shapes = self.options.wire, [], []
        for layer in layers:
            rounded = {}
            for key in self.keys:
                factor = getattr(layer, key).detach()
                error_LX = self.errors[f"{layer.name}.{key}"]
                corrected_LX = error_LX.add_(factor.view(self.local, -1))
                message = encode(corrected_LX, wire)
                sent_LX = decode(message, corrected_LX.shape[1], wire, factor.dtype)
                corrected_LX.sub_(sent_LX)  # what rounding lost
                rounded[key] = sent_LX.reshape(factor.shape)
                parts.append(message)
                shapes.append(factor.shape)
            self._remember(layer, rounded.get("a", layer.a), rounded["b"])
            if self.options.reset == "ab":  # the lost part of a factor means nothing beside the next draw
                for key in self.keys:
                    self.errors[f"{layer.name}.{key}"].zero_()
        exchanged = exchange([tensor for message in parts for tensor in message])
        if exchanged is None:
            return None
        received = iter(exchanged)
        everyones = []
        for message, (heads, rows, columns) in zip(parts, shapes, strict=True):
            elements = heads // self.local * rows * columns
            decoded = decode([next(received) for _ in message], elements, wire, self.layers[0].weight.dtype)
            everyones.append(decoded.reshape(-1, rows, columns))
        return everyones

    def _merge_sums(self, layers: list[LoraLinear]) -> None:
        sums = [sum_of_products(layer.a, layer.b) for layer in layers]
        self.communicator.all_reduce(sums)
        for layer, sum_OI in zip(layers, sums, strict=True):
            torch.add(self._base(layer), sum_OI, alpha=self._share, out=layer.weight)
            self._remember(layer, layer.a.detach(), layer.b.detach())

    def _merge_compressed_deltas(self, layers: list[LoraLinear], compressed: CompressedMean) -> None:
        mean_X = compressed.mean(self._deltas(layer) for layer in layers)
        for layer, mean in zip(layers, mean_X.split([layer.weight.numel() for layer in layers]), strict=True):
            layer.weight.add_(mean.view_as(layer.weight))
            self._remember(layer, layer.a.detach(), layer.b.detach())

    def _deltas(self, layer: LoraLinear) -> Tensor:
        """Return each local device's change of W since the last merge, (L, O*I)."""
        per_device = layer.a.shape[0] // self.local
        deltas_LOI = []
        for first in range(0, layer.a.shape[0], per_device):
            heads = slice(first, first + per_device)
            delta_OI = sum_of_products(layer.a[heads], layer.b[heads])
            if layer.a0 is not None and layer.b0 is not None:
                delta_OI -= sum_of_products(layer.a0[heads], layer.b0[heads])
            deltas_LOI.append(delta_OI)
        return torch.stack(deltas_LOI).flatten(1).mul_(self.options.scale / self.options.heads_per_device)

    def _remember(self, layer: LoraLinear, a_HRI: Tensor, b_HOR: Tensor) -> None:
        if self.options.reset == "none":
            layer.remember_product(a_HRI, b_HOR)

    def _base(self, layer: LoraLinear) -> Tensor:
        if layer.start_weight is None:
            return layer.weight
        return layer.start_weight.to(layer.weight.device)

    def state(self) -> dict[str, Tensor]:
        """Return what rounding lost, by name."""
        named = {f"error.{name}": tensor for name, tensor in self.errors.items()}
        for message, mean in zip(self.dense_messages, self.means, strict=False):
            named.update({f"{key}.{message[0].name}": tensor for key, tensor in mean.state().items()})
        return named


def add_products(base_OI: Tensor, a_HRI: Tensor, b_HOR: Tensor, share: float, out: Tensor) -> None:
    """Write base + share·Σ_h B_h·A_h to `out`, (O, I): one matrix product, and not a dense delta beside it."""
    torch.addmm(base_OI, *_stacked(a_HRI, b_HOR), alpha=share, out=out)


def sum_of_products(a_HRI: Tensor, b_HOR: Tensor) -> Tensor:
    """Return Σ_h B_h·A_h, (O, I): the sum of products, which a product of sums is not."""
    b_OX, a_XI = _stacked(a_HRI, b_HOR)
    return b_OX @ a_XI


def _stacked(a_HRI: Tensor, b_HOR: Tensor) -> tuple[Tensor, Tensor]:
    """Return (O, H*R) and (H*R, I), whose product is the sum over heads of B_h·A_h."""
    return b_HOR.transpose(0, 1).reshape(b_HOR.shape[1], -1), a_HRI.reshape(-1, a_HRI.shape[2])
