"""Synthetic batches of a network's own shapes, for measuring and tracing; their content means nothing.

Legend: S samples.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from simulate.models.interfaces import NetworkOptions, ReadsText, SeesImages


def example_batch(model: NetworkOptions, samples: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, equal at every call: tokens (S, context), or images and their classes (S,)."""
    if model.unit == "samples":
        size = cast(SeesImages, model)
        images = torch.linspace(-1, 1, samples * size.colours * size.image**2)
        return images.view(samples, size.colours, size.image, size.image), torch.arange(samples) % size.classes
    text = cast(ReadsText, model)
    tokens = torch.arange(samples * text.context).view(samples, text.context) % text.vocab
    return tokens, tokens
