"""Decode image files into equal squares of bytes, in a pool of processes; torch-free.

Decoding takes most of the time before a run's first start, so it uses all cores and writes straight into the cache's
file. Sources of images (simulate.data.image_folders, huggingface) call `decode_all`; arrays go through `fit_array`.

Legend: C colours, P pixels a side.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from subprocess import PIPE
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from simulate.common.limits import usable_workers
from simulate.data.cache import ArraySlot

CHUNK_IMAGES = 500
"""Images in one task of the pool."""
POOL_FROM_IMAGES = 3000
"""Fewer images than this are decoded in this process before a pool would have started."""
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV"}
DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError, NotImplementedError,
    RuntimeError, KeyError, TypeError, struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
"""The exceptions that Pillow and zipfile raise for damaged content."""


@dataclass(frozen=True)
class Frame:
    """The size and colours to which every image is converted."""

    pixels: int
    """Pixels of each side."""
    colours: int
    """1 (grey) or 3 (red, green, blue)."""
    upscale: bool = False
    """Whether smaller images are enlarged; they are refused otherwise."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, P, P)."""
        return self.colours, self.pixels, self.pixels


class UnfitImageError(Exception):
    """Raised for an image that is damaged, or cannot be converted to the frame; the text says why."""


class SmallImageError(UnfitImageError):
    """Raised for a sound image with fewer pixels than the frame."""


class Reader(Protocol):
    """Reads the encoded content of images by name; can be pickled, for the pool's processes."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises one of DAMAGE where it cannot."""


@dataclass(frozen=True)
class FolderReader:
    """Files below a folder."""

    root: Path

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


@dataclass(frozen=True)
class ZipReader:
    """Files of a zip archive, read in place; zipfile checks each against the archive's checksum."""

    path: Path

    def read(self, name: str) -> bytes:
        # The time of change is part of the cache's key, so that a new archive of that name is opened anew.
        archive, members = _archive(self.path, self.path.stat().st_mtime_ns)
        return archive.read(members[name])


