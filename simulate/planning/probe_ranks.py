"""What a plan takes from a probe: ranks to try, marks on candidates, notes; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simulate.common.toml_io import LARGEST_INTEGER
from simulate.config.run import Run
from simulate.methods.lte.options import LteOptions
from simulate.models.shapes import ModelShape
from simulate.planning.search_space import AXES, MERGE_EVERY
from simulate.probe.recommend import Needs, recommend
from simulate.probe.schema import Probe, check_model, load_probe


class PlanProbe:
    """A probe of the network that is planned."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self.path = path
        self.probe: Probe = load_probe(path)
        check_model(self.probe, shape, path)
        self._needs = {every: Needs.of(self.probe, every) for every in (1, LARGEST_INTEGER)}

    def needs(self, merge_every: int) -> Needs:
        """Return what rounds of so many steps need, as far as the probe went."""
        return self._needs[1 if merge_every <= self.probe.settings.round_steps else LARGEST_INTEGER]

    def ranks(self, base: Run) -> tuple[int, ...]:
        """Return the recommended ranks for the heads and rounds that the plan tries."""
        return tuple(sorted({needs.rank(heads) for needs in self._tried(base) for heads in self._heads(base)}))

    def marks(self, run: Run) -> Iterator[str]:
        """Say where a candidate's rank lies below or above what the probe found."""
        if isinstance(run.method, LteOptions):
            yield from self.needs(run.method.merge_every).marks(run.method.rank, run.heads)

    def notes(self, base: Run, chosen: Run | None) -> Iterator[str]:
        """Say what the probe recommends for the plan's devices, and where the choice stands."""
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
        if chosen is not None and isinstance(chosen.method, LteOptions):
            marks = list(self.marks(chosen))
            if chosen.method.merge_every > settings.warmup_steps:
                marks.append(f"its T = {chosen.method.merge_every} is longer than what was probed, and needs more rank")
            if batch is not None and not batch.low <= chosen.samples_per_step <= batch.high:
                where = "below" if chosen.samples_per_step < batch.low else "above"
                marks.append(f"its batch of {chosen.samples_per_step} samples is {where} the noise scale's range")
            yield (
                "assumption: candidates rank by assumed samples as without a probe, which only marks them (!)"
                + (f"; the choice: {'; '.join(marks)}" if marks else "; the choice is within what the probe found")
            )

    def _tried(self, base: Run) -> list[Needs]:
        """Return the needs of the rounds that the plan tries, shorter ones first."""
        method = base.method
        given = isinstance(method, LteOptions) and "merge_every" in method.model_fields_set
        rounds = (method.merge_every,) if given else MERGE_EVERY  # type: ignore[union-attr]
        return list(dict.fromkeys(self.needs(every) for every in rounds))

    def _heads(self, base: Run) -> list[int]:
        method = base.method
        given = isinstance(method, LteOptions) and "heads_per_device" in method.model_fields_set
        a_device = (method.heads_per_device,) if given else AXES["lte"]["heads_per_device"]  # type: ignore[union-attr]
        return [base.cluster.devices * heads for heads in a_device]
