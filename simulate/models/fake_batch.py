"""Synthetic batches of a network's own shapes, for measuring and tracing; their content means nothing.

A network on samples of any shape gets samples of its data set, since nothing else says what it can read.

Legend: S samples.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from simulate.common.live_objects import find
from simulate.models.interfaces import OF_SAMPLES, LiveSamples, NetworkOptions, ReadsText, SeesImages, TakesSamples


def example_batch(model: NetworkOptions, samples: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, equal at every call: tokens (S, context), or images and their classes (S,).

    Of a data set that is an object, they are its samples from `first` on, and again from its beginning.
    """
    if model.family == OF_SAMPLES:
        return _given_batch(cast(TakesSamples, model), samples, first)
    if model.unit == "samples":
        size = cast(SeesImages, model)
        images = torch.linspace(-1, 1, samples * size.colours * size.image**2)
        return images.view(samples, size.colours, size.image, size.image), torch.arange(samples) % size.classes
    text = cast(ReadsText, model)
    tokens = torch.arange(samples * text.context).view(samples, text.context) % text.vocab
    return tokens, tokens


def _given_batch(model: TakesSamples, samples: int, first: int) -> tuple[Tensor, Tensor]:
    data: LiveSamples = find("model.samples", model.samples)
    rows = np.arange(first, first + samples) % len(data.inputs)
    inputs, targets = (torch.from_numpy(array[rows]) for array in (data.inputs, data.targets))
    # float32, as networks are traced; a run's dtype is the caller's to give.
    inputs, targets = (t.float() if t.is_floating_point() else t for t in (inputs, targets))
    return inputs, targets
