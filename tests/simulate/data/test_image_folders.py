"""Folders and archives of images: classes and splits of files, and errors for contradictory layouts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data.image_folders import Tree, arrange, read_folder, read_zip
from simulate.data.images import ImageSource
from simulate.data.load import image_source
from tests.simulate.data.pictures import files_of, write_folder, write_zip


def tree_of(*paths: str, bare: tuple[str, ...] = ()) -> Tree:
    return Tree(dict.fromkeys(paths, (1, 1)), frozenset(bare))


def arranged(*paths: str) -> dict[str, tuple[str, bool | None]]:
    """Return path → class and whether it is held out."""
    found = arrange(tree_of(*paths), "there")
    held_out = [None] * len(found.paths) if found.held_out is None else found.held_out.tolist()
    names = [found.classes[label] for label in found.labels]
    return dict(zip(found.paths, zip(names, held_out, strict=True), strict=True))


def refusal(tree: Tree) -> str:
    with pytest.raises(InputError) as caught:
        arrange(tree, "there")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_are_classes() -> None:
    assert arranged("cat/1.jpg", "dog/1.PNG", "dog/notes.txt") == {
        "cat/1.jpg": ("cat", None),
        "dog/1.PNG": ("dog", None),
    }


def test_folders_around_everything_mean_nothing() -> None:
    assert arranged("256_ObjectCategories/001.ak47/1.jpg", "256_ObjectCategories/002.flag/1.jpg") == {
        "256_ObjectCategories/001.ak47/1.jpg": ("001.ak47", None),
        "256_ObjectCategories/002.flag/1.jpg": ("002.flag", None),
    }


@pytest.mark.parametrize("wrapper", ["", "cifar10/", "data/cifar10/"])
@pytest.mark.parametrize(("train", "held_out"), [("train", "test"), ("Train", "val"), ("training", "validation")])
def test_splits_are_told_from_classes(wrapper: str, train: str, held_out: str) -> None:
    paths = [f"{wrapper}{split}/{name}/1.jpg" for split in (train, held_out) for name in ("cat", "dog")]
    expected = [(name, split == held_out) for split in (train, held_out) for name in ("cat", "dog")]
    assert arranged(*paths) == dict(zip(paths, expected, strict=True))


def test_val_goes_before_test_which_is_left_aside() -> None:
    paths = [f"{split}/{name}/1.jpg" for split in ("test", "train", "val") for name in ("cat", "dog")]
    found = arranged(*paths, "test/0001.jpg")
    assert set(found) == {path for path in paths if not path.startswith("test")}


def test_train_may_be_a_class_or_alone() -> None:
    assert {name for name, _ in arranged("train/1.jpg", "bus/1.jpg").values()} == {"train", "bus"}
    assert {name for name, _ in arranged("train/cat/1.jpg", "train/dog/1.jpg").values()} == {"cat", "dog"}


def test_nested_classes_are_named_by_their_path_and_a_class_keeps_what_is_below_it() -> None:
    assert arranged("a/abbey/1.jpg", "a/airport/inside/1.jpg", "b/bar/1.jpg", "b/bar/more/2.jpg") == {
        "a/abbey/1.jpg": ("a/abbey", None),
        "a/airport/inside/1.jpg": ("a/airport/inside", None),
        "b/bar/1.jpg": ("b/bar", None),
        "b/bar/more/2.jpg": ("b/bar", None),
    }


def test_classes_that_differ_between_splits_are_named() -> None:
    message = refusal(tree_of("train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/emu/1.jpg"))
    assert "not in the validation split: dog; not in the training split: emu" in message
    many = tree_of("test/x/1.jpg", "train/x/1.jpg", *(f"train/{name}/1.jpg" for name in "abcdefg"))
    assert "a, b, c, d, e and 2 more" in refusal(many)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (tree_of("cat/1.jpg", "dog/1.jpg", bare=("emu",)), "class folder emu of there is empty"),
        (tree_of("cat/1.jpg", "dog/1.jpg", "3.jpg"), "outside of class folders (3.jpg)"),
        (tree_of("1.jpg", "2.jpg"), "outside of class folders (1.jpg)"),
        (tree_of("cat/1.jpg", "cat/2.jpg"), "one class, 'cat'"),
        (tree_of("train/a/1.jpg", "val/a/1.jpg", "extra/a/1.jpg"), "beside it extra/, which is no split"),
    ],
)
def test_what_makes_no_sense_is_refused(tree: Tree, words: str) -> None:
    assert words in refusal(tree)


FILES: Mapping[str, bytes] = files_of({"cat": 3, "dog": 2})


def test_a_folder_and_an_archive_list_the_same(tmp_path: Path) -> None:
    hidden = {**FILES, ".git/x.png": b"", "cat/.DS_Store": b""}
    folder = read_folder(write_folder(tmp_path / "pictures", hidden))
    archive = read_zip(write_zip(tmp_path / "pictures.zip", {**hidden, "__MACOSX/cat/0.png": b""}, ("cat", "dog")))
    assert folder.images == archive.images == sorted(FILES)
    assert folder.bare_folders == archive.bare_folders == frozenset()


def test_empty_folders_are_seen_in_both(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", FILES)
    (root / "emu" / "young").mkdir(parents=True)
    assert read_folder(root).bare_folders == {"emu/young"}
    archive = write_zip(tmp_path / "pictures.zip", FILES, ("cat", "emu", "emu/young", "catalogue"))
    assert read_zip(archive).bare_folders == {"emu/young", "catalogue"}


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pictures.zip", FILES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"pictures\.zip' is a truncated or damaged zip archive") as caught:
        image_source(Data(path=str(path)))
    assert "\n" not in str(caught.value)


def source(path: Path) -> ImageSource:
    found = image_source(Data(path=str(path)))
    assert found is not None
    return found


def test_a_source_tells_the_size_and_colours_of_its_first_picture(tmp_path: Path) -> None:
    files = {**files_of({"cat": 2, "dog": 2}, size=12), "cat/0.png": b"damaged"}
    found = source(write_folder(tmp_path / "pictures", files))
    assert (found.pixels, found.colours, found.classes) == (12, 3, ("cat", "dog"))
    with pytest.raises(InputError, match="no image can be decoded"):
        source(write_folder(tmp_path / "broken", {"a/1.png": b"", "b/1.png": b""}))


def test_a_stamp_changes_with_any_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", FILES)
    stamps = [source(root).stamp, source(root).stamp]
    os.utime(root / "cat/0.png", (1, 1))
    stamps.append(source(root).stamp)
    (root / "cat/9.png").write_bytes(FILES["cat/0.png"])
    stamps.append(source(root).stamp)
    assert stamps[0] == stamps[1] and len(set(stamps)) == 3
