"""What a plan takes from a probe: ranks to try, marks on candidates, notes; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ltecli.grid import AXES
from simulate.config import Run
from simulate.models.shapes import ModelShape
from simulate.options import LteOptions
from simulate.probe.document import Probe, check_model, load_probe
from simulate.probe.recommend import Needs, recommend


class PlanProbe:
    """A probe of the network that is planned."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self.path = path
        self.probe: Probe = load_probe(path)
        check_model(self.probe, shape, path)
        self.needs = Needs.of(self.probe)

    def ranks(self, base: Run) -> tuple[int, ...]:
        """Return the recommended ranks for the heads that the plan tries."""
        return tuple(sorted({self.needs.rank(heads) for heads in self._heads(base)}))

    def marks(self, run: Run) -> Iterator[str]:
        """Say where a candidate's rank lies below or above what the probe found."""
        if isinstance(run.method, LteOptions):
            yield from self.needs.marks(run.method.rank, run.heads)

    def notes(self, base: Run, chosen: Run | None) -> Iterator[str]:
        """Say what the probe recommends for the plan's devices, and where the choice stands."""
        probe, devices = self.probe, base.cluster.devices
        advice = [f"{self.needs.rank(heads)} x {heads} heads" for heads in self._heads(base)]
        yield (
            f"probe {self.path}: recommends rank {' or '.join(advice)}, added to the candidates; a round's update has "
            f"90 % of its squared norm in {self.needs.most} directions (estimate: {probe.settings.warmup_steps} dense "
            f"steps with {probe.settings.optimizer} on {probe.data.source}, seed {probe.settings.seed})"
        )
        batch = recommend(probe, devices, devices).batch_samples
        if batch is not None:
            yield (
                f"probe: gradient noise scale {batch.estimate:.0f} samples over all devices (estimate; "
                f"{batch.low:.0f} to {batch.high:.0f}), {max(1, round(batch.estimate / devices))} a device; larger "
                "batches bring little"
            )
        if chosen is not None and isinstance(chosen.method, LteOptions):
            marks = list(self.needs.marks(chosen.method.rank, chosen.heads))
            yield (
                "assumption: candidates rank by assumed samples as without a probe, which only marks them (!)"
                + (f"; the choice: {'; '.join(marks)}" if marks else "; the choice is within what the probe found")
            )

    def _heads(self, base: Run) -> list[int]:
        method = base.method
        given = isinstance(method, LteOptions) and "heads_per_device" in method.model_fields_set
        a_device = (method.heads_per_device,) if given else AXES["lte"]["heads_per_device"]  # type: ignore[union-attr]
        return [base.cluster.devices * heads for heads in a_device]
