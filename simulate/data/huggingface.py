"""Data sets of the Hugging Face hub, or folders that its library can load, streamed once into a cache file; torch-free.

Training needs any row at any step, and a stream gives them once and in order. So the rows are read through, at most as
many as run.toml says, and kept: texts as bytes, a newline between two, or images as they are encoded, with labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from simulate.common.errors import InputError
from simulate.config.tables import HUB, Data
from simulate.data.cache import ArraySlot, Draft, Kept, cache_folder, cached
from simulate.data.decode_images import Frame, Unfit, decode_all
from simulate.data.image_folders import HELD_OUT_NAMES, first_size, read_folder
from simulate.data.images import ImageSource, hold_out

TEXTS, IMAGES = "texts", "images"
TRAIN = "train"
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Columns:
    """What of a row is read."""

    content: str
    kind: str
    label: str | None
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class RowReader:
    """Encoded images, end to end in one array, by their number."""

    content: ArraySlot
    ends: ArraySlot

    def read(self, name: str) -> bytes:
        index, ends = int(name), self.ends.read()
        return self.content.read()[ends[index - 1] if index else 0 : ends[index]].tobytes()


def read_hub(data: Data) -> Kept:
    """Return the rows of a data set, from the cache or streamed now; raises InputError where it cannot be loaded."""
    assert data.name is not None
    path = Path(data.name.removeprefix(HUB))
    stamp = read_folder(path).stamp() if path.is_dir() else ""
    key = {"name": data.name, "subset": data.subset, "column": data.column, "rows": data.rows, "stamp": stamp}
    return cached("hub", key, lambda draft: _Stream(data).write(draft))


def hub_images(data: Data) -> ImageSource | None:
    """Return the images of a data set, or None where it holds texts; raises InputError."""
    kept = read_hub(data)
    if kept.facts["kind"] == TEXTS:
        return None
    labels, held_out = np.array(kept.arrays["labels"]), np.array(kept.arrays["held_out"], bool)
    classes, name = kept.facts["classes"], str(data.name)
    if not held_out.any():
        held_out = hold_out(labels, classes, name)
    reader = RowReader(*(ArraySlot.of(kept.arrays[key]) for key in ("content", "ends")))
    names = [str(row) for row in range(len(labels))]
    colours, pixels = first_size(reader, names)

    def fill(frame: Frame, target: ArraySlot) -> Unfit:
        return decode_all(reader, names, frame, target)

    return ImageSource(
        name=name,
        classes=tuple(classes),
        labels=labels,
        held_out=held_out,
        colours=colours,
        pixels=pixels,
        stamp=kept.digest,
        fill=fill,
        image_name=lambda row: f"row {row} of {name}",
    )


class _Stream:
    """A data set while it is read."""

    def __init__(self, data: Data) -> None:
        self.data, self.name = data, str(data.name)
        self.source = self.name.removeprefix(HUB)
        self.library = _library()
        self.splits = self._guarded(lambda: self.library.get_dataset_split_names(self.source, data.subset))
        if TRAIN not in self.splits:
            raise InputError(
                f"data.name = {self.name!r} has no split {TRAIN!r} (but {', '.join(self.splits)}); choose another"
            )
        self.first = next(self._rows(TRAIN), None)
        if self.first is None:
            raise InputError(f"data.name = {self.name!r} has no rows; choose another")
        self.columns = self._columns(self.first)

    def write(self, draft: Draft) -> None:
        """Read all rows and write them into a draft."""
        splits = [TRAIN]
        if self.columns.kind == IMAGES:
            splits += [name for name in HELD_OUT_NAMES if name in self.splits][:1]
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as spool:
            ends: list[int] = []
            labels: list[int] = []
            held_out: list[bool] = []
            for split in splits:
                for content, label in self._samples(split):
                    spool.write(content)
                    ends.append(spool.tell())
                    labels.append(label)
                    held_out.append(split != TRAIN)
            arrays: dict[str, list[Any]] = {}
            if self.columns.kind == IMAGES:
                arrays = {"ends": ends, "labels": labels, "held_out": held_out}
            self._seal(draft, spool, ends[-1], arrays)

    def _seal(self, draft: Draft, spool: IO[bytes], size: int, arrays: dict[str, list[Any]]) -> None:
        if not size:
            raise InputError(f"data.name = {self.name!r} has rows, but nothing in them; choose another data.column")
        dtypes = {name: "u1" if name == "held_out" else "i8" for name in arrays}
        shapes = {name: (dtypes[name], (len(values),)) for name, values in arrays.items()}
        classes = self.columns.classes or [str(k) for k in range(max(arrays.get("labels", [0])) + 1)]
        places = draft.allocate(
            {**shapes, "content": ("u1", (size,))}, {"kind": self.columns.kind, "classes": list(classes)}
        )
        for name, values in arrays.items():
            places[name].open()[:] = values
        content, first = places["content"].open(), 0
        spool.seek(0)
        while block := spool.read(_COPY_BYTES):
            content[first : first + len(block)] = np.frombuffer(block, np.uint8)
            first += len(block)

    def _columns(self, row: dict[str, Any]) -> Columns:
        """Tell texts from images by the first row."""
        texts = [name for name, value in row.items() if isinstance(value, str)]
        images = [name for name, value in row.items() if _is_image(value)]
        found = images or texts
        if self.data.column is not None:
            found = [name for name in (*images, *texts) if name == self.data.column]
        if len(found) != 1:
            raise InputError(
                f"data.name = {self.name!r} has columns {', '.join(row)}, of which one must be text or images; "
                "name it with --set data.column=NAME"
            )
        if found[0] not in images:
            return Columns(found[0], TEXTS, None, None)
        labels = [name for name, value in row.items() if isinstance(value, int) and not isinstance(value, bool)]
        if len(labels) != 1:
            raise InputError(
                f"data.name = {self.name!r} has {len(labels)} columns of whole numbers ({', '.join(row)}), and images "
                "need one as their label; choose another data set"
            )
        return Columns(found[0], IMAGES, labels[0], self._class_names(labels[0]))

    def _class_names(self, label: str) -> tuple[str, ...] | None:
        feature = (self._dataset(TRAIN).features or {}).get(label)
        names = getattr(feature, "names", None)
        return None if names is None else tuple(names)

    def _dataset(self, split: str) -> Any:
        loaded = self._guarded(
            lambda: self.library.load_dataset(self.source, self.data.subset, split=split, streaming=True)
        )
        for name, feature in (loaded.features or {}).items():
            if isinstance(feature, self.library.Image):
                loaded = loaded.cast_column(name, self.library.Image(decode=False))
        return loaded

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        rows = iter(self._dataset(split))
        while (row := self._guarded(lambda: next(rows, None))) is not None:
            yield row

    def _samples(self, split: str) -> Iterator[tuple[bytes, int]]:
        """Yield content and label of a split's rows."""
        for number, row in enumerate(islice(self._rows(split), self.data.rows)):
            value = row[self.columns.content]
            if self.columns.kind == TEXTS:
                yield (b"\n" if number else b"") + str(value or "").encode(), 0
                continue
            label = row[str(self.columns.label)]
            if not isinstance(label, int) or label < 0:
                raise InputError(
                    f"data.name = {self.name!r}: row {number} of {split} has no label ({label!r}); choose another"
                )
            yield _image_bytes(value), label

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # of the library, of its file formats, of the network
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"data.name = {self.name!r} cannot be loaded ({reason}); check name, data.subset and network"
            ) from None


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def _image_bytes(value: Any) -> bytes:
    """Return an image's encoded bytes; empty where there are none, which is told when they are decoded."""
    if not _is_image(value):
        return b""
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    path = value["path"]
    return Path(path).read_bytes() if path and Path(path).is_file() else b""


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"data.name: {HUB} needs the datasets library, which is not installed; pip install 'lte[hf]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets
