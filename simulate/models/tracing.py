"""Counts and checks of a user's network, obtained by running it on synthetic samples.

Our own networks have closed forms (simulate.models.families); a user's has none, so its layers, operations and peak
memory are observed. The same runs check that copies of its parameters keep devices apart. The schema's `shape()` calls
`traced_shape`; simulate.methods.build_network calls `build_traced` and `empty_traced`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from simulate.common.errors import InputError, first_line
from simulate.common.live_objects import find, is_live
from simulate.layers.convert import ConversionSpec, convert, is_linear, lora, merged_state, runs_whole
from simulate.layers.formats import Convolutions
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
from simulate.models.interfaces import (
    HUGGINGFACE,
    IMAGES_HINT,
    OF_SAMPLES,
    LiveSamples,
    ReadsText,
    SeesImages,
    TakesSamples,
    UserNetworkOptions,
)
from simulate.models.losses import check_loss, has_own_loss, row_losses_of
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.models.repeatable import PERTURBATION, check_history, check_passes, check_start_weights, seeded
from simulate.models.shapes import ActivationTrace, Kind, LinearShape, ModelShape, ParameterShape
from simulate.models.user_network import call_factory

COPIES, SAMPLES_OF_COPY = 2, 2
"""Copies and samples of each in the check that devices are kept apart."""
TOLERANCE = 1e-3
"""Largest error of an output, in float32, relative to the largest output."""
PASSED_SAMPLES = 8
"""Samples of the passes that find out what is random, kept or unused."""
PASSES = 16
"""Most passes until a parameter without a gradient counts as unused."""
TRACED_SAMPLES = (2, 6)
"""Batch sizes at which peak memory is measured."""
_ONE_PAIR = AdapterSpec(1, 1.0, heads_per_device=1, reset_less=False, first_device=0, seed=0)
_ONE_B = replace(_ONE_PAIR, frozen_a=True)


@dataclass(frozen=True)
class _Findings:
    """Marks that `convert` reads from a network, found once for equal options."""

    trained_whole: tuple[str, ...]
    """Names of linear layers whose result is the network's output."""
    unbatched: dict[str, set[int]] = field(default_factory=dict)
    """Places of the arguments, and of the results as −1 − k, that all samples share, by a module's name: a mask, an
    index of positions, a table."""
    unused: tuple[str, ...] = ()
    """Names of parameters that the loss does not depend on."""
    whole: str | None = None
    """Why all of the network runs copy by copy; None where only modules of other kinds do."""

    def mark(self, network: nn.Module) -> nn.Module:
        """Return the network with the marks; what nothing depends on is frozen, as plain training leaves it, too."""
        network.trained_whole, network.unbatched = self.trained_whole, self.unbatched  # type: ignore[assignment]
        network.unused, network.whole = self.unused, self.whole is not None  # type: ignore[assignment]
        for name in self.unused:
            network.get_parameter(name).requires_grad_(False)
        return network


def build_traced(options: UserNetworkOptions) -> nn.Module:
    """Return the plain network with the marks that `convert` reads."""
    network = call_factory(options)
    return _findings(options).mark(network)


def empty_traced(options: UserNetworkOptions, device: torch.device) -> nn.Module:
    """Return the plain network with its buffers, and without storage for parameters."""
    with seeded(0):  # the factory draws start weights, which must not advance the run's draws
        network = call_factory(options).to(device)
    plain = list(network.parameters())
    # By id, so that tied parameters stay tied.
    empty = {id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False) for parameter in plain}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, empty[id(parameter)])
    return network


