"""Layers of which every device trains its own copy of all parameters: C copies in one tensor program.

Parameters without an adapter (embeddings, norms, biases, all weights of dense methods) differ between devices until
they are averaged, so they need one copy a device. simulate.layers.convert puts these layers into a network.

Legend: L local devices, C copies (L, or 1 if all devices share one), M rows of one copy (its samples times tokens),
I inputs, O outputs, V vocabulary, D width. A frozen parameter is a buffer with one copy.

Activations keep the plain layout (samples of device 0, samples of device 1, ...) in their first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from simulate.common.errors import InputError
from simulate.layers.dtypes import product_dtype
from simulate.layers.products import copies_linear


def replicate(parameter: Tensor, copies: int) -> Tensor:
    """Return a parameter with a leading axis of equal copies; a single copy shares the parameter's memory.

    A frozen one stays a single copy, and is no parameter, so that nothing counts, sends or steps it.
    """
    one = parameter.detach().unsqueeze(0)
    if not parameter.requires_grad:
        return one
    return nn.Parameter(one if copies == 1 else one.repeat(copies, *(1,) * parameter.ndim))


class Replicated(nn.Module):
    """Base of layers whose parameters have a copies axis, under the plain layer's names."""

    def hold(self, name: str, tensor: Tensor | nn.Module | None) -> None:
        """Register a parameter, a frozen tensor (as a buffer), a VectorLora or None under the plain layer's name."""
        if isinstance(tensor, nn.Parameter | nn.Module) or tensor is None:
            setattr(self, name, tensor)
        else:
            self.register_buffer(name, tensor)

    def plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain layer's parameters, each with its copies axis."""
        for name, parameter in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            yield name, parameter
        for name, module in self.named_children():
            if isinstance(module, VectorLora):
                yield name, module.value


def copies_of(tensor: Tensor | VectorLora) -> Tensor:
    """Return the effective values, (C, ...), of a parameter with copies."""
    return tensor() if isinstance(tensor, VectorLora) else tensor


class VectorLora(nn.Module):
    """Frozen vector with a low-rank pair for each device: v + s·b_n·a_n − s·b0_n·a0_n, with b (D, 1) and a (1, 1).

    It trains the affine parameters of norms as LoRA trains matrices (arXiv 2402.16828, section 3), and is merged like
    LTE's pairs. b starts at 0, and a at 1: up to its sign the only orthogonal 1x1 matrix.
    """

    def __init__(self, vector: Tensor, devices: int, scale: float, remembers: bool) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("value", vector.detach().clone().unsqueeze(0))
        self.a = nn.Parameter(vector.new_ones(devices, 1))
        self.b = nn.Parameter(vector.new_zeros(devices, len(vector)))
        self.register_buffer("a0", torch.ones_like(self.a.detach()) if remembers else None)
        self.register_buffer("b0", torch.zeros_like(self.b.detach()) if remembers else None)
        self.register_buffer("merged", self.value.repeat(devices, 1))
        """Effective vectors of all local devices, (L, D), in which a merge averages them."""

    value: Tensor
    merged: Tensor
    a0: Tensor | None
    b0: Tensor | None

    def forward(self) -> Tensor:
        change_LD = self.b * self.a  # a vector's low-rank pair: (D, 1)·(1, 1)
        if self.a0 is not None and self.b0 is not None:
            change_LD = change_LD - self.b0 * self.a0
        return self.value + self.scale * change_LD

    def factors(self) -> Iterator[nn.Parameter]:
        """Yield the trained factors."""
        yield from (self.a, self.b)

    def start_round(self) -> None:
        """Copy the merged vector into `value`, then reset the pair, or in reset-less mode store it as a0 and b0."""
        self.value.copy_(self.merged[:1])
        if self.a0 is not None and self.b0 is not None:
            self.a0.copy_(self.a.detach())
            self.b0.copy_(self.b.detach())
        else:
            self.a.detach().fill_(1.0)
            self.b.detach().zero_()


class ReplicatedLinear(Replicated):
    """Linear layer of which every device trains its own copy (C = L), or all devices share one (C = 1)."""

    def __init__(self, weight_COI: Tensor, bias_CO: Tensor | None) -> None:
        super().__init__()
        self.hold("weight", weight_COI)
        self.hold("bias", bias_CO)

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        copies, outputs, inputs = self.weight.shape
        if copies == 1:  # a view's gradient is written in place, that of an index is copied
            bias = None if self.bias is None else self.bias.view(outputs)
            return F.linear(x, self.weight.view(outputs, inputs), bias)
        x_CMI = x.reshape(copies, -1, inputs)  # dimension 0 is device by device, so that this is a view
        if product_dtype(x) == self.weight.dtype:
            y: Tensor = copies_linear(x_CMI, self.weight, self.bias)
        else:  # autocast casts the inputs of torch's own operations only
            w_CIO = self.weight.transpose(1, 2)
            y = torch.bmm(x_CMI, w_CIO) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x_CMI, w_CIO)
        return y.view(*x.shape[:-1], outputs)


