"""AdamW with both moments in 8 bits an element and one scale for every 256 (Dettmers et al. 2021, arXiv 2110.02861).

That is a quarter of their memory in fp32; methods use it with `train.optimizer_state = "8bit"`. The kernels are those
of bitsandbytes, which run on CPUs and old GPUs and update moments in place. torchao's optimizer needs a compiler, and
on GPUs Triton, which the oldest supported cards lack. bitsandbytes' own optimizer classes cut a flattened parameter
into blocks; here every row (copy or head) begins with a new block, so that no scale is shared by two devices.

Legend: C copies or heads, X elements of one, B blocks of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from simulate.common.errors import InputError
from simulate.layers.quantized import import_bitsandbytes
from simulate.optim.per_parameter import PerParameterOptimizer
from simulate.rules.optimizer import BLOCK_ELEMENTS, CPU_CHUNK_ELEMENTS

MOMENTS = ("exp_avg", "exp_avg_sq")
CODES, SCALES = "_codes", "_scales"
"""Suffixes of a moment's tensors in the optimizer's state."""


def check_installed() -> None:
    """Raise InputError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "train.optimizer_state = '8bit' needs the package bitsandbytes; pip install 'lte[quantize]', "
            "or --set train.optimizer_state=fp32"
        )


@cache
def _library() -> Any:
    """Import the kernels at their first use, since few runs have one."""
    check_installed()
    return import_bitsandbytes()


@cache
def _values(moment: str, device: torch.device) -> Tensor:
    """Return the values of a moment's 256 codes, in units of a block's scale; the second moment's have no sign."""
    return _library().create_dynamic_map(signed=moment == "exp_avg").to(device)


def moment_values(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of the first and of the second moment's codes, cached for each device."""
    first, second = (_values(moment, device) for moment in MOMENTS)
    return first, second


class AdamW8bit(PerParameterOptimizer):
    """AdamW over parameters (C, ...) in float32, moments as codes (C, ...) and scales (C, B)."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        _library()

    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        # On the host, also after a checkpoint has put it on a GPU, since reading it below would wait for the GPU.
        state["step"] = state["step"].cpu() + 1
        tensors = [parameter.grad, parameter, *(state[m + CODES] for m in MOMENTS)]
        scales = [state[m + SCALES] for m in MOMENTS]
        first, second = moment_values(parameter.device)
        beta1, beta2 = group["betas"]
        for (g, p, codes1, codes2), (scales1, scales2) in _parts(tensors, scales):
            _library().optimizer_update_8bit_blockwise(
                "adam", g, p, codes1, codes2, beta1, beta2, 0.0, 0.0, group["eps"], int(state["step"]), group["lr"],
                first, second, scales1, scales2, group["weight_decay"],
            )  # fmt: skip
            if isinstance(parameter, FakeTensor):  # the memory of one part stands for all of them
                break

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        blocks = -(-parameter[0].numel() // BLOCK_ELEMENTS)
        state = {"step": torch.tensor(0.0)}
        for moment in MOMENTS:
            state[moment + CODES] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[moment + SCALES] = parameter.new_zeros(len(parameter), blocks)
        return state


def _parts(tensors: list[Tensor], scales: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield views for one kernel call each: whole blocks of one row, or of all rows if these end with whole blocks."""
    rows, elements = len(tensors[0]), tensors[0][0].numel()
    flat = [tensor.reshape(-1) for tensor in tensors]
    flat_scales = [scale.view(-1) for scale in scales]
    if elements % BLOCK_ELEMENTS == 0:  # no block spans two rows, so all rows go in one call
        rows, elements = 1, rows * elements
    blocks = len(flat_scales[0]) // rows
    # On a CPU the kernel allocates scratch for all elements of a call, so it gets few at a time.
    limit = CPU_CHUNK_ELEMENTS if tensors[0].device.type == "cpu" else elements
    for row in range(rows):
        for first in range(0, elements, limit):
            last, start = min(first + limit, elements), row * blocks
            part_blocks = slice(start + first // BLOCK_ELEMENTS, start - (-last // BLOCK_ELEMENTS))  # rounded up
            part = slice(row * elements + first, row * elements + last)
            yield [tensor[part] for tensor in flat], [scale[part_blocks] for scale in flat_scales]


def moment_of(state: Mapping[str, Tensor], moment: str) -> Tensor:
    """Return the decoded values of a moment, (C, X)."""
    codes_CX, scales_CB = state[moment + CODES].flatten(1), state[moment + SCALES]
    scales_CX = scales_CB.repeat_interleave(BLOCK_ELEMENTS, dim=1)[:, : codes_CX.shape[1]]
    return _values(moment, codes_CX.device)[codes_CX.int()] * scales_CX


def zero_moment(state: Mapping[str, Tensor], moment: str, zeroed_CX: Tensor) -> None:
    """Set chosen entries of a moment to the code of zero, in place; scales stay."""
    zero_code = int((_values(moment, zeroed_CX.device) == 0).nonzero())
    state[moment + CODES].view(zeroed_CX.shape).masked_fill_(zeroed_CX, zero_code)
