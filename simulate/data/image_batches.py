"""Batches of images: every device goes through its own shard in a new order each epoch, addressed by step.

Images come from the memory-mapped cache as bytes, and are augmented and normalised on the training device, since bytes
are a quarter of what floats would move. simulate.data.batches builds these for a run.

Legend: L local devices, B samples of a device, S samples, C colours, P pixels a side, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simulate.common.seeding import generator
from simulate.data.augment import Draws, crop_and_flip, mix, normalise
from simulate.data.images import Images
from simulate.data.partition import EpochRows, even_shards, skewed_shards


class ImageBatches:
    """Batches of normalised inputs (S, C, P, P) and targets: class numbers (S,), or with mixup class shares (S, K)."""

    def __init__(
        self,
        images: Images,
        samples: int,
        devices: int,
        seed: int,
        *,
        classes: int | None = None,
        shards: Sequence[float] | None = None,
        skew: float | None = None,
        augment: Sequence[str] = (),
        mixup: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.images, self.samples, self.devices, self.seed = images, samples, devices, seed
        self.classes = len(images.classes) if classes is None else classes
        self.augment, self.mixup, self.dtype, self.device = augment, mixup, dtype, device or torch.device("cpu")
        # Held-out and undecodable images are in no shard.
        labels = images.labels[images.train]
        parts = (
            even_shards(len(labels), devices, shards, seed)
            if skew is None
            else skewed_shards(labels, len(images.classes), devices, shards, skew, seed)
        )
        self.shards = [images.train[part] for part in parts]
        """Rows of each device's images in the data set."""
        self._epochs = EpochRows(self.shards, samples, seed)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the data; a run resumes only on data with the digest in its checkpoint."""
        return self.images.fingerprint

    def batch(self, step: int, local_devices: range) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the local devices in device order."""
        rows = np.concatenate([self.rows(device, step) for device in local_devices])
        pixels, labels = self._read(rows)
        # One generator a device: a device's draws are the same whichever process holds it.
        randoms = [generator(self.seed, "augment", device, step) for device in local_devices]
        draws = [Draws.of(random, self.samples, pixels.shape[-1], self.augment) for random in randoms]
        if self.augment:
            pixels = crop_and_flip(pixels, draws)
        inputs = normalise(pixels, self.images.mean, self.images.std, self.dtype)
        return self._mixed(inputs, labels, randoms) if self.mixup else (inputs, labels)

    def rows(self, device: int, step: int) -> np.ndarray:
        """Return the images of one device's batch, (B,)."""
        return self._epochs.of(device, step)

    def _read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the pixels of some images, as bytes, and their labels."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images.pixels[rows])).to(self.device)
        return pixels, torch.from_numpy(self.images.labels[rows]).to(self.device)

    def _mixed(self, inputs: Tensor, labels: Tensor, randoms: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        draws = [(random.beta(self.mixup, self.mixup), random.permutation(self.samples)) for random in randoms]
        shares_L = torch.tensor([share for share, _ in draws], dtype=self.dtype, device=self.device)
        partners_LB = torch.from_numpy(np.stack([partners for _, partners in draws])).to(self.device)
        devices = len(randoms)
        targets = F.one_hot(labels, self.classes).to(self.dtype)
        mixed, targets_LBK = mix(
            inputs.view(devices, self.samples, -1),
            targets.view(devices, self.samples, -1),
            shares_L,
            partners_LB,
        )
        return mixed.view_as(inputs), targets_LBK.view_as(targets)

    def validation(self, num_samples: int, num_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield held-out images spread evenly over the split, not augmented, at most `num_at_once` at a time."""
        held_out = self.images.validation
        chosen = np.unique(np.linspace(0, len(held_out) - 1, num=min(num_samples, len(held_out))).astype(np.int64))
        for first in range(0, len(chosen), num_at_once):
            pixels, labels = self._read(held_out[chosen[first : first + num_at_once]])
            yield normalise(pixels, self.images.mean, self.images.std, self.dtype), labels

    @property
    def score_names(self) -> tuple[str, ...]:
        """Name of the score beside the loss: the share of samples whose most likely class is right."""
        return ("val_accuracy",)

    def scores(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return 1 for each sample whose most likely class is right and 0 for others, (S,)."""
        return [(outputs.argmax(-1) == targets).double()]
