"""CIFAR-10 and CIFAR-100 as published for Python (Krizhevsky 2009): batches of pixels in pickles; torch-free.

A pickle may call any function when it is loaded, and these files come from the internet. So an unpickler opens them
that knows numpy's arrays and nothing else. simulate.data.load calls `find_cifar` to recognise a folder, then
`cifar_source`.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simulate.common.errors import InputError
from simulate.data.cache import stamp_of
from simulate.data.images import ImageSource, array_source

SIDE, COLOURS = 32, 3


@dataclass(frozen=True)
class Layout:
    """File names and pickle keys of one of the two data sets."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels_key: str
    names_key: str


LAYOUTS = (
    Layout(
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        meta="batches.meta",
        labels_key="labels",
        names_key="label_names",
    ),
    Layout(("train",), ("test",), "meta", "fine_labels", "fine_label_names"),
)
"""CIFAR-10, and CIFAR-100 with its hundred fine classes."""


def find_cifar(path: Path) -> tuple[Path, Layout] | None:
    """Return the folder, `path` or one right below it, that holds one of the two data sets, and its layout."""
    for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        for layout in LAYOUTS:
            if (folder / layout.meta).is_file() and (folder / layout.train[0]).is_file():
                return folder, layout
    return None


def cifar_source(path: Path) -> ImageSource:
    """Return the images of a folder; raises InputError for files that are missing, damaged or hold more than arrays."""
    found = find_cifar(path)
    if found is None:
        raise InputError(
            f"data.path = {str(path)!r} holds no CIFAR batches (batches.meta and data_batch_1, or meta and train); "
            "unpack the archive for Python there"
        )
    folder, layout = found
    names = _class_names(folder / layout.meta, layout.names_key)
    train = [_batch(folder / name, layout.labels_key, len(names)) for name in layout.train]
    test = [_batch(folder / name, layout.labels_key, len(names)) for name in layout.test]
    pixels, labels = (np.concatenate(parts) for parts in zip(*train, *test, strict=True))
    held_out = np.arange(len(labels)) >= sum(len(part_labels) for _, part_labels in train)
    # Names, sizes and times of all files: a changed one makes the cache decode anew.
    files = [folder / name for name in (*layout.train, *layout.test, layout.meta)]
    return array_source(str(path), stamp_of(files), pixels, labels, names, held_out)


def _class_names(path: Path, key: str) -> list[str]:
    names = _table(path).get(key)
    if not isinstance(names, list) or not names:
        raise InputError(f"data: {path} has no list {key!r}; fetch the data set again")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _batch(path: Path, labels_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (S, C, Y, X), uint8, and labels (S,)."""
    table = _table(path)
    pixels, labels = table.get("data"), table.get(labels_key)
    size = COLOURS * SIDE * SIDE
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (size,) or not len(pixels):
        raise InputError(f"data: {path} has no pixels of {size} bytes an image under 'data'; fetch it again")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(isinstance(k, int) for k in labels):
        raise InputError(f"data: {path} has no whole number for each image under {labels_key!r}; fetch it again")
    if not all(0 <= k < classes for k in labels):
        raise InputError(f"data: {path} has label {max(labels)}, but there are {classes} classes; fetch it again")
    return pixels.reshape(-1, COLOURS, SIDE, SIDE), np.array(labels, np.int64)


def _table(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data: {path} cannot be read ({error.strerror}); fetch the data set again") from None
    try:
        # Python 2 wrote them; as bytes, text of any encoding loads.
        table = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise InputError(f"data: {path} is not loaded: {error}; fetch it again from where it is published") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"data: {path} is damaged ({type(error).__name__}); fetch it again") from None
    if not isinstance(table, dict):
        raise InputError(f"data: {path} is no CIFAR batch (it holds a {type(table).__name__}); fetch it again")
    return {key.decode(errors="replace") if isinstance(key, bytes) else str(key): value for key, value in table.items()}


class ArraysOnly(pickle.Unpickler):
    """Loads numbers, bytes, text, lists, dicts and numpy's arrays; refuses every other name, called or not."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor that arrays need; raises UnpicklingError for any other name."""
        # Anything else that a pickle names could be a function to call, such as os.system.
        found = _HARMLESS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return found


def _empty_array(kind: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    """Stand in for numpy's private function: an empty array, whose state follows in the pickle."""
    # A subclass could run code of its own when its state is set.
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("it makes an array of a class of its own")
    return np.ndarray(shape, dtype.decode() if isinstance(dtype, bytes) else dtype)


def _latin_bytes(text: str, encoding: str) -> bytes:
    """Stand in for codecs.encode, by which newer pickles in older protocols spell bytes."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it spells bytes in {encoding}")
    return text.encode("latin1")


_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("_codecs", "encode"): _latin_bytes,
}
