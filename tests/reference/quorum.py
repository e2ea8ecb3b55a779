"""Merges without some devices: everyone has a whole model of its own, and keeps the one that it last started from.

The engine moves a late device to each new base as merges pass it by. Here it stays on its old one, and what it brings
is the difference from that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.common import adapted_names
from tests.reference.diloco import DilocoTwin
from tests.reference.local_sgd import LocalSgdTwin, LocalTwin
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.reference.paced import count_skipped


class Roll:
    """The rows of merges_given, read one device at a time."""

    def __init__(self, run: Run) -> None:
        assert run.cluster.merges_given is not None
        self.rows, self.every, self.steps = run.cluster.merges_given, run.method.round_steps, run.train.steps
        self.p = 0.5 if run.cluster.age_exponent is None else run.cluster.age_exponent
        self.sizes = run.data.shards or [1.0] * run.cluster.devices
        self.devices = range(run.cluster.devices)

    def given(self, merge: int, n: int) -> int:
        return 1 if merge < 0 else self.rows[merge % len(self.rows)][n]

    def age(self, merge: int, n: int) -> int:
        return 0 if self.given(merge - 1, n) else 1 + self.age(merge - 1, n)

    def takes(self, merge: int, n: int) -> int:
        """Return the steps of a round: of one that a late device spends waiting none."""
        if self.given(merge - 1, n) == 0:
            return 0
        later = merge
        while self.given(later, n) == 0 and later * self.every < self.steps:
            later += 1
        return 0 if later * self.every >= self.steps else min(self.given(later, n), self.steps - merge * self.every)

    def present(self, merge: int) -> list[int]:
        return [n for n in self.devices if self.given(merge, n) > 0]

    def shares(self, merge: int, sized: bool = True) -> dict[int, float]:
        """Return w_n = m_n·c_n·(1 + age)^−p / Σ of those who take part."""
        parts = {}
        for n in self.present(merge):
            age = self.age(merge, n)
            size = self.sizes[n] if sized else 1.0
            parts[n] = size * self.takes(merge - age, n) * (1 + age) ** -self.p
        return {n: part / sum(parts.values()) for n, part in parts.items()}

    def trains(self, step: int, n: int) -> bool:
        return step % self.every < self.takes(step // self.every, n)

    def merges_after(self, step: int) -> bool:
        return (step + 1) % self.every == 0 or step + 1 == self.steps


class QuorumLocalTwin(LocalTwin):
    """Local training; `weights` are the merged ones, `bases` what each device started from."""

    sized = True

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.roll = Roll(run)
        self.weights = [p.detach().clone() for p in start.parameters()]
        self.bases = [[p.detach().clone() for p in start.parameters()] for _ in self.devices]
        self.last_losses = torch.zeros(len(self.devices), dtype=torch.float64)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses, gradients = self.all_gradients(inputs, targets)
        for n, (device, own) in enumerate(zip(self.devices, gradients, strict=True)):
            if self.roll.trains(step, n):
                device.apply(own, step)
                self.last_losses[n] = losses[n]
        if self.roll.merges_after(step):
            for device in self.devices if not self.forgets else ():
                count_skipped(device.optimizer, step + 1)
            with torch.no_grad():
                self._merge_those_present(step // self.roll.every)
        return self.last_losses.clone()

    def _merge_those_present(self, merge: int) -> None:
        shares = self.roll.shares(merge, self.sized)
        for i, weight in enumerate(self.weights):
            change = sum(share * (self.devices[n].parameters[i] - self.bases[n][i]) for n, share in shares.items())
            weight.copy_(self.moved(i, weight, change))
        for n, device in enumerate(self.devices):
            if self.roll.given(merge, n) != 0:  # who is lost takes the merged weights, too
                device.set_weights(self.weights)
                self.bases[n] = [weight.clone() for weight in self.weights]
                if self.forgets and n in shares:
                    device.forget_moments()

    forgets = False

    def moved(self, i: int, weight: Tensor, change: Tensor) -> Tensor:
        return weight + change

    def merged_state(self) -> dict[str, Tensor]:
        self.devices[0].set_weights(self.weights)
        return super().merged_state()


class QuorumLocalSgdTwin(QuorumLocalTwin, LocalSgdTwin):
    """Weights move by the mean change."""

    @property
    def forgets(self) -> bool:  # type: ignore[override]
        return self.options.merge_optimizer == "reset"


class QuorumDilocoTwin(QuorumLocalTwin, DilocoTwin):
    """Weights move by the outer step, whose velocity only merges change."""

    sized = False

    def moved(self, i: int, weight: Tensor, change: Tensor) -> Tensor:
        self.outer_step(i, -change)
        return self.outer[i]


class QuorumLteTwin(LteTwin):
    """Products add to W, and other parameters move by their mean change."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        self.roll = Roll(run)
        self.merged = {name: tensor.detach().clone() for name, tensor in start.state_dict().items()}
        self.bases = [dict(self.merged) for _ in self.devices]
        self.last_losses = torch.zeros(len(self.devices), dtype=torch.float64)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        count = len(self.devices)
        for n, (x, y) in enumerate(zip(inputs.chunk(count), targets.chunk(count), strict=True)):
            if self.roll.trains(step, n):
                self.last_losses[n] = self.devices[n].step(x, y, step)
        if self.roll.merges_after(step):
            self._merge_those_present(step // self.roll.every, step + 1)
        return self.last_losses.clone()

    @torch.no_grad()
    def _merge_those_present(self, merge: int, steps_done: int) -> None:
        shares = self.roll.shares(merge, sized=False)
        adapted = adapted_names(self.devices[0].model)
        names = [name for name, _ in self.devices[0].model.named_parameters()]
        for name in names:
            of_adapters = name in adapted
            changes = {
                n: self._product(n, name) if of_adapters else self._own(n, name) - self.bases[n][name] for n in shares
            }
            self.merged[name] = self.merged[name] + sum(shares[n] * change for n, change in changes.items())
        for n, device in enumerate(self.devices):
            count_skipped(device.optimizer, steps_done)
            if self.roll.given(merge, n) == 0:
                continue
            self.bases[n] = {name: tensor.clone() for name, tensor in self.merged.items()}
            for name in names:
                device.model.get_parameter(name).copy_(self.merged[name])
            for head in device.heads if n in shares else ():
                for name in adapted:
                    self._start_round(device, head, name, steps_done)

    def _own(self, n: int, name: str) -> Tensor:
        return self.devices[n].model.get_parameter(name)

    def _product(self, n: int, name: str) -> Tensor:
        heads = self.devices[n].heads
        return self.options.scale * torch.stack([head.b[name] @ head.a[name] for head in heads]).mean(0)

    def merged_state(self) -> dict[str, Tensor]:
        # Buffers and shared weights are the plain network's own.
        own = self.devices[0].model
        with torch.no_grad():
            for name, _ in own.named_parameters():
                own.get_parameter(name).copy_(self.merged[name])
        return {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}


class QuorumLteFrozenATwin(QuorumLteTwin, LteFrozenATwin):
    """The same with heads that train B alone."""