@lru_cache(maxsize=1)
def _archive(path: Path, changed_ns: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Open an archive once in each process: its table of contents may take longer to read than a chunk of images."""
    archive = zipfile.ZipFile(path)
    return archive, zip_members(archive)


def zip_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members by their names with slashes, which archives of Windows may lack."""
    return {member.filename.replace("\\", "/"): member for member in archive.infolist()}


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """Open an encoded image, without Pillow's warnings of what it stores beside its pixels; raises one of DAMAGE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            yield image


def decode(content: bytes, frame: Frame) -> np.ndarray:
    """Return an encoded image as (C, P, P), uint8; raises UnfitImageError."""
    try:
        with opened(content) as image:
            _check_depth(image)
            _check_size(image, frame)
            # Only for a JPEG, and much faster: it is decoded at its smallest scale that is large enough.
            image.draft("L" if frame.colours == 1 else "RGB", (frame.pixels, frame.pixels))
            # Cameras store pixels as the sensor lies, and how to turn them upright beside them.
            return fit(ImageOps.exif_transpose(image), frame)
    except UnidentifiedImageError:  # its message names an object in memory
        raise UnfitImageError("cannot be decoded (Pillow knows no such format)") from None
    except DAMAGE as error:
        raise UnfitImageError(f"cannot be decoded ({error or type(error).__name__})") from None


def _check_depth(image: Image.Image) -> None:
    """Raise UnfitImageError for more than 8 bits a colour: their range is unknown, and Pillow would cut them to 8."""
    depth = f"mode {image.mode}" if image.mode not in EIGHT_BIT_MODES else None
    # Of colours in 16 bits Pillow tells the mode RGB; how the file keeps them stands among its decoder's arguments.
    for _, _, _, arguments in getattr(image, "tile", []):
        stored = arguments if isinstance(arguments, tuple) else (arguments,)
        layouts = [text for text in stored if isinstance(text, str) and re.search(r";(16|12|32)", text)]
        if layouts:
            depth = f"pixels stored as {layouts[0]}"
        elif image.format == "PPM" and len(stored) > 1 and stored[1] > 255:
            depth = f"values up to {stored[1]}"
    if depth is not None:
        raise UnfitImageError(f"has {depth}, which is not 8 bits a colour")


def _check_size(image: Image.Image, frame: Frame) -> None:
    if min(image.size) < frame.pixels and not frame.upscale:
        raise SmallImageError(f"has {image.size[0]} x {image.size[1]} pixels, fewer than {frame.pixels}")


def fit(image: Image.Image, frame: Frame) -> np.ndarray:
    """Return the centre square of an image, (C, P, P), resized by antialiased bilinear weights if its size differs."""
    if "transparency" in image.info:  # Pillow warns where it has to drop a palette's transparency
        image = image.convert("RGBA")
    image = image.convert("L" if frame.colours == 1 else "RGB")
    width, height = image.size
    if (width, height) != (frame.pixels, frame.pixels):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        size, box = (frame.pixels, frame.pixels), (left, top, left + side, top + side)
        image = image.resize(size, Image.Resampling.BILINEAR, box)
    return np.asarray(image, np.uint8).reshape(frame.pixels, frame.pixels, frame.colours).transpose(2, 0, 1)


def fit_array(pixels_CYX: np.ndarray, frame: Frame) -> np.ndarray:
    """Return a decoded image in the frame; raises SmallImageError."""
    if pixels_CYX.shape == frame.shape:
        return pixels_CYX
    image = Image.fromarray(np.ascontiguousarray(pixels_CYX.transpose(1, 2, 0)).squeeze())
    _check_size(image, frame)
    return fit(image, frame)


Unfit = dict[int, UnfitImageError]
"""Index of an image → reason why it is unfit."""
Task = tuple[Reader, Sequence[str], int, Frame, ArraySlot]
"""Where to read, which images, the row of the first, the frame, and the array to write."""
WORKER = """
import sys
sys.path[:] = sys.argv[1:]
from simulate.data.decode_images import serve_share
serve_share()
"""


def decode_all(reader: Reader, names: Sequence[str], frame: Frame, target: ArraySlot) -> Unfit:
    """Decode all images into rows of `target`, (S, C, P, P), in parallel where there are many; returns the unfit."""
    starts = range(0, len(names), CHUNK_IMAGES)
    tasks = [(reader, names[first : first + CHUNK_IMAGES], first, frame, target) for first in starts]
    workers = usable_workers(len(tasks))
    if len(names) < POOL_FROM_IMAGES or workers < 2:
        parts = [_decode_chunk(*task) for task in tasks]
    else:
        parts = _decode_in_processes([tasks[worker::workers] for worker in range(workers)])
    return {index: error for part in parts for index, error in part.items()}


def _decode_in_processes(shares: Sequence[Sequence[Task]]) -> list[Unfit]:
    """Decode each share of the tasks in a process of its own; an exception, an interrupt too, ends all of them."""
    # Not multiprocessing: a spawned worker runs the caller's script again, which would train again and wait for the
    # cache that the first run holds, and a fork of a process with torch's threads may hang.
    command = [sys.executable, "-c", WORKER, *sys.path]
    # In a session of their own, since Ctrl-C reaches all processes of a terminal: the parent alone ends them.
    processes = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, start_new_session=True) for _ in shares]
    try:
        for process, share in zip(processes, shares, strict=True):
            assert process.stdin is not None
            with process.stdin:
                pickle.dump(share, process.stdin)
        parts = []
        for process in processes:
            assert process.stdout is not None
            answer = process.stdout.read()
            if process.wait() != 0:
                raise RuntimeError(f"a process that decodes images ended with code {process.returncode}")
            parts += pickle.loads(answer)
        return parts
    finally:
        for process in processes:
            process.kill()
            process.__exit__(None, None, None)


def serve_share() -> None:
    """Decode the tasks that stdin has, and write what was unfit to stdout; a worker's whole program."""
    tasks: Sequence[Task] = pickle.load(sys.stdin.buffer)
    pickle.dump([_decode_chunk(*task) for task in tasks], sys.stdout.buffer)


def _decode_chunk(reader: Reader, names: Sequence[str], first: int, frame: Frame, target: ArraySlot) -> Unfit:
    out, unfit = target.open(), Unfit()
    for index, name in enumerate(names, first):
        try:
            out[index] = decode(_content(reader, name), frame)
        except UnfitImageError as error:
            unfit[index] = error
    return unfit


def _content(reader: Reader, name: str) -> bytes:
    try:
        return reader.read(name)
    except DAMAGE as error:
        raise UnfitImageError(f"cannot be read ({error or type(error).__name__})") from None