@contextmanager
def _named_errors(options: UserNetworkOptions, what: str, advice: str = "") -> Iterator[None]:
    """Turn what the user's code raises into an InputError of one line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"model.name = {options.name!r}: {what}: {error}") from error
    except Exception as error:
        raise InputError(
            f"model.name = {options.name!r}: {what} raised {type(error).__name__}: {first_line(error)}{advice}"
        ) from error


def _run(options: UserNetworkOptions, network: nn.Module, samples: int, what: str = "the network") -> Tensor:
    """Return the outputs for synthetic samples; raises InputError if the network fails or gives another shape."""
    inputs, targets = example_batch(options, samples)
    kind = "samples" if options.family == OF_SAMPLES else "tokens" if options.unit == "tokens" else "images"
    advice = f"; its forward gets {kind} alone, and returns logits"
    if options.family == HUGGINGFACE:
        advice = "; change model.context, or the keys of the configuration that do not fit together"
    elif options.unit == "tokens":
        advice += f"; {IMAGES_HINT}"
    if what != "the network":
        advice = COPIES_ADVICE
    with _named_errors(options, f"{what}, on {kind} {tuple(inputs.shape)},", advice), torch.no_grad():
        outputs = network(inputs)
    if options.family == OF_SAMPLES:
        return _checked_outputs(options, outputs, targets)
    expected = _output_shape(options, samples)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"model.name = {options.name!r}: inputs {tuple(inputs.shape)} gave a {type(outputs).__name__} where logits "
            f"{expected} are needed; return these alone (a loss of the network's own is not added to the run's)"
        )
    if (given := tuple(outputs.shape)) != expected:
        sizes = "context and vocab" if options.unit == "tokens" else "classes"
        raise InputError(
            f"model.name = {options.name!r}: inputs {tuple(inputs.shape)} gave {given} where logits {expected} are "
            f"needed; set model.{sizes} to what the network has"
            + ("" if options.unit == "samples" else ", or model.classes for a network of images")
        )
    return outputs


def _checked_outputs(options: UserNetworkOptions, outputs: Any, targets: Tensor) -> Tensor:
    """Return the outputs for samples of any shape; raises InputError where they or the targets do not fit the loss."""
    if not isinstance(outputs, Tensor) or not outputs.ndim or len(outputs) != len(targets):
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"model.name = {options.name!r}: {len(targets)} samples gave {given} where one tensor with a row for each "
            "is needed; return that from forward"
        )
    fits = tuple(targets.shape) == tuple(outputs.shape if targets.is_floating_point() else outputs.shape[:-1])
    if not (fits or has_own_loss(options)):
        raise InputError(
            f"model.name = {options.name!r}: outputs {tuple(outputs.shape)} and {_type_text(targets)} targets "
            f"{tuple(targets.shape)} do not fit cross-entropy, which takes classes as integers of the shape without "
            "the last axis, or shares of classes; give a loss of your own by loss="
        )
    if not has_own_loss(options):
        data: LiveSamples = find("model.samples", cast(TakesSamples, options).samples)
        data.check_classes(outputs.shape[-1])
    return outputs


def _type_text(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_double_precision(options: UserNetworkOptions, network: nn.Module) -> None:
    """Raise InputError for a network of float64 parameters that has operations without that format."""
    inputs, _ = example_batch(options, 1)
    with _named_errors(options, "the network in fp64", "; choose train.dtype = fp32"), torch.no_grad():
        network(inputs.double() if inputs.is_floating_point() else inputs)


COPIES_ADVICE = (
    "; call layers instead of reading their weights, and keep samples apart, in dimension 0 of what layers get "
    "(attention: batch_first=True; routing: no lists of several samples' tokens)"
)


def _output_shape(options: UserNetworkOptions, samples: int) -> tuple[int, ...]:
    if options.unit == "tokens":
        text = cast(ReadsText, options)
        return (samples, text.context, text.vocab)
    return (samples, cast(SeesImages, options).classes)


@lru_cache(maxsize=16)
def _findings(options: UserNetworkOptions) -> _Findings:
    check_start_weights(options.name, lambda: call_factory(options))
    with seeded(0):  # a fixed seed, so that the check of copies never depends on luck
        network = call_factory(options).eval()
        findings = _Findings(_output_layer(options, network), _shared_arguments(options, network))
        check_passes(options.name, network, lambda: _run(options, network, PASSED_SAMPLES))
        if has_own_loss(options):
            inputs, targets = example_batch(options, PASSED_SAMPLES)
            with _named_errors(options, "the network"):
                check_loss(options, network.train()(inputs), targets)
        with seeded(0):
            fresh = call_factory(options)
        check_history(options.name, network, fresh, lambda one: _run(options, one, PASSED_SAMPLES))
        del fresh
        findings = replace(findings, unused=_unused_parameters(options, network))
        plain = _copied(options, findings.mark(network.eval()))
        try:
            _check_copies(options, plain, network)
        except InputError as error:
            # It reads layers' weights, calls other functions of theirs than forward, or sorts samples: one copy after
            # the other it may still compute what each copy alone does.
            findings = replace(findings, whole=str(error))
            try:
                _check_samples(options, network)
                _check_copies(options, findings.mark(_copied(options, network)), network)
            except InputError:
                raise error from None
    return findings


def _check_samples(options: UserNetworkOptions, network: nn.Module) -> None:
    """Raise InputError if a sample's outputs depend on the samples beside it."""
    inputs, _ = example_batch(options, COPIES * SAMPLES_OF_COPY)
    with _named_errors(options, "single samples"), torch.no_grad():
        together, alone = network(inputs), torch.cat([network(sample) for sample in inputs.split(1)])
    if not torch.allclose(together, alone, rtol=TOLERANCE, atol=TOLERANCE * float(alone.abs().max())):
        raise InputError(f"model.name = {options.name!r}: samples mix")


