"""CIFAR batches: read as published; pickles with anything but arrays are refused and not executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data.cifar import cifar_source
from simulate.data.images import load_images
from simulate.data.load import image_source

NAMES = [b"airplane", b"automobile", b"bird"]


def batch(number: int, images: int = 4, key: bytes = b"labels") -> dict[bytes, Any]:
    content = np.random.default_rng(number).integers(0, 256, (images, 3072), np.uint8)
    return {b"data": content, key: [(number + index) % 3 for index in range(images)], b"filenames": [b"x.png"] * images}


def write(path: Path, value: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


def write_cifar10(root: Path, protocol: int = 2) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    write(root / "batches.meta", {b"label_names": NAMES, b"num_vis": 3072}, protocol)
    for number in range(1, 6):
        write(root / f"data_batch_{number}", batch(number), protocol)
    write(root / "test_batch", batch(6), protocol)
    return root


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_10_is_read_as_published(tmp_path: Path, protocol: int) -> None:
    root = write_cifar10(tmp_path / "data" / "cifar-10-batches-py", protocol)
    for path in (root, root.parent):
        found = image_source(Data(path=str(path)))
        assert found is not None
        loaded = load_images(found, found.frame(None, None, False))
        assert loaded.classes == ("airplane", "automobile", "bird")
        assert (len(loaded.train), len(loaded.validation)) == (20, 4)
        for row in range(24):
            expected = batch(row // 4 + 1)
            # A row of the published array is red, green and blue, each row by row.
            assert loaded.pixels[row].tobytes() == expected[b"data"][row % 4].tobytes()
            assert loaded.labels[row] == expected[b"labels"][row % 4]


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    # As numpy wrote it there: the older module's name, and bytes where text is now.
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    state = (
        b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'"
        + b"a" * 3072
        + b"'\ntb"
    )
    root = write_cifar10(tmp_path / "cifar")
    (root / "test_batch").write_bytes(b"(dS'data'\n" + array + state + b"sS'labels'\n(lI2\nas.")
    found = cifar_source(root)
    assert found.labels[-1] == 2 and found.held_out.sum() == 1
    loaded = load_images(found, found.frame(None, None, False))
    assert (loaded.pixels[-1] == ord("a")).all()


def test_cifar_100_has_its_fine_classes(tmp_path: Path) -> None:
    write(tmp_path / "meta", {b"fine_label_names": NAMES, b"coarse_label_names": [b"vehicle"]})
    for number, name in enumerate(("train", "test")):
        write(tmp_path / name, batch(number, key=b"fine_labels") | {b"coarse_labels": [0] * 4})
    found = image_source(Data(path=str(tmp_path)))
    assert found is not None and found.classes == ("airplane", "automobile", "bird")
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


class Attack:
    """An object that runs a command when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["batches.meta", "data_batch_3"])
def test_a_pickle_that_runs_something_is_refused_before_it_does(tmp_path: Path, place: str, protocol: int) -> None:
    root, trace = write_cifar10(tmp_path / "cifar"), tmp_path / "trace"
    for call in (os.mkdir, eval, exec):
        argument = str(trace) if call is os.mkdir else f"__import__('os').mkdir({str(trace)!r})"
        write(root / place, {b"data": Attack(call, argument)}, protocol)
        with pytest.raises(InputError, match=f"{place} is not loaded: it names .*which is no array"):
            cifar_source(root)
    write(root / place, Attack(np.load, "/etc/passwd"), protocol)
    with pytest.raises(InputError, match="which is no array"):
        cifar_source(root)
    assert not trace.exists()


def test_the_attack_works_where_pickles_are_trusted(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(os.mkdir, str(tmp_path / "trace"))))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("batches.meta", {b"num_vis": 3}, "no list 'label_names'"),
        ("data_batch_2", [1], "it holds a list"),
        ("data_batch_2", {b"labels": [1]}, "no pixels of 3072 bytes"),
        ("data_batch_2", {b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 1]}, "no pixels of 3072 bytes"),
        ("data_batch_2", batch(1) | {b"labels": [0]}, "no whole number for each image"),
        ("test_batch", batch(1) | {b"labels": [0, 1, 2, 3]}, "label 3, but there are 3 classes"),
    ],
)
def test_what_is_no_batch_is_named(tmp_path: Path, place: str, value: Any, words: str) -> None:
    root = write_cifar10(tmp_path / "cifar")
    write(root / place, value)
    with pytest.raises(InputError, match=words) as caught:
        cifar_source(root)
    assert place in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_or_missing_batch_is_named(tmp_path: Path) -> None:
    root = write_cifar10(tmp_path / "cifar")
    path = root / "data_batch_4"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"data_batch_4 is (damaged|not loaded)"):
        cifar_source(root)
    path.unlink()
    with pytest.raises(InputError, match="data_batch_4 cannot be read"):
        cifar_source(root)


def test_a_folder_that_is_said_to_be_cifar_must_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no CIFAR batches"):
        image_source(Data(path=str(tmp_path), format="cifar"))
