"""The forecast of a method, as costs and planning ask for it; each method answers in simulate/methods/NAME/plan.py.

Costs work with these answers alone and import no method. `plan_of` finds the plan of a run's method, also of one from
outside this package. Torch-free.

Letters: N devices, T steps of a round, R rank, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

from simulate.comm.transfers import Exchange
from simulate.config.method_options import MethodOptions
from simulate.config.method_table import method_part
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.phases import Phase, WeightMaterialisation


@dataclass(frozen=True)
class PeriodicExchange:
    """An exchange after step `first`, and every `every` steps from there on, up to step `until`; steps count from 1."""

    exchange: Exchange
    first: int = 1
    every: int = 1
    until: int | None = None
    at_end: bool = False
    """Also after the run's last step."""
    hidden_steps: int = 0
    """Steps of compute that go on while it travels; after the run's last step there are none."""

    def happens(self, step: int, last_step: int) -> bool:
        """Whether it takes place after `step` of a run of `last_step`."""
        if self.at_end and step == last_step:
            return True
        return self.first <= step <= (self.until or step) and (step - self.first) % self.every == 0

    def times(self, steps: int, last_step: int) -> int:
        """Return how often it takes place in the first `steps` of a run of `last_step` steps."""
        reached = min(steps, self.until or steps)
        regular = max(0, (reached - self.first) // self.every + 1)
        extra = self.at_end and steps == last_step and (steps < self.first or (steps - self.first) % self.every != 0)
        return regular + extra

    def hidden(self, last_step: int) -> Iterator[tuple[int, int]]:
        """Yield how often it takes place in a run, and the steps of compute that go on while it travels then."""
        if not self.hidden_steps:
            yield self.times(last_step, last_step), 0
            return
        # An exchange that nobody waits for at the run's end, like a last stale gradient, is as hidden as all others.
        late = range(max(1, last_step - self.hidden_steps + 1) if self.at_end else last_step + 1, last_step + 1)
        cut = [last_step - step for step in late if self.happens(step, last_step)]
        yield self.times(last_step, last_step) - len(cut), self.hidden_steps
        for steps in cut:
            yield 1, steps


def merge_every(exchange: Exchange, every: int, hidden_steps: int = 0) -> PeriodicExchange:
    """Return an exchange after every T steps, and after the run's last one."""
    return PeriodicExchange(exchange, first=every, every=every, at_end=True, hidden_steps=hidden_steps)


def staggered(exchanges: Sequence[Exchange], every: int, hidden_steps: int) -> tuple[PeriodicExchange, ...]:
    """Return one fragment's exchange after the other, each every T steps, T / fragments apart; all after the last."""
    apart = every // len(exchanges)
    return tuple(
        PeriodicExchange(exchange, first=apart * (index + 1), every=every, at_end=True, hidden_steps=hidden_steps)
        for index, exchange in enumerate(exchanges)
    )


@dataclass(frozen=True)
class AdapterLayout:
    """The low-rank pairs that one device holds of each adapted layer."""

    rank: int
    """Of one head."""
    held_rank: int
    """Of all pairs that the device holds and trains."""
    row_rank: int
    """That one row of activations passes through."""
    heads: int = 1
    """Parts of the batch that pass through pairs of their own."""
    stacked: int = 1
    """Pairs that lie side by side in one parameter, each with moments of its own."""
    frozen_a: bool = False
    """Whether B alone is trained."""
    subtracts: bool = False
    """Whether the product at the last merge is kept and subtracted in every pass."""
    idle_rank: int = 0
    """Rank of the pairs that a step leaves out, which then have no gradient."""
    frozen_kinds: frozenset[str] = frozenset()
    """Kinds of parameters beside adapters that nobody trains."""
    draws_jointly: bool = False
    """Whether the A of all heads come from one draw."""


@dataclass(frozen=True)
class ExchangeContext:
    """One device's part of an exchange, as its buffers depend on it."""

    shape: ModelShape
    devices: int
    gradients: int
    """Bytes of all gradients."""
    element_bytes: int
    muon: bool
    eight_bit_step: int
    """Bytes of working memory of an optimizer step whose moments have 8 bits."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each parameter."""
        return [t.elements * self.element_bytes for t in self.shape.tensors]


class MethodPlan(Protocol):
    """The answers of one method's plan; simulate.methods.plans has defaults for most of them."""

    axes: ClassVar[Mapping[str, Sequence[Any]]]
    """Values worth trying of the keys that the user left open."""

    def __init__(self, options: Any) -> None: ...

    # What devices exchange.
    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return everything that N > 1 devices exchange."""

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the moments of gradient exchanges and merges that can be a device's peak."""

    # What a device holds.
    shares_state: bool
    """Whether all devices hold equal weights and moments, so that a simulation keeps them once."""

    starts_dense: bool
    """Whether the run begins with dense steps, which hold more than those that follow."""

    def adapters(self, devices: int) -> AdapterLayout | None:
        """Return the pairs of each adapted layer; None where every weight is trained."""

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the elements of error feedback, outer momentum, weights and gradients of other steps."""

    full_copies: int
    """Full-precision copies of the adapted weights that merges need beside the frozen ones."""

    drops_moments: Literal["none", "adapters", "all"]
    """The moments that a merge zeroes."""

    drops_at_once: bool
    """Whether a merge that drops moments does so right away, of all layers."""

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return how an evaluation comes to weights."""

    # What diagnostics see.
    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return the parameters that devices train whole, and apart from one another between merges."""

    has_separate_heads: bool
    """Whether each device's pairs train apart from all others' between merges, as LTE's heads do."""

    def separate_copies(self, devices: int) -> int:
        """Return how many different copies of such parameters there are before a merge."""

    def last_merge_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the elements of the last merge that diagnostics keep for themselves."""

    # What it computes.
    def dense_share(self, steps: int) -> float:
        """Return the share of a run's steps that train all weights although others train adapters."""

    def update_flops(self, shape: ModelShape) -> float:
        """Return the operations that compression makes of one step's gradients."""

    def merge_flops(self, shape: ModelShape, devices: int) -> float:
        """Return one device's operations in a round's merges."""

    compresses_gradients: bool
    """Whether a step compresses gradients one element at a time."""

    def merge_elements_moved(self, shape: ModelShape, extra: int) -> float:
        """Return the elements that a round's merges read and write, given those of `extra_elements`."""

    quantizes_merges: bool
    """Whether each device quantises the merged weights itself."""

    @property
    def measured_delay_steps(self) -> int:
        """Steps from a merge until its result has arrived, for who measures a device alone."""

    steps_until_alike: int
    """Steps without a round after which all further ones hold the same memory."""

    routes_randomly: bool
    """Whether a step trains pairs that are drawn, so that moments come bit by bit."""

    # What is assumed and tried.
    @property
    def samples_like(self) -> str:
        """Name of the method whose assumed samples over dense's hold for this one."""

    def rank_shortfall(self, width: int, devices: int, rank_share: float) -> float:
        """Return how many times too small the rank is for a network of this width; at least 1."""

    def fitted(self, devices: int) -> MethodOptions:
        """Return the options, changed where they cannot go with so many devices."""

    def is_valid(self) -> bool:
        """Whether options that were copied with other values, which are not validated, would be accepted in a run."""

    transport: str | None
    """How merged factors travel, where a method has the choice."""

    def synchronisation(self) -> str:
        """Return how parameters beside adapters are trained together, in words."""


MOST_PLANS = 4096
_PLANS: dict[int, tuple[MethodOptions, MethodPlan]] = {}
"""Plans by the identity of their options, which a plan of thousands of candidates asks for ten times each; the options
beside a plan keep that identity from becoming another's."""


def plan_of(options: MethodOptions) -> MethodPlan:
    """Return the plan of a method's options; raises InputError where its name leads nowhere."""
    found = _PLANS.get(id(options))
    if found is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        found = _PLANS[id(options)] = options, cast(MethodPlan, method_part(options.name, "plan")(options))
    return found[1]
