"""LoRA-the-Explorer (Huh et al. 2024, arXiv 2402.16828, algorithm 1).

Every head h trains A_h, B_h on its own data against frozen W. Every T steps the heads' products are averaged into W:

    reset:       W ← W + (s/H)·Σ_h B_h·A_h,   then B_h ← 0  (and, with reset = "ab", A_h drawn anew)
    reset-less:  W ← W + (s/H)·Σ_h (B_h·A_h − B0_h·A0_h),   then A0_h, B0_h ← A_h, B_h

Reset-less merges telescope, since each one takes back the last: W = W0 + (s/H)·Σ_h B_h·A_h with the start weights W0.
So W0 is kept instead of everybody's old factors; nothing accumulates, neither rounding nor memory. Parameters outside
adapted layers belong to a device and are averaged with every merge. Optimizer state stays with its device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.adapters import AdapterSpec, LoraLinear, convert, lora_layers, merged_state
from simulate.communicator import Communicator
from simulate.config import LteOptions, Run
from simulate.costs.traffic import lte_buffer_sizes, pack
from simulate.methods.base import Method, clip_per_device


class Lte(Method):
    """LTE with or without reset, over any of the three transports."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        assert isinstance(run.method, LteOptions)
        assert run.method.quantize == "none", "quantised weights can be planned, not trained"
        self.options = run.method
        super().__init__(run, communicator, device, network)
        self.layers = lora_layers(self.model)
        adapters = {id(p) for layer in self.layers for p in (layer.a, layer.b)}
        self.adapter_parameters = [p for p in self.model.parameters() if id(p) in adapters]
        self.replicated_parameters = [p for p in self.model.parameters() if id(p) not in adapters]

    def prepare(self, model: nn.Module) -> nn.Module:
        spec = AdapterSpec(
            rank=self.options.rank,
            scale=self.options.scale,
            heads_per_device=self.options.heads_per_device,
            reset_less=self.options.reset == "none",
            first_device=self.communicator.local_devices.start,
            seed=self.run.train.seed,
        )
        return convert(model, self.local_devices, spec)

    def parameter_groups(self) -> list[dict[str, object]]:
        rate = self.run.train.learning_rate
        adapter_rate = self.options.adapter_learning_rate or rate / self.options.scale
        adapters = {
            f"{name}.{key}" for name, m in self.model.named_modules() if isinstance(m, LoraLinear) for key in "ab"
        }
        named = list(self.model.named_parameters())
        return [
            *self.decay_groups([pair for pair in named if pair[0] in adapters], adapter_rate),
            *self.decay_groups([pair for pair in named if pair[0] not in adapters], rate),
        ]

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        heads = self.options.heads_per_device
        losses_H = self.group_losses(inputs, targets, self.local_devices * heads)
        # The sum over heads gives each adapter the gradient of its own head's mean loss, whatever H is.
        losses_H.sum().backward()
        if heads > 1:  # what a device's heads share gets the device's mean
            torch._foreach_div_([p.grad for p in self.replicated_parameters if p.grad is not None], float(heads))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        clip_per_device(gradients, self.local_devices, self.run.train.clip_norm)
        self.apply_gradients(step)
        return losses_H.detach().view(self.local_devices, heads).mean(1)

    @property
    def round_steps(self) -> int:
        return self.options.merge_every

    @torch.no_grad()
    def merge(self, step: int) -> None:
        transport = self.options.merge_transport
        sizes = [self._travelling_bytes(layer) for layer in self.layers]
        for group in pack(lte_buffer_sizes(sizes, self.communicator.num_devices, transport)):
            self._merge_layers([self.layers[i] for i in group])
        parameters = self.replicated_parameters
        for group in pack([p[0].numel() * p.element_size() for p in parameters]):
            self._average([parameters[i] for i in group])
        for layer in self.layers:
            self._start_round(layer, step)

    def _travelling_bytes(self, layer: LoraLinear) -> tuple[int, int]:
        weight_bytes = layer.weight.numel() * layer.weight.element_size()
        if self.options.merge_transport == "reduce":
            return weight_bytes, 0
        elements = (layer.a.numel() + layer.b.numel()) // self.local_devices
        return elements * layer.a.element_size(), weight_bytes if self.options.merge_transport == "server" else 0

    def _merge_layers(self, layers: list[LoraLinear]) -> None:
        factors = [factor.detach() for layer in layers for factor in (layer.a, layer.b)]
        if self.options.merge_transport == "reduce":
            sums = [sum_of_products(layer.a, layer.b) for layer in layers]
            self.communicator.all_reduce(sums)
            for layer, sum_OI in zip(layers, sums, strict=True):
                torch.add(self._base(layer), sum_OI, alpha=self._share, out=layer.weight)
            return
        server = self.options.merge_transport == "server"
        everyones = self.communicator.push(factors) if server else self.communicator.all_gather(factors)
        for layer, a_HRI, b_HOR in zip(layers, everyones[::2], everyones[1::2], strict=True):
            add_products(self._base(layer), a_HRI, b_HOR, self._share, out=layer.weight)
        if server:
            self.communicator.pull([layer.weight for layer in layers])

    @property
    def _share(self) -> float:
        """s/H: the merge is a mean over all heads."""
        return self.options.scale / (self.communicator.num_devices * self.options.heads_per_device)

    def _base(self, layer: LoraLinear) -> Tensor:
        return layer.weight if layer.start_weight is None else layer.start_weight.to(layer.weight.device)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        if self.options.merge_transport == "server":
            means = [p.mean(0) for p in self.communicator.push([p.detach() for p in parameters])]
            self.communicator.pull(means)
        else:
            means = [p.detach().sum(0) for p in parameters]
            self.communicator.all_reduce(means)
            torch._foreach_div_(means, float(self.communicator.num_devices))
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.copy_(mean.expand_as(parameter))

    def _start_round(self, layer: LoraLinear, step: int) -> None:
        if self.options.reset == "none":
            layer.remember_product()
            return
        layer.b.zero_()
        if self.options.reset == "ab":
            layer.a.copy_(layer.draw_a(step + 1))

    def merged_state(self) -> dict[str, Tensor]:
        return merged_state(self.model)

    def _model_tensors(self) -> dict[str, Tensor]:
        start = {f"{layer.name}.start_weight": layer.start_weight for layer in self.layers}
        return {**super()._model_tensors(), **{name: w for name, w in start.items() if w is not None}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLinear) and f"model.{name}.a0" in state:
                module.remember_product()  # makes room for what is copied in next
        super().load_state(state)


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
