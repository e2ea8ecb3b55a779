"""The cache of prepared data: files that were costly to make, each written whole or not at all.

Decoding images and encoding text take minutes, and every process of every run needs the result. It is kept as one
safetensors file of arrays, memory-mapped, so that processes of one machine share its memory. The file holds its own
digest, over its header and every byte of its arrays; a truncated or damaged file counts as missing and is made anew.
simulate.data.tokenizer, images and huggingface call `cached`; huggingface keeps its Arrow files with `cached_file`.

The safetensors library reads these files, too, but copies each array into memory of the process (200 MB of pixels took
195 MB more), so the header is read here and numpy maps the arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from simulate.common.cache_folder import CACHE_VARIABLE, cache_folder
from simulate.common.disk import reserve
from simulate.common.errors import InputError
from simulate.common.safetensors_writer import DTYPES, header

LARGE_BYTES = 1 << 24
"""Size from which a file is not read through at every start: what was found out about it is kept."""
CACHE_VERSION = 1
"""Part of every key: raise it when changed code makes other arrays for the same key."""
_NO_DIGEST = "0" * 64
_READ_BYTES = 1 << 24
_LONGEST, _HEADER_ROOM = 1 << 62, 1 << 10
"""Length that stands in for an unknown one, and bytes left in the header for facts that are known at the end."""
_NUMPY_NAMES = {format_name: name for name, (format_name, _) in DTYPES.items()}

Opened = TypeVar("Opened")
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Array name → dtype as numpy spells it ("u1", "i8") and shape."""


@dataclass(frozen=True)
class CachedArrays:
    """The content of a cache file."""

    arrays: dict[str, np.ndarray]
    """Memory-mapped, read-only."""
    facts: dict[str, Any]
    """Values beside the arrays that the maker wrote."""
    digest: str
    """sha256 of everything in the file: equal digests mean equal arrays and facts."""


@dataclass(frozen=True)
class ArraySlot:
    """The position of one array in a file under construction, so that other processes can write into it."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """Return the array itself, writable."""
        return np.memmap(self.path, self.dtype, "r+", self.offset, self.shape)


class Draft:
    """A cache file under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def allocate(self, shapes: Shapes, facts: Mapping[str, Any]) -> dict[str, ArraySlot]:
        """Write the header and reserve room for the arrays; raises OSError where the disk has none."""
        named = {name: (np.dtype(dtype).name, shape) for name, (dtype, shape) in shapes.items()}
        content, begins = header(named, {"facts": json.dumps(facts), "sha256": _NO_DIGEST})
        slots = {name: ArraySlot(self.path, begins[name], *shapes[name]) for name in shapes}
        sizes = [int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for dtype, shape in shapes.values()]
        with self.path.open("wb") as file:
            file.write(content)
            file.flush()
            # A sparse file on a full disk would kill the process that writes into its mapping.
            reserve(file.fileno(), len(content) + sum(sizes))
        return slots

    def stream(self, name: str, dtype: str, blocks: Iterable[np.ndarray], facts: dict[str, Any]) -> None:
        """Write one array of unknown length, block by block; raises OSError where the disk is full.

        `facts` may grow by a few figures until the last block, and get the sha256 of the array's bytes.
        """
        kind, total, elements = np.dtype(dtype), hashlib.sha256(), 0
        with self.path.open("wb") as file:
            room = len(self._header(name, kind, _LONGEST, facts)) + _HEADER_ROOM
            file.write(bytes(room))
            for block in blocks:
                content = np.ascontiguousarray(block, kind).data
                file.write(content)
                total.update(content)
                elements += len(block)
            facts["sha256"] = total.hexdigest()
            text = self._header(name, kind, elements, facts)
            assert len(text) <= room, "facts grew by more than a few figures"
            file.seek(0)
            # Blanks may follow the header's text, and count in its length.
            file.write((room - 8).to_bytes(8, "little") + text[8:].ljust(room - 8))

    @staticmethod
    def _header(name: str, dtype: np.dtype[Any], elements: int, facts: Mapping[str, Any]) -> bytes:
        return header({name: (dtype.name, (elements,))}, {"facts": json.dumps(facts), "sha256": _NO_DIGEST})[0]

    def seal(self) -> None:
        """Write the digest into the header."""
        with self.path.open("r+b") as file:
            content, digest = _read_header(file), _digest(file)
            # Over the zeros that `allocate` wrote; the digest counts them, so that writing it leaves it true.
            file.seek(8 + content.rindex(_NO_DIGEST.encode()))
            file.write(digest.encode())


