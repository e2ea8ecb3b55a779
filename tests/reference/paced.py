"""Devices that take only some of a round's steps: each is told how many, and stands still for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.diloco import DilocoTwin
from tests.reference.local_sgd import LocalSgdTwin, LocalTwin, weighted
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.reference.sparseloco import SparselocoTwin


def counts_at(run: Run, step: int) -> list[int]:
    """Return every device's steps in the round that a step belongs to; the last round may be shorter."""
    every, given = run.method.round_steps, run.method.given_steps
    assert given is not None
    left = run.train.steps - step // every * every
    return [min(count, left) for count in given[step // every % len(given)]]


def trains(run: Run, step: int) -> list[bool]:
    """Return which devices take a step."""
    return [step % run.method.round_steps < count for count in counts_at(run, step)]


def count_skipped(optimizer: torch.optim.AdamW, steps_done: int) -> None:
    """Set Adam's step counter to the run's, wherever there is one."""
    for state in optimizer.state.values():
        state["step"].fill_(steps_done)


class PacedLocalTwin(LocalTwin):
    """Local training with as many steps as each device is told."""

    last_losses: Tensor

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses, gradients = self.all_gradients(inputs, targets)
        taken = trains(self.run, step)
        for device, own, goes_on in zip(self.devices, gradients, taken, strict=True):
            if goes_on:
                device.apply(own, step)
        self.last_losses = torch.where(torch.tensor(taken), losses, losses if step == 0 else self.last_losses)
        every = self.run.method.round_steps
        if (step + 1) % every == 0 or self.is_last(step):
            for device in self.devices:
                count_skipped(device.optimizer, step + 1)
        with torch.no_grad():
            self.merge_if_due(step)
        return self.last_losses

    def shares_at(self, step: int) -> list[float]:
        """Return w_n = m_n·c_n / Σ."""
        sizes = self.run.data.shards or [1.0] * len(self.devices)
        parts = [size * count for size, count in zip(sizes, counts_at(self.run, step), strict=True)]
        return [part / sum(parts) for part in parts]


class PacedLocalSgdTwin(PacedLocalTwin, LocalSgdTwin):
    """Weights are averaged by the steps taken."""

    def _shares(self, round_index: int) -> list[float]:
        return self.shares_at(round_index * self.options.merge_every)


class PacedDilocoTwin(PacedLocalTwin, DilocoTwin):
    """Deltas are averaged by the steps taken; knows no compressed wire."""

    def merge_if_due(self, step: int) -> None:
        self.merged_step = step
        super().merge_if_due(step)

    def deltas(self, part: int) -> list[Tensor]:
        means = weighted([device.parameters for device in self.devices], self.shares_at(self.merged_step))
        return [self.outer[i] - means[i] for i in self.fragments[part]]


class PacedSparselocoTwin(PacedLocalTwin, SparselocoTwin):
    """Changes are weighted by the steps taken before their largest entries are looked for."""

    def merge_if_due(self, step: int) -> None:
        self.weights = self.shares_at(step)
        super().merge_if_due(step)


class PacedLteTwin(LteTwin):
    """Products and parameters are averaged by the steps taken."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        self.last_losses = torch.zeros(len(self.devices), dtype=torch.float64)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        count = len(self.devices)
        parts = zip(self.devices, inputs.chunk(count), targets.chunk(count), trains(self.run, step), strict=True)
        for n, (device, x, y, goes_on) in enumerate(parts):
            if goes_on:
                self.last_losses[n] = device.step(x, y, step)
        counts = counts_at(self.run, step)
        self.shares = [own / sum(counts) for own in counts]
        for fragment in self.fragments_due(step + 1):
            for device in self.devices:
                count_skipped(device.optimizer, step + 1)
            self.merge(fragment, step + 1)
        return self.last_losses.clone()

    def merge_adapted(self, names: list[str]) -> None:
        per_device = self.options.heads_per_device
        for name in names:
            of_devices = [
                torch.stack([head.change(name) for head in device.heads]).sum(0) / per_device for device in self.devices
            ]
            mean = sum(share * delta for share, delta in zip(self.shares, of_devices, strict=True))
            self.add_to_all(name, self.options.scale * mean)

    def average(self, columns: list[tuple[Tensor, ...]]) -> None:
        for copies in columns:
            mean = sum(share * copy for share, copy in zip(self.shares, copies, strict=True))
            for parameter in copies:
                parameter.copy_(mean)


class PacedLteFrozenATwin(PacedLteTwin, LteFrozenATwin):
    """The same with heads that train B alone."""
