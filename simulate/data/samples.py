"""A data set that somebody holds in Python, read once into memory, so that a run's samples are fixed; torch-free.

Taken are: a map-style data set or a list of samples (input, target); a pair of tensors or arrays (inputs, targets); a
DataLoader; any other iterable of samples, or of batches with `batched`. All of it is read, since a run must find the
same samples again whenever a step is repeated: what draws at random, or has more than MOST_BYTES, is refused in a line.
ltecli.api calls read_samples; simulate.data.batches draws from the result.

Legend: S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from simulate.common.errors import InputError, first_line
from simulate.common.live_objects import digest_of, register
from simulate.common.seeding import generator
from simulate.common.units import bytes_text
from simulate.config.run import Run
from simulate.data.images import HELD_OUT_SHARE
from simulate.data.partition import shard_sizes

MOST_BYTES = 2_000_000_000
"""Largest data set that is read into memory."""
TRIED_TWICE = 4
"""Samples that are read twice, to see whether the data set draws them at random."""


@dataclass(frozen=True)
class Samples:
    """Samples in memory: inputs and targets of any shape."""

    source: str
    """Kind of object that they came from."""
    inputs: np.ndarray
    """(S, ...)."""
    targets: np.ndarray
    """(S, ...)."""
    held_out: np.ndarray
    """(S,), bool: whether a sample is for validation."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all of it; a run resumes only on data with the digest in its checkpoint."""
        arrays = (self.inputs, self.targets, self.held_out)
        return digest_of(part for x in arrays for part in (f"{x.dtype} {x.shape}", np.ascontiguousarray(x).tobytes()))

    @cached_property
    def train(self) -> np.ndarray:
        """Rows of the training samples, int64, in order."""
        return np.flatnonzero(~self.held_out)

    @cached_property
    def validation(self) -> np.ndarray:
        """Rows of the samples to evaluate on, int64, in order."""
        return np.flatnonzero(self.held_out)

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs and targets."""
        return int(self.inputs.nbytes + self.targets.nbytes)

    @property
    def has_classes(self) -> bool:
        """Whether each target is the number of a class."""
        return self.targets.ndim == 1 and self.targets.dtype.kind in "iu"

    def describe(self) -> str:
        """Return source, numbers of samples and their shapes as one line of text."""
        return (
            f"{self.source} in memory, {len(self.train):,} training and {len(self.validation):,} validation samples: "
            f"inputs {_shape_text(self.inputs)}, targets {_shape_text(self.targets)}"
        )

    def check(self, run: Run) -> None:
        """Raise InputError where samples do not fit the model, or a device's shard would be empty."""
        model, shape = run.model, run.model.shape()
        expected: tuple[int, ...] | None = None
        if (image := getattr(model, "image", None)) is not None:
            expected = (model.colours, image, image)  # type: ignore[attr-defined]
        elif (context := getattr(model, "context", None)) is not None:
            expected = (context,)
        if expected not in (None, self.inputs.shape[1:]):
            raise InputError(
                f"data: the inputs of {self.source} are {_shape_text(self.inputs)}, and model.name = {model.name!r} "
                f"reads {' x '.join(map(str, expected or ()))}; change the model's sizes, or the data"
            )
        if getattr(model, "loss", None) is None:
            self.check_classes(shape.outputs)
        if 0 in (sizes := shard_sizes(len(self.train), run.cluster.devices, run.data.shards)):
            raise InputError(
                f"data: {self.source} has {len(self.train):,} training samples for cluster.devices = "
                f"{run.cluster.devices}, and device {sizes.index(0)} gets none; give more, or use fewer devices"
            )

    def check_classes(self, outputs: int) -> None:
        """Raise InputError for integers as targets that are no classes of a network with so many outputs."""
        if self.targets.dtype.kind not in "iu":
            return
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= outputs:
            raise InputError(
                f"data: targets of {self.source} go from {low} to {high}, and cross-entropy of {outputs} outputs takes "
                f"classes from 0 to {outputs - 1}; change them, or give a loss of your own"
            )


def register_samples(data: Any, validation: Any = None, batched: bool = False) -> tuple[str, Samples]:
    """Read data sets; return the name, and what must be held for as long as it is used. Raises InputError."""
    samples = read_samples(data, validation, batched)
    return register(samples.source, samples.fingerprint, samples), samples


