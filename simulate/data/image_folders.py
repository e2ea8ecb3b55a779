"""Folders of images, one a class, on disk or in a zip archive; torch-free.

A class is the topmost folder that holds images itself; its name is its path, so that nested ones stay apart
("a/abbey"). Splits are folders around the classes: train beside val or test; `val` is preferred to `test`.
simulate.data.load lists a path (simulate.data.file_tree) and hands the list to `folder_source`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simulate.common.errors import InputError
from simulate.data.cache import ArraySlot
from simulate.data.decode_images import DAMAGE, FolderReader, Frame, Reader, Unfit, ZipReader, decode_all, opened
from simulate.data.file_tree import Tree
from simulate.data.images import ImageSource, hold_out

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "test")
"""Names of a split to evaluate on, the preferred one first."""
NAMED_CLASSES = 5
"""Classes that an error lists at most."""


@dataclass(frozen=True)
class Arrangement:
    """The images of a folder with their classes and splits."""

    paths: list[str]
    classes: tuple[str, ...]
    labels: np.ndarray
    held_out: np.ndarray | None
    """(S,), bool; None where there are no splits."""


def arrange(tree: Tree, source: str) -> Arrangement:
    """Sort images into classes and splits by their folders; raises InputError where the folders contradict that."""
    paths = tree.images
    wrapper = _wrapper(paths)
    split_of = _splits(paths, wrapper, source)
    kept = [path for path in paths if split_of is None or split_of[_first_part(path, wrapper)] is not None]
    roots = [wrapper if split_of is None else f"{wrapper}{_first_part(path, wrapper)}/" for path in kept]
    names = _class_names(kept, roots, source)
    held_out = None if split_of is None else np.array([split_of[_first_part(path, wrapper)] for path in kept], bool)
    _check_unreadable(tree, kept, set(roots), source)
    _check_classes(tree, names, held_out, source)
    classes = tuple(sorted(set(names)))
    number = {name: k for k, name in enumerate(classes)}
    return Arrangement(kept, classes, np.array([number[name] for name in names], np.int64), held_out)


def _wrapper(paths: Sequence[str]) -> str:
    """Return the folders that hold everything ("cifar10/"), down to where splits or classes part."""
    # Archives often have one folder around everything, which is neither a split nor a class.
    wrapper = ""
    while True:
        firsts = {_first_part(path, wrapper) for path in paths}
        deeper = all(path.count("/") > wrapper.count("/") + 1 for path in paths)
        if len(firsts) != 1 or not deeper:
            return wrapper
        wrapper += f"{firsts.pop()}/"


def _first_part(path: str, wrapper: str) -> str:
    return path[len(wrapper) :].partition("/")[0]


def _splits(paths: Sequence[str], wrapper: str, source: str) -> dict[str, bool | None] | None:
    """Return folder → whether it is held out (None: unused), or None where the folders are classes."""
    firsts = sorted({_first_part(path, wrapper) for path in paths if "/" in path[len(wrapper) :]})
    train = [name for name in firsts if name.lower() in TRAIN_NAMES]
    others = [name for name in firsts if name.lower() in HELD_OUT_NAMES]
    if not train or not others:  # "train" alone may be a class, beside "bus"
        _refuse_other_splits(paths, wrapper, firsts, source)
        return None
    # Training on train/ alone and dropping other folders without a word would lose data.
    if strange := [name for name in firsts if name not in (*train, *others)]:
        raise InputError(
            f"data: {source} has {train[0]}/ and beside it {strange[0]}/, which is no split "
            f"({', '.join(HELD_OUT_NAMES)}); move it away"
        )
    chosen = min(others, key=lambda name: HELD_OUT_NAMES.index(name.lower()))
    return {name: False if name in train else True if name == chosen else None for name in firsts}


def _refuse_other_splits(paths: Sequence[str], wrapper: str, firsts: Sequence[str], source: str) -> None:
    """Raise InputError where splits have other names, or stand within the classes: each would become a class."""
    below: dict[str, set[str]] = {
        first: {_first_part(path, f"{wrapper}{first}/") for path in paths if path.startswith(f"{wrapper}{first}/")}
        for first in firsts
    }
    training = next((first for first in firsts if _words(first).intersection(TRAIN_NAMES)), None)
    for first in firsts:
        folders = {name for name in below[first] if any(p.startswith(f"{wrapper}{first}/{name}/") for p in paths)}
        if training not in (None, first) and len(folders) > 1 and folders == below[training or ""]:
            raise InputError(
                f"data: {source} has {training}/ and {first}/ with the same folders in them; name splits train and one "
                f"of {', '.join(HELD_OUT_NAMES)}"
            )
    inner = set.intersection(*below.values()) if len(firsts) > 1 else set()
    if inner.intersection(TRAIN_NAMES) and inner.intersection(HELD_OUT_NAMES):
        raise InputError(
            f"data: {source} has splits within its classes ({firsts[0]}/train); put the splits around the classes: "
            f"train/{firsts[0]}"
        )


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _class_names(paths: Sequence[str], roots: Sequence[str], source: str) -> list[str]:
    """Return each image's class: the topmost folder below its root that holds images itself."""
    # A class may have subfolders with images of its own: the topmost folder with images counts.
    holding = {path.rpartition("/")[0] for path in paths}
    names = []
    for path, root in zip(paths, roots, strict=True):
        parts = path[len(root) :].split("/")[:-1]
        if not parts:
            raise InputError(
                f"data: {source} has images outside of class folders ({path}); put each into its class's folder"
            )
        depths = range(1, len(parts) + 1)
        name = "/".join(next(parts[:d] for d in depths if root + "/".join(parts[:d]) in holding))
        # macOS takes letters apart from their accents, other systems do not: to a person it is one name.
        names.append(unicodedata.normalize("NFC", name))
    return names