def stamp_of(files: Sequence[Path]) -> str:
    """Return names, sizes and times of change of files, for the key of what is made from them."""
    status = [(str(file.resolve()), file.stat()) for file in files]
    return repr([(name, s.st_size, s.st_mtime_ns) for name, s in status])


def cached(kind: str, key: Mapping[str, Any], make: Callable[[Draft], None]) -> CachedArrays:
    """Return the arrays for `key`, from the cache or made now; `make` allocates and fills a draft.

    Raises InputError as `cached_file` does.
    """

    def write(path: Path) -> None:
        draft = Draft(path)
        make(draft)
        draft.seal()

    return cached_file(kind, key, "safetensors", open_arrays, write)


def cached_facts(kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the facts for `key`, from the cache or found out now; raises InputError as `cached_file` does."""

    def read(path: Path) -> dict[str, Any] | None:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):  # a damaged file is made anew
            return None

    return cached_file(kind, key, "json", read, lambda path: path.write_text(json.dumps(make()), encoding="utf-8"))


def cached_file(
    kind: str,
    key: Mapping[str, Any],
    suffix: str,
    read: Callable[[Path], Opened | None],
    write: Callable[[Path], object],
) -> Opened:
    """Return what `read` makes of the file for `key`; `write` makes the file where it is missing or `read` gives None.

    Raises InputError for any OSError of `read` and `write`, reported as a cache folder that cannot be used. Of several
    processes that ask for the same key at once, one makes the file and the others wait.
    """
    from filelock import FileLock  # imported late: light commands import this module and lock nothing

    folder = cache_folder()
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock is beside the file, which appears under its name only once it is whole. The system releases it when
        # this process dies.
        with FileLock(folder / f".{name}.lock"):
            found = read(folder / name)
            if found is None:
                _write_whole(folder / name, write)
                found = read(folder / name)
    except OSError as error:
        raise InputError(
            f"{CACHE_VARIABLE}: the cache folder {folder} cannot be used ({error.strerror or error}); "
            f"make room there, or set {CACHE_VARIABLE} to another folder"
        ) from None
    assert found is not None, "a file that was just written opens"
    return found


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    try:
        write(scratch)
        with scratch.open("r+b") as file:  # Windows flushes no file that is open for reading only
            os.fsync(file.fileno())  # a crash must not leave the final name on a file whose bytes were lost
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def open_arrays(path: Path) -> CachedArrays | None:
    """Return the content of a cache file, or None where it is missing or anything in it is not as it was sealed."""
    try:
        with path.open("rb") as file:
            content = _read_header(file)
            entries = json.loads(content)
            metadata = entries.pop("__metadata__")
            if not _was_sound(path, file):
                if metadata["sha256"] != _digest(file):
                    return None
                _mark_sound(path, file)
            facts = json.loads(metadata["facts"])
            arrays = {name: _mapped(path, 8 + len(content), entry) for name, entry in entries.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return CachedArrays(arrays, facts, metadata["sha256"])


def _was_sound(path: Path, file: BinaryIO) -> bool:
    """Whether a large file was checked before, and has the same size and time of change."""
    status, mark = os.fstat(file.fileno()), _mark_of(path)
    return status.st_size >= LARGE_BYTES and mark.is_file() and mark.read_text("utf-8") == repr(_change_of(status))


def _mark_sound(path: Path, file: BinaryIO) -> None:
    if (status := os.fstat(file.fileno())).st_size >= LARGE_BYTES:
        _mark_of(path).write_text(repr(_change_of(status)), "utf-8")


def _mark_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.checked")


def _change_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _mapped(path: Path, start: int, entry: dict[str, Any]) -> np.ndarray:
    dtype, shape = np.dtype(_NUMPY_NAMES[entry["dtype"]]), tuple(entry["shape"])
    if 0 in shape:  # an empty mapping is an error
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + entry["data_offsets"][0], shape)


def _read_header(file: BinaryIO) -> bytes:
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    # A damaged length must not make us read, or allocate, beyond the file.
    if not 0 < size <= os.fstat(file.fileno()).st_size - 8:
        raise ValueError("no header")
    return file.read(size)


def _digest(file: BinaryIO) -> str:
    """Return the digest of an open file, with zeros in the place of the digest in its header."""
    entries = json.loads(_read_header(file))
    # Checkpoints hold this digest, so it must not change: metadata is digested last, wherever the header has it.
    metadata = entries.pop("__metadata__")
    entries["__metadata__"] = {**metadata, "sha256": _NO_DIGEST}
    total = hashlib.sha256(json.dumps(entries).encode())
    while block := file.read(_READ_BYTES):
        total.update(block)
    return total.hexdigest()
