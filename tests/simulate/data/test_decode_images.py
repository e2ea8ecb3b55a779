"""Decoding: centre crops and sizes by hand, errors for unfit images, and the pool against one process."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simulate.data import decode_images as module
from simulate.data.cache import Draft
from simulate.data.decode_images import (
    FolderReader,
    Frame,
    SmallImageError,
    UnfitImageError,
    ZipReader,
    decode,
    decode_all,
    fit_array,
)
from tests.simulate.data.pictures import encoded, files_of, pixels, write_folder, write_zip


def test_a_picture_of_the_right_size_is_kept_to_the_pixel() -> None:
    picture = pixels(0, 6, 6)
    assert np.array_equal(decode(encoded(picture), Frame(6, 3)), picture.transpose(2, 0, 1))


def test_the_centre_square_is_taken() -> None:
    picture = pixels(0, 4, 10)
    assert np.array_equal(decode(encoded(picture), Frame(4, 3)), picture[:, 3:7].transpose(2, 0, 1))
    assert np.array_equal(decode(encoded(picture.transpose(1, 0, 2)), Frame(4, 3)), picture.transpose(2, 1, 0)[:, 3:7])


def test_halving_a_picture_of_constant_quarters_keeps_their_values() -> None:
    quarters = np.array([[[10], [50]], [[90], [130]]], np.uint8).repeat(40, 0).repeat(40, 1)
    small = decode(encoded(quarters), Frame(40, 1))[0]
    assert (small[0, 0], small[0, -1], small[-1, 0], small[-1, -1]) == (10, 50, 90, 130)
    # The bilinear filter of a halving reaches two pixels over an edge, each half as heavy as the one before.
    assert small[0, 18:22].tolist() == [10, 15, 45, 50]


def test_grey_and_colour_are_brought_to_each_other() -> None:
    grey = pixels(0, 5, 5, 1)
    assert np.array_equal(decode(encoded(grey), Frame(5, 3)), grey.transpose(2, 0, 1).repeat(3, 0))
    red = np.zeros((5, 5, 3), np.uint8)
    red[..., 0] = 255
    assert (decode(encoded(red), Frame(5, 1)) == 76).all()  # 0.299 · 255, as ITU-R BT.601 weighs red


def test_a_small_picture_is_refused_or_enlarged() -> None:
    content = encoded(pixels(0, 5, 9))
    with pytest.raises(SmallImageError, match="has 9 x 5 pixels, fewer than 8"):
        decode(content, Frame(8, 3))
    assert decode(content, Frame(8, 3, upscale=True)).shape == (3, 8, 8)


def test_sixteen_bits_a_colour_are_refused_and_not_cut() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(UnfitImageError, match=r"I;16.*not 8 bits"):
        decode(buffer.getvalue(), Frame(8, 1))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        encoded(pixels(0))[:100],
        encoded(pixels(0, 64, 64), "JPEG")[:600],
        encoded(pixels(0))[:60] + b"\x00" * 40 + encoded(pixels(0))[100:],
    ],
    ids=["nothing", "text", "cut png", "cut jpeg", "overwritten png"],
)
def test_damage_is_told(content: bytes) -> None:
    with pytest.raises(UnfitImageError, match="cannot be decoded"):
        decode(content, Frame(8, 3))


@pytest.mark.parametrize("colours", [1, 3])
def test_cameras_pictures_stand_upright(colours: int) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # white above, black below
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x112] = 6  # "turn me by 90 degrees clockwise"
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", quality=95, exif=exif)
    for size in (16, 8):  # at full and at a smaller scale
        seen = decode(buffer.getvalue(), Frame(size, colours))
        assert seen[:, : size // 2 - 1].min() > 240 and seen[:, size // 2 + 1 :].max() < 15


def test_a_broken_exif_block_is_no_traceback() -> None:
    picture = Image.fromarray(pixels(1, 16, 16))
    for block in (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0",
    ):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", exif=block)
        with contextlib.suppress(UnfitImageError):
            assert decode(buffer.getvalue(), Frame(16, 3)).shape == (3, 16, 16)


def test_colours_of_sixteen_bits_are_refused_though_their_mode_says_eight() -> None:
    # Pillow writes no such files: a PNG and a PPM of one pixel, by hand.
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, row = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0" + b"\1\2" * 3)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    for content in (png, b"P6\n1 1\n65535\n" + b"\1\2" * 3):
        with pytest.raises(UnfitImageError, match="not 8 bits a colour"):
            decode(content, Frame(1, 3))
    assert decode(b"P6\n1 1\n255\n\1\2\3", Frame(1, 3)).ravel().tolist() == [1, 2, 3]


def test_arrays_are_fitted_like_files() -> None:
    picture = pixels(0, 12, 20)
    assert np.array_equal(fit_array(picture.transpose(2, 0, 1), Frame(6, 1)), decode(encoded(picture), Frame(6, 1)))
    with pytest.raises(SmallImageError):
        fit_array(picture.transpose(2, 0, 1), Frame(16, 3))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_pool_does_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    files = files_of({"a": 30})
    files["a/7.png"], files["a/21.png"] = b"damaged", encoded(pixels(0, 4, 4))
    reader = (
        FolderReader(write_folder(tmp_path / "pictures", files))
        if kind == "folder"
        else ZipReader(write_zip(tmp_path / "pictures.zip", files))
    )
    names = sorted(files, key=lambda name: int(Path(name).stem))
    results = []
    for pool_from in (10**9, 0):
        monkeypatch.setattr(module, "POOL_FROM_IMAGES", pool_from)
        monkeypatch.setattr(module, "CHUNK_IMAGES", 9)
        monkeypatch.setattr(module, "usable_workers", lambda tasks: 2)
        place = Draft(tmp_path / f"out {pool_from}").allocate({"x": ("u1", (30, 3, 8, 8))}, {})["x"]
        unfit = decode_all(reader, names, Frame(8, 3), place)
        assert {index: type(error) for index, error in unfit.items()} == {7: UnfitImageError, 21: SmallImageError}
        results.append(np.array(place.open()))
    assert np.array_equal(results[0], results[1])
    for index in set(range(30)) - {7, 21}:
        assert np.array_equal(results[0][index], decode(files[names[index]], Frame(8, 3)))


SCRIPT = """
import pathlib, sys
import simulate.data.decode_images as module
from simulate.data.cache import Draft
module.POOL_FROM_IMAGES, module.CHUNK_IMAGES, module.usable_workers = 0, 1, lambda tasks: 2
with open("starts", "a") as file:
    file.write("x")
