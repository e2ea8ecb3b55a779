"""Joint draws of A with whole matrices: Q = Π·C·D·C·D·C·D, of which every head takes its rows."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from simulate.common.seeding import generator
from simulate.config.run import Run
from simulate.methods.build_network import build_model
from simulate.methods.lte.options import LteOptions
from tests.reference.lora import Draw


def joint_draw(run: Run) -> Draw:
    """Return draws whose rows are orthogonal over consecutive heads, of as many as fit into a layer's inputs."""
    assert isinstance(run.method, LteOptions)
    network, rank, seed = build_model(run), run.method.rank, run.train.seed

    @cache
    def draw(name: str, head: int, steps_done: int) -> Tensor:
        inputs = network.get_parameter(name).shape[1]
        fit = inputs // rank
        q_II = random_orthogonal(inputs, (seed, name.removesuffix(".weight"), head // fit, steps_done))
        first = head % fit * rank
        return math.sqrt(inputs / rank) * q_II[first : first + rank]

    return draw


def random_orthogonal(size: int, where: tuple[int, str, int, int]) -> Tensor:
    """Return the matrix that a group of heads shares, (I, I)."""
    seed, *rest = where
    random = generator(seed, "joint adapters", *rest)
    order = random.permutation(size)
    q_II = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        q_II[row, int(order[row])] = 1.0
    for _ in range(3):
        signs = [1.0 if bit else -1.0 for bit in random.integers(0, 2, size)]
        q_II = q_II @ hartley_matrix(size) @ torch.diag(torch.tensor(signs, dtype=torch.float64))
    return q_II


def hartley_matrix(size: int) -> Tensor:
    """Return C, C_ij = (cos + sin)(2π·i·j/I) / sqrt(I)."""
    angles = [[2 * math.pi * (i * j % size) / size for j in range(size)] for i in range(size)]
    return torch.tensor([[math.cos(x) + math.sin(x) for x in row] for row in angles], dtype=torch.float64) / size**0.5
