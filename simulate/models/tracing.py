"""What a network without closed forms is made of, found out by running it on made-up samples.

Legend: S samples.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simulate.common.errors import InputError
from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.cross_entropy import token_losses
from simulate.layers.lora import AdapterSpec, LoraLinear, lora_layers
from simulate.layers.per_device import (
    ReplicatedConv2d,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    ReplicatedModule,
    ReplicatedRmsNorm,
)
from simulate.models.fake_batch import example_batch
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.models.schema import FactoryModel, HuggingfaceModel
from simulate.models.shapes import ActivationTrace, Kind, LinearShape, ModelShape, ParameterShape
from simulate.models.user_network import call_factory

COPIES, SAMPLES_OF_COPY = 2, 2
"""Enough to see whether samples of different devices are kept apart."""
PERTURBATION = 0.1
"""Of the copies' parameters, so that they differ."""
TOLERANCE = 1e-3
"""Of outputs, in float32, relative to the largest."""
TRACED_SAMPLES = (2, 6)
"""Batches whose peaks are measured."""
_ONE_PAIR = AdapterSpec(1, 1.0, heads_per_device=1, reset_less=False, first_device=0, seed=0)
_ONE_B = replace(_ONE_PAIR, frozen_a=True)


@dataclass(frozen=True)
class _Findings:
    """What every build of a network needs to be told."""

    trained_whole: tuple[str, ...]
    """The linear layer that gives the outputs."""
    unbatched: tuple[str, ...]
    """Embeddings whose index all samples share."""


def build_traced(options: FactoryModel) -> nn.Module:
    """Return the plain network, marked with what `convert` must know of it."""
    network = call_factory(options)
    findings = _findings(options)
    network.trained_whole = findings.trained_whole  # type: ignore[assignment]
    network.unbatched = findings.unbatched  # type: ignore[assignment]
    return network


def empty_traced(options: FactoryModel, device: torch.device) -> nn.Module:
    """Return the plain network with its buffers, and without storage for parameters."""
    with torch.random.fork_rng(devices=[]):  # its start weights are nobody's
        network = call_factory(options).to(device)
    plain = list(network.parameters())
    empty = {id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False) for parameter in plain}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, empty[id(parameter)])
    return network


def _run(options: FactoryModel, network: nn.Module, samples: int, what: str = "the network") -> Tensor:
    """Return the outputs for made-up samples; raises InputError where the network does not run, or gives others."""
    inputs, _ = example_batch(options, samples)
    try:
        with torch.no_grad():
            outputs = network(inputs)
    except Exception as error:
        raise InputError(
            f"model.name = {options.name!r}: {what} raised {type(error).__name__} on inputs {tuple(inputs.shape)}: "
            f"{error}"
        ) from error
    wanted = _output_shape(options, samples)
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != wanted:
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        sizes = "context and vocab" if options.unit == "tokens" else "classes"
        raise InputError(
            f"model.name = {options.name!r}: inputs {tuple(inputs.shape)} gave {given} where logits {wanted} are "
            f"needed; set model.{sizes} to what the network has"
            + ("" if options.unit == "samples" else ", or model.classes for a network of images")
        )
    return outputs


def _output_shape(options: FactoryModel, samples: int) -> tuple[int, ...]:
    if options.unit == "tokens":
        return (samples, getattr(options, "context"), getattr(options, "vocab"))  # noqa: B009 - of a mixin
    return (samples, getattr(options, "classes"))  # noqa: B009


@lru_cache(maxsize=16)
def _findings(options: FactoryModel) -> _Findings:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = call_factory(options).eval()
        findings = _Findings(_output_layer(options, network), _shared_indices(options, network))
        network.trained_whole, network.unbatched = findings.trained_whole, findings.unbatched  # type: ignore[assignment]
        _check_copies(options, network)
    return findings


Note = Callable[[str, Any, Any], None]
"""(name of a module, what it was called with, what it returned)."""


