"""Checkpoints: safetensors and JSON, never pickle; each part is written whole or not at all.

checkpoints/step-N/ has parts: `state` holds the tensors that all devices share, `devices-A-B` those that devices A to
B−1 have for themselves. A process writes the parts that it holds; a checkpoint is whole once every device has a part.
The files of a part are flushed to disk and renamed one after the other, the JSON last: it holds digests of the tensors
and of the run, so that a damaged file or another run's checkpoint is refused instead of loaded. A checkpoint begins by
handing its tensors to the operating system, and is completed without them: training goes on meanwhile
(simulate.training.saving). The training loop saves and loads; simulate.launch.recovery reads the parts that single
nodes have; `lte export` reads the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulate.common.errors import InputError
from simulate.common.run_files import EXTENDED_FILE, RUN_FILE
from simulate.config.profiles import EMBEDDED
from simulate.config.run import Run, run_fingerprint
from simulate.methods.state import State

if TYPE_CHECKING:  # listing checkpoints must not cost torch's import
    from torch import Tensor

CHECKPOINT_VERSION = 2
NUMERICS = 2
"""Counts mistakes that were mended in what a run computes from the same tensors; a checkpoint without it has 1.

1: on CPUs with AVX-512, NF4 weights whose width 16 divides and 64 does not were unpacked with other blocks' scales."""
KEEP = 2
"""Number of the newest whole checkpoints that are kept: the disk could damage one."""
CHUNK_BYTES = 2**20
"""Bytes of a file that are read at a time for its digest."""
SHARED = "state"
_PART = re.compile(r"devices-(\d+)-(\d+)\.json")


@dataclass(frozen=True)
class Progress:
    """Everything but tensors that the next step depends on."""

    step: int
    """Steps done."""
    compute_s: float
    """Seconds of computing on the simulated clock; so are the next and `pause_s`."""
    exchange_s: float
    """Seconds of waiting for exchanges."""
    sent_bytes: int
    received_bytes: int
    messages: int
    wall_s: float
    """Measured seconds of training so far, over all sessions."""
    val_loss: float | None
    link_free_s: float = 0.0
    """Time on the simulated clock from which the link is free."""
    pause_s: float = 0.0
    """Seconds of evaluations and checkpoints."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step-{step:08d}"


@dataclass(frozen=True)
class BegunCheckpoint:
    """A checkpoint whose tensors are with the operating system, but which does not count before `complete`."""

    path: Path
    parts: tuple[str, ...]
    """Names of its parts, in the order in which they are completed."""
    about: Mapping[str, Any]

    def complete(self) -> Path:
        """Flush the parts to the disk and give them their names; returns the path. Raises OSError.

        It reads files alone, no tensor, so that training may change all of them meanwhile.
        """
        # Shared tensors last: while their part is missing, no reader takes the checkpoint for a whole one.
        try:
            for name in self.parts:
                _complete_part(self.path, name, self.about)
        except BaseException:
            _remove_parts(self.path, self.parts)
            raise
        _flush(self.path.parent)  # its own entry, or a crash could lose the name of a checkpoint that is written
        return self.path


def begin_checkpoint(
    folder: Path, run: Run, data_fingerprint: str, progress: Progress, state: State, with_shared: bool = True
) -> BegunCheckpoint:
    """Hand this process's parts of checkpoints/step-N to the operating system. Raises OSError where the disk refuses.

    Of several processes that write into one folder, only one writes the shared part, with `with_shared`.
    """
    target = checkpoint_path(folder, progress.step)
    target.mkdir(parents=True, exist_ok=True)
    about = {
        "version": CHECKPOINT_VERSION,
        "numerics": NUMERICS,
        "run": run_fingerprint(run),
        "data": data_fingerprint,
        "progress": asdict(progress),
    }
    parts: dict[str, Mapping[str, Tensor]] = {}
    if state.of_devices:
        name = f"devices-{min(state.of_devices)}-{max(state.of_devices) + 1}"
        parts[name] = {f"{device}/{key}": t for device, own in state.of_devices.items() for key, t in own.items()}
    if with_shared:
        parts[SHARED] = state.shared
    try:
        for name, tensors in parts.items():
            _begin_part(target, name, tensors)
    except BaseException:
        _remove_parts(target, parts)
        raise
    return BegunCheckpoint(target, tuple(parts), about)


def save_checkpoint(
    folder: Path, run: Run, data_fingerprint: str, progress: Progress, state: State, with_shared: bool = True
) -> Path:
    """Write this process's parts of a checkpoint, and return once they are on the disk; as `begin_checkpoint`."""
    return begin_checkpoint(folder, run, data_fingerprint, progress, state, with_shared).complete()