class ReplicatedConv1d(ReplicatedLinear):
    """transformers' Conv1D, a linear layer with the transposed weight: (C, I, O)."""

    def forward(self, x: Tensor) -> Tensor:
        copies, inputs, outputs = self.weight.shape
        x_CMI, w_CIO = x.reshape(copies, -1, inputs), self.weight
        y = torch.bmm(x_CMI, w_CIO) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x_CMI, w_CIO)
        return y.view(*x.shape[:-1], outputs)


@dataclass
class Batch:
    """Batch size of the network's current call, for layers whose own input has no batch dimension."""

    samples: int = 0
    """Samples of all copies together."""


class ReplicatedEmbedding(Replicated):
    """Embedding table of each device, (C, V, D).

    With `batch`, all samples share one index, without a batch dimension or with one of size 1. The index is then
    repeated for each sample, since devices have different tables.
    """

    def __init__(self, weight_CVD: Tensor, batch: Batch | None = None) -> None:
        super().__init__()
        self.hold("weight", weight_CVD)
        self.batch = batch

    weight: Tensor

    def forward(self, index: Tensor) -> Tensor:
        copies, vocab, width = self.weight.shape
        if self.batch is not None and copies > 1:
            one = index if index.ndim > 1 and index.shape[0] == 1 else index.unsqueeze(0)
            index = one.expand(self.batch.samples, *one.shape[1:])
        if copies > 1:  # one lookup in all tables side by side
            offset = torch.arange(copies, device=index.device) * vocab
            index = (index.reshape(copies, -1) + offset.unsqueeze(1)).view(index.shape)
        # `reshape`, since a table that is expanded over devices has no such view.
        return F.embedding(index, self.weight.reshape(copies * vocab, width))


class ReplicatedConv2d(Replicated):
    """Convolution of each device; the copies run as groups of one convolution over their channels side by side."""

    def __init__(self, conv: nn.Conv2d, weight_COIYX: Tensor, bias_CO: Tensor | None) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.hold("weight", weight_COIYX)
        self.hold("bias", bias_CO)

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        copies, outputs = self.weight.shape[:2]
        samples = x.shape[0] // copies
        # Samples of all devices side by side in the channels: one grouped convolution is one kernel.
        x_SCYX = x.view(copies, samples, *x.shape[1:]).transpose(0, 1).reshape(samples, -1, *x.shape[2:])
        bias = None if self.bias is None else self.bias.expand(copies, outputs).reshape(-1)
        y = F.conv2d(
            x_SCYX, self.weight.flatten(0, 1), bias, self.stride, self.padding, self.dilation, copies * self.groups
        )
        return y.view(samples, copies, outputs, *y.shape[2:]).transpose(0, 1).flatten(0, 1)