@contextmanager
def _watched(network: nn.Module, kind: type[nn.Module], note: Note) -> Iterator[None]:
    """Tell of every call of a kind of module."""

    def hook(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        note(name, arguments, output)

    modules = [(name, module) for name, module in network.named_modules() if isinstance(module, kind)]
    hooks = [module.register_forward_hook(partial(hook, name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _output_layer(options: FactoryModel, network: nn.Module) -> tuple[str, ...]:
    """Return the linear layer whose result is the network's."""
    results: list[tuple[str, Any]] = []
    with _watched(network, nn.Linear, lambda name, arguments, output: results.append((name, output))):
        outputs = _run(options, network, 1)
    return tuple(name for name, output in results if output is outputs)


def _shared_indices(options: FactoryModel, network: nn.Module) -> tuple[str, ...]:
    """Return the embeddings whose index has as many rows for three samples as for two."""
    two, three = dict[str, int](), dict[str, int]()
    for samples, rows in ((2, two), (3, three)):
        with _watched(network, nn.Embedding, partial(_note_rows, rows)):
            _run(options, network, samples)
    return tuple(name for name, count in two.items() if three.get(name) == count)


def _note_rows(rows: dict[str, int], name: str, arguments: Any, output: Any) -> None:
    rows[name] = len(arguments[0])


def _check_copies(options: FactoryModel, network: nn.Module) -> None:
    """Raise InputError where copies of the network, side by side, do not compute what each computes by itself."""
    converted = convert(copy.deepcopy(network), COPIES).eval()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=PERTURBATION)
        together = _run(options, converted, COPIES * SAMPLES_OF_COPY, "the network with two copies of its parameters")
        inputs, _ = example_batch(options, COPIES * SAMPLES_OF_COPY)
        for index, (part, output) in enumerate(zip(inputs.chunk(COPIES), together.chunk(COPIES), strict=True)):
            own = merged_state(converted, copy=index)
            alone = functional_call(network, own, (part,), tie_weights=False)
            if not torch.allclose(output, alone, rtol=TOLERANCE, atol=TOLERANCE * float(alone.abs().max())):
                raise InputError(
                    f"model.name = {options.name!r}: with a copy of its parameters for each device the network "
                    "computes something else than each copy alone; layers must keep samples apart, in dimension 0 of "
                    "what they get (attention: batch_first=True), and draw nothing at random in eval mode"
                )


def traced_shape(options: FactoryModel) -> ModelShape:
    """Return a network's counts, activations measured. Equal options give the same object."""
    return _traced_shape(options)


@lru_cache(maxsize=16)
def _traced_shape(options: FactoryModel) -> ModelShape:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = build_traced(options)
        adapted = convert(copy.deepcopy(plain), 1, ConversionSpec(lora(_ONE_PAIR, 1)))
        layers = lora_layers(adapted)
        if not layers:
            raise InputError(
                f"model.name = {options.name!r}: the network has no linear layer that adapters could serve"
            )
        linears = tuple(
            LinearShape(layer.name, layer.weight.shape[0], layer.weight.shape[1], 1, rows)
            for layer, rows in zip(layers, _rows(options, adapted, layers), strict=True)
        )
        forward_flops = _forward_flops(options, plain)
        adapted_flops = sum(2 * x.weights * x.rows for x in linears)
        return ModelShape(
            name=options.name,
            family="traced",
            adapted=linears,
            tensors=tuple(_tensors(plain, adapted)),
            layers=1,
            tokens=options.units_per_sample,
            width=max(x.in_features for x in linears),
            outputs=_output_shape(options, 1)[-1],
            predictions=options.units_per_sample,
            mixing_flops=max(0, forward_flops - adapted_flops),
            outer_flops=0,
            inputs=0 if options.unit == "tokens" else example_batch(options, 1)[0].numel(),
            notes=tuple(_notes(options, plain, adapted)),
            dense_trace=_activations(options, convert(copy.deepcopy(plain), 1)),
            adapted_trace=_activations(options, adapted),
            frozen_a_trace=_activations(options, convert(copy.deepcopy(plain), 1, ConversionSpec(lora(_ONE_B, 1)))),
        )


def _notes(options: FactoryModel, plain: nn.Module, adapted: nn.Module) -> Iterator[str]:
    yield f"{options.name} was imported and run to plan this; its activations are measured on this machine's CPU"
    if isinstance(options, HuggingfaceModel):
        yield f"{options.name} is built without dropout"
    plain_kinds = {name: type(module).__name__ for name, module in plain.named_modules()}
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, module in adapted.named_modules():
        kind = plain_kinds.get(name, "projection of attention")
        if isinstance(module, ReplicatedModule):
            kinds[f"{kind}, copy by copy"].append(name)
        elif isinstance(module, ReplicatedLinear | ReplicatedConv2d):
            kinds[kind].append(name)
    if kinds:
        parts = (f"{_some(names)} ({kind})" for kind, names in kinds.items())
        yield f"trained whole, without adapters: {', '.join(parts)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rows(options: FactoryModel, adapted: nn.Module, layers: list[LoraLinear]) -> list[int]:
    """Return how many rows of one sample pass through each adapted layer."""
    outputs: Counter[str] = Counter()
    with _watched(adapted.eval(), LoraLinear, lambda name, _, output: outputs.update({name: output.numel()})):
        _run(options, adapted, 1)
    return [max(1, outputs[layer.name] // layer.weight.shape[0]) for layer in layers]


def _forward_flops(options: FactoryModel, plain: nn.Module) -> int:
    # Fused attention is opaque to the counter, and so is torch's fused encoder layer, which only evaluation takes. Not
    # fused, attention is counted in full, whatever the mask leaves out.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _run(options, plain.train(), 1)
    return int(counter.get_total_flops())


def _tensors(plain: nn.Module, adapted: nn.Module) -> Iterator[ParameterShape]:
    """Yield the plain network's parameters in its order, each with what becomes of it."""
    kinds: dict[str, Kind] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLinear):
            kinds[f"{name}.weight"] = "adapted"
            kinds[f"{name}.bias"] = "bias"
        elif isinstance(module, ReplicatedEmbedding):
            kinds[f"{name}.weight"] = "embedding"
        elif isinstance(module, ReplicatedLayerNorm | ReplicatedRmsNorm):
            kinds[f"{name}.weight"] = kinds[f"{name}.bias"] = "norm"
        elif isinstance(module, ReplicatedLinear | ReplicatedConv2d):
            kinds[f"{name}.bias"] = "bias"
        if hasattr(module, "plain_names"):
            renamed = module.plain_names(name)
            module_kinds: dict[str, Kind] = {f"{name}.in_proj.weight": "adapted", f"{name}.in_proj.bias": "bias"}
            kinds.update({renamed[key]: kind for key, kind in module_kinds.items()})
    for name, parameter in plain.named_parameters():
        yield ParameterShape(kinds.get(name, "other"), tuple(parameter.shape))


def _activations(options: FactoryModel, network: nn.Module) -> ActivationTrace:
    """Return a line through the allocator's peaks at two batch sizes."""
    few, many = TRACED_SAMPLES
    low, high = (_peak_bytes(options, network.train(), samples) for samples in TRACED_SAMPLES)
    sample_bytes = max(0, high - low) // (many - few)
    return ActivationTrace(max(0, low - few * sample_bytes), sample_bytes)


def _peak_bytes(options: FactoryModel, network: nn.Module, samples: int) -> int:
    inputs, targets = example_batch(options, samples)

    def program() -> None:
        # Nothing is named here: a name would keep its tensor for longer than training does.
        token_losses(network(inputs.clone()).flatten(0, -2), targets.reshape(-1)).mean().backward()

    peak = cpu_peak_bytes(program)
    network.zero_grad()
    return peak
