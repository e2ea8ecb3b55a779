"""Checkpoints as the disk gets them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from simulate.methods.state import State
from simulate.training.checkpoints import Progress, list_checkpoints, save_checkpoint
from tests import tiny


def test_a_checkpoint_counts_only_once_all_of_it_is_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine that stops before a file is flushed must not leave one that looks whole."""
    run, seen = tiny.lte_run(), list[list[Path]]()
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            seen.append(list_checkpoints(tmp_path, run.cluster.devices))
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    state = State({"w": torch.ones(3)}, {device: {"a": torch.ones(2)} for device in range(run.cluster.devices)})
    path = save_checkpoint(tmp_path, run, "data", Progress(4, 0.0, 0.0, 0, 0, 0, 0.0, None), state)
    assert seen == [[]] * 4  # tensors and JSON of two parts
    assert list_checkpoints(tmp_path, run.cluster.devices) == [path]
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
