"""Small pictures, and folders, archives and arrays of them, as test data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from simulate.data.images import Images


def pixels(number: int, height: int = 8, width: int = 8, colours: int = 3) -> np.ndarray:
    """Return a made-up picture, (Y, X, C), uint8."""
    return np.random.default_rng(number).integers(0, 256, (height, width, colours), np.uint8)


def encoded(array_YXC: np.ndarray, kind: str = "PNG") -> bytes:
    """Return a picture as the bytes of a file; PNG keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(array_YXC.squeeze()).save(buffer, kind)
    return buffer.getvalue()


def files_of(counts: Mapping[str, int], size: int = 8) -> dict[str, bytes]:
    """Return {"train/cat/0.png": content, ...} for {"train/cat": how many}; every picture is another."""
    named = [f"{folder}/{index}.png" for folder, count in counts.items() for index in range(count)]
    return {name: encoded(pixels(number, size, size)) for number, name in enumerate(named)}


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a folder."""
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], folders: tuple[str, ...] = ()) -> Path:
    """Write files into an archive, with entries for folders of their own."""
    with zipfile.ZipFile(path, "w") as archive:
        for folder in folders:
            archive.writestr(f"{folder}/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def images(train: int = 12, validation: int = 4, classes: int = 3, size: int = 8, colours: int = 3) -> Images:
    """Return made-up images in memory, classes in turns, validation last."""
    count = train + validation
    content = np.stack([pixels(number, size, size, colours).transpose(2, 0, 1) for number in range(count)])
    return Images(
        source="made-up pictures",
        classes=tuple(f"class {k}" for k in range(classes)),
        pixels=content,
        labels=np.arange(count) % classes,
        held_out=np.arange(count) >= train,
        mean=(0.4, 0.5, 0.6)[:colours],
        std=(0.2, 0.25, 0.3)[:colours],
        fingerprint="made-up",
    )
