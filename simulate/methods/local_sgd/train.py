"""Local SGD and FedAvg: every device trains all weights by itself; every T steps they are averaged.

    θ ← Σ_n w_n·θ_n,   w_n = 1/N        (Stich 2018, arXiv 1805.09767; here with AdamW as the local optimizer)
                       w_n = m_n/Σ m    (McMahan et al. 2017, arXiv 1602.05629, algorithm 1, with the published erratum:
                                         m_n is the size of the shard, the sum is over the round's participants)

With `participation` below 1, max(1, round(share·N)) devices drawn for each round train in it; devices are stateless
clients then: they start from the server's weights with a new optimizer. In a simulation the others compute along, but
count for nothing. simulate.methods.registry builds the class; its steps are simulate.methods.local_training's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.common.seeding import generator
from simulate.config.run import Run
from simulate.methods.averaging import Averaging
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.local_training import LocalTraining
from simulate.optim.moments import forget_moments

MOMENTS = ("exp_avg", "exp_avg_sq")


class LocalSgd(LocalTraining):
    """Periodic averaging of parameters, weighted by shards, by all devices or some."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        options = run.of_devices(communicator.local_devices).method
        assert isinstance(options, LocalSgdOptions)
        self.options = options
        super().__init__(run, communicator, device, network)
        server = self.options.merge_transport == "server"
        delayed = self.options.merge_delay > 0
        wire, fewest = self.options.wire, run.cluster.fewest
        self.averaging = Averaging(self.parameters, communicator, server, wire, delayed=delayed, fewest=fewest)

    def active(self, step: int) -> list[int]:
        count = self.options.participants(self.run.cluster.devices)
        return participants(self.run, count, step // self.options.merge_every)

    def merge(self, step: int) -> None:
        if self.options.merge_optimizer == "average":
            self._average_with_moments(self.merge_weights(step))
            self.healthy_N = None
        else:
            super().merge(step)
        self._forget_moments()

    def apply_merged_fragment(self, index: int) -> None:
        super().apply_merged_fragment(index)
        self._forget_moments()

    def _forget_moments(self) -> None:
        if self.options.merge_optimizer == "reset":
            forget_moments(self.stepper.state, self.parameters.values())

    def merge_weights(self, step: int) -> Tensor | None:
        shards, devices = self.run.data.shards, self.run.cluster.devices
        if self.options.participants(devices) == devices:
            return self.shares(shards)
        # w_n = m_n/Σ m over the round's participants (FedAvg, algorithm 1, with the erratum).
        active = self.active(step)
        return self.shares([size if n in active else 0.0 for n, size in enumerate(shards or [1.0] * devices)])

    @torch.no_grad()
    def _average_with_moments(self, weights_N: Tensor | None) -> None:
        """Average parameters and both of Adam's moments in one merge, as if moments were parameters."""
        # In one merge, so that they share messages; no delay, wire or fragments go with averaged moments.
        moments = [self.stepper.state[p][key] for key in MOMENTS for p in self.parameters.values()]
        tensors = [*self.parameters.values(), *moments]
        names = [str(index) for index in range(len(tensors))]
        everything = dict(zip(names, tensors, strict=True))
        server = self.options.merge_transport == "server"
        Averaging(everything, self.communicator, server).merge(0, weights_N)
        for name, last in self.averaging.last.items():  # kept for diagnostics alone
            last.copy_(self.parameters[name][0])


def participants(run: Run, count: int, round_index: int) -> list[int]:
    """Return the devices that train in a round, in global order: all, or a draw addressed by the round."""
    devices = run.cluster.devices  # FedAvg's S_t: a random set of max(C·K, 1) clients (algorithm 1)
    if count == devices:
        return list(range(devices))
    draw = generator(run.train.seed, "participants", round_index)
    return sorted(int(device) for device in draw.choice(devices, size=count, replace=False))
