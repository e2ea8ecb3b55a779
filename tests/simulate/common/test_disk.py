"""Room that is asked for before a mapped file is written: a full disk is one line, and not a killed process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simulate.common.disk import reserve
from simulate.common.errors import InputError
from simulate.layers.quantized import mapped_zeros


def failing(number: int) -> Callable[[int, int, int], None]:
    def fail(handle: int, offset: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_room_is_reserved_and_reads_as_zeros(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w+b") as file:
        reserve(file.fileno(), 5000)
        assert file.read() == bytes(5000)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 5000


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_reserve_nothing_serve_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    with (tmp_path / "a").open("w+b") as file:
        reserve(file.fileno(), 5000)
        assert file.read() == bytes(5000)


def test_a_full_tmpdir_is_named_with_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert mapped_zeros(10, torch.float32).tolist() == [0] * 10
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(InputError, match=rf"TMPDIR: {tmp_path}.* 4,000 bytes more \(No space left.*export TMPDIR="):
        mapped_zeros(1000, torch.float32)


def test_a_machine_without_any_temporary_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setenv("TMPDIR", "/gone")
    with pytest.raises(InputError, match=r"TMPDIR: /gone.*export TMPDIR=FOLDER"):
        mapped_zeros(10, torch.float32)