class _ReplicatedLayerNorm(torch.autograd.Function):
    """Layer norm over the last dimension with C affine pairs; saves its input and two numbers a row, like torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CD: Tensor, bias_CD: Tensor, epsilon: float) -> Tensor:
        copies, width = weight_CD.shape
        x = x.contiguous()
        # An affine pair of ones and zeros, because torch's pass takes twice as long on a CPU without any.
        y, mean, rstd = torch.native_layer_norm(x, [width], x.new_ones(width), x.new_zeros(width), epsilon)
        y_CMD = y.view(copies, -1, width)
        torch.addcmul(bias_CD.unsqueeze(1), y_CMD, weight_CD.unsqueeze(1), out=y_CMD)
        ctx.save_for_backward(x, mean, rstd, weight_CD, bias_CD)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight_CD, bias_CD = ctx.saved_tensors
        copies, width = weight_CD.shape
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight_CD), torch.empty_like(bias_CD)
        # torch's own backward pass, copy by copy: composed of operations on the whole batch it would take seven passes.
        rows = (t.reshape(copies, -1, width).unbind() for t in (grads[0], x, grad_x))
        statistics = (mean.view(copies, -1, 1).unbind(), rstd.view(copies, -1, 1).unbind())
        affine = (t.unbind() for t in (weight_CD, bias_CD, grad_weight, grad_bias))
        for g_MD, x_MD, grad_x_MD, mean_M1, rstd_M1, weight_D, bias_D, grad_weight_D, grad_bias_D in zip(
            *rows, *statistics, *affine, strict=True
        ):
            parts = torch.ops.aten.native_layer_norm_backward(
                g_MD, x_MD, [width], mean_M1, rstd_M1, weight_D, bias_D, [True, True, True]
            )
            for whole, part in zip((grad_x_MD, grad_weight_D, grad_bias_D), parts, strict=True):
                whole.copy_(part)
        return grad_x, grad_weight, grad_bias, None


class ReplicatedLayerNorm(Replicated):
    """LayerNorm whose affine pair every device trains for itself (C = L), all share, or nobody trains (C = 1)."""

    def __init__(self, norm: nn.LayerNorm, weight_CD: Tensor | VectorLora, bias_CD: Tensor | VectorLora | None) -> None:
        super().__init__()
        self.epsilon = norm.eps
        self.hold("weight", weight_CD)
        self.hold("bias", bias_CD)

    weight: Tensor | VectorLora
    bias: Tensor | VectorLora | None

    def forward(self, x: Tensor) -> Tensor:
        weight_CD = copies_of(self.weight)
        bias_CD = torch.zeros_like(weight_CD) if self.bias is None else copies_of(self.bias)
        copies, width = weight_CD.shape
        x = x.to(weight_CD.dtype)  # norms compute in their weights' dtype, also under autocast
        if copies == 1:
            return F.layer_norm(x, [width], weight_CD.view(width), bias_CD.view(width), self.epsilon)
        return _ReplicatedLayerNorm.apply(x, weight_CD, bias_CD, self.epsilon)


class _ReplicatedRmsNorm(torch.autograd.Function):
    """y = x·w/rms(x) over the last dimension with C weights; saves its input and one number a row.

    With n = x/rms(x) and g the gradient of y: ∂/∂w = Σ g·n, ∂/∂x = (g·w − n·mean(g·w·n))/rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CD: Tensor, epsilon: float) -> Tensor:
        copies, width = weight_CD.shape
        x_CMD = x.contiguous().view(copies, -1, width)
        square_CM = torch.linalg.vector_norm(x_CMD, dim=-1).square_() / width
        inverse_CM1 = (square_CM + epsilon).rsqrt_().unsqueeze(2)
        ctx.save_for_backward(x_CMD, inverse_CM1, weight_CD)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # no view, or nobody could write to it in place
        torch.mul(x_CMD, inverse_CM1, out=y.view(x_CMD.shape)).mul_(weight_CD.unsqueeze(1))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_CMD, inverse_CM1, weight_CD = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_CMD), torch.empty_like(weight_CD)
        g_CMD = grads[0].reshape(x_CMD.shape)
        for c in range(len(weight_CD)):  # copy by copy, so that scratch has the size of one copy
            normal_MD = x_CMD[c] * inverse_CM1[c]
            torch.mul(g_CMD[c], normal_MD, out=grad_x[c])
            torch.sum(grad_x[c], 0, out=grad_weight[c])
            along_M1 = (grad_x[c] @ weight_CD[c]).div_(weight_CD.shape[1]).unsqueeze(1)
            torch.mul(g_CMD[c], weight_CD[c], out=grad_x[c])
            grad_x[c].sub_(normal_MD.mul_(along_M1)).mul_(inverse_CM1[c])
        return grad_x.view(grads[0].shape), grad_weight, None


class ReplicatedRmsNorm(Replicated):
    """RMSNorm whose weight every device trains for itself (C = L), all share, or nobody trains (C = 1)."""

    def __init__(self, epsilon: float | None, weight_CD: Tensor | VectorLora) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.hold("weight", weight_CD)

    weight: Tensor | VectorLora

    def forward(self, x: Tensor) -> Tensor:
        weight_CD = copies_of(self.weight)
        x = x.to(weight_CD.dtype)  # norms compute in their weights' dtype, also under autocast
        # torch's default for an unset epsilon is the dtype's machine epsilon.
        epsilon = torch.finfo(x.dtype).eps if self.epsilon is None else self.epsilon
        y: Tensor = _ReplicatedRmsNorm.apply(x, weight_CD, epsilon)
        return y


