"""STL-10's raw files: columns first, labels from 1, and errors for files that are cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data.images import load_images
from simulate.data.load import image_source
from simulate.data.stl10 import stl10_source
from tests.simulate.data.pictures import pixels


def write_stl10(root: Path, train: int = 4, test: int = 2) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", 0, train), ("test", train, test)):
        content = [pixels(number, 96, 96).transpose(2, 1, 0).tobytes() for number in range(first, first + count)]
        (root / f"{split}_X.bin").write_bytes(b"".join(content))
        (root / f"{split}_y.bin").write_bytes(bytes(1 + number % 10 for number in range(first, first + count)))
    return root


def test_pictures_are_read_upright_with_labels_from_0(tmp_path: Path) -> None:
    root = write_stl10(tmp_path / "stl10_binary")
    for path in (root, tmp_path):
        found = image_source(Data(path=str(path)))
        assert found is not None
        loaded = load_images(found, found.frame(None, None, False))
        assert loaded.labels.tolist() == [0, 1, 2, 3, 4, 5]
        assert loaded.held_out.tolist() == [False] * 4 + [True] * 2
        assert loaded.classes[:2] == ("airplane", "bird")
        for row in range(6):
            assert np.array_equal(loaded.pixels[row], pixels(row, 96, 96).transpose(2, 0, 1))


def refusal(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        stl10_source(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_missing_or_cut_short_are_named(tmp_path: Path) -> None:
    assert "holds no train_X.bin" in refusal(tmp_path)
    root = write_stl10(tmp_path / "stl")
    content = (root / "test_X.bin").read_bytes()
    (root / "test_X.bin").write_bytes(content[:-1])
    assert "test_X.bin has 55,295 bytes where 2 labels make 55,296" in refusal(root)
    (root / "test_X.bin").write_bytes(content)
    (root / "test_y.bin").write_bytes(bytes([1, 11]))
    assert "labels other than 1 to 10" in refusal(root)
    (root / "test_y.bin").unlink()
    assert "lacks test_y.bin" in refusal(root)