def read_samples(data: Any, validation: Any = None, batched: bool = False) -> Samples:
    """Read all samples of `data`, and of `validation` to evaluate on; without it a tenth of `data` is held out."""
    source = type(data).__name__ if not isinstance(data, tuple) else "arrays"
    inputs, targets = _read(data, "data", batched)
    if validation is None:
        if len(inputs) < 2:
            raise InputError(f"data: {source} has {len(inputs)} sample; two at least are needed, one of them held out")
        held_out = np.zeros(len(inputs), bool)
        # Addressed by no run's seed: runs with other seeds must evaluate on the same samples to be compared.
        chosen = generator(0, "held out").permutation(len(inputs))[: max(1, int(HELD_OUT_SHARE * len(inputs)))]
        held_out[chosen] = True
        return Samples(source, inputs, targets, held_out)
    others, other_targets = _read(validation, "validation", batched)
    for name, one, other in (("inputs", inputs, others), ("targets", targets, other_targets)):
        if (one.shape[1:], one.dtype) != (other.shape[1:], other.dtype):
            raise InputError(
                f"validation: its {name} are {_shape_text(other)}, and data's are {_shape_text(one)}; make both alike"
            )
    held_out = np.repeat([False, True], [len(inputs), len(others)])
    return Samples(source, np.concatenate([inputs, others]), np.concatenate([targets, other_targets]), held_out)


def _read(data: Any, field: str, batched: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and targets of all samples."""
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        pair = _array(data[0], field), _array(data[1], field)
        if len(pair[0]) != len(pair[1]):
            raise InputError(f"{field}: {len(pair[0])} inputs and {len(pair[1])} targets; give one target an input")
        items, is_batches = iter([pair]), True
    elif isinstance(data, str | bytes | dict) or not (hasattr(data, "__iter__") or hasattr(data, "__len__")):
        raise InputError(
            f"{field} = {type(data).__name__}: a path, a data set of samples (input, target), a pair of tensors, or an "
            "iterable is needed"
        )
    elif hasattr(data, "batch_sampler"):  # a DataLoader, which says itself whether it makes batches
        items, is_batches = iter(data), data.batch_sampler is not None
    elif hasattr(data, "__iter__"):  # before numbers, which torch's IterableDataset inherits without having any
        items, is_batches = iter(data), batched
    else:
        items, is_batches = _items(data, field), batched
    return _joined(items, field, is_batches)


def _items(data: Sequence[Any], field: str) -> Iterator[Any]:
    """Yield the samples of a data set that is read by number."""
    for number in range(len(data)):
        sample = data[number]
        if number < TRIED_TWICE and isinstance(sample, tuple | list):
            for one, other in zip(sample, data[number], strict=True):
                if _array(one, field).tobytes() != _array(other, field).tobytes():
                    raise InputError(
                        f"{field}: sample {number} is another one whenever it is read, so that no run could be "
                        "repeated; leave what draws at random out of the data set"
                    )
        yield sample


def _joined(items: Iterable[Any], field: str, is_batches: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and targets of samples or batches as one array each; raises InputError where they differ."""
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    total = 0
    for number, item in enumerate(items):
        what = f"{field}: {'batch' if is_batches else 'sample'} {number}"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(
                f"{what} is a {type(item).__name__}; a pair (input, target) of tensors or numbers is needed"
            )
        pair = [_array(part, what) for part in item]
        for kind, part, parts in zip(("input", "target"), pair, (inputs, targets), strict=True):
            if is_batches and part.shape[:1] != (pair[0].shape[:1] or (None,)):
                raise InputError(f"{what}: its {kind} is {part.shape}, without a row for each sample; stack them")
            first = parts[0] if parts else part
            own, others = (x.shape[1:] if is_batches else x.shape for x in (part, first))
            if own != others or part.dtype != first.dtype:
                raise InputError(
                    f"{what}: its {kind} is {own} of {part.dtype}, and the first one {others} of {first.dtype}; all "
                    "samples need one shape and type: pad or crop them"
                )
            parts.append(part)
        total += sum(part.nbytes for part in pair)
        if total > MOST_BYTES:
            raise InputError(
                f"{field}: more than {bytes_text(MOST_BYTES)} after {number + 1:,} of its items, and all are held in "
                "memory; write them into files, and name their path"
            )
    if not inputs:
        raise InputError(f"{field} has no samples; an iterator can be read once only: make it anew")
    join = np.concatenate if is_batches else np.stack
    return join(inputs), join(targets)


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _array(value: Any, what: str) -> np.ndarray:
    """Return a tensor, an array or a number as an array of numbers that torch reads, not shared with the caller."""
    try:
        array = np.array(_plain(value))
    except Exception as error:  # bfloat16, lists of unequal lengths
        raise InputError(f"{what}: {type(value).__name__} is no array of numbers ({first_line(error)})") from error
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8 or array.dtype in (np.uint16, np.uint32, np.uint64):
        raise InputError(
            f"{what}: {type(value).__name__} of {array.dtype} cannot be trained on; floats, int8 to int64, uint8 and "
            "booleans can"
        )
    return array


def _shape_text(array: np.ndarray) -> str:
    return f"{' x '.join(map(str, array.shape[1:])) or 'numbers'} ({array.dtype})"