def _unused_parameters(options: UserNetworkOptions, network: nn.Module) -> tuple[str, ...]:
    """Return the parameters that get no gradient from training passes over random samples."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    unused = tuple(trained)
    for number in range(PASSES):  # further ones for parts that only some samples pass through
        inputs, targets = example_batch(options, PASSED_SAMPLES, number * PASSED_SAMPLES)
        if options.unit == "tokens":
            inputs = torch.randint_like(inputs, int(inputs.max()) + 1)
        elif options.family != OF_SAMPLES:  # whose batches differ by themselves
            inputs = torch.randn_like(inputs)
        with _named_errors(options, "its backward pass"):
            row_losses_of(options)(network.train()(inputs), targets).mean().backward()
        unused = tuple(name for name, parameter in trained.items() if parameter.grad is None)
        if not unused:
            break
    network.zero_grad()
    if len(unused) == len(trained):
        raise InputError(
            f"model.name = {options.name!r}: no parameter that the loss depends on has requires_grad = True, so that "
            "nothing would be trained; unfreeze some"
        )
    return unused


OnCall = Callable[[str, Any, Any], None]
"""Callback of (name of a module, its positional and keyword arguments, its output)."""


@contextmanager
def _watch_calls(network: nn.Module, kind: type[nn.Module], on_call: OnCall) -> Iterator[None]:
    """Report every call of a kind of module to `on_call`."""

    def hook(name: str, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        on_call(name, (arguments, keywords), output)

    modules = [(name, module) for name, module in network.named_modules() if isinstance(module, kind)]
    hooks = [module.register_forward_hook(partial(hook, name), with_kwargs=True) for name, module in modules]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _output_layer(options: UserNetworkOptions, network: nn.Module) -> tuple[str, ...]:
    """Return the name of the linear layer whose result is the network's output; it stays without adapters."""
    results: list[tuple[str, Any]] = []
    with _watch_calls(network, nn.Linear, lambda name, arguments, output: results.append((name, output))):
        outputs = _run(options, network, 1)
    if outputs.isnan().any():
        raise InputError(
            f"model.name = {options.name!r}: the network's outputs are not numbers (NaN) before any training; check "
            "its start weights"
        )
    # Identity, not equality: the layer's result must itself be the network's output.
    return tuple(name for name, output in results if output is outputs)


def _shared_arguments(options: UserNetworkOptions, network: nn.Module) -> dict[str, set[int]]:
    """Return the places of tensor arguments and results with equal rows for two and three samples, by module."""
    # Two counts tell an argument that grows with the batch from one that does not.
    two, three = (_argument_rows(options, network, samples) for samples in (2, 3))
    shared: dict[str, set[int]] = defaultdict(set)
    for (name, place), counts in two.items():
        if three.get((name, place)) == counts:
            shared[name].add(place)
    return dict(shared)


def _argument_rows(
    options: UserNetworkOptions, network: nn.Module, samples: int
) -> dict[tuple[str, int], list[int | None]]:
    """Return the rows of modules' arguments and results, by name and place, of every call."""
    rows: dict[tuple[str, int], list[int | None]] = defaultdict(list)

    def note(name: str, arguments: Any, output: Any) -> None:
        places = [*enumerate(tree_leaves(arguments)), *((-1 - k, leaf) for k, leaf in enumerate(tree_leaves(output)))]
        for place, leaf in places:
            if isinstance(leaf, Tensor):
                rows[name, place].append(len(leaf) if leaf.ndim else None)

    with _watch_calls(network, nn.Module, note):
        _run(options, network, samples)
    return rows


