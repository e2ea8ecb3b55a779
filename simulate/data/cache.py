"""Arrays that were costly to make, each set in one safetensors file: memory-mapped, atomic, and checked when opened.

The file holds its own digest, over its header and every byte of its arrays. One that is truncated or damaged counts as
absent and is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simulate.common.errors import InputError

CACHE_VARIABLE = "LTE_CACHE"
CACHE_VERSION = 1
"""Part of every key: raise it where equal keys would mean other arrays."""
ALIGNMENT = 64
_NO_DIGEST = "0" * 64
_READ_BYTES = 1 << 24
_SAFETENSORS_NAMES = {"u1": "U8", "u2": "U16", "u4": "U32", "i4": "I32", "i8": "I64", "f8": "F64"}

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Array name → dtype as numpy spells it ("u1", "i8") and shape."""


@dataclass(frozen=True)
class Kept:
    """What a cache file holds."""

    arrays: dict[str, np.ndarray]
    """Memory-mapped, read-only."""
    facts: dict[str, Any]
    digest: str
    """sha256 of everything in the file: equal digests mean equal arrays and facts."""


@dataclass(frozen=True)
class ArraySlot:
    """Where one array of a file under construction lies, so that other processes can write into it."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """Return the array itself, writable."""
        return np.memmap(self.path, self.dtype, "r+", self.offset, self.shape)

    def read(self) -> np.ndarray:
        """Return the array itself, read-only."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    @classmethod
    def of(cls, array: np.ndarray) -> ArraySlot:
        """Return the place of an array that a cache file holds."""
        assert isinstance(array, np.memmap) and array.filename is not None
        return cls(Path(array.filename), array.offset, array.dtype.str, array.shape)


class Draft:
    """A cache file under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def allocate(self, shapes: Shapes, facts: Mapping[str, Any]) -> dict[str, ArraySlot]:
        """Write the header and reserve room for the arrays; raises OSError where the disk has none."""
        offsets, end = {}, 0
        # The widest elements first keeps every array aligned.
        for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -np.dtype(item[1][0]).itemsize):
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            offsets[name], end = (end, end + size), end + size
        header: dict[str, Any] = {
            name: {"dtype": _SAFETENSORS_NAMES[shapes[name][0]], "shape": shapes[name][1], "data_offsets": span}
            for name, span in offsets.items()
        }
        header["__metadata__"] = {"facts": json.dumps(facts), "sha256": _NO_DIGEST}
        content = json.dumps(header).encode()
        content += b" " * (-(8 + len(content)) % ALIGNMENT)
        start = 8 + len(content)
        with self.path.open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            file.flush()
            _reserve(file.fileno(), start + end)
        return {name: ArraySlot(self.path, start + offsets[name][0], *shapes[name]) for name in shapes}

    def seal(self) -> None:
        """Write the digest into the header, and everything to the disk."""
        with self.path.open("r+b") as file:
            digest = _digest(file)
            file.seek(8)
            header = file.read(_header_bytes(file))
            file.seek(8 + header.rindex(_NO_DIGEST.encode()))
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())


def _reserve(handle: int, size: int) -> None:
    # A sparse file on a full disk would kill the process that writes into its mapping.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def cache_folder() -> Path:
    """Return where cache files lie: LTE_CACHE, or `lte` in the user's cache directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lte"


def cached(kind: str, key: Mapping[str, Any], make: Callable[[Draft], None]) -> Kept:
    """Return the arrays for `key`, from the cache or made now; `make` allocates and fills a draft.

    Raises InputError where the cache folder cannot be written. Of several processes that ask for the same key at once,
    one makes the file and the others wait.
    """
    folder = cache_folder()
    name = f"{kind}-{_key_digest(key)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{name}.lock"):
            kept = open_file(folder / name)
            if kept is None:
                _make(folder / name, make)
                kept = open_file(folder / name)
    except OSError as error:
        raise InputError(
            f"{CACHE_VARIABLE}: the cache folder {folder} cannot be used ({error.strerror}); "
            f"make room there, or set {CACHE_VARIABLE} to another folder"
        ) from None
    assert kept is not None, "a file that was just sealed opens"
    return kept


def _key_digest(key: Mapping[str, Any]) -> str:
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(path: Path, make: Callable[[Draft], None]) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    try:
        draft = Draft(scratch)
        make(draft)
        draft.seal()
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def open_file(path: Path) -> Kept | None:
    """Return what a cache file holds, or None where it is missing or anything in it is not as it was sealed."""
    try:
        with path.open("rb") as file:
            size = _header_bytes(file)
            file.seek(8)
            header = json.loads(file.read(size))
            metadata = header.pop("__metadata__")
            if metadata["sha256"] != _digest(file):
                return None
            facts = json.loads(metadata["facts"])
            arrays = {name: _mapped(path, 8 + size, entry) for name, entry in header.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return Kept(arrays, facts, metadata["sha256"])


def _mapped(path: Path, start: int, entry: dict[str, Any]) -> np.ndarray:
    dtype = next(ours for ours, name in _SAFETENSORS_NAMES.items() if name == entry["dtype"])
    shape = tuple(entry["shape"])
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + entry["data_offsets"][0], shape)


def _header_bytes(file: Any) -> int:
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= os.fstat(file.fileno()).st_size - 8:
        raise ValueError("no header")
    return size


def _digest(file: Any) -> str:
    """Return the digest of an open file, with zeros in the place of the digest that it names."""
    size = _header_bytes(file)
    file.seek(8)
    header = json.loads(file.read(size))
    header["__metadata__"]["sha256"] = _NO_DIGEST
    total = hashlib.sha256(json.dumps(header).encode())
    file.seek(8 + size)
    while block := file.read(_READ_BYTES):
        total.update(block)
    return total.hexdigest()