def take_storage(module: nn.Module) -> None:
    """Replace a module's parameters by ones without storage; shared ones stay shared."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, empty[id(parameter)])


class HeadOfLayer(nn.Module):
    """Stands in for a plain layer in a module that runs copy by copy: the layer that replaces it, for the head at work.

    Its weight may be read, as modules do that hand it to a function of their own.
    """

    def __init__(self, plain: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.bias = plain.bias  # among the module's own parameters: its adapted layer has none
        # In lists: the layer is registered in the ReplicatedModule, and the plain one is asked for its sizes alone.
        self.plain, self.layer = [plain], [layer]
        take_storage(plain)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer[0](x)
        if not isinstance(self.bias, Tensor):
            return y
        return y + (self.bias[:, None, None] if isinstance(self.plain[0], nn.Conv2d) else self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            layer: Any = self.layer[0]
            return layer.weight_of_head()
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self).get("plain", [None])[0], name)


class ReplicatedModule(nn.Module):
    """Module of any other kind: each device's samples go through its own copy of the parameters, device by device.

    `tensors` are the module's own parameters by name, with a copies axis; frozen ones have one copy for all. Tensor
    arguments with as many rows as the first one are divided between copies; all other arguments go to every copy, and
    so do those whose place among the call's arguments is in `unbatched`. Results that all samples share, whose place k
    is there as −1 − k, are repeated for each sample of `batch`. Buffers are shared, so the module must not write to
    them in training. `adapters` are adapted layers by the names that their plain ones, now HeadOfLayer, have in the
    module; where there are any, it runs head by head.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        unbatched: Collection[int] = (),
        batch: Batch | None = None,
        adapters: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.unbatched, self.batch = unbatched, batch
        # Checkpoints name trained ones by their number.
        self.stacked = nn.ParameterList(t for t in tensors.values() if isinstance(t, nn.Parameter))
        trained, self.places = iter(range(len(self.stacked))), dict[str, int | str]()
        for index, (name, tensor) in enumerate(tensors.items()):
            if isinstance(tensor, nn.Parameter):
                self.places[name] = next(trained)
            else:
                self.places[name] = f"frozen{index}"
                self.register_buffer(f"frozen{index}", tensor)
        positions = {id(parameter): name for name, parameter in module.named_parameters()}
        self.all_names = {n: positions[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}
        # In a list, so that the plain module's own parameters are not registered and trained.
        self.plain = [module]
        self.adapters: list[Any] = list(dict.fromkeys((adapters or {}).values()))
        for name, layer in (adapters or {}).items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for step in path:  # so that it has the plain layer's name
                parent = parent._modules.setdefault(step, nn.Module())  # type: ignore[assignment]
            parent._modules[last] = layer

    def __getattr__(self, name: str) -> Any:
        """Return a buffer of the plain module, which networks read, such as an embedding's indices of positions."""
        plain = self.__dict__.get("plain")
        if plain and name in plain[0]._buffers:
            return plain[0]._buffers[name]
        return super().__getattr__(name)

    def _tensor(self, name: str) -> Tensor:
        place = self.places[name]
        tensor: Tensor = self.stacked[place] if isinstance(place, int) else getattr(self, place)
        return tensor

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.plain[0].train(self.training)
        tensors = {name: self._tensor(name) for name in self.places}
        # A device's heads share its copy of what is not adapted.
        copies = max([*map(len, tensors.values()), *(len(layer.factors_in_use()[1]) for layer in self.adapters)])
        if copies == 1:
            own = {name: tensor[0] for name, tensor in tensors.items()}
            return functional_call(self.plain[0], own, arguments, keywords)
        leaves, structure = tree_flatten((arguments, keywords))
        rows = [
            len(leaf) if isinstance(leaf, Tensor) and leaf.ndim and index not in self.unbatched else None
            for index, leaf in enumerate(leaves)
        ]
        samples = next((count for count in rows if count is not None), None)
        if samples is None and all(place >= 0 for place in self.unbatched):
            raise InputError(
                f"{type(self.plain[0]).__name__} gets no tensor with a row for each sample, so that it cannot give "
                "each device's samples its own parameters' result; pass it what depends on the samples"
            )
        parts = []
        for copy in range(copies):
            own = {name: tensor[copy * len(tensor) // copies] for name, tensor in tensors.items()}
            cut = [
                leaf.chunk(copies)[copy] if count is not None and count == samples else leaf
                for leaf, count in zip(leaves, rows, strict=True)
            ]
            args, kwargs = tree_unflatten(cut, structure)
            with self._at_head(copy):
                parts.append(functional_call(self.plain[0], own, args, kwargs))
        _, structure = tree_flatten(parts[0])
        results = zip(*(tree_leaves(part) for part in parts), strict=True)
        return tree_unflatten([self._joined(place, same) for place, same in enumerate(results)], structure)

    @contextmanager
    def _at_head(self, head: int) -> Iterator[None]:
        for layer in self.adapters:
            layer.head = head
        try:
            yield
        finally:
            for layer in self.adapters:
                layer.head = None

    def _joined(self, place: int, same: Sequence[Any]) -> Any:
        """Return the copies' results at one place as one."""
        if not isinstance(same[0], Tensor):
            return same[0]
        if -1 - place not in self.unbatched:
            return torch.cat(list(same))
        assert self.batch is not None
        ones = [result if result.ndim > 1 and len(result) == 1 else result.unsqueeze(0) for result in same]
        return torch.cat([one.expand(self.batch.samples // len(ones), *one.shape[1:]) for one in ones])

    def plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain module's parameters, each with its copies axis; a tied one under each of its names."""
        for name, first in self.all_names.items():
            yield name, self._tensor(first)

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> ReplicatedModule:
        """Move the plain module's buffers along with this module; it is not registered, so torch would leave them."""
        super()._apply(change, recurse)
        for module in self.plain[0].modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, change(buffer))
        return self
