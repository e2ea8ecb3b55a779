"""Draws of A that pick columns, with whole permutation matrices, of which every head takes its rows."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from simulate.common.seeding import generator
from simulate.config.run import Run
from simulate.methods.build_network import build_model
from tests.reference.joint_draw import joint_draw
from tests.reference.lora import Draw


def _sliced(random: np.random.Generator, inputs: int, rank: int) -> np.ndarray:
    """Return the inputs slice by slice, in a random order; what is left over is cut out between two slices."""
    order, gap = random.permutation(inputs // rank), int(random.integers(inputs // rank + 1)) * rank
    kept = [*range(gap), *range(gap + inputs % rank, inputs)]
    return np.concatenate([kept[index * rank : (index + 1) * rank] for index in order])


def column_draw(run: Run) -> Draw:
    """Return draws of dense A: rows of a permutation where all heads cover a layer's inputs, joint draws elsewhere."""
    network, rank, seed, jointly = build_model(run), run.method.rank, run.train.seed, joint_draw(run)

    @cache
    def draw(name: str, head: int, steps_done: int) -> Tensor:
        inputs = network.get_parameter(name).shape[1]
        if run.heads * rank < inputs:
            return jointly(name, head, steps_done)
        fit = inputs // rank
        random = generator(seed, run.method.draws, name.removesuffix(".weight"), head // fit, steps_done)
        order = _sliced(random, inputs, rank) if run.method.draws == "slices" else random.permutation(inputs)
        permutation_II = torch.eye(inputs, dtype=torch.float64)[torch.from_numpy(order)]
        first = head % fit * rank
        return math.sqrt(inputs / rank) * permutation_II[first : first + rank]

    return draw
