"""The Protocol that every method's plan fulfils: all questions that costs and planning ask about a method.

Costs use these answers alone and import no method, so a new method needs no change in them. Each method answers in
simulate/methods/NAME/plan.py; `plan_of` finds the plan of a run's method, also of one from outside this package.
Torch-free.

Letters: N devices, T steps of a round, R rank, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

from simulate.comm.transfers import Exchange
from simulate.config.method_options import MethodOptions
from simulate.config.method_table import method_part
from simulate.layers.formats import layer_draws
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
    """Whether it also happens after the run's last step."""
    hidden_steps: int = 0
    """Steps of compute that overlap it; none overlap an exchange after the run's last step."""

    def happens(self, step: int, last_step: int) -> bool:
        """Whether it happens after `step` of a run of `last_step` steps."""
        if self.at_end and step == last_step:
            return True
        return self.first <= step <= (self.until or step) and (step - self.first) % self.every == 0

    def times(self, steps: int, last_step: int) -> int:
        """Return how often it happens in the first `steps` of a run of `last_step` steps."""
        reached = min(steps, self.until or steps)
        regular = max(0, (reached - self.first) // self.every + 1)
        # The end counts once more only where no regular exchange falls on it.
        extra = self.at_end and steps == last_step and (steps < self.first or (steps - self.first) % self.every != 0)
        return regular + extra

    def hidden(self, last_step: int) -> Iterator[tuple[int, int]]:
        """Yield pairs: a number of exchanges in a run, and the steps of compute that overlap each of them."""
        if not self.hidden_steps:
            yield self.times(last_step, last_step), 0
            return
        # Close to the run's end fewer steps are left to overlap. Without `at_end` nobody waits there for what is still
        # under way, such as the last stale gradient, so that all exchanges are hidden alike.
        late = range(max(1, last_step - self.hidden_steps + 1) if self.at_end else last_step + 1, last_step + 1)
        cut = [last_step - step for step in late if self.happens(step, last_step)]
        yield self.times(last_step, last_step) - len(cut), self.hidden_steps
        for steps in cut:
            yield 1, steps


def merge_every(exchange: Exchange, every: int, hidden_steps: int = 0) -> PeriodicExchange:
    """Return an exchange after every T steps, and after the run's last one."""
    return PeriodicExchange(exchange, first=every, every=every, at_end=True, hidden_steps=hidden_steps)


def staggered(exchanges: Sequence[Exchange], every: int, hidden_steps: int) -> tuple[PeriodicExchange, ...]:
    """Return the fragments' exchanges: each every T steps, T / fragments after the one before, all at the run's end."""
    apart = every // len(exchanges)  # divides evenly: FragmentOptions checks it
    return tuple(
        PeriodicExchange(exchange, first=apart * (index + 1), every=every, at_end=True, hidden_steps=hidden_steps)
        for index, exchange in enumerate(exchanges)
    )


@dataclass(frozen=True)
class AdapterLayout:
    """The low-rank pairs that one device holds of each adapted layer."""

    rank: int
    """Rank of one head."""
    held_rank: int
    """Sum of the ranks of all pairs that the device holds and trains."""
    row_rank: int
    """Rank that one row of activations passes through."""
    heads: int = 1
    """Parts of the batch, each of which passes through its own pair."""
    stacked: int = 1
    """Pairs stacked in one parameter, each with its own moments."""
    frozen_a: bool = False
    """Whether B alone is trained."""
    subtracts: bool = False
    """Whether the product at the last merge is kept and subtracted in every pass."""
    idle_rank: int = 0
    """Sum of the ranks of pairs that a step skips, which therefore have no gradient."""
    frozen_kinds: frozenset[str] = frozenset()
    """Kinds of parameters without adapters that are not trained."""
    column_rank: int = 0
    """Sum of the ranks of all devices' heads, whose A pick columns in the layers whose inputs they cover; 0 where A is
    dense."""

    def picks_columns(self, inputs: int) -> bool:
        """Whether the A of a layer with so many inputs pick columns, so that none is held or multiplied with."""
        return layer_draws("columns", self.column_rank, inputs) == "columns"


@dataclass(frozen=True)
class ExchangeContext:
    """The figures that one device's buffers depend on while it exchanges."""

    shape: ModelShape
    devices: int
    gradients: int
    """Bytes of all gradients."""
    element_bytes: int
    muon: bool
    moments_step: int
    """Bytes of working memory of an optimizer step with 8-bit or projected moments; 0 where they are kept in full."""
    weighs_devices: bool = False
    """Whether devices' shares of a merge differ from round to round."""
    has_quorum: bool = False
    """Whether a merge may lack devices."""
    fewest: int | None = None
    """Fewest devices of a merge that may lack some."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each parameter."""
        return [t.elements * self.element_bytes for t in self.shape.tensors]


class MethodPlan(Protocol):
    """The plan of one method; simulate.methods.plans has default answers for most questions."""

    axes: ClassVar[Mapping[str, Sequence[Any]]]
    """Values worth trying, by key of [method] that the user left open."""

    def __init__(self, options: Any) -> None: ...

    # What devices exchange.
    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return everything that N > 1 devices exchange."""

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the phases of gradient exchanges and merges in which a device's memory can peak."""

    # What a device holds.
    shares_state: bool
    """Whether all devices hold equal weights and moments, so that a simulation stores them once."""

    starts_dense: bool
    """Whether the run begins with dense steps, which hold more than those that follow."""

    def adapters(self, devices: int) -> AdapterLayout | None:
        """Return the pairs of each adapted layer; None where every weight is trained."""

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the elements of the method's own state: error feedback, outer momentum, old weights and gradients."""

    def extra_elements_of_some(self, shape: ModelShape, devices: int, fewest: int) -> int:
        """Return extra_elements where merges may lack devices, with `fewest` of them: error feedback is another."""

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return how many of extra_elements are equal on all devices, so that a simulation stores them once."""

    def simulated_copies(self, devices: int) -> int:
        """Return how many copies of what devices train, and of its moments, a simulation stores."""

    full_copies: int
    """Full-precision copies of the adapted weights that merges need beside the frozen ones."""

    drops_moments: Literal["none", "adapters", "all"]
    """Optimizer moments that a merge zeroes."""

    drops_at_once: bool
    """Whether a merge frees the moments of all layers at once, not one layer after the other."""

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return how an evaluation computes the weights of adapted layers."""

    # What diagnostics see.
    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return the parameters without adapters that differ between devices until a merge."""

    has_separate_heads: bool
    """Whether each device trains pairs of its own between merges, as LTE's heads do."""

    def base_bytes(self, shape: ModelShape, element_bytes: int) -> int:
        """Return the bytes that a device gets which missed merges: what the others started their round from."""

    def separate_copies(self, devices: int) -> int:
        """Return how many different copies of these parameters exist before a merge."""

    def last_merge_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the elements of the last merge that diagnostics store to compare the next one with."""

    # What it computes.
    def dense_share(self, steps: int) -> float:
        """Return the share of a run's steps that train all weights, as a warm start before adapters does."""

    def update_flops(self, shape: ModelShape) -> float:
        """Return the operations of compressing one step's gradients."""

    def merge_flops(self, shape: ModelShape, devices: int) -> float:
        """Return one device's operations in a round's merges."""

    compresses_gradients: bool
    """Whether a step compresses gradients element by element, which costs memory traffic instead of products."""

    def merge_elements_moved(self, shape: ModelShape, extra: int) -> float:
        """Return the elements that a round's merges read and write; `extra` is what extra_elements returned."""

    quantizes_merges: bool
    """Whether each device quantises the merged weights itself; a server sends them quantised."""

    @property
    def measured_delay_steps(self) -> int:
        """Steps from a merge until its result has arrived, for measurements of one device alone."""

    steps_until_alike: int
    """Steps of a method without rounds until its memory stays the same."""

    routes_randomly: bool
    """Whether each step draws the pairs that it trains, so that moments are allocated over many steps."""

    # What is assumed and tried.
    @property
    def samples_like(self) -> str:
        """Name of the method whose assumed samples over dense's this one shares."""

    def rank_shortfall(self, width: int, devices: int, rank_share: float) -> float:
        """Return how many times too small the rank is for a network of this width; at least 1."""

    def fitted(self, devices: int) -> MethodOptions:
        """Return the options, with keys changed that so many devices exclude."""

    def is_valid(self) -> bool:
        """Whether a run would accept the options; copies with other values skip validation, so the planner asks."""

    transport: str | None
    """How merged factors travel; None where a method has no choice."""

    def synchronisation(self) -> str:
        """Return how parameters beside adapters are trained together, in words."""


MOST_PLANS = 4096
_PLANS: dict[int, tuple[MethodOptions, MethodPlan]] = {}
"""Plans by id() of their options: thousands of candidates ask ten times each, and an id is faster than a hash. The
options are stored, too, so that no other object can get the same id."""


def plan_of(options: MethodOptions) -> MethodPlan:
    """Return the plan of a method's options; raises InputError where its name leads nowhere."""
    found = _PLANS.get(id(options))
    if found is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        found = _PLANS[id(options)] = options, cast(MethodPlan, method_part(options.name, "plan")(options))
    return found[1]
