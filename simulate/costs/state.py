"""What one device keeps from step to step, in elements, and what a simulation of all devices keeps once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, singledispatch
from typing import Any

from simulate.comm.transfers import chunk_elements
from simulate.config.method_options import AdapterOptions, DenseOptions, MethodOptions
from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.costs.message_schedule import is_compressible
from simulate.layers.formats import quantized_bytes
from simulate.methods.daso.options import DasoOptions
from simulate.methods.ddp.options import DdpOptions
from simulate.methods.diloco.options import DilocoOptions
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.lte.options import LteOptions
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.methods.relora.options import ReloraOptions
from simulate.methods.sapipe.options import SapipeOptions
from simulate.methods.signsgd.options import SignsgdOptions
from simulate.methods.topk.options import TopkOptions
from simulate.models.shapes import ModelShape
from simulate.rules.transport import is_averaged


@dataclass(frozen=True)
class PersistentState:
    """Elements of one device, beside frozen weights and activations."""

    adapters: int
    """A and B, and their values at the last merge."""
    trained: int
    """What the optimizer steps."""
    moments: int
    """AdamW's two for each trained element; Muon's one for each of a matrix."""
    extra: int
    """Error feedback, outer momentum, weights and gradients of other steps."""
    shared: bool
    """Whether all devices hold the same, so that a simulation keeps it once (but for `extra`)."""


@by_method
def holding(run: Run, shape: ModelShape) -> PersistentState:
    """Return what a device of the run keeps."""
    method, devices, muon = run.method, run.cluster.devices, run.train.optimizer == "muon"
    adapters, matrices, others = 0, shape.adapted_parameters, shape.replicated_parameters
    # With a warm start the dense steps hold most, and no adapters yet.
    if isinstance(method, AdapterOptions) and not (isinstance(method, ReloraOptions) and method.warm_start_steps):
        rank = method.held_rank(devices)
        adapters = shape.factors(rank) * (2 if method.remembers_product else 1)
        matrices = shape.factors(rank, isinstance(method, LteOptions) and method.frozen_a)
        others = _trained_beside_adapters(method, shape)
    return PersistentState(
        adapters=adapters,
        trained=matrices + others,
        moments=(1 if muon else 2) * matrices + 2 * others,
        extra=_extra(method, shape, devices),
        shared=not isinstance(method, LteOptions | LocalSgdOptions | DilocoOptions | DasoOptions),
    )


def _trained_beside_adapters(method: AdapterOptions, shape: ModelShape) -> int:
    return _elements_without(shape, frozen_kinds(method))


@lru_cache(maxsize=64)
def _elements_without(shape: ModelShape, frozen: frozenset[str]) -> int:
    return sum(tensor.elements for tensor in shape.replicated if tensor.kind not in frozen)


@lru_cache(maxsize=64)
def _averaged_elements(shape: ModelShape, norms: str, biases: str) -> int:
    return sum(tensor.elements for tensor in shape.replicated if is_averaged(tensor, norms, biases))


def frozen_kinds(method: AdapterOptions) -> frozenset[str]:
    """Return the kinds of parameters beside adapters that nobody trains."""
    if not isinstance(method, LteOptions):
        return frozenset()
    return frozenset(
        kind for kind, is_frozen in (("norm", method.norms == "none"), ("bias", method.biases == "frozen")) if is_frozen
    )


def keeps_last_average(method: LteOptions | LocalSgdOptions, devices: int) -> bool:
    """Whether a method keeps the last merge's averages for its own sake: compressed, late and staggered merges do."""
    late = bool(method.merge_delay) or (isinstance(method, LteOptions) and method.fragments > 1)
    served = isinstance(method, LteOptions) and method.merge_transport == "server"
    return late or (method.wire != "full" and devices > 1 and not served)


@singledispatch
def _extra(method: Any, shape: ModelShape, devices: int) -> int:
    return 0


def _residuals(elements: int, devices: int) -> int:
    """Error feedback of a compressed mean: of what is sent, and of the part that is averaged here."""
    return (devices + 1) * chunk_elements(elements, devices)


@_extra.register
def _(method: DdpOptions, shape: ModelShape, devices: int) -> int:
    return 0 if method.wire == "full" or devices == 1 else _residuals(shape.parameters, devices)


@_extra.register
def _(method: LocalSgdOptions, shape: ModelShape, devices: int) -> int:
    last = shape.parameters if keeps_last_average(method, devices) else 0
    residuals = _residuals(shape.parameters, devices) if method.wire != "full" and devices > 1 else 0
    return last + residuals + _travelling(method, shape.parameters)


def _travelling(method: MethodOptions, averaged: int) -> int:
    """What was sent of averaged parameters and has not arrived, and what is arriving."""
    return 2 * averaged if method.late_steps else 0


@_extra.register
def _(method: DilocoOptions, shape: ModelShape, devices: int) -> int:
    residuals = 0 if method.wire == "full" or devices == 1 else _residuals(shape.parameters, devices)
    return 2 * shape.parameters + residuals + _travelling(method, shape.parameters)


@_extra.register
def _(method: DasoOptions, shape: ModelShape, devices: int) -> int:
    return shape.parameters if method.delay_steps and devices > method.devices_per_node else 0


@_extra.register
def _(method: SapipeOptions, shape: ModelShape, devices: int) -> int:
    return shape.parameters * (1 if method.compensation == "none" else 2)


@_extra.register
def _(method: PowerSgdOptions, shape: ModelShape, devices: int) -> int:
    matrices = [t for t in shape.tensors if is_compressible(t.shape, method.rank)]
    return sum(t.elements + method.rank * t.shape[1] for t in matrices)


@_extra.register(TopkOptions)
@_extra.register(SignsgdOptions)
def _(method: DenseOptions, shape: ModelShape, devices: int) -> int:
    return shape.parameters


@_extra.register
def _(method: LteOptions, shape: ModelShape, devices: int) -> int:
    averaged = _averaged_elements(shape, method.norms, method.biases)
    factors = shape.factors(method.held_rank(devices), method.frozen_a)
    travelling = _travelling(method, averaged) + (factors + shape.adapted_parameters if method.merge_delay else 0)
    last = shape.replicated_parameters if keeps_last_average(method, devices) else 0
    if method.wire == "full" or devices == 1:
        return travelling + last
    adapted = _residuals(shape.adapted_parameters, devices) if method.merge_transport == "reduce" else factors
    residuals = 0 if method.merge_transport == "server" else _residuals(shape.replicated_parameters, devices)
    return adapted + last + residuals + travelling


@lru_cache(maxsize=256)
def frozen_bytes(shape: ModelShape, quantize: str, element_bytes: int) -> int:
    """Bytes of all adapted weights in their frozen format."""
    return sum(quantized_bytes(x.weights, x.in_features, quantize, element_bytes) * x.count for x in shape.adapted)
