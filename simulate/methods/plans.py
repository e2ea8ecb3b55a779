"""Default plans: of dense training that averages gradients at every step, and of adapters that do.

A plan forecasts a method's messages, memory and compute. Each method's plan.py subclasses one of these and overrides
what differs; simulate.costs and the planner ask it through the Protocol in simulate.rules.method_plan. Torch-free;
it imports costs, which never import it.

Letters: N devices, T steps of a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

from simulate.comm.transfers import Exchange
from simulate.config.method_options import AdapterOptions, MethodOptions
from simulate.config.method_table import BASELINE, METHOD_NAMES
from simulate.costs.buffers import FOLD_TENSORS, reduced_gradients
from simulate.costs.message_schedule import adapter_reduction, dense_reduction
from simulate.layers.formats import Quantize
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.method_plan import AdapterLayout, ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase, WeightMaterialisation

RANKS = (8, 16, 32, 64, 128, 256)
MERGE_EVERY = (10, 30, 100)
"""Ranks and steps of a round worth trying."""
OptionsT = TypeVar("OptionsT", bound=MethodOptions)
AdapterOptionsT = TypeVar("AdapterOptionsT", bound=AdapterOptions)


class DensePlan(Generic[OptionsT]):
    """The plan of dense training whose devices average gradients at every step."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {}
    shares_state = True
    starts_dense = False
    full_copies = 0
    drops_moments: Literal["none", "adapters", "all"] = "none"
    drops_at_once = True
    has_separate_heads = False
    compresses_gradients = False
    quantizes_merges = False
    steps_until_alike = 2
    routes_randomly = False
    transport: str | None = None

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the one exchange of each step: the mean gradient of every parameter."""
        return (PeriodicExchange(dense_reduction(shape, devices, element_bytes)),)

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Return the one memory phase of each step: the largest message beside the gradients."""
        return reduced_gradients(context, context.sizes)

    def adapters(self, devices: int) -> AdapterLayout | None:
        """Return None: every weight is trained."""
        return None

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return 0: nothing is kept beside weights and moments."""
        return 0

    def extra_elements_of_some(self, shape: ModelShape, devices: int, fewest: int) -> int:
        """Return extra_elements: nothing more is kept where merges lack devices."""
        return self.extra_elements(shape, devices)

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return 0: each device keeps state of its own."""
        return 0

    def simulated_copies(self, devices: int) -> int:
        """Return one copy for all devices, or one each."""
        return 1 if self.shares_state else devices

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return that no weights must be computed before an evaluation."""
        return WeightMaterialisation()

    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return nothing: all devices agree after every step."""
        return ()

    def base_bytes(self, shape: ModelShape, element_bytes: int) -> int:
        """Return the bytes of all weights."""
        return shape.parameters * element_bytes

    def separate_copies(self, devices: int) -> int:
        """Return one copy a device."""
        return devices

    def last_merge_elements(self, shape: ModelShape, devices: int) -> int:
        """Return 0: there are no merges."""
        return 0

    def dense_share(self, steps: int) -> float:
        """Return 0: all steps train the same parameters."""
        return 0.0

    def update_flops(self, shape: ModelShape) -> float:
        """Return 0: gradients travel as they are."""
        return 0.0

    def merge_flops(self, shape: ModelShape, devices: int) -> float:
        """Return 0: a mean of weights costs memory traffic, no products."""
        return 0.0

    def merge_elements_moved(self, shape: ModelShape, extra: int) -> float:
        """Return the weights and the method's own state, read and written once a round."""
        return 0.0 if self.options.round_steps == 1 else 2.0 * shape.parameters + 2.0 * extra

    @property
    def measured_delay_steps(self) -> int:
        """Steps from a merge until its result has arrived."""
        return self.options.late_steps

    @property
    def samples_like(self) -> str:
        """Name of the method whose assumed samples apply: its own; to one from outside the baseline's."""
        return self.options.name if self.options.name in METHOD_NAMES else BASELINE

    def rank_shortfall(self, width: int, devices: int, rank_share: float) -> float:
        """Return 1: every direction is trained."""
        return 1.0

    def fitted(self, devices: int) -> MethodOptions:
        """Return the options as they are."""
        return self.options

    def is_valid(self) -> bool:
        """Whether these options go together: yes, as no two values of `axes` exclude each other."""
        return True

    def synchronisation(self) -> str:
        """Return how devices keep their parameters together, in words."""
        return "gradients averaged at every step"


class AdapterPlan(DensePlan[AdapterOptionsT]):
    """The plan of low-rank pairs on frozen weights, which all devices share and agree on at every step."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"rank": RANKS}

    def __init__(self, options: AdapterOptionsT) -> None:
        super().__init__(options)
        self.full_copies = int(options.keeps_master)  # rounding would swallow small changes of quantised weights

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the one exchange of each step: the mean gradients of pairs and of all parameters beside them."""
        return (PeriodicExchange(self.gradients(shape, devices, element_bytes)),)

    def gradients(self, shape: ModelShape, devices: int, element_bytes: int) -> Exchange:
        """Return the messages that average the gradients of pairs, and of all parameters beside them."""
        return adapter_reduction(shape, self.options.row_rank(devices), devices, element_bytes)

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Return the one moment of each step: the message beside the gradients."""
        rank, layers, counts = self.options.row_rank(context.devices), iter(context.shape.in_order()), list[int]()
        for tensor in context.shape.tensors:
            if tensor.kind == "adapted":  # A and B take the place of the frozen W's gradient
                layer = next(layers)
                counts += [rank * layer.in_features, rank * layer.out_features]
            else:
                counts.append(tensor.elements)
        return reduced_gradients(context, [count * context.element_bytes for count in counts])

    def adapters(self, devices: int) -> AdapterLayout | None:
        """Return one pair a layer."""
        options = self.options
        return AdapterLayout(options.rank, options.held_rank(devices), options.row_rank(devices))

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return that each weight is computed from its pairs: FOLD_TENSORS dense tensors at a time."""
        unpacked: Quantize = "none" if self.options.keeps_master else self.options.frozen_format
        return WeightMaterialisation(FOLD_TENSORS, unpacked)

    def merge_elements_moved(self, shape: ModelShape, extra: int) -> float:
        """Return 0: nothing is merged, or too rarely to count."""
        return 0.0

    def rank_shortfall(self, width: int, devices: int, rank_share: float) -> float:
        """Return the width over the rank that a row passes through."""
        return max(1.0, width / self.options.row_rank(devices))
