"""SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706): local AdamW, and sparse changes with decaying error feedback.

    e_n ← β·e_n + (θ_n − θ),   sent: C(e_n),   e_n ← e_n − C(e_n),   θ ← θ + α·mean_n(C(e_n)),   θ_n ← θ

C keeps the k largest of every 4,096 entries, rounded to the format of the wire (simulate.comm.sparse). Nothing but e_n
is kept beside the weights: it takes the place of DiLoCo's outer momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.methods.averaging import Averaging
from simulate.methods.local_training import LocalTraining
from simulate.methods.sparseloco.options import SparselocoOptions


class Sparseloco(LocalTraining):
    """Local training whose merges move by the largest entries of all devices' changes."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        options = run.of_devices(communicator.local_devices).method
        assert isinstance(options, SparselocoOptions)
        self.options = options
        super().__init__(run, communicator, device, network)
        self.averaging = Averaging(
            self.parameters, communicator, wire=options.wire, fragments=options.fragments, outer=self._outer,
            delayed=options.merge_delay > 0, sparsity=options.sparsity,
        )  # fmt: skip

    def _outer(self, name: str, last: Tensor, mean: Tensor) -> Tensor:
        return torch.lerp(last, mean, self.options.outer_learning_rate)
