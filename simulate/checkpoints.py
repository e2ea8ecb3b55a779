"""Checkpoints: safetensors and JSON, never pickle; whole or not there at all.

A checkpoint is written into a hidden folder, flushed to disk and renamed. Its JSON holds the tensors' digest and the
run's, so that a damaged file or somebody else's checkpoint is refused instead of loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulate.config import Run, dump_run
from simulate.errors import InputError

if TYPE_CHECKING:  # listing checkpoints must not cost torch's import
    from torch import Tensor

CHECKPOINT_VERSION = 1
KEEP = 2
"""The newest checkpoints that are kept: one could be damaged by the disk."""
_TENSORS, _META = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """Everything but tensors that the next step depends on."""

    step: int
    """Steps done."""
    compute_s: float
    exchange_s: float
    sent_bytes: int
    received_bytes: int
    messages: int
    wall_s: float
    """Measured seconds of training so far, over all sessions."""
    val_loss: float | None
    link_free_s: float = 0.0
    """Moment of the simulated clock from which the link is free."""


def run_fingerprint(run: Run) -> str:
    """Return a digest of everything that run.toml says."""
    return hashlib.sha256(dump_run(run).encode()).hexdigest()


def save_checkpoint(
    folder: Path, run: Run, data_fingerprint: str, progress: Progress, state: dict[str, Tensor]
) -> Path:
    """Write checkpoints/step-N and drop older ones; returns its path. Raises OSError where the disk refuses."""
    from safetensors.torch import save

    name = f"step-{progress.step:08d}"
    scratch, target = folder / f".{name}.partial", folder / name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        tensors = scratch / _TENSORS
        # Written by Python, since safetensors' own writer does not raise OSError when the disk is full.
        content = save({key: value.cpu().contiguous() for key, value in state.items()})
        tensors.write_bytes(content)
        meta = {
            "version": CHECKPOINT_VERSION,
            "run": run_fingerprint(run),
            "data": data_fingerprint,
            "tensors_bytes": len(content),
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
            "progress": asdict(progress),
        }
        (scratch / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (tensors, scratch / _META, scratch):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path, run: Run, data_fingerprint: str) -> tuple[Progress, dict[str, Tensor]]:
    """Read a checkpoint; raises InputError where it is damaged, or belongs to another run or other data."""
    from safetensors.torch import load

    meta = _read_meta(path)
    content = (path / _TENSORS).read_bytes() if (path / _TENSORS).is_file() else b""
    retry = f"remove {path} to resume from the checkpoint before it"
    if len(content) != meta["tensors_bytes"]:
        size = f"has {len(content):,} of {meta['tensors_bytes']:,} bytes"
        raise InputError(f"{path / _TENSORS} is truncated: it {size}; {retry}")
    if hashlib.sha256(content).hexdigest() != meta["tensors_sha256"]:
        raise InputError(f"{path / _TENSORS} is damaged: its digest is not the one that was saved; {retry}")
    if meta["run"] != run_fingerprint(run):
        raise InputError(f"{path} is a checkpoint of another run: run.toml differs; restore it, or start anew in --out")
    if meta["data"] != data_fingerprint:
        raise InputError(f"{path} was trained on other data: it has changed since; restore it, or start anew")
    return Progress(**meta["progress"]), load(content)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        if meta["version"] != CHECKPOINT_VERSION:
            version = f"{path} has version {meta['version']}, this lte reads {CHECKPOINT_VERSION}"
            raise InputError(f"{version}; use the lte that wrote it")
        Progress(**meta["progress"])
        return {key: meta[key] for key in ("run", "data", "tensors_bytes", "tensors_sha256", "progress")}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise InputError(
            f"{path / _META} is missing or damaged; remove {path} to resume from the checkpoint before it"
        ) from None
