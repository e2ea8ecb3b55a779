"""Load the data that run.toml names: recognise the kind of files at a path, read and check them; torch-free.

`lte train` and launched processes call `load_data`. A plan calls `check_data`, which finds the user's errors without
decoding an image, training a tokenizer or reading more than a sample of a large text.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from simulate.common.encodings import encoding_of
from simulate.common.errors import InputError
from simulate.common.live_objects import find, is_live
from simulate.config.run import Model, Run
from simulate.config.tables import BYTES, Data
from simulate.data.cifar import cifar_source, find_cifar
from simulate.data.digits import DIGITS, digits_source
from simulate.data.file_tree import IMAGE_SUFFIXES, Tree, read_folder, read_zip
from simulate.data.huggingface import hub_images
from simulate.data.image_folders import folder_source
from simulate.data.images import Images, ImageSource, load_images
from simulate.data.samples import Samples
from simulate.data.stl10 import find_stl10, stl10_source
from simulate.data.text import Text, load_text, read_bytes
from simulate.data.text_files import is_packed, refuse_archive
from simulate.data.text_size import sample_note, text_size
from simulate.data.tokenizer import check_vocabulary, declared_size
from simulate.models.schema import text_sizes

Dataset = Text | Images | Samples
TOKENIZER_FILE = "tokenizer.json"
"""The file in a run's folder that holds its tokenizer, unless its tokens are bytes."""
SUPPORTED = (
    "UTF-8 text, JSON lines or Parquet (a file or a folder, compressed or not), "
    "images in class folders (a folder or a .zip), CIFAR-10 or CIFAR-100 batches for "
    "Python, STL-10 binary"
)
SNIFFED_BYTES = 4096
"""Bytes at a file's start that are searched for a NUL, which text has not."""


def load_data(run: Run, tokenizer: Path | None = None) -> Dataset:
    """Return a run's samples, read and checked; raises InputError where they cannot be read or do not fit the model.

    `tokenizer`, the tokenizer.json in a run's folder, takes the place of run.toml's: a resumed run must not train it
    anew.
    """
    data, devices = run.data, run.cluster.devices
    if is_live(data.name):
        return _live_samples(run)
    if tokenizer is not None:  # a given file's path takes the place of "bpe:N"
        data = data.model_copy(update={"tokenizer": str(tokenizer)})
    pixels, colours, classes = image_sizes(run.model)
    source = image_source(data)
    _check_kind(run, source is not None)
    if source is None:
        text = load_text(data)
        text.check(text_sizes(run.model), devices, data.shards)
        return text
    source.check(classes, devices, data.shards)
    images = load_images(source, source.frame(pixels, colours, data.upscale), data.skip_corrupt)
    images.check(classes, devices, data.shards)
    return images


def kept_tokenizer(folder: Path) -> Path | None:
    """Return the path of the tokenizer in a run's folder, or None where its tokens are bytes."""
    return folder / TOKENIZER_FILE if (folder / TOKENIZER_FILE).is_file() else None


def check_data(run: Run) -> list[str]:
    """Raise InputError for errors that a plan can find (see above); return notes on what it took from a sample."""
    devices, shards = run.cluster.devices, run.data.shards
    if is_live(run.data.name):
        _live_samples(run)
        return []
    if run.data.name == DIGITS:  # a plan does without scikit-learn, which brings them
        _check_kind(run, images=True)
        return []
    source = image_source(run.data)
    _check_kind(run, source is not None)
    if source is None:
        return _check_text(run)
    source.check(image_sizes(run.model)[2], devices, shards)
    return []


def _check_text(run: Run) -> list[str]:
    data, sizes = run.data, text_sizes(run.model)
    if data.path is None:
        text, is_about = read_bytes(data), False
    else:
        size = text_size(data)
        text, is_about = size.text(data.path), size.is_about
    if not is_about:  # the text has no more tokens than bytes: too few bytes are too few tokens
        text.check_length(sizes, run.cluster.devices, data.shards)
    if data.tokenizer == BYTES:
        text.check_bytes(sizes)
    else:
        check_vocabulary(declared_size(data.tokenizer), data.tokenizer, sizes.vocab)
    return [] if data.path is None else sample_note(data)


def _live_samples(run: Run) -> Samples:
    """Return the samples of a data set that is an object of this process; raises InputError where they do not fit."""
    samples: Samples = find("data.name", str(run.data.name))
    samples.check(run)
    return samples


def image_sizes(model: Model) -> tuple[int | None, int | None, int | None]:
    """Return pixels a side, colours and classes of a model of images, each None where the model has no such size."""
    sizes = (getattr(model, key, None) for key in ("image", "colours", "classes"))
    pixels, colours, classes = (size or None for size in sizes)
    return pixels, colours, classes


def _check_kind(run: Run, images: bool) -> None:
    data, reads_images = run.data, image_sizes(run.model)[0] is not None
    if images != reads_images:
        found, needed = ("images", "text") if images else ("text", "images")
        field = "path" if data.name is None else "name"
        raise InputError(
            f"data.{field} = {data.path or data.name!r} is {found}, and model.name = {run.model.name!r} "
            f"reads {needed}; choose a model of {found}, or other data"
        )


def image_source(data: Data) -> ImageSource | None:
    """Return the images that run.toml names, or None where it names text; raises InputError."""
    if data.from_hub:
        return hub_images(data)
    if data.path is None:
        return digits_source() if data.name == DIGITS else None
    path = Path(data.path)
    try:
        return _SOURCES[data.format](path) if data.format is not None else _recognised(path)
    except OSError as error:
        raise InputError(f"data.path = {data.path!r} cannot be read ({error.strerror}); check it") from None


def _recognised(path: Path) -> ImageSource | None:
    if not path.is_dir():
        return _recognised_file(path)
    if find_cifar(path) is not None:
        return cifar_source(path)
    if find_stl10(path) is not None:
        return stl10_source(path)
    tree = read_folder(path)
    # A folder of text may have a few pictures, and one of images a README: the majority decides.
    if 2 * len(tree.images) > len(tree.files):
        return folder_source(path, tree)
    if tree.files and not any(_may_be_text(path / name) for name in tree.files):
        if archive := next((name for name in sorted(tree.files) if zipfile.is_zipfile(path / name)), None):
            raise InputError(f"data.path = {str(path)!r} has the archive {archive} in it; unpack it, or name it itself")
        raise InputError(
            f"data.path = {str(path)!r}: nothing in it is recognised ({min(tree.files)} is binary: it holds a NUL "
            f"byte); supported: {SUPPORTED}"
        )
    return None


def _recognised_file(path: Path) -> ImageSource | None:
    if not path.is_file():
        return None  # reading it as text raises the error
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return _images(path)
    refuse_archive(path)
    return None


def _may_be_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES)
    return b"\x00" not in start or encoding_of(start) != "utf-8" or is_packed(path)


def _images(path: Path) -> ImageSource:
    if not path.exists():
        raise InputError(f"data.path = {str(path)!r} does not exist; give a folder of class folders, or a .zip of one")
    tree: Tree = read_folder(path) if path.is_dir() else read_zip(path)
    if not tree.images:
        unpack = "" if path.is_dir() else "; text in an archive has to be unpacked"
        raise InputError(
            f"data.path = {str(path)!r} holds no image ({' '.join(sorted(IMAGE_SUFFIXES))}){unpack}; "
            f"supported: {SUPPORTED}"
        )
    return folder_source(path, tree)


_SOURCES: dict[str, Callable[[Path], ImageSource | None]] = {
    "text": lambda path: None,
    "images": _images,
    "cifar": cifar_source,
    "stl10": stl10_source,
}
