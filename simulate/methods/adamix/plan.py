"""Forecast of AdaMix: the gradients of the one pair that a step chose; torch-free."""

from __future__ import annotations

from dataclasses import replace

from simulate.methods.adamix.options import AdamixOptions
from simulate.methods.plans import AdapterPlan
from simulate.rules.method_plan import AdapterLayout
from simulate.rules.phases import WeightMaterialisation


class AdamixPlan(AdapterPlan[AdamixOptions]):
    """The plan of a mixture of pairs; everyone routes alike, so only the chosen pair has a gradient."""

    routes_randomly = True

    def adapters(self, devices: int) -> AdapterLayout | None:
        """Return all experts' pairs, of which a step trains one."""
        options = self.options
        layout = AdapterLayout(options.rank, options.held_rank(devices), options.row_rank(devices))
        return replace(layout, stacked=options.experts, idle_rank=layout.held_rank - layout.rank)

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return that the mean pair's product is added to each weight in place."""
        return WeightMaterialisation(1)