def _remove_parts(path: Path, parts: Iterable[str]) -> None:
    """Remove parts that are not whole, which also makes room on a full disk."""
    for name in parts:
        for file in (path / f"{name}.json", path / f"{name}.safetensors"):
            file.unlink(missing_ok=True)
            _scratch(file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other processes' parts are there
        path.rmdir()


def prune(folder: Path, devices: Iterable[int], ever: Iterable[int] = ()) -> None:
    """Remove all but the newest checkpoints that hold these devices, and older ones that were never finished.

    `devices` are all whose processes write into this folder: in a node's own folder, the node's devices. `ever` names
    those that are away, too: the newest part of each is kept until it is back.
    """
    whole, away = _with_devices(folder, devices)[-KEEP:], set(ever) - set(devices)
    kept = {newest_with(folder, [device]) for device in away}
    for path in folder.glob("step-*"):
        # A newer one that is not whole may be being written by other processes.
        if whole and path not in whole and path not in kept and path < whole[-1]:
            shutil.rmtree(path, ignore_errors=True)


def write_part(folder: Path, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write one part of a checkpoint to the disk: its tensors, then the JSON, without which it counts as missing."""
    _begin_part(folder, name, tensors)
    _complete_part(folder, name, about)


def _begin_part(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a part's tensors to a scratch file, whose content may wait in the system's memory for the disk."""
    from simulate.common.safetensors_writer import write_tensors

    # Else the JSON of an earlier attempt could stand beside the tensors of this one.
    (folder / f"{name}.json").unlink(missing_ok=True)
    scratch = _scratch(folder / f"{name}.safetensors")
    try:
        with scratch.open("wb") as file:
            write_tensors(file, tensors)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _complete_part(folder: Path, name: str, about: Mapping[str, Any]) -> None:
    """Flush and name a part's tensors, and then write its JSON."""
    file = folder / f"{name}.safetensors"
    # Read back, mostly out of the system's memory: the digest takes as long as writing, and holds up nobody here.
    num_bytes, digest = _digest_of(_scratch(file))
    _settle(file)
    meta = {**about, "tensors_bytes": num_bytes, "tensors_sha256": digest}
    described = folder / f"{name}.json"
    _scratch(described).write_bytes(json.dumps(meta, indent=1).encode())
    _settle(described)


def _scratch(path: Path) -> Path:
    """Return the name that a file of this process has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _settle(path: Path) -> None:
    """Flush a file that was written under its scratch name, and give it its own."""
    # Content before name, and then the folder's entry: after a power cut the name never stands for half a file.
    scratch = _scratch(path)
    try:
        _flush(scratch)
        scratch.replace(path)
        _flush(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):  # Windows opens no folder, and flushes no file opened for reading
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(folder: Path, devices: int) -> list[Path]:
    """Return the whole checkpoints of a run with that many devices, oldest first."""
    return _with_devices(folder, range(devices))


def data_of(path: Path) -> str:
    """Return the fingerprint of the data that a checkpoint was trained on; raises InputError where it is damaged."""
    return str(_read_meta(path, SHARED)["data"])


def numerics_of(path: Path) -> int:
    """Return the NUMERICS that a checkpoint's parts were trained with; raises InputError where one is damaged."""
    return min(_read_meta(path, file.stem)["numerics"] for file in path.glob("*.json"))


def newest_with(folder: Path, devices: Iterable[int]) -> Path | None:
    """Return the newest checkpoint that has the parts of these devices, None without any."""
    found = (p for p in folder.glob("step-*") if set(saved_devices(p)) >= set(devices))
    return max(found, default=None)


def _with_devices(folder: Path, devices: Iterable[int]) -> list[Path]:
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    return [path for path in found if has_shared(path) and set(saved_devices(path)) >= set(devices)]


def has_shared(path: Path) -> bool:
    """Whether a checkpoint holds the shared part."""
    return (path / f"{SHARED}.json").is_file()


def saved_devices(path: Path) -> dict[int, str]:
    """Return the devices that a checkpoint holds, each with the name of its part."""
    parts = (_PART.fullmatch(file.name) for file in sorted(path.glob("devices-*.json")))
    return {
        device: match[0].removesuffix(".json")
        for match in parts
        if match
        for device in range(int(match[1]), int(match[2]))
    }


def load_checkpoint(
    path: Path, run: Run, data_fingerprint: str, devices: Iterable[int], with_shared: bool = True
) -> tuple[Progress | None, State]:
    """Read the parts of `devices`, and the shared one.

    The progress is None where the checkpoint holds none of the parts asked for. Raises InputError where a part is
    damaged, or of another run or other data.
    """
    state, progress, parts = State(), None, saved_devices(path)
    for part in sorted({parts[device] for device in devices if device in parts}):
        progress, tensors = _read_part(path, part, run, data_fingerprint)
        for key, tensor in tensors.items():
            owner, _, name = key.partition("/")
            if int(owner) in devices:
                state.of_devices.setdefault(int(owner), {})[name] = tensor
    for device in set(devices) & set(parts):  # a device without tensors of its own is held, too
        state.of_devices.setdefault(device, {})
    if with_shared:
        progress, shared = _read_part(path, SHARED, run, data_fingerprint)
        state.shared.update(shared)
    return progress, state


def _read_part(path: Path, part: str, run: Run, data_fingerprint: str) -> tuple[Progress, dict[str, Tensor]]:
    from safetensors.torch import load_file

    meta, file = _read_meta(path, part), path / f"{part}.safetensors"
    num_bytes, digest = _digest_of(file)
    retry = f"remove {path} to resume from the checkpoint before it"
    # Size before digest: a truncated file is the usual damage, and its message names how much is missing.
    if num_bytes != meta["tensors_bytes"]:
        size = f"has {num_bytes:,} of {meta['tensors_bytes']:,} bytes"
        raise InputError(f"{file} is truncated: it {size}; {retry}")
    if digest != meta["tensors_sha256"]:
        raise InputError(f"{file} is damaged: its digest is not the one that was saved; {retry}")
    # Another version of lte, with further keys or another order, may write the same run differently; the run's own
    # run.toml is the one that the checkpoint was saved with.
    if meta["run"] not in accepted_runs(run, path.parent.parent):
        raise InputError(
            f"{path} is a checkpoint of another run: run.toml differs, or another version of lte wrote it; "
            "restore it, or start anew in --out"
        )
    if meta["data"] != data_fingerprint:
        raise InputError(f"{path} was trained on other data: it has changed since; restore it, or start anew")
    return Progress(**meta["progress"]), load_file(file)


def accepted_runs(run: Run, folder: Path) -> set[str]:
    """Return the digests of run.toml that checkpoints of a run folder may have: its own, and those with fewer steps."""
    earlier = folder / EXTENDED_FILE
    known = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else []
    return {run_fingerprint(run), _digest_of_run(folder / RUN_FILE), *known}


def _digest_of_run(path: Path) -> str:
    """Return the SHA-256 of a run.toml without the profile that it embeds, which fingerprints leave out."""
    text = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(text.partition(f"\n[{EMBEDDED}]\n".encode())[0]).hexdigest()


def _digest_of(path: Path) -> tuple[int, str]:
    """Return a file's number of bytes and their SHA-256, reading a chunk at a time; 0 bytes where it is missing."""
    num_bytes, digest = 0, hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def _read_meta(path: Path, part: str) -> dict[str, Any]:
    try:
        meta = json.loads((path / f"{part}.json").read_text(encoding="utf-8"))
        if meta["version"] != CHECKPOINT_VERSION:
            version = f"{path} has version {meta['version']}, this lte reads {CHECKPOINT_VERSION}"
            raise InputError(f"{version}; use the lte that wrote it")
        Progress(**meta["progress"])  # raises TypeError where a key is missing or unknown
        known = {key: meta[key] for key in ("run", "data", "tensors_bytes", "tensors_sha256", "progress")}
        return {**known, "numerics": int(meta.get("numerics", 1))}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise InputError(
            f"{path / part}.json is missing or damaged; remove {path} to resume from the checkpoint before it"
        ) from None
