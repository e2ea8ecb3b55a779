"""From run.toml to a network: the same weights for the same seed, whoever builds it."""

from __future__ import annotations

import torch
from torch import nn

from simulate.config import Run
from simulate.models.gpt import Gpt
from simulate.randomness import address

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def build_model(run: Run) -> nn.Module:
    """Return the plain network with its start weights, drawn in float32 from (seed, "weights"), in the run's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(run.train.seed, "weights"))
        model = Gpt(run.model.shape(), run.train.activation_checkpointing)
    return model.to(DTYPES[run.train.dtype])


def empty_model(run: Run) -> nn.Module:
    """Return the plain network without storage, to be called with somebody else's weights."""
    with torch.device("meta"):
        return Gpt(run.model.shape()).to(DTYPES[run.train.dtype]).eval()
