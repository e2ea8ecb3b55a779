"""Layers that train many devices in one tensor program: a leading axis holds each device's own parameters.

Legend: L local devices, K heads of a device, H = L*K local heads, M rows of one head (its samples times tokens),
R rank, I inputs, O outputs, C copies of a replicated parameter (L, or 1 where all devices share it).

Activations keep the plain layout (samples of device 0, samples of device 1, ...) in their first dimension, so any
network that treats dimension 0 as its batch works unchanged; only its parametric layers are swapped, by `convert`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.errors import InputError
from simulate.randomness import address


@dataclass(frozen=True)
class AdapterSpec:
    """What `convert` needs to build adapters: how many, how large, and whose draws."""

    rank: int
    scale: float
    heads_per_device: int
    reset_less: bool
    first_device: int
    """Global index of this process's first device: draws are addressed by global head."""
    seed: int
    draws_per_head: int = 1
    """Independent draws of `rank` rows that make up one head's A."""


class _LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ − s·(x·A0ᵀ)·B0ᵀ + bias for H heads that share W; saves x and s·x·Aᵀ only.

    Beside the frozen product, forward and backward to x cost 2 small products each and the factors' gradients 2 more:
    4P + 6P_adapter operations a row against the dense 6P. Everything adds in place onto the frozen product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_LO: Tensor | None, a_HRI: Tensor, b_HOR: Tensor,
        a0_HRI: Tensor | None, b0_HOR: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        heads, _, inputs = a_HRI.shape
        x_HMI = x.reshape(heads, -1, inputs)
        y_HMO = (x_HMI.reshape(-1, inputs) @ weight_OI.t()).view(heads, -1, weight_OI.shape[0])
        us_HMR = torch.bmm(x_HMI, a_HRI.transpose(1, 2)).mul_(scale)
        y_HMO.baddbmm_(us_HMR, b_HOR.transpose(1, 2))
        if a0_HRI is not None and b0_HOR is not None:
            y_HMO.baddbmm_(torch.bmm(x_HMI, a0_HRI.transpose(1, 2)), b0_HOR.transpose(1, 2), alpha=-scale)
        if bias_LO is not None:
            y_HMO.view(bias_LO.shape[0], -1, bias_LO.shape[1]).add_(bias_LO.unsqueeze(1))
        ctx.save_for_backward(x_HMI, us_HMR, weight_OI, a_HRI, b_HOR, a0_HRI, b0_HOR)
        ctx.scale, ctx.num_bias = scale, 0 if bias_LO is None else bias_LO.shape[0]
        return y_HMO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_HMI, us_HMR, weight_OI, a_HRI, b_HOR, a0_HRI, b0_HOR = ctx.saved_tensors
        (grad_y,) = grads
        outputs, inputs = weight_OI.shape
        g_HMO = grad_y.reshape(x_HMI.shape[0], -1, outputs)
        vs_HMR = torch.bmm(g_HMO, b_HOR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            gx_HMI = (g_HMO.reshape(-1, outputs) @ weight_OI).view(x_HMI.shape)
            gx_HMI.baddbmm_(vs_HMR, a_HRI)
            if a0_HRI is not None:
                gx_HMI.baddbmm_(torch.bmm(g_HMO, b0_HOR), a0_HRI, alpha=-ctx.scale)
            grad_x = gx_HMI.view(*grad_y.shape[:-1], inputs)
        grad_bias = g_HMO.view(ctx.num_bias, -1, outputs).sum(1) if ctx.num_bias else None
        grad_a = torch.bmm(vs_HMR.transpose(1, 2), x_HMI)
        grad_b = torch.bmm(g_HMO.transpose(1, 2), us_HMR)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None


lora_function = _LoraLinear.apply


class LoraLinear(nn.Module):
    """A linear layer with frozen W (a buffer, shared by all local devices) and one LoRA pair per head.

    Effective weight of head h: W + s·B_h·A_h, and in reset-less mode − s·B0_h·A0_h, the product at the last merge.
    A starts orthogonal times sqrt(I/r), every head with its own draw; B starts at 0 (arXiv 2402.16828, section 3).
    """

    def __init__(self, linear: nn.Linear, name: str, spec: AdapterSpec, devices: int) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        heads, (outputs, inputs) = devices * spec.heads_per_device, linear.weight.shape
        self.register_buffer("weight", linear.weight.detach())
        self.bias = None if linear.bias is None else replicate(linear.bias, devices)
        rank = spec.rank * spec.draws_per_head
        self.a = nn.Parameter(linear.weight.new_empty(heads, rank, inputs))
        self.b = nn.Parameter(linear.weight.new_zeros(heads, outputs, rank))
        with torch.no_grad():
            self.a.copy_(self.draw_a(0))
        self.register_buffer("a0", None)
        self.register_buffer("b0", None)
        # W0 never changes: with the old product subtracted, merges telescope to W = W0 + (s/H)·Σ B_h·A_h. It is read
        # at merges only, so it is no buffer: it stays in host memory when the module moves to a GPU.
        self.start_weight = self.weight.cpu().clone() if spec.reset_less else None

    weight: Tensor
    a0: Tensor | None
    b0: Tensor | None

    def factors(self) -> Iterator[nn.Parameter]:
        """Yield the trained factors."""
        yield from (self.a, self.b)

    def draw_a(self, merges: int) -> Tensor:
        """Return fresh A for the local heads, addressed by (seed, layer, global head, merges): rows orthogonal."""
        rank, inputs = self.spec.rank, self.a.shape[2]
        heads = self.a.shape[0] * self.spec.draws_per_head
        first = self.spec.first_device * self.spec.heads_per_device
        normal_HIR = torch.empty(heads, inputs, rank, dtype=torch.float64)
        for head in range(heads):
            seed = address(self.spec.seed, "adapter", self.name, first + head, merges)
            normal_HIR[head].normal_(generator=torch.Generator().manual_seed(seed))
        q_HIR, r_HRR = torch.linalg.qr(normal_HIR)
        q_HIR *= r_HRR.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
        return (q_HIR.transpose(1, 2) * math.sqrt(inputs / rank)).reshape(self.a.shape).to(self.a)

    def remember_product(self, a_HRI: Tensor, b_HOR: Tensor) -> None:
        """Keep B·A as it was merged: what the next merges must not count twice."""
        if self.a0 is None or self.b0 is None:
            self.a0, self.b0 = torch.empty_like(self.a), torch.empty_like(self.b)
        self.a0.copy_(a_HRI)
        self.b0.copy_(b_HOR)

    def folded_weight(self) -> Tensor:
        """Return W + s·mean_h(B_h·A_h), (O, I): the one weight that unmerged adapters amount to."""
        product_HOI = self.b.detach() @ self.a.detach()
        return torch.add(self.weight, product_HOI.mean(0), alpha=self.spec.scale)

    def forward(self, x: Tensor) -> Tensor:
        return lora_function(x, self.weight, self.bias, self.a, self.b, self.a0, self.b0, self.spec.scale)


class ReplicatedLinear(nn.Module):
    """A linear layer of which every device trains its own full copy (C = L), or all share one (C = 1)."""

    def __init__(self, weight_COI: nn.Parameter, bias_CO: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight_COI, bias_CO

    def forward(self, x: Tensor) -> Tensor:
        copies, outputs, inputs = self.weight.shape
        if copies == 1:  # views, not indexing: their gradient is written in place instead of copied
            return F.linear(
                x, self.weight.view(outputs, inputs), None if self.bias is None else self.bias.view(outputs)
            )
        x_CMI = x.reshape(copies, -1, inputs)
        w_CIO = self.weight.transpose(1, 2)
        y = torch.bmm(x_CMI, w_CIO) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x_CMI, w_CIO)
        return y.view(*x.shape[:-1], outputs)


class ReplicatedEmbedding(nn.Module):
    """An embedding table per device, (C, V, D)."""

    def __init__(self, weight_CVD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_CVD

    def forward(self, index: Tensor) -> Tensor:
        copies, vocab, width = self.weight.shape
        if copies > 1:
            offset = torch.arange(copies, device=index.device) * vocab
            index = (index.reshape(copies, -1) + offset.unsqueeze(1)).view(index.shape)
        # No view where copies are one storage, expanded over devices.
        return F.embedding(index, self.weight.reshape(copies * vocab, width))


class _ReplicatedLayerNorm(torch.autograd.Function):
    """Layer norm over the last dimension with C affine pairs; saves its input and two numbers a row, like torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CD: Tensor, bias_CD: Tensor, epsilon: float) -> Tensor:
        copies, width = weight_CD.shape
        x = x.contiguous()
        y, mean, rstd = torch.native_layer_norm(x, [width], None, None, epsilon)
        y.view(copies, -1, width).mul_(weight_CD.unsqueeze(1)).add_(bias_CD.unsqueeze(1))
        ctx.save_for_backward(x, mean, rstd, weight_CD)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight_CD = ctx.saved_tensors
        copies, width = weight_CD.shape
        g_CMD = grads[0].reshape(copies, -1, width)
        normed_CMD = ((x - mean) * rstd).reshape(copies, -1, width)
        grad_weight, grad_bias = (g_CMD * normed_CMD).sum(1), g_CMD.sum(1)
        scaled = (g_CMD * weight_CD.unsqueeze(1)).reshape(x.shape)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            scaled, x, [width], mean, rstd, None, None, [True, False, False]
        )
        return grad_x, grad_weight, grad_bias, None


class ReplicatedLayerNorm(nn.Module):
    """LayerNorm whose affine pair every device trains for itself (C = L), or all share (C = 1)."""

    def __init__(self, norm: nn.LayerNorm, weight_CD: nn.Parameter, bias_CD: nn.Parameter) -> None:
        super().__init__()
        self.epsilon, self.weight, self.bias = norm.eps, weight_CD, bias_CD

    def forward(self, x: Tensor) -> Tensor:
        copies, width = self.weight.shape
        if copies == 1:
            return F.layer_norm(x, [width], self.weight.view(width), self.bias.view(width), self.epsilon)
        return _ReplicatedLayerNorm.apply(x, self.weight, self.bias, self.epsilon)


def replicate(parameter: Tensor, copies: int) -> nn.Parameter:
    """Return a parameter with a leading axis of equal copies."""
    one = parameter.detach().unsqueeze(0)
    return nn.Parameter(one if copies == 1 else one.repeat(copies, *(1,) * parameter.ndim))


MakeAdapter = Callable[[nn.Linear, str], nn.Module]
"""(layer, its name) → what takes its place."""


def lora(spec: AdapterSpec, devices: int) -> MakeAdapter:
    """Return what makes LoRA layers for `devices` local devices."""
    return lambda linear, name: LoraLinear(linear, name, spec, devices)


def convert(model: nn.Module, copies: int, make_adapter: MakeAdapter | None = None) -> nn.Module:
    """Swap a plain network's parametric layers, in place, for ones with `copies` sets of parameters.

    With `make_adapter`, every nn.Linear whose weight is not tied to another module goes through it. Raises InputError
    for a module with parameters that is neither Linear, LayerNorm nor Embedding.
    """
    replicas: dict[int, nn.Parameter] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def replica(parameter: Tensor) -> nn.Parameter:
        if id(parameter) not in replicas:
            replicas[id(parameter)] = replicate(parameter, copies)
        return replicas[id(parameter)]

    def swapped(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear):
            if make_adapter is not None and owners[id(module.weight)] == 1:
                return make_adapter(module, name)
            return ReplicatedLinear(replica(module.weight), None if module.bias is None else replica(module.bias))
        if isinstance(module, nn.Embedding):
            return ReplicatedEmbedding(replica(module.weight))
        if isinstance(module, nn.LayerNorm):
            return ReplicatedLayerNorm(module, replica(module.weight), replica(module.bias))
        raise InputError(
            f"model: {name} is a {type(module).__name__}, whose parameters cannot be trained per device; "
            "use Linear, LayerNorm and Embedding layers"
        )

    plain = [(n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    for name, module in plain:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, swapped(name, module))
    return model


def lora_layers(model: nn.Module) -> list[LoraLinear]:
    """Return the adapted layers in the order of the network."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def merged_state(model: nn.Module, instead: dict[int, Tensor] | None = None, fold: bool = False) -> dict[str, Tensor]:
    """Return one plain model's weights by the plain network's names; right just after a merge (or for shared copies).

    Replicated parameters are taken from the first copy: after a merge all copies are equal. `instead` gives other
    values, (...) without a copies axis, by the parameter's id. With `fold`, adapters that are never merged are added.
    """
    state: dict[str, Tensor] = {}
    other = instead or {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, LoraLinear) or key == "bias":
                state[f"{name}.{key}"] = other.get(id(parameter), parameter[0].detach())
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.folded_weight() if fold else module.weight
    return state
