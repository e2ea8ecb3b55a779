"""From a plain network to one that trains many devices at once, and back to one plain model's weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simulate.common.errors import InputError
from simulate.layers.attention import PerDeviceAttention, is_plain_attention
from simulate.layers.formats import Biases, Convolutions, Norms
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear
from simulate.layers.per_device import (
    Batch,
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
)

MakeAdapter = Callable[[nn.Linear | nn.Conv2d, str, Tensor | None], nn.Module]
"""(layer, its name, its bias with a copies axis) → what takes its place."""
MakeVector = Callable[[Tensor], VectorLora]


@dataclass(frozen=True)
class ConversionSpec:
    """What becomes of layers; by default nothing is adapted and every device trains a copy of all."""

    make_adapter: MakeAdapter | None = None
    make_vector: MakeVector | None = None
    """For the affine parameters of norms where `norms` is "vector-lora"."""
    norms: Norms = "average"
    biases: Biases = "average"
    convolutions: Convolutions = "lora"


EVERYTHING_TRAINED = ConversionSpec()


def lora(spec: AdapterSpec, devices: int) -> MakeAdapter:
    """Return what makes LoRA layers for `devices` local devices."""

    def make(layer: nn.Linear | nn.Conv2d, name: str, bias_LO: Tensor | None) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            return LoraConv2d(layer, bias_LO, name, spec, devices)
        return LoraLinear(layer.weight, bias_LO, name, spec, devices)

    return make


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer with the transposed weight, which GPT-2 is made of."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module normalises like nn.RMSNorm: torch's own, or one of transformers' that Llama's is copied from.

    Gemma's, whose weight counts from 1 on, calls its epsilon differently.
    """
    if isinstance(module, nn.RMSNorm):
        return len(module.normalized_shape) == 1
    of_library = type(module).__module__.startswith("transformers.models.") and type(module).__name__.endswith(
        "RMSNorm"
    )
    return (
        of_library and hasattr(module, "variance_epsilon") and [n for n, _ in module.named_parameters()] == ["weight"]
    )


