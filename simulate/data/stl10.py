"""STL-10 as published (Coates et al. 2011): raw bytes of 96 × 96 colour images, column by column; torch-free."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simulate.common.encodings import read_text
from simulate.common.errors import InputError
from simulate.data.cache import stamp_of
from simulate.data.images import ImageSource, array_source

SIDE, COLOURS = 96, 3
FOLDER = "stl10_binary"
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
NAMES_FILE = "class_names.txt"
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def find_stl10(path: Path) -> Path | None:
    """Return the folder, `path` or stl10_binary in it, that holds the files; None where neither does."""
    return next((folder for folder in (path, path / FOLDER) if (folder / FILES[0]).is_file()), None)


def stl10_source(path: Path) -> ImageSource:
    """Return the labelled images of a folder; raises InputError for files that are missing or cut short."""
    folder = find_stl10(path)
    if folder is None:
        raise InputError(f"data.path = {str(path)!r} holds no {FILES[0]}; unpack the binary archive of STL-10 there")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise InputError(f"data: {folder} lacks {missing[0]} of STL-10; unpack the archive again")
    train, test = (_split(folder, split) for split in ("train", "test"))
    pixels, labels = (np.concatenate(parts) for parts in zip(train, test, strict=True))
    held_out = np.arange(len(labels)) >= len(train[1])
    stamp = stamp_of([folder / name for name in FILES])
    return array_source(str(path), stamp, pixels, labels, _classes(folder), held_out)


def _split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (S, C, Y, X), uint8, and labels (S,) from 0."""
    path, labels_path = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    labels = np.fromfile(labels_path, np.uint8).astype(np.int64) - 1
    size = COLOURS * SIDE * SIDE
    if path.stat().st_size != len(labels) * size or not len(labels):
        raise InputError(
            f"data: {path} has {path.stat().st_size:,} bytes where {len(labels):,} labels make {len(labels) * size:,}; "
            "unpack the archive again"
        )
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise InputError(f"data: {labels_path} has labels other than 1 to {len(CLASSES)}; unpack the archive again")
    # Published column by column: X before Y.
    columns_SCXY = np.memmap(path, np.uint8, "r").reshape(-1, COLOURS, SIDE, SIDE)
    return columns_SCXY.transpose(0, 1, 3, 2), labels


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / NAMES_FILE
    # Where the file is missing or damaged, the published names stand in.
    named = tuple(read_text(path).split()) if path.is_file() else CLASSES
    return named if len(named) == len(CLASSES) else CLASSES
