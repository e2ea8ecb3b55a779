"""Local SGD and FedAvg with a whole plain model and a whole optimizer a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.common.seeding import generator
from simulate.config.run import Run
from simulate.methods.local_sgd.options import LocalSgdOptions
from tests.reference.compressed import RoundedMean
from tests.reference.dense import DenseTwin, flat, unflat


class LocalTwin(DenseTwin):
    """Devices that train by themselves; subclasses merge."""

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses, gradients = self.all_gradients(inputs, targets)
        for device, own in zip(self.devices, gradients, strict=True):
            device.apply(own, step)
        with torch.no_grad():
            self.merge_if_due(step)
        return losses

    def merge_if_due(self, step: int) -> None:
        """Merge after every T steps and after the last one."""
        raise NotImplementedError


class LocalSgdTwin(LocalTwin):
    """θ ← Σ_n m_n·θ_n / Σ_n m_n over the round's participants."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, LocalSgdOptions)
        super().__init__(run, start)
        self.options = run.method
        self.last = [p.detach().clone() for p in start.parameters()]
        self.rounded_mean = RoundedMean(len(self.devices), len(flat(self.last)), run.method.wire)

    def merge_if_due(self, step: int) -> None:
        if (step + 1) % self.options.merge_every and not self.is_last(step):
            return
        shares = self._shares(step // self.options.merge_every)
        weights = self._means([device.parameters for device in self.devices], shares)
        if self.options.merge_optimizer == "average":
            self._average_moments(shares)
        for device in self.devices:
            device.set_weights(weights)
            if self.options.merge_optimizer == "reset":
                device.forget_moments()
        self.last = [weight.clone() for weight in weights]

    def _shares(self, round_index: int) -> list[float]:
        """Return each device's share of the mean: its shard among the participants' shards, or nothing."""
        count = len(self.devices)
        sizes = list(self.run.data.shards or [1.0] * count)
        if self.options.participation < 1:
            chosen = max(1, round(self.options.participation * count))
            draw = generator(self.run.train.seed, "participants", round_index).choice(count, chosen, replace=False)
            sizes = [size if device in draw else 0.0 for device, size in enumerate(sizes)]
        return [size / sum(sizes) for size in sizes]

    def _means(self, copies: list[list[Tensor]], shares: list[float]) -> list[Tensor]:
        if self.options.wire == "full":
            return weighted(copies, shares)
        # Each device sends its share of the change, times N since what is made of them is a plain mean.
        changes = [flat(own) - flat(self.last) for own in copies]
        change = self.rounded_mean.of([len(shares) * share * c for share, c in zip(shares, changes, strict=True)])
        return [last + c for last, c in zip(self.last, unflat(change, self.last), strict=True)]

    def _average_moments(self, shares: list[float]) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            moments = [[device.optimizer.state[p][key] for p in device.parameters] for device in self.devices]
            means = weighted(moments, shares)
            for own in moments:
                for moment, value in zip(own, means, strict=True):
                    moment.copy_(value)


def weighted(copies: list[list[Tensor]], shares: list[float]) -> list[Tensor]:
    """Return each tensor's weighted sum over devices."""
    return [
        sum((share * tensor for share, tensor in zip(shares, tensors, strict=True)), torch.zeros_like(tensors[0]))
        for tensors in zip(*copies, strict=True)
    ]
