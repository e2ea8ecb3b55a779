"""LTE whose norms and biases are trained otherwise: by the first device for all, as low-rank pairs, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simulate.config.run import Run
from simulate.methods.lte.options import LteOptions
from tests.reference.common import adamw, adapted_names, mean_loss
from tests.reference.lora import Draw
from tests.reference.lte import Device, Head, LteTwin


class VectorPair:
    """A vector v + s·(b·a − b0·a0) with a number a and a vector b."""

    def __init__(self, vector: Tensor, scale: float) -> None:
        self.value, self.scale = vector.detach().clone(), scale
        self.a = torch.ones(1, dtype=vector.dtype, requires_grad=True)
        self.b = torch.zeros_like(self.value, requires_grad=True)
        self.a0, self.b0 = torch.ones_like(self.a), torch.zeros_like(self.b)

    def effective(self) -> Tensor:
        """Return the vector that the network sees."""
        return self.value + self.scale * (self.b * self.a - self.b0 * self.a0)

    def start_round(self, merged: Tensor, reset: str) -> None:
        """Take over the merged vector; the pair begins anew, or goes on and is remembered."""
        self.value = merged.clone()
        if reset == "none":
            self.a0, self.b0 = self.a.detach().clone(), self.b.detach().clone()
        else:
            self.a.fill_(1.0)
            self.b.zero_()


class LayerDevice(Device):
    """A device that trains of its norms and biases only what the run says."""

    def __init__(self, run: Run, start: nn.Module, heads: list[Head], index: int) -> None:
        super().__init__(run, start, heads)
        options = run.method
        assert isinstance(options, LteOptions)
        norms, biases = parameter_names(start, nn.LayerNorm), parameter_names(start, nn.Linear, "bias")
        frozen = set(adapted_names(start)) | (biases if options.biases == "frozen" else set())
        if options.norms in ("none", "vector-lora") or (options.norms == "one" and index > 0):
            frozen |= norms
        named = dict(self.model.named_parameters())
        for name in frozen:
            named[name].requires_grad_(False)
        vectors = norms if options.norms == "vector-lora" else set()
        self.vectors = {name: VectorPair(named[name], self.scale) for name in named if name in vectors}
        pairs = [p for vector in self.vectors.values() for p in (vector.a, vector.b)]
        others = [p for name, p in named.items() if name not in frozen]
        self.replicated = [*pairs, *others]  # what the device's heads share
        adapters = [p for head in heads for p in head.parameters]
        rate = run.train.learning_rate
        self.optimizer = adamw(run.train, [(adapters + pairs, rate / self.scale), (others, rate)])

    def head_loss(self, head: Head, inputs: Tensor, targets: Tensor) -> Tensor:
        seen = {name: self.model.get_parameter(name) + self.scale * head.change(name) for name in head.a}
        seen.update({name: vector.effective() for name, vector in self.vectors.items()})
        return mean_loss(functional_call(self.model, seen, (inputs,)), targets)


class LteLayerTwin(LteTwin):
    """N such devices; the first one's norms are taken over where it trains them for all. Knows no fragments."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        assert self.options.fragments == 1
        self.norms = parameter_names(start, nn.LayerNorm)
        self.devices = [LayerDevice(run, start, device.heads, n) for n, device in enumerate(self.devices)]

    @torch.no_grad()
    def merge(self, fragment: int, steps_done: int) -> None:
        names = adapted_names(self.devices[0].model)
        self.merge_adapted(names)
        for name, parameter in self.devices[0].model.named_parameters():
            copies = tuple(device.model.get_parameter(name) for device in self.devices)
            if name in self.devices[0].vectors:
                self._merge_vectors(name, copies)
            elif name in self.norms and self.options.norms == "one":
                for copy in copies:
                    copy.copy_(parameter)
            elif name not in names:
                self.average([copies])
        for device in self.devices:
            for head in device.heads:
                for name in names:
                    self._start_round(device, head, name, steps_done)

    def _merge_vectors(self, name: str, copies: tuple[nn.Parameter, ...]) -> None:
        """v ← the mean of everyone's effective vectors: the products are averaged, not the factors."""
        vectors = [device.vectors[name] for device in self.devices]
        merged = sum(vector.effective() for vector in vectors) / len(vectors)
        for vector, copy in zip(vectors, copies, strict=True):
            vector.start_round(merged, self.options.reset)
            copy.copy_(merged)


def parameter_names(model: nn.Module, kind: type, only: str = "") -> set[str]:
    """Return the names of parameters that modules of a kind own."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kind)
        for name, _ in module.named_parameters(recurse=False)
        if only in ("", name)
    }
