"""Part `resume`: run folders of an earlier tree, stopped after half their steps, which this tree must finish alike.

They lie in figures/stopped.tar.xz as a kill leaves them: the checkpoint of step 12, and events up to step 14. The end
that they are held to is that of the earlier tree, which was not stopped: to the bit on the processor that recorded, to
1e-12 on others.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.frozen.command import lte, scratch_folder
from tests.frozen.compare import FIGURES, differences, processor
from tests.frozen.runs import (
    FP64,
    GPT,
    IMAGES,
    MIXER,
    PAPER,
    RELORA,
    STEPS,
    VIT,
    Table,
    figures,
    read_events,
    run,
    write_run,
)

ARCHIVE = FIGURES / "stopped.tar.xz"
SAVED, REPORTED = STEPS // 2, STEPS // 2 + 2
"""Steps of the checkpoint that is left, and of the last event before the kill."""
FLOOR = 1e-10
"""Of norms: where gradients are zero in theory, as of biases before a softmax, there is nothing but rounding."""
SMALL = {"width": 8, "layers": 1}
STOPPED: dict[str, Table] = {
    "lte nf4": run({**PAPER, "quantize": "nf4", "reset": "ab"}, {"name": "tests.frozen.networks:Perceptron", **IMAGES}),
    "local-sgd moments": run(
        {"name": "local-sgd", "merge_every": 4, "merge_optimizer": "average"}, {**VIT, **SMALL}
    ),
    "powersgd": run({"name": "powersgd", "rank": 2}, {**MIXER, **SMALL}),
    "relora": run(RELORA, {**GPT, **SMALL, "width": 4}),
}  # fmt: skip
for _table in STOPPED.values():
    _table["cluster"]["devices"] = 2
    _table["train"]["checkpoint_every"] = SAVED


def record(pool: Executor) -> dict[str, Any]:
    """Train to the end, keep the folders as of the middle, and return the ends."""
    ends, folders = {}, {}
    for name, (end, folder) in zip(STOPPED, pool.map(train_and_stop, STOPPED.values()), strict=True):
        ends[name], folders[name] = end, folder
    ARCHIVE.write_bytes(_packed(folders))
    return {"processor": processor(), "runs": ends}


def check(recorded: dict[str, Any], pool: Executor) -> list[str]:
    """Finish the stopped runs, and return the differences."""
    tolerance = 0.0 if recorded["processor"] == processor() else FP64
    found = []
    for name, end in zip(recorded["runs"], pool.map(resume, recorded["runs"]), strict=True):
        found += [f"{name}: {line}" for line in end_differences(recorded["runs"][name], end, tolerance)]
    return found


def end_differences(recorded: Table, now: Table, tolerance: float) -> Iterator[str]:
    """Yield where a resumed run ends otherwise than the one that was not stopped."""
    yield from differences(recorded["figures"]["counted"], now["figures"]["counted"], 0.0, "counted")
    for part in ("clocked", "losses"):
        yield from differences(recorded["figures"][part], now["figures"][part], tolerance, part)
    for name, tensor in recorded["tensors"].items():
        other = now["tensors"].get(name)
        if tolerance and other:
            tensor, other = ({k: v for k, v in each.items() if k != "sha256"} for each in (tensor, other))
        yield from differences(tensor, other, tolerance, f"checkpoint {name}", FLOOR if tolerance else 0.0)


def train_and_stop(table: Table) -> tuple[Table, dict[str, bytes]]:
    """Train to the end, in a worker; returns it, and the folder's files as a kill in the middle leaves them."""
    with scratch_folder() as folder:
        write_run(folder / "run.toml", table)
        lte("train", "run.toml", "--out", "out", "--device", "cpu", "--quiet")
        end, out = end_of(folder / "out"), folder / "out"
        shutil.rmtree(out / f"checkpoints/step-{STEPS:08d}")
        shutil.rmtree(out / "tensorboard")
        told = [event for event in read_events(out) if event["step"] <= REPORTED]
        (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told), encoding="utf-8")
        files = sorted(path for path in out.rglob("*") if path.is_file())
        return end, {str(path.relative_to(out)): path.read_bytes() for path in files}


def resume(name: str) -> Table:
    """Finish a stopped run, in a worker, and return its end."""
    with scratch_folder() as folder:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        lte("train", name, "--resume", "--device", "cpu", "--quiet")
        return end_of(folder / name)


def end_of(folder: Path) -> Table:
    """Return a finished run's figures, and every tensor of its last checkpoint in short."""
    parts = sorted((folder / f"checkpoints/step-{STEPS:08d}").glob("*.safetensors"))
    tensors = {f"{part.stem}/{name}": _in_short(t) for part in parts for name, t in sorted(load_file(part).items())}
    return {"figures": figures(read_events(folder)), "tensors": tensors}


def _in_short(tensor: np.ndarray[Any, Any]) -> Table:
    """Return a digest for equal bits, and the norm and a weighted sum of magnitudes for nearly equal ones."""
    values = np.abs(tensor.astype(np.float64).ravel())
    return {
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "norm": float(np.linalg.norm(values)),
        "weighted": float(values @ np.linspace(1, 2, len(values))),
        "sha256": hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()[:12],
    }


def _packed(folders: dict[str, dict[str, bytes]]) -> bytes:
    """Return folders as an archive without times and owners."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9) as archive:
        for name, files in folders.items():
            for place, content in files.items():
                entry = tarfile.TarInfo(f"{name}/{place}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
