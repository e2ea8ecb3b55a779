"""The kind of data at a path: recognised, or named in run.toml, and one line of error otherwise."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.config.tables import Data
from simulate.data import load as sources
from simulate.data.images import Images, load_images
from simulate.data.load import check_data, image_sizes, image_source, load_data
from simulate.data.text import Text
from tests.simulate.data.pictures import files_of, write_folder, write_zip

FILES = files_of({"cat": 3, "dog": 3})
CIFAR_ZIP = Path(os.environ.get("LTE_TEST_DATA", "")) / "cifar10.zip"


def refusal(**data: Any) -> str:
    with pytest.raises(InputError) as caught:
        image_source(Data(**data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_are_told_from_text(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pictures", {**FILES, "LICENSE": b"free", "labels.csv": b"a,b"})
    prose = write_folder(tmp_path / "prose", {"a.md": b"prose", "b.md": b"more", "img/figure.png": FILES["cat/0.png"]})
    archive = write_zip(tmp_path / "pictures.zip", FILES)
    nameless = write_zip(tmp_path / "archive", FILES)
    for path in (pictures, archive, nameless):
        assert image_source(Data(path=str(path))) is not None
    for path in (prose, prose / "a.md", tmp_path / "nowhere"):
        assert image_source(Data(path=str(path))) is None
    assert image_source(Data(name="stdlib")) is None
    assert image_source(Data(name="digits")) is not None


def test_a_format_that_is_said_goes_before_what_is_seen(tmp_path: Path) -> None:
    mixed = write_folder(tmp_path / "mixed", {**FILES, **{f"{n}.txt": b"note" for n in range(9)}})
    assert image_source(Data(path=str(mixed))) is None
    assert image_source(Data(path=str(mixed), format="images")) is not None
    assert image_source(Data(path=str(write_folder(tmp_path / "pictures", FILES)), format="text")) is None


@pytest.mark.parametrize(
    ("files", "data", "words"),
    [
        (
            {"a.bin": b"\x00\x01", "b.bin": b"\x00"},
            {},
            "nothing in it is recognised (a.bin is binary: it holds a NUL byte); supported: UTF-8 text",
        ),
        ({"a.zip": b"PK\x05\x06" + bytes(18)}, {}, "has the archive a.zip in it; unpack it, or name it itself"),
        ({"a.txt": b"prose"}, {"format": "images"}, "holds no image (.bmp .gif"),
        ({"a.txt": b"prose"}, {"format": "stl10"}, "holds no train_X.bin"),
    ],
)
def test_what_is_not_recognised_lists_what_is(tmp_path: Path, files: Any, data: Any, words: str) -> None:
    assert words in refusal(path=str(write_folder(tmp_path / "there", files)), **data)


def test_archives_that_are_not_read_in_place_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("data_batch_1"))
    assert "unpack it and name the folder" in refusal(path=str(tmp_path / "cifar-10-python.tar.gz"))
    write_zip(tmp_path / "prose.zip", {"a.txt": b"prose"})
    assert "text in an archive has to be unpacked" in refusal(path=str(tmp_path / "prose.zip"))
    assert "does not exist" in refusal(path=str(tmp_path / "nowhere"), format="images")


RUN = {
    "model": {"layers": 1, "width": 16, "attention_heads": 2, "context": 8},
    "method": {"rank": 2},
    "cluster": {"devices": 2},
}


def run_of(**data: Any) -> Any:
    return build_run({**RUN, "data": data})


def test_images_and_a_model_of_text_do_not_go_together(tmp_path: Path) -> None:
    for load in (load_data, check_data):
        with pytest.raises(
            InputError, match=r"data.name = 'digits' is images, and model.name = 'gpt' reads text"
        ) as caught:
            load(run_of(name="digits"))
        assert "\n" not in str(caught.value)


@pytest.fixture
def model_of_images(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model that reads 8 x 8 grey images of 10 classes, whatever run.toml says."""
    sizes = SimpleNamespace(image=8, colours=1, classes=10)
    monkeypatch.setattr(sources, "image_sizes", lambda model: image_sizes(sizes))  # type: ignore[arg-type]
    return sizes


def test_a_models_sizes_are_what_images_are_brought_to(model_of_images: SimpleNamespace, tmp_path: Path) -> None:
    loaded = load_data(run_of(name="digits"))
    assert isinstance(loaded, Images) and loaded.pixels.shape[1:] == (1, 8, 8)
    model_of_images.image, model_of_images.colours = 4, 3
    loaded = load_data(run_of(path=str(write_folder(tmp_path / "pictures", FILES))))
    assert isinstance(loaded, Images) and loaded.pixels.shape[1:] == (3, 4, 4)
    check_data(run_of(name="digits"))
    model_of_images.classes = 1
    for load in (load_data, check_data):
        with pytest.raises(InputError, match=r"--set model\.classes=2"):
            load(run_of(path=str(tmp_path / "pictures")))


def test_a_model_of_images_does_not_read_text(model_of_images: SimpleNamespace) -> None:
    with pytest.raises(InputError, match=r"data\.name = 'stdlib' is text, and model.name = 'gpt' reads images"):
        load_data(run_of(name="stdlib"))


def test_text_is_loaded_and_checked(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("prose " * 100)
    loaded = load_data(run_of(path=str(tmp_path / "prose.txt")))
    assert isinstance(loaded, Text)
    assert loaded.describe() == f"{tmp_path}/prose.txt, 540 training and 60 validation bytes"
    (tmp_path / "prose.txt").write_text("prose")
    with pytest.raises(InputError, match="fewer --devices"):
        load_data(run_of(path=str(tmp_path / "prose.txt")))


@pytest.mark.skipif(not CIFAR_ZIP.is_file(), reason="needs LTE_TEST_DATA, a folder with cifar10.zip")
def test_sixty_thousand_pictures_of_an_archive_are_read_in_place() -> None:
    found = image_source(Data(path=str(CIFAR_ZIP)))
    assert found is not None
    loaded = load_images(found, found.frame(32, 3, False))
    assert (len(loaded.train), len(loaded.validation), len(loaded.classes)) == (50_000, 10_000, 10)
    # CIFAR-10's published figures, of which JPEG's losses change little.
    assert loaded.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-4)
    assert loaded.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)
