"""Images from listing to training: held out, measured, skipped, cached and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data import image_folders as folders
from simulate.data.decode_images import Frame
from simulate.data.digits import digits_source
from simulate.data.images import Images, ImageSource, array_source, colour_figures, hold_out, load_images
from simulate.data.load import image_source
from tests.simulate.data.pictures import encoded, files_of, images, pixels, write_folder, write_zip

COUNTS = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}


def source(path: Path) -> ImageSource:
    found = image_source(Data(path=str(path)))
    assert found is not None
    return found


def load(path: Path, skip_corrupt: bool = False, size: int | None = None, upscale: bool = False) -> Images:
    found = source(path)
    return load_images(found, found.frame(size, None, upscale), skip_corrupt)


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(InputError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_every_picture_is_there_with_its_label_and_split(tmp_path: Path, kind: str) -> None:
    files = files_of(COUNTS)
    write = write_folder if kind == "folder" else write_zip
    loaded = load(write(tmp_path / f"pictures.{kind}", files))
    assert loaded.classes == ("cat", "dog")
    assert loaded.describe().endswith("7 training and 3 validation images of 3 x 8 x 8 in 2 classes")
    found = {
        (split, loaded.classes[loaded.labels[row]], loaded.pixels[row].tobytes())
        for split in ("train", "validation")
        for row in getattr(loaded, split)
    }
    numbers = {name: number for number, name in enumerate(files)}
    assert found == {
        (
            "train" if name.startswith("train") else "validation",
            name.split("/")[1],
            pixels(numbers[name]).transpose(2, 0, 1).tobytes(),
        )
        for name in files
    }


def test_decoded_images_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "pictures", files_of(COUNTS))
    first = load(root)
    monkeypatch.setattr(folders, "decode_all", None)
    again = load(root)
    assert np.array_equal(first.pixels, again.pixels) and first.fingerprint == again.fingerprint
    assert (first.mean, first.std) == (again.mean, again.std)
    with pytest.raises(TypeError):
        load(root, size=4)  # another size is another file


def test_a_changed_picture_changes_the_fingerprint(tmp_path: Path) -> None:
    files = files_of(COUNTS)
    before = load(write_folder(tmp_path / "pictures", files)).fingerprint
    after = load(write_folder(tmp_path / "pictures", {**files, "test/dog/0.png": encoded(pixels(99))})).fingerprint
    assert before != after


def test_mean_and_deviation_are_those_of_the_training_split(tmp_path: Path) -> None:
    loaded = load(write_folder(tmp_path / "pictures", files_of(COUNTS)))
    scaled = loaded.pixels[loaded.train].astype(np.float64) / 255
    np.testing.assert_allclose(loaded.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(loaded.std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_mean_and_deviation_by_hand() -> None:
    content = np.array([[[[0, 255]]], [[[51, 102]]], [[[9, 9]]]], np.uint8)
    mean, std = colour_figures(content, np.array([0, 1]))
    # 0, 1, 0.2 and 0.4: mean 0.4, squares 0.16, 0.36, 0.04 and 0.
    assert mean[0] == pytest.approx(0.4, rel=1e-12) and std[0] == pytest.approx(0.14**0.5, rel=1e-12)


def test_a_corrupt_picture_is_named_or_left_out_and_counted(tmp_path: Path) -> None:
    files = {**files_of(COUNTS), "train/cat/1.png": b"damaged"}
    root = write_folder(tmp_path / "pictures", files)
    message = refusal(root)
    assert str(root / "train/cat/1.png") in message and "data.skip_corrupt=true" in message
    loaded = load(root, skip_corrupt=True)
    assert (len(loaded.train), loaded.left_out) == (6, 1)
    assert "1 left out" in loaded.describe()
    scaled = loaded.pixels[loaded.train].astype(np.float64) / 255
    np.testing.assert_allclose(loaded.mean, scaled.mean((0, 2, 3)), rtol=1e-12)


def test_a_class_that_lost_all_its_pictures_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", {**files_of(COUNTS), "test/dog/0.png": b"damaged"})
    assert "class 'dog'" in refusal(root, skip_corrupt=True)
    assert "no validation image" in refusal(root, skip_corrupt=True)


def test_a_small_picture_is_named_even_where_corrupt_ones_are_left_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", {**files_of(COUNTS), "train/dog/1.png": encoded(pixels(0, 5, 9))})
    message = refusal(root, skip_corrupt=True)
    assert "train/dog/1.png has 9 x 5 pixels" in message and "data.upscale=true" in message
    assert load(root, upscale=True).pixels.shape == (10, 3, 8, 8)


def test_a_tenth_of_every_class_is_held_out_where_there_is_no_split() -> None:
    labels = np.array([0] * 25 + [1] * 2 + [2] * 10)
    mask = hold_out(labels, ["a", "b", "c"], "there")
    assert np.bincount(labels[mask]).tolist() == [2, 1, 1]
    assert np.array_equal(mask, hold_out(labels, ["a", "b", "c"], "there"))
    with pytest.raises(InputError, match=r"class 'b' of there has 1 image; .* train/ and val/"):
        hold_out(np.array([0, 0, 1]), ["a", "b"], "there")


@pytest.mark.parametrize(
    ("classes", "devices", "shards", "words"),
    [
        (2, 2, None, "model.classes = 2 does not cover the 3 classes of made-up pictures ('class 2' is number 2)"),
        (3, 13, None, "12 training images for cluster.devices = 13"),
        (3, 3, (100.0, 1.0, 100.0), "data.shards leaves device 1 none of the 12"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(
    classes: int, devices: int, shards: tuple[float, ...] | None, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        images().check(classes, devices, shards)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    images().check(3, 12)
    images().check(100, 1)
    images().check(None, 3, (3.0, 1.0, 2.0))


def test_arrays_are_resized_only_where_they_must() -> None:
    content = np.stack([pixels(n, 6, 6, 1).transpose(2, 0, 1) for n in range(8)])
    found = array_source("there", "stamp of a test", content, np.arange(8) % 2, ["a", "b"])
    assert np.array_equal(load_images(found, found.frame(None, None, False)).pixels, content)
    assert load_images(found, found.frame(3, 3, False)).pixels.shape == (8, 3, 3, 3)
    with pytest.raises(InputError, match=r"image 0 of there has 6 x 6 pixels, fewer than 7"):
        load_images(found, found.frame(7, 1, False))
    with pytest.raises(InputError, match=r"model\.colours = 2"):
        found.frame(None, 2, False)


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    loaded = load_images(digits_source(), Frame(8, 1))
    published = load_digits()
    assert len(loaded.train) + len(loaded.validation) == 1797
    assert np.array_equal(np.round(loaded.pixels[:, 0] * (16 / 255)), published.images)
    assert np.array_equal(loaded.labels, published.target)
    assert np.bincount(loaded.labels[loaded.validation]).min() >= 17


def test_a_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'lte\[vision\]'"):
        digits_source()


def test_left_out_images_are_in_no_split() -> None:
    data = replace(images(), labels=np.where(np.arange(16) == 15, -1, np.arange(16) % 3))
    assert (len(data.train), len(data.validation), data.left_out) == (12, 3, 1)
