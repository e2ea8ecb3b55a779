"""Take from a probe of the network the ranks to try, marks on candidates and notes; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simulate.common.toml_io import LARGEST_INTEGER
from simulate.config.method_table import DEFAULT_METHOD, default_options
from simulate.config.run import Run
from simulate.methods.plans import MERGE_EVERY
from simulate.models.shapes import ModelShape
from simulate.probe.recommend import Needs, recommend
from simulate.probe.schema import Probe, check_model, load_probe
from simulate.rules.method_plan import AdapterLayout, plan_of


class PlanProbe:
    """A probe of the network that is planned."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self.path = path
        self.probe: Probe = load_probe(path)
        check_model(self.probe, shape, path)
        # A probe describes rounds up to the length it measured, and, by an estimate, all longer ones.
        self._needs = {every: Needs.of(self.probe, every) for every in (1, LARGEST_INTEGER)}

    def needs(self, merge_every: int) -> Needs:
        """Return the needs of rounds of so many steps; the probe distinguishes short and long rounds."""
        return self._needs[1 if merge_every <= self.probe.settings.round_steps else LARGEST_INTEGER]

    def ranks(self, base: Run) -> tuple[int, ...]:
        """Return the recommended ranks for the heads and rounds that the plan tries."""
        return tuple(sorted({needs.rank(heads) for needs in self._tried(base) for heads in self._heads(base)}))

    def marks(self, run: Run) -> Iterator[str]:
        """Yield a mark where a candidate's rank lies below or above the probe's recommendation."""
        layout = _separate_heads(run)
        if layout is not None:
            yield from self.needs(run.method.round_steps).marks(layout.rank, run.heads)

    def notes(self, base: Run, chosen: Run | None) -> Iterator[str]:
        """Yield the probe's recommendations for the plan's devices, and how the choice compares with them."""
        probe, devices = self.probe, base.cluster.devices
        settings = probe.settings
        for needs in self._tried(base):
            advice = [f"{needs.rank(heads)} x {heads} heads" for heads in self._heads(base)]
            yield (
                f"probe {self.path}: recommends rank {' or '.join(advice)} for rounds of "
                f"{'up to' if needs.steps == settings.round_steps else 'about'} {needs.steps} steps, tried beside the "
                f"others; their update has 90 % of its squared norm in {needs.most} directions and 99 % in "
                f"{needs.nearly_all} (estimate: {probe.data.source}, seed {settings.seed}, {settings.warmup_steps} "
                f"dense steps with {settings.optimizer})"
            )
        batch = recommend(probe, devices, devices).batch_samples
        if batch is not None:
            yield (
                f"probe: gradient noise scale {batch.estimate:.0f} samples over all devices (estimate; "
                f"{batch.low:.0f} to {batch.high:.0f}), {max(1, round(batch.estimate / devices))} a device; larger "
                "batches bring little"
            )
        if chosen is not None and _separate_heads(chosen) is not None:
            marks = list(self.marks(chosen))
            if chosen.method.round_steps > settings.warmup_steps:
                marks.append(f"its T = {chosen.method.round_steps} is longer than what was probed, and needs more rank")
            if batch is not None and not batch.low <= chosen.samples_per_step <= batch.high:
                where = "below" if chosen.samples_per_step < batch.low else "above"
                marks.append(f"its batch of {chosen.samples_per_step} samples is {where} the noise scale's range")
            yield (
                "assumption: candidates rank by assumed samples as without a probe, which only marks them (!)"
                + (f"; the choice: {'; '.join(marks)}" if marks else "; the choice is within what the probe found")
            )

    def _tried(self, base: Run) -> list[Needs]:
        """Return the needs of the rounds that the plan tries, shorter ones first."""
        rounds: Sequence[int] = MERGE_EVERY  # the values of the search space, unless the user set one
        if _separate_heads(base) is not None and "merge_every" in base.method.model_fields_set:
            rounds = (base.method.round_steps,)
        return list(dict.fromkeys(self.needs(every) for every in rounds))

    def _heads(self, base: Run) -> list[int]:
        """Return the heads over all devices that the plan tries."""
        layout, devices = _separate_heads(base), base.cluster.devices
        if layout is not None and "heads_per_device" in base.method.model_fields_set:
            return [devices * layout.heads]
        tried = plan_of(default_options(DEFAULT_METHOD)).axes["heads_per_device"]
        return [devices * heads for heads in tried]


def _separate_heads(run: Run) -> AdapterLayout | None:
    """Return the pairs of a run whose heads train apart, which probes are for; None for all other runs."""
    plan = plan_of(run.method)
    return plan.adapters(run.cluster.devices) if plan.has_separate_heads else None
