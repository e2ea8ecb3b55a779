"""AdamW whose two moments are kept in 8 bits an element, with one scale for every 256 (Dettmers et al. 2021,
arXiv 2110.02861): a quarter of their memory.

bitsandbytes makes the step: its kernels run on CPU and on old GPUs alike, and update moments where they lie. torchao's
optimizer is compiled when it runs, which needs a compiler, and on GPUs Triton, that the oldest cards here lack. The
classes of bitsandbytes cut a flattened parameter into blocks; here every row of copies or heads begins with a block of
its own, so that no statistic is of two devices.

Legend: C copies or heads, X elements of one, B blocks of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from simulate.common.errors import InputError
from simulate.optim.per_parameter import PerParameterOptimizer
from simulate.rules.optimizer import BLOCK_ELEMENTS, CPU_CHUNK_ELEMENTS

MOMENTS = ("exp_avg", "exp_avg_sq")
CODES, SCALES = "_codes", "_scales"


def check_installed() -> None:
    """Raise InputError where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "train.optimizer_state = '8bit' needs the package bitsandbytes; pip install 'lte[quantize]', "
            "or --set train.optimizer_state=fp32"
        )


@cache
def _library() -> Any:
    """Import the kernels: late, because that takes seconds."""
    check_installed()
    with warnings.catch_warnings():  # of what it imports
        warnings.simplefilter("ignore")
        return import_module("bitsandbytes.functional")


@cache
def _values(moment: str, device: torch.device) -> Tensor:
    """Return what the 256 codes of a moment stand for, in units of a block's scale: the second has no sign."""
    return _library().create_dynamic_map(signed=moment == "exp_avg").to(device)


def moment_values(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the codes of the first and of the second moment stand for; made once for a device."""
    first, second = (_values(moment, device) for moment in MOMENTS)
    return first, second


class AdamW8bit(PerParameterOptimizer):
    """AdamW over parameters (C, ...) in float32, moments as codes (C, ...) and scales (C, B)."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        _library()

    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] = state["step"].cpu() + 1  # on the host, also after a checkpoint: its value is asked for
        tensors = [parameter.grad, parameter, *(state[m + CODES] for m in MOMENTS)]
        scales = [state[m + SCALES] for m in MOMENTS]
        first, second = moment_values(parameter.device)
        beta1, beta2 = group["betas"]
        for (g, p, codes1, codes2), (scales1, scales2) in _parts(tensors, scales):
            _library().optimizer_update_8bit_blockwise(
                "adam", g, p, codes1, codes2, beta1, beta2, 0.0, 0.0, group["eps"], int(state["step"]), group["lr"],
                first, second, scales1, scales2, group["weight_decay"],
            )  # fmt: skip
            if isinstance(parameter, FakeTensor):  # a part of what has no numbers shows what all of them take
                break

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.tensor(0.0)
        blocks = -(-parameter[0].numel() // BLOCK_ELEMENTS)
        for moment in MOMENTS:
            state[moment + CODES] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[moment + SCALES] = parameter.new_zeros(len(parameter), blocks)


def _parts(tensors: list[Tensor], scales: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield views of what one call of the kernel may take: whole blocks of one row, or of all where none is cut.

    On a CPU the kernel has working memory of its own, so it gets little at a time.
    """
    rows, elements = len(tensors[0]), tensors[0][0].numel()
    flat = [tensor.reshape(-1) for tensor in tensors]
    flat_scales = [scale.view(-1) for scale in scales]
    if elements % BLOCK_ELEMENTS == 0:
        rows, elements = 1, rows * elements
    blocks = len(flat_scales[0]) // rows
    limit = CPU_CHUNK_ELEMENTS if tensors[0].device.type == "cpu" else elements
    for row in range(rows):
        for first in range(0, elements, limit):
            last, start = min(first + limit, elements), row * blocks
            of_scales = slice(start + first // BLOCK_ELEMENTS, start - (-last // BLOCK_ELEMENTS))
            of_row = slice(row * elements + first, row * elements + last)
            yield [tensor[of_row] for tensor in flat], [scale[of_scales] for scale in flat_scales]


def moment_of(state: Mapping[str, Tensor], moment: str) -> Tensor:
    """Return a moment as numbers, (C, X)."""
    codes_CX, scales_CB = state[moment + CODES].flatten(1), state[moment + SCALES]
    scales_CX = scales_CB.repeat_interleave(BLOCK_ELEMENTS, dim=1)[:, : codes_CX.shape[1]]
    return _values(moment, codes_CX.device)[codes_CX.int()] * scales_CX


def zero_moment(state: Mapping[str, Tensor], moment: str, zeroed_CX: Tensor) -> None:
    """Set chosen entries of a moment to the code of zero, in place; scales stay."""
    zero_code = int((_values(moment, zeroed_CX.device) == 0).nonzero())
    state[moment + CODES].view(zeroed_CX.shape).masked_fill_(zeroed_CX, zero_code)
