"""Batches for N devices: each device draws from its own shard, and every draw has the address (seed, device, step).

Because of the address, a device's batch is the same in one process or many, and after a resume. The training loop and
probes use the protocol `Batches`; `build_batches` returns TextBatches, SampleBatches or
simulate.data.image_batches.ImageBatches.

Legend: L local devices, B samples of a device in a step (all its passes), T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from simulate.common.seeding import generator
from simulate.config.run import Run
from simulate.data.image_batches import ImageBatches
from simulate.data.load import Dataset, image_sizes
from simulate.data.partition import EpochRows, even_shards
from simulate.data.samples import Samples
from simulate.data.text import Text, shard_bounds
from simulate.layers.dtypes import DTYPES
from simulate.models.losses import has_own_loss
from simulate.models.schema import text_sizes


class Batches(Protocol):
    """The samples of a run, by step and device."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the data; a run resumes only on data with the digest in its checkpoint."""

    def batch(self, step: int, local_devices: range) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, (L*B, ...), of the local devices in device order.

        Targets are whole numbers, or shares of classes in the form of the network's outputs.
        """

    def validation(self, num_samples: int, num_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield fixed held-out samples, inputs and whole targets, at most `num_at_once` at a time."""

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that an evaluation reports beside the loss."""

    def scores(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return for each name one figure a row, (M,); an evaluation reports their means."""


def build_batches(run: Run, dataset: Dataset, device: torch.device | None = None) -> Batches:
    """Return the batches of a run over its data; images are augmented on `device`."""
    if run.cluster.classes:
        return ClassBatches([build_batches(one, dataset, device) for one in run.classes], run.cluster.class_devices)
    if isinstance(dataset, Text):
        return TextBatches.of(run, dataset)
    if isinstance(dataset, Samples):
        return SampleBatches(run, dataset)
    data, train = run.data, run.train
    return ImageBatches(
        dataset,
        train.device_batch,
        run.cluster.devices,
        train.seed,
        classes=image_sizes(run.model)[2],
        shards=data.shards,
        skew=data.skew,
        augment=data.augment,
        mixup=data.mixup,
        dtype=DTYPES[train.dtype],
        device=device,
    )


class ClassBatches:
    """Batches of classes of devices, each of its own size: a device draws what it would if all were of its class."""

    def __init__(self, batches: Sequence[Batches], devices: Sequence[range]) -> None:
        """Join the batches of each class, which has the given devices of all."""
        self._batches, self._devices = batches, devices
        first = batches[0]
        self.fingerprint, self.validation = first.fingerprint, first.validation
        self.score_names, self.scores = first.score_names, first.scores

    def batch(self, step: int, local_devices: range) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the local devices, (ΣB, ...), in device order."""
        parts = []
        for batches, devices in zip(self._batches, self._devices, strict=True):
            own = range(max(devices.start, local_devices.start), min(devices.stop, local_devices.stop))
            if own:
                parts.append(batches.batch(step, own))
        inputs, targets = zip(*parts, strict=True)
        return torch.cat(inputs), torch.cat(targets)


class TextBatches:
    """Windows of a text; device n of N draws them from the n-th of N contiguous parts of the training split.

    The parts are equal, or in proportion to `shards`.
    """

    def __init__(
        self,
        text: Text,
        context: int,
        samples: int,
        devices: int,
        seed: int,
        shards: Sequence[float] | None = None,
    ) -> None:
        self.text, self.context, self.samples, self.devices, self.seed = text, context, samples, devices, seed
        self.bounds = shard_bounds(len(text.train), devices, shards)

    @classmethod
    def of(cls, run: Run, text: Text) -> TextBatches:
        """Return the batches of a run over its text."""
        train = run.train
        return cls(
            text, text_sizes(run.model).context, train.device_batch, run.cluster.devices, train.seed, run.data.shards
        )

    @property
    def fingerprint(self) -> str:
        """Hex digest of the data; a run resumes only on data with the digest in its checkpoint."""
        return self.text.fingerprint

    def batch(self, step: int, local_devices: range) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (L*B, T), int64, of the local devices in device order."""
        # Device by device, each from its own address: who holds the device makes no difference.
        starts_LB = np.stack([self._starts(device, step) for device in local_devices])
        return self._windows(self.text.train, starts_LB.flatten())

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the windows at some starts as inputs, and as targets the same windows one token later."""
        # One token more than the context, since a window and its targets overlap in all but one.
        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def _starts(self, device: int, step: int) -> np.ndarray:
        random = generator(self.seed, "batch", device, step)
        first, last = self.bounds[device]
        return first + random.integers(0, last - first - self.context, self.samples)

    def validation(self, num_samples: int, num_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield fixed windows spread evenly over the validation split, at most `num_at_once` (S, T) at a time."""
        held_out = self.text.validation
        last = len(held_out) - self.context - 1
        # A short split has fewer starts than samples: none is evaluated twice.
        starts = np.unique(np.linspace(0, last, num=min(num_samples, last + 1)).astype(np.int64))
        for first in range(0, len(starts), num_at_once):
            yield self._windows(held_out, starts[first : first + num_at_once])

    @property
    def score_names(self) -> tuple[str, ...]:
        """No names: the loss says all that is measured of text."""
        return ()

    def scores(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return no figures."""
        return []


class SampleBatches:
    """Samples of any shape; every device goes through its own shard in a new order each epoch, as it does of images."""

    def __init__(self, run: Run, samples: Samples) -> None:
        self.data, self.dtype = samples, DTYPES[run.train.dtype]
        self._has_accuracy = samples.has_classes and not has_own_loss(run.model)
        shards = even_shards(len(samples.train), run.cluster.devices, run.data.shards, run.train.seed)
        self._epochs = EpochRows([samples.train[part] for part in shards], run.train.device_batch, run.train.seed)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the data; a run resumes only on data with the digest in its checkpoint."""
        return self.data.fingerprint

    def batch(self, step: int, local_devices: range) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (L*B, ...) of the local devices in device order."""
        return self._read(np.concatenate([self._epochs.of(device, step) for device in local_devices]))

    def _read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of some samples; floating-point numbers in the run's dtype."""
        inputs, targets = (torch.from_numpy(array[rows]) for array in (self.data.inputs, self.data.targets))
        inputs, targets = (t.to(self.dtype) if t.is_floating_point() else t for t in (inputs, targets))
        return inputs, targets

    def validation(self, num_samples: int, num_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield held-out samples spread evenly over the split, at most `num_at_once` at a time."""
        held_out = self.data.validation
        chosen = np.unique(np.linspace(0, len(held_out) - 1, num=min(num_samples, len(held_out))).astype(np.int64))
        for first in range(0, len(chosen), num_at_once):
            yield self._read(held_out[chosen[first : first + num_at_once]])

    @property
    def score_names(self) -> tuple[str, ...]:
        """Name of the score beside the loss: the share of right classes, if targets are some and the loss is ours."""
        return ("val_accuracy",) if self._has_accuracy else ()

    def scores(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return 1 for each sample whose most likely class is right and 0 for others, (S,)."""
        return [(outputs.argmax(-1) == targets).double()] if self._has_accuracy else []