place = Draft(pathlib.Path("out")).allocate({"x": ("u1", (2, 3, 8, 8))}, {})["x"]
reader = module.FolderReader(pathlib.Path("pictures"))
print(module.decode_all(reader, ["a/0.png", "a/1.png"], module.Frame(8, 3), place))
"""


def test_workers_do_not_run_the_callers_script_again(tmp_path: Path) -> None:
    """A script needs no `if __name__ == "__main__":` around what it trains."""
    write_folder(tmp_path / "pictures", files_of({"a": 2}))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("{}\n", "")
    assert (tmp_path / "starts").read_text() == "x"


def test_a_worker_that_ends_early_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL_FROM_IMAGES", 0)
    monkeypatch.setattr(module, "CHUNK_IMAGES", 1)
    monkeypatch.setattr(module, "usable_workers", lambda tasks: 2)
    monkeypatch.setattr(module, "WORKER", "import sys; sys.stdin.buffer.read(); sys.exit(7)")
    place = Draft(tmp_path / "out").allocate({"x": ("u1", (2, 3, 8, 8))}, {})["x"]
    reader = FolderReader(write_folder(tmp_path / "pictures", files_of({"a": 2})))
    with pytest.raises(RuntimeError, match="ended with code 7"):
        decode_all(reader, ["a/0.png", "a/1.png"], Frame(8, 3), place)


def test_a_file_that_went_away_and_a_wrong_checksum_are_told(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pictures.zip", files_of({"a": 1}))
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    place = Draft(tmp_path / "out").allocate({"x": ("u1", (1, 3, 8, 8))}, {})["x"]
    assert "cannot be read (Bad CRC-32" in str(decode_all(ZipReader(path), ["a/0.png"], Frame(8, 3), place)[0])
    assert "cannot be read" in str(decode_all(FolderReader(tmp_path), ["gone.png"], Frame(8, 3), place)[0])