def _check_unreadable(tree: Tree, images: Sequence[str], roots: set[str], source: str) -> None:
    """Raise InputError for a folder beside the classes that has files, and no image: a class would get lost."""
    direct = {path.rpartition("/")[0] for path in images}
    holding = {folder for path in images for folder in _folders_above(path)}
    for path in sorted(tree.files):
        folders = [folder for folder in _folders_above(path) if any(folder.startswith(root) for root in roots)]
        # Beside images, above them or below them, a folder may hold anything else.
        if folders and folders[-1] not in holding and not direct.intersection(folders):
            raise InputError(
                f"data: the folder {folders[-1]} of {source} has no image that can be read (but {path}); put images "
                "into it, or move it away"
            )


def _folders_above(path: str) -> list[str]:
    """Return the folders around a file, from the topmost on."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _check_classes(tree: Tree, names: Sequence[str], held_out: np.ndarray | None, source: str) -> None:
    if bare := sorted(tree.bare_folders):
        raise InputError(f"data: the class folder {bare[0]} of {source} is empty; add images or remove it")
    if len(set(names)) < 2:
        raise InputError(f"data: {source} has one class, {names[0]!r}; at least two are needed for training")
    if held_out is None:
        return
    of_train = {name for name, out in zip(names, held_out, strict=True) if not out}
    of_validation = {name for name, out in zip(names, held_out, strict=True) if out}
    if of_train != of_validation:
        missing = {"validation": of_train - of_validation, "training": of_validation - of_train}
        text = "; ".join(f"not in the {split} split: {_first_names(lost)}" for split, lost in missing.items() if lost)
        raise InputError(f"data: the class folders of {source}'s splits differ ({text}); make them the same")


def _first_names(names: set[str]) -> str:
    shown = sorted(names)[:NAMED_CLASSES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def folder_source(path: Path, tree: Tree) -> ImageSource:
    """Return the images of a folder or a zip archive, given the list of its files; raises InputError."""
    reader: Reader = FolderReader(path) if path.is_dir() else ZipReader(path)
    name = str(path)
    arrangement = arrange(tree, name)
    paths, labels = arrangement.paths, arrangement.labels
    colours, pixels = first_size(reader, paths)

    def fill(frame: Frame, target: ArraySlot) -> Unfit:
        return decode_all(reader, paths, frame, target)

    held_out = hold_out(labels, arrangement.classes, name) if arrangement.held_out is None else arrangement.held_out
    return ImageSource(
        name=name,
        classes=arrangement.classes,
        labels=labels,
        held_out=held_out,
        has_split=arrangement.held_out is not None,
        colours=colours,
        pixels=pixels,
        stamp=f"{path.resolve()} {tree.stamp()}",
        fill=fill,
        image_name=lambda index: str(path / paths[index]),
    )


def first_size(reader: Reader, paths: Sequence[str]) -> tuple[int, int]:
    """Return colours and the shorter side's pixels of the first image that opens; raises InputError if none does."""
    for path in paths:
        try:
            with opened(reader.read(path)) as image:
                return (1 if image.mode in ("1", "L", "LA") else 3), min(image.size)
        except DAMAGE:  # decoding reports it with its name
            continue
    raise InputError(f"data: no image can be decoded, the first is {paths[0]}; check the files")
