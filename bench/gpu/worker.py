"""A process of `make gpu`: it measures the rows of a group one after the other, and reports each on a line of stdout.

    python -m bench.gpu.worker facts cuda
    python -m bench.gpu.worker rows cuda full FOLDER PART ROW...

It ends after a row that failed: memory that an exception holds, or a GPU whose context is lost, must not spoil the next
row, for which bench/gpu/__main__.py starts another process.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.backends import cudnn

from bench.gpu.rows import ROWS
from simulate.common.errors import InputError, first_line
from simulate.common.processor import machine_facts
from simulate.layers.accelerator import describe, refusal

MARK = "@@ "
"""Begins the lines for the caller; libraries print others."""


def report(**message: Any) -> None:
    """Tell the caller."""
    print(MARK + json.dumps(message), flush=True)


def facts(kind: str) -> dict[str, Any]:
    """Return what a figure depends on: processor, GPU, driver, versions. Raises InputError where it cannot train."""
    found: dict[str, Any] = {"processor": machine_facts()["processor"], "cores": os.cpu_count()}
    if kind != "cpu":
        device = torch.device(kind, 0)
        if reason := refusal(device):
            raise InputError(reason)
        card = describe(device)
        found |= {
            "GPU": card.name, "architecture": card.architecture, "memory_bytes": card.total_bytes,
            "driver": _driver(), "CUDA": torch.version.cuda or torch.version.hip, "cuDNN": cudnn.version(),
        }  # fmt: skip
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "bitsandbytes", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    """Return the driver's version, None where nvidia-smi does not tell."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def measure(device: str, size: str, folder: Path, part: str, names: Sequence[str]) -> None:
    """Measure rows by their names until one fails."""
    rows = {row.name: row for row in ROWS[part](size)}
    if device == "cpu" and size == "tiny":
        torch.set_num_threads(1)  # threads that wait for each other would take longer than the sums
    for name in names:
        row = rows[name]
        report(begin=name)
        started = time.monotonic()
        try:
            figures = import_module(f"bench.gpu.{row.module}").measure(row.arguments, torch.device(device), folder)
        except Exception as error:
            traceback.print_exc()
            report(failed=name, error=f"{type(error).__name__}: {first_line(error)}")
            return
        report(done=name, figures=figures, seconds=time.monotonic() - started)


def main() -> int:
    """Do what the command line says."""
    what, device, *more = sys.argv[1:]
    if what == "facts":
        try:
            report(facts=facts(device))
        except Exception as error:
            report(error=first_line(error))
        return 0
    size, folder, part, *names = more
    measure(device, size, Path(folder), part, names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
