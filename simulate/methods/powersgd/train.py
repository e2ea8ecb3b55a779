"""PowerSGD (Vogels et al. 2019, arXiv 1905.13727, algorithm 1): gradients as rank-r products, with error feedback.

For each matrix, device n, with the error E_n of the last step and the Q that it left:

    M_n = G_n + E_n,   P = orthonormal(Σ_n M_n·Q),   Q = mean_n(M_nᵀ·P),   Ĝ = P·Qᵀ,   E_n = M_n − Ĝ

(the error is against the aggregate, as in the authors' code). Ĝ is what AdamW steps with. Vectors, and matrices that
the factors would not shrink, travel as they are.

Legend: L local devices, O outputs, I inputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.common.seeding import address
from simulate.config.run import Run
from simulate.methods.gradient_averaging import (
    GradientMethod,
    all_reduce_packed,
    mean_over_devices,
    take_gradients,
)
from simulate.methods.powersgd.options import PowerSgdOptions


class PowerSgd(GradientMethod):
    """Dense training whose gradients travel as two thin matrices."""

    per_device = True

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        assert isinstance(run.method, PowerSgdOptions)
        super().__init__(run, communicator, device, network)
        rank = run.method.rank
        matrices = {n: p for n, p in self.parameters.items() if run.method.is_compressible(p.shape[1:])}
        self.errors = {n: p.new_zeros(self.local_devices, *p.shape[1:]) for n, p in matrices.items()}
        self.factors = {n: self._start(n, p.shape[2], rank).to(p) for n, p in matrices.items()}

    def _start(self, name: str, inputs: int, rank: int) -> Tensor:
        draw = torch.Generator().manual_seed(address(self.run.train.seed, "powersgd", name))
        return torch.randn(inputs, rank, generator=draw, dtype=torch.float64)

    def average_gradients(self) -> None:
        gradients = take_gradients(self.leaves)
        # M_n = G_n + E_n in the errors' own memory.
        for name, error_LOI in self.errors.items():
            error_LOI.add_(gradients.pop(name))
        # P = orthonormal(Σ_n M_n·Q): the sum will do where the mean is meant, since QR takes the scale out.
        p = {name: (m_LOI @ self.factors[name]).sum(0) for name, m_LOI in self.errors.items()}
        all_reduce_packed(list(p.values()), self.communicator)
        p = {name: torch.linalg.qr(p_OR).Q for name, p_OR in p.items()}
        # Q = mean_n(M_nᵀ·P), which also starts the next step's power iteration.
        q = {name: (m_LOI.transpose(1, 2) @ p[name]).sum(0) for name, m_LOI in self.errors.items()}
        mean_over_devices(list(q.values()), self.communicator)
        for name, m_LOI in self.errors.items():
            self.factors[name].copy_(q[name])
            # Ĝ = P·Qᵀ
            mean_OI = p[name] @ q[name].t()
            m_LOI.sub_(mean_OI)  # M − Ĝ: the next step's error
            self.parameters[name].grad = mean_OI.unsqueeze(0)
        rest = {name: gradient.sum(0, keepdim=True) for name, gradient in gradients.items()}
        mean_over_devices(list(rest.values()), self.communicator)
        for name, mean in rest.items():
            self.parameters[name].grad = mean

    def extra_state(self) -> dict[str, Tensor]:
        factors = {f"factor.{name}": q_IR for name, q_IR in self.factors.items()}
        return {**factors, **{f"error.{name}": error for name, error in self.errors.items()}}
