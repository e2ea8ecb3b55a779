"""AdamW in torch's fused form: one pass over the state and no temporaries, unlike the foreach form.

The arithmetic is torch's (torch.optim.adamw.adamw); only the bookkeeping of torch.optim.AdamW stands here anew, for the
reason in simulate.optim.grouped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from simulate.optim.grouped import GroupedOptimizer, Groups


class AdamW(GroupedOptimizer):
    """AdamW over parameters (C, ...) with moments in the parameter's dtype, and a step counter on its device."""

    def __init__(
        self, params: Sequence[Tensor] | Groups, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group, parameters in self.with_gradients():
            states = [self.state_of(parameter) for parameter in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                params=parameters, grads=[parameter.grad for parameter in parameters if parameter.grad is not None],
                exp_avgs=[state["exp_avg"] for state in states], exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[], state_steps=[state["step"] for state in states],
                fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
