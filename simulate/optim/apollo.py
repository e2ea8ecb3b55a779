"""APOLLO: a gradient's rows or columns get the sizes that Adam would give them, estimated from a random projection.

For a matrix whose shorter side is M and whose longer one is N, with Adam's moments of R alone (r·N elements each):

    R = P·G,   P (r, M) ~ N(0, 1/r), drawn anew every `refresh_every` steps
    M_R ← β1·M_R + (1−β1)·R,   V_R ← β2·V_R + (1−β2)·R²,   R̃ = M̂_R / (√V̂_R + ε)
    s_j = ‖R̃[:, j]‖ / ‖R[:, j]‖,   G̃ = G·diag(s),   ‖G̃‖ at most 1.01 times that of the step before
    W ← W − lr·λ·W − lr·scale·√(M/r)·G̃

(Zhu et al. 2024, arXiv 2412.05270, algorithm 1; moments with Adam's corrections for bias; the limit on growth is that
of Fira, arXiv 2410.01623.) Sizes out of r rows are about √(r/M) of those out of M, so that with the root a scale of 1
gives steps as large as Adam's. GaLore (arXiv 2403.03507) needs a singular value decomposition for P, whose signs and
ties differ from machine to machine; a draw is the same on all.

Legend: C copies, R projected rows, M the shorter and N the longer side of a matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from simulate.common.seeding import address
from simulate.optim.grouped import Groups
from simulate.optim.per_parameter import PerParameterOptimizer
from simulate.rules.optimizer import projected_rank

GROWTH_LIMIT = 1.01
"""Most that the norm of a matrix's scaled gradient grows from one step to the next."""
SMALLEST_NORM = 1e-8
"""Added to norms that are divided by, as in the authors' implementation."""


class Apollo(PerParameterOptimizer):
    """APOLLO over parameters (C, ., .), each copy by itself; all copies and processes have one projection."""

    def __init__(
        self, params: Groups, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: int | None = None, scale: float = 1.0, refresh_every: int = 200, seed: int = 0,
    ) -> None:  # fmt: skip
        """Divide the parameters among groups; a rank of None is a quarter of each matrix's shorter side."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scale": scale})
        self.rank, self.refresh_every, self.seed = rank, refresh_every, seed
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        # A parameter's place is its address, since all processes have the same parameters in the same order.
        self.places = {parameter: place for place, parameter in enumerate(parameters)}
        self.projections: dict[Tensor, tuple[int, Tensor]] = {}
        """Each parameter's projection (R, M), and which one it is; no state, since it can be drawn again."""

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        copies, *sides = parameter.shape
        size = copies, projected_rank(self.rank, *sides), max(sides)
        return {
            "step": torch.tensor(0.0),
            "exp_avg": parameter.new_zeros(size),
            "exp_avg_sq": parameter.new_zeros(size),
            "norm": parameter.new_zeros(copies),
        }

    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        is_tall = parameter.shape[1] > parameter.shape[2]
        g_CMN = gradient.transpose(1, 2) if is_tall else gradient
        # On the host, also after a checkpoint has put it on a GPU, since reading it below would wait for the GPU.
        state["step"] = state["step"].cpu() + 1
        step = 1 if isinstance(state["step"], FakeTensor) else int(state["step"])
        projection_RM = self._projection(parameter, (step - 1) // self.refresh_every)
        # The gradient is freed after the step, so that it is scaled in place; each tensor of R·N elements goes before
        # the next one comes (simulate.costs.moments counts one).
        g_CMN.mul_(self._scales(state, projection_RM, g_CMN, step, group).unsqueeze(1))
        g_CMN.mul_(_limited(state["norm"], torch.linalg.vector_norm(g_CMN, dim=(1, 2))).view(-1, 1, 1))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rank, shorter = projection_RM.shape
        parameter.add_(gradient, alpha=-group["lr"] * group["scale"] * math.sqrt(shorter / rank))

    def _projection(self, parameter: Tensor, number: int) -> Tensor:
        """Return a parameter's projection of this number, (R, M)."""
        if parameter not in self.projections or self.projections[parameter][0] != number:
            rank = projected_rank(self.rank, *parameter.shape[1:])
            # Drawn on the host: devices that share weights may be of several kinds, and must draw alike.
            draw = torch.Generator().manual_seed(address(self.seed, "apollo", self.places[parameter], number))
            normal_RM = torch.randn(rank, min(parameter.shape[1:]), generator=draw, dtype=parameter.dtype)
            self.projections[parameter] = number, normal_RM.div_(math.sqrt(rank)).to(parameter.device)
        return self.projections[parameter][1]

    def _scales(
        self, state: dict[str, Tensor], projection_RM: Tensor, g_CMN: Tensor, step: int, group: dict[str, Any]
    ) -> Tensor:
        """Bring a gradient into its moments; return the scale of each of the longer side's channels, (C, N)."""
        (beta1, beta2), first, second = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        r_CRN = torch.bmm(projection_RM.expand(len(g_CMN), -1, -1), g_CMN)
        norms_CN = torch.linalg.vector_norm(r_CRN, dim=1)
        first.lerp_(r_CRN, 1 - beta1)
        second.mul_(beta2).addcmul_(r_CRN, r_CRN, value=1 - beta2)
        del r_CRN
        adapted_CRN = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        torch.div(first, adapted_CRN, out=adapted_CRN).div_(1 - beta1**step)
        return torch.linalg.vector_norm(adapted_CRN, dim=1).div_(norms_CN.add_(SMALLEST_NORM))


def _limited(last_C: Tensor, norm_C: Tensor) -> Tensor:
    """Return the factors, (C,), that limit the growth of norms; put the limited norms in place of the last ones."""
    most_C = GROWTH_LIMIT * last_C
    # A norm of zero is that of no step, or of one without a gradient: the next is not limited.
    factor_C = torch.where((last_C > 0) & (norm_C > most_C), most_C / norm_C, 1.0)
    last_C.copy_(norm_C * factor_C)
    return factor_C
