"""Conversion of a plain network into one that trains many devices at once, and back into one plain model's weights.

Networks are written for one device. `convert` gives each layer an axis of copies or LoRA heads, so that a single tensor
program trains all local devices; methods call it when they are built. `merged_state` is the way back, for evaluation,
checkpoints and exports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from simulate.common.errors import InputError
from simulate.layers.attention import PerDeviceAttention, is_plain_attention
from simulate.layers.formats import Biases, Convolutions, Norms
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear
from simulate.layers.per_device import (
    Batch,
    HeadOfLayer,
    Replicated,
    ReplicatedConv1d,
    ReplicatedConv2d,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    ReplicatedModule,
    ReplicatedRmsNorm,
    VectorLora,
    replicate,
    take_storage,
)

MakeAdapter = Callable[[nn.Linear | nn.Conv2d, str, Tensor | None], nn.Module]
"""Function of (layer, its name, its bias with a copies axis) that returns the layer's replacement."""
MakeVector = Callable[[Tensor], VectorLora]
"""Function of a norm's affine parameter that returns its replacement."""


@dataclass(frozen=True)
class ConversionSpec:
    """Choice of each layer's replacement; by default nothing is adapted and every device trains a copy of all."""

    make_adapter: MakeAdapter | None = None
    make_vector: MakeVector | None = None
    """Adapts the affine parameters of norms if `norms` is "vector-lora"."""
    norms: Norms = "average"
    biases: Biases = "average"
    convolutions: Convolutions = "lora"


EVERYTHING_TRAINED = ConversionSpec()


def lora(spec: AdapterSpec, devices: int) -> MakeAdapter:
    """Return the function that replaces a layer by a LoRA layer of `devices` local devices."""

    def make(layer: nn.Linear | nn.Conv2d, name: str, bias_LO: Tensor | None) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            return LoraConv2d(layer, bias_LO, name, spec, devices)
        return LoraLinear(layer.weight, bias_LO, name, spec, devices)

    return make


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ATTENTIONS = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
_OWN = frozenset({"weight", "bias", "out_proj", *_ATTENTIONS})
"""Names of the parameters and modules that a layer with a replacement has; it has no buffers."""
_LISTS = (nn.ParameterList, nn.ParameterDict)
"""Modules that hold parameters for the module around them, which reads them."""


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind and computes just what that kind does, so that another may stand in for it.

    A subclass with a forward of its own, a hook and a parametrized weight each compute something else; a buffer, or a
    parameter more, that a user hung on a layer would get lost.
    """
    held = {**module._parameters, **module._modules}
    return (
        isinstance(module, kind)
        # What nn.Conv2d computes stands in a function beside its forward.
        and all(getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
        and "forward" not in vars(module)
        and not is_parametrized(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and _OWN.issuperset(key for key, value in held.items() if value is not None)
        and all(buffer is None for buffer in module._buffers.values())
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, the linear layer of its GPT-2, whose weight is transposed."""
    library = sys.modules.get("transformers.pytorch_utils")  # an import would cost seconds, and prove nothing
    return library is not None and computes_as(module, library.Conv1D)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes what nn.RMSNorm does: torch's own, or a copy of Llama's in transformers."""
    if isinstance(module, nn.RMSNorm):
        return computes_as(module, nn.RMSNorm) and len(module.normalized_shape) == 1
    kind = type(module)
    if not computes_as(module, kind):  # a hook on it
        return False
    if not (kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("RMSNorm")):
        return False
    # Gemma's multiplies by 1 + weight; its epsilon has another name, which keeps it out.
    return hasattr(module, "variance_epsilon") and [name for name, _ in module.named_parameters()] == ["weight"]


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise InputError for a network with batch normalisation."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise InputError(
                f"model: {name} is a {type(module).__name__}, whose running statistics mix samples and belong to no "
                "device's parameters; use LayerNorm, RMSNorm or GroupNorm"
            )


def convert(model: nn.Module, copies: int, spec: ConversionSpec = EVERYTHING_TRAINED) -> nn.Module:
    """Replace a plain network's parametric layers, in place, by ones with `copies` sets of parameters.

    The spec's `make_adapter`, if there is one, replaces every nn.Linear, nn.Conv2d, Conv1D of transformers and
    projection of nn.MultiheadAttention, except those whose weight is tied to another module and those that the network
    names in `trained_whole`. A module of unknown kind with parameters runs copy by copy, and so does all of a network
    that owns parameters itself, or is marked as `whole`. Its `unbatched` maps names of modules to the places of
    arguments, and of results as −1 − k, that all samples share. Parameters with requires_grad = False stay what they
    are, as buffers of one copy. Raises InputError for batch normalisation.
    """
    refuse_batch_norm(model)
    converter, buffers = _Converter(model, copies, spec), _persistent_buffers(model)
    if runs_whole(model):
        root = converter.copy_by_copy("", model)
        for mark in ("unused", "trained_whole"):
            setattr(root, mark, getattr(model, mark, ()))
        root.plain_buffers = buffers  # type: ignore[assignment]
        take_storage(model)
        return root
    model.plain_buffers = buffers  # type: ignore[assignment]
    if converter.unbatched:
        model.register_forward_pre_hook(converter.count_samples)
    # The list holds ids, not modules: it would keep all plain weights in memory until the last layer is replaced.
    for name, key in [(name, id(module)) for name, module in _parametric(model)]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, converter.replacement(name, key))
    for module in model.modules():
        if isinstance(module, ReplicatedModule):
            # Computing with what is no device's copy must fail, as it would where activations are recomputed in the
            # backward pass. Only now, since a plain layer may be part of several modules.
            take_storage(module.plain[0])
    return model


def runs_whole(model: nn.Module) -> bool:
    """Whether all of a network runs copy by copy: it is marked so, or owns parameters itself."""
    return getattr(model, "whole", False) or _owns_parameters(model)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _persistent_buffers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the buffers that a network's state_dict has."""
    return tuple(
        _join(name, key)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, _ in module.named_buffers(recurse=False, remove_duplicate=False)
        if key not in module._non_persistent_buffers_set
    )


