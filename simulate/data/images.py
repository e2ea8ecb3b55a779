"""Labelled images, in two stages: listed by a source, then decoded to one size for training; torch-free.

A plan needs only the list: names, labels, split. A run decodes it to its model's size, once, into the cache. Readers of
folders, archives and published sets build an ImageSource; simulate.data.load turns it into Images with `load_images`.

Legend: S samples, C colours, P pixels a side, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from simulate.common.errors import InputError
from simulate.common.seeding import generator
from simulate.data.cache import ArraySlot, Draft, cached
from simulate.data.decode_images import Frame, SmallImageError, Unfit, fit_array
from simulate.data.partition import shard_sizes

HELD_OUT_SHARE = 0.1
"""Share of every class that is held out where a data set comes without a split."""
LEFT_OUT = -1
"""The label of an image that is not used, since it could not be decoded."""
DECODING = 2
"""Part of every key of decoded images: raise it when changed code makes other pixels of the same files."""
_SUM_IMAGES = 1024
"""Images whose pixels are summed at a time, which bounds the memory for it."""


@dataclass(frozen=True)
class ImageSource:
    """Images that are listed, with their labels and their split, but not decoded yet."""

    name: str
    """The path or the name in run.toml."""
    classes: tuple[str, ...]
    labels: np.ndarray
    """(S,), int64, below K."""
    held_out: np.ndarray
    """(S,), bool: whether an image is for validation."""
    colours: int
    """Colours of the first image, 1 or 3."""
    pixels: int
    """Pixels of the shorter side of the first image."""
    has_split: bool
    """Whether the split came with the data set; else a tenth of every class that can be read is held out."""
    stamp: str
    """Text that differs where any of the files does: the cache's key of the pixels."""
    fill: Callable[[Frame, ArraySlot], Unfit] = field(repr=False)
    """Decodes all images to a frame, into rows of (S, C, P, P); returns the unfit."""
    image_name: Callable[[int], str] = field(default="image {}".format, repr=False)

    def frame(self, pixels: int | None, colours: int | None, upscale: bool) -> Frame:
        """Return the frame of a model, or the images' own where the model leaves it open; raises InputError."""
        colours = self.colours if colours is None else colours
        if colours not in (1, 3):
            raise InputError(f"model.colours = {colours}: images have 1 (grey) or 3; try --set model.colours=3")
        return Frame(self.pixels if pixels is None else pixels, colours, upscale)

    def check(self, classes: int | None, devices: int, shards: Sequence[float] | None = None) -> None:
        """Raise InputError where labels go beyond the model's classes or a device's shard would be empty."""
        _check(self.name, self.classes, int((~self.held_out).sum()), classes, devices, shards)


