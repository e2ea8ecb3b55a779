"""Folders and archives of images: classes and splits of files, and errors for contradictory layouts."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data.decode_images import Frame
from simulate.data.file_tree import Tree, read_folder, read_zip
from simulate.data.image_folders import arrange
from simulate.data.images import ImageSource, load_images
from simulate.data.load import image_source
from tests.simulate.data.pictures import encoded, files_of, pixels, write_folder, write_zip


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
        (tree_of(*(f"{s}/{c}/1.jpg" for s in ("train", "dev") for c in "ab")), "train/ and dev/ with the same folders"),
        (tree_of(*(f"{s}_set/{c}/1.jpg" for s in ("train", "val") for c in "ab")), "name splits train and one of val"),
        (tree_of(*(f"{c}/{s}/1.jpg" for s in ("train", "val") for c in "ab")), "put the splits around the classes"),
    ],
)
def test_what_makes_no_sense_is_refused(tree: Tree, words: str) -> None:
    assert words in refusal(tree)


def test_a_folder_beside_the_classes_without_an_image_is_named() -> None:
    for path in ("cow/1.npy", "cow/deep/1.npy"):
        message = refusal(tree_of("cat/1.jpg", "dog/1.jpg", path))
        assert f"the folder {path.rpartition('/')[0]} of there has no image that can be read (but {path})" in message
    assert "train/cow" in refusal(tree_of("train/cat/1.jpg", "train/dog/1.jpg", "train/cow/1.npy", "val/cat/1.jpg"))
    # Within a class, around classes and beside splits, other files mean nothing.
    around = ("train/cat/more/1.npy", "labels/1.npy", "train/README", "README")
    assert len(arranged(*(f"{s}/{c}/1.jpg" for s in ("train", "val") for c in ("cat", "dog")), *around)) == 4


def test_names_that_a_person_reads_alike_are_one_class() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    found = arranged(f"train/{composed}/1.jpg", "train/b/1.jpg", f"val/{decomposed}/1.jpg", "val/b/1.jpg")
    assert found[f"val/{decomposed}/1.jpg"] == (composed, True)
    # Letters, for one, are data sets of classes that differ by case alone.
    assert {name for name, _ in arranged("a/1.jpg", "A/1.jpg").values()} == {"a", "A"}


FILES: Mapping[str, bytes] = files_of({"cat": 3, "dog": 2})


def test_a_folder_and_an_archive_list_the_same(tmp_path: Path) -> None:
    hidden = {**FILES, ".git/x.png": b"", "cat/.DS_Store": b""}
    folder = read_folder(write_folder(tmp_path / "pictures", hidden))
    archive = read_zip(write_zip(tmp_path / "pictures.zip", {**hidden, "__MACOSX/cat/0.png": b""}, ("cat", "dog")))
    assert folder.images == archive.images == sorted(FILES)
    assert folder.bare_folders == archive.bare_folders == frozenset()


def test_systems_leave_files_that_are_not_seen(tmp_path: Path) -> None:
    added = ("__MACOSX/cat/._0.png", "cat/Thumbs.db", "dog/@eaDir/0.jpg", "dog/._0.png", "desktop.ini")
    files = {**FILES, **dict.fromkeys(added, b"\0\5\x16\7")}
    assert set(read_folder(write_folder(tmp_path / "pictures", files)).files) == set(FILES)
    assert set(read_zip(write_zip(tmp_path / "pictures.zip", files)).files) == set(FILES)


def test_images_are_told_by_their_content(tmp_path: Path) -> None:
    kinds = {"PNG": "png_", "JPEG": "jfif", "GIF": "", "BMP": "image", "WEBP": "txt", "TIFF": "scan", "JPEG2000": "j"}
    shown = {f"cat/{k}.{end}": encoded(pixels(k), kind) for k, (kind, end) in enumerate(kinds.items())}
    files = {**shown, "cat/notes.txt": b"BMW and GIF are words", "cat/label.npy": b"\x93NUMPY"}
    for tree in (read_folder(write_folder(tmp_path / "d", files)), read_zip(write_zip(tmp_path / "d.zip", files))):
        assert tree.images == sorted(shown)


def test_an_archive_of_windows_reads_as_its_folder_does(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name, content in FILES.items():
            entry = zipfile.ZipInfo()
            entry.filename = name.replace("/", "\\")
            archive.writestr(entry, content)
    folder, archived = source(write_folder(tmp_path / "d", FILES)), source(tmp_path / "d.zip")
    assert archived.classes == folder.classes == ("cat", "dog")
    frame = Frame(8, 3)
    assert np.array_equal(load_images(archived, frame).pixels, load_images(folder, frame).pixels)


def test_archives_with_odd_names_or_a_password(tmp_path: Path) -> None:
    for wrapper in ("../", "/home/me/", "./"):
        path = write_zip(tmp_path / "d.zip", {f"{wrapper}{name}": content for name, content in FILES.items()})
        assert load_images(source(path), Frame(8, 3)).classes == ("cat", "dog")
    assert read_zip(write_zip(tmp_path / "none.zip", {})).files == {}
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"d\.zip' is encrypted; unpack it"):
        read_zip(path)


@pytest.mark.parametrize(("method", "name"), [(9, "deflate64"), (200, "method 200")])
def test_a_zip_of_a_compression_that_python_lacks_is_named(tmp_path: Path, method: int, name: str) -> None:
    path = write_zip(tmp_path / "d.zip", FILES)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] = method
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"is compressed by {name}, which Python does not read; unpack it"):
        read_zip(path)


def test_a_link_that_leads_back_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", FILES)
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    with pytest.raises(InputError, match="leads back to a folder around it"):
        read_folder(root)


def test_what_is_held_out_can_be_read(tmp_path: Path) -> None:
    files = files_of({"cat": 10, "dog": 10})
    held_out = np.flatnonzero(source(write_folder(tmp_path / "d", files)).held_out)
    names = sorted(files)
    for row in held_out:
        files[names[row]] = b"damaged"
    found = load_images(source(write_folder(tmp_path / "d", files)), Frame(8, 3), skip_corrupt=True)
    assert found.left_out == 2 and len(found.validation) == 2 and len(found.train) == 16
    assert not set(found.validation) & set(held_out)


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
