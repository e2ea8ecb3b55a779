"""Data sets of the Hugging Face hub, or folders that its library can load; torch-free.

Training needs any row at any step, but a stream gives rows once and in order, and a data set may be far larger than
the part that a run wants. So the rows are streamed once, at most as many as run.toml says, into an Arrow file that the
datasets library writes and memory-maps: texts, or images as they are encoded, with labels. Later runs open the file
and need no network. simulate.data.load asks for images, simulate.data.text for texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from simulate.common.errors import InputError
from simulate.config.tables import HUB, Data
from simulate.data.cache import ArraySlot, Draft, cached, cached_file, stamp_of
from simulate.data.decode_images import Frame, Unfit, decode_all
from simulate.data.file_tree import read_folder
from simulate.data.image_folders import HELD_OUT_NAMES, first_size
from simulate.data.images import ImageSource, hold_out

TRAIN = "train"
CONTENT, LABEL, HELD_OUT = "content", "label", "held_out"
"""Columns of the Arrow file; texts have the first alone."""
_BATCH_ROWS = 1000
Result = TypeVar("Result")


@dataclass(frozen=True)
class RowReader:
    """Reads encoded images out of the Arrow file by the number of their row."""

    rows: Any
    """A datasets.Dataset, which travels to other processes as the path of its file."""

    def read(self, name: str) -> bytes:
        content: bytes = self.rows[int(name)][CONTENT]
        return content


def hub_text(data: Data) -> np.ndarray | None:
    """Return the texts of a data set as bytes, a newline between two, or None where it holds images.

    The bytes are memory-mapped, as one file: windows of training cross the borders of rows. Raises InputError.
    """
    rows = _open_rows(data)
    if LABEL in rows.column_names:
        return None

    def batches() -> Iterator[bytes]:
        return (b"".join(batch[CONTENT]) for batch in rows.iter(_BATCH_ROWS))

    def fill(draft: Draft) -> None:
        # Two passes over the rows: the first counts, since room in the file is reserved before it is filled.
        size, end = sum(map(len, batches())), 0
        text = draft.allocate({CONTENT: ("u1", (size,))}, {})[CONTENT].open()
        for batch in batches():
            begin, end = end, end + len(batch)
            text[begin:end] = np.frombuffer(batch, np.uint8)

    return cached("text", {"rows": _stamp(rows)}, fill).arrays[CONTENT]


def hub_images(data: Data) -> ImageSource | None:
    """Return the images of a data set, or None where it holds texts; raises InputError."""
    rows, name = _open_rows(data), str(data.name)
    if LABEL not in rows.column_names:
        return None
    labels, held_out = (rows.data.column(column).to_numpy() for column in (LABEL, HELD_OUT))
    numbered = [str(number) for number in range(labels.max() + 1)]
    classes = getattr(rows.features[LABEL], "names", numbered)
    reader, names = RowReader(rows), [str(row) for row in range(len(labels))]
    colours, pixels = first_size(reader, names)

    def fill(frame: Frame, target: ArraySlot) -> Unfit:
        return decode_all(reader, names, frame, target)

    return ImageSource(
        name=name,
        classes=tuple(classes),
        labels=labels,
        held_out=held_out if held_out.any() else hold_out(labels, classes, name),
        has_split=bool(held_out.any()),
        colours=colours,
        pixels=pixels,
        stamp=_stamp(rows),
        fill=fill,
        image_name=lambda row: f"row {row} of {name}",
    )


def _stamp(rows: Any) -> str:
    return stamp_of([Path(file["filename"]) for file in rows.cache_files])


def _open_rows(data: Data) -> Any:
    """Return the rows as a memory-mapped datasets.Dataset, streamed now where the cache lacks them."""
    library, path = _library(), Path(str(data.name).removeprefix(HUB))
    stamp = read_folder(path).stamp() if path.is_dir() else ""
    key = {"name": data.name, "subset": data.subset, "column": data.column, "rows": data.rows, "stamp": stamp}

    def read(file: Path) -> Any:
        try:
            return library.Dataset.from_file(str(file)) if file.is_file() else None
        except (OSError, ValueError):  # a damaged file is made anew
            return None

    return cached_file("hub", key, "arrow", read, lambda file: _Stream(data, library).write(file))


class _Stream:
    """A data set while it is streamed."""

    def __init__(self, data: Data, library: Any) -> None:
        self.data, self.name, self.library = data, str(data.name), library
        self.source = self.name.removeprefix(HUB)
        self.splits = self._guarded(lambda: library.get_dataset_split_names(self.source, data.subset))
        if TRAIN not in self.splits:
            raise InputError(
                f"data.name = {self.name!r} has no split {TRAIN!r} (but {', '.join(self.splits)}); choose another"
            )
        # The first row tells texts from images: a stream may come without a description of its columns.
        first = next(self._rows(TRAIN), None)
        if first is None:
            raise InputError(f"data.name = {self.name!r} has no rows; choose another")
        images = [name for name, value in first.items() if _is_image(value)]
        self.column = self._content_column(first, images)
        self.label = self._label_column(first) if self.column in images else None

    def write(self, path: Path) -> None:
        """Stream all rows into an Arrow file."""
        size = 0
        with self.library.arrow_writer.ArrowWriter(path=str(path), features=self._features()) as writer:
            for row in self._labelled_images() if self.label else self._texts():
                size += len(row[CONTENT])
                writer.write(row)
            writer.finalize()
        if not size:
            raise InputError(f"data.name = {self.name!r} has rows, but nothing in them; choose another data.column")

    def _features(self) -> Any:
        """Return the columns of the Arrow file and their types; the label's type holds the names of the classes."""
        types = {CONTENT: self.library.Value("large_binary")}
        if self.label is not None:
            label = (self._dataset(TRAIN).features or {}).get(self.label)
            names = getattr(label, "names", None)
            types[LABEL] = self.library.Value("int64") if names is None else self.library.ClassLabel(names=names)
            types[HELD_OUT] = self.library.Value("bool")
        return self.library.Features(types)

    def _content_column(self, row: dict[str, Any], images: list[str]) -> str:
        """Return the column of images or texts, as the first row tells them apart; images go before captions."""
        texts = [name for name, value in row.items() if isinstance(value, str)]
        found = images or texts
        if self.data.column is not None:
            found = [name for name in (*images, *texts) if name == self.data.column]
        if len(found) != 1:
            raise InputError(
                f"data.name = {self.name!r} has columns {', '.join(row)}, of which one must be text or images; "
                "name it with --set data.column=NAME"
            )
        return found[0]

    def _label_column(self, row: dict[str, Any]) -> str:
        labels = [name for name, value in row.items() if isinstance(value, int) and not isinstance(value, bool)]
        if len(labels) != 1:
            raise InputError(
                f"data.name = {self.name!r} has {len(labels)} columns of whole numbers ({', '.join(row)}), and images "
                "need one as their label; choose another data set"
            )
        return labels[0]

    def _texts(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self._rows(TRAIN)):
            # A newline before all but the first, as between the files of a folder.
            yield {CONTENT: (b"\n" if number else b"") + str(row[self.column] or "").encode()}

    def _labelled_images(self) -> Iterator[dict[str, Any]]:
        for split in (TRAIN, *[name for name in HELD_OUT_NAMES if name in self.splits][:1]):
            for number, row in enumerate(self._rows(split)):
                label = row[str(self.label)]
                if not isinstance(label, int) or label < 0:
                    raise InputError(
                        f"data.name = {self.name!r}: row {number} of {split} has no label ({label!r}); choose another"
                    )
                yield {CONTENT: _image_bytes(row[self.column]), LABEL: label, HELD_OUT: split != TRAIN}

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield a split's rows, at most as many as run.toml says."""
        rows = islice(self._dataset(split), self.data.rows)
        while (row := self._guarded(lambda: next(rows, None))) is not None:
            yield row

    def _dataset(self, split: str) -> Any:
        loaded = self._guarded(
            lambda: self.library.load_dataset(self.source, self.data.subset, split=split, streaming=True)
        )
        for name, feature in (loaded.features or {}).items():
            if isinstance(feature, self.library.Image):  # decoded later, to the size that the model reads
                loaded = loaded.cast_column(name, self.library.Image(decode=False))
        return loaded

    def _guarded(self, call: Callable[[], Result]) -> Result:
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
    """Return an image's encoded bytes, or none where there are none: decoding then reports the row."""
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