def _check_copies(options: UserNetworkOptions, plain: nn.Module, network: nn.Module) -> None:
    """Raise InputError if copies of the network side by side compute something else than each copy alone."""
    converted = convert(plain, COPIES)
    with _named_errors(options, "train() of the network with two copies of its parameters,", COPIES_ADVICE):
        converted.train().eval()
    with torch.no_grad():
        # Equal copies would hide samples that reach another device's copy.
        for parameter in converted.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=PERTURBATION)
        together = _run(options, converted, COPIES * SAMPLES_OF_COPY, "the network with two copies of its parameters")
        inputs, _ = example_batch(options, COPIES * SAMPLES_OF_COPY)
        for index, (part, output) in enumerate(zip(inputs.chunk(COPIES), together.chunk(COPIES), strict=True)):
            own = merged_state(converted, copy=index)
            # Written in place: a weight that the network also keeps in a list shall be the same one there.
            for key, parameter in network.named_parameters():
                parameter.copy_(own[key])
            with _named_errors(options, "the network with other weights"):
                alone = network(part)
            if not torch.allclose(output, alone, rtol=TOLERANCE, atol=TOLERANCE * float(alone.abs().max())):
                raise InputError(
                    f"model.name = {options.name!r}: with a copy of its parameters for each device the network "
                    "computes something else than each copy alone; layers must keep samples apart, in dimension 0 of "
                    "what they get (attention: batch_first=True; routing: no lists of several samples' tokens), be "
                    "kept under their own names alone, and draw nothing at random in eval mode"
                )


def _copied(options: UserNetworkOptions, network: nn.Module) -> nn.Module:
    with _named_errors(
        options, "a deep copy of it",
        "; keep computed tensors out of attributes (torch.nn.utils.parametrizations has norms of weights that can be "
        "copied)",
    ):  # fmt: skip
        return copy.deepcopy(network)


@lru_cache(maxsize=16)
def traced_shape(options: UserNetworkOptions, convolutions: Convolutions = "lora") -> ModelShape:
    """Return a network's counts and measured activations. Equal options give the same object."""
    with seeded(0):
        plain = build_traced(options)

        def with_pairs(spec: AdapterSpec, convolutions: Convolutions = convolutions) -> nn.Module:
            return convert(copy.deepcopy(plain), 1, ConversionSpec(lora(spec, 1), convolutions=convolutions))

        adapted = with_pairs(_ONE_PAIR)
        layers = lora_layers(adapted)
        if not layers and convolutions == "average" and lora_layers(with_pairs(_ONE_PAIR, "lora")):
            raise InputError(
                f"method.convolutions = 'average' leaves {options.name} without a layer that adapters could serve; "
                "try --set method.convolutions=lora"
            )
        if not layers:
            raise InputError(
                f"model.name = {options.name!r}: the network has no linear layer that adapters could serve; give it an "
                "nn.Linear beside the one that computes its outputs"
            )
        linears = tuple(
            LinearShape(layer.name, layer.weight.shape[0], layer.weight.shape[1], 1, rows)
            for layer, rows in zip(layers, _rows(options, adapted, layers), strict=True)
        )
        sample, outputs = example_batch(options, 1)[0], _outputs_of_sample(options, plain)
        forward_flops = _forward_flops(options, plain)
        adapted_flops = sum(2 * x.weights * x.rows for x in linears)
        return ModelShape(
            name=options.name,
            family="traced",
            adapted=linears,
            tensors=tuple(_tensors(plain, adapted)),
            layers=1,
            tokens=options.units_per_sample,
            # A user's network has no one width; the largest input of an adapted layer stands for it.
            width=max(x.in_features for x in linears),
            outputs=outputs[-1],
            predictions=math.prod(outputs[:-1]),
            mixing_flops=max(0, forward_flops - adapted_flops),
            outer_flops=0,
            inputs=sample.numel() if sample.is_floating_point() else 0,
            notes=tuple(_notes(options, plain, adapted)),
            fixed_parameters=sum(p.numel() for p in plain.parameters() if not p.requires_grad),
            dense_trace=_activations(options, convert(copy.deepcopy(plain), 1)),
            adapted_trace=_activations(options, adapted),
            frozen_a_trace=_activations(options, with_pairs(_ONE_B)),
            forward_trace=_activations(options, plain, backward=False),
        )


def _outputs_of_sample(options: UserNetworkOptions, plain: nn.Module) -> tuple[int, ...]:
    """Return the shape of one sample's outputs, (predictions ..., classes)."""
    if options.family == OF_SAMPLES:
        return tuple(_run(options, plain.eval(), 1).shape[1:]) or (1,)
    return _output_shape(options, 1)[1:]


def _notes(options: UserNetworkOptions, plain: nn.Module, adapted: nn.Module) -> Iterator[str]:
    if is_live(options.name):
        yield (
            f"{options.name}: the run starts from the weights that the network had when it was given, whatever "
            "train.seed is; the seed draws shards, batches and adapters. The network itself stays as it is"
        )
    found = "run" if is_live(options.name) else "imported and run"
    yield f"{options.name} was {found} to plan this; its activations are measured on this machine's CPU"
    if options.family == HUGGINGFACE:
        yield f"{options.name} is built without dropout"
    if runs_whole(plain):
        reason = _findings(options).whole
        yield "all of the network runs copy by copy, which takes longer where devices are simulated: " + (
            "it owns parameters itself" if reason is None else f"otherwise, {reason.partition(': ')[2]}"
        )
    frozen = [name for name, p in plain.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"not trained (frozen, or the loss does not depend on it): {_first_names(frozen)}"
    plain_kinds = {name: type(module).__name__ for name, module in plain.named_modules()}
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, module in adapted.named_modules():
        kind = plain_kinds.get(name, "projection of attention")  # the one kind that the plain network has no module for
        if isinstance(module, ReplicatedModule):
            kinds[f"{kind}, copy by copy" + (", but for its linear layers" if module.adapters else "")].append(
                name or "the network"
            )
        elif isinstance(module, ReplicatedLinear | ReplicatedConv2d):
            kinds[kind].append(name)
    if kinds:
        parts = (f"{_first_names(names)} ({kind})" for kind, names in kinds.items())
        yield f"trained whole, without adapters: {', '.join(parts)}"


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rows(options: UserNetworkOptions, adapted: nn.Module, layers: list[LoraLinear]) -> list[int]:
    """Return the number of rows of one sample that pass through each adapted layer."""
    outputs: Counter[str] = Counter()  # sums over calls, for layers that the network uses repeatedly
    with _watch_calls(adapted.eval(), LoraLinear, lambda name, _, output: outputs.update({name: output.numel()})):
        _run(options, adapted, 1)
    return [max(1, outputs[layer.name] // layer.weight.shape[0]) for layer in layers]


def _forward_flops(options: UserNetworkOptions, plain: nn.Module) -> int:
    """Return the operations of one sample's forward pass; attention is counted in full, without regard to its mask."""
    # The counter cannot look into fused attention, nor into torch's fused encoder layer, which training mode avoids.
    # It also fails, without gradients, on a module that returns its own parameter, unless that is frozen.
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    try:
        plain.requires_grad_(False)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _run(options, plain.train(), 1)
    finally:
        for parameter in trained:
            parameter.requires_grad_()
    return int(counter.get_total_flops())


def _tensors(plain: nn.Module, adapted: nn.Module) -> Iterator[ParameterShape]:
    """Yield the plain network's trained parameters in its order, each with its kind in the adapted network."""
    kinds: dict[str, Kind] = {f"{name}.bias": "bias" for name, module in plain.named_modules() if is_linear(module)}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLinear):
            kinds[f"{name}.weight"] = "adapted"
        elif isinstance(module, ReplicatedEmbedding):
            kinds[f"{name}.weight"] = "embedding"
        elif isinstance(module, ReplicatedLayerNorm | ReplicatedRmsNorm):
            kinds[f"{name}.weight"] = kinds[f"{name}.bias"] = "norm"
        # Attention's input projection is a layer of its own here, and two parameters of the module in the plain
        # network.
        if hasattr(module, "plain_names"):
            renamed = module.plain_names(name)
            module_kinds: dict[str, Kind] = {f"{name}.in_proj.weight": "adapted", f"{name}.in_proj.bias": "bias"}
            kinds.update({renamed[key]: kind for key, kind in module_kinds.items()})
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            yield ParameterShape(kinds.get(name, "other"), tuple(parameter.shape))


def _activations(options: UserNetworkOptions, network: nn.Module, backward: bool = True) -> ActivationTrace:
    """Return the straight line through the peaks of memory at two batch sizes."""
    few, many = TRACED_SAMPLES
    # Peaks grow linearly with the batch; the intercept is the part that does not grow, such as gradients.
    low, high = (_peak_bytes(options, network.train(), samples, backward) for samples in TRACED_SAMPLES)
    sample_bytes = max(0, high - low) // (many - few)
    return ActivationTrace(max(0, low - few * sample_bytes), sample_bytes)


def _peak_bytes(options: UserNetworkOptions, network: nn.Module, samples: int, backward: bool) -> int:
    inputs, targets = example_batch(options, samples)
    losses = row_losses_of(options)

    def program() -> None:
        # In one expression: a local variable would keep its tensor longer than training does.
        if backward:
            losses(network(inputs.clone()), targets).mean().backward()
        else:
            with torch.no_grad():
                losses(network(inputs.clone()), targets)

    with _named_errors(options, "the backward pass with layers of devices' own"):
        peak = cpu_peak_bytes(program)
    network.zero_grad()
    return peak
