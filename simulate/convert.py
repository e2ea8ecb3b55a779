"""From a plain network to one that trains many devices at once, and back to one plain model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simulate.adapters import AdapterSpec, LoraConv2d, LoraLinear
from simulate.errors import InputError
from simulate.options import Biases, Convolutions, Norms
from simulate.replicated import (
    Replicated,
    ReplicatedConv2d,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    ReplicatedModule,
    ReplicatedRmsNorm,
    VectorLora,
    replicate,
)

MakeAdapter = Callable[[nn.Linear | nn.Conv2d, str, Tensor | None], nn.Module]
"""(layer, its name, its bias with a copies axis) → what takes its place."""
MakeVector = Callable[[Tensor], VectorLora]
NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Treatment:
    """What becomes of layers; by default nothing is adapted and every device trains a copy of all."""

    make_adapter: MakeAdapter | None = None
    make_vector: MakeVector | None = None
    """For the affine parameters of norms where `norms` is "vector-lora"."""
    norms: Norms = "average"
    biases: Biases = "average"
    convolutions: Convolutions = "lora"


EVERYTHING_TRAINED = Treatment()


def lora(spec: AdapterSpec, devices: int) -> MakeAdapter:
    """Return what makes LoRA layers for `devices` local devices."""

    def make(layer: nn.Linear | nn.Conv2d, name: str, bias_LO: Tensor | None) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            return LoraConv2d(layer, bias_LO, name, spec, devices)
        return LoraLinear(layer.weight, bias_LO, name, spec, devices)

    return make


def convert(model: nn.Module, copies: int, treatment: Treatment = EVERYTHING_TRAINED) -> nn.Module:
    """Swap a plain network's parametric layers, in place, for ones with `copies` sets of parameters.

    Every nn.Linear and nn.Conv2d whose weight is not tied to another module, and that the network does not name in
    `trained_whole`, goes through the treatment's `make_adapter`, if there is one. A module with parameters of a kind that is not known here runs copy by copy. Raises
    InputError for batch normalisation, and for a network that owns parameters without a module around them.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise InputError(
                f"model: {name} is a {type(module).__name__}, whose running statistics mix samples and belong to no "
                "device's parameters; use LayerNorm, RMSNorm or GroupNorm"
            )
    if next(model.parameters(recurse=False), None) is not None:
        raise InputError(f"model: {type(model).__name__} owns parameters itself; move them into a module inside of it")
    converter = _Converter(model, copies, treatment)
    for name, module in list(_parametric(model)):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, converter.swapped(name, module))
    return model


def _parametric(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that own parameters, by each of their names; nothing inside of one that is replicated whole."""
    for name, child in model._modules.items():  # unlike named_children, with a shared child at all its places
        path = f"{prefix}{name}"
        if child is None:
            continue
        if next(child.parameters(recurse=False), None) is not None:
            yield path, child
        else:
            yield from _parametric(child, f"{path}.")


@dataclass
class _Converter:
    """Makes what takes a layer's place; a parameter that several modules share stays shared, and so does a module."""

    model: nn.Module
    copies: int
    treatment: Treatment
    replicas: dict[int, nn.Parameter] = field(default_factory=dict)
    layers: dict[int, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained_whole: tuple[str, ...] = getattr(self.model, "trained_whole", ())
        self.owners: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                self.owners[id(parameter)] = self.owners.get(id(parameter), 0) + 1

    def swapped(self, name: str, module: nn.Module) -> nn.Module:
        """Return what takes a module's place."""
        if id(module) not in self.layers:
            self.layers[id(module)] = self._swapped(name, module)
        return self.layers[id(module)]

    def _swapped(self, name: str, module: nn.Module) -> nn.Module:
        if _is_known(module):
            if isinstance(module, nn.Linear | nn.Conv2d):
                return self._linear(name, module)
            if isinstance(module, nn.Embedding):
                return ReplicatedEmbedding(self._replica(module.weight))
            if isinstance(module, nn.LayerNorm):
                bias = None if module.bias is None else self._affine(module.bias)
                return ReplicatedLayerNorm(module, self._affine(module.weight), bias)
            if isinstance(module, nn.RMSNorm):
                return ReplicatedRmsNorm(module.eps, self._affine(module.weight))
        return ReplicatedModule(module, [self._replica(parameter) for parameter in module.parameters()])

    def _linear(self, name: str, module: nn.Linear | nn.Conv2d) -> nn.Module:
        bias = None if module.bias is None else self._bias(module.bias)
        make = self.treatment.make_adapter
        if make is not None and name not in self.trained_whole and self._adapts(module):
            return make(module, name, bias)
        weight = self._replica(module.weight)
        return (
            ReplicatedConv2d(module, weight, bias) if isinstance(module, nn.Conv2d) else ReplicatedLinear(weight, bias)
        )

    def _adapts(self, module: nn.Linear | nn.Conv2d) -> bool:
        if self.owners[id(module.weight)] > 1:
            return False
        if isinstance(module, nn.Linear):
            return True
        # Groups have weights of their own each; one pair of factors over all of them is no LoRA of any.
        return self.treatment.convolutions == "lora" and module.groups == 1 and not isinstance(module.padding, str)

    def _replica(self, parameter: Tensor) -> nn.Parameter:
        if id(parameter) not in self.replicas:
            self.replicas[id(parameter)] = replicate(parameter, self.copies)
        return self.replicas[id(parameter)]

    def _bias(self, bias: Tensor) -> Tensor:
        return self._replica(bias) if self.treatment.biases == "average" else bias.detach().unsqueeze(0)

    def _affine(self, vector: Tensor) -> Tensor | VectorLora:
        if self.treatment.norms == "none":
            return vector.detach().unsqueeze(0)
        if self.treatment.norms == "vector-lora" and self.treatment.make_vector is not None:
            return self.treatment.make_vector(vector)
        return self._replica(vector)


def _is_known(module: nn.Module) -> bool:
    """Whether the layer that is written for this kind of module does all that the module is set to."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros"
    if isinstance(module, nn.Embedding):
        return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
    return not isinstance(module, NORMS) or len(module.normalized_shape) == 1


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the affine parameters of norms that are trained as they are, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, ReplicatedLayerNorm | ReplicatedRmsNorm)
        for key, parameter in module.named_parameters(recurse=False)
    }


def merged_state(model: nn.Module, instead: dict[int, Tensor] | None = None, fold: bool = False) -> dict[str, Tensor]:
    """Return one plain model's weights by the plain network's names; right just after a merge (or for shared copies).

    Replicated parameters are taken from the first copy: after a merge all copies are equal. `instead` gives other
    values, (...) without a copies axis, by the parameter's id. With `fold`, adapters that are never merged are added.
    """
    state: dict[str, Tensor] = {}
    other = instead or {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.plain_weight(fold)
        if isinstance(module, Replicated | ReplicatedModule | LoraLinear):
            for key, tensor in module.plain_tensors():
                state[f"{name}.{key}"] = other.get(id(tensor), tensor[0].detach())
    return state