@dataclass(frozen=True)
class Images:
    """Images ready to train on."""

    source: str
    classes: tuple[str, ...]
    pixels: np.ndarray
    """(S, C, P, P), uint8, memory-mapped."""
    labels: np.ndarray
    """(S,), int64; LEFT_OUT where an image is not used."""
    held_out: np.ndarray
    """(S,), bool."""
    mean: tuple[float, ...]
    """Mean of each colour over the training images' pixels, scaled to 0 … 1."""
    std: tuple[float, ...]
    """Standard deviation of each colour, likewise."""
    fingerprint: str
    """Hex digest of all of it; a run resumes only on data with the digest in its checkpoint."""

    @cached_property
    def train(self) -> np.ndarray:
        """Rows of the training images, int64, in order."""
        return np.flatnonzero(~self.held_out & (self.labels != LEFT_OUT))

    @cached_property
    def validation(self) -> np.ndarray:
        """Rows of the images to evaluate on, int64, in order."""
        return np.flatnonzero(self.held_out & (self.labels != LEFT_OUT))

    @property
    def left_out(self) -> int:
        """Number of images that could not be decoded."""
        return int((self.labels == LEFT_OUT).sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of all pixels."""
        return int(self.pixels.nbytes)

    def describe(self) -> str:
        """Return source, numbers of images, size and classes as one line of text."""
        colours, pixels = self.pixels.shape[1:3]
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        return (
            f"{self.source}, {len(self.train):,} training and {len(self.validation):,} validation images "
            f"of {colours} x {pixels} x {pixels} in {len(self.classes):,} classes{left_out}"
        )

    def check(self, classes: int | None, devices: int, shards: Sequence[float] | None = None) -> None:
        """Raise InputError where labels go beyond the model's classes or a device's shard would be empty."""
        _check(self.source, self.classes, len(self.train), classes, devices, shards)


def _check(
    name: str, known: Sequence[str], samples: int, classes: int | None, devices: int, shards: Sequence[float] | None
) -> None:
    if classes is not None and len(known) > classes:
        raise InputError(
            f"model.classes = {classes} does not cover the {len(known)} classes of {name} "
            f"({known[classes]!r} is number {classes}); try --set model.classes={len(known)}"
        )
    if devices > samples:
        raise InputError(
            f"data: {name} has {samples:,} training images for cluster.devices = {devices}; each needs one of its own: "
            f"try --set cluster.devices={max(1, samples)}"
        )
    if 0 in (sizes := shard_sizes(samples, devices, shards)):
        raise InputError(
            f"data.shards leaves device {sizes.index(0)} none of the {samples:,} training images of {name}; "
            "raise its size"
        )


def hold_out(labels: np.ndarray, classes: Sequence[str], name: str) -> np.ndarray:
    """Return a mask, (S,), of a tenth of every class, at least one image, the same for every run.

    Raises InputError for a class that has none left to train on.
    """
    mask = np.zeros(len(labels), bool)
    for number, members in enumerate(members_of(labels, len(classes))):
        if len(members) < 2:
            images = "1 image" if len(members) else "no image that can be read"
            raise InputError(
                f"data: class {classes[number]!r} of {name} has {images}; one to train on and one to hold "
                "out are needed: add images, or a split of your own in train/ and val/"
            )
        # Addressed by no run's seed: runs with other seeds must evaluate on the same images to be compared.
        chosen = generator(0, "held out", number).permutation(len(members))
        mask[members[chosen[: max(1, int(HELD_OUT_SHARE * len(members)))]]] = True
    return mask


def members_of(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """Return the rows of every class, in order."""
    # One sort for all classes, where a search for each would take K passes.
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(classes + 1))
    return [order[edges[number] : edges[number + 1]] for number in range(classes)]


def load_images(source: ImageSource, frame: Frame, skip_corrupt: bool = False) -> Images:
    """Return a source's images in a frame, decoded once and cached.

    Raises InputError for an unfit image, or with `skip_corrupt` for a class that has no image left.
    """
    key = {
        "stamp": source.stamp,
        "frame": [frame.pixels, frame.colours, frame.upscale],
        "skip_corrupt": skip_corrupt,
        "decoding": DECODING,
    }
    kept = cached("images", key, lambda draft: _fill(draft, source, frame, skip_corrupt))
    arrays = kept.arrays
    return Images(
        source=source.name,
        classes=tuple(kept.facts["classes"]),
        pixels=arrays["pixels"],
        labels=np.array(arrays["labels"]),
        held_out=np.array(arrays["held_out"], bool),
        mean=tuple(arrays["mean"].tolist()),
        std=tuple(arrays["std"].tolist()),
        fingerprint=kept.digest,
    )


def _fill(draft: Draft, source: ImageSource, frame: Frame, skip_corrupt: bool) -> None:
    samples = len(source.labels)
    slots = draft.allocate(
        {
            "labels": ("i8", (samples,)),
            "mean": ("f8", (frame.colours,)),
            "std": ("f8", (frame.colours,)),
            "held_out": ("u1", (samples,)),
            "pixels": ("u1", (samples, *frame.shape)),
        },
        {"classes": source.classes},
    )
    labels = source.labels.copy()
    for index, error in source.fill(frame, slots["pixels"]).items():
        if isinstance(error, SmallImageError):  # sound, so that skipping it as corrupt would hide a wrong setting
            raise InputError(
                f"data: {source.image_name(index)} {error}, the pixels of the model; "
                "try --set data.upscale=true, or a smaller --set model.image"
            )
        if not skip_corrupt:
            raise InputError(
                f"data: {source.image_name(index)} {error}; replace it, or leave such out with "
                "--set data.skip_corrupt=true"
            )
        labels[index] = LEFT_OUT
    held_out = source.held_out
    if source.has_split or (labels != LEFT_OUT).all():
        # A class that lost all images of a split would be trained on, or judged by, nothing.
        _check_remaining(source, labels)
    else:  # of a class with ten images, the one that is held out may be damaged
        held_out = hold_out(labels, source.classes, source.name)
    used = np.flatnonzero(~held_out & (labels != LEFT_OUT))
    mean, std = colour_figures(slots["pixels"].open(), used)
    for name, values in {"labels": labels, "mean": mean, "std": std, "held_out": held_out}.items():
        slots[name].open()[:] = values


def _check_remaining(source: ImageSource, labels: np.ndarray) -> None:
    for split, mask in (("training", ~source.held_out), ("validation", source.held_out)):
        before, after = set(source.labels[mask].tolist()), set(labels[mask].tolist())
        if lost := sorted(before - after):
            name = source.classes[lost[0]]
            raise InputError(f"data: class {name!r} of {source.name} has no {split} image that can be read; add some")


def colour_figures(pixels_SCPP: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, (C,), of the rows' pixels, scaled to 0 … 1.

    Sums over a histogram are exact integers: the figures, and with them the fingerprint, depend on no order or machine.
    """
    colours = pixels_SCPP.shape[1]
    histogram = np.zeros((colours, 256), np.int64)
    for first in range(0, len(rows), _SUM_IMAGES):
        block = pixels_SCPP[rows[first : first + _SUM_IMAGES]]
        for colour in range(colours):
            histogram[colour] += np.bincount(block[:, colour].ravel(), minlength=256)
    means, stds = zip(*map(_mean_and_std, histogram.tolist()), strict=True)
    return np.array(means), np.array(stds)


def _mean_and_std(counts: list[int]) -> tuple[float, float]:
    """Return mean and standard deviation of the values 0/255 … 255/255, given how often each occurs."""
    number = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    return total / number / 255, math.sqrt(number * squares - total * total) / number / 255


def array_source(
    name: str,
    stamp: str,
    pixels_SCYX: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    held_out: np.ndarray | None = None,
) -> ImageSource:
    """Return a source of images that are in memory; without `held_out`, a tenth of every class is held out."""

    def fill(frame: Frame, target: ArraySlot) -> Unfit:
        out = target.open()
        for row, image in enumerate(pixels_SCYX):
            try:
                out[row] = fit_array(image, frame)
            except SmallImageError as error:
                return {row: error}  # all images have one size: the first small one says it for all
        return {}

    labels = np.asarray(labels, np.int64)
    return ImageSource(
        name=name,
        classes=tuple(classes),
        labels=labels,
        held_out=hold_out(labels, classes, name) if held_out is None else held_out,
        has_split=held_out is not None,
        colours=pixels_SCYX.shape[1],
        pixels=min(pixels_SCYX.shape[2:]),
        stamp=stamp,
        fill=fill,
        image_name=lambda row: f"image {row} of {name}",
    )
