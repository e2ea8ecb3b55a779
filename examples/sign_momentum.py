"""A method of one's own: the majority's sign of momentum (Bernstein et al. 2018, arXiv 1810.05291, algorithm 1).

    m_n ← β·m_n + g_n,     g = sign(Σ_n sign(m_n))

AdamW steps with g. In run.toml: [method] name = "examples.sign_momentum:SignMomentum".
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor

from simulate.config.method_options import MethodOptions
from simulate.costs.buffers import gathered_gradients
from simulate.costs.message_schedule import gathered
from simulate.methods.gathered_gradients import GatheredGradients, pack_bits, unpack_bits
from simulate.methods.plans import DensePlan
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase


class SignMomentum:
    """The three parts by which run.toml's method.name leads to this method."""

    class options(MethodOptions):
        name: str = "examples.sign_momentum:SignMomentum"
        momentum: float = Field(default=0.9, ge=0, lt=1)

    class plan(DensePlan[options]):
        compresses_gradients = True

        def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
            return (PeriodicExchange(gathered([-(-t.elements // 8) for t in shape.tensors], devices)),)

        def extra_elements(self, shape: ModelShape, devices: int) -> int:
            return shape.parameters

        def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
            elements, e = [t.elements for t in context.shape.tensors], context.element_bytes
            votes = [(context.devices * (e + 1) + e) * x for x in elements]
            return gathered_gradients(context, [-(-x // 8) for x in elements], [2 * x for x in elements], votes)

    class train(GatheredGradients):
        def compress(self, corrected_LX: Tensor) -> list[Tensor]:
            positive_LX = corrected_LX >= 0
            corrected_LX.mul_(self.run.method.momentum)  # type: ignore[attr-defined]
            return [pack_bits(positive_LX)]

        def mean(self, messages: list[Tensor], elements: int) -> Tensor:
            votes_NX = unpack_bits(messages[0], elements).to(next(iter(self.errors.values())).dtype)
            return votes_NX.mul_(2).sub_(1).sum(0).sign_()
