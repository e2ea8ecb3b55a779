"""Muon for matrices with a leading axis of copies or heads: steps whose singular values are all about one.

    M ← μ·M + (1−μ)·G,   U = NewtonSchulz(μ·M + (1−μ)·G),   W ← W − lr·0.2·sqrt(max(rows, columns))·U

(Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor makes steps as large as
Adam's, after Liu et al. 2025, arXiv 2502.16982, equation 4.) It keeps one moment, and Adam two. torch's own Muon takes
single matrices only.

Legend: C copies or heads, M rows, N columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from simulate.costs.flops import ITERATIONS
from simulate.optim.per_parameter import PerParameterOptimizer
from simulate.rules.optimizer import through_gram

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial that takes singular values in (0, 1] to about one."""
ADAM_ROOT_MEAN_SQUARE = 0.2
"""Typical root mean square of Adam's steps, relative to the learning rate."""


def orthogonalise(g_CMN: Tensor) -> Tensor:
    """Return an approximation of U·Vᵀ for each matrix U·S·Vᵀ, with singular values between about 0.7 and 1.2."""
    tall = g_CMN.shape[1] > g_CMN.shape[2]
    x = g_CMN.transpose(1, 2) if tall else g_CMN  # the Gram matrix is then the smaller of the two
    # The iteration needs singular values of at most 1, and the Frobenius norm bounds the largest.
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)
    if through_gram(*x.shape[1:]):
        x = _polynomial(x @ x.transpose(1, 2)) @ x
    else:
        a, b, c = COEFFICIENTS
        for _ in range(ITERATIONS):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def _polynomial(gram_CMM: Tensor) -> Tensor:
    """Return the product Q of all p(K), so that Q·X is the result of iterating X ← p(X·Xᵀ)·X.

    p(K) = a + b·K + c·K², and the next K is p·K·p, because all are polynomials of the first K and commute. In single
    precision the relative error is up to 3e-4 if some singular values are far below the largest; the iteration's own
    spread, 0.7 to 1.2, is much larger.
    """
    a, b, c = COEFFICIENTS
    product = None
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram_CMM, gram_CMM, gram_CMM, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < ITERATIONS:  # the last K would not be used
            gram_CMM = factor @ gram_CMM @ factor
    assert product is not None
    return product


class Muon(PerParameterOptimizer):
    """Muon with Nesterov momentum and decoupled weight decay over parameters (C, M, N)."""

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter)}

    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        momentum, share, gradient = self.state[parameter]["momentum"], group["momentum"], parameter.grad
        assert gradient is not None
        momentum.lerp_(gradient, 1 - share)
        update = orthogonalise(gradient.lerp(momentum, share))  # Nesterov: momentum once more, with the new gradient
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = ADAM_ROOT_MEAN_SQUARE * math.sqrt(max(parameter.shape[1:]))
        parameter.add_(update, alpha=-group["lr"] * size)