def _parametric(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that own parameters, under each of their names, without modules inside of them."""
    for name, child in model._modules.items():  # named_children would yield a shared child only once
        path = f"{prefix}{name}"
        if child is None:
            continue
        if _owns_parameters(child):
            yield path, child
        else:
            yield from _parametric(child, f"{path}.")


def _owns_parameters(module: nn.Module) -> bool:
    """Whether a module has parameters that no module inside of it uses."""
    return (
        next(module.parameters(recurse=False), None) is not None
        or is_parametrized(module)  # its weight is computed from parameters of its children
        or any(isinstance(child, _LISTS) and next(child.parameters(), None) is not None for child in module.children())
    )


@dataclass
class _Converter:
    """Maker of replacements; parameters and modules that stand in several places stay shared."""

    model: nn.Module
    copies: int
    spec: ConversionSpec
    replicas: dict[int, Tensor] = field(default_factory=dict)
    """Replicated parameters, by the id of the plain one."""
    layers: dict[int, nn.Module] = field(default_factory=dict)
    """Replacements, by the id of the plain module."""

    def __post_init__(self) -> None:
        self.trained_whole: tuple[str, ...] = getattr(self.model, "trained_whole", ())
        self.unbatched: dict[str, set[int]] = getattr(self.model, "unbatched", {})
        self.batch = Batch()
        # Counted before anything is replaced: a weight with several owners is tied, and gets no adapter.
        self.owners: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                self.owners[id(parameter)] = self.owners.get(id(parameter), 0) + 1
        # By id, since a layer may be part of a module that runs copy by copy, too.
        linear = (
            [module for module in self.model.modules() if is_linear(module)] if self.spec.biases == "frozen" else []
        )
        self.frozen_biases = {id(module.bias) for module in linear}
        # One that modules share of which some run copy by copy counts as tied: these have biases of their own.
        units: dict[int, set[int]] = {}
        for _, unit in [("", self.model)] if runs_whole(self.model) else _parametric(self.model):
            for part in [unit] if _is_supported(unit) else unit.modules():
                units.setdefault(id(part), set()).add(-1 if _is_supported(unit) else id(unit))
                if len(units[id(part)]) > 1:
                    self.owners.update({id(p): 2 for p in part.parameters(recurse=False)})

    def count_samples(self, model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Record the batch size of each call, as a forward hook of the network."""
        self.batch.samples = len(arguments[0])

    def replacement(self, name: str, key: int) -> nn.Module:
        """Return the replacement of the module `name`, whose id was `key` before any replacement."""
        if key not in self.layers:
            plain = self.model.get_submodule(name)
            self.layers[key] = new = self._replacement(name, plain)
            # Networks read sizes of their layers: embedding_dim, out_features.
            for attribute, value in vars(plain).items():
                if isinstance(value, _SIZES) and not attribute.startswith("_") and not hasattr(new, attribute):
                    setattr(new, attribute, value)
        return self.layers[key]

    def _replacement(self, name: str, module: nn.Module) -> nn.Module:
        if _is_supported(module):
            if is_linear(module):
                return self._linear(name, module)
            if isinstance(module, nn.Embedding):
                batch = self.batch if 0 in self.unbatched.get(name, ()) else None
                return ReplicatedEmbedding(self._replica(module.weight), batch)
            if isinstance(module, nn.LayerNorm):
                bias = None if module.bias is None else self._affine(module.bias)
                return ReplicatedLayerNorm(module, self._affine(module.weight), bias)
            if is_rms_norm(module) and isinstance(module.weight, Tensor):
                epsilon = module.eps if isinstance(module, nn.RMSNorm) else module.variance_epsilon
                return ReplicatedRmsNorm(epsilon, self._affine(module.weight))  # type: ignore[arg-type]
            if isinstance(module, nn.MultiheadAttention) and is_plain_attention(module):
                return self._attention(name, module)
        return self.copy_by_copy(name, module)

    def copy_by_copy(self, name: str, module: nn.Module) -> ReplicatedModule:
        """Return the replacement of a module of any kind; linear layers inside of it get their adapters."""
        adapters = dict[str, nn.Module]()
        inside = list(module.named_modules(remove_duplicate=False))[1:] if self.spec.make_adapter else []
        for path, layer in inside:
            # A ReplicatedModule has its own parameters in "stacked".
            if is_linear(layer) and _is_supported(layer) and path.partition(".")[0] != "stacked":
                key, full_name = id(layer), _join(name, path)
                if key not in self.layers and full_name not in self.trained_whole and self._adapts(layer):
                    self.layers[key] = self._adapter(full_name, layer, None)
                if key in self.layers:
                    adapters[path] = self.layers[key]
        stand_ins = {id(layer): HeadOfLayer(layer, adapters[path]) for path, layer in inside if path in adapters}
        for path, layer in inside:
            if path in adapters:
                parent, _, attribute = path.rpartition(".")
                setattr(module.get_submodule(parent), attribute, stand_ins[id(layer)])
        tensors = {key: self._replica(parameter) for key, parameter in module.named_parameters()}
        return ReplicatedModule(module, tensors, self.unbatched.get(name, ()), self.batch, adapters)

    def _attention(self, name: str, module: nn.MultiheadAttention) -> nn.Module:
        assert module.in_proj_weight is not None
        in_proj = _as_linear(module.in_proj_weight, module.in_proj_bias)
        return PerDeviceAttention(
            module, self._linear(f"{name}.in_proj", in_proj), self._linear(f"{name}.out_proj", module.out_proj)
        )

    def _linear(self, name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module.weight, Tensor)
        bias = None
        if isinstance(module.bias, Tensor):
            frozen = self.spec.biases == "frozen"
            bias = module.bias.detach().unsqueeze(0) if frozen else self._replica(module.bias)
        if name not in self.trained_whole and self._adapts(module):
            return self._adapter(name, module, bias)
        weight = self._replica(module.weight)
        if isinstance(module, nn.Conv2d):
            return ReplicatedConv2d(module, weight, bias)
        return ReplicatedConv1d(weight, bias) if is_conv1d(module) else ReplicatedLinear(weight, bias)

    def _adapter(self, name: str, module: nn.Module, bias: Tensor | None) -> nn.Module:
        make = self.spec.make_adapter
        assert make is not None and isinstance(module.weight, Tensor)
        if is_conv1d(module):
            adapter = make(_as_linear(module.weight.t().contiguous()), name, bias)
            adapter.transposed = True  # type: ignore[assignment]
            return adapter
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return make(module, name, bias)

    def _adapts(self, module: nn.Module) -> bool:
        if self.spec.make_adapter is None or self.owners[id(module.weight)] > 1:
            return False
        if not isinstance(module, nn.Conv2d):
            return True
        # Groups have separate weights, and one pair of factors over all of them would mix their channels.
        return self.spec.convolutions == "lora" and module.groups == 1 and not isinstance(module.padding, str)

    def _replica(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self.replicas:
            frozen = id(parameter) in self.frozen_biases
            self.replicas[id(parameter)] = parameter.detach()[None] if frozen else replicate(parameter, self.copies)
        return self.replicas[id(parameter)]

    def _affine(self, vector: Tensor) -> Tensor | VectorLora:
        if self.spec.norms == "none":  # a tensor that is no parameter becomes a buffer, and is not trained
            return vector.detach().unsqueeze(0)
        if self.spec.norms == "vector-lora" and self.spec.make_vector is not None:
            return self.spec.make_vector(vector)
        return self._replica(vector)


_SIZES = (int, float, str, tuple, torch.dtype)
"""Types of attributes that replacements take over."""


def _as_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Linear:
    """Return a linear layer of given parameters."""
    linear = nn.Linear(1, 1, bias=False, device="meta")  # draws nothing from the random generator
    linear.weight = weight_OI if isinstance(weight_OI, nn.Parameter) else nn.Parameter(weight_OI)
    linear.bias = bias_O  # type: ignore[assignment]
    return linear


_LINEAR_TOO = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
"""Subclasses of nn.Linear whose own forward computes the same (x·Wᵀ, rounded before the bias is added)."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what a linear layer, a convolution or transformers' Conv1D does."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__name__}" in _LINEAR_TOO:
        return computes_as(module, kind)
    return computes_as(module, nn.Linear) or computes_as(module, nn.Conv2d) or is_conv1d(module)


def _is_supported(module: nn.Module) -> bool:
    """Whether the replacement written for this kind of module supports all its settings."""
    plain = any(computes_as(module, kind) for kind in (nn.Embedding, nn.LayerNorm, nn.MultiheadAttention))
    if not (plain or is_linear(module) or is_rms_norm(module)):
        return False
    # Copies of trained parameters beside a single frozen one: only biases of linear layers may be that.
    if not all(p.requires_grad for key, p in module.named_parameters() if key != "bias" or not is_linear(module)):
        return False
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros"
    if isinstance(module, nn.Embedding):
        return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
    return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1


def unused_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a converted network that its mark `unused` names."""
    unused: tuple[str, ...] = getattr(model, "unused", ())
    return {
        _join(name, key): tensor
        for name, module in model.named_modules()
        if isinstance(module, ReplicatedModule)
        for key, tensor in module.plain_tensors()
        if _join(name, key) in unused
    }


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the affine parameters of norms that are trained directly, by name; frozen and adapted ones are not."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, ReplicatedLayerNorm | ReplicatedRmsNorm)
        for key, parameter in module.named_parameters(recurse=False)
    }


def merged_state(
    model: nn.Module, instead: dict[int, Tensor] | None = None, fold: bool = False, copy: int = 0, in_use: bool = False
) -> dict[str, Tensor]:
    """Return one plain model's weights and persistent buffers under the plain network's names.

    Replicated parameters are taken from copy `copy`; all copies are equal after a merge. `instead` gives other values,
    (...) without a copies axis, by the parameter's id. `fold` adds adapters that are never merged. With `in_use`,
    weights that have to be computed are LazyWeights, computed anew in each operation and freed after it.
    """
    state: dict[str, Tensor] = {}
    other, renamed = instead or {}, dict[str, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PerDeviceAttention):
            renamed.update(module.plain_names(name))
        # Adapted weights are computed, all other tensors taken as they are.
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.plain_weight_in_use(fold) if in_use else module.plain_weight(fold)
        if isinstance(module, Replicated | ReplicatedModule | LoraLinear):
            for key, tensor in module.plain_tensors():
                state[_join(name, key)] = other.get(id(tensor), tensor[min(copy, len(tensor) - 1)].detach())
    named = {renamed.get(name, name): tensor for name, tensor in state.items()}
    return {**named, **{name: _plain_buffer(model, name) for name in getattr(model, "plain_buffers", ())}}


def call_with_weights(network: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return a plain network's outputs with other weights and buffers than its own."""
    # Of a module under two names, torch would leave the given weights behind: it swaps them in twice.
    once = {
        f"{name}.{key}" if name else key
        for name, module in network.named_modules()
        for key in (*module._parameters, *module._buffers)
    }
    given = {name: weight for name, weight in weights.items() if name in once}
    outputs: Tensor = functional_call(network, given, (inputs,), tie_weights=False)
    return outputs


def _plain_buffer(model: nn.Module, name: str) -> Tensor:
    """Return a buffer of the plain network by its name there."""
    *path, key = name.split(".")
    for part in [None, *path]:
        child = model if part is None else getattr(model, part)
        model = child.plain[0] if isinstance(child, ReplicatedModule) else child
    buffer: Tensor = getattr(model, key)
    return buffer