def convert(model: nn.Module, copies: int, treatment: ConversionSpec = EVERYTHING_TRAINED) -> nn.Module:
    """Swap a plain network's parametric layers, in place, for ones with `copies` sets of parameters.

    Every nn.Linear, nn.Conv2d and transformers' Conv1D whose weight is not tied to another module, and that the network
    does not name in `trained_whole`, goes through the treatment's `make_adapter`, if there is one; so do projections
    of an nn.MultiheadAttention. A module with parameters of a kind that is not known here runs copy by copy. Embeddings
    that the network names in `unbatched` have an index that all samples share. Raises InputError for batch
    normalisation, and for a network that owns parameters without a module around them.
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
    if converter.unbatched:
        model.register_forward_pre_hook(converter.count_samples)
    # By their ids, since the list would keep every plain layer's weights until the last one is swapped.
    for name, key in [(name, id(module)) for name, module in _parametric(model)]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, converter.swapped(name, key))
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
    treatment: ConversionSpec
    replicas: dict[int, nn.Parameter] = field(default_factory=dict)
    layers: dict[int, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained_whole: tuple[str, ...] = getattr(self.model, "trained_whole", ())
        self.unbatched: tuple[str, ...] = getattr(self.model, "unbatched", ())
        self.batch = Batch()
        self.owners: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                self.owners[id(parameter)] = self.owners.get(id(parameter), 0) + 1

    def count_samples(self, model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Note how many samples the network is called with."""
        self.batch.samples = len(arguments[0])

    def swapped(self, name: str, key: int) -> nn.Module:
        """Return what takes the place of the module of this name and, as it was, this id."""
        if key not in self.layers:
            self.layers[key] = self._swapped(name, self.model.get_submodule(name))
        return self.layers[key]

    def _swapped(self, name: str, module: nn.Module) -> nn.Module:
        if _is_known(module):
            if isinstance(module, nn.Linear | nn.Conv2d) or is_conv1d(module):
                return self._linear(name, module)
            if isinstance(module, nn.Embedding):
                batch = self.batch if name in self.unbatched else None
                return ReplicatedEmbedding(self._replica(module.weight), batch)
            if isinstance(module, nn.LayerNorm):
                bias = None if module.bias is None else self._affine(module.bias)
                return ReplicatedLayerNorm(module, self._affine(module.weight), bias)
            if is_rms_norm(module) and isinstance(module.weight, Tensor):
                epsilon = module.eps if isinstance(module, nn.RMSNorm) else module.variance_epsilon
                return ReplicatedRmsNorm(epsilon, self._affine(module.weight))  # type: ignore[arg-type]
            if isinstance(module, nn.MultiheadAttention) and is_plain_attention(module):
                return self._attention(name, module)
        return ReplicatedModule(module, [self._replica(parameter) for parameter in module.parameters()])

    def _attention(self, name: str, module: nn.MultiheadAttention) -> nn.Module:
        assert module.in_proj_weight is not None
        in_proj = _as_linear(module.in_proj_weight, module.in_proj_bias)
        return PerDeviceAttention(
            module, self._linear(f"{name}.in_proj", in_proj), self._linear(f"{name}.out_proj", module.out_proj)
        )

    def _linear(self, name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module.weight, Tensor)
        bias = self._bias(module.bias) if isinstance(module.bias, Tensor) else None
        make = self.treatment.make_adapter
        if make is not None and name not in self.trained_whole and self._adapts(module):
            if is_conv1d(module):
                adapter = make(_as_linear(module.weight.t().contiguous()), name, bias)
                adapter.transposed = True  # type: ignore[assignment]
                return adapter
            assert isinstance(module, nn.Linear | nn.Conv2d)
            return make(module, name, bias)
        weight = self._replica(module.weight)
        if isinstance(module, nn.Conv2d):
            return ReplicatedConv2d(module, weight, bias)
        return ReplicatedConv1d(weight, bias) if is_conv1d(module) else ReplicatedLinear(weight, bias)

    def _adapts(self, module: nn.Module) -> bool:
        if self.owners[id(module.weight)] > 1:
            return False
        if not isinstance(module, nn.Conv2d):
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


def _as_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Linear:
    """Return a linear layer of given parameters."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = weight_OI if isinstance(weight_OI, nn.Parameter) else nn.Parameter(weight_OI)
    linear.bias = bias_O  # type: ignore[assignment]
    return linear


def _is_known(module: nn.Module) -> bool:
    """Whether the layer that is written for this kind of module does all that the module is set to."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros"
    if isinstance(module, nn.Embedding):
        return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
    return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the affine parameters of norms that are trained as they are, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, ReplicatedLayerNorm | ReplicatedRmsNorm)
        for key, parameter in module.named_parameters(recurse=False)
    }


def merged_state(
    model: nn.Module, instead: dict[int, Tensor] | None = None, fold: bool = False, copy: int = 0, in_use: bool = False
) -> dict[str, Tensor]:
    """Return one plain model's weights by the plain network's names; right just after a merge (or for shared copies).

    Replicated parameters are taken from the first copy, or another: after a merge all copies are equal. `instead` gives
    other values, (...) without a copies axis, by the parameter's id. With `fold`, adapters that are never merged are
    added. Weights `in_use` exist only while something is computed with them, where they would have to be made.
    """
    state: dict[str, Tensor] = {}
    other, renamed = instead or {}, dict[str, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PerDeviceAttention):
            renamed.update(module.plain_names(name))
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.plain_weight_in_use(fold) if in_use else module.plain_weight(fold)
        if isinstance(module, Replicated | ReplicatedModule | LoraLinear):
            for key, tensor in module.plain_tensors():
                state[f"{name}.{key}"] = other.get(id(tensor), tensor[min(copy, len(tensor) - 1)].detach())
    return {renamed.get(name, name): tensor for name, tensor in state.items()}
