"""Rows of `make gpu` on the accelerator made of Python: a tensor that stays on the CPU by mistake raises there.

python -m tests.fakegpu.gpu_rows    prints the part of each row that ran

Figures mean nothing here, since the device has no numbers, no clock and no memory.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench.gpu.rows import ROWS
from simulate.measure import fake_tensors
from tests.fakegpu.device import NAME, OnTheDevice, register

CHOSEN = (
    "lte, bf16",
    "the allocator's rules, made-up requests",
    "gpt2 lte rank 64, batch 4",
    "one layer, 8 x rank 64, fp32",
    "gpt2 lte, 8 x rank 64, bf16",
    "lte, 8 x rank 64",
)
TRACKED = fake_tensors.Tracked(100, {}, {}, 1000, 0)


def main() -> None:
    """Measure the chosen rows."""
    module = register()
    module.__dict__.update(
        empty_cache=lambda: None, memory_reserved=lambda device: 100, max_memory_reserved=lambda device: 1000
    )
    torch.set_num_threads(1)
    rows = {row.name: row for rows_of in ROWS.values() for row in rows_of("tiny")}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # It has fake tensors of its own, which are the CPU's on any machine.
        patch.setattr(fake_tensors, "tracked_memory", lambda run, with_host: TRACKED)
        for name in CHOSEN:
            row = rows[name]
            with OnTheDevice() as mode:
                import_module(f"bench.gpu.{row.module}").measure(row.arguments, torch.device(NAME, 0), Path(folder))
            assert mode.operations, name
            print(row.part, flush=True)


if __name__ == "__main__":
    main()
